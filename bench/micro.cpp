// SPDX-License-Identifier: MIT
// Question   how fast is each kernel alone, on one core, and which share of what the core can do is that?
// Method     every kernel of every table this machine runs (name: instruction set / type / kernel / shape), on shapes
//            that users have and on awkward ones (31, 33, one row, one output). A kernel's result is compared with
//            micro_reference.hpp first; one that is wrong is reported, not timed, and the program exits with 1.
// Rates      GFLOP/s beside the measured FMA peak; or GB/s, read and written, beside the measured read bandwidth of
//            the smallest memory the operands fit in. So a kernel in L1 that also writes may exceed 100 %.
// Misleading operands stay in the cache between iterations, as they do in a small network and do not in a large one;
//            the branch predictor learns a fixed shape; the clock may differ between instruction sets.
#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "micro_reference.hpp"
#include "peak.hpp"
#include "pool.hpp"

namespace {

using namespace chainrule;

bool failed = false;

// ---- the machine ----------------------------------------------------------------------------------------------------

struct Level {
    const char* name;
    std::size_t bytes;  // operands up to this size live here
    double rate;        // bytes read per second
};

struct Machine {
    double flops;  // float32
    std::vector<Level> levels;

    static Machine measure() {
        Machine machine{peak::flops(1), {}};
        for (const peak::Level& level : peak::levels())
            machine.levels.push_back({level.name, level.bytes, peak::read_rate(1, level.probe)});
        return machine;
    }

    double read_rate(double bytes) const {
        for (const Level& level : levels)
            if (bytes <= static_cast<double>(level.bytes)) return level.rate;
        return levels.back().rate;
    }

    void describe() const {
        char text[64];
        std::snprintf(text, sizeof text, "%.1f GFLOP/s float32, %s", flops / 1e9, peak::rates().isa);
        benchmark::AddCustomContext("peak, one core", text);
        for (const Level& level : levels) {
            std::snprintf(text, sizeof text, "%.1f GB/s", level.rate / 1e9);
            benchmark::AddCustomContext(std::string("read rate, ") + level.name, text);
        }
    }
};

const Machine& machine() {
    static const Machine measured = Machine::measure();
    return measured;
}

// ---- operands -------------------------------------------------------------------------------------------------------

template <class T>
constexpr double kTolerance =
    sizeof(T) == 4 ? 1e-3 : 1e-6;  // of a kernel against the reference, relative to 1 + |value|

template <class T>
constexpr const char* kTypeName = sizeof(T) == 4 ? "float32" : "float64";

// Zeroed, aligned, as the engine's own memory is.
template <class T>
struct Array {
    Index size;
    T* data;
    explicit Array(Index n) : size(std::max<Index>(n, 1)), data(static_cast<T*>(allocate_bytes(bytes()))) {}
    ~Array() { free_bytes(data, bytes()); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    std::size_t bytes() const { return static_cast<std::size_t>(size) * sizeof(T); }

    // Uniform in ±[0.01, 1]: never at a kink, so that central differences are derivatives.
    void randomize(std::uint32_t seed) {
        std::uint32_t state = seed * 2654435761u + 1;
        for (Index i = 0; i < size; ++i) {
            state = state * 1664525u + 1013904223u;
            const double u = static_cast<double>(state >> 8) / (1 << 24) * 2 - 1;
            data[i] = static_cast<T>(u < 0 ? 0.99 * u - 0.01 : 0.99 * u + 0.01);
        }
    }
};

// A padded matrix with random columns, and room for the 1 that follows each row of a linear layer's input.
template <class T>
struct Matrix : Array<T> {
    Index rows, cols, stride;
    Matrix(Index r, Index c, std::uint32_t seed = 0)
        : Array<T>(r * padded_stride<T>(c + 1)), rows(r), cols(c), stride(padded_stride<T>(c + 1)) {
        if (seed == 0) return;
        Array<T> values(r * c);
        values.randomize(seed);
        for (Index i = 0; i < r; ++i) std::copy_n(values.data + i * c, c, this->data + i * stride);
    }
    T& operator()(Index i, Index j) { return this->data[i * stride + j]; }
    reference::Row row(Index i) const { return {this->data + i * stride, this->data + i * stride + cols}; }
};

template <class T>
double dot(const T* a, const reference::Row& b) {
    double sum = 0;
    for (std::size_t j = 0; j < b.size(); ++j) sum += static_cast<double>(a[j]) * b[j];
    return sum;
}

// A few rows of many, the last one always among them.
std::vector<Index> some_of(Index n) {
    std::vector<Index> picked;
    for (Index i = 0; i < n; i += std::max<Index>(1, n / 7)) picked.push_back(i);
    picked.push_back(n - 1);
    return picked;
}

// ---- verify, time, report -------------------------------------------------------------------------------------------

struct Check {
    double tolerance;
    std::string complaint = {};

