# SPDX-License-Identifier: MIT
"""explain: factors whose product is the gradient, each the Jacobian it says, and counts done by hand."""

import copy
import json
import pickle
import re
from functools import reduce

import numpy as np
import pytest

import chainrule as cr
from chainrule import explanation, reference
from chainrule.layers import BUILT_IN, Dropout, Linear
from chainrule.losses import LOSSES
from conftest import assert_same_bits
from test_gradcheck import Affine, Sine, mean_quartic, quartic


def product(explained):
    return reduce(np.matmul, [factor.value for factor in explained.factors])


def targets_for(loss, outputs, rng):
    """A target of one example that the loss takes."""
    if loss == "cross_entropy":
        return int(rng.integers(outputs))
    return rng.random(outputs // 2 if loss == "gaussian_nll" else outputs)


def assert_close(got, expected):
    """To 1e-12 of the largest: some ten roundings of 1e-16 for each of the few products."""
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0))


# ---- the product is the gradient -----------------------------------------------------------------

NETS = {
    "one_layer": lambda: cr.mlp([3, 2], dtype="float64"),
    "deep": lambda: cr.mlp([3, 4, 5, 4, 3, 2], activation="gelu", seed=1, dtype="float64"),
    "narrow": lambda: cr.mlp([3, 1, 2], activation="tanh", seed=2, dtype="float64"),
    "wide": lambda: cr.mlp([3, 60, 2], activation="relu", seed=3, dtype="float64"),
    "no_bias": lambda: cr.Sequential(
        cr.Linear(3, 4, bias=False), cr.ELU(1.5), cr.Linear(4, 2), dtype="float64"
    ),
    "activation_first": lambda: cr.Sequential(cr.Tanh(), cr.Linear(3, 2), dtype="float64"),
    "softmaxes": lambda: cr.Sequential(
        cr.Linear(3, 4), cr.Softmax(), cr.Dropout(), cr.Linear(4, 2), cr.LogSoftmax(), dtype="float64"
    ),
    "own": lambda: cr.Sequential(cr.Linear(3, 4), Sine(), Affine(4, 5), cr.Linear(5, 2), dtype="float64"),
}


@pytest.mark.parametrize("loss", sorted(set(LOSSES) - {"bce"}))
@pytest.mark.parametrize("name", NETS)
def test_the_product_is_the_gradient(name, loss, rng):
    net, x = NETS[name](), rng.standard_normal(3)
    y = targets_for(loss, 2, rng)
    value, grads = net.value_and_grad(x[None], np.asarray(y)[None], loss=loss)
    for wrt, gradient in grads.items():
        explained = cr.explain(net, x, y, loss, wrt=wrt)
        assert explained.loss == pytest.approx(value, rel=1e-12)
        assert product(explained).shape == (1, gradient.size)
        assert_close(product(explained).reshape(gradient.shape), gradient)
        assert_close(explained.gradient, gradient)
        assert [f.value.shape for f in explained.factors] == [f.shape for f in explained.factors]


def test_the_product_for_the_input_against_the_reference(rng):
    W1, b1, W2 = rng.standard_normal((4, 3)), rng.standard_normal(4), rng.standard_normal((2, 4))
    net = cr.Sequential(cr.Linear(3, 4), cr.SiLU(), cr.Linear(4, 2, bias=False), dtype="float64")
    net.load_state_dict({"0.weight": W1, "0.bias": b1, "2.weight": W2})
    twin = reference.Network([reference.Linear(W1, b1), reference.Op("silu"), reference.Linear(W2)])
    x, y = rng.standard_normal((1, 3)), rng.standard_normal((1, 2))
    phi = twin.forward(x)
    dphi, _ = twin.backward(phi, reference.loss("mse", phi[-1], y)[1])
    explained = cr.explain(net, x, y, "mse", wrt="x")
    assert_close(product(explained), dphi[0])
    assert_close(explained.gradient, dphi[0][0])


