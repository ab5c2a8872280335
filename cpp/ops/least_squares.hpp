// SPDX-License-Identifier: MIT
// least_squares: L = ½ Σ (y - f)², the lecture's loss for regression; summed over outputs.
// gradient    dL/df = f - y, which is the lecture's (y - f)(-1)
// second      1
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct LeastSquares {
    static constexpr bool mean_over_outputs = false;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V) {
        const V d = f - y;
        return {splat<V>(0.5) * d * d, d};
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V, V) {
        return splat<V>(1);
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<LeastSquares>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<LeastSquares>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