    void equal(const char* what, double got, double want) {
        if (!complaint.empty() || std::abs(got - want) <= tolerance * (1 + std::abs(want))) return;
        char text[160];
        std::snprintf(text, sizeof text, "%s: expected %.9g, got %.9g", what, want, got);
        complaint = text;
    }
};

struct Work {
    double flop = 0, bytes = 0;
};

// Of this thread: time in which somebody else had the core does not count.
double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

template <class T, class Run>
void measure(benchmark::State& state, const Check& check, Work work, const Run& run) {
    if (!check.complaint.empty()) {
        failed = true;
        state.SkipWithError(check.complaint.c_str());
        return;
    }
    // Google Benchmark prints its own rates "per second", a share of peak included; so these are plain numbers.
    const double start = cpu_seconds();
    for (auto _ : state) {
        run();
        benchmark::ClobberMemory();
    }
    const double rounds_per_second = static_cast<double>(state.iterations()) / (cpu_seconds() - start);
    const bool computes = work.flop > 0;
    const double rate = (computes ? work.flop : work.bytes) * rounds_per_second;
    const double most = computes ? machine().flops * 4 / sizeof(T) : machine().read_rate(work.bytes);
    state.counters[computes ? "GFLOP/s" : "GB/s"] = rate / 1e9;
    state.counters["%peak"] = 100 * rate / most;
}

// ---- the linear layer -----------------------------------------------------------------------------------------------

struct Shape {
    Index batch, outputs, inputs;
    std::string name() const {
        return std::to_string(batch) + "x" + std::to_string(outputs) + "x" + std::to_string(inputs);
    }
};

constexpr Shape kLinearShapes[] = {
    {1, 64, 64},     {32, 10, 32},    {31, 33, 31},     {33, 31, 33},       {32, 64, 8},
    {32, 64, 64},    {32, 1, 64},     {200, 10, 100},   {200, 100, 64},     {128, 10, 128},
    {128, 128, 256}, {128, 256, 784}, {1024, 64, 1024}, {1024, 1024, 1024},
};

// Packs element (k, j) of a b_rows x cols matrix where multiply_panels expects it.
template <class T, class Element>
void pack(Array<T>& panels, Index b_rows, Index cols, const Element& element) {
    for (Index start = 0; start < cols; start += kPanel<T>) {
        const Index columns = std::min(cols - start, kPanel<T>), width = round_up(columns, kLine<T>);
        for (Index k = 0; k < b_rows; ++k)
            for (Index j = 0; j < columns; ++j) panels.data[start * b_rows + k * width + j] = element(k, start + j);
    }
}

template <class T>
struct Linear {
    Shape s;
    Matrix<T> x, dz, w;  // w: (O, I + 1), the last column is the bias
    Array<T> forward, backward;

