# SPDX-License-Identifier: MIT
"""device=…: what is loaded when, and what is said where something is missing.

On a stand-in for the GPU engine; test_cuda.py has the engine itself.
"""

import copy
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import chainrule as cr
import fake_cuda
from chainrule import devices
from conftest import assert_same_bits


def installed(monkeypatch, module):
    """`module` in the place of chainrule._cuda; None: there is none."""
    monkeypatch.setitem(sys.modules, "chainrule._cuda", module)
    devices._load.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    devices._load.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    fake_cuda.calls.clear()
    installed(monkeypatch, fake_cuda)
    return fake_cuda


@pytest.fixture
def no_gpu(monkeypatch):
    installed(monkeypatch, None)


def with_state(state, version=cr.__version__):
    return types.SimpleNamespace(__version__=version, state=lambda: state, device_count=lambda: 1)


X = np.linspace(-1, 1, 60).reshape(20, 3)
Y = X @ [[1.0], [-2.0], [0.5]]


def small(device="cuda", **more):
    return cr.mlp([3, 5, 1], activation="tanh", seed=3, device=device, **more)


def same(a, b):
    for name, value in a.state_dict().items():
        assert_same_bits(value, b.state_dict()[name], name)


# ---- loading -----------------------------------------------------------------------------------------------


def test_importing_and_computing_on_the_cpu_loads_no_gpu_engine():
    code = (
        "import sys, chainrule as cr, numpy as np\n"
        "net = cr.mlp([2, 3, 1]); net.fit(np.ones((4, 2)), np.ones(4), loss='mse'); net.to('cpu')\n"
        "assert 'chainrule._cuda' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


FORKED = """
import os, sys
import chainrule as cr, fake_cuda
from chainrule import devices

sys.modules["chainrule._cuda"] = fake_cuda
assert devices.count() == 2
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    cr.mlp([2, 1], device="cuda")
except ValueError as error:
    assert "expected an NVIDIA GPU" in str(error) and "'spawn'" in str(error), error
    assert devices.resolve("fit", "auto") == "cpu" and not devices.count() and "'spawn'" in devices.state()
else:
    raise AssertionError("no error")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_is_told_how_to_start():
    """CUDA's own words there are "initialization error"."""
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", FORKED], cwd=here, check=True, timeout=60)


HOW = "pip install . -C cmake.define.CHAINRULE_CUDA=ON"


@pytest.mark.parametrize(
    "make",
    [
        lambda: small("cuda"),
        lambda: small("cpu").to("cuda:0"),
        lambda: cr.Sequential.from_config(small("cpu").config(), device="cuda"),
        lambda: cr.load("nowhere.safetensors", device="cuda"),
    ],
)
def test_without_the_engine_one_error_says_how_to_get_it(make, no_gpu):
    expected = r"device 'cuda(:0)?' must be usable: expected an NVIDIA GPU and a build with CHAINRULE_CUDA=ON"
    with pytest.raises(ValueError, match=rf"^\[\w+\] {expected}, got no GPU engine in this build; {HOW}"):
        make()


@pytest.mark.parametrize(
    ("module", "got"),
    [
        (with_state("no NVIDIA driver: libcuda.so.1 not found"), "no NVIDIA driver: libcuda.so.1 not found"),
        (with_state("", "9.9"), f"a GPU engine of version 9.9 in chainrule {cr.__version__}"),
    ],
)
def test_what_is_missing_is_named(module, got, monkeypatch):
    installed(monkeypatch, module)
    with pytest.raises(ValueError, match=f"CHAINRULE_CUDA=ON, got {got}(; {HOW}|$)"):
        small()
    assert cr.info()["cuda"] == got and small("auto").device == "cpu"


def test_an_engine_that_cannot_be_loaded_says_why(monkeypatch):
    class Broken:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "chainrule._cuda":
                raise ImportError("libx.so: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "chainrule._cuda", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    devices._load.cache_clear()
    assert devices.state() == "a GPU engine that cannot be loaded: libx.so: cannot open shared object file"


# ---- names -------------------------------------------------------------------------------------------------


def test_device_names(gpu):
    names = {name: small(name).device for name in ("cpu", "cuda", "cuda:0", "cuda:1", "auto")}
    assert names == {"cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:1": "cuda:1", "auto": "cuda:0"}
    assert small("cuda:1")._core.device == 1
    assert repr(small("cuda:1")).endswith("seed=3, device='cuda:1')")
    assert cr.info()["cuda"] == "cuda:0 Fake 0, cuda:1 Fake 1"
    with pytest.raises(ValueError, match="must be there: expected 'cuda:0' to 'cuda:1', got 'cuda:2'"):
        small("cuda:2")


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "CUDA", "", "cuda:1\n", None, 0, ["cpu"]])
def test_no_other_names(device, gpu):
    kind = ValueError if isinstance(device, str) else TypeError
    with pytest.raises(kind, match=r"\[Sequential\] device must be known: expected 'cpu', 'cuda'"):
        small(device)


# ---- what follows a network --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_to_copies_there_and_back(dtype, gpu):
    net = small("cpu", dtype=dtype)
    there = net.to("cuda")
    assert (net.device, there.device, there.dtype) == ("cpu", "cuda:0", dtype)
    assert isinstance(there._core, fake_cuda.Network64 if dtype == "float64" else fake_cuda.Network32)
    same(net, there)
    there.fit(X, Y, loss="mse")
    assert (there.to("cpu").predict(X) == there.predict(X)).all()
    assert (net.predict(X) != there.predict(X)).any(), "the copy shares its weights"


