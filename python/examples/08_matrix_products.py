# SPDX-License-Identifier: MIT
"""Fast, parallel matrix products

Lecture: Why does this all work?, 1. GPUs allow us to do fast, parallelized matrix multiplications

    Z = X Wᵀ + b

A layer of a whole batch is one matrix product, and so are both of its derivatives. The times below are those
of this machine and of this moment; nothing depends on them.
"""

import time

import numpy as np

import chainrule as cr
from figures import Chart, Series, svg

SIZES = (64, 128, 256, 512, 1024)  # rows, inputs and outputs


def on_gpu(n: int):
    """A Linear layer on a GPU, or the reason why there is none."""
    try:
        return cr.Sequential(cr.Linear(n, n), device="cuda"), ""
    except ValueError:
        return None, cr.info()["cuda"]


def gflops(product, n: int) -> float:
    """10⁹ operations a second, the best of some runs; 2 n³ operations, a multiplication and a sum each."""
    best, until = float("inf"), time.perf_counter() + 0.15
    while time.perf_counter() < until:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2e-9 * n**3 / best


rng = np.random.default_rng(0)
speed = {"NumPy": [], "chainrule": [], "chainrule, GPU": []}
for n in SIZES:
    X = rng.standard_normal((n, n), dtype=np.float32)
    net = cr.Sequential(cr.Linear(n, n, init="lecun_normal"), seed=0)
    state = net.state_dict()
    W, b = state["0.weight"], state["0.bias"]
    rivals = {"NumPy": lambda: X @ W.T + b, "chainrule": lambda: net(X)}
    gpu, why_not = on_gpu(n)
    if gpu is not None:
        gpu.load_state_dict(state)
        rivals["chainrule, GPU"] = lambda: gpu(X)
    for name, product in rivals.items():
        # sums of n float32 products: both round, by about ε √n
        assert np.allclose(product(), X.astype(float) @ W.T + b, atol=1e-5)
        speed[name].append(gflops(product, n))
speed = {name: values for name, values in speed.items() if values}

if why_not:
    print(f"no GPU: {why_not}; so on the CPU, {cr.get_num_threads()} threads\n")
print("    n  " + "  ".join(f"{name:>10}" for name in speed) + "   GFLOP/s")
for k, n in enumerate(SIZES):
    print(f"{n:5}  " + "  ".join(f"{values[k]:10.1f}" for values in speed.values()))


def figure() -> str:
    """Speed against size."""
    curves = [Series(name, SIZES, values, "both") for name, values in speed.items()]
    title = "n × n times n × n, float32"
    return svg(Chart(title, "n", "GFLOP/s", curves, log_x=True))
