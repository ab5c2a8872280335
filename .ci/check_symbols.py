# SPDX-License-Identifier: MIT
"""Check that no code built for one instruction set can end up running for another.

An inline function that the compiler emits out of line is a weak symbol, and the linker keeps one copy of each
for the whole library. If that copy comes from the AVX-512 object, a machine without AVX-512 dies in a
function that looks harmless. So each object of kernels.cpp may define only symbols of its own namespace.
"""

import re
import subprocess
import sys
from pathlib import Path

ALLOWED = re.compile(r"^DW\.ref\.")  # a pointer to the exception handler: data, the same in every object


def foreign_symbols(path: Path, namespace: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--extern-only", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split(maxsplit=2)[2] for line in listing.splitlines() if len(line.split(maxsplit=2)) == 3]
    return [name for name in names if f"{namespace}::" not in name and not ALLOWED.match(name)]


def main(build: str) -> int:
    objects = sorted(Path(build).rglob("chainrule_kernels_*.dir/**/*.o"))
    if not objects:
        print(f"no kernel objects under {build}", file=sys.stderr)
        return 1
    wrong = 0
    for path in objects:
        isa = re.search(r"chainrule_kernels_(\w+)\.dir", str(path)).group(1)
        foreign = foreign_symbols(path, f"chainrule::{isa}")
        wrong += len(foreign)
        print(f"{isa}: {len(foreign)} symbols outside chainrule::{isa}")
        print("".join(f"  {name}\n" for name in foreign), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
