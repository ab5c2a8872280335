# SPDX-License-Identifier: MIT
"""The oracle itself, in NumPy alone: numbers by hand, finite differences, closed forms."""

import inspect
import io
import itertools
import math
import tokenize

import numpy as np
import pytest

from chainrule import reference
from chainrule.reference import LOSSES, OPS, Linear, Network, Op, Trainer, loss

H = 1e-6  # of central differences, whose error is h² of a third derivative, and 1e-16 of the value over h
PARAMETER = {"leaky_relu": 0.1, "elu": 0.7, "huber": 0.5, "pinball": 0.3}


# ---- by hand -----------------------------------------------------------------------------------------------


def test_a_network_worked_by_hand():
    """The lecture's chain with numbers: x → z = W¹x + b¹ → φ = relu(z) → f = w φ + b, least squares against y
    = 1.

    x = (1, 2)            z = (1·1 − 1·2 + 0, 0.5·1 + 1·2 + 1) = (−1, 3.5)      φ = (0, 3.5)
    f = 2·0 + 3·3.5 − 1 = 9.5          L = ½ (1 − 9.5)² = 36.125               ∂L/∂f = −(1 − 9.5) = 8.5
    ∂L/∂w = 8.5 φ = (0, 29.75)         ∂L/∂b = 8.5
    ∂L/∂φ = 8.5 w = (17, 25.5)         ∂L/∂z = (17·0, 25.5·1) = (0, 25.5)
    ∂L/∂W¹ = ∂L/∂z xᵀ = ((0, 0), (25.5, 51))     ∂L/∂b¹ = (0, 25.5)     ∂L/∂x = (0, 25.5) W¹ = (12.75, 25.5)
    """
    net = Network([
        Linear(np.array([[1.0, -1.0], [0.5, 1.0]]), np.array([0.0, 1.0])), Op("relu"),
        Linear(np.array([[2.0, 3.0]]), np.array([-1.0])),
    ])  # fmt: skip
    phi = net.forward(np.array([[1.0, 2.0]]))
    assert [p.tolist() for p in phi] == [[[1, 2]], [[-1, 3.5]], [[0, 3.5]], [[9.5]]]
    value, df = loss("least_squares", phi[-1], np.array([[1.0]]))
    assert value == 36.125 and df.tolist() == [[8.5]]
    dphi, grads = net.backward(phi, df)
    assert [d.tolist() for d in dphi] == [[[12.75, 25.5]], [[0, 25.5]], [[17, 25.5]], [[8.5]]]
    assert [g.tolist() for g in grads] == [[[0, 0], [25.5, 51]], [0, 25.5], [[0, 29.75]], [8.5]]
    # Forward mode, the sensitivity to x₁: ż = (1, 0.5), φ̇ = (0, 0.5), ḟ = 1.5; and 8.5 · 1.5 = 12.75 as above
    dots = net.tangent(phi, np.array([[1.0, 0.0]]))
    assert [d.tolist() for d in dots] == [[[1, 0]], [[1, 0.5]], [[0, 0.5]], [[1.5]]]


def test_losses_worked_by_hand():
    """f = (1, 3) against y = (0, 1): d = (1, 2)."""
    f, y = np.array([[1.0, 3.0]]), np.array([[0.0, 1.0]])
    one, three = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))
    p = 1 / (1 + math.exp(2))
    table = {
        "least_squares": (2.5, [1, 2]),
        "mse": (2.5, [1, 2]),
        "mae": (1.5, [0.5, 0.5]),
        "huber": ((0.5 * 0.75 + 0.5 * 1.75) / 2, [0.25, 0.25]),
        "pinball": (0.7 * 1.5, [0.35, 0.35]),
        "poisson": ((math.e + math.exp(3) - 3) / 2, [math.e / 2, (math.exp(3) - 1) / 2]),
        "logistic": ((-math.log(1 - one) - math.log(three)) / 2, [one / 2, (three - 1) / 2]),
        "cross_entropy": (-math.log(1 - p), [p, -p]),
    }
    for name, (value, gradient) in table.items():
        got, df = loss(name, f, y, a=PARAMETER.get(name, 0.0))
        assert got == pytest.approx(value, rel=1e-14), name
        assert df[0] == pytest.approx(gradient, rel=1e-14), name
    # N(y; μ = 1, e³) at y = 2: ½ (3 + (2 − 1)² e⁻³); in μ (1 − 2) e⁻³, in s ½ (1 − e⁻³)
    got, df = loss("gaussian_nll", f, np.array([[2.0]]))
    assert got == pytest.approx((3 + math.exp(-3)) / 2, rel=1e-14)
    assert df[0] == pytest.approx([-math.exp(-3), (1 - math.exp(-3)) / 2], rel=1e-14)
    assert set(table) | {"gaussian_nll"} == set(LOSSES)


