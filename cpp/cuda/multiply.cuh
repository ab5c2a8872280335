// SPDX-License-Identifier: MIT
// L2: the matrix product of the GPU engine. A block has a tile of C = A B; it brings both operands to shared memory a few
// terms at a time, the next ones on their way while it multiplies, and hands each sum to an epilogue while it is in a register.
// Each sum is taken by one thread (or, on tensor cores, one warp) over k in order: two runs give the same bits.
#pragma once

#include "formulas.cuh"
#include "mma.cuh"
#include "runtime.cuh"
#include "sizes.hpp"

namespace chainrule {
namespace cuda {

constexpr int kThreads = 256;  // of a block that has no tile

// The rows of a batch: so many after the first, as they come or as an epoch's order names them.
struct Rows {
    const std::int64_t* order = nullptr;  // null: as they come
    const std::int64_t* first = nullptr;  // null: 0
    std::int64_t offset = 0;
    bool plain() const { return !order && !first && offset == 0; }
    __device__ std::int64_t begin() const { return first ? *first + offset : offset; }
    __device__ std::int64_t operator()(std::int64_t i) const {
        const std::int64_t at = begin() + i;
        return order ? order[at] : at;
    }
};

// A row-major matrix. A column of ones beside the last one makes a bias an ordinary weight.
template <class T>
struct Operand {
    const T* data;
    Index stride;
    Rows rows = {};
    int ones = -1;
    __device__ const T* row(Index i) const { return data + rows(i) * stride; }
    __device__ T at(int i, int col) const { return col == ones ? T{1} : row(i)[col]; }
    // The same with its first row at `data` or `order`, which are then read off the device once, not for each element.
    __device__ Operand settled() const {
        const std::int64_t begin = rows.begin();
        Operand here = *this;
        here.rows = {rows.order ? rows.order + begin : nullptr};
        if (!rows.order) here.data += begin * stride;
        return here;
    }
};

// ---- tiles ----------------------------------------------------------------------------------------------------------

// By fused multiply-adds, a sub-tile a thread, in groups of four rows and columns so that shared memory is read by 16 bytes. With
// several teams of threads, each team has all of the tile and a part of the terms.
template <class T, int Rows, int Cols, int Depth, int PerRow, int PerCol, int Teams = 1>
struct Simt {
    using Real = T;
    static constexpr int rows = Rows, cols = Cols, pitch = Cols, depth = Depth, padding = 4;
    static constexpr int across = Cols / PerCol, team_threads = Rows / PerRow * across, threads = Teams * team_threads;
    static constexpr int parts = Teams > 1 ? 1 : PerRow, part_rows = Rows / parts, team_depth = Depth / Teams;
    static_assert(Teams == 1 || Teams * Rows * Cols <= Depth * (Rows + Cols + 2 * padding), "gather has room");
    T sum[PerRow][PerCol] = {};

    static __device__ T kept(T x) { return x; }
    static __device__ int team() { return static_cast<int>(threadIdx.x) / team_threads; }
    static __device__ int member() { return static_cast<int>(threadIdx.x) % team_threads; }
    static __device__ int row_of(int r) { return r / 4 * (4 * Rows / PerRow) + member() / across * 4 + r % 4; }
    static __device__ int col_of(int c) { return c / 4 * (4 * across) + member() % across * 4 + c % 4; }

