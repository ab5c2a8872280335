// SPDX-License-Identifier: MIT
// pinball: L = (1/n) Σ max(q d, (q - 1) d), d = y - f, whose minimiser is the quantile q of y.
// gradient    -q where d > 0, 1 - q where d < 0, over n; 0 at the kink. Source: Koenker and Bassett, Econometrica 46, 1978
// second      0, at the kink too
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Pinball {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V quantile) {
        const V d = y - f;
        const V slope = select(d > V{}, quantile, select(d < V{}, quantile - 1, select(d == d, V{}, d)));
        return {select(d == V{}, V{}, slope * d), -slope};
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V, V) {
        return V{};
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Pinball>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Pinball>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
