# SPDX-License-Identifier: MIT
"""The machine: which instruction set and how many threads the engine uses, and who decides it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import _core, devices
from .checks import short, whole
from .display import warn


def info() -> dict[str, Any]:
    """What runs here: version, instruction set in use and available, threads, GPUs or what is missing.

    Example:
        >>> sorted(info())
        ['cuda', 'isa', 'isas', 'threads', 'version']
    """
    return {
        "version": _core.__version__,
        "isa": _core.isa(),
        "isas": _core.isas(),
        "threads": _core.num_threads(),
        "cuda": devices.state(),
    }


def get_num_threads() -> int:
    """How many threads the engine may use.

    Example:
        >>> get_num_threads() >= 1
        True
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Let the engine use up to n threads; results do not depend on it.

    Raises: TypeError or ValueError for what is no int from 1 to 1024.

    Example:
        >>> set_num_threads(get_num_threads())
    """
    _core.set_num_threads(whole("set_num_threads", "n", n, 1, 1024))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Up to n threads inside a with block.

    Example:
        >>> with threads(1):
        ...     get_num_threads()
        1
    """
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)


def warn_of_settings() -> None:
    """Say what the environment asks for and does not get: a typing error would pass for a measurement."""
    isa, count = os.environ.get("CHAINRULE_ISA"), os.environ.get("CHAINRULE_NUM_THREADS")
    if isa and isa != _core.isa():
        expected = f"one of {', '.join(_core.isas())} on this machine"
        _warn(f"CHAINRULE_ISA: expected {expected}, got {short(isa)}; using {_core.isa()}")
    if count and count.strip() != str(_core.num_threads()):
        expected = "a number of threads from 1 to 1024"
        _warn(f"CHAINRULE_NUM_THREADS: expected {expected}, got {short(count)}; using {_core.num_threads()}")


def _warn(message: str) -> None:
    warn(f"[import] {message}", RuntimeWarning, 4)  # at the line that imports us
