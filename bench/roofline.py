#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The floor of a training step on this machine, our time above it, and where the rest goes.

    python bench/roofline.py                                 # every workload of train.py; a few minutes
    python bench/roofline.py --quick                         # a smoke test; its numbers are not for quoting
    python bench/roofline.py --workloads mnist --threads 1

A phase of a step cannot be shorter than its operations over the FMA peak, nor than its bytes over the
bandwidth of the smallest cache that holds the step's working set; the floor of the step is the sum over its
four phases, which come one after the other. `fit` is timed as in train.py (losses compared first), the phases
by phases.cpp, in the same rounds; README.md says what would mislead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import command
import footprint
from peers import problem
from race import Contestant, Race, Workers, started
from report import about, align, progress, write_json
from timing import HERE, Bandwidth, Level, Peak, Phases, level_of, show_time

FIT = "chainrule fit"


class Line(NamedTuple):
    """One part of the measured time: its floor, and what sets that; no floor for what should not be there."""

    name: str
    seconds: float
    floor: float = 0.0
    bound: str = ""

    def cells(self, fit: float) -> tuple[str, ...]:
        """For the terminal."""
        share = f"{self.floor / self.seconds:.0%}" if self.floor and self.seconds > 0 else ""
        floor = show_time(self.floor) if self.floor else ""
        seconds = f"{'-' if self.seconds < 0 else ''}{show_time(abs(self.seconds))}"
        return self.name, seconds, f"{self.seconds / fit:.1%}", floor, share, self.bound


def floors(work: problem.Workload, peak: float, level: Level) -> list[tuple[float, float]]:
    """Seconds that each phase needs at least: for its operations, and for its bytes."""
    return [
        (phase.flop / peak, phase.bytes / (level.read if phase.flop else level.update))
        for phase in footprint.phases(work)
    ]


class Roofline(Race):
    """`fit` on one workload, with the phases of its step timed in the same rounds."""

    def __init__(
        self, work: problem.Workload, workers: Workers, levels: dict[int, list[Level]], program: Phases
    ) -> None:
        super().__init__(work, workers, {FIT})
        self.levels, self.program = levels, program
        self.phases: dict[int, list[dict[str, float]]] = {}  # threads -> one entry a round

    def time_phases(self, seconds: float) -> None:
        """One round of phases.cpp for each number of threads."""
        work = self.work
        network = "-".join(map(str, work.sizes)), work.activation, work.loss, work.optimizer, work.batch
        for one in self.contestants if self.program.available else ():
            threads = one.process.threads
            progress(f"{work.name}: phases, threads={threads}")
            self.phases.setdefault(threads, []).append(self.program.measure(*network, threads, seconds / 4))

    def peak(self, threads: int) -> float:
        """Measured FLOP/s of so many cores."""
        peak = super().peak(threads)
        assert peak is not None  # main() has a compiler
        return peak

    def level(self, threads: int) -> Level:
        """Where the step's working set lives."""
        return level_of(self.levels[threads], footprint.Footprint.of(self.work).total)

    def floor(self, threads: int) -> dict[str, float]:
        """Seconds: all operations, all bytes, the optimizer's bytes; `step`, phase after phase."""
        bounds = floors(self.work, self.peak(threads), self.level(threads))
        computing, moving = (sum(values) for values in list(zip(*bounds, strict=True))[:2])
        step = sum(max(bound[:2]) for bound in bounds)
        return {"arithmetic": computing, "bytes": moving, "optimizer": bounds[-1][1], "step": step}

    def lines(self, threads: int, fit: float) -> list[Line]:
        """The phases with their floors, and what lies between and around them."""
        times = {k: statistics.median(t[k] for t in self.phases[threads]) for k in self.phases[threads][0]}
        parts = (
            times["forward"],
            times["sweep"] - times["forward"],
            times["gradient"],
            times["update"] - times["gradient"],
        )
        level = self.level(threads)
        lines = []
        bounds = floors(self.work, self.peak(threads), level)
        for phase, seconds, bound in zip(footprint.phases(self.work), parts, bounds, strict=True):
            why = "arithmetic" if bound[0] >= bound[1] else level.name
            lines.append(Line(phase.name, seconds, max(bound), why))
        lines.append(Line("between the phases: cold caches", times["step"] - sum(parts)))
        return [*lines, Line("around the step: epochs, Python", fit - times["step"])]

    def table(self) -> str:
        """One block for each number of threads."""
        size = footprint.Footprint.of(self.work).total
        blocks = [f"{self.work.name}: {self.work}   ({self.flop / 1e6:.3g} MFLOP, {size / 1e6:.3g} MB)"]
        for one in self.contestants:
            blocks.append(self._sentence(one))
            if one.process.threads in self.phases:
                fit = one.spread.median
                rows = [line.cells(fit) for line in self.lines(one.process.threads, fit)]
                head = ("where it goes", "time", "of fit", "floor", "floor / time", "bound by")
                blocks += ["    " + line for line in align([head, *rows])]
        left_out = [f"  left out: {name}: {why}" for name, why in self.excluded.items()]
        return "\n".join([*blocks, *left_out, "  " + self.conditions_line()])

    def _sentence(self, one: Contestant) -> str:
        threads, fit = one.process.threads, one.spread
        floor, level = self.floor(threads), self.level(threads).name
        parts = ", ".join(f"{name} {show_time(value)}" for name, value in floor.items() if name != "step")
        return (
            f"  threads {threads}, in {level}: floor {show_time(floor['step'])} ({parts}); "
            f"fit {show_time(fit.median)} ({show_time(fit.low)} – {show_time(fit.high)}): "
            f"the floor is {floor['step'] / fit.median:.0%} of it"
        )

    def record(self) -> dict[str, Any]:
        """Everything, for the result file."""
        added = {}
        for one in self.contestants:
            threads, timed = one.process.threads, one.process.threads in self.phases
            lines = self.lines(threads, one.spread.median) if timed else []
            added[threads] = {
                "level": self.level(threads).name,
                "floor_seconds": self.floor(threads),
                "phase_seconds": self.phases.get(threads, []),
                "lines": [line._asdict() for line in lines],
            }
        return super().record() | {"footprint": vars(footprint.Footprint.of(self.work)), "threads": added}


