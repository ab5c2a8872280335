// SPDX-License-Identifier: MIT
// L3: one training step on a device, enqueued: forward, loss, all dX on one stream; each dW, with its update, on a second one
// beside the dX of the layer below. What changes from step to step is read on the device, so that a step can be a graph.
#pragma once

#include <cmath>
#include <optional>

#include "sobolev.cuh"

namespace chainrule {
namespace cuda {

// ---- data -----------------------------------------------------------------------------------------------------------

// A data set on the device: the caller's arrays where they lie there, else copies.
template <class T>
class Resident {
   public:
    void take(const Network<T>& net, const Dataset<T>& data, cudaStream_t stream) {
        const int device = net.device();
        source_.x = take(device, data.x, data.rows * net.inputs(), x_, stream);
        source_.labels = take(device, data.labels, data.rows, labels_, stream);
        source_.y = take(device, data.y, data.rows * data.target_cols, y_, stream);
        source_.target_cols = data.target_cols;
        source_.weight = take(device, data.weight, data.rows, weight_, stream);
        source_.dy_weight = data.dy_weight;
        source_.dy = take(device, data.dy, data.rows * net.outputs() * net.inputs(), dy_, stream);
    }
    const Source<T>& source() const { return source_; }

   private:
    template <class N>
    static const N* take(int device, const N* from, Index size, Buffer<N>& buffer, cudaStream_t stream) {
        if (from == nullptr || device_of(from) == device) return from;
        buffer.grow(device, std::max<Index>(size, 1), "a data set");
        upload(buffer.data(), from, size, stream);
        return buffer.data();
    }
    Source<T> source_;
    Buffer<T> x_, y_, weight_, dy_;
    Buffer<std::int64_t> labels_;
};

// Rows [first, …) of a data set.
template <class T>
Source<T> slice(Source<T> data, const Network<T>& net, Index first) {
    data.x += first * net.inputs();
    if (data.labels) data.labels += first;
    if (data.y) data.y += first * data.target_cols;
    if (data.weight) data.weight += first;
    if (data.dy) data.dy += first * net.outputs() * net.inputs();
    return data;
}

// Rows that go through all layers before the next ones come, so that so many kinds of them stay within 256 MB or so.
template <class T>
Index rows_at_once(const Network<T>& net, Index matrices) {
    Index widest = net.inputs();
    for (const Layer<T>& g : net.layers()) widest = std::max(widest, g.outputs);
    const Index row = matrices * (net.depth() + 1) * widest * static_cast<Index>(sizeof(T));
    return std::clamp<Index>((Index{256} << 20) / row, 256, Index{1} << 16);
}

// ---- maps of a step -------------------------------------------------------------------------------------------------

// Up to so many linear layers at once, for what concerns one example's whole gradient.
constexpr int kMostLayers = 32;
template <class T>
struct LinearLayers {
    Operand<T> x[kMostLayers];
    MatrixView<T> c[kMostLayers];
    Index inputs[kMostLayers];
    bool bias[kMostLayers];
    int count;

    explicit LinearLayers(const Network<T>& net, const Tape<T>& tape) : count(0) {
        for (Index l = 0; l < net.depth(); ++l) {
            const Layer<T>& g = tape.layer(l);
            if (g.kind != Layer<T>::Kind::linear) continue;
            if (count == kMostLayers)
                throw std::invalid_argument("[cuda] gradients of single examples: expected at most " +
                                            std::to_string(kMostLayers) + " linear layers, got more");
            x[count] = tape.operand(Tape<T>::primal, l);
            c[count] = tape.at(Tape<T>::cotangent, l + 1);
            inputs[count] = g.inputs;
            bias[count++] = g.bias;
        }
    }
    // |gradient|² of row i: each layer's is the product cᵀ x; see example_clipping.hpp.
    __device__ double square(Index i) const {
        double total = 0;
        for (int l = 0; l < count; ++l)
            total += (bias[l] + square_of_row(inputs[l], x[l].row(i))) *
                     square_of_row(c[l].cols, c[l].data + i * c[l].stride);
        return total;
    }
    // The longest of rows, by which map_rows tells how many threads they pay.
    Index widest() const {
        Index most = 0;
        for (int l = 0; l < count; ++l) most = std::max({most, inputs[l], c[l].cols});
        return most;
    }

    static __device__ double square_of_row(Index cols, const T* row) {
        double sum = 0;
        CHAINRULE_UNROLL(4)
        for (Index j = first_column(); j < cols; j += column_step<T>())
            sum += static_cast<double>(row[j]) * static_cast<double>(row[j]);
        return join_sum(Vec<double>(sum))[0];
    }
};

// Rows of cotangents at linear layers' outputs, so scaled that no example's gradient is longer than it may be; by rows.
template <class T>
struct ClipExamples {
    LinearLayers<T> layers;
    Source<T> data;
    const Control* control;
    double limit;
    __device__ void operator()(Index i) const {
        const double weight = data.weight ? static_cast<double>(data.weight[data.rows(i)]) : 1.0;
        const double norm = ::sqrt(layers.square(i)), most = limit * control->scale * weight;
        if (norm <= most) return;
        const T factor = static_cast<T>(most / norm);
        for (int l = 0; l < layers.count; ++l)
            for (Index j = first_column(); j < layers.c[l].cols; j += column_step<T>()) {
                T& v = layers.c[l].data[i * layers.c[l].stride + j];
                v = v * factor;
            }
    }
};

// ---- the step -------------------------------------------------------------------------------------------------------

template <class T>
struct Step<T>::Work {
    using Kind = typename Tape<T>::Kind;
    using LayerKind = typename Layer<T>::Kind;

