// SPDX-License-Identifier: MIT
#include "train.hpp"

#include <chrono>
#include <cmath>
#include <numeric>

#include "random.hpp"

namespace chainrule {
namespace {

template <class T>
using Kind = typename Layer<T>::Kind;

// Input rows of a gradient tile, whole vectors for the transposed copy. Usually 8 register tiles, which with 64 columns fit
// the first-level cache, where the update rule finds them. Small networks: fewer, so that there are enough tiles to share
// out evenly. Batches of several blocks of kDepth: as many as let their part of X stay in the shared cache while all
// columns are visited, so that packing dZ pays (2048 x 2048, batch 2048, one core: 67 to 88 % of peak). The number of
// threads has no say: sums over tiles (penalties, the norm of the gradient) would depend on it.
Index tile_inputs(Index batch, Index parameters) {
    constexpr Index small_network = 1 << 16;
    return batch > kDepth ? 384 : (parameters > small_network ? 48 : 16);
}

// What the update rule costs for one weight, in multiplications: square root and division are slow.
constexpr double kUpdateCost = 20;

// Short rows by hand: the call of memmove costs more than the few numbers it moves.
template <class T>
void copy_row(const T* from, Index cols, T* to) {
    if (cols > 4) {
        std::copy_n(from, cols, to);
    } else {
        to[0] = from[0];
        if (cols > 1) to[1] = from[1];
        if (cols > 2) to[2] = from[2];
        if (cols > 3) to[3] = from[3];
    }
}

template <class T>
Dataset<T> slice(Dataset<T> data, Index inputs, Index first, Index rows) {
    data.rows = rows;
    data.x += first * inputs;
    if (data.labels) data.labels += first;
    if (data.y) data.y += first * data.target_cols;
    if (data.weight) data.weight += first;
    return data;
}

}  // namespace

template <class T>
Optimizer<T>::Optimizer(const Network<T>& net, const OptimizerSettings& given) : settings(given) {
    for (int slot = 0; slot < kSlots; ++slot)
        if (uses_slot(settings, slot)) slots[slot] = Array<T>(net.size());
}

// ---- phase 1 --------------------------------------------------------------------------------------------------------

template <class T>
Step<T>::Step(Network<T>& net, const Loss<T>& loss, Index rows, Index target_cols)
    : net_(&net),
      loss_(loss),
      activations_(net.layers(), rows, true),
      tile_inputs_(tile_inputs(rows, net.size())),
      target_cols_(target_cols),
      target_stride_(padded_stride<T>(target_cols)),
      targets_(rows * target_stride_),
      weights_(rows),
      values_(rows),
      labels_(rows) {
    plan();
}

template <class T>
void Step<T>::weigh(const Dataset<T>& data, const std::int64_t* order) {
    weighted_ = data.weight != nullptr;
    double total = static_cast<double>(rows_);
    if (weighted_) {
        total = 0;
        for (Index i = 0; i < rows_; ++i) {
            weights_[i] = data.weight[order ? order[i] : i];
            total += static_cast<double>(weights_[i]);
        }
    }
    total_weight_ = total;
    scale_ = static_cast<T>(!loss_.mean ? 1.0 : (total > 0 ? 1 / total : 0.0));
}

template <class T>
void Step<T>::gather(const Dataset<T>& data, const std::int64_t* order, Index begin, Index end) {
    const MatrixView<T> x = activations_.phi(0);
    for (Index i = begin; i < end; ++i) {
        const Index row = order ? order[i] : i;
        copy_row(data.x + row * x.cols, x.cols, x.data + i * x.stride);
        if (data.labels)
            labels_[i] = data.labels[row];
        else
            copy_row(data.y + row * target_cols_, target_cols_, targets_.data() + i * target_stride_);
    }
    net_->append_ones(activations_, 0, begin, end);
}

template <class T>
void Step<T>::run_loss(Index begin, Index end) {
    const MatrixView<T> f = activations_.phi(net_->depth()), df = activations_.dphi(net_->depth());
    const Targets<T> y = {target_cols_ == 0 ? labels_.data() + begin : nullptr,
                          targets_.data() + begin * target_stride_, target_stride_};
    kernels<T>().loss[static_cast<int>(loss_.op)](
        end - begin, f.cols, f.data + begin * f.stride, f.stride, y, weighted_ ? weights_.data() + begin : nullptr,
        scale_, values_.data() + begin, df.data + begin * df.stride, df.stride, static_cast<T>(loss_.param));
}

template <class T>
double Step<T>::total_loss() const {
    double total = 0;
    for (Index i = 0; i < rows_; ++i)
        total += static_cast<double>(values_[i]) * (weighted_ ? static_cast<double>(weights_[i]) : 1.0);
    return total * static_cast<double>(scale_);
}

template <class T>
double Step<T>::sweep(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise,
                      bool backward) {
    rows_ = rows;
    weigh(data, order);
    const Index depth = net_->depth();
    const double multiplies = net_->multiplies_per_row() * static_cast<double>(rows);
    if (!net_->has_external() && !loss_.external) {
        over_rows(rows, 2 * multiplies, [&](Index begin, Index end) {
            gather(data, order, begin, end);
            net_->forward(activations_, 0, depth, begin, end, noise, backward);
            run_loss(begin, end);
            if (backward) net_->backward(activations_, depth, net_->first_cotangent(), begin, end, noise);
        });
        return total_loss();
    }
    over_rows(rows, multiplies, [&](Index begin, Index end) { gather(data, order, begin, end); });
    net_->forward_all(activations_, rows, noise, backward);
    double value;
    if (loss_.external) {
        const MatrixView<T> f = activations_.phi(depth), df = activations_.dphi(depth);
        const Targets<T> y = {target_cols_ == 0 ? labels_.data() : nullptr, targets_.data(), target_stride_};
        value = loss_.external->value_grad({f.data, rows, f.cols, f.stride}, y, target_cols_,
                                           weighted_ ? weights_.data() : nullptr, scale_,
                                           {df.data, rows, df.cols, df.stride});
    } else {
        over_rows(rows, multiplies, [&](Index begin, Index end) { run_loss(begin, end); });
        value = total_loss();
    }
    if (backward) net_->backward_all(activations_, rows, noise, stored_gradient().data());
    return value;
}

// ---- phase 2 --------------------------------------------------------------------------------------------------------

template <class T>
void Step<T>::plan() {
    for (Index l = 0; l < net_->depth(); ++l) {
        const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(l)];
        if (layer.kind == Kind<T>::external && layer.size > 0)
            units_.push_back({Unit::Kind::external, l, 0, 1, 0, layer.size, layer.offset});
        has_bfloat16_ |= layer.bfloat16;
        if (layer.kind == Kind<T>::linear) layer.narrow() ? plan_narrow(l, layer) : plan_wide(l, layer);
    }
    for (const Unit& unit : units_) {
        middles_.push_back(work_ + static_cast<double>(unit.size()) / 2);
        work_ += static_cast<double>(unit.size());
    }
    penalties_.resize(units_.size());
    squares_.resize(units_.size());
}

