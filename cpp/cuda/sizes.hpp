// SPDX-License-Identifier: MIT
// L0: how the GPU engine cuts its work, as functions of sizes alone; a compiler without CUDA can ask them, and tests do.
#pragma once

#include "../platform.hpp"

namespace chainrule {
namespace cuda {

constexpr Index kSmallTile = 64, kLargeTile = 128;

constexpr Index tiles_across(Index n, Index tile) { return (n + tile - 1) / tile; }

// Large tiles where they give every processor one.
constexpr bool wants_large_tiles(Index m, Index n, int processors) {
    return tiles_across(m, kLargeTile) * tiles_across(n, kLargeTile) >= processors;
}

// The most blocks that a product of m x n has, whatever its tiles.
constexpr Index most_tiles(Index m, Index n) { return tiles_across(m, kSmallTile) * tiles_across(n, kSmallTile); }

// cuBLASLt's products from so many multiplications a step on: below, its launches and ours beside it take longer.
constexpr bool wants_library(double multiplies) { return multiplies >= 1 << 27; }

// ---- the resident schedule ------------------------------------------------------------------------------------------

// Rows in shared memory begin an odd number of 16 bytes of float32 after one another: eight threads that read 16 bytes each,
// of eight rows or along one, meet no bank twice.
CHAINRULE_HD constexpr Index resident_stride(Index cols) {
    const Index fours = (cols + 3) / 4;
    return 4 * (fours % 2 == 0 ? fours + 1 : fours);
}

}  // namespace cuda
}  // namespace chainrule
