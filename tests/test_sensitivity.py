# SPDX-License-Identifier: MIT
"""Forward mode along one input alone, which reads one column of the first layer's weights."""

import numpy as np
import pytest

import chainrule as cr
from test_calculus import randomize
from test_own_parts import OwnTanh


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 4, 5, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("inputs", [1, 16, 32, 33, 64, 65, 70])
def test_sensitivity_reads_its_column_of_weights(inputs, outputs, bias, dtype, rng):
    """In every layout a first layer's weights have: narrow and wide, whole panels and parts of one."""
    first = cr.Linear(inputs, outputs, bias=bias)
    net = randomize(cr.Sequential(first, cr.Tanh(), cr.Linear(outputs, 3), dtype=dtype.name), rng)
    X = rng.standard_normal((5, inputs)).astype(dtype)
    for d in range(inputs):
        unit = np.zeros_like(X)
        unit[:, d] = 1
        np.testing.assert_array_equal(cr.sensitivity(net, X, d), cr.jvp(net, X, unit)[1])


def test_sensitivity_of_a_chain_that_begins_otherwise(rng):
    for first in (cr.SiLU(), cr.Softmax(), cr.Dropout(0.5), OwnTanh()):
        net = randomize(cr.Sequential(first, cr.Linear(6, 4), cr.Tanh(), dtype="float64"), rng)
        X = rng.standard_normal((5, 6))
        got = np.stack([cr.sensitivity(net, X, d) for d in range(6)], axis=2)
        np.testing.assert_allclose(got, cr.jacobian(net, X), rtol=1e-12, atol=1e-14)
    alone = randomize(cr.Sequential(cr.Linear(6, 40), dtype="float64"), rng)
    for d in range(6):
        column = alone.state_dict()["0.weight"][:, d]
        np.testing.assert_array_equal(cr.sensitivity(alone, X, d), np.tile(column, (5, 1)))
