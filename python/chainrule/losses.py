# SPDX-License-Identifier: MIT
"""Losses: value and ∂L/∂f of one example from one formula, and what targets each of them takes.

Losses work on the network's outputs f (B, n); y are the targets, w the sample weights (1 without any), and
L = Σᵢ wᵢ Lᵢ / Σᵢ wᵢ for reduction="mean", Σᵢ wᵢ Lᵢ for "sum". "If we swap L, only ∂L/∂f changes": a loss of
your own is any callable (f, y) -> (value, ∂L/∂f), and a built-in one can be called in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final
from weakref import ref

import numpy as np

from . import _core
from .checks import Description, all_finite, converted, listed, one_of, real, real_array, refuse_rows, short

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Function = Callable[[Array, Array], tuple[Any, Array]]

# ------------------------------------------------------------ the base class


class Targets(NamedTuple):
    """Targets as the engine takes them; `flat` where the user's were one-dimensional."""

    values: Array  # int64 labels (B,), or real (B, k) in the network's dtype
    flat: bool


class Loss(Description):
    """Base of the built-in losses; calling one gives (L, ∂L/∂f) for outputs f (B, n) and targets y.

    Example:
        >>> MSE()([[1.0], [3.0]], [1.0, 1.0])
        (2.0, array([[0.],
               [2.]]))
    """

    name: ClassVar[str]
    domain: ClassVar[tuple[float, float]] = (-math.inf, math.inf)  # real targets: the least and the greatest
    _valid: ClassVar[str] = ""  # what lies in there, in words
    _hint: ClassVar[str] = ""
    reduction: str

    def __init__(self, *, reduction: str = "mean") -> None:
        self._set(reduction=one_of(type(self).__name__, "reduction", reduction, ("mean", "sum")))

    @property
    def _param(self) -> float:
        return 0.0

    def __call__(self, f: Any, y: Any, sample_weight: Any = None) -> tuple[float, Array]:
        op = type(self).__name__
        outputs = real_array(op, "f", f)
        dtype = "float32" if outputs.dtype == np.float32 else "float64"
        if outputs.ndim != 2:
            raise ValueError(f"[{op}] f must be 2-D: expected (B, n), got shape {outputs.shape}")
        rows, columns = outputs.shape
        targets = self.targets(op, y, rows, columns, dtype).values
        weight = weights(op, sample_weight, rows, dtype)
        outputs = converted(op, "f", outputs, dtype)
        return _core.loss(self.name, outputs, targets, weight, self._param, self.reduction)

    def targets(self, op: str, y: object, rows: int, outputs: int, dtype: str, name: str = "y") -> Targets:
        """`y` checked for this loss: as many rows as X, the exact shape, finite, and in the loss's domain."""
        array = _with_rows(op, name, y, rows)
        width = self._width(op, outputs)
        if array.ndim > 2 or (array.shape[1] if array.ndim == 2 else 1) != width:
            expected = f"({rows}, {width})" + (f" or ({rows},)" if width == 1 else "")
            labels = array.ndim == 1 and array.dtype.kind in "iub"
            hint = "; class labels need loss='cross_entropy'" if labels else ""
            raise ValueError(
                f"[{op}] {name} must have one column per output of the network: "
                f"expected shape {expected}, got {array.shape}{hint}"
            )
        values = converted(op, name, array, dtype).reshape(rows, width)
        if not all_finite(values):
            refuse_rows(op, name, "finite numbers", values, ~np.isfinite(values))
        self._check_domain(op, name, values)
        return Targets(values, array.ndim == 1)

    def _width(self, op: str, outputs: int) -> int:
        return outputs

    def _check_domain(self, op: str, name: str, values: Array) -> None:
        low, high = self.domain
        too_low = low > -math.inf and values.size and values.min() < low
        if too_low or (high < math.inf and values.size and values.max() > high):
            bad = (values < low) | (values > high)
            refuse_rows(op, name, f"{self._valid} for loss {self.name!r}", values, bad, self._hint)

    def engine(self, flat: bool, weighted: bool) -> _core.Loss:
        """The engine's loss for targets that were `flat` or not, with or without weights."""
        return _core.Loss(self.name, self._param, self.reduction, None)

    def each(self, flat: bool) -> _core.Loss:
        """The engine's loss for gradients example by example: row i is ∂Lᵢ/∂f, whatever the reduction."""
        return _core.Loss(self.name, self._param, "sum", None)

    def gradients(self, f: Array, y: Array, flat: bool) -> Array:
        """∂Lᵢ/∂f of each example, for targets as `targets` gives them."""
        return _core.loss(self.name, f, y, None, self._param, "sum")[1]


