// SPDX-License-Identifier: MIT
// linear: Z = X Wᵀ + b, the lecture's Wx + b for each row of X.
//   X (B, I)   W (O, I)   b (O)   Z (B, O)
//   vjp        dX = dZ W (B, I),  dW = dZᵀ X (O, I),  db = column sums of dZ
//   jvp        Ż = Ẋ Wᵀ + X Ẇᵀ + ḃ;  second: the same maps once more, since Z is linear in X and in W
// saves        X, whose rows are followed by a 1: with it b is one more row of Wᵀ, and db one more row of dWᵀ
//
// Two packed copies of W stay in memory across steps: `forward`, Wᵀ over b in panels of output columns, which is the
// master copy, and `backward`, W in panels of input columns. (panels: see multiply_panels)
// A narrow layer, of up to kNarrowOutputs, would waste most of a vector of outputs. Its vectors run along the inputs: the
// master copy is W in panels of input columns, then b, and serves both ways.
#pragma once

#include "../gemm.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

template <class T>
void linear_forward(Index rows, Index inputs, Index outputs, bool bias, const T* x, Index x_stride, const T* forward,
                    T* z, Index z_stride) {
    const Panels<T> w = {forward, inputs + bias};
    multiply_panels(rows, outputs, inputs, Operand<T>{x, x_stride}, w, bias ? Start::row : Start::zero, w, z, z_stride);
}

template <class T>
void linear_forward_narrow(Index rows, Index inputs, Index outputs, bool bias, const T* x, Index x_stride,
                           const T* master, T* z, Index z_stride) {
    multiply_narrow(rows, outputs, inputs, Operand<T>{x, x_stride}, master, bias ? Start::row : Start::zero, z,
                    z_stride);
}

// Ż = Ẋ Wᵀ, added to what is there where `add`: to X Ẇᵀ + ḃ, which is `forward` at Ẇ.
template <class T>
void linear_jvp(Index rows, Index inputs, Index outputs, bool bias, const T* dx, Index dx_stride, const T* forward,
                T* dz, Index dz_stride, bool add) {
    multiply_panels(rows, outputs, inputs, Operand<T>{dx, dx_stride}, Panels<T>{forward, inputs + bias},
                    add ? Start::add : Start::zero, Panels<T>{}, dz, dz_stride);
}
template <class T>
void linear_jvp_narrow(Index rows, Index inputs, Index outputs, bool, const T* dx, Index dx_stride, const T* master,
                       T* dz, Index dz_stride, bool add) {
    multiply_narrow(rows, outputs, inputs, Operand<T>{dx, dx_stride}, master, add ? Start::add : Start::zero, dz,
                    dz_stride);
}

template <class T>
void linear_vjp_input(Index rows, Index inputs, Index outputs, const T* dz, Index dz_stride, const T* backward, T* dx,
                      Index dx_stride, bool add) {
    multiply_panels(rows, inputs, outputs, Operand<T>{dz, dz_stride}, Panels<T>{backward, outputs},
                    add ? Start::add : Start::zero, Panels<T>{}, dx, dx_stride);
}

// A tile of dWᵀ over db: `count` input rows from x's first column, `width` outputs from dz's; tile stride = width.
template <class T>
void linear_vjp_weight(Index batch, Index count, Index width, const T* x, Index x_stride, const T* dz, Index dz_stride,
                       T* packed, T* tile, bool add) {
    multiply_transposed(count, width, batch, Operand<T>{x, x_stride}, dz, dz_stride, packed, tile, width, add);
}

// Copies rows [first, first + count) of one `forward` panel, `width` wide, into the `backward` panels: element (i, o)
// goes to row o. `column` is the panel's first output; `first` is a multiple of the vector width.
template <class T>
void linear_transpose(Index inputs, Index outputs, Index first, Index count, Index column, const T* panel, Index width,
                      T* backward) {
    transpose_panel(inputs, outputs, first, count, column, panel, width, backward);
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
