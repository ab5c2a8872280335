# SPDX-License-Identifier: MIT
"""explain: the chain-rule product behind one gradient, factor by factor, and what each bracketing costs.

    ∂L/∂Wˡ = ∂L/∂f · J_{φᴸ⁻¹}[φᴸ] ⋯ J_{φˡ}[φˡ⁺¹] · J_{Wˡ}[φˡ]

A product of matrices may be bracketed in any way. From the left every partial product is a row, because L is
one number: reverse mode. From the right every partial product has a column for each parameter: forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from . import losses
from .calculus import exact
from .checks import one_of
from .display import markdown_table, number, superscript, text_table
from .layers import Dropout, Identity, Linear, Softmax, _BuiltIn
from .links import Chain, Link, one_row, one_target, value_and_gradient
from .losses import CrossEntropy, GaussianNLL, Loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Sequential

    Array = NDArray[Any]

MOST_NUMBERS = 10_000_000  # of one factor as a matrix: 80 MB
_WIDTH = 80  # columns of the text
_MOST_ROWS, _MOST_COLUMNS = 8, 8  # of a matrix that is printed

_NOTE = (
    "Numerator layout: J_x[y] is M × N for y ∈ Rᴹ and x ∈ Rᴺ, gradients are rows, W is written row after "
    "row. φˡ is net.trace(x).phi[l], one for each layer object: the lecture's φ = σ(Wφ + b) is two links "
    "here, Linear and its activation."
)

# ------------------------------------------------------------ formulas

# J_x[y] of each op, as text and as LaTeX; x and y are the names of input and output, a is the parameter.
_JACOBIANS: dict[str, tuple[str, str]] = {
    "identity": ("I", r"I"),
    "dropout": ("I (dropout is off)", r"I"),
    "sigmoid": ("diag(%(y)s (1 − %(y)s))", r"\operatorname{diag}(%(y)s (1 - %(y)s))"),
    "tanh": ("diag((1 − %(y)s)(1 + %(y)s))", r"\operatorname{diag}((1 - %(y)s)(1 + %(y)s))"),
    "relu": ("diag(%(x)s > 0)", r"\operatorname{diag}(%(x)s > 0)"),
    "leaky_relu": (
        "diag(1 where %(x)s > 0, else %(a)s)",
        r"\operatorname{diag}(1 \text{ where } %(x)s > 0, \text{ else } %(a)s)",
    ),
    "elu": (
        "diag(1 where %(x)s > 0, else %(y)s + %(a)s)",
        r"\operatorname{diag}(1 \text{ where } %(x)s > 0, \text{ else } %(y)s + %(a)s)",
    ),
    "gelu": (
        "diag(Φ(%(x)s) + %(x)s Φ′(%(x)s))",
        r"\operatorname{diag}(\Phi(%(x)s) + %(x)s\,\Phi'(%(x)s))",
    ),
    "silu": (
        "diag(σ(%(x)s) (1 + %(x)s (1 − σ(%(x)s))))",
        r"\operatorname{diag}(\sigma(%(x)s)(1 + %(x)s(1 - \sigma(%(x)s))))",
    ),
    "softplus": ("diag(σ(%(x)s))", r"\operatorname{diag}(\sigma(%(x)s))"),
    "softmax": ("diag(%(y)s) − %(y)s %(y)sᵀ", r"\operatorname{diag}(%(y)s) - %(y)s\,{%(y)s}^{\top}"),
    "log_softmax": ("I − 1 softmax(%(x)s)ᵀ", r"I - \mathbf{1}\,\operatorname{softmax}(%(x)s)^{\top}"),
}

# ∂L/∂f of each loss for one example; per is the division by the number of outputs, a the loss's parameter.
_GRADIENTS: dict[str, tuple[str, str]] = {
    "least_squares": ("f − y", r"f - y"),
    "mse": ("2 (f − y)%(per)s", r"2 (f - y)%(per)s"),
    "mae": ("sign(f − y)%(per)s", r"\operatorname{sign}(f - y)%(per)s"),
    "huber": (
        "clip(f − y, −%(a)s, %(a)s)%(per)s",
        r"\operatorname{clip}(f - y, -%(a)s, %(a)s)%(per)s",
    ),
    "pinball": (
        "((f > y) − %(a)s)%(per)s, 0 where f = y",
        r"([f > y] - %(a)s)%(per)s,\ 0 \text{ where } f = y",
    ),
    "poisson": ("(exp(f) − y)%(per)s", r"(e^{f} - y)%(per)s"),
    "gaussian_nll": (
        "[(μ − y) e⁻ˢ, ½ (1 − (y − μ)² e⁻ˢ)]%(per)s, f = [μ, s]",
        r"[(\mu - y) e^{-s}, \tfrac12 (1 - (y - \mu)^2 e^{-s})]%(per)s,\ f = [\mu, s]",
    ),
    "logistic": ("(σ(f) − y)%(per)s", r"(\sigma(f) - y)%(per)s"),
    "cross_entropy": ("softmax(f) − onehot(y)", r"\operatorname{softmax}(f) - \operatorname{onehot}(y)"),
}
_OF_PROBABILITIES = ("softmax(f) Σy − y", r"\operatorname{softmax}(f) \textstyle\sum y - y")
_OWN_LOSS = ("your loss's second answer", r"\text{your loss's second answer}")
_OWN_LAYER = ("your layer's vjp", r"\text{your layer's vjp}")


def _loss_formula(rule: Loss, outputs: int, y: Array) -> tuple[str, str]:
    if rule.name not in _GRADIENTS:
        return _OWN_LOSS
    if isinstance(rule, CrossEntropy) and y.ndim == 2:
        return _OF_PROBABILITIES
    n = outputs // 2 if isinstance(rule, GaussianNLL) else outputs
    names = {"per": f"/{n}" if n > 1 else "", "a": f"{rule._param:g}"}
    text, latex = _GRADIENTS[rule.name]
    return text % names, latex % names


def _jacobian_formula(link: Link) -> tuple[str, str]:
    layer, level = link.layer, link.index + 1
    if isinstance(layer, Linear):
        return f"W{superscript(level)}", f"W^{{{level}}}"
    if not isinstance(layer, _BuiltIn):
        return _OWN_LAYER
    text, latex = _JACOBIANS[layer.op]
    a = f"{layer._param:g}"
    return (
        text % {"x": _phi(level - 1), "y": _phi(level), "a": a},
        latex % {"x": _phi_latex(level - 1), "y": _phi_latex(level), "a": a},
    )


def _parameter_formula(link: Link, name: str) -> tuple[str, str]:
    if not isinstance(link.layer, Linear):
        return _OWN_LAYER
    if name == "bias":
        return "I", "I"
    return f"I ⊗ {_phi(link.index)}ᵀ", rf"I \otimes {{{_phi_latex(link.index)}}}^{{\top}}"


def _phi(level: int) -> str:
    return f"φ{superscript(level)}" if level else "x"


def _phi_latex(level: int) -> str:
    return rf"\phi^{{{level}}}" if level else "x"


def _parameter(link: Link, name: str) -> tuple[str, str]:
    """W³ and its LaTeX for the weight of the layer number 2: the number is that of the φ it makes."""
    letter = {"weight": "W", "bias": "b"}.get(name, name) if isinstance(link.layer, Linear) else name
    shown = letter if len(letter) == 1 else rf"\mathrm{{{letter}}}".replace("_", r"\_")
    return f"{letter}{superscript(link.index + 1)}", f"{shown}^{{{link.index + 1}}}"


def _multiplies(link: Link) -> int:
    """Multiplications of one row with J_x[y], its structure used; that of your own layer is not known."""
    if isinstance(link.layer, (Identity, Dropout)):
        return 0
    if link.own or isinstance(link.layer, Linear):
        return link.inputs * link.outputs
    return link.outputs * (2 if isinstance(link.layer, Softmax) else 1)


# ------------------------------------------------------------ the result


class Factor:
    """One factor of the product: `.symbol`, `.formula`, `.layer`, `.shape`, `.multiplies`, `.value`."""

    def __init__(
        self, symbol: tuple[str, str], formula: tuple[str, str], layer: str, shape: tuple[int, int],
        multiplies: int, value: Callable[[], Array],
    ) -> None:  # fmt: skip
        self.symbol, self.latex = symbol
        self.formula, self.formula_latex = formula
        self.layer, self.shape = layer, shape
        self.multiplies = multiplies  # of one row with this factor; of the first factor, of no row
        self._value = value

    @property
    def value(self) -> Array:
        """The factor as a matrix, float64; ValueError for one too large to write down."""
        if self.shape[0] * self.shape[1] > MOST_NUMBERS:
            raise ValueError(
                f"[explain] {self.symbol} as a matrix must fit in memory: expected at most {MOST_NUMBERS:,} "
                f"numbers, got {self.shape[0]:,} × {self.shape[1]:,}; .gradient has the product"
            )
        return self._value()

    @property
    def is_small(self) -> bool:
        """Whether the matrix is printed."""
        return self.shape[0] <= _MOST_ROWS and self.shape[1] <= _MOST_COLUMNS

    def __repr__(self) -> str:
        return f"<Factor {self.symbol} = {self.formula}, {self.shape[0]} × {self.shape[1]}>"


class Explanation:
    """A gradient as a product: `.factors`, `.gradient`, `.loss`, `.reverse`, `.forward`; see `explain`."""

    def __init__(
        self, wrt: str, symbol: tuple[str, str], factors: Sequence[Factor], loss: float, gradient: Array
    ) -> None:
        self.wrt, self.factors, self.loss, self.gradient = wrt, tuple(factors), loss, gradient
        self.symbol, self.latex = f"∂L/∂{symbol[0]}", rf"\frac{{\partial L}}{{\partial {symbol[1]}}}"
        self._of = symbol

    @property
    def reverse(self) -> int:
        """Multiplications when the product is bracketed from the left."""
        return sum(factor.multiplies for factor in self.factors[1:])

    @property
    def forward(self) -> int:
        """Multiplications when it is bracketed from the right: a column for each number of the parameter."""
        if len(self.factors) == 2:
            return self.reverse  # one product: there is nothing to bracket
        return self.factors[-1].shape[1] * self.forward_of_one

    @property
    def forward_of_one(self) -> int:
        """Multiplications from the right for a single number of the parameter, or a single input."""
        inner = sum(factor.multiplies for factor in self.factors[1:-1])
        return inner + self.factors[0].shape[1]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; a factor's value is None where it is not printed either."""
        return {
            "wrt": self.wrt,
            "symbol": self.symbol,
            "layout": "numerator",
            "loss": self.loss,
            "gradient": self.gradient.tolist(),
            "factors": [
                {
                    "symbol": factor.symbol,
                    "latex": factor.latex,
                    "layer": factor.layer,
                    "formula": factor.formula,
                    "shape": list(factor.shape),
                    "multiplies": factor.multiplies,
                    "value": factor.value.tolist() if factor.is_small else None,
                }
                for factor in self.factors
            ],
            "reverse": {"product": self._from_left(), "multiplies": self.reverse},
            "forward": {"product": self._from_right(), "multiplies": self.forward},
        }

    # -------------------------------------------------------- text

    def _from_left(self) -> str:
        first, *others = (factor.symbol for factor in self.factors)
        return "(" * (len(others) - 1) + ") · ".join([f"{first} · {others[0]}", *others[1:]])

    def _from_right(self) -> str:
        symbols = [factor.symbol for factor in self.factors]
        return " · (".join([*symbols[:-2], f"{symbols[-2]} · {symbols[-1]}"]) + ")" * (len(symbols) - 2)

    def _table(self, math: bool) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("factor", "layer", "formula", "shape", "multiplies")]
        for factor in self.factors:
            rows.append(
                (
                    f"${factor.latex}$" if math else factor.symbol,
                    factor.layer,
                    f"${factor.formula_latex}$" if math else factor.formula,
                    f"{factor.shape[0]} × {factor.shape[1]}",
                    "" if factor is self.factors[0] else f"{factor.multiplies:,}",
                )
            )
        name = f"${self.latex}$" if math else self.symbol
        rows.append((name, "", "the product", f"1 × {self.gradient.size}", f"{self.reverse:,}"))
        return rows

    def _reason(self) -> str:
        if len(self.factors) == 2:
            return "Two factors: there is nothing to bracket."
        columns = self.factors[-1].shape[1]
        what = f"each of the {columns:,} numbers of {self._of[0]}" if columns > 1 else f"{self._of[0]}"
        if self.forward > self.reverse:
            compared = f"{self.forward / max(self.reverse, 1):.3g} times the multiplications"
        else:
            compared = "no more multiplications than the row"
        return (
            "From the left a single row passes, because L is one number; from the right a column for "
            f"{what}: {compared}. One of these numbers alone costs {self.forward_of_one:,} in forward mode. "
            "A factor's structure is used: a diagonal costs its diagonal."
        )

    def __str__(self) -> str:
        product = " · ".join(factor.symbol for factor in self.factors)
        lines = [*_wrapped(f"{self.symbol} = {product}", hanging="  "), "", *_wrapped(_NOTE), ""]
        lines += [text_table(self._table(False), "lllrr"), ""]
        if all(factor.is_small for factor in self.factors):
            lines += [*self._values(), ""]
        for direction, bracketed, count in (
            ("from the left, reverse mode", self._from_left(), self.reverse),
            ("from the right, forward mode", self._from_right(), self.forward),
        ):
            lines += [f"{direction}: {count:,} multiplications", *_wrapped(bracketed, "  ", "  ")]
        return "\n".join([*lines, "", *_wrapped(self._reason())])

    __repr__ = __str__

    def _values(self) -> list[str]:
        names = [factor.symbol for factor in self.factors] + [self.symbol]
        values = [factor.value for factor in self.factors] + [self.gradient.reshape(1, -1)]
        wide = max(map(len, names))
        lines = [f"L = {number(self.loss, 6)}"]
        for name, value in zip(names, values, strict=True):
            for row, text in enumerate(_matrix(value)):
                lines.append(f"{'' if row else name:<{wide}} {' ' if row else '='} {text}")
        return lines

    # -------------------------------------------------------- notebooks

    def _repr_latex_(self) -> str:
        product = r" \, ".join(factor.latex for factor in self.factors)
        return rf"$\displaystyle {self.latex} = {product}$"

    def _repr_markdown_(self) -> str:
        parts = [f"$${self._repr_latex_()[1:-1]}$$", _NOTE, markdown_table(self._table(True), "lllrr")]
        if all(factor.is_small for factor in self.factors):
            values = " ".join(_latex_matrix(factor.value) for factor in self.factors)
            result = _latex_matrix(self.gradient.reshape(1, -1))
            parts.append(rf"$$L = {self.loss:.6g}, \qquad {self.latex} = {values} = {result}$$")
        counts = [
            ("bracketed", "mode", "multiplications"),
            (f"`{self._from_left()}`", "reverse, from the left", f"{self.reverse:,}"),
            (f"`{self._from_right()}`", "forward, from the right", f"{self.forward:,}"),
        ]
        return "\n\n".join([*parts, markdown_table(counts, "llr"), self._reason()])


