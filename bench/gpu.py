#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""chainrule on a GPU beside PyTorch and JAX: builds, checks, times and judges in one call of ten minutes.

    python bench/gpu.py                                # needs an NVIDIA GPU; and nvcc where nothing is built
    python bench/gpu.py --workloads small,mnist --no-check
    CHAINRULE_CUDA_MODULE=_cuda.so python bench/gpu.py --dry-run           # the script itself, without a GPU

Each workload has its share of the time; contestants are verified against float64 before they are timed, in
rounds A B C A B C (race.py). A rival that fails is named with its error, and the rest goes on. The rivals are
PyTorch eager, compiled, in one CUDA graph an epoch, and both, and JAX jitted a step and in one scan.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import command
from peers import problem
from peers import process as processes
from peers.process import PeerError
from predict import Prediction
from race import Contestant, Race, Workers, exit_status, started
from report import about, align, progress, write_json
from timing import HERE, ask_python, show_time

ROOT = HERE.parent
PEERS = (
    "chainrule_gpu",
    "torch_gpu",
    "torch_compiled_gpu",
    "torch_graph_gpu",
    "torch_compiled_graph_gpu",
    "jax_gpu",
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


class Goal(NamedTuple):
    """What a workload must show; 0 asks for nothing."""

    work: problem.Workload
    variants: tuple[str, ...]
    faster: float = 0.0  # times than the fastest rival
    share: float = 0.0  # of what the GPU can do
    seconds: float = 0.3  # least time of a sample; a fit begins with copies that no step pays for
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
        Goal(_workload("small", SMALL, "least_squares", 1e-3, 32, 64, 3), (*ONE, "chainrule train_step"), 5),
        Goal(
            _workload("many", SMALL, "least_squares", 1e-3, 32, 64, 3, networks=264),
            MANY,
            5,
            seconds=1.0,
            against="torch",  # 264 trainers are made for each sample
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


class Gpu(NamedTuple):
    """Its name, and what it can do: FLOP/s by precision, bytes/s of a copy; empty and 0 if not measured."""

    name: str
    products: dict[str, float]
    copy: float


NO_CPU_PEAK = argparse.Namespace(available=False)


class Judged(Race):
    """A race with a deadline and a goal."""

    def __init__(self, goal: Goal, workers: Workers, gpu: Gpu, seconds: float) -> None:
        self.goal, self.gpu = goal, gpu
        self.deadline = time.monotonic() + seconds
        self.last_check = (
            self.deadline - 0.4 * seconds
        )  # a slow compiler must not take the time of the timings
        super().__init__(goal.work, workers, goal.variants or None)

    def each(self, what: str, action: Callable[[Contestant], None]) -> None:
        """As in a race; nobody's compiler is waited for when others must be timed."""

        def in_time(one: Contestant) -> None:
            left = self.last_check - time.monotonic()
            if what == "calibrating" and left < 1:
                raise PeerError("the workload's time was spent")
            one.process.reply_seconds = LONGEST_WAIT
            action(one)

        super().each(what, in_time)

    def prepare(self, seconds: float) -> None:
        """Verified at once, for that is their compilers' time; timed one after the other."""
        self.verify()
        self.each("calibrating", lambda one: one.calibrate(seconds))

    def verify(self) -> None:
        """Who computes something else, or needs too long, is left out."""
        progress(f"{self.work.name}: verifying")
        late: dict[str, str] = {}

        def of_process(own: list[Contestant]) -> None:
            for one in own:
                one.process.reply_seconds = max(1.0, self.last_check - time.monotonic())
                try:
                    one.verify()
                except PeerError as error:
                    late[one.name] = str(error)

        by_process: dict[int, list[Contestant]] = {}
        for one in self.contestants:
            by_process.setdefault(one.process.child.pid, []).append(one)
        with ThreadPoolExecutor(max(1, len(by_process))) as pool:
            list(pool.map(of_process, by_process.values()))
        self.contestants = [one for one in self.contestants if one.name not in late]
        self.excluded |= late

    def run(self, options: argparse.Namespace, peak: Any = NO_CPU_PEAK) -> None:
        """As many of the rounds as there is time for, at least one."""
        self.prepare(min(options.seconds or self.goal.seconds, self.goal.seconds))
        for done in range(options.rounds):
            start = time.monotonic()
            self.round(peak)
            took = time.monotonic() - start
            if done and time.monotonic() + 1.2 * took > self.deadline:
                break
        progress("")
        print("\n" + self.table(), flush=True)

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
        rivals = [
            one for one in self.contestants
            if one.process.peer != "chainrule_gpu" and one.variant.startswith(self.goal.against)
        ]  # fmt: skip
        if not rivals or not any(one.process.peer == "chainrule_gpu" for one in self.contestants):
            return None
        return min(self.ratio(one).median for one in rivals)

    @property
    def base(self) -> Contestant | None:
        """chainrule's fastest, or whoever is."""
        ours = [one for one in self.contestants if one.process.peer == "chainrule_gpu"]
        return min(ours or self.contestants, key=lambda one: one.spread.median, default=None)

    def verdict(self) -> dict[str, Any]:
        """Goals, what was reached, and whether that is enough; None where there is nothing to judge."""
        faster = self.faster()
        share = self.share(self.base) if self.base and self.base.process.peer == "chainrule_gpu" else None
        pairs = [(goal, got) for goal, got in ((self.goal.faster, faster), (self.goal.share, share)) if goal]
        met = all(got is not None and got >= goal for goal, got in pairs) if pairs else None
        goals = {"goal_faster": self.goal.faster, "goal_share": self.goal.share}
        without = [name for name in self.excluded if "chainrule" not in name] if self.goal.faster else []
        return goals | {"faster": faster, "share": share, "met": met, "without": without}

    def conditions(self) -> dict[str, Any]:
        """With what the GPU can do."""
        return super().conditions() | {"gpu": self.gpu._asdict(), "floor_seconds": self.floor()}

    def conditions_line(self) -> str:
        """The GPU's peak in this precision, the copy, and who else used the machine."""
        if not self.gpu.copy:
            return f"the GPU's peak is not known; {self.neighbours}"
        peak, copy = self.gpu.products[self.work.precision], self.gpu.copy
        return f"{self.gpu.name}: {peak / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s; {self.neighbours}"

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


# ------------------------------------------------------------ build and check


def usable() -> int:
    """How many GPUs the chainrule that would be imported can use; 0 as well where there is none."""
    if "CHAINRULE_CUDA_MODULE" in os.environ:
        return 1
    code = "from chainrule import devices; print(devices.count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    return int(done.stdout) if done.returncode == 0 else 0


def build(seconds: float) -> str:
    """Install this tree with the GPU's engine into build/gpu, without network; what went wrong, or ""."""
    place = ROOT / "build" / "gpu"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target", str(place)]
    call = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        "-C",
        "cmake.define.CHAINRULE_CUDA=ON",
        "-C",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES=native",  # a third of the compiler's time
        str(ROOT),
    ]
    return _failure(call, seconds)


def check(seconds: float) -> str:
    """The GPU's tests; their last words."""
    call = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "--maxfail=30",
        "--tb=line",
        "tests/test_cuda.py",
    ]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired as late:
        words = bytes(late.stdout or b"").decode(errors="replace").strip()
        return f"not through in {seconds:.0f} s; the last words: {words[-300:]}"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "\n".join([line for line in lines if line.startswith("FAILED")] + lines[-1:])


