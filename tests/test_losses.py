# SPDX-License-Identifier: MIT
"""Every loss, each check on every row of one table: value, gradient, weights, reductions, tails, limits."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from chainrule import _core, reference
from conftest import assert_same_bits, assert_within, eps

INF = math.inf
NAN = math.nan


def reals(rng, rows, k):
    return 2 * rng.standard_normal((rows, k))


def probabilities(rng, rows, k):
    p = rng.random((rows, k))
    return p / p.sum(axis=1, keepdims=True)


class Row(NamedTuple):
    name: str
    targets: Callable = reals  # (rng, rows, columns) -> y
    a: float = 0.0
    limits: tuple = ()  # (f, y, value, gradient) of one example
    kinks: tuple = ()  # values of f − y without a derivative
    per_target: int = 1  # outputs for each target column


def counts(rng, rows, k):
    return rng.poisson(2.0, (rows, k)).astype(float)


def zeros_and_ones(rng, rows, k):
    return rng.integers(0, 2, (rows, k)).astype(float)


def labels(rng, rows, k):
    return rng.integers(0, k, rows)


LOG2 = math.log(2)
# fmt: off
ROWS = [
    Row("least_squares", limits=(
        ([1e4], [0], 5e7, [1e4]), ([-INF], [0], INF, [-INF]), ([3, 4], [0, 0], 12.5, [3, 4]))),
    Row("mse", limits=(
        ([1e4], [0], 1e8, [2e4]), ([INF], [0], INF, [INF]), ([3, 4], [0, 0], 12.5, [3, 4]))),
    Row("mae", kinks=(0,), limits=(
        ([5], [5], 0, [0]), ([INF], [0], INF, [1]), ([-1e4], [0], 1e4, [-1]),
        ([3, -4], [0, 0], 3.5, [0.5, -0.5]))),
    Row("huber", a=0.5, kinks=(-0.5, 0.5), limits=(
        ([2], [2], 0, [0]), ([0.5], [0], 0.125, [0.5]), ([-2], [0], 0.875, [-0.5]), ([INF], [0], INF, [0.5]),
        ([1e4], [0], 4999.875, [0.5]))),
    Row("pinball", a=0.25, kinks=(0,), limits=(
        ([2], [2], 0, [0]), ([2], [0], 1.5, [0.75]), ([0], [2], 0.5, [-0.25]), ([INF], [0], INF, [0.75]),
        ([-INF], [0], INF, [-0.25]))),
    Row("poisson", counts, limits=(
        ([0], [3], 1, [-2]), ([-INF], [0], 0, [0]), ([-INF], [2], INF, [-2]), ([-1e4], [0], 0, [0]),
        ([1e4], [3], INF, [INF]), ([INF], [3], INF, [INF]))),
    Row("gaussian_nll", per_target=2, limits=(
        ([0, 0], [2], 2, [-2, -1.5]), ([0, 1e4], [2], 5e3, [0, 0.5]), ([0, INF], [2], INF, [0, 0.5]),
        ([2, -1e4], [2], -5e3, [0, 0.5]), ([3, -INF], [2], INF, [INF, -INF]))),
    Row("logistic", zeros_and_ones, limits=(
        ([0], [1], LOG2, [-0.5]), ([1e4], [1], 0, [0]), ([1e4], [0], 1e4, [1]), ([-1e4], [1], 1e4, [-1]),
        ([-1e4], [0], 0, [0]), ([INF], [1], 0, [0]), ([-INF], [0], 0, [0]), ([INF], [0], INF, [1]),
        ([-INF], [1], INF, [-1]), ([INF], [0.25], INF, [0.75]), ([1e-8], [1], LOG2 - 5e-9, [-0.5 + 2.5e-9]))),
    Row("logistic", lambda rng, rows, k: rng.random((rows, k)), limits=(([0], [0.25], LOG2, [0.25]),)),
    Row("cross_entropy", labels, limits=(
        ([0, 0], 1, LOG2, [0.5, -0.5]), ([0, 1e4], 1, 0, [0, 0]), ([0, 1e4], 0, 1e4, [-1, 1]),
        ([0, INF], 1, 0, [0, 0]), ([0, INF], 0, INF, [-1, 1]), ([0, -INF], 0, 0, [0, 0]),
        ([0, -INF], 1, INF, [1, -1]), ([-1e4, -1e4], 0, LOG2, [-0.5, 0.5]), ([7], 0, 0, [0]))),
    Row("cross_entropy", probabilities, limits=(
        ([0, 0], [0.25, 0.75], LOG2, [0.25, -0.25]), ([0, INF], [0, 1], 0, [0, 0]),
        ([0, -INF], [1, 0], 0, [0, 0]), ([0, INF], [0.5, 0.5], INF, [-0.5, 0.5]))),
]
# fmt: on
each_loss = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{ROWS.index(row)}")


def sample(row, rng, rows, k, dtype):
    """Outputs f and targets y, f − y no nearer to a kink than a finite difference reaches."""
    y = row.targets(rng, rows, k)
    f = 1.5 * rng.standard_normal((rows, k * row.per_target))
    for kink in row.kinks:
        f = np.where(np.abs(f - y - kink) < 1e-2, f + 0.1, f)
    return f.astype(dtype), y if y.dtype == np.int64 else y.astype(dtype)


def loss(row, f, y, weight=None, reduction="mean"):
    value, df = _core.loss(row.name, f, y, weight, row.a, reduction)
    assert isinstance(value, float) and df.shape == f.shape and df.dtype == f.dtype
    return value, df


def as64(*arrays):
    return [None if v is None else v if v.dtype == np.int64 else v.astype(float) for v in arrays]


def assert_equals_reference(row, f, y, weight, reduction, what=""):
    """Each term is right to 16 eps of its parts, which f, y and the value bound; sums round once a term."""
    f64, y64, w64 = as64(f, y, weight)
    value, df = loss(row, f, y, weight, reduction)
    each = reference.LOSSES[row.name](f64, y64, row.a)[0]
    parts = 1 + np.abs(each) + np.abs(f64).max(axis=1) * (2 + np.abs(y64).max())
    expected, gradient = reference.loss(row.name, f64, y64, w64, row.a, reduction)
    w = np.ones(len(f)) if weight is None else w64
    w = w / w.sum() if reduction == "mean" else w
    step = (16 + f.size) * eps(f.dtype)
    assert_within(np.array(value), np.array(expected), step * (w * parts).sum(), f"{what}value")
    assert_within(df, gradient, step * (np.abs(gradient) + w[:, None]), f"{what}gradient")


@each_loss
@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weights", ["none", "random", "some zero"])
def test_equals_reference(row, outputs, reduction, weights, isa, dtype, rng):
    """A factor of the number of outputs, rows or weights in the value or the gradient alone."""
    f, y = sample(row, rng, 11, outputs, dtype)
    weight = None if weights == "none" else rng.random(11).astype(dtype) + dtype.type(0.1)
    if weights == "some zero":
        weight[[0, 3, 10]] = 0
    assert_equals_reference(row, f, y, weight, reduction)


@each_loss
def test_every_width(row, isa, dtype, rng):
    """Columns lost or counted twice at the end of a row, or padding that leaks into a sum."""
    for outputs in range(1, 71):
        f, y = sample(row, rng, 3, outputs, dtype)
        assert_equals_reference(row, f, y, None, "mean", f"{outputs} outputs, ")


@each_loss
@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_is_that_of_the_value(row, outputs, reduction, isa, rng):
    """Value and gradient of two different functions, in engine and reference alike: projected on a random
    direction.

    Errors: h²/6 of the third derivative (below 6 times the parts of the value), and the value's rounding over
    h.
    """
    h = 1e-5
    f, y = sample(row, rng, 13, outputs, np.float64)
    weight, t = rng.random(13), rng.choice([-1.0, 1.0], f.shape)
    df = loss(row, f, y, weight, reduction)[1]
    difference = loss(row, f + h * t, y, weight, reduction)[0] - loss(row, f - h * t, y, weight, reduction)[0]
    parts = f.size * (np.exp(np.abs(f).max()) * (1 + np.abs(y).max()) ** 2)
    bound = (h * h + 40 * eps(float) / h) * parts / (13 if reduction == "mean" else 1)
    assert_within(np.array((df * t).sum()), np.array(difference / (2 * h)), bound)
    # The bound must be able to tell a wrong factor; a single class has no gradient.
    assert bound < 0.02 * np.abs(df).sum() or (row.name == "cross_entropy" and outputs == 1)


def hvp(row, f, y, t, weight=None, reduction="mean"):
    return _core.loss_hvp(row.name, f, y, t, weight, row.a, reduction)


@each_loss
@pytest.mark.parametrize("outputs", [1, 2, 5, 16, 17, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hvp_equals_reference(row, outputs, reduction, isa, dtype, rng):
    """A Hessian that forgets weights, rows, outputs or a mixed term; widths around the vectors' lengths."""
    f, y = sample(row, rng, 11, outputs, dtype)
    t, weight = rng.standard_normal(f.shape).astype(dtype), rng.random(11).astype(dtype) + dtype.type(0.1)
    for w in (None, weight):
        right = reference.loss_hvp(row.name, *as64(f, y, t), weight=as64(w)[0], a=row.a, reduction=reduction)
        share = reference.shares(11, as64(w)[0], reduction)[:, None]
        parts = (1 + np.abs(f).max()) ** 2 * (2 + np.abs(y).max()) ** 2 * np.exp(np.abs(f).max())
        bound = (16 + f.shape[1]) * eps(dtype) * share * parts * np.abs(t).sum(axis=1, keepdims=True)
        got = hvp(row, f, y, t, w, reduction)
        assert got.dtype == dtype
        assert_within(got, right, bound)


