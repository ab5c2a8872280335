# SPDX-License-Identifier: MIT
"""Line search, L-BFGS memory and damped least squares by themselves: textbook functions, dense formulas."""

import math

import numpy as np
import pytest

from chainrule import solvers
from chainrule.solvers import Trial

# ---------------------------------------------------------------------------------------------- line search


def more_thuente_1(t, beta=2.0):
    return -t / (t * t + beta), (t * t - beta) / (t * t + beta) ** 2


def more_thuente_2(t, beta=0.004):
    a = t + beta
    return a**5 - 2 * a**4, 5 * a**4 - 8 * a**3


def more_thuente_3(t, beta=0.01, waves=39):
    """A kink rounded off at 1, with ripples on its flanks."""
    if abs(t - 1) <= beta:
        value, slope = (t - 1) ** 2 / (2 * beta) + beta / 2, (t - 1) / beta
    else:
        value, slope = abs(1 - t), math.copysign(1.0, t - 1)
    turn = waves * math.pi / 2
    return value + 2 * (1 - beta) / (waves * math.pi) * math.sin(turn * t), slope + (1 - beta) * math.cos(
        turn * t
    )


def yanai(first, second):
    def function(t):
        def gamma(b):
            return math.sqrt(1 + b * b) - b

        one, two = math.hypot(1 - t, second), math.hypot(t, first)
        return (
            gamma(first) * one + gamma(second) * two,
            gamma(first) * (t - 1) / one + gamma(second) * t / two,
        )

    return function


def barrier(t):
    """Infinite from 1 on."""
    return (-2 * t - math.log(1 - t), -2 + 1 / (1 - t)) if t < 1 else (math.inf, math.nan)


def exponential(t):
    """A minimum at 50, far beyond the first steps."""
    return math.exp(0.1 * (t - 50)) - 0.1 * t, 0.1 * math.exp(0.1 * (t - 50)) - 0.1


FUNCTIONS = {
    "more_thuente_1": more_thuente_1,
    "more_thuente_2": more_thuente_2,
    "more_thuente_3": more_thuente_3,
    "yanai_4": yanai(0.001, 0.001),
    "yanai_5": yanai(0.01, 0.001),
    "yanai_6": yanai(0.001, 0.01),
    "barrier": barrier,
    "exponential": exponential,
}


def searched(function, t):
    tried = []

    def phi(t):
        tried.append(t)
        return Trial(t, *function(t))

    start = Trial(0.0, *function(0.0))
    assert start.slope < 0
    return start, solvers.strong_wolfe(phi, start, t), tried


