// SPDX-License-Identifier: MIT
// cross_entropy: softmax and negative log-likelihood in one, on logits f.
// Labels c:          L = log Σ e^f_j - f_c                       gradient  softmax(f) - onehot(c)
// Probabilities p:   L = Σ_j p_j (log Σ e^f_k - f_j)             gradient  softmax(f) Σ p - p
// The row's maximum is subtracted first: no overflow, and a large shared offset changes nothing. 0 · inf counts as 0.
#pragma once

#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct CrossEntropy {
    template <class T>
    static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y, const T* weight, T scale,
                    T* values, T* df, Index df_stride, T) {
        for (Index i = 0; i < rows; ++i) {
            const T factor = (weight ? weight[i] : T{1}) * scale;
            if (y.labels)
                values[i] = label_row(cols, f + i * f_stride, y.labels[i], factor, df + i * df_stride);
            else
                values[i] =
                    probability_row(cols, f + i * f_stride, y.values + i * y.stride, factor, df + i * df_stride);
        }
    }

    // df = factor * softmax(f); returns `rest`, see sum_exponentials.
    template <class T>
    CHAINRULE_INLINE T softmax_row(Index n, const T* f, T largest, T factor, T* df) {
        const T rest = sum_exponentials(n, f, largest, [&](Index j, Vec<T> e) { store(df + j, e); });
        const Vec<T> share = Vec<T>{} + factor / (1 + rest);
        for (Index j = 0; j < round_up(n, kLine<T>); j += kWidth<T>)  // the terms went to the end of the line
            store(df + j, select(real_columns<T>(j, n), load(df + j) * share, Vec<T>{}));
        return rest;
    }

    template <class T>
    CHAINRULE_INLINE T label_row(Index n, const T* f, std::int64_t label, T factor, T* df) {
        const T largest = max_column(n, f);
        const T rest = softmax_row(n, f, largest, factor, df);
        const bool right = f[label] == largest;
        // Of a confident and right prediction p - 1 keeps its digits as minus the other classes' share.
        df[label] = right ? -factor * (rest / (1 + rest)) : df[label] - factor;
        return log1p(Vec<T>{} + rest)[0] - (right ? T{0} : f[label] - largest);
    }

    template <class T>
    CHAINRULE_INLINE T probability_row(Index n, const T* f, const T* p, T factor, T* df) {
        const T largest = max_column(n, f);
        const T mass = sum_columns<T>(n, [&](Index j) { return load(p + j); });
        const Vec<T> log_sum = log1p(Vec<T>{} + softmax_row(n, f, largest, factor * mass, df));
        const Vec<T> m = Vec<T>{} + largest, f_factor = Vec<T>{} + factor;
        return sum_columns<T>(n, [&](Index j) {
            const Vec<T> pj = load(p + j);
            store(df + j, select(real_columns<T>(j, n), load(df + j) - f_factor * pj, Vec<T>{}));
            return select(pj == Vec<T>{}, Vec<T>{}, pj * (log_sum - below_max(load(f + j), m)));
        });
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
