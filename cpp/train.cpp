// SPDX-License-Identifier: MIT
#include "train.hpp"

#include <cmath>
#include <numeric>
#include <stdexcept>

#include "columns.hpp"
#include "example_clipping.hpp"
#include "interrupt.hpp"
#include "random.hpp"

namespace chainrule {
namespace {

template <class T>
using Kind = typename Layer<T>::Kind;

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
Dataset<T> slice(Dataset<T> data, const Network<T>& net, Index first, Index rows) {
    data.rows = rows;
    data.x += first * net.inputs();
    if (data.labels) data.labels += first;
    if (data.y) data.y += first * data.target_cols;
    if (data.weight) data.weight += first;
    if (data.dy) data.dy += first * net.outputs() * net.inputs();
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
Step<T>::Step(Network<T>& net, const Loss<T>& loss, Index rows, Index target_cols, const Extras& extras)
    : net_(&net),
      loss_(loss),
      activations_(net.layers(), rows, true),
      tiles_(net, rows),
      sobolev_(extras.sobolev ? std::make_unique<Sobolev<T>>(net, rows) : nullptr),
      clip_example_norm_(extras.clip_example_norm),
      target_cols_(target_cols),
      target_stride_(padded_stride<T>(target_cols)),
      targets_(rows * target_stride_),
      weights_(rows),
      values_(rows),
      labels_(rows),
      penalties_(tiles_.count()),
      squares_(tiles_.count()) {}

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
    leave_out(end - begin, weighted_ ? weights_.data() + begin : nullptr, values_.data() + begin,
              {df.data + begin * df.stride, end - begin, df.cols, df.stride});
}

template <class T>
double Step<T>::total_loss() const {
    double total = 0;
    for (Index i = 0; i < rows_; ++i)
        total += static_cast<double>(values_[i]) * (weighted_ ? static_cast<double>(weights_[i]) : 1.0);
    return total * static_cast<double>(scale_);
}

// Both phases are shared, or none: a single thread's phase would begin and end with data that the other core has.
// 64-64-64 at batch 64 took two threads 24 µs, one 29, and one in phase 2 only 33.
template <class T>
void Step<T>::choose_parts(double products) {
    parts_ = parts_for(products * net_->multiplies_per_row() + kUpdateCost * static_cast<double>(net_->size()));
}

template <class T>
double Step<T>::sweep(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise,
                      bool backward) {
    if (backward && sobolev_) return sweep_sobolev(data, order, rows, noise);
    rows_ = rows;
    choose_parts(static_cast<double>(backward ? 3 * rows : rows));
    weigh(data, order);
    const Index depth = net_->depth();
    if (!net_->has_external() && !loss_.external) {
        // Each example's own gradient is clipped where its row has gone all the way.
        const Columns<T> columns(*net_, clip_example_norm_ == 0 ? rows : 0, parts_);
        if (columns.layers() > 0) {
            over_rows(rows, parts_, [&](Index begin, Index end) { gather(data, order, begin, end); });
            columns.forward(activations_, backward);
        }
        over_rows(rows, parts_, [&](Index begin, Index end) {
            if (columns.layers() == 0) gather(data, order, begin, end);
            net_->forward(activations_, columns.layers(), depth, begin, end, noise, backward);
            run_loss(begin, end);
            if (!backward) return;
            net_->backward(activations_, depth, std::max(columns.handover(), net_->first_cotangent()), begin, end,
                           noise);
            if (clip_example_norm_ != 0) clip_examples(begin, end);
        });
        if (backward) columns.backward(activations_);
        return total_loss();
    }
    over_rows(rows, parts_, [&](Index begin, Index end) { gather(data, order, begin, end); });
    net_->forward_all(activations_, rows, parts_, noise, backward);
    double value;
    if (loss_.external) {
        const MatrixView<T> f = activations_.phi(depth), df = activations_.dphi(depth);
        const Targets<T> y = {target_cols_ == 0 ? labels_.data() : nullptr, targets_.data(), target_stride_};
        value = loss_.external->value_grad({f.data, rows, f.cols, f.stride}, y, target_cols_,
                                           weighted_ ? weights_.data() : nullptr, scale_,
                                           {df.data, rows, df.cols, df.stride});
    } else {
        over_rows(rows, parts_, [&](Index begin, Index end) { run_loss(begin, end); });
        value = total_loss();
    }
    if (!backward) return value;
    net_->backward_all(activations_, rows, parts_, noise, stored_gradient().data());
    if (clip_example_norm_ != 0) over_rows(rows, parts_, [&](Index begin, Index end) { clip_examples(begin, end); });
    return value;
}

// The loss and ∂L/∂f as ever; the way back is the second term's, which carries both. It has a forward pass of its own, one
// product beside eight or more, because nothing may be in place there.
template <class T>
double Step<T>::sweep_sobolev(const Dataset<T>& data, const std::int64_t* order, Index rows, const Noise& noise) {
    const double value = sweep(data, order, rows, noise, false);
    T* own = net_->has_external() ? stored_gradient().data() : nullptr;
    if (own) std::fill_n(own, net_->size(), T{0});
    const typename Sobolev<T>::Batch batch = {rows,
                                              activations_.phi(0),
                                              output_cotangent(),
                                              data.dy,
                                              order,
                                              weighted_ ? weights_.data() : nullptr,
                                              data.dy_weight * static_cast<double>(scale_)};
    choose_parts(static_cast<double>(4 * rows * (1 + net_->outputs())));
    return value + sobolev_->sweep(batch, own, parts_);
}

template <class T>
void Step<T>::clip_examples(Index begin, Index end) const {
    chainrule::clip_examples(*net_, activations_, begin, end, weighted_ ? weights_.data() : nullptr,
                             static_cast<double>(scale_), clip_example_norm_);
}

// ---- phase 2 --------------------------------------------------------------------------------------------------------

// f(tile, its number, its thread's scratch) for every tile.
template <class T>
template <class F>
void Step<T>::over_tiles(F f) {
    tiles_.over(parts_, f);
}

template <class T>
void Step<T>::differentiate(const Tile& tile, Scratch& scratch, T* gradient) const {
    if (tile.kind == Tile::Kind::external) return;  // it wrote its gradient itself
    if (sobolev_) return sobolev_->differentiate(tiles_, tile, scratch, gradient);
    tiles_.differentiate(tile, rows_, activations_.phi(tile.layer), activations_.dphi(tile.layer + 1), scratch,
                         gradient);
}

template <class T>
double Step<T>::regularize(const Tile& tile, T* gradient, const Regularization& r) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(tile.layer)];
    double penalty = 0;
    if ((r.l1 != 0 || r.l2 != 0) && tile.kind != Tile::Kind::external) {
        // Of a wide layer the weights, not the bias below them; a narrow layer's bias has a tile of its own.
        const Index rows =
            tile.kind == Tile::Kind::narrow ? tile.count : std::min(tile.count, layer.inputs - tile.first);
        penalty = static_cast<double>(k.penalize(rows * tile.width, net_->theta() + tile.place, gradient,
                                                 static_cast<T>(r.l1), static_cast<T>(r.l2)));
    }
    if (r.clip_value != 0) k.clip(tile.size(), gradient, static_cast<T>(r.clip_value));
    return penalty;
}

