# SPDX-License-Identifier: MIT
"""chainrule: the whole run in one `fit`, and one `train_step` per batch from Python."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import chainrule as cr

from . import derivatives
from .problem import ADAM, MIXED_ROUNDING, PREDICTION_ROUNDING, ROUNDING, Workload


def configure(threads: int) -> None:
    """Threads of the engine's own pool."""
    cr.set_num_threads(threads)


def versions() -> dict[str, str]:
    """Version and the instruction set in use."""
    from chainrule import _core

    return {"chainrule": cr.__version__, "isa": _core.isa()}


class _Chainrule:
    note = ""
    device = "cpu"
    tolerance: tuple[float, ...] = ROUNDING
    dtype = "float32"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.work = work
        self.X, self.y = problem["X"], problem["y"]
        activation = cr.ReLU if work.activation == "relu" else cr.Tanh
        layers: list[Any] = []
        for i, o in zip(work.sizes, work.sizes[1:], strict=False):
            layers += [cr.Linear(i, o), activation()]
        self.net = cr.Sequential(*layers[:-1], seed=0, dtype=self.dtype, device=self.device)
        self.names = [f"{2 * k}.{kind}" for k in range(len(work.sizes) - 1) for kind in ("weight", "bias")]
        values = (problem[f"{kind}{k}"] for k in range(len(work.sizes) - 1) for kind in "Wb")
        self.initial = dict(zip(self.names, values, strict=True))
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        if self.work.optimizer == "sgd":
            return cr.SGD(lr=self.work.lr)
        return cr.Adam(lr=self.work.lr, betas=(ADAM["beta1"], ADAM["beta2"]), eps=ADAM["eps"])

    def reset(self) -> None:
        """Initial weights, fresh optimizer."""
        self.net.load_state_dict(self.initial)
        self.optimizer = self._optimizer()

    def parameters(self) -> list[np.ndarray]:
        """In state_dict order."""
        state = self.net.state_dict()
        return [np.asarray(state[name]) for name in self.names]


class Fit(_Chainrule):
    """All epochs in one call."""

    form = "net.fit(X, y, epochs=...), shuffle=False"

    def _fit(self, epochs: int) -> Any:
        return self.net.fit(
            self.X,
            self.y,
            loss=self.work.loss,
            optimizer=self.optimizer,
            batch_size=self.work.batch,
            epochs=epochs,
            shuffle=False,
            verbose=0,
        )

    def run(self, epochs: int) -> None:
        """One call."""
        self._fit(epochs)

    def losses(self, epochs: int) -> list[float]:
        """One mean per epoch."""
        return [float(v) for v in self._fit(epochs)["loss"]]


class MixedFit(Fit):
    """The same in mixed precision."""

    form = 'dtype="bfloat16", ' + Fit.form
    tolerance = MIXED_ROUNDING
    dtype = "bfloat16"


class TrainStep(_Chainrule):
    """One call per batch, as in a hand-written loop."""

    form = "net.train_step(x, y) per batch"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        starts = range(0, len(self.X), work.batch)
        self.batches = [(self.X[s : s + work.batch], self.y[s : s + work.batch]) for s in starts]

    def _step(self, x: np.ndarray, y: np.ndarray) -> float:
        return self.net.train_step(x, y, loss=self.work.loss, optimizer=self.optimizer)

    def run(self, epochs: int) -> None:
        """One call a step."""
        for _ in range(epochs):
            for x, y in self.batches:
                self._step(x, y)

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        return [float(self._step(x, y)) for _ in range(epochs) for x, y in self.batches]


class Predict(_Chainrule):
    """The network called on one batch of rows."""

    form = "net(x)"
    tolerance = PREDICTION_ROUNDING

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.net.load_state_dict(self.initial)

    def reset(self) -> None:
        """Nothing changes."""

    def run(self, calls: int) -> None:
        """The results are dropped."""
        net, x = self.net, self.X
        for _ in range(calls):
            net(x)

    def outputs(self) -> np.ndarray:
        """Of one call."""
        return self.net(self.X)


class Derivative(_Chainrule):
    """One call of one function on NumPy arrays, which makes new arrays for its result."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray], what: str) -> None:
        super().__init__(work, problem)
        self.net.load_state_dict(self.initial)
        self.what, self.call = what, self._calls(problem)[what]
        self.tolerance = derivatives.rounding(work, problem, what)
        self.form = {"forward": "net(x)", "gradient": "net.value_and_grad"}.get(what, "cr.*")

    def _calls(self, problem: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
        net, X, y, loss = self.net, self.X, self.y, self.work.loss
        dX, c = problem["dX"], problem["c"]
        v = dict(zip(self.names, derivatives.direction(self.work, problem), strict=True))
        return {
            "forward": lambda: net(X),
            "gradient": lambda: net.value_and_grad(X, y, loss=loss),
            "jvp": lambda: cr.jvp(net, X, dX),
            "vjp": lambda: cr.vjp(net, X, c),
            "jacobian": lambda: cr.jacobian(net, X),
            "example gradients": lambda: cr.per_example_grads(net, X, y, loss),
            "example norms": lambda: cr.per_example_grad_norms(net, X, y, loss),
            "hvp": lambda: cr.hvp(net, X, y, loss, v),
        }

    def reset(self) -> None:
        """Nothing changes."""

    def run(self, calls: int) -> None:
        """The results are dropped."""
        call = self.call
        for _ in range(calls):
            call()

    def arrays(self) -> list[np.ndarray]:
        """Of one call; a gradient's in the order of the state dict."""
        answer = self.call()
        if self.what == "gradient":
            answer = answer[1]
        if isinstance(answer, dict):
            return [answer[name] for name in self.names]
        return list(answer) if isinstance(answer, tuple) else [answer]


VARIANTS: dict[str, Any] = {"chainrule fit": Fit, "chainrule train_step": TrainStep}
MIXED: dict[str, Any] = {"chainrule bfloat16": MixedFit, "chainrule float32": Fit}
PREDICTORS: dict[str, Any] = {"chainrule": Predict}
DERIVATIVES: dict[str, Any] = {
    f"{what}: chainrule": partial(Derivative, what=what) for what in derivatives.NAMES
}
