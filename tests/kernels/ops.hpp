// SPDX-License-Identifier: MIT
// Elementwise and row-wise ops: forward, vjp, jvp, and the maps of second order.
#pragma once

#include "harness.hpp"

namespace chainrule {
namespace {

// ---- ops: the oracle ------------------------------------------------------------------------------------------------

struct OpRow {
    const char* name;
    Op op;
    Saves saves;
    bool rowwise;
    int index() const { return static_cast<int>(op); }
};
constexpr OpRow all_ops[] = {
#define CHAINRULE_ELEMENTWISE(name, type, saves) {#name, Op::name, Saves::saves, false},
#define CHAINRULE_ROWWISE(name, type, saves) {#name, Op::name, Saves::saves, true},
#include "ops/ops.def"
};

double parameter_of(Op op) { return op == Op::leaky_relu ? 0.25 : op == Op::elu ? 1.5 : 0; }

Real sigmoid(Real x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
Real normal_cdf(Real x) { return std::erfc(-x / std::sqrt(Real{2})) / 2; }
Real normal_density(Real x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(Real{-1})); }
Real times(Real x, Real factor) { return factor == 0 ? 0 : x * factor; }  // the limit where the factor vanishes faster

// How many epsilons a result may be off, relative to its size: what the header of each op states. Without FMA a step
// of a polynomial rounds twice, each time something that is at most half as large as the result: 4 more cover that.
// In gelu the rounding error of x² then goes uncorrected: x²/2 units in the exponent of e^(-x²/2).
Real stated_epsilons(Op op, Real x) {
    const Real extra = fused() ? 0 : 4;
    switch (op) {
        case Op::sigmoid: return 3 + extra;
        case Op::tanh: return 5 + extra;
        case Op::elu: return 3 + extra;
        case Op::gelu: return 9 + extra + (fused() || std::isinf(x) ? 0 : x * x / 2);
        case Op::silu: return 4 + extra;
        case Op::softplus: return 3 + extra;
        default: return 0.5L;  // at most one rounding
    }
}

Real forward_value(Op op, Real x, Real p) {
    switch (op) {
        case Op::sigmoid: return sigmoid(x);
        case Op::tanh: return std::tanh(x);
        case Op::relu: return x > 0 ? x : 0;
        case Op::leaky_relu: return x > 0 ? x : p * x;
        case Op::elu: return x > 0 ? x : p * std::expm1(x);
        case Op::gelu: return times(x, normal_cdf(x));
        case Op::silu: return times(x, sigmoid(x));
        case Op::softplus: return std::fmax(x, Real{0}) + std::log1p(std::exp(-std::fabs(x)));
        default: return x;
    }
}

// The derivative from what the op saves, with its error: sums bound their terms, which may cancel.
Bounded derivative_of(Op op, Real saved, Real p) {
    const Real extra = fused() ? 0 : 4, s = saved;
    switch (op) {
        case Op::sigmoid: return {s * (1 - s), 2 * s * (1 - s)};
        case Op::tanh: return {(1 - s) * (1 + s), 2 * (1 - s) * (1 + s)};
        case Op::relu: return {s > 0 ? 1.0L : 0, 0};
        case Op::leaky_relu: return {s > 0 ? 1 : p, 0};
        case Op::elu: return {s > 0 ? 1 : s + p, s > 0 ? 0 : s + p};
        case Op::gelu: {  // the density's exponent is rounded twice
            const Real tail = times(s, normal_density(s)), square = tail == 0 ? 0 : s * s;
            return {normal_cdf(s) + tail, (10 + extra + square) * (normal_cdf(s) + std::fabs(tail))};
        }
        case Op::silu: {
            const Real y = sigmoid(s), tail = times(s, y * sigmoid(-s));
            return {y + tail, (9 + extra) * (y + std::fabs(tail))};
        }
        case Op::softplus: return {sigmoid(s), (3 + extra) * sigmoid(s)};
        default: return {1, 0};
    }
}

// A sum of n terms is taken in 16 (8) lanes, then in halves: so many roundings on the way of each term.
template <class T>
Real roundings(Index n) {
    return static_cast<Real>(padded<T>(n) / line<T>) + 4;
}

using Row = std::vector<Bounded>;

// softmax and its logarithm. An error of the exponent x - m is a relative one of e^(x - m). What the other terms add to
// the 1 of the largest is bounded on its own, as `rest`: the digits of confident predictions are in it.
struct SoftmaxRow {
    Row p, logs;
    Bounded rest{0, 0};
};

template <class T>
SoftmaxRow softmax_row(Index n, const T* x) {
    const Index largest = std::max_element(x, x + n) - x;
    const Real m = static_cast<Real>(x[largest]), extra = fused() ? 0 : 4;
    SoftmaxRow row;
    Real moment = 0;
    for (Index j = 0; j < n; ++j) {
        const Real e = j == largest ? 0 : std::exp(x[j] - m);
        row.rest.value += e;
        moment += times(m - x[j], e);
    }
    const Real rest = row.rest.value, spread = roundings<T>(n) + 2 + extra, log_total = std::log1p(rest);
    row.rest.epsilons = moment + rest * spread;
    const Real sum_error = rest > 0 ? moment / rest + spread : 0;  // relative
    for (Index j = 0; j < n; ++j) {
        const Real below = x[j] - m, y = std::exp(below) / (1 + rest);
        row.p.push_back({y, y * (times(-below, y) / (y > 0 ? y : 1) + row.rest.epsilons / (1 + rest) + 3 + extra)});
        row.logs.push_back({below - log_total, log_total * (sum_error + 4 + extra) - 2 * below});
    }
    return row;
}

template <class T>
Row forward_row(const OpRow& op, Index n, const T* x) {
    if (op.op == Op::softmax) return softmax_row(n, x).p;
    if (op.op == Op::log_softmax) return softmax_row(n, x).logs;
    Row row;
    for (Index j = 0; j < n; ++j) {
        const Real y = forward_value(op.op, x[j], parameter_of(op.op));
        row.push_back({y, std::fabs(y) * stated_epsilons(op.op, x[j])});
    }
    return row;
}

// d J for the row d (vjp), or J d (jvp).
template <class T>
Row derivative_row(const OpRow& op, bool reverse, Index n, const T* d, const T* saved) {
    const Real extra = fused() ? 0 : 4, depth = roundings<T>(n) + 4 + extra;
    Row row;
    Real inner = 0, inner_size = 0;
    for (Index j = 0; j < n; ++j) {
        const Real y = saved[j], dj = d[j], p = op.op == Op::softmax ? y : std::exp(y);
        const Real term = op.op == Op::log_softmax && reverse ? dj : p * dj;
        inner += term;
        inner_size += std::fabs(term);
        if (!op.rowwise) {
            const Bounded g = derivative_of(op.op, y, parameter_of(op.op));
            row.push_back({dj * g.value, std::fabs(dj) * (g.epsilons + std::fabs(g.value))});
        } else if (op.op == Op::softmax) {
            row.push_back({p * dj, p * (2 * std::fabs(dj))});
        } else {
            row.push_back({dj, 2 * std::fabs(dj)});
        }
    }
    for (Index j = 0; op.rowwise && j < n; ++j) {
        const Real y = saved[j];
        const Real factor = op.op == Op::softmax ? y : reverse ? std::exp(y) : 1;
        Bounded& b = row[static_cast<std::size_t>(j)];
        b.value -= factor * inner;
        b.epsilons += factor * depth * inner_size;
    }
    return row;
}

// ---- ops: the tests -------------------------------------------------------------------------------------------------

constexpr Index kRows = 3;

// Mostly what networks see, some of it far out, and (`limits`) the values at which formulas break.
template <class T>
T draw_input(Random& random, bool limits) {
    using L = std::numeric_limits<T>;
    const T special[] = {0,           -T{0},           L::infinity(),    -L::infinity(), L::max(),
                         L::lowest(), L::denorm_min(), -L::denorm_min(), L::min(),       -L::min()};
    switch (random.integer(0, 15)) {
        case 0: return limits ? special[random.integer(0, 9)] : T{0};
        case 1: return static_cast<T>(random.uniform(-1e-4, 1e-4));
        case 2:
        case 3: return static_cast<T>(random.uniform(-85, 85));
        default: return static_cast<T>(random.uniform(-6, 6));
    }
}

template <class T>
void run_map(const OpRow& op, const Matrix<T>& x, const Matrix<T>& y) {
    kernels<T>().forward[op.index()](x.rows, x.cols, x.data(), x.stride, y.data(), y.stride,
                                     static_cast<T>(parameter_of(op.op)));
}

template <class T>
void run_derivative(const OpRow& op, bool reverse, const Matrix<T>& d, const Matrix<T>& saved, const Matrix<T>& out) {
    const auto kernel = reverse ? kernels<T>().vjp[op.index()] : kernels<T>().jvp[op.index()];
    kernel(d.rows, d.cols, d.data(), d.stride, saved.data(), saved.stride, out.data(), out.stride,
           static_cast<T>(parameter_of(op.op)));
}

template <class T>
void forward_case(const OpRow& op, Index cols, Record<T>& record) {
    Random random = begin_case<T>(op.name, kRows, cols);
    Matrix<T> x(kRows, cols);  // its padding is NaN
    const Matrix<T> y(kRows, cols, 1);
    x.fill([&](Index, Index) { return draw_input<T>(random, !op.rowwise); });
    x.freeze();
    run_map(op, x, y);
    for (Index i = 0; i < kRows; ++i)
        check_within("forward agrees with the formula", cols, y.row(i), forward_row(op, cols, x.row(i)).data());
    check(x.unchanged(), "forward only reads x");
    check(y.gaps_hold(), "forward writes nothing beyond the padded rows");
    record.same(y);
    x.pad_with_maximum();
    run_map(op, x, x);
    check_bits("the same in place and with other padding", x, y);
}

template <class T>
void derivative_case(const OpRow& op, bool reverse, Index cols, Record<T>& record) {
    Random random = begin_case<T>(op.name, kRows, cols, reverse);
    const char* name = reverse ? "vjp agrees with the formula" : "jvp agrees with the formula";
    Matrix<T> d(kRows, cols, 1), saved(kRows, cols);
    const Matrix<T> out(kRows, cols, 2);
    d.fill([&](Index, Index) { return random.uniform(-2, 2); });
    saved.fill([&](Index, Index) { return draw_input<T>(random, !op.rowwise); });
    if (op.saves == Saves::output) run_map(op, saved, saved);
    d.freeze();
    saved.freeze();
    run_derivative(op, reverse, d, saved, out);
    for (Index i = 0; i < kRows; ++i)
        check_within(name, cols, out.row(i), derivative_row(op, reverse, cols, d.row(i), saved.row(i)).data());
    check(d.unchanged() && saved.unchanged(), "a derivative only reads its inputs");
    check(out.gaps_hold(), "a derivative writes nothing beyond the padded rows");
    if (op.rowwise) check(out.padding_is_zero(), "row-wise derivatives write zeros into the padding");
    record.same(out);
    d.pad_with_maximum();
    saved.pad_with_maximum();
    run_derivative(op, reverse, d, saved, d);
    check_bits("the same in place and with other padding", d, out);
}

// g'' from g', which is a function of what is saved: by differences in long double, right to some 1e-10.
Real bend_of(Op op, Saves saves, Real saved, Real p) {
    const Real h = 1e-6L;
    const auto slope = [&](Real s) { return derivative_of(op, s, p).value; };
    const Real change = (slope(saved + h) - slope(saved - h)) / (2 * h);
    return saves == Saves::output ? change * slope(saved) : change;
}

// The tangent of vjp (reverse) or of jvp. Row-wise formulas are left to the Python tests; here they must keep to their
// memory and agree among the instruction sets.
template <class T>
void second_case(const OpRow& op, bool reverse, Index cols, Record<T>& record) {
    Random random = begin_case<T>(op.name, kRows, cols, 2 + reverse);
    Matrix<T> v(kRows, cols, 1), dx(kRows, cols), dv(kRows, cols, 2), saved(kRows, cols), out(kRows, cols, 1);
    for (Matrix<T>* m : {&v, &dx, &dv}) m->fill([&](Index, Index) { return random.uniform(-2, 2); });
    saved.fill([&](Index, Index) { return random.uniform(-6, 6); });
    if (op.saves == Saves::output) run_map(op, saved, saved);
    for (Matrix<T>* m : {&v, &dx, &dv, &saved}) m->freeze();
    const auto kernel = (reverse ? second_kernels<T>().vjp_jvp : second_kernels<T>().jvp_jvp)[op.index()];
    const auto view = [](const Matrix<T>& m) { return MatrixView<const T>{m.data(), m.rows, m.cols, m.stride}; };
    const auto run = [&] {
        kernel(view(reverse ? v : dx), view(dx), view(dv), view(saved), {out.data(), out.rows, out.cols, out.stride},
               static_cast<T>(parameter_of(op.op)));
    };
    run();
    for (Index i = 0; i < kRows && !op.rowwise; ++i)
        for (Index j = 0; j < cols; ++j) {
            const Real s = saved.at(i, j), p = parameter_of(op.op);
            if (std::fabs(s) < 1e-5L) continue;  // too near to a kink for a difference
            const Real bend = bend_of(op.op, op.saves, s, p), slope = derivative_of(op.op, s, p).value;
            const Real product = static_cast<Real>((reverse ? v : dx).at(i, j)) * dx.at(i, j), straight = dv.at(i, j);
            const Bounded want = {straight * slope + product * bend,
                                  40 * (std::fabs(straight) + std::fabs(product)) +
                                      1e-9L / static_cast<Real>(std::numeric_limits<T>::epsilon())};
            check_within("second order agrees with differences of the first", 1, &out.at(i, j), &want);
        }
    check(v.unchanged() && dx.unchanged() && dv.unchanged() && saved.unchanged(), "its inputs are only read");
    check(out.gaps_hold(), "nothing is written beyond the padded rows");
    if (op.rowwise) check(out.padding_is_zero(), "row-wise derivatives write zeros into the padding");
    record.same(out);
    const std::vector<T> before(out.data(), out.data() + out.size());
    for (Matrix<T>* m : {&v, &dx, &dv, &saved}) m->pad_with_maximum();
    run();
    bool same = true;
    for (Index i = 0; i < kRows; ++i)
        same = same && std::memcmp(out.row(i), before.data() + (out.row(i) - out.data()),
                                   static_cast<std::size_t>(cols) * sizeof(T)) == 0;
    check(same, "the same with other padding");
}

// The padding of every cotangent stays zero, since the gradient of the weights' padding is read off it. The engine
// runs vjp in place. What is saved has in its padding what forward passes leave there: g(0), and a 1 where a bias
// multiplies it.
template <class T>
void padding_case(const OpRow& op, Index cols) {
    Random random = begin_case<T>(op.name, kRows, cols);
    const Matrix<T> d(kRows, cols), saved(kRows, cols);
    d.fill([&](Index, Index) { return random.uniform(-2, 2); });
    saved.fill([&](Index, Index) { return random.uniform(-2, 2); });
    d.clear_padding();
    saved.clear_padding();
    for (Index i = 0; i < kRows && cols < saved.stride; ++i) saved.at(i, cols) = 1;
    if (op.saves == Saves::output) run_map(op, saved, saved);
    for (Index i = 0; i < kRows && cols < saved.stride; ++i) saved.at(i, cols) = 1;
    run_derivative(op, true, d, saved, d);
    check(d.padding_is_zero(), "vjp in place keeps zero padding zero");
}

void ops_agree() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa_same_bits<T>([](Record<T>& record) {
            for (const OpRow& op : all_ops)
                for (const Index cols : widths()) {
                    forward_case(op, cols, record);
                    derivative_case(op, true, cols, record);
                    derivative_case(op, false, cols, record);
                    second_case(op, true, cols, record);
                    second_case(op, false, cols, record);
                    padding_case<T>(op, cols);
                }
        });
    });
}

