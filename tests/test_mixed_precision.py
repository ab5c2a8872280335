# SPDX-License-Identifier: MIT
"""dtype="bfloat16" as a user meets it: float32 in and out, files and copies, training that is as good.

What the products compute is the business of test_bfloat16.py.
"""

import copy
import json
import pickle

import numpy as np
import pytest

import chainrule as cr
from chainrule.__main__ import main
from chainrule.data import TableModel
from conftest import assert_same_bits

SIZES = [12, 33, 17, 6]


def small(seed=0, dtype="bfloat16", **more):
    return cr.mlp(SIZES, seed=seed, dtype=dtype, **more)


def assert_same_networks(a, b):
    assert a.config() == b.config() and repr(a) == repr(b)
    assert a.dtype == b.dtype == "bfloat16"
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert_same_bits(value, b.state_dict()[name], name)


@pytest.fixture
def data(rng):
    return rng.standard_normal((53, 12)), rng.standard_normal((53, 6))


class Scale(cr.Layer):
    """y = g x, with a number g for each column."""

    def __init__(self, columns):
        self.columns, self.params = columns, {"g": np.linspace(0.5, 1.5, columns)}

    def forward(self, x):
        return self.params["g"] * x

    def vjp(self, x, y, dy):
        return self.params["g"] * dy, {"g": (dy * x).sum(axis=0)}

    def jvp(self, x, y, dx):
        return self.params["g"] * dx

    def config(self):
        return {"columns": self.columns}


# ---- arrays ------------------------------------------------------------------------------------------------


def test_the_first_weights_are_those_of_float32():
    """Weights drawn otherwise, or rounded: the master copies are float32's."""
    net, full = small(), small(dtype="float32")
    for name, value in net.state_dict().items():
        assert_same_bits(value, full.state_dict()[name], name)


@pytest.mark.parametrize("given", [np.float32, np.float64, int])
def test_arrays_are_float32(given, data):
    """Whatever comes in; NumPy has no bfloat16 to give back."""
    X, y = (np.round(array, 0).astype(given) for array in data)
    net = small()
    assert (net.dtype, net.array_dtype) == ("bfloat16", "float32")
    value, grads = net.value_and_grad(X, y, loss="mse")
    assert isinstance(value, float) and list(grads) == list(net.state_dict())
    for array in [net(X), net(X[0]), *net.trace(X).phi, *net.state_dict().values(), *grads.values()]:
        assert array.dtype == np.float32 and np.isfinite(array).all()


def test_results_are_near_those_of_float32_and_differ(data):
    """A dtype that is taken and forgotten. Three layers round operands by up to 0.4 %, both ways."""
    X, y = data
    net, full = (small(dtype=dtype, activation="tanh") for dtype in ("bfloat16", "float32"))
    for got, want in (
        (net(X), full(X)),
        *zip(*(n.value_and_grad(X, y, loss="mse")[1].values() for n in (net, full)), strict=True),
    ):
        assert (got != want).mean() > 0.9
        np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * np.abs(want).max())
    assert net.evaluate(X, y, loss="mse") == pytest.approx(full.evaluate(X, y, loss="mse"), rel=0.01)


def test_all_ways_through_the_network_agree(data):
    X, y = data
    net = small()
    value, _ = net.value_and_grad(X, y, loss="mse")
    trace = net.trace(X)
    assert [phi.shape for phi in trace.phi] == [(53, n) for n in (12, 33, 33, 17, 17, 6)]
    assert_same_bits(trace.phi[-1], net(X))
    assert_same_bits(net(X[7]), net(X)[7])
    assert net(X[:0]).shape == (0, 6)
    assert value == net.evaluate(X, y, loss="mse") == net.train_step(X, y, loss="mse", optimizer=cr.SGD(0.1))
    assert value == pytest.approx(((trace.phi[-1] - y) ** 2).mean(), rel=1e-5)
    assert net.evaluate(X, y, loss="mse") < value


# ---- names -------------------------------------------------------------------------------------------------


