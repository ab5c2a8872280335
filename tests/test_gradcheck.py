# SPDX-License-Identifier: MIT
"""gradcheck: right derivatives pass, wrong ones are named, kinks are neither, and nothing is changed."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import chainrule as cr
import test_own_parts
from chainrule import gradient_check
from chainrule.layers import BUILT_IN, Linear
from chainrule.losses import LOSSES
from conftest import assert_same_bits

# ---- layers and losses, right and wrong ----------------------------------------------------------


class Sine(cr.Layer):
    """Right; each wrong one below overrides one map."""

    def forward(self, x):
        return np.sin(x)

    def vjp(self, x, y, dy):
        return dy * np.cos(x)

    def jvp(self, x, y, dx):
        return dx * np.cos(x)


class SineWrongVjp(Sine):
    def vjp(self, x, y, dy):
        return dy * np.sin(x)


class SineWrongJvp(Sine):
    def jvp(self, x, y, dx):
        return -dx * np.cos(x)


class SineWrongForward(Sine):
    def forward(self, x):
        return np.sin(2 * x)


class SineWithoutJvp(cr.Layer):
    forward, vjp = Sine.forward, Sine.vjp


class Affine(test_own_parts.Affine):
    """With tangents of its parameters."""

    def jvp(self, x, y, dx, dparams=None):
        dy = dx @ self.params["A"].T
        return dy if dparams is None else dy + x @ dparams["A"].T + dparams["b"]


class AffineWrongGradient(Affine):
    def vjp(self, x, y, dy):
        dx, grads = super().vjp(x, y, dy)
        return dx, grads | {"b": dy.mean(axis=0)}


class AffineWrongTangent(Affine):
    def jvp(self, x, y, dx, dparams=None):
        dy = super().jvp(x, y, dx, dparams)
        return dy if dparams is None else dy - dparams["b"]


class Centred(Sine):
    """Its rows mix."""

    def forward(self, x):
        return x - x.mean(axis=0)

    def vjp(self, x, y, dy):
        return dy - dy.mean(axis=0)


class Magnitude(cr.Layer):
    """|x|, whose derivative at 0 is chosen by `at_zero`."""

    def __init__(self, at_zero=0.0):
        self.at_zero = at_zero

    def forward(self, x):
        return np.abs(x)

    def vjp(self, x, y, dy):
        return dy * np.where(x == 0, self.at_zero, np.sign(x))

    jvp = vjp


def quartic(f, y):
    d = f - y.reshape(f.shape)
    return (d**4).sum(axis=1), 4 * d**3


def quartic_wrong(f, y):
    value, df = quartic(f, y)
    return value, df / 4


def mean_quartic(f, y):
    value, df = quartic(f, y)
    return float(value.mean()), df / len(f)


def mean_quartic_without_mean(f, y):
    value, df = quartic(f, y)
    return float(value.mean()), df


@pytest.fixture
def data(rng):
    return rng.standard_normal((6, 3)), rng.standard_normal((6, 2))


def around(layer, dtype="float64", outputs=2):
    """The layer between two Linears."""
    before = layer.in_features if hasattr(layer, "in_features") else 4
    after = layer.out if isinstance(layer, Affine) else 4
    return cr.Sequential(cr.Linear(3, before), layer, cr.Linear(after, outputs), seed=1, dtype=dtype)


def row(check, name):
    return next(row for row in check.rows if row.name == name)


# ---- right ones pass -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [kind for kind in BUILT_IN.values() if kind is not Linear])
def test_every_layer_passes(kind, dtype, data):
    X, y = data
    net = cr.Sequential(cr.Linear(3, 5), kind(), cr.Linear(5, 2), seed=3, dtype=dtype)
    check = cr.gradcheck(net, X, y, "mse")
    assert check.ok, str(check)
    assert [row.name for row in check.rows] == ["0.weight", "0.bias", "2.weight", "2.bias", "x"]
    assert [(row.checked, row.size, row.kinks) for row in check.rows] == [
        (n, n, 0) for n in (15, 5, 10, 2, 18)
    ]
    assert all(row.error < 1e-7 for row in check.rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"bce"}))
def test_every_loss_passes(name, reduction, rng):
    X, y = rng.standard_normal((6, 3)), rng.random((6, 2))
    targets = {"cross_entropy": rng.integers(0, 2, 6), "gaussian_nll": y[:, 0]}.get(name, y)
    net = cr.mlp([3, 5, 2], activation="tanh", seed=2)
    check = cr.gradcheck(net, X, targets, LOSSES[name](reduction=reduction))
    assert check.ok, str(check)


@pytest.mark.parametrize("layer", [Sine(), Affine(4, 5), SineWithoutJvp()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("loss", [quartic, mean_quartic, cr.CustomLoss(quartic, reduction="sum")])
def test_right_layers_and_losses_of_ones_own_pass(layer, loss, data):
    check = cr.gradcheck(around(layer if layer is not None else None), *data, loss)
    assert check.ok, str(check)
    assert row(check, f"{'mean_' * (loss is mean_quartic)}quartic: ∂L/∂f").checked == 12


def test_the_maps_of_a_layer_each_have_a_row(data):
    names = [row.name for row in cr.gradcheck(around(Affine(4, 5)), *data, "mse").rows]
    assert names[:6] == [
        "Affine.forward",
        "Affine.vjp",
        "Affine.jvp",
        "Affine ⟨u, J t⟩ = ⟨u J, t⟩",
        "Affine.vjp of 'A'",
        "Affine.vjp of 'b'",
    ]
    assert names[6] == "Affine.jvp of its parameters"


def test_gradients_of_zero_pass(rng):
    """At the minimum of a loss of about 1e6, by the normal equations: the differences are all rounding."""
    X, y = rng.standard_normal((20, 3)), 1e3 * rng.standard_normal((20, 1))
    net = cr.Sequential(cr.Linear(3, 1), dtype="float64")
    best = np.linalg.lstsq(np.hstack([X, np.ones((20, 1))]), y, rcond=None)[0].T
    net.load_state_dict({"0.weight": best[:, :3], "0.bias": best[:, 3]})
    check = cr.gradcheck(net, X, y, "least_squares")
    assert check.ok and not any(row.kinks for row in check.rows), str(check)


def test_small_gradients_of_a_curved_loss_are_no_kinks(rng):
    """Near a minimum the two one-sided slopes differ by more than the slope itself: curvature, no kink."""
    X = rng.standard_normal((20, 3))
    net = cr.mlp([3, 4, 1], activation="tanh", seed=1, dtype="float64")
    y = net(X) + 1e-6 * rng.standard_normal((20, 1))
    check = cr.gradcheck(net, X, y, "least_squares")
    assert check.ok and not any(row.kinks for row in check.rows), str(check)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_scale_of_the_inputs_does_not_matter(scale, rng):
    X, y = scale * rng.standard_normal((5, 3)), rng.standard_normal((5, 1))
    assert cr.gradcheck(cr.mlp([3, 4, 1], activation="softplus", seed=1), X, y, "huber").ok


# ---- wrong ones are named ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "messages"),
    [
        (
            SineWrongVjp(),
            [
                r"SineWrongVjp\.vjp disagrees with SineWrongVjp\.forward: relative error .* at row \d, "
                r"input \d, .* instead of .*; its jvp agrees",
                r"SineWrongVjp\.vjp and SineWrongVjp\.jvp are not each other's transpose: .*",
            ],
        ),
        (
            SineWrongJvp(),
            [
                r"SineWrongJvp\.jvp disagrees with SineWrongJvp\.forward: .*; its vjp agrees",
                r"SineWrongJvp\.vjp and SineWrongJvp\.jvp are not each other's transpose: .*",
            ],
        ),
        (
            SineWrongForward(),
            [
                r"SineWrongForward\.vjp disagrees with SineWrongForward\.forward: .*; its jvp disagrees too",
                r"SineWrongForward\.jvp disagrees with SineWrongForward\.forward: .*; its vjp disagrees too",
            ],
        ),
        (
            AffineWrongGradient(4, 5),
            [
                r"AffineWrongGradient\.vjp's gradient of 'b' disagrees with AffineWrongGradient\.forward: "
                r"relative error .* at \[\d\], .*"
            ],
        ),
        (
            AffineWrongTangent(4, 5),
            [r"AffineWrongTangent\.jvp along the parameters disagrees with AffineWrongTangent\.forward: .*"],
        ),
        (Centred(), [r"Centred\.forward mixes rows: row \d of y differs by .* when it is alone .*"]),
    ],
    ids=lambda k: type(k).__name__,
)
def test_a_wrong_map_is_named(layer, messages, data):
    check = cr.gradcheck(around(layer), *data, "mse")
    assert not check.ok
    own = [m for m in check.failures if not m.startswith("∂L/∂")]
    assert len(own) == len(messages)
    for message, pattern in zip(own, messages, strict=True):
        assert re.fullmatch(pattern, message), message


def test_a_wrong_vjp_shows_in_the_chain_below_it_and_not_above(data):
    check = cr.gradcheck(around(SineWrongVjp()), *data, "mse")
    assert {row.name for row in check.rows if not row.ok} == {
        "SineWrongVjp.vjp", "SineWrongVjp ⟨u, J t⟩ = ⟨u J, t⟩", "0.weight", "0.bias", "x",
    }  # fmt: skip


class Bent(Affine):
    """y = (x aᵀ)² + b, so that vjp_jvp has every term: of x, of dy, and of the parameters."""

    factor = 2.0

    def forward(self, x):
        return np.square(x @ self.params["A"].T) + self.params["b"]

    def vjp(self, x, y, dy):
        c = 2 * dy * (x @ self.params["A"].T)
        return c @ self.params["A"], {"A": c.T @ x, "b": dy.sum(axis=0)}

    def jvp(self, x, y, dx, dparams=None):
        z, dz = x @ self.params["A"].T, dx @ self.params["A"].T
        return 2 * z * dz if dparams is None else 2 * z * (dz + x @ dparams["A"].T) + dparams["b"]

    def vjp_jvp(self, x, y, dy, dx, ddy, dparams):
        weight, moved = self.params["A"], dparams["A"]
        z, dz = x @ weight.T, dx @ weight.T + x @ moved.T
        c, dc = 2 * dy * z, self.factor * (ddy * z + dy * dz)
        return dc @ weight + c @ moved, {"b": ddy.sum(axis=0), "A": dc.T @ x + c.T @ dx}


def test_vjp_jvp_is_checked_against_vjp(data):
    check = cr.gradcheck(around(Bent(4, 5)), *data, "mse")
    assert check.ok and row(check, "Bent.vjp_jvp").checked == 6 * 4 + 5 * 4 + 5
    wrong = Bent(4, 5)
    wrong.factor = 1.9
    check = cr.gradcheck(around(wrong), *data, "mse")
    assert [row.name for row in check.rows if not row.ok] == ["Bent.vjp_jvp"]
    assert check.failures[0].startswith("Bent.vjp_jvp disagrees with Bent.vjp: relative error 0")


def test_a_missing_jvp_is_said_and_is_no_failure(data):
    check = cr.gradcheck(around(SineWithoutJvp()), *data, "mse")
    assert check.ok
    assert "SineWithoutJvp.jvp is not defined: forward mode cannot pass this layer" in str(check)


@pytest.mark.parametrize(
    ("loss", "name"),
    [(quartic_wrong, "quartic_wrong"), (mean_quartic_without_mean, "mean_quartic_without_mean")],
)
def test_a_wrong_loss_is_named(loss, name, data):
    check = cr.gradcheck(around(Sine()), *data, loss)
    assert check.failures[0].startswith(
        f"{name}'s gradient ∂L/∂f disagrees with its value: relative error"
    ), check
    assert row(check, "Sine.vjp").ok and not row(check, "2.weight").ok


def test_one_wrong_number_among_many_is_found_and_located(data, monkeypatch):
    """The engine's own gradients are what is checked: an error of 1e-4 in one of them."""
    right = cr.Sequential.value_and_grad

    def wrong(self, X, y, **how):
        value, grads = right(self, X, y, **how)
        grads["2.weight"][1, 2] *= 1 + 1e-4
        return value, grads

    net = cr.mlp([3, 4, 2], activation="tanh", seed=1)
    assert cr.gradcheck(net, *data, "mse").ok
    monkeypatch.setattr(cr.Sequential, "value_and_grad", wrong)
    check = cr.gradcheck(net, *data, "mse")
    assert len(check.failures) == 1
    assert re.fullmatch(r"∂L/∂2\.weight: relative error .* at \[1, 2\], .* instead of .*", check.failures[0])


