# SPDX-License-Identifier: MIT
"""Sequential: what it computes, what its weights are called, and that copies and files are faithful."""

import copy
import gc
import json
import pickle
import threading
import weakref
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest

import chainrule as cr
from chainrule import devices, reference, training
from conftest import assert_same_bits

SIZES = [5, 7, 3]


def small(seed=0, dtype="float64", **more):
    return cr.mlp(SIZES, activation="tanh", seed=seed, dtype=dtype, **more)


def by_hand(net, x):
    w = net.state_dict()
    return np.tanh(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]


def twin(net):
    w = net.state_dict()
    first, last = (reference.Linear(w[f"{i}.weight"], w[f"{i}.bias"]) for i in (0, 2))
    return reference.Network([first, reference.Op("tanh"), last])


def assert_same_networks(a, b):
    assert a.config() == b.config()
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert_same_bits(value, states[1][name], name)


# ---- forward and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_predict_is_the_formula(rows, rng):
    net, x = small(), rng.standard_normal((rows, 5))
    f = net.predict(x)
    assert f.shape == (rows, 3) and f.dtype == np.float64
    np.testing.assert_allclose(f, by_hand(net, x), rtol=1e-13, atol=1e-14)
    assert_same_bits(net(x), f)


def test_a_single_row(rng):
    net, x = small(), rng.standard_normal((4, 5))
    assert net(x[1]).shape == (3,)
    assert_same_bits(net(x[1]), net(x)[1])
    assert_same_bits(net(x[1].tolist()), net(x)[1])
    one = cr.mlp([1, 2])  # one feature: a number in a list is one row
    assert one([2.0]).shape == (2,)


def test_results_are_the_callers(rng):
    """A window into the engine: writing to it would change the network, or the next result."""
    net, x = small(), rng.standard_normal((4, 5))
    before = copy.deepcopy(net)
    expected = net(x)
    _, grads = net.value_and_grad(x, expected * 0, loss="mse")
    for array in [net(x), *net.trace(x).phi, *net.state_dict().values(), *grads.values()]:
        array[...] = 7
    assert_same_networks(net, before)
    assert_same_bits(net(x), expected)


def test_trace_is_every_activation(rng):
    net, x = small(), rng.standard_normal((4, 5))
    trace = net.trace(x)
    assert [phi.shape for phi in trace.phi] == [(4, 5), (4, 7), (4, 7), (4, 3)]
    for phi, expected in zip(trace.phi, twin(net).forward(x), strict=True):
        np.testing.assert_allclose(phi, expected, rtol=1e-13, atol=1e-14)
    assert_same_bits(trace.phi[-1], net(x))


@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_grad_equals_reference(weighted, rng):
    net = small()
    x, y, w = rng.standard_normal((9, 5)), rng.standard_normal((9, 3)), rng.random(9) if weighted else None
    value, grads = net.value_and_grad(x, y, loss="mse", sample_weight=w)
    exact, expected = twin(net).value_and_grad(x, y, "mse", weight=w)
    assert value == pytest.approx(exact, rel=1e-13)
    assert list(grads) == list(net.state_dict())
    for (name, grad), reference_grad in zip(grads.items(), expected, strict=True):
        assert grad.shape == net.state_dict()[name].shape
        np.testing.assert_allclose(grad, reference_grad, rtol=1e-12, atol=1e-14)
    assert net.evaluate(x, y, loss="mse", sample_weight=w) == pytest.approx(exact, rel=1e-13)


def test_sum_and_mean_differ_by_the_weights(rng):
    net, x, y, w = small(), rng.standard_normal((9, 5)), rng.standard_normal((9, 3)), rng.random(9)
    for weight, total in ((None, 9), (w, w.sum())):
        mean = net.evaluate(x, y, loss="mse", sample_weight=weight)
        assert net.evaluate(x, y, loss=cr.MSE(reduction="sum"), sample_weight=weight) == pytest.approx(
            mean * total
        )


def test_a_loss_called_alone_is_the_loss_of_the_network(rng):
    net, x, y = small(), rng.standard_normal((9, 5)), rng.integers(0, 3, 9)
    value, df = cr.CrossEntropy()(net(x), y)
    assert value == pytest.approx(net.evaluate(x, y, loss="cross_entropy"), rel=1e-14)
    np.testing.assert_allclose(net.value_and_grad(x, y, loss="cross_entropy")[1]["2.bias"], df.sum(axis=0))


