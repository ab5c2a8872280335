#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time of a training step against the width of the network, beside other libraries: who is worth it where.

    python bench/widths.py                               # about fifteen minutes; writes a .json and a .svg
    python bench/widths.py --quick --output widths.json  # a smoke test; its numbers are not for quoting

Networks 16-n-n-1, relu, least squares, Adam, batches of 32 and of 256 rows. Losses and weights are compared
with float64 first, rounds are interleaved (race.py); each library is shown at its better number of threads.
"""

from __future__ import annotations

import argparse
import sys

import command
import plot
from peers.problem import Workload
from race import PEERS, Race, Workers, exit_status, started
from report import about, align, progress, write_json
from timing import Peak, Spread, show_time

# What each library recommends, but torch.compile, which takes half a minute to compile each network.
SHOWN = {
    "chainrule fit": "chainrule",
    "jax lax.scan": "JAX, the run in one scan",
    "jax.jit": "JAX, jit a step",
    "torch eager": "PyTorch eager",
    "sklearn fit": "scikit-learn",
}
WIDTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (32, 256)
Times = dict[str, dict[int, Spread]]  # of each variant, by width


def workload(width: int, batch: int) -> Workload:
    """Two epochs are compared with float64; at this learning rate rounding does not grow meanwhile."""
    return Workload(
        f"width-{width}-{batch}", (16, width, width, 1), "relu", "least_squares", "adam", 1e-4, batch, 16, 2
    )


def measure(
    options: argparse.Namespace, workers: Workers, peak: Peak, batch: int
) -> tuple[list[Race], Times]:
    """Every width, and the better number of threads of each variant there."""
    races, times = [], {variant: {} for variant in SHOWN}
    for width in WIDTHS[:: 3 if options.quick else 1]:
        race = Race(workload(width, batch), workers, SHOWN)
        race.prepare(options.seconds)
        for _ in range(options.rounds):
            race.round(peak)
        progress("")
        for one in race.best():
            times[one.variant][width] = one.spread
        for name, why in race.excluded.items():
            print(f"left out: {race.work.name}: {name}: {why}")
        if sum(race.neighbours.shares.values()) > 0.05:
            print(f"{race.work.name}: {race.neighbours}")
        races.append(race)
    return races, {variant: found for variant, found in times.items() if found}


def table(batch: int, times: Times) -> str:
    """One line a width, one column a library."""
    widths = sorted({width for found in times.values() for width in found})
    rows = [[f"16-n-n-1, batch {batch}", *(SHOWN[variant] for variant in times)]]
    for width in widths:
        cells = [show_time(found[width].median) if width in found else "-" for found in times.values()]
        rows.append([f"n = {width}", *cells])
    return "\n".join(["", *align(rows)])


def panel(batch: int, times: Times) -> plot.Panel:
    """A line a library."""
    series = [plot.Series(SHOWN[variant], list(found.items())) for variant, found in times.items()]
    return plot.Panel(f"A training step with {batch} rows", "n, the width of 16-n-n-1", series)


def main() -> int:
    """Exit status 1 when chainrule is missing somewhere."""
    parser = command.parser(__doc__)
    command.add_sampling(parser, rounds=5)
    command.add_peers(parser, PEERS)
    options = command.parse(parser, "widths")
    found: dict[int, tuple[list[Race], Times]] = {}
    with started(options.peers, options) as workers:
        peak = Peak(workers.folder)
        for batch in BATCHES:
            found[batch] = measure(options, workers, peak, batch)
            print(table(batch, found[batch][1]), flush=True)
        head = about(workers.versions, workers.missing)
    races = [race for several, _ in found.values() for race in several]
    if options.output:
        write_json(options.output, head | {"workloads": {race.work.name: race.record() for race in races}})
        picture = options.output.with_suffix(".svg")
        picture.write_text(plot.svg([panel(batch, times) for batch, (_, times) in found.items()]))
        print(f"\nwritten to {options.output} and {picture}")
    return exit_status(workers, races)


if __name__ == "__main__":
    sys.exit(main())
