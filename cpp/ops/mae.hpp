// SPDX-License-Identifier: MIT
// mae: L = (1/n) Σ |y - f|, whose minimiser is the median.
// gradient    sign(f - y) / n; 0 at the kink
// second      0, at the kink too
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Mae {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V) {
        const V d = f - y;
        return {abs(d), select(d == V{}, V{}, select(d == d, copysign(splat<V>(1), d), d))};
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V, V) {
        return V{};
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Mae>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Mae>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
