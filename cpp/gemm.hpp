// SPDX-License-Identifier: MIT
// L1: the matrix product in outer-product form. One micro-kernel serves the three products of a linear layer:
//   forward  Z = X Wᵀ + b   A = X (by rows),    B = Wᵀ in panels, start = the bias row
//   vjp      dX = dZ W      A = dZ (by rows),   B = W in panels
//   vjp      dWᵀ = Xᵀ dZ    A = X (by columns), B = dZ, unpacked
//
// Operands are of the type T of the result, or pairs of bfloat16, two terms of the sum in each element.
//
// The order of every sum is part of the contract: an element of C is summed over k in order by fused multiply-adds
// within blocks of kDepth, and the blocks are added in order. Tile shapes, vector width, threads and the batch a row
// is in change nothing, so all of them give the same bits. Blocking also keeps the rounding error of long sums down.
#pragma once

#include "simd.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

// Rows of a register tile. With AVX-512, 6 rows of 4 vectors leave 8 of 32 registers for a row of B and the broadcast
// of A; with 16 registers, 6 rows of 2 vectors are the largest tile; the plain set, for old processors, makes do with 4, which
// is smaller. Fewer rows run nearly as fast, so a remainder is spread over all tiles instead of padded.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// A operand: element (i, k) is data[i * stride + k], or data[k * stride + i] by columns.
template <class E>
struct Operand {
    const E* data;
    Index stride;
};

// kDepth terms, in elements.
template <class E>
constexpr Index kBlock = kDepth;
template <>
constexpr Index kBlock<Pair> = kDepth / 2;

enum class Start { zero, row, add };  // C starts at 0, at a given row (the bias), or at its present value