    __device__ void add(const T* a, const T* b) {
        a += team() * team_depth * (Rows + padding);
        b += team() * team_depth * (Cols + padding);
        CHAINRULE_UNROLL(16)
        for (int k = 0; k < team_depth; ++k) {
            Several<T, 4> x[PerRow / 4], y[PerCol / 4];
            CHAINRULE_UNROLL(4)
            for (int r = 0; r < PerRow / 4; ++r) x[r] = several_at<4>(a + k * (Rows + padding) + row_of(4 * r));
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < PerCol / 4; ++c) y[c] = several_at<4>(b + k * (Cols + padding) + col_of(4 * c));
            CHAINRULE_UNROLL(8)
            for (int r = 0; r < PerRow; ++r) {
                CHAINRULE_UNROLL(8)
                for (int c = 0; c < PerCol; ++c)
                    sum[r][c] = fma(Vec<T>(x[r / 4].at[r % 4]), Vec<T>(y[c / 4].at[c % 4]), Vec<T>(sum[r][c]))[0];
            }
        }
    }
    // The teams' sums, added up in order, to memory, as the tile's only part.
    __device__ void gather(T* memory) {
        if constexpr (Teams > 1) {
            T* const own = memory + team() * Rows * Cols;
            CHAINRULE_UNROLL(8)
            for (int r = 0; r < PerRow; ++r) {
                CHAINRULE_UNROLL(8)
                for (int c = 0; c < PerCol; ++c) own[row_of(r) * Cols + col_of(c)] = sum[r][c];
            }
            __syncthreads();
            for (int e = static_cast<int>(threadIdx.x); e < Rows * Cols; e += threads) {
                T total = memory[e];
                CHAINRULE_UNROLL(16)
                for (int other = 1; other < Teams; ++other) total = total + memory[other * Rows * Cols + e];
                memory[e] = total;
            }
        }
    }
    // Puts the first part, and moves the others up: an index that is known only at run time would send all of `sum` to memory.
    __device__ void put_part(T* to) {
        if constexpr (Teams == 1) {
            T* const row = to + member() / across * Cols;
            CHAINRULE_UNROLL(8)
            for (int c = 0; c < PerCol; ++c) {
                row[col_of(c)] = sum[0][c];
                CHAINRULE_UNROLL(8)
                for (int r = 1; r < PerRow; ++r) sum[r - 1][c] = sum[r][c];
            }
        }
    }
    // Of the tile, the row that lies in row `slot` of part `part`.
    static __device__ int row_in_tile(int part, int slot) {
        return Teams > 1 ? slot : part / 4 * (4 * Rows / PerRow) + slot * 4 + part % 4;
    }
};

// On tensor cores, Down x Across fragments of 16 x 8 a warp. Operands are rounded to tf32 as they are put into shared memory, where
// several warps read each, and to bfloat16 in pairs on their way into registers. Of eight terms, a lane's two are neighbours, as are
// four of sixteen by twos: with rows four longer than 32 banks, a warp that reads of them, and one that puts eight terms of four
// rows there, meet no bank twice. So do sums with rows eight longer.
//
// Not there: float32 by three products of tf32, x = high + low. Sums that stay on the tensor cores are cut off at each step, and
// 1024 terms of normal numbers come out 16 times less accurate than fused multiply-adds (root mean square, 4.7e-7 and 2.9e-8 of
// the sum of sizes, on a model of the cut; 48 x 48 sums). Three products from 0 on, added outside, are better than those from 32
// terms on (1.1e-8 at 1024, 4.2e-8 instead of 2.6e-8 at 8). But an infinite operand makes NaN of what is infinite or, behind
// tanh, finite, and whether it is faster has to be seen on a GPU.
template <bool Bfloat16, int Rows, int Cols, int Depth, int Down, int Across>
struct TensorCores {
    using Real = float;
    static constexpr int rows = Rows, cols = Cols, pitch = Cols + 8, depth = Depth, padding = 4;
    static constexpr int warps_across = Cols / (8 * Across), threads = 32 * (Rows / (16 * Down)) * warps_across;
    static constexpr int step = Bfloat16 ? 16 : 8;
    static constexpr int parts = 2 * Down, part_rows = Rows / parts;
    static_assert(part_rows * pitch <= Depth * (Rows + Cols + 2 * padding), "put_part has room");
    float sum[Down][Across][4] = {};

