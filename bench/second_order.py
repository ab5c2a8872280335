#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Whole-batch steps, and seconds, to a small error: LevenbergMarquardt and LBFGS against Adam on one curve.

    python bench/second_order.py                         # some minutes; prints a table
    python bench/second_order.py --quick                 # one seed, errors down to 1e-4
    python bench/second_order.py --output FILE.json      # the same, and writes it

sin(x)/x on −10 … 10, 100 rows, x scaled to unit variance, by a 1-20-1 tanh network in float64. Every
optimizer starts from the same weights and sees all rows at every step. Adam runs at five learning rates, and
for each error the best of them counts. Who does not arrive within the most steps is shown as "> that many".
The time is that of a second fit of just so many epochs, without a callback.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import chainrule as cr
from report import about, align, progress, write_json
from timing import show_time

ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CONTESTANTS: dict[str, tuple[int, list[Callable[[], Any]]]] = {  # most steps, and what the best is taken of
    "LevenbergMarquardt": (1000, [cr.LevenbergMarquardt]),
    "LBFGS": (10_000, [cr.LBFGS]),
    "Adam": (100_000, [lambda lr=lr: cr.Adam(lr) for lr in ADAM_RATES]),
}


def curve() -> tuple[np.ndarray, np.ndarray]:
    """X and y."""
    x = np.linspace(-10, 10, 100)
    return x[:, None] / x.std(), np.sinc(x / np.pi)


def fitted(optimizer: Any, seed: int, epochs: int, until: float = 0.0) -> tuple[list[float], float]:
    """The losses of a fit that stops below `until`, and its seconds."""
    X, y = curve()
    net = cr.mlp([1, 20, 1], activation="tanh", seed=seed, dtype="float64")
    stop = [lambda epoch, logs: logs["loss"] < until] if until else []
    start = time.perf_counter()
    history = net.fit(
        X, y, loss="mse", optimizer=optimizer, batch_size=len(X), epochs=epochs, callbacks=stop, verbose=0
    )
    return history["loss"], time.perf_counter() - start


def steps_to(losses: list[float], error: float) -> float:
    """The first step whose loss is below `error`; infinite without one."""
    return next((step for step, loss in enumerate(losses, 1) if loss < error), math.inf)


def arrivals(name: str, seed: int, errors: list[float]) -> list[tuple[float, float]]:
    """(steps, seconds) to each error, by the variant that needs the fewest steps."""
    most, variants = CONTESTANTS[name]
    runs = [fitted(make(), seed, most, min(errors))[0] for make in variants]
    found = []
    for error in errors:
        steps, best = min((steps_to(losses, error), k) for k, losses in enumerate(runs))
        seconds = fitted(variants[best](), seed, int(steps))[1] if steps < math.inf else math.inf
        found.append((steps, seconds))
    return found


def shown(values: list[tuple[float, float]], most: int) -> tuple[str, str]:
    """Medians over the seeds."""
    steps, seconds = (statistics.median(column) for column in zip(*values, strict=True))
    return (f"{steps:,.0f}", show_time(seconds)) if steps < math.inf else (f"> {most:,}", "-")


def table(errors: list[float], found: dict[str, list[list[tuple[float, float]]]]) -> str:
    """One line an optimizer, two columns an error."""
    rows = [["mse below", *(text for error in errors for text in (f"{error:.0e}", ""))]]
    for name, seeds in found.items():
        cells = [shown([seed[k] for seed in seeds], CONTESTANTS[name][0]) for k in range(len(errors))]
        rows.append([name, *(text for cell in cells for text in cell)])
    return "\n".join(align(rows))


def main() -> int:
    """Always 0: what does not arrive is a result, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, and errors down to 1e-4 only")
    parser.add_argument("--seeds", type=int, default=5, help="first weights to take the median over")
    parser.add_argument("--output", type=Path, help="result file (default: none)")
    options = parser.parse_args()
    errors = [1e-3, 1e-4] if options.quick else [1e-3, 1e-4, 1e-5, 1e-6]
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in CONTESTANTS}
    for seed in range(1 if options.quick else options.seeds):
        for name, results in found.items():
            progress(f"{name}, seed {seed}")
            results.append(arrivals(name, seed, errors))
    progress("")
    print("steps and seconds, median over the seeds\n" + table(errors, found))
    if options.output:
        head = about({"chainrule": cr.__version__, "numpy": np.__version__}, {})
        finite = {
            name: [[pair if pair[0] < math.inf else None for pair in seed] for seed in seeds]
            for name, seeds in found.items()
        }
        write_json(options.output, {**head, "errors": errors, "steps_and_seconds": finite})
    return 0


if __name__ == "__main__":
    sys.exit(main())
