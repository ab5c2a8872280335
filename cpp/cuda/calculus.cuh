// SPDX-License-Identifier: MIT
// L3: every derivative of a whole network on a device; see calculus.hpp, whose sweeps these are.
#pragma once

#include "step.cuh"

namespace chainrule {
namespace cuda {

// ---- what becomes of rows of derivatives ------------------------------------------------------------------------------

// Columns of Jacobians, which lie in rows of tangents, to their places: element (n, o, i) from row n * inputs + i.
template <class T>
struct PlaceColumns {
    T* to;
    MatrixView<const T> from;
    Index inputs;
    __device__ void operator()(Index r, Index o) const {
        to[(r / inputs * from.cols + o) * inputs + r % inputs] = from.data[r * from.stride + o];
    }
};
// The sum of an example's `seeds` rows.
template <class T>
struct SumSeeds {
    T* to;
    MatrixView<const T> from;
    Index seeds;
    __device__ void operator()(Index n, Index o) const {
        T sum = 0;
        for (Index i = 0; i < seeds; ++i) sum = sum + from.data[(n * seeds + i) * from.stride + o];
        to[n * from.cols + o] = sum;
    }
};
// cᵀ x of single rows, from row `first` on; without x, c.
template <class T>
struct OuterProducts {
    T* to;
    MatrixView<const T> c;
    Operand<T> x;
    Index first, inputs, seeds;
    __device__ void operator()(Index r, Index place) const {
        const Index row = first + r;
        const T factor = x.data ? x.at(static_cast<int>(row / seeds), static_cast<int>(place % inputs)) : T{1};
        to[r * c.cols * inputs + place] = c.data[row * c.stride + place / inputs] * factor;
    }
};
template <class T>
struct ExampleNorms {
    LinearLayers<T> layers;
    T* norms;
    __device__ void operator()(Index i) const {
        const double square = layers.square(i);
        if (first_column() == 0) norms[i] = static_cast<T>(::sqrt(square));
    }
};

// ---- directions -----------------------------------------------------------------------------------------------------

template <class T>
void Direction<T>::prepare() {
    if (theta_.size() >= net_.size()) return;
    theta_.grow(net_.device(), net_.size(), "a direction");
}
template <class T>
void Direction<T>::clear() {
    const OnDevice here(net_.device());
    const auto held = net_.runtime().hold();
    prepare();
    cuda::clear(theta_.data(), net_.size(), net_.runtime().stream);
}
template <class T>
void Direction<T>::set(const Parameter& parameter, const T* from) {
    const OnDevice here(net_.device());
    const auto held = net_.runtime().hold();
    prepare();
    upload(theta_.data() + parameter.offset, from, parameter.size, net_.runtime().stream);
    net_.runtime().stream.wait();
}

// ---- the sweeps -----------------------------------------------------------------------------------------------------

template <class T>
struct Derivatives<T>::Work {
    using Kind = typename Tape<T>::Kind;
    explicit Work(Network<T>& network)
        : net(network),
          tape(net, false),
          control(net.device(), 1, "a loss"),
          partials(net.device(), kPieces, "a loss") {}

    // f(first, rows) for pieces of whole examples, `seeds` rows of derivatives each, in so many kinds of matrices.
    template <class F>
    void by_pieces(Index examples, Index seeds, Index matrices, F f) {
        const OnDevice here(net.device());
        const auto held = net.runtime().hold();
        const Index piece = std::max<Index>(1, rows_at_once(net, matrices) / seeds);
        for (Index first = 0; first < examples; first += piece) f(first, std::min(piece, examples - first));
        net.runtime().stream.wait();
    }
    cudaStream_t stream() const { return net.runtime().stream; }
    void start(Index first, Index rows, Index seeds, std::initializer_list<Kind> kinds, const T* x) {
        tape.shape(0, rows * seeds, seeds, kinds);
        tape.load(Kind::primal, 0, x + first * net.inputs(), stream());
        tape.forward(nullptr, stream());
    }
    T* gradient(bool zero = false) {
        const OnDevice here(net.device());
        const auto held = net.runtime().hold();
        zero = zero || flat.size() < net.size();
        flat.grow(net.device(), net.size(), "a gradient");
        if (zero) cuda::clear(flat.data(), net.size(), stream());
        return flat.data();
    }
    // That gradient, once the stream has made it: to[k] is parameter k's.
    void leave_gradient(T* const* to) const {
        const OnDevice here(net.device());
        const auto held = net.runtime().hold();
        leave(flat.data(), to);
    }
    void leave(const T* gradient, T* const* to) const {
        for (std::size_t k = 0; k < net.parameters().size(); ++k) {
            const Parameter& part = net.parameters()[k];
            download(to[k], gradient + part.offset, part.size, stream());
        }
        net.runtime().stream.wait();
    }
    T* room(Index size) {
        if (out.size() < size) net.runtime().stream.wait();  // for what fills and reads the smaller one
        out.grow(net.device(), size, "derivatives");
        return out.data();
    }
    template <class F>
    void of_loss(const Dataset<T>& dataset, const Loss<T>& loss, std::initializer_list<Kind> kinds, F f);
    void loss_gradient(const LossRows<T>& rows) { map_rows(rows.f.rows, rows.f.cols, rows, stream()); }
    void outer_products(Index first, T* const* to);

