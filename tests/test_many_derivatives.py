# SPDX-License-Identifier: MIT
"""Derivatives of more rows than go through the sweeps at once (1024), one after another, and refused."""

import copy
import itertools
import re

import numpy as np
import pytest

import chainrule as cr
from chainrule import losses
from conftest import assert_same_bits
from test_calculus import case, randomize
from test_own_parts import own_mean, own_mse


def test_rows_of_the_second_batch_are_those_of_the_first(dtype, rng):
    """Rows from 1024 on are a batch of their own: read or written where the first one is."""
    net, X, y, _ = case(rng, dtype, 1030, sizes=(3, 5, 2))
    dX = rng.standard_normal(X.shape).astype(dtype)
    loss = cr.MSE(reduction="sum")
    asked = [
        (lambda r: cr.jvp(net, X[r], dX[r])[0]), (lambda r: cr.jvp(net, X[r], dX[r])[1]),
        (lambda r: cr.sensitivity(net, X[r], 1)), (lambda r: cr.sensitivity(net, X[r], 1, y[r], loss)),
        (lambda r: cr.vjp(net, X[r], y[r])[1]), (lambda r: cr.input_gradient(net, X[r], y[r], loss)),
        (lambda r: cr.per_example_grads(net, X[r], y[r], loss)["0.weight"]),
        (lambda r: cr.per_example_grad_norms(net, X[r], y[r], loss)),
    ]  # fmt: skip
    for k, ask in enumerate(asked):
        whole = ask(slice(None))
        for part in (slice(0, 9), slice(1019, 1030)):
            assert_same_bits(ask(part), whole[part], f"{k}, rows from {part.start}")


def test_gradients_of_many_rows_are_sums_of_those_of_few(rng):
    """A gradient of more than 1024 rows is added up batch by batch."""
    net, X, y, v = case(rng, np.dtype("float64"), 2500, sizes=(3, 5, 2))
    loss = cr.MSE(reduction="sum")
    parts = [slice(first, first + 500) for first in range(0, 2500, 500)]
    for ask in (
        lambda r: cr.vjp(net, X[r], y[r], params=True)[2],
        lambda r: cr.hvp(net, X[r], y[r], loss, v),
        lambda r: cr.gauss_newton_product(net, X[r], y[r], loss, v),
        lambda r: net.trace(X[r]).backward(y[r]).grads,
        lambda r: net.value_and_grad(X[r], y[r], loss=loss)[1],
    ):
        whole, few = ask(slice(None)), [ask(part) for part in parts]
        for name, got in whole.items():
            expected = sum(part[name] for part in few)
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_labels_and_weights_of_the_second_batch(loss, rng):
    """Those of rows from 1024 on, and not of the rows that are as far into the first batch."""
    net, X, y, v = case(rng, np.dtype("float64"), 1500, sizes=(3, 5, 2))
    if loss == "cross_entropy":
        y = rng.integers(0, 2, 1500)
    rule, weight = losses.LOSSES[loss](reduction="sum"), rng.random(1500)
    halves = slice(0, 750), slice(750, 1500)
    for w in (None, weight):
        of = [None if w is None else w[half] for half in halves]
        got = cr.input_gradient(net, X, y, rule, sample_weight=w)
        parts = [
            cr.input_gradient(net, X[h], y[h], rule, sample_weight=o) for h, o in zip(halves, of, strict=True)
        ]
        assert_same_bits(got, np.concatenate(parts))
        for product in (cr.hvp, cr.gauss_newton_product):
            few = [
                product(net, X[h], y[h], rule, v, sample_weight=o) for h, o in zip(halves, of, strict=True)
            ]
            for name, value in product(net, X, y, rule, v, sample_weight=w).items():
                np.testing.assert_allclose(
                    value, few[0][name] + few[1][name], rtol=1e-10, atol=1e-10, err_msg=name
                )


def test_a_derivative_of_more_rows_than_the_one_before(rng):
    """Targets and values are copied into room that the ones before have left."""
    net, X, y, _ = case(rng, np.dtype("float64"), 900, sizes=(3, 5, 2))
    loss = cr.MSE(reduction="sum")
    for rows in (1, 3, 50, 900, 2):
        part = slice(0, rows)
        fresh = copy.deepcopy(net)
        assert_same_bits(
            cr.input_gradient(net, X[part], y[part], loss), cr.input_gradient(fresh, X[part], y[part], loss)
        )


