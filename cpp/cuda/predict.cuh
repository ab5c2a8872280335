// SPDX-License-Identifier: MIT
// L3: prediction of many rows by a network that fits into shared memory: a block keeps all weights there and takes rows, a tile
// of them at a time, through all layers. X is read once and f written once; nothing else goes to memory.
//
// φ lies transposed, with a tile's rows side by side, and W in panels, as plan_prediction has it: operands of the tiles in
// multiply.cuh, which bring their sums in the same order there and here.
#pragma once

#include "program.hpp"
#include "step.cuh"

namespace chainrule {
namespace cuda {

// ---- tiles that put their columns down as rows of the next φ ----------------------------------------------------------

// What comes after the product: b and the op. Outputs that a layer does not have are zeros, for 0 ∞ is NaN in the next product.
struct Finish {
    const float* bias;  // null: none
    int outputs;
    Op op;
    float param;
    bool for_tiles;  // whether the next layer multiplies it by tiles
    __device__ float biased(float z, int o) const { return bias && o < outputs ? z + bias[o] : z; }
    template <class Tile>
    __device__ float left(float phi, int o) const {
        const float masked = o < outputs ? phi : 0.0f;
        return for_tiles ? Tile::kept(masked) : masked;
    }
};

// Sixteen sums are finished at a time, the first ones, and the others move up: one jump to the op for all of them, and one text
// of it. An index that is known only at run time would send all sums to memory.
struct SimtPrediction : Simt<float, 128, 64, 16, 8, 8> {
    // The column of C at a place of a panel. Four neighbouring places are one thread's, and a quarter of the panel apart: where
    // neighbouring threads put theirs down, 16 bytes each, eight of them meet no bank twice.
    static __device__ int column(int place) { return place % 4 * (cols / 4) + place / 4; }
    __device__ void put(float* to, int stride, int first, const Finish& finish) {
        CHAINRULE_UNROLL(1)
        for (int c = 0; c < 8; c += 2) {
            Several<float, 16> phi;
            CHAINRULE_UNROLL(16)
            for (int e = 0; e < 16; ++e)
                phi.at[e] = finish.biased(sum[e % 8][e / 8], first + column(col_of(c + e / 8)));
            op_forward(finish.op, phi, finish.param);
            CHAINRULE_UNROLL(4)
            for (int four = 0; four < 16; four += 4) {
                const int o = first + column(col_of(c + four / 8));
                Several<float, 4> left;
                CHAINRULE_UNROLL(4)
                for (int r = 0; r < 4; ++r) left.at[r] = finish.left<Simt>(phi.at[four + r], o);
                several_at<4>(to + o * stride + row_of(four % 8)) = left;
            }
            CHAINRULE_UNROLL(8)
            for (int r = 0; r < 8; ++r) {
                CHAINRULE_UNROLL(6)
                for (int next = 2; next < 8; ++next) sum[r][next - 2] = sum[r][next];
            }
        }
    }
};
template <bool Bfloat16>
struct TensorPrediction : TensorCores<Bfloat16, 128, 64, 16, 2, 4> {
    using Base = TensorCores<Bfloat16, 128, 64, 16, 2, 4>;
    static __device__ int column(int place) { return place; }
    __device__ void put(float* to, int stride, int first, const Finish& finish) {
        const auto output = [&](int e) { return first + Base::first_col() + 8 * (e / 4) + 2 * Base::turn() + e % 2; };
        CHAINRULE_UNROLL(1)
        for (int i = 0; i < 2; ++i) {
            Several<float, 16> phi;
            CHAINRULE_UNROLL(16)
            for (int e = 0; e < 16; ++e) phi.at[e] = finish.biased(this->sum[0][e / 4][e % 4], output(e));
            op_forward(finish.op, phi, finish.param);
            const int row = Base::first_row() + 16 * i + Base::group();
            CHAINRULE_UNROLL(16)
            for (int e = 0; e < 16; ++e) {
                to[output(e) * stride + row + e % 4 / 2 * 8] = finish.template left<Base>(phi.at[e], output(e));
                this->sum[0][e / 4][e % 4] = this->sum[1][e / 4][e % 4];
            }
        }
    }
};
template <class Tile>
constexpr TileShape shape_of() {
    return {Tile::rows, Tile::cols, Tile::depth, Tile::padding};
}

// ---- a block ----------------------------------------------------------------------------------------------------------

template <class Tile>
struct Prediction {
    using Step = Program::Step;
    static constexpr int rows = Tile::rows, x_stride = Tile::rows + Tile::padding,
                         w_stride = Tile::cols + Tile::padding;
    static constexpr int kTogether = 8;  // loads of a thread that are under way at once
    const Program& p;
    float* memory;