    Network<T>& net;
    Tape<T> tape;
    Buffer<Control> control;
    Buffer<double> partials;
    Buffer<T> flat, out, values;
    Resident<T> data;
};

// f(first, rows, the loss of those rows) with φ up to date, for pieces of a data set.
template <class T>
template <class F>
void Derivatives<T>::Work::of_loss(const Dataset<T>& dataset, const Loss<T>& loss, std::initializer_list<Kind> kinds,
                                   F f) {
    bool begun = false;
    by_pieces(dataset.rows, 1, static_cast<Index>(kinds.size()), [&](Index first, Index rows) {
        if (!begun) {
            data.take(net, dataset, stream());
            const BatchWeight<T> weight = {data.source(), dataset.rows};
            sum_over(weight.terms(), weight, SetScale<T>{control.data(), loss.mean}, partials.data(), stream());
            begun = true;
        }
        values.grow(net.device(), rows, "the values of a loss");
        const Source<T> source = slice(data.source(), net, first);
        tape.shape(0, rows, 1, kinds);
        tape.load(Kind::primal, 0, source.x, stream());
        tape.forward(nullptr, stream());
        f(first, rows,
          LossRows<T>{loss.op, static_cast<T>(loss.param), source, tape.at(Kind::primal, net.depth()),
                      tape.at(Kind::cotangent, net.depth()), control.data(), values.data()});
    });
}

// The gradients of the tape's rows, one by one, from row `first` of what was asked for; as many at a time as fit.
template <class T>
void Derivatives<T>::Work::outer_products(Index first, T* const* to) {
    constexpr Index most = Index{1} << 24;
    for (std::size_t k = 0; k < net.parameters().size(); ++k) {
        const Parameter& parameter = net.parameters()[k];
        const bool bias = parameter.shape.size() == 1;
        const Index l = parameter.layer, piece = std::max<Index>(1, most / parameter.size);
        for (Index row = 0; row < tape.rows(); row += piece) {
            const Index rows = std::min(piece, tape.rows() - row);
            T* memory = room(rows * parameter.size);
            map_elements(rows, parameter.size,
                         OuterProducts<T>{memory, constant(tape.at(Kind::cotangent, l + 1)),
                                          bias ? Operand<T>{nullptr, 0} : tape.operand(Kind::primal, l), row,
                                          bias ? 1 : tape.layer(l).inputs, tape.seeds()},
                         stream());
            download(to[k] + (first + row) * parameter.size, memory, rows * parameter.size, stream());
        }
    }
}

template <class T>
Derivatives<T>::Derivatives(Network<T>& net) : direction_(net) {
    const OnDevice here(net.device());
    work_ = std::make_unique<Work>(net);
}
template <class T>
Derivatives<T>::~Derivatives() = default;

// ---- functions of X -------------------------------------------------------------------------------------------------

template <class T>
void Derivatives<T>::jvp(Index rows, const T* x, const T* dx, bool along_parameters, T* f, T* df) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index depth = w.net.depth(), moving = dx ? 0 : w.net.first_cotangent();
    w.by_pieces(rows, 1, 2, [&](Index first, Index count) {
        w.start(first, count, 1, {Kind::primal, Kind::tangent}, x);
        if (dx) w.tape.load(Kind::tangent, 0, dx + first * w.net.inputs(), w.stream());
        w.tape.tangents(moving, along_parameters ? direction_.data() : nullptr, w.stream());
        w.tape.store(Kind::primal, depth, f + first * w.net.outputs(), w.stream());
        w.tape.store(Kind::tangent, depth, df + first * w.net.outputs(), w.stream());
    });
}

template <class T>
void Derivatives<T>::sensitivity(Index rows, const T* x, Index input, T* f, T* df) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    w.by_pieces(rows, 1, 2, [&](Index first, Index count) {
        w.start(first, count, 1, {Kind::primal, Kind::tangent}, x);
        w.tape.tangents_along(input, w.stream());
        w.tape.store(Kind::primal, w.net.depth(), f + first * w.net.outputs(), w.stream());
        w.tape.store(Kind::tangent, w.net.depth(), df + first * w.net.outputs(), w.stream());
    });
}