    explicit Linear(Shape shape)
        : s(shape),
          x(s.batch, s.inputs, 1),
          dz(s.batch, s.outputs, 2),
          w(s.outputs, s.inputs + 1, 3),
          forward((s.inputs + 1) * round_up(s.outputs, kLine<T>)),
          backward(s.outputs * round_up(s.inputs, kLine<T>)) {
        for (Index i = 0; i < s.batch; ++i) x(i, s.inputs) = 1;
        pack(forward, s.inputs + 1, s.outputs, [&](Index k, Index j) { return w(j, k); });
        pack(backward, s.outputs, s.inputs, [&](Index k, Index j) { return w(k, j); });
    }
    double flop() const { return 2.0 * static_cast<double>(s.batch * s.outputs * s.inputs); }
};

template <class T>
void linear_forward(benchmark::State& state, Shape s) {
    Linear<T> l(s);
    Matrix<T> z(s.batch, s.outputs);
    const auto run = [&, kernel = kernels<T>().linear_forward] {
        kernel(s.batch, s.inputs, s.outputs, true, l.x.data, l.x.stride, l.forward.data, z.data, z.stride);
    };
    run();
    Check check{kTolerance<T>};
    for (Index i : some_of(s.batch))
        for (Index o : some_of(s.outputs)) {
            reference::Row xi = l.x.row(i);
            xi.push_back(1);
            check.equal("z", z(i, o), dot(l.w.data + o * l.w.stride, xi));
        }
    measure<T>(state, check, {l.flop()}, run);
}

template <class T>
void linear_vjp_input(benchmark::State& state, Shape s) {
    Linear<T> l(s);
    Matrix<T> dx(s.batch, s.inputs);
    const auto run = [&, kernel = kernels<T>().linear_vjp_input] {
        kernel(s.batch, s.inputs, s.outputs, l.dz.data, l.dz.stride, l.backward.data, dx.data, dx.stride, false);
    };
    run();
    Check check{kTolerance<T>};
    for (Index i : some_of(s.batch))
        for (Index j : some_of(s.inputs)) {
            double want = 0;
            for (Index o = 0; o < s.outputs; ++o)
                want += static_cast<double>(l.dz(i, o)) * static_cast<double>(l.w(o, j));
            check.equal("dx", dx(i, j), want);
        }
    measure<T>(state, check, {l.flop()}, run);
}

constexpr Index kTileInputs = 48;  // as in train.cpp

// All tiles of dWᵀ over db, each as wide as a panel, written one after another.
template <class T>
void linear_vjp_weight(benchmark::State& state, Shape s) {
    Linear<T> l(s);
    Array<T> tiles((s.inputs + 1) * round_up(s.outputs, kLine<T>)), packed(kDepth * kPanel<T>);
    const auto run = [&, kernel = kernels<T>().linear_vjp_weight] {
        for (Index column = 0; column < s.outputs; column += kPanel<T>) {
            const Index width = round_up(std::min(s.outputs - column, kPanel<T>), kLine<T>);
            for (Index first = 0; first <= s.inputs; first += kTileInputs)
                kernel(s.batch, std::min(s.inputs + 1 - first, kTileInputs), width, l.x.data + first, l.x.stride,
                       l.dz.data + column, l.dz.stride, packed.data,
                       tiles.data + column * (s.inputs + 1) + first * width, false);
        }
    };
    run();
    Check check{kTolerance<T>};
    for (Index o : some_of(s.outputs))
        for (Index i : some_of(s.inputs + 1)) {
            double sum = 0;
            for (Index b = 0; b < s.batch; ++b) sum += static_cast<double>(l.x(b, i)) * static_cast<double>(l.dz(b, o));
            const Index start = o / kPanel<T> * kPanel<T>;
            const Index width = round_up(std::min(s.outputs - start, kPanel<T>), kLine<T>);
            check.equal("dw", tiles.data[start * (s.inputs + 1) + i * width + o - start], sum);
        }
    measure<T>(state, check, {l.flop()}, run);
}

template <class T>
void linear_transpose(benchmark::State& state, Shape s) {
    Linear<T> l(s);
    Array<T> copy(l.backward.size);
    const auto run = [&, kernel = kernels<T>().linear_transpose] {
        for (Index column = 0; column < s.outputs; column += kPanel<T>)
            kernel(s.inputs, s.outputs, 0, s.inputs, column, l.forward.data + column * (s.inputs + 1),
                   round_up(std::min(s.outputs - column, kPanel<T>), kLine<T>), copy.data);
    };
    run();
    Check check{0};
    for (Index start = 0; start < s.inputs; start += kPanel<T>) {
        const Index columns = std::min(s.inputs - start, kPanel<T>), width = round_up(columns, kLine<T>);
        for (Index o : some_of(s.outputs))
            for (Index j = 0; j < columns; ++j) {
                const Index place = start * s.outputs + o * width + j;
                check.equal("w", copy.data[place], l.backward.data[place]);
            }
    }
    measure<T>(state, check, {0, 2.0 * sizeof(T) * static_cast<double>(s.inputs * s.outputs)}, run);
}

// ---- elementwise and row-wise ops -----------------------------------------------------------------------------------

struct RowShape {
    Index rows, cols;
    std::string name() const { return std::to_string(rows) + "x" + std::to_string(cols); }
};

constexpr RowShape kOpShapes[] = {{1, 64}, {32, 10}, {31, 33}, {32, 64}, {200, 100}, {128, 256}, {1024, 1024}};

enum class Way { forward, vjp, jvp };

struct OpRow {
    const char* name;
    Op op;
    Saves saves;
};
constexpr OpRow kOps[] = {
#define CHAINRULE_ELEMENTWISE(name, type, saves) {#name, Op::name, Saves::saves},
#define CHAINRULE_ROWWISE(name, type, saves) {#name, Op::name, Saves::saves},
#include "ops/ops.def"
};

template <class T>
void op(benchmark::State& state, const OpRow& row, Way way, RowShape s) {
    const T param = static_cast<T>(row.op == Op::leaky_relu ? 0.01 : 1.0);
    const Kernels<T>& table = kernels<T>();
    const auto k = static_cast<int>(row.op);
    Matrix<T> x(s.rows, s.cols, 1), d(s.rows, s.cols, 2), y(s.rows, s.cols), out(s.rows, s.cols);
    table.forward[k](s.rows, s.cols, x.data, x.stride, y.data, y.stride, param);
    Matrix<T>& saved = row.saves == Saves::output ? y : x;
    const auto derivative = (way == Way::jvp ? table.jvp : table.vjp)[k];
    const auto run = [&] {
        if (way == Way::forward)
            table.forward[k](s.rows, s.cols, x.data, x.stride, out.data, out.stride, param);
        else
            derivative(s.rows, s.cols, d.data, d.stride, saved.data, saved.stride, out.data, out.stride, param);
    };
    run();
    Check check{kTolerance<T>};
    for (Index i : some_of(s.rows)) {
        const reference::Row xi = x.row(i), di = d.row(i), got = out.row(i);
        if (way == Way::vjp) {  // the adjoint: (d J) t = d (J t)
            const reference::Row t = d.row((i + 1) % s.rows);
            check.equal("vjp", dot(got.data(), t), dot(di.data(), reference::jvp(row.op, xi, t, param)));
            continue;
        }
        const reference::Row want =
            way == Way::forward ? reference::forward(row.op, xi, param) : reference::jvp(row.op, xi, di, param);
        for (std::size_t j = 0; j < want.size(); ++j) check.equal(way == Way::jvp ? "jvp" : "y", got[j], want[j]);
    }
    const int operands = way == Way::forward || row.saves == Saves::none ? 2 : 3;
    measure<T>(state, check, {0, operands * static_cast<double>(sizeof(T)) * static_cast<double>(s.rows * s.cols)},
               run);
}

// ---- losses ---------------------------------------------------------------------------------------------------------

constexpr RowShape kLossShapes[] = {{32, 1}, {32, 10}, {31, 33}, {200, 10}, {1024, 64}};

struct LossRow {
    const char* name;
    LossOp op;
};
constexpr LossRow kLosses[] = {
#define CHAINRULE_LOSS(name, type) {#name, LossOp::name},
#include "ops/ops.def"
};

template <class T>
void loss(benchmark::State& state, const LossRow& row, RowShape s) {
    const T param = static_cast<T>(0.7);  // huber's delta, pinball's quantile
    const Index outputs = row.op == LossOp::gaussian_nll ? 2 * s.cols : s.cols;
    Matrix<T> f(s.rows, outputs, 1), df(s.rows, outputs), y(s.rows, s.cols, 3), direction(s.rows, outputs, 4);
    Array<T> values(s.rows);
    std::vector<std::int64_t> labels;
    for (Index i = 0; i < s.rows; ++i) {
        labels.push_back(i * 7 % s.cols);
        for (Index j = 0; j < s.cols; ++j) y(i, j) = std::abs(y(i, j));  // counts and probabilities are not negative
    }
    const bool labelled = row.op == LossOp::cross_entropy;
    const Targets<T> targets{labelled ? labels.data() : nullptr, labelled ? nullptr : y.data, y.stride};
    const auto run = [&, kernel = kernels<T>().loss[static_cast<int>(row.op)]] {
        kernel(s.rows, outputs, f.data, f.stride, targets, nullptr, T{1}, values.data, df.data, df.stride, param);
    };
    run();
    Check check{kTolerance<T>};
    for (Index i : some_of(s.rows)) {
        const reference::Row fi = f.row(i), t = direction.row(i);
        const reference::Row yi =
            labelled ? reference::Row{static_cast<double>(labels[static_cast<std::size_t>(i)])} : y.row(i);
        check.equal("loss", values.data[i], reference::loss(row.op, fi, yi, param));
        check.equal("dL/df", dot(df.data + i * df.stride, t), reference::slope(row.op, fi, yi, t, param));
    }
    const double target_bytes =
        labelled ? 8.0 * static_cast<double>(s.rows) : sizeof(T) * static_cast<double>(s.rows * s.cols);
    measure<T>(state, check, {0, target_bytes + 2.0 * sizeof(T) * static_cast<double>(s.rows * outputs)}, run);
}

// ---- optimizers and other passes over flat parameters ---------------------------------------------------------------

constexpr Index kFlatSizes[] = {64, 4096, 65536, 4194304};

constexpr double kLr = 1e-3;

OptimizerSettings settings_of(OptimizerOp rule) {
    switch (rule) {
        case OptimizerOp::sgd: return {rule, {0.9, 0, 0, 0, 0}};
        case OptimizerOp::rmsprop: return {rule, {0.99, 1e-8, 0, 0, 0}};
        case OptimizerOp::adam: return {rule, {0.9, 0.999, 1e-8, 0, 0}};
        default: return {rule, {0.9, 0.999, 1e-8, 0.01, 0}};
    }
}

template <class T>
void optimizer(benchmark::State& state, OptimizerOp rule, Index n) {
    const OptimizerSettings settings = settings_of(rule);
    const Hyper<T> hyper = prepare_step<T>(settings, kLr, 1);
    Array<T> w(n), before(n), g(n);
    w.randomize(1);
    before.randomize(1);
    g.randomize(2);
    std::vector<std::unique_ptr<Array<T>>> memory;
    T* slots[kSlots] = {};
    for (int k = 0; k < kSlots; ++k)
        if (uses_slot(settings, k)) {
            memory.push_back(std::make_unique<Array<T>>(n));
            slots[k] = memory.back()->data;
        }
    const auto run = [&, kernel = kernels<T>().optimize[static_cast<int>(rule)]] {
        kernel(n, w.data, g.data, T{1}, slots, hyper);
    };
    run();
    Check check{kTolerance<T>};
    for (Index i : some_of(n)) {
        const double w0 = static_cast<double>(before.data[i]), gi = static_cast<double>(g.data[i]);
        const double step = reference::first_update(rule, w0, gi, settings.values, kLr) - w0;
        check.equal("update / lr", (static_cast<double>(w.data[i]) - w0) / kLr, step / kLr);
    }
    const double streams = 3.0 + 2.0 * static_cast<double>(memory.size());  // w twice, g once, each slot twice
    measure<T>(state, check, {0, streams * sizeof(T) * static_cast<double>(n)}, run);
}

template <class T>
void penalize(benchmark::State& state, Index n) {
    const T l1 = static_cast<T>(1e-3), l2 = static_cast<T>(1e-2);
    Array<T> w(n), g(n);
    w.randomize(1);
    T total = 0;
    const auto run = [&, kernel = kernels<T>().penalize] { total = kernel(n, w.data, g.data, l1, l2); };
    run();
    Check check{kTolerance<T>};
    double sum = 0;
    for (Index i = 0; i < n; ++i) {
        const double wi = static_cast<double>(w.data[i]);
        sum += 1e-3 * std::abs(wi) + 0.5e-2 * wi * wi;
        check.equal("gradient", g.data[i], std::copysign(1e-3, wi) + 1e-2 * wi);
    }
    check.equal("penalty", total, sum);
    measure<T>(state, check, {0, 3.0 * sizeof(T) * static_cast<double>(n)}, run);
}

template <class T>
void clip(benchmark::State& state, Index n) {
    Array<T> g(n), before(n);
    g.randomize(1);
    before.randomize(1);
    const auto run = [&, kernel = kernels<T>().clip] { kernel(n, g.data, static_cast<T>(0.5)); };
    run();
    Check check{0};
    for (Index i = 0; i < n; ++i)
        check.equal("gradient", g.data[i], std::min(0.5, std::max(-0.5, static_cast<double>(before.data[i]))));
    measure<T>(state, check, {0, 2.0 * sizeof(T) * static_cast<double>(n)}, run);
}

template <class T>
void sum_of_squares(benchmark::State& state, Index n) {
    Array<T> g(n);
    g.randomize(1);
    T total = 0;
    const auto run = [&, kernel = kernels<T>().sum_of_squares] { total = kernel(n, g.data); };
    run();
    Check check{kTolerance<T>};
    double sum = 0;
    for (Index i = 0; i < n; ++i) sum += static_cast<double>(g.data[i]) * static_cast<double>(g.data[i]);
    check.equal("sum", total, sum);
    measure<T>(state, check, {0, 1.0 * sizeof(T) * static_cast<double>(n)}, run);
}

template <class T>
void dropout(benchmark::State& state, RowShape s) {
    constexpr double p = 0.25;
    Matrix<T> x(s.rows, s.cols, 1), y(s.rows, s.cols);
    const auto run = [&, kernel = kernels<T>().dropout] {
        kernel(s.rows, s.cols, x.data, x.stride, y.data, y.stride, p, 42, 7, 0);
    };
    run();
    Check check{kTolerance<T>};
    double kept = 0;
    for (Index i = 0; i < s.rows; ++i)
        for (Index j = 0; j < s.cols; ++j) {
            const double xi = static_cast<double>(x(i, j)), yi = static_cast<double>(y(i, j));
            kept += yi != 0;
            check.equal("y", yi, yi == 0 ? 0 : xi / (1 - p));
        }
    const double n = static_cast<double>(s.rows * s.cols);
    const double deviations = std::abs(kept - n * (1 - p)) / std::sqrt(n * p * (1 - p));
    if (deviations > 6) check.complaint = "kept " + std::to_string(kept / n) + " of the elements, expected 0.75";
    measure<T>(state, check, {0, 2.0 * sizeof(T) * n}, run);
}

// Fork and join of all threads with nothing to do: the cost of one phase of a step.
void fork_join(benchmark::State& state) {
    const int threads = thread_count();
    for (auto _ : state) parallel(threads, [](int, int) {});
}

// ---- the list -------------------------------------------------------------------------------------------------------

// Every benchmark selects its instruction set before it looks up its kernel.
template <class Body>
void add(Isa isa, const std::string& name, const Body& body) {
    benchmark::RegisterBenchmark((std::string(name_of(isa)) + "/" + name).c_str(),
                                 [isa, body](benchmark::State& state) {
                                     select_isa(isa);
                                     body(state);
                                 });
}

template <class T>
void add_linear(Isa isa) {
    using Body = void (*)(benchmark::State&, Shape);
    const std::pair<const char*, Body> forms[] = {{"linear_forward", linear_forward<T>},
                                                  {"linear_vjp_input", linear_vjp_input<T>},
                                                  {"linear_vjp_weight", linear_vjp_weight<T>},
                                                  {"linear_transpose", linear_transpose<T>}};
    for (const auto& [name, body] : forms)
        for (const Shape s : kLinearShapes)
            add(isa, std::string(kTypeName<T>) + "/" + name + "/" + s.name(),
                [body = body, s](benchmark::State& state) { body(state, s); });
}

template <class T>
void add_ops(Isa isa) {
    const std::string type = std::string(kTypeName<T>) + "/";
    const std::pair<const char*, Way> ways[] = {{"_forward/", Way::forward}, {"_vjp/", Way::vjp}, {"_jvp/", Way::jvp}};
    for (const OpRow& row : kOps)
        for (const auto& [suffix, way] : ways)
            for (const RowShape s : kOpShapes)
                add(isa, type + row.name + suffix + s.name(),
                    [&row, way = way, s](benchmark::State& state) { op<T>(state, row, way, s); });
    for (const RowShape s : kOpShapes)
        add(isa, type + "dropout/" + s.name(), [s](benchmark::State& state) { dropout<T>(state, s); });
    for (const LossRow& row : kLosses)
        for (const RowShape s : kLossShapes)
            add(isa, type + row.name + "/" + s.name(), [&row, s](benchmark::State& state) { loss<T>(state, row, s); });
}

template <class T>
void add_flat(Isa isa) {
    const std::string type = std::string(kTypeName<T>) + "/";
    const std::pair<const char*, OptimizerOp> rules[] = {
#define CHAINRULE_OPTIMIZER(name, type) {#name, OptimizerOp::name},
#include "ops/ops.def"
    };
    using Body = void (*)(benchmark::State&, Index);
    const std::pair<const char*, Body> passes[] = {
        {"penalize/", penalize<T>}, {"clip/", clip<T>}, {"sum_of_squares/", sum_of_squares<T>}};
    for (const Index n : kFlatSizes) {
        for (const auto& [name, rule] : rules)
            add(isa, type + name + "/" + std::to_string(n),
                [rule = rule, n](benchmark::State& state) { optimizer<T>(state, rule, n); });
        for (const auto& [name, body] : passes)
            add(isa, type + name + std::to_string(n), [body = body, n](benchmark::State& state) { body(state, n); });
    }
}

template <class T>
void add_all(Isa isa) {
    add_linear<T>(isa);
    add_ops<T>(isa);
    add_flat<T>(isa);
}

}  // namespace

int main(int argc, char** argv) {
    for (const Isa isa : {Isa::avx512, Isa::avx2, Isa::neon, Isa::baseline})
        if (built_in(isa) && runs_here(isa)) {
            add_all<float>(isa);
            add_all<double>(isa);
        }
    benchmark::RegisterBenchmark("fork_join", fork_join)->UseRealTime();
    // 2200 rows: the library's half a second for each would take twenty minutes. A later option overrides this.
    std::vector<char*> arguments(argv, argv + argc);
    char brief[] = "--benchmark_min_time=0.02";
    arguments.insert(arguments.begin() + 1, brief);
    int count = static_cast<int>(arguments.size());
    arguments.push_back(nullptr);
    benchmark::Initialize(&count, arguments.data());
    if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
    machine().describe();
    benchmark::RunSpecifiedBenchmarks();
    return failed ? 1 : 0;
}
