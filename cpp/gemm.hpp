// SPDX-License-Identifier: MIT
// L1: the matrix product in outer-product form. One micro-kernel serves the three products of a linear layer:
//   forward  Z = X Wᵀ + b   A = X (by rows),    B = Wᵀ in panels, start = the bias row
//   vjp      dX = dZ W      A = dZ (by rows),   B = W in panels
//   vjp      dWᵀ = Xᵀ dZ    A = X (by columns), B = dZ, unpacked
//
// The order of every sum is part of the contract: an element of C is summed over k in order by fused multiply-adds
// within blocks of kDepth, and the blocks are added in order. Tile shapes, vector width, threads and the batch a row
// is in change nothing, so all of them give the same bits. Blocking also keeps the rounding error of long sums down.
#pragma once

#include "simd.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

constexpr Index kDepth = 512;

// Rows of a register tile. With AVX-512, 6 rows of 4 vectors leave 8 of 32 registers for a row of B and the broadcast
// of A; with 16 registers, 6 rows of 2 vectors are the largest tile. Fewer rows run nearly as fast, so a remainder is
// spread over all tiles instead of padded.
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// A operand: element (i, k) is data[i * stride + k], or data[k * stride + i] by columns.
template <class T>
struct Operand {
    const T* data;
    Index stride;
};

enum class Start { zero, row, add };  // C starts at 0, at a given row (the bias), or at its present value

// C[0..R)[0..NV vectors) = start + sum over k < depth of A(., k) B(k, .).
template <class T, int R, int NV, bool ByColumns>
CHAINRULE_INLINE void micro_kernel(Index depth, const T* a, Index a_stride, const T* b, Index b_stride, T* c,
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
        Vec<T> bk[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) bk[v] = load(b + v * W);
        b += b_stride;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Vec<T> ark = Vec<T>{} + (ByColumns ? a[k * a_stride + r] : a[r * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[r][v] = fma(ark, bk[v], sum[r][v]);
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

template <class T>
using MicroKernel = void (*)(Index, const T*, Index, const T*, Index, T*, Index, Start, const T*);

template <class T, int R, int NV, bool ByColumns>
void tile(Index depth, const T* a, Index a_stride, const T* b, Index b_stride, T* c, Index c_stride, Start start,
          const T* row) {
    micro_kernel<T, R, NV, ByColumns>(depth, a, a_stride, b, b_stride, c, c_stride, start, row);
}

// tiles[ByColumns][NV - 1][R - 1]
#define CHAINRULE_TILES(NV, C) \
    {tile<T, 1, NV, C>, tile<T, 2, NV, C>, tile<T, 3, NV, C>, tile<T, 4, NV, C>, tile<T, 5, NV, C>, tile<T, 6, NV, C>}
template <class T>
constexpr MicroKernel<T> tiles[2][kTileVectors][kTileRows] = {
#if defined(__AVX512F__) || defined(__aarch64__)
    {CHAINRULE_TILES(1, false), CHAINRULE_TILES(2, false), CHAINRULE_TILES(3, false), CHAINRULE_TILES(4, false)},
    {CHAINRULE_TILES(1, true), CHAINRULE_TILES(2, true), CHAINRULE_TILES(3, true), CHAINRULE_TILES(4, true)},
#else
    {CHAINRULE_TILES(1, false), CHAINRULE_TILES(2, false)},
    {CHAINRULE_TILES(1, true), CHAINRULE_TILES(2, true)},
#endif
};
#undef CHAINRULE_TILES

// One column block of C, `width` wide (a whole number of vectors, at most a panel): rows of tiles, columns of vectors.
template <class T, bool ByColumns>
CHAINRULE_INLINE void block(Index rows, Index width, Index depth, const T* a, Index a_stride, const T* b,
                            Index b_stride, T* c, Index c_stride, Start start, const T* row) {
    constexpr Index W = kWidth<T>;
    const Index count = (rows + kTileRows - 1) / kTileRows;
    for (Index j = 0; j < width; j += kTileVectors * W) {
        const Index vectors = (width - j) / W < kTileVectors ? (width - j) / W : kTileVectors;
        for (Index t = 0, i = 0; t < count; ++t) {
            const Index height = (rows - i) / (count - t);  // even tiles: 32 rows are 5 6 5 5 5 6, not 6 6 6 6 6 2
            tiles<T>[ByColumns][vectors - 1][height - 1](depth, a + i*(ByColumns ? 1 : a_stride), a_stride, b + j,
                                                         b_stride, c + i* c_stride + j, c_stride, start, row + j);
            i += height;
        }
    }
}

// C (rows x cols) = A B + start, B in panels of kPanel columns: panel p begins at p * kPanel * b_rows and its rows are
// as wide as its columns rounded up to a cache line. `bias`: panel row b_rows - 1 holds the row that C starts from.
template <class T>
void multiply_panels(Index rows, Index cols, Index depth, Operand<T> a, const T* b, Index b_rows, bool bias, T* c,
                     Index c_stride) {
    for (Index k = 0; k == 0 || k < depth; k += kDepth)
        for (Index j = 0; j < cols; j += kPanel<T>) {
            const Index width = round_up(cols - j < kPanel<T> ? cols - j : kPanel<T>, kLine<T>);
            const T* panel = b + j * b_rows;
            const Start start = k > 0 ? Start::add : (bias ? Start::row : Start::zero);
            block<T, false>(rows, width, depth - k < kDepth ? depth - k : kDepth, a.data + k, a.stride,
                            panel + k * width, width, c + j, c_stride, start,
                            bias ? panel + (b_rows - 1) * width : panel);
        }
}

// C (rows x width) = Aᵀ B: A given by columns (its row k holds the k-th terms), B unpacked, width at most a panel.
template <class T>
void multiply_transposed(Index rows, Index width, Index depth, Operand<T> a, const T* b, Index b_stride, T* c,
                         Index c_stride) {
    for (Index k = 0; k == 0 || k < depth; k += kDepth)
        block<T, true>(rows, width, depth - k < kDepth ? depth - k : kDepth, a.data + k * a.stride, a.stride,
                       b + k * b_stride, b_stride, c, c_stride, k > 0 ? Start::add : Start::zero, b);
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
