# SPDX-License-Identifier: MIT
"""JAX on a GPU: as on the CPU, with the precision of products set, which is tf32 where nothing is said."""

from __future__ import annotations

import os

import jax
import numpy as np

from . import jax_peer
from .jax_peer import versions
from .problem import Workload

__all__ = ["PREDICTORS", "VARIANTS", "configure", "set_precision", "versions"]


def configure(threads: int) -> None:
    """ImportError where JAX has no GPU, unless this is a dry run."""
    if os.environ.get("CHAINRULE_BENCH_DEVICE", "cuda") == "cuda" and jax.default_backend() == "cpu":
        raise ImportError(f"jax {jax.__version__} sees no GPU")


def set_precision(work: Workload) -> None:
    """Of products from here on."""
    name = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}[work.precision]
    jax.config.update("jax_default_matmul_precision", name)


class Jit(jax_peer.Jit):
    """One call into the compiled step per batch."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work)
        super().__init__(work, problem)


class Predict(jax_peer.Predict):
    """The compiled forward pass on all rows."""

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        set_precision(work)
        super().__init__(work, problem)


VARIANTS = {"jax.jit": Jit}
PREDICTORS = {"jax.jit": Predict}
