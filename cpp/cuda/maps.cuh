// SPDX-License-Identifier: MIT
// L2: what is not a matrix product: maps over elements, maps over rows, sums in a fixed order, and the book-keeping of a step.
// A map is a small struct with an operator(): what one thread does.
#pragma once

#include <algorithm>

#include "multiply.cuh"

namespace chainrule {
namespace cuda {

template <class F>
__global__ void __launch_bounds__(kThreads) over_elements(Index first, unsigned count, unsigned cols, F f) {
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    if (i < count) f(first + static_cast<Index>(i / cols), static_cast<Index>(i % cols));
}
template <class F>
__global__ void __launch_bounds__(kThreads, 4) over_each(Index count, F f) {  // up to 64 registers: an update's are 44
    const Index i = static_cast<Index>(blockIdx.x) * kThreads + static_cast<Index>(threadIdx.x);
    if (i < count) f(i);
}

// f(i) by the threads of row i; see lane.hpp.
template <class F>
__global__ void __launch_bounds__(kThreads, 2) over_rows(Index rows, F f) {
    const Index i = static_cast<Index>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (i < rows) f(i);
}

inline dim3 blocks_for(Index threads) { return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)); }

template <class F>
void map_elements(Index rows, Index cols, const F& f, cudaStream_t stream) {
    // As many rows at a time as 32 bits count: a thread's division by 64 bits would take longer than what it is there for.
    const Index piece = std::max<Index>(1, (Index{1} << 31) / std::max<Index>(cols, 1));
    for (Index first = 0; first < rows; first += piece) {
        const Index count = std::min(piece, rows - first) * cols;
        launch(over_elements<F>, blocks_for(count), kThreads, 0, stream, first, static_cast<unsigned>(count),
               static_cast<unsigned>(cols), f);
    }
}
template <class F>
void map_each(Index count, const F& f, cudaStream_t stream) {
    launch(over_each<F>, blocks_for(count), kThreads, 0, stream, count, f);
}
template <class F>
void map_rows(Index rows, Index cols, const F& f, cudaStream_t stream) {
    const int threads = row_threads(cols);
    launch(over_rows<F>, blocks_for(rows * threads), dim3(threads, kThreads / threads), 0, stream, rows, f);
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// φ for rows of derivatives: `seeds` of them share one row, the first of which is number `phase` of its example.
template <class T>
struct Shared {
    MatrixView<const T> m;
    Index phase = 0, seeds = 1;
    __device__ const T* row(Index i) const { return m.data + (seeds == 1 ? i : (phase + i) / seeds) * m.stride; }
};

template <class T>
struct CopyRows {
    MatrixView<T> to;
    MatrixView<const T> from;
    Rows rows = {};
    __device__ void operator()(Index i, Index j) const {
        to.data[i * to.stride + j] = from.data[rows(i) * from.stride + j];
    }
};
template <class T>
struct AddTo {
    MatrixView<T> to;
    MatrixView<const T> from;
    __device__ void operator()(Index i, Index j) const {
        to.data[i * to.stride + j] = to.data[i * to.stride + j] + from.data[i * from.stride + j];
    }
};
// Row i is row (phase + i) mod seeds of the unit matrix.
template <class T>
struct Unit {
    MatrixView<T> to;
    Index phase, seeds;
    __device__ void operator()(Index i, Index j) const {
        to.data[i * to.stride + j] = (phase + i) % seeds == j ? T{1} : T{0};
    }
};
// Every row is the unit matrix' row `one`.
template <class T>
struct AllUnit {
    MatrixView<T> to;
    Index one;
    __device__ void operator()(Index i, Index j) const { to.data[i * to.stride + j] = j == one ? T{1} : T{0}; }
};
template <class T>
struct OpForward {
    MatrixView<const T> x;
    MatrixView<T> y;
    Op op;
    T param;
    __device__ void operator()(Index i, Index j) const {
        y.data[i * y.stride + j] = op_forward(op, x.data[i * x.stride + j], param);
    }
    __device__ void operator()(Index i) const { row_forward(op, y.cols, x.data + i * x.stride, y.data + i * y.stride); }
};
// dy J, or with `forward` J dx.
template <class T>
struct OpDerivative {
    bool forward;
    MatrixView<const T> in;
    Shared<T> saved;
    MatrixView<T> out;
    Op op;
    T param;
    __device__ void operator()(Index i, Index j) const {
        out.data[i * out.stride + j] = op_vjp(op, in.data[i * in.stride + j], saved.row(i)[j], param);
    }
    __device__ void operator()(Index i) const {
        const T* from = in.data + i * in.stride;
        T* to = out.data + i * out.stride;
        forward ? row_jvp(op, out.cols, from, saved.row(i), to) : row_vjp(op, out.cols, from, saved.row(i), to);
    }
};
// The tangent of v J, or with `forward` that of J v (where v is dx); see op.hpp.
template <class T>
struct OpSecond {
    bool forward;
    MatrixView<const T> v, dx, dv;
    Shared<T> saved;
    MatrixView<T> out;
    Op op;
    T param;
    __device__ void operator()(Index i, Index j) const {
        out.data[i * out.stride + j] = op_second(op, v.data[i * v.stride + j], dx.data[i * dx.stride + j],
                                                 dv.data[i * dv.stride + j], saved.row(i)[j], param);
    }
    __device__ void operator()(Index i) const {
        const T *at_v = v.data + i * v.stride, *at_dx = dx.data + i * dx.stride, *at_dv = dv.data + i * dv.stride;
        T* to = out.data + i * out.stride;
        forward ? row_jvp_jvp(op, out.cols, at_dx, at_dv, saved.row(i), to)
                : row_vjp_jvp(op, out.cols, at_v, at_dx, at_dv, saved.row(i), to);
    }
};
template <class T>
struct DropoutMap {
    MatrixView<const T> x;
    MatrixView<T> y;
    DropoutScale<T> scale;
    std::uint64_t key;
    const std::int64_t* drawn;  // steps before a graph of them
    std::int64_t step;          // of the graph
    __device__ void operator()(Index i, Index j) const {
        y.data[i * y.stride + j] =
            dropout(x.data[i * x.stride + j], scale, key, static_cast<std::uint64_t>(*drawn + step), i, j);
    }
};

// Runs F by elements or by rows, as its op wants it.
template <class T, class F>
void map_op(Op op, MatrixView<T> out, const F& f, cudaStream_t stream) {
    is_rowwise(op) ? map_rows(out.rows, out.cols, f, stream) : map_elements(out.rows, out.cols, f, stream);
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// done(f(0) + … + f(count - 1)) by one block, each thread's terms and then the threads in order.
template <class F, class Done>
__global__ void __launch_bounds__(kThreads) sum_by_block(Index count, F f, Done done) {
    CHAINRULE_SHARED(double, memory);
    double sum = 0;
    for (Index i = threadIdx.x; i < count; i += kThreads) sum += f(i);
    const double total = block_sum(sum, memory);
    if (threadIdx.x == 0) done(total);
}
// Its first stage where there is much to add up: partial[b] over piece b of as many pieces as there are.
template <class F>
__global__ void __launch_bounds__(kThreads) sum_pieces(Index count, F f, double* partial) {
    CHAINRULE_SHARED(double, memory);
    const Index pieces = gridDim.x, piece = blockIdx.x, end = count * (piece + 1) / pieces;
    double sum = 0;
    for (Index i = count * piece / pieces + threadIdx.x; i < end; i += kThreads) sum += f(i);
    const double total = block_sum(sum, memory);
    if (threadIdx.x == 0) partial[piece] = total;
}
constexpr Index kPieces = 256;  // the most
inline Index pieces_of(Index count) { return std::clamp<Index>(count / (16 * kThreads), 1, kPieces); }
template <class F>
void sum_in_pieces(Index count, const F& f, double* partial, cudaStream_t stream) {
    launch(sum_pieces<F>, dim3(static_cast<unsigned>(pieces_of(count))), kThreads, kThreads * sizeof(double), stream,
           count, f, partial);
}

struct Partials {
    const double* at;
    __device__ double operator()(Index i) const { return at[i]; }
};
// done(f(0) + … + f(count - 1)), always in the same order. `room` is for kPieces partial sums.
template <class F, class Done>
void sum_over(Index count, const F& f, const Done& done, double* room, cudaStream_t stream) {
    const auto by_block = [&](Index terms, const auto& term) {
        launch(sum_by_block<std::decay_t<decltype(term)>, Done>, dim3(1), kThreads, kThreads * sizeof(double), stream,
               terms, term, done);
    };
    if (pieces_of(count) == 1) return by_block(count, f);
    sum_in_pieces(count, f, room, stream);
    by_block(pieces_of(count), Partials{room});
}
struct StoreSum {
    double* to;
    __device__ void operator()(double sum) const { *to = sum; }
};
template <class T>
struct Squares {
    const T* at;
    __device__ double operator()(Index i) const { return static_cast<double>(at[i]) * static_cast<double>(at[i]); }
};
template <class T>
struct NotFinite {
    const T* at;
    __device__ double operator()(Index i) const { return at[i] - at[i] == 0 ? 0 : 1; }
};

// ---- the loss and the book-keeping of a step --------------------------------------------------------------------------

// Of what a run keeps on the device, that which a resident block carries along in registers.
struct Progress {
    std::int64_t first = 0;        // row of the next batch
    double total = 0, weight = 0;  // of the epoch so far
    double value = 0;              // of the last step
};
// What a run keeps on the device; the host reads it once an epoch.
struct Control : Progress {
    std::int64_t step = 0;   // of the epoch
    std::int64_t drawn = 0;  // steps that the optimizer has taken, for dropout's masks
    double batch_weight = 0, penalty = 0, slopes = 0, scale = 1, clip = 1;
};

template <class T>
struct Source {  // a data set on the device
    const T* x = nullptr;
    const std::int64_t* labels = nullptr;
    const T* y = nullptr;
    Index target_cols = 0;
    const T* weight = nullptr;
    const T* dy = nullptr;
    double dy_weight = 0;
    Rows rows = {};
};

// The weights of a batch: their sum, and what the loss is multiplied by. Rows without weights are one term.
template <class T>
struct BatchWeight {
    Source<T> data;
    Index count;
    Index terms() const { return data.weight ? count : 1; }
    __device__ double operator()(Index i) const {
        return data.weight ? static_cast<double>(data.weight[data.rows(i)]) : static_cast<double>(count);
    }
};
template <class T>
struct SetScale {
    Control* control;
    bool mean;
    __device__ void operator()(double total) const {
        control->batch_weight = total;
        control->scale = static_cast<double>(static_cast<T>(!mean ? 1.0 : (total > 0 ? 1 / total : 0.0)));
    }
};

// A matrix as cuBLASLt has it; see library.cuh: `cols` columns, one of ones, and zeros to the end of a row of `stride` elements.
template <class T, class Out>
struct Packed {
    Out* to = nullptr;  // null: nobody wants it
    Index cols = 0, stride = 0;
    __device__ void put(Index i, Index j, T value) const {
        if (j >= cols) value = j == cols ? T{1} : T{0};
        if constexpr (sizeof(Out) == 2)
            to[i * stride + j] = static_cast<Out>(round_to_bfloat16(Vec<float>(static_cast<float>(value)))[0] >> 16);
        else
            to[i * stride + j] = value;
    }
};
template <class T>
struct LossRows {
    LossOp op;
    T param;
    Source<T> data;
    MatrixView<T> f, df;
    const Control* control;
    T* values;
    Packed<T, std::uint16_t> packed = {};  // df once more
    __device__ Targets<T> targets(Index row) const {
        return {data.labels ? data.labels + row : nullptr, data.labels ? nullptr : data.y + row * data.target_cols,
                data.target_cols};
    }
    __device__ void operator()(Index i) const {
        const Index row = data.rows(i);
        const T value =
            row_loss(op, f.cols, f.data + i * f.stride, targets(row), data.weight ? data.weight + row : nullptr,
                     static_cast<T>(control->scale), df.data + i * df.stride, param);
        if (first_column() == 0) values[i] = value;
        if (!packed.to) return;
        if (column_step<T>() > 1) __syncwarp();  // a loss may give its columns to other threads
        for (Index j = first_column(); j < packed.stride; j += column_step<T>())
            packed.put(i, j, j < f.cols ? df.data[i * df.stride + j] : T{0});
    }
};
template <class T>
struct LossHvp {
    LossRows<T> loss;
    MatrixView<const T> t;
    MatrixView<T> out;
    __device__ void operator()(Index i) const {
        const Index row = loss.data.rows(i);
        row_loss_hvp(loss.op, loss.f.cols, loss.f.data + i * loss.f.stride, loss.targets(row),
                     loss.data.weight ? loss.data.weight + row : nullptr, static_cast<T>(loss.control->scale),
                     t.data + i * t.stride, out.data + i * out.stride, loss.param);
    }
};

template <class T>
struct WeightedValue {
    const T* values;
    Source<T> data;
    __device__ double operator()(Index i) const {
        return static_cast<double>(values[i]) * (data.weight ? static_cast<double>(data.weight[data.rows(i)]) : 1.0);
    }
};
// A step is over: its loss goes into the epoch's, as chainrule::Trainer has it; and so are as many steps as the epoch advances by.
struct EndStep {
    Control* control;
    bool mean;
    Index rows, advance;
    __device__ void operator()(double total) const {
        control->value = total * control->scale + control->penalty + control->slopes;
        const double share = mean ? control->batch_weight : 1.0;
        control->total += control->value * share;
        control->weight += share;
        if (advance == 0) return;  // others read where the graph began
        control->step += advance;
        control->drawn += advance;
        control->first += advance * rows;
    }
};

// ---- gradients that are seen before the update -------------------------------------------------------------------------

struct Part {  // of theta: weights, then biases, from `offset` on
    Index offset, weights, size;
};

// Regularizes a linear layer's part of the gradient in place; its penalty is the sum.
template <class T>
struct Regularize {
    Rule<T> rule;
    Part part;
    T* gradient;
    __device__ double operator()(Index i) const {
        double penalty = 0;
        T* g = gradient + part.offset + i;
        *g = rule.regularized(part.offset + i, *g, i < part.weights, penalty);
        return penalty;
    }
};
struct SetClip {
    Control* control;
    double limit;
    __device__ void operator()(double squares) const {
        const double factor = limit / (::sqrt(squares) + 1e-6);  // PyTorch's clip_grad_norm_
        control->clip = factor < 1 ? factor : 1.0;
    }
};
template <class T>
struct Apply {
    Rule<T> rule;
    const T* gradient;
    const Control* control;
    __device__ void operator()(Index i) const {
        rule.apply(i, Several<T, 1>{{gradient[i] * static_cast<T>(control->clip)}});
    }
};

}  // namespace cuda
}  // namespace chainrule
