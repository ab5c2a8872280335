# SPDX-License-Identifier: MIT
"""What all tests share: seeds that failures print, instruction sets, threads, distances in roundings."""

import itertools
import os
import signal
import sys
import zlib
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest

from chainrule import _core, devices, reference

# Sets with a fused multiply-add give the same bits; the baseline rounds twice and so stands apart.
FUSED = [isa for isa in _core.isas() if isa != "baseline"]

# For a process whose memory is measured: under the address sanitizer, too, what is freed is used again.
FREED_IS_FREE = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=0:thread_local_quarantine_size_kb=0"}


# Windows has no such shell, signals, permissions and pipes with names, and links for administrators only.
posix = pytest.mark.skipif(os.name != "posix", reason="asks for what POSIX systems have")


# ---- the GPU's engine --------------------------------------------------------------------------------------

# A build of it that is not installed: the emulated one, which runs on the CPU (tests/kernels/cuda_on_cpu).
CUDA_MODULE = os.environ.get("CHAINRULE_CUDA_MODULE")


def pytest_configure():
    if CUDA_MODULE:
        name = "chainrule._cuda"
        spec = spec_from_file_location(name, CUDA_MODULE)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


left_out = []  # how many, of each process that collected tests


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu run where a GPU can be used; else the summary says once why they do not."""
    if not devices.count():
        for_gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=for_gpu)
        left_out.append(len(for_gpu))
        if hasattr(config, "workeroutput"):  # pytest-xdist's, whose workers collect and have no summary
            config.workeroutput["left_out"] = len(for_gpu)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    left_out.append(getattr(node, "workeroutput", {}).get("left_out", 0))


def pytest_terminal_summary(terminalreporter):
    if any(left_out):
        terminalreporter.write_line(f"left out: {max(left_out)} tests that need a GPU; {devices.state()}")


# ---- fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives():
    """A shell starts background jobs with Ctrl-C ignored, so their tests of it would wait for ever."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng(request):
    """A generator seeded by the test's name: every test draws its own numbers, the same in each run."""
    seed = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("CHAINRULE_TEST_SEED", "0"))
    print(f"np.random.default_rng({seed})")  # pytest shows it with a failure
    return np.random.default_rng(seed)


@pytest.fixture(params=_core.isas())
def isa(request):
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return np.dtype(request.param)


@pytest.fixture(params=["by size", "resident", "resident in one block", "fused", "library"])
def schedule(request):
    """What trainers on a GPU take that are made in the test."""
    cuda = sys.modules["chainrule._cuda"]
    name, _, one_block = request.param.partition(" in ")
    cuda.force_schedule("" if name == "by size" else name, 1 if one_block else 0)
    yield request.param
    cuda.force_schedule("")


@pytest.fixture
def on_fused_isas():
    """run -> [run() under each instruction set that has a fused multiply-add]."""
    before = _core.isa()

    def collect(run):
        results = []
        for isa in FUSED:
            _core.set_isa(isa)
            results.append(run())
        return results

    yield collect
    _core.set_isa(before)


@pytest.fixture
def on_threads():
    """run -> [run() with each of these thread counts]."""
    before = _core.num_threads()

    def collect(run, counts=(1, 2, 3, 4, 7)):
        results = []
        for count in counts:
            _core.set_num_threads(count)
            results.append(run())
        return results

    yield collect
    _core.set_num_threads(before)


def eps(dtype):
    """The distance from 1 to the next number; one rounding errs by at most half of it, relatively."""
    return float(np.finfo(dtype).eps)


def in_ulps(got, exact, least=0.0):
    """|got − exact| in units of got's last place at `exact` (longdouble), or of `least` if that is larger.

    0 where they are equal, ±∞ and NaN included.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = exact.astype(got.dtype)
        unit = np.maximum(np.spacing(np.abs(rounded)), least).astype(np.longdouble)
        same = (got == rounded) | (np.isnan(got) & np.isnan(exact))
        return np.where(same, 0.0, np.abs(got.astype(np.longdouble) - exact) / unit).astype(float)


def assert_within(got, expected, bound, what=""):
    """|got − expected| ≤ bound for each element, infinities equal; a failure names the worst element."""
    got, expected, bound = np.broadcast_arrays(got, expected, bound)
    with np.errstate(invalid="ignore"):
        excess = np.abs(got.astype(np.longdouble) - expected.astype(np.longdouble)) - bound
    excess = np.where(got == expected, -np.inf, np.where(np.isnan(excess), np.inf, excess))
    if got.size and excess.max() > 0:
        worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        pytest.fail(
            f"{what}{worst}: got {got[worst]!r}, expected {expected[worst]!r} within {bound[worst]:.3g}"
        )


def assert_same_bits(a, b, what=""):
    """Equal bit for bit, NaN and the sign of zero included."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype}{a.shape} and {b.dtype}{b.shape}"
    if a.tobytes() != b.tobytes():
        differ = np.flatnonzero((a != b) | (np.signbit(a) != np.signbit(b)))
        i = differ[0] if len(differ) else 0
        pytest.fail(
            f"{what}: {len(differ)} of {a.size} differ, first at {i}: {a.flat[i]!r} and {b.flat[i]!r}"
        )


# ---- networks: the same chain in the engine and in reference.py --------------------------------------------


def layers_of(sizes, *ops, bias=True):
    """The engine's list of layers: Linear sizes[0] → sizes[1], ops[0], Linear …; an op is a name or (name,
    parameter).

    The last op stands behind the last Linear if there are as many ops as Linears; () and None stand for no
    op.
    """
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(("linear", n_in, n_out, 0.0, bias, None))
        if i < len(ops) and ops[i]:
            name, a = ops[i] if isinstance(ops[i], tuple) else (ops[i], 0.0)
            layers.append((name, n_out, n_out, a, False, None))
    return layers


def engine(layers, dtype, rng):
    """A network of the engine with weights N(0, 1/inputs) and biases N(0, 1)."""
    net = typed("Network", dtype)(layers)
    for k, (_, _, shape) in enumerate(net.parameters):
        net.set_parameter(
            k, (rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1)).astype(dtype)
        )
    return net


def values(net):
    """All parameters of the engine's network, in float64."""
    return [net.get_parameter(k).astype(float) for k in range(len(net.parameters))]


def twin(layers, net):
    """reference.Network with the parameters that `net` has now."""
    params, links = iter(values(net)), []
    for name, _, _, a, bias, _ in layers:
        if name == "linear":
            links.append(reference.Linear(next(params), next(params) if bias else None))
        else:
            links.append(reference.Dropout() if name == "dropout" else reference.Op(name, a))
    return reference.Network(links)


def typed(name, dtype):
    """_core's class for the element type: typed("Trainer", np.float32) is Trainer32."""
    return getattr(_core, name + ("32" if np.dtype(dtype) == np.float32 else "64"))
