// SPDX-License-Identifier: MIT
#include "tape.hpp"

#include "interrupt.hpp"

namespace chainrule {
namespace {

template <class T>
using LayerKind = typename Layer<T>::Kind;

// A linear layer's three products, columns [at, at + count) of the result: panels are layers by themselves.
template <class T>
void affine(const Layer<T>& g, MatrixView<const T> x, const T* master, MatrixView<T> z, Index at, Index count) {
    const auto kernel = g.narrow() ? kernels<T>().linear_forward_narrow : kernels<T>().linear_forward;
    kernel(z.rows, g.inputs, count, g.bias, x.data, x.stride, master + at * g.weight_rows(), z.data + at, z.stride);
}
template <class T>
void linear_jvp(const Layer<T>& g, MatrixView<const T> dx, const T* master, MatrixView<T> dz, Index at, Index count,
                bool add) {
    const auto kernel = g.narrow() ? kernels<T>().linear_jvp_narrow : kernels<T>().linear_jvp;
    kernel(dz.rows, g.inputs, count, g.bias, dx.data, dx.stride, master + at * g.weight_rows(), dz.data + at, dz.stride,
           add);
}
template <class T>
void linear_vjp(const Layer<T>& g, MatrixView<const T> dz, const T* backward, MatrixView<T> dx, Index at, Index count,
                bool add) {
    kernels<T>().linear_vjp_input(dx.rows, count, g.outputs, dz.data, dz.stride, backward + at * g.outputs,
                                  dx.data + at, dx.stride, add);
}

// The φ that a derivative of layer l is read off.
Index saved_at(Op op, Index l) { return saves_of(op) == Saves::input ? l : l + 1; }

template <class T>
MatrixView<const T> constant(MatrixView<T> m) {
    return {m.data, m.rows, m.cols, m.stride};
}

// A column of a linear layer's W (outputs x inputs), out of its master copy; see ops/linear.hpp.
template <class T>
void copy_column(const Layer<T>& layer, const T* master, Index column, T* to) {
    if (layer.narrow()) {
        const Index start = column / kPanel<T> * kPanel<T>, width = panel_width<T>(layer.inputs, start);
        for (Index o = 0; o < layer.outputs; ++o) to[o] = master[start * layer.outputs + o * width + column - start];
        return;
    }
    for (Index start = 0; start < layer.outputs; start += kPanel<T>)
        std::copy_n(master + start * layer.weight_rows() + column * panel_width<T>(layer.outputs, start),
                    std::min(layer.outputs - start, kPanel<T>), to + start);
}

}  // namespace

// ---- directions -----------------------------------------------------------------------------------------------------

template <class T>
Direction<T>::Direction(const Network<T>& net) : net_(net) {
    Index total = 0;
    for (Index l = 0; l < net.depth(); ++l) {
        const Layer<T>& layer = net.layers()[static_cast<std::size_t>(l)];
        places_.push_back(total);
        if (passed(l)) total += layer.outputs * round_up(layer.inputs, kLine<T>);
    }
    places_.push_back(total);
}

template <class T>
bool Direction<T>::passed(Index l) const {
    return l >= net_.first_cotangent() && net_.layers()[static_cast<std::size_t>(l)].kind == LayerKind<T>::linear;
}

template <class T>
void Direction<T>::clear() {
    prepare();
    std::fill_n(theta_.data(), theta_.size(), T{0});
    std::fill_n(backward_.data(), backward_.size(), T{0});
}

// Memory only when somebody asks for a derivative along parameters.
template <class T>
void Direction<T>::prepare() {
    if (theta_.size() < net_.size()) theta_ = Array<T>(net_.size());
    if (backward_.size() < places_.back()) backward_ = Array<T>(places_.back());
}

template <class T>
void Direction<T>::set(const Parameter& parameter, const T* from) {
    prepare();
    net_.pack(parameter, from, theta_.data());
    const Layer<T>& layer = net_.layers()[static_cast<std::size_t>(parameter.layer)];
    if (passed(parameter.layer) && parameter.shape.size() == 2)
        to_panels(layer.outputs, layer.inputs, from,
                  backward_.data() + places_[static_cast<std::size_t>(parameter.layer)]);
}

// ---- the matrices ---------------------------------------------------------------------------------------------------

template <class T>
void Tape<T>::shape(Index first, Index rows, Index seeds, std::initializer_list<Kind> wanted) {
    if (first > 0) Interruptible::look_up();
    Shape next = {first % seeds, rows, seeds};
    for (const Kind kind : wanted) next.wanted |= 1U << kind;
    if (next == shape_) return;  // as in every call of many for one row each
    shape_ = next;
    examples_ = rows == 0 ? 0 : example(rows - 1) + 1;
    Index total = 0;
    const auto each = [&](auto f) {
        for (const Kind kind : wanted)
            for (Index l = 0; l <= net_.depth(); ++l) f(kind, l);
    };
    each([&](Kind kind, Index l) {
        MatrixView<T>& view = views_[place(kind, l)];
        if (l > 0 && layer(l - 1).kind == LayerKind<T>::dropout) {  // the identity here
            view = at(kind, l - 1);
            return;
        }
        // One column more for the ones that a linear layer's bias is multiplied by.
        const Index cols = l == 0 ? net_.inputs() : layer(l - 1).outputs, stride = padded_stride<T>(cols + 1);
        view = {nullptr, kind == primal ? examples_ : rows, cols, stride};
        total += view.rows * stride;
    });
    if (arena_.size() < total) {
        shape_ = Shape{};  // what cannot be had is not there the next time either
        arena_ = Array<T>(total);
        shape_ = next;
    }
    T* place_of_next = arena_.data();
    each([&](Kind kind, Index l) {
        MatrixView<T>& view = views_[place(kind, l)];
        if (l > 0 && layer(l - 1).kind == LayerKind<T>::dropout) {
            view = at(kind, l - 1);
            return;
        }
        view.data = place_of_next;
        place_of_next += view.rows * view.stride;
    });
}

template <class T>
void Tape<T>::load(Kind kind, Index l, Index begin, Index end, const T* from) const {
    const MatrixView<T> to = rows_of(kind, l, begin, end);
    copy_rows(to.rows, to.cols, from + begin * to.cols, to.cols, to.data, to.stride);
}

template <class T>
void Tape<T>::store(Kind kind, Index l, Index begin, Index end, T* to) const {
    const MatrixView<T> from = rows_of(kind, l, begin, end);
    copy_rows(from.rows, from.cols, from.data, from.stride, to + begin * from.cols, from.cols);
}

template <class T>
void Tape<T>::seed(Kind kind, Index l, Index begin, Index end) const {
    const MatrixView<T> to = at(kind, l);
    for (Index i = begin; i < end; ++i) {
        std::fill_n(to.data + i * to.stride, to.cols, T{0});
        to.data[i * to.stride + (shape_.phase + i) % shape_.seeds] = T{1};
    }
}

template <class T>
MatrixView<T> Tape<T>::rows_of(Kind kind, Index l, Index begin, Index end) const {
    const MatrixView<T> all = at(kind, l);
    return {all.data + begin * all.stride, end - begin, all.cols, all.stride};
}

template <class T>
MatrixView<const T> Tape<T>::read(Kind kind, Index l, Index begin, Index end) const {
    return constant(rows_of(kind, l, begin, end));
}

// φˡ for rows of derivatives: one row again and again (its stride is 0) where they share an example.
template <class T>
MatrixView<const T> Tape<T>::saved(Index l, Index begin, Index end) const {
    const MatrixView<T> all = at(primal, l);
    return {all.data + example(begin) * all.stride, end - begin, all.cols, shape_.seeds == 1 ? all.stride : 0};
}

template <class T>
template <class F>
void Tape<T>::by_example(Index begin, Index end, F f) const {
    for (Index next; begin < end; begin = next) {
        next = shape_.seeds == 1 ? end : std::min(end, (example(begin) + 1) * shape_.seeds - shape_.phase);
        f(begin, next);
    }
}

template <class T>
void Tape<T>::by_panels(const Layer<T>& layer, Index rows, Index columns, const Ranges& f) const {
    const Index multiplies = rows * layer.inputs * layer.outputs;
    const bool worth = worth_sharing(multiplies) || parts_for(static_cast<double>(multiplies)) > 1;
    over_panels(columns, kPanel<T>, sharing_ && worth, f);
}

template <class T>
void Tape<T>::append(Kind kind, Index l, Index begin, Index end, T value) const {
    const MatrixView<T> x = at(kind, l);
    if (!layer(l).bias) return;
    for (Index i = begin; i < end; ++i) x.data[i * x.stride + x.cols] = value;
}

template <class T>
const T* Tape<T>::backward_weights(const Layer<T>& layer) const {
    return layer.narrow() || layer.transposed ? net_.backward_weights(layer) : inputs_backward_.data();
}

template <class T>
void Tape<T>::prepare_inputs() {
    const std::uint64_t now = net_.changes();
    for (const Layer<T>& layer : net_.layers()) {
        if (layer.kind != LayerKind<T>::linear || layer.narrow() || layer.transposed) continue;
        const Index size = layer.outputs * round_up(layer.inputs, kLine<T>);
        if (inputs_backward_.size() == size && copied_ == now) return;
        if (inputs_backward_.size() != size) inputs_backward_ = Array<T>(size);
        net_.transpose_weights(layer, inputs_backward_.data());
        copied_ = now;
    }
}

// Where a user's layer writes each of its parameters' part of a buffer laid out like theta.
template <class T>
std::vector<T*> Tape<T>::own_parameters(Index l, const T* flat) const {
    std::vector<T*> places;
    for (const Parameter& parameter : net_.parameters())
        if (parameter.layer == l) places.push_back(const_cast<T*>(flat) + (parameter.offset - layer(l).offset));
    return places;
}

// f(where to write the gradient of layer l's parameters); what it writes is added to `gradient`, if that is given.
template <class T>
template <class F>
void Tape<T>::with_gradients(Index l, T* gradient, F f) const {
    std::vector<T> part(static_cast<std::size_t>(layer(l).size));
    f(own_parameters(l, part.data()).data());
    for (Index i = 0; gradient != nullptr && i < layer(l).size; ++i)
        gradient[layer(l).offset + i] += part[static_cast<std::size_t>(i)];
}

// ---- sweeps up ------------------------------------------------------------------------------------------------------

template <class T>
void Tape<T>::forward(Index begin, Index end) const {
    for (Index l = 0; l < net_.depth(); ++l) lift(l, begin, end);
}

template <class T>
void Tape<T>::lift(Index l, Index begin, Index end) const {
    append(primal, l, begin, end, T{1});
    if (layer(l).kind == LayerKind<T>::linear)
        push_linear(l, begin, end, true, false, nullptr);
    else if (layer(l).kind != LayerKind<T>::dropout)
        net_.forward_layer(l, rows_of(primal, l, begin, end), rows_of(primal, l + 1, begin, end), nullptr);
}

template <class T>
void Tape<T>::tangents(Index begin, Index end) const {
    for (Index l = 0; l < net_.depth(); ++l) push(l, begin, end, true, nullptr);
}

template <class T>
void Tape<T>::forward_and_tangents(Index begin, Index end, Index moving, const Direction<T>* direction) const {
    for (Index l = 0; l < net_.depth(); ++l) {
        const bool together = layer(l).kind == LayerKind<T>::linear && l + 1 >= moving;
        together ? append(primal, l, begin, end, T{1}) : lift(l, begin, end);
        if (l + 1 >= moving) push(l, begin, end, l >= moving, direction, together);
    }
}

// z = W x + b, and ż = W ẋ + Ẇ x + ḃ of what moves.
template <class T>
void Tape<T>::push_linear(Index l, Index begin, Index end, bool primals, bool moves,
                          const Direction<T>* direction) const {
    const Layer<T>& g = layer(l);
    const T* weights = net_.theta() + g.offset;
    by_panels(g, end - begin, g.outputs, [&](Index at, Index count) {
        if (primals) affine(g, read(primal, l, begin, end), weights, rows_of(primal, l + 1, begin, end), at, count);
        if (direction)
            affine(g, saved(l, begin, end), direction->forward(g), rows_of(tangent, l + 1, begin, end), at, count);
        if (moves)
            linear_jvp(g, read(tangent, l, begin, end), weights, rows_of(tangent, l + 1, begin, end), at, count,
                       direction != nullptr);
    });
}

// A linear layer's outputs move along one column of W: no product, and nothing is done for the other inputs.
template <class T>
void Tape<T>::tangents_along(Index input, Index begin, Index end) const {
    const bool linear = layer(0).kind == LayerKind<T>::linear;
    const MatrixView<T> first = rows_of(tangent, linear ? 1 : 0, begin, end);
    for (Index i = 0; i < first.rows; ++i) {
        T* row = first.data + i * first.stride;
        if (linear) {
            copy_column(layer(0), net_.theta() + layer(0).offset, input, row);
        } else {
            std::fill_n(row, first.cols, T{0});
            row[input] = T{1};
        }
    }
    for (Index l = linear ? 1 : 0; l < net_.depth(); ++l) push(l, begin, end, true, nullptr);
}

template <class T>
void Tape<T>::push(Index l, Index begin, Index end, bool moves, const Direction<T>* direction, bool primals) const {
    const Layer<T>& g = layer(l);
    if (moves) append(tangent, l, begin, end, T{0});
    if (g.kind == LayerKind<T>::linear) return push_linear(l, begin, end, primals, moves, direction);
    if (g.kind == LayerKind<T>::dropout) return;
    const std::vector<T*> own = direction ? own_parameters(l, direction->forward(g)) : std::vector<T*>{};
    by_example(begin, end, [&](Index from, Index to) {
        const MatrixView<const T> x = moves ? read(tangent, l, from, to) : MatrixView<const T>{};
        const MatrixView<T> y = rows_of(tangent, l + 1, from, to);
        if (g.kind == LayerKind<T>::external)
            return g.external->jvp(saved(l, from, to), saved(l + 1, from, to), {x, own.empty() ? nullptr : own.data()},
                                   y);
        const MatrixView<const T> kept = saved(saved_at(g.op, l), from, to);
        kernels<T>().jvp[static_cast<int>(g.op)](y.rows, y.cols, x.data, x.stride, kept.data, kept.stride, y.data,
                                                 y.stride, static_cast<T>(g.param));
    });
}

template <class T>
void Tape<T>::second_tangents(Index begin, Index end) const {
    const MatrixView<T> x = rows_of(second_tangent, 0, begin, end);
    for (Index i = 0; i < x.rows; ++i) std::fill_n(x.data + i * x.stride, x.cols, T{0});
    for (Index l = 0; l < net_.depth(); ++l) bend(l, begin, end);
}

template <class T>
void Tape<T>::bend(Index l, Index begin, Index end) const {
    const Layer<T>& g = layer(l);
    if (g.kind == LayerKind<T>::linear)
        return by_panels(g, end - begin, g.outputs, [&](Index at, Index count) {
            linear_jvp(g, read(second_tangent, l, begin, end), net_.theta() + g.offset,
                       rows_of(second_tangent, l + 1, begin, end), at, count, false);
        });
    if (g.kind == LayerKind<T>::dropout) return;
    by_example(begin, end, [&](Index from, Index to) {
        const MatrixView<const T> dx = read(tangent, l, from, to), ddx = read(second_tangent, l, from, to);
        const MatrixView<T> out = rows_of(second_tangent, l + 1, from, to);
        if (g.kind == LayerKind<T>::external)
            return g.external->jvp_jvp(saved(l, from, to), saved(l + 1, from, to), dx, ddx, out);
        second_kernels<T>().jvp_jvp[static_cast<int>(g.op)](dx, dx, ddx, saved(saved_at(g.op, l), from, to), out,
                                                            static_cast<T>(g.param));
    });
}

// ---- sweeps down ----------------------------------------------------------------------------------------------------

template <class T>
Index Tape<T>::lowest() const {
    const Index low = net_.first_cotangent();
    return low - (layer(low - 1).kind == LayerKind<T>::external);
}

template <class T>
void Tape<T>::cotangents(Index begin, Index end, Index to, T* gradient) const {
    for (Index l = net_.depth(); l-- > to;) pull(cotangent, l, begin, end, gradient);
}

template <class T>
void Tape<T>::pull(Kind kind, Index l, Index begin, Index end, T* gradient) const {
    const Layer<T>& g = layer(l);
    if (g.kind == LayerKind<T>::linear)
        return by_panels(g, end - begin, g.inputs, [&](Index at, Index count) {
            linear_vjp(g, read(kind, l + 1, begin, end), backward_weights(g), rows_of(kind, l, begin, end), at, count,
                       false);
        });
    if (g.kind == LayerKind<T>::dropout) return;
    by_example(begin, end, [&](Index from, Index until) {
        const MatrixView<const T> dy = read(kind, l + 1, from, until);
        const MatrixView<T> dx = rows_of(kind, l, from, until);
        if (g.kind == LayerKind<T>::external)
            return with_gradients(l, gradient, [&](T* const* gradients) {
                g.external->vjp(saved(l, from, until), saved(l + 1, from, until), dy, dx, gradients);
            });
        const MatrixView<const T> kept = saved(saved_at(g.op, l), from, until);
        kernels<T>().vjp[static_cast<int>(g.op)](dx.rows, dx.cols, dy.data, dy.stride, kept.data, kept.stride, dx.data,
                                                 dx.stride, static_cast<T>(g.param));
    });
}

template <class T>
void Tape<T>::cotangent_tangents(Index begin, Index end, Index to, Index moving, T* gradient) const {
    for (Index l = net_.depth(); l-- > to;) pull_tangent(l, begin, end, l >= moving, nullptr, gradient);
}

template <class T>
void Tape<T>::cotangents_and_tangents(Index begin, Index end, const Direction<T>& direction, T* gradient) const {
    const Index moving = net_.first_cotangent();
    for (Index l = net_.depth(); l-- > lowest();) {
        if (layer(l).kind == LayerKind<T>::linear) {
            pull_both(l, begin, end, direction);
            continue;
        }
        if (l >= moving) pull(cotangent, l, begin, end, nullptr);
        pull_tangent(l, begin, end, l >= moving, &direction, gradient);
    }
}

// c W and ċ W + c Ẇ.
template <class T>
void Tape<T>::pull_both(Index l, Index begin, Index end, const Direction<T>& direction) const {
    const Layer<T>& g = layer(l);
    const T* weights = backward_weights(g);
    by_panels(g, end - begin, g.inputs, [&](Index at, Index count) {
        const MatrixView<const T> c = read(cotangent, l + 1, begin, end);
        const MatrixView<T> dc = rows_of(cotangent_tangent, l, begin, end);
        linear_vjp(g, c, weights, rows_of(cotangent, l, begin, end), at, count, false);
        linear_vjp(g, read(cotangent_tangent, l + 1, begin, end), weights, dc, at, count, false);
        linear_vjp(g, c, direction.backward(l), dc, at, count, true);
    });
}

template <class T>
void Tape<T>::pull_tangent(Index l, Index begin, Index end, bool moves, const Direction<T>* direction,
                           T* gradient) const {
    const Layer<T>& g = layer(l);
    const bool curved = g.kind == LayerKind<T>::external ? moves || direction : moves && g.kind == LayerKind<T>::op;
    if (!curved) return pull(cotangent_tangent, l, begin, end, gradient);
    if (g.kind == LayerKind<T>::dropout) return;
    const std::vector<T*> own = direction ? own_parameters(l, direction->forward(g)) : std::vector<T*>{};
    by_example(begin, end, [&](Index from, Index until) {
        const MatrixView<const T> c = read(cotangent, l + 1, from, until),
                                  dc = read(cotangent_tangent, l + 1, from, until);
        const MatrixView<const T> dx = moves ? read(tangent, l, from, until) : MatrixView<const T>{};
        const MatrixView<T> out = rows_of(cotangent_tangent, l, from, until);
        if (g.kind == LayerKind<T>::external)
            return with_gradients(l, gradient, [&](T* const* gradients) {
                g.external->vjp_jvp(saved(l, from, until), saved(l + 1, from, until), c, dc,
                                    {dx, own.empty() ? nullptr : own.data()}, out, gradients);
            });
        second_kernels<T>().vjp_jvp[static_cast<int>(g.op)](c, dx, dc, saved(saved_at(g.op, l), from, until), out,
                                                            static_cast<T>(g.param));
    });
}

template <class T>
void Tape<T>::example_gradient(Index l, Index row, T* own) const {
    std::vector<T> dx(static_cast<std::size_t>(padded_stride<T>(layer(l).inputs)));
    layer(l).external->vjp(saved(l, row, row + 1), saved(l + 1, row, row + 1), read(cotangent, l + 1, row, row + 1),
                           {dx.data(), 1, layer(l).inputs, static_cast<Index>(dx.size())},
                           own_parameters(l, own).data());
}

template class Direction<float>;
template class Direction<double>;
template class Tape<float>;
template class Tape<double>;

}  // namespace chainrule