def _with_rows(op: str, name: str, y: object, rows: int) -> Array:
    array = real_array(op, name, y)
    if array.ndim == 0 or len(array) != rows:
        got = "a single number" if array.ndim == 0 else str(len(array))
        raise ValueError(f"[{op}] {name} must have one row per row of X: expected {rows}, got {got}")
    return array


def weights(op: str, value: object, rows: int, dtype: str, name: str = "sample_weight") -> Array | None:
    """Sample weights (rows,), finite, none below 0 and not all 0; None stays None."""
    if value is None:
        return None
    array = real_array(op, name, value)
    if array.shape != (rows,):
        raise ValueError(f"[{op}] {name} must have one number per row: expected ({rows},), got {array.shape}")
    weight = converted(op, name, array, dtype)
    bad = ~(weight >= 0) | ~np.isfinite(weight)
    refuse_rows(op, name, "finite numbers ≥ 0", weight, bad)
    total = float(weight.sum(dtype=np.float64))
    if rows and not 0 < total <= float(np.finfo(dtype).max):
        raise ValueError(
            f"[{op}] {name} must not be all zero, nor too large: "
            f"expected a positive finite sum, got {total:g}"
        )
    return weight


# ------------------------------------------------------------ regression


@final
class LeastSquares(Loss):
    """Half the squared distance: the lecture's loss.

    Lᵢ = ½ Σⱼ (yⱼ − fⱼ)²

    Shapes: f (B, n), y (B, n), or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = f − y = −(y − f).

    Example:
        >>> LeastSquares()([[3.0]], [1.0])
        (2.0, array([[2.]]))
    """

    name = "least_squares"


@final
class MSE(Loss):
    """The mean squared error over the outputs.

    Lᵢ = (1/n) Σⱼ (yⱼ − fⱼ)²

    Shapes: f (B, n), y (B, n), or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = 2 (f − y)/n.

    Example:
        >>> MSE()([[3.0]], [1.0])
        (4.0, array([[4.]]))
    """

    name = "mse"


@final
class MAE(Loss):
    """The mean absolute error over the outputs; its minimum is the median.

    Lᵢ = (1/n) Σⱼ |yⱼ − fⱼ|

    Shapes: f (B, n), y (B, n), or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = sign(f − y)/n, 0 at the kink f = y.

    Example:
        >>> MAE()([[3.0]], [1.0])
        (2.0, array([[1.]]))
    """

    name = "mae"