def test_not_a_number_is_a_failure(data):
    class Broken(Sine):
        def vjp(self, x, y, dy):
            return dy * np.nan

    check = cr.gradcheck(around(Broken()), *data, "mse")
    assert not row(check, "Broken.vjp").ok and not row(check, "0.weight").ok
    assert row(check, "2.weight").ok and row(check, "2.bias").ok  # above it, nothing is wrong


# ---- kinks ---------------------------------------------------------------------------------------


def test_differences_against_closed_form():
    """x³ at 2: 12 + h² from both sides, and 12 ∓ 6h + h² from one; |x| at 0: −1 and 1."""
    x = np.array([2.0, 0.0])
    h = 2e-3
    found = gradient_check._differences(lambda: x[0] ** 3 + abs(x[1]), x, np.arange(2), 1e-3, 1.0)
    np.testing.assert_allclose(found.central, [12 + h * h, 0], atol=1e-9)
    np.testing.assert_allclose(found.left, [12 - 6 * h + h * h, -1], atol=1e-9)
    np.testing.assert_allclose(found.right, [12 + 6 * h + h * h, 1], atol=1e-9)
    np.testing.assert_array_equal(x, [2.0, 0.0])


def test_a_jump_of_the_bend_is_not_failed():
    """ELU at 0: the slope is 1 on both sides, its own slope 1 and 0, which shifts the difference by h/4."""
    net = cr.Sequential(cr.Linear(2, 2), cr.ELU(), dtype="float64")
    net.load_state_dict({"0.weight": np.eye(2), "0.bias": np.zeros(2)})
    check = cr.gradcheck(net, [[0.0, 0.0]], [[3.0, 1.0]], "mse")
    assert check.ok and row(check, "0.bias").kinks == 2


