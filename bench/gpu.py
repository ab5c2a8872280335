#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""chainrule on a GPU beside PyTorch and JAX: builds, checks, times and judges in one call of ten minutes.

    python bench/gpu.py                                # needs an NVIDIA GPU; and nvcc where nothing is built
    python bench/gpu.py --workloads small,mnist --no-check
    CHAINRULE_CUDA_MODULE=_cuda.so python bench/gpu.py --dry-run           # the script itself, without a GPU

Each workload has its share of the time; contestants are verified against float64 before they are timed, in
rounds A B C A B C (race.py). A rival that fails or is late is named with its error, and the rest goes on.
The rivals are PyTorch eager, compiled, in one CUDA graph an epoch, and both, and JAX jitted a step and in one
scan. The file of results is written again after each workload.

A sample of chainrule's `fit` includes what a fit begins with: data to the GPU, a snapshot, the capture of
graphs. The rivals' data lie there already. The file also has the steady state of our fit, a sample less one
of half its epochs (`steady_seconds_per_step`); nothing is judged by it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import command
from gpu_setup import (
    LEAST_WARMING,
    Gpu,
    build,
    check,
    find_nvcc,
    keep_caches,
    measured_gpu,
    missing,
    warming,
)
from peers import problem
from peers import process as processes
from peers.process import PeerError
from predict import Prediction
from race import Contestant, Race, Workers, exit_status, started
from report import about, align, progress, write_json
from timing import HERE, show_time

# Each way of training has a process of its own: one that hangs takes no other with it. In the order in which
# they are verified, those without a compiler first.
PEERS = (
    "chainrule_gpu",
    "chainrule_step_gpu",
    "torch_gpu",
    "torch_graph_gpu",
    "jax_gpu",
    "jax_scan_gpu",
    "torch_compiled_gpu",
    "torch_compiled_graph_gpu",
)
ONE = (
    "chainrule fit",
    "torch eager",
    "torch.compile",
    "torch graph",
    "torch compiled graph",
    "jax.jit",
    "jax lax.scan",
)
MANY = ("chainrule fit_many", "torch vmap graph", "torch compiled vmap graph", "jax lax.scan")
LONGEST_WAIT = 100.0  # seconds for one answer; compilers are slow
LEAST_WAIT, LEAST_OWN_WAIT = 4.0, 20.0  # even when its time has passed: for a rival, and for chainrule
OVERTIME = 20.0  # seconds after the last workload's end, when the run ends itself
# Shares of a workload's time, from the start of its processes: until when they must be there, rivals should
# be verified, and calibrated, for what is left is the rounds'; and when a rival that is not is refused.
STARTED, VERIFIED, CALIBRATED, REFUSED = 0.4, 0.6, 0.8, 0.9
# How much of the time for verification a rival has to itself before the next one begins beside it. XLA
# chooses kernels by timing them, and would keep bad ones if others used the GPU; those it finds on the disk
# were chosen while nvcc ran and little else used the GPU. Inductor times little more than launch sizes.
ALONE = {"jax_gpu": 0.2, "jax_scan_gpu": 0.2}
ALONE_OTHERS = 0.05
RIVALS_SECONDS = 1.0  # a rival's sample needs no more: it begins with its first step


class Goal(NamedTuple):
    """What a workload must show; 0 asks for nothing."""

    work: problem.Workload
    variants: tuple[str, ...]
    faster: float = 0.0  # times than the fastest rival
    share: float = 0.0  # of what the GPU can do
    seconds: float = 0.3  # least time of a sample; a fit begins with copies that a short one would be full of
    time: float = 1.0  # its share of the run, beside the others'
    against: str = ""  # rivals whose names begin so; "" is all


def _workload(name: str, sizes: tuple[int, ...], loss: str, lr: float, batch: int, batches: int, epochs: int,
              **more: Any) -> problem.Workload:  # fmt: skip
    return problem.Workload(name, sizes, "relu", loss, "adam", lr, batch, batches, epochs, **more)


