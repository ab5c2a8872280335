// SPDX-License-Identifier: MIT
// Update rules, penalties, clipping.
#pragma once

#include "harness.hpp"

namespace chainrule {
namespace {

// ---- update rules ---------------------------------------------------------------------------------------------------

struct RuleCase {
    const char* name;
    OptimizerSettings settings;
    std::int64_t step;
};
constexpr RuleCase all_rules[] = {
    {"sgd", {OptimizerOp::sgd, {0, 0, 0, 0}}, 5},
    {"sgd with decay", {OptimizerOp::sgd, {0, 0, 0, 0.01}}, 5},
    {"sgd with momentum", {OptimizerOp::sgd, {0.9, 0.1, 0, 0.01}}, 5},
    {"sgd with momentum, first step", {OptimizerOp::sgd, {0.9, 0.1, 0, 0}}, 1},
    {"sgd, Nesterov", {OptimizerOp::sgd, {0.9, 0, 1, 0.01}}, 5},
    {"adam", {OptimizerOp::adam, {0.9, 0.999, 1e-8, 0}}, 1},
    {"adam, slow, first step", {OptimizerOp::adam, {0.999, 0.9999, 1e-8, 0}}, 1},
    {"adam with decay", {OptimizerOp::adam, {0.8, 0.99, 1e-3, 0.01}}, 7},
    {"adamw", {OptimizerOp::adamw, {0.9, 0.999, 1e-8, 0.01}}, 1000},
    {"rmsprop", {OptimizerOp::rmsprop, {0.99, 1e-8, 0, 0, 0}}, 3},
    {"rmsprop with momentum", {OptimizerOp::rmsprop, {0.9, 1e-3, 0.01, 0.9, 0}}, 3},
    {"rmsprop, slow, first step", {OptimizerOp::rmsprop, {0.999, 1e-8, 0, 0, 0}}, 1},
    {"rmsprop, centered", {OptimizerOp::rmsprop, {0.9, 1e-3, 0, 0.5, 1}}, 3},
};
constexpr double kRate = 0.05;

// One parameter after a step. PyTorch's rules in long double, on the hyper-parameters as the user gave them: were
// 1 - beta taken from a beta rounded to float32, it would be off by beta / (1 - beta) epsilons.
struct Updated {
    Bounded w, slot[kSlots];
};

Bounded exactly(Real value) { return {value, 0}; }
Bounded add(Bounded a, Bounded b) {
    return {a.value + b.value, a.epsilons + b.epsilons + std::fabs(a.value) + std::fabs(b.value)};
}
Bounded scaled(Bounded a, Real factor) {  // the factor is rounded, then the product
    return {a.value * factor, (a.epsilons + 2 * std::fabs(a.value)) * std::fabs(factor)};
}
Bounded square(Bounded a) { return {a.value * a.value, 2 * std::fabs(a.value) * a.epsilons + a.value * a.value}; }
Bounded root(Bounded a) {
    const Real r = std::sqrt(a.value);
    return {r, r + (r > 0 ? a.epsilons / (2 * r) : 0)};
}
Bounded over(Bounded a, Bounded b) {
    const Real q = a.value / b.value;
    return {q, (a.epsilons + std::fabs(q) * b.epsilons) / std::fabs(b.value) + std::fabs(q)};
}
Bounded mix(Real mean, Real keep, Bounded g) { return add(scaled(exactly(mean), keep), scaled(g, 1 - keep)); }
// The same as mean + (1 - keep)(g - mean), PyTorch's lerp: the difference is rounded before it is scaled.
Bounded lerp(Real mean, Real keep, Bounded g) {
    Bounded moved = mix(mean, keep, g);
    moved.epsilons += (1 - keep) * (std::fabs(g.value) + std::fabs(mean));
    return moved;
}

template <class T>
Updated sgd_oracle(const OptimizerSettings& s, std::int64_t step, T w, Bounded g, const T* slot) {
    const auto [momentum, dampening, nesterov, decay, unused] = s.values;
    Updated u{};
    g = add(g, scaled(exactly(w), decay));
    if (momentum != 0) {
        u.slot[0] = add(scaled(exactly(slot[0]), momentum), scaled(g, step == 1 ? 1 : 1 - dampening));
        g = nesterov != 0 ? add(g, scaled(u.slot[0], momentum)) : u.slot[0];
    }
    u.w = add(exactly(w), scaled(g, -kRate));
    return u;
}

template <class T>
Updated adam_oracle(const OptimizerSettings& s, std::int64_t step, T w, Bounded g, const T* slot) {
    const auto [beta1, beta2, eps, decay, unused] = s.values;
    const Real correction1 = 1 - std::pow(static_cast<Real>(beta1), static_cast<Real>(step));
    const Real correction2 = 1 - std::pow(static_cast<Real>(beta2), static_cast<Real>(step));
    // beta^t is worked out in float64, whose rounding is seen in this share of the correction.
    const Real cancelled = (sizeof(T) == 8 ? 1 : 1e-8L) / std::fmin(correction1, correction2);
    Updated u{};
    Bounded start = exactly(w);
    if (s.rule == OptimizerOp::adamw)
        start = add(start, scaled(scaled(exactly(w), decay), -kRate));
    else
        g = add(g, scaled(exactly(w), decay));
    u.slot[0] = lerp(slot[0], beta1, g);
    u.slot[1] = mix(slot[1], beta2, square(g));
    const Bounded spread = scaled(root(u.slot[1]), 1 / std::sqrt(correction2));
    Bounded move = over(scaled(u.slot[0], kRate / correction1), add(spread, exactly(eps)));
    move.epsilons += (2 + 2 * cancelled) * std::fabs(move.value);
    u.w = add(start, scaled(move, -1));
    return u;
}

template <class T>
Updated rmsprop_oracle(const OptimizerSettings& s, T w, Bounded g, const T* slot) {
    const auto [alpha, eps, decay, momentum, centered] = s.values;
    Updated u{};
    g = add(g, scaled(exactly(w), decay));
    Bounded spread = u.slot[0] = mix(slot[0], alpha, square(g));
    if (centered != 0) {
        u.slot[2] = lerp(slot[2], alpha, g);
        spread = add(spread, scaled(square(u.slot[2]), -1));
    }
    Bounded move = over(g, add(root(spread), exactly(eps)));
    if (momentum != 0) move = u.slot[1] = add(move, scaled(exactly(slot[1]), momentum));
    u.w = add(exactly(w), scaled(move, -kRate));
    return u;
}

template <class T>
Updated rule_oracle(const RuleCase& rule, T w, T g, T scale, const T* slot) {
    const OptimizerSettings& s = rule.settings;
    const Bounded gradient = scaled(exactly(g), scale);
    if (s.rule == OptimizerOp::sgd) return sgd_oracle(s, rule.step, w, gradient, slot);
    if (s.rule == OptimizerOp::rmsprop) return rmsprop_oracle(s, w, gradient, slot);
    return adam_oracle(s, rule.step, w, gradient, slot);
}

// The arrays of one update: `real` parameters, then padding to whole lines, which is zero.
template <class T>
struct RuleArrays {
    Fenced<T> w, g, slot0, slot1, slot2;
    explicit RuleArrays(Index n) : w(n), g(n), slot0(n), slot1(n), slot2(n) {}
    std::array<const Fenced<T>*, kSlots> slots() const { return {&slot0, &slot1, &slot2}; }
    void run(const RuleCase& rule, T scale) const {
        T* used[kSlots];
        for (int s = 0; s < kSlots; ++s)
            used[s] = uses_slot(rule.settings, s) ? slots()[static_cast<std::size_t>(s)]->data() : nullptr;
        const Hyper<T> hyper = prepare_step<T>(rule.settings, kRate, rule.step);
        kernels<T>().optimize[static_cast<int>(rule.settings.rule)](w.size(), w.data(), g.data(), scale, used, hyper);
    }
    // Before the first step the state is zero, so that each term of it shows in full.
    void fill(const RuleCase& rule, Index real, Random& random) const {
        const OptimizerOp op = rule.settings.rule;
        const bool adam = op == OptimizerOp::adam || op == OptimizerOp::adamw, fresh = rule.step == 1;
        const auto put = [&](const Fenced<T>& to, Index i, double low, double high, bool zero) {
            const double value = random.uniform(low, high);
            to[i] = zero || i >= real ? T{0} : static_cast<T>(value);
        };
        for (Index i = 0; i < w.size(); ++i) {
            put(w, i, -1, 1, false);
            put(g, i, -1, 1, false);
            put(slot0, i, op == OptimizerOp::rmsprop ? 0.5 : -1, 1, fresh);  // a mean square, or a mean
            put(slot1, i, adam ? 0.01 : -1, 1, fresh);
            put(slot2, i, -0.5, 0.5, fresh);
        }
    }
};

template <class T>
void rule_case(const RuleCase& rule, Index lines, Record<T>& record) {
    const Index n = lines * line<T>, real = n - line<T> / 2;
    Random random = begin_case<T>(rule.name, n);
    const T scale = static_cast<T>(0.7);
    RuleArrays<T> a(n);
    a.fill(rule, real, random);
    Row w, slots[kSlots];
    for (Index i = 0; i < real; ++i) {
        const T old[kSlots] = {a.slot0[i], a.slot1[i], a.slot2[i]};
        const Updated u = rule_oracle(rule, a.w[i], a.g[i], scale, old);
        w.push_back(u.w);
        for (int s = 0; s < kSlots; ++s) slots[s].push_back(u.slot[s]);
    }
    a.g.freeze();
    a.run(rule, scale);
    check_within("parameters follow the rule", real, a.w.data(), w.data());
    record.same(1, n, a.w.data(), n);
    bool zero = std::all_of(a.w.data() + real, a.w.data() + n, [](T v) { return v == 0; }), held = a.w.fence_holds();
    for (int s = 0; s < kSlots; ++s) {
        const Fenced<T>& slot = *a.slots()[static_cast<std::size_t>(s)];
        held = held && slot.fence_holds();
        if (!uses_slot(rule.settings, s)) continue;
        check_within("the state follows the rule", real, slot.data(), slots[s].data());
        record.same(1, n, slot.data(), n);
        zero = zero && std::all_of(slot.data() + real, slot.data() + n, [](T v) { return v == 0; });
    }
    check(zero, "padding of weights and state stays zero");
    check(held && a.g.unchanged(), "the gradient is only read, nothing is written outside");
}

template <class T>
void rule_nan_case(const RuleCase& rule) {
    const Index n = 2 * line<T>;
    for (Index j = 0; j < n; ++j) {
        Random random = begin_case<T>(rule.name, n, j);
        const RuleArrays<T> a(n);
        a.fill(rule, n, random);
        a.g[j] = std::numeric_limits<T>::quiet_NaN();
        a.run(rule, T{1});
        check(std::count_if(a.w.data(), a.w.data() + n, [](T v) { return std::isnan(v); }) == 1 && std::isnan(a.w[j]),
              "a NaN gradient shows in its parameter and in no other");
    }
}

// In exact arithmetic v - mean² is never negative. Rounded it may be, where both come down to a constant gradient's
// values and stop a few ulps short, and the root of it would be NaN for ever.
template <class T>
void centered_case() {
    const Index n = 4 * line<T>;
    for (const double alpha : {0.5, 0.9, 0.99}) {
        const RuleCase rule = {
            "rmsprop, centered, constant gradient", {OptimizerOp::rmsprop, {alpha, 1e-8, 0, 0, 1}}, 1};
        Random random = begin_case<T>(rule.name, n, static_cast<Index>(alpha * 100));
        const RuleArrays<T> a(n);
        for (Index i = 0; i < n; ++i) {
            a.g[i] = static_cast<T>(random.uniform(-1, 1));
            a.w[i] = a.slot0[i] = a.slot1[i] = a.slot2[i] = 0;
        }
        for (int step = 0; step < 3000; ++step) a.run(rule, step < 10 ? T{3} : T{1});
        check(std::none_of(a.w.data(), a.w.data() + n, [](T v) { return std::isnan(v); }),
              "no NaN from a constant gradient");
    }
}

void optimizers() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Record<T>& record) {
            for (const RuleCase& rule : all_rules) {
                for (const Index lines : {1, 2, 3, 4, 5, 17}) rule_case(rule, lines, record);
                rule_nan_case<T>(rule);
            }
            centered_case<T>();
        });
    });
}

