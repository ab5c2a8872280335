// SPDX-License-Identifier: MIT
// log_softmax: y_j = x_j - m - log Σ_k e^(x_k - m), m = max x, along each row.
// Jacobian    J = I - 1ᵀp with the row p = e^y: every row of J is the unit row minus p
// vjp         dy - p Σ dy_k;  jvp  dx - Σ p_k dx_k
// second      d(v J) = dv - p (Σ dv_k + ẏ Σ v_k), ẏ = J dx;  d(J dx) = ddx - Σ p_k ddx_k - Σ p_k ẏ_k dx_k
// saves       y
// error       3 ulp of the terms
// limits      as softmax
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct LogSoftmax {
    template <class T>
    CHAINRULE_HD static void forward(Index n, const T* x, T* y) {
        const T largest = max_column(n, x);
        const T rest = sum_exponentials(n, x, largest, [](Index, Vec<T>) {});
        const Vec<T> m = Vec<T>{} + largest, log_sum = log1p(Vec<T>{} + rest);
        for (Index j = first_column(); j < n; j += column_step<T>()) store(y + j, below_max(load(x + j), m) - log_sum);
    }
    template <class T>
    CHAINRULE_HD static void vjp(Index n, const T* dy, const T* y, T* dx) {
        const Vec<T> total = Vec<T>{} + sum_columns<T>(n, [&](Index j) { return load(dy + j); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>())
            store(dx + j, select(real_columns<T>(j, n), load(dy + j) - exp(load(y + j)) * total, Vec<T>{}));
    }
    template <class T>
    CHAINRULE_HD static void jvp(Index n, const T* dx, const T* y, T* dy) {
        const Vec<T> mean = Vec<T>{} + sum_columns<T>(n, [&](Index j) { return exp(load(y + j)) * load(dx + j); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>())
            store(dy + j, select(real_columns<T>(j, n), load(dx + j) - mean, Vec<T>{}));
    }
    template <class T>  // into what will be the result: e^y is wanted twice
    CHAINRULE_NOINLINE void probabilities(Index n, const T* y, T* p) {
        for (Index j = first_column(); j < n; j += column_step<T>()) store(p + j, exp(load(y + j)));
    }
    template <class T>
    CHAINRULE_HD static void vjp_jvp(Index n, const T* v, const T* dx, const T* dv, const T* y, T* out) {
        const auto sum = [&](auto term) { return Vec<T>{} + sum_columns<T>(n, term); };
        probabilities(n, y, out);
        const Vec<T> total = sum([&](Index j) { return load(v + j); });
        const Vec<T> drift = sum([&](Index j) { return load(dv + j); });
        const Vec<T> mean = sum([&](Index j) { return load(out + j) * load(dx + j); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>()) {
            const Vec<T> change = drift + (load(dx + j) - mean) * total;
            store(out + j, select(real_columns<T>(j, n), load(dv + j) - load(out + j) * change, Vec<T>{}));
        }
    }
    template <class T>
    CHAINRULE_HD static void jvp_jvp(Index n, const T* dx, const T* ddx, const T* y, T* ddy) {
        const auto mean = [&](auto term) {
            return Vec<T>{} + sum_columns<T>(n, [&](Index j) { return load(ddy + j) * term(j); });
        };
        probabilities(n, y, ddy);
        const Vec<T> shift = mean([&](Index j) { return load(dx + j); });
        const Vec<T> drift = mean([&](Index j) { return load(ddx + j) + (load(dx + j) - shift) * load(dx + j); });
        for (Index j = first_column(); j < row_end<T>(n); j += column_step<T>())
            store(ddy + j, select(real_columns<T>(j, n), load(ddx + j) - drift, Vec<T>{}));
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
