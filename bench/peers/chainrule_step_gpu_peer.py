# SPDX-License-Identifier: MIT
"""chainrule on a GPU, one `train_step` per batch; in a process of its own, as every way of training is."""

from __future__ import annotations

import numpy as np

from . import chainrule_peer
from .chainrule_gpu_peer import configure, versions
from .problem import ROUNDED, Workload

__all__ = ["VARIANTS", "configure", "versions"]


class TrainStep(chainrule_peer.TrainStep):
    """One call a step, each with the batch from NumPy to the GPU and the loss back."""

    device = "cuda"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.dtype, self.tolerance = work.precision, ROUNDED[work.precision]
        super().__init__(work, problem)


VARIANTS = {"chainrule train_step": TrainStep}
