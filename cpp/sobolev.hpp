// SPDX-License-Identifier: MIT
// L3: Sobolev training, on the values y of a function and on its slopes dy = ∂y/∂x. Czarnecki et al., NIPS 2017.
//
//   L = loss + λ Σ_n ω_n ½ ‖J_n − dy_n‖²     J_n = ∂f_n/∂x_n (O, I); ω_n is what the loss multiplies example n by
//
// An output o of an example n has a row of derivatives of its own:
//   down   c from e_o at the top: c⁰ is row o of J_n
//   up     the tangent of λ ω_n (c⁰ − dy_no)
//   down   ċ, the tangent of c, whose gradient ċᵀ x + cᵀ ẋ is that of λ ω_n ½ |c⁰ − dy_no|²
// ċ is linear in where it starts: with ∂loss/∂f there, instead of 0, the gradient is that of both terms. An example has one
// ∂loss/∂f, which the row of its output 0 takes.
#pragma once

#include "tape.hpp"
#include "tiles.hpp"

namespace chainrule {

// The second term for up to so many examples, with all memory it needs. Dropout is the identity, products are exact.
template <class T>
class Sobolev {
   public:
    struct Batch {
        Index examples;
        MatrixView<T> x, df;        // φ⁰, and ∂loss/∂f
        const T* dy;                // (rows of the data, O, I)
        const std::int64_t* order;  // the row of the data that each example is, or null: they are the first ones
        const T* weight;            // of each example, or null
        double scale;               // λ; times weight, λ ω
    };

    Sobolev(const Network<T>& net, Index most);

    // The term's value; what `differentiate` reads. Users' layers add their part of the gradient of both terms to
    // `gradient`, laid out like theta.
    double sweep(const Batch& batch, T* gradient, int most_parts);
    // A linear layer's tile of the gradient of both terms.
    void differentiate(const Tiles<T>& tiles, const Tile& tile, typename Tiles<T>::Scratch& scratch, T* gradient) const;

   private:
    using Kind = typename Tape<T>::Kind;
    void sweep_examples(const Batch& batch, Index begin, Index end, T* gradient);
    void load(const Batch& batch, Index begin, Index end);
    void leave_residuals(const Batch& batch, Index begin, Index end);
    void load_loss(const Batch& batch, Index begin, Index end);
    void add_outputs(Index begin, Index end);

    const Network<T>& net_;
    const Index outputs_;
    Index examples_ = 0;
    // Shaped once, for as many examples as there may be: what no sweep writes, the padding at its ends, stays 0.
    Tape<T> tape_;
    std::vector<double> values_;  // of each example
};

extern template class Sobolev<float>;
extern template class Sobolev<double>;

}  // namespace chainrule
