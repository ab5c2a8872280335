# SPDX-License-Identifier: MIT
"""Checkpoints: a fit that is cut off and goes on has the bits of one that nobody touched, in each kind."""

import io as text
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import chainrule as cr
from chainrule import callbacks, checkpoint, io
from conftest import assert_same_bits, posix
from test_own_parts import OwnTanh

EPOCHS = 9


class Cut(Exception):
    """What ends a fit from outside."""


def cut_after(epoch):
    def cut(now, logs):
        if now == epoch:
            raise Cut

    return cut


@pytest.fixture(autouse=True)
def at_each_epoch(monkeypatch):
    """Files are written after every epoch, not every second."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", np.inf)


def make(dtype="float32", extra=()):
    return cr.Sequential(cr.Linear(5, 7), cr.Tanh(), *extra, cr.Linear(7, 3), seed=3, dtype=dtype)


def problem(labels=False):
    values = np.random.default_rng(8)
    X = values.standard_normal((41, 5))
    return X, values.integers(0, 3, 41) if labels else values.standard_normal((41, 3))


def log_cosh(f, y):
    d = f - y
    return np.log(np.cosh(d)).mean(), np.tanh(d) / d.size


class Slower(cr.Schedule):
    def rates(self, lr, epoch, epochs, steps):
        return lr / (1 + np.arange(epoch, epoch + epochs))


class SlowerByHand:
    """A callback that changes the rate itself; what it does depends on the epoch alone."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def on_epoch_end(self, epoch, logs):
        if epoch % 3 == 2:
            self.optimizer.lr *= 0.5


# What a fit is made of: (network, labels, arguments of fit), all made anew for each fit.
KINDS = {
    "sgd": lambda: (make(), False, {"optimizer": cr.SGD(lr=0.05, momentum=0.9)}),
    "nesterov": lambda: (make("float64"), False, {"optimizer": cr.SGD(lr=0.05, momentum=0.9, nesterov=True)}),
    "gd": lambda: (make(), False, {"optimizer": cr.GD(0.1)}),
    "adam": lambda: (make(), False, {"optimizer": cr.Adam(lr=0.01)}),
    "adamw": lambda: (make("float64"), True, {"loss": "cross_entropy", "optimizer": cr.AdamW(lr=0.01)}),
    "rmsprop": lambda: (make(), False, {"optimizer": cr.RMSprop(lr=0.01, momentum=0.5, centered=True)}),
    "by name": lambda: (make(), False, {}),
    "bfloat16": lambda: (make("bfloat16"), False, {}),
    "lbfgs": lambda: (make("float64"), False, {"optimizer": cr.LBFGS()}),
    "levenberg_marquardt": lambda: (make("float64"), False, {"optimizer": cr.LevenbergMarquardt()}),
    "dropout": lambda: (make(extra=[cr.Dropout(0.4)]), False, {}),
    "own parts": lambda: (make(extra=[OwnTanh()]), False, {"loss": log_cosh}),
    "weights and penalties": lambda: (
        make(),
        True,
        {
            "loss": "cross_entropy",
            "class_weight": "balanced",
            "sample_weight": np.arange(41.0),
            "l1": 0.01,
            "l2": 0.1,
            "clip_norm": 0.1,
        },
    ),
    "examples clipped": lambda: (make(), False, {"clip_example_norm": 0.1}),
    "slopes": lambda: (make("float64"), False, {"dy": np.zeros((41, 3, 5)), "dy_weight": 0.3}),
    "cosine": lambda: (make(), False, {"schedule": cr.CosineAnnealingLR(7)}),
    "warm-up": lambda: (make(), False, {"schedule": cr.WarmupLR(4, after=cr.StepLR(2))}),
    "own schedule": lambda: (make(), False, {"schedule": Slower()}),
    "plateau": lambda: (
        make(),
        False,
        {"optimizer": cr.Adam(lr=0.9), "schedule": cr.ReduceLROnPlateau("loss", 0.5, patience=0)},
    ),
    "early stopping": lambda: (
        make(),
        False,
        {"optimizer": cr.Adam(lr=0.2), "validation_split": 0.3, "callbacks": [cr.EarlyStopping(patience=4)]},
    ),
    "plateau of another loss": lambda: (
        make(),
        False,
        {
            "optimizer": cr.Adam(lr=0.9),
            "schedule": cr.ReduceLROnPlateau("val_loss", 0.5, patience=0),
            "validation_split": 0.3,
        },
    ),
    "two that restore": lambda: (
        make(),
        False,
        {
            "optimizer": cr.Adam(lr=0.2),
            "validation_split": 0.3,
            "callbacks": [cr.EarlyStopping("loss", mode="max", patience=50), cr.EarlyStopping(patience=50)],
        },
    ),
    "two that stop": lambda: (
        make(),
        False,
        {
            "callbacks": [
                cr.EarlyStopping("loss", patience=5, mode="max"),
                cr.EarlyStopping("loss", patience=50, restore_best=False),
            ],
        },
    ),
    "a callback that sets lr": lambda: _with_rate(cr.Adam(lr=0.1)),
}


