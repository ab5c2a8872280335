# SPDX-License-Identifier: MIT
"""From what users have to what the engine takes: a batch X, y, its slopes and weights, checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from . import devices, layers, losses
from .checks import EXACT, all_finite, converted, one_of, real, real_array, refuse_rows, short, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Network(Protocol):
    """What training needs to know of a network."""

    layers: tuple[layers.Layer, ...]
    in_features: int
    out_features: int
    dtype: str
    array_dtype: str
    device: str
    _core: Any
    _engine: devices.Engine


def as_matrix(op: str, X: Any, features: int, dtype: str, *, name: str = "X", finite: bool = True) -> Array:
    """X as a C-contiguous (rows, features) matrix of the dtype; a view where it is one already."""
    array = real_array(op, name, X)
    if array.ndim != 2:
        raise ValueError(
            f"[{op}] {name} must be 2-D: expected (rows, {features}), got shape {array.shape}; "
            f"{_reshape_hint(array, features)}"
        )
    if array.shape[1] != features:
        raise ValueError(
            f"[{op}] {name} must have one column per input of the network: "
            f"expected {features} columns, got {array.shape[1]}"
        )
    matrix = converted(op, name, array, dtype)
    if finite and not all_finite(matrix):
        row, column = (int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        label = f" ({short(X.columns[column])})" if hasattr(X, "columns") else ""
        raise ValueError(
            f"[{op}] {name} must be finite: expected numbers, got {matrix[row, column]} "
            f"in row {row}, column {column}{label}; fill or drop missing values first"
        )
    return matrix


def _reshape_hint(array: Array, features: int) -> str:
    if array.ndim > 2:
        return "use X.reshape(len(X), -1) for one row per example"
    if array.ndim == 0:
        return "a table of numbers is wanted"
    return "use X.reshape(-1, 1) for one feature" if features == 1 else "use X.reshape(1, -1) for one row"


class Data(NamedTuple):
    """One data set as the engine takes it."""

    X: Array
    y: Array
    weight: Array | None
    flat: bool  # whether the user's y was one-dimensional
    dy: Array | None = None  # ∂y/∂x (rows, O, I)

    def rows(self, first: int, last: int) -> Data:
        weight, dy = (None if a is None else a[first:last] for a in (self.weight, self.dy))
        return Data(self.X[first:last], self.y[first:last], weight, self.flat, dy)

    def on(self, device: str) -> Data:
        """Where it is used more than once: a copy on a GPU, or these arrays themselves."""
        return self if device == "cpu" else Data(*(devices.upload(part, device) for part in self))


def take(
    op: str,
    net: Network,
    loss: losses.Loss,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    where: str = "",
    as_it_lies: bool = False,
) -> Data:
    """The user's X, y and weights, checked; `where` is put before their names in messages.

    With as_it_lies, for the engine alone, X stays on the network's GPU if it is there.
    """
    dtype = net.array_dtype
    if net.device != "cpu":
        if isinstance(loss, losses.CustomLoss):
            raise ValueError(
                f"[{op}] a loss of your own runs on the CPU: expected a built-in one on device "
                f"{net.device!r}, got {short(loss)}; use net.to('cpu')"
            )
        X = devices.as_it_lies(X, net.in_features, dtype, net.device) if as_it_lies else devices.on_host(X)
        y, sample_weight = devices.on_host(y), devices.on_host(sample_weight)
    there = net.device != "cpu" and devices.on_gpu(X)
    matrix = X if there else as_matrix(op, X, net.in_features, dtype, name=f"{where}X")
    if not len(matrix):
        raise ValueError(f"[{op}] {where}X must not be empty: expected at least one row, got 0")
    targets = loss.targets(op, y, len(matrix), net.out_features, dtype, f"{where}y")
    weight = losses.weights(op, sample_weight, len(matrix), dtype, f"{where}sample_weight")
    return Data(matrix, targets.values, weight, targets.flat)


def with_slopes(op: str, net: Network, data: Data, dy: Any, dy_weight: Any) -> tuple[Data, float]:
    """The data with the slopes ∂y/∂x, and the weight of their part of the loss; both checked."""
    weight = real(op, "dy_weight", dy_weight, least=0)
    if dy is None:
        if weight != 1:
            raise ValueError(
                f"[{op}] dy_weight must come with dy: expected slopes, got dy_weight={weight:g} alone"
            )
        return data, 0.0
    if net.dtype != net.array_dtype:
        raise ValueError(
            f"[{op}] dy needs exact derivatives: expected dtype float32 or float64, got {net.dtype}"
        )
    dy = dy if net.device == "cpu" else devices.on_host(dy)
    slopes, shape = real_array(op, "dy", dy), (len(data.X), net.out_features, net.in_features)
    flat = (shape[0], shape[2])
    if slopes.shape != shape and not (net.out_features == 1 and slopes.shape == flat):
        raise ValueError(
            f"[{op}] dy must have a slope for each row, output and input: expected shape {shape}"
            f"{f' or {flat}' if net.out_features == 1 else ''}, got {slopes.shape}"
        )
    slopes = converted(op, "dy", slopes, net.array_dtype).reshape(shape)
    if not all_finite(slopes):
        refuse_rows(op, "dy", "finite numbers", slopes, ~np.isfinite(slopes))
    return data._replace(dy=slopes), weight


def split(data: Data, fraction: float) -> tuple[Data, Data]:
    """All rows but the last fraction, and these; the order is the user's, not yet shuffled."""
    rows = len(data.X)
    last = math.ceil(rows * fraction - 1e-9)  # a little less, so that 0.1 of 10 rows is 1 row and not 2
    if last >= rows:
        raise ValueError(
            "[fit] validation_split must leave rows to train on: "
            f"expected fewer than {rows} rows for validation, got {last}"
        )
    return data.rows(0, rows - last), data.rows(rows - last, rows)


