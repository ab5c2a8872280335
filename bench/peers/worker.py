# SPDX-License-Identifier: MIT
"""One contender library in a process of its own: reads one JSON command a line, answers one JSON line.

    python -m peers.worker <peer> <threads>

The clock runs here, around `run(epochs)` only, so neither the pipe nor the reset to the initial weights is
timed. Every sample starts from the same initial weights: all contenders do the same arithmetic, none drifts
off to denormals or saturated units while another does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any, Protocol, runtime_checkable

import numpy as np

from . import derivatives
from .problem import Workload


class Runner(Protocol):
    """One way of using one library, made per workload; all it needs is resident afterwards."""

    form: str  # how the library is used, in the words of its documentation
    note: str  # where its mathematics differs from the others', or ""
    tolerance: tuple[float, ...]  # largest relative difference from float64 allowed, of each thing compared

    def reset(self) -> None:
        """Back to the initial weights and a fresh optimizer."""

    def run(self, epochs: int) -> None:
        """Do it so many times; returns only when the last result is really there."""


@runtime_checkable
class Preparing(Protocol):
    """One that has something to do before a number of epochs may be timed for the first time."""

    def prepare(self, epochs: int) -> None:
        """Do it; nothing changes."""


class Contender(Runner, Protocol):
    """One way of training; tolerances are of losses and of weights."""

    def losses(self, epochs: int) -> list[float]:
        """Train and return the losses before each update, one per step or one mean per epoch."""

    def parameters(self) -> list[np.ndarray]:
        """Current parameters in the order W0, b0, W1, b1, ... with W of shape (out, in)."""


class Predictor(Runner, Protocol):
    """One way of predicting the rows of one batch; the tolerance is of outputs."""

    def outputs(self) -> np.ndarray:
        """The result of one call, (rows, outputs)."""


class Differentiator(Runner, Protocol):
    """One way to one derivative of one network; the tolerance is of each of its arrays."""

    what: str  # as in derivatives.NAMES

    def arrays(self) -> list[np.ndarray]:
        """The result of one call, in the order and the shapes of derivatives.py."""


def distance(name: str, got: Any, want: np.ndarray) -> float:
    """Largest difference, relative to the root mean square of what is wanted."""
    got = np.asarray(got, dtype=np.float64)
    if got.shape != want.shape:
        raise ValueError(f"{name}: expected shape {want.shape}, got {got.shape}")
    return float(np.abs(got - want).max() / np.sqrt((want**2).mean()))


def output_error(predictor: Predictor, work: Workload, problem: dict[str, np.ndarray]) -> dict[str, float]:
    """Against float64: of the outputs."""
    return {"output_difference": distance("outputs", predictor.outputs(), problem["outputs"])}


def derivative_error(
    contender: Differentiator, work: Workload, problem: dict[str, np.ndarray]
) -> dict[str, float]:
    """Against float64: the worst of all arrays, each relative to its own size."""
    want = derivatives.expected(problem, contender.what)
    pairs = zip(contender.arrays(), want, strict=True)
    return {"derivative_difference": max(distance(contender.what, *pair) for pair in pairs)}


def relative_errors(contender: Contender, work: Workload, problem: dict[str, np.ndarray]) -> dict[str, float]:
    """Against float64: largest relative loss difference; weight difference over the distance travelled."""
    contender.reset()
    got = np.array(contender.losses(work.verify_epochs))
    want = problem["losses"]
    if got.size == work.verify_epochs:
        want = want.reshape(work.verify_epochs, -1).mean(axis=1)
    if got.shape != want.shape:
        raise ValueError(f"losses: expected {want.size}, got {got.size}")
    names = [f"{kind}{k}" for k in range(len(work.sizes) - 1) for kind in "Wb"]
    missed = moved = 0.0
    for name, value in zip(names, contender.parameters(), strict=True):
        end = problem[f"ref_{name}"]
        missed += float(((value.astype(np.float64).reshape(end.shape) - end) ** 2).sum())
        moved += float(((problem[name] - end) ** 2).sum())
    return {
        "loss_difference": float(np.max(np.abs(got - want) / np.abs(want))),
        "weight_difference": float(np.sqrt(missed / moved)),
    }


ERRORS = {
    "variants": relative_errors,
    "mixed": relative_errors,
    "predictors": output_error,
    "derivatives": derivative_error,
}


def sample(contender: Runner, epochs: int) -> dict[str, float]:
    """Seconds of wall clock and of CPU (all threads) for `epochs` epochs from the initial weights."""
    contender.reset()
    if isinstance(contender, Preparing):
        contender.prepare(epochs)
    gc.collect()
    gc.disable()
    try:
        cpu, start = time.process_time(), time.perf_counter()
        contender.run(epochs)
        stop, cpu_stop = time.perf_counter(), time.process_time()
    finally:
        gc.enable()
    return {"seconds": stop - start, "cpu_seconds": cpu_stop - cpu}


def calibrate(contender: Runner, seconds: float) -> int:
    """Epochs that fill `seconds`; warms up caches, compilers and thread pools on the way."""
    epochs = 1
    sample(contender, epochs)
    while True:
        took = sample(contender, epochs)["seconds"]
        if took >= seconds:
            return epochs
        epochs = max(epochs + 1, min(epochs * 20, int(np.ceil(epochs * 1.2 * seconds / max(took, 1e-9)))))


class Worker:
    """State of the process: the peer module, the current problem, the contenders built for it."""

    def __init__(self, peer: str, threads: int) -> None:
        self.module = importlib.import_module(f".{peer}_peer", __package__)
        self.module.configure(threads)
        self.problem: dict[str, np.ndarray] = {}
        self.contenders: dict[str, Runner] = {}
        self.work: Workload | None = None

    def hello(self) -> dict[str, Any]:
        """What this process can run, and with which versions."""
        versions = {"python": sys.version.split()[0], "numpy": np.__version__} | self.module.versions()
        return {"versions": versions} | {kind: list(self._offered(kind)) for kind in ERRORS}

    def _offered(self, kind: str) -> dict[str, Any]:
        """The module's VARIANTS, MIXED, PREDICTORS or DERIVATIVES; what it has none of, it does not offer."""
        return dict(getattr(self.module, kind.upper(), {}))

    def load(self, workload: dict[str, Any], path: str) -> dict[str, Any]:
        """Read a problem and forget the previous one."""
        self.contenders.clear()
        self.work = Workload(**workload | {"sizes": tuple(workload["sizes"])})
        with np.load(path) as arrays:
            self.problem = dict(arrays)
        gc.collect()
        return {}

    def prepare(self, kind: str, variant: str) -> dict[str, Any]:
        """Build (and compile) one contender of one of the kinds in ERRORS and check it against float64."""
        assert self.work is not None
        start = time.perf_counter()
        contender = self._offered(kind)[variant](self.work, self.problem)
        errors = ERRORS[kind](contender, self.work, self.problem)
        self.contenders[variant] = contender
        return errors | {
            "form": contender.form,
            "note": contender.note,
            "tolerance": contender.tolerance,
            "prepare_seconds": time.perf_counter() - start,
        }

    def calibrate(self, variant: str, seconds: float) -> dict[str, Any]:
        """Epochs per sample."""
        return {"epochs": calibrate(self.contenders[variant], seconds)}

    def sample(self, variant: str, epochs: int) -> dict[str, Any]:
        """One timed sample."""
        return dict(sample(self.contenders[variant], epochs))

    def drop(self, variant: str) -> dict[str, Any]:
        """Free one contender (its losses were wrong, or the workload is over)."""
        self.contenders.pop(variant, None)
        return {}


def die_with_parent() -> None:
    """A stopped worker cannot notice that its parent was killed; Linux can end it for us."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Serve commands until the pipe closes."""
    die_with_parent()
    # Libraries may print: keep the real stdout for answers and send everything else to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        worker = Worker(sys.argv[1], int(sys.argv[2]))
        answers.write(json.dumps(worker.hello()) + "\n")
    except ImportError as missing:
        answers.write(json.dumps({"missing": str(missing)}) + "\n")
        return
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