// ---- penalty, clipping, norm ----------------------------------------------------------------------------------------

template <class T>
void penalty_case(Index lines, T l1, T l2, Record<T>& record) {
    const Index n = lines * line<T>;
    Random random = begin_case<T>("penalize", n, l1 != 0, l2 != 0);
    Fenced<T> w(n);
    const Fenced<T> g(n);
    Row grad;
    Real value = 0;
    for (Index i = 0; i < n; ++i) {
        w[i] = random.integer(0, 7) == 0 ? T{0} : static_cast<T>(random.uniform(-2, 2));
        g[i] = static_cast<T>(random.uniform(-1, 1));
        const Real wi = w[i], sign = wi > 0 ? 1 : wi < 0 ? -1 : 0;
        value += l1 * std::fabs(wi) + static_cast<Real>(l2) * wi * wi / 2;
        grad.push_back(
            {g[i] + l1 * sign + l2 * wi, 2 * (std::fabs(static_cast<Real>(g[i])) + l1 + l2 * std::fabs(wi))});
    }
    w.freeze();
    const T got = kernels<T>().penalize(n, w.data(), g.data(), l1, l2);
    const Bounded want = {value, value * (roundings<T>(n) + 3)};
    check_within("the penalty is l1 |w| + l2 w²/2, summed", 1, &got, &want);
    check_within("its derivative is added to the gradient", n, g.data(), grad.data());
    check(w.unchanged() && g.fence_holds(), "weights are only read");
    record.same(1, 1, &got, 1);
    record.same(1, n, g.data(), n);
}