@pytest.mark.parametrize("loss", [quartic, mean_quartic, cr.CustomLoss(quartic, reduction="sum")])
def test_a_loss_of_ones_own(loss, rng):
    net, x, y = NETS["deep"](), rng.standard_normal(3), rng.standard_normal((1, 2))
    explained = cr.explain(net, x, y, loss, wrt="2.weight")
    assert_close(product(explained).reshape(5, 4), net.value_and_grad(x[None], y, loss=loss)[1]["2.weight"])
    assert explained.factors[0].formula == "your loss's second answer"


@pytest.mark.parametrize("kind", [kind for kind in BUILT_IN.values() if kind is not Linear])
def test_each_jacobian_against_differences_of_its_layer(kind, rng):
    """Central differences of the layer alone, h = 6e-6: 1e-9 is a hundred times their error."""
    layer, x, h = kind(), rng.standard_normal((1, 5)), 6e-6
    net = cr.Sequential(cr.Linear(5, 5, init="zeros"), layer, dtype="float64")
    net.load_state_dict({"0.weight": np.eye(5)}, strict=False)
    found = cr.explain(net, x, np.zeros(5), "mse", wrt="x").factors[1].value
    numeric = np.stack(
        [(layer.forward(x + h * e) - layer.forward(x - h * e))[0] / (2 * h) for e in np.eye(5)]
    )
    np.testing.assert_allclose(found, numeric.T, atol=1e-9)


