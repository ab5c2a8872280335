// SPDX-License-Identifier: MIT
// linear_bfloat16: linear (see linear.hpp) with the operands of its three products rounded to bfloat16, 8 bits of
// mantissa; sums, results, biases, master weights and the update rule stay in float32. Twice the speed where the processor
// multiplies pairs (AVX512_BF16); right, and slower than float32, elsewhere. No loss scaling: the exponents are float32's.
//
// Two copies of W in pairs are kept across steps, as in linear.hpp: `forward`, Wᵀ in panels of output columns with pairs
// of inputs; `backward`, W in panels of input columns with pairs of outputs. Narrow layers stay in float32.
#pragma once

#include "../gemm.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

static void linear_bfloat16_forward(Index rows, Index inputs, Index outputs, bool bias, const float* x, Index x_stride,
                                    const float* master, const Pair* forward, float* z, Index z_stride, Pair* scratch) {
    multiply_paired(rows, outputs, inputs, x, x_stride, forward, {bias ? master : nullptr, inputs + 1}, z, z_stride,
                    scratch);
}

static void linear_bfloat16_vjp_input(Index rows, Index inputs, Index outputs, const float* dz, Index dz_stride,
                                      const Pair* backward, float* dx, Index dx_stride, Pair* scratch) {
    multiply_paired(rows, inputs, outputs, dz, dz_stride, backward, {}, dx, dx_stride, scratch);
}

static void linear_bfloat16_pair_rows(Index rows, Index cols, const float* x, Index x_stride, Pair* to,
                                      Index to_stride) {
    pair_rows(rows, cols, x, x_stride, to, to_stride);
}

// A tile of dWᵀ over db, as linear_vjp_weight; the rows of x come in pairs.
static void linear_bfloat16_vjp_weight(Index batch, Index count, Index width, const Pair* x, Index x_stride,
                                       const float* dz, Index dz_stride, Pair* packed, float* tile) {
    for (Index k = 0; k == 0 || k < batch; k += kDepth) {
        const Index depth = batch - k < kDepth ? batch - k : kDepth;
        pair_rows(depth, width, dz + k * dz_stride, dz_stride, packed, width);
        block<true>(count, width, (depth + 1) / 2, Operand<Pair>{x + k / 2 * x_stride, x_stride}, packed, width, tile,
                    width, k > 0 ? Start::add : Start::zero, tile);
    }
}

// Rows [first, first + count) of one panel of the master copy into both paired copies (`backward` may be null); `first` is
// a multiple of the vector width.
static void linear_bfloat16_pack(Index inputs, Index outputs, Index first, Index count, Index column,
                                 const float* panel, Index width, Pair* forward, Pair* backward) {
    pair_rows(count, width, panel + first * width, width, forward + column * ((inputs + 1) / 2) + first / 2 * width,
              width);
    if (backward) transpose_pairs(inputs, outputs, first, count, column, panel, width, backward);
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
