# SPDX-License-Identifier: MIT
"""Layers as descriptions: they say what they are, stay so, and begin with the weights they promise."""

import copy
import math
import pickle

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core, layers, reference
from conftest import assert_same_bits, eps

ROWS = [
    cr.Linear(3, 2), cr.Linear(3, 2, bias=False, init="torch"), cr.Identity(), cr.Sigmoid(), cr.Tanh(),
    cr.ReLU(), cr.LeakyReLU(), cr.LeakyReLU(0.2), cr.ELU(), cr.ELU(1.5), cr.GELU(), cr.SiLU(), cr.Softplus(),
    cr.Softmax(), cr.LogSoftmax(), cr.Dropout(), cr.Dropout(0.1),
]  # fmt: skip
MAPS = [layer for layer in ROWS if not isinstance(layer, cr.Linear)]


def label(layer):
    return repr(layer)


# ---- descriptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ROWS, ids=label)
def test_repr_config_and_copies_make_the_same_layer(layer):
    """An argument that repr, config, copy or pickle forgets."""
    fields = vars(layer)
    twins = [
        eval(repr(layer), vars(cr).copy()),
        type(layer)(**layer.config()),
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ]
    for twin in twins:
        assert type(twin) is type(layer)
        assert vars(twin) == fields


@pytest.mark.parametrize("layer", ROWS, ids=label)
def test_layers_cannot_change(layer):
    """A layer shared by networks, or already built into one, that changes under them."""
    for name in [*layer.config(), "forward", "anything"]:
        with pytest.raises(AttributeError, match=f"{name} is read-only"):
            setattr(layer, name, 1)


def test_repr_leaves_out_defaults():
    assert repr(cr.Linear(3, 2)) == "Linear(3, 2)"
    assert repr(cr.Linear(3, 2, bias=False, init="zeros")) == "Linear(3, 2, bias=False, init='zeros')"
    assert repr(cr.Dropout(0.5)) == "Dropout()"


def test_every_op_of_the_engine_has_a_class():
    ops = {name for kind, name, _ in _core.ops() if kind not in ("loss", "optimizer")}
    assert {layer.op for layer in layers.BUILT_IN.values()} == ops


# ---- the three maps of one layer -----------------------------------------------------------------


def rule_of(layer):
    op = "identity" if layer.op == "dropout" else layer.op  # outside training
    return reference.OPS[op], next(iter(layer.config().values()), 0.0)


