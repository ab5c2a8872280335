// SPDX-License-Identifier: MIT
// L3: training of small networks without leaving a processor of the GPU: weights, the rule's state and one batch's activations
// lie in shared memory, one block has one network, and one launch takes many steps. Many networks are many blocks.
//
// In shared memory W lies transposed, with b as its last row: Wᵀ (I + 1, O), and the rule's slots beside it alike. With rows
// resident_stride apart, the sums over inputs read four outputs at once, the sums over outputs four terms.
#pragma once

#include "block.cuh"
#include "maps.cuh"
#include "program.hpp"

namespace chainrule {
namespace cuda {

// One network at work.
template <class T>
struct Job {
    T* theta;
    T* slots[kSlots];
    Control* control;
    const Hyper<T>* hyper;
    Source<T> data;
    Index rows, batch;
    std::uint64_t seed;
    OptimizerOp rule;
    LossOp loss;
    T loss_param, l1, l2, clip_value;
    double clip_norm;
    bool mean;
};

// ---- a step's parts ---------------------------------------------------------------------------------------------------

template <class F>
static __device__ __forceinline__ void block_each(int count, F f) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) f(i);
}
// How a block's threads go over a matrix: as many beside each other as a row fills, and no division tells where they are.
struct Spread {
    int lane, lanes, group, groups;
    __device__ explicit Spread(int cols, int most = 32) {
        int shift = 0;
        while (1 << shift < cols && 1 << shift < most) ++shift;
        lanes = 1 << shift;
        lane = static_cast<int>(threadIdx.x) & (lanes - 1);
        group = static_cast<int>(threadIdx.x) >> shift;
        groups = static_cast<int>(blockDim.x) >> shift;
    }
};
// f(row, column)
template <class F>
static __device__ __forceinline__ void block_over(int rows, int cols, F f) {
    const Spread by(cols);
    for (int i = by.group; i < rows; i += by.groups)
        for (int j = by.lane; j < cols; j += by.lanes) f(i, j);
}
static __device__ __forceinline__ int stride_of(int cols) { return static_cast<int>(resident_stride(cols)); }

// Brings the line of memory that this is in nearer.
static __device__ __forceinline__ void prefetch(const void* place) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L1 [%0];" ::"l"(place));
#else
    (void)place;
#endif
}
// Tells the compiler, which assembly makes forget it, that this is not shared memory.
template <class T>
static __device__ __forceinline__ T* in_global(T* place) {
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(place));
#endif
    return place;
}

template <class T>
struct Block {
    const Program& p;
    const Job<T>& job;
    T* memory;
    double* sums;
    Source<T> data = {};  // from the batch's first row on
    int rows = 0;
    Index left = 0;  // rows of the epoch after this batch

    __device__ T* at(int place) const { return memory + place; }

    // Between theta's layout and ours, which `ours` begins; copy(theta's element, our element). A warp takes eight inputs of four
    // outputs: sectors of memory on one side, 32 banks on the other.
    template <class F>
    __device__ void each_weight(T* theta, int ours, F copy) const {
        for (int s = 0; s < p.count; ++s) {
            const Program::Step& g = p.steps[s];
            if (g.kind != Program::Step::Kind::linear) continue;
            T* const there = in_global(theta + g.offset);
            T* const here = at(ours + g.weights);
            const int stride = stride_of(g.outputs);
            const Spread by(g.inputs, 8);
            for (int o = by.group; o < g.outputs; o += by.groups) {
                CHAINRULE_UNROLL(4)
                for (int i = by.lane; i < g.inputs; i += by.lanes) copy(there[o * g.inputs + i], here[i * stride + o]);
            }
            if (!g.bias) continue;
            block_each(g.outputs, [&](int o) { copy(there[g.outputs * g.inputs + o], here[g.inputs * stride + o]); });
        }
    }
    template <class F>
    __device__ void each_parameter(F copy) const {
        each_weight(job.theta, 0, copy);
        for (int slot = 0; slot < kSlots; ++slot)
            if (p.slots[slot] >= 0) each_weight(job.slots[slot], p.slots[slot], copy);
    }

