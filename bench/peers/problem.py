# SPDX-License-Identifier: MIT
"""The workloads, their data, and the float64 trajectory every contender is checked against.

A problem is made once, by the parent, and handed to every contender in one .npz file: the same float32 data,
the same initial weights, batches in the same order (rows 0..B-1, B..2B-1, ...), so that nobody can win by
doing less. The reference below is plain NumPy and shares no code with any contender, chainrule included.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# What float32 rounding may do to a correct contender over the verified epochs: (losses, weights). Sharp
# enough to have caught an Adam whose 1 - beta2 was rounded in float32 (1.3e-5 off): 2.4e-3 in the weights of
# "mnist".
ROUNDING = (1e-4, 2e-3)
MIXED_ROUNDING = (1e-2, 0.2)  # the same of bfloat16 products: each operand is rounded by up to 2⁻⁹ = 2e-3
PREDICTION_ROUNDING = (1e-5,)  # the same for outputs
# And what rounded operands of products may: Adam's first steps are of the size lr whatever the gradient's, so
# that small gradients, which are mostly rounding error then, move their weights as far as large ones do.
ROUNDED = {"float32": ROUNDING, "tf32": (5e-3, 0.2), "bfloat16": (3e-2, 0.5)}
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark: a network, its loss, its optimizer, and how much data it walks over."""

    name: str
    sizes: tuple[int, ...]
    activation: str  # "relu" | "tanh"
    loss: str  # "logistic" | "least_squares" | "mse" | "cross_entropy"
    optimizer: str  # "sgd" | "adam"
    lr: float
    batch: int
    batches: int  # steps per epoch
    verify_epochs: int
    precision: str = "float32"  # of products; "tf32" and "bfloat16" on GPUs
    networks: int = 1  # trained side by side on the same data, from the same weights

    @property
    def flop(self) -> int:
        """Floating-point operations of a step: 6 B sum(n n') - 2 B n0 n1 (the first layer needs no dX)."""
        products = [i * o for i, o in zip(self.sizes, self.sizes[1:], strict=False)]
        return self.networks * (6 * self.batch * sum(products) - 2 * self.batch * products[0])

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum((i + 1) * o for i, o in zip(self.sizes, self.sizes[1:], strict=False))

    def __str__(self) -> str:
        layers = "-".join(str(n) for n in self.sizes)
        many = f"{self.networks} × " if self.networks > 1 else ""
        kind = "" if self.precision == "float32" else f", {self.precision}"
        return f"{many}{layers} {self.activation}, {self.loss}, {self.optimizer}, batch {self.batch}{kind}"


# Learning rates are small enough that rounding errors do not grow: at 1e-3, "mnist" is chaotic and two
# correct float32 libraries drift 6 % apart in 96 steps, which would hide a wrong one. A step takes the same
# time anyway.
WORKLOADS = {
    w.name: w
    for w in (
        Workload("tiny", (2, 16, 16, 1), "tanh", "logistic", "sgd", 0.1, 32, 64, 3),
        Workload("small", (8, 64, 64, 1), "relu", "least_squares", "adam", 1e-3, 32, 64, 3),
        Workload("digits", (64, 100, 10), "relu", "cross_entropy", "adam", 1e-3, 200, 9, 20),
        Workload("mnist", (784, 256, 128, 10), "relu", "cross_entropy", "adam", 3e-4, 128, 32, 3),
        Workload("mid", (256, 1024, 1024, 1024, 64), "relu", "mse", "adam", 1e-4, 1024, 4, 3),
        Workload("large", (2048, 2048, 2048, 2048), "relu", "mse", "sgd", 0.1, 2048, 1, 3),
    )
}