def _failure(call: list[str], seconds: float) -> str:
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"{call[2]} took more than {seconds:.0f} s"
    return "" if done.returncode == 0 else "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])


def measured_gpu() -> Gpu:
    """By PyTorch; unknown without."""
    try:
        return Gpu(**{"name" if k == "gpu" else k: v for k, v in ask_python("peers.gpu_peak").items()})
    except (subprocess.SubprocessError, OSError) as error:
        print(f"the GPU's peaks were not measured: {error}")
        return Gpu("gpu", {}, 0.0)


# ------------------------------------------------------------ the whole run


def race(goal: Goal, options: argparse.Namespace, gpu: Gpu, seconds: float) -> tuple[Workers, Judged]:
    """One workload, with processes of its own: an error of CUDA's ends with the process that made it."""
    with started(options.peers, options) as workers:
        kind = Judged if goal.variants else JudgedPrediction
        judged = kind(goal, workers, gpu, seconds)
        judged.run(options)
        return workers, judged


def summary(races: list[Judged]) -> str:
    """One line a workload: time, fastest rival, ratio, goal, share of the GPU, goal."""
    rows = [["workload", "chainrule", "times faster", "goal", "of the GPU", "goal", "met", "without"]]
    for judged in races:
        got = judged.verdict()
        faster, share = got["faster"], got["share"]
        ours = judged.base if judged.base and judged.base.process.peer == "chainrule_gpu" else None
        rows.append([
            judged.work.name,
            show_time(ours.spread.median) if ours else "-",
            f"{faster:.2f}" if faster is not None else "-",
            f"{judged.goal.faster:g}" if judged.goal.faster else "",
            f"{share:.0%}" if share is not None else "-",
            f"{judged.goal.share:.0%}" if judged.goal.share else "",
            {None: "", True: "yes", False: "NO"}[got["met"]],
            ", ".join(got["without"]),
        ])  # fmt: skip
    return "\n".join(align(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = command.parser(__doc__ or "")
    command.add_workloads(parser, GOALS, ",".join(GOALS), "small,mnist")
    command.add_peers(parser, PEERS)
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: 9.5)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--seconds", type=float, help="least time of a sample, at most the workload's own")
    parser.add_argument("--no-check", action="store_true", help="without the tests")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny workloads, rivals on the CPU, nothing written"
    )
    options = parser.parse_args()
    judged = [name for name, goal in GOALS.items() if goal.faster or goal.share]
    options.workloads = options.workloads or judged
    options.threads = options.threads[-1:]
    return options


