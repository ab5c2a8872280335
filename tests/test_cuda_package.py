# SPDX-License-Identifier: MIT
"""The GPU through the package's own names: fit and predict, arrays that lie there, threads, limits."""

import ctypes
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import chainrule as cr
from chainrule import checkpoint
from conftest import CUDA_MODULE, assert_same_bits
from test_cuda import PRECISIONS, close, cuda

pytestmark = pytest.mark.gpu

X = np.linspace(-1, 1, 150).reshape(50, 3)
Y = np.sin(2 * X).sum(axis=1)

emulated = pytest.mark.skipif(not CUDA_MODULE, reason="no GPU's memory is short when it is asked to")


def networks(device, count, **more):
    layers = cr.Linear(3, 16), cr.Tanh(), cr.Dropout(0.1), cr.Linear(16, 1)
    return [cr.Sequential(*layers, seed=seed, device=device, **more) for seed in range(count)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "lbfgs", "levenberg_marquardt"])
def test_fit_is_the_cpus(optimizer):
    """The whole way through: validation, schedule, early stopping, history; in float64, digit by digit."""
    histories, nets = [], []
    for device in ("cpu", "cuda"):
        net = cr.mlp([3, 8, 1], activation="tanh", seed=1, dtype="float64", device=device)
        schedule = None if "_" in optimizer else cr.CosineAnnealingLR(6)
        stop = cr.EarlyStopping("val_loss", patience=2)
        histories.append(net.fit(X, Y, loss="mse", optimizer=optimizer, epochs=6, schedule=schedule, seed=3,
                                 validation_split=0.2, callbacks=[stop]))  # fmt: skip
        nets.append(net)
    assert histories[0].epochs == histories[1].epochs
    for name in ("loss", "val_loss"):
        close(histories[1][name], histories[0][name], 1e-7, name)
    close(nets[1].predict(X), nets[0].predict(X), 1e-7)
    assert nets[1].evaluate(X, Y, loss="mse") == pytest.approx(nets[0].evaluate(X, Y, loss="mse"), rel=1e-6)


