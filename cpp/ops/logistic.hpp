// SPDX-License-Identifier: MIT
// logistic: L = (1/n) Σ y softplus(-f) + (1 - y) softplus(f) for logits f and y in [0, 1]: the negative of the lecture's
// log-likelihood y log σ(f) + (1 - y) log(1 - σ(f)), in the form that neither overflows nor loses the tails' digits.
// gradient    (σ(f) - y) / n; where y is 1 it is -σ(-f), which keeps its digits as f grows
// second      σ(f) σ(-f) / n
// limits      0 · inf counts as 0, so a certain and right prediction costs 0 at f = ±inf
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Logistic {
    static constexpr bool mean_over_outputs = true;

    template <class V>
    CHAINRULE_INLINE ValueGrad<V> value_grad(V f, V y, V) {
        const V one = splat<V>(1), e = exp(-abs(f)), rest = log1p(e);
        const V right = select(f < V{}, -f, V{}) + rest;  // softplus(-f)
        const V wrong = select(f < V{}, V{}, f) + rest;   // softplus(f)
        const V value = select(y == V{}, wrong, select(y == one, right, y * right + (1 - y) * wrong));
        const V near = one / (e + 1), far = e * near;  // σ(|f|), σ(-|f|)
        const V sigma = select(f < V{}, far, near), complement = select(f < V{}, near, far);
        return {value, select(y == one, -complement, sigma - y)};
    }
    template <class V>
    CHAINRULE_INLINE V second(V f, V, V) {
        return sigmoid(f) * sigmoid(-f);
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
        elementwise_loss<Logistic>(rows, cols, f, f_stride, y, weight, scale, values, df, df_stride, param);
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T param) {
        elementwise_hvp<Logistic>(f, y, weight, scale, t, out, param);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
