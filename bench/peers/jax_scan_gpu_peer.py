# SPDX-License-Identifier: MIT
"""JAX on a GPU, the whole run in one program; in a process of its own, for each length of it is compiled."""

from __future__ import annotations

import numpy as np

from . import jax_peer
from .jax_gpu_peer import configure, set_precision, versions
from .problem import Workload

__all__ = ["VARIANTS", "configure", "versions"]


class Scan(jax_peer.Scan):
    """The whole run in one XLA program."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work)
        super().__init__(work, problem)


VARIANTS = {"jax lax.scan": Scan}
