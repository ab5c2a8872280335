# SPDX-License-Identifier: MIT
"""A network of L layers: forward, then backward

Lecture: Let's Generalize Everything

    x → φ¹ → ⋯ → φᴸ⁻¹ → φᴸ → L
    ∂L/∂φˡ = ∇_{φᴸ}L J_{φᴸ⁻¹}[φᴸ] ⋯ J_{φˡ}[φˡ⁺¹]
    ∂L/∂Wˡ = ∇_{φᴸ}L J_{φᴸ⁻¹}[φᴸ] ⋯ J_{φˡ}[φˡ⁺¹] J_{Wˡ}[φˡ]
    ∂L/∂Wˡ = ∂L/∂φˡ ∂φˡ/∂Wˡ

Step 1 passes x through the network and stores every φˡ. Step 2 begins with the row ∂L/∂φᴸ and multiplies it
from the right by one Jacobian after the other. On its way down it passes every ∂L/∂φˡ, and each of these
gives the gradient in the weights of its layer. A layer here is one map: Wφ + b is one, tanh is the next.
"""

import numpy as np

import chainrule as cr
from differences import in_parameters
from figures import Chart, Series, svg

rng = np.random.default_rng(0)
X, y = rng.normal(size=(8, 4)).round(2), rng.integers(0, 3, size=8)  # 8 examples, 3 classes
net = cr.mlp([4, 6, 5, 3], activation="tanh", seed=0, dtype="float64")
state, loss = net.state_dict(), cr.CrossEntropy()

trace = net.trace(X)  # step 1
_, dL_df = loss(trace.phi[-1], y)
trace.backward(dL_df)  # step 2

# step 2 by hand, for the first example: the row times one Jacobian after the other
row = dL_df[0]
for ell in range(len(net), 0, -1):
    assert np.allclose(row, trace.dphi[ell][0])
    linear = isinstance(net[ell - 1], cr.Linear)
    if linear:  # J_Wˡ[φˡ] = I ⊗ φˡ⁻¹ᵀ, all examples together
        rows = zip(trace.dphi[ell], trace.phi[ell - 1], strict=True)
        terms = [c @ np.kron(np.eye(len(c)), phi) for c, phi in rows]
        assert np.allclose(trace.grads[f"{ell - 1}.weight"].ravel(), sum(terms))
    row = row @ (state[f"{ell - 1}.weight"] if linear else np.diag(1 - trace.phi[ell][0] ** 2))
assert np.allclose(row, trace.dphi[0][0])

numeric = in_parameters(net, lambda: net.evaluate(X, y, loss=loss))
for name, slopes in numeric.items():
    assert np.allclose(trace.grads[name], slopes, atol=1e-8)

print("l  layer          φˡ      |∂L/∂φˡ|  |∂L/∂Wˡ|  by differences")
print(f"0  {'x':<13}  {trace.phi[0].shape!s:<6}  {np.linalg.norm(trace.dphi[0]):8.4f}")
for ell in range(1, len(net) + 1):
    line = f"{ell}  {net[ell - 1]!r:<13}  {trace.phi[ell].shape!s:<6}  {np.linalg.norm(trace.dphi[ell]):8.4f}"
    name = f"{ell - 1}.weight"
    if name in state:
        line += f"  {np.linalg.norm(trace.grads[name]):8.4f}  {np.linalg.norm(numeric[name]):14.4f}"
    print(line)


def sizes(activation: str) -> list[float]:
    """|∂L/∂φˡ| after each of 20 layers of 32 units, relative to the last one."""
    deep = cr.mlp([4, *[32] * 20, 3], activation=activation, seed=0, dtype="float64")
    trace = deep.trace(X)
    trace.backward(loss(trace.phi[-1], y)[1])
    norms = [float(np.linalg.norm(trace.dphi[ell])) for ell in range(2, len(deep), 2)]
    return [norm / norms[-1] for norm in norms]


def figure() -> str:
    """What a long product of Jacobians does to the row, for three activations."""
    ell = list(range(1, 21))
    curves = [Series(name, ell, sizes(name), "both") for name in ("relu", "tanh", "sigmoid")]
    title = "Slopes of at most ¼ vanish in a product"
    return svg(Chart(title, "hidden layer l", "|∂L/∂φˡ|, last = 1", curves, log_y=True))
