// SPDX-License-Identifier: MIT
#include "sobolev.hpp"

#include <numeric>

namespace chainrule {

template <class T>
Sobolev<T>::Sobolev(const Network<T>& net, Index most)
    : net_(net), outputs_(net.outputs()), tape_(net), values_(static_cast<std::size_t>(most)) {
    tape_.shape(0, most * outputs_, outputs_, {Kind::primal, Kind::tangent, Kind::cotangent, Kind::cotangent_tangent});
}

template <class T>
double Sobolev<T>::sweep(const Batch& batch, T* gradient, int most_parts) {
    examples_ = batch.examples;
    tape_.prepare_inputs();
    if (net_.has_external()) {
        sweep_examples(batch, 0, examples_, gradient);
    } else {
        const Index piece = std::max<Index>(kBlockRows / outputs_, 1);  // a block has so many rows of derivatives
        over_rows(examples_, most_parts, [&](Index begin, Index end) {
            for (Index next; begin < end; begin = next) {
                next = std::min(begin + piece, end);
                sweep_examples(batch, begin, next, gradient);
            }
        });
    }
    return std::accumulate(values_.begin(), values_.begin() + examples_, 0.0);
}

template <class T>
void Sobolev<T>::sweep_examples(const Batch& batch, Index begin, Index end, T* gradient) {
    const Index first = begin * outputs_, last = end * outputs_;
    load(batch, begin, end);
    tape_.forward(begin, end);
    tape_.seed(Kind::cotangent, net_.depth(), first, last);
    tape_.cotangents(first, last, 0, nullptr);
    leave_residuals(batch, begin, end);
    tape_.tangents(first, last);
    load_loss(batch, begin, end);
    tape_.cotangent_tangents(first, last, tape_.lowest(), 0, gradient);
    add_outputs(begin, end);
}

template <class T>
void Sobolev<T>::load(const Batch& batch, Index begin, Index end) {
    const MatrixView<T> to = tape_.at(Kind::primal, 0);
    copy_rows(end - begin, to.cols, batch.x.data + begin * batch.x.stride, batch.x.stride, to.data + begin * to.stride,
              to.stride);
}

// λ ω (c⁰ − dy) into the tangents of the inputs, λ ω ½ |c⁰ − dy|² into the values.
template <class T>
void Sobolev<T>::leave_residuals(const Batch& batch, Index begin, Index end) {
    const MatrixView<T> c = tape_.at(Kind::cotangent, 0), dx = tape_.at(Kind::tangent, 0);
    const Index inputs = c.cols;
    for (Index n = begin; n < end; ++n) {
        const double omega = batch.scale * (batch.weight ? static_cast<double>(batch.weight[n]) : 1.0);
        const T* slope = batch.dy + (batch.order ? batch.order[n] : n) * outputs_ * inputs;
        double squares = 0;
        for (Index row = n * outputs_; row < (n + 1) * outputs_; ++row, slope += inputs)
            for (Index i = 0; i < inputs; ++i) {
                const double residual = static_cast<double>(c.data[row * c.stride + i] - slope[i]);
                squares += residual * residual;
                dx.data[row * dx.stride + i] = static_cast<T>(omega * residual);
            }
        values_[static_cast<std::size_t>(n)] = omega == 0 ? 0 : omega * squares / 2;
    }
}

template <class T>
void Sobolev<T>::load_loss(const Batch& batch, Index begin, Index end) {
    const MatrixView<T> to = tape_.at(Kind::cotangent_tangent, net_.depth());
    for (Index n = begin; n < end; ++n) {
        T* row = to.data + n * outputs_ * to.stride;
        std::copy_n(batch.df.data + n * batch.df.stride, outputs_, row);
        for (Index o = 1; o < outputs_; ++o) std::fill_n(row + o * to.stride, outputs_, T{0});
    }
}

// All rows of an example meet the same x in ċᵀ x: their ċ are added up where those of output 0 are.
template <class T>
void Sobolev<T>::add_outputs(Index begin, Index end) {
    for (Index l = tape_.lowest(); outputs_ > 1 && l <= net_.depth(); ++l) {
        if (l == 0 || net_.layers()[static_cast<std::size_t>(l - 1)].kind != Layer<T>::Kind::linear) continue;
        const MatrixView<T> dc = tape_.at(Kind::cotangent_tangent, l);
        for (Index n = begin; n < end; ++n) {
            T* sum = dc.data + n * outputs_ * dc.stride;
            for (Index o = 1; o < outputs_; ++o)
                for (Index j = 0; j < dc.cols; ++j) sum[j] += sum[o * dc.stride + j];
        }
    }
}

template <class T>
void Sobolev<T>::differentiate(const Tiles<T>& tiles, const Tile& tile, typename Tiles<T>::Scratch& scratch,
                               T* gradient) const {
    const Index l = tile.layer;
    MatrixView<T> dc = tape_.at(Kind::cotangent_tangent, l + 1);
    dc.stride *= outputs_;
    tiles.differentiate(tile, examples_, tape_.at(Kind::primal, l), dc, scratch, gradient);
    tiles.differentiate(tile, examples_ * outputs_, tape_.at(Kind::tangent, l), tape_.at(Kind::cotangent, l + 1),
                        scratch, gradient, true);
}

template class Sobolev<float>;
template class Sobolev<double>;

}  // namespace chainrule