def test_fit_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Optimizer's state, dropout and best weights come back: the bits of a fit that nothing cut off."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", np.inf)

    def fit(path, *callbacks):
        net = cr.Sequential(cr.Linear(3, 16), cr.Dropout(0.2), cr.Linear(16, 1), seed=1, device="cuda")
        stop = cr.EarlyStopping("val_loss", patience=2)
        history = net.fit(X, Y, loss="mse", optimizer=cr.Adam(0.3), epochs=9, validation_split=0.2,
                          callbacks=[stop, *callbacks], checkpoint=path)  # fmt: skip
        return [*net.state_dict().values(), *history["loss"], *history["val_loss"]]

    def cut(epoch, logs):
        if epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(tmp_path / "run.safetensors", cut)
    for got, expected in zip(fit(tmp_path / "run.safetensors"), fit(None), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradcheck(dtype):
    """All derivatives again, against central differences of a float64 network on the CPU."""
    net = cr.mlp([3, 8, 2], activation="gelu", seed=2, dtype=dtype, device="cuda")
    assert cr.gradcheck(net, X[:5], [0, 1, 1, 0, 1], "cross_entropy").ok


@pytest.mark.parametrize("own", [False, True], ids=["one data set", "one each"])
def test_many_networks_have_the_bits_of_each_alone(own, schedule, rng):
    options = {"loss": "mse", "epochs": 3, "batch_size": 16}
    nets, alone = networks("cuda", 5), networks("cuda", 5)
    optimizers, seeds = [cr.Adam(0.001 * (k + 1)) for k in range(5)], [3, 1, 4, 1, 5]
    data = (rng.standard_normal((5, 20, 3)), rng.standard_normal((5, 20, 1))) if own else (X, Y)
    histories = cr.fit_many(nets, *data, optimizer=optimizers, seed=seeds, **options)
    for k, (net, twin, history) in enumerate(zip(nets, alone, histories, strict=True)):
        rows = [array[k] for array in data] if own else data
        assert twin.fit(*rows, optimizer=optimizers[k], seed=seeds[k], **options).history == history.history
        for name, value in twin.state_dict().items():
            assert_same_bits(net.state_dict()[name], value, name)


def test_more_networks_than_clusters():
    """Each has a block of its own, and alone four, which add up in another order."""
    nets, alone = networks("cuda", 70, dtype="float64"), networks("cuda", 70, dtype="float64")
    options = {"loss": "mse", "epochs": 2, "batch_size": 32}
    histories = cr.fit_many(nets, X, Y, **options)
    for k in (0, 41, 69):
        history = alone[k].fit(X, Y, **options)
        close(histories[k]["loss"], history["loss"], 1e-12)
        close(nets[k].predict(X), alone[k].predict(X), 1e-12)


def test_of_many_one_diverges(schedule):
    nets, alone = networks("cuda", 3), networks("cuda", 3)
    with pytest.raises(FloatingPointError, match=r"in networks \[1\]"):
        cr.fit_many(nets, X, Y, loss="mse", optimizer=[cr.SGD(0.1), cr.SGD(1e30), cr.SGD(0.1)], epochs=4)
    for k in (0, 2):
        alone[k].fit(X, Y, loss="mse", optimizer=cr.SGD(0.1), epochs=4)
    for net, twin in zip(nets, alone, strict=True):
        assert_same_bits(net.predict(X), twin.predict(X))


def test_divergence_puts_the_weights_back(schedule):
    net = networks("cuda", 1)[0]
    before = net.predict(X)
    with pytest.raises(FloatingPointError, match="weights are those from before"):
        net.fit(X, Y, loss="mse", optimizer=cr.SGD(1e20), epochs=20)
    assert_same_bits(net.predict(X), before)
    net.fit(X, Y, loss="mse")


def test_ctrl_c_leaves_a_network_that_works(schedule):
    net = networks("cuda", 1)[0]
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        net.fit(X, Y, loss="mse", epochs=10**6)
    timer.join()
    assert np.isfinite(net.predict(X)).all()
    net.fit(X, Y, loss="mse")


def test_steps_of_ones_own(schedule):
    """train_step on batches of changing size, with and without weights, between predictions."""
    nets = [networks(device, 1, dtype="float64")[0] for device in ("cpu", "cuda")]
    optimizers = [cr.Adam(0.01), cr.Adam(0.01)]
    for first, last in ((0, 32), (32, 50), (0, 7), (0, 50)):
        rows = slice(first, last)
        for weight in (None, np.arange(last - first) + 1.0):
            a, b = (
                net.train_step(X[rows], Y[rows], loss="huber", optimizer=optimizer, sample_weight=weight)
                for net, optimizer in zip(nets, optimizers, strict=True)
            )
            assert a == pytest.approx(b, rel=1e-9)
            close(nets[1].predict(X), nets[0].predict(X), 1e-9)


# ---- arrays on the device ----------------------------------------------------------------------------------


REAL = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "bool"]


@pytest.mark.parametrize("dtype", REAL)
def test_an_array_there_and_back(dtype, rng):
    given = (100 * rng.standard_normal((7, 5))).astype(dtype)
    array = cuda.upload(given, 0)
    assert (array.shape, array.dtype, array.device) == ((7, 5), np.dtype(dtype), 0)
    assert array.__dlpack_device__() == (2, 0)
    given[:] = 0  # a copy
    again = cuda.from_dlpack(array)
    assert again.numpy().any()
    assert_same_bits(again.numpy(), array.numpy())
    del array
    assert_same_bits(np.asarray(again), again.numpy())


