# SPDX-License-Identifier: MIT
"""The GPU's engine: every op, loss, rule, derivative and schedule against the CPU's in float64.

The CPU's results are held to reference.py by the other files. These tests run on a GPU, and on the emulated
engine that CHAINRULE_CUDA_MODULE names; sizes are small enough for that, and lie around the kernels' tiles.
"""

import math
import sys

import numpy as np
import pytest

from chainrule import _core, devices
from conftest import CUDA_MODULE, assert_same_bits, assert_within, eps, layers_of, typed
from test_losses import each_loss
from test_losses import sample as sample_loss
from test_ops import assert_right, each_op, roundings, saved, size_of
from test_ops import sample as sample_op
from test_optim import RULES, each_rule

pytestmark = pytest.mark.gpu
cuda = sys.modules.get("chainrule._cuda") if devices.count() else None
PRECISIONS = ["float32", "tf32", "bfloat16", "float64"]
ROUNDED = {"tf32": 2.0**-10, "bfloat16": 2.0**-8}  # operands of products, relatively: tf32 may be cut off
NO_LIMITS = (-math.inf, math.inf)


def of(name, precision):
    return getattr(cuda, name + ("64" if precision == "float64" else "32"))


def real(precision):
    return np.dtype("float64" if precision == "float64" else "float32")


class Pair:
    """A network on the GPU, and its twin of the same numbers on the CPU in float64."""

    def __init__(self, layers, precision, rng):
        self.precision, self.dtype = precision, real(precision)
        self.gpu = of("Network", precision)(layers, precision, 0)
        self.cpu = _core.Network64(layers)
        for k, (_, _, shape) in enumerate(self.gpu.parameters):
            scale = math.sqrt(shape[-1]) if len(shape) > 1 else 1
            self.gpu.set_parameter(k, (rng.standard_normal(shape) / scale).astype(self.dtype))
        self.follow()

    def follow(self):
        """The CPU's parameters become the GPU's."""
        for k in range(len(self.gpu.parameters)):
            self.cpu.set_parameter(k, self.gpu.get_parameter(k).astype(float))

    def numbers(self, rng, *shape):
        return rng.standard_normal(shape).astype(self.dtype)

    def assert_same_parameters(self, relative, what=""):
        for k, (_, name, _) in enumerate(self.gpu.parameters):
            close(self.gpu.get_parameter(k), self.cpu.get_parameter(k), relative, f"{what}{name} {k} ")


def wide(array):
    """In float64; labels, None and all else as they are."""
    return array.astype(float) if isinstance(array, np.ndarray) and array.dtype != np.int64 else array


# Networks here have sums of up to 70 terms in 3 layers, there and back, of up to some 3 times the largest
# result: 3 · 2 · 70 · 3 roundings, and as many again for what they do to the slopes.
ROUNDINGS = 2500


def close(got, exact, relative, what=""):
    """got = exact to `relative` of the largest number in exact."""
    got, exact = np.asarray(got, float), np.asarray(exact, float)
    assert got.shape == exact.shape, f"{what}{got.shape} and {exact.shape}"
    assert_within(got, exact, np.array(relative * max(np.abs(exact).max(initial=0), 1e-3)), what)


def all_close(got, exact, relative, what=""):
    """The same for whatever is made of arrays and numbers."""
    if isinstance(exact, dict):
        assert got.keys() == exact.keys()
        got, exact = list(got.values()), list(exact.values())
    if isinstance(exact, (tuple, list)):
        assert len(got) == len(exact)
        for place, (a, b) in enumerate(zip(got, exact, strict=True)):
            all_close(a, b, relative, f"{what}[{place}] ")
    else:
        close(got, exact, relative, what)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    return request.param


# ---- single ops --------------------------------------------------------------------------------------------


@each_op
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 33), (70, 65)], ids=str)
def test_op(row, shape, dtype, rng):
    """A formula that the GPU computes otherwise, at the CPU's bounds; rows and columns around a warp."""
    precision = dtype.name
    net = of("Network", precision)([(row.name, shape[1], shape[1], row.a, False, None)], precision, 0)
    x, v = sample_op(rng, row, shape, dtype), rng.standard_normal(shape).astype(dtype)
    y = net.predict(x)
    assert_right(row, x, y, "cuda")
    bound = roundings(row, shape[1]) * eps(dtype) * size_of(row, v)
    x64, v64 = wide(x), wide(v)
    kept = np.ascontiguousarray(wide(saved(row, x, y)))
    for name, (f, got) in {"vjp": net.vjp(x, v, False), "jvp": net.jvp(x, v, None)}.items():
        assert_same_bits(f, y, name)
        assert_within(got, getattr(_core, f"op_{name}")(row.name, v64, kept, row.a), bound, name)
    twin = _core.Network64([(row.name, shape[1], shape[1], row.a, False, None)])
    close(net.second(x, False), twin.second(x64, False), 64 * eps(dtype) * roundings(row, shape[1]), "second")


