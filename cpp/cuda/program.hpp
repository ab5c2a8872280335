// SPDX-License-Identifier: MIT
// L3: what the resident schedule does with a network, worked out on the host: which parts there are, and where in a block's
// shared memory each matrix lies. Plain arithmetic on sizes; a compiler without CUDA can ask it.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../network.hpp"
#include "sizes.hpp"

namespace chainrule {
namespace cuda {

constexpr int kResidentLayers = 24;
constexpr int kResidentThreads = 256;
constexpr Index kDeskBytes = 512;

struct Program {
    struct Step {
        enum class Kind { linear, elementwise, rowwise, dropout } kind;
        Op op, fused;  // fused: the elementwise op after a linear layer, else the identity
        int inputs, outputs;
        bool bias, keeps_z;
        double param, fused_param;
        int number;   // of the layer, for dropout's key
        int weights;  // Wᵀ over b
        int x, z, y;  // φ before, between (where kept) and after
        int dy, dx;   // cotangents of y, and of x; the same place where they share it
        int saved;    // what the derivative of op or fused is read off
        bool pulls;   // whether anybody needs dx
        bool
            differentiates;  // whether a linear layer pulls through its fused op itself; else who brings dy has done it
        Op through;          // the fused op of the layer before, through which dx goes at once
        double through_param;
        int through_saved;
        Index offset;  // of the layer in theta
    };
    Step steps[kResidentLayers];
    int ranks = 1;  // blocks that share a batch
    int count = 0, inputs = 0, outputs = 0;
    int f = 0, df = 0;       // φᴸ and its cotangent
    int parameters = 0;      // elements of all weights, which come first
    int slots[kSlots] = {};  // where the rule's slots of a block's part begin; -1: it has none there
    int gradient = -1;       // where the gradient lies; -1: no place, it is used up at once
    int sums = 0;            // a double for each thread, and one for each block
    int desk = 0;            // the job and a step's rates, which a barrier of a cluster would send out of reach
    Index total = 0;         // elements of T in all
};

// Cuts shared memory, in elements; every piece begins at 16 bytes.
class Cutter {
   public:
    int cut(Index size) {
        const Index place = next_;
        next_ += round_up(size, 4);
        return next_ <= (Index{1} << 30) ? static_cast<int>(place) : 0;
    }
    Index used() const { return next_; }

