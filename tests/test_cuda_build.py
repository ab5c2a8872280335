# SPDX-License-Identifier: MIT
"""The GPU engine without a GPU: nvcc takes it for every target, and its hot kernels spill no register."""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CPP = Path(__file__).resolve().parent.parent / "cpp"
NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc here to compile cpp/cuda.cu with"),
]

# What training and prediction spend their time in. A spill would send their sums through slow memory.
HOT = r"multiply<|train_resident|predict_resident|finish_product|over_elements|over_each|over_rows"
# Bytes that a thread may spill: of nvcc 12.4, two hot kernels do, 40 and 104 of the 512 in their registers.
MOST_SPILLED = {12: 128}
# Registers of a thread that let a block of 256 start at all; one more would be a launch that fails.
MOST_REGISTERS = 255


def newest():
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return max(re.findall(r"compute_(\d+)", known), key=int)


def release():
    """12 of nvcc 12.4."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"release (\d+)\.", said)[1])


TARGETS = ["80", "90a", "newest"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What nvcc says to each target, all of them at once."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_for(target):
        # One object: the host's pass reads the same source in its own way, and may refuse it.
        kind = "-c" if target == TARGETS[0] else "-cubin"
        arch = f"-arch=sm_{newest() if target == 'newest' else target}"
        command = [NVCC, "-std=c++17", arch, "-fmad=false", kind, "-Werror=all-warnings"]
        command += ["--ptxas-options=-v", f"-I{CPP}", "-o", str(folder / target), str(CPP / "cuda.cu")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(compile_for, TARGETS), strict=True))


@pytest.fixture(params=TARGETS)
def kernels(request, compiled):
    """{kernel: (bytes of stack, bytes of spills, registers)}, as ptxas reports it for one target."""
    done = compiled[request.param]
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    assert found, done.stderr
    return {demangled(name): tuple(map(int, numbers)) for name, *numbers in found}


@functools.cache
def demangled(name):
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout if tool else name


def test_hot_kernels_spill_nothing(kernels):
    most = MOST_SPILLED.get(release(), 0)
    hot = {name: numbers for name, numbers in kernels.items() if re.search(HOT, name)}
    assert len(hot) > 20, sorted(kernels)
    spilling = {name: numbers for name, numbers in hot.items() if max(numbers[:2]) > most}
    assert not spilling


def test_kernels_can_start(kernels):
    assert max(registers for _, _, registers in kernels.values()) <= MOST_REGISTERS
