#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Microseconds per derivative: chainrule beside torch.func and JAX, on the same networks and batches.

    python bench/derivatives.py                              # everything: ten minutes on two cores
    python bench/derivatives.py --quick                      # a smoke test; its numbers are not for quoting
    python bench/derivatives.py --workloads small1 --peers chainrule,jax --rounds 15

Products with the Jacobian in both modes, whole Jacobians in the inputs, each example's gradient and its norm,
Hessian-vector products; tanh networks, because relu's second derivative is 0. Each answer is compared with
float64 before anything is timed; then the rounds go through all derivatives of all libraries (race.py).
"""

from __future__ import annotations

import sys
from typing import Any

import command
from peers import derivatives, problem
from race import Contestant, Race, exit_status, started
from report import about, add_workload, align
from timing import Peak, Spread, show_time

PEERS = ("chainrule", "torch", "jax")
NETWORKS = {"small": (10, 64, 64, 3), "mnist": (784, 256, 128, 10)}
WORKLOADS = {
    f"{name}{rows}": problem.Workload(f"{name}{rows}", sizes, "tanh", "cross_entropy", "sgd", 0.1, rows, 1, 1)
    for name, sizes in NETWORKS.items()
    for rows in (1, 128)
}
QUICK_WORKLOADS = "small1,small128"


def what(one: Contestant) -> str:
    """The derivative that a contestant computes."""
    return one.variant.partition(": ")[0]


def library(one: Contestant) -> str:
    """The library it uses."""
    return one.variant.partition(": ")[2]


class Derivatives(Race):
    """All derivatives of one network at one batch size; each is compared with its own kind."""

    unit, kind = "call", "derivatives"
    make = staticmethod(derivatives.make)

    def rival(self, one: Contestant) -> Contestant:
        """chainrule at its best at the same derivative, or the fastest there is."""
        same = [other for other in self.contestants if what(other) == what(one)]
        ours = [other for other in same if other.process.peer == "chainrule"]
        return min(ours or same, key=lambda other: other.spread.median)

    def in_units(self, one: Contestant, unit: str) -> Spread | None:
        """How many forward passes, or gradients, of the same library and threads it takes, round by round."""
        wanted = f"{unit}: {library(one)}", one.process
        found = [other for other in self.contestants if (other.variant, other.process) == wanted]
        if not found:
            return None
        return Spread.of([a / b for a, b in zip(one.seconds, found[0].seconds, strict=True)])

    def record(self) -> dict[str, Any]:
        """Everything, for the result file."""
        rows = []
        for one in sorted(self.contestants, key=lambda one: (derivatives.NAMES.index(what(one)), one.name)):
            units = {f"in_{unit}s": self.in_units(one, unit) for unit in derivatives.UNITS}
            counted = {name: vars(spread) for name, spread in units.items() if spread}
            rows.append(self.row(one) | {"derivative": what(one), "library": library(one)} | counted)
        return {
            "workload": self.title,
            "parameters": self.work.parameters,
            "rows": rows,
            "excluded": self.excluded,
            "conditions": self.conditions(),
        }

    @property
    def title(self) -> str:
        """Network and batch; no optimizer plays a part."""
        layers = "-".join(map(str, self.work.sizes))
        return f"{layers} {self.work.activation}, {self.work.loss}, batch {self.work.batch}"

    def table(self) -> str:
        """The terminal's view: one line a derivative, each library at its better thread setting."""
        best = self.best()
        libraries = list(dict.fromkeys(library(one) for one in best))
        libraries.sort(key=lambda name: name != "chainrule")
        head = [name for name in libraries for name in (name, "threads", "min – max", "ratio")]
        rows = [["", *head, "passes", "gradients"]]
        for name in derivatives.NAMES:
            found = {library(one): one for one in best if what(one) == name}
            cells = [cell for key in libraries for cell in self._cells_of(found.get(key))]
            if found:
                rows.append([name, *cells, *self._units(found.get("chainrule"))])
        lines = [f"{self.work.name}: {self.title}", *("  " + line for line in align(rows))]
        lines += [f"  left out: {name}: {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, "  " + self.conditions_line()])

    def _cells_of(self, one: Contestant | None) -> tuple[str, ...]:
        if one is None:
            return ("-", "", "", "")
        spread, ratio = one.spread, self.ratio(one)
        times = f"{show_time(spread.low)} – {show_time(spread.high)}"
        compared = "base" if one is self.rival(one) else f"{ratio.median:.2f}"
        return show_time(spread.median), str(one.process.threads), times, compared

    def _units(self, one: Contestant | None) -> list[str]:
        spreads = [self.in_units(one, unit) if one else None for unit in derivatives.UNITS]
        return [f"{spread.median:.2f}" if spread else "" for spread in spreads]


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed somewhere."""
    parser = command.parser(__doc__)
    command.add_workloads(parser, WORKLOADS, ",".join(WORKLOADS), QUICK_WORKLOADS)
    command.add_peers(parser, PEERS)
    command.add_sampling(parser)
    options = command.parse(parser, "derivatives")
    races = []
    with started(options.peers, options) as workers:
        peak = Peak(workers.folder)
        for name in options.workloads:
            head = about(workers.versions, workers.missing)
            race = Derivatives(WORKLOADS[name], workers)
            race.run(options, peak)
            if options.output:
                add_workload(options.output, name, race.record() | head)
            races.append(race)
    if options.output:
        print(f"\nwritten to {options.output}")
    return exit_status(workers, races)


if __name__ == "__main__":
    sys.exit(main())
