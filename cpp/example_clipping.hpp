// SPDX-License-Identifier: MIT
// L3: the norm of one example's own gradient, and its limit, without forming that gradient. A linear layer's is the product
// cᵀ x of a row of cotangents and one of inputs, so |cᵀ x|² = |c|² |x|²; the bias has the input 1. Goodfellow,
// arXiv:1510.01799, 2015.
#pragma once

#include "network.hpp"

namespace chainrule {

// |c|² (|x|² + 1) for one row; without the 1 where there is no bias.
template <class T>
double square_of_product(MatrixView<T> c, MatrixView<T> x, bool bias, Index row);

// After the sweep down through rows [begin, end): the cotangents at the outputs of linear layers, multiplied so that no
// example's gradient is longer than `limit` times what the loss multiplies it by, scale * weight[row] (null: 1).
template <class T>
void clip_examples(const Network<T>& net, const Activations<T>& a, Index begin, Index end, const T* weight,
                   double scale, double limit);

}  // namespace chainrule