def test_own_losses_see_all_rows_of_derivatives(rng):
    """The engine's losses are differentiated in batches of 1024 rows, of which one's own knows nothing."""
    net, X, y, v = case(rng, np.dtype("float64"), 1030, sizes=(3, 5, 2))
    for own, loss in ((own_mean, "mse"), (own_mse, "mse")):
        np.testing.assert_allclose(
            cr.input_gradient(net, X, y, own), cr.input_gradient(net, X, y, loss), rtol=1e-9, atol=1e-15
        )
        for name, got in cr.hvp(net, X, y, own, v).items():
            np.testing.assert_allclose(
                got, cr.hvp(net, X, y, loss, v)[name], rtol=1e-5, atol=1e-7, err_msg=name
            )


def test_an_own_loss_along_nothing_is_0(rng):
    """The step of the difference is in units of how far the outputs move: which may be 0."""
    X, y = rng.standard_normal((5, 4)), rng.standard_normal((5, 3))
    net = cr.mlp([4, 3], dtype="float64")
    v = {name: np.zeros_like(value) for name, value in net.state_dict().items()}
    for product in (cr.hvp, cr.gauss_newton_product):
        for name, got in product(net, X, y, own_mse, v).items():
            assert (got == 0).all(), name


def test_an_own_loss_of_large_outputs(rng):
    """The step of the difference is in units of the outputs: one of 1e-5 is lost beside 1e9."""
    net = randomize(cr.mlp([3, 2], dtype="float64"), rng)
    net.load_state_dict({"0.bias": np.full(2, 1e9)}, strict=False)
    X, y = rng.standard_normal((5, 3)), np.full((5, 2), 1e9)
    v = {name: rng.standard_normal(value.shape) for name, value in net.state_dict().items()}
    own, exact = cr.hvp(net, X, y, own_mse, v), cr.hvp(net, X, y, "mse", v)
    for name, got in own.items():
        np.testing.assert_allclose(got, exact[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_no_derivative_sees_the_one_before(rng):
    """Memory is laid out anew where the next one has as many rows, but of as many examples, or of others."""
    net, X, c, _ = case(rng, np.dtype("float64"), 12, sizes=(3, 5, 2))
    asked = [
        lambda: cr.vjp(net, X, c)[1], lambda: cr.jacobian(net, X[:6], mode="reverse"),
        lambda: cr.jvp(net, X, X)[1], lambda: cr.jacobian(net, X[:4], mode="forward"),
        lambda: cr.laplacian(net, X[:4]),
    ]  # fmt: skip
    alone = [(copy.deepcopy(net), ask)[1]() for ask in asked]
    for first, second in itertools.permutations(range(len(asked)), 2):
        asked[first]()
        assert_same_bits(asked[second](), alone[second], f"{second} after {first}")


def test_what_a_direction_does_not_name_is_0_again(rng):
    """The direction before it named all parameters, in both layouts that products with them want."""
    net, X, y, v = case(rng, np.dtype("float64"), 4, sizes=(3, 5, 4, 2))
    for name in v:
        alone = {name: v[name]}
        fresh = copy.deepcopy(net)
        for product in (cr.hvp, cr.gauss_newton_product):
            product(net, X, y, "mse", v)
            got, expected = product(net, X, y, "mse", alone), product(fresh, X, y, "mse", alone)
            for key, value in got.items():
                assert_same_bits(value, expected[key], f"{key} along {name}")
        cr.jvp(net, X, dparams=v)
        assert_same_bits(cr.jvp(net, X, dparams=alone)[1], cr.jvp(fresh, X, dparams=alone)[1], name)


class Power(cr.Layer):
    """y = e^g x: curved in its parameter."""

    def __init__(self):
        self.params = {"g": np.array(0.3)}

    def forward(self, x):
        return np.exp(self.params["g"]) * x

    def vjp(self, x, y, dy):
        return np.exp(self.params["g"]) * dy, {"g": (dy * y).sum()}

    def jvp(self, x, y, dx):
        return np.exp(self.params["g"]) * dx


def test_a_first_own_layer_curved_in_its_parameters(rng):
    """It meets no tangents of its input, and bends all the same."""
    net = randomize(cr.Sequential(Power(), cr.Linear(3, 2), dtype="float64"), rng)
    X, y, h = rng.standard_normal((6, 3)), rng.standard_normal((6, 2)), 1e-5
    v = {name: rng.standard_normal(value.shape) for name, value in net.state_dict().items()}
    start, slopes = net.state_dict(), []
    for s in (h, -h):
        net.load_state_dict({name: value + s * v[name] for name, value in start.items()})
        slopes.append(net.value_and_grad(X, y, loss="mse")[1])
    net.load_state_dict(start)
    for name, got in cr.hvp(net, X, y, "mse", v).items():
        expected = (slopes[0][name] - slopes[1][name]) / (2 * h)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_moves_along_nothing(rng):
    """The tangents of the call before lie where nobody writes new ones."""
    net, X, _, v = case(rng, np.dtype("float64"), 4, sizes=(3, 5, 2))
    cr.jvp(net, X, X, v)
    f, df = cr.jvp(net, X)
    assert_same_bits(f, net(X))
    assert not df.any()
    assert not cr.jvp(net, X, dparams={})[1].any()


NET64 = cr.mlp([3, 4, 2], seed=0, dtype="float64")
NET3 = cr.mlp([3, 3], seed=0, dtype="float64")
F5, T5 = np.zeros((5, 3)), np.zeros((5, 2))
FITTING = [  # arrays of the network's own dtype are taken as they are, without a look in Python
    (lambda: cr.jvp(NET64, F5, F5[:4]),
     "[jvp] dX must have a row for each row of X: expected shape (5, 3), got (4, 3)"),
    (lambda: cr.jvp(NET64, F5[:4], F5),
     "[jvp] dX must have a row for each row of X: expected shape (4, 3), got (5, 3)"),
    (lambda: cr.vjp(NET64, F5, T5[:4]),
     "[vjp] c must have a row for each row of X: expected shape (5, 2), got (4, 2)"),
    (lambda: cr.vjp(NET64, F5, F5),
     "[vjp] c must have a row for each row of X: expected shape (5, 2), got (5, 3)"),
    (lambda: NET64.trace(F5).backward(T5[:4]),
     "[backward] dL_df must have a row for each row of X: expected shape (5, 2), got (4, 2)"),
    (lambda: cr.jvp(NET64, F5, dparams={"0.weight": np.ones((3, 4))}),
     "[jvp] dparams['0.weight'] must have the parameter's shape: expected (4, 3), got (3, 4)"),
    (lambda: cr.jvp(NET64, F5, dparams={"0.bias": np.ones(3)}),
     "[jvp] dparams['0.bias'] must have the parameter's shape: expected (4,), got (3,)"),
    (lambda: cr.hvp(NET64, F5, T5, "mse", {"0.weight": np.ones((4, 3, 1))}),
     "[hvp] v['0.weight'] must have the parameter's shape: expected (4, 3), got (4, 3, 1)"),
    (lambda: cr.input_gradient(NET64, F5, T5[:4], "mse"),
     "[input_gradient] y must have one row per row of X"),
    (lambda: cr.hvp(NET64, F5, [0, 1, 0, 1], "cross_entropy", {}), "[hvp] y must have one row per row of X"),
    (lambda: cr.hvp(NET64, F5, T5, "mse", {}, sample_weight=np.ones(4)),
     "[hvp] sample_weight must have one number per row: expected (5,), got (4,)"),
    (lambda: cr.hvp(NET64, F5, T5, "mse", {}, sample_weight=np.ones((5, 1))),
     "[hvp] sample_weight must have one number per row: expected (5,), got (5, 1)"),
    (lambda: cr.input_gradient(NET3, F5, np.zeros((5, 1)), "gaussian_nll"), "[input_gradient] "),
]  # fmt: skip


@pytest.mark.parametrize("call, text", FITTING, ids=range(len(FITTING)))
def test_arrays_that_fit_are_refused_in_the_same_words(call, text):
    """Shapes that only the engine looks at: read beyond an array's end where they are wrong."""
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
