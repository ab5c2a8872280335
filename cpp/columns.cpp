// SPDX-License-Identifier: MIT
#include "columns.hpp"

namespace chainrule {
namespace {

template <class T>
using Kind = typename Layer<T>::Kind;

template <class T>
bool is_elementwise(const Layer<T>& layer) {
    return layer.kind == Kind<T>::op && layer.op != Op::softmax && layer.op != Op::log_softmax;
}

template <class T>
MatrixView<T> columns_of(MatrixView<T> view, Index rows, Index begin, Index end) {
    return {view.data + begin, rows, end - begin, view.stride};
}

}  // namespace

template <class T>
Columns<T>::Columns(const Network<T>& net, Index rows, int most_parts)
    : net_(net), rows_(rows), parts_(parts_of_rows(most_parts, rows)) {
    if (parts_ == 1 || rows > kMostRows) return;
    for (const Layer<T>& next : net.layers()) {
        const bool even = next.kind == Kind<T>::linear && !next.bfloat16 && next.outputs % (parts_ * kPanel<T>) == 0;
        if (!even && !(layers_ > 0 && is_elementwise(next))) break;
        ++layers_;
    }
    handover_ = above_last_linear(layers_);
}

template <class T>
Index Columns<T>::above_last_linear(Index count) const {
    while (count > 0 && layer(count - 1).kind != Kind<T>::linear) --count;
    return count;
}

// f(begin, end) over so many columns, a whole number of panels, on all threads.
template <class T>
template <class F>
void Columns<T>::share(Index cols, F f) const {
    parallel(parts_, [&](int part, int parts) {
        const Index panels = cols / kPanel<T>;
        f(panels * part / parts * kPanel<T>, panels * (part + 1) / parts * kPanel<T>);
    });
}

template <class T>
void Columns<T>::forward(const Activations<T>& a, bool training) const {
    for (Index l = 0, next; l < layers_; l = next) {
        const Layer<T>& linear = layer(l);
        for (next = l + 1; next < layers_ && layer(next).kind != Kind<T>::linear;) ++next;
        share(linear.outputs, [&](Index begin, Index end) {
            const auto mine = [&](Index k) { return columns_of(a.phi(k), rows_, begin, end); };
            const MatrixView<T> x = a.phi(l), z = mine(l + 1);
            kernels<T>().linear_forward(rows_, linear.inputs, z.cols, linear.bias, x.data, x.stride,
                                        net_.theta() + linear.offset + begin * linear.weight_rows(), z.data, z.stride);
            for (Index op = l + 1; op < next; ++op) net_.forward_layer(op, mine(op), mine(op + 1), nullptr);
            if (training && begin == 0) net_.append_ones(a, next, 0, rows_);
        });
    }
}

template <class T>
void Columns<T>::backward(const Activations<T>& a) const {
    for (Index above = handover_; above > net_.first_cotangent();) {
        const Index l = above - 1, below = above_last_linear(l);
        const Layer<T>& linear = layer(l);
        share(linear.inputs, [&](Index begin, Index end) {
            const auto mine = [&](MatrixView<T> view) { return columns_of(view, rows_, begin, end); };
            const MatrixView<T> dz = a.dphi(above), dx = mine(a.dphi(l));
            kernels<T>().linear_vjp_input(rows_, dx.cols, linear.outputs, dz.data, dz.stride,
                                          net_.backward_weights(linear) + begin * linear.outputs, dx.data, dx.stride,
                                          false);
            for (Index op = l; op-- > below;)
                net_.backward_op(op, mine(a.dphi(op + 1)), mine(a.dphi(op)), mine(a.phi(net_.saved_by(op))));
        });
        above = below;
    }
}

template class Columns<float>;
template class Columns<double>;

}  // namespace chainrule
