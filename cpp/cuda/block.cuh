// SPDX-License-Identifier: MIT
// L2: matrix products of one block whose matrices all lie in shared memory, rows resident_stride apart.
//
// Shared memory bounds them: it gives a processor 32 words a cycle, which multiplies 128. So a thread takes a tile of 8 x 4
// sums, 32 multiply-adds for 12 words; with 2 x 4, which small products have more of, they are 8 for 6. To keep all threads busy,
// four of them share the terms of a tile. They are eight lanes apart: the eight lanes that read 16 bytes each in one turn of the
// banks have neighbouring tiles and the same terms.
#pragma once

#include "multiply.cuh"

namespace chainrule {
namespace cuda {

constexpr int kSharers = 4, kLanesInTurn = 8;

// A thread's part of a tile: all R x C sums over its share of the terms; after share(), R / 4 rows of the whole sums.
template <class T, int R, int C>
struct SharedTile {
    static constexpr int rows = R, cols = C, mine = R / kSharers;
    T sum[R][C] = {};

    // x yᵀ
    __device__ void add(const T (&x)[R], const T (&y)[C]) {
        CHAINRULE_UNROLL(8)
        for (int r = 0; r < R; ++r) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < C; ++c) sum[r][c] = fma(Vec<T>(x[r]), Vec<T>(y[c]), Vec<T>(sum[r][c]))[0];
        }
    }
    // Keeps the upper or lower rows, for which the thread so many lanes away gives its part, and gives the others.
    template <int Keep>
    __device__ void halve(bool upper, int lanes) {
        CHAINRULE_UNROLL(4)
        for (int r = 0; r < Keep; ++r) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < C; ++c) {
                const T low = sum[r][c], high = sum[r + Keep][c];
                sum[r][c] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, lanes);
            }
        }
    }
    __device__ void share(int sharer) {
        halve<R / 2>(sharer / 2 != 0, 2 * kLanesInTurn);
        halve<R / 4>(sharer % 2 != 0, kLanesInTurn);
    }
};

// Tiles of C, down x across of them. bring(tile, i, j, sharer) adds a sharer's terms to tile (i, j); then each of a tile's rows
// goes to take(i, j, r, sums), r its number within the tile.
template <class T, int R, int C, class Bring, class Take>
static __device__ __forceinline__ void each_tile(int down, int across, Bring bring, Take take) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, sharer = lane / kLanesInTurn;
    const int step = static_cast<int>(blockDim.x) / kSharers, tiles = down * across;
    for (int first = thread / 32 * kLanesInTurn; first < tiles; first += step) {
        const int mine = first + lane % kLanesInTurn, t = mine < tiles ? mine : tiles - 1;
        const int i = t / across, j = t - i * across;
        SharedTile<T, R, C> tile;
        bring(tile, i, j, sharer);
        tile.share(sharer);
        if (mine >= tiles) continue;
        CHAINRULE_UNROLL(1)  // one text of what is done with sums, in registers none the less
        for (int r = 0; r < tile.mine; ++r) {
            Several<T, C> sums;
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < C; ++c) {
                sums.at[c] = tile.sum[0][c];
                if (tile.mine > 1) tile.sum[0][c] = tile.sum[tile.mine - 1][c];
            }
            take(i, j, sharer * tile.mine + r, sums);
        }
    }
}

// Small products want tiles that they fill.
template <class Wide, class Narrow>
static __device__ __forceinline__ void by_shape(int m, int n, Wide wide, Narrow narrow) {
    m > 4 && n > 2 ? wide() : narrow();
}

// Row r of tile i of m rows: neighbouring tiles have neighbouring rows, which begin in different banks.
static __device__ __forceinline__ int row_of(int i, int r, int down) { return i + r * down; }
static __device__ __forceinline__ int at_most(int i, int last) { return i < last ? i : last; }

