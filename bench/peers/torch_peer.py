# SPDX-License-Identifier: MIT
"""PyTorch: eager with fused optimizers, and torch.compile of forward, loss and their backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from . import derivatives
from .problem import ADAM, MIXED_ROUNDING, PREDICTION_ROUNDING, ROUNDING, Workload


def configure(threads: int) -> None:
    """One setting for intra-op threads; inter-op parallelism has nothing to do in a chain."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)


def versions() -> dict[str, str]:
    """Versions that decide the speed."""
    return {"torch": torch.__version__}


def _least_squares(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * (f - y).square().sum(dim=1).mean()


LOSSES = {
    "logistic": F.binary_cross_entropy_with_logits,
    "least_squares": _least_squares,
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
}


class Eager:
    """nn.Sequential, loss.backward(), fused optimizer: the form of PyTorch's tutorials at its fastest."""

    form = "nn.Sequential, Adam/SGD(fused=True), zero_grad(set_to_none=True)"
    note = ""
    tolerance: tuple[float, ...] = ROUNDING

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.work = work
        self.initial = [
            torch.tensor(problem[f"{kind}{k}"]) for k in range(len(work.sizes) - 1) for kind in "Wb"
        ]
        X, y = torch.tensor(problem["X"]), torch.tensor(problem["y"])
        self.batches = list(zip(X.split(work.batch), y.split(work.batch), strict=True))
        self.model = self._model()
        self.loss = LOSSES[work.loss]
        self.forward = self._forward
        self.optimizer = self._optimizer()

    def _model(self) -> nn.Sequential:
        activation = nn.ReLU if self.work.activation == "relu" else nn.Tanh
        parts: list[nn.Module] = []
        for i, o in zip(self.work.sizes, self.work.sizes[1:], strict=False):
            parts += [nn.Linear(i, o), activation()]
        return nn.Sequential(*parts[:-1])

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        if self.work.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.work.lr, fused=True)
        betas = (ADAM["beta1"], ADAM["beta2"])
        return torch.optim.Adam(parameters, lr=self.work.lr, betas=betas, eps=ADAM["eps"], fused=True)

    def _forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model(x), y)

    def reset(self) -> None:
        """Copy the initial weights in; a fresh optimizer."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.initial, strict=True):
                parameter.copy_(value)
        self.optimizer = self._optimizer()

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x, y)
        loss.backward()
        self.optimizer.step()
        return loss

    def run(self, epochs: int) -> None:
        """Losses are not read: .item() is not needed to train (and CPU execution is synchronous)."""
        for _ in range(epochs):
            for x, y in self.batches:
                self._step(x, y)

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        return [self._step(x, y).item() for _ in range(epochs) for x, y in self.batches]

    def parameters(self) -> list[np.ndarray]:
        """Copies."""
        return [p.detach().cpu().numpy().copy() for p in self.model.parameters()]


class Compiled(Eager):
    """torch.compile of model and loss; the optimizer stays the fused one.

    Tried and not faster on these networks: the optimizer compiled too, mode="max-autotune", the C++ wrapper,
    compiled autograd.
    """

    form = "torch.compile(model + loss), Adam/SGD(fused=True)"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.forward = torch.compile(self._forward, dynamic=False)


class _Autocast(Eager):
    """Model and loss under torch.autocast: products in bfloat16, weights and their gradients in float32."""

    tolerance = MIXED_ROUNDING

    def _forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super()._forward(x, y)


class AutocastEager(_Autocast):
    """PyTorch's mixed precision, as its documentation shows it."""

    form = 'torch.autocast("cpu", dtype=torch.bfloat16), ' + Eager.form


class AutocastCompiled(_Autocast, Compiled):
    """The same through torch.compile."""

    form = 'torch.autocast("cpu", dtype=torch.bfloat16), ' + Compiled.form


class Predict(Eager):
    """The module called on one batch of rows."""

    form = "model(x), model.eval(), one torch.inference_mode() around all calls, tensors in and out"
    tolerance = PREDICTION_ROUNDING

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        super().reset()
        self.model.eval()
        self.x = self.batches[0][0]
        self.call: Callable[[torch.Tensor], torch.Tensor] = self.model

    def reset(self) -> None:
        """Nothing changes."""

    def run(self, calls: int) -> None:
        """The results are dropped."""
        call, x = self.call, self.x
        with torch.inference_mode():
            for _ in range(calls):
                call(x)

    def outputs(self) -> np.ndarray:
        """Of one call."""
        with torch.inference_mode():
            return self.call(self.x).cpu().numpy()


class PredictCompiled(Predict):
    """The same through torch.compile."""

    form = "torch.compile(model)(x), otherwise the same"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.call = torch.compile(self.model, dynamic=False)


class Derivative(Eager):
    """torch.func on the module as a function of its parameters and inputs.

    One row alone is differentiated without vmap, which only costs there. Norms are those of the gradients:
    torch.func has no other way to them.
    """

    form = "torch.func.{what} of functional_call, vmap over rows where there are several, tensors in and out"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray], what: str) -> None:
        super().__init__(work, problem)
        self.reset()
        self.what, self.form = what, self.form.format(what=what)
        self.tolerance = derivatives.rounding(work, problem, what)
        self.now = {name: p.detach() for name, p in self.model.named_parameters()}
        self.call = self._calls(problem)[what]

    def _outputs(self, x: torch.Tensor) -> torch.Tensor:
        return functional_call(self.model, self.now, (x,))

    def _value(self, parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(functional_call(self.model, parameters, (x,)), y)

    def _jacobian(self, x: torch.Tensor) -> torch.Tensor:
        one = jacrev(self._outputs)
        return one(x[0])[None] if len(x) == 1 else vmap(one)(x)

    def _each(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        one = grad(self._value)
        if len(x) == 1:
            return {name: g[None] for name, g in one(self.now, x, y).items()}
        return vmap(lambda x, y: one(self.now, x[None], y[None]))(x, y)

    def _calls(self, problem: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
        f, now, slopes, (x, y) = self._outputs, self.now, grad(self._value), self.batches[0]
        dx, c = torch.tensor(problem["dX"]), torch.tensor(problem["c"])
        v = dict(zip(now, map(torch.tensor, derivatives.direction(self.work, problem)), strict=True))
        return {
            "jvp": lambda: jvp(f, (x,), (dx,)),
            "vjp": lambda: _pulled(f, x, c),
            "jacobian": lambda: (self._jacobian(x),),
            "example gradients": lambda: self._each(x, y).values(),
            "example norms": lambda: (_norms(self._each(x, y)),),
            "hvp": lambda: jvp(lambda p: slopes(p, x, y), (now,), (v,))[1].values(),
        }

    def run(self, calls: int) -> None:
        """The results are dropped."""
        call = self.call
        for _ in range(calls):
            call()

    def arrays(self) -> list[np.ndarray]:
        """Of one call."""
        return [a.detach().numpy() for a in self.call()]


def _pulled(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, c: torch.Tensor) -> tuple[Any, ...]:
    value, pull = vjp(f, x)
    return value, *pull(c)


def _norms(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()]).sum(dim=0).sqrt()


VARIANTS: dict[str, Any] = {"torch eager": Eager, "torch.compile": Compiled}
MIXED: dict[str, Any] = {"autocast eager": AutocastEager, "autocast compile": AutocastCompiled}
PREDICTORS: dict[str, Any] = {"torch eager": Predict, "torch.compile": PredictCompiled}
DERIVATIVES: dict[str, Any] = {
    f"{what}: torch.func": partial(Derivative, what=what) for what in derivatives.COMPARED
}
