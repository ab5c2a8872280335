# SPDX-License-Identifier: MIT
"""PyTorch on a GPU, eager. What is compiled or captured has files of its own, as it has its own processes."""

from __future__ import annotations

import os

import numpy as np
import torch

from . import torch_peer
from .problem import ROUNDED, Workload

DEVICE = os.environ.get("CHAINRULE_BENCH_DEVICE", "cuda")  # "cpu" for a dry run


def configure(threads: int) -> None:
    """A GPU is there."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise ImportError(f"torch {torch.__version__} sees no GPU")


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
        with torch.device(DEVICE):  # as a default for ever it would cost every call
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


class Predict(torch_peer.Predict):
    """The module called on all rows."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work.precision)
        with torch.device(DEVICE):
            super().__init__(work, problem)

    def run(self, calls: int) -> None:
        """The results are dropped."""
        super().run(calls)
        wait()


VARIANTS = {"torch eager": Eager}
PREDICTORS = {"torch eager": Predict}
