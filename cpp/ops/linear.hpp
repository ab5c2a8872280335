// SPDX-License-Identifier: MIT
// linear: Z = X Wᵀ + b, the lecture's Wx + b for each row of X.
//   X (B, I)   W (O, I)   b (O)   Z (B, O)
//   vjp        dX = dZ W (B, I),  dW = dZᵀ X (O, I),  db = column sums of dZ
//   jvp        Ż = Ẋ Wᵀ + X Ẇᵀ + ḃ
// saves        X, whose rows are followed by a 1: with it b is one more row of Wᵀ, and db one more row of dWᵀ
//
// Two packed copies of W stay in memory across steps: `forward`, Wᵀ over b in panels of output columns, which is the
// master copy, and `backward`, W in panels of input columns. (panels: see multiply_panels)
#pragma once

#include "../gemm.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

template <class T>
void linear_forward(Index rows, Index inputs, Index outputs, bool bias, const T* x, Index x_stride, const T* forward,
                    T* z, Index z_stride) {
    multiply_panels(rows, outputs, inputs, Operand<T>{x, x_stride}, forward, inputs + bias, bias, z, z_stride);
}

template <class T>
void linear_vjp_input(Index rows, Index inputs, Index outputs, const T* dz, Index dz_stride, const T* backward, T* dx,
                      Index dx_stride) {
    multiply_panels(rows, inputs, outputs, Operand<T>{dz, dz_stride}, backward, outputs, false, dx, dx_stride);
}

// A tile of dWᵀ over db: `count` input rows from x's first column, `width` outputs from dz's; tile stride = width.
template <class T>
void linear_vjp_weight(Index batch, Index count, Index width, const T* x, Index x_stride, const T* dz, Index dz_stride,
                       T* tile) {
    multiply_transposed(count, width, batch, Operand<T>{x, x_stride}, dz, dz_stride, tile, width);
}

// Where input column i of output row 0 stands in the `backward` panels, and the stride from one output row to the next.
template <class T>
CHAINRULE_INLINE T* backward_column(T* backward, Index inputs, Index outputs, Index i, Index& stride) {
    const Index start = i / kPanel<T> * kPanel<T>;
    stride = round_up(inputs - start < kPanel<T> ? inputs - start : kPanel<T>, kLine<T>);
    return backward + start * outputs + (i - start);
}

// Copies rows [first, first + count) of one `forward` panel, `width` wide, into the `backward` panels: element (i, o)
// goes to row o. `column` is the panel's first output; `first` is a multiple of the vector width.
template <class T>
void linear_transpose(Index inputs, Index outputs, Index first, Index count, Index column, const T* panel, Index width,
                      T* backward) {
    constexpr Index W = kWidth<T>;
    const Index columns = outputs - column < width ? outputs - column : width, end = first + count;
    Index i = first, stride;
    for (; i + W <= end; i += W) {
        T* to = backward_column(backward, inputs, outputs, i, stride) + column * stride;
        for (Index o = 0; o < columns; o += W) {
            Vec<T> square[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; ++r) square[r] = load(panel + (i + r) * width + o);
            transpose_square<T>(square);
            const Index height = columns - o < W ? columns - o : W;
            for (Index r = 0; r < height; ++r) store(to + (o + r) * stride, square[r]);
        }
    }
    for (; i < end; ++i) {
        T* to = backward_column(backward, inputs, outputs, i, stride) + column * stride;
        for (Index o = 0; o < columns; ++o) to[o * stride] = panel[i * width + o];
    }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
