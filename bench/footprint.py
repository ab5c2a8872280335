# SPDX-License-Identifier: MIT
"""What a training step must hold, move and compute, from the layer sizes alone: the denominators of "share".

φˡ (B, nˡ) are the activations, dφˡ their cotangents; every number is float32, every padding left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from peers.problem import Workload

REAL = 4  # bytes
STATE = {"sgd": 0, "adam": 2}  # numbers that the update rule keeps for each parameter


@dataclass(frozen=True)
class Footprint:
    """Bytes that live through a step."""

    parameters: int
    state: int  # the optimizer's
    transposed: int  # second copies of the weights that carry cotangents back: all but the first layer's
    activations: int  # φ⁰ … φᴸ and dφ¹ … dφᴸ of one batch

    @classmethod
    def of(cls, work: Workload) -> Footprint:
        """Of one network, optimizer and batch."""
        transposed = sum(i * o for i, o in pairwise(work.sizes[1:]))
        rows = sum(work.sizes) + sum(work.sizes[1:])
        parameters = REAL * work.parameters
        return cls(
            parameters, STATE[work.optimizer] * parameters, REAL * transposed, REAL * work.batch * rows
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.state + self.transposed + self.activations


@dataclass(frozen=True)
class Phase:
    """One part of a step: its operations, and the bytes it reads and writes if it touches everything once."""

    name: str
    flop: int
    bytes: int


def phases(work: Workload) -> list[Phase]:
    """The four parts of a step, one after the other. What the update rule computes is not counted."""
    hold, sizes = Footprint.of(work), work.sizes
    products = [2 * work.batch * i * o for i, o in pairwise(sizes)]
    rows = [REAL * work.batch * n for n in sizes]  # bytes of one φ
    both = sum(i + o for i, o in pairwise(rows))  # each layer's input and output
    inner = sum(2 * i + o for i, o in pairwise(rows[1:]))  # dφ read, dφ written, φ read for the slope
    return [
        # The data are gathered into φ⁰; the loss reads φᴸ and the targets and writes dφᴸ.
        Phase("forward + loss", sum(products), hold.parameters + 2 * rows[0] + both + 3 * rows[-1]),
        Phase("backward", sum(products[1:]), hold.transposed + inner),
        Phase("weight gradients", sum(products), both),
        # Adam: w, m, v read and written, 24 bytes a parameter, and 4 for the transposed copy.
        Phase("rule + transposed copy", 0, 2 * (hold.parameters + hold.state) + hold.transposed),
    ]
