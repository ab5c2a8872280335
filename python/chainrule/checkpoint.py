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
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import devices, io
from .batch import Data
from .callbacks import EarlyStopping
from .checks import Description
from .display import warn
from .training import PENALTIES, Plan, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Sequential

    Arrays = dict[str, NDArray[Any]]

FORMAT = 1  # of the JSON, whose fields are these
FIELDS = {
    "format": (int,),
    "terms": (dict,),
    "step": (int,),
    "first_lr": (float, type(None)),  # None where the optimizer has none
    "lr": (float, type(None)),  # a callback may have changed it
    "stopped": (int, type(None)),
}
PAUSE = 1.0  # seconds from one file to the next, at least
SHARE = 0.05  # of the time may go into writing them


class Checkpoint:
    """The file of one fit: read at its beginning if there is one, written between its epochs.

    Raises, before anything is changed: TypeError for what is no path, and for a layer of your own without
        config(); ValueError for a file that is damaged, or of another fit; OSError.
    """

    def __init__(self, path: Any, net: Sequential, run: Run) -> None:
        io.require_suffix("fit", path)
        self.name = os.fsdecode(path)
        self.path = os.path.abspath(self.name)  # for callbacks may change the folder
        self.net, self.due, self.fails = net, 0.0, False
        io.require_place("[fit] checkpoint", self.path)
        self.first_lr = run.plan.optimizer.lr if run.plan.optimizer.pace == "lr" else None
        self.stops = [stop for stop in run.plan.callbacks.all if isinstance(stop, EarlyStopping)]
        self.terms = {"network": io.architecture_text(net), **_terms(run.plan, self.stops)}
        self.found = self._read(run) if os.path.exists(self.path) else None
        io.remove_leftovers(self.path)

    # -------------------------------------------------------- going on

    def begin(self, run: Run) -> None:
        """Put the fit to where its file says; write a first file where there is none."""
        if self.found is None:
            self._write(run)
            return
        try:
            self._go_on(run, *self.found)
        except BaseException:
            run.give_back()
            raise
        self.found = None

    def _go_on(self, run: Run, arrays: Arrays, document: dict[str, Any]) -> None:
        optimizer = run.plan.optimizer
        history = {name: arrays[f"run.history.{name}"].tolist() for name in run.history}
        for k, stop in enumerate(self.stops):
            _put(self.net, arrays, f"run.best.{k}.")
            stop.resume(history[stop.monitor])
        _put(self.net, arrays, "")
        slots = [arrays[name] for name in _slots(run)]
        optimizer.load_state_dict(self.net, {"step": document["step"], "slots": slots})
        if self.first_lr is not None:
            optimizer.lr = self.first_lr  # which a schedule begins with
        run.go_on(history, document["stopped"])
        if self.first_lr is not None:
            optimizer.lr = document["lr"]

    def _read(self, run: Run) -> tuple[Arrays, dict[str, Any]]:
        try:
            arrays, texts = io.read_safetensors(self.path)
            document = io.parse_json(self.path, texts.get(io.RUN, "{}"), "checkpoint", floats=True)
        except ValueError as error:
            raise ValueError(
                f"{error}; give fit another checkpoint, or delete the file to begin anew"
            ) from error
        if io.RUN not in texts:
            got = "a model" if io.ARCHITECTURE in texts else "arrays alone"
            raise ValueError(
                f"[fit] checkpoint {self.name!r} must be a file of fit: expected the state of a fit in it, "
                f"got {got}; give another name"
            )
        for name, kinds in FIELDS.items():
            if type(document.get(name)) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise self._wrong(name, expected, repr(document.get(name)))
        if document["format"] != FORMAT:
            raise self._wrong("format", FORMAT, document["format"])
        self._compare(document)
        self._check(arrays, document, run)
        return arrays, document

    def _compare(self, document: dict[str, Any]) -> None:
        """Whether the file's terms are those of this fit."""
        for name, mine in self.terms.items():
            if document["terms"].get(name) != mine:
                raise self._wrong(name, mine, document["terms"].get(name))
        first, last = document["first_lr"], document["lr"]
        # In the very process whose callback has changed the rate, it is the last one.
        if (
            self.first_lr not in (first, last)
            or (first is None) != (last is None)
            or min(first or 0, last or 0) < 0
        ):
            raise self._wrong("lr", self.first_lr, first)
        self.first_lr = first

    def _check(self, arrays: Arrays, document: dict[str, Any], run: Run) -> None:
        """All arrays that are needed are there, and nothing else; numbers are such as can be."""
        weights = self.net.state_dict()
        needed = {**weights, **_slots(run)}
        epochs = np.empty(arrays.get("run.history.loss", np.empty(0)).size)
        needed |= {f"run.history.{name}": epochs for name in run.history}
        for k, stop in enumerate(self.stops):
            if stop.kept_some(arrays.get(f"run.history.{stop.monitor}", np.empty(0)).ravel().tolist()):
                needed |= {f"run.best.{k}.{name}": array for name, array in weights.items()}
        expected = {name: (array.shape, array.dtype) for name, array in needed.items()}
        got = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                raise self._wrong(f"array {name}", expected.get(name), got.get(name))
        if len(epochs) > run.plan.epochs:
            raise self._wrong("epochs", f"at most {run.plan.epochs}", len(epochs))
        if not 0 <= document["step"] < 2**63:
            raise self._wrong("step", "0 to 2⁶³ − 1", document["step"])
        if document["stopped"] not in (None, len(epochs) - 1):
            raise self._wrong("stopped", f"None or {len(epochs) - 1}", document["stopped"])

    def _wrong(self, what: str, expected: object, got: object) -> ValueError:
        expected, got = _around_difference(str(expected), str(got))
        return ValueError(
            f"[fit] checkpoint {self.name!r} must be of this fit: expected {what} {expected}, got {got}; "
            "give another name, or delete the file to begin anew"
        )

    # -------------------------------------------------------- writing

    def epoch(self, run: Run, *, last: bool = False) -> None:
        """An epoch has ended: write, unless the last file is young; what the disk refuses costs only that."""
        young = not last and time.monotonic() < self.due
        if young or not self.net._core.all_finite():  # of the latter, the next loss will say so
            return
        try:
            self._write(run)
            self.fails = False
        except (OSError, MemoryError) as error:
            self.due = time.monotonic() + PAUSE
            if self.fails and not last:
                return
            self.fails = True
            left = "the file is the one from before" if os.path.exists(self.path) else "there is no file"
            remedy = "make room and call fit again" if last else "training goes on, and tries again"
            warn(
                f"[fit] checkpoint {self.name!r} must be written after epoch {run.history.epochs}: expected "
                f"no error, got {error!r}; {left}; {remedy}",
                RuntimeWarning,
                4,  # of who called fit
            )

    def _write(self, run: Run) -> None:
        began, optimizer = time.monotonic(), run.plan.optimizer
        document = {
            "format": FORMAT, "terms": self.terms, "step": run.engine.step_count, "first_lr": self.first_lr,
            "lr": None if self.first_lr is None else optimizer.lr, "stopped": run.history.stopped_epoch,
        }  # fmt: skip
        arrays = {**self.net.state_dict(), **_slots(run), **self._best()}
        arrays |= {f"run.history.{name}": np.array(run.history[name]) for name in run.history}
        texts = {io.ARCHITECTURE: io.architecture_text(self.net), io.RUN: json.dumps(document)}
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


