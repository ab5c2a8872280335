// SPDX-License-Identifier: MIT
// L0: how the GPU engine cuts its work, as functions of sizes alone; a compiler without CUDA can ask them, and tests do.
#pragma once

#include "../platform.hpp"

namespace chainrule {
namespace cuda {

constexpr Index kMiniTile = 16, kTinyTile = 32, kSmallTile = 64, kLargeTile = 128;

constexpr Index tiles_across(Index n, Index tile) { return (n + tile - 1) / tile; }
constexpr Index tiles_of(Index m, Index n, Index tile) { return tiles_across(m, tile) * tiles_across(n, tile); }

// The largest tiles that give every processor one and that a product fills. Of tiny and mini ones, a block's threads share the
// terms of each sum: 128 x 256 has 8 small tiles, and eight processors would take all of it, one term after the other; with
// 784 terms, 32 of them with a tiny tile each take three times as long as 128 with a mini one (by count of instructions).
enum class TileSize { mini, tiny, small, large };
constexpr TileSize tile_size(Index m, Index n, int processors) {
    const Index narrow = m < n ? m : n;
    if (narrow > kSmallTile && tiles_of(m, n, kLargeTile) >= processors) return TileSize::large;
    if (narrow > kTinyTile && tiles_of(m, n, kSmallTile) >= processors) return TileSize::small;
    return tiles_of(m, n, kTinyTile) >= processors ? TileSize::tiny : TileSize::mini;
}

constexpr Index width_of(TileSize size) {
    switch (size) {
        case TileSize::mini: return kMiniTile;
        case TileSize::tiny: return kTinyTile;
        case TileSize::small: return kSmallTile;
        default: return kLargeTile;
    }
}

// A product of rows, Aᵀ B, has as many terms as a batch has rows. Where its tiles are too few for all processors, its terms are
// in slices, a block each, and another kernel adds those up: from four times so many terms on, that is repaid. A weight's
// gradient by 28,672 rows of 8-64-64-1 takes 28 slices 16 turns of the loop over terms, where one block took 224. Only mini and
// tiny tiles are ever too few. `least`: tensor cores have no mini ones.
constexpr Index kTermsOfSlice = 1024, kMostSlices = 64;
struct Cut {
    TileSize size;
    Index slices;
};
constexpr Cut cut_of_rows(Index m, Index n, Index k, int processors, TileSize least = TileSize::mini) {
    const Index most = k < 4 * kTermsOfSlice ? 1 : k < kMostSlices * kTermsOfSlice ? k / kTermsOfSlice : kMostSlices;
    const TileSize fitting = tile_size(m, n, processors), whole = fitting < least ? least : fitting;
    const bool tiny = whole == TileSize::mini && tiles_of(m, n, kTinyTile) * most >= processors;
    const TileSize size = tiny ? TileSize::tiny : whole;
    const Index tiles = tiles_of(m, n, width_of(size)), wanted = tiles < processors ? 2 * processors / tiles : 1;
    return {size, wanted < most ? wanted : most};
}

// The most blocks that a product of m x n has, whatever its tiles.
constexpr Index most_tiles(Index m, Index n) { return tiles_of(m, n, kMiniTile); }

// cuBLASLt's products from so many multiplications a step on: below, its launches and ours beside it take longer.
constexpr bool wants_library(double multiplies) { return multiplies >= 1 << 27; }

// A bias' gradient is a column of ones in its layer's product of rows, which is free where the operand is packed anyway. It is a
// sum of its own where it would be all that an operand is packed for, or begins another column of the library's tiles in a product
// of several rounds of those: 4096 x 4097 has 544 tiles of 128 x 256 instead of 512, for 132 processors.
constexpr bool sums_apart(bool packed, Index m, Index inputs, Index k) {
    return !packed || (inputs % kLargeTile == 0 && m * inputs >= Index{1} << 22 && k >= 1024);
}

// How many threads go along a row of so many columns: a warp, or one where most of a warp would have nothing to do.
constexpr int row_threads(Index cols) { return cols < 8 ? 1 : 32; }

// Prediction with all weights in each block pays when there are rows for every processor; before, tiles keep more of them busy.
constexpr bool wants_resident_prediction(Index rows, Index rows_of_block, int processors) {
    return rows >= rows_of_block * processors;
}

// ---- the resident schedule ------------------------------------------------------------------------------------------

// The blocks of a cluster that share a network's batch: eight rows each are what a product's tiles want, and networks come before
// clusters. Eight are the most that every GPU with clusters takes. By an estimate of cycles a step of 8-64-64-1 with 32 rows takes
// one block some 9,000, four blocks half of that, two barriers of a cluster included.
constexpr int kMostRanks = 8;
constexpr int ranks_of(Index batch, Index networks, int processors) {
    int ranks = kMostRanks;
    while (ranks > 1 && (batch < 8 * ranks || networks * ranks > processors)) ranks /= 2;
    return ranks;
}

// Rows in shared memory begin an odd number of 16 bytes of float32 after one another: eight threads that read 16 bytes each,
// of eight rows or along one, meet no bank twice.
CHAINRULE_HD constexpr Index resident_stride(Index cols) {
    const Index fours = (cols + 3) / 4;
    return 4 * (fours % 2 == 0 ? fours + 1 : fours);
}

}  // namespace cuda
}  // namespace chainrule