def test_dropout_acts_in_training_only(rng):
    plain, dropped = small(), small(dropout=0.5)
    dropped.load_state_dict(dict(zip(dropped.state_dict(), plain.state_dict().values(), strict=True)))
    x, y = rng.standard_normal((9, 5)), rng.standard_normal((9, 3))
    assert_same_bits(plain(x), dropped(x))
    assert plain.evaluate(x, y, loss="mse") == dropped.evaluate(x, y, loss="mse")
    for a, b in zip(*(n.value_and_grad(x, y, loss="mse")[1].values() for n in (plain, dropped)), strict=True):
        assert_same_bits(a, b)
    losses = [n.train_step(x, y, loss="mse", optimizer=cr.SGD()) for n in (plain, dropped)]
    assert losses[0] != losses[1]


def test_many_threads_may_use_one_network(rng):
    net, x = small(), rng.standard_normal((50, 5))
    expected, wrong = net(x), []

    def work():
        for _ in range(200):
            if (net(x) != expected).any():
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- weights by name -----------------------------------------------------------------------------


def test_first_weights_that_have_no_memory(monkeypatch):
    """Which NumPy asks for, after the engine has got its own."""

    def without_memory(*arguments):
        raise MemoryError("Unable to allocate 14.9 GiB for an array")

    monkeypatch.setattr("chainrule.model.initial", without_memory)
    with pytest.raises(MemoryError, match=r"^\[Sequential\] the weights must fit .* got 13$"):
        cr.mlp([2, 3, 1])


def test_names_are_those_of_pytorch():
    net = cr.Sequential(cr.Dropout(), cr.Linear(2, 3), cr.ReLU(), cr.Linear(3, 4, bias=False))
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        "1.weight": (3, 2),
        "1.bias": (3,),
        "3.weight": (4, 3),
    }
    assert net.num_parameters == 6 + 3 + 12


def test_state_dict_goes_around(dtype, rng):
    a, b = small(seed=1, dtype=dtype), small(seed=2, dtype=dtype)
    assert b.load_state_dict(a.state_dict()) == ([], [])
    x = rng.standard_normal((4, 5))
    assert_same_bits(a(x), b(x))
    for name, value in b.state_dict().items():
        assert_same_bits(value, a.state_dict()[name])


def test_a_float32_network_takes_float64_weights():
    a, b = small(dtype="float64"), small(seed=1, dtype="float32")
    b.load_state_dict({name: np.asfortranarray(w) for name, w in a.state_dict().items()})
    for name, w in a.state_dict().items():
        assert_same_bits(b.state_dict()[name], w.astype(np.float32))


def test_not_strict_takes_what_fits():
    net, before = small(), small()
    given = {"0.bias": np.arange(7), "9.bias": np.zeros(2)}
    missing, unexpected = net.load_state_dict(given, strict=False)
    assert (missing, unexpected) == (["0.weight", "2.weight", "2.bias"], ["9.bias"])
    assert_same_bits(net.state_dict()["0.bias"], np.arange(7.0))
    assert_same_bits(net.state_dict()["2.weight"], before.state_dict()["2.weight"])


# ---- description, copies, files ------------------------------------------------------------------

NETWORKS = [
    lambda: small(),
    lambda: small(seed=3, dtype="float32"),
    lambda: cr.Sequential(
        cr.Identity(), cr.Linear(5, 3, bias=False, init="torch"), cr.LogSoftmax(), seed=2**64 - 1
    ),
    lambda: cr.mlp([5, *range(1, 30), 3], activation=cr.LeakyReLU(0.2), dropout=0.25, init="lecun_normal"),
]


@pytest.mark.parametrize("make", NETWORKS)
def test_repr_and_config_make_the_same_network(make):
    net = make()
    assert_same_networks(eval(repr(net), vars(cr).copy()), net)
    assert_same_networks(cr.Sequential.from_config(json.loads(json.dumps(net.config()))), net)


