// SPDX-License-Identifier: MIT
// L3: the first wide layers of a small batch, which threads share by columns.
//
// Rows are independent, and so are the columns of one layer. A thread that takes some rows reads all weights, half of which
// another core has just updated. One that takes some columns of all rows reads the weights that it updates itself
// (Tiles::by_columns) and that stay in its cache, and hands over activations, which phase 2 would fetch anyway; in return
// threads meet after every layer. Two cores, a step: 784-256-128-10, batch 128: 708 to 665 µs; 256-256-256-10, batch 64: 299
// to 259. No result changes: an element of a product does not know who computes it.
// Tried: a copy of X for each thread, gathered by itself, saved 7 of these 665 µs, and was not worth its memory.
// Tried for few weights and many rows: each of two threads sums the gradient over its half of the batch. 64-100-10, batch 200,
// took 53 instead of 59 µs, but the sums, and their bits, were no longer those of the derivatives (calculus.hpp).
#pragma once

#include "network.hpp"

namespace chainrule {

template <class T>
class Columns {
   public:
    // The largest batch. The rows of larger ones leave the cache between two layers, and use each weight often.
    static constexpr Index kMostRows = 2 * kBlockRows;

    // Of a batch of `rows` rows, by at most so many threads.
    Columns(const Network<T>& net, Index rows, int most_parts);

    // How many of the first layers are shared by columns: linear ones whose panels come out even, and the elementwise ops
    // behind them; 0 where one thread works.
    Index layers() const { return layers_; }
    // Down to dφ of this number rows go on the way back: the output of the last linear layer among them, 0 if there is none.
    Index handover() const { return handover_; }

    void forward(const Activations<T>& a, bool training) const;  // φ⁰, whole, to φ of number layers()
    void backward(const Activations<T>& a) const;  // dφ of number handover(), whole, as far down as needed

   private:
    const Layer<T>& layer(Index l) const { return net_.layers()[static_cast<std::size_t>(l)]; }
    Index above_last_linear(Index count) const;
    template <class F>
    void share(Index cols, F f) const;

    const Network<T>& net_;
    Index rows_, layers_ = 0, handover_ = 0;
    int parts_;
};

extern template class Columns<float>;
extern template class Columns<double>;

}  // namespace chainrule
