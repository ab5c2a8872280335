// SPDX-License-Identifier: MIT
// mse: L = (1/n) Σ (y - f)², the mean over n outputs; PyTorch's MSELoss.
// gradient    2 (f - y) / n
// second      2 / n
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Mse {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V) {
        const V d = f - y;
        return {d * d, 2 * d};
    }
    template <class V>
    CHAINRULE_INLINE V second(V, V, V) {
        return splat<V>(2);
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Mse>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Mse>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