SMALL, MID = (8, 64, 64, 1), (256, 1024, 1024, 1024, 64)
ROWS = 1_000_000
GOALS = {
    goal.work.name: goal
    for goal in (
        Goal(
            _workload("small", SMALL, "least_squares", 1e-3, 32, 64, 3),
            (*ONE, "chainrule train_step", "chainrule fit in one block"),
            5,
        ),
        Goal(
            _workload("many", SMALL, "least_squares", 1e-3, 32, 64, 3, networks=264),
            MANY,
            5,
            seconds=1.0,  # 264 trainers are made for each sample
            against="torch",
        ),
        Goal(_workload("mnist", (784, 256, 128, 10), "cross_entropy", 3e-4, 128, 32, 3), ONE, 2),
        Goal(_workload("mid", MID, "mse", 1e-4, 1024, 4, 3, precision="bfloat16"), ONE, 1.5, seconds=1.0),
        Goal(
            _workload("wide", (4096,) * 4, "mse", 1e-5, 4096, 1, 2, precision="bfloat16"),
            ONE,
            1.05,
            0.8,
            seconds=3.0,
            time=2.0,
        ),
        Goal(_workload("predict", (64, 64, 64, 1), "mse", 0.1, ROWS, 1, 1), (), share=0.7),
        Goal(_workload("mid float32", MID, "mse", 1e-4, 1024, 4, 3), ONE),
        Goal(_workload("mid tf32", MID, "mse", 1e-4, 1024, 4, 3, precision="tf32"), ONE),
    )
}


NO_CPU_PEAK = argparse.Namespace(available=False)


class Window:
    """The time of one workload, the start of its processes included."""

    def __init__(self, seconds: float) -> None:
        self.begin, self.seconds = time.monotonic(), seconds

    def left(self, share: float = 1.0) -> float:
        """Seconds until so much of it has passed; negative afterwards."""
        return self.begin + share * self.seconds - time.monotonic()


def ours(one: Contestant) -> bool:
    """Whether it is chainrule."""
    return one.process.peer.startswith("chainrule")