def test_repr():
    assert repr(small(dtype="float32")) == "Sequential(Linear(5, 7), Tanh(), Linear(7, 3))"
    assert repr(small(4)) == "Sequential(Linear(5, 7), Tanh(), Linear(7, 3), seed=4, dtype='float64')"
    assert max(map(len, repr(NETWORKS[3]()).splitlines())) <= 100


each_copy = pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
    ids=["copy", "deepcopy", "pickle"],
)


class Named(cr.Sequential):
    def __init__(self, name):
        self.name = name
        super().__init__(cr.Linear(5, 3))


@each_copy
def test_copies_keep_what_the_user_wrote_on_a_network(copied):
    net = Named("mine")
    net.classes = ["a", "b", "c"]
    twin = copied(net)
    assert type(twin) is Named and (twin.name, twin.classes) == ("mine", ["a", "b", "c"])
    assert twin.classes is not net.classes
    assert_same_networks(net, copied(twin))


@pytest.mark.parametrize("make", NETWORKS)
@each_copy
def test_copies_are_equal_and_independent(copied, make, rng):
    net = make()
    net.fit(
        rng.standard_normal((8, 5)), rng.standard_normal((8, 3)), loss="mse"
    )  # so that the weights are not the first
    before = net.state_dict()
    twin = copied(net)
    assert_same_networks(net, twin)
    twin.fit(rng.standard_normal((8, 5)), rng.standard_normal((8, 3)), loss="mse", optimizer=cr.SGD(0.1))
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name])
    assert any((a != b).any() for a, b in zip(before.values(), twin.state_dict().values(), strict=True))


@pytest.mark.parametrize("make", NETWORKS)
def test_files_are_faithful(make, tmp_path):
    net = make()
    net.save(tmp_path / "net.safetensors", {"note": "first"})
    assert_same_networks(cr.load(tmp_path / "net.safetensors"), net)


def test_the_sequence_of_layers():
    net = small()
    assert len(net) == 3
    assert repr(net[1]) == "Tanh()" and net[-1].out_features == 3
    assert [type(layer) for layer in net] == [cr.Linear, cr.Tanh, cr.Linear]
    assert net[:2] == net.layers[:2]
    assert (net.in_features, net.out_features, net.dtype, net.device) == (5, 3, "float64", "cpu")
    with pytest.raises(IndexError):
        net[3]


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32"), "f4", ">f4"])
def test_names_of_dtypes(dtype):
    assert cr.Sequential(cr.Linear(1, 1), dtype=dtype).dtype == "float32"


def test_summary_counts():
    """Counted by hand: 64·100 + 100 and 100·10 + 10 numbers; as many products as weights."""
    lines = cr.mlp([64, 100, 10], dropout=0.5).summary().splitlines()
    assert lines[0].split() == ["layer", "output", "parameters", "multiplies"]
    assert lines[1].split() == ["0", "Linear(64,", "100)", "(B,", "100)", "6,500", "6,400"]
    assert lines[3].split() == ["2", "Dropout()", "(B,", "100)", "0", "0"]
    assert lines[4].split() == ["3", "Linear(100,", "10)", "(B,", "10)", "1,010", "1,000"]
    assert lines[5].split() == ["total", "7,510", "7,400"]
    assert len({len(line) for line in lines}) == 1


def test_summary_is_a_table_in_notebooks():
    """The same cells; markup in a layer's name is text."""

    class Odd(cr.Layer):
        def forward(self, x):
            return x

        def vjp(self, x, y, dy):
            return dy

    summary = cr.Sequential(cr.Linear(64, 100), Odd(), cr.Linear(100, 10)).summary()
    assert isinstance(summary, str) and str(summary) == summary and summary.count("\n") == 4
    table = ElementTree.fromstring(summary._repr_html_())
    rows = [[cell.text or "" for cell in row] for row in table.iter("tr")]
    assert rows[0] == ["", "layer", "output", "parameters", "multiplies"]
    assert rows[2] == ["1", "<Odd>", "(B, 100)", "0", "?"]
    assert rows[-1] == ["", "total", "", "7,510", "7,400"]
    assert [row.split() for row in summary.splitlines()] == [" ".join(row).split() for row in rows]