def make(work: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """Data, initial weights and reference trajectory of one workload, as named arrays.

    `X` (N, n0) float32; `y` (N,) int64 labels for cross-entropy, else (N, k) float32; `W0`, `b0`, ... (O, I)
    and (O,) float32; `losses` (steps,) float64, each before its update; `ref_W0`, `ref_b0`, ... the float64
    parameters after the last step.
    """
    problem = start(work, seed)
    losses, trained = reference(work, problem)
    return problem | {"losses": losses} | named("ref_", trained)


def make_prediction(work: Workload, seed: int = 0) -> dict[str, np.ndarray]:
    """The same with `outputs` (N, k) float64, the network's values at X, in place of the trajectory."""
    problem = start(work, seed)
    return problem | {"outputs": predict(work, problem["X"], parameters(work, problem))}


def save(problem: dict[str, np.ndarray], path: Path) -> None:
    """Write a problem where the contenders read it."""
    np.savez(path, allow_pickle=False, **problem)


def data(work: Workload, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """X and y of all batches."""
    X = rng.standard_normal((work.batch * work.batches, work.sizes[0]), dtype=np.float32)
    return X, _targets(work, X, rng)


def start(work: Workload, seed: int) -> dict[str, np.ndarray]:
    """Data and initial weights, without a result."""
    rng = np.random.default_rng(seed)
    X, y = data(work, rng)
    return {"X": X, "y": y} | named("", initial(work, rng))


def named(prefix: str, values: list[np.ndarray]) -> dict[str, np.ndarray]:
    """W0, b0, W1, b1, ..."""
    return {f"{prefix}{'Wb'[k % 2]}{k // 2}": value for k, value in enumerate(values)}


def parameters(work: Workload, problem: dict[str, np.ndarray]) -> list[np.ndarray]:
    """W0, b0, W1, b1, ... in float64."""
    return [problem[f"{kind}{k}"].astype(np.float64) for k in range(len(work.sizes) - 1) for kind in "Wb"]


def _targets(work: Workload, X: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Something a network can learn: a random linear map of the inputs, bent by a sine."""
    teacher = rng.standard_normal((work.sizes[0], work.sizes[-1]), dtype=np.float32)
    scores: np.ndarray = np.sin(X @ teacher / np.float32(np.sqrt(work.sizes[0])) * 2)
    if work.loss == "cross_entropy":
        return np.asarray(scores.argmax(axis=1), dtype=np.int64)
    if work.loss == "logistic":
        return np.asarray(scores > 0, dtype=np.float32)
    return scores


def initial(work: Workload, rng: np.random.Generator) -> list[np.ndarray]:
    """He (relu) or Glorot (tanh) normal weights; biases that are not zero, so that a forgotten bias shows."""
    values = []
    for i, o in zip(work.sizes, work.sizes[1:], strict=False):
        spread = np.sqrt(2.0 / i if work.activation == "relu" else 2.0 / (i + o))
        values.append((rng.standard_normal((o, i)) * spread).astype(np.float32))
        values.append((rng.standard_normal(o) * 0.01).astype(np.float32))
    return values


def _loss(name: str, f: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss over the batch and its derivative with respect to the outputs f."""
    rows, outputs = f.shape
    if name == "cross_entropy":
        shifted = f - f.max(axis=1, keepdims=True)
        log_z = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        picked = np.arange(rows), y
        p = np.exp(shifted - log_z)
        p[picked] -= 1.0
        return float((log_z[:, 0] - shifted[picked]).mean()), p / rows
    if name == "logistic":
        value = np.maximum(f, 0.0) - y * f + np.log1p(np.exp(-np.abs(f)))
        return float(value.mean()), (1.0 / (1.0 + np.exp(-f)) - y) / (rows * outputs)
    d = f - y
    if name == "mse":
        return float((d * d).mean()), 2.0 * d / d.size
    return float(0.5 * (d * d).sum(axis=1).mean()), d / rows  # least_squares


def forward(work: Workload, X: np.ndarray, params: list[np.ndarray]) -> list[np.ndarray]:
    """X, the activations of each layer, the outputs."""
    depth = len(params) // 2
    phi = [X]
    for k in range(depth):
        z = phi[-1] @ params[2 * k].T + params[2 * k + 1]
        if k < depth - 1:
            z = np.maximum(z, 0.0) if work.activation == "relu" else np.tanh(z)
        phi.append(z)
    return phi


def predict(work: Workload, X: np.ndarray, params: list[np.ndarray]) -> np.ndarray:
    """The network's outputs in float64."""
    return forward(work, X.astype(np.float64), params)[-1]


def gradient(
    work: Workload, X: np.ndarray, y: np.ndarray, params: list[np.ndarray]
) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients in the order W0, b0, W1, b1, ... (the chain rule, written out)."""
    depth = len(params) // 2
    phi = forward(work, X, params)
    value, cotangent = _loss(work.loss, phi[-1], y)
    grads: list[np.ndarray] = [np.empty(0)] * len(params)
    for k in reversed(range(depth)):
        grads[2 * k], grads[2 * k + 1] = cotangent.T @ phi[k], cotangent.sum(axis=0)
        if k:
            a = phi[k]
            slope = (a > 0.0) if work.activation == "relu" else (1.0 - a) * (1.0 + a)
            cotangent = (cotangent @ params[2 * k]) * slope
    return value, grads


def reference(work: Workload, problem: dict[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Train `verify_epochs` epochs in float64: losses before each update; W0, b0, W1, ... at the end."""
    params = parameters(work, problem)
    first = [np.zeros_like(p) for p in params]
    second = [np.zeros_like(p) for p in params]
    X = problem["X"].astype(np.float64)
    y = problem["y"] if work.loss == "cross_entropy" else problem["y"].astype(np.float64)
    losses = []
    for t in range(work.verify_epochs * work.batches):
        start = (t % work.batches) * work.batch
        rows = slice(start, start + work.batch)
        value, grads = gradient(work, X[rows], y[rows], params)
        losses.append(value)
        for p, g, m, v in zip(params, grads, first, second, strict=True):
            if work.optimizer == "sgd":
                p -= work.lr * g
                continue
            m += (1.0 - ADAM["beta1"]) * (g - m)
            v += (1.0 - ADAM["beta2"]) * (g * g - v)
            m_hat = m / (1.0 - ADAM["beta1"] ** (t + 1))
            v_hat = v / (1.0 - ADAM["beta2"] ** (t + 1))
            p -= work.lr * m_hat / (np.sqrt(v_hat) + ADAM["eps"])
    return np.array(losses), params