def prepared(options: argparse.Namespace, end: float) -> dict[str, Any]:
    """The engine built where it is missing, and checked; what came of it."""
    if options.dry_run:
        os.environ["CHAINRULE_BENCH_DEVICE"] = "cpu"
        return {}
    found: dict[str, Any] = {}
    if not usable():
        progress("building")
        found["build"] = build(min(240.0, end - time.monotonic())) or "built here"
        print(f"build: {found['build']}")
        if not usable():
            raise SystemExit("no GPU is usable, nothing was timed")
    if not options.no_check:
        progress("checking")
        found["check"] = check(min(100.0, 0.25 * (end - time.monotonic())))
        print(f"check: {found['check']}")
    return found


def result_file(gpu: Gpu) -> Path:
    """bench/results/<date>-<gpu>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-{name}.json"


def main() -> int:
    """Exit status 1 when a goal was not met, or chainrule could not be timed somewhere."""
    options = parse()
    end = time.monotonic() + 60 * options.minutes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    processes.REPLY_SECONDS = LONGEST_WAIT
    found = prepared(options, end)
    gpu = Gpu("none", {}, 0.0) if options.dry_run else measured_gpu()
    output = options.output or result_file(gpu)
    races, status, results = [], 0, {"gpu": gpu._asdict(), **found, "workloads": {}}
    for place, name in enumerate(options.workloads):
        goal = shrunk(GOALS[name]) if options.dry_run else GOALS[name]
        shares = [GOALS[other].time for other in options.workloads[place:]]
        seconds = (end - time.monotonic()) * shares[0] / sum(shares)
        try:
            workers, judged = race(goal, options, gpu, seconds)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            results["workloads"][name], status = {"error": repr(error)}, 1
            continue
        races.append(judged)
        status |= exit_status(workers, [judged])
        results["workloads"][name] = judged.record() | about(workers.versions, workers.missing)
        if not options.dry_run:
            write_json(output, results)
    print("\n" + summary(races))
    if not options.dry_run:
        print(f"\nwritten to {output}")
    missed = not options.dry_run and any(judged.verdict()["met"] is False for judged in races)
    return int(status or missed)


if __name__ == "__main__":
    sys.exit(main())