template <class T>
void Step<T>::plan_wide(Index l, const Layer<T>& layer) {
    for (Index first = 0; first < layer.weight_rows(); first += tile_inputs_)
        for (Index column = 0; column < layer.outputs; column += kPanel<T>) {
            const Index width = panel_width<T>(layer.outputs, column);
            units_.push_back({Unit::Kind::wide, l, column, width, first,
                              std::min(layer.weight_rows() - first, tile_inputs_),
                              layer.offset + column * layer.weight_rows() + first * width});
        }
}

template <class T>
void Step<T>::plan_narrow(Index l, const Layer<T>& layer) {
    for (Index column = 0; column < layer.inputs; column += kPanel<T>)
        units_.push_back({Unit::Kind::narrow, l, column, panel_width<T>(layer.inputs, column), 0, layer.outputs,
                          layer.offset + column * layer.outputs});
    if (layer.bias) units_.push_back({Unit::Kind::wide, l, 0, kLine<T>, layer.inputs, 1, layer.bias_offset()});
}

// f(unit, its number, its thread's scratch) for every unit, on several threads where it pays; each thread takes a run of
// neighbours with its share of the work.
template <class T>
template <class F>
void Step<T>::over_units(F f) {
    if (units_.empty()) return;
    const int parts = parts_for(work_ * (static_cast<double>(rows_) + kUpdateCost));
    const Index tile_size = tile_inputs_ * kPanel<T>, size = tile_size + kDepth * kPanel<T>;
    const Index x_pairs = has_bfloat16_ ? tile_inputs_ * ((capacity() + 1) / 2) : 0;
    const Index pairs = has_bfloat16_ ? x_pairs + kDepth / 2 * kPanel<T> : 0;
    if (tiles_.size() < parts * size) tiles_ = Array<T>(parts * size);
    if (pairs_.size() < parts * pairs) pairs_ = Array<Pair>(parts * pairs);
    parallel(parts, [&](int part, int count) {
        T* const tile = tiles_.data() + part * size;
        Pair* const x = pairs_.data() + part * pairs;
        Scratch scratch = {tile, tile + tile_size, x, x + x_pairs, nullptr};
        const auto start_of = [&](int p) {
            return std::lower_bound(middles_.begin(), middles_.end(), work_ * p / count) - middles_.begin();
        };
        for (Index u = start_of(part), end = start_of(part + 1); u < end; ++u)
            f(units_[static_cast<std::size_t>(u)], static_cast<std::size_t>(u), scratch);
    });
}