def bandwidths(levels: dict[int, list[Level]]) -> str:
    """For the terminal."""
    rows: list[tuple[str, ...]] = [("bandwidth, GB/s", "threads", "read", "copy", "triad", "update in place")]
    for threads, measured in levels.items():
        for level in measured:
            rates = (level.read, level.copy, level.triad, level.update)
            rows.append((level.name, str(threads), *(f"{rate / 1e9:.0f}" for rate in rates)))
    return "\n".join(align(rows))


def run(options: argparse.Namespace, workers: Workers) -> list[Roofline]:
    """All workloads."""
    peak, bandwidth, program = Peak(workers.folder), Bandwidth(workers.folder), Phases(options.build)
    if not peak.available:
        sys.exit("[roofline] a C++ compiler measures the floors: expected c++, g++ or clang++, got none")
    levels = {threads: bandwidth.measure(threads) for threads in options.threads}
    print("\n" + bandwidths(levels))
    if not program.available:
        print(f"left out: the phases: {program.why}")
    races = []
    for name in options.workloads:
        race = Roofline(problem.WORKLOADS[name], workers, levels, program)
        race.prepare(options.seconds)
        for _ in range(options.rounds):
            race.round(peak)
            race.time_phases(options.seconds)
        progress("")
        print("\n" + race.table(), flush=True)
        races.append(race)
    return races


def main() -> int:
    """Exit status 1 when `fit` could not be timed somewhere."""
    parser = command.parser(__doc__)
    command.add_workloads(parser, problem.WORKLOADS, ",".join(problem.WORKLOADS), "tiny,small,digits,mnist")
    command.add_sampling(parser, seconds=1.0)  # long enough that the set-up of `fit` does not count
    build = HERE.parent / "build" / "bench"
    parser.add_argument("--build", type=Path, default=build, help=f"folder for phases.cpp (default: {build})")
    options = command.parse(parser, "roofline")
    with started(["chainrule"], options) as workers:
        races = run(options, workers)
    if options.output:
        results = {race.work.name: race.record() for race in races}
        bandwidth = {n: [vars(level) for level in measured] for n, measured in races[0].levels.items()}
        head = about(workers.versions, workers.missing)
        write_json(options.output, head | {"bandwidth": bandwidth, "workloads": results})
        print(f"\nwritten to {options.output}")
    return 1 if workers.missing or any(race.excluded for race in races) else 0


if __name__ == "__main__":
    sys.exit(main())
