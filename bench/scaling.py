#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time of a training step against the batch, the depth and the number of parameters: does it grow linearly?

    python bench/scaling.py                                  # about ten minutes; writes a .json and a .svg
    python bench/scaling.py --quick --output scaling.json    # a smoke test; its numbers are not for quoting

One `fit` of chainrule a point (relu, mse, Adam), losses and weights compared with float64 first. Twice the
batch, the layers or the parameters should take at most twice the time: more is a fault, except where the
working set leaves a cache. A line t = a + b x is fitted to the medians, by least squares of relative errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import command
import plot
from footprint import Footprint
from peers.problem import Workload
from race import Race, Workers, started
from report import about, align, progress, write_json
from timing import Bandwidth, Level, Peak, Spread, level_of, show_time

FIT = "chainrule fit"
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True)
class Sweep:
    """One quantity that grows while the rest stays, and the networks on the way, by its value."""

    name: str
    rest: str
    each: tuple[int, str]  # how many of it the line's slope is told for
    points: dict[int, Workload]


def workload(name: str, sizes: tuple[int, ...], batch: int) -> Workload:
    """Sixteen batches: where one epoch is a sample already, the set-up of a `fit` hardly counts."""
    return Workload(name, sizes, "relu", "mse", "adam", 1e-4, batch, 16, 1)


def sweeps(quick: bool) -> list[Sweep]:
    """Batches of 2³ … 2¹⁴, 1 … 32 layers, 16 … 4096 units wide; every fourth for a smoke test."""
    every = 4 if quick else 1
    batches = [2**k for k in range(3, 15)][::every]
    wide = [workload(f"width {n}", (n, n, n), 128) for n in WIDTHS[::every] if n < 1000 or not quick]
    rows = {b: workload(f"batch {b}", (64, 256, 256, 10), b) for b in batches}
    # The first layer is not counted: it carries no cotangent back and is a third cheaper than the others.
    deep = {d: workload(f"depth {d}", (64,) * (d + 2), 128) for d in DEPTHS[::every]}
    return [
        Sweep("batch", "64-256-256-10", (1, "row"), rows),
        Sweep("layers", "after the first, 64 wide, batch 128", (1, "layer"), deep),
        Sweep("parameters", "n-n-n, batch 128", (1000, "1000"), {work.parameters: work for work in wide}),
    ]


class Growth(NamedTuple):
    """From one point to the next: time over time, divided by x over x; 1 is linear."""

    factor: float
    start: int
    end: int
    leaves: str  # the cache that the working set leaves on the way, or ""


@dataclass
class Curve:
    """One sweep with one number of threads; to be read once it has its points."""

    sweep: Sweep
    threads: int
    levels: list[Level]
    times: dict[int, Spread] = field(default_factory=dict)

    def line(self) -> tuple[float, float]:
        """(a, b) of t = a + b x with the least relative errors; a is not negative."""
        x = np.array(list(self.times), dtype=float)
        t = np.array([spread.median for spread in self.times.values()])
        a, b = np.linalg.lstsq(np.stack([1 / t, x / t], axis=1), np.ones_like(t), rcond=None)[0]
        return (float(a), float(b)) if a >= 0 else (0.0, float((x / t).sum() / ((x / t) ** 2).sum()))

    def equation(self) -> str:
        """The line, for people."""
        (a, b), (count, each) = self.line(), self.sweep.each
        return f"{show_time(a)} + {show_time(count * b)} per {each}"

    def off(self, x: int) -> float:
        """How far the median is from the line, relatively."""
        a, b = self.line()
        return self.times[x].median / (a + b * x) - 1

    def level(self, x: int) -> str:
        """Where the working set of that step lives."""
        return level_of(self.levels, Footprint.of(self.sweep.points[x]).total).name

    def growths(self) -> Iterator[Growth]:
        """Between neighbours."""
        for (x1, t1), (x2, t2) in pairwise(self.times.items()):
            leaves = self.level(x1) if self.level(x1) != self.level(x2) else ""
            yield Growth(t2.median / t1.median * x1 / x2, x1, x2, leaves)

    def verdict(self) -> str:
        """The line, the farthest point, and the fastest growth within and between caches."""
        farthest = max(self.times, key=lambda x: abs(self.off(x)))
        parts = [
            f"threads {self.threads}: {self.equation()}",
            f"farthest from it {self.off(farthest):+.0%} at {farthest}",
        ]
        for name, crossing in (("within a cache", False), ("leaving a cache", True)):
            found = [growth for growth in self.growths() if bool(growth.leaves) == crossing]
            if found:
                worst = max(found)
                text = f"fastest growth {name} {worst.factor:.2f} of linear, {worst.start} to {worst.end}"
                parts.append(text + (f" ({worst.leaves})" if crossing else ""))
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """For the result file."""
        points = [
            {"x": x, "workload": str(self.sweep.points[x]), "seconds": vars(spread), "level": self.level(x)}
            for x, spread in self.times.items()
        ]
        growths = [growth._asdict() for growth in self.growths()]
        return {"threads": self.threads, "line": self.line(), "points": points, "growths": growths}

    def series(self) -> plot.Series:
        """For the plot."""
        a, b = self.line()
        name = f"{self.threads} thread{'s' if self.threads > 1 else ''}: {self.equation()}"
        return plot.Series(name, list(self.times.items()), lambda x: a + b * x)