template <class T>
void Step<T>::differentiate(const Unit& unit, Scratch& scratch, T* tile) const {
    if (unit.kind == Unit::Kind::external) return;  // it wrote its gradient itself
    const MatrixView<T> x = activations_.phi(unit.layer), dz = activations_.dphi(unit.layer + 1);
    if constexpr (std::is_same_v<T, float>)
        if (net_->layers()[static_cast<std::size_t>(unit.layer)].bfloat16)
            return differentiate_paired(unit, x, dz, scratch, tile);
    const bool narrow = unit.kind == Unit::Kind::narrow;
    const MatrixView<T>&across = narrow ? dz : x, &along = narrow ? x : dz;
    kernels<T>().linear_vjp_weight(rows_, unit.count, unit.width, across.data + unit.first, across.stride,
                                   along.data + unit.column, along.stride, scratch.packed, tile);
    if (narrow)  // the padding of X may hold anything, that of the weights stays zero
        for (Index o = 0; o < unit.count; ++o)
            for (Index j = x.cols - unit.column; j < unit.width; ++j) tile[o * unit.width + j] = 0;
}

// Units of the same rows of W follow each other and share the pairs of X.
template <class T>
void Step<T>::differentiate_paired(const Unit& unit, MatrixView<float> x, MatrixView<float> dz, Scratch& scratch,
                                   float* tile) const {
    const Index x_stride = round_up(unit.count, kLine<float>);
    const Unit* shared = scratch.paired_for;
    if (shared == nullptr || shared->layer != unit.layer || shared->first != unit.first)
        bfloat16_kernels().pair_rows(rows_, x_stride, x.data + unit.first, x.stride, scratch.x_pairs, x_stride);
    scratch.paired_for = &unit;
    bfloat16_kernels().vjp_weight(rows_, unit.count, unit.width, scratch.x_pairs, x_stride, dz.data + unit.column,
                                  dz.stride, scratch.packed_pairs, tile);
}

template <class T>
double Step<T>::regularize(const Unit& unit, T* tile, const Regularization& r) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(unit.layer)];
    double penalty = 0;
    if ((r.l1 != 0 || r.l2 != 0) && unit.kind != Unit::Kind::external) {
        // Of a wide layer the weights, not the bias below them; a narrow layer's bias has a unit of its own.
        const Index rows =
            unit.kind == Unit::Kind::narrow ? unit.count : std::min(unit.count, layer.inputs - unit.first);
        penalty = static_cast<double>(k.penalize(rows * unit.width, net_->theta() + unit.place, tile,
                                                 static_cast<T>(r.l1), static_cast<T>(r.l2)));
    }
    if (r.clip_value != 0) k.clip(unit.size(), tile, static_cast<T>(r.clip_value));
    return penalty;
}

