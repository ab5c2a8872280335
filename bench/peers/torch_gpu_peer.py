# SPDX-License-Identifier: MIT
"""PyTorch on a GPU: eager, and torch.compile with its own CUDA graphs; torch_graph_gpu_peer.py has more."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from . import torch_peer
from .problem import ROUNDED, Workload

DEVICE = os.environ.get("CHAINRULE_BENCH_DEVICE", "cuda")  # "cpu" for a dry run


def configure(threads: int) -> None:
    """Everything is made on the GPU."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise ImportError(f"torch {torch.__version__} sees no GPU")
    torch.set_default_device(DEVICE)


def versions() -> dict[str, str]:
    """Versions that decide the speed."""
    return {"torch": torch.__version__, "torch CUDA": str(torch.version.cuda)}


def wait() -> None:
    """Until the GPU has done everything."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def set_precision(precision: str) -> None:
    """Of float32 products from here on."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


class Eager(torch_peer.Eager):
    """nn.Sequential, loss.backward(), fused optimizer; weights in float32, autocast for bfloat16."""

    form = "nn.Sequential, autocast for bfloat16, Adam/SGD(fused=True), zero_grad(set_to_none=True)"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work.precision)
        super().__init__(work, problem)
        self.tolerance = ROUNDED[work.precision]

    def _forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.work.precision != "bfloat16":
            return self.loss(self.model(x), y)
        with torch.autocast(DEVICE, torch.bfloat16):
            f = self.model(x)
        return self.loss(f.float(), y)

    def run(self, epochs: int) -> None:
        """Losses are not read."""
        super().run(epochs)
        wait()


class Compiled(Eager):
    """Model and loss compiled with CUDA graphs; the optimizer is PyTorch's fused one."""

    form = "torch.compile(model + loss, mode='reduce-overhead'), Adam/SGD(fused=True)"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.forward = torch.compile(self._forward, dynamic=False, mode="reduce-overhead")

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return super()._step(x, y)


class Predict(torch_peer.Predict):
    """The module called on all rows."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work.precision)
        super().__init__(work, problem)

    def run(self, calls: int) -> None:
        """The results are dropped."""
        super().run(calls)
        wait()


class PredictCompiled(Predict):
    """The same through torch.compile, whose kernels a graph replays."""

    form = "torch.compile(model, mode='max-autotune')(x), otherwise the same"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            self.model, dynamic=False, mode="max-autotune"
        )
        self.call = compiled


VARIANTS = {"torch eager": Eager, "torch.compile": Compiled}
PREDICTORS = {"torch eager": Predict, "torch.compile": PredictCompiled}