class Judged(Race):
    """A race with a deadline and a goal. A late rival costs neither chainrule nor another rival its place."""

    def __init__(self, goal: Goal, workers: Workers, gpu: Gpu, window: Window, made: Path) -> None:
        self.goal, self.gpu, self.window = goal, gpu, window
        self.spent: dict[str, float] = {}  # seconds of the window when each phase was over
        self.steady: list[float] = []  # of our fit, per step, one entry a round
        super().__init__(goal.work, workers, goal.variants or None, made)
        self.phase("started")

    def phase(self, name: str) -> None:
        """It is over."""
        self.spent[name] = round(self.window.seconds - self.window.left(), 1)

    def patience(self, one: Contestant, share: float, most: float = LONGEST_WAIT) -> float:
        """Seconds that an answer may take: until that share of the window has passed, and `most`.

        A few are given when it has passed already, and more to chainrule, without which nothing is judged.
        """
        least = LEAST_OWN_WAIT if ours(one) else LEAST_WAIT
        return min(LONGEST_WAIT, max(least, min(most, self.window.left(share))))

    def each(self, what: str, action: Callable[[Contestant], None]) -> None:
        """As in a race; nobody is waited for much longer than a sample takes."""

        def in_time(one: Contestant) -> None:
            one.process.reply_seconds = self.patience(one, 1.0, 5.0 + 10.0 * self.goal.seconds)
            action(one)

        super().each(what, in_time)

    def prepare(self, seconds: float) -> None:
        """Verified beside each other, for that is their compilers' time; timed one after the other."""
        self.verify()
        self.phase("verified")
        self.each("calibrating", lambda one: self.calibrate(one, seconds))
        self.phase("calibrated")

    def verify(self) -> None:
        """Who computes something else, or needs too long, is left out."""
        progress(f"{self.work.name}: verifying")
        late: dict[str, str] = {}

        def verified(one: Contestant) -> None:
            one.process.reply_seconds = self.patience(one, CALIBRATED if ours(one) else VERIFIED)
            try:
                one.verify()
            except Exception as error:  # whatever it is, it is this contestant's alone
                late[one.name] = str(error) if isinstance(error, PeerError) else repr(error)

        span, threads = max(0.0, self.window.left(VERIFIED)), []
        for one in self.contestants:
            threads.append(threading.Thread(target=verified, args=(one,), daemon=True))
            threads[-1].start()
            threads[-1].join(None if ours(one) else span * ALONE.get(one.process.peer, ALONE_OTHERS))
        for thread in threads:
            thread.join()
        self.contestants = [one for one in self.contestants if one.name not in late]
        self.excluded |= late

    def calibrate(self, one: Contestant, seconds: float) -> None:
        """A rival may take nearly twice its share of what is left for this; chainrule is never refused."""
        if ours(one):
            one.calibrate(seconds)
            return
        if self.window.left(REFUSED) <= 0:
            raise PeerError("the workload's time was spent")
        left = self.window.left(CALIBRATED)
        waiting = sum(not ours(other) and not other.epochs for other in self.contestants)
        one.process.reply_seconds = self.patience(one, CALIBRATED, 2 * left / (waiting + 1))
        one.calibrate(min(seconds, RIVALS_SECONDS))

    def run(self, options: argparse.Namespace, peak: Any = NO_CPU_PEAK) -> None:
        """As many of the rounds as there is time for, at least one."""
        self.prepare(min(options.seconds or self.goal.seconds, self.goal.seconds))
        for _ in range(options.rounds):
            start = time.monotonic()
            self.round(peak)
            if 1.2 * (time.monotonic() - start) > self.window.left():
                break
        self.phase("timed")
        progress("")
        print("\n" + self.table(), flush=True)

    def round(self, peak: Any) -> None:
        """And a sample of half the epochs of our fit, for its steady state."""
        super().round(peak)
        for one in self.contestants:
            if one.variant.startswith("chainrule fit") and one.epochs > 1:
                with contextlib.suppress(PeerError):
                    self.steady.append(self.steady_sample(one))

    def steady_sample(self, one: Contestant) -> float:
        """Seconds of a step without what a fit begins with: the last sample less one of half its epochs."""
        half, steps = one.epochs // 2, self.work.batches
        short = one.process.ask("sample", variant=one.variant, epochs=half)["seconds"]
        return float(one.seconds[-1] * one.epochs * steps - short) / ((one.epochs - half) * steps)

    # ---- judgement ----

    def floor(self) -> float:
        """Seconds that the work takes at least on this GPU: operations, or bytes in and out; 0 if unknown."""
        if not self.gpu.copy:
            return 0.0
        return max(self.flop / self.gpu.products[self.work.precision], self.bytes / self.gpu.copy)

    @property
    def bytes(self) -> int:
        """Adam's: gradients and copies aside, weights and two moments are read and written."""
        return 24 * self.work.parameters * self.work.networks

    def share(self, one: Contestant) -> float | None:
        """Of what the GPU can do."""
        return self.floor() / one.spread.median if self.floor() else None

    def faster(self) -> float | None:
        """How many times the fastest rival's time is ours."""
        if not self.base or not ours(self.base):
            return None
        rivals = [
            one for one in self.contestants if not ours(one) and one.variant.startswith(self.goal.against)
        ]
        return min((self.ratio(one).median for one in rivals), default=None)

    @property
    def base(self) -> Contestant | None:
        """chainrule's fastest, or whoever is."""
        candidates = [one for one in self.contestants if ours(one)] or self.contestants
        return min(candidates, key=lambda one: one.spread.median, default=None)

    def verdict(self) -> dict[str, Any]:
        """Goals, what was reached, and whether that is enough; None where there is nothing to judge."""
        faster = self.faster()
        share = self.share(self.base) if self.base and ours(self.base) else None
        pairs = [(goal, got) for goal, got in ((self.goal.faster, faster), (self.goal.share, share)) if goal]
        met = all(got is not None and got >= goal for goal, got in pairs) if pairs else None
        goals = {
            "goal_faster": self.goal.faster,
            "goal_share": self.goal.share,
            "against": self.goal.against or "all",
        }
        without = [name for name in self.excluded if "chainrule" not in name] if self.goal.faster else []
        return goals | {"faster": faster, "share": share, "met": met, "without": without}

    def conditions(self) -> dict[str, Any]:
        """With what the GPU can do, and where the workload's time went."""
        gpu = {"gpu": self.gpu._asdict(), "floor_seconds": self.floor()}
        return (
            super().conditions() | gpu | {"window_seconds": self.window.seconds, "spent_seconds": self.spent}
        )

    def conditions_line(self) -> str:
        """The GPU's peak in this precision, the copy, and who else used the machine."""
        if not self.gpu.copy:
            return f"the GPU's peak is not known; {self.neighbours}"
        peak, copy = self.gpu.products[self.work.precision], self.gpu.copy
        return f"{self.gpu.name}: {peak / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s; {self.neighbours}"

    def row(self, one: Contestant) -> dict[str, Any]:
        """With the steady state of our fit."""
        steady = {"steady_seconds_per_step": self.steady} if one.variant.startswith("chainrule fit") else {}
        return super().row(one) | steady

    def record(self) -> dict[str, Any]:
        """With the verdict."""
        return super().record() | self.verdict()


