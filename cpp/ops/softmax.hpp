// SPDX-License-Identifier: MIT
// softmax: y_j = e^(x_j - m) / Σ_k e^(x_k - m), m = max x, along each row.
// Jacobian    J = diag(y) - yᵀy for the row y, shape (n, n), never formed
// vjp         y * (dy - Σ dy_k y_k);  jvp the same, since J is symmetric
// saves       y
// error       6 ulp, and |x_j - m| ulp for the rounding of the exponent
// limits      a row with one +inf is one-hot, an all -inf row is uniform
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Softmax {
    template <class T>
    static void forward(Index n, const T* x, T* y) {
        const T rest = sum_exponentials(n, x, max_column(n, x), [&](Index j, Vec<T> e) { store(y + j, e); });
        const Vec<T> total = Vec<T>{} + (1 + rest);
        for (Index j = 0; j < n; j += kWidth<T>) store(y + j, load(y + j) / total);
    }
    template <class T>
    static void vjp(Index n, const T* dy, const T* y, T* dx) {
        const Vec<T> mean = Vec<T>{} + sum_columns<T>(n, [&](Index j) { return load(dy + j) * load(y + j); });
        for (Index j = 0; j < round_up(n, kLine<T>); j += kWidth<T>)
            store(dx + j, select(real_columns<T>(j, n), load(y + j) * (load(dy + j) - mean), Vec<T>{}));
    }
    template <class T>
    static void jvp(Index n, const T* dx, const T* y, T* dy) {
        vjp(n, dx, y, dy);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