// Element q of each of N packs, and element t of each of N rows.
template <int N, class T>
static __device__ __forceinline__ void pick(const Several<T, 4> (&from)[N], int q, T (&to)[N]) {
    CHAINRULE_UNROLL(8)
    for (int r = 0; r < N; ++r) to[r] = from[r].at[q];
}
template <int N, class T>
static __device__ __forceinline__ void pick(const T* const (&rows)[N], int t, T (&to)[N]) {
    CHAINRULE_UNROLL(8)
    for (int r = 0; r < N; ++r) to[r] = rows[r][t];
}
template <int N, class T>
static __device__ __forceinline__ void pick_fours(const T* const (&rows)[N], int t, Several<T, 4> (&to)[N]) {
    CHAINRULE_UNROLL(8)
    for (int r = 0; r < N; ++r) to[r] = several_at<4>(rows[r] + t);
}
// The rows of a tile; one that is not there is the last one again.
template <int N, class T>
static __device__ __forceinline__ void find_rows(int i, int apart, int count, const T* from, int stride,
                                                 const T* (&rows)[N]) {
    CHAINRULE_UNROLL(8)
    for (int r = 0; r < N; ++r) rows[r] = from + at_most(row_of(i, r, apart), count - 1) * stride;
}

template <int R, int C, class T, class Take>
static __device__ __forceinline__ void block_product_by(int m, int n, int k, const T* a, int a_stride, const T* b,
                                                        int b_stride, Take take) {
    const int down = (m + R - 1) / R, across = (n + C - 1) / C, whole = k / 4 * 4;
    each_tile<T, R, C>(
        down, across,
        [&](SharedTile<T, R, C>& tile, int i, int j, int sharer) {
            const T* rows[R];
            find_rows(i, down, m, a, a_stride, rows);
            const T* const column = b + j * C;
            T x[R];
            for (int t = 4 * sharer; t < whole; t += 4 * kSharers) {
                Several<T, 4> fours[R];
                pick_fours(rows, t, fours);
                CHAINRULE_UNROLL(4)
                for (int q = 0; q < 4; ++q) {
                    pick(fours, q, x);
                    const Several<T, C> y = several_at<C>(column + (t + q) * b_stride);
                    tile.add(x, y.at);
                }
            }
            const int t = whole + sharer;  // of the last terms, one each
            if (t >= k) return;
            pick(rows, t, x);
            const Several<T, C> y = several_at<C>(column + t * b_stride);
            tile.add(x, y.at);
        },
        [&](int i, int j, int r, Several<T, C>& sums) {
            if (row_of(i, r, down) < m) take(row_of(i, r, down), j * C, sums);
        });
}
// C (m x n) = A B, A (m x k) and B (k x n). take(i, j, sums) gets one or four neighbours of row i from column j on; what is beyond
// column n has a place in a row, and no meaning.
template <class T, class Take>
static __device__ __forceinline__ void block_product(int m, int n, int k, const T* a, int a_stride, const T* b,
                                                     int b_stride, Take take) {
    by_shape(
        m, n, [&] { block_product_by<8, 4>(m, n, k, a, a_stride, b, b_stride, take); },
        [&] { block_product_by<4, 1>(m, n, k, a, a_stride, b, b_stride, take); });
}

