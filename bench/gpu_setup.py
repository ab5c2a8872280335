# SPDX-License-Identifier: MIT
"""What gpu.py does before it times: builds and checks the engine, warms the rivals' caches, finds the peaks.

All of it runs in other processes, each with a limit of time; what fails is said, and the run goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from peers import problem
from peers.process import settings
from timing import HERE, usable_cpus

ROOT = HERE.parent
# Peers whose first call compiles. The two of JAX share a process: XLA chooses kernels by timing them, and two
# that do so at once would disturb each other.
COMPILING = (("jax_gpu", "jax_scan_gpu"), ("torch_compiled_gpu",), ("torch_compiled_graph_gpu",))
LEAST_WARMING = 90.0  # seconds it may take at any rate: a cold compiler would cost a rival its place
LAST_WORDS = 5.0  # seconds for what is late to say where it was
MORE_WARMING = 5.0  # seconds after a build that took longer


class Gpu(NamedTuple):
    """Its name, and what it can do: FLOP/s by precision, bytes/s of a copy; empty and 0 if not measured."""

    name: str
    products: dict[str, float]
    copy: float


@contextlib.contextmanager
def group(call: list[str], **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and all that it has started with it: compilers start many."""
    child = subprocess.Popen(call, preexec_fn=os.setpgrp, **how)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run(call: list[str], seconds: float, cwd: Path = ROOT, **more: str) -> tuple[int | None, str]:
    """Exit status, None where it took too long, and all it said; in a file, for a pipe can be held open.

    What is late is interrupted first, so that it can say where it was. `more` is for its environment.
    """
    with tempfile.TemporaryFile() as log:
        how: dict[str, Any] = {"stdout": log, "stderr": log, "cwd": cwd, "env": os.environ | more}
        with group(call, stdin=subprocess.DEVNULL, **how) as child:
            code = waited(child, seconds)
            if code is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGINT)
                waited(child, LAST_WORDS)
        log.seek(0)
        return code, log.read().decode(errors="replace").strip()


def waited(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Exit status; None where it runs on."""
    try:
        return child.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None


def last_json(text: str, kind: type) -> Any:
    """The last line that is JSON of this kind: libraries print what they like around it."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, kind):
                return value
    raise ValueError(f"expected a line of JSON, got {text[-300:] or 'nothing'}")


# ------------------------------------------------------------ the engine


def missing(seconds: float) -> str:
    """Why the chainrule that would be imported can use no GPU; "" where it can."""
    if "CHAINRULE_CUDA_MODULE" in os.environ:
        return ""
    code = "import json; from chainrule import devices; print(json.dumps([devices.count(), devices.state()]))"
    ended, text = run([sys.executable, "-c", code], seconds, HERE)
    if ended is None:
        return f"no answer in {seconds:.0f} s; the last words: {text[-300:]}"
    try:
        count, state = last_json(text, list)
    except ValueError:
        return text.rpartition("\n")[2] or f"exit status {ended}"
    return "" if count else str(state)


def find_nvcc() -> str:
    """CMake looks on PATH alone: where nvcc lies in CUDA's usual folder, CUDACXX is set. What was found."""
    if named := os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return named
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    homes += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    for nvcc in (Path(home, "bin", "nvcc") for home in homes):
        if nvcc.is_file():
            os.environ["CUDACXX"] = str(nvcc)
            return f"{nvcc}, by CUDACXX"
    return f"none on PATH, nor in bin of {', '.join(homes)}"


def build(seconds: float) -> str:
    """Install this tree with the GPU's engine into build/gpu, without network; what went wrong, or ""."""
    place = ROOT / "build" / "gpu"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target", str(place)]
    call = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        "-C",
        "build-dir=build/cmake",  # kept for the next call
        "-C",
        "cmake.define.CHAINRULE_CUDA=ON",
        "-C",
        "cmake.define.CMAKE_CUDA_ARCHITECTURES=native",  # a third of the compiler's time
        str(ROOT),
    ]
    code, text = run(call, seconds)
    if code == 0:
        return ""
    words = "\n".join(text.splitlines()[-200:])
    return words if code is not None else f"pip took more than {seconds:.0f} s; its last words: {words}"


def check(seconds: float) -> str:
    """The GPU's tests, a process for each file, for a kernel's fault stays with its process; what they say.

    The package's own names come first: they say most in the least time.
    """
    options = ["-q", "-m", "gpu and not slow", "--maxfail=30", "--tb=short", "-W", "default"]
    end, said = time.monotonic() + seconds, []
    for name in ("test_cuda_package.py", "test_cuda.py"):
        call = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / name)]
        code, text = run(call, end - time.monotonic(), COLUMNS="300", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
        late = f"not through in {seconds:.0f} s: " if code is None else ""
        said.append(f"{name}: {late}" + (text.rpartition("\n")[2] if code == 0 else text[-20_000:]))
    return "\n".join(said)


def measured_gpu(seconds: float) -> Gpu:
    """By PyTorch, whose first import is slow; unknown without, and what goes wrong costs only the peaks."""
    code, text = run([sys.executable, "-m", "peers.gpu_peak"], seconds, HERE)
    try:
        found = last_json(text, dict)
        return Gpu(str(found["gpu"]), dict(found["products"]), float(found["copy"]))
    except (ValueError, KeyError, TypeError) as error:
        ended = f"no answer in {seconds:.0f} s" if code is None else f"exit status {code}"
        print(f"the GPU's peaks were not measured: {ended}, {type(error).__name__}: {error}")
        return Gpu("gpu", {}, 0.0)


# ------------------------------------------------------------ the rivals' caches


def keep_caches() -> None:
    """JAX keeps what it compiles on the disk only where it is told to; PyTorch does anyway."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "jax-cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@contextlib.contextmanager
def warming(
    python: str,
    peers: Collection[str],
    asked: list[tuple[str, problem.Workload, tuple[str, ...]]],
    least: float,
) -> Iterator[dict[str, list[str]]]:
    """Rivals compile their programs while the block runs, and for `least` seconds if they need them.

    nvcc leaves most cores and all of the GPU idle, and a compiler that finds its programs on the disk needs
    seconds where it would need half a minute. `asked` are (kind, workload, variants). What was compiled, and
    what went wrong, is in the dictionary afterwards, by process.
    """
    start, said = time.monotonic(), {}
    text = json.dumps([(kind, asdict(work), list(variants)) for kind, work, variants in asked])
    together = [[peer for peer in some if peer in peers] for some in COMPILING]
    names = [",".join(some) for some in together if some]
    how: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "cwd": HERE,
        "env": os.environ | settings(usable_cpus()),
    }
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chainrule-warm-")))
        children = {}
        for name in names:
            log = stack.enter_context((folder / name).open("wb"))
            call = [python, "-m", "peers.warm", name, str(usable_cpus()), text]
            children[name] = stack.enter_context(group(call, stdout=log, stderr=log, **how))
        yield said
        until = max(time.monotonic() + MORE_WARMING, start + least)
        for name, child in children.items():
            code = waited(child, until - time.monotonic())
            lines = (folder / name).read_text(errors="replace").strip().splitlines()
            said[name] = [line for line in lines if line.startswith("warm: ")]
            if code is None:
                said[name].append(f"ended after {time.monotonic() - start:.0f} s")
            elif code:
                said[name] += [f"exit status {code}", *lines[-1:]]
