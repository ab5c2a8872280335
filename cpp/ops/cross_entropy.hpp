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
        row_blocks(rows, weight, scale, [&](Index i, Index count, Vec<T> factor) {
            const Rows<T> logits = {f + i * f_stride, f_stride};
            T* d = df + i * df_stride;
            const Vec<T> value = y.labels ? labels(count, cols, logits, y.labels + i, factor, d, df_stride)
                                          : probabilities(count, cols, logits, {y.values + i * y.stride, y.stride},
                                                          factor, d, df_stride);
            store_some(count, values + i, value);
        });
    }

    template <class T>
    CHAINRULE_INLINE Vec<T> labels(Index rows, Index cols, Rows<T> f, const std::int64_t* y, Vec<T> factor, T* df,
                                   Index df_stride) {
        Vec<T> label{}, right{};
        for (Index i = 0; i < rows; ++i) label[i] = static_cast<T>(y[i]);
        const auto is_label = [&](Index j) { return label == Vec<T>{} + static_cast<T>(j); };
        const Vec<T> largest = max_columns(rows, cols, f);
        Exponentials<T> sum;
        map_columns(rows, cols, {f}, df, df_stride, [&](Index j, const Vec<T>(&column)[1]) {
            right = select(is_label(j), column[0], right);
            return sum.add(column[0], largest);
        });
        const Vec<T> rest = sum.rest(), share = factor / (1 + rest);
        const auto hit = right == largest;
        // Of a confident and right prediction p - 1 keeps its digits as minus the other classes' share.
        const Vec<T> at_hit = -factor * (rest / (1 + rest));
        map_columns(rows, cols, {Rows<T>{df, df_stride}}, df, df_stride, [&](Index j, const Vec<T>(&column)[1]) {
            const Vec<T> p = column[0] * share;
            return select(is_label(j), select(hit, at_hit, p - factor), p);
        });
        return log1p(rest) - select(hit, Vec<T>{}, right - largest);
    }

    template <class T>
    CHAINRULE_INLINE Vec<T> probabilities(Index rows, Index cols, Rows<T> f, Rows<T> y, Vec<T> factor, T* df,
                                          Index df_stride) {
        const Vec<T> largest = max_columns(rows, cols, f);
        Vec<T> mass{}, dot{};
        Exponentials<T> sum;
        map_columns(rows, cols, {f, y}, df, df_stride, [&](Index, const Vec<T>(&column)[2]) {
            const Vec<T> p = column[1];
            mass = mass + p;
            dot = dot + select(p == Vec<T>{}, Vec<T>{}, p * below_max(column[0], largest));
            return sum.add(column[0], largest);
        });
        const Vec<T> rest = sum.rest(), share = factor * mass / (1 + rest);
        map_columns(rows, cols, {Rows<T>{df, df_stride}, y}, df, df_stride,
                    [&](Index, const Vec<T>(&column)[2]) { return column[0] * share - factor * column[1]; });
        return mass * log1p(rest) - dot;
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
