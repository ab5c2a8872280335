// SPDX-License-Identifier: MIT
// Losses: value, gradient and Hessian-vector product.
#pragma once

#include "ops.hpp"

namespace chainrule {
namespace {

// ---- losses ---------------------------------------------------------------------------------------------------------

struct LossRow {
    const char* name;
    LossOp op;
};
constexpr LossRow all_losses[] = {
#define CHAINRULE_LOSS(name, type) {#name, LossOp::name},
#include "ops/ops.def"
};

double parameter_of(LossOp op) { return op == LossOp::huber ? 0.75 : op == LossOp::pinball ? 0.3 : 0; }

bool is_mean(LossOp op) { return op != LossOp::least_squares && op != LossOp::cross_entropy; }

struct Term {  // of one output: value and derivative
    Bounded value, grad;
};

Term loss_term(LossOp op, Real f, Real y, Real p) {
    const Real d = f - y, a = std::fabs(d), more = fused() ? 0 : 4;
    switch (op) {
        case LossOp::least_squares: return {{d * d / 2, 2 * d * d}, {d, 2 * a}};
        case LossOp::mse: return {{d * d, 3 * d * d}, {2 * d, 4 * a}};
        case LossOp::mae: return {{a, a}, {d > 0 ? 1.0L : d < 0 ? -1.0L : 0, 0}};
        case LossOp::huber:
            if (a <= p) return {{d * d / 2, 2 * d * d}, {d, a}};
            return {{p * (a - p / 2), 4 * p * a}, {d > 0 ? p : -p, 0}};
        case LossOp::pinball: {
            const Real slope = d < 0 ? p : d > 0 ? p - 1 : 0;
            return {{-slope * d, 3 * a}, {-slope, 1}};
        }
        case LossOp::poisson: {
            const Real rate = std::exp(f), product = times(f, y);
            return {{rate - product, (2 + more) * (rate + std::fabs(product))}, {rate - y, (2 + more) * (rate + y)}};
        }
        default: {  // logistic
            const Real rest = std::log1p(std::exp(-std::fabs(f)));
            const Real right = rest + std::fmax(-f, Real{0}), wrong = rest + std::fmax(f, Real{0});
            const Real value = times(right, y) + times(wrong, 1 - y);
            const Real grad = y == 1 ? -sigmoid(-f) : sigmoid(f) - y;  // at the ends of [0, 1] every digit counts
            return {{value, (6 + more) * value}, {grad, (4 + more) * (y == 1 ? sigmoid(-f) : sigmoid(f) + y)}};
        }
    }
}

// Gaussian negative log-likelihood of output j of k: writes both derivatives, returns the value.
Bounded gaussian_term(Real mean, Real s, Real y, Bounded& dmean, Bounded& ds) {
    const Real d = mean - y, precision = std::exp(-s), q = d * d * precision, more = fused() ? 0 : 4;
    dmean = {d * precision, (4 + more) * std::fabs(d) * precision};
    ds = {(1 - q) / 2, (4 + more) * (1 + q)};
    return {(s + q) / 2, (4 + more) * (std::fabs(s) + q)};
}

// Cross-entropy with probabilities y, or (y null) a label.
template <class T>
Bounded cross_entropy_row(Index n, const T* f, const T* y, std::int64_t label, Row& grad) {
    const SoftmaxRow s = softmax_row(n, f);
    const Real more = roundings<T>(n) + 4;
    const auto target = [&](std::size_t j) {
        return y ? static_cast<Real>(y[j]) : static_cast<Real>(static_cast<Index>(j) == label);
    };
    Real mass = 0;
    Bounded value{0, 0};
    for (std::size_t j = 0; j < s.p.size(); ++j) mass += target(j);
    for (std::size_t j = 0; j < s.p.size(); ++j) {
        value.value -= times(s.logs[j].value, target(j));
        value.epsilons += times(s.logs[j].epsilons - (y ? more : 1) * s.logs[j].value, target(j));
        const Real p = s.p[j].value * mass;
        grad[j] = {p - target(j), s.p[j].epsilons * mass + (more + 2) * (p + target(j))};
    }
    if (!y && f[label] == *std::max_element(f, f + n)) {  // p - 1 is minus the others' share, and as exact as that
        const Real share = s.rest.value / (1 + s.rest.value);
        grad[static_cast<std::size_t>(label)] = {-share, s.rest.epsilons * 2 / (1 + s.rest.value) + 4 * share};
    }
    return value;
}

// One row of a loss: derivatives into `grad`, not yet multiplied by weight and scale; returns the value.
template <class T>
Bounded loss_row(LossOp op, Index n, const T* f, const T* y, std::int64_t label, Row& grad) {
    grad.assign(static_cast<std::size_t>(n), Bounded{0, 0});
    if (op == LossOp::cross_entropy) return cross_entropy_row(n, f, y, label, grad);
    const bool pairs = op == LossOp::gaussian_nll;
    const Index count = pairs ? n / 2 : n;
    const Real share = is_mean(op) ? 1 / static_cast<Real>(count) : 1, more = roundings<T>(n) + 4;
    Real value = 0, bound = 0;
    for (Index j = 0; j < count; ++j) {
        Bounded& g = grad[static_cast<std::size_t>(j)];
        Bounded term;
        if (pairs) {
            term = gaussian_term(f[j], f[count + j], y[j], g, grad[static_cast<std::size_t>(count + j)]);
        } else {
            const Term t = loss_term(op, f[j], y[j], parameter_of(op));
            term = t.value;
            g = t.grad;
        }
        value += term.value;
        bound += term.epsilons + more * std::fabs(term.value);
    }
    for (Bounded& g : grad) g = {g.value * share, (g.epsilons + 2 * std::fabs(g.value)) * share};
    return {value * share, (bound + 2 * std::fabs(value)) * share};
}

// The arrays of one call.
template <class T>
struct LossCase {
    const LossRow& loss;
    const bool labelled;
    Matrix<T> f, y, df;
    Fenced<T> weight, values;
    Fenced<std::int64_t> labels;