def _with_rate(optimizer):
    return make(), False, {"optimizer": optimizer, "callbacks": [SlowerByHand(optimizer)]}


def fit(kind, path, cut=None, epochs=EPOCHS, **changed):
    """A fit of this kind with everything new, as another process would have it."""
    net, labels, arguments = KINDS[kind]()
    arguments = {"loss": "mse", "batch_size": 8, **arguments, **changed}
    if isinstance(arguments.get("optimizer"), (cr.GD, cr.LBFGS, cr.LevenbergMarquardt)):
        del arguments["batch_size"]
    callbacks = [*arguments.pop("callbacks", ()), *([] if cut is None else [cut_after(cut)])]
    X, y = problem(labels)
    history = net.fit(X, y, epochs=epochs, callbacks=callbacks, verbose=0, checkpoint=path, **arguments)
    return net, history, arguments.get("optimizer")


def assert_same_fit(got, expected):
    for a, b in zip(got[0].state_dict().values(), expected[0].state_dict().values(), strict=True):
        assert_same_bits(a, b)
    assert got[1].history == expected[1].history
    assert got[1].stopped_epoch == expected[1].stopped_epoch
    if got[2] is not None:
        states = [optimizer.state_dict(net) for net, _, optimizer in (got, expected)]
        assert states[0]["step"] == states[1]["step"]
        for a, b in zip(states[0]["slots"], states[1]["slots"], strict=True):
            assert_same_bits(a, b)
        assert got[2].config() == expected[2].config()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_and_gone_on(kind, tmp_path):
    """Cut off twice, and once more after the last epoch."""
    expected, path = fit(kind, None), tmp_path / "run.safetensors"
    assert expected[1].epochs > 4 or expected[1].stopped_epoch is not None
    for epoch in (2, 3, expected[1].epochs - 1):
        with pytest.raises(Cut):
            fit(kind, path, cut=epoch)
    assert_same_fit(fit(kind, path), expected)
    assert_same_fit(fit(kind, path), expected)  # nothing is left to do


@pytest.mark.parametrize("kind", ["adam", "plateau", "lbfgs", "early stopping"])
def test_more_epochs(kind, tmp_path):
    path = tmp_path / "run.safetensors"
    for epochs in (3, EPOCHS):
        got = fit(kind, path, epochs=epochs)
        assert_same_fit(got, fit(kind, None, epochs=epochs))


def test_one_that_was_stopped_stays_stopped(tmp_path):
    path = tmp_path / "run.safetensors"
    first = fit("two that stop", path)
    assert first[1].stopped_epoch is not None
    again = fit("two that stop", path, epochs=10 * EPOCHS)
    assert_same_fit(again, first)


def test_without_anybody_watching(tmp_path, monkeypatch):
    """Many epochs at a time, as nothing wants to see each: the bits of one call for all of them."""
    path, calls = tmp_path / "run.safetensors", []
    written = checkpoint.Checkpoint._write
    monkeypatch.setattr(
        checkpoint.Checkpoint,
        "_write",
        lambda self, run: (calls.append(run.history.epochs), written(self, run)),
    )
    got = fit("adam", path, epochs=3000)
    assert calls[0] == 0 and calls[-1] == 3000
    assert 3 < len(calls) < 1000  # not after every epoch of some microseconds
    assert_same_fit(got, fit("adam", None, epochs=3000))


def test_one_file_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSE", 1e9)
    path = tmp_path / "run.safetensors"
    with pytest.raises(Cut):
        fit("adam", path, cut=4)
    assert len(io.read_safetensors(path)[0]["run.history.loss"]) == 0  # the one from before the first epoch
    assert_same_fit(fit("adam", path), fit("adam", None))
    assert len(io.read_safetensors(path)[0]["run.history.loss"]) == EPOCHS


