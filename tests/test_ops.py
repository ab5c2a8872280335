# SPDX-License-Identifier: MIT
"""Every op, each check on every row of one table: forward, vjp and jvp against formulas written anew."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from chainrule import _core, reference
from conftest import assert_same_bits, assert_within, eps, in_ulps

INF, LOG2, PEAK = math.inf, math.log(2), 2 / math.sqrt(math.tau)  # PEAK = 2 φ(0), φ the normal density
LD = np.longdouble


def exact_sigmoid(x):
    small = np.exp(-np.abs(x))
    return np.where(x < 0, small, 1) / (1 + small)


def exact_leaky(x, a):
    return np.where(x > 0, x, a * x)


def exact_elu(x, a):
    return np.where(x > 0, x, a * np.expm1(-np.abs(x)))


def exact_softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def exact_cdf(x):
    """erfc(z)/2 at z = −x/√2, in double at the rounded z, moved by the rest: erfc′(z) = −2/√π e^(−z²)."""
    z = -x / np.sqrt(LD(2))
    near = np.clip(z, -30, 30).astype(float)  # erfc is 2 or below the smallest number beyond
    rest = np.clip(z, -30, 30) - near
    tail = np.vectorize(math.erfc, otypes=[float])(near) / LD(2)
    return tail - np.exp(-LD(1) * near * near) * rest / np.sqrt(LD(np.pi))


def exact_softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def exact_log_softmax(x):
    z = np.sort(x - x.max(axis=-1, keepdims=True), axis=-1)[
        ..., :-1
    ]  # without the largest, which is log1p's 1
    return x - x.max(axis=-1, keepdims=True) - np.log1p(np.exp(z).sum(axis=-1, keepdims=True))


class Row(NamedTuple):
    name: str
    exact: Callable  # (x, a) in extended precision
    ulp: float  # forward's error in units of the last place, as the op's header states it
    values: tuple = ()  # g(−∞), g(0), g(∞)
    slopes: tuple = ()  # g′(−∞), g′(0), g′(∞)
    bend: float = 0.0  # g″(0); it is 0 at both ends
    a: float = 0.0
    kink: bool = False  # no first or no second derivative at 0
    scale: float = 4.0  # inputs are scale · N(0, 1)

    @property
    def elementwise(self):
        return bool(self.values)


# fmt: off
ROWS = [
    #   name         g                                  ulp  g(−∞, 0, ∞)        g′(−∞, 0, ∞)    g″(0), a, kink
    Row("identity",  lambda x, a: x,                    0,   (-INF, 0, INF),    (1, 1, 1)),
    Row("sigmoid",   lambda x, a: exact_sigmoid(x),     3,   (0, 0.5, 1),       (0, 0.25, 0)),
    Row("tanh",      lambda x, a: np.tanh(x),           5,   (-1, 0, 1),        (0, 1, 0)),
    Row("relu",      lambda x, a: np.maximum(x, 0),     0,   (0, 0, INF),       (0, 0, 1),      0, 0.0, True),
    Row("leaky_relu", lambda x, a: exact_leaky(x, a),   0.5, (-INF, 0, INF),    (0.1, 0.1, 1),  0, 0.1, True),
    Row("leaky_relu", lambda x, a: np.maximum(x, 0),    0,   (0, 0, INF),       (0, 0, 1),      0, 0.0, True),
    Row("elu",       lambda x, a: exact_elu(x, a),      3,   (-1, 0, INF),      (0, 1, 1),      0, 1.0, True),
    Row("elu",       lambda x, a: exact_elu(x, a),      3,   (-0.7, 0, INF),    (0, 0.7, 1),    0, 0.7, True),
    Row("gelu",      lambda x, a: x * exact_cdf(x),     9,   (0, 0, INF),       (0, 0.5, 1),    PEAK),
    Row("silu",      lambda x, a: x * exact_sigmoid(x), 4,   (0, 0, INF),       (0, 0.5, 1),    0.5),
    Row("softplus",  lambda x, a: exact_softplus(x),    3,   (0, LOG2, INF),    (0, 0.5, 1),    0.25),
    Row("softmax",   lambda x, a: exact_softmax(x),     6),
    Row("log_softmax", lambda x, a: exact_log_softmax(x), 3),
]
# fmt: on
def each(rows):
    return pytest.mark.parametrize(
        "row", rows, ids=[f"{row.name}-{row.a}" if row.a else row.name for row in rows]
    )


each_op, each_elementwise = each(ROWS), each([row for row in ROWS if row.elementwise])
SAVES = {name: saves for _, name, saves in _core.ops()}


def forward(row, x):
    return _core.op_forward(row.name, np.ascontiguousarray(x), row.a)


def saved(row, x, y):
    return np.ascontiguousarray(y if SAVES[row.name] == "output" else x)


def vjp(row, dy, x, y):
    return _core.op_vjp(row.name, np.ascontiguousarray(dy), saved(row, x, y), row.a)


def jvp(row, dx, x, y):
    return _core.op_jvp(row.name, np.ascontiguousarray(dx), saved(row, x, y), row.a)


def sample(rng, row, shape, dtype):
    """Inputs of the op's domain; where it has a kink, none nearer to it than a finite difference reaches."""
    x = row.scale * rng.standard_normal(shape)
    return np.where(np.abs(x) < 1e-3, 1e-3, x).astype(dtype) if row.kink else x.astype(dtype)