template <class T>
void Step<T>::apply(const Tile& tile, const T* gradient, T scale, Optimizer<T>& optimizer,
                    const Hyper<T>& hyper) const {
    const Kernels<T>& k = kernels<T>();
    const Layer<T>& layer = net_->layers()[static_cast<std::size_t>(tile.layer)];
    T* slots[kSlots];
    for (int s = 0; s < kSlots; ++s)
        slots[s] = optimizer.slots[s].size() > 0 ? optimizer.slots[s].data() + tile.place : nullptr;
    k.optimize[static_cast<int>(optimizer.settings.rule)](tile.size(), net_->theta() + tile.place, gradient, scale,
                                                          slots, hyper);
    if (tile.kind == Tile::Kind::wide && !layer.narrow()) net_->copy_tile(layer, tile.first, tile.count, tile.column);
}

template <class T>
Array<T>& Step<T>::stored_gradient() {
    if (gradient_.size() < net_->size()) gradient_ = Array<T>(net_->size());
    return gradient_;
}

template <class T>
const T* Step<T>::gradient() {
    T* flat = stored_gradient().data();
    over_tiles(
        [&](const Tile& tile, std::size_t, Scratch& scratch) { differentiate(tile, scratch, flat + tile.place); });
    return flat;
}

// Tried: fetching a tile's weights and moments into the second cache before its product, for the rule that follows.
// 784-256-128-10 took two threads 697 to 757 µs a step instead of 672.
template <class T>
double Step<T>::update(Optimizer<T>& optimizer, double lr, const Regularization& r) {
    const Hyper<T> hyper = prepare_step<T>(optimizer.settings, lr, optimizer.step_count + 1);
    // Before, for what was computed by the weights so far; and when it is over, for who copies them meanwhile in another thread.
    const struct Change {
        explicit Change(Network<T>& network) : net(network) { net.count_change(); }
        ~Change() { net.count_change(); }
        Network<T>& net;
    } change(*net_);
    const auto penalty = [&] { return std::accumulate(penalties_.begin(), penalties_.end(), 0.0); };
    if (r.clip_norm == 0 && !net_->has_external() && !sobolev_) {
        over_tiles([&](const Tile& tile, std::size_t n, Scratch& scratch) {
            tiles_.differentiate(tile, rows_, activations_.phi(tile.layer), activations_.dphi(tile.layer + 1), scratch,
                                 scratch.tile);
            penalties_[n] = regularize(tile, scratch.tile, r);
            apply(tile, scratch.tile, T{1}, optimizer, hyper);
        });
        return penalty();
    }
    T* flat = stored_gradient().data();
    over_tiles([&](const Tile& tile, std::size_t n, Scratch& scratch) {
        T* gradient = flat + tile.place;
        differentiate(tile, scratch, gradient);
        penalties_[n] = regularize(tile, gradient, r);
        if (r.clip_norm != 0) squares_[n] = static_cast<double>(kernels<T>().sum_of_squares(tile.size(), gradient));
    });
    double scale = 1;
    if (r.clip_norm != 0) {
        const double norm = std::sqrt(std::accumulate(squares_.begin(), squares_.end(), 0.0));
        scale = std::min(1.0, r.clip_norm / (norm + 1e-6));  // PyTorch's clip_grad_norm_
    }
    over_tiles([&](const Tile& tile, std::size_t, Scratch&) {
        apply(tile, flat + tile.place, static_cast<T>(scale), optimizer, hyper);
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
        Interruptible::look_up();
        const Dataset<T> part = slice(data, net, first, std::min(piece, data.rows - first));
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
      step_(net, loss, std::min(options.batch_size, data.rows), data.target_cols,
            {data.dy != nullptr, options.clip_example_norm}),
      order_(options.shuffle ? data.rows : 0) {
    for (const Array<T>& slot : optimizer.slots)
        if (slot.size() > 0 && slot.size() != net.size())
            throw std::invalid_argument("[fit] the optimizer's state must be of this network: expected " +
                                        std::to_string(net.size()) + " numbers, got " + std::to_string(slot.size()));
}

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
    if (data_.dy != nullptr || options_.clip_example_norm != 0)
        throw std::invalid_argument("[step] slopes and clipped examples are for fit: expected run, got step");
    if (batch.rows > step_.capacity()) step_ = Step<T>(net_, loss_, batch.rows, batch.target_cols);
    return one_step(batch, nullptr, batch.rows, lr);
}

template <class T>
std::vector<double> Trainer<T>::run(Index first_epoch, Index epochs, const double* lr, Index lr_stride) {
    // Looking at the clock costs 25 ns, a step of the smallest networks 2 µs: look every few steps there.
    const double multiplies =
        3 * net_.multiplies_per_row() * static_cast<double>(std::min(options_.batch_size, data_.rows));
    const Index look = net_.has_external() || loss_.external ? 1 : 1 + static_cast<Index>(1e6 / (multiplies + 1e4));
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
            Interruptible::look_up();
        }
        losses.push_back(loss_.mean && weight > 0 ? total / weight : total);
        if (!std::isfinite(total)) break;
    }
    return losses;
}

template <class T>
double Trainer<T>::run_batch(Index first, Index rows, double lr) {
    if (options_.shuffle) return one_step(data_, order_.data() + first, rows, lr);
    return one_step(slice(data_, net_, first, rows), nullptr, rows, lr);
}

#define CHAINRULE_INSTANTIATE(T) \
    template class Optimizer<T>; \
    template class Step<T>;      \
    template class Trainer<T>;   \
    template double evaluate<T>(Network<T>&, const Loss<T>&, const Dataset<T>&);
CHAINRULE_INSTANTIATE(float)
CHAINRULE_INSTANTIATE(double)

}  // namespace chainrule