    __device__ void begin_batch(Index first) {
        rows = static_cast<int>(job.rows - first < job.batch ? job.rows - first : job.batch);
        left = job.rows - first - rows;
        data = job.data;
        if (data.rows.order) {
            data.rows.order += first;
            return;
        }
        data.x += first * p.inputs;
        if (data.labels) data.labels += first;
        if (data.y) data.y += first * data.target_cols;
        if (data.weight) data.weight += first;
    }
    // Four rows at a time: each is a wait for its place in the order, and then for itself.
    __device__ void gather() const {
        constexpr int together = 4;
        const Spread by(p.inputs);
        const T* const x = in_global(data.x);
        const int stride = stride_of(p.inputs), apart = by.groups;
        for (int first = by.group; first < rows; first += together * apart) {
            const T* from[together];
            CHAINRULE_UNROLL(4)
            for (int r = 0; r < together; ++r) {
                const int i = first + r * apart;
                from[r] = x + data.rows(i < rows ? i : first) * p.inputs;
            }
            T* const to = at(p.steps[0].x) + first * stride;
            for (int j = by.lane; j < p.inputs; j += by.lanes) {
                T here[together];
                CHAINRULE_UNROLL(4)
                for (int r = 0; r < together; ++r) here[r] = from[r][j];
                CHAINRULE_UNROLL(4)
                for (int r = 0; r < together; ++r)
                    if (first + r * apart < rows) to[r * apart * stride + j] = here[r];
            }
        }
    }

    // Rows of the next batch come nearer while this one is in hand, and the part of the order that names those after them: each
    // would take as long as a small layer otherwise.
    __device__ void prefetch_next() const {
        const Index next = left < job.batch ? left : job.batch,
                    after = left - next < job.batch ? left - next : job.batch;
        constexpr int line = 128 / sizeof(T), places = 128 / sizeof(std::int64_t);
        block_each(static_cast<int>(next), [&](int i) {
            const std::int64_t row = data.rows(rows + i);
            for (int j = 0; j < p.inputs; j += line) prefetch(data.x + row * p.inputs + j);
            if (data.labels) prefetch(data.labels + row);
            if (data.y) prefetch(data.y + row * data.target_cols);
            if (data.weight) prefetch(data.weight + row);
        });
        if (!data.rows.order) return;
        block_each(static_cast<int>((after + places - 1) / places),
                   [&](int i) { prefetch(data.rows.order + rows + next + i * places); });
    }

    __device__ void forward(const Program::Step& g, std::uint64_t drawn) const {
        const int x_stride = stride_of(g.inputs), y_stride = stride_of(g.outputs);
        const T* x = at(g.x);
        T* y = at(g.y);
        switch (g.kind) {
            case Program::Step::Kind::linear: {
                const T* bias = at(g.weights + g.inputs * y_stride);
                block_product(rows, g.outputs, g.inputs, x, x_stride, at(g.weights), y_stride,
                              [&](int i, int o, auto& z) {
                                  constexpr int n = sizeof z / sizeof(T);
                                  const int place = i * y_stride + o;
                                  if (g.bias) {
                                      const auto b = several_at<n>(bias + o);
                                      CHAINRULE_UNROLL(4)
                                      for (int c = 0; c < n; ++c) z.at[c] = z.at[c] + b.at[c];
                                  }
                                  if (g.keeps_z) several_at<n>(at(g.z) + place) = z;
                                  op_forward(g.fused, z, static_cast<T>(g.fused_param));
                                  several_at<n>(y + place) = z;
                              });
                return;
            }
            case Program::Step::Kind::elementwise:
                block_over(rows, g.outputs, [&](int i, int j) {
                    const int place = i * y_stride + j;
                    y[place] = op_forward(g.op, x[place], static_cast<T>(g.param));
                });
                return;
            case Program::Step::Kind::rowwise:
                block_each(rows, [&](int i) { row_forward(g.op, g.outputs, x + i * y_stride, y + i * y_stride); });
                return;
            case Program::Step::Kind::dropout: drop(g, x, y, drawn);
        }
    }
    __device__ void drop(const Program::Step& g, const T* from, T* to, std::uint64_t drawn) const {
        const DropoutScale<T> scale(g.param);
        const std::uint64_t key = dropout_key(job.seed, g.number);
        const int stride = stride_of(g.outputs);
        block_over(rows, g.outputs,
                   [&](int i, int j) { to[i * stride + j] = dropout(from[i * stride + j], scale, key, drawn, i, j); });
    }

