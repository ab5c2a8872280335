// SPDX-License-Identifier: MIT
// L2: update rules over flat parameters, PyTorch's to the letter. Applied to a tile of the gradient while it is in the
// cache, or to the whole gradient where it must be seen first (clipping by global norm): the same loop, the same bits.
// w parameter, g gradient, s0.. the rule's own state ("slots"), zero at first.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace chainrule {

namespace CHAINRULE_ISA {

template <class T>
struct State {
    T* slot[kSlots];
};

// gradient descent: w -= lr g; with momentum s0 = μ s0 + (1 - damping) g and w -= lr s0; Nesterov: w -= lr (g + μ s0).
struct Sgd {
    template <class T>
    CHAINRULE_INLINE Vec<T> update(Index i, Vec<T> w, Vec<T> g, const State<T>& s, const Hyper<T>& h) {
        g = fma(Vec<T>{} + h.weight_decay, w, g);
        if (h.momentum != 0) {
            const Vec<T> buffer = fma(Vec<T>{} + h.momentum, load(s.slot[0] + i), h.undamped * g);
            store(s.slot[0] + i, buffer);
            g = h.nesterov != 0 ? fma(Vec<T>{} + h.momentum, buffer, g) : buffer;
        }
        return fma(Vec<T>{} - h.lr, g, w);
    }
};

// Adam: m = β1 m + (1-β1) g, v = β2 v + (1-β2) g²; w -= lr m̂ / (√v̂ + ε), bias-corrected. Kingma and Ba, ICLR 2015.
template <bool Decoupled>
struct AdamRule {
    template <class T>
    CHAINRULE_INLINE Vec<T> update(Index i, Vec<T> w, Vec<T> g, const State<T>& s, const Hyper<T>& h) {
        if (Decoupled)
            w = w - h.lr * h.weight_decay * w;  // AdamW: Loshchilov and Hutter, ICLR 2019
        else
            g = fma(Vec<T>{} + h.weight_decay, w, g);
        Vec<T> m = load(s.slot[0] + i);
        m = fma(Vec<T>{} + h.rest1, g - m, m);
        const Vec<T> v = fma(h.rest2 * g, g, h.beta2 * load(s.slot[1] + i));
        store(s.slot[0] + i, m);
        store(s.slot[1] + i, v);
        return fma(Vec<T>{} - h.step_size, m / fma(sqrt(v), Vec<T>{} + h.root_scale, Vec<T>{} + h.eps), w);
    }
};
using Adam = AdamRule<false>;
using AdamW = AdamRule<true>;

// RMSprop: v = α v + (1-α) g², w -= lr g / (√v + ε); centered: v less the square of the running mean of g. Hinton, 2012.
struct RmsProp {
    template <class T>
    CHAINRULE_INLINE Vec<T> update(Index i, Vec<T> w, Vec<T> g, const State<T>& s, const Hyper<T>& h) {
        g = fma(Vec<T>{} + h.weight_decay, w, g);
        const Vec<T> v = fma(h.rest_alpha * g, g, h.alpha * load(s.slot[0] + i));
        store(s.slot[0] + i, v);
        Vec<T> spread = v;
        if (h.centered != 0) {
            Vec<T> mean = load(s.slot[2] + i);
            mean = fma(Vec<T>{} + h.rest_alpha, g - mean, mean);
            store(s.slot[2] + i, mean);
            spread = max(fma(-mean, mean, v), Vec<T>{});  // a variance, which rounding may take below 0
        }
        Vec<T> step = g / (sqrt(spread) + h.eps);
        if (h.momentum != 0) {
            step = fma(Vec<T>{} + h.momentum, load(s.slot[1] + i), step);
            store(s.slot[1] + i, step);
        }
        return fma(Vec<T>{} - h.lr, step, w);
    }
};

// The penalty l1 |w| + ½ l2 w² of a weight, and its derivative, the subgradient 0 at 0.
template <class V>
CHAINRULE_INLINE V penalty(V w, Scalar<V> l1, V half_l2) {
    return fma(half_l2, w * w, l1 * abs(w));
}
template <class V>
CHAINRULE_INLINE V penalty_gradient(V w, Scalar<V> l1, Scalar<V> l2) {
    const V sign = select(w == V{}, V{}, copysign(V{} + l1, w));
    return fma(V{} + l2, w, sign);
}

// Clamped to [-limit, limit]; NaN stays.
template <class V>
CHAINRULE_INLINE V clamped(V g, V limit) {
    return select(abs(g) > limit, copysign(limit, g), g);
}

#if !defined(CHAINRULE_DEVICE)
// n is a whole number of cache lines; padding has zero gradient and stays zero under every rule. `scale` multiplies the
// gradient first (clipping by global norm; 1 changes no bit).
template <class Rule, class T>
void optimize(Index n, T* w, const T* g, T scale, T* const* slots, const Hyper<T>& hyper) {
    const State<T> state = {{slots[0], slots[1], slots[2]}};
    const Hyper<T> h = hyper;
    for (Index i = 0; i < n; i += kWidth<T>) store(w + i, Rule::update(i, load(w + i), load(g + i) * scale, state, h));
}

// Adds the penalty l1 |w| + ½ l2 w² to the gradient, returns its sum over the weights.
template <class T>
T penalize(Index n, const T* w, T* g, T l1, T l2) {
    LineSum<T> sum;
    const Vec<T> half_l2 = Vec<T>{} + l2 * static_cast<T>(0.5);
    for (Index line = 0; line < n; line += kLine<T>)
        for (int v = 0; v < LineSum<T>::vectors; ++v) {
            const Index i = line + v * kWidth<T>;
            const Vec<T> wi = load(w + i);
            store(g + i, load(g + i) + penalty_gradient(wi, l1, l2));
            sum.v[v] = sum.v[v] + penalty(wi, l1, half_l2);
        }
    return LineSum<T>::total(sum);
}

template <class T>
void clip(Index n, T* g, T limit) {
    const Vec<T> top = Vec<T>{} + limit;
    for (Index i = 0; i < n; i += kWidth<T>) store(g + i, clamped(load(g + i), top));
}

template <class T>
T sum_of_squares(Index n, const T* g) {
    LineSum<T> sum;
    for (Index line = 0; line < n; line += kLine<T>)
        for (int v = 0; v < LineSum<T>::vectors; ++v) {
            const Vec<T> gi = load(g + line + v * kWidth<T>);
            sum.v[v] = fma(gi, gi, sum.v[v]);
        }
    return LineSum<T>::total(sum);
}

#endif

}  // namespace CHAINRULE_ISA
}  // namespace chainrule