// C[0..R)[0..NV vectors) = start + sum over k < depth of A(., k) B(k, .).
template <class T, class E, int R, int NV, bool ByColumns>
CHAINRULE_INLINE void micro_kernel(Index depth, const E* a, Index a_stride, const E* b, Index b_stride, T* c,
                                   Index c_stride, Start start, const T* row) {
    constexpr int W = kWidth<T>;
    Vec<T> sum[R][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        const Vec<T> first = start == Start::row ? load(row + v * W) : Vec<T>{};
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sum[r][v] = first;
    }
    for (Index k = 0; k < depth; ++k) {
        // By columns, each k is on another line, often on another page, where no hardware prefetcher follows: fetch the
        // line that the tile three further down begins on.
        if (ByColumns) __builtin_prefetch(a + k * a_stride + 3 * kTileRows);
        Vec<E> bk[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) bk[v] = load(b + v * W);
        b += b_stride;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Vec<E> ark = Vec<E>{} + (ByColumns ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[r][v] = add_term(ark, bk[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            T* out = c + r * c_stride + v * W;
            store(out, start == Start::add ? load(out) + sum[r][v] : sum[r][v]);
        }
}

template <class T, class E>
using MicroKernel = void (*)(Index, const E*, Index, const E*, Index, T*, Index, Start, const T*);

template <class T, class E, int R, int NV, bool ByColumns>
void tile(Index depth, const E* a, Index a_stride, const E* b, Index b_stride, T* c, Index c_stride, Start start,
          const T* row) {
    micro_kernel<T, E, R, NV, ByColumns>(depth, a, a_stride, b, b_stride, c, c_stride, start, row);
}

// tiles[ByColumns][NV - 1][R - 1]
#if defined(__AVX2__) || defined(__aarch64__)
#define CHAINRULE_TALL(NV, C) , tile<T, E, 5, NV, C>, tile<T, E, 6, NV, C>
#else
#define CHAINRULE_TALL(NV, C)
#endif
#define CHAINRULE_TILES(NV, C) \
    {tile<T, E, 1, NV, C>, tile<T, E, 2, NV, C>, tile<T, E, 3, NV, C>, tile<T, E, 4, NV, C> CHAINRULE_TALL(NV, C)}
template <class T, class E>
constexpr MicroKernel<T, E> tiles[2][kTileVectors][kTileRows] = {
#if defined(__AVX512F__) || defined(__aarch64__)
    {CHAINRULE_TILES(1, false), CHAINRULE_TILES(2, false), CHAINRULE_TILES(3, false), CHAINRULE_TILES(4, false)},
    {CHAINRULE_TILES(1, true), CHAINRULE_TILES(2, true), CHAINRULE_TILES(3, true), CHAINRULE_TILES(4, true)},
#else
    {CHAINRULE_TILES(1, false), CHAINRULE_TILES(2, false)},
    {CHAINRULE_TILES(1, true), CHAINRULE_TILES(2, true)},
#endif
};
#undef CHAINRULE_TALL
#undef CHAINRULE_TILES

// One column block of C, `width` wide (a whole number of vectors, at most a panel): rows of tiles, columns of vectors.
template <bool ByColumns, class T, class E>
CHAINRULE_INLINE void block(Index rows, Index width, Index depth, Operand<E> a, const E* b, Index b_stride, T* c,
                            Index c_stride, Start start, const T* row) {
    constexpr Index W = kWidth<T>;
    const Index count = (rows + kTileRows - 1) / kTileRows;
    for (Index j = 0; j < width; j += kTileVectors * W) {
        const Index vectors = (width - j) / W < kTileVectors ? (width - j) / W : kTileVectors;
        for (Index t = 0, i = 0; t < count; ++t) {
            const Index height = (rows - i) / (count - t);  // even tiles: 32 rows are 5 6 5 5 5 6, not 6 6 6 6 6 2
            const E* ai = a.data + i * (ByColumns ? 1 : a.stride);
            tiles<T, E>[ByColumns][vectors - 1][height - 1](depth, ai, a.stride, b + j, b_stride, c + i* c_stride + j,
                                                            c_stride, start, row + j);
            i += height;
        }
    }
}

// A matrix in panels of kPanel columns: panel p begins at p * kPanel * rows, and its rows are as wide as its columns rounded
// up to a cache line. A product begins at row `first`.
template <class E>
struct Panels {
    const E* data;
    Index rows, first = 0;
};

// C (rows x cols) = A B, started with the last row of `bias` where `start` says row. A panel of C gets all its terms before
// the next one: 192 x 2048 x 2048 at 95.5 % of the peak, 93.5 % when all panels got a block of terms each in turn.
template <class T, class E>
CHAINRULE_NOINLINE void multiply_panels(Index rows, Index cols, Index depth, Operand<E> a, Panels<E> b, Start start,
                                        Panels<T> bias, T* c, Index c_stride) {
    for (Index j = 0; j < cols; j += kPanel<T>) {
        const Index width = panel_width<T>(cols, j);
        const T* row = start == Start::row ? bias.data + j * bias.rows + (bias.rows - 1) * width : nullptr;
        for (Index k = 0; k == 0 || k < depth; k += kBlock<E>)
            block<false>(rows, width, depth - k < kBlock<E> ? depth - k : kBlock<E>, Operand<E>{a.data + k, a.stride},
                         b.data + j * b.rows + (b.first + k) * width, width, c + j, c_stride,
                         k > 0 ? Start::add : start, row);
    }
}

// C (rows x width) = Aᵀ B: A given by columns (its row k holds the k-th terms), width at most a panel. B is strided; where
// it is deep, each block of it is packed first, because all tiles of C read it again (`packed`: kDepth * kPanel elements).
// With `add` the product is added to C; a C summed so in pieces of whole blocks has the bits of one sum.
template <class T>
void multiply_transposed(Index rows, Index width, Index depth, Operand<T> a, const T* b, Index b_stride, T* packed,
                         T* c, Index c_stride, bool add) {
    const bool pack = depth > kDepth;
    for (Index k = 0; k == 0 || k < depth; k += kDepth) {
        const Index count = depth - k < kDepth ? depth - k : kDepth;
        const T* bk = b + k * b_stride;
        for (Index i = 0; pack && i < count; ++i)
            for (Index j = 0; j < width; j += kWidth<T>) store(packed + i * width + j, load(bk + i * b_stride + j));
        block<true>(rows, width, count, Operand<T>{a.data + k * a.stride, a.stride}, pack ? packed : bk,
                    pack ? width : b_stride, c, c_stride, k > 0 || add ? Start::add : Start::zero, b);
    }
}

// ---- few columns ----------------------------------------------------------------------------------------------------
// C (rows x cols) = A Bᵀ + bias, cols <= kNarrowOutputs: vectors run along k. B in panels of kPanel columns, of `cols` rows.

// A row of B with kWidth rows of A, one dot product a lane: 16 (float) or 8 (double) partial sums over k, in order, then
// folded in halves; the same for every vector width.
template <class T>
CHAINRULE_INLINE Vec<T> dot_rows(Index depth, const T* const (&a)[kWidth<T>], const T* b, Index cols, Index row) {
    constexpr int W = kWidth<T>;
    LineSum<T> sums[W];
    for (Index line = 0; line < depth; line += kLine<T>) {
        const Index start = line / kPanel<T> * kPanel<T>, width = panel_width<T>(depth, start);
        const T* bk = b + start * cols + row * width + (line - start);
#pragma GCC unroll 4
        for (int v = 0; v < LineSum<T>::vectors; ++v) {
            const Index k = line + v * W;
            const auto real = lane_numbers<T>() < Vec<T>{} + static_cast<T>(depth - k);  // nobody trusts A's padding
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) {
                const Vec<T> ak = k + W <= depth ? load(a[r] + k) : select(real, load(a[r] + k), Vec<T>{});
                sums[r].v[v] = fma(ak, load(bk + v * W), sums[r].v[v]);
            }
        }
    }
    return LineSum<T>::totals(sums);
}

// The bias, where C starts with it, stands behind B. The rest of C's first cache line becomes zero unless C is added to.
template <class T>
void multiply_narrow(Index rows, Index cols, Index depth, Operand<T> a, const T* b, Start start, T* c, Index c_stride) {
    constexpr int W = kWidth<T>;
    const T* bias = start == Start::row ? b + cols * round_up(depth, kLine<T>) : nullptr;
    for (Index i = 0; i < rows; i += W) {
        const Index count = rows - i < W ? rows - i : W;
        const T* row[W];
        for (int r = 0; r < W; ++r) row[r] = a.data + (i + (r < count ? r : 0)) * a.stride;
        for (Index r = 0; r < count && start != Start::add; ++r)
            for (Index j = 0; j < kLine<T>; j += W) store(c + (i + r) * c_stride + j, Vec<T>{});
        for (Index j = 0; j < cols; ++j) {
            alignas(kLineBytes) T total[W];
            store(total, dot_rows(depth, row, b, cols, j) + (bias ? bias[j] : T{0}));
            for (Index r = 0; r < count; ++r) {
                T& element = c[(i + r) * c_stride + j];
                element = start == Start::add ? element + total[r] : total[r];
            }
        }
    }
}

// C (rows x cols, not padded) = aᵀ b for single rows, or that added to it: the gradient of one example's weights, with the
// bits that a sum of one term has, the sign of zero included.
template <class T>
void outer(Index rows, Index cols, const T* a, const T* b, T* c, bool add) {
    constexpr Index W = kWidth<T>;
    for (Index i = 0; i < rows; ++i, c += cols) {
        const Vec<T> factor = Vec<T>{} + a[i];
        const auto row = [&](auto before) {
            Index j = 0;
#pragma GCC unroll 4
            for (; j + W <= cols; j += W) store(c + j, factor * load(b + j) + before(j));
            for (; j < cols; ++j) c[j] = a[i] * b[j] + (add ? c[j] : T{0});
        };
        add ? row([c](Index j) { return load(c + j); }) : row([](Index) { return Vec<T>{}; });
    }
}

// ---- transposition --------------------------------------------------------------------------------------------------

// B = Aᵀ for A (rows x cols); not an element beyond is read or written.
template <class T>
void transpose(Index rows, Index cols, const T* a, Index a_stride, T* b, Index b_stride) {
    constexpr Index W = kWidth<T>;
    const auto by_element = [&](Index i, Index end, Index j) {
        for (; i < end; ++i)
            for (Index k = j; k < cols; ++k) b[k * b_stride + i] = a[i * a_stride + k];
    };
    Index i = 0;
    for (Index end; i + W <= rows; i = end) {  // whole lines of B one after the other, where there are so many rows
        end = i + kLine<T> <= rows ? i + kLine<T> : i + W;
        Index j = 0;
        for (; j + W <= cols; j += W)
            for (Index k = i; k < end; k += W) {
                Vec<T> square[W];
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) square[r] = load(a + (k + r) * a_stride + j);
                transpose_square<T>(square);
#pragma GCC unroll 16
                for (int r = 0; r < W; ++r) store(b + (j + r) * b_stride + k, square[r]);
            }
        by_element(i, end, j);
    }
    by_element(i, rows, 0);
}

// Where column i of row 0 stands in panels of `rows` rows and `cols` columns, and the stride from one row to the next.
template <class T>
CHAINRULE_INLINE T* panel_column(T* panels, Index cols, Index rows, Index i, Index& stride) {
    const Index start = i / kPanel<T> * kPanel<T>;
    stride = panel_width<T>(cols, start);
    return panels + start * rows + (i - start);
}

// Rows [first, first + count) of one panel of A, `width` wide, into the panels of Aᵀ (outputs x inputs): element (i, o) goes to
// row o. `column` is the panel's first column of A; `first` is a multiple of the vector width.
template <class T>
void transpose_panel(Index inputs, Index outputs, Index first, Index count, Index column, const T* panel, Index width,
                     T* backward) {
    constexpr Index W = kWidth<T>;
    const Index columns = outputs - column < width ? outputs - column : width, end = first + count;
    Index i = first, stride;
    for (; i + W <= end; i += W) {
        T* to = panel_column(backward, inputs, outputs, i, stride) + column * stride;
        for (Index o = 0; o < columns; o += W) {
            Vec<T> square[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) square[r] = load(panel + (i + r) * width + o);
            transpose_square<T>(square);
            const Index height = columns - o < W ? columns - o : W;
            for (Index r = 0; r < height; ++r) store(to + (o + r) * stride, square[r]);
        }
    }
    for (; i < end; ++i) {
        T* to = panel_column(backward, inputs, outputs, i, stride) + column * stride;
        for (Index o = 0; o < columns; ++o) to[o * stride] = panel[i * width + o];
    }
}

// ---- bfloat16 -------------------------------------------------------------------------------------------------------
// Operands are rounded and paired on the way in: along the columns of A where it is given by rows, along the rows of A
// and B where the sum runs over the batch.

// Columns of x (rows x cols) in pairs; an odd last one has 0 beside it, whatever pads x. Rows of `to` are whole lines.
CHAINRULE_INLINE void pair_columns(Index rows, Index cols, const float* x, Index stride, Pair* to, Index to_stride) {
    constexpr int W = kWidth<float>;
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += 2 * W) {
            Vec<float> low = load(x + i * stride + j), high{};
            if (j + W < cols) high = load(x + i * stride + j + W);
            if (j + 2 * W > cols) {
                const auto real = [&](Index k) {
                    return lane_numbers<float>() < Vec<float>{} + static_cast<float>(cols - k);
                };
                low = select(real(j), low, Vec<float>{});
                high = select(real(j + W), high, Vec<float>{});
            }
            split_pairs(low, high);
            store(to + i * to_stride + j / 2, pair_up(low, high));
        }
}

