#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Seconds from the command line to a trained network: a fresh process imports, loads, trains to 97 %.

    python bench/end_to_end.py                               # a few minutes
    python bench/end_to_end.py --quick                       # a smoke test; its numbers are not for quoting

digits.py reads scikit-learn's digits from a file made once (1440 rows to train, 357 held out) and trains
64-100-10 relu, cross-entropy, Adam, batch 32, with the held-out accuracy looked at after each epoch. Before
anything is timed, each library's probabilities after one epoch are compared with float64. The clock of the
parent runs from the start of the process to its end; the libraries take turns, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import command
import digits
from peers import problem
from peers.process import settings
from report import about, align, progress, write_json
from timing import HERE, Neighbours, Spread, show_time

TRAINED_ROWS = 1440  # 45 whole batches
LIMIT = 300  # epochs
TOLERANCE = 1e-4  # of a probability after one epoch


@dataclass
class Entry:
    """One library with one number of threads."""

    library: str
    threads: int
    version: str = ""
    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)  # one entry a seed, as all that follow
    imports: list[float] = field(default_factory=list)
    trainings: list[float] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)  # after each epoch

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.library}, threads={self.threads}"

    def start(self, python: str, *arguments: object) -> dict[str, Any]:
        """A fresh process, to its end."""
        program = [python, str(HERE / "digits.py"), self.library, *map(str, arguments)]
        environment = os.environ | settings(self.threads)
        done = subprocess.run(program, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name} died: {done.stderr}")
        return dict(json.loads(done.stdout))

    def run(self, python: str, data: Path, seed: int, target: float) -> None:
        """One timed run."""
        begin = time.perf_counter()
        answer = self.start(python, data, seed, target, LIMIT)
        self.seconds.append(time.perf_counter() - begin)
        self.imports.append(answer["import_seconds"])
        self.trainings.append(answer["train_seconds"])
        self.accuracies.append(answer["accuracy"])


def save_digits(path: Path) -> dict[str, np.ndarray]:
    """Split once, the same for all seeds and libraries."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("[end_to_end] the digits come with scikit-learn: expected it installed, got no module")
    X, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(X))
    X, y = (X / 16)[rows].astype(np.float32), y[rows].astype(np.int64)
    arrays = {"X": X[:TRAINED_ROWS], "y": y[:TRAINED_ROWS]}
    arrays |= {"held_X": X[TRAINED_ROWS:], "held_y": y[TRAINED_ROWS:]}
    np.savez(path, allow_pickle=False, **arrays)
    return arrays


def expected(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Held-out probabilities after one epoch with seed 0, in float64."""
    rule = ("relu", "cross_entropy", "adam", digits.LR)
    batches = TRAINED_ROWS // digits.BATCH
    work = problem.Workload("digits", digits.SIZES, *rule, digits.BATCH, batches, verify_epochs=1)
    rows = next(digits.orders(0, TRAINED_ROWS))
    named = dict(zip(("W0", "b0", "W1", "b1"), digits.initial(0), strict=True))
    _, trained = problem.reference(work, {"X": arrays["X"][rows], "y": arrays["y"][rows]} | named)
    return digits.softmax(problem.predict(work, arrays["held_X"], trained))


def verified(options: argparse.Namespace, data: Path, want: np.ndarray) -> tuple[list[Entry], dict[str, str]]:
    """Who can run and computes the same; and who cannot, with the reason. Warms the file cache, too."""
    entries, missing = [], {}
    got = data.with_name("probabilities.npy")
    for library, threads in product(options.peers, options.threads):
        entry = Entry(library, threads)
        progress(f"verifying {entry.name}")
        answer = entry.start(options.python, data, 0, 2.0, 1, got)
        if "missing" in answer:
            missing[library] = answer["missing"]
            continue
        entry.version = answer["version"]
        entry.difference = float(np.abs(np.load(got) - want).max())
        if entry.difference <= TOLERANCE:
            entries.append(entry)
        else:
            missing[entry.name] = f"computes something else, off by {entry.difference:.1e}"
    return entries, missing


def table(entries: list[Entry]) -> str:
    """Fastest first."""
    head = (
        "",
        "threads",
        "process",
        "min – max",
        "import",
        "training",
        "epochs",
        "accuracy",
        "against base",
        "diff",
    )
    rows: list[tuple[str, ...]] = [head]
    ours = [entry for entry in entries if entry.library == "chainrule"]
    base = min(ours or entries, key=lambda entry: Spread.of(entry.seconds).median)
    for entry in sorted(entries, key=lambda entry: Spread.of(entry.seconds).median):
        seconds, epochs = Spread.of(entry.seconds), Spread.of([float(len(a)) for a in entry.accuracies])
        accuracy = Spread.of([a[-1] for a in entry.accuracies])
        ratio = Spread.of([a / b for a, b in zip(entry.seconds, base.seconds, strict=True)])
        rows.append(
            (
                f"{entry.library} {entry.version}",
                str(entry.threads),
                show_time(seconds.median),
                f"{show_time(seconds.low)} – {show_time(seconds.high)}",
                show_time(Spread.of(entry.imports).median),
                show_time(Spread.of(entry.trainings).median),
                f"{epochs.median:.0f} ({epochs.low:.0f} – {epochs.high:.0f})",
                f"{accuracy.median:.1%} ({accuracy.low:.1%} – {accuracy.high:.1%})",
                "base" if entry is base else f"{ratio.median:.1f} ({ratio.low:.1f} – {ratio.high:.1f})",
                f"{entry.difference:.0e}",
            )
        )
    return "\n".join(align(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = command.parser(__doc__)
    command.add_peers(parser, digits.LEARNERS)
    parser.add_argument(
        "--seeds", type=int, help="runs of each, from different weights (default: 5; quick: 1)"
    )
    parser.add_argument(
        "--target", type=float, default=0.97, help="held-out accuracy to reach (default: 0.97)"
    )
    options = command.parse(parser, "end-to-end")
    options.seeds = options.seeds or (1 if options.quick else 5)
    return options


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed, or missed the target."""
    options = parse()
    neighbours = Neighbours()
    with tempfile.TemporaryDirectory(prefix="chainrule-bench-") as folder:
        data = Path(folder) / "digits.npz"
        entries, missing = verified(options, data, expected(save_digits(data)))
        for seed, entry in product(range(options.seeds), entries):
            progress(f"seed {seed}: {entry.name}")
            with neighbours.watched():
                entry.run(options.python, data, seed, options.target)
    progress("")
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    if entries:
        print(f"{table(entries)}\n{neighbours}")
    if options.output:
        rows = [vars(entry) for entry in entries]
        conditions = {"target": options.target, **neighbours.shares}
        write_json(
            options.output,
            about({entry.library: entry.version for entry in entries}, missing)
            | {"conditions": conditions, "rows": rows},
        )
        print(f"\nwritten to {options.output}")
    ours = [entry for entry in entries if entry.library == "chainrule"]
    reached = all(a[-1] >= options.target for entry in ours for a in entry.accuracies)
    return 1 if any(name.startswith("chainrule") for name in missing) or not reached else 0


if __name__ == "__main__":
    sys.exit(main())
