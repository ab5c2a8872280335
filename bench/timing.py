# SPDX-License-Identifier: MIT
"""What every Python benchmark here needs: order statistics, the machine's peak, who else used the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Program:
    """A C++ file of this directory that needs nothing else, compiled with the system's compiler.

    `available` is False where no compiler is found; what the program would have measured is then left out.
    """

    source: str
    options: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.program = folder / Path(self.source).stem
        candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
        compiler = next((c for c in candidates if c and shutil.which(c)), None)
        self.available = compiler is not None
        if compiler is not None:
            options = ["-std=c++17", "-O2", "-pthread", "-x", "c++", *self.options]
            subprocess.run([compiler, *options, str(HERE / self.source), "-o", str(self.program)], check=True)

    def ask(self, *arguments: object) -> dict[str, Any]:
        """Run it; it prints one line of JSON."""
        return ask(self.program, *arguments)


def ask(program: Path, *arguments: object) -> dict[str, Any]:
    """Run a program that prints one JSON object."""
    command = [str(program), *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


class Peak(Program):
    """The machine's measured float32 peak."""

    source = "peak.hpp"
    options = ("-DCHAINRULE_PEAK_MAIN",)

    def measure(self, threads: int) -> dict[str, float | str]:
        """{"isa", "gflops" of `threads` cores together, "ghz"}; takes about 50 ms."""
        return self.ask(threads)


@dataclass(frozen=True)
class Level:
    """A cache or the memory: its size in bytes and the bytes/s through it, of all threads together."""

    name: str
    size: float
    read: float
    copy: float
    triad: float
    update: float  # read and written in place, as by an update rule


class Bandwidth(Program):
    """The measured bandwidth of every cache and of the memory."""

    source = "bandwidth.cpp"

    def measure(self, threads: int) -> list[Level]:
        """Smallest level first; private caches count once a thread. Takes a second or two."""
        return [Level(**level) for level in self.ask(threads)["levels"]]


class Phases:
    """phases.cpp, built with the engine of this source tree by CMake (half a minute the first time).

    `available` is False where there is no CMake or no compiler; `why` says so.
    """

    def __init__(self, folder: Path) -> None:
        self.program, self.why = folder / "phases", ""
        source = ["cmake", "-S", str(HERE.parent), "-B", str(folder)]
        options = ["-DCHAINRULE_BENCH=ON", "-DCHAINRULE_PYTHON=OFF"]
        try:
            for command in ([*source, *options], ["cmake", "--build", str(folder), "--target", "phases"]):
                subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            self.why = "no cmake"
        except subprocess.CalledProcessError as error:
            self.why = (error.stderr.strip().splitlines() or ["cmake failed"])[-1]
        self.available = not self.why

    def measure(self, *arguments: object) -> dict[str, float]:
        """Seconds of {"forward", "sweep", "gradient", "update", "step"}; see phases.cpp."""
        return ask(self.program, *arguments)


def level_of(levels: list[Level], size: float) -> Level:
    """The smallest level that holds so many bytes."""
    return next((level for level in levels if size <= level.size), levels[-1])


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


class Neighbours:
    """How much of the machine others used while we measured."""

    def __init__(self) -> None:
        self.passed = self.foreign = self.stolen = 0.0

    @contextmanager
    def watched(self, pids: Iterable[int] = ()) -> Iterator[None]:
        """Count what passes meanwhile; `pids` and this process are not others."""
        own = [os.getpid(), *pids]
        before, used = CpuTimes.now(), process_cpu(own)
        yield
        passed, used = CpuTimes.now().since(before), process_cpu(own) - used
        self.passed += passed.total
        self.foreign += max(0.0, passed.busy - used)
        self.stolen += passed.steal

    @property
    def shares(self) -> dict[str, float]:
        """Of all CPU time: {"foreign_cpu_share", "steal_share"}."""
        whole = max(self.passed, 1e-9)
        return {"foreign_cpu_share": self.foreign / whole, "steal_share": self.stolen / whole}

    def __str__(self) -> str:
        foreign, stolen = self.shares.values()
        busy = "  THE MACHINE WAS NOT IDLE" if foreign + stolen > 0.05 else ""
        return f"others used {foreign:.1%} of the CPUs, stolen {stolen:.1%}{busy}"


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
