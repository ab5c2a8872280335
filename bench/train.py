#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Microseconds per training step: chainrule beside PyTorch, JAX and scikit-learn, on the same problem.

    python bench/train.py                                    # everything: 10 to 20 minutes on two cores
    python bench/train.py --quick                            # a smoke test; its numbers are not for quoting
    python bench/train.py --workloads tiny,mnist --peers chainrule,jax --rounds 15
    python bench/train.py --mixed                            # bfloat16 products on the two largest

First each contestant's losses and weights are compared with a float64 trajectory, and one that computes
something else is not timed; then the rounds go A B C A B C, so that a slow spell of the machine hits
everybody (race.py). README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import sys

import command
from peers import problem
from race import PEERS, Race, Workers, exit_status, started
from report import about, add_workload, align
from timing import Peak

QUICK_WORKLOADS = "tiny,small,digits,mnist"
MIXED_WORKLOADS = ["mid", "large"]


class MixedRace(Race):
    """Products in bfloat16, beside our own float32."""

    kind = "mixed"


def summary(races: list[Race]) -> str:
    """Times a step takes relative to chainrule's, one line a variant, one column a workload."""
    variants = list(dict.fromkeys(one.variant for race in races for one in race.best()))
    rows = [["against base", *(race.work.name for race in races)]]
    for variant in variants:
        row = [variant]
        for race in races:
            found = [one for one in race.best() if one.variant == variant]
            row.append(f"{race.ratio(found[0]).median:.2f}" if found else "-")
        rows.append(row)
    return "\n".join(align(rows))


def run(options: argparse.Namespace, workers: Workers) -> list[Race]:
    """All workloads, printed and written one by one, so that an interrupted run keeps what it has.

    Each entry of the file says by itself when and on what it was measured.
    """
    peak = Peak(workers.folder)
    races = []
    for name in options.workloads:
        head = about(workers.versions, workers.missing)
        race = (MixedRace if options.mixed else Race)(problem.WORKLOADS[name], workers)
        race.run(options, peak)
        if options.output:
            add_workload(options.output, name + " bfloat16" * options.mixed, race.record() | head)
        races.append(race)
    return races


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = command.parser(__doc__)
    command.add_workloads(parser, problem.WORKLOADS, ",".join(problem.WORKLOADS), QUICK_WORKLOADS)
    command.add_peers(parser, PEERS)
    command.add_sampling(parser)
    parser.add_argument(
        "--mixed", action="store_true", help="bfloat16 mixed precision (default workloads: mid,large)"
    )
    options = command.parse(parser, "", arguments)
    if options.mixed and options.workloads == list(problem.WORKLOADS):
        options.workloads = MIXED_WORKLOADS
    return options


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed somewhere."""
    options = parse()
    with started(options.peers, options) as workers:
        races = run(options, workers)
    print("\n" + summary(races))
    if options.output:
        print(f"\nwritten to {options.output}")
    return exit_status(workers, races)


if __name__ == "__main__":
    sys.exit(main())