def class_weights(net: Network, loss: losses.Loss, data: Data, class_weight: Any) -> Array | None:
    """Sample weights times the weight of each row's class; a class without a weight has 1."""
    labels, place, counts = np.unique(_labels(data.y), return_inverse=True, return_counts=True)
    if isinstance(class_weight, dict):
        known = _known_labels(net, loss, data.y)
        named = {_label(key, known): _weight(key, value) for key, value in class_weight.items()}
        of_label = np.array([named.get(int(label), 1.0) for label in labels])
    elif isinstance(class_weight, str):
        one_of("fit", "class_weight", class_weight, ("balanced",))
        of_label = len(data.y) / (len(labels) * counts)
    else:
        raise TypeError(
            "[fit] class_weight must be a dict or 'balanced': "
            f"expected {{label: weight}}, got {short(class_weight)}"
        )
    weight = of_label[place.reshape(-1)]
    if data.weight is not None:
        weight = weight * data.weight
    return losses.weights("fit", weight, len(weight), net.array_dtype, "class_weight times sample_weight")


def _labels(y: Array) -> Array:
    """The label (B,) of each row of targets: a whole number alone, or the place of the 1 among zeros."""
    if y.ndim == 1 or y.shape[1] == 1:
        column = y.reshape(-1)
        bad = (column != np.floor(column)) | (np.abs(column) > EXACT)
        labels = column
    else:
        bad = ((y != 0) & (y != 1)).any(axis=1) | (y.sum(axis=1) != 1)
        labels = y.argmax(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            "[fit] class_weight needs one label per row: expected whole numbers, or rows of zeros and a one, "
            f"got {short(y[row].tolist())} in row {row}"
        )
    return labels


def _known_labels(net: Network, loss: losses.Loss, y: Array) -> tuple[int, int]:
    """The least and the greatest label that targets of this loss can have."""
    if y.ndim == 2 and y.shape[1] > 1:
        return 0, y.shape[1] - 1
    if isinstance(loss, losses.CrossEntropy):
        return 0, net.out_features - 1
    return (0, 1) if isinstance(loss, losses.Logistic) else (-EXACT, EXACT)


def _label(key: Any, known: tuple[int, int]) -> int:
    return whole("fit", "a label in class_weight", int(key) if isinstance(key, bool) else key, *known)


def _weight(key: Any, value: Any) -> float:
    return real("fit", f"class_weight[{key!r}]", value, least=0)