// NaN in lane j and nowhere else: out_j is NaN, and elementwise ops leave every other lane as it was. A maximum with
// its operands the wrong way round swallows NaN; a wrong mask in the tail swallows it at some widths only.
template <class T>
void check_one_nan(const OpRow& op, const char* rule, Index j, const Matrix<T>& got, const Matrix<T>& clean) {
    bool others = true;
    for (Index l = 0; l < got.cols && !op.rowwise; ++l)
        others = others && (l == j || std::memcmp(&got.at(0, l), &clean.at(0, l), sizeof(T)) == 0);
    check(std::isnan(got.at(0, j)) && others, rule);
}

template <class T>
void nan_case(const OpRow& op, Index cols) {
    Random random = begin_case<T>(op.name, 1, cols);
    const Matrix<T> x(1, cols), saved(1, cols), d(1, cols), y(1, cols), dx(1, cols), dy(1, cols), got(1, cols);
    x.fill([&](Index, Index) { return random.uniform(-3, 3); });
    d.fill([&](Index, Index) { return random.uniform(-3, 3); });
    run_map(op, x, y);
    std::copy_n((op.saves == Saves::output ? y : x).data(), cols, saved.data());
    run_derivative(op, true, d, saved, dx);
    run_derivative(op, false, d, saved, dy);
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (Index j = 0; j < cols; ++j) {
        const T xj = std::exchange(x.at(0, j), nan);
        run_map(op, x, got);
        check_one_nan(op, "forward passes NaN on", j, got, y);
        x.at(0, j) = xj;
        const T dj = std::exchange(d.at(0, j), nan);
        run_derivative(op, true, d, saved, got);
        check_one_nan(op, "vjp passes a NaN cotangent on", j, got, dx);
        run_derivative(op, false, d, saved, got);
        check_one_nan(op, "jvp passes a NaN tangent on", j, got, dy);
        d.at(0, j) = dj;
        if (op.saves == Saves::none) continue;
        const T sj = std::exchange(saved.at(0, j), nan);
        run_derivative(op, true, d, saved, got);
        check_one_nan(op, "vjp passes a NaN activation on", j, got, dx);
        run_derivative(op, false, d, saved, got);
        check_one_nan(op, "jvp passes a NaN activation on", j, got, dy);
        saved.at(0, j) = sj;
    }
}