    static __device__ int group() { return static_cast<int>(threadIdx.x) % 32 / 4; }
    static __device__ int turn() { return static_cast<int>(threadIdx.x) % 4; }
    static __device__ int first_row() { return static_cast<int>(threadIdx.x) / 32 / warps_across * 16 * Down; }
    static __device__ int first_col() { return static_cast<int>(threadIdx.x) / 32 % warps_across * 8 * Across; }

    // As an operand lies in shared memory.
    static __device__ float kept(float x) { return Bfloat16 ? x : round_to_tf32(x); }
    // Where a lane's terms of part `part` of a step begin.
    static __device__ int term(int part) { return 2 * turn() + (Bfloat16 ? 8 * part : part); }
    static __device__ std::uint32_t operand(const float* place, int stride, int part) {
        place += term(part) * stride;
        return Bfloat16 ? bfloat16_pair(place[0], place[stride]) : bits_of(place[0]);
    }
    __device__ void add(const float* a, const float* b) {
        constexpr int a_stride = Rows + padding, b_stride = Cols + padding;
        CHAINRULE_UNROLL(4)
        for (int k = 0; k < Depth; k += step) {
            std::uint32_t x[Down][4], y[Across][2];
            CHAINRULE_UNROLL(4)
            for (int i = 0; i < Down; ++i) {
                CHAINRULE_UNROLL(4)
                for (int p = 0; p < 4; ++p)
                    x[i][p] = operand(a + k * a_stride + first_row() + 16 * i + group() + p % 2 * 8, a_stride, p / 2);
            }
            CHAINRULE_UNROLL(4)
            for (int j = 0; j < Across; ++j) {
                CHAINRULE_UNROLL(2)
                for (int p = 0; p < 2; ++p)
                    y[j][p] = operand(b + k * b_stride + first_col() + 8 * j + group(), b_stride, p);
            }
            CHAINRULE_UNROLL(4)
            for (int i = 0; i < Down; ++i) {
                CHAINRULE_UNROLL(4)
                for (int j = 0; j < Across; ++j)
                    if (Bfloat16)
                        multiply_bfloat16(sum[i][j], x[i], y[j]);
                    else
                        multiply_tf32(sum[i][j], x[i], y[j]);
            }
        }
    }
    __device__ void gather(float*) {}
    __device__ void put_part(float* to) {
        float* const row = to + (static_cast<int>(threadIdx.x) / 32 / warps_across * 8 + group()) * pitch;
        CHAINRULE_UNROLL(4)
        for (int j = 0; j < Across; ++j) {
            CHAINRULE_UNROLL(2)
            for (int e = 0; e < 2; ++e) {
                row[first_col() + 8 * j + 2 * turn() + e] = sum[0][j][e];
                CHAINRULE_UNROLL(4)
                for (int i = 0; i < Down; ++i) {
                    if (i > 0) sum[i - 1][j][2 + e] = sum[i][j][e];
                    sum[i][j][e] = sum[i][j][2 + e];
                }
            }
        }
    }
    static __device__ int row_in_tile(int part, int slot) {
        return slot / 8 * 16 * Down + part / 2 * 16 + part % 2 * 8 + slot % 8;
    }
};

// Of one operand, the part of a tile that a thread brings: Extent rows or columns of C by Depth terms. DownK: the terms run down
// the matrix' rows, and a warp reads along one, always the same columns; else the terms run along the rows, and a warp reads
// eight of four rows, which fill sectors of memory, too, and lie in 32 banks where they are put.
template <class Tile, bool DownK, int Extent>
struct Carrier {
    using T = typename Tile::Real;
    static constexpr int Depth = Tile::depth, Threads = Tile::threads, Padding = Tile::padding;
    static constexpr int count = Extent * Depth / Threads, warps = Threads / 32, fours = Extent / 4;
    static constexpr int own_rows = DownK || fours < warps ? 1 : fours / warps;  // whose terms a thread reads
    static constexpr int warps_of_row = fours < warps ? warps / fours : 1;
    static_assert(count * Threads == Extent * Depth && count % own_rows == 0, "every thread brings as much");
    static_assert(DownK ? Threads % Extent == 0 : Depth % (8 * warps_of_row) == 0, "and from the same rows or columns");
    T value[count];
    const T* line[own_rows];  // the rows, or the column
    bool there[own_rows];     // not beyond the matrix
    T filler;                 // of what is not: 0, or 1 in a column of ones
    Rows rows;
    Index stride;