template <class T>
void norm_case(Index lines, Record<T>& record) {
    const Index n = lines * line<T>;
    Random random = begin_case<T>("sum_of_squares", n);
    Fenced<T> g(n);
    Real exact = 0;
    for (Index i = 0; i < n; ++i) {
        g[i] = static_cast<T>(random.uniform(-1, 1));
        exact += static_cast<Real>(g[i]) * g[i];
    }
    g.freeze();
    const T got = kernels<T>().sum_of_squares(n, g.data());
    const Bounded want = {exact, exact * (roundings<T>(n) + 1)};
    check_within("the sum of squares", 1, &got, &want);
    check(g.unchanged(), "the gradient is only read");
    record.same(1, 1, &got, 1);
    const Index j = random.integer(0, n - 1);
    g[j] = std::numeric_limits<T>::quiet_NaN();
    check(std::isnan(kernels<T>().sum_of_squares(n, g.data())), "a NaN in any lane makes the norm NaN");
}

template <class T>
void clip_case(Index lines) {
    const Index n = lines * line<T>;
    const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN(),
            limit = static_cast<T>(0.7);
    Random random = begin_case<T>("clip", n);
    const T special[] = {0, -T{0}, limit, -limit, std::nextafter(limit, inf), inf, -inf};
    const Fenced<T> g(n), want(n);
    for (Index i = 0; i < n; ++i) {
        const T value =
            random.integer(0, 1) == 0 ? special[random.integer(0, 6)] : static_cast<T>(random.uniform(-2, 2));
        g[i] = value;
        want[i] = value > limit ? limit : value < -limit ? -limit : value;
    }
    const Index j = random.integer(0, n - 1);
    g[j] = want[j] = nan;
    kernels<T>().clip(n, g.data(), limit);
    check_bits("clamped to [-limit, limit], NaN stays", 1, n, g.data(), n, want.data(), n);
    check(g.fence_holds(), "nothing is written before the gradient");
}

void penalties() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Record<T>& record) {
            for (const Index lines : {1, 2, 3, 4, 5, 17, 192}) {
                penalty_case<T>(lines, T(0.1), T(0), record);
                penalty_case<T>(lines, T(0), T(0.3), record);
                penalty_case<T>(lines, T(0.1), T(0.3), record);
                norm_case<T>(lines, record);
                clip_case<T>(lines);
            }
            begin_case<T>("penalize", 0);
            check(kernels<T>().penalize(0, nullptr, nullptr, T(1), T(1)) == 0,
                  "no weights, no penalty");  // a tile of a bias alone
        });
    });
}

}  // namespace
}  // namespace chainrule