def test_its_name_is_shown():
    net = cr.Sequential(cr.Linear(2, 6), cr.ReLU(), cr.Linear(6, 1), dtype="bfloat16")
    assert repr(net) == "Sequential(Linear(2, 6), ReLU(), Linear(6, 1), dtype='bfloat16')"
    assert net.config()["dtype"] == "bfloat16"
    assert repr(small()) == repr(cr.Sequential(*small(), dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["bf16", "bfloat", "float16", np.float16, np.uint16, None])
def test_unknown_dtypes_list_the_known_ones(dtype):
    with pytest.raises(ValueError, match=r"expected one of 'float32', 'float64', 'bfloat16', 'tf32', got"):
        cr.mlp([2, 6, 1], dtype=dtype)


# ---- files and copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_files_and_copies_keep_it(trained, data, tmp_path):
    """A copy that computes in float32: its config says so, and its outputs have other bits."""
    X, y = data
    net = small(seed=3)
    if trained:
        net.fit(X, y, loss="mse", epochs=2)
    path = tmp_path / "net.safetensors"
    net.save(path)
    copies = [cr.load(path), copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))]
    made = cr.Sequential.from_config(json.loads(json.dumps(net.config())))
    made.load_state_dict(net.state_dict())
    for other in [*copies, made]:
        assert_same_networks(other, net)
        assert_same_bits(other(X), net(X))


def test_weights_go_from_one_dtype_to_another(data):
    X, _ = data
    net = small(seed=1)
    for dtype in ("float32", "float64"):
        other = small(seed=2, dtype=dtype)
        other.load_state_dict(net.state_dict())
        back = small(seed=2)
        back.load_state_dict(other.state_dict())
        assert_same_bits(back(X), net(X))


def test_safetensors_hold_float32(tmp_path):
    """Weights rounded on their way to a file; any reader of the format can take them."""
    safetensors = pytest.importorskip("safetensors.numpy")
    small().save(tmp_path / "net.safetensors")
    for name, value in safetensors.load_file(tmp_path / "net.safetensors").items():
        assert_same_bits(value, small().state_dict()[name], name)


# ---- training ----------------------------------------------------------------------------------------------


