# SPDX-License-Identifier: MIT
"""Central differences: the derivatives that need no chain rule, to check those that do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # an ndarray of float64


def gradient(L: Callable[[Array], float], a: Array, h: float = 1e-6) -> Array:
    """∂L/∂a ≈ (L(a + h) − L(a − h)) / 2h, one element of `a` after the other; the error is of order h².

    >>> gradient(lambda a: float((a * a).sum()), np.array([1.0, 3.0])).round(6)
    array([2., 6.])
    """
    slopes = np.zeros(a.shape)
    for place in np.ndindex(*a.shape):
        step = np.zeros(a.shape)
        step[place] = h
        slopes[place] = (L(a + step) - L(a - step)) / (2 * h)
    return slopes


def in_parameters(net: Any, L: Callable[[], float], h: float = 1e-6) -> dict[str, Array]:
    """The same in every parameter of a network that L looks at; keys as in state_dict."""
    state = net.state_dict()
    slopes = {}
    for name, value in state.items():

        def at(moved: Array, name: str = name) -> float:
            net.load_state_dict({**state, name: moved})
            return L()

        slopes[name] = gradient(at, value, h)
    net.load_state_dict(state)
    return slopes
