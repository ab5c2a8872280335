# SPDX-License-Identifier: MIT
"""`fit`: from the user's arguments to calls of the engine, and back to a History.

Everything is checked before anything is changed. Where nobody looks between epochs, a fit is one engine call.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from . import devices, layers, losses, optim
from .batch import Data, Network, class_weights, split, take, with_slopes
from .callbacks import Callbacks, Progress, check_monitor, verbosity
from .checks import converted, flag, listed, real, real_array, short, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@final
class History(Mapping[str, list[float]]):
    """A mapping of what a `fit` measured, epoch by epoch: `history["loss"]`, `["val_loss"]`, `["lr"]`.

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

    __eq__, __hash__ = object.__eq__, object.__hash__  # two fits are two

    def __len__(self) -> int:
        return len(self.history)

    def __iter__(self) -> Iterator[str]:
        return iter(self.history)

    def logs(self) -> dict[str, float]:
        """The values of the last epoch."""
        return {name: values[-1] for name, values in self.history.items() if values}

    def __repr__(self) -> str:
        last = "".join(f", {name}={value:.4g}" for name, value in self.logs().items())
        return f"<History of {self.epochs} epochs{last}>"


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
    callbacks: Callbacks
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
        data = data._replace(weight=class_weights(net, rule, data, class_weight))
    measured = ("loss", how.pace) if validation is None else ("loss", "val_loss", how.pace)
    if schedule is not None and not isinstance(schedule, (optim.Schedule, optim.ReduceLROnPlateau)):
        raise TypeError(
            f"[fit] schedule must be a schedule: expected StepLR(...) or the like, got {short(schedule)}"
        )
    check_monitor(schedule, measured)
    return Plan(
        data, validation, rule, how, schedule, Callbacks(callbacks, measured),
        _rows_per_step(how, batch_size, len(data.X)), epochs, shuffle and not how.whole_batch, seed,
        verbosity(verbose), dy_weight, penalties, measured,
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
        data, validation = split(data, fraction)
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
        kind = type(validation_data).__name__
        got = f"{kind} of {len(validation_data)}" if kind in ("tuple", "list") else kind
        raise TypeError(
            f"[fit] validation_data must be a tuple: expected (X, y) or (X, y, sample_weight), got {got}"
        )
    return data, take("fit", net, loss, *validation_data, where="validation ", as_it_lies=True)


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
        progress = Progress(plan.verbose, plan.epochs)
        try:
            plan.callbacks.begin(self.net)
            self.begin_schedule()
            if self.keeper is not None:
                self.keeper.begin(self)
            progress.begin(history.epochs, history.logs())
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