class JudgedPrediction(Judged, Prediction):
    """Forward passes over all rows."""

    @property
    def bytes(self) -> int:
        """Rows in, outputs out."""
        return 4 * self.work.batch * (self.work.sizes[0] + self.work.sizes[-1])

    @property
    def flop(self) -> int:
        """2 B Σ n n′"""
        return 2 * self.work.batch * sum(i * o for i, o in pairwise(self.work.sizes))


def kind(goal: Goal) -> type[Judged]:
    """Training, or forward passes."""
    return Judged if goal.variants else JudgedPrediction


def shrunk(goal: Goal) -> Goal:
    """A few small steps of it, for a dry run."""
    work = goal.work
    return goal._replace(
        work=dataclasses.replace(
            work, sizes=tuple(min(n, 24) for n in work.sizes), batch=min(work.batch, 40),
            batches=min(work.batches, 2), verify_epochs=1, networks=min(work.networks, 3),
        ),
        seconds=0.01,
    )  # fmt: skip


class Problems:
    """Every workload's problem, made while the engine is built: "wide" takes a minute of NumPy's.

    Within its window that would be the rivals' time, who would then be refused.
    """

    def __init__(self, goals: list[Goal], folder: Path) -> None:
        self.paths = {goal.work.name: folder / f"{goal.work.name}.npz" for goal in goals}
        self.made: dict[str, Future[None]] = {name: Future() for name in self.paths}
        threading.Thread(target=self._make, args=(goals,), daemon=True).start()

    def _make(self, goals: list[Goal]) -> None:
        for goal in goals:
            name = goal.work.name
            try:
                problem.save(kind(goal).make(goal.work), self.paths[name])
                self.made[name].set_result(None)
            except Exception as error:  # of that workload alone
                self.made[name].set_exception(error)

    def path(self, goal: Goal) -> Path:
        """Of a file that is there."""
        self.made[goal.work.name].result()
        return self.paths[goal.work.name]


# ------------------------------------------------------------ the whole run


class Stopped(BaseException):
    """By the machine, or by the run's own alarm; not an Exception, for it is no workload's failure."""


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what is being ended must not be interrupted again."""
    for name in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(name, signal.SIG_IGN)
    raise Stopped(signal.Signals(number).name)


class Results:
    """The result file, written again after everything found: whoever ends the run leaves what is finished."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.head: dict[str, Any] = {}
        self.workloads: dict[str, dict[str, Any]] = {}

    def add(self, **found: Any) -> None:
        """Something about the whole run."""
        self.head |= found
        self.write()

    def workload(self, name: str, record: dict[str, Any]) -> None:
        """One more."""
        self.workloads[name] = record
        self.write()

    def write(self) -> None:
        """Where there is a file; it is named after the GPU where nobody has named it."""
        if self.path:
            write_json(self.path, {**self.head, "workloads": self.workloads})


def race(
    goal: Goal, options: argparse.Namespace, gpu: Gpu, seconds: float, made: Path
) -> tuple[Workers, Judged]:
    """One workload, with processes of its own: an error of CUDA's ends with the process that made it."""
    window = Window(seconds)
    processes.REPLY_SECONDS = min(LONGEST_WAIT, STARTED * seconds)
    with started(options.peers, options) as workers:
        judged = kind(goal)(goal, workers, gpu, window, made)
        judged.run(options)
        return workers, judged


