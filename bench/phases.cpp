// SPDX-License-Identifier: MIT
// Question   where does the time of a training step go?
// Method     the engine's own Step, its parts called by themselves, over and over on one batch: phase 1 without and with
//            its way back, the gradient alone, the whole of phase 2, and whole steps; medians of samples that take turns.
//            roofline.py takes the differences:
//              forward + loss            forward
//              backward                  sweep - forward
//              weight gradients          gradient
//              rule + transposed copy    update - gradient
// Misleading parts repeated alone find in the cache what a step has driven out: compare their sum with `step`. And
//            `gradient` writes to memory what `update` keeps in a tile: the rule's line is too small by that, where the
//            weights are larger than a cache.
// Use        phases 64-100-10 relu cross_entropy adam 200 [threads] [seconds] prints one line of JSON, in seconds; each part is
//            timed for `seconds`.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "train.hpp"

namespace {

using namespace chainrule;
using Real = float;

// ---- the command line -----------------------------------------------------------------------------------------------

[[noreturn]] void unknown(const char* what, const std::string& name) {
    throw std::invalid_argument(std::string("[phases] unknown ") + what + ": " + name);
}

Op op_named(const std::string& text) {
#define CHAINRULE_ELEMENTWISE(name, type, saves) \
    if (text == #name) return Op::name;
#include "ops/ops.def"
    unknown("activation", text);
}

LossOp loss_named(const std::string& text) {
#define CHAINRULE_LOSS(name, type) \
    if (text == #name) return LossOp::name;
#include "ops/ops.def"
    unknown("loss", text);
}

OptimizerSettings optimizer_named(const std::string& text) {
    if (text == "sgd") return {OptimizerOp::sgd, {}};
    if (text == "adam") return {OptimizerOp::adam, {0.9, 0.999, 1e-8}};
    unknown("optimizer", text);
}

std::vector<Index> sizes_of(const std::string& text) {
    std::vector<Index> sizes;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, '-');) sizes.push_back(std::stol(part));
    return sizes;
}

// ---- a network and a batch ------------------------------------------------------------------------------------------

std::vector<Layer<Real>> chain(const std::vector<Index>& sizes, Op activation) {
    std::vector<Layer<Real>> layers;
    for (std::size_t l = 1; l < sizes.size(); ++l) {
        Layer<Real> linear{Layer<Real>::Kind::linear, sizes[l - 1], sizes[l]};
        linear.bias = true;
        layers.push_back(linear);
        Layer<Real> between{Layer<Real>::Kind::op, sizes[l], sizes[l]};
        between.op = activation;
        if (l + 1 < sizes.size()) layers.push_back(between);
    }
    return layers;
}

class Uniform {  // in [-1, 1)
   public:
    Real operator()() {
        state_ = state_ * 1664525u + 1013904223u;
        return static_cast<Real>(state_ >> 8) / (1 << 23) - 1;
    }
    std::vector<Real> operator()(Index count, double scale) {
        std::vector<Real> values(static_cast<std::size_t>(count));
        for (Real& value : values) value = (*this)() * static_cast<Real>(scale);
        return values;
    }

   private:
    std::uint32_t state_ = 1;
};

void initialize(Network<Real>& net, Uniform& uniform) {
    for (const Parameter& parameter : net.parameters()) {
        const bool weight = parameter.shape.size() > 1;
        const double scale = weight ? std::sqrt(6.0 / static_cast<double>(parameter.shape[1])) : 0.01;
        net.write(parameter, uniform(parameter.size, scale).data());
    }
}

struct Batch {
    std::vector<Real> x, y;
    std::vector<std::int64_t> labels;
    Dataset<Real> data;

    Batch(Index rows, Index inputs, Index outputs, LossOp loss, Uniform& uniform)
        : x(uniform(rows * inputs, 1)), y(uniform(rows * outputs, 1)), labels(static_cast<std::size_t>(rows)) {
        for (Index i = 0; i < rows; ++i) labels[static_cast<std::size_t>(i)] = i % outputs;
        if (loss == LossOp::logistic)
            for (Real& value : y) value = value > 0;
        const bool classes = loss == LossOp::cross_entropy;
        data = {
            rows,   x.data(), classes ? labels.data() : nullptr, classes ? nullptr : y.data(), classes ? 0 : outputs,
            nullptr};
    }
};

// ---- the clock ------------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

struct Part {
    const char* name;
    std::function<void()> run;
    long calls = 1;  // a sample
    std::vector<double> samples{};

    double time() const {
        rouse_workers();  // as `fit` does before an epoch
        const auto start = Clock::now();
        for (long i = 0; i < calls; ++i) run();
        return std::chrono::duration<double>(Clock::now() - start).count();
    }
    double median() {
        std::nth_element(samples.begin(), samples.begin() + kSamples / 2, samples.end());
        return samples[kSamples / 2];
    }

    static constexpr int kSamples = 9;
};

// The parts take turns, so that their differences come from the same spell of the machine.
void sample(std::vector<Part>& parts, double seconds) {
    for (Part& part : parts)
        while (part.time() < seconds / Part::kSamples) part.calls *= 2;
    for (int i = 0; i < Part::kSamples; ++i)
        for (Part& part : parts) part.samples.push_back(part.time() / static_cast<double>(part.calls));
}

void measure(const std::vector<Index>& sizes, Op activation, const Loss<Real>& loss, const OptimizerSettings& rule,
             Index rows, double seconds) {
    Uniform uniform;
    Network<Real> net(chain(sizes, activation));
    initialize(net, uniform);
    const Batch batch(rows, sizes.front(), sizes.back(), loss.op, uniform);
    Optimizer<Real> optimizer(net, rule);
    Step<Real> step(net, loss, rows, batch.data.target_cols);

    const auto sweep = [&](bool backward) { step.sweep(batch.data, nullptr, rows, Noise{}, backward); };
    const auto update = [&] {
        step.update(optimizer, 1e-6, Regularization{});  // so small that a thousand updates leave the same network
        ++optimizer.step_count;
    };
    std::vector<Part> parts = {{"forward", [&] { sweep(false); }},
                               {"sweep", [&] { sweep(true); }},
                               {"gradient", [&] { step.gradient(); }},
                               {"update", update},
                               {"step", [&] { sweep(true), update(); }}};
    sample(parts, seconds);
    const char* separator = "{";
    for (Part& part : parts) {
        std::printf("%s\"%s\": %.5g", separator, part.name, part.median());
        separator = ", ";
    }
    std::printf("}\n");
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc < 6) throw std::invalid_argument("[phases] arguments: expected sizes activation loss optimizer batch");
    set_thread_count(argc > 6 ? std::atoi(argv[6]) : 1);
    measure(sizes_of(argv[1]), op_named(argv[2]), {loss_named(argv[3]), 0, true, nullptr}, optimizer_named(argv[4]),
            std::atol(argv[5]), argc > 7 ? std::atof(argv[7]) : 0.2);
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
