# SPDX-License-Identifier: MIT
"""Layers and losses of the user's own: they train like built-in ones, and a wrong map is named."""

import copy
import gc
import json
import math
import pickle
import re
import warnings

import numpy as np
import pytest

import chainrule as cr
from conftest import assert_same_bits


class OwnTanh(cr.Layer):
    def forward(self, x):
        return np.tanh(x)

    def vjp(self, x, y, dy):
        return dy * (1 - y) * (1 + y)

    def jvp(self, x, y, dx):
        return dx * (1 - y) * (1 + y)

    def config(self):
        return {}


class Vandal(OwnTanh):
    """Leaves nothing of the arrays that it was given."""

    def forward(self, x):
        y = np.tanh(x)
        x[...] = np.nan
        return y

    def vjp(self, x, y, dy):
        dx = super().vjp(x, y, dy)
        for array in (x, y, dy):
            array[...] = np.nan
        return dx

    def jvp(self, x, y, dx):
        dy = super().jvp(x, y, dx)
        for array in (x, y, dx):
            array[...] = np.nan
        return dy


class Affine(cr.Layer):
    """Linear, written by hand: y = x Aᵀ + b."""

    def __init__(self, in_features, out, seed=0):
        self.in_features, self.out, self.seed = in_features, out, seed
        rng = np.random.default_rng(seed)
        self.params = {"A": rng.standard_normal((out, in_features)), "b": rng.standard_normal(out)}

    def out_features(self, in_features):
        return self.out

    def forward(self, x):
        return x @ self.params["A"].T + self.params["b"]

    def vjp(self, x, y, dy):
        return dy @ self.params["A"], {"A": dy.T @ x, "b": dy.sum(axis=0)}

    def jvp(self, x, y, dx):
        return dx @ self.params["A"].T


class Gain(cr.Layer):
    """y = g x, with one number g to learn and a name that a file can bring back."""

    def __init__(self, start=2.0):
        self.start, self.params = start, {"g": np.array(start)}

    def forward(self, x):
        return self.params["g"] * x

    def vjp(self, x, y, dy):
        return self.params["g"] * dy, {"g": (dy * x).sum()}

    def jvp(self, x, y, dx):
        return self.params["g"] * dx

    def config(self):
        return {"start": self.start}


def own_mse(f, y):
    d = f - (y if y.ndim == 2 else y[:, None])
    return (d**2).mean(axis=1), 2 * d / d.shape[1]


def own_mean(f, y):
    d = f - y
    return float((d**2).mean()), 2 * d / d.size


@pytest.fixture
def data(rng):
    return rng.standard_normal((23, 4)), rng.standard_normal((23, 3))


# ---- layers --------------------------------------------------------------------------------------


def test_an_own_layer_trains_like_the_built_in_one(data):
    """An array handed to the wrong map. Two libraries' tanh differ by some roundings."""
    X, y = data
    nets = [
        cr.Sequential(cr.Linear(4, 8), layer, cr.Linear(8, 3), dtype="float64")
        for layer in (OwnTanh(), cr.Tanh())
    ]
    histories = [net.fit(X, y, loss="mse", optimizer=cr.SGD(0.1), batch_size=5, epochs=20) for net in nets]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-11)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", [cr.SGD(0.05, momentum=0.9), cr.Adam(0.01)], ids=str)
