#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Microseconds per training step: chainrule beside PyTorch, JAX and scikit-learn, on the same problem.

    python bench/train.py                                    # everything: 10 to 20 minutes on two cores
    python bench/train.py --quick                            # a smoke test; its numbers are not for quoting
    python bench/train.py --workloads tiny,mnist --peers chainrule,jax --rounds 15

Every (library, number of threads) lives in its own process. Only the one being timed runs; the others are
stopped by SIGSTOP, because idle thread pools spin. First each contestant's losses and weights are compared
with a float64 trajectory, and one that computes something else is not timed; then the rounds go A B C A B C,
so that a slow spell of the machine hits everybody. README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import problem
from peers.process import PeerError, Process
from timing import HERE, CpuTimes, Peak, Spread, cpu_model, machine, process_cpu, show_time, usable_cpus

PEERS = ("chainrule", "torch", "jax", "sklearn")
QUICK_WORKLOADS = "tiny,small,digits,mnist"
HEAD = (
    *("", "threads", "a step", "min – max", "cores", "of peak", "against base"),
    *("other threads", "loss diff", "weight diff"),
)


@dataclass
class Contestant:
    """One variant of one library with one number of threads, on one workload."""

    process: Process
    variant: str
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

    def sample(self, steps_per_epoch: int) -> None:
        """One timed sample."""
        answer = self.process.ask("sample", variant=self.variant, epochs=self.epochs)
        self.seconds.append(answer["seconds"] / (self.epochs * steps_per_epoch))
        self.cpu.append(answer["cpu_seconds"] / answer["seconds"])


class Race:
    """All contestants on one workload: verify, calibrate, time."""

    def __init__(self, work: problem.Workload, processes: list[Process], folder: Path) -> None:
        self.work = work
        self.contestants: list[Contestant] = []
        self.excluded: dict[str, str] = {}  # name -> why
        self.peaks: dict[int, list[float]] = {}  # threads -> GFLOP/s, one entry a round
        self.clock: list[float] = []
        self.foreign = self.steal = self.passed = 0.0
        path = folder / f"{work.name}.npz"
        progress(f"{work.name}: float64 reference")
        problem.save(work, path)
        for process in processes:
            try:
                process.ask("load", workload=work.name, path=str(path))
            except PeerError as error:
                self.excluded[f"{process.peer}, threads={process.threads}"] = str(error)
                continue
            self.contestants += [Contestant(process, variant) for variant in process.hello["variants"]]
        path.unlink()

    def verify(self) -> None:
        """Build every contestant and compare it with the float64 trajectory; who differs is out."""

        def check(one: Contestant) -> None:
            one.facts = one.process.ask("prepare", variant=one.variant)
            losses, weights = one.facts["loss_difference"], one.facts["weight_difference"]
            most = one.facts["tolerance"]
            if not (losses <= most[0] and weights <= most[1]):  # NaN is out too
                with contextlib.suppress(PeerError):
                    one.process.ask("drop", variant=one.variant)
                raise PeerError(
                    f"computes something else: losses differ by {losses:.1e} (allowed {most[0]:.0e}), "
                    f"weights by {weights:.1e} (allowed {most[1]:.0e})"
                )

        self._each("verifying", check)

    def calibrate(self, seconds: float) -> None:
        """Epochs per sample, so that each takes at least `seconds`."""

        def fill(one: Contestant) -> None:
            one.epochs = one.process.ask("calibrate", variant=one.variant, seconds=seconds)["epochs"]

        self._each("calibrating", fill)

    def round(self, peak: Peak) -> None:
        """One sample of each, the machine's peak first."""
        for threads in sorted({one.process.threads for one in self.contestants} if peak.available else ()):
            measured = peak.measure(threads)
            self.peaks.setdefault(threads, []).append(float(measured["gflops"]))
            self.clock.append(float(measured["ghz"]))
        before, own = CpuTimes.now(), self._own_cpu()
        self._each("timing", lambda one: one.sample(self.work.batches))
        passed, own = CpuTimes.now().since(before), self._own_cpu() - own
        self.passed += passed.total
        self.foreign += max(0.0, passed.busy - own)
        self.steal += passed.steal

    def _own_cpu(self) -> float:
        return process_cpu([os.getpid(), *{one.process.child.pid for one in self.contestants}])

    def _each(self, what: str, action: Callable[[Contestant], None]) -> None:
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

    def ratio(self, one: Contestant) -> Spread:
        """Time over the base's time, round by round: both numbers come from the same spell of the machine."""
        assert self.base is not None
        return Spread.of([a / b for a, b in zip(one.seconds, self.base.seconds, strict=True)])

    def share(self, one: Contestant) -> float | None:
        """Share of the measured FMA peak of as many cores as the contestant was given."""
        if one.process.threads not in self.peaks:
            return None
        peak = Spread.of(self.peaks[one.process.threads]).median * 1e9
        return self.work.flop / one.spread.median / peak

    def record(self) -> dict[str, Any]:
        """Everything, for the result file."""
        rows = [
            {
                "peer": one.process.peer,
                "variant": one.variant,
                "threads": one.process.threads,
                "seconds_per_step": one.seconds,
                "median": one.spread.median,
                "cores_used": Spread.of(one.cpu).median,
                "ratio_to_base": vars(self.ratio(one)),
                "share_of_peak": self.share(one),
                "steps_per_sample": one.epochs * self.work.batches,
                **one.facts,
            }
            for one in sorted(self.contestants, key=lambda one: one.spread.median)
        ]
        return {
            "workload": str(self.work),
            "flop_per_step": self.work.flop,
            "parameters": self.work.parameters,
            "base": self.base.name if self.base else None,
            "rows": rows,
            "excluded": self.excluded,
            "conditions": self.conditions(),
        }

    def conditions(self) -> dict[str, Any]:
        """How quiet the machine was."""
        whole = max(self.passed, 1e-9)
        return {
            "peak_gflops": {str(n): Spread.of(v).median for n, v in self.peaks.items()},
            "clock_ghz": vars(Spread.of(self.clock)) if self.clock else None,
            "foreign_cpu_share": self.foreign / whole,
            "steal_share": self.steal / whole,
        }

    def table(self) -> str:
        """The terminal's view: one line a variant, at its better thread setting."""
        lines = [f"{self.work.name}: {self.work}   ({self.work.flop / 1e6:.3g} MFLOP a step)"]
        lines += ["  " + line for line in align([HEAD, *(self._cells(one) for one in self.best())])]
        notes = {f"  {one.variant}: {one.facts['note']}" for one in self.contestants if one.facts["note"]}
        lines += sorted(notes) + [f"  left out: {name}: {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, "  " + self._conditions_line()])

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
            f"{one.facts['loss_difference']:.0e}",
            f"{one.facts['weight_difference']:.0e}",
        )

    def _conditions_line(self) -> str:
        now = self.conditions()
        peaks = ", ".join(f"{v:.0f} GFLOP/s on {n}" for n, v in sorted(now["peak_gflops"].items()))
        clock = "unknown"
        if now["clock_ghz"]:
            clock = f"{now['clock_ghz']['low']:.2f} – {now['clock_ghz']['high']:.2f} GHz"
        busy = "  THE MACHINE WAS NOT IDLE" if now["foreign_cpu_share"] + now["steal_share"] > 0.05 else ""
        return (
            f"peak {peaks or 'not measured (no C++ compiler)'}; clock {clock}; others used "
            f"{now['foreign_cpu_share']:.1%} of the CPUs, stolen {now['steal_share']:.1%}{busy}"
        )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def progress(text: str) -> None:
    """One line rewritten in place, only on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def start(options: argparse.Namespace, folder: Path) -> tuple[list[Process], dict[str, str]]:
    """A worker for each peer and thread setting, and the peers that cannot be imported, with the reason."""
    processes, missing = [], {}
    for peer in options.peers:
        for count in options.threads:
            progress(f"starting {peer}, threads={count}")
            try:
                process = Process(peer, count, options.python, folder)
            except PeerError as error:
                missing[peer] = str(error)
                continue
            if "missing" in process.hello:
                missing[peer] = process.hello["missing"]
                process.close()
            else:
                processes.append(process)
    progress("")
    return processes, missing


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


def commit() -> str:
    """The commit that was measured, with '+' where files have changed since."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_output() -> Path:
    """bench/results/<date>-<cpu>.json"""
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-{cpu}.json"


