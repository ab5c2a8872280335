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

struct SimtPrediction : Simt<float, 128, 64, 16, 8, 4> {
    // The column of C at a place of a panel. Four neighbouring places are one thread's, and a quarter of the panel apart: where
    // neighbouring threads put theirs down, 16 bytes each, eight of them meet no bank twice.
    static __device__ int column(int place) { return place % 4 * across + place / 4; }
    __device__ void put(float* to, int stride) const {
        CHAINRULE_UNROLL(4)
        for (int c = 0; c < 4; ++c) {
            CHAINRULE_UNROLL(2)
            for (int r = 0; r < 8; r += 4)
                *reinterpret_cast<Four<float>*>(to + column(col_of(c)) * stride +
                                                row_of(r)) = {{sum[r][c], sum[r + 1][c], sum[r + 2][c], sum[r + 3][c]}};
        }
    }
};
template <bool Bfloat16>
struct TensorPrediction : TensorCores<Bfloat16, 128, 64, 16, 2, 4> {
    using Base = TensorCores<Bfloat16, 128, 64, 16, 2, 4>;
    static __device__ int column(int place) { return place; }
    __device__ void put(float* to, int stride) const {
        CHAINRULE_UNROLL(2)
        for (int i = 0; i < 2; ++i) {
            CHAINRULE_UNROLL(4)
            for (int j = 0; j < 4; ++j) {
                CHAINRULE_UNROLL(4)
                for (int e = 0; e < 4; ++e) {
                    const int row = Base::first_row() + 16 * i + Base::group() + e / 2 * 8;
                    to[(Base::first_col() + 8 * j + 2 * Base::turn() + e % 2) * stride + row] = this->sum[i][j][e];
                }
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
            const int height = terms(g.inputs), panels = (g.outputs + Tile::cols - 1) / Tile::cols;
            each(panels * height * w_stride, [&](int e) {
                const int place = e % w_stride, k = e / w_stride % height;
                const int o = e / w_stride / height * Tile::cols + Tile::column(place);
                to[e] = place < Tile::cols && o < g.outputs && k < g.inputs ? w[o * g.inputs + k] : 0.0f;
            });
        }
    }
    // A warp reads eight columns of four rows, which fills sectors of 32 bytes, and meets each bank once where it puts them.
    __device__ void gather(const float* x, int count) const {
        const int columns = terms(p.inputs), across = columns / 8;
        float* const to = at(p.steps[0].x);
        each(rows * columns, [&](int e) {
            const int j = e / 32 % across * 8 + e % 8, i = e / 32 / across * 4 + e / 8 % 4;
            to[j * x_stride + i] = i < count && j < p.inputs ? x[static_cast<Index>(i) * p.inputs + j] : 0.0f;
        });
    }
    __device__ void multiply_wide(const Step& g) const {
        const int height = terms(g.inputs);
        const float* panel = weights(g);
        for (int column = 0; column < g.outputs; column += Tile::cols, panel += height * w_stride) {
            Tile tile;
            for (int k = 0; k < height; k += Tile::depth) tile.add(at(g.x) + k * x_stride, panel + k * w_stride);
            tile.put(at(g.y) + column * x_stride, x_stride);
        }
    }
    __device__ void multiply_few(const Step& g) const {
        each(g.outputs * rows, [&](int e) {
            const int i = e % rows, o = e / rows;
            const float *x = at(g.x) + i, *w = weights(g) + o * g.inputs;
            float sum = 0;
            CHAINRULE_UNROLL(8)
            for (int k = 0; k < g.inputs; ++k)
                sum = fma(Vec<float>(x[k * x_stride]), Vec<float>(w[k]), Vec<float>(sum))[0];
            at(g.y)[o * x_stride + i] = sum;
        });
    }
    // b and the op, in place; below them zeros up to whole tiles of terms, for 0 ∞ is NaN.
    __device__ void finish(const Step& g) const {
        const bool linear = g.kind == Step::Kind::linear;
        const Op op = linear ? g.fused : g.op;
        const float param = static_cast<float>(linear ? g.fused_param : g.param);
        float* const y = at(g.y);
        each(terms(g.outputs) * rows, [&](int e) {
            const int o = e / rows, place = o * x_stride + e % rows;
            float value = 0;
            if (o < g.outputs) {
                value = y[place];
                if (linear && g.bias) value = value + at(g.weights)[o];
                value = op_forward(op, value, param);
            }
            y[place] = value;
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
    for (Index first = Index{blockIdx.x} * Tile::rows; first < rows; first += Index{gridDim.x} * Tile::rows) {
        const int count = static_cast<int>(rows - first < Tile::rows ? rows - first : Tile::rows);
        __syncthreads();  // everybody has stored the rows before
        block.gather(x + first * program.inputs, count);
        __syncthreads();
        for (int s = 0; s < program.count; ++s) {
            const Program::Step& g = program.steps[s];
            if (g.kind == Program::Step::Kind::dropout) continue;
            if (g.kind == Program::Step::Kind::linear) {
                block.few(g) ? block.multiply_few(g) : block.multiply_wide(g);
                __syncthreads();
            }
            block.finish(g);
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
            check(cudaFuncSetAttribute(predict_resident<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes())),
                  "asking for shared memory");
            const Index room = 2 * bytes() <= static_cast<std::size_t>(net_.runtime().shared_bytes) ? 2 : 1;
            const Index blocks = std::min(tiles_across(rows, Tile::rows), room * net_.runtime().how.processors);
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
