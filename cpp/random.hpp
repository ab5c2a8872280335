// SPDX-License-Identifier: MIT
// L0: Philox4x32-10, a counter-based generator: the n-th number is a function of (key, n) alone.
// So dropout masks, permutations and initial weights do not depend on threads, on the batch a row is in, or on call order.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define CHAINRULE_HD __host__ __device__
#else
#define CHAINRULE_HD
#endif

namespace chainrule {

struct Philox4 {
    std::uint32_t word[4];
};

// Internal linkage, so that no translation unit shares its copy with one compiled for another instruction set.
CHAINRULE_HD static inline Philox4 philox(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high) {
    std::uint32_t c0 = static_cast<std::uint32_t>(counter_low), c1 = static_cast<std::uint32_t>(counter_low >> 32);
    std::uint32_t c2 = static_cast<std::uint32_t>(counter_high), c3 = static_cast<std::uint32_t>(counter_high >> 32);
    std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0, p1 = std::uint64_t{0xCD9E8D57u} * c2;
        const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c1 = static_cast<std::uint32_t>(p1);
        c3 = static_cast<std::uint32_t>(p0);
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;  // golden ratio
        k1 += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return {{c0, c1, c2, c3}};
}

// The streams of one seed: the generator's second word says what the numbers are for.
CHAINRULE_HD static inline std::uint64_t stream_of(std::uint64_t purpose, std::uint64_t number) {
    return purpose << 56 | number;
}
constexpr std::uint64_t kInitialWeights = 1, kPermutation = 2, kDropout = 3;

// Each dropout layer has a key of its own; consecutive multiples of the golden ratio are far apart.
CHAINRULE_HD static inline std::uint64_t dropout_key(std::uint64_t seed, std::int64_t layer) {
    return seed + static_cast<std::uint64_t>(layer + 1) * 0x9E3779B97F4A7C15u;
}

}  // namespace chainrule