void ops_nan() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            for (const OpRow& op : all_ops)
                for (Index cols = 1; cols <= 70; cols += quick ? 5 : 1) nan_case<T>(op, cols);
        });
    });
}

// What rounding bounds cannot see: kinks, signs of zero, rows at infinity.
template <class T>
void limit_cases() {
    const T inf = std::numeric_limits<T>::infinity(), zero = 0;
    const auto one = [](Op op, T x) {
        const OpRow& row = all_ops[static_cast<int>(op)];
        begin_case<T>(row.name, 1, 1);
        const Matrix<T> in(1, 1), out(1, 1);
        in.at(0, 0) = x;
        run_map(row, in, out);
        return out.at(0, 0);
    };
    const auto slope = [](Op op, T saved) {
        const OpRow& row = all_ops[static_cast<int>(op)];
        begin_case<T>(row.name, 1, 1);
        const Matrix<T> d(1, 1), in(1, 1), out(1, 1);
        d.at(0, 0) = 1;
        in.at(0, 0) = saved;
        run_derivative(row, true, d, in, out);
        return out.at(0, 0);
    };
    check(slope(Op::relu, zero) == 0 && slope(Op::relu, -zero) == 0, "relu'(0) = relu'(-0) = 0");
    check(slope(Op::leaky_relu, zero) == T(0.25) && slope(Op::leaky_relu, -zero) == T(0.25),
          "leaky_relu'(0) is the slope");
    check(slope(Op::elu, zero) == T(1.5), "elu'(0) = alpha");
    check(one(Op::tanh, -zero) == 0 && std::signbit(one(Op::tanh, -zero)), "tanh keeps the sign of zero");
    check(one(Op::sigmoid, -zero) == T(0.5) && one(Op::sigmoid, zero) == T(0.5), "sigmoid(0) = 1/2");
    check(one(Op::gelu, -inf) == 0 && one(Op::silu, -inf) == 0 && one(Op::softplus, -inf) == 0, "limits at -inf");
    check(one(Op::elu, -inf) == T(-1.5) && one(Op::tanh, -inf) == -1 && one(Op::sigmoid, -inf) == 0, "limits at -inf");
}