    __device__ double weight_of_batch() const {
        if (!data.weight) return rows;
        double mine = 0;
        block_each(rows, [&](int i) { mine += static_cast<double>(data.weight[data.rows(i)]); });
        return block_sum(mine, sums);
    }
    // The sum of weighted losses of this thread's rows, and ∂L/∂f.
    __device__ double loss(double scale) const {
        const int stride = stride_of(p.outputs);
        double mine = 0;
        block_each(rows, [&](int i) {
            const std::int64_t row = data.rows(i);
            const Targets<T> y = {data.labels ? data.labels + row : nullptr,
                                  data.labels ? nullptr : data.y + row * data.target_cols, data.target_cols};
            const T* weight = data.weight ? data.weight + row : nullptr;
            const T value = row_loss(job.loss, p.outputs, at(p.f) + i * stride, y, weight, static_cast<T>(scale),
                                     at(p.df) + i * stride, job.loss_param);
            mine += static_cast<double>(value) * (weight ? static_cast<double>(*weight) : 1.0);
        });
        return mine;
    }

    __device__ void backward(const Program::Step& g, std::uint64_t drawn) const {
        if (!g.pulls) return;
        const int x_stride = stride_of(g.inputs), y_stride = stride_of(g.outputs);
        const T* dy = at(g.dy);
        T* dx = at(g.dx);
        switch (g.kind) {
            case Program::Step::Kind::linear:
                block_product_transposed(rows, g.inputs, g.outputs, dy, y_stride, at(g.weights), y_stride,
                                         [&](int i, int j, int apart, auto& into) {
                                             constexpr int n = sizeof into / sizeof(T);
                                             const int place = i * x_stride + j;
                                             auto saved = into;
                                             CHAINRULE_UNROLL(4)
                                             for (int c = 0; c < n; ++c)
                                                 saved.at[c] = at(g.through_saved)[place + c * apart];
                                             op_vjp(g.through, into, saved, static_cast<T>(g.through_param));
                                             CHAINRULE_UNROLL(4)
                                             for (int c = 0; c < n; ++c) dx[place + c * apart] = into.at[c];
                                         });
                return;
            case Program::Step::Kind::elementwise: return differentiate(g.op, g.param, g, dy, dx);
            case Program::Step::Kind::rowwise:
                block_each(rows, [&](int i) {
                    row_vjp(g.op, g.outputs, dy + i * y_stride, at(g.saved) + i * y_stride, dx + i * y_stride);
                });
                return;
            case Program::Step::Kind::dropout: drop(g, dy, dx, drawn);
        }
    }
    __device__ void differentiate(Op op, double param, const Program::Step& g, const T* dy, T* dx) const {
        const int stride = stride_of(g.outputs);
        const T* saved = at(g.saved);
        block_over(rows, g.outputs, [&](int i, int j) {
            const int place = i * stride + j;
            dx[place] = op_vjp(op, dy[place], saved[place], static_cast<T>(param));
        });
    }

    // take(place, part, how many of them mean something, whether they are weights') for the gradient of a linear layer.
    template <class Take>
    __device__ void each_gradient(const Program::Step& g, Take take) const {
        const int stride = stride_of(g.outputs);
        const T* dy = at(g.dy);
        block_product_of_rows(
            g.inputs, g.outputs, rows, at(g.x), stride_of(g.inputs), dy, stride,
            [&](int i, int o, auto& part) { take(g.weights + i * stride + o, part, g.outputs - o, true); });
        if (!g.bias) return;
        block_sum_of_rows(g.outputs, rows, dy, stride,
                          [&](int o, auto& sum) { take(g.weights + g.inputs * stride + o, sum, 1, false); });
    }