    static __device__ int terms(int inputs) { return static_cast<int>(round_up(inputs, Tile::depth)); }
    static __device__ bool few(const Step& g) { return g.outputs <= kFewOutputs; }
    template <class F>
    static __device__ __forceinline__ void each(int count, F f) {
        for (int e = static_cast<int>(threadIdx.x); e < count; e += Tile::threads) f(e);
    }
    __device__ float* at(int place) const { return memory + place; }
    __device__ float* weights(const Step& g) const { return at(g.weights) + (g.outputs + 3) / 4 * 4; }
    // Whether a linear layer comes next that multiplies by tiles, which want their operands rounded.
    __device__ bool for_tiles(const Step* next) const {
        const Step* const end = p.steps + p.count;
        while (next < end && next->kind == Step::Kind::dropout) ++next;
        return next < end && next->kind == Step::Kind::linear && !few(*next);
    }

    __device__ void bring_weights(const float* theta) const {
        for (int s = 0; s < p.count; ++s) {
            const Step& g = p.steps[s];
            if (g.kind != Step::Kind::linear) continue;
            const float *w = theta + g.offset, *b = w + g.outputs * g.inputs;
            float* const to = weights(g);
            each(g.outputs, [&](int o) { at(g.weights)[o] = g.bias ? b[o] : 0.0f; });
            if (few(g)) {
                each(g.outputs * g.inputs, [&](int e) { to[e] = w[e]; });
                continue;
            }
            bring_panels(g, w, to);
        }
    }
    // Wᵀ. A warp reads eight terms of four outputs at once, as a Carrier does; all loads come first, some of what nobody wants.
    __device__ void bring_panels(const Step& g, const float* w, float* panels) const {
        const int thread = static_cast<int>(threadIdx.x), height = terms(g.inputs);
        const int places = static_cast<int>(round_up(g.outputs, Tile::cols));
        for (int c = thread / 8; c < places; c += Tile::threads / 8) {
            const int panel = c / Tile::cols, place = c % Tile::cols, o = panel * Tile::cols + Tile::column(place);
            const float* const row = w + (o < g.outputs ? o : 0) * g.inputs;
            float* const to = panels + panel * height * w_stride + place;
            for (int k = thread % 8; k < height; k += 8 * kTogether) {
                float here[kTogether];
                CHAINRULE_UNROLL(8)
                for (int s = 0; s < kTogether; ++s) here[s] = row[k + 8 * s < g.inputs ? k + 8 * s : 0];
                CHAINRULE_UNROLL(8)
                for (int s = 0; s < kTogether; ++s) {
                    const int t = k + 8 * s;
                    if (t < height) to[t * w_stride] = o < g.outputs && t < g.inputs ? Tile::kept(here[s]) : 0.0f;
                }
            }
        }
    }
    template <int N>
    static __device__ void put(float* to, const Several<float, N>& x, bool there, bool rounds) {
        CHAINRULE_UNROLL(4)
        for (int c = 0; c < N; ++c) to[c * x_stride] = !there ? 0.0f : rounds ? Tile::kept(x.at[c]) : x.at[c];
    }
    // A warp reads 32 bytes of each of its rows, which fills a sector of memory, and meets no bank twice where it puts them.
    template <int N>
    __device__ void gather(const float* x, int count) const {
        constexpr int warps = Tile::threads / 32, rows_of_warp = 4 * N;
        const int thread = static_cast<int>(threadIdx.x), columns = terms(p.inputs);
        const int row = thread / 32 * rows_of_warp + thread % rows_of_warp, first = thread % 32 / rows_of_warp * N;
        float* const to = at(p.steps[0].x);
        const bool rounds = for_tiles(p.steps);
        for (int i = row; i < rows; i += warps * rows_of_warp) {
            const float* const from = x + static_cast<Index>(i < count ? i : 0) * p.inputs;
            for (int j = first; j < columns; j += 8 * kTogether) {
                Several<float, N> here[kTogether];
                CHAINRULE_UNROLL(8)
                for (int s = 0; s < kTogether; ++s)
                    here[s] = several_at<N>(from + (j + 8 * s < p.inputs ? j + 8 * s : 0));
                CHAINRULE_UNROLL(8)
                for (int s = 0; s < kTogether; ++s)
                    if (j + 8 * s < columns)
                        put<N>(to + (j + 8 * s) * x_stride + i, here[s], i < count && j + 8 * s < p.inputs, rounds);
            }
        }
    }
    __device__ Finish finish(const Step& g) const {
        const bool linear = g.kind == Step::Kind::linear;
        return {g.bias ? at(g.weights) : nullptr, g.outputs, linear ? g.fused : g.op,
                static_cast<float>(linear ? g.fused_param : g.param), for_tiles(&g + 1)};
    }
    __device__ void multiply_wide(const Step& g) const {
        const int height = terms(g.inputs);
        const float* panel = weights(g);
        for (int column = 0; column < g.outputs; column += Tile::cols, panel += height * w_stride) {
            Tile tile;
            __syncwarp();  // tensor cores want a warp together, which the panel before may have left parted
            for (int k = 0; k < height; k += Tile::depth) tile.add(at(g.x) + k * x_stride, panel + k * w_stride);
            tile.put(at(g.y), x_stride, column, finish(g));
        }
    }
    __device__ void multiply_few(const Step& g) const {
        const Finish after = finish(g);
        each(terms(g.outputs) * rows, [&](int e) {
            const int i = e % rows, o = e / rows;
            float sum = 0;
            if (o < g.outputs) {
                const float *x = at(g.x) + i, *w = weights(g) + o * g.inputs;
                CHAINRULE_UNROLL(8)
                for (int k = 0; k < g.inputs; ++k)
                    sum = fma(Vec<float>(x[k * x_stride]), Vec<float>(w[k]), Vec<float>(sum))[0];
            }
            const float phi = op_forward(after.op, after.biased(sum, o), after.param);
            at(g.y)[o * x_stride + i] = after.template left<Tile>(phi, o);
        });
    }
    __device__ void apply(const Step& g) const {
        const Finish how = finish(g);
        each(g.outputs * (rows / 4), [&](int e) {
            auto& there = several_at<4>(at(g.y) + e / (rows / 4) * x_stride + e % (rows / 4) * 4);
            Several<float, 4> phi = there;
            op_forward(how.op, phi, how.param);
            CHAINRULE_UNROLL(4)
            for (int c = 0; c < 4; ++c) phi.at[c] = how.template left<Tile>(phi.at[c], 0);
            there = phi;
        });
    }
    __device__ void store(float* f, int count) const {
        each(count * p.outputs, [&](int e) { f[e] = at(p.f)[e % p.outputs * x_stride + e / p.outputs]; });
    }
};

template <class Tile>
__global__ void __launch_bounds__(Tile::threads, 2)
    predict_resident(const __grid_constant__ Program program, const float* theta, Index rows, const float* x,
                     float* f) {
    CHAINRULE_SHARED(float, memory);
    const Prediction<Tile> block = {program, memory};
    block.bring_weights(theta);
    const bool in_fours = program.inputs % 4 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
    for (Index first = Index{blockIdx.x} * Tile::rows; first < rows; first += Index{gridDim.x} * Tile::rows) {
        const int count = static_cast<int>(rows - first < Tile::rows ? rows - first : Tile::rows);
        __syncthreads();  // everybody has stored the rows before
        const float* const here = x + first * program.inputs;
        in_fours ? block.template gather<4>(here, count) : block.template gather<1>(here, count);
        __syncthreads();
        for (int s = 0; s < program.count; ++s) {
            const Program::Step& g = program.steps[s];
            if (g.kind == Program::Step::Kind::dropout) continue;
            if (g.kind == Program::Step::Kind::linear)
                block.few(g) ? block.multiply_few(g) : block.multiply_wide(g);
            else
                block.apply(g);
            __syncthreads();
        }
        block.store(f + first * program.outputs, count);
    }
}

// ---- on the host ------------------------------------------------------------------------------------------------------

// Prediction by tiles of one kind, for a network that has a program for them.
class ResidentPrediction {
   public:
    ResidentPrediction(const Network<float>& net) : net_(net) {
        with_tile([&](auto tile) { program_ = plan_prediction(net.layers(), shape_of<decltype(tile)>()); });
    }
    bool fits() const { return program_.count > 0 && bytes() <= static_cast<std::size_t>(net_.runtime().shared_bytes); }
    // x and f lie anywhere.
    void run(Index rows, const float* x, float* f) const {
        auto& runtime = net_.runtime();
        const bool x_here = device_of(x) == net_.device(), f_here = device_of(f) == net_.device();
        const Index piece = x_here && f_here ? rows : std::min(rows, rows_at_once(net_, 1));
        for (Index first = 0; first < rows; first += piece) {
            const Index count = std::min(piece, rows - first);
            const float* from = x + first * net_.inputs();
            float* to = f + first * net_.outputs();
            if (!x_here) {
                runtime.rows_in.grow(net_.device(), piece * net_.inputs(), "rows to predict from");
                upload(runtime.rows_in.data(), from, count * net_.inputs(), runtime.stream);
                from = runtime.rows_in.data();
            }
            if (!f_here) {
                runtime.rows_out.grow(net_.device(), piece * net_.outputs(), "predictions");
                to = runtime.rows_out.data();
            }
            enqueue(count, from, to);
            if (!f_here) download(f + first * net_.outputs(), to, count * net_.outputs(), runtime.stream);
        }
        runtime.stream.wait();
    }

   private:
    void enqueue(Index rows, const float* x, float* f) const {
        with_tile([&](auto tile) {
            using Tile = decltype(tile);
            allow_shared(predict_resident<Tile>, net_.runtime().shared_bytes);
            int room = 0;
            check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, predict_resident<Tile>, Tile::threads, bytes()),
                  "asking for room");
            if (room < 1)
                throw std::runtime_error(
                    "[cuda] predictions must fit a processor: expected room for a block, got none");
            const Index blocks = std::min(tiles_across(rows, Tile::rows), Index{room} * net_.runtime().how.processors);
            launch(predict_resident<Tile>, dim3(static_cast<unsigned>(blocks)), Tile::threads, bytes(),
                   net_.runtime().stream, program_, net_.theta(), rows, x, f);
        });
    }
    std::size_t bytes() const { return static_cast<std::size_t>(program_.total) * sizeof(float); }
    template <class F>
    void with_tile(F f) const {
        if (net_.precision() == Precision::tf32) return f(TensorPrediction<false>{});
        if (net_.precision() == Precision::bfloat16) return f(TensorPrediction<true>{});
        f(SimtPrediction{});
    }

    const Network<float>& net_;
    Program program_;
};

}  // namespace cuda
}  // namespace chainrule