    Work(Network<T>& network, const Loss<T>& the_loss, Index rows, const Extras& the_extras, bool training)
        : net(network),
          loss(the_loss),
          extras(the_extras),
          tape(net, training),
          control(net.device(), 1, "a step"),
          partials(net.device(), 2 * kPieces, "a step") {
        make_room(rows);
        if (extras.sobolev) sobolev.emplace(net);
    }
    void shape(Index rows) { tape.shape(0, rows, 1, {Kind::primal, Kind::cotangent}); }
    // For up to so many. What could not be had is not there any more: the next call asks for it again.
    void make_room(Index rows) {
        if (rows <= capacity) return;
        capacity = 0;
        values.grow(net.device(), rows, "the values of a loss");
        shape(rows);
        capacity = rows;
    }

    // For rows that come without a schedule.
    void shape_by_size(Index rows) {
        tape.multiply_by(arithmetic_of(net, rows), !extras.sobolev && extras.clip_example_norm == 0);
        shape(rows);
    }

    void forward(const Source<T>& data, Index rows, const typename Tape<T>::Drawing* drawing);
    void run_loss(const Source<T>& data, Index rows);
    void end(const Source<T>& data, Index rows, Index advance, cudaStream_t stream);
    void sweep(const Source<T>& data, Index rows, bool backward);
    template <class Weigh>
    void down(const typename Tape<T>::Drawing* drawing, Weigh weigh);
    void store_gradient(const Source<T>& data, Index rows, const typename Tape<T>::Drawing* drawing);
    void update_at_once(const Rule<T>& rule, Index rows, const typename Tape<T>::Drawing* drawing);
    void update_stored(const Rule<T>& rule, double clip_norm);
    T* gradient() {
        if (stored.size() < net.size()) {
            stored.grow(net.device(), net.size(), "a gradient");
            clear(stored.data(), net.size(), net.runtime().stream);  // between the layers, where nobody writes
        }
        return stored.data();
    }
    void set_control(const Control& value) {
        beginning = value;  // whoever reads the end has waited for this copy
        upload(control.data(), &beginning, 1, net.runtime().stream);
    }
    Control get_control() {
        Control value;
        download(&value, control.data(), 1, net.runtime().stream);
        net.runtime().stream.wait();
        return value;
    }
    double* partials_on(cudaStream_t stream) const {
        return partials.data() + (stream == net.runtime().side ? kPieces : 0);
    }
    void add_penalties(Index count) {
        cudaStream_t stream = net.runtime().stream;
        sum_over(count, Partials{penalties.data()}, StoreSum{&control.data()->penalty}, partials_on(stream), stream);
    }
    Index penalty_blocks() const {
        Index blocks = 0;
        for (const Layer<T>& g : net.layers())
            if (g.kind == LayerKind::linear) blocks += most_tiles(g.outputs, g.inputs + g.bias);
        return blocks;
    }

