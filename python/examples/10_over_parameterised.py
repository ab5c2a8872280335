# SPDX-License-Identifier: MIT
"""Over-parameterised networks

Lecture: Why does this all work?, 2. lots of data, interpolating; 3. over-parameterization

    yₙ = f*(xₙ) + εₙ, n = 1, …, N

The truth f* is a network of 4 relu units; N = 80 examples have noise of variance 0.09. Networks of 1 to 320
units are trained to the end. The wide ones interpolate: their training error is 0, noise included. The test
error goes down, up to a peak where the training error gets to 0, and down again: double descent. The best of
all is about as wide as f*, but who knows f*; and even without noise it is wide networks that descend to 0.
"""

import numpy as np

import chainrule as cr
from figures import Chart, Series, svg

D, WIDTHS = 5, (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 40, 80, 160, 320)


def trained(width: int, N: int, seed: int, noise: float = 0.3) -> tuple[float, float]:
    """The mean squared errors in training, and in the test against the truth itself."""
    rng = np.random.default_rng(seed)
    X, unseen = rng.normal(size=(N, D)).round(3), rng.normal(size=(2000, D)).round(3)
    truth = cr.mlp([D, 4, 1], seed=1000 + seed, dtype="float64")
    scale = truth(unseen).std()  # of f*: an error of 1 is that of the best constant
    y = (truth(X)[:, 0] / scale + noise * rng.normal(size=N)).round(3)
    net = cr.mlp([D, width, 1], seed=seed, dtype="float64")
    how = {"loss": "mse", "optimizer": cr.Adam(lr=0.01), "schedule": cr.CosineAnnealingLR(4000)}
    net.fit(X, y, **how, batch_size=N, shuffle=False, epochs=4000)
    return net.evaluate(X, y, loss="mse"), net.evaluate(unseen, truth(unseen) / scale, loss="mse")


def quartiles(width: int, N: int) -> np.ndarray:
    """(quartile, training or test) of 8 runs."""
    return np.quantile([trained(width, N, seed) for seed in range(8)], (0.25, 0.5, 0.75), axis=0)


by_width = {H: quartiles(H, 80) for H in WIDTHS}
print("units  weights   training       test   (N = 80, medians of 8 runs; 1e-12: or less)")
for H, errors in by_width.items():
    print(f"{H:5}  {H * (D + 2) + 1:7}  {max(errors[1, 0], 1e-12):9.1e}  {errors[1, 1]:9.3f}")
assert all(by_width[H][2, 0] < 1e-6 for H in (80, 160, 320))  # interpolation
test = {H: errors[1, 1] for H, errors in by_width.items()}
least, worst = min(test, key=test.get), max(test, key=test.get)
assert 8 < worst < 80 and test[worst] > 2 * test[320]  # the second descent
print(f"test error: least {test[least]:.3f}, {least} units; worst {test[worst]:.3f}, {worst} units")

by_amount = {N: quartiles(40, N) for N in (10, 20, 40, 80, 160, 320, 640, 1280)}
assert by_amount[1280][1, 1] < 0.3 * by_amount[80][1, 1]
print(f"test error of 40 units: N = 80 {by_amount[80][1, 1]:.3f}, N = 1280 {by_amount[1280][1, 1]:.3f}")

found = {H: sum(trained(H, 80, s, noise=0.0)[0] < 1e-6 for s in range(20)) for H in (4, 8, 16, 24, 40, 80)}
assert found[4] < 5 and found[80] > 15
print("\nwithout noise, how many of 20 starts get the training error below 1e-6, by units")
print(", ".join(f"{H}: {starts}" for H, starts in found.items()))


def chart(title: str, x_label: str, results: dict, mark: tuple[float, str]) -> Chart:
    """Medians with their quartiles."""
    table = np.array(list(results.values())).T  # (training or test, quartile, x)
    curves = [
        Series(name, list(results), middle, "both", band=(low, high))
        for name, (low, middle, high) in zip(("training", "test, against f*"), table, strict=True)
    ]
    return Chart(title, x_label, "mean squared error", curves, log_x=True, marks=[mark])


def figure() -> str:
    """Both errors against width and against the amount of data; interpolation; luck."""
    floor = np.maximum([errors[1, 0] for errors in by_width.values()], 1e-12)
    interpolation = [Series("training, 10⁻¹² where less", WIDTHS, floor, "both")]
    luck = [Series("training error below 10⁻⁶", list(found), list(found.values()), "both")]
    return svg(
        chart("80 examples: down, up, and down again", "units", by_width, (79 / (D + 2), "80 weights")),
        Chart("80 examples: interpolation", "units", "mean squared error", interpolation, True, True),
        chart("40 units: data help", "examples N", by_amount, (40 * (D + 2) + 1, "281 weights")),
        Chart("80 examples without noise", "units", "starts of 20", luck, log_x=True),
    )
