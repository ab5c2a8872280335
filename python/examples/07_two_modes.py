# SPDX-License-Identifier: MIT
"""Reverse mode and forward mode

Lecture: Let's Generalize Everything, the note on "reverse-mode" and "forward-mode"

    ∂Lₙ/∂x_{nd} = ((∇_{φᴸ}Lₙ J_{φᴸ⁻¹}[φᴸ]) ⋯ J_{φ¹}[φ²]) ∂φ¹/∂x_{nd}
    ∂Lₙ/∂x_{nd} = ∇_{φᴸ}Lₙ (J_{φᴸ⁻¹}[φᴸ] ⋯ (J_{φ¹}[φ²] ∂φ¹/∂x_{nd}))

One product, two orders. Reverse mode multiplies from Lₙ: a row at all times, and at its end the derivatives
in everything. Forward mode multiplies from x_{nd}: a column at all times, and at its end the derivative of
everything in that one number. Counted are multiplications for one example, beyond the forward pass; timed
are all 256 examples on one thread, forward pass included.
"""

import timeit

import numpy as np

import chainrule as cr
from figures import Chart, Series, svg

MODES = ("forward mode", "reverse mode")
D, H, O = 100, 64, 1
X, y = np.random.default_rng(0).normal(size=(256, D)), np.zeros(256)
net = cr.mlp([D, H, H, O], activation="tanh", seed=0, dtype="float64")

# one sensitivity, three ways
d, h = 7, 1e-5
step = h * np.eye(D)[d]
forward = cr.sensitivity(net, X, d, y, loss="least_squares")  # ∂Lₙ/∂x_nd for all n, one d
reverse = cr.input_gradient(net, X, y, loss=cr.LeastSquares(reduction="sum"))[:, d]
up, down = (0.5 * (y - net(X + s)[:, 0]) ** 2 for s in (step, -step))
assert np.allclose(forward, reverse, atol=1e-12)
assert np.allclose(forward, (up - down) / (2 * h), atol=1e-8)
print(f"∂Lₙ/∂x_nd for n = 1, d = {d}:  forward mode {forward[0]:.6f}, reverse mode {reverse[0]:.6f}\n")


def count(D: int, H: int, O: int) -> dict[str, tuple[int, int]]:
    """Multiplications in the Linear layers D → H → H → O: (forward mode, reverse mode)."""
    products = H * D + H * H + O * H  # a pass through all layers, upwards or downwards
    column = products - H * D + H  # ∂φ¹/∂x_d needs one column of W¹
    above = H * D * (H * H + O * H) + H * H * (O * H)  # a weight of W¹, or of W², moves what is above it
    return {
        "∂f/∂x_d, one d": (column, O * products),
        "∂f/∂x": (D * column, O * products),
        "∂f/∂W, all l": (above + products, O * (products - H * D + products)),
    }


def seconds(work) -> str:
    """The least of 60 runs, because whatever else the machine does only adds."""
    with cr.threads(1):
        return f"{1e3 * min(timeit.repeat(work, number=1, repeat=60)):7.2f} ms"


works = [
    (lambda: cr.sensitivity(net, X, d), lambda: cr.jacobian(net, X, mode="reverse")),
    (lambda: cr.jacobian(net, X, mode="forward"), lambda: cr.jacobian(net, X, mode="reverse")),
    (None, lambda: cr.vjp(net, X, np.ones((256, O)), params=True)),
]
assert count(D, H, O)["∂f/∂x"][1] == sum(W.size for W in net.state_dict().values() if W.ndim == 2)
print("                        forward mode          reverse mode")
for (what, counts), pair in zip(count(D, H, O).items(), works, strict=True):
    cells = [f"{n:12,} {seconds(work) if work else '':>10}" for n, work in zip(counts, pair, strict=True)]
    print(f"{what:<14}" + "".join(cells))


def figure() -> str:
    """The whole Jacobian: as many columns as inputs, or as many rows as outputs."""
    charts, sizes = [], [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    for title, label, shapes in (
        ("One output", "inputs D", [(n, 1) for n in sizes]),
        ("100 inputs", "outputs O", [(100, n) for n in sizes]),
    ):
        pairs = [count(D, H, O)["∂f/∂x"] for D, O in shapes]
        curves = [Series(mode, sizes, [pair[k] for pair in pairs], "both") for k, mode in enumerate(MODES)]
        charts.append(Chart(title, label, "multiplications for ∂f/∂x", curves, log_x=True, log_y=True))
    return svg(*charts)
