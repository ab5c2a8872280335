// SPDX-License-Identifier: MIT
// L0: Philox4x32-10, a counter-based generator: the n-th number is a function of (key, n) alone.
// So dropout masks, permutations and initial weights do not depend on threads, on the batch a row is in, or on call order.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

#include "platform.hpp"

namespace chainrule {

// The numbers of N consecutive counters, word by word: out[w][i] is word w at counter_low + i. The loops over i are what
// compilers turn into vectors. Internal linkage, so that no translation unit shares its copy with one compiled for
// another instruction set.
template <int N>
CHAINRULE_HD static inline void philox_lanes(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high,
                                             std::uint32_t (&c)[4][N]) {
    for (int i = 0; i < N; ++i) {
        const std::uint64_t low = counter_low + static_cast<std::uint64_t>(i);
        c[0][i] = static_cast<std::uint32_t>(low);
        c[1][i] = static_cast<std::uint32_t>(low >> 32);
        c[2][i] = static_cast<std::uint32_t>(counter_high);
        c[3][i] = static_cast<std::uint32_t>(counter_high >> 32);
    }
    std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
#ifndef __CUDACC__
#pragma GCC unroll 1  // unrolled first, GCC does not turn it into vectors
#endif
        for (int i = 0; i < N; ++i) {
            const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0][i], p1 = std::uint64_t{0xCD9E8D57u} * c[2][i];
            c[0][i] = static_cast<std::uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
            c[2][i] = static_cast<std::uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
            c[1][i] = static_cast<std::uint32_t>(p1);
            c[3][i] = static_cast<std::uint32_t>(p0);
        }
        k0 += 0x9E3779B9u;  // golden ratio
        k1 += 0xBB67AE85u;  // sqrt(3) - 1
    }
}

struct Philox4 {
    std::uint32_t word[4];
};

CHAINRULE_HD static inline Philox4 philox(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high) {
    std::uint32_t c[4][1];
    philox_lanes(key, counter_low, counter_high, c);
    return {{c[0][0], c[1][0], c[2][0], c[3][0]}};
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

// Number i of a stream for initial weights: uniform in [0, 1) with 53 bits, and standard normal.
double uniform(std::uint64_t seed, std::uint64_t stream, std::int64_t i);
double normal(std::uint64_t seed, std::uint64_t stream, std::int64_t i);

// The order in which an epoch visits the examples: a permutation of 0..n-1 that depends on (seed, epoch) alone.
void permute(std::int64_t n, std::uint64_t seed, std::uint64_t epoch, std::int64_t* order);

}  // namespace chainrule
