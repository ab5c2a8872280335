# SPDX-License-Identifier: MIT
"""fit_many: the bits of separate fits, on the CPU and on a stand-in for the GPU engine."""

import re
import sys

import numpy as np
import pytest

import chainrule as cr
from conftest import assert_same_bits
from test_devices import forget, gpu, same
from test_training import Terminal

__all__ = ["forget", "gpu"]  # fixtures

X = np.linspace(-1, 1, 90).reshape(30, 3)
Y = np.sin(X).sum(axis=1)


@pytest.fixture(params=["cpu", "cuda:1"])
def device(request, gpu):
    return request.param


def networks(device, count=3, **more):
    layers = cr.Linear(3, 6), cr.Tanh(), cr.Dropout(0.1), cr.Linear(6, 1)
    return [cr.Sequential(*layers, seed=seed, device=device, **more) for seed in range(count)]


CASES = [
    {},
    {"optimizer": [cr.Adam(0.01), cr.Adam(0.02), cr.Adam(0.0)]},
    {"seed": [7, 8, 9], "sample_weight": np.linspace(0, 1, 30), "l2": 0.1, "clip_norm": 0.5},
    {"optimizer": "sgd", "schedule": cr.StepLR(2, 0.5), "epochs": 5, "batch_size": 7},
    {"schedule": cr.WarmupLR(3), "epochs": 4, "shuffle": False},
    {"optimizer": cr.GD(0.1), "clip_example_norm": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case) or "plain")
def test_the_bits_of_separate_fits(case, device, gpu):
    options = {"loss": "mse", "epochs": 3, **case}
    nets, alone = networks(device), networks(device)
    histories = cr.fit_many(nets, X, Y, **options)
    for k, (net, twin, history) in enumerate(zip(nets, alone, histories, strict=True)):
        own = {name: value[k] if isinstance(value, list) else value for name, value in options.items()}
        assert twin.fit(X, Y, **own).history == history.history
        same(net, twin)
    assert set(gpu.calls) == (set() if device == "cpu" else {3})


def test_data_of_their_own(device, rng):
    Xs, ys = rng.standard_normal((3, 10, 3)), rng.standard_normal((3, 10, 1))
    nets, alone = networks(device), networks(device)
    cr.fit_many(nets, Xs, ys, loss="mse", epochs=2)
    for net, twin, rows, y in zip(nets, alone, Xs, ys, strict=True):
        twin.fit(rows, y, loss="mse", epochs=2)
        same(net, twin)


def test_an_optimizer_goes_on_with_each_network(device):
    nets, alone, adam, other = networks(device), networks(device), cr.Adam(), cr.Adam()
    for _ in range(2):
        cr.fit_many(nets, X, Y, loss="mse", optimizer=adam, epochs=2)
        for twin in alone:
            twin.fit(X, Y, loss="mse", optimizer=other, epochs=2)
    for net, twin in zip(nets, alone, strict=True):
        same(net, twin)
        assert adam.state_dict(net)["step"] == other.state_dict(twin)["step"] == 4


@pytest.mark.parametrize("optimizer", ["lbfgs", "levenberg_marquardt"])
def test_whole_batch_optimizers(optimizer, gpu):
    nets, twin = (
        [cr.mlp([3, 4, 1], activation="tanh", device="cuda") for _ in range(2)],
        cr.mlp([3, 4, 1], "tanh"),
    )
    histories = cr.fit_many(nets, X, Y, loss="mse", optimizer=optimizer, epochs=3)
    alone = twin.fit(X, Y, loss="mse", optimizer=optimizer, epochs=3)
    assert alone.history == histories[0].history == histories[1].history
    same(nets[0], twin)


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_progress(verbose, device, gpu, monkeypatch):
    """Networks done, one after the other; epochs, where one call trains all; the bits of silence."""
    options = {"loss": "mse", "epochs": 30, "schedule": cr.StepLR(9)}
    quiet, nets = networks(device), networks(device)
    histories = cr.fit_many(quiet, X, Y, verbose=0, **options)
    stream, clock = Terminal(), iter(range(1000))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock) ** 2 / 9)  # every look at it takes longer
    watched = cr.fit_many(nets, X, Y, verbose=verbose, **options)
    done, unit = (3, "network") if device == "cpu" else (30, "epoch")
    assert f"{unit} {done}/{done}  loss" in stream.getvalue()
    assert ("epoch" if device == "cpu" else "network") not in stream.getvalue()
    for net, twin, history, other in zip(nets, quiet, watched, histories, strict=True):
        same(net, twin)
        assert history.history == other.history


def test_one_that_diverges_spoils_no_other(device):
    """Its weights are those from before, its history ends there; the others are trained to the end."""
    nets, alone = networks(device), networks(device)
    optimizers = [cr.SGD(0.1), cr.SGD(1e30), cr.SGD(0.1)]
    with pytest.raises(
        FloatingPointError, match=r"^\[fit_many\] .* in networks \[1\], .* \[fit\] loss must"
    ) as caught:
        cr.fit_many(nets, X, Y, loss="mse", optimizer=optimizers, epochs=4)
    same(nets[1], alone[1])
    lengths = [len(history["loss"]) for history in caught.value.histories]
    assert lengths[0] == lengths[2] == 4 and lengths[1] < 4
    for k in (0, 2):
        alone[k].fit(X, Y, loss="mse", optimizer=cr.SGD(0.1), epochs=4)
        same(nets[k], alone[k])


def twice(nets):
    return [nets[0], nets[1], nets[0]]


def of_two_kinds(nets):
    return [nets[0], cr.mlp([3, 1], device=nets[0].device)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"nets": twice}, ValueError, "expected all of one kind, got one of them twice"),
        ({"nets": of_two_kinds}, ValueError, "expected all of one kind, got 2 kinds"),
        ({"nets": lambda nets: []}, ValueError, "got 0 kinds"),
        ({"nets": lambda nets: [1]}, TypeError, "expected Sequentials, got 1"),
        ({"callbacks": [print]}, ValueError, "nobody looks between epochs: expected no callbacks"),
        ({"schedule": cr.ReduceLROnPlateau()}, ValueError, "expected no ReduceLROnPlateau"),
        ({"seed": [1, 2]}, ValueError, "seed must be one or a list: expected 3, got 2"),
        (
            {"optimizer": [cr.Adam(), cr.SGD(0.1), "adam"]},
            ValueError,
            "expected one class, got 'Adam', 'SGD'",
        ),
        ({"X": np.zeros((2, 5, 3))}, ValueError, "expected 3 times some, got 2"),
        ({"loss": "rmse"}, ValueError, "[fit] loss"),
        ({"batchsize": 3}, TypeError, "batchsize"),
    ],
)
def test_errors_change_nothing(arguments, error, message, device):
    nets, alone = networks(device), networks(device)
    arguments = {"X": X, "y": Y, "loss": "mse", **arguments}
    chosen = arguments.pop("nets", lambda nets: nets)(nets)
    with pytest.raises(error, match=re.escape(message)):
        cr.fit_many(chosen, arguments.pop("X"), arguments.pop("y"), **arguments)
    for net, twin in zip(nets, alone, strict=True):
        same(net, twin)
        assert_same_bits(net.predict(X), twin.predict(X))
