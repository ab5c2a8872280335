// SPDX-License-Identifier: MIT
// L3: the second term of training on slopes, on a device; see sobolev.hpp for the mathematics.
#pragma once

#include "tape.cuh"

namespace chainrule {
namespace cuda {

// λ ω (c⁰ − dy) into the tangents of the inputs, λ ω ½ |c⁰ − dy|² into the values; by rows.
template <class T>
struct LeaveResiduals {
    Source<T> data;
    const Control* control;
    MatrixView<const T> c;
    MatrixView<T> dx;
    Index outputs;
    double lambda;
    double* values;
    __device__ void operator()(Index n) const {
        const Index row = data.rows(n), inputs = c.cols;
        const double weight = data.weight ? static_cast<double>(data.weight[row]) : 1.0;
        const double omega = lambda * control->scale * weight;
        const T* slope = data.dy + row * outputs * inputs;
        double squares = 0;
        for (Index r = 0; r < outputs; ++r) {
            const T* const from = c.data + (n * outputs + r) * c.stride;
            T* const to = dx.data + (n * outputs + r) * dx.stride;
            for (Index i = first_column(); i < inputs; i += column_step<T>()) {
                const double residual = static_cast<double>(from[i] - slope[r * inputs + i]);
                squares += residual * residual;
                to[i] = static_cast<T>(omega * residual);
            }
        }
        squares = join_sum(Vec<double>(squares))[0];
        if (first_column() == 0) values[n] = omega == 0 ? 0 : omega * squares / 2;
    }
};
// ∂loss/∂f where an example's output 0 has its row, else 0.
template <class T>
struct LoadLoss {
    MatrixView<T> to;
    MatrixView<const T> df;
    Index outputs;
    __device__ void operator()(Index r, Index o) const {
        to.data[r * to.stride + o] = r % outputs == 0 ? df.data[r / outputs * df.stride + o] : T{0};
    }
};
// The sum of an example's rows, into its first: all of them meet the same x in ċᵀ x.
template <class T>
struct AddOutputs {
    MatrixView<T> dc;
    Index outputs;
    __device__ void operator()(Index n, Index j) const {
        T* const to = dc.data + n * outputs * dc.stride + j;
        for (Index o = 1; o < outputs; ++o) *to = *to + to[o * dc.stride];
    }
};

template <class T>
class Sobolev {
   public:
    using Kind = typename Tape<T>::Kind;
    explicit Sobolev(const Network<T>& net) : net_(net), tape_(net, false), partials_(net.device(), kPieces, "slopes") {
        tape_.keep_all(true);
    }

    // Of a batch whose ∂loss/∂f is there: the gradient of both terms, and the second term's value into control->slopes.
    void sweep(const Source<T>& data, double lambda, Index rows, MatrixView<const T> df, Control* control, T* flat,
               cudaStream_t stream) {
        const Index outputs = net_.outputs(), depth = net_.depth(), low = net_.first_cotangent();
        tape_.shape(0, rows * outputs, outputs,
                    {Kind::primal, Kind::tangent, Kind::cotangent, Kind::cotangent_tangent});
        values_.grow(net_.device(), rows, "slopes");
        tape_.input(data.x, data.rows, stream);
        tape_.forward(nullptr, stream);
        tape_.seed(Kind::cotangent, depth, stream);
        tape_.cotangents(0, stream);
        map_rows(rows, net_.inputs(),
                 LeaveResiduals<T>{data, control, constant(tape_.at(Kind::cotangent, 0)), tape_.at(Kind::tangent, 0),
                                   outputs, lambda, values_.data()},
                 stream);
        sum_over(rows, Partials{values_.data()}, StoreSum{&control->slopes}, partials_.data(), stream);
        tape_.tangents(0, nullptr, stream);
        map_elements(rows * outputs, outputs, LoadLoss<T>{tape_.at(Kind::cotangent_tangent, depth), df, outputs},
                     stream);
        tape_.cotangent_tangents(low, 0, nullptr, stream);
        for (Index l = 0; l < depth; ++l) differentiate(l, rows, flat, stream);
    }

   private:
    void differentiate(Index l, Index rows, T* flat, cudaStream_t stream) const {
        if (tape_.layer(l).kind != Layer<T>::Kind::linear) return;
        const Index outputs = net_.outputs();
        const MatrixView<T> dc = tape_.at(Kind::cotangent_tangent, l + 1);
        if (outputs > 1) map_elements(rows, dc.cols, AddOutputs<T>{dc, outputs}, stream);
        tape_.gradient(l, rows, {dc.data, dc.stride * outputs}, tape_.operand(Kind::primal, l), true,
                       tape_.into(l, flat, false), stream);
        tape_.gradient(l, rows * outputs, tape_.operand(Kind::cotangent, l + 1), tape_.operand(Kind::tangent, l), false,
                       tape_.into(l, flat, true), stream);
    }

    const Network<T>& net_;
    Tape<T> tape_;
    Buffer<double> values_, partials_;
};

}  // namespace cuda
}  // namespace chainrule
