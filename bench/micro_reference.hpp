// SPDX-License-Identifier: MIT
// What every op must compute, in plain double precision, one row at a time: the measure micro.cpp holds kernels against
// before it times them. Derivatives come from central differences of the values, so they cannot share a mistake.
// A switch over all ops without a default: an op that is added to ops.def and not here is a compiler warning.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"

namespace reference {

using chainrule::LossOp;
using chainrule::Op;
using chainrule::OptimizerOp;
using Row = std::vector<double>;

constexpr double kStep = 1e-6;  // of the central differences: error about 1e-10

inline double log_sum_exp(const Row& x) {
    const double largest = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (double v : x) sum += std::exp(v - largest);
    return largest + std::log(sum);
}

inline double elementwise(Op op, double z, double param) {
    switch (op) {
        case Op::identity: return z;
        case Op::sigmoid: return 1 / (1 + std::exp(-z));
        case Op::tanh: return std::tanh(z);
        case Op::relu: return std::max(z, 0.0);
        case Op::leaky_relu: return z > 0 ? z : param * z;
        case Op::elu: return z > 0 ? z : param * std::expm1(z);
        case Op::gelu: return z / 2 * (1 + std::erf(z / std::sqrt(2.0)));
        case Op::silu: return z / (1 + std::exp(-z));
        case Op::softplus: return std::log1p(std::exp(z));
        case Op::softmax:
        case Op::log_softmax:
        case Op::count: break;
    }
    return std::nan("");
}

inline Row forward(Op op, const Row& x, double param) {
    Row y = x;
    const double shift = op == Op::softmax || op == Op::log_softmax ? log_sum_exp(x) : 0;
    for (double& v : y) {
        if (op == Op::softmax)
            v = std::exp(v - shift);
        else if (op == Op::log_softmax)
            v -= shift;
        else
            v = elementwise(op, v, param);
    }
    return y;
}

inline Row moved(const Row& x, const Row& direction, double step) {
    Row y = x;
    for (std::size_t j = 0; j < x.size(); ++j) y[j] += step * direction[j];
    return y;
}

// The tangent J dx of a layer.
inline Row jvp(Op op, const Row& x, const Row& dx, double param) {
    Row up = forward(op, moved(x, dx, kStep), param);
    const Row down = forward(op, moved(x, dx, -kStep), param);
    for (std::size_t j = 0; j < up.size(); ++j) up[j] = (up[j] - down[j]) / (2 * kStep);
    return up;
}

// The loss of one example with outputs f and targets y (one class label for cross_entropy).
inline double loss(LossOp op, const Row& f, const Row& y, double param) {
    if (op == LossOp::cross_entropy) return log_sum_exp(f) - f[static_cast<std::size_t>(y[0])];
    const std::size_t n = y.size();
    double sum = 0;
    for (std::size_t j = 0; j < n; ++j) {
        const double d = f[j] - y[j];
        switch (op) {
            case LossOp::least_squares: sum += d * d / 2 * static_cast<double>(n); break;
            case LossOp::mse: sum += d * d; break;
            case LossOp::mae: sum += std::abs(d); break;
            case LossOp::huber: sum += std::abs(d) <= param ? d * d / 2 : param * (std::abs(d) - param / 2); break;
            case LossOp::pinball: sum += std::max(-param * d, (1 - param) * d); break;
            case LossOp::poisson: sum += std::exp(f[j]) - y[j] * f[j]; break;
            case LossOp::gaussian_nll: sum += (f[n + j] + d * d * std::exp(-f[n + j])) / 2; break;
            case LossOp::logistic: sum += std::log1p(std::exp(f[j])) - y[j] * f[j]; break;
            case LossOp::cross_entropy:
            case LossOp::count: break;
        }
    }
    return sum / static_cast<double>(n);
}

// The loss's derivative in one direction.
inline double slope(LossOp op, const Row& f, const Row& y, const Row& direction, double param) {
    return (loss(op, moved(f, direction, kStep), y, param) - loss(op, moved(f, direction, -kStep), y, param)) /
           (2 * kStep);
}

// The parameter after the first step of a rule, from zero state, with the settings micro.cpp gives it.
inline double first_update(OptimizerOp rule, double w, double g, const double* v, double lr) {
    switch (rule) {
        case OptimizerOp::sgd: return w - lr * (g + v[3] * w);
        case OptimizerOp::adam: return w - lr * g / (std::abs(g) + v[2]);
        case OptimizerOp::adamw: return w * (1 - lr * v[3]) - lr * g / (std::abs(g) + v[2]);
        case OptimizerOp::rmsprop: return w - lr * g / (std::sqrt((1 - v[0]) * g * g) + v[1]);
        case OptimizerOp::count: break;
    }
    return std::nan("");
}

}  // namespace reference
