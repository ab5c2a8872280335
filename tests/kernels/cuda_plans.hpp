// SPDX-License-Identifier: MIT
// How the GPU engine cuts its work: sizes, and what the resident schedule puts where. Plain arithmetic; no GPU, no CUDA.
#pragma once

#include <set>

#include "cuda/program.hpp"
#include "harness.hpp"

namespace chainrule {
namespace {

// Eight threads read 16 bytes each in one turn of shared memory's 32 banks of 4 bytes: of eight neighbouring rows, or of one.
void cuda_strides() {
    context.type = "";
    for (Index cols = 1; cols <= 300; ++cols) {
        const Index stride = cuda::resident_stride(cols);
        std::set<Index> banks;
        for (Index row = 0; row < 8; ++row)
            for (Index word = 0; word < 4; ++word) banks.insert((row * stride + word) % 32);
        check(stride >= cols && stride % 4 == 0, "a row is whole groups of 16 bytes");
        check(stride < cols + 8, "no more is lost than two groups");
        check(banks.size() == 32, "eight rows meet no bank twice");
    }
}

void cuda_tiles() {
    context.type = "";
    for (const Index n : {1, 63, 64, 65, 127, 128, 129, 4096}) {
        check(cuda::tiles_across(n, 64) * 64 >= n && (cuda::tiles_across(n, 64) - 1) * 64 < n, "tiles cover, no more");
        check(cuda::most_tiles(n, n) >= cuda::tiles_across(n, 128) * cuda::tiles_across(n, 128),
              "small tiles are most");
    }
    using cuda::TileSize;
    check(cuda::tile_size(128, 256, 132) == TileSize::mini, "few tiles leave processors idle");
    check(cuda::tile_size(256, 785, 132) == TileSize::tiny, "200 tiny tiles do not");
    check(cuda::tile_size(1024, 1024, 132) == TileSize::small, "256 small tiles are enough for 132 processors");
    check(cuda::tile_size(4096, 4096, 132) == TileSize::large, "1024 large tiles are, too");
    check(cuda::tile_size(65536, 64, 132) == TileSize::small, "a narrow product fills no large tile");
    check(cuda::tile_size(65536, 1, 132) == TileSize::tiny, "nor a small one, if it is that narrow");
    std::vector<std::pair<Index, Index>> pairs;
    for (const Index m : {1, 31, 64, 257, 1024})
        for (const Index n : {1, 65, 258, 1025}) pairs.emplace_back(m, n);
    for (const auto& [m, n] : pairs)
        for (const TileSize least : {TileSize::mini, TileSize::tiny})
            for (Index k = 1, before = 0; k < Index{1} << 21; k += k / 2 + 1) {
                const cuda::Cut cut = cuda::cut_of_rows(m, n, k, 132, least);
                const Index tiles = cuda::tiles_of(m, n, cuda::width_of(cut.size)), room = cut.slices * m * n;
                check(cut.slices >= 1 && (cut.slices == 1 || k / cut.slices >= cuda::kTermsOfSlice),
                      "slices are long enough");
                check(cut.slices == 1 || tiles * cut.slices <= 2 * 132, "and no more than two for a processor");
                check(cut.size >= least, "tensor cores have no mini tiles");
                check(cut.slices == 1 || cuda::width_of(cut.size) <= cuda::kTinyTile, "larger tiles are never too few");
                check(room >= before, "fewer rows need no more room, for a graph of fewer may take none");
                before = room;
            }
    check(cuda::cut_of_rows(64, 65, 4095, 132).slices == 1, "few rows are one slice");
    check(cuda::cut_of_rows(64, 65, 28672, 132).slices == 28, "many are for all processors");
    check(cuda::cut_of_rows(128, 128, 8192, 132).slices == 4, "mini tiles fill half of the processors");
    check(cuda::cut_of_rows(128, 128, 8192, 132, TileSize::tiny).slices == 8, "tensor cores have a quarter as many");
    check(cuda::cut_of_rows(1024, 1025, 1 << 20, 132).slices == 1, "who has tiles for all processors needs no slices");
    for (const Index cols : {1, 7, 8, 31, 32, 1000}) {
        const int threads = cuda::row_threads(cols);
        check(threads == 1 || (threads == 32 && cols >= 8), "a row is a thread's or a warp's, if it has work for one");
    }
    check(cuda::sums_apart(false, 3, 5, 7), "no operand is packed for a bias alone");
    check(!cuda::sums_apart(true, 1024, 1024, 1024), "where it is packed, a column of ones is free");
    check(cuda::sums_apart(true, 4096, 4096, 4096), "unless it begins another column of tiles");
    check(!cuda::sums_apart(true, 4096, 4095, 4096), "and is the first in it");
    check(!cuda::wants_library(8.0 * 128 * 256), "small steps stay with our own products");
    check(cuda::wants_library(1024.0 * 1024 * 1024), "large ones go to the library");
}

// ---- programs -------------------------------------------------------------------------------------------------------

struct Piece {  // of shared memory
    Index first, size;
    bool operator<(const Piece& other) const { return first < other.first; }
};

template <class T>
std::vector<Layer<T>> layers_of(std::initializer_list<Index> widths, Op op, bool dropout) {
    using Kind = typename Layer<T>::Kind;
    std::vector<Layer<T>> layers;
    for (auto width = widths.begin(); width + 1 != widths.end(); ++width) {
        layers.push_back({Kind::linear, width[0], width[1], true});
        if (width + 2 == widths.end()) break;
        layers.push_back({Kind::op, width[1], width[1], false, op});
        if (dropout) layers.push_back({Kind::dropout, width[1], width[1]});
    }
    return layers;
}

// Every matrix of a program that has a place of its own: none may touch another, all lie within the whole.
template <class T>
std::set<Piece> pieces_of(const cuda::Program& p, Index batch) {
    using Step = cuda::Program::Step;
    std::set<Piece> pieces;
    Index parameters = 0;
    const auto matrix = [&](int place, int cols) { pieces.insert({place, batch * cuda::resident_stride(cols)}); };
    for (int n = 0; n < p.count; ++n) {
        const Step& s = p.steps[n];
        const Index size = (s.inputs + s.bias) * cuda::resident_stride(s.outputs);
        if (s.kind == Step::Kind::linear) pieces.insert({s.weights, size});
        if (s.kind == Step::Kind::linear) parameters = std::max(parameters, s.weights + size);
        check(s.weights + (s.kind == Step::Kind::linear ? size : 0) <= p.parameters, "weights come first");
        if (s.keeps_z) matrix(s.z, s.outputs);
        matrix(s.x, s.inputs);
        matrix(s.y, s.outputs);
        matrix(s.dy, s.outputs);
        if (s.pulls) matrix(s.dx, s.inputs);
    }
    for (const int slot : p.slots)
        if (slot >= 0) pieces.insert({slot, 4 * cuda::tiles_across(parameters / 4, p.ranks)});
    check(p.parameters == parameters && parameters % 4 == 0, "and are whole fours");
    if (p.gradient >= 0) pieces.insert({p.gradient, parameters});
    pieces.insert(
        {p.sums, (cuda::kResidentThreads + cuda::kMostRanks) * static_cast<Index>(sizeof(double) / sizeof(T))});
    pieces.insert({p.desk, cuda::kDeskBytes / static_cast<Index>(sizeof(T))});
    return pieces;
}

template <class T>
void check_program(std::initializer_list<Index> widths, Op op, bool dropout, Index batch, bool stored, int ranks = 1) {
    const std::vector<Layer<T>> layers = layers_of<T>(widths, op, dropout);
    const bool slots[kSlots] = {true, true, false};
    const cuda::Program p = cuda::plan_resident(layers, 1, batch, slots, stored, ranks);
    check(p.count > 0, "so few layers are resident");
    Index end = 0;
    for (const Piece& piece : pieces_of<T>(p, cuda::tiles_across(batch, ranks))) {
        check(piece.first >= end && piece.first % 4 == 0, "matrices lie apart, at multiples of 16 bytes");
        end = piece.first + piece.size;
    }
    check(end <= p.total, "all of it is within the whole");
    check(p.slots[2] < 0 && (p.gradient >= 0) == (stored || ranks > 1), "what is not there has no place");
    for (int n = 1; n < p.count; ++n) {
        check(p.steps[n].x == p.steps[n - 1].y, "a part begins where the one before ends");
        check(!p.steps[n].pulls || p.steps[n].dx == p.steps[n - 1].dy, "and so do its cotangents");
    }
}

void cuda_programs() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        for (const Op op : {Op::tanh, Op::gelu, Op::softmax, Op::identity})
            for (const bool dropout : {false, true})
                for (const Index batch : {1, 7, 32}) {
                    check_program<T>({8, 64, 64, 1}, op, dropout, batch, false);
                    check_program<T>({3, 5, 2}, op, dropout, batch, true);
                    check_program<T>({8, 64, 64, 1}, op, dropout, batch, false, 4);
                    check_program<T>({1, 1}, op, dropout, batch, false);
                }
        const std::vector<Layer<T>> many(cuda::kResidentLayers + 1, Layer<T>{Layer<T>::Kind::linear, 1, 1});
        check(cuda::plan_resident(many, 1, 1, {}, false, 1).count == 0, "too many layers are not resident");
        const std::vector<Layer<T>> huge(2, Layer<T>{Layer<T>::Kind::linear, Index{1} << 20, Index{1} << 20});
        check(cuda::plan_resident(huge, 1, 1, {}, false, 1).total > Index{1} << 30,
              "a sum of sizes that int has no room for");
    });
    // The network of the resident schedule's goal, with Adam, within what one block of an sm_90 may have.
    const bool adam[kSlots] = {true, true, false};
    const auto p = cuda::plan_resident(layers_of<float>({8, 64, 64, 1}, Op::relu, false), 1, 32, adam, false, 1);
    check(2 * p.total * 4 <= 227 * 1024, "8-64-64-1 with Adam and 32 rows fits twice");
    const auto wide = layers_of<float>({64, 128, 64, 10}, Op::relu, false);
    check(cuda::plan_resident(wide, 1, 64, adam, false, 1).total * 4 > 227 * 1024, "18,000 parameters fit no block");
    check(cuda::plan_resident(wide, 1, 64, adam, false, 8).total * 4 <= 227 * 1024, "but eight that share their state");
    check(cuda::ranks_of(15, 1, 132) == 1 && cuda::ranks_of(32, 1, 132) == 4 && cuda::ranks_of(1 << 20, 1, 132) == 8,
          "eight rows and more for a block, eight blocks at most");
    check(cuda::ranks_of(32, 33, 132) == 4 && cuda::ranks_of(32, 34, 132) == 2 && cuda::ranks_of(32, 264, 132) == 1,
          "networks come before clusters");
}