template <int R, int C, class T, class Take>
static __device__ __forceinline__ void block_product_transposed_by(int m, int n, int k, const T* a, int a_stride,
                                                                   const T* b, int b_stride, Take take) {
    const int down = (m + R - 1) / R, across = (n + C - 1) / C, whole = k / 4 * 4;
    each_tile<T, R, C>(
        down, across,
        [&](SharedTile<T, R, C>& tile, int i, int j, int sharer) {
            const T *a_rows[R], *b_rows[C];
            find_rows(i, down, m, a, a_stride, a_rows);
            find_rows(j, across, n, b, b_stride, b_rows);
            T x[R], y[C];
            for (int t = 4 * sharer; t < whole; t += 4 * kSharers) {
                Several<T, 4> a_fours[R], b_fours[C];
                pick_fours(a_rows, t, a_fours);
                pick_fours(b_rows, t, b_fours);
                CHAINRULE_UNROLL(4)
                for (int q = 0; q < 4; ++q) {
                    pick(a_fours, q, x);
                    pick(b_fours, q, y);
                    tile.add(x, y);
                }
            }
            const int t = whole + sharer;
            if (t >= k) return;
            pick(a_rows, t, x);
            pick(b_rows, t, y);
            tile.add(x, y);
        },
        [&](int i, int j, int r, Several<T, C>& sums) {
            if (row_of(i, r, down) < m) take(row_of(i, r, down), j, across, sums);
        });
}
// C (m x n) = A Bᵀ, A (m x k) and B (n x k). take(i, j, apart, sums) gets columns of row i from j on that are so far apart.
template <class T, class Take>
static __device__ __forceinline__ void block_product_transposed(int m, int n, int k, const T* a, int a_stride,
                                                                const T* b, int b_stride, Take take) {
    by_shape(
        m, n, [&] { block_product_transposed_by<8, 4>(m, n, k, a, a_stride, b, b_stride, take); },
        [&] { block_product_transposed_by<4, 1>(m, n, k, a, a_stride, b, b_stride, take); });
}

template <int R, int C, class T, class Take>
static __device__ __forceinline__ void block_product_of_rows_by(int m, int n, int k, const T* a, int a_stride,
                                                                const T* b, int b_stride, Take take) {
    const int down = (m + R - 1) / R, across = (n + C - 1) / C, fours = (m + 3) / 4;
    each_tile<T, R, C>(
        down, across,
        [&](SharedTile<T, R, C>& tile, int i, int j, int sharer) {
            const T* columns[R / 4];  // of A, four rows of Aᵀ each
            find_rows(i, down, fours, a, 4, columns);
            for (int t = sharer; t < k; t += kSharers) {
                T x[R];
                CHAINRULE_UNROLL(2)
                for (int g = 0; g < R / 4; ++g) {
                    const Several<T, 4> four = several_at<4>(columns[g] + t * a_stride);
                    CHAINRULE_UNROLL(4)
                    for (int q = 0; q < 4; ++q) x[4 * g + q] = four.at[q];
                }
                const Several<T, C> y = several_at<C>(b + t * b_stride + j * C);
                tile.add(x, y.at);
            }
        },
        [&](int i, int j, int r, Several<T, C>& sums) {
            const int row = 4 * row_of(i, r / 4, down) + r % 4;
            if (row < m) take(row, j * C, sums);
        });
}
// C (m x n) = Aᵀ B, A (k x m) and B (k x n); take as in block_product.
template <class T, class Take>
static __device__ __forceinline__ void block_product_of_rows(int m, int n, int k, const T* a, int a_stride, const T* b,
                                                             int b_stride, Take take) {
    by_shape(
        m, n, [&] { block_product_of_rows_by<8, 4>(m, n, k, a, a_stride, b, b_stride, take); },
        [&] { block_product_of_rows_by<4, 1>(m, n, k, a, a_stride, b, b_stride, take); });
}

// The sums of B's columns, B (k x n): take(j, sum).
template <class T, class Take>
static __device__ __forceinline__ void block_sum_of_rows(int n, int k, const T* b, int b_stride, Take take) {
    each_tile<T, kSharers, 1>(
        1, n,
        [&](SharedTile<T, kSharers, 1>& tile, int, int j, int sharer) {
            for (int t = sharer; t < k; t += kSharers) tile.sum[0][0] = tile.sum[0][0] + b[t * b_stride + j];
        },
        [&](int, int j, int r, Several<T, 1>& sum) {
            if (r == 0) take(j, sum);
        });
}

}  // namespace cuda
}  // namespace chainrule
