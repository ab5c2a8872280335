// SPDX-License-Identifier: MIT
// L3: what a network is measured by: a data set in the caller's arrays, and a loss, the engine's or a user's.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.hpp"

namespace chainrule {

// Rows of examples in plain row-major arrays that somebody else owns.
template <class T>
struct Dataset {
    Index rows;
    const T* x;                  // (rows, inputs)
    const std::int64_t* labels;  // (rows), or null
    const T* y;                  // (rows, target_cols), or null
    Index target_cols;
    const T* weight;  // (rows), or null
    // For Sobolev training (sobolev.hpp): ∂y/∂x (rows, outputs, inputs), or null, and what its part of the loss is multiplied by.
    const T* dy = nullptr;
    double dy_weight = 0;
};

// A loss that lives outside the engine: a user's Python callable.
template <class T>
class ExternalLoss {
   public:
    virtual ~ExternalLoss() = default;
    // Value of the batch; writes dL/df. scale * weight[i] is what a per-example loss is to be multiplied by.
    virtual double value_grad(MatrixView<const T> f, const Targets<T>& y, Index target_cols, const T* weight, T scale,
                              MatrixView<T> df) = 0;
};

// Rows of weight 0 do not count, whatever their loss is: 0·∞ = 0 here. `values` may be null.
template <class T>
void leave_out(Index rows, const T* weight, T* values, MatrixView<T> gradient) {
    for (Index i = 0; weight && i < rows; ++i) {
        if (weight[i] != 0) continue;
        if (values) values[i] = 0;
        std::fill_n(gradient.data + i * gradient.stride, gradient.cols, T{0});
    }
}

template <class T>
struct Loss {
    LossOp op;
    double param;
    bool mean;  // over examples; else their sum
    std::shared_ptr<ExternalLoss<T>> external;
};

}  // namespace chainrule