// Of a prediction's shared memory: b and W of each linear layer, then two φ; the parts follow each other.
constexpr cuda::TileShape kPredictionTile = {128, 64, 16, 4};

void check_prediction(std::initializer_list<Index> widths) {
    using Step = cuda::Program::Step;
    const cuda::TileShape& tile = kPredictionTile;
    const cuda::Program p = cuda::plan_prediction(layers_of<float>(widths, Op::gelu, true), tile);
    check(p.count > 0, "elementwise ops and dropout have a place");
    const auto ends = [&](int place, Index cols) { return place + cols * (tile.rows + tile.padding); };
    Index end = 0;
    for (int n = 0; n < p.count; ++n) {
        const Step& s = p.steps[n];
        const bool linear = s.kind == Step::Kind::linear;
        const Index panels = cuda::tiles_across(s.outputs, tile.cols);
        check((s.x != s.y) == linear, "a product has another place than its operand, all else is in place");
        check(n == 0 || s.x == p.steps[n - 1].y, "a part begins where the one before ends");
        check(ends(s.x, tile.terms(s.inputs)) <= p.total && ends(s.y, panels * tile.cols) <= p.total,
              "φ lies within the whole");
        if (!linear) continue;
        check(s.weights >= end && s.weights % 4 == 0, "weights lie apart, at multiples of 16 bytes");
        const Index wide = panels * tile.terms(s.inputs) * (tile.cols + tile.padding);
        end = s.weights + round_up(s.outputs, 4) + (s.outputs <= cuda::kFewOutputs ? s.outputs * s.inputs : wide);
    }
    const Step& first = p.steps[0];
    const int lower = std::min(first.x, first.y), upper = std::max(first.x, first.y);
    check(lower >= end && lower % 4 == 0 && upper % 4 == 0, "and before both φ");
    for (int n = 0; n < p.count; ++n)
        check(p.steps[n].x != lower || ends(lower, tile.terms(p.steps[n].inputs)) <= upper, "which do not meet");
    check(p.f == p.steps[p.count - 1].y, "what the last part makes is predicted");
}

void cuda_predictions() {
    context.type = "";
    check_prediction({64, 64, 64, 1});
    check_prediction({1, 9, 8});
    check_prediction({17, 65, 129, 3});
    const auto rowwise = layers_of<float>({3, 4, 2}, Op::softmax, false);
    check(cuda::plan_prediction(rowwise, kPredictionTile).count == 0, "an op of whole rows has no place");
    const auto p = cuda::plan_prediction(layers_of<float>({64, 64, 64, 1}, Op::relu, false), kPredictionTile);
    check(2 * p.total * 4 <= 227 * 1024, "two blocks of 64-64-64-1 fit beside each other");
    check(cuda::wants_resident_prediction(1000000, 128, 132) && !cuda::wants_resident_prediction(16895, 128, 132),
          "blocks keep weights when every processor has rows");
}

}  // namespace
}  // namespace chainrule
