# SPDX-License-Identifier: MIT
"""Matrix products: exact where integers leave nothing to rounding, bounded elsewhere, whatever the tiling."""

import itertools

import numpy as np
import pytest

from chainrule import _core
from conftest import assert_same_bits, assert_within, eps

FORMS = pytest.mark.parametrize("form", ["nn", "tn"])


def product(form, a, b, bias=None):
    """a b (+ bias) by the engine: "nn" is the layer's X Wᵀ + b; "tn", the gradient's dZᵀ X, is handed aᵀ."""
    return _core.gemm(form, np.ascontiguousarray(a.T if form == "tn" else a), np.ascontiguousarray(b), bias)


def poison(form, dtype):
    """Leaves NaN in every buffer that the engine keeps: what is read but never written shows afterwards."""
    product(form, np.full((300, 300), np.nan, dtype), np.full((300, 300), np.nan, dtype))


def integers(rng, shape, dtype, top):
    return rng.integers(-top, top, shape, endpoint=True).astype(dtype)


@FORMS
def test_every_shape_to_40_is_exact(form, isa, dtype, rng):
    """Any index that is off by one, in any tile and tail: 64 000 shapes, integers, not the smallest error
    allowed.

    Sums stay below 40 · 64 · 128 + 128 < 2²⁴, where float32 has every integer. prefix[K] is the product of
    the first K.
    """
    poison(form, dtype)
    a, b, bias = (integers(rng, s, dtype, t) for s, t in (((40, 40), 64), ((40, 40), 128), (40, 128)))
    prefix = np.concatenate(
        [np.zeros((1, 40, 40)), np.cumsum(a.T[:, :, None] * b[:, None, :], axis=0)]
    ).astype(dtype)
    for m, k in itertools.product(range(1, 41), repeat=2):
        left = np.ascontiguousarray(a[:m, :k].T if form == "tn" else a[:m, :k])
        for n in range(1, 41):
            add = bias[:n] if form == "nn" and (m + n + k) % 2 else None
            expected = prefix[k, :m, :n] if add is None else prefix[k, :m, :n] + add
            got = _core.gemm(form, left, np.ascontiguousarray(b[:k, :n]), add)
            if not (got.shape == (m, n) and (got == expected).all()):
                pytest.fail(
                    f"{form} {m}×{k} by {k}×{n}, bias {add is not None}: error {np.abs(got - expected).max()}"
                )


EDGES = [1, 2, 7, 31, 33, 63, 65, 95, 97, 127, 129, 191, 193, 255, 257]
SKINNY = [
    (1, 257, 257), (257, 1, 257), (257, 257, 1), (1, 1, 4099), (4099, 1, 1), (1, 4099, 1), (3, 2, 10007),
    (2, 5003, 3),
]  # fmt: skip


@FORMS
def test_odd_sizes_and_skinny_shapes_are_exact(form, isa, dtype, rng):
    """The edges of cache blocks, where the first is right and the second is not. Sums < 10007 · 64 < 2²⁴."""
    poison(form, dtype)
    for m, n, k in SKINNY + [tuple(rng.choice(EDGES, 3)) for _ in range(60)]:
        a, b, bias = (integers(rng, s, dtype, 8) for s in ((m, k), (k, n), n))
        exact = a.astype(float) @ b.astype(float)
        assert (product(form, a, b) == exact).all(), f"{form} {m}×{k} by {k}×{n}"
        if form == "nn":
            assert (product(form, a, b, bias) == exact + bias).all(), f"{m}×{k} by {k}×{n} with bias"


@FORMS
@pytest.mark.parametrize("m, n, k", [(1000, 777, 501), (129, 1030, 2049), (33, 7, 4096)])
def test_large_products_by_projection(form, m, n, k, isa, dtype, rng):
    """Freivalds' check, in extended precision: C v = A (B v) for a random v, without a second matrix product
    to trust.

    Bound: an element sums K products in order with one rounding each (two in the baseline): K eps |A||B|.
    """
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    v = rng.choice([-1.0, 1.0], n)
    exact = (a.astype(np.longdouble) * (b.astype(np.longdouble) * v).sum(axis=1)).sum(axis=1)
    got = (product(form, a, b).astype(np.longdouble) * v).sum(axis=1)
    bound = (k + 1) * eps(dtype) * (np.abs(a).astype(float) @ np.abs(b).astype(float).sum(axis=1))
    # Errors have independent signs: N of them are about √N of one; a bound of N could hide a wrong element.
    assert_within(got, exact, bound * 8 / np.sqrt(n), f"{form} ")


