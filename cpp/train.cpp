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

// Input rows of a gradient tile: 8 register tiles high, and with its 64 columns small enough for the first-level cache.
constexpr Index kTileInputs = 48;

// Tiles are visited in groups of this many input rows, all columns of a group after each other: its part of X then stays
// in the shared cache. Column by column instead, X came from memory again for each (75 % of peak at 2048 x 2048, batch
// 2048).
constexpr Index kGroupInputs = 8 * kTileInputs;

// What the update rule costs for one weight, in multiplications: square root and division are slow.
constexpr double kUpdateCost = 20;

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
    scale_ = static_cast<T>(!loss_.mean ? 1.0 : (total > 0 ? 1 / total : 0.0));
}

template <class T>
void Step<T>::gather(const Dataset<T>& data, const std::int64_t* order, Index begin, Index end) {
    const MatrixView<T> x = activations_.phi(0);
    for (Index i = begin; i < end; ++i) {
        const Index row = order ? order[i] : i;
        std::copy_n(data.x + row * x.cols, x.cols, x.data + i * x.stride);
        if (data.labels)
            labels_[i] = data.labels[row];
        else
            std::copy_n(data.y + row * target_cols_, target_cols_, targets_.data() + i * target_stride_);
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
        if (layer.kind == Kind<T>::external && layer.size > 0) units_.push_back({l, 0, 0, 0, layer.size});
        if (layer.kind != Kind<T>::linear) continue;
        for (Index group = 0; group < layer.weight_rows(); group += kGroupInputs)
            for (Index column = 0; column < layer.outputs; column += kPanel<T>)
                for (Index first = group; first < std::min(group + kGroupInputs, layer.weight_rows());
                     first += kTileInputs)
                    units_.push_back({l, column, round_up(std::min(layer.outputs - column, kPanel<T>), kLine<T>), first,
                                      std::min(layer.weight_rows() - first, kTileInputs)});
    }
    double total = 0;
    for (const Unit& unit : units_)
        work_.push_back(total += static_cast<double>(unit.count * std::max<Index>(unit.width, 1)));
    penalties_.resize(units_.size());
    squares_.resize(units_.size());
}

// f(unit, its number, a scratch tile) for every unit, on several threads where it pays; each thread takes a run of
// neighbours with its share of the work.
template <class T>
template <class F>
void Step<T>::over_units(F f) {
    if (units_.empty()) return;
    const double total = work_.back();
    const int parts = parts_for(total * (static_cast<double>(rows_) + kUpdateCost));
    constexpr Index tile_size = kTileInputs * kPanel<T>;
    if (tiles_.size() < parts * tile_size) tiles_ = Array<T>(parts * tile_size);
    parallel(parts, [&](int part, int count) {
        const auto start_of = [&](int p) {
            return std::upper_bound(work_.begin(), work_.end(), total * p / count) - work_.begin();
        };
        for (Index u = start_of(part), end = start_of(part + 1); u < end; ++u)
            f(units_[static_cast<std::size_t>(u)], static_cast<std::size_t>(u), tiles_.data() + part * tile_size);
    });
}

template <class T>
Index Step<T>::place(const Unit& unit) const {
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(unit.layer)];
    return layer.offset + unit.column * layer.weight_rows() + unit.first * unit.width;
}

template <class T>
void Step<T>::differentiate(const Unit& unit, T* tile) const {
    if (unit.width == 0) return;  // an external layer wrote its gradient itself
    const MatrixView<T> x = activations_.phi(unit.layer), dz = activations_.dphi(unit.layer + 1);
    kernels<T>().linear_vjp_weight(rows_, unit.count, unit.width, x.data + unit.first, x.stride, dz.data + unit.column,
                                   dz.stride, tile);
}

