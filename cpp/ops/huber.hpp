// SPDX-License-Identifier: MIT
// huber: L = (1/n) Σ h(f - y), h(d) = ½ d² where |d| <= δ, else δ (|d| - ½ δ): squares for small errors, linear for outliers.
// gradient    d clamped to [-δ, δ], over n. Source: Huber, Ann. Math. Statist. 35, 1964
// second      1 / n where |d| <= δ, else 0
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Huber {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V delta) {
        const V d = f - y, a = abs(d);
        const V inside = select(a > delta, copysign(delta, d), d);
        return {select(a > delta, delta * (a - splat<V>(0.5) * delta), splat<V>(0.5) * d * d), inside};
    }
    template <class V>
    CHAINRULE_INLINE V second(V f, V y, V delta) {
        return select(abs(f - y) > delta, V{}, splat<V>(1));
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Huber>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Huber>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
