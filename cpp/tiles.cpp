// SPDX-License-Identifier: MIT
#include "tiles.hpp"

#include <type_traits>

#include "columns.hpp"

namespace chainrule {
namespace {

template <class T>
using Kind = typename Layer<T>::Kind;

// Input rows of a gradient tile, whole vectors for the transposed copy. Usually 8 register tiles, which with 64 columns fit
// the first-level cache, where the update rule finds them. Small networks: fewer, so that there are enough tiles to share
// out evenly. Batches of several blocks of kDepth: as many as let their part of X stay in the shared cache while all
// columns are visited, so that packing dZ pays (2048 x 2048, batch 2048, one core: 67 to 88 % of peak with 384; mid another
// 1.4 % faster with 512). The number of threads has no say: sums over tiles (penalties, the norm of the gradient) would
// depend on it.
Index tile_inputs(Index batch, Index parameters) {
    constexpr Index small_network = 1 << 16;
    return batch > kDepth ? 512 : (parameters > small_network ? 48 : 16);
}

}  // namespace

template <class T>
Tiles<T>::Tiles(const Network<T>& net, Index rows)
    : net_(&net), capacity_(rows), inputs_(tile_inputs(rows, net.size())) {
    for (Index l = 0; l < net.depth(); ++l) {
        const Layer<T>& layer = net.layers()[static_cast<std::size_t>(l)];
        if (layer.kind == Kind<T>::external && layer.size > 0)
            tiles_.push_back({Tile::Kind::external, l, 0, 1, 0, layer.size, layer.offset});
        has_bfloat16_ |= layer.bfloat16;
        if (layer.kind == Kind<T>::linear) layer.narrow() ? plan_narrow(l, layer) : plan_wide(l, layer);
    }
    for (std::size_t n = 0; n < tiles_.size(); ++n) {
        const bool same_run = n > 0 && (tiles_[n].layer == tiles_[n - 1].layer ||
                                        !(by_columns(tiles_[n].layer) || by_columns(tiles_[n - 1].layer)));
        if (!same_run) runs_.push_back({n, n, 0});
        Run& run = runs_.back();
        const double size = static_cast<double>(tiles_[n].size());
        middles_.push_back(run.work + size / 2);
        run.work += size;
        run.end = n + 1;
    }
}

// Does phase 1 share the layer by columns, given a suitable number of threads (columns.hpp)? Then everybody's columns follow
// each other here, in a run of the layer's own: who reads a weight there updates it here.
template <class T>
bool Tiles<T>::by_columns(Index l) const {
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(l)];
    return layer.kind == Kind<T>::linear && capacity_ <= Columns<T>::kMostRows && layer.outputs % (2 * kPanel<T>) == 0;
}

template <class T>
void Tiles<T>::plan_wide(Index l, const Layer<T>& layer) {
    const Index rows = layer.weight_rows();
    const Index panels = (layer.outputs + kPanel<T> - 1) / kPanel<T>;
    // A bias alone makes no tile: it would be one chain of waiting additions.
    Index heights = std::max<Index>(1, (rows - 1 + inputs_ - 1) / inputs_), height = inputs_;
    if (capacity_ > kDepth) {  // tall tiles: as even as can be, and a half for each of two threads
        if (panels == 1 && rows > inputs_ / 2) heights = std::max<Index>(heights, 2);
        height = round_up((rows - 1 + heights - 1) / heights, kLine<T>);
    }
    for (Index n = 0; n < heights * panels; ++n) {
        const Index first = (by_columns(l) ? n % heights : n / panels) * height;
        const Index column = (by_columns(l) ? n / heights : n % panels) * kPanel<T>;
        const Index count = rows - first <= height + 1 ? rows - first : height;
        const Index width = panel_width<T>(layer.outputs, column);
        tiles_.push_back(
            {Tile::Kind::wide, l, column, width, first, count, layer.offset + column * rows + first * width});
    }
}

template <class T>
void Tiles<T>::plan_narrow(Index l, const Layer<T>& layer) {
    for (Index column = 0; column < layer.inputs; column += kPanel<T>)
        tiles_.push_back({Tile::Kind::narrow, l, column, panel_width<T>(layer.inputs, column), 0, layer.outputs,
                          layer.offset + column * layer.outputs});
    if (layer.bias) tiles_.push_back({Tile::Kind::wide, l, 0, kLine<T>, layer.inputs, 1, layer.bias_offset()});
}

template <class T>
void Tiles<T>::differentiate(const Tile& tile, Index rows, MatrixView<T> x, MatrixView<T> dz, Scratch& scratch,
                             T* gradient, bool add) const {
    if constexpr (std::is_same_v<T, float>)
        if (net_->layers()[static_cast<std::size_t>(tile.layer)].bfloat16)
            return differentiate_paired(tile, rows, x, dz, scratch, gradient);
    const bool narrow = tile.kind == Tile::Kind::narrow;
    const MatrixView<T>&across = narrow ? dz : x, &along = narrow ? x : dz;
    kernels<T>().linear_vjp_weight(rows, tile.count, tile.width, across.data + tile.first, across.stride,
                                   along.data + tile.column, along.stride, scratch.packed, gradient, add);
    if (narrow)  // the padding of X may hold anything, that of the weights stays zero
        for (Index o = 0; o < tile.count; ++o)
            for (Index j = x.cols - tile.column; j < tile.width; ++j) gradient[o * tile.width + j] = 0;
}

// Tiles of the same rows of W follow each other and share the pairs of X.
template <class T>
void Tiles<T>::differentiate_paired(const Tile& tile, Index rows, MatrixView<float> x, MatrixView<float> dz,
                                    Scratch& scratch, float* gradient) const {
    const Index x_stride = round_up(tile.count, kLine<float>);
    const Tile* shared = scratch.paired_for;
    if (shared == nullptr || shared->layer != tile.layer || shared->first != tile.first)
        bfloat16_kernels().pair_rows(rows, x_stride, x.data + tile.first, x.stride, scratch.x_pairs, x_stride);
    scratch.paired_for = &tile;
    bfloat16_kernels().vjp_weight(rows, tile.count, tile.width, scratch.x_pairs, x_stride, dz.data + tile.column,
                                  dz.stride, scratch.packed_pairs, gradient);
}

template class Tiles<float>;
template class Tiles<double>;

}  // namespace chainrule