def _wrapped(text: str, indent: str = "", hanging: str = "") -> list[str]:
    return wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _matrix(value: Array) -> list[str]:
    """A matrix, a line for each row, the columns aligned."""
    cells = [[number(float(v)) for v in row] for row in value]
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        f"[{'  '.join(f'{cell:>{size}}' for cell, size in zip(row, sizes, strict=True))}]" for row in cells
    ]


def _latex_matrix(value: Array) -> str:
    rows = r" \\ ".join(" & ".join(f"{v + 0.0:.4g}" for v in row) for row in value)
    return rf"\begin{{pmatrix}} {rows} \end{{pmatrix}}"


# ------------------------------------------------------------ explain


def explain(net: Sequential, x: Any, y: Any, loss: Any, wrt: str = "0.weight") -> Explanation:
    """The chain-rule product behind one gradient, for one example: each factor, and both bracketings.

    ∂L/∂Wˡ = ∂L/∂f · J_{φᴸ⁻¹}[φᴸ] ⋯ J_{φˡ}[φˡ⁺¹] · J_{Wˡ}[φˡ]

    Numerator layout: J_x[y] is M×N for y ∈ Rᴹ and x ∈ Rᴺ, and gradients are rows; W is written row after row.
    φˡ is net.trace(x).phi[l], so that every layer object has its own: the lecture's φ = σ(Wφ + b) is two
    links here. Everything is computed in float64, from a float32 network as well; dropout is off.

    Shapes: x (I,) or (1, I), y the target of this example; `.factors[i].value` are matrices whose product,
        (1, size), is `.gradient`, which has the parameter's shape (of "x": (I,)).

    Args:
        wrt: a parameter's name, as in state_dict, or "x" for the input.

    Returns: an Explanation: text in a terminal, Markdown in a notebook, `.to_dict()` for programs.

    Raises: TypeError or ValueError as value_and_grad, for more than one example, for an unknown `wrt`, and
        for a bfloat16 network.

    Example:
        >>> import chainrule as cr
        >>> net = cr.mlp([2, 3, 1], activation="tanh", seed=0)
        >>> print(*(factor.symbol for factor in cr.explain(net, [1.0, 2.0], 0.5, "mse").factors))
        ∂L/∂f J_{φ²}[φ³] J_{φ¹}[φ²] J_{W¹}[φ¹]
    """
    rule = losses.resolve("explain", loss)
    exact("explain", net)
    one_of("explain", "wrt", wrt, [*net.state_dict(), "x"])
    row = one_row("explain", net, x)
    target = one_target("explain", net, rule, y)
    chain = Chain(net)
    phi = chain.forward(row)
    value, df = value_and_gradient(rule, phi[-1], target)
    dphi, grads = chain.backward(phi, df)
    formula = _loss_formula(rule, net.out_features, target)
    first = Factor(
        ("∂L/∂f", r"\frac{\partial L}{\partial f}"), formula, rule.name.replace("external", "your loss"),
        (1, net.out_features), 0, df.copy,
    )  # fmt: skip
    if wrt == "x":
        factors = [_through(link, phi[link.index]) for link in reversed(chain.links)]
        return Explanation(wrt, ("x", "x"), [first, *factors], value, dphi[0][0])
    place, _, name = wrt.partition(".")
    last = chain.links[int(place)]
    factors = [_through(link, phi[link.index]) for link in reversed(chain.links[last.index + 1 :])]
    factors.append(_to_parameter(last, name, phi[last.index]))
    return Explanation(wrt, _parameter(last, name), [first, *factors], value, np.asarray(grads[wrt]))


