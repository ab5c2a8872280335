// SPDX-License-Identifier: MIT
// dropout: y = x * mask / (1 - p) in training, where mask is 0 with probability p; y = x otherwise.
// Jacobian    diag(mask / (1 - p)): forward, vjp and jvp are the same map
// saves       nothing: the mask is a function of (seed, layer, step, row, column) by the counter-based generator, so it is
//             drawn again in the backward pass, and does not depend on threads or on how rows are cut into blocks
// Source: Srivastava et al., JMLR 15, 2014
#pragma once

#include "../random.hpp"
#include "op.hpp"

namespace chainrule {
namespace CHAINRULE_ISA {

// Sixteen counters at a time give the numbers of 64 columns: word w of counter i belongs to column 16 w + i.
template <class T>
void dropout(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, double p, std::uint64_t key,
             std::uint64_t step, Index first_row) {
    constexpr Index lanes = 16;
    const std::uint32_t threshold = static_cast<std::uint32_t>(p * 0x1p32);  // p < 1, so it fits
    const T keep = static_cast<T>(1 / (1 - p));
    std::uint32_t random[4][lanes];
    for (Index i = 0; i < rows; ++i)
        for (Index block = 0; block < cols; block += 4 * lanes) {
            const std::uint64_t place =
                static_cast<std::uint64_t>(first_row + i) << 32 | static_cast<std::uint64_t>(block / 4);
            philox_lanes(key, place, stream_of(kDropout, step), random);
            const Index width = cols - block < 4 * lanes ? cols - block : 4 * lanes;
            const std::uint32_t* number = random[0];
            const T* from = x + i * x_stride + block;
            T* to = y + i * y_stride + block;
            for (Index j = 0; j < width; ++j) to[j] = number[j] < threshold ? T{0} : from[j] * keep;
        }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
