// SPDX-License-Identifier: MIT
// softmax: y_j = e^(x_j - m) / Σ_k e^(x_k - m), m = max x, along each row.
// Jacobian    J = diag(y) - yᵀy for the row y, shape (n, n), never formed
// vjp         y * (dy - Σ dy_k y_k);  jvp the same, since J is symmetric
// second      d(v J) = ẏ * (v - Σ v_k y_k) + y * (dv - Σ dv_k y_k - Σ v_k ẏ_k), ẏ = J dx; jvp_jvp is v = dx
// saves       y
// error       6 ulp, and |x_j - m| ulp for the rounding of the exponent
// limits      a row with one +inf is one-hot, an all -inf row is uniform
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct Softmax {
    template <class T>  // not inlined: cross_entropy.hpp calls it, too
    CHAINRULE_NOINLINE void forward(Index n, const T* x, T* y) {
        const T rest = sum_exponentials(n, x, max_column(n, x), [&](Index j, Vec<T> e) { store(y + j, e); });
        const Vec<T> total = Vec<T>{} + (1 + rest);
        for (Index j = first_column(); j < n; j += column_step<T>()) store(y + j, load(y + j) / total);
    }
    template <class T>
    CHAINRULE_NOINLINE void vjp(Index n, const T* dy, const T* y, T* dx) {
        const Vec<T> mean = Vec<T>{} + sum_columns<T>(n, [&](Index j) { return load(dy + j) * load(y + j); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>())
            store(dx + j, select(real_columns<T>(j, n), load(y + j) * (load(dy + j) - mean), Vec<T>{}));
    }
    template <class T>
    CHAINRULE_HD static void jvp(Index n, const T* dx, const T* y, T* dy) {
        vjp(n, dx, y, dy);
    }
    template <class T>
    CHAINRULE_HD static void vjp_jvp(Index n, const T* v, const T* dx, const T* dv, const T* y, T* out) {
        const auto sum = [&](auto term) { return Vec<T>{} + sum_columns<T>(n, term); };
        const Vec<T> mean = sum([&](Index j) { return load(v + j) * load(y + j); });
        const Vec<T> shift = sum([&](Index j) { return load(dx + j) * load(y + j); });
        const auto dy = [&](Index j) { return load(y + j) * (load(dx + j) - shift); };
        const Vec<T> drift = sum([&](Index j) { return fma(load(dv + j), load(y + j), load(v + j) * dy(j)); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>()) {
            const Vec<T> bent = dy(j) * (load(v + j) - mean), straight = load(y + j) * (load(dv + j) - drift);
            store(out + j, select(real_columns<T>(j, n), bent + straight, Vec<T>{}));
        }
    }
    template <class T>
    CHAINRULE_HD static void jvp_jvp(Index n, const T* dx, const T* ddx, const T* y, T* ddy) {
        vjp_jvp(n, dx, dx, ddx, y, ddy);
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