    static __device__ int place(int s) {
        const int thread = static_cast<int>(threadIdx.x);
        return DownK ? thread % Extent : (thread / 32 % fours + s % own_rows * warps) * 4 + thread % 32 / 8;
    }
    static __device__ int term(int s) {
        const int thread = static_cast<int>(threadIdx.x);
        return DownK ? thread / Extent + s * (Threads / Extent)
                     : (thread / 32 / fours + s / own_rows * warps_of_row) * 8 + thread % 8;
    }

    __device__ Carrier(const Operand<T>& from, int start, int end)
        : filler(DownK && start + place(0) == from.ones ? T{1} : T{0}), rows(from.rows), stride(from.stride) {
        CHAINRULE_UNROLL(4)
        for (int r = 0; r < own_rows; ++r) {
            const int i = start + place(r);
            there[r] = i < end && filler == 0;
            const int j = there[r] ? i : 0;
            line[r] = from.data + (DownK ? j : rows(j) * stride);
        }
    }
    // All loads first, some of what nobody wants: with a branch around each they would wait for one another.
    __device__ void fetch(int k, int k_end) {
        CHAINRULE_UNROLL(16)
        for (int s = 0; s < count; ++s) {
            const int t = k + term(s), near = t < k_end ? t : k_end - 1;
            const T here = line[s % own_rows][DownK ? rows(near) * stride : near];
            value[s] = there[s % own_rows] && t < k_end ? here : filler;
        }
    }
    __device__ void put(T* to) const {
        CHAINRULE_UNROLL(16)
        for (int s = 0; s < count; ++s) to[term(s) * (Extent + Padding) + place(s)] = Tile::kept(value[s]);
    }
};

template <class Tile>
constexpr std::size_t tile_bytes() {
    return static_cast<std::size_t>(Tile::depth * (Tile::rows + Tile::cols + 2 * Tile::padding)) *
           sizeof(typename Tile::Real);
}

// Whether a processor is to have two blocks at once, which fill each other's waits: where ptxas spills nothing at 128 registers a
// thread. It does for large tiles with both operands along rows, to which a thread has eight pointers, for teams in float64, and
// for one large tile on sm_80 and most on sm_121.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
template <class Tile, bool ADownK, bool BDownK>
constexpr bool is_one_of_two = false;
#else
template <class Tile, bool ADownK, bool BDownK>
constexpr bool is_one_of_two = Tile::parts > 1 && (ADownK || BDownK || Tile::rows < kLargeTile);
#endif

// C (m x n) over k terms; all of its elements go to the epilogue, then the block ends with epilogue.finish(memory).
template <class Tile, bool ADownK, bool BDownK, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::threads, is_one_of_two<Tile, ADownK, BDownK> ? 2 : 1)
    multiply(int m, int n, int k, Operand<T> a, Operand<T> b, Epilogue epilogue) {
    CHAINRULE_SHARED(T, memory);
    T* const a_tile = memory;
    T* const b_tile = memory + Tile::depth * (Tile::rows + Tile::padding);
    const int down = (m + Tile::rows - 1) / Tile::rows, block = static_cast<int>(blockIdx.x);
    const int row = block % down * Tile::rows, col = block / down * Tile::cols;
    Carrier<Tile, ADownK, Tile::rows> next_a(a.settled(), row, m);
    Carrier<Tile, BDownK, Tile::cols> next_b(b.settled(), col, n);
    int begin = 0, end = k;
    if constexpr (Epilogue::sliced) epilogue.narrow(begin, end);
    Tile tile;
    if (begin < end) {
        next_a.fetch(begin, end);
        next_b.fetch(begin, end);
    }
    for (int start = begin; start < end; start += Tile::depth) {
        next_a.put(a_tile);
        next_b.put(b_tile);
        __syncthreads();
        if (start + Tile::depth < end) {
            next_a.fetch(start + Tile::depth, end);
            next_b.fetch(start + Tile::depth, end);
        }
        tile.add(a_tile, b_tile);
        __syncthreads();
    }
    tile.gather(memory);
    // Part by part through shared memory: one text of the epilogue instead of one for each element of a thread's, and
    // neighbouring threads write neighbouring columns. Four elements at a time have their loads under way together; two, where
    // a large tile's sums leave no registers for more and another block fills the wait.
    constexpr bool in_twos = Tile::rows >= kLargeTile && is_one_of_two<Tile, ADownK, BDownK>;
    constexpr int size = Tile::part_rows * Tile::cols, N = in_twos ? 2 : size >= 4 * Tile::threads ? 4 : 1;
    static_assert(size % (N * Tile::threads) == 0 && Tile::threads % Tile::cols == 0, "a thread stays in its column");
    for (int part = 0; part < Tile::parts; ++part) {
        tile.put_part(memory);
        __syncthreads();
        const int column = static_cast<int>(threadIdx.x) % Tile::cols, j = col + column;
        CHAINRULE_UNROLL(1)
        for (int e = static_cast<int>(threadIdx.x); e < size && j < n; e += N * Tile::threads) {
            Several<T, N> sums;
            int rows[N];
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < N; ++c) {
                const int slot = e / Tile::cols + c * (Tile::threads / Tile::cols);
                const int i = row + Tile::row_in_tile(part, slot);
                sums.at[c] = memory[slot * Tile::pitch + column];
                rows[c] = i < m ? i : -1;
            }
            epilogue(rows, j, sums);
        }
        __syncthreads();
    }
    epilogue.finish(memory);
}

