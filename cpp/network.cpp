// SPDX-License-Identifier: MIT
#include "network.hpp"

#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "interrupt.hpp"
#include "random.hpp"

namespace chainrule {

Saves saves_of(Op op) {
    static constexpr Saves saves[] = {
#define CHAINRULE_ELEMENTWISE(name, type, what) Saves::what,
#define CHAINRULE_ROWWISE(name, type, what) Saves::what,
#include "ops/ops.def"
    };
    return saves[static_cast<int>(op)];
}

namespace {

template <class T>
using Kind = typename Layer<T>::Kind;

template <class T>
Saves saves_of(const Layer<T>& layer) {
    switch (layer.kind) {
        case Kind<T>::op: return saves_of(layer.op);
        case Kind<T>::dropout: return Saves::none;
        default: return Saves::input;
    }
}

// May `layer` overwrite its input, which is `previous`' output?
template <class T>
bool works_in_place(const Layer<T>& previous, const Layer<T>& layer) {
    if (saves_of(layer) == Saves::input || previous.kind == Kind<T>::external) return false;
    return saves_of(previous) != Saves::output;
}

template <class T>
MatrixView<T> rows_of(MatrixView<T> view, Index begin, Index end) {
    return {view.data + begin * view.stride, end - begin, view.cols, view.stride};
}

}  // namespace

// ---- activations ----------------------------------------------------------------------------------------------------

template <class T>
Activations<T>::Activations(const std::vector<Layer<T>>& layers, Index rows, bool cotangents) : rows_(rows) {
    const std::size_t depth = layers.size();
    std::vector<Index> begin;  // of each buffer, in elements
    Index total = 0;
    const auto make = [&](Index cols) {
        // One column more for the ones that a linear layer's bias is multiplied by.
        const MatrixView<T> view = {nullptr, rows, cols, padded_stride<T>(cols + 1)};
        begin.push_back(total);
        total += view.stride * rows;
        return view;
    };
    std::vector<std::size_t> phi_buffer(depth + 1), dphi_buffer(depth + 1);
    phi_.push_back(make(layers[0].inputs));
    for (std::size_t l = 0; l < depth; ++l) {
        const bool shares = l > 0 && works_in_place(layers[l - 1], layers[l]);
        phi_.push_back(shares ? phi_[l] : make(layers[l].outputs));
        phi_buffer[l + 1] = shares ? phi_buffer[l] : begin.size() - 1;
    }
    if (cotangents) {
        dphi_.resize(depth + 1);
        dphi_[depth] = make(layers[depth - 1].outputs);
        dphi_buffer[depth] = begin.size() - 1;
        for (std::size_t l = depth; l-- > 0;) {
            const bool shares = layers[l].kind == Kind<T>::op || layers[l].kind == Kind<T>::dropout;
            const bool unused = l == 0 && layers[l].kind == Kind<T>::linear;
            dphi_[l] = shares ? dphi_[l + 1] : (unused ? MatrixView<T>{} : make(layers[l].inputs));
            dphi_buffer[l] = shares ? dphi_buffer[l + 1] : begin.size() - 1;
        }
    }
    for (const Layer<T>& layer : layers)
        if (layer.bfloat16 && pairs_.size() == 0) pairs_ = Array<Pair>(rows * kPairRoom);
    arena_ = Array<T>(total);
    for (std::size_t l = 0; l <= depth; ++l) {
        phi_[l].data = arena_.data() + begin[phi_buffer[l]];
        if (cotangents && dphi_[l].stride > 0) dphi_[l].data = arena_.data() + begin[dphi_buffer[l]];
    }
}

// ---- parameters -----------------------------------------------------------------------------------------------------

template <class T>
Network<T>::Network(std::vector<Layer<T>> layers) : layers_(std::move(layers)) {
    if (layers_.empty()) throw std::invalid_argument("[Network] a network has layers: expected at least 1, got 0");
    Index total = 0, backward_total = 0, forward_pairs = 0, backward_pairs = 0;
    first_cotangent_ = depth();
    for (Index l = 0; l < depth(); ++l) {
        Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
        layer.offset = total;
        const Index first_parameter = static_cast<Index>(parameters_.size());
        if (layer.kind == Kind<T>::linear) {
            const Index inputs = layer.inputs, outputs = layer.outputs;
            parameters_.push_back({l, "weight", {outputs, inputs}, 0, outputs * inputs});
            if (layer.bias) parameters_.push_back({l, "bias", {outputs}, 0, outputs});
            total += layer.narrow() ? outputs * round_up(inputs, kLine<T>) + layer.bias * kLine<T>
                                    : layer.weight_rows() * round_up(outputs, kLine<T>);
            multiplies_ += static_cast<double>(layer.weight_rows()) * static_cast<double>(outputs);
            layer.transposed = l >= first_cotangent_ && !layer.narrow();
            layer.bfloat16 &= !layer.narrow() && std::is_same_v<T, float>;
            Index& copies = layer.bfloat16 ? backward_pairs : backward_total;
            layer.backward_offset = copies;
            if (layer.transposed) copies += (layer.bfloat16 ? (outputs + 1) / 2 : outputs) * round_up(inputs, kLine<T>);
            layer.forward_offset = forward_pairs;
            if (layer.bfloat16) forward_pairs += (inputs + 1) / 2 * round_up(outputs, kLine<T>);
        } else if (layer.kind == Kind<T>::external) {
            has_external_ = true;
            for (const auto& own : layer.external->parameters()) {
                parameters_.push_back({l, own.name, own.shape, total, own.size});
                total += round_up(own.size, kLine<T>);
            }
        }
        layer.size = total - layer.offset;
        if (static_cast<Index>(parameters_.size()) > first_parameter)
            first_cotangent_ = std::min(first_cotangent_, l + 1);
    }
    theta_ = Array<T>(total);
    backward_ = Array<T>(backward_total);
    forward_pairs_ = Array<Pair>(forward_pairs);
    backward_pairs_ = Array<Pair>(backward_pairs);
    for (Index l = 0; l < depth(); ++l) {
        if (layers_[static_cast<std::size_t>(l)].kind != Kind<T>::external) continue;
        std::vector<T*> storage;
        for (const Parameter& parameter : parameters_)
            if (parameter.layer == l) storage.push_back(theta_.data() + parameter.offset);
        layers_[static_cast<std::size_t>(l)].external->bind(storage.data());
    }
}

template <class T>
static void copy_padded(const T* from, Index size, Index padded, T* to) {
    std::fill(std::copy_n(from, size, to), to + padded, T{0});
}

// A linear layer's weights: a narrow layer's master copy is W in panels; a wide one's Wᵀ, with the bias as its last row.

template <class T>
void Network<T>::read(const Parameter& parameter, const T* flat, T* to) const {
    const Layer<T>& layer = layers_[static_cast<std::size_t>(parameter.layer)];
    const T* from = flat + layer.offset;
    const Index inputs = layer.inputs, outputs = layer.outputs;
    const bool bias = parameter.shape.size() == 1;
    if (layer.kind == Kind<T>::external) {
        std::copy_n(flat + parameter.offset, parameter.size, to);
    } else if (layer.narrow()) {
        bias ? void(std::copy_n(flat + layer.bias_offset(), outputs, to)) : from_panels(outputs, inputs, from, to);
    } else {
        over_panels(outputs, kPanel<T>, worth_sharing(parameter.size), [&](Index start, Index columns) {
            const Index width = panel_width<T>(outputs, start);
            const T* panel = from + start * layer.weight_rows();
            if (bias)
                std::copy_n(panel + inputs * width, columns, to + start);
            else
                second_kernels<T>().transpose(inputs, columns, panel, width, to + start * inputs, inputs);
        });
    }
}

// With zeros in the padding: an update may have left NaN there, which would spoil whatever looks at all of θ.
template <class T>
void Network<T>::pack(const Parameter& parameter, const T* from, T* flat) const {
    const Layer<T>& layer = layers_[static_cast<std::size_t>(parameter.layer)];
    T* to = flat + layer.offset;
    const Index inputs = layer.inputs, outputs = layer.outputs;
    const bool bias = parameter.shape.size() == 1;
    if (layer.kind == Kind<T>::external) {
        copy_padded(from, parameter.size, round_up(parameter.size, kLine<T>), flat + parameter.offset);
    } else if (layer.narrow() && bias) {
        copy_padded(from, outputs, kLine<T>, flat + layer.bias_offset());
    } else if (layer.narrow()) {
        std::fill_n(to, outputs * round_up(inputs, kLine<T>), T{0});
        to_panels(outputs, inputs, from, to);
    } else {
        over_panels(outputs, kPanel<T>, worth_sharing(parameter.size), [&](Index start, Index columns) {
            const Index width = panel_width<T>(outputs, start);
            T* panel = to + start * layer.weight_rows();
            if (bias) return copy_padded(from + start, columns, width, panel + inputs * width);
            if (columns < width) std::fill_n(panel, inputs * width, T{0});
            second_kernels<T>().transpose(columns, inputs, from + start * inputs, inputs, panel, width);
        });
    }
}

template <class T>
void Network<T>::write(const Parameter& parameter, const T* from) {
    pack(parameter, from, theta());
    const Layer<T>& layer = layers_[static_cast<std::size_t>(parameter.layer)];
    if (layer.kind == Kind<T>::linear && parameter.shape.size() == 2) copy_weights(layer);
    count_change();
}

template <class T>
void Network<T>::transpose_weights(const Layer<T>& layer, T* backward) const {
    for (Index column = 0; column < layer.outputs; column += kPanel<T>)
        kernels<T>().linear_transpose(layer.inputs, layer.outputs, 0, layer.inputs, column,
                                      theta() + layer.offset + column * layer.weight_rows(),
                                      panel_width<T>(layer.outputs, column), backward);
}

template <class T>
void Network<T>::copy_tile(const Layer<T>& layer, Index first, Index count, Index column) const {
    const T* panel = theta() + layer.offset + column * layer.weight_rows();
    const Index width = panel_width<T>(layer.outputs, column), rows = std::min(count, layer.inputs - first);
    if (layer.transposed && !layer.bfloat16)
        kernels<T>().linear_transpose(layer.inputs, layer.outputs, first, rows, column, panel, width,
                                      backward_.data() + layer.backward_offset);
    if constexpr (std::is_same_v<T, float>)
        if (layer.bfloat16)
            bfloat16_kernels().pack(layer.inputs, layer.outputs, first, rows, column, panel, width,
                                    forward_pairs_.data() + layer.forward_offset,
                                    layer.transposed ? backward_pairs_.data() + layer.backward_offset : nullptr);
}

template <class T>
void Network<T>::copy_weights(const Layer<T>& layer) const {
    for (Index column = 0; column < layer.outputs && !layer.narrow(); column += kPanel<T>)
        copy_tile(layer, 0, layer.inputs, column);
}

template <class T>
Array<T> Network<T>::snapshot() const {
    Array<T> copy(size());
    std::copy_n(theta(), size(), copy.data());
    return copy;
}

template <class T>
void Network<T>::restore(const Array<T>& snapshot) {
    std::copy_n(snapshot.data(), size(), theta());
    for (const Layer<T>& layer : layers_)
        if (layer.kind == Kind<T>::linear) copy_weights(layer);
    count_change();
    publish();
}

template <class T>
bool Network<T>::all_finite() const {
    bool finite = true;
    for (Index i = 0; i < size(); ++i) finite &= theta_[i] - theta_[i] == 0;
    return finite;
}

template <class T>
void Network<T>::publish() {
    for (const Layer<T>& layer : layers_)
        if (layer.kind == Kind<T>::external) layer.external->publish();
}

// ---- the two sweeps -------------------------------------------------------------------------------------------------

template <class T>
void Network<T>::append_ones(const Activations<T>& a, Index l, Index begin, Index end) const {
    if (l >= depth() || !layers_[static_cast<std::size_t>(l)].bias) return;
    const MatrixView<T> x = a.phi(l);
    for (Index i = begin; i < end; ++i) x.data[i * x.stride + x.cols] = T{1};
}

template <class T>
void Network<T>::forward_layer(Index l, MatrixView<T> x, MatrixView<T> y, Pair* pairs) const {
    const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
    if constexpr (std::is_same_v<T, float>)
        if (layer.bfloat16)
            return bfloat16_kernels().forward(x.rows, layer.inputs, layer.outputs, layer.bias, x.data, x.stride,
                                              theta() + layer.offset, forward_pairs_.data() + layer.forward_offset,
                                              y.data, y.stride, pairs);
    switch (layer.kind) {
        case Kind<T>::linear: {
            const auto kernel = layer.narrow() ? kernels<T>().linear_forward_narrow : kernels<T>().linear_forward;
            return kernel(x.rows, layer.inputs, layer.outputs, layer.bias, x.data, x.stride, theta() + layer.offset,
                          y.data, y.stride);
        }
        case Kind<T>::op:
            return kernels<T>().forward[static_cast<int>(layer.op)](x.rows, x.cols, x.data, x.stride, y.data, y.stride,
                                                                    static_cast<T>(layer.param));
        case Kind<T>::external: return layer.external->forward({x.data, x.rows, x.cols, x.stride}, y);
        case Kind<T>::dropout:
            if (x.data != y.data) copy_rows(x.rows, x.cols, x.data, x.stride, y.data, y.stride);
    }
}

template <class T>
void Network<T>::forward(const Activations<T>& a, Index from, Index to, Index begin, Index end, const Noise& noise,
                         bool training) const {
    for (Index l = from; l < to; ++l) {
        const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
        const MatrixView<T> x = rows_of(a.phi(l), begin, end), y = rows_of(a.phi(l + 1), begin, end);
        if (layer.kind == Kind<T>::dropout && noise.active)
            kernels<T>().dropout(x.rows, x.cols, x.data, x.stride, y.data, y.stride, layer.param,
                                 dropout_key(noise.seed, l), noise.step, begin);
        else
            forward_layer(l, x, y, a.pairs(begin));
        if (training) append_ones(a, l + 1, begin, end);
    }
}

// The number of the activation from which an op's derivative is read.
template <class T>
Index Network<T>::saved_by(Index l) const {
    return saves_of(layers_[static_cast<std::size_t>(l)]) == Saves::input ? l : l + 1;
}

template <class T>
void Network<T>::backward_op(Index l, MatrixView<T> dy, MatrixView<T> dx, MatrixView<T> saved) const {
    const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
    kernels<T>().vjp[static_cast<int>(layer.op)](dx.rows, dx.cols, dy.data, dy.stride, saved.data, saved.stride,
                                                 dx.data, dx.stride, static_cast<T>(layer.param));
}

template <class T>
void Network<T>::backward(const Activations<T>& a, Index to, Index from, Index begin, Index end,
                          const Noise& noise) const {
    const Kernels<T>& k = kernels<T>();
    for (Index l = to; l-- > from;) {
        const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
        const MatrixView<T> dy = rows_of(a.dphi(l + 1), begin, end), dx = rows_of(a.dphi(l), begin, end);
        if (layer.bfloat16) {
            if constexpr (std::is_same_v<T, float>)
                bfloat16_kernels().vjp_input(dx.rows, layer.inputs, layer.outputs, dy.data, dy.stride,
                                             backward_pairs_.data() + layer.backward_offset, dx.data, dx.stride,
                                             a.pairs(begin));
        } else if (layer.kind == Kind<T>::linear) {
            k.linear_vjp_input(dx.rows, layer.inputs, layer.outputs, dy.data, dy.stride, backward_weights(layer),
                               dx.data, dx.stride, false);
        } else if (layer.kind == Kind<T>::op) {
            backward_op(l, dy, dx, rows_of(a.phi(saved_by(l)), begin, end));
        } else if (noise.active) {
            k.dropout(dx.rows, dx.cols, dy.data, dy.stride, dx.data, dx.stride, layer.param, dropout_key(noise.seed, l),
                      noise.step, begin);
        }
    }
}

// ---- whole batches --------------------------------------------------------------------------------------------------

constexpr double kLeastPart = 3e5;  // multiplications

// A core does 1e6 multiplications in 17 µs. See pool.hpp for what handing work over costs. Dearer is that what one phase wrote
// the next one reads on the other core: 1.6 ns a cache line, and as much again to write it anew. 8-64-64-1 at batch 32 took 11.9
// µs on two threads and 11.3 on one; prefetching the lines, for reading or for writing, changed nothing.
// Work grows faster than the data that it hands over: with the power 3/2 where all sizes grow, but not at all where there
// are more layers. On cores three times as far apart two threads pay from 100 times the work: 128-128-128-128 at batch 128
// took 460 µs instead of 350, 256-256-256-10 at batch 64 535 instead of 470, 784-256-128-10 1100 instead of 1240.
int parts_worth(double multiplies, int threads, double distance) {
    const double least_part = kLeastPart * std::pow(std::max(distance, 1.0), 4);
    return static_cast<int>(std::clamp(multiplies / least_part, 1.0, static_cast<double>(threads)));
}

int parts_for(double multiplies) {
    constexpr double least_to_wake_for = 1e6;
    if (multiplies < 2 * kLeastPart || (multiplies < least_to_wake_for && !workers_awake())) return 1;
    return parts_worth(multiplies, thread_count(), core_distance());
}

void over_panels(Index columns, Index panel, bool shared, const Ranges& f) {
    const Index panels = (columns + panel - 1) / panel;
    parallel(shared ? static_cast<int>(std::min<Index>(thread_count(), panels)) : 1, [&](int part, int parts) {
        for (Index p = panels * part / parts; p < panels * (part + 1) / parts; ++p)
            f(p * panel, std::min(panel, columns - p * panel));
    });
}

template <class T>
void Network<T>::forward_all(const Activations<T>& a, Index rows, int most_parts, const Noise& noise,
                             bool training) const {
    for (Index l = 0; l < depth();) {
        const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
        if (layer.kind == Kind<T>::external) {
            const MatrixView<T> x = a.phi(l), y = a.phi(l + 1);
            layer.external->forward({x.data, rows, x.cols, x.stride}, {y.data, rows, y.cols, y.stride});
            if (training) append_ones(a, l + 1, 0, rows);
            ++l;
            continue;
        }
        const Index next = next_external(l);
        over_rows(rows, most_parts, [&](Index begin, Index end) { forward(a, l, next, begin, end, noise, training); });
        l = next;
    }
}

template <class T>
void Network<T>::backward_all(const Activations<T>& a, Index rows, int most_parts, const Noise& noise,
                              T* gradient) const {
    Index l = depth();
    while (l > 0 && l >= first_cotangent_) {
        const Layer<T>& layer = layers_[static_cast<std::size_t>(l - 1)];
        if (layer.kind == Kind<T>::external) {
            const MatrixView<T> x = a.phi(l - 1), y = a.phi(l), dy = a.dphi(l), dx = a.dphi(l - 1);
            std::vector<T*> gradients;
            for (const Parameter& parameter : parameters_)
                if (parameter.layer == l - 1) gradients.push_back(gradient + parameter.offset);
            layer.external->vjp({x.data, rows, x.cols, x.stride}, {y.data, rows, y.cols, y.stride},
                                {dy.data, rows, dy.cols, dy.stride}, {dx.data, rows, dx.cols, dx.stride},
                                gradients.data());
            --l;
            continue;
        }
        Index from = l - 1;
        while (from > first_cotangent_ && layers_[static_cast<std::size_t>(from - 1)].kind != Kind<T>::external) --from;
        if (from < first_cotangent_) return;
        over_rows(rows, most_parts, [&](Index begin, Index end) { backward(a, l, from, begin, end, noise); });
        l = from;
    }
}

template <class T>
Index Network<T>::next_external(Index layer) const {
    while (layer < depth() && layers_[static_cast<std::size_t>(layer)].kind != Kind<T>::external) ++layer;
    return layer;
}

// Activations for so many rows: the network's own if they are few and nobody else has them, else new ones.
template <class T>
class Network<T>::Scratch {
   public:
    Scratch(const Network& net, Index rows)
        : net_(net),
          rows_(rows),
          borrowed_(rows <= kFewRows && !net.scratch_taken_.exchange(true, std::memory_order_acquire)) {}
    ~Scratch() {
        if (borrowed_) net_.scratch_taken_.store(false, std::memory_order_release);
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    const Activations<T>& activations() {
        Activations<T>& a = borrowed_ ? net_.scratch_ : own_;
        if (a.rows() < rows_) a = Activations<T>(net_.layers_, rows_, false);
        return a;
    }

   private:
    static constexpr Index kFewRows = 64;
    const Network& net_;
    const Index rows_;
    const bool borrowed_;
    Activations<T> own_;
};

template <class T>
void Network<T>::predict_blocks(const Activations<T>& a, Index first, Index end, const T* x, T* f) const {
    const MatrixView<T> in = a.phi(0), out = a.phi(depth());
    for (; first < end; first += kBlockRows) {
        const Index block = std::min(end - first, kBlockRows);
        copy_rows(block, inputs(), x + first * inputs(), inputs(), in.data, in.stride);
        forward(a, 0, depth(), 0, block, Noise{}, false);
        copy_rows(block, outputs(), out.data, out.stride, f + first * outputs(), outputs());
    }
}

template <class T>
void Network<T>::predict(Index rows, const T* x, T* f) const {
    if (rows == 0) return;
    const int most_parts = parts_for(multiplies_ * static_cast<double>(rows));
    if (has_external_) {
        const Activations<T> a(layers_, rows, false);
        const MatrixView<T> in = a.phi(0), out = a.phi(depth());
        copy_rows(rows, inputs(), x, inputs(), in.data, in.stride);
        forward_all(a, rows, most_parts, Noise{}, false);
        return copy_rows(rows, outputs(), out.data, out.stride, f, outputs());
    }
    const Index piece = std::max(kBlockRows, static_cast<Index>(4e9 / (multiplies_ + 1)));  // of some 50 ms
    if (rows > piece) {
        for (Index first = 0; first < rows; first += piece) {
            Interruptible::look_up();
            predict(std::min(piece, rows - first), x + first * inputs(), f + first * outputs());
        }
        return;
    }
    const int parts = static_cast<int>(std::min<Index>(most_parts, rows));
    if (parts == 1) {
        Scratch scratch(*this, std::min(rows, kBlockRows));
        return predict_blocks(scratch.activations(), 0, rows, x, f);
    }
    std::vector<Activations<T>> scratch;  // made here: a worker has nobody to tell that memory ran out
    for (int part = 0; part < parts; ++part) scratch.emplace_back(layers_, std::min(rows, kBlockRows), false);
    parallel(parts, [&](int part, int count) {
        predict_blocks(scratch[static_cast<std::size_t>(part)], rows * part / count, rows * (part + 1) / count, x, f);
    });
}

// Each output in a matrix of its own: nothing works in place here.
template <class T>
void Network<T>::trace(Index rows, const T* x, T* const* phi) const {
    const auto room_for = [&](Index cols) { return Array<T>((rows + 1) * padded_stride<T>(cols)); };
    Array<T> memory = room_for(inputs());
    MatrixView<T> in = {memory.data(), rows, inputs(), padded_stride<T>(inputs())};
    copy_rows(rows, in.cols, x, in.cols, in.data, in.stride);
    for (Index l = 0; l < depth(); ++l) {
        const Layer<T>& layer = layers_[static_cast<std::size_t>(l)];
        Array<T> next = room_for(layer.outputs);
        const MatrixView<T> out = {next.data(), rows, layer.outputs, padded_stride<T>(layer.outputs)};
        const Array<Pair> pairs(layer.bfloat16 ? rows * kPairRoom : 0);
        forward_layer(l, in, out, pairs.data());
        copy_rows(rows, out.cols, out.data, out.stride, phi[l], out.cols);
        memory = std::move(next);
        in = out;
    }
}

template class Network<float>;
template class Network<double>;
template class Activations<float>;
template class Activations<double>;

}  // namespace chainrule
