# SPDX-License-Identifier: MIT
"""`fit`: from the user's arguments to calls of the engine, and back to a History.

Everything is checked before anything is changed. Where nobody looks between epochs, a fit is one engine call.
"""

from __future__ import annotations

import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final
from weakref import ref

import numpy as np

from . import devices, layers, losses, optim
from .checks import (
    EXACT,
    Description,
    all_finite,
    converted,
    flag,
    listed,
    one_of,
    real,
    real_array,
    refuse_rows,
    short,
    whole,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Network(Protocol):
    """What training needs to know of a network."""

    layers: tuple[layers.Layer, ...]
    in_features: int
    out_features: int
    dtype: str
    array_dtype: str
    device: str
    _core: Any
    _engine: devices.Engine


# ------------------------------------------------------------ data in


def as_matrix(op: str, X: Any, features: int, dtype: str, *, name: str = "X", finite: bool = True) -> Array:
    """X as a C-contiguous (rows, features) matrix of the dtype; a view where it is one already."""
    array = real_array(op, name, X)
    if array.ndim != 2:
        raise ValueError(
            f"[{op}] {name} must be 2-D: expected (rows, {features}), got shape {array.shape}; "
            f"{_reshape_hint(array, features)}"
        )
    if array.shape[1] != features:
        raise ValueError(
            f"[{op}] {name} must have one column per input of the network: "
            f"expected {features} columns, got {array.shape[1]}"
        )
    matrix = converted(op, name, array, dtype)
    if finite and not all_finite(matrix):
        row, column = (int(i) for i in np.argwhere(~np.isfinite(matrix))[0])
        label = f" ({short(X.columns[column])})" if hasattr(X, "columns") else ""
        raise ValueError(
            f"[{op}] {name} must be finite: expected numbers, got {matrix[row, column]} "
            f"in row {row}, column {column}{label}; fill or drop missing values first"
        )
    return matrix


def _reshape_hint(array: Array, features: int) -> str:
    if array.ndim > 2:
        return "use X.reshape(len(X), -1) for one row per example"
    if array.ndim == 0:
        return "a table of numbers is wanted"
    return "use X.reshape(-1, 1) for one feature" if features == 1 else "use X.reshape(1, -1) for one row"


class Data(NamedTuple):
    """One data set as the engine takes it."""

    X: Array
    y: Array
    weight: Array | None
    flat: bool  # whether the user's y was one-dimensional
    dy: Array | None = None  # ∂y/∂x (rows, O, I)

    def rows(self, first: int, last: int) -> Data:
        weight, dy = (None if a is None else a[first:last] for a in (self.weight, self.dy))
        return Data(self.X[first:last], self.y[first:last], weight, self.flat, dy)

    def on(self, device: str) -> Data:
        """Where it is used more than once: a copy on a GPU, or these arrays themselves."""
        return self if device == "cpu" else Data(*(devices.upload(part, device) for part in self))


def take(
    op: str,
    net: Network,
    loss: losses.Loss,
    X: Any,
    y: Any,
    sample_weight: Any = None,
    *,
    where: str = "",
    as_it_lies: bool = False,
) -> Data:
    """The user's X, y and weights, checked; `where` is put before their names in messages.

    With as_it_lies, for the engine alone, X stays on the network's GPU if it is there.
    """
    dtype = net.array_dtype
    if net.device != "cpu":
        if isinstance(loss, losses.CustomLoss):
            raise ValueError(
                f"[{op}] a loss of your own runs on the CPU: expected a built-in one on device "
                f"{net.device!r}, got {short(loss)}; use net.to('cpu')"
            )
        X = devices.as_it_lies(X, net.in_features, dtype, net.device) if as_it_lies else devices.on_host(X)
        y, sample_weight = devices.on_host(y), devices.on_host(sample_weight)
    there = net.device != "cpu" and devices.on_gpu(X)
    matrix = X if there else as_matrix(op, X, net.in_features, dtype, name=f"{where}X")
    if not len(matrix):
        raise ValueError(f"[{op}] {where}X must not be empty: expected at least one row, got 0")
    targets = loss.targets(op, y, len(matrix), net.out_features, dtype, f"{where}y")
    weight = losses.weights(op, sample_weight, len(matrix), dtype, f"{where}sample_weight")
    return Data(matrix, targets.values, weight, targets.flat)


def with_slopes(op: str, net: Network, data: Data, dy: Any, dy_weight: Any) -> tuple[Data, float]:
    """The data with the slopes ∂y/∂x, and the weight of their part of the loss; both checked."""
    weight = real(op, "dy_weight", dy_weight, least=0)
    if dy is None:
        if weight != 1:
            raise ValueError(
                f"[{op}] dy_weight must come with dy: expected slopes, got dy_weight={weight:g} alone"
            )
        return data, 0.0
    if net.dtype != net.array_dtype:
        raise ValueError(
            f"[{op}] dy needs exact derivatives: expected dtype float32 or float64, got {net.dtype}"
        )
    dy = dy if net.device == "cpu" else devices.on_host(dy)
    slopes, shape = real_array(op, "dy", dy), (len(data.X), net.out_features, net.in_features)
    flat = (shape[0], shape[2])
    if slopes.shape != shape and not (net.out_features == 1 and slopes.shape == flat):
        raise ValueError(
            f"[{op}] dy must have a slope for each row, output and input: expected shape {shape}"
            f"{f' or {flat}' if net.out_features == 1 else ''}, got {slopes.shape}"
        )
    slopes = converted(op, "dy", slopes, net.array_dtype).reshape(shape)
    if not all_finite(slopes):
        refuse_rows(op, "dy", "finite numbers", slopes, ~np.isfinite(slopes))
    return data._replace(dy=slopes), weight


def _split(data: Data, fraction: float) -> tuple[Data, Data]:
    """All rows but the last fraction, and these; the order is the user's, not yet shuffled."""
    rows = len(data.X)
    last = math.ceil(rows * fraction - 1e-9)  # a little less, so that 0.1 of 10 rows is 1 row and not 2
    if last >= rows:
        raise ValueError(
            "[fit] validation_split must leave rows to train on: "
            f"expected fewer than {rows} rows for validation, got {last}"
        )
    return data.rows(0, rows - last), data.rows(rows - last, rows)


def _class_weights(net: Network, loss: losses.Loss, data: Data, class_weight: Any) -> Array | None:
    """Sample weights times the weight of each row's class; a class without a weight has 1."""
    labels, place, counts = np.unique(_labels(data.y), return_inverse=True, return_counts=True)
    if isinstance(class_weight, dict):
        known = _known_labels(net, loss, data.y)
        named = {_label(key, known): _weight(key, value) for key, value in class_weight.items()}
        of_label = np.array([named.get(int(label), 1.0) for label in labels])
    elif isinstance(class_weight, str):
        one_of("fit", "class_weight", class_weight, ("balanced",))
        of_label = len(data.y) / (len(labels) * counts)
    else:
        raise TypeError(
            "[fit] class_weight must be a dict or 'balanced': "
            f"expected {{label: weight}}, got {short(class_weight)}"
        )
    weight = of_label[place.reshape(-1)]
    if data.weight is not None:
        weight = weight * data.weight
    return losses.weights("fit", weight, len(weight), net.array_dtype, "class_weight times sample_weight")


def _labels(y: Array) -> Array:
    """The label (B,) of each row of targets: a whole number alone, or the place of the 1 among zeros."""
    if y.ndim == 1 or y.shape[1] == 1:
        column = y.reshape(-1)
        bad = (column != np.floor(column)) | (np.abs(column) > EXACT)
        labels = column
    else:
        bad = ((y != 0) & (y != 1)).any(axis=1) | (y.sum(axis=1) != 1)
        labels = y.argmax(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            "[fit] class_weight needs one label per row: expected whole numbers, or rows of zeros and a one, "
            f"got {short(y[row].tolist())} in row {row}"
        )
    return labels


def _known_labels(net: Network, loss: losses.Loss, y: Array) -> tuple[int, int]:
    """The least and the greatest label that targets of this loss can have."""
    if y.ndim == 2 and y.shape[1] > 1:
        return 0, y.shape[1] - 1
    if isinstance(loss, losses.CrossEntropy):
        return 0, net.out_features - 1
    return (0, 1) if isinstance(loss, losses.Logistic) else (-EXACT, EXACT)


def _label(key: Any, known: tuple[int, int]) -> int:
    return whole("fit", "a label in class_weight", int(key) if isinstance(key, bool) else key, *known)


def _weight(key: Any, value: Any) -> float:
    return real("fit", f"class_weight[{key!r}]", value, least=0)


# ------------------------------------------------------------ what fit gives back


@final
class History:
    """What a `fit` measured, epoch by epoch: `history["loss"]`, `history["val_loss"]`, `history["lr"]`.

    Example:
        >>> import chainrule as cr
        >>> history = cr.mlp([1, 1]).fit([[0.0], [1.0]], [0.0, 1.0], loss="mse", epochs=3)
        >>> history.epochs, sorted(history.history)
        (3, ['loss', 'lr'])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.history: dict[str, list[float]] = {name: [] for name in names}
        self.first_epoch = 0  # which this fit began with: later than 0 where a checkpoint had the others
        # The epoch, from 0, after which a callback asked to stop or a whole-batch optimizer had converged.
        self.stopped_epoch: int | None = None

    @property
    def epochs(self) -> int:
        """How many epochs were trained."""
        return len(self.history["loss"])

    def __getitem__(self, name: str) -> list[float]:
        if name not in self.history:
            raise KeyError(
                f"[History] name must be known: expected one of {listed(self.history)}, got {short(name)}"
            )
        return self.history[name]

    def __contains__(self, name: object) -> bool:
        return name in self.history

    def __iter__(self) -> Iterator[str]:
        return iter(self.history)

    def logs(self) -> dict[str, float]:
        """The values of the last epoch."""
        return {name: values[-1] for name, values in self.history.items()}

    def __repr__(self) -> str:
        last = "".join(f", {name}={value:.4g}" for name, value in self.logs().items()) if self.epochs else ""
        return f"<History of {self.epochs} epochs{last}>"


# ------------------------------------------------------------ callbacks


@final
class EarlyStopping(Description):
    """Stops a `fit` when a value has not improved for `patience` epochs, and puts the best weights back.

    It watches one fit at a time; RuntimeError for a second network meanwhile.

    monitor is "val_loss" or "loss"; to improve is to fall (mode="max": to rise) by more than `min_delta`.

    Example:
        >>> import chainrule as cr
        >>> stop = cr.EarlyStopping("loss", patience=2, min_delta=10.0)  # nothing improves by 10
        >>> cr.mlp([1, 1]).fit([[1.0]], [1.0], loss="mse", epochs=50, callbacks=[stop]).stopped_epoch
        2
    """

    monitor: str
    patience: int
    min_delta: float
    mode: str
    restore_best: bool
    best: float
    best_epoch: int | None
    waited: int
    weights: Any  # the network's snapshot of that epoch, while a fit is watched

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 10,
        min_delta: float = 0.0,
        mode: str = "min",
        restore_best: bool = True,
    ) -> None:
        op = "EarlyStopping"
        self._set(
            monitor=one_of(op, "monitor", monitor, ("val_loss", "loss")),
            patience=whole(op, "patience", patience, 0),
            min_delta=real(op, "min_delta", min_delta, least=0),
            mode=one_of(op, "mode", mode, ("min", "max")),
            restore_best=flag(op, "restore_best", restore_best),
        )
        self._begin()

    def _begin(self, net: Any = None) -> None:
        worst = math.inf if self.mode == "min" else -math.inf
        self._set(net=None if net is None else ref(net), best=worst, best_epoch=None, waited=0, weights=None)

    def on_train_begin(self, net: Any) -> None:
        watched = self._watched()
        if watched is not None and watched is not net:  # its weights would end in the other network
            raise RuntimeError(
                "[EarlyStopping] one fit at a time: expected an idle one, got one that watches another fit; "
                "make one for each"
            )
        self._begin(net)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> bool:
        self._see(epoch, logs[self.monitor])
        if self.best_epoch == epoch:
            self._keep()
            return False
        return self.waited >= self.patience

    def on_train_end(self, net: Any) -> None:
        if self.weights is not None:
            net._core.restore(self.weights)
        self.let_go(net)

    def resume(self, values: Iterable[float]) -> None:
        """Go on after epochs with these values; the network holds the best weights of them."""
        for epoch, value in enumerate(values):
            self._see(epoch, value)
        if self.best_epoch is not None:
            self._keep()

    def kept_some(self, values: Iterable[float]) -> bool:
        """Whether it would hold best weights after epochs with these values."""
        fresh = EarlyStopping(**self.config())
        for epoch, value in enumerate(values):
            fresh._see(epoch, value)
        return fresh.restore_best and fresh.best_epoch is not None

    def _see(self, epoch: int, value: float) -> None:
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:  # false for NaN
            self._set(best=value, best_epoch=epoch, waited=0)
        else:
            self._set(waited=self.waited + 1)

    def _keep(self) -> None:
        self._set(weights=self._watched()._core.snapshot() if self.restore_best else None)

    def let_go(self, net: Any) -> None:
        """A fit of this network is over, whichever way."""
        if self._watched() is net:
            self._set(net=None, weights=None)

    def _watched(self) -> Any:
        net = vars(self).get("net")
        return None if net is None else net()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "net": None, "weights": None}


_HOOKS = ("on_train_begin", "on_epoch_end", "on_train_end")


class _Callbacks:
    """The user's callbacks behind one face."""

    def __init__(self, callbacks: Any, measured: Iterable[str]) -> None:
        if callbacks is None:
            callbacks = ()
        if not isinstance(callbacks, (list, tuple)):
            raise TypeError(
                f"[fit] callbacks must be a list: expected [callback, ...], got {short(callbacks)}"
            )
        for callback in callbacks:
            usable = callable(callback) or any(hasattr(callback, hook) for hook in _HOOKS)
            if isinstance(callback, type) or not usable:
                raise TypeError(
                    f"[fit] a callback must be an object with one of {', '.join(_HOOKS)}, or a callable: "
                    f"expected f(epoch, logs), got {short(callback)}"
                )
            _check_monitor(callback, measured)
            if isinstance(callback, EarlyStopping) and sum(other is callback for other in callbacks) > 1:
                raise ValueError(
                    f"[fit] callbacks: expected each EarlyStopping once, got {callback!r} twice; make two"
                )
        self.all = tuple(callbacks)
        self.begun: list[Any] = []

    def begin(self, net: Network) -> None:
        for callback in self.all:
            if hasattr(callback, "on_train_begin"):
                callback.on_train_begin(net)
            self.begun.append(callback)

    def epoch(self, epoch: int, logs: dict[str, float]) -> bool:
        """Whether one of them wants to stop; all are asked."""
        wishes = [self._one(callback, epoch, logs) for callback in self.all]
        return any(wishes)

    @staticmethod
    def _one(callback: Any, epoch: int, logs: dict[str, float]) -> bool:
        if hasattr(callback, "on_epoch_end"):
            answer = callback.on_epoch_end(epoch, dict(logs))
        elif any(hasattr(callback, hook) for hook in _HOOKS):
            return False
        else:
            answer = callback(epoch, dict(logs))
        # A number, as file.write gives one, is no wish to stop.
        return isinstance(answer, (bool, np.bool_)) and bool(answer)

    def end(self, net: Network) -> None:
        for callback in self.all:
            if hasattr(callback, "on_train_end"):
                callback.on_train_end(net)

    def let_go(self, net: Network) -> None:
        for callback in self.begun:
            if isinstance(callback, EarlyStopping):
                callback.let_go(net)


def _check_monitor(watcher: Any, measured: Iterable[str]) -> None:
    if getattr(watcher, "monitor", None) == "val_loss" and "val_loss" not in measured:
        kind = type(watcher).__name__
        raise ValueError(
            f"[fit] {kind} monitors 'val_loss': expected validation_data or validation_split, got neither; "
            f"or use {kind}(monitor='loss')"
        )


# ------------------------------------------------------------ progress


class _Progress:
    """verbose=1: a bar or one changing line on a terminal, a line every tenth elsewhere; 2: every epoch.

    All of it goes to stderr, so stdout stays the user's.
    """

    def __init__(self, verbose: int, epochs: int) -> None:
        self.verbose, self.epochs, self.shown, self.moment, self.width = verbose, epochs, 0, -math.inf, 0
        self.terminal = _is_terminal()
        self.bar = self._tqdm() if verbose == 1 and self.terminal else None

    def _tqdm(self) -> Any:
        try:
            from tqdm import tqdm

            # Told the size, for it shows nothing on a terminal that says 0 × 0.
            size = {"ncols": _columns() - 1, "nrows": 24}
            return tqdm(total=self.epochs, unit="epoch", file=sys.stderr, leave=True, **size)
        except (ImportError, KeyError):  # KeyError: older than 4.45, without nrows
            return None

    def go_on(self, done: int, logs: dict[str, float]) -> None:
        """After epochs of another process, which took no time in this one."""
        if self.bar is not None:
            self.bar.initial = self.bar.n = self.shown = done
        self.show(done, logs)

    def show(self, done: int, logs: dict[str, float]) -> None:
        if not self.verbose or sys.stderr is None:
            return
        numbers = {name: f"{value:.4g}" for name, value in logs.items()}
        line = f"epoch {done}/{self.epochs}  " + "  ".join(f"{k} {v}" for k, v in numbers.items())
        if self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(done - self.shown)
            self.shown = done
        elif self.verbose == 1 and self.terminal:
            if done == self.epochs or time.perf_counter() > self.moment + 0.1:
                line = line[: _columns() - 1]  # a line that wraps would leave one line of itself each time
                print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
                self.moment, self.width = time.perf_counter(), len(line)
        elif (
            self.verbose == 2
            or done == self.epochs
            or 10 * done // self.epochs > 10 * self.shown // self.epochs
        ):
            print(line, file=sys.stderr, flush=True)
            self.shown = done

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.verbose == 1 and self.terminal:
            print(file=sys.stderr)


def _is_terminal() -> bool:
    return sys.stderr is not None and bool(getattr(sys.stderr, "isatty", bool)())


def _columns() -> int:
    """Of the terminal; 80 where it does not say, or says 0."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


# ------------------------------------------------------------ fit


DEFAULT_BATCH_SIZE = 32
PENALTIES = ("l1", "l2", "clip_value", "clip_norm", "clip_example_norm")


class Plan(NamedTuple):
    """A checked `fit`: all that the loop needs."""

    data: Data
    validation: Data | None
    loss: losses.Loss
    optimizer: optim.Optimizer
    schedule: Any
    callbacks: _Callbacks
    batch_size: int
    epochs: int
    shuffle: bool
    seed: int
    verbose: int
    dy_weight: float
    penalties: tuple[float, float, float, float, float]  # PENALTIES; 0 is off
    measured: tuple[str, ...]  # what the history will hold


def plan(
    net: Network, X: Any, y: Any, *, loss: Any, optimizer: Any, batch_size: Any = None, epochs: Any = 1,
    shuffle: Any = True, seed: Any = 0, validation_data: Any = None, validation_split: Any = 0.0,
    callbacks: Any = (), verbose: Any = 0, sample_weight: Any = None, class_weight: Any = None,
    schedule: Any = None, l1: Any = 0.0, l2: Any = 0.0, clip_value: Any = None, clip_norm: Any = None,
    clip_example_norm: Any = None, dy: Any = None, dy_weight: Any = 1.0,
) -> Plan:  # fmt: skip
    """The arguments of `fit`, checked, with everything converted; changes nothing."""
    rule, how = losses.resolve("fit", loss), optim.resolve("fit", optimizer)
    if batch_size is not None:
        batch_size = whole("fit", "batch_size", batch_size)
    epochs = whole("fit", "epochs", epochs)
    shuffle, seed = flag("fit", "shuffle", shuffle), whole("fit", "seed", seed, 0, 2**64 - 1)
    penalties = (
        real("fit", "l1", l1, least=0),
        real("fit", "l2", l2, least=0),
        0.0 if clip_value is None else real("fit", "clip_value", clip_value, above=0),
        0.0 if clip_norm is None else real("fit", "clip_norm", clip_norm, above=0),
        0.0 if clip_example_norm is None else real("fit", "clip_example_norm", clip_example_norm, above=0),
    )
    data = take("fit", net, rule, X, y, sample_weight, as_it_lies=not how.whole_batch)
    data, dy_weight = with_slopes("fit", net, data, dy, dy_weight)
    _check_by_example(net, dy is not None, penalties[4] > 0)
    data, validation = _with_validation(net, rule, data, validation_data, validation_split)
    if class_weight is not None:
        data = data._replace(weight=_class_weights(net, rule, data, class_weight))
    measured = ("loss", how.pace) if validation is None else ("loss", "val_loss", how.pace)
    if schedule is not None and not isinstance(schedule, (optim.Schedule, optim.ReduceLROnPlateau)):
        raise TypeError(
            f"[fit] schedule must be a schedule: expected StepLR(...) or the like, got {short(schedule)}"
        )
    _check_monitor(schedule, measured)
    return Plan(
        data, validation, rule, how, schedule, _Callbacks(callbacks, measured),
        _rows_per_step(how, batch_size, len(data.X)), epochs, shuffle and not how.whole_batch, seed,
        _verbosity(verbose), dy_weight, penalties, measured,
    )  # fmt: skip


_MOST_LINEAR = 32  # kMostLayers of cpp/cuda/step.cuh


def _check_by_example(net: Network, sobolev: bool, clipping: bool) -> None:
    """What cannot be had together with dy or with clip_example_norm."""
    if sobolev and clipping:
        raise ValueError(
            "[fit] clip_example_norm limits gradients of the loss alone: expected no dy, got both; "
            "use clip_norm"
        )
    linear = sum(isinstance(layer, layers.Linear) for layer in net.layers)
    if clipping and net.device != "cpu" and linear > _MOST_LINEAR:
        raise ValueError(
            f"[fit] clip_example_norm on a GPU: expected at most {_MOST_LINEAR} Linear layers, got {linear}; "
            "use clip_norm, or device='cpu'"
        )
    for index, layer in enumerate(net.layers):
        if sobolev and isinstance(layer, layers.Dropout) and layer.p:
            raise ValueError(
                "[fit] dy needs one function to have slopes of: expected no dropout, got "
                f"{layer!r} as layer {index}; use l2"
            )
        if clipping and not isinstance(layer, layers.Linear) and getattr(layer, "params", None):
            raise ValueError(
                "[fit] clip_example_norm needs each example's gradient, and vjp of a layer of your own gives "
                f"their sum: expected no params in it, got {type(layer).__name__} as layer {index}"
            )


def _rows_per_step(optimizer: optim.Optimizer, batch_size: int | None, rows: int) -> int:
    if isinstance(optimizer, optim.WholeBatch) and batch_size is not None and batch_size < rows:
        raise ValueError(
            f"[fit] {type(optimizer).__name__} takes all rows at once: expected no batch_size, or one "
            f"≥ {rows}, got {batch_size}"
        )
    return rows if optimizer.whole_batch else min(batch_size or DEFAULT_BATCH_SIZE, rows)


def _with_validation(
    net: Network, loss: losses.Loss, data: Data, validation_data: Any, validation_split: Any
) -> tuple[Data, Data | None]:
    fraction = real("fit", "validation_split", validation_split, least=0, below=1)
    if validation_data is None and not fraction:
        return data, None
    if validation_data is None:
        data, validation = _split(data, fraction)
        for name, part in (("training", data), ("validation", validation)):
            if part.weight is not None and not part.weight.any():
                raise ValueError(
                    f"[fit] sample_weight must not be all 0 in the {name} part: "
                    "expected a positive sum, got 0"
                )
        return data, validation
    if fraction:
        raise ValueError(
            "[fit] validation comes from one place: expected validation_data or validation_split, got both"
        )
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) not in (2, 3):
        raise TypeError(
            "[fit] validation_data must be a tuple: expected (X, y) or (X, y, sample_weight), "
            f"got {type(validation_data).__name__}"
        )
    return data, take("fit", net, loss, *validation_data, where="validation ", as_it_lies=True)


def _verbosity(verbose: Any) -> int:
    if isinstance(verbose, str):
        one_of("fit", "verbose", verbose, ("auto",))
        return int(_is_terminal())
    return int(verbose) if isinstance(verbose, bool) else whole("fit", "verbose", verbose, 0, 2)


class Run(ABC):
    """One `fit` under way: what happens between its epochs, and what is needed to undo it."""

    remedy = "Lower lr, scale X and y to about unit size, or set clip_norm=1.0"  # against divergence
    converged = False  # whether more epochs would change nothing
    together = 1  # how many fits have their rates at once
    keeper: Any = None  # the Checkpoint, if there is to be one

    def __init__(self, net: Network, plan: Plan) -> None:
        self.net, self.plan = net, plan
        self.engine = plan.optimizer.engine(net)
        self.validation = None if plan.validation is None else plan.validation.on(net.device)
        if self.validation is not None and net.device != "cpu":
            _evaluate(net, plan.loss, self.validation)  # has its memory before anything is changed
        self.before = net._core.snapshot()
        steps = self.engine.step_count
        self.state = (steps, self.engine.get_state()) if steps else None
        self.history = History(plan.measured)
        self.plateau: optim.Plateau | None = None

    def go_on(self, history: dict[str, list[float]], stopped_epoch: int | None) -> None:
        """After epochs that another fit has trained; weights and optimizer are as they left them."""
        self.history.history.update(history)
        self.history.first_epoch, self.history.stopped_epoch = self.history.epochs, stopped_epoch
        self.begin_schedule()

    def begin_schedule(self) -> None:
        """ReduceLROnPlateau, from the optimizer's rate and what the epochs so far have measured."""
        rule = self.plan.schedule
        if isinstance(rule, optim.ReduceLROnPlateau):
            self.plateau = rule.start(self.plan.optimizer.lr)
            for value in self.history[rule.monitor]:
                self.plateau.see(value)

    @abstractmethod
    def train(self, rates: Array) -> tuple[Array, Array]:
        """Train at most one epoch per rate: the losses, and the rate or damping that each ended with."""

    def run(self) -> History:
        plan, history = self.plan, self.history
        progress = _Progress(plan.verbose, plan.epochs)
        try:
            plan.callbacks.begin(self.net)
            self.begin_schedule()
            if self.keeper is not None:
                self.keeper.begin(self)
            if history.epochs:
                progress.go_on(history.epochs, history.logs())
            for rates in self.chunks():
                self.record(*self.train(rates))
                logs = history.logs()
                progress.show(history.epochs, logs)
                if plan.callbacks.epoch(history.epochs - 1, logs) or self.converged:
                    history.stopped_epoch = history.epochs - 1
                elif self.keeper is not None and history.epochs < plan.epochs:  # the last is written below
                    self.keeper.epoch(self)
            self.check_parameters()
            if self.keeper is not None:
                self.keeper.epoch(self, last=True)
            plan.callbacks.end(self.net)
        finally:
            plan.callbacks.let_go(self.net)
            progress.close()
        return history

    def chunks(self) -> Iterator[Array]:
        """Rates for the epochs of the next engine call: many, 0.1 s of them, or one, as they are watched."""
        plan, history, plateau = self.plan, self.history, self.plateau
        watched = plan.callbacks.all or plan.validation is not None or plan.verbose == 2
        glanced_at = bool(plan.verbose) or self.keeper is not None
        count = 1 if watched or plateau or glanced_at else 1 << 16  # there is an array of that many rates
        if plan.schedule is not None:  # which may be as many for each epoch as it has steps
            steps = -(-len(plan.data.X) // plan.batch_size)
            count = max(1, min(count, (1 << 22) // (steps * self.together)))
        while history.epochs < plan.epochs and history.stopped_epoch is None:
            start, done = time.perf_counter(), history.epochs
            yield self._rates(min(count, plan.epochs - done))
            if plateau is not None:
                plateau.see(history[plateau.rule.monitor][-1])
            elif glanced_at and not watched:
                seconds = (time.perf_counter() - start) / (history.epochs - done)
                count = max(1, min(10 * count, int(0.1 / max(seconds, 1e-9))))

    def _rates(self, epochs: int) -> Array:
        plan = self.plan
        if plan.schedule is None or self.plateau is not None:
            return np.full(epochs, self.plateau.lr if self.plateau else plan.optimizer.lr)
        steps = -(-len(plan.data.X) // plan.batch_size)
        answer = plan.schedule.rates(plan.optimizer.lr, self.history.epochs, epochs, steps)
        op = f"rates of {type(plan.schedule).__name__}"
        rates = converted("fit", op, real_array("fit", op, answer), "float64")
        shaped = rates.ndim in (1, 2) and 0 < len(rates) <= epochs and rates.shape[1:] in ((), (steps,))
        if not (shaped and (rates >= 0).all() and np.isfinite(rates).all()):
            raise ValueError(
                f"[fit] {op} must be one per epoch or step: expected finite numbers ≥ 0 of shape "
                f"({epochs},) or ({epochs}, {steps}), got {short(answer)} of shape {rates.shape}"
            )
        return rates

    def record(self, values: Array, paces: Array) -> None:
        """Append what the epochs just trained have measured; raise if training has diverged."""
        plan, history = self.plan, self.history
        history["loss"].extend(values.tolist())
        history[plan.optimizer.pace].extend(paces.tolist())
        if not math.isfinite(history["loss"][-1]):
            raise self._diverged("loss", str(history["loss"][-1]))
        if self.validation is not None:
            history["val_loss"].append(_evaluate(self.net, plan.loss, self.validation))

    def check_parameters(self) -> None:
        """The last update of all may overflow after the last loss was finite."""
        if not self.net._core.all_finite():
            raise self._diverged("parameters", "NaN or infinity")

    def give_back(self) -> None:
        """Put network and optimizer back to where they were."""
        self.net._core.restore(self.before)
        if self.state is None:
            self.plan.optimizer.reset(self.net)
        else:
            self.engine.step_count = self.state[0]
            self.engine.set_state(self.state[1])

    def _diverged(self, what: str, got: str) -> FloatingPointError:
        """The error that says so, with everything put back."""
        self.give_back()
        pace = self.plan.optimizer.pace
        where = "before the first step"
        if self.history.epochs:
            size = f"{'learning rate' if pace == 'lr' else pace} {self.history[pace][-1]:g}"
            where = f"in epoch {self.history.epochs} of {self.plan.epochs} at {size}"
        return FloatingPointError(
            f"[fit] {what} must stay finite: expected numbers, got {got} {where}; "
            f"the weights are those from before this fit. {self.remedy}"
        )


class EngineRun(Run):
    """A fit by steps on batches: the engine runs whole epochs."""

    def __init__(self, net: Network, plan: Plan, data: Data | None = None) -> None:
        super().__init__(net, plan)
        data = data or plan.data  # of `plan`, on the network's device
        by_example = data.weight is not None or plan.penalties[4] > 0
        self.trainer: Any = net._engine.trainer(
            net._core, self.engine, plan.loss.engine(data.flat, by_example), *data[:3], plan.batch_size,
            plan.shuffle, plan.seed, *plan.penalties, data.dy, plan.dy_weight,
        )  # fmt: skip

    def train(self, rates: Array) -> tuple[Array, Array]:
        return self.paced(self.trainer.run(self.history.epochs, rates), rates)

    @staticmethod
    def paced(values: Array, rates: Array) -> tuple[Array, Array]:
        """Losses of epochs, and the rate that each ended with."""
        last = rates if rates.ndim == 1 else rates[:, -1]
        return values, last[: len(values)]


def _evaluate(net: Network, loss: losses.Loss, data: Data) -> float:
    return float(
        net._core.evaluate(data.X, data.y, data.weight, loss.engine(data.flat, data.weight is not None))
    )


def evaluate(net: Network, X: Any, y: Any, *, loss: Any, sample_weight: Any) -> float:
    """The reduced loss over all rows."""
    rule = losses.resolve("evaluate", loss)
    return _evaluate(net, rule, take("evaluate", net, rule, X, y, sample_weight, as_it_lies=True))


# ------------------------------------------------------------ single steps


class Stepper:
    """Single updates with one loss and one optimizer: the engine's objects, made once and kept."""

    def __init__(self, net: Network, loss: Any, optimizer: Any) -> None:
        if isinstance(optimizer, str):
            raise TypeError(
                "[train_step] optimizer must be an object, whose state lasts from step to step: "
                f"expected one made before the loop, such as cr.Adam(), got {optimizer!r}"
            )
        if isinstance(optimizer, optim.WholeBatch):
            raise TypeError(
                "[train_step] optimizer must take one gradient a step: expected cr.Adam() or the like, "
                f"got {optimizer!r}, which takes a whole fit"
            )
        self.given = loss, optimizer  # kept alive, because the network finds this object by their ids
        self.loss, self.optimizer = losses.resolve("train_step", loss), optim.resolve("train_step", optimizer)
        self.engine = self.optimizer.engine(net)
        self.trainers: dict[tuple[bool, bool], Any] = {}
        # The step for arrays that fit as they are, by the trainer that was used last; None for all others.
        self.as_is: Callable[[Any, Any, float], float | None] = _never

    def step(self, net: Network, X: Any, y: Any, sample_weight: Any) -> float:
        data = take("train_step", net, self.loss, X, y, sample_weight, as_it_lies=True)
        kind = data.flat, data.weight is not None
        trainer = self.trainers.get(kind)
        if trainer is None:
            trainer = self.trainers[kind] = self._trainer(net, data)
        self.as_is = trainer.step_as_is
        loss: float = trainer.step(data.X, data.y, data.weight, self.optimizer.lr)
        return loss

    def _trainer(self, net: Network, data: Data) -> Any:
        one = data.rows(0, 1)  # a trainer is made with data; its step is given its own
        trainer: Any = net._engine.trainer(
            net._core, self.engine, self.loss.engine(data.flat, data.weight is not None),
            devices.on_host(one.X).copy(), one.y.copy(), None, 1, False, 0, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip
        trainer.domain = self.loss.domain
        return trainer


def _never(X: Any, y: Any, lr: float) -> None:
    """No batch fits before there is a trainer."""
