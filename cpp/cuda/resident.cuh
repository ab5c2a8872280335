// SPDX-License-Identifier: MIT
// L3: training of small networks without leaving a processor of the GPU: weights, the rule's state and one batch's activations
// lie in shared memory, one block has one network, and one launch takes many steps. Many networks are many blocks.
//
// In shared memory W lies transposed, with b as its last row: Wᵀ (I + 1, O), and the rule's slots beside it alike. With rows
// resident_stride apart, the sums over inputs read four outputs at once, the sums over outputs four terms.
#pragma once

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

// ---- products of a block ----------------------------------------------------------------------------------------------

// C (m x n) = A B, A (m x k) and B (k x n) with rows padded to fours: two rows and four columns a thread,
// which puts its sums somewhere and then finishes each of them.
template <class T, class Put, class Finish>
static __device__ __forceinline__ void block_product(int m, int n, int k, const T* a, int a_stride, const T* b,
                                                     int b_stride, Put put, Finish finish) {
    const int across = (n + 3) / 4, tiles = (m + 1) / 2 * across;
    for (int t = static_cast<int>(threadIdx.x); t < tiles; t += static_cast<int>(blockDim.x)) {
        const int row = t / across * 2, col = t % across * 4, second = row + 1 < m ? row + 1 : row;
        T sum[2][4] = {};
        for (int i = 0; i < k; ++i) {
            const Four<T> y = *reinterpret_cast<const Four<T>*>(b + i * b_stride + col);
            const Vec<T> x0 = a[row * a_stride + i], x1 = a[second * a_stride + i];
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) {
                sum[0][c] = fma(x0, Vec<T>(y.at[c]), Vec<T>(sum[0][c]))[0];
                sum[1][c] = fma(x1, Vec<T>(y.at[c]), Vec<T>(sum[1][c]))[0];
            }
        }
        CHAINRULE_UNROLL(2)
        for (int r = 0; r < 2; ++r) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c)
                if (row + r < m && col + c < n) put(row + r, col + c, sum[r][c]);
        }
        CHAINRULE_UNROLL(1)  // one text of all ops instead of eight
        for (int e = 0; e < 8; ++e)
            if (row + e / 4 < m && col + e % 4 < n) finish(row + e / 4, col + e % 4);
    }
}

// C (m x n) = A Bᵀ, A (m x k) and B (n x k): two rows, and four columns a quarter of n apart, so that neighbouring threads
// read neighbouring rows of B.
template <class T, class Put, class Finish>
static __device__ __forceinline__ void block_product_transposed(int m, int n, int k, const T* a, int a_stride,
                                                                const T* b, int b_stride, Put put, Finish finish) {
    const int across = (n + 3) / 4, tiles = (m + 1) / 2 * across;
    for (int t = static_cast<int>(threadIdx.x); t < tiles; t += static_cast<int>(blockDim.x)) {
        const int row = t / across * 2, col = t % across, second = row + 1 < m ? row + 1 : row;
        T sum[2][4] = {};
        const auto add = [&](T x0, T x1, int c, T y) {
            sum[0][c] = fma(Vec<T>(x0), Vec<T>(y), Vec<T>(sum[0][c]))[0];
            sum[1][c] = fma(Vec<T>(x1), Vec<T>(y), Vec<T>(sum[1][c]))[0];
        };
        const auto place = [&](int c) { return col + c * across < n ? col + c * across : col; };
        int i = 0;
        for (; i + 4 <= k; i += 4) {
            const Four<T> x0 = *reinterpret_cast<const Four<T>*>(a + row * a_stride + i);
            const Four<T> x1 = *reinterpret_cast<const Four<T>*>(a + second * a_stride + i);
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) {
                const Four<T> y = *reinterpret_cast<const Four<T>*>(b + place(c) * b_stride + i);
                CHAINRULE_UNROLL(4)
                for (int q = 0; q < 4; ++q) add(x0.at[q], x1.at[q], c, y.at[q]);
            }
        }
        for (; i < k; ++i) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c)
                add(a[row * a_stride + i], a[second * a_stride + i], c, b[place(c) * b_stride + i]);
        }
        CHAINRULE_UNROLL(2)
        for (int r = 0; r < 2; ++r) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c)
                if (row + r < m && col + c * across < n) put(row + r, col + c * across, sum[r][c]);
        }
        CHAINRULE_UNROLL(1)
        for (int e = 0; e < 8; ++e)
            if (row + e / 4 < m && col + e % 4 * across < n) finish(row + e / 4, col + e % 4 * across);
    }
}

