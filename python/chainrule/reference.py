# SPDX-License-Identifier: MIT
"""The whole of chainrule in plain NumPy, float64: read this first.

A network is a chain  x = φ⁰ → φ¹ → … → φᴸ = f,  closed by a loss 𝓛(f, y). Each link has three maps:

    forward   φˡ⁻¹        ↦  φˡ = gˡ(φˡ⁻¹)
    vjp       c = ∂𝓛/∂φˡ  ↦  c J[φˡ] = ∂𝓛/∂φˡ⁻¹     reverse mode: a row times the Jacobian
    jvp       t = φ̇ˡ⁻¹    ↦  J[φˡ] t = φ̇ˡ           forward mode: the Jacobian times a column

Numerator layout: J_x[y] is M×N for y ∈ Rᴹ and x ∈ Rᴺ, so the gradient of a scalar is a row. No Jacobian is
ever formed; the maps themselves have tangents, which give products with Hessians. Examples are stacked as
rows: X is (B, I) for B examples of I inputs. Brackets name sections of the lecture.

>>> rng = np.random.default_rng(0)
>>> net = Network([Linear(rng.normal(size=(4, 3)), np.zeros(4)), Op("tanh"), Linear(rng.normal(size=(2, 4)))])
>>> x, t, c = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
>>> phi = net.forward(x)
>>> dphi, grads = net.backward(phi, c)
>>> bool(np.isclose((c * net.tangent(phi, t)[-1]).sum(), (dphi[0] * t).sum()))  # c (J t) = (c J) t
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # an ndarray of float64, or int64 for labels
Map = Callable[..., Array]

# ---- ops: one row each, forward beside Jacobian ------------------------------------------------------------


class Rule(NamedTuple):
    """The maps of an op with input x, output y and parameter a; c a cotangent, t a tangent, dc, dt theirs."""

    forward: Map  # (x, a) -> y
    vjp: Map  # (c, x, y, a) -> c J
    jvp: Map  # (t, x, y, a) -> J t
    vjp_jvp: Map  # (c, t, dc, x, y, a) -> d(c J), its tangent along t
    jvp_jvp: Map  # (t, t, dt, x, y, a) -> d(J t)


def elementwise(g: Map, slope: Map, bend: Map) -> Rule:
    """J = diag(g′), symmetric: both products are v g′, with g′ read off y where that is exact, else off x."""

    def product(v: Array, x: Array, y: Array, a: Array) -> Array:
        return v * slope(x, y, a)

    def tangent(v: Array, t: Array, dv: Array, x: Array, y: Array, a: Array) -> Array:
        return dv * slope(x, y, a) + v * t * bend(x, y, a)  # d(v g′) = dv g′ + v g″ t

    return Rule(g, product, product, tangent, tangent)


def total(v: Array) -> Array:
    return v.sum(axis=-1, keepdims=True)


def softmax_tangent(v: Array, t: Array, dv: Array, x: Array, y: Array, a: Array) -> Array:
    """d(y v − y Σ v y), with dy = y (t − Σ y t)."""
    dy = y * (t - total(y * t))
    return dy * (v - total(v * y)) + y * (dv - total(dv * y + v * dy))


def off(t: Array, y: Array) -> Array:
    """The tangent t − Σ p t of y = log p."""
    return t - total(np.exp(y) * t)


def times(a: Array, b: Array) -> Array:
    """The product a b with 0·∞ = 0, its limit wherever 0 is approached faster than ∞."""
    with np.errstate(invalid="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def sigmoid(x: Array) -> Array:
    """σ(x) = 1/(1 + e⁻ˣ), arranged so that the exponential never overflows."""
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


normal_cdf: Map = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2, otypes=[float])


def normal_density(x: Array) -> Array:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def log_softmax(x: Array) -> Array:
    """x − log Σ eˣ, with the greatest x moved to 0: its e⁰ = 1 is the 1 of log1p."""
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    z = np.subtract(x, top, where=x != top, out=np.zeros_like(x))  # 0 at the top even if the top is ∞
    first = np.arange(x.shape[-1]) == z.argmax(axis=-1)[:, None]
    return z - np.log1p(np.where(first, 0.0, np.exp(z)).sum(axis=-1, keepdims=True))


# fmt: off
OPS: dict[str, Rule] = {
    # name                     y = g(x); g′, at a kink the one from the left; g″, at a kink 0
    "identity":    elementwise(lambda x, a: x, lambda x, y, a: 1.0, lambda x, y, a: 0.0),
    "sigmoid":     elementwise(lambda x, a: sigmoid(x), lambda x, y, a: y * (1 - y),
                               lambda x, y, a: y * (1 - y) * (1 - 2 * y)),
    "tanh":        elementwise(lambda x, a: np.tanh(x), lambda x, y, a: (1 - y) * (1 + y),
                               lambda x, y, a: -2 * y * (1 - y) * (1 + y)),
    "relu":        elementwise(lambda x, a: np.maximum(x, 0), lambda x, y, a: y > 0, lambda x, y, a: 0.0),
    "leaky_relu":  elementwise(lambda x, a: np.where(x > 0, x, times(a, x)),
                               lambda x, y, a: np.where(y > 0, 1, a), lambda x, y, a: 0.0),
    "elu":         elementwise(lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))),
                               lambda x, y, a: np.where(y > 0, 1, y + a),
                               lambda x, y, a: np.where(y < 0, y + a, 0)),
    "gelu":        elementwise(lambda x, a: times(x, normal_cdf(x)),
                               lambda x, y, a: normal_cdf(x) + times(x, normal_density(x)),
                               lambda x, y, a: times(normal_density(x), 2 - x * x)),
    "silu":        elementwise(lambda x, a: times(x, sigmoid(x)),
                               lambda x, y, a: sigmoid(x) + times(x, sigmoid(x) * sigmoid(-x)),
                               lambda x, y, a: times(sigmoid(x) * sigmoid(-x), 2 - x * np.tanh(x / 2))),
    "softplus":    elementwise(lambda x, a: np.logaddexp(0, x), lambda x, y, a: sigmoid(x),
                               lambda x, y, a: sigmoid(x) * sigmoid(-x)),
    # by rows: J = diag(y) − yᵀy for softmax, J = I − 1ᵀ softmax(x) for its logarithm
    "softmax":     Rule(lambda x, a: np.exp(log_softmax(x)),
                        lambda c, x, y, a: y * (c - total(c * y)),
                        lambda t, x, y, a: y * (t - total(y * t)), softmax_tangent, softmax_tangent),
    "log_softmax": Rule(lambda x, a: log_softmax(x),
                        lambda c, x, y, a: c - np.exp(y) * total(c),
                        lambda t, x, y, a: t - total(np.exp(y) * t),
                        lambda c, t, dc, x, y, a: dc - np.exp(y) * (total(dc) + off(t, y) * total(c)),
                        lambda t, _, dt, x, y, a: dt - total(np.exp(y) * (dt + off(t, y) * t))),
}
# fmt: on

# ---- losses: value and gradient of each example from one function, so that they cannot disagree ------------

Loss = Callable[[Array, Array, float], tuple[Array, Array]]  # f (B, n), y, a -> L (B,), ∂L/∂f (B, n)


def averaged(rule: Loss) -> Loss:
    """The mean over the n outputs of a loss that is given output by output."""

    def over_outputs(f: Array, y: Array, a: float) -> tuple[Array, Array]:
        value, df = rule(f, y, a)
        return value.mean(axis=-1), df / f.shape[-1]

    return over_outputs


def least_squares(f: Array, y: Array, a: float) -> tuple[Array, Array]:
    """½ Σ (y − f)², with the gradient (y − f)(−1). [Loss function for regression]"""
    return 0.5 * ((y - f) ** 2).sum(axis=-1), f - y


def logistic(f: Array, y: Array, a: float) -> tuple[Array, Array]:
    """−[y log σ(f) + (1 − y) log(1 − σ(f))], with the gradient σ(f) − y. [Loss function for classification]

    The lecture's L is the log-likelihood, to be maximised; the loss is its negative, hence the signs.
    """
    value = times(y, np.logaddexp(0, -f)) + times(1 - y, np.logaddexp(0, f))
    return value, (1 - y) * sigmoid(f) - y * sigmoid(-f)


def huber(f: Array, y: Array, a: float) -> tuple[Array, Array]:
    """½ d² up to |d| = a, from there on along the tangent."""
    d = f - y
    return np.where(abs(d) <= a, d * d / 2, a * (abs(d) - a / 2)), np.clip(d, -a, a)


def cross_entropy(f: Array, y: Array, a: float) -> tuple[Array, Array]:
    """−Σ p log softmax(f), with the gradient softmax(f) Σp − p. Labels y mean p = onehot(y)."""
    p = np.eye(f.shape[-1])[y] if y.ndim == 1 else y
    log_q = log_softmax(f)
    return -times(p, log_q).sum(axis=-1), np.exp(log_q) * p.sum(axis=-1, keepdims=True) - p


def gaussian_nll(f: Array, y: Array, a: float) -> tuple[Array, Array]:
    """−log N(y; μ, eˢ) without its constant, mean over the k targets; f = [μ (k), s (k)]."""
    mu, s = np.split(f, 2, axis=-1)
    z = (mu - y) * np.exp(-s)
    return 0.5 * (s + z * (mu - y)).mean(axis=-1), np.hstack([z, 0.5 - 0.5 * z * (mu - y)]) / mu.shape[-1]


def gaussian_hessian(f: Array, y: Array, a: float, t: Array) -> Array:
    (mu, s), (t_mu, t_s) = np.split(f, 2, axis=-1), np.split(t, 2, axis=-1)
    z, k = (mu - y) * np.exp(-s), mu.shape[-1]
    return np.hstack([np.exp(-s) * t_mu - z * t_s, 0.5 * z * (mu - y) * t_s - z * t_mu]) / k


def cross_entropy_hessian(f: Array, y: Array, a: float, t: Array) -> Array:
    q = np.exp(log_softmax(f))
    return (1.0 if y.ndim == 1 else total(y)) * q * (t - total(q * t))


# fmt: off
LOSSES: dict[str, Loss] = {
    "least_squares": least_squares,
    "mse":           averaged(lambda f, y, a: ((f - y) ** 2, 2 * (f - y))),
    "mae":           averaged(lambda f, y, a: (abs(f - y), np.sign(f - y))),
    "huber":         averaged(huber),
    "pinball":       averaged(lambda f, y, a: (np.maximum(a * (y - f), (a - 1) * (y - f)),
                                               (1 - a) * (f > y) - a * (f < y))),
    "poisson":       averaged(lambda f, y, a: (np.exp(f) - times(y, f), np.exp(f) - y)),  # f = log rate
    "gaussian_nll":  gaussian_nll,
    "logistic":      averaged(logistic),
    "cross_entropy": cross_entropy,
}
HESSIANS: dict[str, Map] = {  # f, y, a, t -> H t for each example; 0 at kinks
    "least_squares": lambda f, y, a, t: t,
    "mse":           lambda f, y, a, t: 2 * t / f.shape[-1],
    "mae":           lambda f, y, a, t: 0 * t,
    "huber":         lambda f, y, a, t: (abs(f - y) <= a) * t / f.shape[-1],
    "pinball":       lambda f, y, a, t: 0 * t,
    "poisson":       lambda f, y, a, t: np.exp(f) * t / f.shape[-1],
    "gaussian_nll":  gaussian_hessian,
    "logistic":      lambda f, y, a, t: sigmoid(f) * sigmoid(-f) * t / f.shape[-1],
    "cross_entropy": cross_entropy_hessian,
}
# fmt: on


def loss(
    name: str, f: Array, y: Array, weight: Array = None, a: float = 0.0, reduction: str = "mean"
) -> tuple[float, Array]:
    """𝓛 = Σ wᵢLᵢ / Σ wᵢ ("sum": without the denominator) and ∂𝓛/∂f. "If we swap L, only ∂L/∂f changes"."""
    value, df = LOSSES[name](f, y, a)
    w = shares(len(f), weight, reduction)
    return float(times(w, value).sum()), w[:, None] * df


def loss_hvp(name: str, f: Array, y: Array, t: Array, *, a: float = 0.0, **how: Any) -> Array:
    """The Hessian of 𝓛 in f times t: the tangent of ∂𝓛/∂f where f moves along t."""
    return shares(len(f), **how)[:, None] * HESSIANS[name](f, y, a, t)


def shares(rows: int, weight: Array = None, reduction: str = "mean") -> Array:
    """What each example counts in 𝓛."""
    w = np.ones(rows) if weight is None else weight
    return w / w.sum() if reduction == "mean" else w


# ---- the chain ---------------------------------------------------------------------------------------------


class Linear:
    """z = W x + b; for rows Z = X Wᵀ + b, with W (O, I) and b (O,). [Let's now finish the optimization]"""

    def __init__(self, W: Array, b: Array = None) -> None:
        self.params: list[Array] = [W] if b is None else [W, b]

    def forward(self, x: Array) -> Array:
        return x @ self.params[0].T + sum(self.params[1:])

    def vjp(self, c: Array, x: Array, z: Array) -> tuple[Array, list[Array]]:
        """∂𝓛/∂x = c W; ∂𝓛/∂W = cᵀx and ∂𝓛/∂b = c, both summed over the examples."""
        return c @ self.params[0], [c.T @ x, c.sum(axis=0)][: len(self.params)]

    def jvp(self, t: Array, x: Array, z: Array, dparams: Sequence[Array] = ()) -> Array:
        """ż = W ẋ + Ẇ x + ḃ."""
        return t @ self.params[0].T + (x @ dparams[0].T + sum(dparams[1:]) if dparams else 0.0)

    def vjp_jvp(self, c: Array, t: Array, dc: Array, x: Array, dW: Array) -> tuple[Array, list[Array]]:
        """The tangents of c W, of cᵀx and of c by the product rule."""
        ddx = dc @ self.params[0] + c @ dW
        return ddx, [dc.T @ x + c.T @ t, dc.sum(axis=0)][: len(self.params)]


class Op:
    """A row of OPS as a link of the chain; it has nothing to learn."""

    def __init__(self, name: str, a: Array = 0.0) -> None:
        self.rule, self.a, self.params = OPS[name], a, list[Array]()

    def forward(self, x: Array) -> Array:
        return self.rule.forward(x, self.a)

    def vjp(self, c: Array, x: Array, y: Array) -> tuple[Array, list[Array]]:
        return self.rule.vjp(c, x, y, self.a), []

    def jvp(self, t: Array, x: Array, y: Array, dparams: Sequence[Array] = ()) -> Array:
        return self.rule.jvp(t, x, y, self.a)


class Dropout(Op):
    """φ ↦ m φ, J = diag(m): m is 0 for a random share p, 1/(1 − p) for the rest, and 1 outside training."""

    def __init__(self, mask: Array = 1.0) -> None:
        self.rule = elementwise(lambda x, a: a * x, lambda x, y, a: a, lambda x, y, a: 0.0)
        self.a, self.params = mask, []


class Network:
    """The chain itself. [Let's generalize everything]"""

    def __init__(self, layers: Iterable[Linear | Op]) -> None:
        self.layers = list(layers)

    @property
    def params(self) -> list[Array]:
        return [p for layer in self.layers for p in layer.params]

    def forward(self, x: Array) -> list[Array]:
        """Step 1 of the lecture, "store all φˡ": φ⁰ = x, φ¹, …, φᴸ = f."""
        phi = [x]
        for layer in self.layers:
            phi.append(layer.forward(phi[-1]))
        return phi

    def backward(self, phi: list[Array], c: Array) -> tuple[list[Array], list[Array]]:
        """Step 2, from c = ∂𝓛/∂φᴸ: all ∂𝓛/∂φˡ = c J[φᴸ] ⋯ J[φˡ⁺¹], and all ∂𝓛/∂Wˡ = ∂𝓛/∂φˡ J_Wˡ[φˡ]."""
        dphi: list[Array] = [c]
        grads: list[Array] = []
        for layer, x, y in zip(self.layers[::-1], phi[-2::-1], phi[:0:-1], strict=True):
            dx, dparams = layer.vjp(dphi[0], x, y)
            dphi, grads = [dx, *dphi], dparams + grads
        return dphi, grads

    def tangent(self, phi: list[Array], t: Array, dparams: Sequence[Array] = ()) -> list[Array]:
        """Forward mode, from t = ẋ (and Ẇ, ḃ, … if given): every φ̇ˡ = J[φˡ] φ̇ˡ⁻¹ + J_Wˡ[φˡ] Ẇˡ."""
        dots, rest = [t], iter(dparams)
        for layer, x, y in zip(self.layers, phi[:-1], phi[1:], strict=True):
            dots.append(layer.jvp(dots[-1], x, y, [next(rest) for _ in layer.params] if dparams else ()))
        return dots

    def tangent_backward(self, phi: list[Array], dots: list[Array], dphi: list[Array], dc: Array,
                         dparams: Sequence[Array]) -> list[Array]:  # fmt: skip
        """Forward over reverse: the tangents of all gradients, from those of the φˡ and of c = ∂𝓛/∂φᴸ."""
        grads: list[Array] = []
        rest = list(dparams)
        for layer, c, t, x, y in list(zip(self.layers, dphi[1:], dots, phi, phi[1:], strict=False))[::-1]:
            if isinstance(layer, Op):
                dc = layer.rule.vjp_jvp(c, t, dc, x, y, layer.a)
                continue
            own = [rest.pop() for _ in layer.params][::-1]
            dc, dgrads = layer.vjp_jvp(c, t, dc, x, own[0])
            grads = dgrads + grads
        return grads

    def second_tangent(self, phi: list[Array], dots: list[Array]) -> Array:
        """d²f/ds² along x + s t: every φ̈ˡ from φ̈ˡ⁻¹ and φ̇ˡ⁻¹, from φ̈⁰ = 0."""
        dt = 0 * phi[0]
        for layer, t, x, y in zip(self.layers, dots, phi, phi[1:], strict=False):
            dt = layer.rule.jvp_jvp(t, t, dt, x, y, layer.a) if isinstance(layer, Op) else layer.jvp(dt, x, y)
        return dt

    def hvp(self, X: Array, y: Array, loss_name: str, v: Sequence[Array], **how: Any) -> list[Array]:
        """H v, the Hessian of 𝓛 in all parameters times a direction: the tangent of the gradient along v."""
        phi = self.forward(X)
        dots = self.tangent(phi, 0 * X, v)
        dphi, _ = self.backward(phi, loss(loss_name, phi[-1], y, **how)[1])
        return self.tangent_backward(phi, dots, dphi, loss_hvp(loss_name, phi[-1], y, dots[-1], **how), v)

    def value_and_grad(self, X: Array, y: Array, loss_name: str, **how: Any) -> tuple[float, list[Array]]:
        """𝓛 and its gradient in every parameter: up the chain, through the loss, down the chain."""
        phi = self.forward(X)
        value, df = loss(loss_name, phi[-1], y, **how)
        return value, self.backward(phi, df)[1]


# ---- optimizers: update k = 1, 2, … of a parameter w, in place; g is its gradient, s the rule's memory -----


def sgd(w: Array, g: Array, s: dict[str, Array], k: int, lr: float, *, momentum: float = 0.0,
        dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> None:  # fmt: skip
    """w ← w − lr v, v ← momentum v + (1 − dampening) g. Nesterov: look one step of the velocity v ahead."""
    g = g + weight_decay * w
    if momentum:
        v = s["v"] = momentum * s["v"] + (1 - dampening) * g if k > 1 else g
        g = g + momentum * v if nesterov else v
    w -= lr * g


def adam(w: Array, g: Array, s: dict[str, Array], k: int, lr: float, *, beta1: float = 0.9,
         beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0) -> None:  # fmt: skip
    """w ← w − lr m̂ / (√v̂ + eps): running means of g and g², each divided by the weight it has so far."""
    g = g + weight_decay * w
    m = s["m"] = beta1 * s.get("m", 0.0) + (1 - beta1) * g
    v = s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * g * g
    w -= lr * m / (1 - beta1**k) / (np.sqrt(v / (1 - beta2**k)) + eps)


def adamw(w: Array, g: Array, s: dict[str, Array], k: int, lr: float, *, weight_decay: float = 0.01,
          **hyper: float) -> None:  # fmt: skip
    """Adam whose decay acts on w itself instead of passing through the running means."""
    w *= 1 - lr * weight_decay
    adam(w, g, s, k, lr, **hyper)


def rmsprop(w: Array, g: Array, s: dict[str, Array], k: int, lr: float, *, alpha: float = 0.99,
            eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
            centered: bool = False) -> None:  # fmt: skip
    """w ← w − lr u, u ← momentum u + g / (√v + eps), v the running mean of g² (centered: its variance)."""
    g = g + weight_decay * w
    v = s["v"] = alpha * s.get("v", 0.0) + (1 - alpha) * g * g
    m = s["m"] = (alpha * s.get("m", 0.0) + (1 - alpha) * g) if centered else 0.0
    u = s["u"] = momentum * s.get("u", 0.0) + g / (np.sqrt(np.maximum(v - m * m, 0.0)) + eps)
    w -= lr * u


OPTIMIZERS: dict[str, Callable[..., None]] = {"sgd": sgd, "adam": adam, "adamw": adamw, "rmsprop": rmsprop}

# ---- training ----------------------------------------------------------------------------------------------


class Trainer:
    """A network, a loss, an optimizer: `step` is one update, `fit` goes through the data in a given order."""

    def __init__(
        self, net: Network, loss_name: str, optimizer: str, *, how: dict[str, Any] | None = None,
        l1: float = 0.0, l2: float = 0.0, clip_value: float = math.inf, clip_norm: float = math.inf,
        **hyper: Any,
    ) -> None:  # fmt: skip
        self.net, self.loss_name, self.how = net, loss_name, how or {}
        self.rule, self.hyper, self.steps = OPTIMIZERS[optimizer], hyper, 0
        self.memory: list[dict[str, Array]] = [{} for _ in net.params]
        self.l1, self.l2, self.clip_value, self.clip_norm = l1, l2, clip_value, clip_norm

    def step(self, X: Array, y: Array, lr: float, weight: Array = None) -> float:
        """One update on the batch X, y; returns the loss before it, penalty l1 Σ|w| + ½ l2 Σw² included."""
        value, grads = self.net.value_and_grad(X, y, self.loss_name, weight=weight, **self.how)
        for w, g in zip(self.net.params, grads, strict=True):
            if w.ndim == 2:  # the penalty spares the biases
                value += self.l1 * float(abs(w).sum()) + self.l2 / 2 * float((w * w).sum())
                g += self.l1 * np.sign(w) + self.l2 * w
        grads = [np.clip(g, -self.clip_value, self.clip_value) for g in grads]
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
        shrink = min(1.0, self.clip_norm / (norm + 1e-6))
        self.steps += 1
        for w, g, s in zip(self.net.params, grads, self.memory, strict=True):
            self.rule(w, shrink * g, s, self.steps, lr, **self.hyper)
        return value

    def fit(
        self, X: Array, y: Array, lr: float, batch_size: int, orders: Iterable[Array], weight: Array = None
    ) -> Iterator[float]:
        """One epoch for each order, a permutation of the rows; yields its mean loss over the rows."""
        w = np.ones(len(X)) if weight is None else weight
        for order in orders:
            batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            losses = [self.step(X[b], y[b], lr, None if weight is None else weight[b]) for b in batches]
            yield float(np.average(losses, weights=[w[b].sum() for b in batches]))