def write(path: Path, race: Race, about: dict[str, Any]) -> None:
    """Add one workload to the result file; each entry says by itself when and on what it was measured."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault("workloads", {})[race.work.name] = race.record() | about
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def run(
    options: argparse.Namespace, processes: list[Process], missing: dict[str, str], folder: Path
) -> list[Race]:
    """All workloads, printed and written one by one, so that an interrupted run keeps what it has."""
    versions = {k: v for process in processes for k, v in process.hello["versions"].items()}
    print("  ".join(f"{k} {v}" for k, v in versions.items()))
    for peer, why in missing.items():
        print(f"left out: {peer}: {why}")
    peak = Peak(folder)
    races = []
    for name in options.workloads:
        about = {
            "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions,
            "missing": missing,
        }
        race = Race(problem.WORKLOADS[name], processes, folder)
        race.verify()
        race.calibrate(options.seconds)
        for _ in range(options.rounds):
            race.round(peak)
        progress("")
        print("\n" + race.table(), flush=True)
        if options.output:
            write(options.output, race, about)
        races.append(race)
    return races


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line; lists are comma-separated and checked here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--workloads", help=f"of {', '.join(problem.WORKLOADS)} (default: all)")
    add("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)")
    add("--threads", default=None, help="to try; the best counts (default: 1 and all CPUs)")
    add("--rounds", type=int, default=None, help="samples of each contestant (default: 7)")
    add("--seconds", type=float, default=None, help="least time of a sample (default: 0.3)")
    add("--quick", action="store_true", help="small workloads, 3 rounds of 0.05 s, no result file")
    add("--output", type=Path, help="result file (default: bench/results/<date>-<cpu>.json)")
    add("--python", default=sys.executable, help="interpreter of the workers (default: this one)")
    options = parser.parse_args(arguments)
    every = QUICK_WORKLOADS if options.quick else ",".join(problem.WORKLOADS)
    options.workloads = (options.workloads or every).split(",")
    options.peers = options.peers.split(",")
    options.threads = sorted({int(n) for n in (options.threads or f"1,{usable_cpus()}").split(",")})
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.seconds = options.seconds or (0.05 if options.quick else 0.3)
    for kind, known in (("workloads", problem.WORKLOADS), ("peers", PEERS)):
        unknown = [name for name in getattr(options, kind) if name not in known]
        if unknown:
            parser.error(f"--{kind}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not options.quick:
        options.output = options.output or default_output()
    return options


def main() -> int:
    """Exit status 1 when chainrule was asked for and could not be timed somewhere."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="chainrule-bench-") as folder:
        processes, missing = start(options, Path(folder))
        try:
            races = run(options, processes, missing, Path(folder))
        finally:
            for process in processes:
                process.close()
    print("\n" + summary(races))
    if options.output:
        print(f"\nwritten to {options.output}")
    lost = [*missing, *(name for race in races for name in race.excluded)]
    return 1 if any(name.startswith("chainrule") for name in lost) else 0


if __name__ == "__main__":
    sys.exit(main())