@FORMS
def test_not_a_number_reaches_its_row_or_column_alone(form, isa, dtype, rng):
    """0 · NaN skipped as 0, or a NaN in the last element that falls into the neighbour's tile."""
    for size in (*range(1, 20), 31, 33, 64, 65, 97):
        a, b = np.zeros((size, size), dtype), integers(rng, (size, size), dtype, 4)
        for i in {0, size // 2, size - 1}:
            a[i, size - 1 - i] = np.nan
            only = np.zeros((size, size), bool)
            only[i] = True
            assert (np.isnan(product(form, a, b)) == only).all(), f"row {i} of {size}"
            assert (np.isnan(product(form, b, a.T)) == only.T).all(), f"column {i} of {size}"
            a[i, size - 1 - i] = 0


@FORMS
def test_infinity_is_a_number_like_others(form, isa, dtype):
    """inf · 0 is NaN, inf · 1 is inf, inf − inf is NaN: no shortcut may say otherwise."""
    a = np.array([[np.inf, 1], [1, 1], [np.inf, -np.inf]], dtype)
    b = np.array([[0, 1, -1], [1, 1, -1]], dtype)
    expected = np.array([[np.nan, np.inf, -np.inf], [1, 2, -2], [np.nan, np.nan, np.nan]], dtype)
    np.testing.assert_array_equal(product(form, a, b), expected)


@FORMS
@pytest.mark.parametrize("m, n, k", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_empty_sides(form, m, n, k, isa, dtype):
    """A loop that runs once too often; with no terms to add, a product is 0, not what lay in memory."""
    poison(form, dtype)
    for bias in [None, np.ones(n, dtype)] if form == "nn" else [None]:
        got = product(form, np.ones((m, k), dtype), np.ones((k, n), dtype), bias)
        assert got.shape == (m, n) and (got == k + (bias is not None)).all()


@FORMS
def test_bits_do_not_depend_on_the_tile(form, isa, dtype, rng):
    """Rows or columns at the end of a tile done in another order than those inside it."""
    a, b = rng.standard_normal((97, 70)).astype(dtype), rng.standard_normal((70, 131)).astype(dtype)
    whole = product(form, a, b)
    for m in (1, 2, 5, 6, 7, 96):
        assert_same_bits(product(form, a[:m], b), whole[:m], f"{m} rows")
        assert_same_bits(product(form, a[-m:], b), whole[-m:], f"last {m} rows")
    for n in (5, 6, 15, 16, 17, 33, 64, 65, 130):
        assert_same_bits(product(form, a, b[:, :n]), whole[:, :n], f"{n} columns")
        assert_same_bits(product(form, a, b[:, -n:]), whole[:, -n:], f"last {n} columns")


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bits_of_few_columns_do_not_depend_on_the_rows(n, isa, dtype, rng):
    """Up to four columns are dot products, several rows at a time: rows that share their lanes' sums."""
    a, b = rng.standard_normal((97, 70)).astype(dtype), rng.standard_normal((70, n)).astype(dtype)
    bias = rng.standard_normal(n).astype(dtype)
    whole = product("nn", a, b, bias)
    for m in (1, 2, 7, 8, 15, 16, 17, 96):
        assert_same_bits(product("nn", a[:m], b, bias), whole[:m], f"{m} rows")
        assert_same_bits(product("nn", a[-m:], b, bias), whole[-m:], f"last {m} rows")
    for j in range(n):
        assert_same_bits(product("nn", a, b[:, j:], bias[j:]), whole[:, j:], f"columns from {j}")


@FORMS
@pytest.mark.parametrize(
    "m, n, k", [(97, 131, 70), (6, 64, 300), (257, 33, 1), (5, 7, 2049), (33, 1, 65), (5, 4, 129)]
)
def test_instruction_sets_agree_bit_for_bit(form, m, n, k, dtype, rng, on_fused_isas):
    """Sums split over lanes or over K, whose order depends on the vector length."""
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    first, *others = on_fused_isas(lambda: product(form, a, b))
    for other in others:
        assert_same_bits(first, other)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_forms_agree_bit_for_bit(dtype, isa, rng):
    """Forward and gradient products that sum in different orders."""
    a, b = rng.standard_normal((67, 129)).astype(dtype), rng.standard_normal((129, 35)).astype(dtype)
    assert_same_bits(product("nn", a, b), product("tn", a, b))