template <class T>
void Step<T>::apply(const Unit& unit, const T* tile, T scale, Optimizer<T>& optimizer, const Hyper<T>& hyper) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(unit.layer)];
    T* slots[kSlots];
    for (int s = 0; s < kSlots; ++s)
        slots[s] = optimizer.slots[s].size() > 0 ? optimizer.slots[s].data() + unit.place : nullptr;
    k.optimize[static_cast<int>(optimizer.settings.rule)](unit.size(), net_->theta() + unit.place, tile, scale, slots,
                                                          hyper);
    if (unit.kind == Unit::Kind::wide && !layer.narrow()) net_->copy_tile(layer, unit.first, unit.count, unit.column);
}

template <class T>
Array<T>& Step<T>::stored_gradient() {
    if (gradient_.size() < net_->size()) gradient_ = Array<T>(net_->size());
    return gradient_;
}

template <class T>
const T* Step<T>::gradient() {
    T* flat = stored_gradient().data();
    over_units(
        [&](const Unit& unit, std::size_t, Scratch& scratch) { differentiate(unit, scratch, flat + unit.place); });
    return flat;
}

template <class T>
double Step<T>::update(Optimizer<T>& optimizer, double lr, const Regularization& r) {
    const Hyper<T> hyper = prepare_step<T>(optimizer.settings, lr, optimizer.step_count + 1);
    const auto penalty = [&] { return std::accumulate(penalties_.begin(), penalties_.end(), 0.0); };
    if (r.clip_norm == 0 && !net_->has_external()) {
        over_units([&](const Unit& unit, std::size_t u, Scratch& scratch) {
            differentiate(unit, scratch, scratch.tile);
            penalties_[u] = regularize(unit, scratch.tile, r);
            apply(unit, scratch.tile, T{1}, optimizer, hyper);
        });
        return penalty();
    }
    T* flat = stored_gradient().data();
    over_units([&](const Unit& unit, std::size_t u, Scratch& scratch) {
        T* tile = flat + unit.place;
        differentiate(unit, scratch, tile);
        penalties_[u] = regularize(unit, tile, r);
        if (r.clip_norm != 0) squares_[u] = static_cast<double>(kernels<T>().sum_of_squares(unit.size(), tile));
    });
    double scale = 1;
    if (r.clip_norm != 0) {
        const double norm = std::sqrt(std::accumulate(squares_.begin(), squares_.end(), 0.0));
        scale = std::min(1.0, r.clip_norm / (norm + 1e-6));  // PyTorch's clip_grad_norm_
    }
    over_units([&](const Unit& unit, std::size_t, Scratch&) {
        apply(unit, flat + unit.place, static_cast<T>(scale), optimizer, hyper);
    });
    return penalty();
}

// ---- epochs ---------------------------------------------------------------------------------------------------------

template <class T>
double evaluate(Network<T>& net, const Loss<T>& loss, const Dataset<T>& data) {
    // A user's loss sees all rows at once; ours are summed piece by piece.
    const Index piece = loss.external ? data.rows : std::min<Index>(data.rows, 1024);
    Step<T> step(net, loss, piece, data.target_cols);
    double total = 0, total_weight = 0;
    for (Index first = 0; first < data.rows; first += piece) {
        const Dataset<T> part = slice(data, net.inputs(), first, std::min(piece, data.rows - first));
        const double weight =
            data.weight ? std::accumulate(part.weight, part.weight + part.rows, 0.0) : static_cast<double>(part.rows);
        const double value = step.sweep(part, nullptr, part.rows, Noise{}, false);
        if (piece == data.rows) return value;
        total += loss.mean ? value * weight : value;
        total_weight += weight;
    }
    return loss.mean ? (total_weight > 0 ? total / total_weight : 0) : total;
}