@pytest.mark.parametrize("layer", [cr.ReLU(), cr.LeakyReLU(0.1), cr.ELU(2.0)], ids=repr)
def test_a_kink_is_reported_and_not_failed(layer, data):
    """Weights of 0 put every hidden unit on its kink, where no derivative is right."""
    net = cr.Sequential(cr.Linear(3, 4, init="zeros"), layer, cr.Linear(4, 2), seed=1)
    check = cr.gradcheck(net, *data, "mse")
    assert check.ok
    assert row(check, "0.weight").kinks == 12 and row(check, "0.weight").checked == 0
    assert row(check, "2.bias").kinks == 0
    assert "left out: the function has a kink there" in str(check)


def test_a_kink_of_the_loss_is_reported():
    net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
    for loss in ("mae", cr.Pinball(0.3)):
        check = cr.gradcheck(net, [[1.0]], [[0.0]], loss)
        assert check.ok and all(row.kinks == 1 for row in check.rows if row.name.startswith("0."))


def test_a_kink_of_ones_own_layer_is_seen_by_its_two_slopes(rng):
    """Any slope from −1 to 1 is right for |x| at 0; 1.5 is none."""
    X, y = np.zeros((2, 1)), rng.standard_normal((2, 1))
    for at_zero, right in ((0.0, True), (1.0, True), (-0.25, True), (1.5, False)):
        net = cr.Sequential(cr.Linear(1, 1, init="zeros"), Magnitude(at_zero), cr.Linear(1, 1), seed=1)
        check = cr.gradcheck(net, X, y, "mse")
        assert row(check, "Magnitude.vjp").ok == right
        assert row(check, "Magnitude.vjp").kinks == (2 if right else 0)


