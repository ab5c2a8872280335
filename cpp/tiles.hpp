// SPDX-License-Identifier: MIT
// L3: the gradient of a network's parameters in tiles, each summed over the batch by one thread in fixed order.
#pragma once

#include "network.hpp"

namespace chainrule {

// A tile of a linear layer's gradient: `count` rows from `first`, `width` columns from `column` of its master copy, or all
// of an external layer's gradient. It begins at `place` of a buffer laid out like theta.
struct Tile {
    enum class Kind { wide, narrow, external };
    Kind kind;
    Index layer, column, width, first, count, place;
    Index size() const { return count * width; }
};

// All tiles of one network, for batches of up to `rows` rows.
template <class T>
class Tiles {
   public:
    struct Scratch {  // of one thread
        T *tile, *packed;
        Pair *x_pairs, *packed_pairs;
        const Tile* paired_for;  // whose rows x_pairs holds
    };

    CHAINRULE_COLD Tiles(const Network<T>& net, Index rows);
    std::size_t count() const { return tiles_.size(); }

    // f(tile, its number, its thread's scratch) for every tile, on so many threads; of each run of tiles a thread takes
    // neighbours with its share of the work.
    template <class F>
    void over(int parts, F f);

    // The tile of dW = dZᵀ X, over db: x are the layer's inputs, with their column of ones, dz the cotangents of its
    // outputs. With `add`, added to what is there.
    void differentiate(const Tile& tile, Index rows, MatrixView<T> x, MatrixView<T> dz, Scratch& scratch, T* gradient,
                       bool add = false) const;

   private:
    struct Run {
        std::size_t begin, end;
        double work;  // elements of its tiles
    };

    bool by_columns(Index l) const;
    CHAINRULE_COLD void plan_wide(Index l, const Layer<T>& layer);
    CHAINRULE_COLD void plan_narrow(Index l, const Layer<T>& layer);
    void differentiate_paired(const Tile& tile, Index rows, MatrixView<float> x, MatrixView<float> dz, Scratch& scratch,
                              float* gradient) const;

    const Network<T>* net_;
    Index capacity_, inputs_;  // rows of a batch; input rows of a tile, and a bias
    bool has_bfloat16_ = false;
    std::vector<Tile> tiles_;
    std::vector<Run> runs_;
    std::vector<double> middles_;  // elements of its run before the middle of each: where it lies decides who does it
    Array<T> memory_;
    Array<Pair> pairs_;
};

template <class T>
template <class F>
void Tiles<T>::over(int parts, F f) {
    if (tiles_.empty()) return;
    const Index tile_size = (inputs_ + 1) * kPanel<T>, size = tile_size + kDepth * kPanel<T>;
    const Index x_pairs = has_bfloat16_ ? round_up(inputs_ + 1, kLine<T>) * ((capacity_ + 1) / 2) : 0;
    const Index pairs = has_bfloat16_ ? x_pairs + kDepth / 2 * kPanel<T> : 0;
    if (memory_.size() < parts * size) memory_ = Array<T>(parts * size);
    if (pairs_.size() < parts * pairs) pairs_ = Array<Pair>(parts * pairs);
    parallel(parts, [&](int part, int count) {
        T* const tile = memory_.data() + part * size;
        Pair* const x = pairs_.data() + part * pairs;
        Scratch scratch = {tile, tile + tile_size, x, x + x_pairs, nullptr};
        for (const Run& run : runs_) {
            const double* const middles = middles_.data();
            const auto start_of = [&](int p) {
                return static_cast<std::size_t>(
                    std::lower_bound(middles + run.begin, middles + run.end, run.work * p / count) - middles);
            };
            for (std::size_t n = start_of(part), end = start_of(part + 1); n < end; ++n) f(tiles_[n], n, scratch);
        }
    });
}

extern template class Tiles<float>;
extern template class Tiles<double>;

}  // namespace chainrule