   private:
    Index next_ = 0;
};

// Whether layer l is an elementwise op.
template <class T>
bool elementwise_at(const std::vector<Layer<T>>& layers, std::size_t l) {
    return l < layers.size() && layers[l].kind == Layer<T>::Kind::op && !is_rowwise(layers[l].op);
}

// The parts of a network, an elementwise op after a linear layer within that; count 0 if they are too many.
template <class T>
Program parts_of(const std::vector<Layer<T>>& layers, Index first_cotangent) {
    using Step = Program::Step;
    Program p;
    for (std::size_t l = 0; l < layers.size(); ++l) {
        if (p.count == kResidentLayers) return Program{};
        const Layer<T>& g = layers[l];
        Step& s = p.steps[p.count++] = Step{};
        s.op = s.fused = s.through = Op::identity;
        s.inputs = static_cast<int>(g.inputs);
        s.outputs = static_cast<int>(g.outputs);
        s.bias = g.bias;
        s.param = g.param;
        s.number = static_cast<int>(l);
        s.pulls = static_cast<Index>(l) >= first_cotangent;
        s.offset = g.offset;
        s.op = g.kind == Layer<T>::Kind::op ? g.op : Op::identity;
        s.kind = g.kind == Layer<T>::Kind::linear    ? Step::Kind::linear
                 : g.kind == Layer<T>::Kind::dropout ? Step::Kind::dropout
                 : is_rowwise(g.op)                  ? Step::Kind::rowwise
                                                     : Step::Kind::elementwise;
        if (s.kind != Step::Kind::linear || !elementwise_at(layers, l + 1)) continue;
        s.fused = layers[++l].op;
        s.fused_param = layers[l].param;
        s.keeps_z = saves_of(s.fused) == Saves::input;
        s.differentiates = s.fused != Op::identity;
    }
    for (int n = 1; n < p.count; ++n) {
        Step &before = p.steps[n - 1], &s = p.steps[n];
        if (s.kind != Step::Kind::linear || !s.pulls || !before.differentiates) continue;
        before.differentiates = false;
        s.through = before.fused;
        s.through_param = before.fused_param;
    }
    p.inputs = static_cast<int>(layers.front().inputs);
    p.outputs = static_cast<int>(layers.back().outputs);
    return p;
}

// The whole program, for batches of so many rows by so many blocks. `slots` says which of them the rule has, `stored` whether the
// whole gradient must be seen before the update.
template <class T>
Program plan_resident(const std::vector<Layer<T>>& layers, Index first_cotangent, Index batch,
                      const bool (&slots)[kSlots], bool stored, int ranks) {
    using Step = Program::Step;
    Program p = parts_of(layers, first_cotangent);
    p.ranks = ranks;
    Cutter memory;
    for (int n = 0; n < p.count; ++n) {
        Step& s = p.steps[n];
        if (s.kind == Step::Kind::linear) s.weights = memory.cut((s.inputs + s.bias) * resident_stride(s.outputs));
    }
    p.parameters = memory.cut(0);
    const Index own = 4 * tiles_across(p.parameters / 4, ranks);
    for (int slot = 0; slot < kSlots; ++slot) p.slots[slot] = slots[slot] ? memory.cut(own) : -1;
    if (stored || ranks > 1) p.gradient = memory.cut(p.parameters);
    const auto matrix = [&](int cols) { return memory.cut(tiles_across(batch, ranks) * resident_stride(cols)); };
    int phi = matrix(p.inputs);
    for (int n = 0; n < p.count; ++n) {
        Step& s = p.steps[n];
        s.x = phi;
        if (s.keeps_z) s.z = matrix(s.outputs);
        s.y = phi = matrix(s.outputs);
        const bool of_input = saves_of(s.kind == Step::Kind::linear ? s.fused : s.op) == Saves::input;
        s.saved = !of_input ? s.y : (s.kind == Step::Kind::linear ? s.z : s.x);
    }
    int dphi = matrix(p.outputs);
    p.f = phi;
    p.df = dphi;
    for (int n = p.count; n-- > 0;) {
        Step& s = p.steps[n];
        s.dy = dphi;
        if (s.kind == Step::Kind::linear && s.pulls) dphi = matrix(s.inputs);
        s.dx = dphi;
        s.through_saved = n > 0 ? p.steps[n - 1].saved : s.x;
    }
    p.sums = memory.cut((kResidentThreads + kMostRanks) * static_cast<Index>(sizeof(double) / sizeof(T)));
    p.desk = memory.cut(kDeskBytes / static_cast<Index>(sizeof(T)));
    p.total = memory.used();
    return p;
}

// ---- prediction -----------------------------------------------------------------------------------------------------

// A tile of multiply.cuh: rows x cols of C, so many terms at a time, and how much longer rows of A and B are in shared memory.
struct TileShape {
    Index rows, cols, depth, padding;
    Index terms(Index inputs) const { return round_up(inputs, depth); }
};

// Layers of no more outputs take no tile: it would compute zeros for most of its time.
constexpr Index kFewOutputs = 8;

// Where prediction has weights and two φ, which take turns; count 0 if a layer wants its rows whole. Of each linear layer b comes
// first, then W: Wᵀ in panels of a tile's columns, zeros below it, or as it is if there are few outputs.
template <class T>
Program plan_prediction(const std::vector<Layer<T>>& layers, const TileShape& tile) {
    using Step = Program::Step;
    Program p = parts_of(layers, 0);
    Cutter memory;
    Index widest = tile.terms(p.inputs);
    for (int n = 0; n < p.count; ++n) {
        Step& s = p.steps[n];
        if (s.kind == Step::Kind::rowwise) return Program{};
        widest = std::max(widest, round_up(s.outputs, tile.cols));
        const Index panel = tile.terms(s.inputs) * (tile.cols + tile.padding);
        const Index weights = s.outputs <= kFewOutputs ? static_cast<Index>(s.outputs) * s.inputs
                                                       : tiles_across(s.outputs, tile.cols) * panel;
        if (s.kind == Step::Kind::linear) s.weights = memory.cut(round_up(s.outputs, 4) + weights);
    }
    int phi = memory.cut(widest * (tile.rows + tile.padding)), other = memory.cut(widest * (tile.rows + tile.padding));
    for (int n = 0; n < p.count; ++n) {
        Step& s = p.steps[n];
        s.x = phi;
        if (s.kind == Step::Kind::linear) std::swap(phi, other);  // all else is in place
        s.y = phi;
    }
    p.f = phi;
    p.total = memory.used();
    return p;
}

}  // namespace cuda
}  // namespace chainrule
