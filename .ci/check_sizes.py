# SPDX-License-Identifier: MIT
"""Hold a wheel to its budget: under 1 MB as a file, under 1.5 MB installed."""

import sys
import zipfile
from pathlib import Path

WHEEL, INSTALLED = 1_000_000, 1_500_000


def main(wheel: str) -> int:
    packed = Path(wheel).stat().st_size
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: info.file_size for info in archive.infolist()}
    unpacked = sum(files.values())
    for what, size, budget in (("wheel", packed, WHEEL), ("installed", unpacked, INSTALLED)):
        print(f"{what}: {size / 1e3:.0f} kB of {budget / 1e3:.0f} kB")
    if packed < WHEEL and unpacked < INSTALLED:
        return 0
    for name, size in sorted(files.items(), key=lambda item: -item[1])[:10]:
        print(f"  {size / 1e3:8.0f} kB  {name}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
