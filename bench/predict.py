#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Latency of one row, throughput of many: chainrule beside PyTorch, JAX and scikit-learn, from Python.

    python bench/predict.py                                  # a minute or two
    python bench/predict.py --quick                          # a smoke test; its numbers are not for quoting

A 64-64-64-1 relu network, the same weights in every library, its outputs compared with float64 before
anything is timed. Each library is called on arrays of its own kind, as by a program that stays with it; one
that has its rows in NumPy adds the conversion. One row measures the call, 4096 rows measure the machine.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import command
from peers import problem
from race import PEERS, Race, exit_status, started
from report import about, write_json
from timing import Peak

NETWORK = (64, 64, 64, 1)
ROWS = (1, 4096)


def workload(rows: int) -> problem.Workload:
    """So many rows through the network; loss and optimizer play no part."""
    return problem.Workload(
        "one row" if rows == 1 else f"{rows} rows", NETWORK, "relu", "mse", "sgd", 0.1, rows, 1, 1
    )


class Prediction(Race):
    """Forward passes, one batch a call."""

    unit, kind = "call", "predictors"
    make = staticmethod(problem.make_prediction)

    @property
    def flop(self) -> int:
        """2 B Σ n n′"""
        sizes = self.work.sizes
        return 2 * self.work.batch * sum(i * o for i, o in pairwise(sizes))

    def table(self) -> str:
        """Rows a second beneath, where there are many."""
        lines = [super().table()]
        if self.work.batch > 1 and self.contestants:
            rates = [f"{one.variant} {self.work.batch / one.spread.median / 1e6:.3g}" for one in self.best()]
            lines.append("  million rows a second: " + ", ".join(rates))
        return "\n".join(lines)


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed."""
    parser = command.parser(__doc__)
    command.add_peers(parser, PEERS)
    command.add_sampling(parser)
    options = command.parse(parser, "predict")
    races = []
    with started(options.peers, options) as workers:
        head, peak = about(workers.versions, workers.missing), Peak(workers.folder)
        for rows in ROWS:
            race = Prediction(workload(rows), workers)
            race.run(options, peak)
            races.append(race)
    if options.output:
        write_json(options.output, head | {"workloads": {race.work.name: race.record() for race in races}})
        print(f"\nwritten to {options.output}")
    return exit_status(workers, races)


if __name__ == "__main__":
    sys.exit(main())