// ---- epilogues ------------------------------------------------------------------------------------------------------
// An epilogue takes N elements of a column of C, whose rows are given, -1 for one that is not there, and leaves what it has put
// into memory. All are loaded before the first is needed: N waits in one. With `packed_only` nobody reads what it makes but
// products, and derivatives that want no more than a sign: the library may keep it in the form that its products take, alone.

// f(c) for each of N rows or places that is there.
template <class I, int N, class F>
static __device__ __forceinline__ void each_there(const I (&rows)[N], F f) {
    CHAINRULE_UNROLL(4)
    for (int c = 0; c < N; ++c)
        if (rows[c] >= 0) f(c);
}

// Z = X Wᵀ + b, z kept where somebody needs it, and y = op(z). With `add`, to what is in y.
template <class T>
struct Activate {
    static constexpr bool sliced = false;
    const T* bias;       // null: none
    MatrixView<T> z, y;  // data null: not kept
    Op op;
    T param;
    bool add;
    bool packed_only = false;
    template <int N>
    __device__ void operator()(const int (&rows)[N], int j, Several<T, N>& v) {
        Several<T, N> more = {};
        if (add) each_there(rows, [&](int c) { more.at[c] = y.data[rows[c] * y.stride + j]; });
        const T b = bias ? bias[j] : T{0};
        each_there(rows, [&](int c) { v.at[c] = bias ? v.at[c] + b : v.at[c]; });
        if (add) each_there(rows, [&](int c) { v.at[c] = v.at[c] + more.at[c]; });
        if (z.data) each_there(rows, [&](int c) { z.data[rows[c] * z.stride + j] = v.at[c]; });
        op_forward(op, v, param);
        if (y.data) each_there(rows, [&](int c) { y.data[rows[c] * y.stride + j] = v.at[c]; });
    }
    __device__ void finish(T*) {}
};

