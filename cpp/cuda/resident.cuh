// SPDX-License-Identifier: MIT
// L3: training of small networks without leaving a processor of the GPU: weights, the rule's state and one batch's activations
// lie in shared memory, one block has one network, and one launch takes many steps. Many networks are many blocks.
//
// While there are processors to spare, a network has a cluster of blocks. Each has all weights and a part of the batch's rows; then
// it adds up a part of the gradient from all blocks, updates those weights, of which it alone has the rule's state, and gives them to
// the others.
//
// In shared memory W lies transposed, with b as its last row: Wᵀ (I + 1, O), and the rule's slots beside it alike. With rows
// resident_stride apart, the sums over inputs read four outputs at once, the sums over outputs four terms.
#pragma once

#include "block.cuh"
#include "cluster.cuh"
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
// One thing, word by word.
template <class T>
static __device__ __forceinline__ void block_copy(T* to, const T* from) {
    static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>, "whole words");
    block_each(static_cast<int>(sizeof(T) / 4), [&](int word) {
        reinterpret_cast<std::uint32_t*>(to)[word] = reinterpret_cast<const std::uint32_t*>(from)[word];
    });
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

// Alone, or one of several that share the work: to be ready for others takes registers, of which two blocks on a processor have few.
template <class T, bool Shares>
struct Block {
    const Program& p;
    const Job<T>& job;
    T* memory;
    int rank;                                // in its cluster
    Source<T> data = {};                     // from the first of the block's rows on
    int batch = 0;                           // rows of the step
    int before = 0, rows = 0;                // those of the blocks before this one, and its own
    Index left = 0;                          // rows of the epoch after this batch
    std::int64_t own_row = 0;                // where the data have the row of the batch that this thread takes first
    int taken = 0;                           // steps of this launch
    const Hyper<T>* launch_rates = nullptr;  // the first step's, in a cluster

    __device__ int ranks() const { return Shares ? p.ranks : 1; }
    __device__ T* at(int place) const { return memory + place; }
    __device__ Hyper<T>* rates() const {
        static_assert(sizeof(Job<T>) % alignof(Hyper<T>) == 0, "rates may lie behind a job");
        static_assert(sizeof(Job<T>) + sizeof(Hyper<T>) <= kDeskBytes, "the desk has room");
        return reinterpret_cast<Hyper<T>*>(reinterpret_cast<Job<T>*>(at(p.desk)) + 1);
    }
    __device__ double* sums() const { return reinterpret_cast<double*>(at(p.sums)); }

    // The block's part of so many.
    struct Span {
        int begin, end;
    };
    __device__ Span span_of(int count) const {
        return Shares ? Span{count * rank / ranks(), count * (rank + 1) / ranks()} : Span{0, count};
    }

    template <class F>
    __device__ void for_each_linear(F f) const {
        for (int s = 0; s < p.count; ++s)
            if (p.steps[s].kind == Program::Step::Kind::linear) f(p.steps[s]);
    }
    // The layer that has a parameter there.
    __device__ const Program::Step& layer_at(int place) const {
        const Program::Step* found = p.steps;
        for_each_linear([&](const Program::Step& g) {
            if (g.weights <= place) found = &g;
        });
        return *found;
    }

    // Whoever departs has done what others wait for; who has rejoined may rely on what they did. In between a thread may do what its
    // own block wants next.
    __device__ void depart() const {
        if constexpr (Shares)
            cluster_arrive();
        else
            __syncthreads();
    }
    __device__ void rejoin() const {
        if constexpr (Shares) cluster_wait();
        __syncthreads();
    }
    __device__ void meet() const {
        depart();
        if constexpr (Shares) cluster_wait();
    }
    // Over all threads of the cluster, for each of them.
    __device__ double sum_of_all(double mine) const {
        double total = block_sum(mine, sums());
        if constexpr (!Shares) return total;
        double* const totals = sums() + kResidentThreads;
        if (threadIdx.x == 0)
            for (int r = 0; r < ranks(); ++r) *in_block(totals + rank, r) = total;
        meet();
        total = 0;
        for (int r = 0; r < ranks(); ++r) total += totals[r];
        meet();  // before anybody writes there again
        return total;
    }