FORMULAS = {
    "identity": ("I", lambda x, y: np.eye(4)),
    "sigmoid": ("diag(φ² (1 − φ²))", lambda x, y: np.diag(y * (1 - y))),
    "tanh": ("diag((1 − φ²)(1 + φ²))", lambda x, y: np.diag((1 - y) * (1 + y))),
    "relu": ("diag(φ¹ > 0)", lambda x, y: np.diag(x > 0)),
    "leaky_relu": ("diag(1 where φ¹ > 0, else 0.01)", lambda x, y: np.diag(np.where(x > 0, 1, 0.01))),
    "elu": ("diag(1 where φ¹ > 0, else φ² + 1)", lambda x, y: np.diag(np.where(x > 0, 1, y + 1))),
    "gelu": (
        "diag(Φ(φ¹) + φ¹ Φ′(φ¹))",
        lambda x, y: np.diag(reference.normal_cdf(x) + x * reference.normal_density(x)),
    ),
    "silu": (
        "diag(σ(φ¹) (1 + φ¹ (1 − σ(φ¹))))",
        lambda x, y: np.diag(reference.sigmoid(x) * (1 + x * (1 - reference.sigmoid(x)))),
    ),
    "softplus": ("diag(σ(φ¹))", lambda x, y: np.diag(reference.sigmoid(x))),
    "softmax": ("diag(φ²) − φ² φ²ᵀ", lambda x, y: np.diag(y) - np.outer(y, y)),
    "log_softmax": ("I − 1 softmax(φ¹)ᵀ", lambda x, y: np.eye(4) - np.outer(np.ones(4), np.exp(y))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_printed_formula_is_the_value(name, rng):
    """Each formula as it is printed, and the same written in NumPy: φ¹ in, φ² out."""
    formula, by_hand = FORMULAS[name]
    net = cr.mlp([3, 4], output_activation=name, dtype="float64")
    x = rng.standard_normal(3)
    factor = cr.explain(net, x, np.zeros(4), "mse", wrt="0.bias").factors[1]
    phi = net.trace(x[None]).phi
    assert factor.formula == formula
    np.testing.assert_allclose(factor.value, by_hand(phi[1][0], phi[2][0]), atol=1e-12)


def test_every_op_and_loss_has_a_formula():
    assert set(explanation._JACOBIANS) == {layer.op for layer in BUILT_IN.values() if layer is not Linear}
    assert set(explanation._GRADIENTS) == set(LOSSES) - {"bce"}
    assert set(FORMULAS) == set(explanation._JACOBIANS) - {Dropout.op}


# ---- counts, symbols -----------------------------------------------------------------------------


@pytest.fixture
def small():
    return cr.mlp([2, 3, 1], activation="tanh", seed=0, dtype="float64")


def test_counts_by_hand(small):
    """Row 1×1 · W³ 3, · diag 3, · (I ⊗ xᵀ) 6. A column: diag 3, W³ 3, the last dot product 1; 6 columns."""
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse")
    assert [factor.multiplies for factor in explained.factors] == [0, 3, 3, 6]
    assert (explained.reverse, explained.forward_of_one, explained.forward) == (12, 7, 42)
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse", wrt="x")
    assert [factor.multiplies for factor in explained.factors] == [0, 3, 3, 6]
    assert (explained.reverse, explained.forward) == (12, 2 * 7)
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse", wrt="0.bias")
    assert (explained.reverse, explained.forward) == (6, 3 * 7)


def test_two_factors_have_one_bracketing(small):
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse", wrt="2.weight")
    assert explained.reverse == explained.forward == 3
    assert explained._from_left() == explained._from_right() == "∂L/∂f · J_{W³}[φ³]"


def test_symbols_count_layer_objects(small):
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse")
    assert [factor.symbol for factor in explained.factors] == [
        "∂L/∂f", "J_{φ²}[φ³]", "J_{φ¹}[φ²]", "J_{W¹}[φ¹]",
    ]  # fmt: skip
    assert [factor.formula for factor in explained.factors] == [
        "2 (f − y)", "W³", "diag((1 − φ²)(1 + φ²))", "I ⊗ xᵀ",
    ]  # fmt: skip
    assert explained._from_left() == "((∂L/∂f · J_{φ²}[φ³]) · J_{φ¹}[φ²]) · J_{W¹}[φ¹]"
    assert explained._from_right() == "∂L/∂f · (J_{φ²}[φ³] · (J_{φ¹}[φ²] · J_{W¹}[φ¹]))"
    assert cr.explain(small, [1.0, 2.0], 0.5, "mse", wrt="x").factors[-1].symbol == "J_{x}[φ¹]"
    own = cr.explain(NETS["own"](), np.ones(3), np.ones(2), "mse", wrt="2.A")
    assert own.symbol == "∂L/∂A³" and own.factors[-1].symbol == "J_{A³}[φ³]"
    assert own.factors[1].layer == "3: Linear(5, 2)" and own.factors[2].formula == "your layer's vjp"


@pytest.mark.parametrize(
    ("loss", "outputs", "formula"),
    [
        ("mse", 1, "2 (f − y)"),
        ("mse", 4, "2 (f − y)/4"),
        (cr.Huber(0.5), 1, "clip(f − y, −0.5, 0.5)"),
        ("gaussian_nll", 4, "[(μ − y) e⁻ˢ, ½ (1 − (y − μ)² e⁻ˢ)]/2, f = [μ, s]"),
        ("bce", 1, "σ(f) − y"),
    ],
)
def test_the_gradient_of_the_loss_in_words(loss, outputs, formula):
    y = np.ones(outputs // 2 if loss == "gaussian_nll" else outputs)
    explained = cr.explain(cr.mlp([2, outputs]), [1.0, 2.0], y, loss)
    assert explained.factors[0].formula.strip("()") == formula.strip("()")
    labels = cr.explain(cr.mlp([2, 3]), [1.0, 2.0], 1, "cross_entropy").factors[0].formula
    shares = cr.explain(cr.mlp([2, 3]), [1.0, 2.0], [0.5, 0.5, 0], "cross_entropy").factors[0].formula
    assert (labels, shares) == ("softmax(f) − onehot(y)", "softmax(f) Σy − y")


# ---- text, notebooks, programs -------------------------------------------------------------------


def test_text(small):
    text = str(cr.explain(small, [1.0, 2.0], 0.5, "mse"))
    lines = text.splitlines()
    assert lines[0] == "∂L/∂W¹ = ∂L/∂f · J_{φ²}[φ³] · J_{φ¹}[φ²] · J_{W¹}[φ¹]"
    assert all(len(line) <= 80 for line in lines)
    assert re.search(r"^J_\{φ²\}\[φ³\] +2: Linear\(3, 1\) +W³ +1 × 3 +3$", text, re.MULTILINE)
    assert "from the left, reverse mode: 12 multiplications" in text
    assert "from the right, forward mode: 42 multiplications" in text
    assert "Numerator layout" in text and "L = " in text and "[1  2  0  0  0  0]" in text
    assert "3.5 times the multiplications" in " ".join(text.split())


def test_large_networks_are_explained_without_their_numbers(rng):
    net = cr.mlp([2048, 2048, 10], seed=0)
    explained = cr.explain(net, rng.standard_normal(2048), 3, "cross_entropy")
    assert "L = " not in str(explained) and "pmatrix" not in explained._repr_markdown_()
    assert explained.to_dict()["factors"][-1]["value"] is None
    assert explained.gradient.shape == (2048, 2048)
    with pytest.raises(ValueError, match=r"^\[explain\] J_\{W¹\}\[φ¹\] as a matrix must fit in memory"):
        _ = explained.factors[-1].value


def test_notebooks(small):
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse")
    latex = explained._repr_latex_()
    assert latex == (
        r"$\displaystyle \frac{\partial L}{\partial W^{1}} = \frac{\partial L}{\partial f} \, "
        r"\mathbb{J}_{\phi^{2}}[\phi^{3}] \, \mathbb{J}_{\phi^{1}}[\phi^{2}] \, \mathbb{J}_{W^{1}}[\phi^{1}]$"
    )
    markdown = explained._repr_markdown_()
    assert markdown.startswith(f"$${latex[1:-1]}$$")
    assert markdown.count("pmatrix") == 10 and markdown.count("$$") == 4
    own = cr.explain(NETS["own"](), np.ones(3), np.ones(2), "mse")
    assert "&lt;Sine>" in own._repr_markdown_()  # a tag would vanish
    for text in (markdown, own._repr_markdown_()):
        assert text.count("{") == text.count("}")


def test_programs(small):
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse")
    found = json.loads(json.dumps(explained.to_dict()))
    assert found["layout"] == "numerator" and found["wrt"] == "0.weight"
    assert found["reverse"]["multiplies"] == 12 and found["forward"]["multiplies"] == 42
    assert_close(
        reduce(np.matmul, [np.array(f["value"]) for f in found["factors"]]).reshape(3, 2), found["gradient"]
    )
    assert repr(explained.factors[1]) == "<Factor J_{φ²}[φ³] = W³, 1 × 3>"


def test_values_can_be_written_to_without_harm(small):
    explained = cr.explain(small, [1.0, 2.0], 0.5, "mse")
    for factor in explained.factors:
        factor.value[:] = 0
    assert_close(product(explained).reshape(3, 2), explained.gradient)


def test_the_network_stays_as_it_is(rng):
    net = NETS["own"]()
    before, params = net.state_dict(), net[2].params["A"]
    cr.explain(net, rng.standard_normal(3), np.ones(2), "mse", wrt="2.A")
    assert net[2].params["A"] is params
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name], name)


class Double(cr.Layer):
    def forward(self, x):
        return 2 * x

    def vjp(self, x, y, dy):
        return 2 * dy

    def jvp(self, x, y, dx):
        return 2 * dx


class InPlace(cr.Layer):
    """Works in the arrays that it is given."""

    def forward(self, x):
        x *= 2
        return x

    def vjp(self, x, y, dy):
        dy *= 2
        return dy

    def jvp(self, x, y, dx):
        dx *= 2
        return dx


def test_what_works_in_place_changes_nothing_of_the_callers(rng):
    def half_squares(f, y):
        y -= f
        return (y**2).sum() / 2, -y

    net, twin = (
        cr.Sequential(kind(), cr.Linear(3, 2), kind(), seed=1, dtype="float64") for kind in (InPlace, Double)
    )
    x, y = rng.standard_normal((1, 3)), rng.standard_normal((1, 2))
    kept = x.copy(), y.copy()
    shown = [
        cr.explain(of, x, y, loss, wrt="1.weight")
        for of, loss in ((net, half_squares), (twin, "least_squares"))
    ]
    assert_close(shown[0].gradient, shown[1].gradient)
    drawn = [cr.draw(of, x, y, half_squares)._repr_svg_().replace("InPlace", "Double") for of in (net, twin)]
    assert re.findall(r">([^<>]+)</text>", drawn[0]) == re.findall(r">([^<>]+)</text>", drawn[1])
    assert cr.gradcheck(net, x, y, half_squares).ok
    assert_same_bits(x, kept[0])
    assert_same_bits(y, kept[1])


@pytest.mark.parametrize("y", [0.5, [0.5], [[0.5]], np.float32(0.5)])
@pytest.mark.parametrize("x", [[1.0, 2.0], [[1.0, 2.0]]])
def test_one_example_in_every_shape(x, y, small):
    assert_close(cr.explain(small, x, y, "mse").gradient, cr.explain(small, [1.0, 2.0], 0.5, "mse").gradient)


def test_float32_networks_are_explained_in_float64(rng):
    net = cr.mlp([3, 4, 2], seed=1)
    x, y = rng.standard_normal(3), rng.standard_normal(2)
    gradient = cr.explain(net, x, y, "mse").gradient
    assert gradient.dtype == np.float64
    got = net.value_and_grad(x[None], y[None], loss="mse")[1]["0.weight"]
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([[1.0, 2.0]] * 2, 0.5, "mse"),
            ValueError,
            r"\[explain\] x must be one example: expected 1 row, got 2",
        ),
        (([1.0], 0.5, "mse"), ValueError, r"\[explain\] x must have one column per input"),
        (([1.0, np.nan], 0.5, "mse"), ValueError, r"\[explain\] x must be finite"),
        (([1.0, 2.0], [1.0, 2.0], "mse"), ValueError, r"\[explain\] y must have one column per output"),
        (([1.0, 2.0], None, "mse"), TypeError, r"\[explain\] y"),
        (([1.0, 2.0], 0.5, "no"), ValueError, r"\[explain\] loss"),
        (
            ([1.0, 2.0], 0.5, "mse", "1.weight"),
            ValueError,
            r"\[explain\] wrt must be a known name: expected one of '0.weight', .*'x', got '1.weight'",
        ),
        (([1.0, 2.0], 0.5, "mse", 0), TypeError, r"\[explain\] wrt must be a string"),
    ],
)
def test_what_is_refused(arguments, error, message, small):
    with pytest.raises(error, match=message):
        cr.explain(small, *arguments)


def test_bfloat16_is_refused():
    message = r"^\[explain\] derivatives are exact: expected dtype float32 or float64, got bfloat16$"
    with pytest.raises(ValueError, match=message):
        cr.explain(cr.mlp([2, 1], dtype="bfloat16"), [1.0, 2.0], 0.5, "mse")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("wrt", ["0.weight", "2.A", "x"])
def test_copies_and_pickles(wrt, copied):
    explained = cr.explain(NETS["own"](), [1.0, 2.0, 3.0], [0.5, 1.0], "mse", wrt=wrt)
    twin = copied(explained)
    assert str(twin) == str(explained)
    for factor, other in zip(twin.factors, explained.factors, strict=True):
        assert_same_bits(factor.value, other.value)