def test_copies_stay_pickles_and_files_do_not(gpu, tmp_path):
    net = small("cuda:1")
    net.note = ["mine"]
    for twin in (copy.copy(net), copy.deepcopy(net)):
        assert twin.device == "cuda:1" and twin.note == ["mine"] and twin.note is not net.note
        same(net, twin)
    for device in ("cpu", "cuda:0"):
        net.save(tmp_path / "net.safetensors")
        assert cr.load(tmp_path / "net.safetensors", device).device == device
    assert cr.load(tmp_path / "net.safetensors").device == pickle.loads(pickle.dumps(net)).device == "cpu"
    same(net, pickle.loads(pickle.dumps(net)))


def test_files_are_the_same_from_any_device(gpu, tmp_path):
    small("cpu").save(tmp_path / "a.safetensors")
    small("cuda").save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tf32_is_float32_on_the_cpu(gpu, tmp_path):
    net = small(dtype="tf32")
    net.save(tmp_path / "net.safetensors")
    assert (net.dtype, net.array_dtype, net.predict(X).dtype) == ("tf32", "float32", np.float32)
    assert (
        copy.copy(net).dtype
        == net.to("cuda:1").dtype
        == cr.load(tmp_path / "net.safetensors", "cuda").dtype
        == "tf32"
    )
    for twin in (net.to("cpu"), pickle.loads(pickle.dumps(net)), cr.load(tmp_path / "net.safetensors")):
        assert (twin.dtype, twin.device) == ("float32", "cpu")


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
def test_rounded_products_have_no_exact_derivatives(dtype, gpu):
    net = small(dtype=dtype)
    for ask in (
        lambda: cr.jvp(net, X),
        lambda: cr.hvp(net, X, Y, "mse", net.state_dict()),
        lambda: net.fit(X, Y, loss="mse", dy=X),
        lambda: net.fit(X, Y, loss="mse", optimizer="lbfgs"),
        lambda: cr.explain(net, X[0], Y[0], "mse"),
    ):
        with pytest.raises(ValueError, match=f"expected dtype float32 or float64, got {dtype}"):
            ask()


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs", "levenberg_marquardt"])
def test_fit_is_the_engines(optimizer, gpu):
    cpu, there = small("cpu"), small()
    a, b = (
        net.fit(X, Y, loss="mse", optimizer=optimizer, epochs=3, validation_split=0.2) for net in (cpu, there)
    )
    assert a["loss"] == b["loss"] and a["val_loss"] == b["val_loss"]
    same(cpu, there)


def own_loss(f, y):
    return ((f[:, 0] - y) ** 2).mean(), 2 * (f - y[:, None]) / len(f)


class Own(cr.Layer):
    def forward(self, x):
        return x

    def vjp(self, x, y, dy):
        return dy


def test_what_runs_in_python_is_refused_and_the_remedy_named(gpu):
    net = small()
    before = net.state_dict()
    opt = cr.Adam()
    for ask in (
        lambda: net.fit(X, Y, loss=own_loss),
        lambda: net.train_step(X, Y, loss=own_loss, optimizer=opt),
        lambda: net.value_and_grad(X, Y, loss=own_loss),
        lambda: net.evaluate(X, Y, loss=own_loss),
        lambda: cr.per_example_grads(net, X, Y, own_loss),
        lambda: cr.fit_many([net], X, Y, loss=own_loss),
    ):
        with pytest.raises(ValueError, match=r"a loss of your own runs on the CPU: .* use net.to\('cpu'\)"):
            ask()
    with pytest.raises(ValueError, match=r"a layer of your own .* got Own; use device='cpu'"):
        cr.Sequential(cr.Linear(3, 1), Own(), device="cuda")
    with pytest.raises(ValueError, match="a layer of your own"):
        cr.Sequential(cr.Linear(3, 1), Own()).to("cuda")
    assert all((before[name] == value).all() for name, value in net.state_dict().items())


# ---- arrays on a device ------------------------------------------------------------------------------------


def test_arrays_that_lie_there(gpu):
    net, cpu = small(), small("cpu")
    there = gpu.upload(X.astype(np.float32), 0)
    f = net.predict(there)
    assert isinstance(f, gpu.Array) and f.device == 0
    assert_same_bits(f.numpy(), cpu.predict(X))
    targets = gpu.upload(Y.astype(np.float32), 0)
    for one, rows, y in ((net, there, targets), (cpu, X.astype(np.float32), Y)):
        one.fit(rows, y, loss="mse", epochs=2, validation_data=(rows, y))
        one.train_step(rows, y, loss="mse", optimizer=cr.SGD(0.1))
    same(net, cpu)
    with pytest.raises(TypeError, match="can't convert cuda"):
        cpu.predict(there)


@pytest.mark.parametrize(
    ("array", "device", "got"),
    [
        (X, 0, r"got float64 \(20, 3\) on 'cuda:0'"),
        (X.astype(np.float32), 1, r"got float32 \(20, 3\) on 'cuda:1'"),
        (X[:, :2].astype(np.float32), 0, r"got float32 \(20, 2\)"),
        (X[0].astype(np.float32), 0, r"got float32 \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit(array, device, got, gpu):
    expected = r"\[predict\] X on a GPU is taken as it is: expected float32 \(rows, 3\) on 'cuda:0', "
    with pytest.raises(ValueError, match=expected + got):
        small().predict(gpu.upload(array, device))