template <class T>
void Derivatives<T>::vjp(Index rows, const T* x, const T* c, T* f, T* const* dphi, T* const* parameters) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index depth = w.net.depth(), to = dphi[0] ? 0 : w.net.first_cotangent();
    T* flat = parameters ? w.gradient(rows == 0) : nullptr;
    w.tape.keep_all(std::any_of(dphi + 1, dphi + depth + 1, [](const T* wanted) { return wanted != nullptr; }));
    w.by_pieces(rows, 1, 2, [&](Index first, Index count) {
        w.start(first, count, 1, {Kind::primal, Kind::cotangent}, x);
        w.tape.load(Kind::cotangent, depth, c + first * w.net.outputs(), w.stream());
        w.tape.cotangents(to, w.stream());
        if (f) w.tape.store(Kind::primal, depth, f + first * w.net.outputs(), w.stream());
        for (Index l = 0; l <= depth; ++l)
            if (dphi[l])
                w.tape.store(Kind::cotangent, l, dphi[l] + first * w.tape.at(Kind::cotangent, l).cols, w.stream());
        if (parameters) w.tape.gradients(Kind::cotangent, depth, flat, first > 0, w.stream());
    });
    w.tape.keep_all(false);
    if (parameters) w.leave_gradient(parameters);
}

template <class T>
void Derivatives<T>::jacobian(Index rows, const T* x, bool reverse, T* j) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index inputs = w.net.inputs(), outputs = w.net.outputs(), seeds = reverse ? outputs : inputs;
    const Kind kind = reverse ? Kind::cotangent : Kind::tangent;
    w.by_pieces(rows, seeds, 2, [&](Index first, Index count) {
        w.start(first, count, seeds, {Kind::primal, kind}, x);
        w.tape.seed(kind, reverse ? w.net.depth() : 0, w.stream());
        if (reverse) {
            w.tape.cotangents(0, w.stream());
            return w.tape.store(kind, 0, j + first * outputs * inputs, w.stream());
        }
        w.tape.tangents(0, nullptr, w.stream());
        T* memory = w.room(count * outputs * inputs);
        map_elements(count * inputs, outputs, PlaceColumns<T>{memory, constant(w.tape.at(kind, w.net.depth())), inputs},
                     w.stream());
        download(j + first * outputs * inputs, memory, count * outputs * inputs, w.stream());
    });
}

template <class T>
void Derivatives<T>::parameter_jacobian(Index rows, const T* x, T* const* j) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index seeds = w.net.outputs();
    w.by_pieces(rows, seeds, 2, [&](Index first, Index count) {
        w.start(first, count, seeds, {Kind::primal, Kind::cotangent}, x);
        w.tape.seed(Kind::cotangent, w.net.depth(), w.stream());
        w.tape.cotangents(w.net.first_cotangent(), w.stream());
        w.outer_products(first * seeds, j);
    });
}

template <class T>
void Derivatives<T>::second(Index rows, const T* x, bool sum, T* to) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index inputs = w.net.inputs(), outputs = w.net.outputs(), size = outputs * (sum ? 1 : inputs);
    w.by_pieces(rows, inputs, 3, [&](Index first, Index count) {
        w.start(first, count, inputs, {Kind::primal, Kind::tangent, Kind::second_tangent}, x);
        w.tape.seed(Kind::tangent, 0, w.stream());
        w.tape.tangents(0, nullptr, w.stream());
        w.tape.second_tangents(w.stream());
        const MatrixView<const T> ddf = constant(w.tape.at(Kind::second_tangent, w.net.depth()));
        T* memory = w.room(count * size);
        if (sum)
            map_elements(count, outputs, SumSeeds<T>{memory, ddf, inputs}, w.stream());
        else
            map_elements(count * inputs, outputs, PlaceColumns<T>{memory, ddf, inputs}, w.stream());
        download(to + first * size, memory, count * size, w.stream());
    });
}

