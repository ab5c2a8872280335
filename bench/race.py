# SPDX-License-Identifier: MIT
"""Contestants on one workload: verified, calibrated, and timed in interleaved rounds A B C A B C.

Every (library, number of threads) lives in its own process. Only the one being timed runs; the others are
stopped by SIGSTOP, because idle thread pools spin. One that computes something else is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peers import problem
from peers.process import PeerError, Process
from report import align, progress
from timing import Neighbours, Peak, Spread, show_time

PEERS = ("chainrule", "torch", "jax", "sklearn")


@dataclass
class Contestant:
    """One variant of one library with one number of threads, on one workload."""

    process: Process
    variant: str
    kind: str = "variants"  # of what a worker offers: "variants", "mixed", "predictors" or "derivatives"
    facts: dict[str, Any] = field(default_factory=dict)  # form, note, differences from float64
    epochs: int = 0
    seconds: list[float] = field(default_factory=list)  # per step, one entry a round
    cpu: list[float] = field(default_factory=list)  # cores in use, one entry a round

    @property
    def name(self) -> str:
        """With the thread setting, for messages."""
        return f"{self.variant}, threads={self.process.threads}"

    @property
    def spread(self) -> Spread:
        """Seconds per step."""
        return Spread.of(self.seconds)

    @property
    def differences(self) -> dict[str, float]:
        """From float64, by what was compared: "loss", "weight", "output"."""
        ending = "_difference"
        return {k.removesuffix(ending): v for k, v in self.facts.items() if k.endswith(ending)}

    def verify(self) -> None:
        """Build it and compare with float64; PeerError if it computes something else."""
        self.facts = self.process.ask("prepare", kind=self.kind, variant=self.variant)
        checks = [
            (*item, most)
            for item, most in zip(self.differences.items(), self.facts["tolerance"], strict=True)
        ]
        if not all(value <= most for _, value, most in checks):  # NaN is out too
            with contextlib.suppress(PeerError):
                self.process.ask("drop", variant=self.variant)
            texts = [f"{name} by {value:.1e} (allowed {most:.1e})" for name, value, most in checks]
            raise PeerError(f"computes something else, off in {', '.join(texts)}")

    def calibrate(self, seconds: float) -> None:
        """Epochs per sample, so that each takes at least `seconds`."""
        self.epochs = self.process.ask("calibrate", variant=self.variant, seconds=seconds)["epochs"]

    def sample(self, steps_per_epoch: int) -> None:
        """One timed sample."""
        answer = self.process.ask("sample", variant=self.variant, epochs=self.epochs)
        self.seconds.append(answer["seconds"] / (self.epochs * steps_per_epoch))
        self.cpu.append(answer["cpu_seconds"] / answer["seconds"])


class Race:
    """All contestants on one workload: of `variants` only, on the problem in the file `made`, where given."""

    unit = "step"  # what is timed
    kind = "variants"
    make = staticmethod(problem.make)

    def __init__(
        self,
        work: problem.Workload,
        workers: Workers,
        variants: Collection[str] | None = None,
        made: Path | None = None,
    ) -> None:
        self.work = work
        self.contestants: list[Contestant] = []
        self.excluded: dict[str, str] = {}  # name -> why
        self.peaks: dict[int, list[float]] = {}  # threads -> GFLOP/s, one entry a round
        self.clock: list[float] = []
        self.neighbours = Neighbours()
        path = made or workers.folder / f"{work.name}.npz"
        if not made:
            progress(f"{work.name}: float64 reference")
            problem.save(self.make(work), path)
        for process in workers.processes:
            offered = [v for v in process.hello[self.kind] if variants is None or v in variants]
            try:
                if offered:
                    process.ask("load", workload=asdict(work), path=str(path))
            except PeerError as error:
                self.excluded[f"{process.peer}, threads={process.threads}"] = str(error)
                continue
            self.contestants += [Contestant(process, variant, self.kind) for variant in offered]
        path.unlink()

    @property
    def flop(self) -> int:
        """Floating-point operations of what is timed."""
        return self.work.flop

    def prepare(self, seconds: float) -> None:
        """Leave out who computes something else; then find how long a sample of each must be."""
        self.each("verifying", Contestant.verify)
        self.each("calibrating", lambda one: one.calibrate(seconds))

    def run(self, options: argparse.Namespace, peak: Peak) -> None:
        """All of it: verified, timed in rounds, shown."""
        self.prepare(options.seconds)
        for _ in range(options.rounds):
            self.round(peak)
        progress("")
        print("\n" + self.table(), flush=True)

    def round(self, peak: Peak) -> None:
        """One sample of each, the machine's peak first."""
        for threads in sorted({one.process.threads for one in self.contestants} if peak.available else ()):
            measured = peak.measure(threads)
            self.peaks.setdefault(threads, []).append(float(measured["gflops"]))
            self.clock.append(float(measured["ghz"]))
        with self.neighbours.watched({one.process.child.pid for one in self.contestants}):
            self.each("timing", lambda one: one.sample(self.work.batches))

    def each(self, what: str, action: Callable[[Contestant], None]) -> None:
        """Every contestant in turn; one that fails drops out with its reason."""
        for one in list(self.contestants):
            progress(f"{self.work.name}: {what} {one.name}")
            try:
                action(one)
            except PeerError as error:
                self.contestants.remove(one)
                self.excluded[one.name] = str(error)

    # ---- results ----

    @property
    def base(self) -> Contestant | None:
        """Who everybody is compared with: chainrule at its best, or the fastest where chainrule is absent."""
        ours = [one for one in self.contestants if one.process.peer == "chainrule"]
        return min(ours or self.contestants, key=lambda one: one.spread.median, default=None)

    def best(self) -> list[Contestant]:
        """Each variant at its better thread setting, fastest first."""
        fastest: dict[str, Contestant] = {}
        for one in sorted(self.contestants, key=lambda one: one.spread.median):
            fastest.setdefault(one.variant, one)
        return list(fastest.values())

    def rival(self, one: Contestant) -> Contestant:
        """Whom one is compared with."""
        assert self.base is not None
        return self.base

    def ratio(self, one: Contestant) -> Spread:
        """Time over the rival's, round by round: both numbers come from the same spell of the machine."""
        return Spread.of([a / b for a, b in zip(one.seconds, self.rival(one).seconds, strict=True)])

    def peak(self, threads: int) -> float | None:
        """Measured FLOP/s of so many cores."""
        return Spread.of(self.peaks[threads]).median * 1e9 if threads in self.peaks else None

    def share(self, one: Contestant) -> float | None:
        """Share of the measured FMA peak of as many cores as the contestant was given."""
        peak = self.peak(one.process.threads)
        return None if peak is None else self.flop / one.spread.median / peak

    def row(self, one: Contestant) -> dict[str, Any]:
        """What the result file says of one."""
        return {
            "peer": one.process.peer,
            "variant": one.variant,
            "threads": one.process.threads,
            f"seconds_per_{self.unit}": one.seconds,
            "median": one.spread.median,
            "cores_used": Spread.of(one.cpu).median,
            "ratio_to_base": vars(self.ratio(one)),
            f"{self.unit}s_per_sample": one.epochs * self.work.batches,
            **one.facts,
        }

    def record(self) -> dict[str, Any]:
        """Everything, for the result file."""
        ranked = sorted(self.contestants, key=lambda one: one.spread.median)
        return {
            "workload": str(self.work),
            f"flop_per_{self.unit}": self.flop,
            "parameters": self.work.parameters,
            "base": self.base.name if self.base else None,
            "rows": [self.row(one) | {"share_of_peak": self.share(one)} for one in ranked],
            "excluded": self.excluded,
            "conditions": self.conditions(),
        }

    def conditions(self) -> dict[str, Any]:
        """How quiet the machine was."""
        return {
            "peak_gflops": {str(n): Spread.of(v).median for n, v in self.peaks.items()},
            "clock_ghz": vars(Spread.of(self.clock)) if self.clock else None,
            **self.neighbours.shares,
        }

    def table(self) -> str:
        """The terminal's view: one line a variant, at its better thread setting."""
        lines = [f"{self.work.name}: {self.work}   ({self.flop / 1e6:.3g} MFLOP a {self.unit})"]
        compared = [f"{name} diff" for one in self.contestants[:1] for name in one.differences]
        head = (
            "",
            "threads",
            f"a {self.unit}",
            "min – max",
            "cores",
            "of peak",
            "against base",
            "other threads",
        )
        lines += [
            "  " + line for line in align([(*head, *compared), *(self._cells(one) for one in self.best())])
        ]
        notes = {f"  {one.variant}: {one.facts['note']}" for one in self.contestants if one.facts["note"]}
        lines += sorted(notes) + [f"  left out: {name}: {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, "  " + self.conditions_line()])

    def _cells(self, one: Contestant) -> tuple[str, ...]:
        spread, ratio, share = one.spread, self.ratio(one), self.share(one)
        others = [
            f"{other.process.threads}: {show_time(other.spread.median)}"
            for other in self.contestants
            if other.variant == one.variant and other is not one
        ]
        return (
            one.variant,
            str(one.process.threads),
            show_time(spread.median),
            f"{show_time(spread.low)} – {show_time(spread.high)}",
            f"{Spread.of(one.cpu).median:.2f}",
            "" if share is None else f"{share:.1%}",
            "base" if one is self.base else f"{ratio.median:.2f} ({ratio.low:.2f} – {ratio.high:.2f})",
            ", ".join(others),
            *(f"{value:.0e}" for value in one.differences.values()),
        )

    def conditions_line(self) -> str:
        """Peak, clock, and who else used the machine."""
        now = self.conditions()
        peaks = ", ".join(f"{v:.0f} GFLOP/s on {n}" for n, v in sorted(now["peak_gflops"].items()))
        clock = "unknown"
        if now["clock_ghz"]:
            clock = f"{now['clock_ghz']['low']:.2f} – {now['clock_ghz']['high']:.2f} GHz"
        return f"peak {peaks or 'not measured (no C++ compiler)'}; clock {clock}; {self.neighbours}"


class Workers(NamedTuple):
    """The processes that take part, the peers that cannot be imported (with the reason), a scratch folder."""

    processes: list[Process]
    missing: dict[str, str]
    folder: Path

    @property
    def versions(self) -> dict[str, str]:
        """Of everything that takes part."""
        return {k: v for process in self.processes for k, v in process.hello["versions"].items()}


def _start(peers: Collection[str], threads: Collection[int], python: str, folder: Path) -> Workers:
    workers = Workers([], {}, folder)
    progress(f"starting {', '.join(peers)}")
    for process in [Process(*one, python, folder) for one in itertools.product(peers, threads)]:
        try:
            process.greet()
        except PeerError as error:
            process.hello = {"missing": str(error)}
        if "missing" in process.hello:
            workers.missing[process.peer] = process.hello["missing"]
            process.close()
        else:
            workers.processes.append(process)
    progress("")
    return workers


@contextlib.contextmanager
def started(peers: Collection[str], options: argparse.Namespace) -> Iterator[Workers]:
    """A worker for each peer and thread setting; versions are printed, and all end with the block."""
    with tempfile.TemporaryDirectory(prefix="chainrule-bench-") as folder:
        workers = _start(peers, options.threads, options.python, Path(folder))
        try:
            print("  ".join(f"{k} {v}" for k, v in workers.versions.items()))
            for peer, why in workers.missing.items():
                print(f"left out: {peer}: {why}")
            yield workers
        finally:
            for process in workers.processes:
                process.close()


def exit_status(workers: Workers, races: Collection[Race]) -> int:
    """1 when chainrule was asked for and could not be timed somewhere."""
    lost = [*workers.missing, *(name for race in races for name in race.excluded)]
    return 1 if any(re.search(r"(^|: )chainrule", name) for name in lost) else 0
