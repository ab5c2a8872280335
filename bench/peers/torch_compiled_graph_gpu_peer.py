# SPDX-License-Identifier: MIT
"""The graphs of torch_graph_gpu_peer.py with what torch.compile makes of the model in them."""

from __future__ import annotations

import torch

from .torch_gpu_peer import configure, versions
from .torch_graph_gpu_peer import Graph, Vmap

__all__ = ["VARIANTS", "configure", "versions"]


class CompiledGraph(Graph):
    """The same with model and loss compiled into fused kernels first."""

    form = "torch.compile(model + loss) in the same graph"

    def capture(self) -> None:
        """Compiled without graphs of its own."""
        self.forward = torch.compile(self._forward, dynamic=False)
        super().capture()


class CompiledVmap(Vmap):
    """The same with the gradient compiled first."""

    form = "torch.compile(vmap(grad_and_value(loss))) in the same graph"

    def capture(self) -> None:
        """Compiled without graphs of its own."""
        self.gradients = torch.compile(self.gradients, dynamic=False)
        super().capture()


VARIANTS = {"torch compiled graph": CompiledGraph, "torch compiled vmap graph": CompiledVmap}
