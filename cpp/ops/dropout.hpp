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
struct DropoutScale {
    std::uint32_t threshold;  // numbers below it drop
    T keep;
    CHAINRULE_HD explicit DropoutScale(double p)
        : threshold(static_cast<std::uint32_t>(p * 0x1p32)),  // p < 1, so it fits
          keep(static_cast<T>(1 / (1 - p))) {}
};
// The counter of the first of a block of 64 columns.
CHAINRULE_HD static inline std::uint64_t dropout_place(Index row, Index block) {
    return static_cast<std::uint64_t>(row) << 32 | static_cast<std::uint64_t>(block / 4);
}

#if defined(CHAINRULE_DEVICE)
// One element: the same number, drawn alone.
template <class T>
CHAINRULE_INLINE T dropout(T x, const DropoutScale<T>& scale, std::uint64_t key, std::uint64_t step, Index row,
                           Index col) {
    const std::uint64_t place = dropout_place(row, col / 64 * 64) + static_cast<std::uint64_t>(col % 16);
    const auto four = philox(key, place, stream_of(kDropout, step));
    const bool upper = col % 32 >= 16;  // chosen, not indexed: a thread's array with an index would lie in slow memory
    const std::uint32_t number =
        col % 64 < 32 ? (upper ? four.word[1] : four.word[0]) : (upper ? four.word[3] : four.word[2]);
    return number < scale.threshold ? T{0} : x * scale.keep;
}
#else
// Sixteen counters at a time give the numbers of 64 columns: word w of counter i belongs to column 16 w + i.
template <class T>
void dropout(Index rows, Index cols, const T* x, Index x_stride, T* y, Index y_stride, double p, std::uint64_t key,
             std::uint64_t step, Index first_row) {
    constexpr Index lanes = 16;
    const DropoutScale<T> scale(p);
    std::uint32_t random[4][lanes];
    for (Index i = 0; i < rows; ++i)
        for (Index block = 0; block < cols; block += 4 * lanes) {
            philox_lanes(key, dropout_place(first_row + i, block), stream_of(kDropout, step), random);
            const Index width = cols - block < 4 * lanes ? cols - block : 4 * lanes;
            const std::uint32_t* number = random[0];
            const T* from = x + i * x_stride + block;
            T* to = y + i * y_stride + block;
            for (Index j = 0; j < width; ++j) to[j] = number[j] < scale.threshold ? T{0} : from[j] * scale.keep;
        }
}
#endif

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
