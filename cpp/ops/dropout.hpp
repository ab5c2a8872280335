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

template <class T>
void dropout(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, double p, std::uint64_t key,
             std::uint64_t step, Index first_row) {
    const std::uint64_t threshold = static_cast<std::uint64_t>(p * 0x1p32);
    const T keep = static_cast<T>(1 / (1 - p));
    for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < cols; j += 4) {
            const std::uint64_t place = static_cast<std::uint64_t>(first_row + i) << 32 | static_cast<std::uint64_t>(j);
            const Philox4 random = philox(key, place, stream_of(kDropout, step));
            for (Index l = 0; l < 4; ++l)  // the last few may be padding
                y[i * y_stride + j + l] = random.word[l] < threshold ? T{0} : x[i * x_stride + j + l] * keep;
        }
}

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