def test_own_parameters_train_like_those_of_linear(optimizer, dtype, data):
    X, y = data
    own = cr.Sequential(Affine(4, 8), cr.Tanh(), Affine(8, 3, seed=1), dtype=dtype)
    linear = cr.mlp([4, 8, 3], activation="tanh", dtype=dtype)
    linear.load_state_dict(dict(zip(linear.state_dict(), own.state_dict().values(), strict=True)))
    for net in (own, linear):
        net.fit(X, y, loss="mse", optimizer=copy.copy(optimizer), batch_size=5, epochs=10)
    tolerance = {"float32": 2e-3, "float64": 1e-9}[
        dtype
    ]  # 50 updates carry a rounding of 1e-7 (1e-16) this far
    for a, b in zip(own.state_dict().values(), linear.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_names_and_gradients(data):
    X, y = data
    net = cr.Sequential(Affine(4, 3), Gain(), dtype="float64")
    assert {name: value.shape for name, value in net.state_dict().items()} == {
        "0.A": (3, 4),
        "0.b": (3,),
        "1.g": (),
    }
    assert net.num_parameters == 12 + 3 + 1
    value, grads = net.value_and_grad(X, y, loss="least_squares")
    residual = 2 * (X @ net[0].params["A"].T + net[0].params["b"]) - y
    assert value == pytest.approx(0.5 * (residual**2).sum() / 23)
    np.testing.assert_allclose(grads["0.A"], 2 * residual.T @ X / 23)
    np.testing.assert_allclose(grads["1.g"], (residual * (residual + y) / 2).sum() / 23)


def test_the_maps_of_the_examples_are_each_others_transpose(rng):
    """c·(J t) = (c·J)·t: an example that taught a wrong map would be worse than none."""
    x, t = rng.standard_normal((2, 6, 4))
    for layer, outputs in ((OwnTanh(), 4), (Affine(4, 3), 3), (Gain(), 4)):
        y, c = layer.forward(x), rng.standard_normal((6, outputs))
        dx = layer.vjp(x, y, c)
        dx = dx[0] if isinstance(dx, tuple) else dx
        assert (c * layer.jvp(x, y, t)).sum() == pytest.approx((dx * t).sum(), rel=1e-12)


def test_the_layer_sees_the_current_parameters(data):
    """params that stay those of before training, in the layer's dict or in its forward map."""
    net = cr.Sequential(Gain(2.0), cr.Linear(4, 3), dtype="float64")
    net.fit(*data, loss="mse", optimizer=cr.SGD(0.1), epochs=3)
    assert net[0].params["g"] == net.state_dict()["0.g"] != 2.0
    net.load_state_dict({"0.g": 5.0}, strict=False)
    assert net[0].params["g"] == 5.0
    np.testing.assert_allclose(net.trace(data[0]).phi[1], 5.0 * data[0])


def test_the_callers_arrays_are_not_trained(data):
    given = np.ones((3, 4))
    layer = Affine(4, 3)
    layer.params["A"] = given
    cr.Sequential(layer).fit(*data, loss="mse", optimizer=cr.SGD(0.1))
    assert (given == 1).all()
    assert (layer.params["A"] != 1).any()


def test_maps_may_spoil_what_they_are_given(data):
    """A layer that works in place on its arguments must not reach into the engine or the caller's X."""
    X, y = data
    before = X.copy()
    nets = [cr.Sequential(layer, cr.Linear(4, 3), layer, dtype="float64") for layer in (Vandal(), OwnTanh())]
    for net in nets:
        net.fit(X, y, loss="mse", epochs=3)
    assert_same_bits(X, before)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert_same_bits(a, b)


def test_a_layer_without_parameters_may_be_shared():
    layer = OwnTanh()
    assert len(cr.Sequential(cr.Linear(4, 4), layer, cr.Linear(4, 4), layer)) == 4


def test_a_layer_with_parameters_belongs_to_one_network(data):
    layer = Gain()
    net = cr.Sequential(cr.Linear(4, 3), layer)
    for again in ((cr.Linear(4, 3), layer), (cr.Linear(4, 3), Gain(), layer)):
        with pytest.raises(
            ValueError, match="a layer with parameters belongs to one network: expected a new Gain"
        ):
            cr.Sequential(*again)
    with pytest.raises(ValueError, match="belongs to one network"):
        fresh = Gain()
        cr.Sequential(cr.Linear(4, 3), fresh, fresh)
    assert net[1].params["g"].dtype == np.float32
    with pytest.raises(ValueError, match="belongs to one network"):
        cr.Sequential(cr.Linear(4, 3), layer, dtype="float64")
    assert net[1].params["g"].dtype == np.float32
    net.fit(*data, loss="mse")
    del net
    gc.collect()
    cr.Sequential(cr.Linear(4, 3), layer)  # its network is gone


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_parameters_of_their_own(copied, data):
    net = cr.Sequential(cr.Linear(4, 3), Gain(), dtype="float64")
    net.fit(*data, loss="mse")
    twin = copied(net)
    assert twin[1] is not net[1]
    assert_same_bits(twin(data[0]), net(data[0]))
    before = float(net[1].params["g"])
    twin.fit(*data, loss="mse", optimizer=cr.SGD(0.1))
    assert net[1].params["g"] == net.state_dict()["1.g"] == before != twin[1].params["g"]


def test_own_layers_in_files(data, tmp_path):
    net = cr.Sequential(cr.Linear(4, 3), Gain(3.0), OwnTanh())
    net.fit(*data, loss="mse")
    assert repr(net) == "Sequential(Linear(4, 3), Gain(start=3.0), OwnTanh())"
    assert json.loads(json.dumps(net.config()))["layers"][1] == {"class": "Gain", "start": 3.0}
    net.save(tmp_path / "own.safetensors")
    again = cr.load(tmp_path / "own.safetensors")
    assert type(again[1]) is Gain and again[1].start == 3.0
    assert_same_bits(again(data[0]), net(data[0]))


@pytest.mark.parametrize("value", [np.float32(2), np.ones(3), {1, 2}, float("nan"), b"x"], ids=repr)
def test_a_config_that_no_file_can_hold_is_named(value, tmp_path):
    class Odd(OwnTanh):
        def config(self):
            return {"value": value}

    with pytest.raises(TypeError, match=r"^\[save\] config\(\) of a layer of your own: expected .*, got: "):
        cr.Sequential(cr.Linear(4, 3), Odd()).save(tmp_path / "odd.safetensors")
    assert not list(tmp_path.iterdir())


def test_numbers_put_among_the_parameters_are_refused():
    """They would be used, and neither trained nor saved."""
    for dtype in ("float32", "float64"):
        net = cr.Sequential(cr.Linear(2, 2), Gain(), dtype=dtype)
        before = net.predict([[1.0, 2.0]])
        with pytest.raises(ValueError, match="read-only"):
            net[1].params["g"][...] = 7.0
        own = net[1].params
        for changed in ({"g": np.array(7.0)}, {}, {**own, "h": np.array(7.0)}, 7):
            net[1].params = changed
            with pytest.raises(ValueError, match=r"\[Gain\] params belong to the network: expected its own"):
                net.predict([[1.0, 2.0]])
        net[1].params = own
        assert_same_bits(net.predict([[1.0, 2.0]]), before)
        twin = copy.deepcopy(net)
        twin.fit([[1.0, 2.0]], [[0.0, 0.0]], loss="mse")
        assert twin[1].params["g"] != net[1].params["g"] == net.state_dict()["1.g"]


def test_rows_do_not_know_each_other_where_derivatives_are_differences(rng):
    """A step in the size of other rows: too long for this one; and NaN in them would spoil it."""
    net = cr.Sequential(cr.Linear(2, 3), OwnTanh(), cr.Linear(3, 2), Gain(), seed=0, dtype="float64")
    x = rng.standard_normal((1, 2))
    for other in (1e3, 1e6, np.nan, np.inf):
        rows = np.vstack([x, np.full((1, 2), other)])
        for f in (
            cr.laplacian,
            cr.input_hessian_diagonal,
            lambda net, x: cr.jacobian(net, x, wrt="parameters", mode="forward")["3.g"],
            lambda net, x: cr.jvp(net, x, None, {"3.g": np.array(0.5)})[1],
        ):
            assert_same_bits(np.asarray(f(net, rows))[0], np.asarray(f(net, x))[0])


class Long(cr.Layer):
    """y = 3 x, and many numbers that do nothing but in jvp."""

    def __init__(self):
        self.params = {"g": np.zeros(300_000, np.float32)}

    def forward(self, x):
        return 3 * x

    def vjp(self, x, y, dy):
        return 3 * dy, {"g": np.zeros(self.params["g"].shape, np.float32)}

    def jvp(self, x, y, dx, dparams):
        return 3 * dx + dparams["g"].sum()


def test_the_form_of_a_parameter_is_for_its_holders_to_change():
    """The engine goes on with as many numbers as it was given, in memory that stays."""

    def as_bytes(array):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from NumPy 2.5 on
            array.dtype = np.int8

    def as_another(array):
        array.__setstate__((1, (2,), np.dtype("f4"), False, b"12345678"))

    X, c, v = [[1.0, 2.0]], [[1.0]], {"1.g": np.ones(300_000, np.float32)}
    for change in (as_bytes, as_another):
        net = cr.Sequential(cr.Linear(2, 1), Long())
        expected = net.predict(X), cr.jvp(net, X, None, v)[1]
        with pytest.raises(ValueError, match="resize"):
            net[1].params["g"].resize(3, refcheck=False)
        change(net[1].params["g"])
        assert_same_bits(net.predict(X), expected[0])
        assert_same_bits(cr.jvp(net, X, None, v)[1], expected[1])
        with pytest.raises(ValueError, match=r"gradient of g"):
            cr.vjp(net, X, c, params=True)
        assert not net.state_dict()["1.g"].any()


class Cut(cr.Layer):
    """The first columns; its arguments are named like those of Linear, and it has no weight."""

    def __init__(self, in_features, out_features):
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x):
        return x[:, : self.out_features]

    def vjp(self, x, y, dy):
        return np.pad(dy, ((0, 0), (0, self.in_features - self.out_features)))

    def jvp(self, x, y, dx):
        return dx[:, : self.out_features]

    def config(self):
        return {"in_features": self.in_features, "out_features": self.out_features}


