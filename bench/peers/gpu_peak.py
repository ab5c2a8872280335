# SPDX-License-Identifier: MIT
"""What the GPU can do, by PyTorch: FLOP/s of large products in each precision, bytes/s of a large copy.

python -m peers.gpu_peak prints one line of JSON; random operands, because zeros run faster.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch

SIZE = 8192  # of the products
COPY = 1 << 30  # bytes; many times the L2 cache


def seconds(run: Callable[[], object], rounds: int = 9) -> float:
    """Median time of a call on the GPU, by CUDA events."""
    run()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def products() -> dict[str, float]:
    """FLOP/s by precision."""
    peaks = {}
    for precision, dtype in (
        ("bfloat16", torch.bfloat16),
        ("tf32", torch.float32),
        ("float32", torch.float32),
    ):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a, b = (torch.randn(SIZE, SIZE, device="cuda").to(dtype) for _ in range(2))
        out = torch.empty(SIZE, SIZE, device="cuda", dtype=dtype)
        peaks[precision] = 2.0 * SIZE**3 / seconds(lambda: torch.mm(a, b, out=out))  # noqa: B023 (called at once)
    return peaks


def main() -> None:
    """Print them."""
    x = torch.randn(COPY // 4, device="cuda")
    y = torch.empty_like(x)
    name, bandwidth = torch.cuda.get_device_name(), 2 * COPY / seconds(lambda: y.copy_(x))
    print(json.dumps({"gpu": name, "products": products(), "copy": bandwidth}))


if __name__ == "__main__":
    main()