def structure(capsule):
    """Where a DLPack capsule's structure lies."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer(capsule, b"dltensor")


def address(capsule):
    """Where its numbers lie: the structure begins with that."""
    return ctypes.c_void_p.from_address(structure(capsule)).value


class Alien:
    """An array there that says it has another dtype: (code, bits) stand after pointer, device and rank."""

    def __init__(self, array, code, bits):
        self.array, self.kind = array, (code, bits)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **kw):
        capsule = self.array.__dlpack__()
        ctypes.memmove(structure(capsule) + 20, bytes(self.kind), 2)
        return capsule


@pytest.mark.parametrize(("code", "bits"), [(4, 16), (2, 8), (2, 128), (5, 64), (0, 4), (6, 1)])
def test_dtypes_that_numpy_has_not(code, bits):
    alien = Alien(cuda.upload(np.zeros((4, 3), np.int64), 0), code, bits)
    with pytest.raises(TypeError, match=rf"dtype must be one of NumPy's.*code {code} with {bits} bits"):
        cr.mlp([3, 1], device="cuda").fit(alien, np.zeros(4), loss="mse")


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_labels_and_rows_of_any_dtype_there(dtype):
    nets = [cr.mlp([3, 4, 2], device="cuda", seed=0) for _ in range(2)]
    rows, labels = (10 * X).astype("float16"), (Y > 0).astype(dtype)
    there = cuda.upload(rows, 0), cuda.upload(labels, 0)
    losses = [
        net.fit(*data, loss="cross_entropy")["loss"]
        for net, data in zip(nets, [(rows, labels), there], strict=True)
    ]
    assert losses[0] == losses[1]
    with pytest.raises(TypeError, match="float16"):
        there[0].all_finite()


def test_a_copy_for_whoever_asks_for_one():
    """PyTorch takes it for one, and writes there."""
    array = cuda.upload(np.arange(5.0), 0)
    same, copy = (array.__dlpack__(copy=how, dl_device=(2, 0)) for how in (None, True))
    assert address(same) == address(array.__dlpack__(stream=1, max_version=(1, 0), copy=False))
    assert address(same) != address(copy)
    with pytest.raises(BufferError, match=r"expected \(2, 0\), got \(1, 0\); .numpy\(\)"):
        array.__dlpack__(dl_device=(1, 0))


def test_the_memory_of_an_array_that_has_gone():
    """It may be another's; that of one that is there may not."""
    kept = cuda.upload(np.full(1000, 1.0), 0)
    for number in range(2, 6):
        array = cuda.upload(np.full(1000, float(number)), 0)
        assert (array.numpy() == number).all() and (kept.numpy() == 1).all()
        del array


@pytest.mark.parametrize("precision", PRECISIONS)
def test_predictions_that_stay_there(precision, rng):
    net = networks("cuda", 1, dtype=precision)[0]
    x = X.astype(net.array_dtype)
    f = net.predict(cuda.upload(x, 0))
    assert (f.shape, f.dtype) == ((50, 1), net.array_dtype)
    assert_same_bits(f.numpy(), net.predict(x))


@pytest.mark.parametrize(
    "dtype", ["float32", "float64"]
)  # of the arrays; float64 ones come to the host first
@pytest.mark.parametrize("validation", ["data", "split"])
def test_training_on_arrays_there(dtype, validation):
    a, b = networks("cuda", 2)
    b.load_state_dict(a.state_dict())
    x, y = X.astype(dtype), Y.astype(dtype)
    there = cuda.upload(x, 0), cuda.upload(y, 0)
    histories = []
    for net, arrays in ((a, (x, y)), (b, there)):
        options = {"validation_data": arrays} if validation == "data" else {"validation_split": 0.3}
        optimizer = cr.Adam()
        history = net.fit(*arrays, loss="mse", optimizer=optimizer, epochs=3, **options).history
        step = net.train_step(*arrays, loss="mse", optimizer=optimizer)
        whole = cr.mlp([3, 4, 1], activation="tanh", device="cuda").fit(
            *arrays, loss="mse", optimizer="lbfgs", epochs=2
        )
        histories.append([history, step, net.evaluate(*arrays, loss="mse"), whole.history])
    assert histories[0] == histories[1]
    assert_same_bits(a.predict(X), b.predict(X))


def test_rows_of_an_array_there():
    x = X.astype(np.float32)
    array = cuda.upload(x, 0)
    assert len(array) == 50 and array.all_finite() and array[:0].all_finite()
    for rows in (slice(0, 50), slice(7, 20), slice(49, None), slice(-3, None), slice(9, 3)):
        assert_same_bits(array[rows].numpy(), x[rows])
    with pytest.raises(IndexError, match="expected neighbours"):
        array[::2]
    for value in (np.nan, np.inf):
        x[31, 2] = value
        broken = cuda.upload(x, 0)
        assert broken[:31].all_finite() and broken[32:].all_finite() and not broken.all_finite()
        with pytest.raises(ValueError, match=r"X must be finite.*row 31, column 2"):
            networks("cuda", 1)[0].fit(broken, Y, loss="mse")


@pytest.mark.skipif(bool(CUDA_MODULE), reason="PyTorch has no emulated GPU")
def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    net = networks("cuda", 1)[0]
    x = torch.tensor(X, dtype=torch.float32, device="cuda:0")
    f = torch.from_dlpack(net.predict(x * 2))  # on PyTorch's stream: ours must wait for it, and it for ours
    assert f.device == x.device
    assert_same_bits(f.cpu().numpy(), net.predict((2 * X).astype(np.float32)))
    net.fit(x, torch.tensor(Y, device="cuda:0"), loss="mse")


# ---- limits ------------------------------------------------------------------------------------------------