    Network<T>& net;
    Loss<T> loss;
    Index capacity = 0;
    Extras extras;
    Tape<T> tape;
    Buffer<T> values, stored;
    Buffer<Control> control;
    Control beginning;
    Buffer<double> partials, penalties;
    std::optional<Sobolev<T>> sobolev;
    Resident<T> batch;  // of calls that bring their own
};

template <class T>
void Step<T>::Work::forward(const Source<T>& data, Index rows, const typename Tape<T>::Drawing* drawing) {
    auto& run = net.runtime();
    run.fork.order(run.stream, run.side);
    const BatchWeight<T> weight = {data, rows};
    sum_over(weight.terms(), weight, SetScale<T>{control.data(), loss.mean}, partials_on(run.side), run.side);
    tape.begin_step();
    tape.input(data.x, data.rows, run.stream);
    tape.forward(drawing, run.stream);
    run.join.order(run.side, run.stream);
}

template <class T>
void Step<T>::Work::run_loss(const Source<T>& data, Index rows) {
    const Index depth = net.depth();
    map_rows(rows, net.outputs(),
             LossRows<T>{loss.op, static_cast<T>(loss.param), data, tape.at(Kind::primal, depth),
                         tape.at(Kind::cotangent, depth), control.data(), values.data(), tape.packing(depth)},
             net.runtime().stream);
}

template <class T>
void Step<T>::Work::end(const Source<T>& data, Index rows, Index advance, cudaStream_t stream) {
    sum_over(rows, WeightedValue<T>{values.data(), data}, EndStep{control.data(), loss.mean, rows, advance},
             partials_on(stream), stream);
}

// One step's work without the update; its value is the control's.
template <class T>
void Step<T>::Work::sweep(const Source<T>& data, Index rows, bool backward) {
    set_control(Control{});
    shape_by_size(rows);
    forward(data, rows, nullptr);
    run_loss(data, rows);
    if (backward) store_gradient(data, rows, nullptr);
    end(data, rows, 1, net.runtime().stream);
}

// A network's own, for those who ask for single sweeps again and again: memory takes longer to be had than many a sweep.
template <class T>
typename Step<T>::Work& kept_step(Network<T>& net, const Loss<T>& loss, Index rows) {
    using Work = typename Step<T>::Work;
    std::unique_ptr<Work>& kept = net.runtime().step;
    if (!kept) kept = std::make_unique<Work>(net, loss, rows, Extras{}, false);
    kept->loss = loss;
    kept->make_room(rows);
    return *kept;
}

// All cotangents; weigh(l, stream) enqueues what is done with the gradient of layer l, which nobody reads W of any more. The lowest
// layer's has no cotangents to run beside it, but the gradients of the layers above.
template <class T>
template <class Weigh>
void Step<T>::Work::down(const typename Tape<T>::Drawing* drawing, Weigh weigh) {
    auto& run = net.runtime();
    Index lowest = 0;
    while (lowest < net.depth() && tape.layer(lowest).kind != LayerKind::linear) ++lowest;
    tape.cotangents(net.first_cotangent(), drawing, run.stream, [&](Index l) {
        if (l == lowest) return weigh(l, run.stream);
        run.fork.order(run.stream, run.side);
        weigh(l, run.side);
    });
    run.join.order(run.side, run.stream);
}

// ∂L/∂f is there; the whole gradient into `stored`.
template <class T>
void Step<T>::Work::store_gradient(const Source<T>& data, Index rows, const typename Tape<T>::Drawing* drawing) {
    T* flat = gradient();
    if (sobolev)
        return sobolev->sweep(data, data.dy_weight, rows, constant(tape.at(Kind::cotangent, net.depth())),
                              control.data(), flat, net.runtime().stream);
    const auto store = [&](Index l, cudaStream_t stream) {
        tape.gradient(l, rows, tape.operand(Kind::cotangent, l + 1), tape.operand(Kind::primal, l), true,
                      tape.into(l, flat, false), stream);
    };
    if (extras.clip_example_norm == 0) return down(drawing, store);
    down(drawing, [](Index, cudaStream_t) {});
    const LinearLayers<T> layers(net, tape);
    map_rows(rows, layers.widest(), ClipExamples<T>{layers, data, control.data(), extras.clip_example_norm},
             net.runtime().stream);
    tape.begin_step();
    for (Index l = 0; l < net.depth(); ++l)
        if (tape.layer(l).kind == LayerKind::linear) store(l, net.runtime().stream);
}

template <class T>
void Step<T>::Work::update_at_once(const Rule<T>& rule, Index rows, const typename Tape<T>::Drawing* drawing) {
    const Index blocks = penalty_blocks();
    const bool penal = rule.l1 != 0 || rule.l2 != 0;
    if (penal) {
        penalties.grow(net.device(), blocks, "penalties");
        clear(penalties.data(), blocks, net.runtime().stream);
    }
    Index first = 0;
    down(drawing, [&](Index l, cudaStream_t stream) {
        const Layer<T>& g = tape.layer(l);
        tape.gradient(l, rows, tape.operand(Kind::cotangent, l + 1), tape.operand(Kind::primal, l), true,
                      Update<T>{rule, g.offset, static_cast<int>(g.outputs), static_cast<int>(g.inputs),
                                penalties.data() + first},
                      stream);
        first += most_tiles(g.outputs, g.inputs + g.bias);
    });
    if (penal) add_penalties(blocks);
}

// From `stored`: penalties, limits, and the rule in a pass of its own.
template <class T>
void Step<T>::Work::update_stored(const Rule<T>& rule, double clip_norm) {
    cudaStream_t stream = net.runtime().stream;
    T* flat = gradient();
    std::vector<Part> parts;
    for (const Layer<T>& g : net.layers())
        if (g.kind == LayerKind::linear)
            parts.push_back({g.offset, g.outputs * g.inputs, g.outputs * (g.inputs + g.bias)});
    if (rule.l1 != 0 || rule.l2 != 0 || rule.clip_value != 0) {
        penalties.grow(net.device(), static_cast<Index>(parts.size()) * kPieces, "penalties");
        Index pieces = 0;
        for (const Part& part : parts) {
            sum_in_pieces(part.size, Regularize<T>{rule, part, flat}, penalties.data() + pieces, stream);
            pieces += pieces_of(part.size);
        }
        add_penalties(pieces);
    }
    if (clip_norm != 0)
        sum_over(net.size(), Squares<T>{flat}, SetClip{control.data(), clip_norm}, partials_on(stream), stream);
    map_each(net.size(), Apply<T>{rule, flat, control.data()}, stream);
}

}  // namespace cuda
}  // namespace chainrule