def test_reductions_and_weights_by_hand():
    """L = (1, 4) with weights (3, 1): mean 7/4, sum 7; gradients (√2, √8) times 3/4 and 1/4, or 3 and 1."""
    f, y, w = np.sqrt([[2.0], [8.0]]), np.zeros((2, 1)), np.array([3.0, 1.0])
    for reduction, scale in (("mean", 4), ("sum", 1)):
        value, df = loss("least_squares", f, y, w, reduction=reduction)
        assert value == pytest.approx(7 / scale)
        assert df[:, 0] == pytest.approx([3 * math.sqrt(2) / scale, math.sqrt(8) / scale])


# ---- finite differences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
def test_ops_by_finite_differences(name, rng):
    """jvp = (g(x + ht) − g(x − ht)) / 2h away from kinks, and vjp its transpose: c · (J t) = (c J) · t."""
    rule, a = OPS[name], PARAMETER.get(name, 0.0)
    x, c, t = 2 * rng.standard_normal((9, 6)), rng.standard_normal((9, 6)), rng.standard_normal((9, 6))
    x = np.where(np.abs(x) < 1e-3, 1e-3, x)
    y = rule.forward(x, a)
    tangent = rule.jvp(t, x, y, a)
    difference = (rule.forward(x + H * t, a) - rule.forward(x - H * t, a)) / (2 * H)
    np.testing.assert_allclose(tangent, difference, atol=1e-8)
    assert (c * tangent).sum() == pytest.approx((rule.vjp(c, x, y, a) * t).sum(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_losses_by_finite_differences(name, outputs, rng):
    """A gradient that is not that of the value, with weights, for any number of outputs."""
    y = rng.random((7, outputs)) if name != "cross_entropy" else rng.integers(0, outputs, 7)
    f = 2 + rng.random((7, 2 * outputs if name == "gaussian_nll" else outputs))  # f − y > 1: beyond all kinks
    w, t, a = rng.random(7), rng.standard_normal(f.shape), PARAMETER.get(name, 0.0)
    df = loss(name, f, y, w, a)[1]
    difference = (loss(name, f + H * t, y, w, a)[0] - loss(name, f - H * t, y, w, a)[0]) / (2 * H)
    assert (df * t).sum() == pytest.approx(difference, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("name", OPS)
def test_networks_by_finite_differences(name, rng):
    """The chain rule itself: all parameters and x moved in one direction, backwards and forwards."""
    sizes, links = [3, 5, 4, 2], []
    for n_in, n_out in itertools.pairwise(sizes):
        bias = None if n_out == 4 else rng.standard_normal(n_out)
        links += [Linear(rng.standard_normal((n_out, n_in)), bias), Op(name, PARAMETER.get(name, 0.0))]
    net, x = Network(links), rng.standard_normal((6, 3))
    c, t = rng.standard_normal((6, 2)), rng.standard_normal((6, 3))
    directions = [rng.standard_normal(p.shape) for p in net.params]
    phi = net.forward(x)
    dphi, grads = net.backward(phi, c)
    dots = net.tangent(phi, t, directions)

    def moved(h):
        for p, d in zip(net.params, directions, strict=True):
            p += h * d
        result = net.forward(x + h * t)
        for p, d in zip(net.params, directions, strict=True):
            p -= h * d
        return result

    for dot, up, down in zip(dots, moved(H), moved(-H), strict=True):
        np.testing.assert_allclose(dot, (up - down) / (2 * H), atol=1e-7)
    by_rows = (dphi[0] * t).sum() + sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert (c * dots[-1]).sum() == pytest.approx(by_rows, rel=1e-11)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("loss_name", ["least_squares", "logistic", "cross_entropy", "gaussian_nll"])
def test_hessians_by_finite_differences(name, loss_name, rng):
    """H v = (g(θ + h v) − g(θ − h v)) / 2h; along a line x + s t the outputs' second difference."""
    sizes, links = [3, 5, 4], []
    for n_in, n_out in itertools.pairwise(sizes):
        bias = None if n_out == 4 else rng.standard_normal(n_out)
        links += [Linear(rng.standard_normal((n_out, n_in)), bias), Op(name, PARAMETER.get(name, 0.0))]
    net, x = Network(links), rng.standard_normal((6, 3))
    y, w = rng.random((6, 2 if loss_name == "gaussian_nll" else 4)), rng.random(6)
    v = [rng.standard_normal(p.shape) / 5 for p in net.params]

    def moved(h):
        for p, d in zip(net.params, v, strict=True):
            p += h * d
        grads = net.value_and_grad(x, y, loss_name, weight=w)[1]
        for p, d in zip(net.params, v, strict=True):
            p -= h * d
        return grads

    for product, up, down in zip(net.hvp(x, y, loss_name, v, weight=w), moved(H), moved(-H), strict=True):
        np.testing.assert_allclose(product, (up - down) / (2 * H), atol=2e-6)
    t = rng.standard_normal(x.shape) / 5
    phi, h = net.forward(x), 1e-4
    difference = net.forward(x + h * t)[-1] - 2 * phi[-1] + net.forward(x - h * t)[-1]
    got = net.second_tangent(phi, net.tangent(phi, t))
    np.testing.assert_allclose(got, difference / h**2, atol=1e-5)


def test_nothing_overflows_or_warns():
    """inf − inf, 0 · inf or an overflow on the way to a finite limit: warnings are errors here."""
    x = np.array([[-np.inf, -1e4, -40.0, 0.0, 40.0, 1e4, np.inf]])
    for name, rule in OPS.items():
        y = rule.forward(x, PARAMETER.get(name, 0.0))
        assert not np.isnan(y).any(), name
        if "softmax" not in name and name not in ("identity", "relu", "leaky_relu"):
            assert not np.isnan(rule.vjp(np.ones_like(x), x, y, PARAMETER.get(name, 0.0))).any(), name
    for f, right, wrong in ((1e4, 0, 1e4), (np.inf, 0, np.inf), (40.0, math.log1p(math.exp(-40)), 40.0)):
        for y, value in ((1.0, right), (0.0, wrong)):
            assert loss("logistic", np.array([[f]]), np.array([[y]]))[0] == pytest.approx(value, rel=1e-14)
            label = np.array([int(y)])
            assert loss("cross_entropy", np.array([[0.0, f]]), label)[0] == pytest.approx(value, rel=1e-14)


# ---- closed forms of training ------------------------------------------------------------------------------


def train(optimizer, steps, lr, w0=1.0, **how):
    """w after each step on L = ½ w², whose gradient is w: one weight, x = 1, y = 0."""
    net = Network([Linear(np.array([[w0]]))])
    trainer = Trainer(net, "least_squares", optimizer, **how)
    path = []
    for _ in range(steps):
        trainer.step(np.ones((1, 1)), np.zeros((1, 1)), lr)
        path.append(float(net.params[0][0, 0]))
    return np.array(path)


K = np.arange(1, 21)


def test_gradient_descent_is_geometric():
    """w ← w − lr (1 + λ) w: the k-th power of 1 − lr (1 + λ)."""
    np.testing.assert_allclose(train("sgd", 20, 0.3), 0.7**K, rtol=1e-13)
    np.testing.assert_allclose(train("sgd", 20, 0.3, weight_decay=0.5), 0.55**K, rtol=1e-13)
    np.testing.assert_allclose(train("sgd", 20, 0.3, l2=0.5), 0.55**K, rtol=1e-13)


def test_momentum_follows_its_characteristic_roots():
    """Heavy ball: w_{k+1} = (1 + μ − lr) w_k − μ w_{k−1}, w₋₁ = w₀; the roots of r² − (1 + μ − lr) r + μ."""
    mu, lr = 0.5, 0.1
    r, s = np.roots([1, -(1 + mu - lr), mu])
    a = (1 - lr - s) / (r - s)  # a rᵏ + (1 − a) sᵏ with w₀ = 1, w₁ = 1 − lr
    np.testing.assert_allclose(
        train("sgd", 20, lr, momentum=mu), (a * r**K + (1 - a) * s**K).real, rtol=1e-12
    )


def test_nesterov_and_dampening_by_hand():
    """lr = 0.1, μ = 0.5, w₀ = 1. Nesterov: v = 1, w = 1 − 0.1 (1 + 0.5) = 0.85; v = 0.5 + 0.85, w −= 0.1
    (0.85 + 0.675).

    Dampening 0.4: v = 1, the first gradient whole, w = 0.9; v = 0.5 + 0.6 · 0.9 = 1.04, w = 0.796.
    """
    np.testing.assert_allclose(train("sgd", 2, 0.1, momentum=0.5, nesterov=True), [0.85, 0.6975], rtol=1e-14)
    np.testing.assert_allclose(train("sgd", 2, 0.1, momentum=0.5, dampening=0.4), [0.9, 0.796], rtol=1e-14)


def test_adaptive_rules_by_hand():
    """One step from w = 2, where g = 2: Adam moves by lr whatever g is; RMSprop by lr / √(1 − α)."""
    np.testing.assert_allclose(train("adam", 1, 0.1, 2.0, eps=0.0), [1.9], rtol=1e-14)
    np.testing.assert_allclose(train("adam", 1, 0.1, 2.0, eps=1.0), [2 - 0.1 * 2 / 3], rtol=1e-14)
    np.testing.assert_allclose(train("adamw", 1, 0.1, 2.0, eps=0.0, weight_decay=0.5), [1.8], rtol=1e-14)
    np.testing.assert_allclose(train("rmsprop", 1, 0.1, 2.0, eps=0.0, alpha=0.75), [1.8], rtol=1e-14)
    np.testing.assert_allclose(train("rmsprop", 1, 0.1, 2.0, eps=1.0, alpha=0.75), [2 - 0.1], rtol=1e-14)
    # centred: v − m² = (1 − α) 4 − ((1 − α) 2)² = 1 − 0.25
    np.testing.assert_allclose(
        train("rmsprop", 1, 0.1, 2.0, eps=0.0, alpha=0.75, centered=True),
        [2 - 0.2 / math.sqrt(0.75)],
        rtol=1e-14,
    )


def test_penalty_and_clipping_by_hand():
    """w = 3: g = 3 + l1 + 3 l2 = 3 + 0.5 + 0.75 = 4.25; clipped by value to 2, by length to 1."""
    penalty = {"l1": 0.5, "l2": 0.25}
    np.testing.assert_allclose(train("sgd", 1, 0.1, 3.0, **penalty), [3 - 0.425], rtol=1e-14)
    np.testing.assert_allclose(train("sgd", 1, 0.1, 3.0, **penalty, clip_value=2.0), [2.8], rtol=1e-14)
    # PyTorch's 1e-6 in the denominator
    np.testing.assert_allclose(train("sgd", 1, 0.1, 3.0, **penalty, clip_norm=1.0), [2.9], rtol=1e-7)
    net = Network([Linear(np.array([[3.0]]), np.array([-7.0]))])
    value = Trainer(net, "least_squares", "sgd", **penalty).step(np.ones((1, 1)), np.zeros((1, 1)), 0.1)
    assert value == pytest.approx(
        8 + 0.5 * 3 + 0.25 * 9 / 2
    )  # ½ (3 − 7)², and a penalty that spares the bias
    assert net.params[1][0] == pytest.approx(-7 + 0.4)


def test_fit_goes_through_the_rows_in_the_given_order(rng):
    """Two epochs over 5 rows in batches of 2 are six steps; each epoch's loss is the mean over rows."""
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((5, 1))
    one, two = (Network([Linear(np.ones((1, 3)))]) for _ in range(2))
    orders = [np.array([4, 0, 3, 1, 2]), np.array([1, 2, 3, 4, 0])]
    losses = list(Trainer(one, "mse", "adam").fit(x, y, 0.1, 2, orders))
    trainer = Trainer(two, "mse", "adam")
    for order, total in zip(orders, losses, strict=True):
        steps = [trainer.step(x[rows], y[rows], 0.1) for rows in (order[:2], order[2:4], order[4:])]
        assert total == pytest.approx((2 * steps[0] + 2 * steps[1] + steps[2]) / 5)
    np.testing.assert_array_equal(one.params[0], two.params[0])


def test_the_page_stays_a_page():
    """Some 260 lines of code: whoever adds a feature here has to find what can go."""
    lines, source = set(), inspect.getsource(reference)
    quiet = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in quiet and not token.string.startswith('"""'):
            lines.update(range(token.start[0], token.end[0] + 1))
    assert len(lines) <= 265