template <class T>
Trainer<T>::Trainer(Network<T>& net, Optimizer<T>& optimizer, const Loss<T>& loss, const Dataset<T>& data,
                    const TrainerOptions& options)
    : net_(net),
      optimizer_(optimizer),
      data_(data),
      options_(options),
      loss_(loss),
      step_(net, loss, std::min(options.batch_size, data.rows), data.target_cols),
      order_(options.shuffle ? data.rows : 0) {}

template <class T>
Index Trainer<T>::steps_per_epoch() const {
    return (data_.rows + options_.batch_size - 1) / options_.batch_size;
}

template <class T>
double Trainer<T>::one_step(const Dataset<T>& data, const std::int64_t* order, Index rows, double lr) {
    const FlushSubnormals flush(!net_.has_external() && !loss_.external);  // a user's code keeps the user's mode
    const Noise noise = {true, options_.seed, static_cast<std::uint64_t>(optimizer_.step_count)};
    const double loss = step_.sweep(data, order, rows, noise);
    const double penalty = step_.update(optimizer_, lr, options_.regularization);
    ++optimizer_.step_count;
    return loss + penalty;
}

template <class T>
double Trainer<T>::step(const Dataset<T>& batch, double lr) {
    if (batch.rows > step_.capacity()) step_ = Step<T>(net_, loss_, batch.rows, batch.target_cols);
    return one_step(batch, nullptr, batch.rows, lr);
}

template <class T>
std::vector<double> Trainer<T>::run(Index first_epoch, Index epochs, const double* lr, Index lr_stride,
                                    const std::function<void()>& poll) {
    using Clock = std::chrono::steady_clock;
    constexpr auto poll_interval = std::chrono::milliseconds(20);
    // Looking at the clock costs 25 ns, a step of the smallest networks 2 µs: look every few steps there.
    const double multiplies =
        3 * net_.multiplies_per_row() * static_cast<double>(std::min(options_.batch_size, data_.rows));
    const Index look = net_.has_external() || loss_.external ? 1 : 1 + static_cast<Index>(1e6 / (multiplies + 1e4));
    auto polled = Clock::now();
    std::vector<double> losses;
    Index since_look = 0;
    for (Index epoch = 0; epoch < epochs; ++epoch) {
        if (options_.shuffle)
            permute(data_.rows, options_.seed, static_cast<std::uint64_t>(first_epoch + epoch), order_.data());
        if (multiplies * static_cast<double>(steps_per_epoch()) > 1e7) rouse_workers();  // an epoch of 0.1 ms or more
        double total = 0, weight = 0;
        for (Index step = 0, first = 0; first < data_.rows; ++step, first += options_.batch_size) {
            const Index rows = std::min(options_.batch_size, data_.rows - first);
            const double rate = lr[epoch * lr_stride + (lr_stride > 1 ? step : 0)];
            const double loss = run_batch(first, rows, rate), share = loss_.mean ? step_.total_weight() : 1.0;
            total += loss * share;
            weight += share;
            if (++since_look < look) continue;
            since_look = 0;
            if (const auto now = Clock::now(); now - polled >= poll_interval) {
                poll();
                polled = now;
            }
        }
        losses.push_back(loss_.mean && weight > 0 ? total / weight : total);
        if (!std::isfinite(total)) break;
    }
    return losses;
}

template <class T>
double Trainer<T>::run_batch(Index first, Index rows, double lr) {
    if (options_.shuffle) return one_step(data_, order_.data() + first, rows, lr);
    return one_step(slice(data_, net_.inputs(), first, rows), nullptr, rows, lr);
}

#define CHAINRULE_INSTANTIATE(T) \
    template class Optimizer<T>; \
    template class Step<T>;      \
    template class Trainer<T>;   \
    template double evaluate<T>(Network<T>&, const Loss<T>&, const Dataset<T>&);
CHAINRULE_INSTANTIATE(float)
CHAINRULE_INSTANTIATE(double)

}  // namespace chainrule