@each_loss
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_hvp_is_the_slope_of_the_gradient(row, outputs, isa, rng):
    """What engine and reference both have wrong; with weights. Symmetric, too: u · (H t) = t · (H u).

    Errors: h²/6 of the fourth derivative, and the gradient's rounding over h, of parts as above.
    """
    h = 1e-5
    f, y = sample(row, rng, 13, outputs, np.float64)
    weight, t, u = rng.random(13), *rng.choice([-1.0, 1.0], (2, *f.shape))
    ends = [loss(row, f + s * t, y, weight)[1] for s in (h, -h)]
    parts = np.exp(np.abs(f).max()) * (1 + np.abs(y).max()) ** 2
    got = hvp(row, f, y, t, weight)
    assert_within(got, (ends[0] - ends[1]) / (2 * h), (h * h + 40 * eps(float) / h) * parts)
    left, right = (u * got).sum(), (t * hvp(row, f, y, u, weight)).sum()
    assert abs(left - right) <= 40 * eps(float) * parts * f.size


@each_loss
def test_hvp_agrees_bit_for_bit(row, dtype, rng, on_fused_isas):
    """Instruction sets, and rows that know their neighbours."""
    f, y = sample(row, rng, 7, 18, dtype)
    t = rng.standard_normal(f.shape).astype(dtype)
    first, *others = on_fused_isas(lambda: hvp(row, f, y, t, None, "sum"))
    for other in others:
        assert_same_bits(first, other, row.name)
    for i in range(7):
        one = slice(i, i + 1)
        assert_same_bits(hvp(row, f[one], y[one], t[one], None, "sum"), first[one], f"row {i}")