    LossCase(const LossRow& row, bool with_labels, Index rows, Index cols, Random& random)
        : loss(row),
          labelled(with_labels),
          f(rows, cols),
          y(rows, row.op == LossOp::gaussian_nll ? cols / 2 : cols, 1),
          df(rows, cols, 1),
          weight(rows),
          values(rows),
          labels(rows) {
        f.fill(
            [&](Index, Index) { return random.integer(0, 9) == 0 ? random.uniform(-40, 40) : random.uniform(-3, 3); });
        y.fill([&](Index, Index) { return draw_target(random); });
        for (Index i = 0; i < rows; ++i) {
            weight[i] = static_cast<T>(random.uniform(0.1, 2));
            labels[i] = random.integer(0, cols - 1);
        }
    }
    double draw_target(Random& random) const {
        switch (loss.op) {
            case LossOp::poisson: return static_cast<double>(random.integer(0, 5));
            case LossOp::logistic:
            case LossOp::cross_entropy:
                return random.integer(0, 2) == 0 ? static_cast<double>(random.integer(0, 1)) : random.uniform(0, 1);
            default: return random.uniform(-3, 3);
        }
    }
    void freeze() {
        f.freeze();
        y.freeze();
        weight.freeze();
        labels.freeze();
    }
    bool unchanged() const { return f.unchanged() && y.unchanged() && weight.unchanged() && labels.unchanged(); }
    Targets<T> targets_of() const {
        return {labelled ? labels.data() : nullptr, labelled ? nullptr : y.data(), labelled ? 0 : y.stride};
    }
    void run_hvp(bool weighted, T scale, const Matrix<T>& t) const {
        second_kernels<T>().loss_hvp[static_cast<int>(loss.op)](
            {f.data(), f.rows, f.cols, f.stride}, targets_of(), weighted ? weight.data() : nullptr, scale,
            {t.data(), t.rows, t.cols, t.stride}, {df.data(), df.rows, df.cols, df.stride},
            static_cast<T>(parameter_of(loss.op)));
    }
    void run(bool weighted, T scale) const {
        const Targets<T> targets = targets_of();
        kernels<T>().loss[static_cast<int>(loss.op)](f.rows, f.cols, f.data(), f.stride, targets,
                                                     weighted ? weight.data() : nullptr, scale, values.data(),
                                                     df.data(), df.stride, static_cast<T>(parameter_of(loss.op)));
    }
};

template <class T>
void loss_case(const LossRow& loss, bool labelled, bool weighted, Index cols, Record<T>& record) {
    Random random = begin_case<T>(loss.name, kRows, cols, 2 * labelled + weighted);
    LossCase<T> c(loss, labelled, kRows, cols, random);
    c.freeze();
    const T scale = static_cast<T>(0.3);
    c.run(weighted, scale);
    for (Index i = 0; i < kRows; ++i) {
        Row grad;
        const Bounded value =
            loss_row(loss.op, cols, c.f.row(i), labelled ? nullptr : c.y.row(i), labelled ? c.labels[i] : -1, grad);
        check_within("value agrees with the formula", 1, &c.values[i], &value);
        const Real factor = static_cast<Real>(scale) * (weighted ? static_cast<Real>(c.weight[i]) : 1);
        for (Bounded& g : grad) g = {g.value * factor, (g.epsilons + 3 * std::fabs(g.value)) * factor};
        check_within("gradient agrees with the formula", cols, c.df.row(i), grad.data());
    }
    check(c.unchanged(), "a loss only reads its inputs");
    check(c.df.gaps_hold() && c.values.fence_holds(), "a loss writes nothing beyond its outputs");
    check(c.df.padding_is_zero(), "the padding of the cotangent is zero");
    record.same(1, kRows, c.values.data(), kRows);
    record.same(c.df);
    const std::vector<T> values(c.values.data(), c.values.data() + kRows), df(c.df.data(), c.df.data() + c.df.size());
    c.f.pad_with_maximum();
    c.y.pad_with_maximum();
    c.run(weighted, scale);
    check_bits("the same value with other padding", 1, kRows, c.values.data(), 0, values.data(), 0);
    check_bits("the same gradient with other padding", 1, c.df.size(), c.df.data(), 0, df.data(), 0);
}

// H t keeps to its memory, is the same with other padding, and agrees among the instruction sets; the formulas are left to
// the Python tests.
template <class T>
void hvp_case(const LossRow& loss, bool labelled, bool weighted, Index cols, Record<T>& record) {
    Random random = begin_case<T>(loss.name, kRows, cols, 4 + 2 * labelled + weighted);
    LossCase<T> c(loss, labelled, kRows, cols, random);
    Matrix<T> t(kRows, cols, 2);
    t.fill([&](Index, Index) { return random.uniform(-2, 2); });
    c.freeze();
    t.freeze();
    c.run_hvp(weighted, static_cast<T>(0.3), t);
    check(c.unchanged() && t.unchanged(), "its inputs are only read");
    check(c.df.gaps_hold(), "nothing is written beyond the outputs");
    check(c.df.padding_is_zero(), "the padding is zero");
    record.same(c.df);
    const std::vector<T> before(c.df.data(), c.df.data() + c.df.size());
    for (Matrix<T>* m : {&c.f, &c.y, &t}) m->pad_with_maximum();
    c.run_hvp(weighted, static_cast<T>(0.3), t);
    check_bits("the same with other padding", 1, c.df.size(), c.df.data(), 0, before.data(), 0);
}

// NaN in one output, then in one target: the value is NaN, so is the derivative there; where outputs do not interact no
// other derivative changes.
template <class T>
void loss_nan_case(const LossRow& loss, bool labelled, Index cols) {
    Random random = begin_case<T>(loss.name, 1, cols, labelled);
    const LossCase<T> c(loss, labelled, 1, cols, random);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    c.y.at(0, c.y.cols - 1) = T(0.5);  // probabilities that are all 0 ask for nothing
    c.run(false, 1);
    const std::vector<T> clean(c.df.data(), c.df.data() + cols);
    const auto poisoned = [&](T& place, Index j, const char* rule) {
        const T old = std::exchange(place, nan);
        c.run(false, 1);
        bool good = std::isnan(c.values[0]) && std::isnan(c.df[j]);
        const Index partner = loss.op == LossOp::gaussian_nll ? (j + cols / 2) % cols : j;
        for (Index l = 0; l < cols && loss.op != LossOp::cross_entropy; ++l)
            good = good && (l == j || l == partner ||
                            std::memcmp(&c.df[l], &clean[static_cast<std::size_t>(l)], sizeof(T)) == 0);
        check(good, rule);
        place = old;
    };
    for (Index j = 0; j < cols; ++j) poisoned(c.f[j], j, "NaN in one output shows in value and gradient");
    for (Index j = 0; j < c.y.cols && !labelled; ++j)
        poisoned(c.y[j], j, "NaN in one target shows in value and gradient");
}

template <class F>
void over_losses(F f) {
    for (const LossRow& loss : all_losses)
        for (const bool labelled : {false, true})
            if (!labelled || loss.op == LossOp::cross_entropy)
                f(loss, labelled, loss.op == LossOp::gaussian_nll ? 2 : 1);
}

void losses() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Record<T>& record) {
            over_losses([&](const LossRow& loss, bool labelled, Index even) {
                for (const Index cols : widths())
                    for (const bool weighted : {false, true}) {
                        loss_case(loss, labelled, weighted, cols * even, record);
                        hvp_case(loss, labelled, weighted, cols * even, record);
                    }
                for (Index cols = 1; cols <= 70; cols += quick ? 5 : 1) loss_nan_case<T>(loss, labelled, cols * even);
            });
        });
    });
}