// C (m x n) = Aᵀ B, A (k x m) and B (k x n), a row of ones below Aᵀ where `ones`: four by four a thread.
template <class T, class F>
static __device__ __forceinline__ void block_product_of_rows(int m, int n, int k, bool ones, const T* a, int a_stride,
                                                             const T* b, int b_stride, F each) {
    const int across = (n + 3) / 4, down = (m + 3) / 4, tiles = (down + ones) * across;
    for (int t = static_cast<int>(threadIdx.x); t < tiles; t += static_cast<int>(blockDim.x)) {
        const int row = t / across * 4, col = t % across * 4;
        const bool bias = t / across == down;
        T sum[4][4] = {};
        for (int i = 0; i < k; ++i) {
            Four<T> x = {{T{1}, T{0}, T{0}, T{0}}};
            if (!bias) x = *reinterpret_cast<const Four<T>*>(a + i * a_stride + row);
            const Four<T> y = *reinterpret_cast<const Four<T>*>(b + i * b_stride + col);
            CHAINRULE_UNROLL(4)
            for (int r = 0; r < 4; ++r) {
                CHAINRULE_UNROLL(4)
                for (int c = 0; c < 4; ++c) sum[r][c] = fma(Vec<T>(x.at[r]), Vec<T>(y.at[c]), Vec<T>(sum[r][c]))[0];
            }
        }
        CHAINRULE_UNROLL(4)
        for (int r = 0; r < 4; ++r) {
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) {
                if (col + c >= n) continue;
                if (bias && r == 0) each(m, col + c, sum[r][c]);
                if (!bias && row + r < m) each(row + r, col + c, sum[r][c]);
            }
        }
    }
}

// ---- a step's parts ---------------------------------------------------------------------------------------------------

template <class F>
static __device__ __forceinline__ void block_each(int count, F f) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) f(i);
}
static __device__ __forceinline__ int stride_of(int cols) { return static_cast<int>(resident_stride(cols)); }

template <class T>
struct Block {
    const Program& p;
    const Job<T>& job;
    T* memory;
    double* sums;
    Source<T> data = {};  // from the batch's first row on
    int rows = 0;

    __device__ T* at(int place) const { return memory + place; }