@pytest.mark.parametrize("t", [1e-3, 1e-1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_line_search_meets_the_wolfe_conditions(name, t):
    start, found, tried = searched(FUNCTIONS[name], t)
    assert found.t in tried
    assert (found.value, found.slope) == FUNCTIONS[name](found.t)
    assert found.value <= start.value + 1e-4 * found.t * start.slope
    assert abs(found.slope) <= 0.9 * abs(start.slope)
    assert len(tried) < solvers.MOST_TRIALS


def test_a_first_length_that_is_good_costs_one_evaluation():
    _, found, tried = searched(lambda t: ((t - 1) ** 2, 2 * (t - 1)), 0.9)
    assert tried == [0.9] == [found.t]


def test_the_cubic_finds_the_minimum_of_a_cubic():
    """t³ − 3t: the first trial at 3 lies too high, the second is the minimum at 1."""
    _, found, tried = searched(lambda t: (t**3 - 3 * t, 3 * t * t - 3), 3.0)
    assert tried == [3.0, pytest.approx(1.0, abs=1e-12)]
    assert found.t == tried[1]


def test_a_function_without_end_gives_the_last_trial():
    start, found, tried = searched(lambda t: (-t, -1.0), 1.0)
    assert len(tried) == solvers.MOST_TRIALS
    assert found.t == tried[-1] == max(tried)
    assert found.value < start.value


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_no_fall_is_no_step(value):
    """What rounding makes of a minimum: a slope that promises a fall, and values that do not fall."""
    _, found, tried = searched(lambda t: (value if t else 1.0, -1e-9), 1.0)
    assert found is None
    assert len(tried) <= solvers.MOST_TRIALS


@pytest.mark.parametrize("beyond", [(-math.inf, -1.0), (-2.0, math.nan), (-2.0, -math.inf)])
def test_what_is_not_finite_is_not_accepted(beyond):
    """Values and slopes that overflow from 2 on, on a slope downhill to a minimum at 1.5."""
    _, found, _ = searched(lambda t: (t * t - 3 * t, 2 * t - 3) if t < 2 else beyond, 2.0)
    assert found.t < 2


# --------------------------------------------------------------------------------------------------- L-BFGS


def dense_bfgs(pairs, size):
    """H by the BFGS formula, from γI on, γ = sᵀy/yᵀy of the newest pair."""
    s, y = pairs[-1]
    H = (s @ y) / (y @ y) * np.eye(size)
    for s, y in pairs:
        rho = 1 / (s @ y)
        left = np.eye(size) - rho * np.outer(s, y)
        H = left @ H @ left.T + rho * np.outer(s, s)
    return H


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_the_two_loops_are_the_bfgs_formula(count, rng):
    A = rng.standard_normal((6, 6))
    A = A @ A.T + np.eye(6)
    memory = solvers.LBFGSMemory(6, 5)
    pairs = [(s, A @ s) for s in rng.standard_normal((count, 6))]
    for pair in pairs:
        memory.see(*pair)
    g = rng.standard_normal(6)
    exact = -dense_bfgs(pairs[-5:], 6) @ g
    assert np.abs(memory.direction(g) - exact).max() < 1e-11 * np.abs(exact).max()


def test_without_pairs_it_is_steepest_descent(rng):
    g = rng.standard_normal(4)
    assert (solvers.LBFGSMemory(4, 3).direction(g) == -g).all()


def test_pairs_without_curvature_are_skipped(rng):
    s = rng.standard_normal(4)
    across = np.array([s[1], -s[0], 0.0, 0.0])
    memory = solvers.LBFGSMemory(4, 3)
    for y in (-s, 0 * s, across, across + 1e-12 * s, np.full(4, np.nan)):
        memory.see(s, y)
    assert not memory.pairs
    memory.see(s, across + s)
    assert len(memory.pairs) == 1


def test_the_memory_can_be_saved(rng):
    memory, other = solvers.LBFGSMemory(4, 3), solvers.LBFGSMemory(4, 3)
    g = rng.standard_normal(4)
    for count in range(6):
        other.set_state(memory.get_state())
        assert len(other.pairs) == min(count, 3)
        assert (other.direction(g) == memory.direction(g)).all()
        s = rng.standard_normal(4)
        memory.see(s, s + 0.1 * rng.standard_normal(4))


# -------------------------------------------------------------------------------------- Levenberg-Marquardt


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("damping", [1e-8, 1e-2, 10.0])
@pytest.mark.parametrize("rows", [1, 4, 7, 20])
def test_primal_and_dual_steps_solve_the_stacked_least_squares(rows, damping, ridge, rng):
    """δ minimizes |J δ + r|² + |√K (θ + δ)|² + λ|δ|²: a plain least-squares problem in stacked rows."""
    J, r, theta = rng.standard_normal((rows, 7)), rng.standard_normal(rows), rng.standard_normal(7)
    K = ridge * (np.arange(7) % 2)
    stacked = np.vstack([J, np.diag(np.sqrt(K)), math.sqrt(damping) * np.eye(7)])
    exact = np.linalg.lstsq(stacked, -np.concatenate([r, np.sqrt(K) * theta, np.zeros(7)]), rcond=None)[0]
    for equations in (solvers.NormalEquations(theta, K), solvers.DualEquations(theta, K, rows)):
        for part in (slice(0, 3), slice(3, rows)):
            equations.add(J[part], r[part])
        assert np.abs(equations.gradient - (J.T @ r + K * theta)).max() < 1e-13
        assert equations.scale == pytest.approx((J * J).sum(axis=0).max(), rel=1e-14)
        # The systems' condition is at most |J|²/λ < 1e2/1e-8.
        assert np.abs(equations.step(damping) - exact).max() < 1e-5 * max(1.0, np.abs(exact).max())
        if damping > 1e-3:
            assert np.abs(equations.step(damping) - exact).max() < 1e-11 * max(1.0, np.abs(exact).max())
