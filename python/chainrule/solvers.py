# SPDX-License-Identifier: MIT
"""Whole-batch optimization on plain float64 vectors: line search, L-BFGS memory, damped least squares.

θ are all parameters as one vector, g = ∂L/∂θ, d a direction, φ(t) = L(θ + t d). Nothing here knows a network.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# What overflows shows in the result, and is seen there; a warning would tell it to the wrong reader.
quiet = np.errstate(over="ignore", invalid="ignore")

# ------------------------------------------------------------ line search

ARMIJO, CURVATURE = 1e-4, 0.9  # c₁ and c₂ of the Wolfe conditions, as in Nocedal and Wright for quasi-Newton
MOST_TRIALS = 25


class Trial(NamedTuple):
    """φ at one step length."""

    t: float
    value: float  # φ(t); NaN and infinity are allowed and taken for very large
    slope: float  # φ′(t)
    point: Any = None  # whatever the caller wants back with the accepted trial


def strong_wolfe(phi: Callable[[float], Trial], start: Trial, t: float) -> Trial | None:
    """A step length that satisfies the strong Wolfe conditions, tried from `t` on; None where none is found.

    φ(t) ≤ φ(0) + c₁ t φ′(0)  and  |φ′(t)| ≤ c₂ |φ′(0)|,  c₁ = 1e-4, c₂ = 0.9

    `start` is φ at 0, with a negative slope. After 25 trials the best that meets the first condition is it.
    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, algorithm 3.5.
    """
    before = start
    for count in range(1, MOST_TRIALS + 1):
        now = phi(t)
        if not _falls(now, start) or (count > 1 and now.value >= before.value):
            return _zoom(phi, start, before, now, MOST_TRIALS - count)
        if abs(now.slope) <= -CURVATURE * start.slope:
            return now
        if now.slope >= 0:
            return _zoom(phi, start, now, before, MOST_TRIALS - count)
        # Still downhill: at least a tenth of the last stride further on, at most ten times as far.
        t = _cubic_minimum(before, now, t + 0.1 * (t - before.t), 10 * t)
        before = now
    return before


def _zoom(phi: Callable[[float], Trial], start: Trial, low: Trial, high: Trial, trials: int) -> Trial | None:
    """Algorithm 3.6: `low` is the best trial that falls enough, and downhill from it lies `high`."""
    for _ in range(trials):
        margin = 0.1 * abs(high.t - low.t)  # closer to an end than this, the interval would hardly shrink
        t = _cubic_minimum(low, high, min(low.t, high.t) + margin, max(low.t, high.t) - margin)
        if t in (low.t, high.t):  # no number lies between them
            break
        now = phi(t)
        if not _falls(now, start) or now.value >= low.value:
            high = now
            continue
        if abs(now.slope) <= -CURVATURE * start.slope:
            return now
        if now.slope * (high.t - low.t) >= 0:
            high = low
        low = now
    return low if low.t > 0 else None


def _falls(now: Trial, start: Trial) -> bool:
    """The first condition, false where anything is NaN or infinite."""
    finite = math.isfinite(now.value) and math.isfinite(now.slope)
    return finite and now.value <= start.value + ARMIJO * now.t * start.slope


def _cubic_minimum(a: Trial, b: Trial, least: float, most: float) -> float:
    """The minimum of the cubic that has the values and slopes of a and b, within limits; else their mean."""
    middle = 0.5 * (least + most)
    if not (math.isfinite(b.value) and math.isfinite(b.slope)) or a.t == b.t:
        return middle
    first = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = first * first - a.slope * b.slope
    if not 0 <= square < math.inf:
        return middle
    second = math.copysign(math.sqrt(square), b.t - a.t)
    bottom = b.slope - a.slope + 2 * second
    if bottom == 0:
        return middle
    return min(max(b.t - (b.t - a.t) * (b.slope + second - first) / bottom, least), most)


# ------------------------------------------------------------ L-BFGS


class LBFGSMemory:
    """The last steps s and changes y of the gradient along them: an inverse Hessian of limited memory.

    Source: Nocedal and Wright, algorithm 7.4, the two-loop recursion.
    """

    def __init__(self, size: int, pairs: int) -> None:
        self.size, self.step_count = size, 0
        self.pairs: deque[tuple[Array, Array, float]] = deque(maxlen=pairs)  # s, y, 1/sᵀy

    @quiet
    def see(self, s: Array, y: Array) -> None:
        """Remember a pair, unless the loss hardly curves along s: such a pair would blow up the next step."""
        curve = float(s @ y)
        if curve > 1e-10 * np.linalg.norm(s) * np.linalg.norm(y):
            self.pairs.append((s, y, 1 / curve))

    @quiet
    def direction(self, g: Array) -> Array:
        """−H g, H ≈ (∂²L/∂θ²)⁻¹; −g as long as nothing is remembered."""
        d, shares = -g, []
        for s, y, inverse in reversed(self.pairs):
            share = inverse * float(s @ d)
            d -= share * y
            shares.append(share)
        if self.pairs:
            _, y, inverse = self.pairs[-1]
            d /= inverse * float(y @ y)
        for (s, y, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            d += (share - inverse * float(y @ d)) * s
        return d

    def get_state(self) -> list[Array]:
        """[S, Y], pairs as rows, the newest last; rows of zeros where there is none yet."""
        slots = [np.zeros((self.pairs.maxlen or 0, self.size)) for _ in range(2)]
        for row, (s, y, _) in enumerate(self.pairs, slots[0].shape[0] - len(self.pairs)):
            slots[0][row], slots[1][row] = s, y
        return slots

    def set_state(self, slots: list[Array]) -> None:
        """What `get_state` gave."""
        self.pairs.clear()
        for s, y in zip(*slots, strict=True):
            self.see(s.copy(), y.copy())


# ------------------------------------------------------------ Levenberg-Marquardt

EPS = float(np.finfo(np.float64).eps)


class Damping:
    """The damping λ that Levenberg-Marquardt has come to; 0 before its first step."""

    def __init__(self) -> None:
        self.value, self.step_count = 0.0, 0

    def get_state(self) -> list[Array]:
        return [np.array([self.value])]

    def set_state(self, slots: list[Array]) -> None:
        self.value = float(slots[0][0])


class NormalEquations:
    """The damped steps of L = ½ |r|² + ½ θᵀKθ around θ, from rows of J = ∂r/∂θ that come in blocks.

    (JᵀJ + K + λI) δ = −(Jᵀr + Kθ), K diagonal

    Where J has at least as many rows as columns, only JᵀJ (P, P) is kept.
    """

    def __init__(self, theta: Array, ridge: Array) -> None:
        self.ridge = ridge  # the diagonal of K
        self.hessian, self.gradient = np.zeros((theta.size, theta.size)), ridge * theta

    @quiet
    def add(self, jacobian: Array, residual: Array) -> None:
        """Further rows of J, and their r."""
        self.hessian += jacobian.T @ jacobian
        self.gradient += jacobian.T @ residual

    @property
    def scale(self) -> float:
        """The greatest diagonal element of JᵀJ."""
        return float(self.hessian.diagonal().max())

    @property
    def least(self) -> float:
        """The least damping that counts beside the rounding of the system."""
        return EPS * self.scale

    @quiet
    def step(self, damping: float) -> Array:
        """δ; LinAlgError where the system is singular.

        NumPy has no triangular solver, so its LU costs less than its Cholesky factor would.
        """
        system = self.hessian.copy()
        system.flat[:: len(system) + 1] += self.ridge + damping
        return np.asarray(np.linalg.solve(system, -self.gradient))


class DualEquations:
    """The same steps where J has fewer rows N than columns P, by a system of N equations.

    δ = −E⁻¹ (Jᵀ (I + J E⁻¹ Jᵀ)⁻¹ (r − J E⁻¹ Kθ) + Kθ), E = K + λI
    """

    def __init__(self, theta: Array, ridge: Array, rows: int) -> None:
        self.ridge, self.pull = ridge, ridge * theta
        self.jacobian, self.residual, self.filled = np.empty((rows, theta.size)), np.empty(rows), 0

    @quiet
    def add(self, jacobian: Array, residual: Array) -> None:
        place = slice(self.filled, self.filled + len(residual))
        self.jacobian[place], self.residual[place], self.filled = jacobian, residual, place.stop

    @property
    @quiet
    def gradient(self) -> Array:
        """Jᵀr + Kθ."""
        return np.asarray(self.residual @ self.jacobian + self.pull)

    @property
    @quiet
    def scale(self) -> float:
        return float(np.einsum("np,np->p", self.jacobian, self.jacobian).max())

    @property
    def least(self) -> float:
        """Where some parameters have a penalty and others only λ, their parts of J E⁻¹ Jᵀ differ by 1/λ."""
        return (math.sqrt(EPS) if self.ridge.any() else EPS) * self.scale

    @quiet
    def step(self, damping: float) -> Array:
        inverse = 1 / (self.ridge + damping)
        scaled = self.jacobian * inverse
        system = scaled @ self.jacobian.T
        system.flat[:: len(system) + 1] += 1
        dual = np.linalg.solve(system, self.residual - scaled @ self.pull)
        return np.asarray(-(dual @ scaled + inverse * self.pull))