def test_a_wrong_derivative_is_no_kink(data):
    assert row(cr.gradcheck(around(SineWrongVjp()), *data, "mse"), "SineWrongVjp.vjp").kinks == 0


# ---- coordinates, the network itself, the result -------------------------------------------------


def test_many_coordinates_are_sampled_by_the_seed(rng):
    net = cr.mlp([30, 40, 2], activation="tanh", seed=1)
    X, y = rng.standard_normal((4, 30)), rng.standard_normal((4, 2))
    check = cr.gradcheck(net, X, y, "mse", coordinates=25, seed=5)
    assert [(row.checked, row.size) for row in check.rows] == [
        (25, 1200), (25, 40), (25, 80), (2, 2), (25, 120),
    ]  # fmt: skip
    assert check.rows == cr.gradcheck(net, X, y, "mse", coordinates=25, seed=5).rows
    assert check.rows != cr.gradcheck(net, X, y, "mse", coordinates=25, seed=6).rows


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_changed(dtype, data):
    layer = Affine(4, 5)
    net = around(layer, dtype)
    before, X, y = net.state_dict(), *data
    kept, params = (X.copy(), y.copy()), dict(layer.params)
    assert cr.gradcheck(net, X, y, quartic).ok
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name], name)
    assert layer.params.keys() == params.keys()
    assert all(layer.params[name] is value for name, value in params.items())
    assert_same_bits(X, kept[0])
    assert_same_bits(y, kept[1])


