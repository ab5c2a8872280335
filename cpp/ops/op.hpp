// SPDX-License-Identifier: MIT
// L2: the contract of an op, and the two loops that run one over a matrix: elementwise and row-wise. No third.
//
// A layer is y = g(x) on rows of a batch. Its three maps stand side by side in its header:
//   forward(x)        y
//   vjp(dy, saved)    the row cotangent dy J, J = J_x[y] in numerator layout (reverse mode)
//   jvp(dx, saved)    the tangent J dx (forward mode)
// `saved` is x, y or nothing, as ops.def says. dy and dx may be the same memory, so may x and y.
// Elementwise ops are formulas on a vector of any width, without loops or pointers; J is diagonal and never formed.
// Where g has a kink, its header names the derivative taken there. NaN goes in, NaN comes out.
// Rows are padded to a cache line. Elementwise loops run over the padding, which no reader trusts; row-wise loops and
// losses mask it, and losses write zeros there, so that the padding of every cotangent stays zero.
#pragma once

#include "../kernels.hpp"
#include "../simd.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

template <class Op, class T>
void elementwise_forward(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += kWidth<T>)
            store(y + i * y_stride + j, Op::forward(load(x + i * x_stride + j), p));
}

template <class Op, class T>
void elementwise_vjp(Index rows, Index cols, const T* dy, Index dy_stride, const T* saved, Index saved_stride, T* dx,
                     Index dx_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += kWidth<T>)
            store(dx + i * dx_stride + j, Op::vjp(load(dy + i * dy_stride + j), load(saved + i * saved_stride + j), p));
}

template <class Op, class T>
void elementwise_jvp(Index rows, Index cols, const T* dx, Index dx_stride, const T* saved, Index saved_stride, T* dy,
                     Index dy_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += kWidth<T>)
            store(dy + i * dy_stride + j, Op::jvp(load(dx + i * dx_stride + j), load(saved + i * saved_stride + j), p));
}

template <class Op, class T>
void rowwise_forward(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, T) {
    for (Index i = 0; i < rows; ++i) Op::forward(cols, x + i * x_stride, y + i * y_stride);
}

template <class Op, class T>
void rowwise_vjp(Index rows, Index cols, const T* dy, Index dy_stride, const T* saved, Index saved_stride, T* dx,
                 Index dx_stride, T) {
    for (Index i = 0; i < rows; ++i) Op::vjp(cols, dy + i * dy_stride, saved + i * saved_stride, dx + i * dx_stride);
}

template <class Op, class T>
void rowwise_jvp(Index rows, Index cols, const T* dx, Index dx_stride, const T* saved, Index saved_stride, T* dy,
                 Index dy_stride, T) {
    for (Index i = 0; i < rows; ++i) Op::jvp(cols, dx + i * dx_stride, saved + i * saved_stride, dy + i * dy_stride);
}

// ---- tools of the row-wise ops --------------------------------------------------------------------------------------

// Which lanes of the vector that begins at column j are real columns.
template <class T>
CHAINRULE_INLINE auto real_columns(Index j, Index cols) {
    return lane_numbers<T>() < Vec<T>{} + static_cast<T>(cols - j);
}

// Sum over the columns of f(j), a vector that begins at column j; the same order for every vector width.
template <class T, class F>
CHAINRULE_INLINE T sum_columns(Index cols, F f) {
    LineSum<T> sum;
    for (Index line = 0; line < cols; line += kLine<T>)
        for (int v = 0; v < LineSum<T>::vectors; ++v) {
            const Index j = line + v * kWidth<T>;
            sum.v[v] = sum.v[v] + select(real_columns<T>(j, cols), f(j), Vec<T>{});
        }
    return LineSum<T>::total(sum);
}

// The largest element of a row, NaN aside.
template <class T>
CHAINRULE_INLINE T max_column(Index cols, const T* x) {
    const Vec<T> lowest = splat<Vec<T>>(-__builtin_inf());
    Vec<T> largest = lowest;
    for (Index j = 0; j < cols; j += kWidth<T>)
        largest = max(select(real_columns<T>(j, cols), load(x + j), lowest), largest);
    T result = largest[0];
    for (int i = 1; i < kWidth<T>; ++i) result = largest[i] > result ? largest[i] : result;
    return result;
}

// x - m for a row's maximum m, with the limit 0 where x = m, infinite or not: a row with one +inf is one-hot, not NaN.
template <class V>
CHAINRULE_INLINE V below_max(V x, V m) {
    return select(x == m, V{}, x - m);
}

// Σ e^(x_k - m) less the 1 of one maximum; `each(j, e)` sees the terms. Kept apart from that 1, it gives log Σ and the
// small probabilities to full relative accuracy: log1p(rest), rest / (1 + rest).
template <class T, class F>
CHAINRULE_INLINE T sum_exponentials(Index cols, const T* x, T largest, F each) {
    const Vec<T> m = Vec<T>{} + largest;
    Vec<T> maxima{};
    const T rest = sum_columns<T>(cols, [&](Index j) {
        const Vec<T> xj = load(x + j), e = exp(below_max(xj, m));
        each(j, e);
        const auto is_max = xj == m;
        maxima = maxima + select(is_max & real_columns<T>(j, cols), splat<Vec<T>>(1), Vec<T>{});
        return select(is_max, Vec<T>{}, e);
    });
    T count = 0;
    for (int i = 0; i < kWidth<T>; ++i) count += maxima[i];
    return rest + (count > 1 ? count - 1 : T{0});
}

// ---- losses ---------------------------------------------------------------------------------------------------------

template <class V>
struct ValueGrad {
    V value, grad;
};

// Losses that are sums over outputs. A loss's value and gradient come from one function, so that they cannot disagree.
// values[i] = L_i; df[i] = weight_i * scale * dL_i/df. Losses named "mean" divide by the number of outputs.
template <class Loss, class T>
void elementwise_loss(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y, const T* weight, T scale,
                      T* values, T* df, Index df_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    const T share = Loss::mean_over_outputs ? T{1} / static_cast<T>(cols) : T{1};
    for (Index i = 0; i < rows; ++i) {
        const T* fi = f + i * f_stride;
        const T* yi = y.values + i * y.stride;
        T* dfi = df + i * df_stride;
        const Vec<T> factor = Vec<T>{} + (weight ? weight[i] : T{1}) * scale * share;
        values[i] = share * sum_columns<T>(cols, [&](Index j) {
                        const ValueGrad<Vec<T>> l = Loss::value_grad(load(fi + j), load(yi + j), p);
                        store(dfi + j, select(real_columns<T>(j, cols), factor * l.grad, Vec<T>{}));
                        return l.value;
                    });
    }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
