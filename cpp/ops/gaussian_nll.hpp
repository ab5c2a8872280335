// SPDX-License-Identifier: MIT
// gaussian_nll: the negative log-likelihood of a normal distribution whose mean and spread are both outputs:
// f = (μ_1..μ_k, s_1..s_k), s = log σ², y of k columns; L = (1/k) Σ ½ (s + (y - μ)² e^-s), without the constant ½ log 2π.
// gradient    dL/dμ = (μ - y) e^-s / k,  dL/ds = ½ (1 - (y - μ)² e^-s) / k
// second      d²L/dμ² = e^-s / k,  d²L/dμds = (y - μ) e^-s / k,  d²L/ds² = ½ (y - μ)² e^-s / k
// limits      0 · inf counts as 0 where y = μ. Source: Nix and Weigend, ICNN 1994
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct GaussianNll {
    template <class V>
    CHAINRULE_INLINE ValueGrad<V> square(V d, V s) {  // d² e^-s and d e^-s
        const V zero = select(s == s, V{}, s), dp = select(d == V{}, zero, d * exp(-s));
        return {select(d == V{}, zero, d * dp), dp};
    }
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T) {
        const Index k = cols / 2;
        const T share = T{1} / static_cast<T>(k), half = static_cast<T>(0.5);
        for (Index i = 0; i < rows; ++i) {
            const T* mu = f + i * f_stride;
            T *dmu = df + i * df_stride, *ds = dmu + k;
            const T factor = (weight ? weight[i] : T{1}) * scale * share;
            values[i] = share * sum_columns<T>(k, [&](Index j) {
                            // The s block begins in the middle of a line, so its last vector may not be whole.
                            const Index lanes = k - j < kWidth<T> ? k - j : kWidth<T>;
                            Vec<T> s{};
                            for (Index l = 0; l < lanes; ++l) s[l] = mu[k + j + l];
                            const Vec<T> d = load(mu + j) - load(y.values + i * y.stride + j);
                            const ValueGrad<Vec<T>> q = square(d, s);
                            for (Index l = 0; l < lanes; ++l) {
                                dmu[j + l] = factor * q.grad[l];
                                ds[j + l] = factor * half * (1 - q.value[l]);
                            }
                            const Vec<T> infinity = splat<Vec<T>>(__builtin_inf());
                            return select(q.value == infinity, infinity, half * (s + q.value));
                        });
            for (Index j = cols; j < row_end<T>(cols); ++j) dmu[j] = 0;
        }
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T) {
        const Index k = f.cols / 2;
        for (Index i = 0; i < f.rows; ++i) {
            const T *mu = f.data + i * f.stride, *tmu = t.data + i * t.stride;
            T* to = out.data + i * out.stride;
            const T factor = (weight ? weight[i] : T{1}) * scale / static_cast<T>(k), half = static_cast<T>(0.5);
            for (Index j = first_column(); j < k; j += column_step<T>()) {
                const Index lanes = k - j < kWidth<T> ? k - j : kWidth<T>;
                const Vec<T> s = load_some(lanes, mu + k + j), ts = load_some(lanes, tmu + k + j);
                const ValueGrad<Vec<T>> q = square(load(mu + j) - load(y.values + i * y.stride + j), s);
                const Vec<T> across = load(tmu + j);
                store_some(lanes, to + j, factor * (exp(-s) * across - q.grad * ts));
                store_some(lanes, to + k + j, factor * (half * q.value * ts - q.grad * across));
            }
            for (Index j = f.cols; j < row_end<T>(f.cols); ++j) to[j] = 0;
        }
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