def test_the_pause_grows_with_the_time_a_file_takes(tmp_path, monkeypatch):
    clock = iter([100.0, 103.0])
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock, 103.0))
    monkeypatch.setattr(checkpoint, "SHARE", 0.05)
    seen = []
    begin = checkpoint.Checkpoint.begin
    monkeypatch.setattr(
        checkpoint.Checkpoint, "begin", lambda self, run: (begin(self, run), seen.append(self.due))
    )
    fit("adam", tmp_path / "run.safetensors")
    assert seen == [pytest.approx(103 + 3 / 0.05)]


def test_the_network_in_it(tmp_path):
    """`load` reads a checkpoint as a network: of the last epoch, before EarlyStopping puts the best back."""
    path = tmp_path / "run.safetensors"
    net, _, _ = fit("dropout", path)
    loaded, extra = io.load_with_metadata(path)
    assert extra == {}
    assert repr(loaded) == repr(net)
    assert_same_bits(loaded.predict(problem()[0]), net.predict(problem()[0]))


def test_each_epoch_is_written_once(tmp_path, monkeypatch):
    written, write = [], io.write_safetensors
    monkeypatch.setattr(io, "write_safetensors", lambda path, arrays, texts: (
        written.append(len(arrays["run.history.loss"])), write(path, arrays, texts)))  # fmt: skip
    fit("adam", tmp_path / "run.safetensors", epochs=3, callbacks=[lambda epoch, logs: None])
    assert written == [0, 1, 2, 3]


def test_an_error_on_the_way_back_gives_back_what_the_caller_had(tmp_path, monkeypatch):
    """Not the best weights of the file, which are in the network for a moment."""
    path, net, optimizer = tmp_path / "run.safetensors", make(), cr.Adam(lr=0.2)
    fit("early stopping", path, epochs=4)
    before = net.state_dict()

    def failing(self):
        raise MemoryError

    monkeypatch.setattr(cr.EarlyStopping, "_keep", failing)
    arguments = {**KINDS["early stopping"]()[2], "optimizer": optimizer}
    with pytest.raises(MemoryError):
        net.fit(*problem(), loss="mse", batch_size=8, epochs=9, checkpoint=path, **arguments)
    for name, array in net.state_dict().items():
        assert_same_bits(array, before[name])
    assert optimizer.state_dict(net)["step"] == 0


def test_a_fit_that_goes_on_writes_too(tmp_path):
    """After each epoch, not only at the end."""
    path = tmp_path / "run.safetensors"
    for epoch in (2, 5):
        with pytest.raises(Cut):
            fit("adam", path, cut=epoch)
        assert len(io.read_safetensors(path)[0]["run.history.loss"]) == epoch


def test_progress_begins_where_it_goes_on(tmp_path, capsys):
    path = tmp_path / "run.safetensors"
    fit("adam", path, epochs=4)
    X, y = problem()
    make().fit(
        X, y, loss="mse", optimizer=cr.Adam(lr=0.01), batch_size=8, epochs=6, verbose=2, checkpoint=path
    )
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["4/6", "5/6", "6/6"]


def test_the_bar_knows_what_took_no_time(tmp_path, monkeypatch):
    """Epochs of another process are none of this one's rate."""
    tqdm, bars = pytest.importorskip("tqdm"), []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **{**more, "file": text.StringIO()})
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(callbacks, "_is_live", lambda: True)
    path, (X, y) = tmp_path / "run.safetensors", problem()
    for epochs in (4, 6):
        make().fit(X, y, loss="mse", epochs=epochs, verbose=1, checkpoint=path)
    assert [(getattr(bar, "initial", 0), bar.n) for bar in bars] == [(0, 4), (4, 6)]


def test_divergence_gives_back_what_the_caller_had(tmp_path):
    """Not what is in the file."""
    path, X = tmp_path / "run.safetensors", problem()[0]
    net = make()

    def explode(epoch, logs):
        if epoch == 4:
            net.load_state_dict({name: 1e38 * array for name, array in net.state_dict().items()})

    optimizer = cr.SGD(lr=0.01)
    before = net.state_dict()
    for _ in range(2):  # the second time from the file, of epoch 5
        with pytest.raises(FloatingPointError, match=r"\[fit\] .* must stay finite"):
            net.fit(
                X,
                problem()[1],
                loss="mse",
                optimizer=optimizer,
                epochs=9,
                callbacks=[explode],
                checkpoint=path,
            )
        for name, array in net.state_dict().items():
            assert_same_bits(array, before[name])


