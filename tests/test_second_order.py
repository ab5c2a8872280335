# SPDX-License-Identifier: MIT
"""Second derivatives, by parameters and by inputs, against differences of first ones and reference.py."""

import math

import numpy as np
import pytest

import chainrule as cr
from chainrule import losses, reference
from conftest import assert_same_bits, assert_within, eps
from test_calculus import (
    ACTIVATIONS,
    SMOOTH,
    direction,
    each_activation,
    each_smooth,
    flat,
    moved,
    random_chain,
    randomize,
    size,
    twin,
)
from test_losses import ROWS as LOSS_ROWS
from test_losses import sample as loss_sample

# ---- in the parameters -------------------------------------------------------------------------------------


def example_of(row, net, rng, rows):
    """f and targets of a loss in its own domain: X through the network, y drawn for the loss."""
    X = rng.standard_normal((rows, net.in_features))
    return X, loss_sample(row, rng, rows, net.out_features // row.per_target, np.float64)[1]


@each_smooth
def test_hvp_is_the_slope_of_the_gradient(activation, rng):
    """(g(θ + h v) − g(θ − h v)) / 2h, to 1e-6 of the largest, for several losses, weighted."""
    h = 1e-5
    for depth in (1, 3, 6):
        net = random_chain(rng, activation, SMOOTH, depth, widths=[1, 2, 3, 7, 17])
        X, y = rng.standard_normal((6, net.in_features)), rng.random((6, net.out_features))
        v, w = direction(net, rng), rng.random(6)
        v = {name: d / math.sqrt(net.num_parameters) for name, d in v.items()}
        for loss in ("least_squares", "logistic", "cross_entropy"):
            ends = [moved(net, v, s).value_and_grad(X, y, loss=loss, sample_weight=w)[1] for s in (h, -h)]
            slope = {k: (ends[0][k] - ends[1][k]) / (2 * h) for k in v}
            got = cr.hvp(net, X, y, loss, v, sample_weight=w)
            scale = size(*slope.values(), *ends[0].values(), *net.trace(X).phi)
            for name in v:
                assert np.abs(got[name] - slope[name]).max() <= 1e-6 * scale, (name, net)


@each_activation
@pytest.mark.parametrize("row", LOSS_ROWS, ids=lambda row: f"{row.name}-{LOSS_ROWS.index(row)}")
def test_hvp_equals_reference(activation, row, rng):
    """Every op under every loss, piecewise ones too, where differences would step over a kink."""
    net = randomize(cr.Sequential(cr.Linear(3, 7), activation, cr.Dropout(), cr.Linear(7, 5, bias=False),
                                  activation, cr.Linear(5, 4), dtype="float64"), rng)  # fmt: skip
    X, y = example_of(row, net, rng, 6)
    v, w, own = direction(net, rng), rng.random(6), twin(net)
    loss = losses.LOSSES[row.name](*([row.a] if row.a else []))
    expected = own.hvp(X, y, row.name, list(v.values()), a=row.a, weight=w)
    bound = 1e-12 * size(*expected, *net.trace(X).phi) * size(*v.values())
    for got, right in zip(cr.hvp(net, X, y, loss, v, w).values(), expected, strict=True):
        assert_within(got, right, bound)
    J = flat_jacobian(net, X)
    along = J @ flat(v)
    curved = reference.loss_hvp(row.name, net(X), y, along, a=row.a, weight=w)
    right = np.einsum("bo,bop->p", curved, J)
    assert_within(
        flat(cr.gauss_newton_product(net, X, y, loss, v, w)), right, 1e-12 * size(J) ** 2 * size(along)
    )


def flat_jacobian(net, X):
    parts = cr.jacobian(net, X, wrt="parameters").values()
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)


@each_smooth
def test_hessian(activation, rng):
    """Symmetric to rounding, its columns are Hessian-vector products, and flat directions mean the same."""
    net = random_chain(rng, activation, SMOOTH, 5, widths=[1, 2, 3])
    X, y, w = rng.standard_normal((5, net.in_features)), rng.random((5, net.out_features)), rng.random(5)
    H = cr.hessian(net, X, y, "logistic", sample_weight=w)
    assert H.shape == (net.num_parameters,) * 2
    bound = 1e-13 * size(H) * size(*net.trace(X).phi) ** 2
    assert_within(H, H.T, bound)
    u, v = direction(net, rng), direction(net, rng)
    assert_within(flat(cr.hvp(net, X, y, "logistic", v, w)), H @ flat(v), 30 * bound)
    for name, part in cr.hvp(net, X, y, "logistic", flat(v), w).items():
        assert_same_bits(part, cr.hvp(net, X, y, "logistic", v, w)[name])
    left, right = (flat(a) @ flat(cr.hvp(net, X, y, "logistic", b, w)) for a, b in ((u, v), (v, u)))
    assert abs(left - right) <= 100 * bound * net.num_parameters