// ---- functions of a loss --------------------------------------------------------------------------------------------

template <class T>
void Derivatives<T>::input_gradient(const Dataset<T>& data, const Loss<T>& loss, T* dx) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    w.of_loss(data, loss, {Kind::primal, Kind::cotangent}, [&](Index first, Index, const LossRows<T>& rows) {
        w.loss_gradient(rows);
        w.tape.cotangents(0, w.stream());
        w.tape.store(Kind::cotangent, 0, dx + first * w.net.inputs(), w.stream());
    });
}

template <class T>
double Derivatives<T>::gradient(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    Network<T>& net = work_->net;
    const OnDevice here(net.device());
    const auto held = net.runtime().hold();
    auto& step = kept_step(net, loss, data.rows);
    step.batch.take(net, data, net.runtime().stream);
    step.sweep(step.batch.source(), data.rows, true);
    work_->leave(step.gradient(), to);
    return step.get_control().value;
}

template <class T>
void Derivatives<T>::hvp(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index low = w.net.first_cotangent(), depth = w.net.depth();
    T* flat = w.gradient();
    w.of_loss(data, loss, {Kind::primal, Kind::tangent, Kind::cotangent, Kind::cotangent_tangent},
              [&](Index first, Index count, const LossRows<T>& rows) {
                  w.tape.tangents(low, direction_.data(), w.stream());
                  w.loss_gradient(rows);
                  map_rows(count, w.net.outputs(),
                           LossHvp<T>{rows, constant(w.tape.at(Kind::tangent, depth)),
                                      w.tape.at(Kind::cotangent_tangent, depth)},
                           w.stream());
                  w.tape.keep_all(true);  // c at the outputs of ops, which ċ goes through
                  w.tape.cotangents(low, w.stream());
                  w.tape.keep_all(false);
                  w.tape.cotangent_tangents(low, low, direction_.data(), w.stream());
                  w.tape.gradients(Kind::cotangent_tangent, low, flat, first > 0, w.stream());
              });
    w.leave_gradient(to);
}

template <class T>
void Derivatives<T>::gauss_newton(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    const Index low = w.net.first_cotangent(), depth = w.net.depth();
    T* flat = w.gradient();
    w.of_loss(data, loss, {Kind::primal, Kind::tangent, Kind::cotangent},
              [&](Index first, Index count, const LossRows<T>& rows) {
                  w.tape.tangents(low, direction_.data(), w.stream());
                  map_rows(
                      count, w.net.outputs(),
                      LossHvp<T>{rows, constant(w.tape.at(Kind::tangent, depth)), w.tape.at(Kind::cotangent, depth)},
                      w.stream());
                  w.tape.cotangents(low, w.stream());
                  w.tape.gradients(Kind::cotangent, depth, flat, first > 0, w.stream());
              });
    w.leave_gradient(to);
}

template <class T>
void Derivatives<T>::example_gradients(const Dataset<T>& data, const Loss<T>& loss, T* const* to) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    w.of_loss(data, loss, {Kind::primal, Kind::cotangent}, [&](Index first, Index, const LossRows<T>& rows) {
        w.loss_gradient(rows);
        w.tape.cotangents(w.net.first_cotangent(), w.stream());
        w.outer_products(first, to);
    });
}

template <class T>
void Derivatives<T>::example_norms(const Dataset<T>& data, const Loss<T>& loss, T* norms) {
    Work& w = *work_;
    using Kind = typename Work::Kind;
    w.of_loss(data, loss, {Kind::primal, Kind::cotangent}, [&](Index first, Index count, const LossRows<T>& rows) {
        w.loss_gradient(rows);
        w.tape.cotangents(w.net.first_cotangent(), w.stream());
        T* memory = w.room(count);
        const LinearLayers<T> layers(w.net, w.tape);
        map_rows(count, layers.widest(), ExampleNorms<T>{layers, memory}, w.stream());
        download(norms + first, memory, count, w.stream());
    });
}

}  // namespace cuda
}  // namespace chainrule