def exact(row, x):
    with np.errstate(under="ignore", over="ignore"):
        return np.asarray(row.exact(x.astype(LD), LD(np.asarray(row.a, x.dtype))), LD)


def allowed(row, x, isa):
    """Forward's error in ulps at x: what its header states, and what no formula in this precision avoids.

    Row-wise: the gap max − x is rounded, by gap eps/2, and so are its exponential and their sum: by as many
    ulps as the exponentials' mean of the gap. The baseline has no fused multiply-add: polynomials round twice
    a term, and gelu's x² cannot carry its rounding. Where longdouble is no wider than double, the oracle errs
    as well: its x/√2 is rounded twice, which moves erfc by up to x² eps, two ulps each.
    """
    ulp = np.full(x.shape, row.ulp * (2.0 if isa == "baseline" else 1.0))
    if not row.elementwise:
        gap = x.max(axis=-1, keepdims=True) - x.astype(float)
        others = np.exp(-gap) * (np.arange(x.shape[-1]) != gap.argmin(axis=-1)[:, None])
        ulp += (gap * others).sum(axis=-1, keepdims=True) / np.maximum(
            others.sum(axis=-1, keepdims=True), 1e-300
        )
        ulp += gap if row.name == "softmax" else 0
    if row.name == "gelu" and isa == "baseline":
        ulp += np.square(x, dtype=float)
    if np.finfo(LD).eps < eps(np.float64) / 4:
        return ulp
    return ulp + 4 + (2 * np.square(x, dtype=float) if row.name == "gelu" else 0)


def assert_right(row, x, y, isa, what=""):
    """y = g(x) to the allowed ulps; in x Φ(x), the last place of a subnormal Φ counts |x| times."""
    right = exact(row, x)
    error, most = in_ulps(y, right, np.finfo(y.dtype).smallest_subnormal * np.abs(x)), allowed(row, x, isa)
    worst = np.unravel_index((error - most).argmax(), error.shape)
    if not (error <= most).all():
        pytest.fail(
            f"{what}{row.name}({x[worst]!r}) = {y[worst]!r}, exact {right[worst]!r}: "
            f"{error[worst]:.1f} ulp, allowed {most[worst]:.1f}"
        )


def size_of(row, v):
    """The size of the terms that a product with J sums: |v|, or its row's sum if J mixes columns."""
    v = np.abs(v.astype(float))
    return v if row.elementwise else np.broadcast_to(v.sum(axis=-1, keepdims=True), v.shape)