def test_own_layers_with_the_arguments_of_linear_in_files(data, tmp_path):
    """Only a Linear's widths are those of a weight in the file: Cut has none."""
    net = cr.Sequential(cr.Linear(4, 5), Cut(in_features=5, out_features=3), seed=0)
    net.save(tmp_path / "cut.safetensors")
    again = cr.load(tmp_path / "cut.safetensors")
    assert type(again[1]) is Cut
    assert_same_bits(again(data[0]), net(data[0]))


def test_a_name_of_ours_is_not_taken_for_one_of_theirs():
    class ReLU(OwnTanh):
        pass

    with pytest.raises(TypeError, match="for a class whose name is not a built-in layer's"):
        cr.Sequential(cr.Linear(4, 3), ReLU()).config()


# ---- layers with a wrong map ---------------------------------------------------------------------

WRONG_MAPS = [
    ({"forward": lambda self, x: x[:, :2]}, "[Wrong] forward: expected shape (5, 3), got (5, 2)"),
    ({"forward": lambda self, x: x.T}, "[Wrong] forward: expected shape (5, 3), got (3, 5)"),
    ({"forward": lambda self, x: x.sum()}, "[Wrong] forward: expected shape (5, 3), got ()"),
    (
        {"forward": lambda self, x: None},
        "[Wrong] forward: expected real numbers of shape (5, 3), got dtype object",
    ),
    (
        {"forward": lambda self, x: x + 1j},
        "[Wrong] forward: expected real numbers of shape (5, 3), got dtype complex",
    ),
    ({"forward": lambda self, x: [[1], [1, 2]]}, "[Wrong] forward: expected shape (5, 3), got list"),
    ({"vjp": lambda self, x, y, dy: dy[:1]}, "[Wrong] vjp: expected shape (5, 3), got (1, 3)"),
    ({"vjp": lambda self, x, y, dy: (dy, {})}, "[Wrong] vjp: expected shape (5, 3), got tuple"),
]
WRONG_GRADIENTS = [
    (
        lambda self, x, y, dy: dy,
        "[Wrong] vjp of a layer with parameters: expected (dx, {name: gradient}), got ndarray",
    ),
    (
        lambda self, x, y, dy: (dy,),
        "[Wrong] vjp of a layer with parameters: expected (dx, {name: gradient}), got tuple",
    ),
    (lambda self, x, y, dy: (dy, {}), "[Wrong] vjp: expected gradients of 'g', got none"),
    (lambda self, x, y, dy: (dy, {"h": 1.0}), "[Wrong] vjp: expected gradients of 'g', got 'h'"),
    (
        lambda self, x, y, dy: (dy, {"g": 1.0, "h": 1.0}),
        "[Wrong] vjp: expected gradients of 'g', got 'g', 'h'",
    ),
    (lambda self, x, y, dy: (dy, {"g": dy}), "[Wrong] vjp of parameter 'g': expected shape (), got (5, 3)"),
    (lambda self, x, y, dy: (dy[0], {"g": 1.0}), "[Wrong] vjp: expected shape (5, 3), got (3,)"),
]


