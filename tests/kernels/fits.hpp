// SPDX-License-Identifier: MIT
// Whole fits, from the first weights to the last: the same bits on every instruction set with FMA. The C library's log, sin,
// cos and pow draw the weights and prepare Adam's steps; their last bits show in float64 alone.
#pragma once

#include "harness.hpp"
#include "train.hpp"

namespace chainrule {
namespace {

template <class T>
std::vector<Layer<T>> small_layers() {
    using Kind = typename Layer<T>::Kind;
    std::vector<Layer<T>> layers = {
        {Kind::linear, 9, 70, true},  {Kind::op, 70, 70, false, Op::gelu}, {Kind::dropout, 70, 70},
        {Kind::linear, 70, 33, true}, {Kind::op, 33, 33, false, Op::tanh}, {Kind::linear, 33, 3, true}};
    layers[2].param = 0.25;
    return layers;
}

template <class T>
void draw_weights(Network<T>& net) {
    std::uint64_t stream = 0;
    for (const Parameter& parameter : net.parameters()) {
        std::vector<T> values(static_cast<std::size_t>(parameter.size));
        for (std::size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<T>(0.3 * normal(base_seed, stream, static_cast<Index>(i)));
        net.write(parameter, values.data());
        ++stream;
    }
}

template <class T>
void fit_case(const OptimizerSettings& settings, double clip_norm, Record<T>& record) {
    constexpr Index rows = 61, inputs = 9, epochs = 8, classes = 3;
    Random random = begin_case<T>("fit", rows, static_cast<Index>(settings.rule), clip_norm > 0);
    std::vector<T> x, weight;
    std::vector<std::int64_t> labels;
    for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < inputs; ++j) x.push_back(static_cast<T>(random.uniform(-1, 1)));
        labels.push_back((x.end()[-1] > 0) + (x.end()[-2] > 0));
        weight.push_back(static_cast<T>(random.uniform(0.5, 1.5)));
    }

    Network<T> net(small_layers<T>());
    draw_weights(net);
    Optimizer<T> optimizer(net, settings);
    Trainer<T> trainer(net, optimizer, {LossOp::cross_entropy, 0, true, nullptr},
                       {rows, x.data(), labels.data(), nullptr, 0, weight.data()},
                       {16, true, 7, {1e-5, 1e-4, 0, clip_norm}});
    const std::vector<double> rates(epochs, 0.01);
    const std::vector<double> losses = trainer.run(0, epochs, rates.data(), 1);
    check(losses.size() == epochs && losses.back() < losses.front(), "the loss falls");
    const std::vector<T> rounded(losses.begin(), losses.end());
    std::vector<T> f(rows * classes);
    net.predict(rows, x.data(), f.data());
    record.same(1, epochs, rounded.data(), epochs);
    record.same(1, net.size(), net.theta(), net.size());
    record.same(rows, classes, f.data(), classes);
}

template <class T>
void fits() {
    on_each_isa_same_bits<T>([](Record<T>& record) {
        for (const double clip_norm : {0.0, 0.5}) {
            fit_case<T>({OptimizerOp::sgd, {0.9, 0, 1, 0.01}}, clip_norm, record);
            fit_case<T>({OptimizerOp::adam, {0.9, 0.999, 1e-8, 0}}, clip_norm, record);
            fit_case<T>({OptimizerOp::adamw, {0.9, 0.999, 1e-8, 0.01}}, clip_norm, record);
            fit_case<T>({OptimizerOp::rmsprop, {0.9, 1e-8, 0, 0.5, 1}}, clip_norm, record);
        }
    });
}

}  // namespace
}  // namespace chainrule