def summary(races: list[Judged]) -> str:
    """One line a workload: time, fastest rival, ratio, goal, share of the GPU, goal."""
    rows = [["workload", "chainrule", "times faster", "goal", "of the GPU", "goal", "met", "without"]]
    for judged in races:
        got = judged.verdict()
        faster, share = got["faster"], got["share"]
        base = judged.base if judged.base and ours(judged.base) else None
        than = f" than {judged.goal.against}" if judged.goal.against else ""
        rows.append([
            judged.work.name,
            show_time(base.spread.median) if base else "-",
            f"{faster:.2f}{than}" if faster is not None else "-",
            f"{judged.goal.faster:g}" if judged.goal.faster else "",
            f"{share:.0%}" if share is not None else "-",
            f"{judged.goal.share:.0%}" if judged.goal.share else "",
            {None: "", True: "yes", False: "NO"}[got["met"]],
            ", ".join(name.partition(",")[0] for name in got["without"]),
        ])  # fmt: skip
    return "\n".join(align(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = command.parser(__doc__ or "")
    command.add_workloads(parser, GOALS, ",".join(GOALS), "small,mnist")
    command.add_peers(parser, PEERS)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--seconds", type=float, help="least time of a sample, at most the workload's own")
    parser.add_argument("--no-check", action="store_true", help="without the tests")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny workloads, rivals on the CPU, written only to --output"
    )
    options = parser.parse_args()
    judged = [name for name, goal in GOALS.items() if goal.faster or goal.share]
    options.workloads = options.workloads or judged
    options.threads = options.threads[-1:]
    return options


def prepared(options: argparse.Namespace, goals: list[Goal], end: float, results: Results) -> None:
    """The engine built where it is missing, and checked; rivals' caches warm."""
    if options.dry_run:
        os.environ["CHAINRULE_BENCH_DEVICE"] = "cpu"
    left = end - time.monotonic()
    asked = [("variants" if goal.variants else "predictors", goal.work, goal.variants) for goal in goals]
    with warming(options.python, options.peers, asked, min(LEAST_WARMING, 0.2 * left)) as warmed:
        built(min(240.0, left), results)
    for name, lines in warmed.items():
        done = sum(line.endswith(" s") and line.startswith("warm: ") for line in lines)
        print(
            f"warm-up of {name}: {done} programs",
            *(line for line in lines if not line.endswith(" s")),
            sep="; ",
        )
    results.add(warm_up=warmed)
    if not (options.no_check or options.dry_run):
        progress("checking")
        text = check(min(100.0, 0.25 * (end - time.monotonic())))
        print(f"check: {text}")
        results.add(check=text)


def built(seconds: float, results: Results) -> None:
    """The engine, unless it can be used already."""
    why = missing(60.0)
    if not why:
        return
    print(f"no GPU is usable yet: {why}")
    nvcc = find_nvcc()
    print(f"nvcc: {nvcc}")
    progress("building")
    text = build(seconds) or "built here"
    print(f"build: {text}")
    results.add(nvcc=nvcc, build=text)
    if why := missing(60.0):
        results.add(error=f"no GPU is usable: {why}")
        raise SystemExit(f"no GPU is usable, nothing was timed: {why}")


def result_file(gpu: Gpu) -> Path:
    """bench/results/<date>-<gpu>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-{name}.json"


def timed(
    options: argparse.Namespace,
    goals: list[Goal],
    problems: Problems,
    end: float,
    results: Results,
    races: list[Judged],
) -> None:
    """All workloads; each has its share of the time that is left. Those that are finished are in `races`."""
    gpu = (
        Gpu("none", {}, 0.0) if options.dry_run else measured_gpu(min(150.0, 0.3 * (end - time.monotonic())))
    )
    if not options.dry_run:
        results.path = results.path or result_file(gpu)
    results.add(gpu=gpu._asdict())
    for place, goal in enumerate(goals):
        name = goal.work.name
        try:
            made = problems.path(goal)
            left = end - time.monotonic()
            if left < 5:
                raise TimeoutError("no time was left")
            seconds = left * goal.time / sum(other.time for other in goals[place:])
            workers, judged = race(goal, options, gpu, seconds, made)
            record = judged.record() | about(workers.versions, workers.missing)
            record["failed"] = bool(exit_status(workers, [judged]))
            races.append(judged)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            record = {"error": repr(error), "failed": True}
        results.workload(name, record)


def main() -> int:
    """Exit status 1 when a goal was not met, or chainrule could not be timed somewhere."""
    options = parse()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a killed run has said what it knew
    end = time.monotonic() + 60 * options.minutes
    for name in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(name, stop)
    signal.alarm(int(60 * options.minutes + OVERTIME))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    keep_caches()
    results = Results(options.output)
    goals = [shrunk(GOALS[name]) if options.dry_run else GOALS[name] for name in options.workloads]
    races: list[Judged] = []
    with tempfile.TemporaryDirectory(prefix="chainrule-bench-", ignore_cleanup_errors=True) as folder:
        problems = Problems(goals, Path(folder))
        try:
            prepared(options, goals, end, results)
            timed(options, goals, problems, end, results, races)
        except Stopped as why:
            print(f"\nstopped by {why} after {len(results.workloads)} workloads")
            results.add(stopped=str(why))
    if races:
        print("\n" + summary(races))
    if results.path:
        print(f"\nwritten to {results.path}")
    failed = len(races) < len(goals) or any(record["failed"] for record in results.workloads.values())
    missed = not options.dry_run and any(judged.verdict()["met"] is False for judged in races)
    return int(failed or missed)


if __name__ == "__main__":
    sys.exit(main())