@pytest.mark.parametrize("layer", MAPS, ids=label)
def test_maps_equal_reference(layer, rng):
    """A map that is handed the wrong one of x and y, or the wrong parameter. Bound: rounding."""
    x, c = rng.standard_normal((2, 7, 5))
    rule, a = rule_of(layer)
    y = layer.forward(x)
    np.testing.assert_allclose(y, rule.forward(x, a), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(layer.vjp(x, y, c), rule.vjp(c, x, y, a), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(layer.jvp(x, y, c), rule.jvp(c, x, y, a), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layer", MAPS, ids=label)
def test_maps_keep_the_dtype_and_the_arguments(layer, dtype, rng):
    x = rng.standard_normal((4, 3)).astype(dtype)
    before = x.copy()
    y = layer.forward(x)
    assert y.dtype == layer.vjp(x, y, x).dtype == layer.jvp(x, y, x).dtype == dtype
    assert_same_bits(x, before)
    assert layer.forward([[1, 2]]).dtype == np.float64


@pytest.mark.parametrize("layer", MAPS, ids=label)
def test_a_layer_alone_and_in_a_network_agree_bit_for_bit(layer, dtype, rng):
    x = rng.standard_normal((6, 3)).astype(dtype)
    net = cr.Sequential(cr.Linear(3, 3, init="zeros", bias=False), layer, dtype=dtype)
    net.load_state_dict({"0.weight": np.eye(3)})
    assert_same_bits(net(x), layer.forward(x))


# ---- the first weights ---------------------------------------------------------------------------

I, O = 300, 200  # noqa: E741
UNIFORM = {
    "glorot_uniform": math.sqrt(6 / (I + O)),
    "he_uniform": math.sqrt(6 / I),
    "lecun_uniform": math.sqrt(3 / I),
    "torch": 1 / math.sqrt(I),
    "sklearn": math.sqrt(6 / (I + O)),
}
NORMAL = {"glorot_normal": 2 / (I + O), "he_normal": 2 / I, "lecun_normal": 1 / I}
DRAWN_BIASES = {"torch", "sklearn"}


def first(*chain, seed=0, dtype="float64"):
    return cr.Sequential(*chain, seed=seed, dtype=dtype).state_dict()


@pytest.mark.parametrize("init", UNIFORM)
def test_uniform_initialisers(init, rng):
    """The wrong half width: of 60,000 draws the largest lies within 10⁻³ of it, and the mean of squares in
    six standard errors (u² has the variance 4/45) of width²/3."""
    state = first(cr.Linear(I, O, init=init), seed=int(rng.integers(2**32)))
    w, width = state["0.weight"], UNIFORM[init]
    assert w.shape == (O, I)
    assert 0.999 * width < abs(w).max() <= width
    assert abs(w.mean()) < 6 * width / math.sqrt(3 * w.size)
    assert abs((w**2).mean() - width**2 / 3) < 6 * width**2 * math.sqrt(4 / 45 / w.size)
    if init in DRAWN_BIASES:
        assert 0.9 * width < abs(state["0.bias"]).max() <= width
    else:
        assert not state["0.bias"].any()


@pytest.mark.parametrize("init", NORMAL)
def test_normal_initialisers(init, rng):
    """The wrong variance, or no normal distribution: mean, variance, kurtosis within six standard errors."""
    state = first(cr.Linear(I, O, init=init), seed=int(rng.integers(2**32)))
    w = state["0.weight"] / math.sqrt(NORMAL[init])
    assert abs(w.mean()) < 6 / math.sqrt(w.size)
    assert abs((w**2).mean() - 1) < 6 * math.sqrt(2 / w.size)
    assert abs((w**4).mean() - 3) < 6 * math.sqrt(96 / w.size)
    assert not state["0.bias"].any()


def test_zeros():
    state = first(cr.Linear(I, O, init="zeros"))
    assert not state["0.weight"].any() and not state["0.bias"].any()


@pytest.mark.parametrize("after", ["relu", "leaky_relu", "elu", "gelu", "silu", "softplus"])
def test_auto_is_he_normal_before_the_relu_family(after):
    by_auto = first(cr.Linear(5, 4), *cr.mlp([4, 4], output_activation=after)[1:])
    assert_same_bits(by_auto["0.weight"], first(cr.Linear(5, 4, init="he_normal"))["0.weight"])


@pytest.mark.parametrize(
    "chain",
    [(), (cr.Tanh(),), (cr.Sigmoid(),), (cr.Softmax(),), (cr.Linear(4, 2),), (cr.Dropout(), cr.Tanh())],
    ids=repr,
)
def test_auto_is_glorot_uniform_elsewhere(chain):
    by_auto = first(cr.Linear(5, 4), *chain)
    assert_same_bits(by_auto["0.weight"], first(cr.Linear(5, 4, init="glorot_uniform"))["0.weight"])


@pytest.mark.parametrize("between", [cr.Dropout(), cr.Identity()], ids=repr)
def test_auto_looks_through_what_changes_nothing(between):
    by_auto = first(cr.Linear(5, 4), between, cr.ReLU())
    assert_same_bits(by_auto["0.weight"], first(cr.Linear(5, 4, init="he_normal"))["0.weight"])


def test_sklearn_knows_the_logistic_activation():
    plain = first(cr.Linear(5, 4, init="sklearn"), cr.Tanh())
    logistic = first(cr.Linear(5, 4, init="sklearn"), cr.Sigmoid())
    for name in plain:
        np.testing.assert_allclose(logistic[name], plain[name] / math.sqrt(3), rtol=4 * eps("float64"))


def test_first_weights_are_functions_of_seed_and_place():
    """Weights that depend on what was made before, on other layers, or that two layers share."""
    chain = [cr.Linear(4, 4, init="torch"), cr.Tanh(), cr.Linear(4, 4, init="torch")]
    state = first(*chain, seed=5)
    drawn = 2 * _core.random_uniform(16, 5, 4) - 1
    np.testing.assert_allclose(state["2.weight"].ravel(), drawn / 2, rtol=4 * eps("float64"))
    np.testing.assert_allclose(
        state["2.bias"], (2 * _core.random_uniform(4, 5, 5) - 1) / 2, rtol=4 * eps("float64")
    )
    assert not np.isin(state["0.weight"], state["2.weight"]).any()
    assert not np.isin(state["2.bias"], state["2.weight"]).any()
    for name, again in first(*chain, seed=5).items():
        assert_same_bits(again, state[name])
        assert (again != first(*chain, seed=6)[name]).all()
    wider = first(cr.Linear(9, 4, init="torch"), *chain[1:], seed=5)
    assert_same_bits(wider["2.weight"], state["2.weight"])


def test_float32_weights_are_the_rounded_float64_ones():
    exact, rounded = first(cr.Linear(30, 20)), first(cr.Linear(30, 20), dtype="float32")
    for name, w in exact.items():
        assert_same_bits(rounded[name], w.astype(np.float32))