    // Between theta's layout and ours, which `ours` begins; copy(theta's element, our element), of the block's part or of all. A
    // warp takes eight inputs of four outputs: sectors of memory on one side, 32 banks on the other.
    template <class F>
    __device__ void each_weight(T* theta, int ours, Span part, F copy) const {
        for_each_linear([&](const Program::Step& g) {
            T* const there = in_global(theta + g.offset);
            const int stride = stride_of(g.outputs);
            const auto copy_own = [&](int from, int to) {
                if (!Shares || (to >= part.begin && to < part.end)) copy(there[from], memory[ours + to]);
            };
            const Spread by(g.inputs, 8);
            for (int o = by.group; o < g.outputs; o += by.groups) {
                CHAINRULE_UNROLL(4)
                for (int i = by.lane; i < g.inputs; i += by.lanes)
                    copy_own(o * g.inputs + i, g.weights + i * stride + o);
            }
            if (!g.bias) return;
            block_each(g.outputs,
                       [&](int o) { copy_own(g.outputs * g.inputs + o, g.weights + g.inputs * stride + o); });
        });
    }
    // Of the rule's state a block has what is its own.
    template <class F>
    __device__ void each_parameter(Span part, F copy) const {
        each_weight(job.theta, 0, part, copy);
        const Span own = own_parameters();
        for (int slot = 0; slot < kSlots; ++slot)
            if (p.slots[slot] >= 0) each_weight(job.slots[slot], p.slots[slot] - own.begin, own, copy);
    }
    __device__ Span all_parameters() const { return {0, p.parameters}; }
    // Those that this block updates.
    __device__ Span own_parameters() const {
        const Span fours = span_of(p.parameters / 4);
        return {4 * fours.begin, 4 * fours.end};
    }

    __device__ void begin_batch(Index of_epoch) {
        batch = static_cast<int>(job.rows - of_epoch < job.batch ? job.rows - of_epoch : job.batch);
        left = job.rows - of_epoch - batch;
        const Span part = span_of(batch);
        before = part.begin;
        rows = part.end - part.begin;
        data = job.data;
        const Index begin = of_epoch + before;
        const int mine = static_cast<int>(threadIdx.x);
        if (data.rows.order) {
            data.rows.order += begin;
            if (Shares && mine < rows) own_row = data.rows.order[mine];
            return;
        }
        own_row = mine;
        data.x += begin * p.inputs;
        if (data.labels) data.labels += begin;
        if (data.y) data.y += begin * data.target_cols;
        if (data.weight) data.weight += begin;
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

    // A cluster's barrier sends away what was near: only what is asked for after one is there before the next.
    __device__ void prefetch_targets() const {
        const int i = static_cast<int>(threadIdx.x);
        if (i >= rows) return;
        if (data.rows.order) prefetch(data.rows.order + i);
        prefetch_target(own_row);
    }
    __device__ void prefetch_target(std::int64_t row) const {
        if (data.labels) prefetch(data.labels + row);
        if (data.y) prefetch(data.y + row * data.target_cols);
        if (data.weight) prefetch(data.weight + row);
    }
    // Rows of the next batch come nearer while this one is in hand, and the part of the order that names those after them: each
    // would take as long as a small layer otherwise.
    __device__ void prefetch_next() const {
        const int next = static_cast<int>(left < job.batch ? left : job.batch),
                  after = static_cast<int>(left - next < job.batch ? left - next : job.batch);
        const Span part = span_of(next), part_after = span_of(after);
        constexpr int line = 128 / sizeof(T), places = 128 / sizeof(std::int64_t);
        block_each(part.end - part.begin, [&](int i) {
            const std::int64_t row = data.rows(batch - before + part.begin + i);
            for (int j = 0; j < p.inputs; j += line) prefetch(data.x + row * p.inputs + j);
            prefetch_target(row);
        });
        if (!data.rows.order) return;
        const std::int64_t* const order = data.rows.order + batch - before + next + part_after.begin;
        block_each((part_after.end - part_after.begin + places - 1) / places,
                   [&](int i) { prefetch(order + i * places); });
    }

    __device__ void forward(const Program::Step& g) const {
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
            case Program::Step::Kind::dropout: drop(g, x, y);
        }
    }
    __device__ void drop(const Program::Step& g, const T* from, T* to) const {
        const DropoutScale<T> scale(g.param);
        const std::uint64_t drawn = static_cast<std::uint64_t>(job.control->drawn + taken);
        const std::uint64_t key = dropout_key(job.seed, g.number);
        const int stride = stride_of(g.outputs);
        block_over(rows, g.outputs, [&](int i, int j) {
            to[i * stride + j] = dropout(from[i * stride + j], scale, key, drawn, before + i, j);
        });
    }

