// SPDX-License-Identifier: MIT
#include "example_clipping.hpp"

#include <cmath>

namespace chainrule {
namespace {

template <class T>
double square_of_row(MatrixView<T> m, Index row) {
    const T* x = m.data + row * m.stride;
    const Index lines = m.cols / kLine<T> * kLine<T>;
    double sum = static_cast<double>(kernels<T>().sum_of_squares(lines, x));
    for (Index j = lines; j < m.cols; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    if (std::isfinite(sum)) return sum;
    sum = 0;  // float32 has no squares beyond 3e38, double has: an outlier is to be clipped, not multiplied by 1/inf
    for (Index j = 0; j < m.cols; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    return sum;
}

}  // namespace

template <class T>
double square_of_product(MatrixView<T> c, MatrixView<T> x, bool bias, Index row) {
    return square_of_row(c, row) * (square_of_row(x, row) + bias);
}

template <class T>
void clip_examples(const Network<T>& net, const Activations<T>& a, Index begin, Index end, const T* weight,
                   double scale, double limit) {
    const auto over_linear = [&](auto f) {
        for (Index l = 0; l < net.depth(); ++l) {
            const Layer<T>& layer = net.layers()[static_cast<std::size_t>(l)];
            if (layer.kind == Layer<T>::Kind::linear) f(layer, a.phi(l), a.dphi(l + 1));
        }
    };
    for (Index row = begin; row < end; ++row) {
        double square = 0;
        over_linear([&](const Layer<T>& layer, MatrixView<T> x, MatrixView<T> c) {
            square += square_of_product(c, x, layer.bias, row);
        });
        const double norm = std::sqrt(square), most = limit * scale * (weight ? static_cast<double>(weight[row]) : 1.0);
        if (norm <= most) continue;
        const T factor = static_cast<T>(most / norm);
        over_linear([&](const Layer<T>&, MatrixView<T>, MatrixView<T> c) {
            for (Index j = 0; j < c.cols; ++j) c.data[row * c.stride + j] *= factor;
        });
    }
}

#define CHAINRULE_INSTANTIATE(T)                                                     \
    template double square_of_product<T>(MatrixView<T>, MatrixView<T>, bool, Index); \
    template void clip_examples<T>(const Network<T>&, const Activations<T>&, Index, Index, const T*, double, double);
CHAINRULE_INSTANTIATE(float)
CHAINRULE_INSTANTIATE(double)

}  // namespace chainrule
