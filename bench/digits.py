# SPDX-License-Identifier: MIT
"""What end_to_end.py runs: one library learns to read digits, until enough held-out ones are right.

    python bench/digits.py LIBRARY DATA.npz SEED TARGET EPOCHS [PROBABILITIES.npy]

It stops after the first epoch whose held-out accuracy reaches TARGET, or after EPOCHS. All libraries start
from the same weights and see the same rows in the same order; each is used in the form its documentation
recommends, and imported when its learner is made: nobody pays for another's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any, Protocol

import numpy as np

SIZES = (64, 100, 10)
BATCH = 32
LR = 1e-3

Arrays = list[np.ndarray]


def initial(seed: int) -> Arrays:
    """W0, b0, W1, b1 as scikit-learn draws them from this seed (Glorot and Bengio 2010, biases too)."""
    random = np.random.RandomState(seed)
    parameters = []
    for i, o in pairwise(SIZES):
        bound = np.sqrt(6.0 / (i + o))
        parameters += [random.uniform(-bound, bound, (i, o)).T, random.uniform(-bound, bound, o)]
    return [np.ascontiguousarray(p, dtype=np.float32) for p in parameters]


def softmax(f: np.ndarray) -> np.ndarray:
    """Rows of outputs to rows of probabilities."""
    e = np.exp(f - f.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


class Learner(Protocol):
    """A network that trains epoch by epoch."""

    def epoch(self, X: np.ndarray, y: np.ndarray) -> None:
        """All rows once, in this order, in batches."""

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Of the ten classes, (rows, 10)."""


class Chainrule:
    """`fit` of one epoch; the optimizer keeps its state from one to the next."""

    def __init__(self, seed: int) -> None:
        import chainrule as cr

        self.net = cr.mlp(SIZES, activation="relu")
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        self.net.load_state_dict(dict(zip(names, initial(seed), strict=True)))
        self.optimizer = cr.Adam(lr=LR)

    def epoch(self, X: np.ndarray, y: np.ndarray) -> None:
        """One call."""
        self.net.fit(
            X, y, loss="cross_entropy", optimizer=self.optimizer, batch_size=BATCH, shuffle=False, verbose=0
        )

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Softmax of the outputs."""
        return softmax(self.net(X))


class Torch:
    """Eager, fused Adam; torch.compile would take longer to compile than this takes to train."""

    def __init__(self, seed: int) -> None:
        import torch

        self.torch: Any = torch
        inputs, hidden, outputs = SIZES
        parts = (torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))
        self.net = torch.nn.Sequential(*parts)
        with torch.no_grad():
            for parameter, value in zip(self.net.parameters(), initial(seed), strict=True):
                parameter.copy_(torch.from_numpy(value))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR, fused=True)

    def epoch(self, X: np.ndarray, y: np.ndarray) -> None:
        """The loop of the tutorials."""
        batches = (self.torch.from_numpy(array).split(BATCH) for array in (X, y))
        for x, labels in zip(*batches, strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            self.torch.nn.functional.cross_entropy(self.net(x), labels).backward()
            self.optimizer.step()

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Softmax of the outputs."""
        with self.torch.inference_mode():
            return np.asarray(self.net(self.torch.from_numpy(X)).softmax(dim=1))


class Jax:
    """One jitted lax.scan an epoch, state donated."""

    def __init__(self, seed: int) -> None:
        import jax
        import jax.numpy as jnp

        self.jnp = jnp
        parameters = [jnp.asarray(p) for p in initial(seed)]
        zeros = [jnp.zeros_like(p) for p in parameters]
        self.state: Any = (parameters, zeros, [jnp.zeros_like(p) for p in parameters], jnp.float32(0))

        def outputs(p: Any, x: Any) -> Any:
            return jax.nn.relu(x @ p[0].T + p[1]) @ p[2].T + p[3]

        def loss(p: Any, x: Any, y: Any) -> Any:
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs(p, x)), y[:, None], axis=1).mean()

        def step(state: Any, batch: Any) -> tuple[Any, None]:
            parameters, first, second, t = state
            gradient, t = jax.grad(loss)(parameters, *batch), t + 1
            first = [0.9 * m + 0.1 * g for m, g in zip(first, gradient, strict=True)]
            second = [0.999 * v + 0.001 * g * g for v, g in zip(second, gradient, strict=True)]
            rate, root = LR / (1 - 0.9**t), jnp.sqrt(1 - 0.999**t)
            moved = zip(parameters, first, second, strict=True)
            return ([p - rate * m / (jnp.sqrt(v) / root + 1e-8) for p, m, v in moved], first, second, t), None

        def scan(state: Any, X: Any, y: Any) -> Any:
            return jax.lax.scan(step, state, (X, y))[0]

        self.train = jax.jit(scan, donate_argnums=0)
        self.classify = jax.jit(lambda parameters, x: jax.nn.softmax(outputs(parameters, x)))

    def epoch(self, X: np.ndarray, y: np.ndarray) -> None:
        """One call."""
        batches = X.reshape(-1, BATCH, SIZES[0]), y.astype(np.int32).reshape(-1, BATCH)
        self.state = self.train(self.state, *map(self.jnp.asarray, batches))

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Softmax of the outputs."""
        return np.asarray(self.classify(self.state[0], X))


class Sklearn:
    """MLPClassifier, one partial_fit an epoch."""

    def __init__(self, seed: int) -> None:
        from sklearn.neural_network import MLPClassifier

        self.net = MLPClassifier(
            SIZES[1:-1], alpha=0.0, batch_size=BATCH, learning_rate_init=LR, shuffle=False, max_iter=1,
            random_state=seed,
        )  # fmt: skip

    def epoch(self, X: np.ndarray, y: np.ndarray) -> None:
        """One call."""
        self.net.partial_fit(X, y, classes=range(SIZES[-1]))

    def probabilities(self, X: np.ndarray) -> np.ndarray:
        """Its own."""
        return np.asarray(self.net.predict_proba(X))


LEARNERS: dict[str, Any] = {"chainrule": Chainrule, "torch": Torch, "jax": Jax, "sklearn": Sklearn}


def orders(seed: int, rows: int) -> Iterator[np.ndarray]:
    """The order of the rows, epoch after epoch."""
    random = np.random.default_rng(seed)
    while True:
        yield random.permutation(rows)


def main(library: str, data: str, seed: str, target: str, epochs: str, save: str = "") -> None:
    """Print {"accuracy": [after each epoch], "version", "import_seconds", "train_seconds"} as JSON."""
    with np.load(data) as arrays:
        X, y, held_X, held_y = (arrays[name] for name in ("X", "y", "held_X", "held_y"))
    start = time.perf_counter()
    learner: Learner = LEARNERS[library](int(seed))
    made = time.perf_counter()
    accuracy = []
    for rows in islice(orders(int(seed), len(X)), int(epochs)):
        learner.epoch(X[rows], y[rows])
        probabilities = learner.probabilities(held_X)
        accuracy.append(float((probabilities.argmax(axis=1) == held_y).mean()))
        if accuracy[-1] >= float(target):
            break
    trained = time.perf_counter()
    if save:
        np.save(save, probabilities)
    seconds = {"import_seconds": made - start, "train_seconds": trained - made}
    print(json.dumps({"accuracy": accuracy, "version": sys.modules[library].__version__} | seconds))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ImportError as missing:
        print(json.dumps({"missing": str(missing)}))
