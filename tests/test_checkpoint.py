# SPDX-License-Identifier: MIT
"""Checkpoints: a fit that is cut off and goes on has the bits of one that nobody touched, in each kind."""

import io as text
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

import chainrule as cr
from chainrule import checkpoint, io, training
from chainrule.checkpoint import described
from conftest import assert_same_bits
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
    monkeypatch.setattr(training, "_is_terminal", lambda: True)
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
history = net.fit(X, y, loss="cross_entropy", optimizer=cr.Adam(lr=0.01), batch_size=16, epochs=1500,
                  validation_split=0.2, callbacks=[cr.EarlyStopping(patience=10_000)], checkpoint=path)
np.savez(sys.argv[2], *net.state_dict().values(), history["loss"], history["val_loss"])
"""


@pytest.mark.slow
def test_killed_at_any_moment(rng, tmp_path):
    """kill -9, ten times, then left alone: whole or as it was, and in the end the same bits."""

    def start(path, name):
        command = [sys.executable, "-c", PROGRAM, str(path), str(tmp_path / name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    path, cuts = tmp_path / "run.safetensors", 0
    while cuts < 10:
        with start(path, "got.npz") as process:
            assert process.stdout.readline() == "begins\n"
            time.sleep(rng.uniform(0.01, 0.15))
            process.send_signal(signal.SIGKILL)
        cuts += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            break
        if path.exists():
            io.read_safetensors(path)
    print(f"killed {cuts} times")
    assert cuts > 2 and len(io.read_safetensors(path)[0]["run.history.loss"]) > 20
    for place, name in ((path, "got.npz"), ("", "expected.npz")):
        with start(place, name) as process:
            assert process.wait(120) == 0
    got, expected = (np.load(tmp_path / name) for name in ("got.npz", "expected.npz"))
    for name in expected.files:
        assert_same_bits(got[name], expected[name])
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


# ------------------------------------------------------------ what is refused


CHANGES = {
    "loss": {"loss": "mae"},
    "optimizer": {"optimizer": cr.Adam(lr=0.01, betas=(0.8, 0.9))},
    "optimizer .*RMSprop": {"optimizer": cr.RMSprop(lr=0.01)},
    "lr 0.02": {"optimizer": cr.Adam(lr=0.02)},
    "schedule": {"schedule": cr.StepLR(3)},
    "batch_size": {"batch_size": 9},
    "shuffle": {"shuffle": False},
    "seed": {"seed": 1},
    "l2": {"l2": 0.5},
    "EarlyStopping": {"callbacks": [cr.EarlyStopping("loss")]},
    "data": {"sample_weight": np.arange(41.0)},
    "validation": {"validation_data": problem()},
    "epochs at most 3": {"epochs": 3},
}


@pytest.mark.parametrize("what", CHANGES)
def test_of_another_fit(what, tmp_path):
    path = tmp_path / "run.safetensors"
    fit("adam", path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^\[fit\] checkpoint .* must be of this fit: expected .*{what}"):
        fit("adam", path, **CHANGES[what])
    assert path.read_bytes() == content


def test_of_another_network(tmp_path):
    path, (X, y) = tmp_path / "run.safetensors", problem()
    fit("by name", path)
    net = cr.mlp([5, 7, 3], activation="relu")
    before, optimizer = net.state_dict(), cr.Adam()
    with pytest.raises(ValueError, match=r"^\[fit\] checkpoint .*: expected network "):
        net.fit(X, y, loss="mse", optimizer=optimizer, batch_size=8, epochs=EPOCHS, checkpoint=path)
    for name, array in net.state_dict().items():
        assert_same_bits(array, before[name])
    assert optimizer.state_dict(net)["step"] == 0


def test_of_other_data_alike(tmp_path):
    """One bit in one number of 41 × 5."""
    path, (X, y) = tmp_path / "run.safetensors", problem()
    fit("by name", path)
    X[17, 3] = np.nextafter(np.float32(X[17, 3]), np.float32(9))
    with pytest.raises(ValueError, match="expected data with SHA-256"):
        make().fit(X, y, loss="mse", batch_size=8, epochs=EPOCHS, checkpoint=path)


def test_what_the_same_numbers_are_for(tmp_path):
    """Weights of examples, or slopes: of one input and one output there are as many."""
    path, column = tmp_path / "run.safetensors", np.arange(1.0, 5.0)
    cr.mlp([1, 1]).fit(column[:, None], column, loss="mse", sample_weight=column, checkpoint=path)
    with pytest.raises(ValueError, match="must be of this fit"):
        cr.mlp([1, 1]).fit(column[:, None], column, loss="mse", dy=column[:, None], checkpoint=path)


def times(factor, power=2):
    def loss(f, y, exponent=power):
        d = f - y
        return (factor * d**2).mean(), 2 * factor * d / d.size

    return loss


class Times:
    def __init__(self, factor):
        self.factor = np.full(2, factor)

    def __call__(self, f, y):
        return times(self.factor[0])(f, y)


class Rates(cr.Schedule):
    def __init__(self, k):
        self.k = k

    def rates(self, lr, epoch, epochs, steps):
        return lr / (1 + self.k * np.arange(epoch, epoch + epochs))


def among(names):
    """Whose set of names is a constant of its code."""
    space = {}
    exec(f"def loss(f, y):\n    return 'a' in {set(names)!r}", space)
    return space["loss"]


class Method:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, f, y):
        return times(self.factor)(f, y)


OWN = {
    "a set": ({"loss": among("abcdefgh")}, {"loss": among("abcdefgx")}),
    "a method's object": ({"loss": Method(1).loss}, {"loss": Method(2).loss}),
    "a part of a function": (
        {"loss": partial(times(1), exponent=2)},
        {"loss": partial(times(2), exponent=2)},
    ),
    "another name": ({"loss": times(1)}, {"loss": log_cosh}),
    "what it takes along": ({"loss": times(1)}, {"loss": times(2)}),
    "a default": ({"loss": times(1)}, {"loss": times(1, power=3)}),
    "an object's attribute": ({"loss": Times(1)}, {"loss": Times(2)}),
    "a lambda's text": ({"loss": lambda f, y: times(1)(f, y)}, {"loss": lambda f, y: times(2)(f, y)}),
    "a loss's argument": ({"loss": cr.losses.Huber(1.0)}, {"loss": cr.losses.Huber(2.0)}),
    "a schedule's attribute": ({"schedule": Rates(1)}, {"schedule": Rates(2)}),
    "a schedule in another": (
        {"schedule": cr.WarmupLR(1, after=Rates(1))},
        {"schedule": cr.WarmupLR(1, after=Rates(2))},
    ),
    "a penalty": (
        {"dy": np.zeros((41, 3, 5)), "dy_weight": 1.0},
        {"dy": np.zeros((41, 3, 5)), "dy_weight": 2.0},
    ),
}


@pytest.mark.parametrize("what", OWN)
def test_parts_of_ones_own_are_more_than_their_names(what, tmp_path):
    path = tmp_path / "run.safetensors"
    first, other = OWN[what]
    if what == "a set":  # is no loss
        assert described(first) != described(other)
        return
    fit("by name", path, epochs=2, **first)
    fit("by name", path, epochs=3, **first)
    with pytest.raises(ValueError, match=r"must be of this fit: expected (loss|schedule|dy_weight) "):
        fit("by name", path, **other)


def test_parts_of_ones_own_are_the_same_in_every_process(tmp_path):
    """No addresses, no order of sets."""
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import OWN, described
print([described(value) for one, two in OWN.values() for value in (*one.values(), *two.values())])
"""
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]
    texts = {subprocess.check_output(command, text=True, timeout=120) for _ in range(2)}
    assert len(texts) == 1
    assert "0x" not in texts.pop()


