# SPDX-License-Identifier: MIT
"""`fit` with LBFGS and LevenbergMarquardt: loops over all rows at once, around the engine's derivatives.

An epoch is one step. θ are all parameters in the order of `state_dict`, as one float64 vector of numbers that
the network's own dtype holds exactly: what a step starts from is what the network computes with.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import calculus, losses, optim, solvers
from .layers import Dropout, Linear
from .training import PENALTIES, Plan, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

MOST_ELEMENTS = 2**27  # of LevenbergMarquardt's largest float64 array: 1 GiB
BLOCK_ELEMENTS = 2**21  # of the rows of J that are computed at once: 16 MiB, which stay in the cache


class Parameters:
    """The parameters of a network as one vector θ."""

    def __init__(self, net: Any) -> None:
        self.net, self.core = net, net._core
        self.shapes = [tuple(shape) for _, _, shape in self.core.parameters]
        self.cuts = np.cumsum([0, *(math.prod(shape) for shape in self.shapes)])

    def get(self) -> Array:
        return self.join([self.core.get_parameter(k) for k in range(len(self.shapes))])

    def put(self, theta: Array) -> None:
        for k, shape in enumerate(self.shapes):
            part = theta[self.cuts[k] : self.cuts[k + 1]].reshape(shape)
            self.core.set_parameter(k, part.astype(self.net.array_dtype))

    @solvers.quiet
    def moved(self, theta: Array, direction: Array, t: float = 1.0) -> Array:
        """θ + t d as the network will hold it; what is too large becomes infinite, and so will the loss."""
        return np.asarray((theta + t * direction).astype(self.net.array_dtype).astype(np.float64))

    def penalized(self) -> Array:
        """1 for the weights of Linear layers, which `l2` is about, 0 for all else."""
        parts = [
            np.full(math.prod(shape), float(name == "weight" and isinstance(self.net.layers[layer], Linear)))
            for layer, name, shape in self.core.parameters
        ]
        return np.concatenate(parts) if parts else np.empty(0)

    @staticmethod
    def join(arrays: list[Array]) -> Array:
        """Arrays shaped like the parameters as one vector."""
        return np.concatenate([a.ravel() for a in arrays], dtype=np.float64) if arrays else np.empty(0)


class _WholeBatchRun(Run):
    """What both have in common: what they refuse, the lock on the network, the tests of convergence."""

    remedy = "Scale X and y to about unit size, or begin with cr.Adam()"
    net: calculus.Network

    def __init__(self, net: calculus.Network, plan: Plan) -> None:
        self._refuse(net, plan)
        super().__init__(net, plan)
        self.parameters = Parameters(net)
        self.ridge = plan.penalties[1] * self.parameters.penalized()

    def train(self, rates: Array) -> tuple[Array, Array]:
        core = self.net._core
        core.begin_training()
        try:
            value, pace = self._epoch(float(rates.flat[0]))
        finally:
            core.end_training()
        return np.array([value]), np.array([pace])

    @abstractmethod
    def _epoch(self, rate: float) -> tuple[float, float]:
        """One step: the loss after it, and the rate or damping."""

    def _refuse(self, net: Any, plan: Plan) -> None:
        kind = type(plan.optimizer).__name__
        if net.dtype != net.array_dtype:
            raise ValueError(
                f"[fit] {kind} needs exact derivatives: expected dtype float32 or float64, got {net.dtype}"
            )
        for index, layer in enumerate(net.layers):
            if isinstance(layer, Dropout) and layer.p:
                raise ValueError(
                    f"[fit] {kind} compares losses of one and the same network: expected no dropout, got "
                    f"{layer!r} as layer {index}; use l2"
                )
        if plan.data.dy is not None:
            raise ValueError(f"[fit] {kind} sees values only: expected no dy, got slopes; use Adam or SGD")
        for name, value in zip(PENALTIES, plan.penalties, strict=True):
            if value and name != "l2":
                why = "a smooth loss" if name == "l1" else "whole gradients"
                raise ValueError(f"[fit] {kind} needs {why}: expected no {name}, got {name}={value:g}")

    @solvers.quiet
    def _penalty(self, theta: Array) -> tuple[float, Array]:
        """½ l2 Σw² and its gradient."""
        pull = self.ridge * theta
        return 0.5 * float(pull @ theta), pull

    def _flat(self, gradient: Array) -> bool:
        least: float = self._optimizer.tolerance_grad
        return not gradient.size or float(np.abs(gradient).max()) <= least

    def _settled(self, before: float, after: float) -> bool:
        share: float = self._optimizer.tolerance_change
        return abs(before - after) <= share * abs(before)

    @property
    def _optimizer(self) -> Any:
        return self.plan.optimizer


# ------------------------------------------------------------ L-BFGS


class Point(NamedTuple):
    """A θ with the loss L and ∂L/∂θ there."""

    theta: Array
    value: float
    gradient: Array


class LBFGSRun(_WholeBatchRun):
    """A fit by quasi-Newton steps."""

    remedy = f"Lower lr, set line_search='strong_wolfe', or: {_WholeBatchRun.remedy}"

    def __init__(self, net: calculus.Network, plan: Plan) -> None:
        super().__init__(net, plan)
        data = plan.data
        self.loss = plan.loss.engine(data.flat, data.weight is not None)
        self.here: Point | None = None

    def _epoch(self, rate: float) -> tuple[float, float]:
        start = self._start()
        if math.isfinite(start.value) and not np.isfinite(start.gradient).all():
            raise self._diverged("gradient", "NaN or infinity")
        try:
            end = self._step(start, rate)
        except BaseException:  # Ctrl-C, a layer or a loss of the user's: no weights that were only tried
            self.parameters.put(start.theta)
            raise
        self.parameters.put(end.theta)
        self.here = end
        self.engine.step_count += end is not start
        return end.value, rate

    def _start(self) -> Point:
        """Where the last step ended, unless a callback has changed the weights since."""
        theta = self.parameters.get()
        if self.here is None or not np.array_equal(theta, self.here.theta):
            self.here = self._point(theta)
        return self.here

    def _point(self, theta: Array) -> Point:
        self.parameters.put(theta)
        data = self.plan.data
        value, grads = self.net._core.value_and_grad(data.X, data.y, data.weight, self.loss)
        penalty, pull = self._penalty(theta)
        return Point(theta, value + penalty, self.parameters.join(grads) + pull)

    def _step(self, start: Point, rate: float) -> Point:
        """Where one step leads; `start` itself where there is no step to take."""
        if not math.isfinite(start.value):
            return start
        self.converged = self._flat(start.gradient)
        if self.converged or not rate:
            return start
        end = self._along(start, rate)
        if end is None and self.engine.pairs:  # what was remembered misleads: steepest descent
            self.engine.pairs.clear()
            end = self._along(start, rate)
        if end is None:  # nothing falls by more than the rounding of the loss
            self.converged = True
            return start
        self.engine.see(end.theta - start.theta, end.gradient - start.gradient)
        self.converged = self._flat(end.gradient) or self._settled(start.value, end.value)
        return end

    def _along(self, start: Point, rate: float) -> Point | None:
        """A step in the direction of L-BFGS; None where the line search finds none."""
        direction = self.engine.direction(start.gradient)
        slope = _product(direction, start.gradient)
        if not slope < 0:
            return None
        length = rate if self.engine.pairs else rate * min(1.0, 1 / float(np.abs(start.gradient).sum()))

        def phi(t: float) -> solvers.Trial:
            point = self._point(self.parameters.moved(start.theta, direction, t))
            return solvers.Trial(t, point.value, _product(point.gradient, direction), point)

        if self._optimizer.line_search is None:
            found: solvers.Trial | None = phi(length)
        else:
            found = solvers.strong_wolfe(phi, solvers.Trial(0.0, start.value, slope, start), length)
        return None if found is None else found.point


@solvers.quiet
def _product(a: Array, b: Array) -> float:
    return float(a @ b)


# ------------------------------------------------------------ Levenberg-Marquardt


class LevenbergMarquardtRun(_WholeBatchRun):
    """A fit by damped Gauss-Newton steps: L = ½ Σ ω (f − y)² + ½ θᵀKθ, ω from the loss and its weights."""

    def __init__(self, net: calculus.Network, plan: Plan) -> None:
        super().__init__(net, plan)
        data, loss = plan.data, plan.loss
        weight = np.ones(len(data.X)) if data.weight is None else data.weight.astype(np.float64)
        if loss.reduction == "mean":
            weight = weight / weight.sum()
        if isinstance(loss, losses.MSE):
            weight = weight * (2 / net.out_features)
        self.root = np.sqrt(weight)[:, None]  # √ω of each row; residuals are √ω (f − y)

    def _refuse(self, net: Any, plan: Plan) -> None:
        super()._refuse(net, plan)
        if not isinstance(plan.loss, (losses.LeastSquares, losses.MSE)):
            raise ValueError(
                "[fit] LevenbergMarquardt needs a sum of squares: expected loss 'least_squares' or 'mse', "
                f"got {plan.loss!r}; use LBFGS"
            )
        if plan.schedule is not None:
            raise ValueError(
                f"[fit] LevenbergMarquardt has no lr: expected no schedule, got {plan.schedule!r}"
            )
        residuals, unknowns = len(plan.data.X) * net.out_features, net.num_parameters
        if not unknowns:
            raise ValueError(
                "[fit] LevenbergMarquardt solves for parameters: expected at least one, got none"
            )
        if min(residuals, unknowns) * unknowns > MOST_ELEMENTS:
            raise ValueError(
                f"[fit] LevenbergMarquardt must fit in 1 GiB: expected at most {MOST_ELEMENTS:,} for "
                f"min(rows · outputs, parameters) · parameters, got min({residuals:,}, {unknowns:,}) · "
                f"{unknowns:,}; use LBFGS"
            )

    def _rates(self, epochs: int) -> Array:
        return np.array([self.engine.value])

    def _epoch(self, rate: float) -> tuple[float, float]:
        theta = self.parameters.get()
        residual = self._residual()
        value = self._value(theta, residual)
        if math.isfinite(value):
            equations = self._equations(theta, residual)
            if not (math.isfinite(equations.scale) and np.isfinite(equations.gradient).all()):
                raise self._diverged("derivatives", "NaN or infinity")
            try:
                theta, value = self._step(theta, value, equations)
            finally:  # after Ctrl-C or an error in a user's layer, too: no weights that were only tried
                self.parameters.put(theta)
        return value, self.engine.value

    def _residual(self) -> Array:
        """√ω (f − y) in (rows, outputs)."""
        data = self.plan.data
        f = self.net._core.predict(data.X).astype(np.float64)
        return np.asarray(self.root * (f - data.y))

    def _value(self, theta: Array, residual: Array) -> float:
        return 0.5 * float(np.vdot(residual, residual)) + self._penalty(theta)[0]

    def _step(self, theta: Array, value: float, equations: Any) -> tuple[Array, float]:
        """The first damped step that makes the loss fall: where it leads, and the loss there."""
        optimizer, gradient = self._optimizer, equations.gradient
        if self._flat(gradient):
            self.converged = True
            return theta, value
        most = equations.scale / solvers.EPS
        damping = self.engine.value or optimizer.damping * equations.scale
        visible = value * float(np.finfo(self.net.array_dtype).eps)  # a smaller fall is lost in rounding
        while damping <= most:  # beyond, θ + δ is θ
            step = _solved(equations, damping)
            if step is not None and -0.5 * _product(gradient, step) < visible:
                break
            trial = None if step is None else self._trial(self.parameters.moved(theta, step))
            if trial is not None and trial[1] < value:
                self.engine.value = max(damping / optimizer.down, equations.least)
                self.engine.step_count += 1
                self.converged = self._settled(value, trial[1])
                return trial
            damping *= optimizer.up
        self.converged = True
        return theta, value

    def _trial(self, theta: Array) -> tuple[Array, float]:
        """A θ with the loss there."""
        self.parameters.put(theta)
        return theta, self._value(theta, self._residual())

    def _equations(self, theta: Array, residual: Array) -> solvers.NormalEquations | solvers.DualEquations:
        rows, outputs = residual.shape
        equations: solvers.NormalEquations | solvers.DualEquations
        if theta.size <= residual.size:
            equations = solvers.NormalEquations(theta, self.ridge)
        else:
            equations = solvers.DualEquations(theta, self.ridge, residual.size)
        block = max(1, BLOCK_ELEMENTS // max(1, outputs * theta.size))
        for first in range(0, rows, block):
            part = slice(first, first + block)
            by_name = calculus.jacobian(self.net, self.plan.data.X[part], wrt="parameters")
            count = len(residual[part])
            jacobian = np.concatenate(
                [j.reshape(count, outputs, -1) for j in by_name.values()], axis=2, dtype=np.float64
            )
            jacobian *= self.root[part, :, None]
            equations.add(jacobian.reshape(count * outputs, -1), residual[part].ravel())
        return equations


def _solved(equations: Any, damping: float) -> Array | None:
    """A damped step; None where the equations are singular, or by rounding no longer positive definite."""
    try:
        step: Array = equations.step(damping)
    except np.linalg.LinAlgError:
        return None
    return step if _product(equations.gradient, step) < 0 else None


RUNS: dict[type[optim.Optimizer], type[Run]] = {
    optim.LBFGS: LBFGSRun,
    optim.LevenbergMarquardt: LevenbergMarquardtRun,
}