@each_loss
def test_limits(row, isa, dtype):
    """0 · inf, inf − inf or overflow where the limit is finite; an undocumented gradient at a kink."""
    for f, y, value, gradient in row.limits:
        f = np.array([f], dtype)
        y = np.array([y]) if isinstance(y, int) else np.array([y], dtype)
        got, df = loss(row, f, y, None, "mean")
        what = f"f = {f[0]}, y = {y[0]}: "
        # 4 roundings of the result; an infinite one has to be infinite (and 0 to be 0)
        for ours, limit in ((np.array(got), np.array(value, float)), (df[0], np.array(gradient, float))):
            assert_within(ours, limit, 4 * eps(dtype) * np.where(np.isinf(limit), 0, np.abs(limit)), what)


@pytest.mark.parametrize("name", ["logistic", "cross_entropy"])
def test_sure_and_right_predictions_keep_their_digits(name, isa, dtype):
    """A loss computed as log of a number near 1: log1p(e⁻ᵗ) has all its digits however sure the prediction,
    −σ(−t) too.

    Bound: an ulp or two each for exp, log1p and the division, and t/2 eps of exp's argument is exact here.
    """
    for t in [1e-8, 0.5, 3.0, 10.0, 20.0, 40.0, 80.0]:
        t = float(dtype.type(t))
        if name == "logistic":
            f, y = np.array([[t]], dtype), np.array([[1.0]], dtype)
        else:
            f, y = np.array([[0.0, t, -INF]], dtype), np.array([1])
        value, df = _core.loss(name, f, y, None, 0.0, "mean")
        wrong = math.exp(-t) / (1 + math.exp(-t))
        exact = math.log1p(math.exp(-t))
        assert_within(np.array(value), np.array(exact), 8 * eps(dtype) * exact, f"value at t = {t}")
        assert_within(
            df[0, f.shape[1] // 2], np.array(-wrong), 8 * eps(dtype) * wrong, f"gradient at t = {t}"
        )


@pytest.mark.parametrize("offset", [-4096.0, 4096.0])
def test_cross_entropy_ignores_a_shared_offset(offset, isa, dtype, rng):
    """A maximum that is not subtracted exactly: with integers not one bit may change."""
    f, y = rng.integers(-20, 20, (9, 7)).astype(dtype), rng.integers(0, 7, 9)
    (a, da), (b, db) = (
        _core.loss("cross_entropy", g, y, None, 0.0, "mean") for g in (f, f + dtype.type(offset))
    )
    assert a == b
    assert_same_bits(da, db)


def test_labels_mean_one_hot(isa, dtype, rng):
    """Two code paths that disagree. Bound: 16 roundings of numbers below the largest logit."""
    f, labels = (4 * rng.standard_normal((31, 9))).astype(dtype), rng.integers(0, 9, 31)
    a, da = _core.loss("cross_entropy", f, labels, None, 0.0, "mean")
    b, db = _core.loss("cross_entropy", f, np.eye(9, dtype=dtype)[labels], None, 0.0, "mean")
    assert_within(np.array(a), np.array(b), 16 * eps(dtype) * np.abs(f).max())
    assert_within(da, db, 4 * eps(dtype) / 31)


@each_loss
def test_nan_stays_in_its_row(row, isa, dtype, rng):
    """A NaN that is dropped by a comparison or leaks into other rows' gradients."""
    for outputs in (1, 2, 5, 17):
        f, y = sample(row, rng, 5, outputs, dtype)
        clean = loss(row, f, y, None, "sum")[1]
        f[2, -1] = NAN
        value, df = loss(row, f, y, None, "sum")
        assert math.isnan(value) and np.isnan(df[2, -1])
        others = [0, 1, 3, 4]
        assert_same_bits(df[others], clean[others])


@each_loss
def test_weight_zero_takes_a_row_out(row, isa, dtype, rng):
    """Weights in the value but not in the gradient, or a denominator that counts rows instead of weights."""
    f, y = sample(row, rng, 9, 3, dtype)
    keep = np.array([0, 2, 3, 7, 8])
    weight = np.zeros(9, dtype)
    weight[keep] = 1
    value, df = loss(row, f, y, weight, "mean")
    alone, dalone = loss(row, np.ascontiguousarray(f[keep]), np.ascontiguousarray(y[keep]), None, "mean")
    assert_within(np.array(value), np.array(alone), 16 * eps(dtype) * (abs(alone) + 1))
    assert_within(df[keep], dalone, 4 * eps(dtype) * np.abs(dalone))
    assert (df[weight == 0] == 0).all()


@each_loss
def test_instruction_sets_agree_bit_for_bit(row, dtype, rng, on_fused_isas):
    f, y = sample(row, rng, 7, 37, dtype)
    weight = rng.random(7).astype(dtype)
    (value, df), *others = on_fused_isas(lambda: loss(row, f, y, weight, "mean"))
    for other, dother in others:
        assert value == other
        assert_same_bits(df, dother, row.name)


@each_loss
def test_a_row_does_not_know_its_neighbours(row, isa, dtype, rng):
    """Gradient bits that depend on the batch, beyond the reduction's common factor."""
    f, y = sample(row, rng, 7, 13, dtype)
    df = loss(row, f, y, None, "sum")[1]
    for i in range(7):
        assert_same_bits(loss(row, f[i : i + 1], y[i : i + 1], None, "sum")[1], df[i : i + 1], f"row {i}")


def test_the_table_has_every_loss():
    assert {row.name for row in ROWS} == {name for kind, name, _ in _core.ops() if kind == "loss"}


def test_the_second_derivative_of_huber_at_delta(isa, dtype):
    f, y, t = (np.array([row], dtype) for row in ([[0.5, -0.5, 0.25, 0.75]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]))
    f, y, t = (a.reshape(1, 4) for a in (f, y, t))
    got = _core.loss_hvp("huber", f, y, t, None, 0.5, "sum")
    assert got.tolist() == [[0.25, 0.25, 0.25, 0.0]]