template <class T>
double Step<T>::regularize(const Unit& unit, T* tile, const Regularization& r) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(unit.layer)];
    double penalty = 0;
    if ((r.l1 != 0 || r.l2 != 0) && unit.width > 0) {
        const Index rows = std::min(unit.count, layer.inputs - unit.first);  // weights, not the bias below them
        penalty = static_cast<double>(k.penalize(rows * unit.width, net_->theta() + place(unit), tile,
                                                 static_cast<T>(r.l1), static_cast<T>(r.l2)));
    }
    if (r.clip_value != 0) k.clip(unit.count * std::max<Index>(unit.width, 1), tile, static_cast<T>(r.clip_value));
    return penalty;
}

template <class T>
void Step<T>::apply(const Unit& unit, const T* tile, T scale, Optimizer<T>& optimizer, const Hyper<T>& hyper) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(unit.layer)];
    const Index begin = place(unit);
    T* slots[kSlots];
    for (int s = 0; s < kSlots; ++s)
        slots[s] = optimizer.slots[s].size() > 0 ? optimizer.slots[s].data() + begin : nullptr;
    k.optimize[static_cast<int>(optimizer.settings.rule)](unit.count * std::max<Index>(unit.width, 1),
                                                          net_->theta() + begin, tile, scale, slots, hyper);
    if (unit.width > 0 && unit.layer >= net_->first_cotangent())
        k.linear_transpose(layer.inputs, layer.outputs, unit.first, std::min(unit.count, layer.inputs - unit.first),
                           unit.column, net_->theta() + layer.offset + unit.column * layer.weight_rows(), unit.width,
                           net_->backward_weights(layer));
}

template <class T>
Array<T>& Step<T>::stored_gradient() {
    if (gradient_.size() < net_->size()) gradient_ = Array<T>(net_->size());
    return gradient_;
}

template <class T>
const T* Step<T>::gradient() {
    T* flat = stored_gradient().data();
    over_units([&](const Unit& unit, std::size_t, T*) { differentiate(unit, flat + place(unit)); });
    return flat;
}

template <class T>
double Step<T>::update(Optimizer<T>& optimizer, double lr, const Regularization& r) {
    const Hyper<T> hyper = prepare_step<T>(optimizer.settings, lr, optimizer.step_count + 1);
    const auto penalty = [&] { return std::accumulate(penalties_.begin(), penalties_.end(), 0.0); };
    if (r.clip_norm == 0 && !net_->has_external()) {
        over_units([&](const Unit& unit, std::size_t u, T* tile) {
            differentiate(unit, tile);
            penalties_[u] = regularize(unit, tile, r);
            apply(unit, tile, T{1}, optimizer, hyper);
        });
        return penalty();
    }
    T* flat = stored_gradient().data();
    over_units([&](const Unit& unit, std::size_t u, T*) {
        T* tile = flat + place(unit);
        differentiate(unit, tile);
        penalties_[u] = regularize(unit, tile, r);
        if (r.clip_norm != 0)
            squares_[u] =
                static_cast<double>(kernels<T>().sum_of_squares(unit.count * std::max<Index>(unit.width, 1), tile));
    });
    double scale = 1;
    if (r.clip_norm != 0) {
        const double norm = std::sqrt(std::accumulate(squares_.begin(), squares_.end(), 0.0));
        scale = std::min(1.0, r.clip_norm / (norm + 1e-6));  // PyTorch's clip_grad_norm_
    }
    over_units([&](const Unit& unit, std::size_t, T*) {
        apply(unit, flat + place(unit), static_cast<T>(scale), optimizer, hyper);
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
        double total = 0;
        for (Index step = 0, first = 0; first < data_.rows; ++step, first += options_.batch_size) {
            const Index rows = std::min(options_.batch_size, data_.rows - first);
            const double rate = lr[epoch * lr_stride + (lr_stride > 1 ? step : 0)];
            total += run_batch(first, rows, rate) *
                     (loss_.mean ? static_cast<double>(rows) / static_cast<double>(data_.rows) : 1.0);
            if (++since_look < look) continue;
            since_look = 0;
            if (const auto now = Clock::now(); now - polled >= poll_interval) {
                poll();
                polled = now;
            }
        }
        losses.push_back(total);
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
