// SPDX-License-Identifier: MIT
// L2: the contract of an op, and the two loops that run one over a matrix: elementwise and row-wise. No third.
//
// A layer is y = g(x) on rows of a batch. Its three maps stand side by side in its header:
//   forward(x)        y
//   vjp(dy, saved)    the row cotangent dy J, J = J_x[y] in numerator layout (reverse mode)
//   jvp(dx, saved)    the tangent J dx (forward mode)
// and, since derivatives have derivatives, two of second order, both read off what the op saves:
//   vjp_jvp(c, dx, dc, saved)   the tangent of c J along dx: dc J + c dJ
//   jvp_jvp(dx, ddx, saved)     the tangent of J dx along dx: J ddx + dJ dx; the result of neither is any of its inputs
// `saved` is x, y or nothing, as ops.def says. dy and dx may be the same memory, so may x and y.
// Elementwise ops are formulas on a vector of any width, without loops or pointers; J is diagonal and never formed. Their
// `second` is g'', with which both maps of second order are one: v g' + a b g''.
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

// jvp as well: J is diagonal, so that dy J and J dx are the same products, and one loop serves both.
template <class Op, class T>
void elementwise_vjp(Index rows, Index cols, const T* dy, Index dy_stride, const T* saved, Index saved_stride, T* dx,
                     Index dx_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += kWidth<T>)
            store(dx + i * dx_stride + j, Op::vjp(load(dy + i * dy_stride + j), load(saved + i * saved_stride + j), p));
}

