# SPDX-License-Identifier: MIT
"""PyTorch at its fastest on a GPU: an epoch of whole steps, optimizer included, captured in one CUDA graph.

In a process of its own, because a capture that fails can leave PyTorch's CUDA unusable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, vmap

from . import torch_gpu_peer
from .problem import ADAM, ROUNDED, Workload
from .torch_gpu_peer import DEVICE, configure, versions, wait

__all__ = ["VARIANTS", "configure", "versions"]


class Unrecorded:
    """In a dry run on the CPU, what a graph would replay."""

    def __init__(self, captured: Graph) -> None:
        self.captured = captured

    def replay(self) -> None:
        """Run it."""
        self.captured.values = self.captured.epoch()


class Graph(torch_gpu_peer.Eager):
    """Forward, backward and a capturable fused optimizer for every batch of an epoch: one launch an epoch."""

    form = "one torch.cuda.graph of an epoch of steps, Adam(fused=True, capturable=True)"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.capture()

    def _optimizer(self) -> torch.optim.Optimizer:
        return capturable(self.work, list(self.model.parameters()))

    def capture(self) -> None:
        """Three epochs to warm up on another stream, as PyTorch's documentation asks; then the graph."""
        if DEVICE == "cpu":
            self.graph: Any = Unrecorded(self)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.epoch()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.values = self.epoch()

    def epoch(self) -> list[torch.Tensor]:
        """The losses of its steps."""
        return [self._step(x, y).detach() for x, y in self.batches]

    def reset(self) -> None:
        """In place: the graph knows these tensors."""
        with torch.no_grad():
            for parameter, value in zip(self.tensors(), self.initial, strict=True):
                parameter.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()
        wait()

    def tensors(self) -> list[torch.Tensor]:
        """The parameters, in the order of the initial ones."""
        return list(self.model.parameters())

    def run(self, epochs: int) -> None:
        """One launch an epoch."""
        for _ in range(epochs):
            self.graph.replay()
        wait()

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        values = []
        for _ in range(epochs):
            self.graph.replay()
            values += [float(value.mean()) for value in self.values]
        return values


class Vmap(Graph):
    """Many networks: vmap of the gradient over stacked parameters, one fused optimizer, in a graph."""

    form = (
        "torch.func.vmap(grad_and_value(loss)) over stacked parameters, fused capturable Adam, in one graph"
    )

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        torch_gpu_peer.set_precision(work.precision)
        with torch.device(DEVICE):
            torch_gpu_peer.torch_peer.Eager.__init__(self, work, problem)
        self.tolerance = ROUNDED[work.precision]
        names = [name for name, _ in self.model.named_parameters()]
        self.stacked = {
            name: torch.stack([value] * work.networks)
            for name, value in zip(names, self.initial, strict=True)
        }
        self.optimizer = capturable(work, list(self.stacked.values()))
        self.gradients = vmap(grad_and_value(self._value), in_dims=(0, None, None))
        self.capture()

    def _value(self, parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(functional_call(self.model, parameters, (x,)), y)

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gradients, values = self.gradients(self.stacked, x, y)
        for name, parameter in self.stacked.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        return values

    def tensors(self) -> list[torch.Tensor]:
        """Stacked."""
        return list(self.stacked.values())

    def parameters(self) -> list[np.ndarray]:
        """Of the last network."""
        return [value[-1].cpu().numpy().copy() for value in self.stacked.values()]


def capturable(work: Workload, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """A fused optimizer whose step count lies on the GPU."""
    if work.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=work.lr, fused=True)
    betas: Any = (ADAM["beta1"], ADAM["beta2"])
    return torch.optim.Adam(
        parameters, lr=work.lr, betas=betas, eps=ADAM["eps"], fused=True, capturable=DEVICE == "cuda"
    )


VARIANTS = {"torch graph": Graph, "torch vmap graph": Vmap}
