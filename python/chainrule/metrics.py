# SPDX-License-Identifier: MIT
"""The figures by which people judge a trained network, in a few lines of NumPy each; labels are 0 … k−1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(labels: ArrayLike, predicted: ArrayLike) -> float:
    """Share of rows whose predicted label is the true one; both (B,). ValueError for other shapes or no rows.

    >>> accuracy([0, 1, 2, 2], [0, 1, 2, 1])
    0.75
    """
    y, p = _pair("accuracy", labels, predicted)
    return float(np.mean(y == p))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean of −ln p(true label), in nats; labels (B,), probabilities (B, k). ValueError for other shapes.

    A probability of zero counts as the smallest normal number of its dtype: one sure mistake stays finite.

    >>> round(log_loss([0, 1], [[0.5, 0.5], [0.25, 0.75]]), 4)
    0.4904
    """
    y, p = np.asarray(labels), np.asarray(probabilities)
    if p.ndim != 2 or y.shape != p.shape[:1] or not y.size:
        raise ValueError(
            f"[log_loss] shapes: expected (B,) and (B, k) with B ≥ 1, got {y.shape} and {p.shape}"
        )
    if y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"[log_loss] labels: expected 0 to {p.shape[1] - 1}, got {y.min()} to {y.max()}")
    chosen = p[np.arange(len(y)), y]
    return float(-np.mean(np.log(np.maximum(chosen, np.finfo(p.dtype).tiny))))


def confusion(labels: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Counts (k, k): row = true label, column = predicted label. ValueError for other shapes or labels ≥ k.

    >>> confusion([0, 1, 1], [0, 1, 0], classes=2)
    array([[1, 0],
           [1, 1]])
    """
    y, p = _pair("confusion", labels, predicted)
    if min(y.min(), p.min()) < 0 or max(y.max(), p.max()) >= classes:
        raise ValueError(f"[confusion] labels: expected 0 to {classes - 1}, got {min(y.min(), p.min())} "
                         f"to {max(y.max(), p.max())}")  # fmt: skip
    return np.bincount(y * classes + p, minlength=classes**2).reshape(classes, classes)


def rmse(targets: ArrayLike, predicted: ArrayLike) -> float:
    """Root of the mean squared error, √(Σ(y−f)²/B), in the unit of the target. ValueError for other shapes.

    >>> rmse([1.0, 2.0], [1.0, 4.0]) == 2**0.5
    True
    """
    y, f = _pair("rmse", targets, predicted)
    return float(np.sqrt(np.mean((y - f) ** 2)))


def mae(targets: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error, Σ|y−f|/B, in the unit of the target. ValueError for other shapes.

    >>> mae([1.0, 2.0], [1.0, 4.0])
    1.0
    """
    y, f = _pair("mae", targets, predicted)
    return float(np.mean(np.abs(y - f)))


def r2(targets: ArrayLike, predicted: ArrayLike) -> float:
    """Share of the variance explained, 1 − Σ(y−f)²/Σ(y−ȳ)²; 1 is perfect, 0 is no better than the mean.

    NaN when all targets are equal, for then there is nothing to explain. ValueError for other shapes.

    >>> r2([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    0.5
    """
    y, f = _pair("r2", targets, predicted)
    total = float(np.sum((y - y.mean()) ** 2))
    return 1.0 - float(np.sum((y - f) ** 2)) / total if total > 0 else float("nan")


def _pair(name: str, first: ArrayLike, second: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two arrays of one shape (B,); unchecked, (B,) against (B, 1) would broadcast to (B, B) in silence."""
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"[{name}] shapes: expected (B,) twice with B ≥ 1, got {a.shape} and {b.shape}")
    return a, b
