# SPDX-License-Identifier: MIT
"""The logistic loss and its gradient

Lecture: Loss Function For Classification

    p(y=1|x) = σ(fₙ) = 1/(1 + exp(−fₙ))
    p(y=0|x) = 1 − σ(fₙ) = 1/(1 + exp(fₙ))
    L(w) = ∑ₙ yₙ log p(y=1|x) + (1 − yₙ) log p(y=0|x)
    L(w) = ∑ₙ yₙ log σ(fₙ) + (1 − yₙ) log(1 − σ(fₙ))
    ∂σ(z)/∂z = σ(z)(1 − σ(z))
    ∂Lₙ/∂fₙ = yₙ 1/(σ(fₙ)) σ(fₙ)(1 − σ(fₙ)) + (1 − yₙ) 1/(1 − σ(fₙ)) σ(fₙ)(1 − σ(fₙ))(−1)
    ∂Lₙ/∂fₙ = yₙ (1 − σ(fₙ)) − (1 − yₙ) σ(fₙ)

The sign: this L is the logarithm of the probability of the data, a log-likelihood. It is to become large, so
one learns by going up its gradient. A loss is to become small: what chainrule calls "logistic" is −L, with
the gradient σ(fₙ) − yₙ, and one learns by going down. Both are the same step.
"""

import numpy as np

import chainrule as cr
from differences import gradient
from figures import Chart, Series, svg


def sigma(z):
    return 1 / (1 + np.exp(-z))


def log_likelihood(f):
    """The lecture's L(w), letter by letter."""
    return (y * np.log(sigma(f)) + (1 - y) * np.log(1 - sigma(f))).sum()


y = np.array([1, 0, 1, 0])
f = np.array([2.0, 2.0, -0.5, -4.0])

# the lecture's helpful tip: the slope of σ, read off its value
z = f[:, None]
slope = cr.Sigmoid().vjp(z, sigma(z), np.ones_like(z))[:, 0]
assert np.allclose(slope, sigma(f) * (1 - sigma(f)))
assert np.allclose(slope, gradient(lambda f: sigma(f).sum(), f))

# the gradient in fₙ, with the lecture's sign and with ours
s = sigma(f)
assert np.allclose(1 - s, 1 / (1 + np.exp(f)))
lecture = y * (1 - s) - (1 - y) * s
assert np.allclose(lecture, y / s * s * (1 - s) + (1 - y) / (1 - s) * s * (1 - s) * (-1))
L, dL_df = cr.Logistic(reduction="sum")(z, y)
assert np.allclose(lecture, y - sigma(f)) and np.allclose(lecture, gradient(log_likelihood, f))
assert np.isclose(L, -log_likelihood(f)) and np.allclose(dL_df[:, 0], -lecture)

print("n  yₙ    fₙ   σ(fₙ)  σ′(fₙ)  lecture's ∂Lₙ/∂fₙ  chainrule's")
for n in range(4):
    print(f"{n + 1}  {y[n]:2d}  {f[n]:4.1f}  {sigma(f[n]):6.3f}  {slope[n]:6.3f}", end="")
    print(f"  {lecture[n]:17.3f}  {dL_df[n, 0]:11.3f}")
print(f"\nlog-likelihood L(w) = {log_likelihood(f):.3f}, loss −L(w) = {L:.3f}")

# letter by letter, log(1 − σ(f)) is log 0 for a large f; computed as −log(1 + exp(f)) it is not
assert 1 - sigma(800.0) == 0 and cr.Logistic()([[800.0]], [0])[0] == 800
print("for y = 0, f = 800: 1 − σ(f) rounds to 0, the loss is 800 all the same")


def figure() -> str:
    """Loss and gradient of one example, for both classes."""
    x = np.linspace(-5, 5, 101)
    charts = []
    for truth in (1, 0):
        values = [cr.Logistic()([[v]], [truth]) for v in x]
        curves = [
            Series("loss −Lₙ", x, [value for value, _ in values]),
            Series("its slope σ(fₙ) − yₙ", x, [slope[0, 0] for _, slope in values]),
        ]
        charts.append(Chart(f"One example with yₙ = {truth}", "logit fₙ", "loss, slope", curves))
    return svg(*charts)
