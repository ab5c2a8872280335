# SPDX-License-Identifier: MIT
"""Who looks on between the epochs of a fit: callbacks, EarlyStopping, and the line that shows progress."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any, final
from weakref import ref

import numpy as np

from .batch import Network
from .checks import Description, flag, one_of, real, short, whole
from .display import stderr


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
        """Watch this network, from the beginning."""
        watched = self._watched()
        if watched is not None and watched is not net:  # its weights would end in the other network
            raise RuntimeError(
                "[EarlyStopping] one fit at a time: expected an idle one, got one that watches another fit; "
                "make one for each"
            )
        self._begin(net)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> bool:
        """See this epoch's `logs[monitor]`; whether `patience` epochs have brought nothing better."""
        self._see(epoch, logs[self.monitor])
        if self.best_epoch == epoch:
            self._keep()
            return False
        return self.waited >= self.patience

    def on_train_end(self, net: Any) -> None:
        """Put the weights of the best epoch back."""
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


class Callbacks:
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
            check_monitor(callback, measured)
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


def check_monitor(watcher: Any, measured: Iterable[str]) -> None:
    if getattr(watcher, "monitor", None) == "val_loss" and "val_loss" not in measured:
        kind = type(watcher).__name__
        raise ValueError(
            f"[fit] {kind} monitors 'val_loss': expected validation_data or validation_split, got neither; "
            f"or use {kind}(monitor='loss')"
        )


# ------------------------------------------------------------ progress


AUTO = 3  # a verbosity: 1 where a person looks on, once it has taken PATIENCE seconds
PATIENCE = 1.0


class Progress:
    """verbose=1: a bar or one changing line where a person looks on, a line every tenth elsewhere; 2: each.

    All of it goes to stderr, so stdout stays the user's.
    """

    def __init__(self, verbose: int, total: int, unit: str = "epoch") -> None:
        self.verbose, self.total, self.unit = verbose, total, unit
        self.initial, self.shown, self.moment, self.width = 0, 0, -math.inf, 0
        self.live = verbose in (1, AUTO) and _is_live()
        self.start = time.perf_counter()
        self.due = self.start + (PATIENCE if verbose == AUTO else 0.0)

    @cached_property
    def bar(self) -> Any:
        """tqdm's, made when there is something to show; None without tqdm."""
        try:
            from tqdm import tqdm

            # Told the size, for it shows nothing on a terminal that says 0 × 0.
            how = {"initial": self.initial, "ncols": _columns() - 1, "nrows": 24}
            bar = tqdm(total=self.total, unit=self.unit, file=sys.stderr, leave=True, **how)
        except (ImportError, KeyError):  # KeyError: older than 4.45, without nrows
            return None
        earlier = time.perf_counter() - self.start
        bar.start_t -= earlier
        bar.last_print_t -= earlier
        return bar

    def begin(self, done: int, logs: dict[str, float]) -> None:
        """After epochs of another process, which took no time in this one."""
        self.initial = done
        if done or self.live:
            self.show(done, logs)

    def show(self, done: int, logs: dict[str, float]) -> None:
        now = time.perf_counter()
        if not self.verbose or now < self.due or stderr() is None:
            return
        numbers = {name: f"{value:.4g}" for name, value in logs.items()}
        line = f"{self.unit} {done}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in numbers.items())
        if self.live and self.bar is not None:
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.live:
            if done == self.total or now > self.moment + 0.1:
                line = line[: _columns() - 1]  # a line that wraps would leave one line of itself each time
                print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
                self.moment, self.width = now, len(line)
        elif self.verbose == 2 or done == self.total or 10 * done // self.total > self.shown:
            print(line, file=sys.stderr, flush=True)
            self.shown = 10 * done // self.total  # tenths

    def close(self) -> None:
        bar = vars(self).get("bar")
        if bar is not None:
            bar.close()
        elif self.width and stderr() is not None:
            print(file=sys.stderr)


def verbosity(verbose: Any) -> int:
    """0, 1, 2 or AUTO of what the user gave for it."""
    if isinstance(verbose, str):
        one_of("fit", "verbose", verbose, ("auto",))
        return AUTO if _is_live() else 0
    return int(verbose) if isinstance(verbose, bool) else whole("fit", "verbose", verbose, 0, 2)


def _is_live() -> bool:
    """Whether a person looks on, and "\\r" takes a line back: at a terminal, in a Jupyter notebook."""
    stream: Any = stderr()
    terminal = stream is not None and bool(getattr(stream, "isatty", bool)())
    return terminal or "ipykernel" in type(stream).__module__


def _columns() -> int:
    """Of the terminal; 80 in a notebook, and where it does not say, or says 0."""
    try:
        return (sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns) or 80
    except (OSError, ValueError, AttributeError):
        return 80