PROGRAM = """
import sys
import numpy as np
import chainrule as cr
from chainrule import checkpoint

checkpoint.PAUSE, checkpoint.SHARE = 1e-3, float("inf")
values = np.random.default_rng(0)
X, y = values.standard_normal((500, 8)), values.integers(0, 3, 500)
net = cr.Sequential(cr.Linear(8, 64), cr.ReLU(), cr.Dropout(0.2), cr.Linear(64, 3), seed=1)
print("begins", flush=True)
path = sys.argv[1] if len(sys.argv[1]) else None
history = net.fit(X, y, loss="cross_entropy", optimizer=cr.Adam(lr=0.01), batch_size=16, epochs=3000,
                  validation_split=0.2, callbacks=[cr.EarlyStopping(patience=100_000)], checkpoint=path)
np.savez(sys.argv[2], *net.state_dict().values(), history["loss"], history["val_loss"])
"""


@pytest.mark.slow
def test_killed_at_any_moment(rng, tmp_path):
    """kill -9, ten times or more, then left alone: whole or as it was, and in the end the same bits."""

    def start(path, name):
        command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def epochs():
        """In the file, which is whole."""
        return len(io.read_safetensors(path)[0]["run.history.loss"]) if path.exists() else 0

    path, cuts = tmp_path / "run.safetensors", 0
    while cuts < 10 or (epochs() <= 20 and cuts < 100):  # on a slow disk not even an epoch a process
        with start(path, "got.npz") as process:
            assert process.stdout.readline() == "begins\n"
            time.sleep(rng.uniform(0.01, 0.15))
            process.kill()
        assert process.returncode in (0, -9 if os.name == "posix" else 1)
        if process.returncode == 0:
            break
        cuts += 1
        print(f"killed {cuts} times, last after epoch {epochs()}")
    assert cuts > 2 and epochs() > 0
    for place, name in ((path, "got.npz"), ("", "expected.npz")):
        with start(place, name) as process:
            assert process.wait(120) == 0
    got, expected = (np.load(tmp_path / name) for name in ("got.npz", "expected.npz"))
    for name in expected.files:
        assert_same_bits(got[name], expected[name])
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


# ------------------------------------------------------------ files