def test_the_result_prints(data):
    check = cr.gradcheck(around(SineWrongVjp()), *data, "mse")
    lines = str(check).splitlines()
    assert lines[0] == "gradcheck: 4 of 9 agree with central differences to 1e-06"
    assert lines[1].split() == ["derivative", "shape", "checked", "kinks", "relative", "error"]
    assert re.fullmatch(r"SineWrongVjp\.vjp +6 × 4 +24 +\S+  WRONG", lines[3])
    assert repr(check) == str(check)
    html = ElementTree.fromstring(f"<div>{check._repr_html_()}</div>")
    assert len(html.findall("table/tbody/tr")) == 9
    assert sum(line.startswith("|") for line in check._repr_markdown_().splitlines()) == 11
    assert str(cr.gradcheck(around(Sine()), *data, "mse")).startswith("gradcheck: all 9 agree")


def test_raising(data):
    assert cr.gradcheck(around(Sine()), *data, "mse", raise_on_failure=True).ok
    with pytest.raises(AssertionError, match=r"^\[gradcheck\] derivatives must agree: SineWrongVjp\.vjp"):
        cr.gradcheck(around(SineWrongVjp()), *data, "mse", raise_on_failure=True)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, r"\[gradcheck\] eps"),
        ({"tolerance": -1.0}, ValueError, r"\[gradcheck\] tolerance"),
        ({"coordinates": 0}, ValueError, r"\[gradcheck\] coordinates"),
        ({"seed": "a"}, TypeError, r"\[gradcheck\] seed"),
        ({"raise_on_failure": 1}, TypeError, r"\[gradcheck\] raise_on_failure"),
        ({"loss": "nothing"}, ValueError, r"\[gradcheck\] loss"),
        ({"y": [[1.0]]}, ValueError, r"\[gradcheck\] y"),
    ],
)
def test_what_is_refused(how, error, message, data):
    X, y = data
    arguments = {"loss": "mse", "y": y} | how
    with pytest.raises(error, match=message):
        cr.gradcheck(cr.mlp([3, 2]), X, arguments.pop("y"), arguments.pop("loss"), **arguments)


def test_what_is_no_network_is_refused():
    for see in (cr.gradcheck, cr.explain, cr.draw):
        op = see.__name__
        message = rf"^\[{op}\] net must be a network: expected a Sequential, got 'net'$"
        with pytest.raises(TypeError, match=message):
            see("net", [1.0], [1.0], "mse")
    with pytest.raises(TypeError, match=r"^\[draw\] net must be a network"):
        cr.draw([cr.Linear(1, 1)])


def test_bfloat16_is_refused(data):
    message = r"^\[gradcheck\] derivatives are exact: expected dtype float32 or float64, got bfloat16$"
    with pytest.raises(ValueError, match=message):
        cr.gradcheck(cr.mlp([3, 2], dtype="bfloat16"), *data, "mse")