// Certain and right costs nothing, certain and wrong costs infinity; neither is NaN.
template <class T>
void loss_limit_cases() {
    const T inf = std::numeric_limits<T>::infinity();
    const auto value = [](LossOp op, T f, T y) {
        Random random = begin_case<T>(all_losses[static_cast<int>(op)].name, 1, 1);
        const LossCase<T> c(all_losses[static_cast<int>(op)], false, 1, 1, random);
        c.f[0] = f;
        c.y[0] = y;
        c.run(false, 1);
        return std::array<T, 2>{c.values[0], c.df[0]};
    };
    using Pair = std::array<T, 2>;
    check(value(LossOp::logistic, inf, 1) == Pair{0, 0} && value(LossOp::logistic, -inf, 0) == Pair{0, 0},
          "logistic: sure and right");
    check(value(LossOp::logistic, inf, 0) == Pair{inf, 1} && value(LossOp::logistic, -inf, 1) == Pair{inf, -1},
          "logistic: sure and wrong");
    check(value(LossOp::logistic, inf, T(0.5))[0] == inf, "logistic: sure where nothing is sure");
    check(value(LossOp::poisson, inf, 3)[0] == inf && value(LossOp::poisson, -inf, 0) == Pair{0, 0},
          "poisson at infinity");
    check(value(LossOp::poisson, -inf, 3)[0] == inf, "poisson: a rate of 0 and a count");
    for (const LossOp op : {LossOp::mae, LossOp::huber, LossOp::pinball, LossOp::mse, LossOp::least_squares})
        check(value(op, T(0.5), T(0.5)) == Pair{0, 0}, "value and gradient 0 where the prediction is right");
}

void loss_limits() {
    in_both_types([](auto zero) { on_each_isa([] { loss_limit_cases<decltype(zero)>(); }); });
}

}  // namespace
}  // namespace chainrule