// C = A B, from the bias on where there is one, with the rows of A paired in `scratch`: of a deep A fewer rows at a time. No
// more than rows + pieces of them fill kDepth / 2 pairs each, which kPairRoom allows for.
CHAINRULE_NOINLINE void multiply_paired(Index rows, Index cols, Index depth, const float* a, Index a_stride,
                                        const Pair* b, Panels<float> bias, float* c, Index c_stride, Pair* scratch) {
    constexpr Index few_rows = 48;
    const Index blocks = depth > kDepth ? (depth + kDepth - 1) / kDepth : 1;
    const Index most = rows < few_rows ? 1 : rows / few_rows;
    const Index pieces = most < blocks ? most : blocks, deep = pieces * kDepth;
    for (Index piece = 0; piece < pieces; ++piece) {
        const Index first = rows * piece / pieces, height = rows * (piece + 1) / pieces - first;
        for (Index k = 0; k == 0 || k < depth; k += deep) {
            const Index count = depth - k < deep ? depth - k : deep, stride = round_up(count, 2 * kLine<float>) / 2;
            pair_columns(height, count, a + first * a_stride + k, a_stride, scratch, stride);
            const Start start = k > 0 ? Start::add : (bias.data ? Start::row : Start::zero);
            multiply_panels(height, cols, (count + 1) / 2, Operand<Pair>{scratch, stride},
                            Panels<Pair>{b, (depth + 1) / 2, k / 2}, start, bias, c + first * c_stride, c_stride);
        }
    }
}