# ------------------------------------------------------------ which fit it is


def _terms(plan: Plan, stops: list[EarlyStopping]) -> dict[str, str]:
    """What must be the same for a fit to be the same, as text; the number of epochs may grow."""
    optimizer = {name: value for name, value in plan.optimizer.config().items() if name != "lr"}
    parts = {
        "loss": plan.loss, "optimizer": [type(plan.optimizer).__name__, optimizer],
        "schedule": plan.schedule, "EarlyStopping": stops, "batch_size": plan.batch_size,
        "shuffle": plan.shuffle, "seed": plan.seed, "dy_weight": plan.dy_weight,
        **dict(zip(PENALTIES, plan.penalties, strict=True)),
    }  # fmt: skip
    terms = {name: described(part) for name, part in parts.items()}
    return {
        **terms,
        "data with SHA-256": _digest(plan.data),
        "validation data with SHA-256": _digest(plan.validation),
    }


def described(part: Any, depth: int = 9) -> str:
    """What it is and holds, the same in every process: of the user's own functions and objects, too."""
    deeper = depth - 1
    if isinstance(part, Description):
        return f"{type(part).__name__}({described(part.config(), depth)[1:-1]})"
    if depth and isinstance(part, (list, tuple)):
        return f"[{', '.join(described(item, deeper) for item in part)}]"
    if depth and isinstance(part, (set, frozenset)):
        return f"{{{', '.join(sorted(described(item, deeper) for item in part))}}}"
    if depth and isinstance(part, dict):
        return f"{{{', '.join(f'{name}={described(value, deeper)}' for name, value in part.items())}}}"
    if isinstance(part, (CodeType, ModuleType)):  # whose repr has a file: of a notebook, one for each process
        text = part.co_name if isinstance(part, CodeType) else part.__name__
    else:
        text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(part))
    held = _held(part, depth) if depth else None
    if not held:
        return text
    inside = held if isinstance(held, bytes) else described(held, deeper).encode(errors="replace")
    return f"{text} with SHA-256 {hashlib.sha256(inside).hexdigest()}"


def _held(part: Any, depth: int) -> Any:
    """What makes a function or an object another one than its name says; none of numbers and texts."""
    if isinstance(part, np.ndarray):
        return part.tolist() if part.dtype.hasobject else part.tobytes()
    if isinstance(part, CodeType):
        return [part.co_code, part.co_names, part.co_consts]
    if isinstance(part, FunctionType):
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        names = (
            sorted(_names(part.__code__) & part.__globals__.keys()) if depth > 5 else ()
        )  # not of all it calls
        used = {name: part.__globals__[name] for name in names}
        return [part.__code__, part.__defaults__, part.__kwdefaults__, cells, used]
    if isinstance(part, MethodType):
        return [part.__func__, part.__self__]
    if isinstance(part, partial):
        return [part.func, part.args, part.keywords]
    if isinstance(part, (type, ModuleType)) or hasattr(part, "state_dict"):  # of networks, weights change
        return None
    return getattr(part, "__dict__", None)


def _names(code: CodeType) -> set[str]:
    """Of what is global to it and to the functions in it; and of attributes, which does no harm."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*inner)


def _digest(data: Data | None) -> str:
    digest = hashlib.sha256()
    for part in data or ():
        if part is not None:
            array = np.ascontiguousarray(devices.on_host(part))
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()


def _around_difference(a: str, b: str) -> tuple[str, str]:
    """Of long texts, where they begin to differ."""
    if max(len(a), len(b)) <= 200:
        return a, b
    place = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first = max(0, place - 60)
    cut = [
        f"{'…' * (first > 0)}{text[first : place + 100]}{'…' * (place + 100 < len(text))}" for text in (a, b)
    ]
    return cut[0], cut[1]
