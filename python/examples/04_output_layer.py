# SPDX-License-Identifier: MIT
"""The gradient in the weights of the output layer

Lecture: Let's Now Finish The Optimization

    fₙ = wᵀφₙ + b
    ∂Lₙ/∂w = ∂Lₙ/∂fₙ ∂fₙ/∂w
    ∂fₙ/∂w = φₙ
    ∂Lₙ/∂w = (yₙ − fₙ)(−1) φₙ

The value fₙ stands in its own gradient: it must be computed first, φₙ → fₙ, with the weights of now. And if
we swap L, only the first factor changes.
"""

import numpy as np

import chainrule as cr
from differences import in_parameters

rng = np.random.default_rng(0)
phi = rng.normal(size=(6, 3)).round(2)  # six examples φₙ as rows
y = np.array([1, 0, 1, 1, 0, 1])
net = cr.Sequential(cr.Linear(3, 1), seed=0, dtype="float64")  # wᵀφ + b

# ∂fₙ/∂w, by the library and by the lecture
J = cr.jacobian(net, phi, wrt="parameters")["0.weight"]  # (examples, outputs, shape of w)
assert np.allclose(J[:, 0, 0, :], phi)


def show(name: str, numbers) -> None:
    print(f"{name:<16}" + "".join(f"{number:9.3f}" for number in numbers))


print(" " * 16 + "   ∂L/∂w₁   ∂L/∂w₂   ∂L/∂w₃    ∂L/∂b")
for loss in (cr.LeastSquares(reduction="sum"), cr.Logistic(reduction="sum")):
    f = net(phi)  # the forward pass comes first
    L, dL_df = loss(f, y)  # the only factor that knows the loss
    formula = [*(dL_df * phi).sum(axis=0), dL_df.sum()]
    show(loss.name, formula)

    value, grads = net.value_and_grad(phi, y, loss=loss)
    _, _, by_vjp = cr.vjp(net, phi, dL_df, params=True)  # the same from ∂L/∂f, whichever loss it came from
    numeric = in_parameters(net, lambda: net.evaluate(phi, y, loss=loss))
    show("  by differences", [*numeric["0.weight"][0], *numeric["0.bias"]])
    assert np.isclose(value, L)
    for result in (grads, by_vjp, numeric):
        assert np.allclose([*result["0.weight"][0], *result["0.bias"]], formula, atol=1e-7)

# with an fₙ from other weights the formula gives the gradient of no loss
stale = net(phi)
net.load_state_dict({"0.weight": net.state_dict()["0.weight"] + 1, "0.bias": np.zeros(1)})
_, grads = net.value_and_grad(phi, y, loss=cr.LeastSquares(reduction="sum"))
of_now, of_before = (((f - y[:, None]) * phi).sum(axis=0) for f in (net(phi), stale))
assert np.allclose(grads["0.weight"][0], of_now) and not np.allclose(of_now, of_before, atol=0.1)
print("\nleast squares after w has moved:")
show("  fₙ of now", of_now)
show("  fₙ of before", of_before)
print("  the second is the gradient of no loss")
