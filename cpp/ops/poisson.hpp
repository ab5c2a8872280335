// SPDX-License-Identifier: MIT
// poisson: L = (1/n) Σ e^f - y f, the negative log-likelihood of counts y with log rate f, without the constant log y!.
// gradient    (e^f - y) / n
// second      e^f / n
// limits      inf at f = inf; 0 at f = -inf, y = 0
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Poisson {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V) {
        const V rate = exp(f), infinity = splat<V>(__builtin_inf());
        const V value = rate - select(y == V{}, select(f == f, V{}, f), y * f);
        return {select(rate == infinity, infinity, value), rate - y};
    }
    template <class V>
    CHAINRULE_INLINE V second(V f, V, V) {
        return exp(f);
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Poisson>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Poisson>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