def test_out_of_memory_says_how_much_and_leaves_the_network_usable():
    with pytest.raises(MemoryError, match=r"expected .*[\d,]+.* bytes.* got"):
        cr.Sequential(cr.Linear(2**20, 2**20), device="cuda")
    net = cr.mlp([2, 1024, 1024, 1], device="cuda")
    before = net.predict(X[:1, :2])
    with pytest.raises(MemoryError):
        cr.per_example_grads(net, *[np.zeros((2**26, n), np.float32) for n in (2, 1)], "mse")  # addresses end
    assert_same_bits(net.predict(X[:1, :2]), before)
    net.fit(X[:1, :2], Y[:1], loss="mse")


class Full:
    """From the end of the first epoch on, somebody else has the GPU's memory."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_epoch_end(self, epoch, logs):
        self.monkeypatch.setenv("CHAINRULE_EMULATOR_MEMORY", "1")


@emulated
def test_graphs_have_the_librarys_products():
    """It finds no algorithm while a graph is made, here as in some of its versions: it is asked before."""
    count = ctypes.c_long.in_dll(ctypes.CDLL(CUDA_MODULE), "chainrule_products_in_graphs")
    before = count.value
    cuda.force_schedule("library")
    try:
        networks("cuda", 1)[0].fit(X, Y, loss="mse", epochs=4, batch_size=25)
    finally:
        cuda.force_schedule("")
    assert count.value > before


@emulated
@pytest.mark.parametrize("more", [{}, {"validation_split": 0.25}, {"clip_norm": 1.0}], ids=str)
def test_what_has_begun_to_train_wants_no_more_memory(more, schedule, monkeypatch):
    nets = networks("cuda", 2)
    how = {"loss": "mse", "epochs": 3, "seed": 1, **more}
    nets[0].fit(X, Y, callbacks=[Full(monkeypatch)], **how)
    monkeypatch.delenv("CHAINRULE_EMULATOR_MEMORY")
    nets[1].load_state_dict(networks("cuda", 1)[0].state_dict())
    nets[1].fit(X, Y, **how)
    assert_same_bits(nets[0].predict(X), nets[1].predict(X))
    before = nets[0].predict(X)
    with pytest.raises(FloatingPointError, match="parameters must stay finite"):  # seen by a sum on the GPU
        nets[0].fit(
            X, Y, callbacks=[Full(monkeypatch)], loss="mse", optimizer=cr.SGD(3e38), batch_size=50, l2=1e38
        )
    monkeypatch.delenv("CHAINRULE_EMULATOR_MEMORY")
    assert_same_bits(nets[0].predict(X), before)


@emulated
@pytest.mark.parametrize("way", ["resident", "fused"])
def test_all_networks_are_trained_or_none(way, monkeypatch, request):
    """Whatever allocation it is that fails. (cuBLASLt's workspaces would take hundreds of attempts.)"""
    cuda.force_schedule(way)
    request.addfinalizer(lambda: cuda.force_schedule(""))

    def attempt(limit):
        nets = networks("cuda", 3)
        before = [net.predict(X[:2]) for net in nets]
        monkeypatch.setenv("CHAINRULE_EMULATOR_MEMORY", str(limit))
        try:
            cr.fit_many(nets, X, Y, loss="mse")
            text = ""
        except MemoryError as error:
            text = str(error)
        monkeypatch.delenv("CHAINRULE_EMULATOR_MEMORY")
        changed = [(net.predict(X[:2]) != old).any() for net, old in zip(nets, before, strict=True)]
        assert all(changed) if not text else not any(changed), text
        return text

    limit, failed = 1, 0
    while text := attempt(limit):
        wanted, free, total = map(
            int, re.search(r"expected (\d+) bytes .* got (\d+) free of (\d+)", text).groups()
        )
        limit, failed = max(limit + 1, total - free + wanted), failed + 1
        assert failed < 300, text
    assert failed > 5


@emulated
def test_derivatives_are_kept_after_memory_was_short(monkeypatch, rng):
    """Else each call would ask for memory and give it back."""
    net, x, c = cr.mlp([3, 20, 2], device="cuda"), rng.standard_normal((40, 3)), np.ones((40, 2))
    monkeypatch.setenv("CHAINRULE_EMULATOR_MEMORY", "0")
    with pytest.raises(MemoryError):
        cr.vjp(net, x, c)
    monkeypatch.delenv("CHAINRULE_EMULATOR_MEMORY")
    expected = cr.vjp(net, x, c)[1]
    monkeypatch.setenv("CHAINRULE_EMULATOR_MEMORY", "0")
    assert_same_bits(cr.vjp(net, x, c)[1], expected)


def test_what_the_gpu_does_not_clip_is_refused_in_time():
    deep = cr.Sequential(*[cr.Linear(3, 3) for _ in range(33)], device="cuda")
    began = []
    with pytest.raises(ValueError, match=r"\[fit\] clip_example_norm on a GPU: expected at most 32 Linear"):
        deep.fit(X, X, loss="mse", clip_example_norm=1.0, callbacks=[lambda *_: began.append(1)])
    assert not began


def test_other_threads_use_other_networks(rng):
    """Two trainings at a time, each with the bits that it has alone."""
    nets, alone = networks("cuda", 2), networks("cuda", 2)
    threads = [
        threading.Thread(target=net.fit, args=(X, Y), kwargs={"loss": "mse", "epochs": 5}) for net in nets
    ]
    for thread in threads:
        thread.start()
    for thread, net, twin in zip(threads, nets, alone, strict=True):
        thread.join()
        twin.fit(X, Y, loss="mse", epochs=5)
        assert_same_bits(net.predict(X), twin.predict(X))


ASKED_WHILE_TRAINING = """
import threading, time
import conftest, numpy as np, chainrule as cr

conftest.pytest_configure()
net, X, y, optimizer = cr.mlp([3, 4, 1], device="cuda"), np.zeros((64, 3)), np.zeros(64), cr.Adam()

def ask():
    while asking:
        net.predict(X[0]), net.state_dict(), cr.vjp(net, X[:1], np.ones((1, 1))), optimizer.state_dict(net)

def fit(epochs):
    start = time.perf_counter()
    net.fit(X, y, loss="mse", optimizer=optimizer, epochs=epochs)
    return time.perf_counter() - start

fit(10)
epochs, asking = 20 + int(10 / fit(10)), True  # for a second or so
asker = threading.Thread(target=ask)
asker.start()
fit(epochs)
asking = False
asker.join()
"""


def test_a_network_in_training_can_be_asked():
    """The training asks for Python's lock now and then: whoever waits for the network must not keep it."""
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", ASKED_WHILE_TRAINING], cwd=here, check=True, timeout=120)


EVERY_KERNEL = """
import sys, numpy as np, chainrule as cr
from chainrule import _cuda
rng = np.random.default_rng(0)
X, y = rng.standard_normal((70, 5)), rng.integers(0, 3, 70)
for schedule, blocks in [("", 0), ("resident", 1), *((name, 0) for name in _cuda.schedules())]:
    _cuda.force_schedule(schedule, blocks)
    for dtype in ("float32", "tf32", "bfloat16", "float64"):
        layers = cr.Linear(5, 33), cr.GELU(), cr.Dropout(0.2), cr.Linear(33, 65), cr.Tanh(), cr.Linear(65, 3)
        nets = [cr.Sequential(*layers, seed=k, dtype=dtype, device="cuda") for k in range(3)]
        nets[0].fit(X, y, loss="cross_entropy", l2=0.1, clip_norm=1.0, validation_split=0.2)
        nets[0].fit(X, y, loss="cross_entropy", optimizer="rmsprop", clip_example_norm=1.0)
        cr.fit_many(nets, X, y, loss="cross_entropy", batch_size=16)
        nets[0].train_step(X, y, loss="cross_entropy", optimizer=cr.SGD(0.1, momentum=0.9))
_cuda.force_schedule("")
net = cr.mlp([5, 33, 3], activation="silu", device="cuda")
cr.gradcheck(net, X[:3], y[:3], "cross_entropy"), cr.laplacian(net, X)
cr.per_example_grads(net, X, y, "cross_entropy"), cr.jacobian(net, X, wrt="parameters")
net.fit(X, X[:, :3], loss="mse", dy=np.zeros((70, 3, 5)))
many = rng.standard_normal((9000, 5))
net.fit(many, many[:, :3], loss="mse", batch_size=9000, epochs=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(CUDA_MODULE), reason="compute-sanitizer looks at GPUs only")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="there is no compute-sanitizer here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool):
    """Addresses out of range, races for shared memory, reads before writes, barriers in branches."""
    command = [
        "compute-sanitizer",
        f"--tool={tool}",
        "--error-exitcode=9",
        sys.executable,
        "-c",
        EVERY_KERNEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
