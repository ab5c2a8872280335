# SPDX-License-Identifier: MIT
"""clip_example_norm: one step of `fit` against gradients of all examples, clipped in NumPy."""

import copy
import itertools
import re

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core
from conftest import assert_same_bits, assert_within
from test_calculus import each_activation, flat, randomize, size
from test_own_parts import Gain, OwnTanh, own_mean, own_mse


def clipped(net, X, y, loss, limit, weight=None):
    """Σ ω_n g_n min(1, limit / |g_n|) of the examples' gradients g_n, and how many were longer."""
    grads = cr.per_example_grads(net, X, y, loss)
    norms = np.sqrt(sum((g.reshape(len(X), -1) ** 2).sum(1) for g in grads.values()))
    omega = np.ones(len(X)) if weight is None else weight
    omega = omega * np.minimum(1, limit / norms)
    if getattr(loss, "reduction", "mean") == "mean":
        omega = omega / (len(X) if weight is None else weight.sum())
    return {name: np.tensordot(omega, g, 1) for name, g in grads.items()}, int((norms > limit).sum())


def step(net, X, y, loss, limit, **more):
    """The gradient that a step of `fit` takes with these rows."""
    before = net.state_dict()
    net.fit(X, y, loss=loss, optimizer=cr.SGD(1.0), batch_size=len(X), clip_example_norm=limit, **more)
    return {name: before[name] - value for name, value in net.state_dict().items()}


def middle_norm(net, X, y, loss):
    return float(np.median(cr.per_example_grad_norms(net, X, y, loss)))


def check(net, X, y, loss, weight=None):
    limit = middle_norm(net, X, y, loss)
    expected, longer = clipped(net, X, y, loss, limit, weight)
    assert 0 < longer < len(X)
    got = step(net, X, y, loss, limit, sample_weight=weight)
    for name, value in expected.items():
        assert_within(got[name], value, 1e-12 * size(value, net.state_dict()[name]), name)


# ---- one step ----------------------------------------------------------------------------------------------


@each_activation
@pytest.mark.parametrize("sizes", [[1, 1], [3, 2, 1], [7, 17, 65, 3], [64, 8, 16]])
def test_step_is_that_of_clipped_gradients(activation, sizes, rng):
    layers = [cr.Linear(sizes[0], sizes[1], bias=False)]
    for n_in, n_out in itertools.pairwise(sizes[1:]):
        layers += [activation, cr.Linear(n_in, n_out)]
    net = randomize(cr.Sequential(*layers, dtype="float64"), rng)
    check(net, rng.standard_normal((37, sizes[0])), rng.standard_normal((37, sizes[-1])), "mse")


@pytest.mark.parametrize(
    "loss",
    [cr.LeastSquares(), cr.MSE(reduction="sum"), cr.MAE(), cr.Huber(0.5), cr.Pinball(0.2), cr.CrossEntropy(),
     cr.Logistic(), cr.Poisson(), own_mse],
)  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_weights(loss, weighted, rng):
    """Weights multiply what is clipped already."""
    net = randomize(cr.mlp([4, 9, 3], activation="tanh", dtype="float64"), rng)
    X, y = rng.standard_normal((40, 4)), rng.random((40, 3))
    if isinstance(loss, cr.CrossEntropy):
        y = rng.integers(3, size=40)
    weight = rng.random(40) * 3
    weight[7] = 0
    check(net, X, y, loss, weight if weighted else None)


def test_layers_in_place_share_nothing_that_is_scaled(rng):
    """Linear on Linear, two activations on each other, one first, one last."""
    layers = [
        cr.Tanh(),
        cr.Linear(5, 17),
        cr.Linear(17, 3),
        cr.Sigmoid(),
        cr.SiLU(),
        cr.Dropout(0.0),
        cr.Linear(3, 2),
    ]
    net = randomize(cr.Sequential(*layers, cr.Softplus(), dtype="float64"), rng)
    check(net, rng.standard_normal((30, 5)), rng.standard_normal((30, 2)), "least_squares")


def test_a_layer_of_ones_own_without_parameters(rng):
    net = randomize(cr.Sequential(cr.Linear(3, 5), OwnTanh(), cr.Linear(5, 2), dtype="float64"), rng)
    check(net, rng.standard_normal((20, 3)), rng.standard_normal((20, 2)), "mse")


def test_penalty_and_clip_norm_come_after(rng):
    net = randomize(cr.mlp([4, 9, 2], activation="tanh", dtype="float64"), rng)
    X, y = rng.standard_normal((25, 4)), rng.standard_normal((25, 2))
    limit, state = middle_norm(net, X, y, "mse"), net.state_dict()
    expected, _ = clipped(net, X, y, "mse", limit)
    for name in expected:
        expected[name] = expected[name] + 0.1 * state[name] * name.endswith("weight")
    factor = min(1.0, 0.3 / (np.linalg.norm(flat(expected)) + 1e-6))
    assert factor < 1
    got = step(net, X, y, "mse", limit, l2=0.1, clip_norm=0.3)
    for name, value in expected.items():
        assert_within(got[name], factor * value, 1e-12 * size(state[name]), name)