// Rows of x (rows x cols, cols whole lines) in pairs. They come from memory, where no hardware prefetcher follows: with
// them fetched ahead, 64 columns at a time of 2048 x 2048 took 1.05 ms for all instead of 1.35.
CHAINRULE_INLINE void pair_rows(Index rows, Index cols, const float* x, Index stride, Pair* to, Index to_stride) {
    for (Index i = 0; i < rows; i += 2)
        for (Index j = 0; j < cols; j += kWidth<float>) {
            const float* pair = x + i * stride + j;
            __builtin_prefetch(pair + 8 * stride);
            __builtin_prefetch(pair + 9 * stride);
            store(to + i / 2 * to_stride + j, pair_up(load(pair), i + 1 < rows ? load(pair + stride) : Vec<float>{}));
        }
}

// transpose_panel into pairs: rows o and o + 1 of Aᵀ share a row of `backward`. Zeros stand beside an odd last row,
// whatever pads the panel.
CHAINRULE_INLINE void transpose_pairs(Index inputs, Index outputs, Index first, Index count, Index column,
                                      const float* panel, Index width, Pair* backward) {
    constexpr int W = kWidth<float>;
    Index stride;
    for (Index i = first; i < first + count; i += W) {
        Pair* to = panel_column(backward, inputs, (outputs + 1) / 2, i, stride) + column / 2 * stride;
        for (Index o = 0; o < width; o += W) {
            Vec<float> square[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r)
                square[r] = i + r < first + count ? load(panel + (i + r) * width + o) : Vec<float>{};
            transpose_square<float>(square);
            for (Index r = 0; r < W && column + o + r < outputs; r += 2)
                store(to + (o + r) / 2 * stride,
                      pair_up(square[r], column + o + r + 1 < outputs ? square[r + 1] : Vec<float>{}));
        }
    }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