@pytest.fixture(params=["layer by layer", "by blocks", "by cuBLASLt"])
def way(request):
    """Predictions that go through memory between layers, and those that keep all weights in each block."""
    schedules = {"layer by layer": "fused", "by blocks": "resident", "by cuBLASLt": "library"}
    cuda.force_schedule(schedules[request.param])
    yield request.param
    cuda.force_schedule("")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_every_width(precision, bias, way, rng):
    """Rows, columns or terms lost or counted twice at the edges of tiles."""
    edges = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
    for place, outputs in enumerate(edges):
        inputs, rows = edges[(5 * place + 3) % len(edges)], edges[(7 * place + 1) % len(edges)]
        pair = Pair(layers_of([inputs, outputs], bias=bias), precision, rng)
        x, dy = pair.numbers(rng, rows, inputs), pair.numbers(rng, rows, outputs)
        w, b = pair.gpu.get_parameter(0), pair.gpu.get_parameter(1) if bias else np.zeros(outputs)
        what = f"{rows} × {inputs} → {outputs}: "
        step = (inputs + 2) * eps(pair.dtype) + 2.01 * ROUNDED.get(precision, 0)  # both operands
        exact, parts = wide(x) @ wide(w).T + b, np.abs(wide(x)) @ np.abs(wide(w)).T + np.abs(b)
        assert_within(pair.gpu.predict(x), exact, step * parts, what)
        if precision in ("float32", "float64"):
            all_close(
                pair.gpu.backward(x, dy), pair.cpu.backward(wide(x), wide(dy)), 600 * eps(pair.dtype), what
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_calls_of_any_size_one_after_the_other(precision, schedule, rng):
    """What a network keeps for its next evaluation, gradient and prediction is of no use to a larger one.

    Two products on the way up and two down: at worst, four times the rounding of their operands.
    """
    pair = Pair(layers_of([5, 9, 3], "tanh"), precision, rng)
    relative = 4 * ROUNDED[precision] if precision in ROUNDED else ROUNDINGS * eps(pair.dtype)
    for rows, name, reduction in ((7, "mse", "mean"), (70, "cross_entropy", "sum"), (33, "huber", "mean")):
        loss = _core.Loss(name, 1.0, reduction, None)
        x, y = pair.numbers(rng, rows, 5), pair.numbers(rng, rows, 3)
        y = y.argmax(axis=1) if name == "cross_entropy" else y
        got = pair.gpu.value_and_grad_as_is(x, y, loss, NO_LIMITS)
        exact = pair.cpu.value_and_grad_as_is(wide(x), wide(y), loss, NO_LIMITS)
        assert got[0] == pytest.approx(exact[0], rel=relative)
        all_close(got[1], exact[1], relative)
        got, exact = pair.gpu.evaluate(x, y, None, loss), pair.cpu.evaluate(wide(x), wide(y), None, loss)
        assert got == pytest.approx(exact, rel=relative)
        close(pair.gpu.predict(x), pair.cpu.predict(wide(x)), relative)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss(row, reduction, weighted, dtype, rng):
    """Value and ∂L/∂f of one output and of many, of one row and of several blocks."""
    for rows, outputs in ((1, 1), (11, 5), (130, 2), (9, 8), (3, 70)):
        f, y = sample_loss(row, rng, rows, outputs, dtype)
        weight = (rng.random(rows) + 0.1).astype(dtype) if weighted else None
        layers = [("identity", f.shape[1], f.shape[1], 0.0, False, None)]
        net, twin = of("Network", dtype.name)(layers, dtype.name, 0), _core.Network64(layers)
        loss = _core.Loss(row.name, row.a, reduction, None)
        relative = (64 + 4 * f.size) * eps(dtype)
        what = f"{rows} rows, {outputs} outputs: "
        exact = twin.evaluate(wide(f), wide(y), wide(weight), loss)
        assert net.evaluate(f, y, weight, loss) == pytest.approx(exact, rel=relative, abs=relative), what
        got = net.input_gradient(f, y, weight, loss, NO_LIMITS)
        close(got, twin.input_gradient(wide(f), wide(y), wide(weight), loss, NO_LIMITS), relative, what)


@pytest.mark.parametrize("name", ["mse", "gaussian_nll"])
@pytest.mark.parametrize("outputs", [4, 34])
def test_rows_of_weight_0_do_not_count(name, outputs, schedule, precision, rng):
    """0 · ∞ = 0 for a target whose loss overflows; by a thread or a warp a row."""
    pair = Pair(layers_of([3, outputs]), precision, rng)
    x, y = pair.numbers(rng, 9, 3), pair.numbers(rng, 9, outputs // (2 if name == "gaussian_nll" else 1))
    weight = np.ones(9, pair.dtype)
    weight[4:6], y[4:6] = 0, 1e30 if precision == "float32" else 1e200
    loss, v = _core.Loss(name, 0.0, "mean", None), directions(pair, rng)
    wide_v = {key: wide(array) for key, array in v.items()}
    got = pair.gpu.value_and_grad(x, y, weight, loss), pair.gpu.hvp(x, y, weight, loss, NO_LIMITS, v, False)
    exact = (
        pair.cpu.value_and_grad(wide(x), wide(y), wide(weight), loss),
        pair.cpu.hvp(wide(x), wide(y), wide(weight), loss, NO_LIMITS, wide_v, False),
    )
    assert all(np.isfinite(array).all() for array in flat(exact))
    all_close(got, exact, ROUNDINGS * eps(pair.dtype))


@each_loss
@pytest.mark.parametrize("outputs", [5, 34])
def test_hessian_of_a_loss(row, outputs, dtype, rng):
    """By a thread or a warp a row: through one layer, the sums of whose products are of 4 terms."""
    f, y = sample_loss(row, rng, 9, outputs, dtype)
    pair = Pair(layers_of([3, f.shape[1]]), dtype.name, rng)
    x, weight, v = pair.numbers(rng, 9, 3), (rng.random(9) + 0.1).astype(dtype), directions(pair, rng)
    loss = _core.Loss(row.name, row.a, "mean", None)
    got = pair.gpu.hvp(x, y, weight, loss, NO_LIMITS, v, False)
    wide_v = {name: wide(array) for name, array in v.items()}
    exact = pair.cpu.hvp(wide(x), wide(y), wide(weight), loss, NO_LIMITS, wide_v, False)
    all_close(got, exact, ROUNDINGS * eps(dtype))


# ---- networks ----------------------------------------------------------------------------------------------

NETWORKS = {
    "tanh": layers_of([5, 17, 9, 3], "tanh", "tanh"),
    "gelu, silu": layers_of([3, 33, 70, 2], "gelu", "silu"),
    "softplus, sigmoid": layers_of([4, 8, 8, 4], "softplus", "sigmoid", "softmax"),
    "elu": layers_of([2, 31, 6], ("elu", 0.7), "log_softmax", bias=False),
    "one": layers_of([1, 1]),
    "wide rows": layers_of([3, 9, 34], "silu", "softmax"),
}
CROSS_ENTROPY = _core.Loss("cross_entropy", 0.0, "mean", None)


def directions(pair, rng):
    names = [f"{layer}.{name}" for layer, name, _ in pair.gpu.parameters]
    shapes = [shape for _, _, shape in pair.gpu.parameters]
    return {name: pair.numbers(rng, *shape) for name, shape in zip(names, shapes, strict=True)}


MAPS = {
    "predict": lambda net, d: net.predict(d["x"]),
    "trace": lambda net, d: net.trace(d["x"]),
    "vjp": lambda net, d: net.vjp(d["x"], d["c"], True),
    "backward": lambda net, d: net.backward(d["x"], d["c"]),
    "jvp": lambda net, d: net.jvp(d["x"], d["dx"], d["v"]),
    "jvp in the parameters": lambda net, d: net.jvp(d["x"], None, d["v"]),
    "sensitivity": lambda net, d: net.sensitivity(d["x"], d["x"].shape[1] - 1),
    "jacobian, reverse": lambda net, d: net.jacobian(d["x"], True),
    "jacobian, forward": lambda net, d: net.jacobian(d["x"], False),
    "jacobian in the parameters": lambda net, d: net.parameter_jacobian(d["x"]),
    "second": lambda net, d: net.second(d["x"], False),
    "laplacian": lambda net, d: net.second(d["x"], True),
    "value_and_grad": lambda net, d: net.value_and_grad(d["x"], d["y"], d["w"], CROSS_ENTROPY),
    "input_gradient": lambda net, d: net.input_gradient(d["x"], d["y"], d["w"], CROSS_ENTROPY, NO_LIMITS),
    "hvp": lambda net, d: net.hvp(d["x"], d["y"], d["w"], CROSS_ENTROPY, NO_LIMITS, d["v"], False),
    "gauss_newton": lambda net, d: net.hvp(d["x"], d["y"], d["w"], CROSS_ENTROPY, NO_LIMITS, d["v"], True),
    "example_gradients": lambda net, d: net.example_gradients(d["x"], d["y"], CROSS_ENTROPY, NO_LIMITS),
    "example_norms": lambda net, d: net.example_norms(d["x"], d["y"], CROSS_ENTROPY, NO_LIMITS),
    "slopes": lambda net, d: net.value_and_grad(d["x"], d["y"], d["w"], CROSS_ENTROPY, d["dy"], 0.7),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("layers", NETWORKS.values(), ids=NETWORKS)
def test_derivatives(name, layers, precision, rng):
    """Every map that the CPU has, of one row and of more than a block."""
    pair = Pair(layers, precision, rng)
    for rows in (1, 37):
        given = {
            "x": pair.numbers(rng, rows, layers[0][1]),
            "dx": pair.numbers(rng, rows, layers[0][1]),
            "c": pair.numbers(rng, rows, layers[-1][2]),
            "y": rng.integers(0, layers[-1][2], rows),
            "w": pair.numbers(rng, rows) ** 2,
            "dy": pair.numbers(rng, rows, layers[-1][2], layers[0][1]),
            "v": directions(pair, rng),
        }
        exact = {key: wide(value) for key, value in given.items() if key != "v"}
        exact["v"] = {key: wide(value) for key, value in given["v"].items()}
        got, expected = MAPS[name](pair.gpu, given), MAPS[name](pair.cpu, exact)
        second = (
            4 if name in ("second", "laplacian", "hvp", "gauss_newton", "slopes") else 1
        )  # sums of products of slopes
        all_close(got, expected, second * ROUNDINGS * eps(pair.dtype), f"{rows} rows: ")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("network", ["gelu, silu", "wide rows"])
def test_two_runs_give_the_same_bits(name, network, precision, rng):
    """Sums in the order in which blocks happen to end."""
    pair = Pair(NETWORKS[network], precision, rng)
    outputs = NETWORKS[network][-1][2]
    given = {
        "x": pair.numbers(rng, 150, 3), "dx": pair.numbers(rng, 150, 3), "c": pair.numbers(rng, 150, outputs),
        "y": rng.integers(0, outputs, 150), "w": pair.numbers(rng, 150) ** 2,
        "dy": pair.numbers(rng, 150, outputs, 3),
        "v": directions(pair, rng),
    }  # fmt: skip
    first, second = (flat(MAPS[name](pair.gpu, given)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def flat(answer):
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, (tuple, list)):
        return [array for part in answer for array in flat(part)]
    return [np.asarray(answer)]


def test_what_does_not_fit_is_not_computed(precision, rng):
    """None, as on the CPU, for arrays of another dtype or shape: Python then converts or complains."""
    pair = Pair(NETWORKS["tanh"], precision, rng)
    x, c = pair.numbers(rng, 4, 5), pair.numbers(rng, 4, 3)
    for bad in ([[1.0] * 5], x.astype(np.float16), x[:, :4].copy(), np.asfortranarray(x), x[::2]):
        assert pair.gpu.predict_as_is(bad) is None
        assert pair.gpu.vjp(bad, c, False) is None and pair.gpu.jacobian(bad, True) is None
    assert_same_bits(pair.gpu.predict_as_is(x), pair.gpu.predict(x))
    assert_same_bits(pair.gpu.predict_as_is(x[1]), pair.gpu.predict(x[1:2])[0])
    assert pair.gpu.predict(x[:0]).shape == (0, 3)


# ---- predictions -------------------------------------------------------------------------------------------

PREDICTED = {
    "64-64-64-1": layers_of([64, 64, 64, 1], "tanh", "relu"),
    "panels and few": layers_of([9, 65, 8, 130, 9], "gelu", "silu", ("elu", 0.7), "sigmoid", bias=False),
    "dropout": [
        *layers_of([3, 70], "softplus"),
        ("dropout", 70, 70, 0.4, False, None),
        ("linear", 70, 3, 0.0, True, None),
    ],
    "an op first": [
        ("tanh", 17, 17, 0.0, False, None),
        ("sigmoid", 17, 17, 0.0, False, None),
        *layers_of([17, 5]),
    ],
    "rows whole": layers_of([5, 12, 9], "relu", "softmax"),  # these two go layer by layer either way
    "too large": layers_of([5, 400, 400, 2], "relu", "relu"),
}


@pytest.mark.parametrize("layers", PREDICTED.values(), ids=PREDICTED)
def test_predictions(layers, way, precision, rng):
    """Around a block's rows; a row does not know its batch where blocks have the same tiles for all."""
    pair = Pair(layers, precision, rng)
    x = pair.numbers(rng, 300, layers[0][1])
    whole = pair.gpu.predict(x)
    close(whole, pair.cpu.predict(wide(x)), ROUNDINGS * eps(pair.dtype))
    for rows in (1, 127, 128, 129):
        part = pair.gpu.predict(x[:rows])
        close(part, whole[:rows], ROUNDINGS * eps(pair.dtype))
        if way == "by blocks" and layers is PREDICTED["64-64-64-1"] and precision == "float32":
            assert_same_bits(part, whole[:rows])


def test_what_pads_a_layer_reaches_no_prediction(way, rng):
    """0 · ∞ is NaN: sums that are infinite, and tanh's limits behind them, are the CPU's."""
    pair = Pair(layers_of([5, 9, 17, 3], "tanh", "tanh"), "float32", rng)
    x = pair.numbers(rng, 130, 5)
    x[7, 2], x[128, 4], x[129, 0] = np.inf, -np.inf, np.nan
    got, exact = pair.gpu.predict(x), pair.cpu.predict(wide(x))
    assert np.isnan(got[129]).all() and np.isfinite(got[:129]).all()
    close(got[:129], exact[:129], ROUNDINGS * eps(np.float32))


def test_large_predictions_go_in_pieces(rng):
    pair = Pair(layers_of([2, 5, 1], "relu"), "float32", rng)
    x = pair.numbers(rng, 70_001, 2)
    close(pair.gpu.predict(x), pair.cpu.predict(wide(x)), 100 * eps(np.float32))


MANY = 9300  # more than two slices of a gradient, and than one piece of a loss


@pytest.mark.parametrize("name, precision", [
    ("vjp", "float32"), ("vjp", "float64"), ("value_and_grad", "float32"), ("hvp", "float64")
])  # fmt: skip
def test_sums_over_many_rows(name, precision, rng):
    """Slices and pieces, the last ones shorter: one left out, taken twice, or read before it is there."""
    pair = Pair(layers_of([5, 4, 2], "tanh"), precision, rng)
    given = {
        "x": pair.numbers(rng, MANY, 5), "c": np.abs(pair.numbers(rng, MANY, 2)),
        "y": rng.integers(0, 2, MANY), "w": pair.numbers(rng, MANY) ** 2, "v": directions(pair, rng),
    }  # fmt: skip
    exact = {key: wide(value) for key, value in given.items() if key != "v"}
    exact["v"] = {key: wide(value) for key, value in given["v"].items()}
    got, again = (MAPS[name](pair.gpu, given) for _ in range(2))
    # A chain of sums has up to 1163 terms of a slice, or 37 of a piece and 256 threads; see ROUNDINGS.
    all_close(got, MAPS[name](pair.cpu, exact), 2 * ROUNDINGS * eps(pair.dtype))
    for a, b in zip(flat(got), flat(again), strict=True):
        assert_same_bits(a, b)


def test_slices_of_gradients_without_their_bias(monkeypatch, rng):
    """32 inputs are fewer tiles than 33, and more slices, on a GPU of few processors or with many rows."""
    monkeypatch.setenv("CHAINRULE_EMULATOR_PROCESSORS", "14")
    pair = Pair(layers_of([1, 32, 32, 1], "tanh", "tanh"), "float64", rng)
    given = {"x": pair.numbers(rng, 6200, 1), "y": pair.numbers(rng, 6200, 1), "v": directions(pair, rng)}
    mse = _core.Loss("mse", 0.0, "mean", None)
    got, exact = (
        net.hvp(given["x"], given["y"], None, mse, NO_LIMITS, given["v"], False)
        for net in (pair.gpu, pair.cpu)
    )
    all_close(got, exact, 4 * ROUNDINGS * eps(pair.dtype))


# ---- training ----------------------------------------------------------------------------------------------

TRAINED = layers_of([5, 17, 9, 2], "tanh", "silu")


class Trained(Pair):
    """Two trainings of one problem: on the GPU, and on the CPU in float64."""

    rows = 37

    def __init__(self, rng, precision="float64", rule=RULES[0], layers=TRAINED, weighted=False, sloped=False,
                 loss=("mse", 0.0, "mean", None), batch_size=37, shuffle=False, dy_weight=0.5,
                 **more):  # fmt: skip
        super().__init__(layers, precision, rng)
        self.x, y = self.numbers(rng, self.rows, layers[0][1]), self.numbers(rng, self.rows, layers[-1][2])
        self.y = y.argmax(axis=1) if loss[0] == "cross_entropy" else y
        self.weight = (rng.random(self.rows) + 0.1).astype(self.dtype) if weighted else None
        dy = self.numbers(rng, self.rows, layers[-1][2], layers[0][1]) if sloped else None
        names = ("l1", "l2", "clip_value", "clip_norm", "clip_example_norm")
        options = batch_size, shuffle, 11, *(more.get(name, 0.0) for name in names)
        self.lr, hyper = rule.lr, rule.engine_hyper()
        sides = []
        for net, kind, as_given in ((self.gpu, of, np.asarray), (self.cpu, typed, wide)):
            type_of = precision if kind is of else np.float64
            optimizer = kind("Optimizer", type_of)(net, rule.name, hyper)
            data = (None if a is None else as_given(a) for a in (self.x, self.y, self.weight))
            slopes = None if dy is None else as_given(dy)
            trainer = kind("Trainer", type_of)(
                net, optimizer, _core.Loss(*loss), *data, *options, slopes, dy_weight
            )
            sides.append((optimizer, trainer))
        (self.optimizer, self.trainer), (self.cpu_optimizer, self.cpu_trainer) = sides

    def assert_steps_equal(self, steps, relative):
        """Each step of the CPU starts where the GPU stands, but keeps a memory of its own."""
        for step in range(steps):
            self.follow()
            got = self.trainer.step(self.x, self.y, self.weight, self.lr)
            exact = self.cpu_trainer.step(wide(self.x), wide(self.y), wide(self.weight), self.lr)
            assert got == pytest.approx(exact, rel=relative), f"step {step}"
            self.assert_same_parameters(relative, f"step {step}: ")

    def assert_runs_equal(self, epochs, relative):
        """Whole epochs, each side on its own."""
        rates = np.full(epochs, self.lr)
        got, exact = self.trainer.run(0, rates), self.cpu_trainer.run(0, rates)
        close(got, exact, relative, "losses ")
        self.assert_same_parameters(relative)


@each_rule
def test_steps_follow_the_cpu(rule, schedule, rng):
    """A wrong rule, a lost state, a bias correction with the wrong step number; bound as in test_optim."""
    pair = Trained(rng, rule=rule)
    pair.assert_steps_equal(8, 1e-12)
    assert pair.optimizer.step_count == 8


@each_rule
def test_float32_steps_follow_too(rule, schedule, rng):
    Trained(rng, "float32", rule).assert_steps_equal(8, 5e-4)


@pytest.mark.parametrize("more", [
    {"weighted": True}, {"l1": 0.03}, {"l2": 0.2},
    {"clip_value": 0.02}, {"clip_norm": 0.1}, {"clip_norm": 1e3},
    {"l1": 0.01, "l2": 0.1, "clip_value": 0.05, "clip_norm": 0.1, "weighted": True},
    {"clip_example_norm": 0.3}, {"clip_example_norm": 0.3, "weighted": True}, {"sloped": True},
    {"sloped": True, "weighted": True, "l2": 0.1}, {"loss": ("mse", 0.0, "sum", None), "clip_value": 0.02},
    {"loss": ("cross_entropy", 0.0, "mean", None)}, {"loss": ("huber", 0.5, "mean", None), "weighted": True},
], ids=str)  # fmt: skip
def test_treatments_follow_the_cpu(more, schedule, rng):
    """Penalties, clips, weights, slopes, losses, in whole epochs of shuffled batches with a rest."""
    Trained(rng, rule=RULES[2], batch_size=8, shuffle=True, **more).assert_runs_equal(2, 1e-10)


@pytest.mark.parametrize("layers", [
    layers_of([5, 1]), layers_of([1, 64, 64, 1], "relu", "relu"), layers_of([5, 130, 2], "gelu"),
    layers_of([33, 70, 65, 3], "tanh", "leaky_relu", "log_softmax"), layers_of([5, 16, 2], "elu", bias=False),
    layers_of([129, 3], ()), [("tanh", 5, 5, 0.0, False, None), *layers_of([5, 4, 2], "softmax")],
], ids=lambda layers: "-".join(row[0] for row in layers))  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 16, 37])
def test_architectures_follow_the_cpu(layers, batch_size, schedule, rng):
    """Widths around tiles and vectors, layers without a Linear before them, batches of one."""
    Trained(rng, rule=RULES[6], layers=layers, batch_size=batch_size, shuffle=True).assert_runs_equal(1, 1e-9)


def with_dropout(p):
    return [*layers_of([5, 17], "tanh"), ("dropout", 17, 17, p, False, None), *layers_of([17, 2])]


@pytest.mark.parametrize("rows", [64, 67, 1, 5])
@pytest.mark.parametrize("more", [
    {}, {"weighted": True, "l1": 0.01, "l2": 0.1, "clip_value": 0.05}, {"clip_norm": 0.1},
    {"layers": with_dropout(0.3)},
], ids=["plain", "penalties", "clip_norm", "dropout"])  # fmt: skip
def test_blocks_share_a_batch(rows, more, rng):
    """Eight blocks of eight rows; a batch of fewer rows than blocks behind it, or alone; a step of few."""

    class OfRows(Trained):
        pass

    OfRows.rows = rows
    pair = OfRows(rng, rule=RULES[6], batch_size=64, shuffle=True, **more)
    assert pair.trainer.schedule == "resident"
    assert pair.trainer.blocks == (8 if rows >= 64 and cuda.has_clusters(0) else 1)
    pair.assert_runs_equal(3, 1e-10)
    few = [None if a is None else a[:5] for a in (pair.x, pair.y, pair.weight)]
    close(pair.trainer.step(*few, 0.01), pair.cpu_trainer.step(*few, 0.01), 1e-10, "loss ")
    pair.assert_same_parameters(1e-10)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_dropout_and_order_are_the_cpus(p, schedule, rng):
    """The same seed drops the same activations and takes the same rows, or every digit would differ."""
    pair = Trained(rng, rule=RULES[0], layers=with_dropout(p), batch_size=8, shuffle=True)
    pair.assert_runs_equal(3, 1e-10)
    close(pair.gpu.predict(pair.x), pair.cpu.predict(wide(pair.x)), 1e-10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_trainings_give_the_same_bits(precision, schedule, rng):
    state = rng.bit_generator.state
    ends = []
    for _ in range(2):
        rng.bit_generator.state = state
        pair = Trained(rng, precision, RULES[6], with_dropout(0.2), batch_size=8, shuffle=True)
        losses = pair.trainer.run(0, np.full(3, 0.01))
        ends.append(
            [losses, pair.gpu.get_parameter(0), pair.gpu.get_parameter(3), *pair.optimizer.get_state()]
        )
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b)


def test_epochs_in_one_call_or_in_many(schedule, rng):
    """What is kept between launches, and what starts anew; rates by epoch and by step."""
    state, ends = rng.bit_generator.state, []
    for how in ("one call", "a call an epoch", "rates by step"):
        rng.bit_generator.state = state
        pair = Trained(rng, "float32", RULES[6], with_dropout(0.2), batch_size=8, shuffle=True)
        rates = np.array([0.01, 0.02, 0.005])
        if how == "a call an epoch":
            losses = np.concatenate([pair.trainer.run(k, rates[k : k + 1]) for k in range(3)])
        else:
            losses = pair.trainer.run(0, np.repeat(rates[:, None], 5, axis=1) if "step" in how else rates)
        ends.append([losses, pair.gpu.get_parameter(0), *pair.optimizer.get_state()])
        resident = pair.trainer.schedule == "resident"
        assert (pair.trainer.blocks > 0) == resident
        assert (pair.trainer.graphs > 0) != resident  # or each would be slow in silence
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert_same_bits(a, b)


def test_an_epoch_of_more_steps_than_a_launch_takes(schedule, rng):
    """Each launch of the resident schedule goes on at the row where the one before stopped."""

    class Long(Trained):
        rows = 1100

    for shuffle in (False, True):
        pair = Long(rng, rule=RULES[0], layers=layers_of([3, 2]), batch_size=1, shuffle=shuffle)
        pair.assert_runs_equal(2, 1e-9)


def test_a_step_takes_the_schedule_that_suits_its_rows(rng):
    """Whatever rows its trainer was made with: one, by train_step, which meets its batches later."""

    class Tall(Trained):
        rows = 8192

    pair = Tall(rng, rule=RULES[0], layers=layers_of([3, 5, 2], "tanh"), batch_size=1)
    for rows, chosen in (
        (1, "resident"),
        (32, "resident"),
        (4096, "resident"),
        (8192, "fused"),
        (7, "fused"),
    ):
        x, y = pair.x[:rows], pair.y[:rows]
        close(pair.trainer.step(x, y, None, 0.01), pair.cpu_trainer.step(x, y, None, 0.01), 1e-12, "loss ")
        assert pair.trainer.schedule == chosen
        pair.assert_same_parameters(1e-12)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_library_makes_the_products_it_is_given(precision, rng):
    """Where it had no algorithm, tiles of ours would serve in silence, at a tenth of its rate in bfloat16."""

    class Tall(Trained):
        rows = 64

    cuda.force_schedule("library")
    try:
        pair = Tall(rng, precision, RULES[6], layers_of([64, 128, 64], "relu"), batch_size=32)
        pair.trainer.run(0, np.full(3, 0.01))
    finally:
        cuda.force_schedule("")
    made, given = pair.trainer.library_shapes
    assert 0 < made == given


def test_what_is_enqueued_ahead_of_a_divergence_counts(schedule, rng):
    """The loss of an epoch is read when the next is on its way; that one's steps have been taken, too."""
    pair = Trained(rng, rule=RULES[0], batch_size=10)
    losses = pair.trainer.run(0, np.array([0.01, np.inf, 0.01, 0.01, 0.01]))
    assert np.isfinite(losses[:-1]).all() and not np.isfinite(losses[-1]) and len(losses) < 5
    assert pair.optimizer.step_count == 4 * (len(losses) + 1)


def test_each_step_of_a_graph_has_its_own_rate_and_mask(schedule, rng):
    """19 steps an epoch: a graph of 16 and three alone; rates, bias corrections and dropout differ."""
    adam = next(rule for rule in RULES if rule.name == "adam")
    pair = Trained(rng, rule=adam, layers=with_dropout(0.3), batch_size=2)
    rates = np.linspace(0.02, 0.001, 38).reshape(2, 19)
    close(pair.trainer.run(0, rates), pair.cpu_trainer.run(0, rates), 1e-10, "losses ")
    pair.assert_same_parameters(1e-10)


def test_a_state_goes_on_where_it_was(schedule, rng):
    """get_state and set_state, and from the GPU to the CPU: an optimizer's memory moved with its network."""
    pair = Trained(rng, rule=RULES[6])
    pair.assert_steps_equal(3, 1e-12)
    pair.cpu_optimizer.set_state(pair.optimizer.get_state())
    pair.optimizer.set_state(pair.cpu_optimizer.get_state())
    pair.assert_steps_equal(3, 1e-12)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_rounded_products_train_as_well(precision, schedule, rng):
    """As float64's, to 5 % of the first loss: rounding errors are not biased."""
    pair = Trained(rng, precision, RULES[6], batch_size=8, shuffle=True)
    rates = np.full(30, 0.01)
    got, exact = pair.trainer.run(0, rates), pair.cpu_trainer.run(0, rates)
    assert exact[-1] < 0.5 * exact[0]
    assert_within(got, exact, 0.05 * exact[0], "losses ")


class OfManyRows(Trained):
    rows = MANY


@pytest.mark.parametrize("more", [
    {"l1": 0.03, "weighted": True}, {"clip_norm": 0.1, "batch_size": 9000}, {"clip_example_norm": 0.3},
], ids=str)  # fmt: skip
def test_steps_of_many_rows_follow_the_cpu(more, rng):
    """Gradients in slices, with the update and without; and a rest that has none."""
    layers, more = layers_of([5, 4, 2], "tanh"), {"batch_size": MANY, **more}
    OfManyRows(rng, rule=RULES[2], layers=layers, **more).assert_runs_equal(2, 1e-10)


class Longer(Trained):
    rows = 163


@pytest.mark.parametrize("algorithms", ["all", "some"])
@pytest.mark.parametrize("more", [{}, {"l2": 0.1}, {"clip_norm": 0.5}, {"clip_example_norm": 0.3}], ids=str)
def test_packed_operands_are_those_of_the_step(more, algorithms, monkeypatch, rng):
    """The library's, packed once a step, against tiles that round each time; graphs of 16 steps and of one.

    Float32 sums in another order send a bfloat16 to its neighbour now and then, 2^-8 away; last step's
    matrices are further off.
    """
    monkeypatch.setenv("CHAINRULE_EMULATOR_ALGORITHMS", algorithms)
    layers = [
        *layers_of([5, 70], "tanh"),
        ("dropout", 70, 70, 0.2, False, None),
        *layers_of([70, 33, 2], "gelu"),
    ]
    state, ends = rng.bit_generator.state, []
    for schedule in ("fused", "library"):
        rng.bit_generator.state = state
        cuda.force_schedule(schedule)
        pair = Longer(rng, "bfloat16", RULES[0], layers, batch_size=8, shuffle=True, weighted=True, **more)
        cuda.force_schedule("")
        losses = [pair.trainer.run(epoch, np.full(1, 0.05)) for epoch in range(2)]
        pair.gpu.set_parameter(0, pair.gpu.get_parameter(0) / 2)
        if "clip_example_norm" not in more:
            losses.append(pair.trainer.step(pair.x, pair.y, pair.weight, 0.05))
        moves = [pair.gpu.get_parameter(k) - pair.cpu.get_parameter(k) for k in range(6)]
        ends.append([*losses, *moves])
    all_close(ends[1], ends[0], 2.0**-7)


@each_loss
@pytest.mark.parametrize("outputs", [5, 70])
def test_a_loss_packs_its_cotangents(row, outputs, rng):
    """By a thread or a warp a row. By rows of the unit matrix, the gradient is those cotangents, rounded."""
    rows, precision = 9, "bfloat16"
    f, y = sample_loss(row, rng, rows, outputs, np.dtype("float32"))
    loss, ends = _core.Loss(row.name, row.a, "sum", None), []
    pair = Pair(layers_of([rows, f.shape[1]]), precision, rng)
    pair.gpu.set_parameter(0, np.ascontiguousarray(f.T))
    pair.gpu.set_parameter(1, np.zeros(f.shape[1], np.float32))
    for schedule in ("fused", "library"):
        cuda.force_schedule(schedule)
        _, gradients = pair.gpu.value_and_grad_as_is(np.eye(rows, dtype=np.float32), y, loss, NO_LIMITS)
        cuda.force_schedule("")
        ends.append(gradients)
    all_close(ends[1], ends[0], 2.0**-20)


DEEP = (5, 33, 70, 9, 2)


@pytest.mark.parametrize("op", ["relu", "leaky_relu", "gelu", "tanh"])
def test_what_lies_packed_alone_has_the_same_bits(op, rng):
    """A limit on examples' gradients reads float32; one that limits nothing changes no bit of a step.

    Except at relu on a GPU: for what cuBLASLt leaves as bfloat16, it may have an algorithm of other sums.
    """
    state, ends, ops = rng.bit_generator.state, [], [(op, 0.1)] * 3
    cuda.force_schedule("library")
    for limit in ("clip_norm", "clip_example_norm"):
        rng.bit_generator.state = state
        pair = Longer(rng, "bfloat16", RULES[6], layers_of(DEEP, *ops), batch_size=8, **{limit: 1e30})
        ends.append([pair.trainer.run(0, np.full(2, 0.01)), *map(pair.gpu.get_parameter, range(8))])
    cuda.force_schedule("")
    if op == "relu" and not CUDA_MODULE:
        return all_close(*ends, 2.0**-7)
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("op", ["relu", "leaky_relu", "gelu"])
@pytest.mark.parametrize("draw", range(3))
def test_our_tiles_read_what_the_library_has_packed(op, draw, monkeypatch, rng):
    """Where it has some algorithms only.

    Four steps: in many, a sum on the other side of a kink moves parameters by 2^-4 now and then.
    """
    state, ends = rng.bit_generator.state, []
    for algorithms in ("none", "some"):
        monkeypatch.setenv("CHAINRULE_EMULATOR_ALGORITHMS", algorithms)
        rng.bit_generator.state = state
        cuda.force_schedule("library")
        pair = Trained(rng, "bfloat16", RULES[6], layers_of(DEEP, *[(op, 0.1)] * 3), batch_size=10)
        cuda.force_schedule("")
        losses = pair.trainer.run(0, np.full(1, 0.01))
        ends.append([losses, *(pair.gpu.get_parameter(k) - pair.cpu.get_parameter(k) for k in range(8))])
    all_close(ends[1], ends[0], 2.0**-4)


def test_snapshots_and_changes(rng):
    pair = Trained(rng, "float32")
    before, changes = pair.gpu.get_parameter(0), pair.gpu.changes
    snapshot = pair.gpu.snapshot()
    pair.trainer.run(0, np.full(1, 0.1))
    assert pair.gpu.changes != changes and (pair.gpu.get_parameter(0) != before).any()
    pair.gpu.restore(snapshot)
    assert_same_bits(pair.gpu.get_parameter(0), before)
    assert pair.gpu.all_finite()
    pair.gpu.set_parameter(0, np.full_like(before, np.inf))
    assert not pair.gpu.all_finite()


@pytest.mark.skipif(not CUDA_MODULE, reason="no GPU loses graphs when it is asked to")
@pytest.mark.parametrize("name, value", [("CAPTURE", "lost"), ("ALGORITHMS", "none")])
def test_what_the_device_refuses_is_done_another_way(name, value, schedule, monkeypatch, rng):
    """Graphs that another thread's wait ends; shapes for which cuBLASLt has no algorithm."""
    monkeypatch.setenv(f"CHAINRULE_EMULATOR_{name}", value)
    Trained(rng, "float64", batch_size=5, shuffle=True).assert_runs_equal(3, 1e-11)