def test_an_outlier_pulls_no_further_than_the_limit(dtype, rng):
    net = randomize(cr.mlp([3, 8, 1], activation="tanh", dtype=dtype), rng)
    X, y = rng.standard_normal((1, 3)), np.array([[1e6]])
    assert_within(
        np.linalg.norm(flat(step(net, X, y, "mse", 0.5)).astype(float)),
        0.5,
        1e-5 if dtype == np.float32 else 1e-12,
    )


@pytest.mark.parametrize("features", [2, 16, 65])
def test_an_outlier_whose_square_overflows_is_clipped_and_not_lost(features):
    """float32 ends at 3e38, so |x|² of x = 3e19 needs more than that; ∂L/∂f of mae is 1 all the same."""
    net = cr.Sequential(cr.Linear(features, 1, init="zeros"))
    X = np.zeros((1, features), np.float32)
    X[0, 0] = 3e19
    got = step(net, X, np.ones((1, 1), np.float32), "mae", 0.5)
    assert_within(np.linalg.norm(flat(got)), 0.5, 1e-6)
    assert_within(cr.per_example_grad_norms(net, X, [[1e30]], "mae") / 3e19, 1.0, 1e-6)


# ---- whole fits --------------------------------------------------------------------------------------------


def test_batches_in_their_order(rng):
    net = randomize(cr.mlp([4, 9, 2], activation="tanh", dtype="float64"), rng)
    X, y = rng.standard_normal((25, 4)), rng.standard_normal((25, 2))
    other, limit = copy.deepcopy(net), middle_norm(net, X, y, "mse")
    for epoch in range(3):
        order = _core.permutation(25, 4, epoch)
        for first in range(0, 25, 8):
            rows = order[first : first + 8]
            grads, _ = clipped(other, X[rows], y[rows], "mse", limit)
            other.load_state_dict({name: w - 0.1 * grads[name] for name, w in other.state_dict().items()})
    net.fit(X, y, loss="mse", optimizer=cr.SGD(0.1), batch_size=8, epochs=3, seed=4, clip_example_norm=limit)
    for name, value in other.state_dict().items():
        assert_within(net.state_dict()[name], value, 1e-12 * size(value), name)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_a_limit_that_none_reaches_changes_no_bit(optimizer, dtype, rng):
    X, y = rng.standard_normal((70, 20)), rng.standard_normal((70, 3))
    nets = [cr.mlp([20, 33, 3], seed=1, dtype=dtype) for _ in range(2)]
    for net, more in zip(nets, ({}, {"clip_example_norm": 1e6}), strict=True):
        net.fit(X, y, loss="mse", optimizer=optimizer, epochs=3, **more)
    assert_same_bits(flat(nets[0].state_dict()), flat(nets[1].state_dict()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("more", [{}, {"clip_norm": 1e30}])
def test_same_bits_for_any_threads_and_instruction_set(
    optimizer, more, dtype, on_threads, on_fused_isas, rng
):
    """And for both ways of phase 2: a clip_norm that none reaches makes it store the gradient first."""
    X, y = rng.standard_normal((300, 40)), rng.standard_normal((300, 3))

    def run(**more):
        net = cr.mlp([40, 129, 65, 3], activation="silu", seed=1, dtype=dtype)
        net.fit(
            X, y, loss="mse", optimizer=optimizer, batch_size=128, epochs=2, clip_example_norm=0.7, **more
        )
        return flat(net.state_dict())

    results = on_threads(lambda: run(**more)) + on_fused_isas(run)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_bfloat16_is_clipped_to_its_rounding(rng):
    """Operands of the products are rounded to 8 bits, so the step's length is the limit within 2 · 2⁻⁸."""
    net = cr.mlp([20, 33, 33, 20], activation="tanh", dtype="bfloat16", seed=3)
    got = step(net, rng.standard_normal((1, 20)), 100 * rng.standard_normal((1, 20)), "mse", 0.5)
    assert_within(np.linalg.norm(flat(got)), 0.5, 0.5 * 2 * 2**-8)


# ---- what has no gradient of each example ------------------------------------------------------------------


def test_refusals_leave_all_as_it_was(rng):
    X, y = rng.standard_normal((6, 3)), rng.standard_normal((6, 2))
    with_params = cr.Sequential(cr.Linear(3, 2), Gain())
    message = "[fit] clip_example_norm needs each example's gradient"
    for net, loss, start in (
        (with_params, "mse", message),
        (cr.mlp([3, 4, 2]), own_mean, "[loss] value of your loss with weights or clip_example_norm"),
    ):
        before = flat(net.state_dict())
        with pytest.raises(ValueError, match=re.escape(start)):
            net.fit(X, y, loss=loss, clip_example_norm=1.0)
        assert_same_bits(flat(net.state_dict()), before)


def test_same_bits_for_any_threads_of_layers_that_they_share_by_columns(dtype, on_threads, rng):
    """Cotangents that are finished column by column, after the examples' norms were taken: columns are for
    whole panels."""
    X, y = rng.standard_normal((128, 64)), rng.standard_normal((128, 3))

    def run():
        net = cr.mlp([64, 384, 256, 3], activation="tanh", seed=1, dtype=dtype)
        net.fit(X, y, loss="mse", optimizer="sgd", batch_size=128, epochs=3, clip_example_norm=0.1)
        return flat(net.state_dict())

    first, *others = on_threads(run, (1, 2, 3))
    for other in others:
        assert_same_bits(first, other)