// softmax of rows with infinite elements: one +inf is one-hot wherever it stands, all -inf is uniform.
template <class T>
void infinite_rows(Index cols) {
    begin_case<T>("softmax", cols + 1, cols);
    const T inf = std::numeric_limits<T>::infinity();
    const Matrix<T> x(cols + 1, cols), y(cols + 1, cols), logs(cols + 1, cols);
    x.fill([&](Index i, Index j) { return i == cols ? -inf : i == j ? inf : static_cast<T>(j % 5); });
    run_map(all_ops[static_cast<int>(Op::softmax)], x, y);
    run_map(all_ops[static_cast<int>(Op::log_softmax)], x, logs);
    bool hot = true, uniform = true;
    for (Index i = 0; i < cols; ++i)
        for (Index j = 0; j < cols; ++j) hot = hot && y.at(i, j) == (i == j) && logs.at(i, j) == (i == j ? T{0} : -inf);
    for (Index j = 0; j < cols; ++j) uniform = uniform && y.at(cols, j) == 1 / static_cast<T>(cols);
    check(hot, "a row with one +inf is one-hot");
    check(uniform, "a row of -inf is uniform");
}

void ops_limits() {
    in_both_types([](auto zero) {
        using T = decltype(zero);
        on_each_isa([] {
            limit_cases<T>();
            for (Index cols = 1; cols <= 70; ++cols) infinite_rows<T>(cols);
        });
    });
}

}  // namespace
}  // namespace chainrule