def _through(link: Link, x: Array) -> Factor:
    """J_{φˡ⁻¹}[φˡ]."""
    level = link.index + 1
    symbol = (
        f"J_{{{_phi(level - 1)}}}[{_phi(level)}]",
        rf"\mathbb{{J}}_{{{_phi_latex(level - 1)}}}[{_phi_latex(level)}]",
    )
    shape = (link.outputs, link.inputs)
    return Factor(
        symbol, _jacobian_formula(link), _layer(link), shape, _multiplies(link), partial(link.jacobian, x)
    )


def _to_parameter(link: Link, name: str, x: Array) -> Factor:
    """J_{Wˡ}[φˡ]; Linear's has one number of x in each column, a row times it is an outer product."""
    text, latex = _parameter(link, name)
    level = link.index + 1
    size = link.params[name].size
    symbol = (f"J_{{{text}}}[{_phi(level)}]", rf"\mathbb{{J}}_{{{latex}}}[{_phi_latex(level)}]")
    dense = size * link.outputs
    count = {"weight": size, "bias": 0}[name] if isinstance(link.layer, Linear) else dense
    return Factor(
        symbol, _parameter_formula(link, name), _layer(link), (link.outputs, size), count,
        partial(link.parameter_jacobian, name, x),
    )  # fmt: skip


def _layer(link: Link) -> str:
    name = f"Linear({link.inputs}, {link.outputs})" if isinstance(link.layer, Linear) else repr(link.layer)
    return f"{link.index}: {name}"
