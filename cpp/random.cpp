// SPDX-License-Identifier: MIT
#include "random.hpp"

#include <cmath>
#include <numeric>
#include <utility>

namespace chainrule {

double uniform(std::uint64_t seed, std::uint64_t stream, std::int64_t i) {
    const Philox4 r = philox(seed, static_cast<std::uint64_t>(i / 2), stream_of(kInitialWeights, stream));
    const std::uint64_t bits = static_cast<std::uint64_t>(r.word[i % 2 * 2]) << 32 | r.word[i % 2 * 2 + 1];
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

// Box and Muller, Ann. Math. Statist. 29, 1958.
double normal(std::uint64_t seed, std::uint64_t stream, std::int64_t i) {
    constexpr double two_pi = 6.283185307179586476925;
    const std::int64_t pair = i / 2 * 2;
    const double radius = std::sqrt(-2 * std::log(1 - uniform(seed, stream, pair)));
    const double angle = two_pi * uniform(seed, stream, pair + 1);
    return radius * (i % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

// Fisher and Yates, from the end; one draw is 32 bits, four to a call of the generator.
void permute(std::int64_t n, std::uint64_t seed, std::uint64_t epoch, std::int64_t* order) {
    std::iota(order, order + n, std::int64_t{0});
    Philox4 random{};
    for (std::int64_t i = n - 1; i > 0; --i) {
        const std::uint64_t draw = static_cast<std::uint64_t>(n - 1 - i);
        if (draw % 4 == 0) random = philox(seed, draw / 4, stream_of(kPermutation, epoch));
        const std::uint64_t range = static_cast<std::uint64_t>(i + 1);
        std::swap(order[i], order[static_cast<std::uint64_t>(random.word[draw % 4]) * range >> 32]);
    }
}

}  // namespace chainrule
