#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Peak memory of a fit beside what it must hold, and whether memory grows over 100,000 steps (Linux).

    python bench/memory.py                                   # half a minute
    python bench/memory.py --quick                           # a smoke test: fewer steps

Each measurement is a process of its own. The peak is the high-water mark of resident memory (VmHWM), reset
after the import and the data, less what was resident then: it holds the network, its optimizer, the step's
arena, and whatever the library makes on the way. Beside it stands what footprint.py computes from the layer
sizes: parameters, optimizer state, transposed copies, one batch of activations and cotangents.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import command
from footprint import Footprint
from peers import problem
from peers.process import settings
from report import about, align, progress, write_json

PEAKS = "mnist,mid,large"
WAYS = ("fit", "train_step", "predict")
WARM_UP = 2000  # steps before memory is looked at first
KIB = 1024


# ---- in a process of its own: imports chainrule, prints one line of JSON ----


def status(field: str) -> int:
    """Bytes of "VmRSS" or "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """The high-water mark falls to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def network(work: problem.Workload) -> Any:
    """The workload's network with weights of its own."""
    import chainrule as cr

    return cr.mlp(work.sizes, activation=work.activation, seed=0)


def measure_peak(work: problem.Workload) -> dict[str, Any]:
    """{"made", "fitted": bytes above what was resident before the network was made, "version"}."""
    import chainrule as cr

    X, y = problem.data(work, np.random.default_rng(0))
    optimizer = {"sgd": cr.SGD, "adam": cr.Adam}[work.optimizer](lr=work.lr)
    forget_peak()
    before = status("VmRSS")
    net = network(work)
    made = status("VmHWM") - before
    net.fit(X, y, loss=work.loss, optimizer=optimizer, batch_size=work.batch, epochs=2, verbose=0)
    return {"made": made, "fitted": status("VmHWM") - before, "version": cr.__version__}


def measure_growth(way: str, steps: int) -> dict[str, Any]:
    """{"growth": bytes that `steps` steps of "tiny" added after a warm-up}."""
    import chainrule as cr

    work = problem.WORKLOADS["tiny"]
    X, y = problem.data(work, np.random.default_rng(0))
    net, loss, optimizer = network(work), cr.Logistic(), cr.SGD(lr=work.lr)
    first = X[: work.batch], y[: work.batch]

    def take(count: int) -> None:
        if way == "fit":
            epochs = -(-count // work.batches)
            net.fit(X, y, loss=loss, optimizer=optimizer, batch_size=work.batch, epochs=epochs, verbose=0)
            return
        for _ in range(count):
            if way == "train_step":
                net.train_step(*first, loss=loss, optimizer=optimizer)
            else:
                net(first[0])

    take(WARM_UP)
    before = status("VmRSS")
    take(steps)
    return {"growth": status("VmRSS") - before}


# ---- the parent ----


def child(options: argparse.Namespace, threads: int, *arguments: object) -> dict[str, Any]:
    """This file again, in a fresh process."""
    program = [options.python, __file__, "--child", *map(str, arguments)]
    environment = os.environ | settings(threads)
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def megabytes(count: float) -> str:
    """Three digits."""
    return f"{count / 1e6:.3g}"


def peaks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a workload and number of threads."""
    rows = []
    for name in options.workloads:
        hold = Footprint.of(problem.WORKLOADS[name])
        for threads in options.threads:
            progress(f"{name}, threads={threads}")
            found = child(options, threads, "peak", name)
            rows.append(
                {"workload": name, "threads": threads, "expected": vars(hold) | {"total": hold.total}} | found
            )
    progress("")
    return rows


def peak_table(rows: list[dict[str, Any]]) -> str:
    """In MB."""
    head = ("peak, MB", "threads", "parameters", "state", "transposed", "activations", "sum", "making", "fit")
    lines: list[tuple[str, ...]] = [(*head, "fit / sum", "rest / parameters")]
    for row in rows:
        parts, fitted = row["expected"], row["fitted"]
        rest = (fitted - parts["total"]) / parts["parameters"]
        numbers = [megabytes(value) for value in (*parts.values(), row["made"], fitted)]
        ratios = (f"{fitted / parts['total']:.2f}", f"{rest:.1f}")
        lines.append((row["workload"], str(row["threads"]), *numbers, *ratios))
    return "\n".join(align(lines))


def growths(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way of stepping and number of threads."""
    rows = []
    for way in WAYS:
        for threads in options.threads:
            progress(f"{options.steps} steps of tiny by {way}, threads={threads}")
            rows.append(
                {"way": way, "threads": threads} | child(options, threads, "growth", way, options.steps)
            )
    progress("")
    return rows


def growth_table(rows: list[dict[str, Any]], steps: int) -> str:
    """In kB."""
    lines: list[tuple[str, ...]] = [(f"growth over {steps:,} steps of tiny, kB", "threads", "resident")]
    lines += [(row["way"], str(row["threads"]), f"{row['growth'] / KIB:.0f}") for row in rows]
    return "\n".join(align(lines))


def parse() -> argparse.Namespace:
    """Command line; --child is for `child`."""
    parser = command.parser(__doc__)
    command.add_workloads(parser, problem.WORKLOADS, PEAKS, PEAKS)
    parser.add_argument("--steps", type=int, help="of tiny (default: 100000; quick: 20000)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = command.parse(parser, "memory")
    options.steps = options.steps or (20_000 if options.quick else 100_000)
    return options


def main() -> None:
    """Two tables, and the file."""
    options = parse()
    if options.child:
        what, name, *rest = options.child
        answer = (
            measure_peak(problem.WORKLOADS[name]) if what == "peak" else measure_growth(name, int(rest[0]))
        )
        return print(json.dumps(answer))
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("[memory] reads /proc: expected Linux, got another system")
    peak_rows = peaks(options)
    print(peak_table(peak_rows), flush=True)
    growth_rows = growths(options)
    print("\n" + growth_table(growth_rows, options.steps))
    if options.output:
        head = about({"chainrule": peak_rows[0]["version"]}, {})
        write_json(options.output, head | {"peak": peak_rows, "steps": options.steps, "growth": growth_rows})
        print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