def measure(
    sweep: Sweep, levels: dict[int, list[Level]], options: argparse.Namespace, workers: Workers
) -> list[Curve]:
    """Every point with every number of threads; one that could not be timed is named and left out."""
    peak = Peak(workers.folder)
    curves = {n: Curve(sweep, n, levels[n]) for n in options.threads}
    for x, work in sweep.points.items():
        race = Race(work, workers, {FIT})
        race.prepare(options.seconds)
        for _ in range(options.rounds):
            race.round(peak)
        progress("")
        for one in race.contestants:
            curves[one.process.threads].times[x] = one.spread
        for name, why in race.excluded.items():
            print(f"left out: {work.name}: {name}: {why}")
        if sum(race.neighbours.shares.values()) > 0.05:
            print(f"{work.name}: {race.neighbours}")
    return [curve for curve in curves.values() if len(curve.times) > 1]


def table(curves: list[Curve]) -> str:
    """One line a point, then the verdicts."""
    sweep = curves[0].sweep
    head = [f"{sweep.name}, {sweep.rest}", "working set"]
    rows = [head + [text for c in curves for text in (f"threads {c.threads}", "off the line")]]
    for x, work in sweep.points.items():
        row = [str(x), f"{Footprint.of(work).total / 1e6:.3g} MB"]
        for curve in curves:
            known = x in curve.times
            row += [show_time(curve.times[x].median), f"{curve.off(x):+.0%}"] if known else ["-", "-"]
        rows.append(row)
    return "\n".join(["", *align(rows), *(f"  {curve.verdict()}" for curve in curves)])


def panel(curves: list[Curve]) -> plot.Panel:
    """Both numbers of threads, and where the working set of one thread leaves a cache."""
    first = curves[0]
    marks = [((g.start * g.end) ** 0.5, f"leaves {g.leaves}") for g in first.growths() if g.leaves]
    title = f"Step time against {first.sweep.name}"
    return plot.Panel(title, f"{first.sweep.name} ({first.sweep.rest})", [c.series() for c in curves], marks)


def main() -> int:
    """Exit status 1 when a point is missing."""
    parser = command.parser(__doc__)
    command.add_sampling(parser)
    options = command.parse(parser, "scaling")
    found = []
    with started(["chainrule"], options) as workers:
        bandwidth = Bandwidth(workers.folder)
        if workers.missing or not bandwidth.available:
            sys.exit("[scaling] needs chainrule, and a C++ compiler for the caches: expected both, got one")
        levels = {n: bandwidth.measure(n) for n in options.threads}
        for sweep in sweeps(options.quick):
            curves = measure(sweep, levels, options, workers)
            print(table(curves), flush=True)
            found.append(curves)
        head = about(workers.versions, workers.missing)
    if options.output:
        results = {curves[0].sweep.name: [curve.record() for curve in curves] for curves in found}
        write_json(options.output, head | {"sweeps": results})
        picture = options.output.with_suffix(".svg")
        picture.write_text(plot.svg([panel(curves) for curves in found]))
        print(f"\nwritten to {options.output} and {picture}")
    return int(any(len(c.times) < len(c.sweep.points) for curves in found for c in curves))


if __name__ == "__main__":
    sys.exit(main())
