#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""chainrule.sklearn's estimators beside scikit-learn's: the same arguments, one line changed.

    python bench/estimators.py                               # about three minutes
    python bench/estimators.py --quick                       # a smoke test; its numbers are not for quoting

On scikit-learn's own tables, standardised: the default network (100 hidden units) for a fixed number of
epochs, and the predictions of one row and of all. First both are trained without shuffling, by SGD in
float64, where their weights must agree to rounding. Each sample is a fresh process that fits once to warm up
and then again; the libraries take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from itertools import product
from typing import Any

import numpy as np

import command
from peers.process import settings
from report import about, align, progress, write_json
from timing import HERE, Neighbours, Spread, show_time

LIBRARIES = {"chainrule": "chainrule.sklearn", "scikit-learn": "sklearn.neural_network"}
TABLES = {"iris": 200, "breast_cancer": 100, "digits": 100}  # and epochs
DTYPES = ("float64", "float32")
CALLS = 100  # of predict a sample
TOLERANCE = 1e-10  # of a weight, after 10 epochs


def table(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes."""
    from sklearn import datasets
    from sklearn.preprocessing import scale

    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return scale(X).astype(dtype), y


def classifier(library: str, **arguments: Any) -> Any:
    """One that trains for all of its epochs."""
    from importlib import import_module

    kind = import_module(LIBRARIES[library]).MLPClassifier
    return kind(random_state=0, tol=0.0, n_iter_no_change=10**6, **arguments)


def sample(library: str, name: str, dtype: str, epochs: int) -> dict[str, float]:
    """What a process is started for: seconds of a fit, and of predictions."""
    X, y = table(name, dtype)
    classifier(library, max_iter=epochs).fit(X, y)
    begin = time.perf_counter()
    model = classifier(library, max_iter=epochs).fit(X, y)
    seconds = {"fit": time.perf_counter() - begin}
    for what, rows in (("one row", X[:1]), ("all rows", X)):
        begin = time.perf_counter()
        for _ in range(CALLS):
            model.predict(rows)
        seconds[what] = (time.perf_counter() - begin) / CALLS
    return seconds


def difference(name: str) -> float:
    """Between the two, after ten epochs that only rounding can tell apart."""
    X, y = table(name, "float64")
    X, y = X[: len(X) // 50 * 50], y[: len(X) // 50 * 50]  # whole batches
    exact = {"solver": "sgd", "learning_rate_init": 0.01, "batch_size": 50, "shuffle": False, "max_iter": 10}
    one, other = (classifier(library, **exact).fit(X, y).coefs_ for library in LIBRARIES)
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def started(python: str, threads: int, *arguments: object) -> dict[str, float]:
    """A sample in a process of its own."""
    program = [python, str(HERE / "estimators.py"), "--sample", *map(str, arguments)]
    done = subprocess.run(
        program, env=os.environ | settings(threads), capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table: each library at its better number of threads."""
    shown: list[tuple[str, ...]] = [("", "", "chainrule", "scikit-learn", "times")]
    for name, dtype, what in product(TABLES, DTYPES, ("fit", "one row", "all rows")):
        ours, theirs = (
            min(
                (
                    Spread.of(row["seconds"][what])
                    for row in rows
                    if (row["table"], row["dtype"], row["library"]) == key
                ),
                key=lambda spread: spread.median,
                default=None,
            )
            for key in ((name, dtype, library) for library in LIBRARIES)
        )
        if ours and theirs:
            both = [
                f"{show_time(s.median)} ({show_time(s.low)} – {show_time(s.high)})" for s in (ours, theirs)
            ]
            shown.append((f"{name} {dtype}", what, *both, f"{theirs.median / ours.median:.1f}"))
    return align(shown)


def main() -> int:
    """Exit status 1 where the two do not compute the same."""
    if sys.argv[1:2] == ["--sample"]:
        warnings.simplefilter("ignore")  # that the loss has not settled
        print(json.dumps(sample(*sys.argv[2:5], int(sys.argv[5]))))  # type: ignore[call-arg]
        return 0
    parser = command.parser(__doc__)
    command.add_sampling(parser, rounds=5)
    options = command.parse(parser, "estimators")
    warnings.simplefilter("ignore")
    apart = {name: difference(name) for name in TABLES}
    print("weights differ by", ", ".join(f"{value:.0e} ({name})" for name, value in apart.items()))
    if max(apart.values()) > TOLERANCE:
        return 1
    rows: list[dict[str, Any]] = [
        {"table": name, "dtype": dtype, "library": library, "threads": threads, "seconds": {}}
        for name, dtype, threads, library in product(TABLES, DTYPES, options.threads, LIBRARIES)
    ]
    neighbours = Neighbours()
    for number, row in product(range(options.rounds), rows):
        progress(f"round {number + 1}: {row['table']} {row['dtype']} {row['library']}")
        epochs = TABLES[row["table"]] // (20 if options.quick else 1)
        with neighbours.watched():
            answer = started(
                options.python, row["threads"], row["library"], row["table"], row["dtype"], epochs
            )
        for what, seconds in answer.items():
            row["seconds"].setdefault(what, []).append(seconds)
    progress("")
    print("\n".join(lines(rows)), neighbours, sep="\n")
    if options.output:
        from sklearn import __version__ as version

        conditions = {"epochs": TABLES, **neighbours.shares}
        head = about({"scikit-learn": version}, {})
        write_json(options.output, head | {"conditions": conditions, "differences": apart, "rows": rows})
        print(f"\nwritten to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
