# SPDX-License-Identifier: MIT
"""Least squares and its gradient

Lecture: Loss Function For Regression

    L(w) = ½ ∑ₙ (yₙ − fₙ)²
    ∂L/∂fₙ = (yₙ − fₙ)(−1)

Every fₙ stands in one term of the sum, so its derivative is that term's alone: the prediction minus the
truth. A prediction that is too high is pulled down, one that is too low is pulled up, each by as much as it
is wrong.
"""

import numpy as np

import chainrule as cr
from differences import gradient
from figures import Chart, Series, svg

y = np.array([1.0, 2.0, -0.5, 3.0])  # the truth
f = np.array([0.2, 2.6, 1.0, 2.5])  # what some model predicts

loss = cr.LeastSquares(
    reduction="sum"
)  # ∑ₙ, as in the lecture; "mean" would divide by the number of examples
L, dL_df = loss(f[:, None], y)  # value and gradient come from one function: they cannot disagree

by_formula = (y - f) * (-1)
by_differences = gradient(lambda f: loss(f[:, None], y)[0], f)
assert np.isclose(L, 0.5 * ((y - f) ** 2).sum())
assert np.array_equal(dL_df[:, 0], by_formula)
assert np.allclose(dL_df[:, 0], by_differences, atol=1e-8)

print("n     yₙ     fₙ     Lₙ   ∂L/∂fₙ   by differences")
for n in range(len(y)):
    L_n = loss(f[n : n + 1, None], y[n : n + 1])[0]
    assert np.isclose(L_n, 0.5 * (y[n] - f[n]) ** 2)
    print(f"{n + 1}  {y[n]:5.2f}  {f[n]:5.2f}  {L_n:5.3f}  {dL_df[n, 0]:7.3f}  {by_differences[n]:15.3f}")
print(f"\nL(w) = {L:.3f}, the sum of the Lₙ")


def figure() -> str:
    """Loss and gradient of one example against its prediction."""
    x = np.linspace(-2, 4, 61)
    values = [loss([[v]], [1.0]) for v in x]
    curves = [
        Series("Lₙ = ½(yₙ − fₙ)²", x, [value for value, _ in values]),
        Series("∂Lₙ/∂fₙ = fₙ − yₙ", x, [slope[0, 0] for _, slope in values]),
    ]
    return svg(Chart("One example with yₙ = 1", "prediction fₙ", "loss, slope", curves, marks=[(1, "yₙ")]))