    __device__ Rule<T> rule(const Hyper<T>* hyper) const {
        Rule<T> rule = {job.rule, memory, {}, in_global(hyper), nullptr, job.l1, job.l2, job.clip_value};
        for (int slot = 0; slot < kSlots; ++slot) rule.slots[slot] = p.slots[slot] >= 0 ? at(p.slots[slot]) : nullptr;
        return rule;
    }
    // All gradients and updates; returns what this thread has of the penalty.
    __device__ double update(const Rule<T>& rule) const {
        double penalty = 0, squares = 0;
        const bool stored = p.gradient >= 0;
        for (int s = 0; s < p.count; ++s) {
            if (p.steps[s].kind != Program::Step::Kind::linear) continue;
            each_gradient(p.steps[s], [&](int place, auto& gradient, int count, bool weights) {
                constexpr int n = sizeof gradient / sizeof(T);
                CHAINRULE_UNROLL(4)
                for (int c = 0; c < n; ++c) {
                    if (c >= count || !(stored || rule.regularizes())) continue;
                    gradient.at[c] = rule.regularized(place + c, gradient.at[c], weights, penalty);
                    squares += static_cast<double>(gradient.at[c]) * static_cast<double>(gradient.at[c]);
                }
                if (stored)
                    several_at<n>(at(p.gradient) + place) = gradient;
                else
                    rule.apply(place, gradient);
            });
        }
        if (!stored) return penalty;
        const double factor = job.clip_norm / (::sqrt(block_sum(squares, sums)) + 1e-6);
        const T clip = static_cast<T>(factor < 1 ? factor : 1.0);
        block_each(p.parameters / 4, [&](int e) {
            Several<T, 4> gradient = several_at<4>(at(p.gradient) + 4 * e);
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) gradient.at[c] = gradient.at[c] * clip;
            rule.apply(4 * e, gradient);
        });
        return penalty;
    }
};

// One step. All threads count alike; of the losses, each has its own part.
template <class T>
static __device__ __forceinline__ void resident_step(Block<T>& block, Control& control, const Hyper<T>* hyper) {
    using Kind = Program::Step::Kind;
    const Program& p = block.p;
    block.begin_batch(control.first);
    block.gather();
    block.prefetch_next();
    const double weight = block.weight_of_batch();
    const double scale = static_cast<double>(static_cast<T>(!block.job.mean ? 1.0 : (weight > 0 ? 1 / weight : 0.0)));
    const std::uint64_t drawn = static_cast<std::uint64_t>(control.drawn);
    __syncthreads();
    for (int s = 0; s < p.count; ++s) {
        block.forward(p.steps[s], drawn);
        __syncthreads();
    }
    const double value = block.loss(scale) * scale;
    __syncthreads();
    for (int s = p.count; s-- > 0;) {
        const Program::Step& g = p.steps[s];
        if (g.kind == Kind::linear && g.differentiates) {
            block.differentiate(g.fused, g.fused_param, g, block.at(g.dy), block.at(g.dy));
            __syncthreads();
        }
        block.backward(g, drawn);
        __syncthreads();
    }
    const double penalty = block.update(block.rule(hyper));
    __syncthreads();
    const double share = block.job.mean ? weight : 1.0;
    control.value = value + penalty;
    control.total += control.value * share;
    control.weight += share;
    ++control.step;
    ++control.drawn;
    control.first += block.rows;
}

// `steps` steps of each job's network, or as many as its epoch still has.
template <class T>
__global__ void __launch_bounds__(kResidentThreads, sizeof(T) == 4 ? 2 : 1)
    train_resident(const __grid_constant__ Program program, const Job<T>* jobs, int steps) {
    CHAINRULE_SHARED(T, memory);
#ifdef __CUDA_ARCH__
    __builtin_assume(blockDim.y == 1);  // a thread has a row to itself
#endif
    const Job<T>& job = jobs[blockIdx.x];
    Block<T> block = {program, job, memory, reinterpret_cast<double*>(memory + program.sums)};
    Control control = *job.control;
    if (threadIdx.x != 0) control.value = control.total = 0;
    __syncthreads();  // thread 0 writes it in the end
    block.each_parameter([](T& there, T& here) { here = there; });
    __syncthreads();
    for (int n = 0; n < steps && control.first < job.rows; ++n) resident_step(block, control, job.hyper + control.step);
    block.each_parameter([](T& there, T& here) { there = here; });
    control.value = block_sum(control.value, block.sums);
    control.total = block_sum(control.total, block.sums);
    if (threadIdx.x == 0) *job.control = control;
}

}  // namespace cuda
}  // namespace chainrule
