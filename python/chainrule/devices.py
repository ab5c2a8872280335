# SPDX-License-Identifier: MIT
"""Where networks live: the processor, or a GPU, whose engine is loaded when it is first asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _core
from .checks import short

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Engine(NamedTuple):
    """What computes for one dtype on one device: the classes of the compiled module."""

    network: Callable[[list[Any]], Any]
    optimizer: Callable[..., Any]
    trainer: Callable[..., Any]


def engine(dtype: str, device: str) -> Engine:
    """The engine for a dtype, and a device as `resolve` gives it."""
    module: Any = _core if device == "cpu" else _load()[0]
    bits = "64" if dtype == "float64" else "32"
    network, optimizer, trainer = (
        getattr(module, f"{name}{bits}") for name in ("Network", "Optimizer", "Trainer")
    )
    how = (dtype == "bfloat16",) if device == "cpu" else (dtype, _index(device))
    return Engine(lambda rows: network(rows, *how), optimizer, trainer)


def _index(device: str) -> int:
    return int(device.partition(":")[2])


def resolve(op: str, device: Any) -> str:
    """ "cpu", or "cuda:0" and so on, of what the user named; a ValueError says what a GPU lacks."""
    match = re.fullmatch(r"cpu|auto|cuda(?::(\d{1,4}))?", device) if isinstance(device, str) else None
    if match is None:
        raise (ValueError if isinstance(device, str) else TypeError)(
            f"[{op}] device must be known: expected 'cpu', 'cuda', 'cuda:1' and so on, or 'auto', "
            f"got {short(device)}"
        )
    if device == "cpu":
        return "cpu"
    module, missing = _load()
    if device == "auto":
        return "cpu" if missing else "cuda:0"
    if missing:
        hint = "; pip install . -C cmake.define.CHAINRULE_CUDA=ON, where nvcc is" if module is None else ""
        raise ValueError(
            f"[{op}] device {device!r} must be usable: expected an NVIDIA GPU and a build with "
            f"CHAINRULE_CUDA=ON, got {missing}{hint}"
        )
    index = int(match[1] or 0)
    if index >= count():
        raise ValueError(
            f"[{op}] device must be there: expected 'cuda:0' to 'cuda:{count() - 1}', got {device!r}"
        )
    return f"cuda:{index}"


def count() -> int:
    """How many GPUs can be used."""
    module, missing = _load()
    return 0 if missing else int(module.device_count())


def state() -> str:
    """The GPUs by name, or what is missing."""
    module, missing = _load()
    return missing or ", ".join(f"cuda:{index} {module.device_name(index)}" for index in range(count()))


_LOST = ""  # why this process cannot use what is there


@cache
def _load() -> tuple[Any, str]:
    """The module of the GPU engine, and what is missing before it can be used."""
    try:
        module = import_module("._cuda", __package__)
    except ModuleNotFoundError:
        return None, "no GPU engine in this build"
    except ImportError as error:
        return None, f"a GPU engine that cannot be loaded: {error}"
    if module.__version__ != _core.__version__:
        return None, f"a GPU engine of version {module.__version__} in chainrule {_core.__version__}"
    missing: str = module.state()
    if not missing and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_lose)
    return module, _LOST or missing


def _lose() -> None:
    """CUDA works in the process that began it, but not in one forked from that."""
    global _LOST
    _LOST = "a process forked from one that has used the GPU: start it by 'spawn' instead"
    _load.cache_clear()


# ------------------------------------------------------------ arrays on a device

_DLPACK_CUDA = 2  # DLDeviceType


def on_gpu(array: Any) -> bool:
    """Whether `array` says, by the DLPack protocol, that it lies in the memory of an NVIDIA GPU."""
    where = getattr(array, "__dlpack_device__", None)
    return where is not None and not isinstance(array, type) and where()[0] == _DLPACK_CUDA


def _taken(array: Any) -> Any:
    """The GPU engine's own kind of array, on the same memory."""
    module = _load()[0]
    return array if isinstance(array, module.Array) else module.from_dlpack(array)


def on_host(array: Any) -> Any:
    """A NumPy copy of what lies on a GPU; all else as it is."""
    return _taken(array).numpy() if on_gpu(array) else array


def as_it_lies(array: Any, features: int, dtype: str, device: str) -> Any:
    """Rows on the network's own GPU that its engine takes there, or what lies on a GPU as a NumPy copy."""
    if not on_gpu(array):
        return array
    X = _taken(array)
    fits = X.device == _index(device) and X.dtype == dtype and len(X.shape) == 2 and X.shape[1] == features
    return X if fits and len(X) and X.all_finite() else X.numpy()


def upload(part: Any, device: str) -> Any:
    """An array's copy on a GPU, for several trainers; what is no array as it is."""
    return _load()[0].upload(part, _index(device)) if isinstance(part, np.ndarray) else part


def run_many(trainers: list[Any], first_epoch: int, rates: NDArray[Any]) -> NDArray[Any]:
    """Epochs of K trainers on one GPU, all at once: losses (K, epochs) for rates (K, epochs[, steps])."""
    losses: NDArray[Any] = _load()[0].run_many(trainers, first_epoch, rates)
    return losses


def predict(core: Any, array: Any, features: int, dtype: str, device: str) -> Any:
    """Outputs for rows that lie on the network's own GPU; they stay there."""
    X = _taken(array)
    if X.device != _index(device) or X.dtype != dtype or len(X.shape) != 2 or X.shape[1] != features:
        raise ValueError(
            f"[predict] X on a GPU is taken as it is: expected {dtype} (rows, {features}) on '{device}', "
            f"got {X.dtype} {X.shape} on 'cuda:{X.device}'"
        )
    return core.predict_array(X)