def test_where_a_function_stands_does_not_count():
    """A notebook's cells have a file name for each process, and scripts get lines above."""
    spaces = [{}, {}]
    text = "def loss(f, y):\n    return [g(f) for g in (lambda f: f + 1, abs)]"
    exec(compile(text, "/tmp/ipykernel_11/1.py", "exec"), spaces[0])
    exec(compile("\n\n" + text, "/tmp/ipykernel_22/2.py", "exec"), spaces[1])
    assert described(spaces[0]["loss"]) == described(spaces[1]["loss"])


def test_a_loss_that_knows_its_network(tmp_path):
    """As losses of physics do; the network changes, and it is the same fit."""
    path, (X, y), net = tmp_path / "run.safetensors", problem(), make()

    def loss(f, y):
        return log_cosh(f, y) if net.in_features else None

    for epochs in (2, 4):
        history = net.fit(X, y, loss=loss, epochs=epochs, checkpoint=path)
    assert history.epochs == 4


def test_parts_of_ones_own_that_hold_themselves():
    """Descriptions end."""
    circle = []
    circle.append(circle)
    knot = Times(1)
    knot.self = knot

    def recursive(f, y):
        return recursive, circle, knot

    for part in (circle, knot, recursive):
        assert len(described(part)) < 10_000


