# SPDX-License-Identifier: MIT
"""Files that no fit goes on from: of another fit, damaged, made by hand; refused before anything changes."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import chainrule as cr
from chainrule import io
from chainrule.checkpoint import described
from conftest import assert_same_bits
from test_checkpoint import EPOCHS, KINDS, SlowerByHand, at_each_epoch, fit, log_cosh, make, problem

__all__ = ["at_each_epoch"]  # a fixture for each test here, too

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


def in_a_notebook(**names):
    """A loss that uses global names."""
    space = {"np": np, **names}
    text = "def loss(f, y):\n    return (lambda d: ((alpha * d**2).mean(), shape(d) * alpha / d.size))(f - y)"
    exec(text, space)
    return space["loss"]


class Method:
    def __init__(self, factor):
        self.factor = factor

    def loss(self, f, y):
        return times(self.factor)(f, y)


OWN = {
    "a set": ({"loss": among("abcdefgh")}, {"loss": among("abcdefgx")}),
    "a global number": (
        {"loss": in_a_notebook(alpha=1, shape=abs)},
        {"loss": in_a_notebook(alpha=2, shape=abs)},
    ),
    "a global function": (
        {"loss": in_a_notebook(alpha=1, shape=lambda d: d)},
        {"loss": in_a_notebook(alpha=1, shape=lambda d: 2 * d)},
    ),
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
from test_checkpoint_refused import OWN, described
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
    with pytest.raises(
        ValueError, match=r"must be a file of fit: expected .* got a model; give another name$"
    ):
        fit("adam", path)
    io.write_safetensors(path, make().state_dict())
    with pytest.raises(ValueError, match=r"got arrays alone; give another name$"):
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
    with pytest.raises(TypeError, match=r"^\[fit\] file name must be a path: expected text or a Path"):
        make().fit(*problem(), loss="mse", checkpoint=path)
