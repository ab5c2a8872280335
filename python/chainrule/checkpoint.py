# SPDX-License-Identifier: MIT
"""Checkpoints: a `fit` that was interrupted goes on from its file, to the bits of one that was not.

A file is a network as `save` writes it, of the end of an epoch, which `load` reads; and what else the fit has
come to, in arrays whose names begin with "run." and in JSON under the metadata key "chainrule.run": the
optimizer's state, the history, the best weights of EarlyStopping. There is no generator to keep: the order of
rows is drawn from (seed, epoch), dropout from (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from . import devices, io
from .training import Data, EarlyStopping, Plan, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Sequential

    Arrays = dict[str, NDArray[Any]]

FORMAT = 1  # of the JSON, whose fields are these
FIELDS = {"format": int, "terms": dict, "step": int, "lr": float | None, "stopped": int | None}
PAUSE = 1.0  # seconds from one file to the next, at least
SHARE = 0.05  # of the time may go into writing them


class Checkpoint:
    """The file of one fit: read at its beginning if there is one, written between its epochs.

    Raises, before anything is changed: ValueError for a file that is damaged, or of another fit; TypeError
        for a layer of your own without config(); OSError.
    """

    def __init__(self, path: Any, net: Sequential, run: Run) -> None:
        io.require_suffix("fit", path)
        self.path, self.due = os.fsdecode(path), 0.0
        self.net, self.network = net, io.architecture_text(net)
        self.terms = _terms(run.plan)
        self.stops = [stop for stop in run.plan.callbacks.all if isinstance(stop, EarlyStopping)]
        self.found = self._read(run) if os.path.exists(path) else None

    # -------------------------------------------------------- going on

    def begin(self, run: Run) -> None:
        """Put the fit to where its file says; write a first file where there is none."""
        if self.found is None:
            self._write(run)  # now: a folder that cannot be written to is no surprise for the end of an hour
            return
        arrays, document = self.found
        if document["lr"] is not None:
            run.plan.optimizer.lr = document["lr"]
        history = {name: arrays[f"run.history.{name}"].tolist() for name in run.history}
        for k, stop in enumerate(self.stops):
            _put(self.net, arrays, f"run.best.{k}.")
            stop.resume(history[stop.monitor])
        _put(self.net, arrays, "")
        slots = [arrays[name] for name in _slots(run)]
        run.plan.optimizer.load_state_dict(self.net, {"step": document["step"], "slots": slots})
        run.go_on(history, document["stopped"])
        self.found = None

    def _read(self, run: Run) -> tuple[Arrays, dict[str, Any]]:
        arrays, texts = io.read_safetensors(self.path)
        if io.RUN not in texts:
            raise self._wrong("file", f"a checkpoint, with the key {io.RUN!r}", "something else")
        document = io.parse_json(self.path, texts[io.RUN], "checkpoint", floats=True)
        for name, kind in FIELDS.items():
            if not isinstance(document.get(name), kind):
                raise self._wrong(f"{name} of", kind, repr(document.get(name)))
        if document["format"] != FORMAT:
            raise self._wrong("format", FORMAT, document["format"])
        if document["step"] < 0:
            raise self._wrong("step", "at least 0", document["step"])
        theirs = {"network": texts.get(io.ARCHITECTURE), **document["terms"]}
        for name, mine in {"network": self.network, **self.terms}.items():
            if theirs.get(name) != mine:
                raise self._wrong(name, mine, theirs.get(name))
        self._check(arrays, run)
        done = len(arrays["run.history.loss"])
        if done > run.plan.epochs:
            raise self._wrong("epochs", f"at most {run.plan.epochs}", done)
        return arrays, document

    def _check(self, arrays: Arrays, run: Run) -> None:
        """Names, shapes and dtypes: all that is needed is there, and nothing else."""
        weights = self.net.state_dict()
        needed = {**weights, **_slots(run)}
        epochs = np.empty(arrays.get("run.history.loss", np.empty(0)).size)
        needed |= {f"run.history.{name}": epochs for name in run.history}
        for k, _ in enumerate(self.stops):  # which had no best weights to keep, or has them all
            best = {f"run.best.{k}.{name}": array for name, array in weights.items()}
            needed |= best if best.keys() & arrays.keys() else {}
        expected = {name: (array.shape, array.dtype) for name, array in needed.items()}
        got = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                raise self._wrong(f"array {name}", expected.get(name), got.get(name))

    def _wrong(self, what: str, expected: object, got: object) -> ValueError:
        return ValueError(
            f"[fit] checkpoint {self.path!r} must be of this fit: expected {what} {_brief(expected)}, got "
            f"{_brief(got)}; give another name, or delete the file to begin anew"
        )

    # -------------------------------------------------------- writing

    def epoch(self, run: Run) -> None:
        """An epoch has ended: write, unless the last file is young."""
        if time.monotonic() >= self.due:
            self.write(run)

    def write(self, run: Run) -> None:
        """Write; what the disk refuses costs the file, not the training."""
        try:
            self._write(run)
        except (OSError, MemoryError) as error:
            self.due = time.monotonic() + PAUSE
            warnings.warn(
                f"[fit] checkpoint {self.path!r} must be written after epoch {run.history.epochs}: expected "
                f"no error, got {error!r}; training goes on, with the file from before",
                RuntimeWarning,
                stacklevel=5,  # of who called fit
            )

    def _write(self, run: Run) -> None:
        began, optimizer = time.monotonic(), run.plan.optimizer
        document = {
            "format": FORMAT, "terms": self.terms, "step": run.engine.step_count,
            "lr": optimizer.lr if optimizer.pace == "lr" else None, "stopped": run.history.stopped_epoch,
        }  # fmt: skip
        arrays = {**self.net.state_dict(), **_slots(run), **self._best()}
        arrays |= {f"run.history.{name}": np.array(run.history[name]) for name in run.history}
        texts = {io.ARCHITECTURE: self.network, io.RUN: json.dumps(document)}
        io.write_safetensors(self.path, arrays, texts)
        now = time.monotonic()
        self.due = now + max(PAUSE, (now - began) / SHARE)

    def _best(self) -> Arrays:
        """The best weights of each EarlyStopping, which are put into the network to be read."""
        kept = {k: stop.weights for k, stop in enumerate(self.stops) if stop.weights is not None}
        core = self.net._core
        found: Arrays = {}
        now = core.snapshot() if kept else None
        try:
            for k, weights in kept.items():
                core.restore(weights)
                found |= {f"run.best.{k}.{name}": array for name, array in self.net.state_dict().items()}
        finally:
            if now is not None:
                core.restore(now)
        return found


def _put(net: Any, arrays: Arrays, prefix: str) -> None:
    """The weights under this prefix into the network, if they are there."""
    weights = {name: arrays[prefix + name] for name in net.state_dict() if prefix + name in arrays}
    if weights:
        net.load_state_dict(weights)


def _slots(run: Run) -> Arrays:
    """The optimizer's state by name."""
    return {f"run.optimizer.{k}": slot for k, slot in enumerate(run.engine.get_state())}


def _terms(plan: Plan) -> dict[str, str]:
    """What must be the same for a fit to be the same, as text; the number of epochs may grow."""
    stops = [callback for callback in plan.callbacks.all if isinstance(callback, EarlyStopping)]
    parts = {
        "loss": plan.loss, "optimizer": plan.optimizer, "schedule": plan.schedule, "EarlyStopping": stops,
        "batch_size": plan.batch_size, "shuffle": plan.shuffle, "seed": plan.seed,
        "(l1, l2, clip_value, clip_norm, clip_example_norm)": plan.penalties, "dy_weight": plan.dy_weight,
    }  # fmt: skip
    terms = {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part)) for name, part in parts.items()}
    return {
        **terms,
        "data with SHA-256": _digest(plan.data),
        "validation with SHA-256": _digest(plan.validation),
    }


def _digest(data: Data | None) -> str:
    digest = hashlib.sha256()
    for part in data or ():
        if part is not None:
            array = np.ascontiguousarray(devices.on_host(part))
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}…"