    __device__ double weight_of_batch() const {
        if (!data.weight) return batch;
        double mine = 0;
        block_each(batch, [&](int i) { mine += static_cast<double>(data.weight[data.rows(i - before)]); });
        return block_sum(mine, sums());
    }
    // The sum of weighted losses of this thread's rows, and ∂L/∂f.
    __device__ double loss(T scale) const {
        const int stride = stride_of(p.outputs);
        double mine = 0;
        block_each(rows, [&](int i) {
            const std::int64_t row = data.rows(i);
            const Targets<T> y = {data.labels ? data.labels + row : nullptr,
                                  data.labels ? nullptr : data.y + row * data.target_cols, data.target_cols};
            const T* weight = data.weight ? data.weight + row : nullptr;
            const T value = row_loss(job.loss, p.outputs, at(p.f) + i * stride, y, weight, scale, at(p.df) + i * stride,
                                     job.loss_param);
            mine += static_cast<double>(value) * (weight ? static_cast<double>(*weight) : 1.0);
        });
        return mine;
    }

    __device__ void backward(const Program::Step& g) const {
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
            case Program::Step::Kind::dropout: drop(g, dy, dx);
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

    // The rates of the step in hand. A block alone looks them up when it wants them, as registers are scarce; in a cluster all would
    // wait for that.
    __device__ const Hyper<T>* hyper() const { return (Shares ? launch_rates : first_rates()) + taken; }
    __device__ const Hyper<T>* first_rates() const { return in_global(job.hyper) + job.control->step; }
    __device__ Rule<T> rule() const {
        Rule<T> rule = {job.rule, memory, {}, Shares ? rates() : hyper(), nullptr, job.l1, job.l2, job.clip_value};
        const int first = own_parameters().begin;
        for (int slot = 0; slot < kSlots; ++slot)
            rule.slots[slot] = p.slots[slot] >= 0 ? at(p.slots[slot]) - first : nullptr;
        return rule;
    }
    // All gradients and updates; returns what this thread has of the penalty.
    __device__ double update(const Rule<T>& rule) const {
        return Shares || p.gradient >= 0 ? update_stored(rule) : update_at_once(rule);
    }
    __device__ double update_at_once(const Rule<T>& rule) const {
        double penalty = 0;
        for_each_linear([&](const Program::Step& g) {
            each_gradient(g, [&](int place, auto& gradient, int count, bool weights) {
                if (rule.regularizes()) regularize(rule, place, gradient, count, weights, penalty);
                rule.apply(place, gradient);
            });
        });
        return penalty;
    }
    // Where the whole gradient must be seen first, or other blocks have parts of it.
    __device__ double update_stored(const Rule<T>& rule) const {
        double penalty = 0, squares = 0;
        const bool clips = job.clip_norm != 0;
        for_each_linear([&](const Program::Step& g) {
            each_gradient(g, [&](int place, auto& part, int, bool) {
                several_at<sizeof part / sizeof(T)>(at(p.gradient) + place) = part;
            });
        });
        meet();
        if constexpr (Shares) prefetch_next();
        each_own_four([&](int place) {
            Several<T, 4> gradient = sum_of_blocks(at(p.gradient) + place);
            if (clips || rule.regularizes()) {
                const Program::Step& g = layer_at(place);
                const int within = place - g.weights, stride = stride_of(g.outputs),
                          count = g.outputs - within % stride;
                if (rule.regularizes()) regularize(rule, place, gradient, count, within < g.inputs * stride, penalty);
                CHAINRULE_UNROLL(4)
                for (int c = 0; c < 4; ++c)
                    if (c < count) squares += static_cast<double>(gradient.at[c]) * static_cast<double>(gradient.at[c]);
            }
            if (clips)
                several_at<4>(at(p.gradient) + place) = gradient;
            else
                apply_everywhere(rule, place, gradient);
        });
        if (!clips) return penalty;
        const double factor = job.clip_norm / (::sqrt(sum_of_all(squares)) + 1e-6);
        const T clip = static_cast<T>(factor < 1 ? factor : 1.0);
        each_own_four([&](int place) {
            Several<T, 4> gradient = several_at<4>(at(p.gradient) + place);
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) gradient.at[c] = gradient.at[c] * clip;
            apply_everywhere(rule, place, gradient);
        });
        return penalty;
    }