// dX = dZ W, and the cotangent before the op that made X: dX g'. With `add`, dX is added to what is there.
template <class T>
struct Differentiate {
    static constexpr bool sliced = false;
    MatrixView<T> dx;             // data null: not kept
    MatrixView<const T> saved;    // data null: there is no op
    const std::uint16_t* packed;  // not null: `saved` lies here instead, as bfloat16
    Op op;
    T param;
    bool add;
    bool packed_only = false;
    template <int N>
    __device__ void operator()(const int (&rows)[N], int j, Several<T, N>& v) {
        Several<T, N> more = {}, from = {};
        if (add) each_there(rows, [&](int c) { more.at[c] = dx.data[rows[c] * dx.stride + j]; });
        if (packed)
            each_there(rows, [&](int c) { from.at[c] = real_of<T>(packed[rows[c] * saved.stride + j]); });
        else if (saved.data)
            each_there(rows, [&](int c) { from.at[c] = saved.data[rows[c] * saved.stride + j]; });
        if (add) each_there(rows, [&](int c) { v.at[c] = v.at[c] + more.at[c]; });
        if (saved.data) op_vjp(op, v, from, param);
        if (dx.data) each_there(rows, [&](int c) { dx.data[rows[c] * dx.stride + j] = v.at[c]; });
    }
    __device__ void finish(T*) {}
};

// Where the gradient of a linear layer has output o's derivative by input i, W (outputs, inputs), then b.
static __device__ __forceinline__ Index place_of_gradient(int o, int i, int outputs, int inputs) {
    return i < inputs ? static_cast<Index>(o) * inputs + i : static_cast<Index>(outputs) * inputs + o;
}

// dW beside db, into a gradient laid out like theta.
template <class T>
struct StoreGradient {
    static constexpr bool sliced = false;
    T* to;
    int outputs, inputs;
    bool add;
    template <int N>
    __device__ void operator()(const int (&rows)[N], int i, Several<T, N>& v) {
        Several<T, N> more = {};
        if (add) each_there(rows, [&](int c) { more.at[c] = to[place_of_gradient(rows[c], i, outputs, inputs)]; });
        each_there(rows, [&](int c) {
            if (add) v.at[c] = more.at[c] + v.at[c];
            to[place_of_gradient(rows[c], i, outputs, inputs)] = v.at[c];
        });
    }
    __device__ void finish(T*) {}
};

// The sum over a block's threads, at thread 0; always in the same order. `memory` has a double for each thread.
static __device__ __forceinline__ double block_sum(double mine, double* memory) {
    const unsigned t = threadIdx.x;
    memory[t] = mine;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {  // a power of two
        __syncthreads();
        if (t < half) memory[t] = memory[t] + memory[t + half];
    }
    __syncthreads();
    const double total = memory[0];
    __syncthreads();  // before anybody writes there again
    return total;
}

// What an update rule needs of the step in hand, for weights that lie from `offset` of theta on.
template <class T>
struct Rule {
    OptimizerOp rule;
    T* theta;
    T* slots[kSlots];
    const Hyper<T>* hyper;     // of each step of the epoch
    const std::int64_t* step;  // the present one; null: `hyper` is its
    T l1, l2, clip_value;