def assert_named(layer, text, data):
    X, y = data
    net, adam = cr.Sequential(cr.Linear(4, 3), layer, cr.Linear(3, 3)), cr.Adam()
    before = net.state_dict()
    for train in (
        lambda: net.fit(X[:5], y[:5], loss="mse", optimizer=adam),
        lambda: net.train_step(X[:5], y[:5], loss="mse", optimizer=adam),
        lambda: net.value_and_grad(X[:5], y[:5], loss="mse"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            train()
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert adam.state_dict(net)["step"] == 0


@pytest.mark.parametrize("maps, text", WRONG_MAPS, ids=[text for _, text in WRONG_MAPS])
def test_a_wrong_map_is_named(maps, text, data):
    assert_named(type("Wrong", (OwnTanh,), maps)(), text, data)


@pytest.mark.parametrize("vjp, text", WRONG_GRADIENTS, ids=[text for _, text in WRONG_GRADIENTS])
def test_a_wrong_gradient_is_named(vjp, text, data):
    assert_named(type("Wrong", (Gain,), {"vjp": vjp})(), text, data)


def test_an_error_in_a_map_comes_through_as_it_is(data):
    class Late(OwnTanh):
        left = 7

        def vjp(self, x, y, dy):
            Late.left -= 1
            if not Late.left:
                raise ZeroDivisionError("mine")
            return super().vjp(x, y, dy)

    X, y = data
    net = cr.Sequential(cr.Linear(4, 3), Late(), dtype="float64")
    with pytest.raises(ZeroDivisionError, match="mine"):
        net.fit(X, y, loss="mse", optimizer=cr.SGD(0.1), batch_size=5, epochs=4, shuffle=False)
    expected = cr.Sequential(cr.Linear(4, 3), OwnTanh(), dtype="float64")
    sgd = cr.SGD(0.1)  # six updates, 5 rows each but the fifth of 3, came before the error
    for first in (0, 5, 10, 15, 20, 0):
        expected.train_step(X[first : first + 5], y[first : first + 5], loss="mse", optimizer=sgd)
    for a, b in zip(net.state_dict().values(), expected.state_dict().values(), strict=True):
        assert_same_bits(a, b)
    Late.left = 10**9
    net.fit(X, y, loss="mse")


# ---- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [own_mse, own_mean, cr.CustomLoss(own_mse)], ids=["rows", "mean", "object"])
def test_an_own_loss_trains_like_the_built_in_one(loss, data):
    X, y = data
    nets = [cr.mlp([4, 8, 3], dtype="float64"), cr.mlp([4, 8, 3], dtype="float64")]
    arguments = {"optimizer": "sgd", "batch_size": 5, "epochs": 10, "validation_split": 0.2}
    own, built_in = (
        net.fit(X, y, loss=how, **arguments) for net, how in zip(nets, (loss, "mse"), strict=True)
    )
    np.testing.assert_allclose(own["loss"], built_in["loss"], rtol=1e-12)
    np.testing.assert_allclose(own["val_loss"], built_in["val_loss"], rtol=1e-12)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_and_reduction_are_applied_to_values_of_rows(reduction, data, rng):
    (X, y), w = data, rng.random(23)
    net = cr.mlp([4, 8, 3], dtype="float64")
    own, built_in = cr.CustomLoss(own_mse, reduction=reduction), cr.MSE(reduction=reduction)
    for weight in (None, w):
        a, grads = net.value_and_grad(X, y, loss=own, sample_weight=weight)
        b, expected = net.value_and_grad(X, y, loss=built_in, sample_weight=weight)
        assert a == pytest.approx(b, rel=1e-12)
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, expected[name], rtol=1e-11, atol=1e-14)
        assert net.evaluate(X, y, loss=own, sample_weight=weight) == pytest.approx(b, rel=1e-12)


TARGETS = [  # y as given to fit, and (kind, columns) as the loss sees it; None: one-dimensional
    (np.ones((23, 3)), "f", 3),
    (np.ones((23, 2), int), "f", 2),
    (np.ones((23, 1)), "f", 1),
    (np.ones(23), "f", None),
    ([1.5] * 23, "f", None),
    (np.arange(23) % 3, "i", None),
    (np.arange(23) % 2 == 0, "i", None),
    ((np.arange(23) % 3).astype("u8"), "i", None),
    (np.arange(23), "f", None),  # not labels of the three outputs: numbers
    (np.arange(23) - 9, "f", None),
    (np.full(23, 2**63, "u8"), "f", None),
]


@pytest.mark.parametrize("y, kind, columns", TARGETS, ids=range(len(TARGETS)))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_sees_y_as_it_was_given(y, kind, columns, dtype, data):
    """(B,) turned into (B, 1) broadcasts against (B,) to (B, B): a wrong loss without an error."""
    seen = []

    def loss(f, y):
        seen.append((f, y))
        return 0.0, np.zeros_like(f)

    net = cr.mlp([4, 3], dtype=dtype)
    net.fit(data[0], y, loss=loss, batch_size=10, shuffle=False)
    net.train_step(data[0], y, loss=loss, optimizer=cr.SGD())
    net.evaluate(data[0], y, loss=loss)
    assert [f.shape for f, _ in seen[:3]] == [(10, 3), (10, 3), (3, 3)]
    for f, batch in seen:
        assert batch.shape == ((len(f),) if columns is None else (len(f), columns))
        assert batch.dtype == (np.int64 if kind == "i" else f.dtype) and f.dtype == dtype
    np.testing.assert_array_equal(
        np.concatenate([batch for _, batch in seen[:3]]), np.asarray(y, seen[0][1].dtype)
    )


def test_a_network_may_have_other_outputs_than_targets(data, rng):
    """Mean and log variance for one target: the built-in gaussian_nll, written by hand."""

    def nll(f, y):
        mu, s = f.T
        z = (mu - y) * np.exp(-s)
        return 0.5 * (s + z * (mu - y)), np.stack([z, 0.5 - 0.5 * z * (mu - y)], axis=1)

    X, y = data[0], rng.standard_normal(23)
    nets = [cr.mlp([4, 8, 2], dtype="float64") for _ in range(2)]
    for net, loss in zip(nets, (nll, "gaussian_nll"), strict=True):
        net.fit(X, y, loss=loss, epochs=5)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


WRONG_LOSSES = [
    (lambda f, y: 1.0, "[loss] your loss: expected a tuple (value, dL/df), got float"),
    (lambda f, y: None, "[loss] your loss: expected a tuple (value, dL/df), got NoneType"),
    (lambda f, y: (1.0, f, f), "[loss] your loss: expected a tuple (value, dL/df), got tuple of 3"),
    (lambda f, y: (1.0, f[:, 0]), "[loss] gradient of your loss: expected shape (5, 3), got (5,)"),
    (lambda f, y: (1.0, f.T), "[loss] gradient of your loss: expected shape (5, 3), got (3, 5)"),
    (lambda f, y: (f, f), "[loss] value of your loss: expected a number or shape (5,), got (5, 3)"),
    (lambda f, y: (f[:2, 0], f), "[loss] value of your loss: expected a number or shape (5,), got (2,)"),
    (lambda f, y: (f[:, :1], f), "[loss] value of your loss: expected a number or shape (5,), got (5, 1)"),
    (lambda f, y: ("low", f), "[loss] your loss: expected real numbers, got dtypes <U3 and float32"),
    (lambda f, y: (1.0, f + 1j), "[loss] your loss: expected real numbers, got dtypes float64 and complex64"),
    (lambda f, y: (1.0, [[1], [1, 2]]), "[loss] your loss: expected arrays (value, dL/df), got ragged ones"),
]


@pytest.mark.parametrize("loss, text", WRONG_LOSSES, ids=[text for _, text in WRONG_LOSSES])
def test_a_wrong_loss_is_named(loss, text, data):
    X, y = data
    net, adam = cr.mlp([4, 3]), cr.Adam()
    before = net.state_dict()
    for call in (
        lambda: net.fit(X[:5], y[:5], loss=loss, optimizer=adam),
        lambda: net.train_step(X[:5], y[:5], loss=loss, optimizer=adam),
        lambda: net.value_and_grad(X[:5], y[:5], loss=loss),
        lambda: net.evaluate(X[:5], y[:5], loss=loss),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert adam.state_dict(net)["step"] == 0


def test_weights_need_values_of_rows(data):
    net = cr.mlp([4, 3])
    with pytest.raises(
        ValueError, match=re.escape("expected one value per example, shape (5,), got one number")
    ):
        net.fit(*(a[:5] for a in data), loss=own_mean, sample_weight=np.ones(5))


def test_a_loss_that_is_nan_puts_the_weights_back(data):
    net = cr.mlp([4, 3])
    before = net.state_dict()
    with pytest.raises(
        FloatingPointError, match="loss must stay finite: expected numbers, got nan in epoch 1 of 2"
    ):
        net.fit(*data, loss=lambda f, y: (math.nan, np.zeros_like(f)), epochs=2)
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name])


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_an_error_in_a_loss_comes_through_as_it_is(error, data):
    def failing(f, y):
        raise error

    net = cr.mlp([4, 3])
    with pytest.raises(type(error)) as caught:
        net.fit(*data, loss=failing)
    assert caught.value is error
    net.fit(*data, loss="mse")


