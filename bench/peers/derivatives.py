# SPDX-License-Identifier: MIT
"""What `bench/derivatives.py` asks of each library, and the float64 answers it is checked against.

All of one network, its arrays by name in one dict beside those of problem.py: `dX` (B, n0) a tangent of the
inputs, `c` (B, k) a cotangent of the outputs, `v_W0`, `v_b0`, ... a direction in the parameters; and the
answers, array k of derivative `what` as `what` + str(k):

    forward             f (B, k)
    gradient            of the mean loss, W0, b0, ...
    jvp                 f, and its tangent along dX (B, k)
    vjp                 f, and c J (B, n0)
    jacobian            (B, k, n0)
    example gradients   of each example's own loss, (B, *shape) for each parameter
    example norms       the length of each of these over all parameters (B,)
    hvp                 the Hessian of the mean loss times v, shaped like the parameters

Every library is compared with these, none with another, to what float32 owes to rounding (`rounding`).

Gradients are problem.py's chain rule, which training is checked with, too; along directions this file takes
differences instead of another page of it.
"""

from __future__ import annotations

from itertools import count, takewhile

import numpy as np

from . import problem
from .problem import Workload

COMPARED = ("jvp", "vjp", "jacobian", "example gradients", "example norms", "hvp")
UNITS = ("forward", "gradient")  # what chainrule's own are measured in
NAMES = UNITS + COMPARED

# Sweeps through the layers: up with values, and tangents; down with cotangents, and their tangents.
SWEEPS = {"forward": 1, "hvp": 4}

# Of central differences in float64: they err by about h², 1e-10 of what they are of, and by 1e-16 / h.
STEP = 1e-5


def make(work: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """One problem with all answers."""
    start = problem.start(work, seed)
    rng = np.random.default_rng(seed + 1)
    rows, width = work.batch, work.sizes[-1]
    start |= {
        "dX": rng.standard_normal((rows, work.sizes[0]), dtype=np.float32),
        "c": rng.standard_normal((rows, width), dtype=np.float32),
    }
    start |= problem.named("v_", problem.initial(work, rng))
    answers = _in_inputs(work, start) | _in_parameters(work, start)
    return start | {f"{what}{k}": a for what, arrays in answers.items() for k, a in enumerate(arrays)}


def rounding(work: Workload, made: dict[str, np.ndarray], what: str) -> tuple[float]:
    """What float32 may do to the worst element, relative to the root mean square of its array.

    A sum of k terms rounds k times, each time by a random share of u = 2⁻²⁴: by u √k. A sweep through the
    layers adds up their widths, and the sweeps each other's errors, so k = sweeps · Σ widths. The largest of
    N normal deviates, of either sign, is √(2 ln 2N) standard deviations from 0.
    """
    terms = SWEEPS.get(what, 2) * sum(work.sizes)
    most = max(array.size for array in expected(made, what))
    return (float(2.0**-24 * np.sqrt(terms) * np.sqrt(2 * np.log(2 * most))),)


def direction(work: Workload, made: dict[str, np.ndarray]) -> list[np.ndarray]:
    """v in the order W0, b0, ..."""
    return [made[f"v_{kind}{k}"] for k in range(len(work.sizes) - 1) for kind in "Wb"]


def expected(made: dict[str, np.ndarray], what: str) -> list[np.ndarray]:
    """The answer's arrays."""
    names = (f"{what}{k}" for k in count())
    return [made[name] for name in takewhile(made.__contains__, names)]


def _in_inputs(work: Workload, made: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    params = problem.parameters(work, made)
    X, dX, c = (made[name].astype(np.float64) for name in ("X", "dX", "c"))
    phi = problem.forward(work, X, params)
    f, h = phi[-1], STEP
    ahead, behind = (problem.predict(work, X + step * dX, params) for step in (h, -h))
    rows = [_pull(phi, params, np.broadcast_to(unit, f.shape)) for unit in np.eye(f.shape[1])]
    return {
        "forward": [f],
        "jvp": [f, (ahead - behind) / (2 * h)],
        "vjp": [f, _pull(phi, params, c)],
        "jacobian": [np.stack(rows, axis=1)],
    }


def _pull(phi: list[np.ndarray], params: list[np.ndarray], c: np.ndarray) -> np.ndarray:
    """c J, down through tanh′ = (1 − a)(1 + a) and W."""
    for k in reversed(range(len(phi) - 1)):
        c = c @ params[2 * k]
        if k:
            c = c * (1.0 - phi[k]) * (1.0 + phi[k])
    return c


def _in_parameters(work: Workload, made: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    params, v = problem.parameters(work, made), direction(work, made)
    X, y, h = made["X"].astype(np.float64), made["y"], STEP

    def gradient_at(step: float) -> list[np.ndarray]:
        moved = [p + step * d.astype(np.float64) for p, d in zip(params, v, strict=True)]
        return problem.gradient(work, X, y, moved)[1]

    one_by_one = [problem.gradient(work, X[n : n + 1], y[n : n + 1], params)[1] for n in range(len(X))]
    each = [np.stack(arrays) for arrays in zip(*one_by_one, strict=True)]
    squares = [(g.reshape(len(g), -1) ** 2).sum(axis=1) for g in each]
    pairs = zip(gradient_at(h), gradient_at(-h), strict=True)
    return {
        "gradient": gradient_at(0.0),
        "example gradients": each,
        "example norms": [np.sqrt(np.sum(squares, axis=0))],
        "hvp": [(ahead - behind) / (2 * h) for ahead, behind in pairs],
    }
