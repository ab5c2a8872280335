# SPDX-License-Identifier: MIT
"""The engine on NVIDIA GPUs, built with CHAINRULE_CUDA=ON: _core's classes, on a device.

Names, argument order and results are _core's, and NumPy arrays go in and out; what differs stands here.
Layers and losses in Python are refused before.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from ._core import LayerRow, Loss, Real, _Snapshot

__version__: str

def state() -> str: ...  # "" if there is a usable GPU, else what is missing
def device_count() -> int: ...  # 0 where state() is not ""
def device_name(device: int) -> str: ...
def has_clusters(device: int) -> bool: ...  # of blocks, from compute capability 9.0 on
def synchronize(device: int) -> None: ...
def force_schedule(name: str, blocks: int = 0) -> None: ...  # one of schedules(); "" and 0 blocks: by size
def schedules() -> list[str]: ...

Labels = NDArray[np.int64]

class Array:
    """A C-contiguous array on a device: float32, float64 or int64."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def device(self) -> int: ...
    def numpy(self) -> Real | Labels: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def upload(array: Real | Labels, device: int) -> Array: ...
def from_dlpack(
    source: object,
) -> Array: ...  # a view; TypeError for a dtype that NumPy has not, BufferError for another layout or device

class Snapshot32(_Snapshot): ...
class Snapshot64(_Snapshot): ...

class _Network(_core._Network):  # the methods of _core's
    def __init__(self, layers: list[LayerRow], precision: str, device: int) -> None: ...
    def predict_array(self, X: Array) -> Array: ...  # of the dtype, on the device

class Network32(_Network): ...  # precision "float32", "tf32", "bfloat16"
class Network64(_Network): ...  # precision "float64"

class _Optimizer(_core._Optimizer):  # slots have _core's layout: a state made on one device fits on the other
    def __init__(self, net: _Network, name: str, hyper: list[float]) -> None: ...

class Optimizer32(_Optimizer): ...
class Optimizer64(_Optimizer): ...

class _Trainer(_core._Trainer):
    def __init__(
        self,
        net: _Network,
        optimizer: _Optimizer,
        loss: Loss,
        X: Real | Array,
        y: Real | Labels | Array,
        weight: Real | Array | None,
        batch_size: int,
        shuffle: bool,
        seed: int,
        l1: float,
        l2: float,
        clip_value: float,
        clip_norm: float,
        clip_example_norm: float = 0.0,
        dy: Real | Array | None = None,
        dy_weight: float = 0.0,
    ) -> None: ...
    @property
    def schedule(self) -> str: ...  # the one that its size, or force_schedule, has chosen
    @property
    def blocks(self) -> int: ...  # that share a batch in the resident schedule; else 0
    @property
    def graphs(self) -> int: ...  # made so far; the resident schedule needs none
    @property
    def library_shapes(self) -> tuple[int, int]: ...  # of products: that cuBLASLt makes, and all

class Trainer32(_Trainer): ...
class Trainer64(_Trainer): ...

# `run` of all trainers at once, their networks alike and on one device: lr (K, epochs) or (K, epochs, steps);
# the losses (K, epochs). What comes after a loss that is not finite does not count; the others have the bits
# of a run of their own.
def run_many(trainers: list[_Trainer], first_epoch: int, lr: NDArray[np.float64]) -> NDArray[np.float64]: ...