def test_a_quadratic_is_its_own_hessian(rng):
    """½ |X w − y|² has the Hessian XᵀX, which is Gauss-Newton's too; least squares of a linear layer."""
    net = cr.Sequential(cr.Linear(5, 1, bias=False), dtype="float64")
    X, y = rng.standard_normal((9, 5)), rng.standard_normal(9)
    loss = cr.LeastSquares(reduction="sum")
    np.testing.assert_allclose(cr.hessian(net, X, y, loss), X.T @ X, rtol=1e-13)
    v = rng.standard_normal(5)
    np.testing.assert_allclose(flat(cr.gauss_newton_product(net, X, y, loss, v)), X.T @ (X @ v), rtol=1e-12)


def test_one_missing_parameter_counts_as_zero(rng):
    net = randomize(cr.mlp([3, 5, 2], activation="tanh", dtype="float64"), rng)
    X, y, v = rng.standard_normal((4, 3)), rng.standard_normal((4, 2)), direction(net, rng)
    part = {"2.weight": v["2.weight"]}
    whole = {name: v[name] if name in part else np.zeros_like(v[name]) for name in v}
    for product in (cr.hvp, cr.gauss_newton_product):
        product(net, X, y, "mse", v)  # leaves nothing behind for the next call
        for a, b in zip(*(product(net, X, y, "mse", d).values() for d in (part, whole)), strict=True):
            assert_same_bits(a, b)


# ---- in the inputs -----------------------------------------------------------------------------------------


@each_activation
def test_input_hessian_diagonal_equals_reference(activation, dtype, rng):
    for depth in (1, 4, 7):
        net = random_chain(rng, activation, ACTIVATIONS, depth, dtype=dtype.name, widths=[1, 2, 3, 7, 17])
        own, X = twin(net), rng.standard_normal((4, net.in_features)).astype(dtype)
        phi = own.forward(X.astype(float))
        got = cr.input_hessian_diagonal(net, X)
        for i in range(net.in_features):
            dots = own.tangent(phi, np.broadcast_to(np.eye(net.in_features)[i], X.shape))
            right = own.second_tangent(phi, dots)
            assert_within(got[:, :, i], right, 3e3 * eps(dtype) * size(*dots) ** 2 * size(*phi), f"{net!r} ")
        total = got.astype(float).sum(axis=2)
        assert_within(
            cr.laplacian(net, X), total, eps(dtype) * net.in_features * size(got) * np.ones_like(total)
        )


@each_smooth
def test_laplacian_is_the_trace_of_differences(activation, rng):
    """Σ (f(x + h e) − 2 f(x) + f(x − h e)) / h², to the 1e-5 that such differences can give."""
    h = 1e-4
    net = random_chain(rng, activation, SMOOTH, 5, widths=[2, 3, 7])
    X = rng.standard_normal((3, net.in_features))
    steps = h * np.eye(net.in_features)
    differences = sum((net(X + e) - 2 * net(X) + net(X - e)) / h**2 for e in steps)
    got = cr.laplacian(net, X)
    assert np.abs(got - differences).max() <= 1e-5 * size(got, *net.trace(X).phi)


def test_laplacian_of_a_square(rng):
    """f = Σ log cosh by Softplus: softplus″ = σ(x) σ(−x), with unit weights exactly known."""
    net = cr.Sequential(
        cr.Linear(4, 4, bias=False), cr.Softplus(), cr.Linear(4, 1, bias=False), dtype="float64"
    )
    net.load_state_dict({"0.weight": np.eye(4), "2.weight": np.ones((1, 4))})
    X = rng.standard_normal((6, 4))
    s = 1 / (1 + np.exp(-X))
    np.testing.assert_allclose(cr.input_hessian_diagonal(net, X)[:, 0], s * (1 - s), rtol=1e-13)
    np.testing.assert_allclose(cr.laplacian(net, X)[:, 0], (s * (1 - s)).sum(axis=1), rtol=1e-13)
