# SPDX-License-Identifier: MIT
"""JAX: one jitted step called per batch, and the whole run inside one jitted lax.scan; state is donated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import derivatives
from .problem import ADAM, PREDICTION_ROUNDING, ROUNDED, ROUNDING, Workload

Params = list[tuple[jax.Array, jax.Array]]


def configure(threads: int) -> None:
    """The parent has set PJRT_NPROC and XLA_FLAGS: XLA reads them when its CPU client starts."""


def versions() -> dict[str, str]:
    """Versions that decide the speed."""
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}


def _forward(work: Workload, params: Params, x: jax.Array) -> jax.Array:
    """The outputs; weights are kept (in, out), as JAX users do."""
    if work.precision == "bfloat16":
        x, params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (x, params))
    f = x
    for k, (w, b) in enumerate(params):
        f = f @ w + b
        if k < len(params) - 1:
            f = jax.nn.relu(f) if work.activation == "relu" else jnp.tanh(f)
    return f.astype(jnp.float32)


def _value(work: Workload, params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean loss of one batch."""
    f = _forward(work, params, x)
    if work.loss == "cross_entropy":
        return -jnp.take_along_axis(jax.nn.log_softmax(f), y[:, None], axis=1).mean()
    if work.loss == "logistic":
        return (jnp.maximum(f, 0.0) - y * f + jnp.log1p(jnp.exp(-jnp.abs(f)))).mean()
    d = f - y
    return (d * d).mean() if work.loss == "mse" else 0.5 * (d * d).sum(axis=1).mean()


def _update(work: Workload, state: Any, grads: Params) -> Any:
    """SGD or Adam exactly as PyTorch and the Adam paper write it."""
    params, first, second, t = state
    tree = jax.tree.map
    if work.optimizer == "sgd":
        return tree(lambda p, g: p - work.lr * g, params, grads), first, second, t + 1.0
    b1, b2 = ADAM["beta1"], ADAM["beta2"]
    t = t + 1.0
    c1, c2 = -jnp.expm1(t * math.log(b1)), -jnp.expm1(t * math.log(b2))  # 1 - b**t without cancellation
    first = tree(lambda m, g: b1 * m + (1.0 - b1) * g, first, grads)
    second = tree(lambda v, g: b2 * v + (1.0 - b2) * (g * g), second, grads)
    params = tree(
        lambda p, m, v: p - work.lr * (m / c1) / (jnp.sqrt(v / c2) + ADAM["eps"]), params, first, second
    )
    return params, first, second, t


