# SPDX-License-Identifier: MIT
"""The gradient through a hidden layer

Lecture: Let's Now Finish The Optimization

    φₙ = σ(W¹x + b¹), fₙ = wᵀφₙ + b
    ∇_{W¹}Lₙ = ∂Lₙ/∂fₙ ∇_{φₙ}fₙ J_{W¹}[φₙ]

The first factor is a number, the second the row wᵀ. The third has a number for each φ_j and each weight of
W¹, and most of them are 0, because the weight W¹_{jd} moves φ_j alone, at the rate φ_j (1 − φ_j) x_d.
"""

import numpy as np

import chainrule as cr
from differences import gradient
from figures import Chart, Series, svg

J, D = 3, 2
x, y = np.array([0.5, -1.0]), np.array([1.0])
hidden = cr.Sequential(cr.Linear(D, J), cr.Sigmoid(), seed=1, dtype="float64")
output = cr.Sequential(cr.Linear(J, 1), seed=2, dtype="float64")

phi = hidden(x)  # x → φₙ → fₙ first
f = output(phi)
dL_df = (y - f) * (-1)
df_dphi = cr.jacobian(output, phi)[0]  # (J,)
dphi_dW = cr.jacobian(hidden, x[None, :], wrt="parameters")["0.weight"][0]  # (J, shape of W¹) = (J, J, D)
dL_dW = dL_df * np.einsum("j,jkd->kd", df_dphi, dphi_dW)

by_hand = np.einsum("jk,j,d->jkd", np.eye(J), phi * (1 - phi), x)
assert np.allclose(df_dphi, output.state_dict()["0.weight"][0])
assert np.allclose(dphi_dW, by_hand) and np.count_nonzero(dphi_dW) == J * D
print(f"J_W¹[φ] has {dphi_dW.size} numbers, {np.count_nonzero(dphi_dW)} of them not 0")

# the same in one piece: nobody forms J_W¹[φ], a row times it is an outer product
net = cr.Sequential(*hidden.layers, *output.layers, dtype="float64")
weights = [*hidden.state_dict().values(), *output.state_dict().values()]
net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))
_, grads = net.value_and_grad(x[None, :], y, loss="least_squares")


def L(W):
    """The loss with other weights W¹."""
    phi = 1 / (1 + np.exp(-(W @ x + weights[1])))
    return 0.5 * float(y[0] - weights[2][0] @ phi - weights[3][0]) ** 2


by_differences = gradient(L, weights[0])
assert np.allclose(grads["0.weight"], dL_dW) and np.allclose(by_differences, dL_dW, atol=1e-9)
print("\nj  d   three factors   value_and_grad   by differences")
for j, d in np.ndindex(J, D):
    numbers = dL_dW[j, d], grads["0.weight"][j, d], by_differences[j, d]
    print(f"{j + 1}  {d + 1}  " + "".join(f"{number:14.6f}   " for number in numbers).rstrip())


def figure() -> str:
    """How far differences are from the chain rule, for steps of all sizes."""
    steps = 10.0 ** np.arange(-12, 0.1, 0.25)
    errors = [abs(gradient(L, weights[0], h) - dL_dW).max() for h in steps]
    curves = [
        Series("(L(W¹ + h) − L(W¹ − h)) / 2h against the chain rule", steps, errors, "both"),
        Series("∝ h², the cut-off terms of Taylor's series", steps[28:], steps[28:] ** 2 / 50, "dashed"),
        Series("∝ 1/h, the rounding of L", steps[:29], 2e-17 / steps[:29], "dashed"),
    ]
    return svg(Chart("The error of differences", "step h", "greatest error", curves, log_x=True, log_y=True))