    // f(place) for the parameters that this block updates, four at a time.
    template <class F>
    __device__ void each_own_four(F f) const {
        const Span own = own_parameters();
        block_each((own.end - own.begin) / 4, [&](int e) { f(own.begin + 4 * e); });
    }
    template <int N>
    __device__ void regularize(const Rule<T>& rule, int place, Several<T, N>& gradient, int count, bool weights,
                               double& penalty) const {
        CHAINRULE_UNROLL(4)
        for (int c = 0; c < N; ++c)
            if (c < count) gradient.at[c] = rule.regularized(place + c, gradient.at[c], weights, penalty);
    }
    // Four loads are under way at once, some of what nobody wants: one after the other, each would take as long as a small layer.
    __device__ Several<T, 4> sum_of_blocks(T* place) const {
        if constexpr (!Shares) return several_at<4>(place);
        constexpr int together = 4;
        Several<T, 4> sum = {};
        for (int first = 0; first < ranks(); first += together) {
            Several<T, 4> parts[together];
            CHAINRULE_UNROLL(4)
            for (int r = 0; r < together; ++r)
                parts[r] = several_at<4>(in_block(place, first + r < ranks() ? first + r : rank));
            CHAINRULE_UNROLL(4)
            for (int r = 0; r < together; ++r) {
                if (first + r >= ranks()) continue;
                CHAINRULE_UNROLL(4)
                for (int c = 0; c < 4; ++c) sum.at[c] = sum.at[c] + parts[r].at[c];
            }
        }
        return sum;
    }
    __device__ void apply_everywhere(const Rule<T>& rule, int place, const Several<T, 4>& gradient) const {
        rule.apply(place, gradient);
        if constexpr (!Shares) return;
        const Several<T, 4> weights = several_at<4>(at(place));
        for (int n = 1; n < ranks(); ++n) {  // each begins with its neighbour: not all with the same one
            const int r = rank + n < ranks() ? rank + n : rank + n - ranks();
            several_at<4>(in_block(at(place), r)) = weights;
        }
    }
};

// One step, from one depart to the next: while the others still update, a block gathers its rows. All threads count alike; of the
// losses, each has its own part.
template <class T, bool Shares>
static __device__ __forceinline__ void resident_step(Block<T, Shares>& block, Progress& progress) {
    using Kind = Program::Step::Kind;
    const Program& p = block.p;
    block.begin_batch(progress.first);
    block.gather();
    if constexpr (!Shares) block.prefetch_next();
    const double weight = block.weight_of_batch();
    const T scale = static_cast<T>(!block.job.mean ? 1.0 : (weight > 0 ? 1 / weight : 0.0));
    block.rejoin();
    if constexpr (Shares) {
        block_copy(block.rates(), block.hyper());
        block.prefetch_targets();
    }
    for (int s = 0; s < p.count; ++s) {
        block.forward(p.steps[s]);
        __syncthreads();
    }
    const double value = block.loss(scale) * static_cast<double>(scale);
    __syncthreads();
    for (int s = p.count; s-- > 0;) {
        const Program::Step& g = p.steps[s];
        if (g.kind == Kind::linear && g.differentiates) {
            block.differentiate(g.fused, g.fused_param, g, block.at(g.dy), block.at(g.dy));
            __syncthreads();
        }
        block.backward(g);
        __syncthreads();
    }
    const double penalty = block.update(block.rule());
    block.depart();
    const double share = block.job.mean ? weight : 1.0;
    progress.value = value + penalty;
    progress.total += progress.value * share;
    progress.weight += share;
    progress.first += block.batch;
    ++block.taken;
}

// `steps` steps of each job's network, or as many as its epoch still has, by the blocks of a cluster.
template <class T, bool Shares>
__global__ void __launch_bounds__(kResidentThreads, sizeof(T) == 4 && !Shares ? 2 : 1)
    train_resident(const __grid_constant__ Program program, const Job<T>* jobs, int steps) {
    CHAINRULE_SHARED(T, memory);
#ifdef __CUDA_ARCH__
    __builtin_assume(blockDim.y == 1);  // a thread has a row to itself
#endif
    const int number = static_cast<int>(blockIdx.x), network = Shares ? number / program.ranks : number;
    const Job<T>* job_here = jobs + network;
    if constexpr (Shares) {
        auto* const own = reinterpret_cast<Job<T>*>(memory + program.desk);
        block_copy(own, job_here);
        __syncthreads();
        job_here = own;
    }
    const Job<T>& job = *job_here;
    Block<T, Shares> block = {program, job, memory, Shares ? number - network * program.ranks : 0};
    const bool counts = threadIdx.x == 0 && block.rank == 0;
    Progress progress = *job.control;  // the rest of it would be in registers, too, all the way to the end
    if (!counts) progress.value = progress.total = 0;
    block.each_parameter(block.all_parameters(), [](T& there, T& here) { here = there; });
    block.depart();
    if constexpr (Shares) block.launch_rates = block.first_rates();
    while (block.taken < steps && progress.first < job.rows) resident_step(block, progress);
    block.rejoin();
    block.each_parameter(block.own_parameters(), [](T& there, T& here) { there = here; });
    progress.value = block.sum_of_all(progress.value);
    progress.total = block.sum_of_all(progress.total);
    if (!counts) return;
    static_cast<Progress&>(*job.control) = progress;
    job.control->step += block.taken;
    job.control->drawn += block.taken;
}

}  // namespace cuda
}  // namespace chainrule
