# SPDX-License-Identifier: MIT
"""Optimizers and learning-rate schedules: names, defaults and update rules are PyTorch's.

w is a parameter, g = ∂L/∂w its gradient, λ the `weight_decay`. An optimizer object keeps its state (momenta,
number of updates) for each network it has trained: a second `fit` with the same object goes on where the
first one stopped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final
from weakref import WeakKeyDictionary

import numpy as np

from . import solvers
from .checks import Description, flag, listed, one_of, real, short, undefined, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _core, devices

    Array = NDArray[Any]
    State = _core.Optimizer32 | _core.Optimizer64 | solvers.LBFGSMemory | solvers.Damping


class Network(Protocol):
    """What an optimizer needs to know of a network."""

    _core: Any
    _engine: devices.Engine


# ------------------------------------------------------------ optimizers


class Optimizer(Description):
    """Base of the optimizers; only `lr` may be changed later, and counts from the next step on."""

    rule: ClassVar[str]  # the engine's name of it
    whole_batch: ClassVar[bool] = False
    pace: ClassVar[str] = "lr"  # what sets the length of its steps, by the name that histories give it
    lr: float

    def _set(self, **fields: object) -> None:
        super()._set(**fields, _engines=WeakKeyDictionary())

    def __setattr__(self, name: str, value: object) -> None:
        if name == self.pace == "lr":
            vars(self)["lr"] = self._real("lr", value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts afresh: state belongs to networks, and those are not copied along.
        return self.config()

    def __setstate__(self, fields: dict[str, Any]) -> None:
        self._set(**fields)

    def _real(self, name: str, value: object, **limits: float) -> float:
        return real(type(self).__name__, name, value, **{"least": 0.0, **limits})

    def _hyper(self) -> list[float]:
        raise NotImplementedError

    def engine(self, net: Network) -> Any:
        """The engine's optimizer with the state of this network, fresh at first."""
        engines: WeakKeyDictionary[Any, State] = vars(self)["_engines"]
        found = engines.get(net._core)  # networks themselves may be equal, or made anew
        if found is None:
            found = engines[net._core] = self._start(net)
        return found

    def _start(self, net: Network) -> State:
        state: State = net._engine.optimizer(net._core, self.rule, self._hyper())
        return state

    def state_dict(self, net: Network) -> dict[str, Any]:
        """The state kept for `net`: {"step": updates done, "slots": [arrays]}.

        Example:
            >>> import chainrule as cr
            >>> net, opt = cr.mlp([2, 1]), cr.Adam()
            >>> opt.state_dict(net)["step"]
            0
        """
        engine = self.engine(net)
        return {"step": engine.step_count, "slots": engine.get_state()}

    def load_state_dict(self, net: Network, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; ValueError, and no change, if it does not fit."""
        op, engine = type(self).__name__, self.engine(net)
        if not isinstance(state, dict) or state.keys() != {"step", "slots"}:
            raise ValueError(
                f"[{op}] state must be a state_dict: expected step and slots, got {short(state)}"
            )
        step = whole(op, "step", state["step"], 0)
        current, slots = engine.get_state(), list(state["slots"])
        expected, got = (
            [(s.shape, s.dtype) for s in current],
            [(np.shape(s), np.asarray(s).dtype) for s in slots],
        )
        if expected != got:
            raise ValueError(f"[{op}] slots must be of the same network: expected {expected}, got {got}")
        engine.set_state([np.ascontiguousarray(slot) for slot in slots])
        engine.step_count = step

    def reset(self, net: Network) -> None:
        """Begin afresh with `net`: no updates done, state zero."""
        engine = self.engine(net)
        engine.set_state([np.zeros_like(slot) for slot in engine.get_state()])
        engine.step_count = 0


@final
class GD(Optimizer):
    """Gradient descent on the whole data set: `fit` takes all rows as one batch, whatever `batch_size` says.

    w ← w − lr g

    Raises: TypeError or ValueError for an lr that is no finite number ≥ 0.

    Example:
        >>> GD(0.1)
        GD(0.1)
    """

    rule = "sgd"
    whole_batch = True

    def __init__(self, lr: float) -> None:
        self._set(lr=self._real("lr", lr))

    def _hyper(self) -> list[float]:
        return [0.0, 0.0, 0.0, 0.0]


@final
class SGD(Optimizer):
    """Stochastic gradient descent: the gradient of one batch at a time, with momentum μ if you like.

    g ← g + λ w; v ← μ v + (1 − dampening) g, first v = g; w ← w − lr v, with `nesterov` w ← w − lr (g + μ v)

    Raises: TypeError or ValueError for hyper-parameters out of range; Nesterov needs momentum, no dampening.

    Example:
        >>> SGD(0.1, momentum=0.9)
        SGD(lr=0.1, momentum=0.9)
    """

    rule = "sgd"
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self._set(
            lr=self._real("lr", lr),
            momentum=self._real("momentum", momentum),
            dampening=self._real("dampening", dampening, least=-math.inf),
            weight_decay=self._real("weight_decay", weight_decay),
            nesterov=flag("SGD", "nesterov", nesterov),
        )
        if self.nesterov and not (self.momentum > 0 and self.dampening == 0):
            raise ValueError(
                f"[SGD] nesterov needs a momentum and no dampening: expected momentum > 0 and dampening = 0, "
                f"got {self.momentum:g} and {self.dampening:g}"
            )

    def _hyper(self) -> list[float]:
        return [self.momentum, self.dampening, float(self.nesterov), self.weight_decay]


class _AdamFamily(Optimizer):
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def _check(self, lr: object, betas: object, eps: object, weight_decay: object) -> None:
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(
                f"[{type(self).__name__}] betas must be a pair: expected (β1, β2), got {short(betas)}"
            )
        self._set(
            lr=self._real("lr", lr),
            betas=tuple(self._real(f"betas[{i}]", beta, below=1) for i, beta in enumerate(betas)),
            eps=self._real("eps", eps),
            weight_decay=self._real("weight_decay", weight_decay),
        )

    def _hyper(self) -> list[float]:
        return [*self.betas, self.eps, self.weight_decay]


@final
class Adam(_AdamFamily):
    """Steps of about lr in every parameter: the running mean of g over the root of the running mean of g².

    g ← g + λ w; m ← β1 m + (1 − β1) g; v ← β2 v + (1 − β2) g²;
    w ← w − lr m̂/(√v̂ + eps), m̂ = m/(1 − β1ᵗ), v̂ = v/(1 − β2ᵗ) at the t-th update

    Raises: TypeError or ValueError for hyper-parameters out of range.
    Source: Kingma and Ba, ICLR 2015.

    Example:
        >>> Adam(lr=0.01)
        Adam(lr=0.01)
    """

    rule = "adam"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._check(lr, betas, eps, weight_decay)


@final
class AdamW(_AdamFamily):
    """Adam whose weight decay acts on the parameters themselves.

    w ← w − lr λ w, then Adam's update without λ

    Raises: TypeError or ValueError for hyper-parameters out of range.
    Source: Loshchilov and Hutter, ICLR 2019.

    Example:
        >>> AdamW(weight_decay=0.1)
        AdamW(weight_decay=0.1)
    """

    rule = "adamw"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self._check(lr, betas, eps, weight_decay)


@final
class RMSprop(Optimizer):
    """The gradient over the root of the running mean of its square (its variance if `centered`), momentum μ.

    g ← g + λ w; v ← α v + (1 − α) g²; u ← μ u + g/(√v + eps); w ← w − lr u

    Raises: TypeError or ValueError for hyper-parameters out of range.
    Source: Hinton, lecture 6e, 2012.

    Example:
        >>> RMSprop(centered=True)
        RMSprop(centered=True)
    """

    rule = "rmsprop"
    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool

    def __init__(
        self,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        self._set(
            lr=self._real("lr", lr),
            alpha=self._real("alpha", alpha, below=1),
            eps=self._real("eps", eps),
            weight_decay=self._real("weight_decay", weight_decay),
            momentum=self._real("momentum", momentum),
            centered=flag("RMSprop", "centered", centered),
        )

    def _hyper(self) -> list[float]:
        return [self.alpha, self.eps, self.weight_decay, self.momentum, float(self.centered)]


class WholeBatch(Optimizer):
    """Base of the optimizers whose steps look at all rows several times; wholebatch.py runs them."""

    whole_batch = True
    tolerance_grad: float
    tolerance_change: float


@final
class LBFGS(WholeBatch):
    """Quasi-Newton steps on the whole data set, one an epoch; `fit` stops early once it has converged.

    d = −H g, H the inverse Hessian that the last `history_size` steps and gradients amount to; w ← w + t d

    `line_search="strong_wolfe"` tries t = lr first (in the very first step lr min(1, 1/Σ|g|)) and searches on
    until the loss has fallen enough and its slope has flattened; None takes that t as it is. A fit has
    converged when max|g| ≤ `tolerance_grad`, when a step changes the loss by at most `tolerance_change` of
    itself, or when the line search finds no fall.

    Rows per step: all; `fit` refuses a `batch_size` below that, dropout, l1 and clipping.
    Raises: TypeError or ValueError for hyper-parameters out of range.
    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, chapters 3 and 7.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> X = np.linspace(-1, 1, 20)[:, None]
        >>> net = cr.Sequential(cr.Linear(1, 1), dtype="float64")
        >>> history = net.fit(X, 3 * X - 1, loss="mse", optimizer=cr.LBFGS(), epochs=50)
        >>> history.epochs < 10, bool(history["loss"][-1] < 1e-12)
        (True, True)
    """

    history_size: int
    line_search: str | None

    def __init__(
        self,
        lr: float = 1.0,
        history_size: int = 10,
        line_search: str | None = "strong_wolfe",
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
    ) -> None:
        if line_search is not None:
            one_of("LBFGS", "line_search", line_search, ("strong_wolfe",))
        self._set(
            lr=self._real("lr", lr),
            history_size=whole("LBFGS", "history_size", history_size),
            line_search=line_search,
            tolerance_grad=self._real("tolerance_grad", tolerance_grad),
            tolerance_change=self._real("tolerance_change", tolerance_change),
        )

    def _start(self, net: Network) -> State:
        return solvers.LBFGSMemory(_num_parameters(net), self.history_size)


@final
class LevenbergMarquardt(WholeBatch):
    """Damped Gauss-Newton steps for sums of squares, one an epoch; `fit` stops early once it has converged.

    (JᵀJ + λI) δ = −Jᵀr, w ← w + δ, r = f − y the residuals, J = ∂f/∂w; both by the loss's factors and weights

    If the loss falls, the step is taken and λ ← λ/`down`; if not, λ ← λ·`up` and the step is tried again: to
    raise λ by little and lower it by much follows curved valleys best. The first λ is `damping` times the
    greatest diagonal element of JᵀJ. A fit has converged when max|g| ≤ `tolerance_grad`, when a step changes
    the loss by at most `tolerance_change` of itself, or when no λ makes it fall.

    Losses: "least_squares" and "mse". Rows per step: all; `fit` refuses a `batch_size` below that, dropout,
    l1, clipping and schedules. Histories hold "damping" in place of "lr".
    Costs: for P parameters and N = rows · outputs one square system of min(P, N) equations a try; ValueError
    where that, or J for N < P, takes more than 1 GiB: use LBFGS there.
    Raises: TypeError or ValueError for hyper-parameters out of range.
    Source: Marquardt, J. SIAM 11, 1963; up and down: Transtrum and Sethna, arXiv:1201.5885, 2012.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> X = np.linspace(-1, 1, 30)[:, None]
        >>> net = cr.mlp([1, 5, 1], activation="tanh", dtype="float64")
        >>> history = net.fit(X, np.sin(3 * X), loss="mse", optimizer=cr.LevenbergMarquardt(), epochs=50)
        >>> bool(history["loss"][-1] < 1e-4)
        True
    """

    pace = "damping"
    damping: float
    up: float
    down: float

    def __init__(
        self,
        damping: float = 1e-3,
        up: float = 1.5,
        down: float = 5.0,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
    ) -> None:
        op = "LevenbergMarquardt"
        self._set(
            damping=real(op, "damping", damping, above=0),
            up=real(op, "up", up, above=1),
            down=real(op, "down", down, least=1),
            tolerance_grad=self._real("tolerance_grad", tolerance_grad),
            tolerance_change=self._real("tolerance_change", tolerance_change),
        )

    def _start(self, net: Network) -> State:
        return solvers.Damping()


def _num_parameters(net: Network) -> int:
    return sum(math.prod(shape) for _, _, shape in net._core.parameters)


OPTIMIZERS: dict[str, type[Any]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW, "rmsprop": RMSprop}
WHOLE_BATCH: dict[str, type[Any]] = {"lbfgs": LBFGS, "levenberg_marquardt": LevenbergMarquardt}


def resolve(op: str, optimizer: object) -> Optimizer:
    """An Optimizer from an Optimizer, or a fresh one with default arguments from a name."""
    names = OPTIMIZERS | WHOLE_BATCH
    if isinstance(optimizer, Optimizer):
        if type(optimizer) not in (GD, *names.values()):
            raise TypeError(
                f"[{op}] optimizers are complete, their rules are the engine's: "
                f"expected one of {listed(names)}, got the subclass {type(optimizer).__name__}"
            )
        return optimizer
    if isinstance(optimizer, str):
        made: Optimizer = names[one_of(op, "optimizer", optimizer, names)]()
        return made
    hint = (
        f"{optimizer.__name__}(...), got the class"
        if isinstance(optimizer, type)
        else f"one of {listed(names)}, got"
    )
    raise TypeError(f"[{op}] optimizer must be a name or an optimizer: expected {hint} {short(optimizer)}")


# ------------------------------------------------------------ schedules


class Schedule:
    """Base of the schedules; subclass it and define `rates` for one of your own.

    Epochs are counted from 0 at the start of each `fit`.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> class Inverse(cr.Schedule):
        ...     def rates(self, lr, epoch, epochs, steps):
        ...         return lr / (1 + np.arange(epoch, epoch + epochs))
        >>> history = cr.mlp([1, 1]).fit([[1.0]], [1.0], loss="mse", epochs=2, schedule=Inverse())
        >>> history["lr"]
        [0.001, 0.0005]
    """

    def rates(self, lr: float, epoch: int, epochs: int, steps: int) -> Array:
        """Learning rates from `epoch` on, for `epochs` epochs of `steps` steps, `lr` being the optimizer's.

        float64, one per epoch, or one per step as (epochs, steps). It may answer for fewer epochs, and is
        asked again.
        """
        raise NotImplementedError(undefined(self, "rates"))


@final
class StepLR(Description, Schedule):
    """The learning rate times γ = `gamma` every `step_size` epochs.

    lr_t = lr γ^⌊t/step_size⌋ in epoch t

    Example:
        >>> StepLR(2, gamma=0.5).rates(1.0, 0, 5, 1)
        array([1.  , 1.  , 0.5 , 0.5 , 0.25])
    """

    step_size: int
    gamma: float

    def __init__(self, step_size: int, gamma: float = 0.1) -> None:
        self._set(
            step_size=whole("StepLR", "step_size", step_size), gamma=real("StepLR", "gamma", gamma, above=0)
        )

    def rates(self, lr: float, epoch: int, epochs: int, steps: int) -> Array:
        t = np.arange(epoch, epoch + epochs)
        return np.asarray(lr * self.gamma ** (t // self.step_size).astype(np.float64))


@final
class ExponentialLR(Description, Schedule):
    """The learning rate times γ = `gamma` after every epoch.

    lr_t = lr γᵗ in epoch t

    Example:
        >>> ExponentialLR(0.5).rates(1.0, 0, 3, 1)
        array([1.  , 0.5 , 0.25])
    """

    gamma: float

    def __init__(self, gamma: float) -> None:
        self._set(gamma=real("ExponentialLR", "gamma", gamma, above=0))

    def rates(self, lr: float, epoch: int, epochs: int, steps: int) -> Array:
        return np.asarray(lr * self.gamma ** np.arange(epoch, epoch + epochs, dtype=np.float64))


@final
class CosineAnnealingLR(Description, Schedule):
    """Half a cosine from the learning rate down to `eta_min` in T = `T_max` epochs.

    lr_t = eta_min + ½ (lr − eta_min) (1 + cos(π t/T)) in epoch t; beyond T it rises again, as in PyTorch

    Example:
        >>> CosineAnnealingLR(2).rates(1.0, 0, 3, 1).round(3)
        array([1. , 0.5, 0. ])
    """

    T_max: int
    eta_min: float

    def __init__(self, T_max: int, eta_min: float = 0.0) -> None:
        self._set(
            T_max=whole("CosineAnnealingLR", "T_max", T_max),
            eta_min=real("CosineAnnealingLR", "eta_min", eta_min, least=0),
        )

    def rates(self, lr: float, epoch: int, epochs: int, steps: int) -> Array:
        turn = 1 + np.cos(np.pi * np.arange(epoch, epoch + epochs) / self.T_max)
        return np.asarray(self.eta_min + 0.5 * (lr - self.eta_min) * turn)


@final
class WarmupLR(Description, Schedule):
    """A learning rate that rises with every step of the first epochs, then follows another schedule.

    lr_s = lr (a + (1 − a) s/S) at step s = 1 … S of the warm-up, a = `start_factor`; then `after`, from its
    epoch 0

    Example:
        >>> WarmupLR(1, after=ExponentialLR(0.5)).rates(1.0, 0, 3, 4)
        array([[0.25, 0.5 , 0.75, 1.  ]])
    """

    epochs: int
    start_factor: float
    after: Schedule | None

    def __init__(self, epochs: int, start_factor: float = 0.0, after: Schedule | None = None) -> None:
        if after is not None and not isinstance(after, Schedule):
            raise TypeError(f"[WarmupLR] after must be a schedule: expected one or None, got {short(after)}")
        self._set(
            epochs=whole("WarmupLR", "epochs", epochs),
            start_factor=real("WarmupLR", "start_factor", start_factor, least=0, most=1),
            after=after,
        )

    def rates(self, lr: float, epoch: int, epochs: int, steps: int) -> Array:
        if epoch < self.epochs:
            rows = min(epochs, self.epochs - epoch)
            s = np.arange(epoch * steps + 1, (epoch + rows) * steps + 1, dtype=np.float64).reshape(
                rows, steps
            )
            return np.asarray(lr * (self.start_factor + (1 - self.start_factor) * s / (self.epochs * steps)))
        if self.after is None:
            return np.full(epochs, lr)
        return self.after.rates(lr, epoch - self.epochs, epochs, steps)


@final
class ReduceLROnPlateau(Description):
    """The learning rate times `factor` when a loss has not fallen for more than `patience` epochs.

    lr ← max(factor lr, min_lr)

    monitor is "val_loss" or "loss"; the fall must exceed 1e-4 of the best value, as in PyTorch.

    Example:
        >>> ReduceLROnPlateau("loss", patience=3)
        ReduceLROnPlateau(monitor='loss', patience=3)
    """

    monitor: str
    factor: float
    patience: int
    min_lr: float

    def __init__(
        self, monitor: str = "val_loss", factor: float = 0.1, patience: int = 10, min_lr: float = 0.0
    ) -> None:
        op = "ReduceLROnPlateau"
        self._set(
            monitor=one_of(op, "monitor", monitor, ("val_loss", "loss")),
            factor=real(op, "factor", factor, above=0, below=1),
            patience=whole(op, "patience", patience, 0),
            min_lr=real(op, "min_lr", min_lr, least=0),
        )

    def start(self, lr: float) -> Plateau:
        """What one `fit` keeps of the losses it has seen."""
        return Plateau(self, lr)


class Plateau:
    """The rate that a ReduceLROnPlateau has come to in one `fit`."""

    def __init__(self, rule: ReduceLROnPlateau, lr: float) -> None:
        self.rule, self.lr, self.best, self.waited = rule, lr, math.inf, 0

    def see(self, value: float) -> None:
        better = value < self.best - 1e-4 * abs(self.best) if math.isfinite(self.best) else value < self.best
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
        if self.waited > self.rule.patience:
            self.lr, self.waited = max(self.lr * self.rule.factor, min(self.rule.min_lr, self.lr)), 0
