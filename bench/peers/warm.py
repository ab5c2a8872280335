# SPDX-License-Identifier: MIT
"""Compiles what peers will be asked for, so that they find it in their libraries' caches on the disk.

    python -m peers.warm <peer,peer> <threads> <JSON: [[kind, workload, variants], ...]>

Nothing is compared and nothing is timed. A line a variant says how long it took, or what went wrong.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

from .problem import Workload, start
from .worker import die_with_parent, sample


def rehearse(contender: Any, work: Workload) -> None:
    """What a worker asks first: the steps that it verifies, and a short sample."""
    contender.reset()
    if hasattr(contender, "outputs"):
        contender.outputs()
    else:
        contender.losses(work.verify_epochs)
    sample(contender, 1)


def main() -> None:
    """Workload by workload, so that the first ones are ready when time is short."""
    die_with_parent()
    modules = [importlib.import_module(f".{peer}_peer", __package__) for peer in sys.argv[1].split(",")]
    for module in modules:
        module.configure(int(sys.argv[2]))
    for kind, fields, variants in json.loads(sys.argv[3]):
        work = Workload(**fields | {"sizes": tuple(fields["sizes"])})
        problem = start(work, 0)
        offered = {
            name: make for module in modules for name, make in getattr(module, kind.upper(), {}).items()
        }
        for name in [name for name in offered if not variants or name in variants]:
            begin = time.perf_counter()
            try:
                rehearse(offered[name](work, problem), work)
                said = f"{time.perf_counter() - begin:.1f} s"
            except Exception as error:
                said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"warm: {work.name}: {name}: {said}", flush=True)


if __name__ == "__main__":
    main()