@final
class Huber(Loss):
    """Squared for small errors, absolute for errors beyond δ = `delta` > 0: robust against outliers.

    Lᵢ = (1/n) Σⱼ (½ d² where |d| ≤ δ, else δ (|d| − ½ δ)), d = fⱼ − yⱼ

    Shapes: f (B, n), y (B, n), or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = clip(f − y, −δ, δ)/n.

    Example:
        >>> Huber(delta=1.0)([[3.0]], [1.0])
        (1.5, array([[1.]]))
    """

    name = "huber"
    delta: float

    def __init__(self, delta: float = 1.0, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self._set(delta=real("Huber", "delta", delta, above=0))

    @property
    def _param(self) -> float:
        return self.delta


@final
class Pinball(Loss):
    """The loss whose minimum is the q-quantile of y, q = `quantile` between 0 and 1.

    Lᵢ = (1/n) Σⱼ max(q d, (q − 1) d), d = yⱼ − fⱼ

    Shapes: f (B, n), y (B, n), or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = −q/n where y > f, (1 − q)/n where y < f, 0 at the kink f = y.

    Example:
        >>> Pinball(quantile=0.75)([[3.0]], [1.0])
        (0.5, array([[0.25]]))
    """

    name = "pinball"
    quantile: float

    def __init__(self, quantile: float = 0.5, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self._set(quantile=real("Pinball", "quantile", quantile, above=0, below=1))

    @property
    def _param(self) -> float:
        return self.quantile


@final
class Poisson(Loss):
    """The negative log-likelihood of counts, for outputs that are logarithms of rates.

    Lᵢ = (1/n) Σⱼ (exp(fⱼ) − yⱼ fⱼ), without the term log yⱼ! that f does not change

    Shapes: f (B, n), y (B, n) with y ≥ 0, or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = (exp(f) − y)/n.

    Example:
        >>> Poisson()([[0.0]], [3.0])
        (1.0, array([[-2.]]))
    """

    name = "poisson"
    domain = (0.0, math.inf)
    _valid = "counts ≥ 0"


@final
class GaussianNLL(Loss):
    """The negative log-likelihood of a normal distribution whose mean and variance are both outputs.

    Lᵢ = (1/k) Σⱼ ½ (sⱼ + (yⱼ − μⱼ)² exp(−sⱼ)) for f = [μ, s], s = log variance; without ½ log 2π

    Shapes: f (B, 2k), first the k means, then the k logarithms; y (B, k), or (B,) for k = 1.
    Gradient: ∂Lᵢ/∂μ = (μ − y) exp(−s)/k, ∂Lᵢ/∂s = ½ (1 − (y − μ)² exp(−s))/k.

    Example:
        >>> GaussianNLL()([[3.0, 0.0]], [1.0])
        (2.0, array([[ 2. , -1.5]]))
    """

    name = "gaussian_nll"

    def _width(self, op: str, outputs: int) -> int:
        if outputs % 2:
            raise ValueError(
                f"[{op}] loss 'gaussian_nll' needs a mean and a log variance per target: "
                f"expected an even number of outputs, got {outputs}"
            )
        return outputs // 2


# ------------------------------------------------------------ classification


@final
class Logistic(Loss):
    """The logistic loss, or binary cross-entropy, on logits f; each output is a yes or no of its own.

    Lᵢ = (1/n) Σⱼ (yⱼ log(1 + exp(−fⱼ)) + (1 − yⱼ) log(1 + exp(fⱼ)))

    Shapes: f (B, n), y (B, n) in [0, 1], or (B,) for n = 1.
    Gradient: ∂Lᵢ/∂f = (σ(f) − y)/n.

    Example:
        >>> Logistic()([[0.0]], [1])[1]
        array([[-0.5]])
    """

    name = "logistic"
    domain = (0.0, 1.0)
    _valid = "0 to 1"
    _hint = "; several classes need loss='cross_entropy'"


@final
class CrossEntropy(Loss):
    """Softmax and negative log-likelihood in one, on logits f: one of n classes.

    Lᵢ = log Σⱼ exp(fⱼ) − f_y for a label y; −Σⱼ pⱼ log softmax(f)ⱼ for probabilities p

    Shapes: f (B, n); y (B,) integers 0 … n − 1 of any width, or (B, n) probabilities ≥ 0.
    Gradient: ∂Lᵢ/∂f = softmax(f) − onehot(y); softmax(f) Σp − p.

    Example:
        >>> CrossEntropy()([[0.0, 0.0]], [1])[1]
        array([[ 0.5, -0.5]])
    """

    name = "cross_entropy"
    domain = (0.0, math.inf)  # of probabilities
    _valid = "probabilities ≥ 0"

    def targets(self, op: str, y: object, rows: int, outputs: int, dtype: str, name: str = "y") -> Targets:
        array = _with_rows(op, name, y, rows)
        if array.ndim != 1:
            if array.shape == (rows, 1) and outputs != 1:
                raise ValueError(
                    f"[{op}] {name} must be 1-D labels: expected ({rows},), got {array.shape}; use y.ravel()"
                )
            return super().targets(op, array, rows, outputs, dtype, name)
        if array.dtype.kind == "f":
            refuse_rows(op, name, "a label in every row", array, np.isnan(array), "; leave it out")
            raise TypeError(
                f"[{op}] {name} must be class labels: expected integers or booleans, got {array.dtype}; "
                "use y.astype(int), or an own column of probabilities for each class"
            )
        if not _are_labels(array, outputs):
            hint = "; two classes with one output need loss='logistic'" if outputs == 1 else ""
            bad = array >= outputs if array.dtype.kind in "ub" else (array < 0) | (array >= outputs)
            refuse_rows(op, name, f"labels 0 to {outputs - 1}", array, bad, hint)
        return Targets(np.require(array, np.int64, ["C", "A"]), True)


def _are_labels(array: Array, outputs: int) -> bool:
    """Whether all integers are in 0 … outputs − 1; compared as Python's, which no width overflows."""
    return not array.size or (int(array.min()) >= 0 and int(array.max()) < outputs)


# ------------------------------------------------------------ losses of the user's own


@final
class CustomLoss(Loss):
    """A loss of your own: a callable (f, y) -> (value, ∂L/∂f), with the f and y of one batch.

    A scalar value is L of the batch and its gradient ∂L/∂f (B, n). Values (B,) are the Lᵢ and row i of the
    gradient is ∂Lᵢ/∂f; sample weights and `reduction` are then applied for you. Second derivatives are
    differences of that gradient, with one step for all rows: give them rows of about one size.

    Shapes: f (B, n); y as you passed it to `fit`, (B, k) or (B,), in the network's dtype; only labels,
        integers 0 … n − 1 in (B,), come as int64, so that they can index.
    Raises: TypeError for what cannot be called; ValueError in training for an answer of the wrong shape.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> def quartic(f, y):
        ...     d = f[:, 0] - y
        ...     return d**4, (4 * d**3)[:, None]
        >>> net = cr.Sequential(cr.Linear(2, 1))
        >>> history = net.fit(np.eye(2), [0.0, 1.0], loss=quartic, epochs=3)
        >>> len(history["loss"])
        3
    """

    name = "external"
    function: Function

    def __init__(self, function: Function, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        if not callable(function):
            raise TypeError(
                "[CustomLoss] function must be callable: expected (f, y) -> (value, dL/df), "
                f"got {short(function)}"
            )
        self._set(function=function)

    def __call__(self, f: Any, y: Any, sample_weight: Any = None) -> tuple[Any, Array]:
        if sample_weight is not None:
            raise ValueError("[CustomLoss] sample_weight in a direct call: expected None, got weights")
        return self.function(f, y)

    def targets(self, op: str, y: object, rows: int, outputs: int, dtype: str, name: str = "y") -> Targets:
        array = _with_rows(op, name, y, rows)
        if array.ndim > 2 or array.size == 0 < rows:
            raise ValueError(
                f"[{op}] {name} must be 1-D or 2-D: expected ({rows},) or ({rows}, k), got {array.shape}"
            )
        if array.ndim == 1 and array.dtype.kind in "iub" and _are_labels(array, outputs):
            return Targets(np.require(array, np.int64, ["C", "A"]), True)
        values = converted(op, name, array, dtype).reshape(rows, -1 if rows else 1)
        if not all_finite(values):
            refuse_rows(op, name, "finite numbers", values, ~np.isfinite(values))
        return Targets(values, array.ndim == 1)

    def engine(self, flat: bool, weighted: bool) -> _core.Loss:
        # Weakly: Python's collector cannot see what the engine holds, and a loss may know its network.
        here = ref(self)

        def guarded(f: Array, y: Array) -> tuple[Any, Array]:
            answer = here().function(f, y[:, 0] if flat and y.ndim == 2 else y)  # type: ignore[union-attr]
            return _checked(answer, f, weighted)

        return _core.Loss(self.name, 0.0, self.reduction, guarded)

    def each(self, flat: bool) -> _core.Loss:
        return _core.Loss(self.name, 0.0, "sum", lambda f, y: (0.0, self.gradients(f, y, flat)))

    def gradients(self, f: Array, y: Array, flat: bool) -> Array:
        """From a loss of the whole batch, row by row: Lᵢ is the loss of a batch of that row alone."""
        y = y[:, 0] if flat and y.ndim == 2 else y
        value, grad = _checked(self.function(f.copy(), y.copy()), f, False)
        if np.ndim(value) or len(f) == 1:
            return np.asarray(grad)
        rows = [slice(i, i + 1) for i in range(len(f))]
        return np.concatenate(
            [_checked(self.function(f[i].copy(), y[i].copy()), f[i], False)[1] for i in rows]
        )


def _checked(answer: object, f: Array, weighted: bool) -> tuple[Any, Array]:
    """What a loss of the user's own gave back: a float or values (B,), and a gradient shaped like f."""
    if not (isinstance(answer, tuple) and len(answer) == 2):
        got = f"tuple of {len(answer)}" if isinstance(answer, tuple) else type(answer).__name__
        raise ValueError(f"[loss] your loss: expected a tuple (value, dL/df), got {got}")
    try:
        value, grad = np.asarray(answer[0]), np.asarray(answer[1])
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors that want a gradient
        raise ValueError(
            f"[loss] your loss: expected arrays (value, dL/df), got ragged ones or others ({error})"
        ) from None
    if value.dtype.kind not in "biuf" or grad.dtype.kind not in "biuf":
        raise ValueError(
            f"[loss] your loss: expected real numbers, got dtypes {value.dtype} and {grad.dtype}"
        )
    hint, square = "", (len(f), len(f))
    if f.shape[1] == 1 < len(f) and square in (value.shape, grad.shape):
        hint = (
            f"; y came as ({len(f)},), and f − y is {square}: use f[:, 0] - y, and [:, None] for the gradient"
        )
    if value.shape not in ((), (len(f),)):
        raise ValueError(
            f"[loss] value of your loss: expected a number or shape ({len(f)},), got {value.shape}{hint}"
        )
    if grad.shape != f.shape:
        raise ValueError(f"[loss] gradient of your loss: expected shape {f.shape}, got {grad.shape}{hint}")
    if weighted and value.shape == ():
        raise ValueError(
            "[loss] value of your loss with weights or clip_example_norm: "
            f"expected one value per example, shape ({len(f)},), got one number"
        )
    grad = np.require(grad, f.dtype, ["C", "A"])
    return (float(value) if value.shape == () else np.require(value, f.dtype, ["C", "A"])), grad


# ------------------------------------------------------------ by name

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (LeastSquares, MSE, MAE, Huber, Pinball, Poisson, GaussianNLL, Logistic, CrossEntropy)
}
LOSSES["bce"] = Logistic  # binary cross-entropy, another name for the same loss


def resolve(op: str, loss: object) -> Loss:
    """A Loss from a Loss, a name of the table, or a callable of the user's own."""
    if isinstance(loss, Loss):
        if type(loss) not in (CustomLoss, *LOSSES.values()):
            raise TypeError(
                f"[{op}] losses are complete, their formulas are the engine's: "
                f"expected a function (f, y) -> (value, dL/df), got the subclass {type(loss).__name__}"
            )
        return loss
    if isinstance(loss, str):
        return LOSSES[one_of(op, "loss", loss, LOSSES)]()
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise TypeError(
            f"[{op}] loss must be an object: expected {loss.__name__}(...), got the class {loss.__name__}"
        )
    if callable(loss):
        return CustomLoss(loss)
    raise TypeError(
        f"[{op}] loss must be a name, a loss or a callable: "
        f"expected one of {listed(LOSSES)}, got {short(loss)}"
    )
