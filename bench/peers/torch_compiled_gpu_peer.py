# SPDX-License-Identifier: MIT
"""PyTorch on a GPU through torch.compile with its own CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from . import torch_gpu_peer
from .problem import Workload
from .torch_gpu_peer import configure, versions

__all__ = ["PREDICTORS", "VARIANTS", "configure", "versions"]


class Compiled(torch_gpu_peer.Eager):
    """Model and loss compiled with CUDA graphs; the optimizer is PyTorch's fused one."""

    form = "torch.compile(model + loss, mode='reduce-overhead'), Adam/SGD(fused=True)"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.forward = torch.compile(self._forward, dynamic=False, mode="reduce-overhead")

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return super()._step(x, y)


class PredictCompiled(torch_gpu_peer.Predict):
    """The same through torch.compile, whose kernels a graph replays."""

    form = "torch.compile(model, mode='reduce-overhead')(x), otherwise the same"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
            self.model, dynamic=False, mode="reduce-overhead"
        )
        self.call = compiled


VARIANTS = {"torch.compile": Compiled}
PREDICTORS = {"torch.compile": PredictCompiled}