def accuracy(dtype, seed):
    """On the last 360 of scikit-learn's digits, in percent, after 15 epochs on the others."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = X[order] / 16, y[order]
    net = cr.mlp([64, 100, 10], seed=seed, dtype=dtype)
    net.fit(X[:-360], y[:-360], loss="cross_entropy", epochs=15, seed=seed)
    return 100 * (net.predict(X[-360:]).argmax(axis=1) == y[-360:]).mean()


def test_digits_are_read_as_well_as_in_float32(isa):
    """Training that stalls or drifts in 8 bits: mean of three seeds, at most one point below float32."""
    full, mixed = (np.mean([accuracy(dtype, seed) for seed in range(3)]) for dtype in ("float32", "bfloat16"))
    assert full > 95 and mixed > full - 1


@pytest.mark.parametrize(
    "optimizer", [cr.GD(0.1), cr.SGD(0.05, momentum=0.9), cr.Adam(), cr.RMSprop()], ids=str
)
def test_every_way_of_training_learns(optimizer, rng):
    """A path of `fit` that takes the network for something else: weights, penalties, limits, validation."""
    X = rng.standard_normal((200, 12))
    y = (X[:, :6] > 0).argmax(axis=1)
    net = small(dropout=0.1)
    history = net.fit(
        X, y, loss="cross_entropy", optimizer=optimizer, epochs=30, validation_split=0.2, l1=1e-5, l2=1e-4,
        class_weight="balanced", sample_weight=rng.random(200) + 0.5, clip_norm=1.0, clip_value=0.5,
        schedule=cr.CosineAnnealingLR(30), callbacks=[cr.EarlyStopping("val_loss", patience=30)],
    )  # fmt: skip
    assert history["loss"][-1] < 0.8 * history["loss"][0] and np.isfinite(history["val_loss"]).all()


def fitted(make, data, epochs=3):
    """Parameters, losses and outputs of a fit with steps large enough for several threads."""
    X, y = data
    net = make()
    history = net.fit(X, y, loss="mse", epochs=epochs, batch_size=128, clip_norm=0.5)
    return [*net.state_dict().values(), np.array(history["loss"]), net.predict(X)]


def test_bits_do_not_depend_on_threads(isa, rng, on_threads):
    """A promise that holds for every dtype, on one machine and instruction set."""
    data = rng.standard_normal((301, 40)), rng.standard_normal((301, 5))
    first, *others = on_threads(
        lambda: fitted(lambda: cr.mlp([40, 130, 67, 5], dropout=0.2, dtype="bfloat16"), data)
    )
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)


def test_weights_put_back_after_a_divergence_are_as_good_as_new(data):
    """NaN that stays in a rounded copy: `fit` puts the old weights back, and so may the user."""
    X, y = data
    net = cr.mlp([12, 33, 35, 6], seed=0, dtype="bfloat16")
    start, (value, grads) = net.state_dict(), net.value_and_grad(X, y, loss="mse")

    def assert_as_new():
        again, new = net.value_and_grad(X, y, loss="mse")
        assert again == value
        for name, g in grads.items():
            assert_same_bits(new[name], g, name)

    with pytest.raises(FloatingPointError):
        net.fit(X, y, loss="mse", optimizer=cr.SGD(1e30), epochs=5)
    assert_as_new()
    for _ in range(4):
        net.train_step(X, y, loss="mse", optimizer=cr.SGD(1e30))
    assert not np.isfinite(net(X)).any()
    net.load_state_dict(start)
    assert_as_new()


# ---- layers of other kinds ---------------------------------------------------------------------------------


def test_narrow_networks_are_float32s(data):
    """Layers of up to four outputs are not worth rounding: the same bits, whichever dtype is named."""
    X, y = data[0], data[1][:, :4]
    made = [lambda d=d: cr.mlp([12, 4, 3, 4], seed=5, dtype=d) for d in ("bfloat16", "float32")]
    for a, b in zip(*(fitted(make, (X, y)) for make in made), strict=True):
        assert_same_bits(a, b)


def test_layers_of_ones_own_see_float32(data):
    """Between two rounded products; they train, and a file brings them back."""
    X, y = data
    seen = []

    class Watch(cr.Layer):
        def forward(self, x):
            seen.append(x.dtype)
            return x

        def vjp(self, x, y, dy):
            seen.append(dy.dtype)
            return dy

        def jvp(self, x, y, dx):
            return dx

    net = cr.Sequential(
        Watch(), cr.Linear(12, 33), Watch(), Scale(33), cr.Tanh(), cr.Linear(33, 6), dtype="bfloat16"
    )
    assert net.state_dict()["3.g"].dtype == np.float32
    history = net.fit(X, y, loss="mse", optimizer=cr.Adam(0.01), epochs=30)
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert set(seen) == {np.dtype("float32")}
    assert (net.state_dict()["3.g"] != np.linspace(0.5, 1.5, 33, dtype=np.float32)).all()


def test_layers_of_ones_own_come_back_from_a_file(data, tmp_path):
    X, y = data
    net = cr.Sequential(cr.Linear(12, 33), Scale(33), cr.Linear(33, 6), dtype="bfloat16")
    net.fit(X, y, loss="mse", epochs=2)
    net.save(tmp_path / "own.safetensors")
    loaded = cr.load(tmp_path / "own.safetensors")
    assert_same_networks(loaded, net)
    assert_same_bits(loaded(X), net(X))


# ---- the command line --------------------------------------------------------------------------------------


def test_tables_train_in_bfloat16(rng, tmp_path, monkeypatch, capsys):
    """`--dtype bfloat16` from the table to the file and back to answers."""
    monkeypatch.chdir(tmp_path)
    x = rng.standard_normal((200, 3))
    rows = [",".join([*(f"{v:.5f}" for v in row), "up" if row.sum() > 0 else "down"]) for row in x]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c,way", *rows]) + "\n")
    assert main(["train", "table.csv", "--target", "way", "--dtype", "bfloat16", "--quiet"]) == 0
    model = TableModel.load("model.safetensors")
    assert model.net.dtype == "bfloat16" and model.dtype == np.float32
    capsys.readouterr()
    assert main(["predict", "model.safetensors", "table.csv"]) == 0
    answers = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    right = np.mean([a == row.rsplit(",", 1)[1] for a, row in zip(answers, rows, strict=True)])
    assert right > 0.9


def test_bfloat16_layers_are_not_shared_by_columns(isa, on_threads, rng):
    X, y = rng.standard_normal((128, 64)), rng.standard_normal((128, 3))

    def run():
        net = cr.mlp([64, 384, 256, 3], activation="tanh", seed=1, dtype="bfloat16")
        net.fit(X, y, loss="mse", optimizer="sgd", batch_size=128, epochs=3)
        return [*net.state_dict().values()]

    first, *others = on_threads(run, (1, 2, 3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)