def test_an_own_loss_called_alone():
    assert cr.CustomLoss(lambda f, y: (f + y, f))(1, 2) == (3, 1)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.1}, {"clip_value": 0.01}], ids=str)
def test_own_parameters_are_clipped_like_those_of_linear(clip, data):
    """The norm is that of all parameters, an own layer's among them."""
    X, y = data
    own = cr.Sequential(cr.Linear(4, 8), cr.Tanh(), Affine(8, 3, seed=1), dtype="float64")
    linear = cr.mlp([4, 8, 3], activation="tanh", dtype="float64")
    linear.load_state_dict(dict(zip(linear.state_dict(), own.state_dict().values(), strict=True)))
    for net in (own, linear):
        net.fit(X, y, loss="mse", optimizer=cr.SGD(0.1), batch_size=5, epochs=3, **clip)
    for a, b in zip(own.state_dict().values(), linear.state_dict().values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_an_own_loss_is_evaluated_on_all_rows_at_once(rng):
    """Its value need not be a sum over rows; the engine's own losses are evaluated in pieces of 1024."""
    X, y, seen = rng.standard_normal((1500, 4)), rng.standard_normal((1500, 3)), []

    def largest(f, y):
        seen.append(f.shape)
        return float(np.abs(f - y).max()), np.zeros_like(f)

    net = cr.mlp([4, 3], dtype="float64")
    assert net.evaluate(X, y, loss=largest) == np.abs(net(X) - y).max()
    assert seen == [(1500, 3)]


@pytest.mark.parametrize(
    "behind", [cr.Tanh(), cr.ReLU(), cr.Softmax(), cr.Dropout(0.5)], ids=lambda layer: layer.op
)
def test_an_own_layer_is_given_what_it_returned(behind, data):
    """Most ops work in place in training: behind one's own layer they would leave their output in its y."""
    X, y = data
    nets = [
        cr.Sequential(cr.Linear(4, 3), layer, behind, dtype="float64", seed=1)
        for layer in (OwnTanh(), cr.Tanh())
    ]
    for net in nets:
        net.fit(X, y, loss="mse", optimizer=cr.SGD(0.1), batch_size=5, epochs=3, seed=2)
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_weights_put_back_are_shown_to_own_layers(data):
    """EarlyStopping's best ones; and those from before a fit whose loss was not finite."""
    X, y = data
    gain = Gain()
    net = cr.Sequential(cr.Linear(4, 3), gain, dtype="float64")
    stop = cr.EarlyStopping("loss", patience=3, restore_best=True)
    net.fit(X, y, loss="mse", optimizer=cr.SGD(10.0), batch_size=23, epochs=9, callbacks=[stop])
    assert gain.params["g"] == net.state_dict()["1.g"]
    left = [3]

    def loss(f, y):
        left[0] -= 1
        return (own_mse(f, y)[0] if left[0] else np.full(len(f), math.nan)), own_mse(f, y)[1]

    before = net.state_dict()["1.g"].copy()
    with pytest.raises(FloatingPointError, match="loss must stay finite"):
        net.fit(X, y, loss=loss, optimizer=cr.SGD(0.01), batch_size=5)
    assert gain.params["g"] == net.state_dict()["1.g"] == before


def test_rows_of_weight_0_do_not_count_in_own_losses(data):
    """Whatever their value and their gradient are: 0 · ∞ = 0 here."""
    X, y = data
    weight = np.ones(23)
    weight[[3, 17]] = 0

    def spoiled(f, y):
        value, df = own_mse(f, y)
        bad = np.isin(y[:, 0], spoil)
        value[bad], df[bad] = math.inf, math.nan
        return value, df

    spoil = y[[3, 17], 0]
    net = cr.mlp([4, 8, 3], dtype="float64")
    value, grads = net.value_and_grad(X, y, loss=spoiled, sample_weight=weight)
    right, expected = net.value_and_grad(X, y, loss=own_mse, sample_weight=weight)
    assert value == pytest.approx(right, rel=1e-12)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected[name], rtol=1e-11, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("own", ["layer", "loss"])
def test_own_code_computes_with_subnormal_numbers(own, data):
    """The engine's own steps count them as zero; a user's code, which runs in the middle of one, does not."""
    X, y = data
    seen = []

    def loss(f, y):
        seen.append(float(np.float64(1e-310) * np.float64(0.5)))
        return own_mse(f, y)

    class Halving(OwnTanh):
        def forward(self, x):
            seen.append(float(np.float64(1e-310) * np.float64(0.5)))
            return super().forward(x)

    net = cr.Sequential(cr.Linear(4, 3), *[Halving()][: own == "layer"], dtype="float64")
    how = loss if own == "loss" else "mse"
    net.fit(X, y, loss=how, epochs=1)
    net.train_step(X, y, loss=how, optimizer=cr.SGD(0.1))
    assert seen and set(seen) == {5e-311}