def _step(work: Workload, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    if work.networks == 1:
        return _one_step(work, state, x, y)
    axes = (0, 0, 0, None)  # networks share the step count
    one = partial(_one_step, work)
    return jax.vmap(one, in_axes=(axes, None, None), out_axes=(axes, 0))(state, x, y)


def _one_step(work: Workload, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(partial(_value, work))(state[0], x, y)
    return _update(work, state, grads), loss


class _Jax:
    note = ""
    tolerance: tuple[float, ...] = ROUNDING

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.work = work
        depth = len(work.sizes) - 1
        self.initial = [(problem[f"W{k}"].T.copy(), problem[f"b{k}"]) for k in range(depth)]
        if work.networks > 1:
            self.initial = jax.tree.map(lambda a: np.stack([a] * work.networks), self.initial)
        self.tolerance = ROUNDED[work.precision] if self.tolerance is ROUNDING else self.tolerance
        y = problem["y"].astype(np.int32) if work.loss == "cross_entropy" else problem["y"]
        self.X = jnp.asarray(problem["X"].reshape(work.batches, work.batch, -1))
        self.y = jnp.asarray(y.reshape(work.batches, work.batch, *y.shape[1:]))

    def reset(self) -> None:
        """New device arrays: the old ones were donated."""

        def zeros() -> Any:
            return [] if self.work.optimizer == "sgd" else jax.tree.map(jnp.zeros_like, self.initial)

        params = [(jnp.array(w), jnp.array(b)) for w, b in self.initial]
        self.state = jax.block_until_ready((params, zeros(), zeros(), jnp.float32(0.0)))

    def parameters(self) -> list[np.ndarray]:
        """Back to (out, in); of the last network, where there are several."""
        params = self.state[0] if self.work.networks == 1 else jax.tree.map(lambda a: a[-1], self.state[0])
        return [a for w, b in params for a in (np.asarray(w).T, np.asarray(b))]


class Jit(_Jax):
    """One call into the compiled step per batch."""

    form = "jax.jit(step, donate_argnums=0) per step, batches resident, one block_until_ready at the end"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.batches = [(self.X[k], self.y[k]) for k in range(work.batches)]
        self.step = jax.jit(partial(_step, work), donate_argnums=0)

    def run(self, epochs: int) -> None:
        """Dispatch is asynchronous; wait for the last state."""
        state, step = self.state, self.step
        for _ in range(epochs):
            for x, y in self.batches:
                state, _loss = step(state, x, y)
        self.state = jax.block_until_ready(state)

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        values = []
        for _ in range(epochs):
            for x, y in self.batches:
                self.state, loss = self.step(self.state, x, y)
                values.append(loss)
        return [float(v.mean()) for v in values]


class Scan(_Jax):
    """The whole run in one XLA program: a scan over epochs around a scan over batches.

    Tried and not faster: one flat parameter vector, unroll=4, a single scan that indexes its batch.
    """

    form = "one jitted lax.scan over the whole run, data resident, state donated"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)

        def train(state: Any, X: jax.Array, y: jax.Array, epochs: int) -> tuple[Any, jax.Array]:
            def batch(state: Any, xy: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
                return _step(work, state, *xy)

            def epoch(state: Any, _: None) -> tuple[Any, jax.Array]:
                return lax.scan(batch, state, (X, y))

            return lax.scan(epoch, state, None, length=epochs)

        self.train = jax.jit(train, donate_argnums=0, static_argnums=3)
        self.compiled: dict[int, Any] = {}

    def prepare(self, epochs: int) -> None:
        """Each number of epochs is a program of its own."""
        if epochs not in self.compiled:
            self.compiled[epochs] = self.train.lower(self.state, self.X, self.y, epochs).compile()

    def run(self, epochs: int) -> None:
        """One call."""
        train = self.compiled[epochs]
        self.state, _losses = jax.block_until_ready(train(self.state, self.X, self.y))

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        self.state, values = self.train(self.state, self.X, self.y, epochs)
        values = np.asarray(values)
        return [float(v.mean()) for v in values.reshape(epochs * self.work.batches, -1)]


class Predict(_Jax):
    """The compiled forward pass on one batch of rows."""

    form = "jax.jit(forward)(params, x).block_until_ready(), device arrays in and out"
    tolerance = PREDICTION_ROUNDING

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        super().reset()
        self.x, self.forward = self.X[0], jax.jit(partial(_forward, work))

    def reset(self) -> None:
        """Nothing changes."""

    def run(self, calls: int) -> None:
        """Each call waits for its result: that is its latency."""
        forward, params, x = self.forward, self.state[0], self.x
        for _ in range(calls):
            forward(params, x).block_until_ready()

    def outputs(self) -> np.ndarray:
        """Of one call."""
        return np.asarray(self.forward(self.state[0], self.x))


class Derivative(_Jax):
    """jax.jit of one derivative as a function of parameters and inputs.

    Norms are those of the gradients, which XLA may fuse: JAX has no other way to them.
    """

    def __init__(self, work: Workload, problem: dict[str, np.ndarray], what: str) -> None:
        super().__init__(work, problem)
        super().reset()
        self.what, self.tolerance = what, derivatives.rounding(work, problem, what)
        function, *arguments = self._parts(problem)[what]
        self.call = partial(jax.jit(function), self.state[0], *arguments)
        self.form = f"jax.jit of {what}, block_until_ready each time, device arrays in and out"

    def reset(self) -> None:
        """Nothing changes."""

    def _parts(self, problem: dict[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
        """name: (function of the parameters and more, what more)."""
        f, value = partial(_forward, self.work), partial(_value, self.work)
        x, y, dx, c = self.X[0], self.y[0], jnp.asarray(problem["dX"]), jnp.asarray(problem["c"])
        flat = derivatives.direction(self.work, problem)
        v = [(jnp.asarray(w.T), jnp.asarray(b)) for w, b in zip(flat[::2], flat[1::2], strict=True)]
        slopes = jax.grad(value)

        def each(p: Params, x: jax.Array, y: jax.Array) -> Params:
            return jax.vmap(lambda x, y: slopes(p, x[None], y[None]))(x, y)

        return {
            "jvp": (lambda p, x, dx: jax.jvp(partial(f, p), (x,), (dx,)), x, dx),
            "vjp": (lambda p, x, c: _pulled(partial(f, p), x, c), x, c),
            "jacobian": (lambda p, x: jax.vmap(jax.jacrev(partial(f, p)))(x), x),
            "example gradients": (each, x, y),
            "example norms": (lambda p, x, y: _norms(each(p, x, y)), x, y),
            "hvp": (lambda p, x, y, v: jax.jvp(lambda p: slopes(p, x, y), (p,), (v,))[1], x, y, v),
        }

    def run(self, calls: int) -> None:
        """Each call waits for its result: that is its latency."""
        call = self.call
        for _ in range(calls):
            jax.block_until_ready(call())

    def arrays(self) -> list[np.ndarray]:
        """Of one call, weights as (…, out, in)."""
        answer = self.call()
        if isinstance(answer, list):
            return [a for w, b in answer for a in (np.asarray(w).swapaxes(-1, -2), np.asarray(b))]
        return [np.asarray(a) for a in (answer if isinstance(answer, tuple) else (answer,))]


def _pulled(f: Callable[[jax.Array], jax.Array], x: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, pull = jax.vjp(f, x)
    return value, pull(c)[0]


def _norms(gradients: Params) -> jax.Array:
    squares = [jnp.square(g.reshape(len(g), -1)).sum(axis=1) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(sum(squares))


VARIANTS: dict[str, Any] = {"jax.jit": Jit, "jax lax.scan": Scan}
PREDICTORS: dict[str, Any] = {"jax.jit": Predict}
DERIVATIVES: dict[str, Any] = {
    f"{what}: jax.jit": partial(Derivative, what=what) for what in derivatives.COMPARED
}