def test_a_rate_that_a_callback_has_changed_is_no_other_fit(tmp_path):
    """In a notebook: the same objects again, for more epochs or after Ctrl-C."""
    path, (X, y) = tmp_path / "run.safetensors", problem()
    expected = fit("a callback that sets lr", None)
    net, _, arguments = KINDS["a callback that sets lr"]()
    for epochs in (5, EPOCHS):
        net.fit(X, y, loss="mse", batch_size=8, epochs=epochs, checkpoint=path, **arguments)
    assert_same_bits(net.predict(X), expected[0].predict(X))
    assert arguments["optimizer"].lr == expected[2].lr


def test_a_rate_that_a_callback_changes_beside_a_schedule(tmp_path):
    """The schedule begins with the rate that the fit began with."""

    def run(path, net, optimizer, epochs):
        options = {
            "schedule": cr.ReduceLROnPlateau("loss", 0.5, patience=0),
            "callbacks": [SlowerByHand(optimizer)],
        }
        X, y = problem()
        return net.fit(
            X, y, loss="mse", optimizer=optimizer, batch_size=8, epochs=epochs, checkpoint=path, **options
        )

    path, net, optimizer = tmp_path / "run.safetensors", make(), cr.Adam(lr=0.9)
    run(path, net, optimizer, 5)
    got, expected = run(path, net, optimizer, EPOCHS), run(None, make(), cr.Adam(lr=0.9), EPOCHS)
    assert got.history == expected.history