def roundings(row, columns):
    """A bound on the roundings in an element of a product with J: 16 in a slope, one a column in a sum."""
    return 16 + (0 if row.elementwise else columns)


def assert_products(row, v, x, y, what=""):
    """Both products with J are the reference's, which is given the very numbers that the engine saved."""
    bound = roundings(row, x.shape[1]) * eps(x.dtype) * size_of(row, v)
    rule, a = reference.OPS[row.name], float(x.dtype.type(row.a))
    v64, x64, y64 = v.astype(float), x.astype(float), y.astype(float)
    assert_within(vjp(row, v, x, y), rule.vjp(v64, x64, y64, a), bound, f"{what}vjp")
    assert_within(jvp(row, v, x, y), rule.jvp(v64, x64, y64, a), bound, f"{what}jvp")


def wide_range(dtype):
    """Numbers of every size: the middle, the tails until e^x leaves the type, magnitudes down to 10⁻³⁰."""
    top = 120.0 if dtype == np.float32 else 800.0
    tiny = np.logspace(-30, 1, 400)
    x = np.concatenate([np.linspace(-20, 20, 4001), np.linspace(-top, top, 1601), tiny, -tiny])
    return x.astype(dtype)


# ---- values ------------------------------------------------------------------------------------------------


@each_op
def test_forward_is_right_to_the_stated_ulps(row, isa, dtype):
    """A wrong coefficient, range reduction or branch anywhere, underflow and overflow included."""
    x = wide_range(dtype)
    x = x[: len(x) // 7 * 7].reshape(-1, 7)
    assert_right(row, x, forward(row, x), isa)


@each_op
def test_forward_equals_reference(row, isa, rng):
    """Engine and reference that mean different functions; erfc's rounded argument adds x² ulps, twice."""
    x = sample(rng, row, (23, 19), np.float64)
    y = reference.OPS[row.name].forward(x, row.a)
    bound = (2 * allowed(row, x, isa) + 2 + (2 * x * x if row.name == "gelu" else 0)) * np.spacing(np.abs(y))
    assert_within(forward(row, x), y, bound, row.name)


@each_elementwise
def test_limits(row, isa, dtype):
    """inf − inf or 0 · inf left somewhere, or overflow far before the end of the range."""
    x = np.array([[-INF, -1e4, -0.0, 0.0, 1e4, INF, math.nan]], dtype)
    y = forward(row, x)
    left, zero, right = np.asarray(row.values, dtype)
    far = -1e4 * row.a if row.name == "leaky_relu" else max(left, -1e4)
    expected = [left, far, zero, zero, min(right, 1e4), right]
    assert_within(
        y[0, :6], np.array(expected, dtype), eps(dtype) * np.array([0, 1e4, 1, 1, 1e4, 0]), row.name
    )
    assert np.isnan(y[0, 6])
    slopes = vjp(row, np.ones_like(x), x, y)[0, [0, 1, 2, 3, 4, 5]]
    left, zero, right = row.slopes
    assert_within(slopes, [left, left, zero, zero, right, right], 4 * eps(dtype), f"{row.name}'")
    assert_same_bits(slopes, jvp(row, np.ones_like(x), x, y)[0, :6])


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_limits_of_rows(name, isa, dtype):
    """inf − inf where the maximum is subtracted; overflow; NaN or −inf that spoils other rows or columns."""
    x = np.array(
        [
            [0, 0, 0, 0],
            [0, INF, 1, -INF],
            [-INF, 0, 0, -INF],
            [1e4, -1e4, 1e4, 0],
            [-INF] * 4,
            [1, math.nan, 2, 3],
        ],
        dtype,
    )
    y = _core.op_forward(name, x, 0.0)
    p = np.array([[1, 1, 1, 1], [0, 4, 0, 0], [0, 2, 2, 0], [2, 0, 2, 0], [1, 1, 1, 1]]) / 4
    if name == "softmax":
        assert_within(y[:5], p, eps(dtype))
    else:
        assert_within(np.exp(y[:5]), p, 2 * eps(dtype))
        assert_within(y[3, 1], np.array(-20000 - LOG2), 2e4 * eps(dtype))
        assert y[1, 0] == y[2, 3] == -INF
    assert np.isnan(y[5]).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_ignores_a_shared_offset(name, isa, rng, dtype):
    """The maximum is not subtracted exactly: integers and an integer offset leave not one bit to rounding."""
    x = rng.integers(-30, 30, (9, 11)).astype(dtype)
    assert_same_bits(_core.op_forward(name, x, 0.0), _core.op_forward(name, x + 4096, 0.0))


@each_op
def test_nan_in_nan_out(row, isa, dtype):
    """A maximum or a comparison that drops NaN, in a full vector or in the tail, whatever the lane."""
    for columns in range(1, 41):
        x = np.ones((columns, columns), dtype)
        np.fill_diagonal(x, math.nan)
        nan = np.isnan(forward(row, x))
        assert (nan == (np.eye(columns, dtype=bool) if row.elementwise else True)).all(), f"{columns} columns"


# ---- derivatives -------------------------------------------------------------------------------------------


@each_op
def test_products_equal_reference(row, isa, dtype, rng):
    """A wrong derivative, at any input.

    A slope is a sum of at most two terms below 1.2, each right to 9 ulp; a row's sum rounds once a column.
    """
    x = sample(rng, row, (31, 33), dtype)
    y, v = forward(row, x), rng.standard_normal((31, 33)).astype(dtype)
    assert_products(row, v, x, y)


@each_op
def test_jvp_is_the_central_difference(row, isa, rng):
    """A derivative that is wrong in engine and reference alike: (g(x + ht) − g(x − ht)) / 2h knows g only.

    Errors: h²/6 |g‴| |t|³ with |g‴| < 4 over a direction of ±1 (row-wise: of length 1), and twice the ulps of
    g over 2h.
    """
    h = 1e-5
    x, t = sample(rng, row, (40, 17), np.float64), rng.choice([-1.0, 1.0], (40, 17))
    t = t if row.elementwise else t / math.sqrt(17)
    y = forward(row, x)
    difference = (forward(row, x + h * t) - forward(row, x - h * t)) / (2 * h)
    rounding = (row.ulp + 1) * eps(float) * (np.abs(y) + np.abs(x) + 1) / h
    assert_within(jvp(row, t, x, y), difference, 4 * h * h / 6 + rounding, row.name)


@each_op
def test_vjp_is_the_gradient_of_a_projection(row, isa, rng):
    """vjp transposed or summed over the wrong axis: the slope of c · g(x + ht) in h is (c J) · t."""
    h = 1e-5
    x, c, t = (
        sample(rng, row, (40, 17), np.float64),
        rng.standard_normal((40, 17)),
        rng.choice([-1.0, 1.0], (40, 17)),
    )
    t /= math.sqrt(17)
    y = forward(row, x)
    difference = (c * (forward(row, x + h * t) - forward(row, x - h * t))).sum(axis=1) / (2 * h)
    rounding = (row.ulp + 17) * eps(float) * (np.abs(c) * (np.abs(y) + np.abs(x) + 1)).sum(axis=1) / h
    assert_within(
        (vjp(row, c, x, y) * t).sum(axis=1), difference, np.abs(c).sum(axis=1) * 4 * h * h / 6 + rounding
    )


@each_op
def test_vjp_and_jvp_are_transposes(row, isa, dtype, rng):
    """u · (J v) = (u J) · v to rounding, without a step size: finite differences are too coarse to see it."""
    shape = (37, 29)
    x, u, v = (sample(rng, row, shape, dtype) for _ in range(3))
    y = forward(row, x)
    left = (u.astype(float) * jvp(row, v, x, y)).sum(axis=1)
    right = (vjp(row, u, x, y) * v.astype(float)).sum(axis=1)
    terms = np.abs(u.astype(float)) * size_of(row, v) + size_of(row, u) * np.abs(v.astype(float))
    assert_within(left, right, roundings(row, 29) * eps(dtype) * terms.sum(axis=1))


# ---- second order ------------------------------------------------------------------------------------------


def vjp_jvp(row, c, dx, dc, x, y):
    return _core.op_vjp_jvp(row.name, c, dx, dc, saved(row, x, y), row.a)


def jvp_jvp(row, dx, ddx, x, y):
    return _core.op_jvp_jvp(row.name, dx, ddx, saved(row, x, y), row.a)


def second_order_case(row, rng, shape, dtype):
    """x away from a kink, y, and four matrices of directions."""
    x = sample(rng, row, shape, dtype)
    return x, forward(row, x), [rng.standard_normal(shape).astype(dtype) for _ in range(4)]


def size_of_second(row, v, dx, dv, columns):
    """The size of the terms: |dv| and |v dx|, the latter with up to |x| < 20 in a bend; sums over a row."""
    return size_of(row, dv) + 3 * size_of(row, v) * (size_of(row, dx) if not row.elementwise else np.abs(dx))


@each_op
@pytest.mark.parametrize("columns", [1, 2, 7, 16, 17, 33])
def test_second_order_equals_reference(row, columns, isa, dtype, rng):
    """A wrong g″, or a wrong arrangement of the product rule; at widths around the vectors' lengths.

    A bend is a product of a few factors of at most 9 ulps each; gelu's density rounds x² twice.
    """
    x, y, (c, dx, dc, ddx) = second_order_case(row, rng, (9, columns), dtype)
    rule, a = reference.OPS[row.name], float(dtype.type(row.a))
    args = [v.astype(float) for v in (c, dx, dc, ddx, x, y)]
    step = (2 * roundings(row, columns) + 20) * eps(dtype)
    right = rule.vjp_jvp(args[0], args[1], args[2], *args[4:], a)
    assert_within(
        vjp_jvp(row, c, dx, dc, x, y), right, step * size_of_second(row, c, dx, dc, columns), "vjp_jvp"
    )
    right = rule.jvp_jvp(args[1], args[1], args[3], *args[4:], a)
    assert_within(
        jvp_jvp(row, dx, ddx, x, y), right, step * size_of_second(row, dx, dx, ddx, columns), "jvp_jvp"
    )


@each_op
def test_second_order_is_the_slope_of_the_first(row, isa, rng):
    """What engine and reference both have wrong: both maps against central differences of vjp and of jvp.

    Errors: h²/6 of the third derivative of g′, below 8, and the slope's ulps over h.
    """
    h = 1e-5
    x, y, (c, dx, dc, ddx) = second_order_case(row, rng, (20, 9), np.float64)
    dx = np.clip(dx, -1, 1)
    ends = [(x + s * dx, forward(row, x + s * dx), s) for s in (h, -h)]
    down = [vjp(row, c + s * dc, at, g) for at, g, s in ends]
    up = [jvp(row, dx + s * ddx, at, g) for at, g, s in ends]
    bound = (8 * h * h + 40 * eps(float) / h) * (1 + sum(size_of(row, v) for v in (c, dx, dc, ddx))) ** 2
    assert_within(vjp_jvp(row, c, dx, dc, x, y), (down[0] - down[1]) / (2 * h), bound, "vjp_jvp")
    assert_within(jvp_jvp(row, dx, ddx, x, y), (up[0] - up[1]) / (2 * h), bound, "jvp_jvp")


@each_elementwise
def test_bends_at_zero_and_at_the_ends(row, isa, dtype):
    """The value taken at a kink, 0, and 0 · ∞ or NaN where g″ fades out."""
    x = np.array([[-INF, -1e4, -0.0, 0.0, 1e4, INF, math.nan]], dtype)
    y, one, zero = forward(row, x), np.ones_like(x), np.zeros_like(x)
    bends = vjp_jvp(row, one, one, zero, x, y)
    assert_within(bends[0, :6], np.array([0, 0, row.bend, row.bend, 0, 0]), 4 * eps(dtype))
    assert np.isnan(bends[0, 6]) or row.name == "identity"
    assert_same_bits(bends, jvp_jvp(row, one, zero, x, y))


@each_op
def test_second_order_agrees_bit_for_bit(row, dtype, rng, on_fused_isas):
    """Instruction sets, and rows that know their neighbours."""
    x, y, (c, dx, dc, ddx) = second_order_case(row, rng, (7, 37), dtype)
    first, *others = on_fused_isas(
        lambda: np.stack([vjp_jvp(row, c, dx, dc, x, y), jvp_jvp(row, dx, ddx, x, y)])
    )
    for other in others:
        assert_same_bits(first, other, row.name)
    for i in range(7):
        one = slice(i, i + 1)
        assert_same_bits(vjp_jvp(row, c[one], dx[one], dc[one], x[one], y[one]), first[0, one], f"row {i}")


def test_relu_at_its_kink(isa, dtype):
    """relu′(0) = 0 at both zeros, and 1 as soon as x > 0: smallest numbers included."""
    x = np.array([[-0.0, 0.0, np.finfo(dtype).tiny, -np.finfo(dtype).tiny]], dtype)
    y = _core.op_forward("relu", x, 0.0)
    assert_same_bits(_core.op_vjp("relu", np.ones_like(x), y, 0.0), np.array([[0, 0, 1, 0]], dtype))


# ---- shapes, instruction sets, neighbours ------------------------------------------------------------------


@each_op
def test_every_width(row, isa, dtype, rng):
    """A tail that is skipped, done twice or read from padding: widths 1 to 70, around every vector length."""
    for columns in range(1, 71):
        x, v = (sample(rng, row, (3, columns), dtype) for _ in range(2))
        y = forward(row, x)
        assert y.dtype == dtype
        assert_right(row, x, y, isa, f"{columns} columns: ")
        assert_products(row, v, x, y, f"{columns} columns, ")


@each_op
@pytest.mark.parametrize("columns", [1, 5, 16])
def test_no_rows(row, isa, dtype, columns):
    """An empty batch that reads or writes a first row."""
    x = np.empty((0, columns), dtype)
    for result in (forward(row, x), vjp(row, x, x, x), jvp(row, x, x, x)):
        assert result.shape == (0, columns) and result.dtype == dtype


@each_op
def test_instruction_sets_agree_bit_for_bit(row, dtype, rng, on_fused_isas):
    """A formula whose bits depend on the vector length: contraction by the compiler, horizontal sums."""
    x, v = (sample(rng, row, (13, 67), dtype) for _ in range(2))
    x[0, :3] = [INF, -INF, 1e4]

    def run():
        y = forward(row, x)
        return np.stack([y, vjp(row, v, x, y), jvp(row, v, x, y)])

    first, *others = on_fused_isas(run)
    for other in others:
        assert_same_bits(first, other, row.name)


@each_op
def test_rows_do_not_know_their_neighbours(row, isa, dtype, rng):
    """Bits that depend on the batch a row is in: a tail of rows done by another code than the others."""
    x, v = (sample(rng, row, (7, 37), dtype) for _ in range(2))
    y = forward(row, x)
    dx = vjp(row, v, x, y)
    for i in range(7):
        one = slice(i, i + 1)
        assert_same_bits(forward(row, x[one]), y[one], f"row {i}")
        assert_same_bits(vjp(row, v[one], x[one], y[one]), dx[one], f"row {i}")


def test_the_table_has_every_op():
    assert {row.name for row in ROWS} == {
        name for kind, name, _ in _core.ops() if kind in ("elementwise", "rowwise")
    }