def test_mlp_builds_what_it_says():
    def kinds(*arguments, **more):
        return [type(layer).__name__ for layer in cr.mlp(*arguments, **more)]

    assert kinds([2, 3, 1]) == ["Linear", "ReLU", "Linear"]
    assert kinds([2, 1]) == ["Linear"]
    assert kinds((2, 3, 1), activation=None, output_activation="softmax") == ["Linear", "Linear", "Softmax"]
    assert kinds(np.array([2, 3, 1]), dropout=0.1) == ["Linear", "ReLU", "Dropout", "Linear"]
    assert cr.mlp([2, 3, 1], activation=cr.ELU(2.0))[1].alpha == 2.0
    assert {layer.init for layer in cr.mlp([2, 3, 1], init="sklearn") if isinstance(layer, cr.Linear)} == {
        "sklearn"
    }
    assert repr(cr.mlp([2, 3, 1], seed=9)) == repr(
        cr.Sequential(cr.Linear(2, 3), cr.ReLU(), cr.Linear(3, 1), seed=9)
    )


@pytest.mark.parametrize("trained", [False, True])
def test_networks_are_freed(trained, rng):
    """A cycle or a table that keeps a network, with its data and optimizer state, for ever."""
    net, opt = small(), cr.Adam()
    if trained:
        x, y = rng.standard_normal((8, 5)), rng.standard_normal((8, 3))
        net.fit(x, y, loss="mse", optimizer=opt, callbacks=[cr.EarlyStopping("loss")])
        net.train_step(x, y, loss="mse", optimizer=opt)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


class Physics:
    """As users write them: the loss is a method of what has the network."""

    def __init__(self):
        self.net = small()

    def loss(self, f, y):
        return ((f - y) ** 2).sum(), 2 * (f - y)


class Knowing(cr.Layer):
    def forward(self, x):
        return x

    def vjp(self, x, y, dy):
        return dy

    def jvp(self, x, y, dx):
        return dx


def whose_loss_knows_it():
    net = small()
    return net, lambda f, y: (((f - y) ** 2).sum() + 0 * len(net.layers), 2 * (f - y))


def whose_layer_knows_it():
    layer = Knowing()
    layer.net = cr.Sequential(cr.Linear(5, 3), layer)
    return layer.net, "mse"


def whose_loss_is_a_method():
    physics = Physics()
    return physics.net, physics.loss


@pytest.mark.parametrize("make", [whose_loss_knows_it, whose_layer_knows_it, whose_loss_is_a_method])
def test_networks_that_know_themselves_are_freed(make, rng):
    """What the engine holds, Python's collector does not see."""
    net, loss = make()
    x, y, opt = rng.standard_normal((8, 5)), rng.standard_normal((8, 3)), cr.Adam()
    for _ in range(2):
        net.train_step(x, y, loss=loss, optimizer=opt)
    net.fit(x, y, loss=loss, optimizer=opt)
    gone = weakref.ref(net)
    del net, loss
    gc.collect()
    assert gone() is None


def test_a_method_is_one_loss(rng):
    """A new object at each look at it, for each of which a trainer was made."""
    physics, opt = Physics(), cr.Adam()
    x, y = rng.standard_normal((8, 5)), rng.standard_normal((8, 3))
    with mock.patch.object(training, "Stepper", wraps=training.Stepper) as made:
        for _ in range(20):
            physics.net.train_step(x, y, loss=physics.loss, optimizer=opt)
    assert made.call_count == 1


# ---- the machine ---------------------------------------------------------------------------------


def test_info():
    info = cr.info()
    assert info["version"] == cr.__version__ and info["isa"] in info["isas"]
    assert info["threads"] == cr.get_num_threads() >= 1
    assert info["cuda"] == devices.state() and info["cuda"]


def test_threads_are_put_back():
    before = cr.get_num_threads()
    with pytest.raises(KeyError), cr.threads(3):
        assert cr.get_num_threads() == 3
        with cr.threads(1):
            assert cr.get_num_threads() == 1
        assert cr.get_num_threads() == 3
        raise KeyError
    assert cr.get_num_threads() == before


def test_public_names():
    for name in cr.__all__:
        assert getattr(cr, name) is not None
    assert cr.reference.Network and cr.io.save and cr.data
    with pytest.raises(AttributeError, match="no attribute 'Conv2d'"):
        cr.Conv2d  # noqa: B018