    __device__ bool regularizes() const { return l1 != 0 || l2 != 0 || clip_value != 0; }
    // The gradient with the penalty's part, clipped; adds the penalty itself to `penalty`.
    __device__ T regularized(Index place, T gradient, bool weight, double& penalty) const {
        const T w = theta[place];
        if (weight && (l1 != 0 || l2 != 0)) {
            gradient = gradient + penalty_gradient(Vec<T>(w), l1, l2)[0];
            penalty += static_cast<double>(
                chainrule::CHAINRULE_ISA::penalty(Vec<T>(w), l1, Vec<T>(l2 * static_cast<T>(0.5)))[0]);
        }
        return clip_value != 0 ? clamped(Vec<T>(gradient), Vec<T>(clip_value))[0] : gradient;
    }
    // To neighbouring weights, from `place` on.
    template <int N>
    __device__ void apply(Index place, const Several<T, N>& gradient) const {
        update<N>(
            gradient, [&](T* from, Several<T, N>& to) { to = several_at<N>(from + place); },
            [&](T* to, const Several<T, N>& from) { several_at<N>(to + place) = from; });
    }
    // To those of places that are not negative; returns the new weights.
    template <int N>
    __device__ Several<T, N> apply(const Index (&places)[N], const Several<T, N>& gradient) const {
        return update<N>(
            gradient,
            [&](const T* from, Several<T, N>& to) { each_there(places, [&](int c) { to.at[c] = from[places[c]]; }); },
            [&](T* to, const Several<T, N>& from) { each_there(places, [&](int c) { to[places[c]] = from.at[c]; }); });
    }
    template <int N, class Load, class Store>
    __device__ Several<T, N> update(const Several<T, N>& gradient, Load load, Store store) const {
        Several<T, N> w = {}, state[kSlots] = {};
        load(theta, w);
        CHAINRULE_UNROLL(3)
        for (int s = 0; s < kSlots; ++s)
            if (slots[s]) load(slots[s], state[s]);
        rule_update(rule, w, gradient, state, hyper[step ? *step : 0]);
        store(theta, w);
        CHAINRULE_UNROLL(3)
        for (int s = 0; s < kSlots; ++s)
            if (slots[s]) store(slots[s], state[s]);
        return w;
    }
};

// dW beside db, and the update at once.
template <class T>
struct Update {
    static constexpr bool sliced = false;
    Rule<T> rule;
    Index offset;
    int outputs, inputs;
    double* penalties;  // of each block
    double penalty = 0;
    template <int N>
    __device__ void operator()(const int (&rows)[N], int i, Several<T, N>& v) {
        Index places[N];
        CHAINRULE_UNROLL(4)
        for (int c = 0; c < N; ++c)
            places[c] = rows[c] < 0 ? -1 : offset + place_of_gradient(rows[c], i, outputs, inputs);
        if (rule.regularizes())
            each_there(rows, [&](int c) { v.at[c] = rule.regularized(places[c], v.at[c], i < inputs, penalty); });
        v = rule.apply(places, v);
    }
    __device__ void finish(T* memory) {
        if (rule.l1 == 0 && rule.l2 == 0) return;
        const double total = block_sum(penalty, reinterpret_cast<double*>(memory));
        if (threadIdx.x == 0) penalties[blockIdx.x] = total;
    }
};

// One slice of the terms for each row of blocks, to where all slices of C lie.
template <class T>
struct KeepSlice {
    static constexpr bool sliced = true;
    T* slices;
    int count, terms;  // of slices, and of one at most
    int size, cols;    // of C
    __device__ void narrow(int& begin, int& end) const {
        begin = static_cast<int>(blockIdx.y) * terms;
        end = end - begin < terms ? end : begin + terms;
    }
    template <int N>
    __device__ void operator()(const int (&rows)[N], int j, const Several<T, N>& v) {
        T* const to = slices + static_cast<Index>(blockIdx.y) * size;
        each_there(rows, [&](int c) { to[rows[c] * cols + j] = v.at[c]; });
    }
    __device__ void finish(T*) {}
};

// The epilogue of a product whose slices lie there; they are added up in order.
template <class T, class Epilogue>
__global__ void __launch_bounds__(kThreads) add_slices(int size, int n, int count, const T* slices, Epilogue epilogue) {
    CHAINRULE_SHARED(T, memory);
    const int place = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
    if (place < size) {
        Several<T, 1> sum = {};
        CHAINRULE_UNROLL(8)
        for (int s = 0; s < count; ++s) sum.at[0] = sum.at[0] + slices[static_cast<Index>(s) * size + place];
        const int rows[1] = {place / n};
        epilogue(rows, place % n, sum);
    }
    epilogue.finish(memory);
}

// ---- the choice of a tile -------------------------------------------------------------------------------------------

constexpr int kDeepest = 128;  // terms of a tile