def test_a_callback_that_changes_the_folder(tmp_path, monkeypatch):
    """The file stays where it was when the fit began."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    fit("adam", "run.safetensors", callbacks=[lambda epoch, logs: os.chdir(tmp_path / "sub")])
    assert not list((tmp_path / "sub").iterdir())
    assert len(io.read_safetensors(tmp_path / "run.safetensors")[0]["run.history.loss"]) == EPOCHS


def test_leftovers_of_killed_processes_go(tmp_path):
    path = tmp_path / "run.safetensors"
    others = [".run.safetensors.x.tmp", ".run.safetensors.0123456789abcdef"]
    (tmp_path / ".run.safetensors.0123456789abcdef.tmp").touch()
    for name in others:
        (tmp_path / name).touch()
    fit("adam", path)
    assert sorted(os.listdir(tmp_path)) == sorted(["run.safetensors", *others])


def test_names_that_begin_alike(tmp_path):
    """What another run is writing at that moment stays."""
    name = "learning rate 0.001, batch 32, hidden 64 64, seed "
    (tmp_path / f".{name}1.safetensors.0123456789abcdef.tmp").touch()
    fit("adam", tmp_path / f"{name}2.safetensors")
    assert len(os.listdir(tmp_path)) == 2


def test_names_that_are_long_in_bytes(tmp_path):
    fit("adam", tmp_path / ("𝔸" * 58 + ".safetensors"))
    assert len(os.listdir(tmp_path)) == 1


@posix
def test_a_link_to_nothing_yet(tmp_path):
    (tmp_path / "run.safetensors").symlink_to("far.safetensors")
    with pytest.raises(Cut):
        fit("adam", tmp_path / "run.safetensors", cut=3)
    assert (tmp_path / "run.safetensors").is_symlink() and (tmp_path / "far.safetensors").is_file()
    gone_on, whole = fit("adam", tmp_path / "run.safetensors"), fit("adam", None)
    assert_same_fit(gone_on, whole)
    assert (gone_on[1].first_epoch, whole[1].first_epoch) == (3, 0)


def test_a_layer_that_has_learnt_something_beside_its_parameters(tmp_path):
    """What config() says at that moment is in the file, as `save` would write it."""
    path, layer = tmp_path / "run.safetensors", Counting()
    net = cr.Sequential(cr.Linear(5, 3), layer)
    net.fit(*problem(), loss="mse", epochs=3, checkpoint=path)
    net.save(tmp_path / "net.safetensors")
    assert (
        cr.load(path).layers[1].calls
        == cr.load(tmp_path / "net.safetensors").layers[1].calls
        == layer.calls
        > 0
    )


class Counting(cr.Layer):
    def __init__(self, calls=0):
        self.calls = calls

    def forward(self, x):
        self.calls += 1
        return x

    def vjp(self, x, y, dy):
        return dy

    def config(self):
        return {"calls": self.calls}


# ------------------------------------------------------------ what the disk refuses


def test_a_folder_that_is_not_there(tmp_path):
    """Before the first epoch, with nothing changed."""
    net, (X, y) = make(), problem()
    before = net.state_dict()
    begun = []

    class Begins:
        def on_train_begin(self, net):
            begun.append(net)

    with pytest.raises(
        FileNotFoundError, match=r"\[fit\] checkpoint: expected a folder .*none'; make it first"
    ):
        net.fit(X, y, loss="mse", checkpoint=tmp_path / "none" / "run.safetensors", callbacks=[Begins()])
    assert not begun
    for name, array in net.state_dict().items():
        assert_same_bits(array, before[name])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()], ids=repr)
def test_a_full_disk(error, tmp_path, monkeypatch):
    """Training goes on; the file stays that of the last epoch that could be written, and counts."""
    path, write, count = tmp_path / "run.safetensors", io.write_safetensors, iter(range(100))

    def failing(*arguments):
        if next(count) in (4, 5, 6):
            raise error
        write(*arguments)

    monkeypatch.setattr(io, "write_safetensors", failing)
    with (
        pytest.warns(
            RuntimeWarning, match=r"\[fit\] checkpoint .* after epoch 4: .*training goes on"
        ) as record,
        pytest.raises(Cut),
    ):
        fit("adam", path, cut=6)
    assert len(record) == 1  # not three lines for one disk
    assert_warned_in_fit(record[0])
    assert len(io.read_safetensors(path)[0]["run.history.loss"]) == 3
    assert_same_fit(fit("adam", path), fit("adam", None))


def assert_warned_in_fit(warning):
    """Where the user calls it, in `fit` above."""
    first = fit.__code__.co_firstlineno
    assert warning.filename == __file__ and first < warning.lineno < first + 20


def test_each_time_that_a_disk_fills_up(tmp_path, monkeypatch):
    """And at the very end."""
    write, count = io.write_safetensors, iter(range(100))

    def failing(*arguments):
        if next(count) in (2, 3, 5, EPOCHS - 1, EPOCHS):
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(io, "write_safetensors", failing)
    with pytest.warns(RuntimeWarning, match=r"\[fit\] checkpoint .* must be written") as record:
        got = fit("adam", tmp_path / "run.safetensors", callbacks=[lambda epoch, logs: None])
    texts = [str(one.message) for one in record]
    assert [re.search(r"after epoch (\d+)", text)[1] for text in texts] == ["2", "5", "8", "9"]
    assert [text.endswith("training goes on, and tries again") for text in texts] == [True, True, True, False]
    assert texts[-1].endswith("the file is the one from before; make room and call fit again")
    for one in record:
        assert_warned_in_fit(one)
    assert_same_fit(got, fit("adam", None))


def test_a_folder_that_is_deleted_meanwhile(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    remove = [lambda epoch, logs: shutil.rmtree(folder) if epoch == 3 else None]
    with pytest.warns(RuntimeWarning, match=r"must be written") as record:
        fit("adam", folder / "run.safetensors", callbacks=remove)
    assert all("there is no file; " in str(one.message) for one in record)


def test_weights_that_have_diverged_after_the_last_loss_are_not_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError):
        fit("sgd", path, epochs=1, optimizer=cr.SGD(lr=1e300), batch_size=41)
    assert all(np.isfinite(array).all() for array in io.read_safetensors(path)[0].values())


def test_an_error_while_best_weights_are_read(tmp_path, monkeypatch):
    """They are in the network for a moment; the ones of training come back."""
    expected = fit("two that stop", None)
    read, best = cr.Sequential.state_dict, checkpoint.Checkpoint._best

    def failing(net):
        raise MemoryError

    def without_memory(self):
        cr.Sequential.state_dict = failing
        try:
            return best(self)
        finally:
            cr.Sequential.state_dict = read

    monkeypatch.setattr(checkpoint.Checkpoint, "_best", without_memory)
    with pytest.warns(RuntimeWarning, match="the file is the one from before"):
        got = fit("two that stop", tmp_path / "run.safetensors")
    assert_same_fit(got, expected)


def test_many_networks_have_none(tmp_path):
    with pytest.raises(TypeError, match="expected no 'checkpoint'"):
        cr.fit_many([make()], *problem(), loss="mse", checkpoint=tmp_path / "run.safetensors")
