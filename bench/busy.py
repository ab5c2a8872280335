#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a busy neighbour costs: step time while another process keeps a core busy, over step time alone.

    python bench/busy.py                                     # a few minutes
    python bench/busy.py --quick                             # a smoke test; its numbers are not for quoting

The neighbour is an endless loop that the system may put on any core. Each round times every contestant alone
and then beside it (losses compared first, as in train.py). On c cores with t threads a fair scheduler leaves
min(1, c / (t + 1)) of a core to each thread: for 2 of 2 cores, 1.5 times the time. More is a pool that waits
for a thread which is not running.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import command
from peers import problem
from race import Contestant, Race, Workers, exit_status, started
from report import about, align, progress, write_json
from timing import Peak, Spread, show_time, usable_cpus

PEERS = ("chainrule", "torch")
VARIANTS = ("chainrule fit", "chainrule train_step", "torch eager")


# It ends with this process, even one that is killed (PR_SET_PDEATHSIG; Linux).
LOOP = "import ctypes, signal; ctypes.CDLL(None).prctl(1, signal.SIGKILL)\nwhile True: pass"


class Neighbour:
    """A process that computes without end, stopped except inside `busy()`."""

    def __init__(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", LOOP])
        os.kill(self.child.pid, signal.SIGSTOP)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Runs while the block does."""
        os.kill(self.child.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self.child.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        self.child.kill()
        self.child.wait()


class BusyRace(Race):
    """Each contestant alone, and beside the neighbour."""

    def __init__(self, work: problem.Workload, workers: Workers, seconds: float) -> None:
        super().__init__(work, workers, VARIANTS)
        self.prepare(seconds)
        self.beside = {one.name: replace(one, seconds=[], cpu=[]) for one in self.contestants}

    def both(self, peak: Peak, neighbour: Neighbour) -> None:
        """One round: all alone, then all beside it."""
        self.round(peak)
        with neighbour.busy():
            self.each("beside a neighbour", lambda one: self.beside[one.name].sample(self.work.batches))

    def pairs(self) -> list[tuple[Contestant, Contestant, Spread]]:
        """Alone, beside, and the ratio round by round."""
        both = [(one, self.beside[one.name]) for one in self.contestants]
        return [
            (a, b, Spread.of([y / x for x, y in zip(a.seconds, b.seconds, strict=True)])) for a, b in both
        ]

    def table(self) -> str:
        """One line a contestant."""
        rows: list[tuple[str, ...]] = [("", "threads", "alone", "beside", "ratio", "fair", "cores beside")]
        for alone, beside, ratio in self.pairs():
            threads = alone.process.threads
            rows.append(
                (
                    alone.variant,
                    str(threads),
                    show_time(alone.spread.median),
                    show_time(beside.spread.median),
                    f"{ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f})",
                    f"{fair(threads):.2f}",
                    f"{Spread.of(beside.cpu).median:.2f}",
                )
            )
        left_out = [f"  left out: {name}: {why}" for name, why in self.excluded.items()]
        lines = [f"{self.work.name}: {self.work}", *("  " + line for line in align(rows)), *left_out]
        return "\n".join([*lines, f"  alone: {self.conditions_line()}"])

    def record(self) -> dict[str, Any]:
        """Everything, for the result file."""
        beside = {b.name: {"seconds_per_step": b.seconds, "ratio": vars(r)} for _, b, r in self.pairs()}
        return super().record() | {"beside": beside}


def fair(threads: int) -> float:
    """Time over time alone if all cores are shared evenly between the threads and one neighbour."""
    return max(1.0, (threads + 1) / usable_cpus())


def run(options: argparse.Namespace, workers: Workers, neighbour: Neighbour) -> list[BusyRace]:
    """All workloads."""
    peak, races = Peak(workers.folder), []
    for name in options.workloads:
        race = BusyRace(problem.WORKLOADS[name], workers, options.seconds)
        for _ in range(options.rounds):
            race.both(peak, neighbour)
        progress("")
        print("\n" + race.table(), flush=True)
        races.append(race)
    return races


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed somewhere."""
    parser = command.parser(__doc__)
    command.add_workloads(parser, problem.WORKLOADS, "tiny,small,digits,mnist", "tiny,mnist")
    command.add_peers(parser, PEERS)
    command.add_sampling(parser)
    options = command.parse(parser, "busy")
    neighbour = Neighbour()
    try:
        with started(options.peers, options) as workers:
            races = run(options, workers, neighbour)
            head = about(workers.versions, workers.missing)
    finally:
        neighbour.close()
    if options.output:
        write_json(options.output, head | {"workloads": {race.work.name: race.record() for race in races}})
        print(f"\nwritten to {options.output}")
    return exit_status(workers, races)


if __name__ == "__main__":
    sys.exit(main())