    // Between theta's layout and ours, which `ours` begins; copy(theta's element, our element).
    template <class F>
    __device__ void each_weight(T* theta, int ours, F copy) const {
        for (int s = 0; s < p.count; ++s) {
            const Program::Step& g = p.steps[s];
            if (g.kind != Program::Step::Kind::linear) continue;
            T* const there = theta + g.offset;
            T* const here = at(ours + g.weights);
            const int stride = stride_of(g.outputs);
            block_each(g.outputs * (g.inputs + g.bias), [&](int e) {
                const bool weight = e < g.outputs * g.inputs;
                const int o = weight ? e / g.inputs : e - g.outputs * g.inputs, i = weight ? e % g.inputs : g.inputs;
                copy(there[e], here[i * stride + o]);
            });
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
    __device__ void gather() const {
        const int stride = stride_of(p.inputs);
        block_each(rows * p.inputs, [&](int e) {
            const int i = e / p.inputs, j = e % p.inputs;
            at(p.steps[0].x)[i * stride + j] = data.x[data.rows(i) * p.inputs + j];
        });
    }

    __device__ void forward(const Program::Step& g, std::uint64_t drawn) const {
        const int x_stride = stride_of(g.inputs), y_stride = stride_of(g.outputs);
        const T* x = at(g.x);
        T* y = at(g.y);
        switch (g.kind) {
            case Program::Step::Kind::linear: {
                const T* bias = at(g.weights + g.inputs * y_stride);
                T* z = g.keeps_z ? at(g.z) : y;
                block_product(
                    rows, g.outputs, g.inputs, x, x_stride, at(g.weights), y_stride,
                    [&](int i, int o, T sum) { z[i * y_stride + o] = g.bias ? sum + bias[o] : sum; },
                    [&](int i, int o) {
                        const int place = i * y_stride + o;
                        y[place] = op_forward(g.fused, z[place], static_cast<T>(g.fused_param));
                    });
                return;
            }
            case Program::Step::Kind::elementwise:
                block_each(rows * g.outputs, [&](int e) {
                    const int place = e / g.outputs * y_stride + e % g.outputs;
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
        block_each(rows * g.outputs, [&](int e) {
            const int i = e / g.outputs, j = e % g.outputs;
            to[i * stride + j] = dropout(from[i * stride + j], scale, key, drawn, i, j);
        });
    }

    __device__ double weight_of_batch() const {
        if (!data.weight) return rows;
        double mine = 0;
        block_each(rows, [&](int i) { mine += static_cast<double>(data.weight[data.rows(i)]); });
        return block_sum(mine, sums);
    }
    // The sum of weighted losses, and ∂L/∂f.
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
        return block_sum(mine, sums);
    }

    __device__ void backward(const Program::Step& g, std::uint64_t drawn) const {
        if (!g.pulls) return;
        const int x_stride = stride_of(g.inputs), y_stride = stride_of(g.outputs);
        const T* dy = at(g.dy);
        T* dx = at(g.dx);
        switch (g.kind) {
            case Program::Step::Kind::linear:
                block_product_transposed(
                    rows, g.inputs, g.outputs, dy, y_stride, at(g.weights), y_stride,
                    [&](int i, int j, T sum) { dx[i * x_stride + j] = sum; },
                    [&](int i, int j) {
                        const int place = i * x_stride + j;
                        dx[place] =
                            op_vjp(g.through, dx[place], at(g.through_saved)[place], static_cast<T>(g.through_param));
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
        block_each(rows * g.outputs, [&](int e) {
            const int place = e / g.outputs * stride + e % g.outputs;
            dx[place] = op_vjp(op, dy[place], saved[place], static_cast<T>(param));
        });
    }

    // f(place, gradient, whether it is a weight's) for every weight and bias of a linear layer.
    template <class F>
    __device__ void each_gradient(const Program::Step& g, F f) const {
        const int stride = stride_of(g.outputs);
        block_product_of_rows(g.inputs, g.outputs, rows, g.bias, at(g.x), stride_of(g.inputs), at(g.dy), stride,
                              [&](int i, int o, T sum) { f(g.weights + i * stride + o, sum, i < g.inputs); });
    }

    __device__ Rule<T> rule(const Hyper<T>* hyper) const {
        Rule<T> rule = {job.rule, memory, {}, hyper, nullptr, job.l1, job.l2, job.clip_value};
        for (int slot = 0; slot < kSlots; ++slot) rule.slots[slot] = p.slots[slot] >= 0 ? at(p.slots[slot]) : nullptr;
        return rule;
    }
    // All gradients and updates; returns the penalty.
    __device__ double update(const Rule<T>& rule) const {
        double penalty = 0, squares = 0;
        const bool stored = p.gradient >= 0;
        for (int s = 0; s < p.count; ++s) {
            if (p.steps[s].kind != Program::Step::Kind::linear) continue;
            each_gradient(p.steps[s], [&](int place, T gradient, bool weight) {
                gradient = rule.regularized(place, gradient, weight, penalty);
                if (!stored) {
                    rule.apply(place, gradient);
                    return;
                }
                at(p.gradient)[place] = gradient;
                squares += static_cast<double>(gradient) * static_cast<double>(gradient);
            });
        }
        if (stored) {
            const double factor = job.clip_norm / (::sqrt(block_sum(squares, sums)) + 1e-6);
            const T clip = static_cast<T>(factor < 1 ? factor : 1.0);
            for (int s = 0; s < p.count; ++s) {
                const Program::Step& g = p.steps[s];
                if (g.kind != Program::Step::Kind::linear) continue;
                const int stride = stride_of(g.outputs);
                block_each((g.inputs + g.bias) * g.outputs, [&](int e) {
                    const int place = g.weights + e / g.outputs * stride + e % g.outputs;
                    rule.apply(place, at(p.gradient)[place] * clip);
                });
            }
        }
        if (rule.l1 == 0 && rule.l2 == 0) return 0;
        __syncthreads();
        return block_sum(penalty, sums);
    }
};

// One step; `control` has the same value in all threads.
template <class T>
static __device__ __forceinline__ void resident_step(Block<T>& block, Control& control, const Hyper<T>* hyper) {
    using Kind = Program::Step::Kind;
    const Program& p = block.p;
    block.begin_batch(control.first);
    block.gather();
    const double weight = block.weight_of_batch();
    const double scale = static_cast<double>(static_cast<T>(!block.job.mean ? 1.0 : (weight > 0 ? 1 / weight : 0.0)));
    const std::uint64_t drawn = static_cast<std::uint64_t>(control.drawn);
    __syncthreads();
    for (int s = 0; s < p.count; ++s) {
        block.forward(p.steps[s], drawn);
        __syncthreads();
    }
    const double value = block.loss(scale) * scale;
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
__global__ void __launch_bounds__(kResidentThreads, 1)
    train_resident(const __grid_constant__ Program program, const Job<T>* jobs, int steps) {
    CHAINRULE_SHARED(T, memory);
#ifdef __CUDA_ARCH__
    __builtin_assume(blockDim.y == 1);  // a thread has a row to itself
#endif
    const Job<T>& job = jobs[blockIdx.x];
    Block<T> block = {program, job, memory, reinterpret_cast<double*>(memory + program.sums)};
    Control control = *job.control;
    __syncthreads();  // thread 0 writes it in the end
    block.each_parameter([](T& there, T& here) { here = there; });
    __syncthreads();
    for (int n = 0; n < steps && control.first < job.rows; ++n) resident_step(block, control, job.hyper + control.step);
    block.each_parameter([](T& there, T& here) { there = here; });
    if (threadIdx.x == 0) *job.control = control;
}

}  // namespace cuda
}  // namespace chainrule