// Large tiles read each operand less often, small and tiny ones keep more of the device busy.
template <class T>
struct Tiles {
    using Mini = Simt<T, 16, 16, kDeepest, 4, 4, 16>;
    using Tiny = Simt<T, 32, 32, 64, 4, 4, 4>;
    using Small = Simt<T, 64, 64, 16, 4, 4>;
    using Large = std::conditional_t<sizeof(T) == 4, Simt<T, 128, 128, 16, 8, 8>, Small>;
};
using Tf32Tiny = TensorCores<false, 32, 32, 64, 1, 1>;
using Tf32Small = TensorCores<false, 64, 64, 16, 2, 2>;
using Tf32Large = TensorCores<false, 128, 128, 16, 4, 4>;
using Bfloat16Tiny = TensorCores<true, 32, 32, 64, 1, 1>;
using Bfloat16Small = TensorCores<true, 64, 64, 16, 2, 2>;
using Bfloat16Large = TensorCores<true, 128, 128, 16, 4, 4>;

template <class Tile, bool ADownK, bool BDownK, class T, class Epilogue>
void multiply_by(Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b, const Epilogue& epilogue,
                 cudaStream_t stream) {
    dim3 blocks(static_cast<unsigned>(tiles_across(m, Tile::rows) * tiles_across(n, Tile::cols)));
    if constexpr (Epilogue::sliced) blocks.y = static_cast<unsigned>(epilogue.count);
    launch(multiply<Tile, ADownK, BDownK, T, Epilogue>, blocks, Tile::threads, tile_bytes<Tile>(), stream,
           static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), a, b, epilogue);
}

template <bool ADownK, bool BDownK, class T, class Epilogue>
void multiply_tiles(Precision precision, TileSize size, Index m, Index n, Index k, const Operand<T>& a,
                    const Operand<T>& b, const Epilogue& epilogue, cudaStream_t stream) {
    const auto with = [&](auto tile) { multiply_by<decltype(tile), ADownK, BDownK>(m, n, k, a, b, epilogue, stream); };
    const auto go = [&](auto mini, auto tiny, auto small, auto large) {
        if (size == TileSize::mini) return with(mini);
        if (size == TileSize::tiny) return with(tiny);
        if constexpr (!Epilogue::sliced) size == TileSize::small ? with(small) : with(large);
    };
    if constexpr (sizeof(T) == 4) {
        if (precision == Precision::tf32) return go(Tf32Tiny{}, Tf32Tiny{}, Tf32Small{}, Tf32Large{});
        if (precision == Precision::bfloat16)
            return go(Bfloat16Tiny{}, Bfloat16Tiny{}, Bfloat16Small{}, Bfloat16Large{});
    }
    go(typename Tiles<T>::Mini{}, typename Tiles<T>::Tiny{}, typename Tiles<T>::Small{}, typename Tiles<T>::Large{});
}

// Aᵀ B, in slices where there are several, for which there is room.
template <class T, class Epilogue>
void multiply_rows(Precision precision, Cut cut, Index m, Index n, Index k, const Operand<T>& a, const Operand<T>& b,
                   const Epilogue& epilogue, T* room, cudaStream_t stream) {
    if (cut.slices == 1) return multiply_tiles<true, true>(precision, cut.size, m, n, k, a, b, epilogue, stream);
    const int count = static_cast<int>(cut.slices), size = static_cast<int>(m * n), cols = static_cast<int>(n);
    const int terms = static_cast<int>(round_up(tiles_across(k, cut.slices), kDeepest));
    multiply_tiles<true, true>(precision, cut.size, m, n, k, a, b, KeepSlice<T>{room, count, terms, size, cols},
                               stream);
    launch(add_slices<T, Epilogue>, dim3(static_cast<unsigned>(tiles_across(size, kThreads))), kThreads,
           kThreads * sizeof(double), stream, size, cols, count, static_cast<const T*>(room), epilogue);
}

}  // namespace cuda
}  // namespace chainrule
