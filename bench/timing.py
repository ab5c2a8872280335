# SPDX-License-Identifier: MIT
"""What every Python benchmark here needs: order statistics, the machine's peak, who else used the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some samples. Means are not used: noise only ever adds time."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Spread of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))


def show_time(seconds: float) -> str:
    """Three significant digits with the unit that fits: '7.21 us', '85.0 ms', '1.23 s'."""
    unit, value = "us", seconds * 1e6
    for larger in ("ms", "s"):
        if value >= 999.5:
            unit, value = larger, value / 1e3
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


class Peak:
    """The machine's measured float32 peak, from peak.hpp compiled with the system's C++ compiler.

    `available` is False where no compiler is found; shares of peak are then left out.
    """

    def __init__(self, folder: Path) -> None:
        self.program = folder / "peak"
        candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
        compiler = next((c for c in candidates if c and shutil.which(c)), None)
        self.available = compiler is not None
        if compiler is not None:
            options = ["-std=c++17", "-O2", "-pthread", "-x", "c++", "-DCHAINRULE_PEAK_MAIN"]
            subprocess.run([compiler, *options, str(HERE / "peak.hpp"), "-o", str(self.program)], check=True)

    def measure(self, threads: int) -> dict[str, float | str]:
        """{"isa", "gflops" of `threads` cores together, "ghz"}; takes about 50 ms."""
        command = [str(self.program), str(threads)]
        return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since boot, summed over all CPUs (Linux; zeros elsewhere)."""

    total: float = 0.0
    busy: float = 0.0
    steal: float = 0.0

    @classmethod
    def now(cls) -> CpuTimes:
        """Read /proc/stat."""
        try:
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return cls()
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, iowait, irq, softirq, steal = (int(v) / tick for v in fields)
        busy = user + nice + system + irq + softirq
        return cls(busy + idle + iowait + steal, busy, steal)

    def since(self, earlier: CpuTimes) -> CpuTimes:
        """What passed between two readings."""
        return CpuTimes(self.total - earlier.total, self.busy - earlier.busy, self.steal - earlier.steal)


def process_cpu(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used, all their threads and finished children included."""
    seconds = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        seconds += sum(int(v) for v in fields[11:15]) / os.sysconf("SC_CLK_TCK")
    return seconds


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, str | int]:
    """What a reader needs to judge the numbers."""
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "usable_cpus": usable_cpus(),
        "system": platform.platform(),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": " ".join(f"{v:.2f}" for v in os.getloadavg()),
    }
