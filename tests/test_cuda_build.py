# SPDX-License-Identifier: MIT
"""The GPU engine without a GPU: nvcc takes it for every target, and its hot kernels spill no register."""

import re
import shutil
import subprocess
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
# Registers of a thread that let a block of 256 start at all; one more would be a launch that fails.
MOST_REGISTERS = 255


def newest():
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return max(re.findall(r"compute_(\d+)", known), key=int)


@pytest.fixture(scope="module", params=["80", "90a", "newest"])
def kernels(request, tmp_path_factory):
    """{kernel: (bytes of stack, bytes of spills, registers)}, as ptxas reports it for one target."""
    target = newest() if request.param == "newest" else request.param
    made = tmp_path_factory.mktemp("cuda") / "cuda.o"
    # An object, not a cubin: the host's pass reads the same source in its own way, and may refuse it.
    command = [NVCC, "-std=c++17", f"-arch=sm_{target}", "-fmad=false", "-c", "-Werror=all-warnings"]
    command += ["--ptxas-options=-v", f"-I{CPP}", "-o", str(made), str(CPP / "cuda.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers"
    )
    found = re.findall(pattern, done.stderr, re.DOTALL)
    assert found, done.stderr
    return {demangled(name): tuple(map(int, numbers)) for name, *numbers in found}


def demangled(name):
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout if tool else name


def test_hot_kernels_spill_nothing(kernels):
    hot = {name: numbers for name, numbers in kernels.items() if re.search(HOT, name)}
    assert len(hot) > 20, sorted(kernels)
    spilling = {name: numbers for name, numbers in hot.items() if numbers[0] or numbers[1]}
    assert not spilling


def test_kernels_can_start(kernels):
    assert max(registers for _, _, registers in kernels.values()) <= MOST_REGISTERS
