// SPDX-License-Identifier: MIT
// L3: the matrices that derivatives of first and second order travel through, and the sweeps over their rows.
//
// Four things travel along the chain, beside the primals φˡ: tangents φ̇ˡ and second tangents φ̈ˡ upwards, cotangents
// cˡ = ∂L/∂φˡ and their tangents ċˡ downwards. With z = W x + b:
//   ż = W ẋ + Ẇ x + ḃ      c_x = c W         c_W = cᵀ x
//   z̈ = W ẍ                ċ_x = ċ W + c Ẇ   ċ_W = ċᵀ x + cᵀ ẋ
// and for an op as ops/op.hpp has it. At the top ċ = H_L ḟ, so that a sweep up and a sweep down give H v. Nothing is shared
// in place. A row's bits depend neither on its batch nor on the threads, gradients' bits not on the threads either.
#pragma once

#include <initializer_list>

#include "network.hpp"

namespace chainrule {

// A direction Ẇ in the space of parameters, in both layouts that products with W want; `backward` only for layers that
// a cotangent passes on its way to the parameters: the first ones' is never read, and there often are most of the weights.
// Tried: for one row, panels made where the product wants them, from the caller's array. Along 784-256-128-10 jvp took 31 µs
// instead of 44, but H v 55 instead of 58: not worth a second mode.
template <class T>
class Direction {
   public:
    explicit Direction(const Network<T>& net);
    void clear();
    void set(const Parameter& parameter, const T* from);  // plain row-major
    const T* forward(const Layer<T>& layer) const { return theta_.data() + layer.offset; }
    const T* backward(Index layer) const { return backward_.data() + places_[static_cast<std::size_t>(layer)]; }
    Index bytes() const { return (theta_.size() + backward_.size()) * static_cast<Index>(sizeof(T)); }

   private:
    void prepare();
    bool passed(Index layer) const;
    const Network<T>& net_;
    std::vector<Index> places_;  // of the layers in backward_, and its size
    Array<T> theta_, backward_;
};

// The matrices of one batch, and the sweeps over ranges of its rows. Several rows of derivatives, such as all rows of a
// Jacobian, may belong to one example: then they share its primals, which are computed once.
template <class T>
class Tape {
   public:
    enum Kind { primal, tangent, cotangent, cotangent_tangent, second_tangent, kinds };

    explicit Tape(const Network<T>& net)
        : net_(net), levels_(net.depth() + 1), views_(static_cast<std::size_t>(kinds * levels_)) {}

    // Room for these kinds, contents undefined. Rows [first, first + rows) of derivatives, `seeds` for each example.
    void shape(Index first, Index rows, Index seeds, std::initializer_list<Kind> wanted);
    Index rows() const { return shape_.rows; }
    Index examples() const { return examples_; }
    Index example(Index row) const { return (shape_.phase + row) / shape_.seeds; }
    MatrixView<T> at(Kind kind, Index layer) const { return views_[place(kind, layer)]; }
    Index bytes() const { return (arena_.size() + inputs_backward_.size()) * static_cast<Index>(sizeof(T)); }

    // Whether sweeps share out the columns of their products to several threads, which is for who does not share out rows.
    void share_columns(bool sharing) { sharing_ = sharing; }

    void load(Kind kind, Index layer, Index begin, Index end, const T* from) const;  // from the first row's place
    void store(Kind kind, Index layer, Index begin, Index end, T* to) const;
    void seed(Kind kind, Index layer, Index begin,
              Index end) const;  // rows of the unit matrix, one example's after another's

    // The sweeps, each after those whose results it reads. `moving` is the first φ with a tangent: 0 where the inputs move,
    // else the first that parameters move. `to` is the φ where a sweep down ends. Users' layers add their part of the
    // gradient to `gradient`, laid out like theta, if it is given.
    void forward(Index begin, Index end) const;
    void tangents(Index begin, Index end) const;
    void forward_and_tangents(Index begin, Index end, Index moving,
                              const Direction<T>* direction) const;  // both at once
    void tangents_along(Index input, Index begin, Index end) const;  // that input alone moves, by 1 in every row
    void second_tangents(Index begin, Index end) const;
    void cotangents(Index begin, Index end, Index to, T* gradient) const;
    void cotangent_tangents(Index begin, Index end, Index to, Index moving, T* gradient) const;
    // Both at once, of parameters that move: the cotangents down to the first that does.
    void cotangents_and_tangents(Index begin, Index end, const Direction<T>& direction, T* gradient) const;
    void prepare_inputs();  // before a sweep down to the inputs
    // Where a sweep down for the parameters' sake ends: above the first that there are, but a user's layer gives them itself.
    Index lowest() const;

    // The gradient of a user's layer for one row alone, laid out as in theta.
    void example_gradient(Index layer, Index row, T* own) const;

   private:
    std::size_t place(Kind kind, Index layer) const { return static_cast<std::size_t>(kind * levels_ + layer); }
    const Layer<T>& layer(Index l) const { return net_.layers()[static_cast<std::size_t>(l)]; }
    MatrixView<T> rows_of(Kind kind, Index l, Index begin, Index end) const;
    MatrixView<const T> read(Kind kind, Index l, Index begin, Index end) const;
    MatrixView<const T> saved(Index l, Index begin, Index end) const;
    const T* backward_weights(const Layer<T>& layer) const;
    void append(Kind kind, Index l, Index begin, Index end, T value) const;
    template <class F>
    void by_example(Index begin, Index end, F f) const;
    void by_panels(const Layer<T>& layer, Index rows, Index columns, const Ranges& f) const;
    void lift(Index l, Index begin, Index end) const;
    void push(Index l, Index begin, Index end, bool moves, const Direction<T>* direction, bool primals = false) const;
    void push_linear(Index l, Index begin, Index end, bool primals, bool moves, const Direction<T>* direction) const;
    void bend(Index l, Index begin, Index end) const;
    void pull(Kind kind, Index l, Index begin, Index end, T* gradient) const;
    void pull_both(Index l, Index begin, Index end, const Direction<T>& direction) const;
    void pull_tangent(Index l, Index begin, Index end, bool moves, const Direction<T>* direction, T* gradient) const;
    template <class F>
    void with_gradients(Index l, T* gradient, F f) const;
    std::vector<T*> own_parameters(Index l, const T* flat) const;

    const Network<T>& net_;
    struct Shape {  // what `views_` are laid out for
        Index phase = 0, rows = 0, seeds = 1;
        unsigned wanted = 0;  // a bit for each kind
        bool operator==(const Shape& other) const {
            return phase == other.phase && rows == other.rows && seeds == other.seeds && wanted == other.wanted;
        }
    };
    Shape shape_;
    Index levels_, examples_ = 0;
    bool sharing_ = false;
    std::vector<MatrixView<T>> views_;
    Array<T> arena_;
    // The transposed copy of the weights that training has none of, made when somebody first differentiates down to the
    // inputs and again after the weights have changed.
    Array<T> inputs_backward_;
    std::uint64_t copied_ = 0;
};

extern template class Direction<float>;
extern template class Direction<double>;
extern template class Tape<float>;
extern template class Tape<double>;

}  // namespace chainrule