// dv g' + v dx g''; v and dx may be the same.
template <class Op, class T>
void elementwise_second(MatrixView<const T> v, MatrixView<const T> dx, MatrixView<const T> dv,
                        MatrixView<const T> saved, MatrixView<T> out, T param) {
    const Vec<T> p = Vec<T>{} + param;
    for (Index i = 0; i < out.rows; ++i)
        for (Index j = 0; j < out.cols; j += kWidth<T>) {
            const auto at = [&](MatrixView<const T> m) { return load(m.data + i * m.stride + j); };
            const Vec<T> s = at(saved);
            store(out.data + i * out.stride + j, Op::jvp(at(dv), s, p) + at(v) * at(dx) * Op::second(s, p));
        }
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

template <class Op, class T>
void rowwise_vjp_jvp(MatrixView<const T> v, MatrixView<const T> dx, MatrixView<const T> dv, MatrixView<const T> saved,
                     MatrixView<T> out, T) {
    for (Index i = 0; i < out.rows; ++i)
        Op::vjp_jvp(out.cols, v.data + i * v.stride, dx.data + i * dx.stride, dv.data + i * dv.stride,
                    saved.data + i * saved.stride, out.data + i * out.stride);
}

template <class Op, class T>
void rowwise_jvp_jvp(MatrixView<const T>, MatrixView<const T> dx, MatrixView<const T> ddx, MatrixView<const T> saved,
                     MatrixView<T> out, T) {
    for (Index i = 0; i < out.rows; ++i)
        Op::jvp_jvp(out.cols, dx.data + i * dx.stride, ddx.data + i * ddx.stride, saved.data + i * saved.stride,
                    out.data + i * out.stride);
}

// ---- tools of the row-wise ops --------------------------------------------------------------------------------------

// Which lanes of the vector that begins at column j are real columns.
template <class T>
CHAINRULE_INLINE auto real_columns(Index j, Index cols) {
    return lane_numbers<T>() < Vec<T>{} + static_cast<T>(cols - j);
}

// Sum over the columns of f(j), a vector that begins at column j; the same order for every vector width.
#if defined(CHAINRULE_DEVICE)
// The GPU's rows have no padding that anybody may touch.
template <class T>
CHAINRULE_INLINE constexpr Index row_end(Index cols) {
    return cols;
}
template <class T, class F>
CHAINRULE_INLINE T sum_columns(Index cols, F f) {
    Vec<T> sum{};
    for (Index j = first_column(); j < cols; j += column_step<T>()) sum = sum + f(j);
    return join_sum(sum)[0];
}
#else
// One thread has all of a row, a vector at a time.
CHAINRULE_INLINE constexpr Index first_column() { return 0; }
template <class T>
CHAINRULE_INLINE constexpr Index column_step() {
    return kWidth<T>;
}
template <class V>
CHAINRULE_INLINE V join_sum(V v) {
    return v;
}
template <class V>
CHAINRULE_INLINE V join_max(V v) {
    return v;
}
// Where a row ends that losses and row-wise ops write zeros beside.
template <class T>
CHAINRULE_INLINE constexpr Index row_end(Index cols) {
    return round_up(cols, kLine<T>);
}
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
#endif

// The largest element of a row, NaN aside.
template <class T>
CHAINRULE_INLINE T max_column(Index cols, const T* x) {
    const Vec<T> lowest = splat<Vec<T>>(-__builtin_inf());
    Vec<T> largest = lowest;
    for (Index j = first_column(); j < cols; j += column_step<T>())
        largest = max(select(real_columns<T>(j, cols), load(x + j), lowest), largest);
    largest = join_max(largest);
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
    maxima = join_sum(maxima);
    T count = 0;
    for (int i = 0; i < kWidth<T>; ++i) count += maxima[i];
    return rest + (count > 1 ? count - 1 : T{0});
}

// ---- losses -------------------------------------------------------------------------------------------------------
// Losses lay kWidth rows on their side: a row a lane, a column a vector. Sums over columns then need no folding of lanes,
// and one exp serves kWidth rows (cross-entropy of 200 rows with 10 classes: 20 µs with vectors along the row, 3 µs so).

template <class T>
struct Rows {
    const T* data;
    Index stride;
};

#if defined(CHAINRULE_DEVICE)
template <class T>
CHAINRULE_INLINE void load_columns(Index, Index, const T* x, Index, Vec<T>* column) {
    column[0] = load(x);
}
template <class T>
CHAINRULE_INLINE void store_columns(Index, Index, const Vec<T>* column, T* x, Index) {
    store(x, column[0]);
}
#else
// `cols` columns, up to kWidth, of up to kWidth rows; not inlined, or the transposition would stand in every loss again. A
// single one, as of a regression, goes without: lane by lane.
template <class T>
CHAINRULE_NOINLINE void load_columns(Index rows, Index cols, const T* x, Index stride, Vec<T>* column) {
    constexpr int W = kWidth<T>;
    if (cols == 1) {
        for (int i = 0; i < W; ++i) column[0][i] = x[(i < rows ? i : 0) * stride];
        return;
    }
    Vec<T> square[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = load(x + (i < rows ? i : 0) * stride);
    transpose_square<T>(square);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) column[i] = square[i];
}
// Zeros beside a single column, to the end of the vector; else kWidth columns are stored.
template <class T>
CHAINRULE_NOINLINE void store_columns(Index rows, Index cols, const Vec<T>* column, T* x, Index stride) {
    constexpr int W = kWidth<T>;
    if (cols == 1) {
        for (Index i = 0; i < W && i < rows; ++i) {
            store(x + i * stride, Vec<T>{});
            x[i * stride] = column[0][i];
        }
        return;
    }
    Vec<T> square[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) square[i] = column[i];
    transpose_square<T>(square);
    for (Index i = 0; i < W && i < rows; ++i) store(x + i * stride, square[i]);
}
#endif

// For each column j of the N matrices `in`, of at most kWidth rows: out's column j = f(j, in's columns). Zeros go to out's
// padding, to the end of the line. No `out`, no store.
template <class T, int N, class F>
CHAINRULE_INLINE void map_columns(Index rows, Index cols, const Rows<T> (&in)[N], T* out, Index out_stride, F f) {
    constexpr int W = kWidth<T>;
    for (Index start = first_column(); start < (out ? row_end<T>(cols) : cols); start += column_step<T>()) {
        Vec<T> columns[N][W];
        for (int n = 0; n < N; ++n) load_columns(rows, cols - start, in[n].data + start, in[n].stride, columns[n]);
        const int width = cols - start == 1 ? 1 : W;
        CHAINRULE_UNROLL(1)  // W copies of every formula would make a third of the package
        for (int k = 0; k < width; ++k) {
            Vec<T> column[N];
            for (int n = 0; n < N; ++n) column[n] = columns[n][k];
            columns[0][k] = start + k < cols ? f(start + k, column) : Vec<T>{};
        }
        if (out) store_columns(rows, cols - start, columns[0], out + start, out_stride);
    }
}

// The first n lanes; n at most kWidth.
template <class T>
CHAINRULE_INLINE Vec<T> load_some(Index n, const T* p) {
    if (n >= kWidth<T>) return load(p);
    Vec<T> v{};
    for (Index i = 0; i < n; ++i) v[i] = p[i];
    return v;
}
template <class T>
CHAINRULE_INLINE void store_some(Index n, T* p, Vec<T> v) {
    if (n >= kWidth<T>) return store(p, v);
    for (Index i = 0; i < n; ++i) p[i] = v[i];
}

// f(first row, rows, their weight * scale) for each block of at most kWidth rows.
template <class T, class F>
CHAINRULE_INLINE void row_blocks(Index rows, const T* weight, T scale, F f) {
    for (Index i = 0; i < rows; i += kWidth<T>) {
        const Index count = rows - i < kWidth<T> ? rows - i : kWidth<T>;
        f(i, count, weight ? load_some(count, weight + i) * scale : Vec<T>{} + scale);
    }
}

// The largest of each row's elements, NaN aside.
template <class T>
CHAINRULE_INLINE Vec<T> max_columns(Index rows, Index cols, Rows<T> x) {
    Vec<T> largest = splat<Vec<T>>(-__builtin_inf());
    map_columns(rows, cols, {x}, static_cast<T*>(nullptr), 0, [&](Index, const Vec<T>(&column)[1]) {
        largest = max(column[0], largest);
        return column[0];
    });
    return join_max(largest);
}

// sum_exponentials, column by column: add() gives e^(x - max).
template <class T>
struct Exponentials {
    Vec<T> sum = {}, maxima = {};
    CHAINRULE_HD Vec<T> add(Vec<T> x, Vec<T> largest) {
        const Vec<T> e = exp(below_max(x, largest));
        const auto is_max = x == largest;
        sum = sum + select(is_max, Vec<T>{}, e);
        maxima = maxima + select(is_max, splat<Vec<T>>(1), Vec<T>{});
        return e;
    }
    CHAINRULE_HD Vec<T> rest() const { return join_sum(sum) + max(join_sum(maxima) - 1, Vec<T>{}); }
};

template <class V>
struct ValueGrad {
    V value, grad;
};

// Losses that are sums over outputs. A loss's value and gradient come from one function, so that they cannot disagree.
// values[i] = L_i; df[i] = weight_i * scale * dL_i/df. Losses named "mean" divide by the number of outputs.
template <class Loss, class T>
CHAINRULE_HD void elementwise_loss(Index rows, Index cols, const T* f, Index f_stride, const Targets<T>& y,
                                   const T* weight, T scale, T* values, T* df, Index df_stride, T param) {
    const Vec<T> p = Vec<T>{} + param;
    const T share = Loss::mean_over_outputs ? T{1} / static_cast<T>(cols) : T{1};
    row_blocks(rows, weight, scale, [&](Index i, Index count, Vec<T> factor) {
        factor = factor * share;
        Vec<T> sum{};
        const Rows<T> in[] = {{f + i * f_stride, f_stride}, {y.values + i * y.stride, y.stride}};
        map_columns(count, cols, in, df + i * df_stride, df_stride, [&](Index, const Vec<T>(&column)[2]) {
            const ValueGrad<Vec<T>> l = Loss::value_grad(column[0], column[1], p);
            sum = sum + l.value;
            return factor * l.grad;
        });
        store_some(count, values + i, share * join_sum(sum));
    });
}

// out = weight_i * scale * t H, H the Hessian of L_i in f: diagonal, with Loss::second on it. Zeros go to out's padding.
template <class Loss, class T>
CHAINRULE_HD void elementwise_hvp(MatrixView<const T> f, const Targets<T>& y, const T* weight, T scale,
                                  MatrixView<const T> t, MatrixView<T> out, T param) {
    const Vec<T> p = Vec<T>{} + param;
    const T share = Loss::mean_over_outputs ? T{1} / static_cast<T>(f.cols) : T{1};
    for (Index i = 0; i < f.rows; ++i) {
        const Vec<T> factor = Vec<T>{} + (weight ? weight[i] : T{1}) * scale * share;
        for (Index j = first_column(); j < row_end<T>(f.cols); j += column_step<T>()) {
            const Vec<T> second = Loss::second(load(f.data + i * f.stride + j), load(y.values + i * y.stride + j), p);
            const Vec<T> product = factor * second * load(t.data + i * t.stride + j);
            store(out.data + i * out.stride + j, select(real_columns<T>(j, f.cols), product, Vec<T>{}));
        }
    }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
