# SPDX-License-Identifier: MIT
"""Gradient descent optimizes

Lecture: Optimizing the Neural Network; Practicalities

    W ← W − η ∂L/∂W
    θₖ − θ* = (I − η H)ᵏ (θ₀ − θ*)

Forward pass, backward pass, "and make our update step along the gradient": against it, as L is a loss. Each
update sees the whole batch. For the line f = wx + b and least squares L is a paraboloid with the Hessian H,
and the second formula says where θ = (w, b) is after k updates. Steps are stable up to η = 2/λ, with λ the
greatest eigenvalue of H; a network of any shape goes down in the same way as long as its steps are short.
"""

import numpy as np

import chainrule as cr
from figures import Chart, Series, svg

rng = np.random.default_rng(0)
x = rng.uniform(-1, 2, size=(30, 1)).round(3)
y = (1.5 * x[:, 0] - 0.2 + 0.2 * rng.normal(size=30)).round(3)

design = np.hstack([x, np.ones_like(x)])
H = design.T @ design / len(x)  # L = 1/N ∑ ½ (yₙ − fₙ)²
best = np.linalg.solve(H, design.T @ y / len(x))  # the normal equations
eigenvalues, axes = np.linalg.eigh(H)
limit = 2 / eigenvalues[-1]


def descend(eta: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """θ after 0, 1, … updates, and how far the loss is above the least one."""
    net = cr.Sequential(cr.Linear(1, 1, init="zeros"), dtype="float64")
    optimizer, path = cr.GD(lr=eta), []
    for _ in range(steps + 1):
        path.append(np.concatenate([array.ravel() for array in net.state_dict().values()]))
        net.train_step(x, y, loss="least_squares", optimizer=optimizer)
    away = np.array(path) - best
    return np.array(path), 0.5 * np.einsum("ki,ij,kj->k", away, H, away)


shares = (0.1, 0.5, 1.05)
runs = [descend(share * limit, 40) for share in shares]
print(f"least at w = {best[0]:.4f}, b = {best[1]:.4f};  stable up to η = 2/λ = {limit:.4f}\n")
print("  k" + "".join(f"  η = {share:4} · 2/λ" for share in shares) + "    loss above the least")
for k in (0, 1, 2, 5, 10, 20, 40):
    print(f"{k:3}" + "".join(f"{above[k]:16.2e}" for _, above in runs))
for share, (path, above) in zip(shares, runs, strict=True):
    assert (np.diff(above) < 0).all() if share < 1 else above[-1] > above[0]
    for k in range(41):
        power = np.linalg.matrix_power(np.eye(2) - share * limit * H, k)
        assert np.allclose(path[k] - best, power @ (path[0] - best))

net = cr.mlp([1, 16, 1], activation="tanh", seed=0, dtype="float64")
wave = np.sin(4 * x[:, 0])
history = net.fit(x, wave, loss="least_squares", optimizer=cr.GD(lr=0.1), batch_size=30, epochs=2000)
assert (np.diff(history["loss"]) < 0).all()
print("\na tanh network on sin 4x, η = 0.1: loss after k updates")
print(", ".join(f"{k}: {history['loss'][k]:.4f}" for k in (0, 10, 100, 1000)))


def figure() -> str:
    """The way down between the contour lines, which are ellipses, and the loss on the way."""
    turn = np.linspace(0, 2 * np.pi, 121)
    circle = np.array([np.cos(turn), np.sin(turn)])
    curves = []
    for level in (0.01, 0.05, 0.2, 0.5, 1.0):
        ring = best[:, None] + axes @ (np.sqrt(2 * level / eigenvalues)[:, None] * circle)
        curves.append(Series("", ring[0], ring[1], "faint", colour=4))
    losses = []
    for place, (share, (path, above)) in enumerate(zip(shares, runs, strict=True)):
        name, kept = f"η = {share} · 2/λ", 5 if share > 1 else 41
        curves.append(Series(name, path[:kept, 0], path[:kept, 1], "both", colour=place))
        losses.append(Series(name, range(41), above, colour=place))
    return svg(
        Chart("Down the gradient", "w", "b", curves),
        Chart("40 updates", "updates k", "loss above the least", losses, log_y=True),
    )
