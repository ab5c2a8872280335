// SPDX-License-Identifier: MIT
// cross_entropy: softmax and negative log-likelihood in one, on logits f.
// Labels c:          L = log Σ e^f_j - f_c                       gradient  softmax(f) - onehot(c)
// Probabilities p:   L = Σ_j p_j (log Σ e^f_k - f_j)             gradient  softmax(f) Σ p - p
// Second, of both:   t ↦ Σp (t J), J the Jacobian of softmax. 0 · inf counts as 0.
// The row's maximum is subtracted first: no overflow, and a large shared offset changes nothing.
#pragma once

#include "softmax.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

struct CrossEntropy {
    template <class T>
    CHAINRULE_HD static void run(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                 const T* weight, T scale, T* values, T* df, Index df_stride, T) {
        row_blocks(rows, weight, scale, [&](Index i, Index count, Vec<T> factor) {
            Rows<T> one[] = {{f + i * f_stride, f_stride}};
            Rows<T> two[] = {one[0], {y.labels ? nullptr : y.values + i * y.stride, y.stride}};
            const MatrixView<T> out = {df + i * df_stride, count, cols, df_stride};
            Vec<T> label{};
            for (Index r = 0; y.labels && r < count; ++r) label[r] = static_cast<T>(y.labels[i + r]);
            store_some(count, values + i, y.labels ? block(one, label, factor, out) : block(two, label, factor, out));
        });
    }
    // One row a lane; `in` is f and the probabilities, or (N = 1) f alone, and labels are the probabilities 0 and 1.
    template <class T, int N>
    CHAINRULE_INLINE Vec<T> block(Rows<T> (&in)[N], Vec<T> label, Vec<T> factor, MatrixView<T> df) {
        const auto p_of = [&](Index j, const Vec<T>(&column)[N]) {
            const Vec<T> hit = select(label == Vec<T>{} + static_cast<T>(j), splat<Vec<T>>(1), Vec<T>{});
            return N == 1 ? hit : column[N - 1];
        };
        const Vec<T> largest = max_columns(df.rows, df.cols, in[0]);
        Vec<T> mass{}, dot{};
        Exponentials<T> sum;
        map_columns(df.rows, df.cols, in, df.data, df.stride, [&](Index j, const Vec<T>(&column)[N]) {
            const Vec<T> p = p_of(j, column);
            mass = mass + p;
            dot = dot + select(p == Vec<T>{}, Vec<T>{}, p * below_max(column[0], largest));
            return sum.add(column[0], largest);
        });
        mass = join_sum(mass), dot = join_sum(dot);
        const Vec<T> rest = sum.rest(), share = factor * mass / (1 + rest);
        // Of a confident and right label p - 1 keeps its digits as minus the other classes' share.
        const Vec<T> at_hit = -factor * (rest / (1 + rest));
        in[0] = {df.data, df.stride};
        map_columns(df.rows, df.cols, in, df.data, df.stride, [&](Index j, const Vec<T>(&column)[N]) {
            const Vec<T> p = p_of(j, column), d = column[0] * share - factor * p;
            return N == 1 ? select((p == splat<Vec<T>>(1)) & (dot == Vec<T>{}), at_hit, d) : d;
        });
        return mass * log1p(rest) - dot;
    }
    template <class T>
    CHAINRULE_HD static void hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                 MatrixView<const T> t, MatrixView<T> out, T) {
        for (Index i = 0; i < f.rows; ++i) {
            const auto p = [&](Index j) { return load(y.values + i * y.stride + j); };
            const T mass = y.labels ? T{1} : sum_columns<T>(f.cols, p);
            const Vec<T> factor = Vec<T>{} + (weight ? weight[i] : T{1}) * scale * mass;
            T* to = out.data + i * out.stride;
            Softmax::forward(f.cols, f.data + i * f.stride, to);
            Softmax::vjp(f.cols, t.data + i * t.stride, to, to);
            for (Index j = first_column(); j < f.cols; j += column_step<T>()) store(to + j, factor * load(to + j));
        }
    }
};

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