def test_where_long_texts_differ_is_shown(tmp_path):
    path, (X, y) = tmp_path / "run.safetensors", problem()
    sizes = [5, 7, 7, 7, 7, 3]
    cr.mlp(sizes, seed=0).fit(X, y, loss="mse", checkpoint=path)
    with pytest.raises(ValueError, match=r'expected network ….*"seed":1\}.*got ….*"seed":0\}'):
        cr.mlp(sizes, seed=1).fit(X, y, loss="mse", checkpoint=path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "net.safetensors"
    make().save(path)
    with pytest.raises(ValueError, match=r"expected file a checkpoint, with the key 'chainrule.run', got"):
        fit("adam", path)
    with pytest.raises(ValueError, match=r"\[fit\] file name .*run.ckpt'?: expected the suffix .safetensors"):
        fit("adam", tmp_path / "run.ckpt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"^\[fit\] checkpoint: expected the name of a file"):
        fit("adam", tmp_path / "folder.safetensors")


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_damaged_file(where, tmp_path):
    path = tmp_path / "run.safetensors"
    fit("adam", path, epochs=4)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\[load\] .*; give fit another checkpoint, or delete the file"):
        fit("adam", path)


def changed(path, arrays=None, **fields):
    """The file with some arrays (None: without) and some fields of its JSON changed, and a right checksum."""
    found, texts = io.read_safetensors(path)
    found |= arrays or {}
    document = {**json.loads(texts[io.RUN]), **fields}
    texts[io.RUN] = json.dumps(document)
    io.write_safetensors(path, {name: array for name, array in found.items() if array is not None}, texts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"format": 2},
        {"format": None},
        {"terms": []},
        {"step": "many"},
        {"lr": "fast"},
        {"lr": -1.0},
        {"step": -1},
        {"stopped": 1.5},
        {"stopped": 2},
        {"stopped": True},
        {"step": True},
        {"step": 2**63},
        {"lr": None},
        {"first_lr": None},
        {"first_lr": -1.0, "lr": 0.01},
        {"arrays": {"run.history.loss": None}},
        {"arrays": {"run.history.loss": np.zeros(3)}},
        {"arrays": {"run.history.lr": np.zeros((4, 1))}},
        {"arrays": {"run.history.loss": np.zeros(4, np.float32)}},
        {"arrays": {"run.optimizer.1": None}},
        {"arrays": {"run.optimizer.1": np.zeros(5, np.float32)}},
        {"arrays": {"run.more": np.zeros(5)}},
        {"arrays": {"0.weight": np.zeros((7, 5))}},
        {"arrays": {"2.bias": None}},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_made_by_hand(wrong, tmp_path):
    """A right checksum, and something that cannot be: an error before anything is changed."""
    path = tmp_path / "run.safetensors"
    fit("adam", path, epochs=4)
    changed(path, **wrong)
    net, optimizer = make(), cr.Adam(lr=0.01)
    before = net.state_dict()
    X, y = problem()
    with pytest.raises(ValueError, match=r"expected .*, got "):
        net.fit(X, y, loss="mse", optimizer=optimizer, batch_size=8, epochs=EPOCHS, checkpoint=path)
    for name, array in net.state_dict().items():
        assert_same_bits(array, before[name])
    assert optimizer.lr == 0.01 and optimizer.state_dict(net)["step"] == 0


def test_best_weights_are_there_where_there_must_be_some(tmp_path):
    path = tmp_path / "run.safetensors"
    net, _, _ = fit("early stopping", path, epochs=3)
    for missing in ({"2.bias"}, set(net.state_dict())):
        changed(path, {f"run.best.0.{name}": None for name in missing})
        with pytest.raises(ValueError, match=r"expected array run.best.0"):
            fit("early stopping", path)


def test_nothing_is_best_where_nothing_was_a_number(tmp_path):
    """A validation loss that never is one: no weights are kept, before and after."""
    path, X = tmp_path / "run.safetensors", problem()[0]
    infinite = (np.zeros((2, 5)), np.full((2, 3), 1e30))
    for epochs in (2, 4):
        got = fit("adam", path, epochs=epochs, validation_data=infinite, callbacks=[cr.EarlyStopping()])
    assert not np.isfinite(got[1]["val_loss"]).any()
    expected = fit("adam", None, epochs=4, validation_data=infinite, callbacks=[cr.EarlyStopping()])
    assert_same_bits(got[0].predict(X), expected[0].predict(X))


def test_an_early_stopping_is_listed_once(tmp_path):
    stop = cr.EarlyStopping("loss")
    with pytest.raises(ValueError, match=r"expected each EarlyStopping once, got .* twice; make two"):
        make().fit(*problem(), loss="mse", callbacks=[stop, stop])


@pytest.mark.parametrize("path", [True, 3, ["a.safetensors"]])
def test_what_is_no_path(path):
    with pytest.raises(TypeError, match=r"^\[fit\] checkpoint must be a path: expected"):
        make().fit(*problem(), loss="mse", checkpoint=path)


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


def test_a_link_to_nothing_yet(tmp_path):
    (tmp_path / "run.safetensors").symlink_to("far.safetensors")
    with pytest.raises(Cut):
        fit("adam", tmp_path / "run.safetensors", cut=3)
    assert (tmp_path / "run.safetensors").is_symlink() and (tmp_path / "far.safetensors").is_file()
    assert_same_fit(fit("adam", tmp_path / "run.safetensors"), fit("adam", None))


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
