# SPDX-License-Identifier: MIT
"""The chain link by link, in float64 and plain NumPy: what gradcheck, explain and draw look at.

The engine computes derivatives without forming a Jacobian and without keeping more than it must. To look at
a derivative we want the opposite: each link alone, with its parameters, its three maps and its Jacobian as a
matrix. Built-in layers bring their maps along (the engine's own, one op at a time), Linear is written here,
and layers of your own are copied, so that looking at them changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batch
from .checks import real_array
from .layers import Guard, Layer, Linear, _BuiltIn
from .losses import CustomLoss, Loss, _checked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Sequential

    Array = NDArray[Any]


class Link:
    """One layer with its parameters: y = g(x), c·J_x[y] and J_x[y]·t for rows x (B, I), y (B, O)."""

    def __init__(self, layer: Layer, index: int, inputs: int, outputs: int, params: dict[str, Array]) -> None:
        self.layer, self.index, self.inputs, self.outputs = layer, index, inputs, outputs
        self.own = not isinstance(layer, _BuiltIn)
        self.params = params
        self._maps: Any = layer
        if self.own:  # a copy of its own: the original belongs to the network, and keeps its arrays
            self.layer = deepcopy(layer)
            self._maps = Guard(self.layer, inputs, outputs, "float64")
            self._maps.params.update(params)
            self.params = self._maps.params

    @property
    def kind(self) -> str:
        """The layer's class name."""
        return type(self.layer).__name__

    def forward(self, x: Array) -> Array:
        if isinstance(self.layer, Linear):
            return x @ self.params["weight"].T + self.params.get("bias", 0.0)
        return np.asarray(self._maps.forward(*self._given(x)))

    def vjp(self, x: Array, y: Array, c: Array) -> tuple[Array, dict[str, Array]]:
        """c·J_x[y] row by row, and c·J_W[y] summed over the rows for each parameter W."""
        if isinstance(self.layer, Linear):
            grads = {"weight": c.T @ x, "bias": c.sum(axis=0)}
            return c @ self.params["weight"], {name: grads[name] for name in self.params}
        answer = self._maps.vjp(*self._given(x, y, c))
        return answer if isinstance(answer, tuple) else (answer, {})

    def jvp(self, x: Array, y: Array, t: Array) -> Array:
        """J_x[y]·t, row by row."""
        if isinstance(self.layer, Linear):
            return t @ self.params["weight"].T
        return np.asarray(self._maps.jvp(*self._given(x, y, t)))

    def vjp_jvp(self, *given: Any) -> Any:
        """The tangent of what vjp gives, as `Layer` has it."""
        return self._maps.vjp_jvp(*self._given(*given))

    def _given(self, *given: Any) -> Iterable[Any]:
        """A layer of your own may work in place: it gets copies, as from the engine."""
        return (deepcopy(value) for value in given) if self.own else given

    def jacobian(self, x: Array) -> Array:
        """J_x[y] (O, I) at one row x (1, I): its rows are the vjp's of the unit cotangents."""
        if isinstance(self.layer, Linear):
            return self.params["weight"].copy()
        rows = np.repeat(x, self.outputs, axis=0)
        return self.vjp(rows, self.forward(rows), np.eye(self.outputs))[0]

    def parameter_jacobian(self, name: str, x: Array) -> Array:
        """J_W[y] (O, size of W) at one row x (1, I), W written row after row."""
        if isinstance(self.layer, Linear):
            return np.kron(np.eye(self.outputs), x) if name == "weight" else np.eye(self.outputs)
        y = self.forward(x)
        return np.stack([self.vjp(x, y, c[None, :])[1][name].ravel() for c in np.eye(self.outputs)])


class Chain:
    """All links of a network, with copies of its parameters in float64."""

    def __init__(self, net: Sequential) -> None:
        state = net.state_dict()
        self.links = []
        links = zip(net.layers, pairwise(net._widths), strict=True)
        for index, (layer, (inputs, outputs)) in enumerate(links):
            start = f"{index}."
            params = {
                name.removeprefix(start): value.astype(np.float64)
                for name, value in state.items()
                if name.startswith(start)
            }
            self.links.append(Link(layer, index, inputs, outputs, params))

    def forward(self, x: Array) -> list[Array]:
        """φ⁰ = x, φ¹, …, φᴸ = f."""
        phi = [x]
        for link in self.links:
            phi.append(link.forward(phi[-1]))
        return phi

    def backward(self, phi: list[Array], c: Array) -> tuple[list[Array], dict[str, Array]]:
        """From c = ∂L/∂f: all ∂L/∂φˡ, l = 0 … L, and the gradients keyed like state_dict."""
        dphi: list[Array] = [c]
        grads: dict[str, Array] = {}
        for link in reversed(self.links):
            dx, params = link.vjp(phi[link.index], phi[link.index + 1], dphi[0])
            dphi.insert(0, dx)
            grads = {f"{link.index}.{name}": value for name, value in params.items()} | grads
        return dphi, grads


# ------------------------------------------------------------ what the user passes


def one_row(op: str, net: Sequential, x: Any) -> Array:
    """One example (I,) or (1, I) as a row (1, I) of float64."""
    array = real_array(op, "x", x)
    if array.ndim == 2 and len(array) != 1:
        raise ValueError(f"[{op}] x must be one example: expected 1 row, got {len(array)}")
    rows = array[None, :] if array.ndim == 1 else array
    return batch.as_matrix(op, rows, net.in_features, "float64", name="x")


def one_target(op: str, net: Sequential, rule: Loss, y: Any) -> Any:
    """The target of one example as the loss takes it; a number, (k,) and (1, k) are all one row."""
    array = real_array(op, "y", y)
    rows = array if array.ndim and len(array) == 1 else array[None]
    targets = rule.targets(op, rows, 1, net.out_features, "float64")
    return as_passed(targets.values, targets.flat)


def as_passed(y: Array, flat: bool) -> Array:
    """Targets in the shape in which the user gave them: 1-D or 2-D."""
    return y[:, 0] if flat and y.ndim == 2 else y


def value_and_gradient(rule: Loss, f: Array, y: Array) -> tuple[float, Array]:
    """L and ∂L/∂f (B, n) of a batch, with the loss's reduction applied to a loss of your own as well."""
    if not isinstance(rule, CustomLoss):
        return rule(f, y)
    answer = rule(f.copy(), y.copy())  # it may work in place
    values, df = _checked(answer, f, False)
    if isinstance(values, float):
        return values, df
    scale = 1 / len(f) if rule.reduction == "mean" else 1.0
    return float(values.sum()) * scale, df * scale
