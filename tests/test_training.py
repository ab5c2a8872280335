# SPDX-License-Identifier: MIT
"""fit: the same training as the reference's, however it is watched, cut into calls, or broken off."""

import copy
import gc
import io
import math
import os
import pickle
import re
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core, optim, reference
from chainrule.display import warn
from conftest import assert_same_bits

SIZES = [4, 6, 3]


@pytest.fixture
def data(rng):
    return rng.standard_normal((23, 4)), rng.standard_normal((23, 3))


def make(seed=0, sizes=SIZES, dtype="float64", **more):
    return cr.mlp(sizes, activation="tanh", seed=seed, dtype=dtype, **more)


def twin(net):
    w = net.state_dict()
    links = [reference.Linear(w["0.weight"].copy(), w["0.bias"].copy()), reference.Op("tanh")]
    return reference.Network([*links, reference.Linear(w["2.weight"].copy(), w["2.bias"].copy())])


def assert_same_weights(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert_same_bits(x, y, name)


def fitted(X, y, seed=0, net=None, **arguments):
    net = net or make(seed)
    return net, net.fit(X, y, **{"loss": "mse", "batch_size": 5, "epochs": 4, **arguments})


class Recorder:
    """A callback that writes down what it is told."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, net):
        self.calls.append("begin")

    def on_epoch_end(self, epoch, logs):
        self.calls.append((epoch, logs))

    def on_train_end(self, net):
        self.calls.append("end")


# ---- the training itself -------------------------------------------------------------------------

CASES = [
    ("sgd", {}, "sgd", {}, 1e-3),
    (cr.SGD(0.1, momentum=0.9, nesterov=True), {}, "sgd", {"momentum": 0.9, "nesterov": True}, 0.1),
    ("adam", {}, "adam", {}, 1e-3),
    ("adamw", {}, "adamw", {}, 1e-3),
    (cr.RMSprop(), {}, "rmsprop", {}, 1e-2),
    ("adam", {"l1": 0.01, "l2": 0.1, "clip_value": 0.05, "clip_norm": 0.1}, "adam",
     {"l1": 0.01, "l2": 0.1, "clip_value": 0.05, "clip_norm": 0.1}, 1e-3),
]  # fmt: skip


@pytest.mark.parametrize("optimizer, more, rule, hyper, lr", CASES, ids=lambda v: str(v) if v else "")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_fit_equals_reference(optimizer, more, rule, hyper, lr, shuffle, weighted, data, rng):
    """Defaults that are not PyTorch's, arguments lost on the way, another order. Bound: 20 roundings."""
    X, y = data
    weight = rng.random(23) if weighted else None
    net = make()
    own = reference.Trainer(twin(net), "mse", rule, **hyper)
    orders = [_core.permutation(23, 7, epoch) if shuffle else np.arange(23) for epoch in range(4)]
    losses = list(own.fit(X, y, lr, 5, orders, weight))
    history = net.fit(X, y, loss="mse", optimizer=copy.copy(optimizer), batch_size=5, epochs=4,
                      shuffle=shuffle, seed=7, sample_weight=weight, **more)  # fmt: skip
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-10)
    for value, expected in zip(net.state_dict().values(), own.net.params, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-8, atol=1e-10)


def test_gd_takes_all_rows_in_their_order(data):
    X, y = data
    net = make()
    own = reference.Trainer(twin(net), "mse", "sgd")
    losses = list(own.fit(X, y, 0.1, 23, [np.arange(23)] * 5))
    _, history = fitted(X, y, net=net, optimizer=cr.GD(0.1), batch_size=5, epochs=5)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)
    in_order, _ = fitted(X, y, optimizer=cr.SGD(0.1), batch_size=23, epochs=5, shuffle=False)
    assert_same_weights(net, in_order)


def test_a_batch_larger_than_the_data_is_all_of_it(data):
    (a, _), (b, _) = fitted(*data, batch_size=23), fitted(*data, batch_size=10**12)
    assert_same_weights(a, b)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23])
def test_steps_by_hand_are_an_epoch(batch_size, data):
    X, y = data
    net, history = fitted(X, y, batch_size=batch_size, epochs=1, shuffle=False)
    hand, adam, losses = make(), cr.Adam(), []
    for i in range(0, 23, batch_size):
        batch = X[i : i + batch_size], y[i : i + batch_size]
        losses += [hand.train_step(*batch, loss="mse", optimizer=adam)] * len(batch[0])
    assert_same_weights(net, hand)
    assert history["loss"][0] == pytest.approx(np.mean(losses), rel=1e-12)


def test_labels_are_safe_from_later_changes(data):
    """Labels are checked once and then index memory: the engine has a copy that no callback can reach."""
    X, _ = data
    labels = np.zeros(23, np.int64)

    def change(epoch, logs):
        labels[:] = 10**15

    a, _ = fitted(X, labels, loss="cross_entropy", callbacks=[change])
    b, _ = fitted(X, np.zeros(23, np.int64), loss="cross_entropy")
    assert_same_weights(a, b)


def test_an_optimizer_object_goes_on_and_a_name_starts_afresh(data):
    X, y = data
    once, _ = fitted(X, y, epochs=4, shuffle=False)
    adam = cr.Adam()
    net, _ = fitted(X, y, epochs=1, shuffle=False, optimizer=adam)
    assert adam.state_dict(net)["step"] == 5
    for _ in range(3):
        fitted(X, y, net=net, epochs=1, shuffle=False, optimizer=adam)
    assert_same_weights(net, once)
    fresh, _ = fitted(X, y, epochs=1, shuffle=False)
    fitted(X, y, net=fresh, epochs=3, shuffle=False)
    assert any(
        (a != b).any() for a, b in zip(fresh.state_dict().values(), once.state_dict().values(), strict=True)
    )


def test_one_optimizer_keeps_networks_apart(data):
    X, y = data
    shared, alone = cr.Adam(), [fitted(X, y, seed=s)[0] for s in (0, 1)]
    together = [make(0), make(1)]
    for net in together:
        fitted(X, y, net=net, optimizer=shared)
    for a, b in zip(alone, together, strict=True):
        assert_same_weights(a, b)


def test_optimizer_state_can_be_saved(data):
    """Resume: weights and state through plain dicts into new objects, bit for bit."""
    X, y = data
    net, adam = make(), cr.Adam()
    fitted(X, y, net=net, optimizer=adam, shuffle=False)
    again, other = make(1), cr.Adam()
    again.load_state_dict(net.state_dict())
    other.load_state_dict(again, pickle.loads(pickle.dumps(adam.state_dict(net))))
    for n, o in ((net, adam), (again, other)):
        fitted(X, y, net=n, optimizer=o, shuffle=False)
    assert_same_weights(net, again)


def test_lr_may_be_changed_between_steps(data):
    sgd, net = cr.SGD(0.1), make()
    before = net.state_dict()
    sgd.lr = 0.0
    net.train_step(*data, loss="mse", optimizer=sgd)
    for name, value in net.state_dict().items():
        assert_same_bits(value, before[name])


def test_steps_with_many_losses_and_optimizers(data):
    """The engine's objects are kept for a few pairs of loss and optimizer; more of them must not mix."""
    X, y = data
    net, hand = make(), make()
    pairs = [(cr.Huber(1.0 + k), cr.SGD(0.01 * k)) for k in range(12)]
    for loss, sgd in pairs * 2:
        net.train_step(X, y, loss=loss, optimizer=sgd)
        hand.train_step(X, y, loss=cr.Huber(loss.delta), optimizer=cr.SGD(sgd.lr))
    assert_same_weights(net, hand)
    assert len(net._steppers) <= 8


# ---- cut into calls ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "watcher",
    [
        pytest.param({"callbacks": [lambda epoch, logs: None]}, id="a function"),
        {"callbacks": [cr.EarlyStopping("loss", patience=100)]},
        {"verbose": 1},
        {"verbose": 2},
        {"schedule": cr.ReduceLROnPlateau("loss", patience=100)},
        {"schedule": cr.StepLR(100)},
        {"schedule": cr.WarmupLR(2, start_factor=1.0)},
    ],
    ids=str,
)
def test_watching_changes_no_bit(watcher, data):
    """Epochs in chunks with another order, another learning rate, or a state begun anew."""
    quiet, history = fitted(*data, epochs=30, verbose=0)
    seen, watched = fitted(*data, epochs=30, **{"verbose": 0, **watcher})
    assert_same_weights(quiet, seen)
    assert watched.history == history.history


def test_validation_changes_no_bit_and_is_evaluate(data, rng):
    X, y = data
    Xv, yv, wv = rng.standard_normal((9, 4)), rng.standard_normal((9, 3)), rng.random(9)
    quiet, _ = fitted(X, y)
    net, measured = make(), []

    def measure(epoch, logs):
        measured.append((logs["val_loss"], net.evaluate(Xv, yv, loss="mse", sample_weight=wv)))

    fitted(X, y, net=net, validation_data=(Xv, yv, wv), callbacks=[measure])
    assert_same_weights(quiet, net)
    assert len(measured) == 4 and all(a == b for a, b in measured)


@pytest.mark.parametrize("fraction, rows", [(0.1, 3), (0.25, 6), (0.5, 12), (0.9, 21), (1e-6, 1)])
def test_validation_split_is_the_end_of_the_data(fraction, rows, data, rng):
    """Rows shuffled before the cut, or a cut off by one: as in Keras, ⌈fraction · n⌉ rows at the end."""
    (X, y), w = data, rng.random(23)
    a, split = fitted(X, y, validation_split=fraction, sample_weight=w)
    b, given = fitted(
        X[:-rows], y[:-rows], sample_weight=w[:-rows], validation_data=(X[-rows:], y[-rows:], w[-rows:])
    )
    assert_same_weights(a, b)
    assert split.history == given.history


def test_seven_hundredths_of_a_hundred_rows_are_seven():
    """0.07 · 100 is 7.000000000000001 in floating point, 100 · (1 − 0.9) is 9.999999999999998."""
    X = np.arange(100.0)[:, None] / 100
    for fraction, rows in ((0.07, 7), (0.1, 10), (0.29, 29), (0.3, 30), (0.57, 57), (0.9, 90)):
        nets = [cr.mlp([1, 1]), cr.mlp([1, 1])]
        split = nets[0].fit(X, X, loss="mse", validation_split=fraction)
        given = nets[1].fit(X[:-rows], X[:-rows], loss="mse", validation_data=(X[-rows:], X[-rows:]))
        assert split.history == given.history


# ---- weights -------------------------------------------------------------------------------------


def test_weights_count_rows(data, rng):
    """Whole batch, "mean": a row with weight k is there k times, one with weight 0 is not there."""
    X, y = data
    times = rng.integers(0, 4, 23)
    a, _ = fitted(X, y, sample_weight=times, batch_size=23, optimizer=cr.SGD(0.1), epochs=10)
    repeated = np.repeat(np.arange(23), times)
    b, _ = fitted(X[repeated], y[repeated], batch_size=100, optimizer=cr.SGD(0.1), epochs=10)
    for x, z in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        np.testing.assert_allclose(x, z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, far", [("float32", 1e30), ("float64", 1e200)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["mse", "least_squares", "huber", "gaussian_nll", "own"])
def test_rows_of_weight_0_do_not_count_whatever_their_loss(loss, reduction, dtype, far, data, rng):
    """A target that stands for a missing one overflows: 0 · ∞ = 0, as in the reference."""

    def own(f, y):
        with np.errstate(over="ignore"):
            return ((f - y) ** 2).sum(axis=1), 2 * (f - y)

    X, rows = data[0], slice(0, 20)
    y = rng.standard_normal((len(X), 1 if loss == "gaussian_nll" else 2))
    y[20:] = far
    weight = np.where(np.arange(len(X)) < 20, 1.5, 0.0)
    kinds = {
        "mse": cr.MSE,
        "least_squares": cr.LeastSquares,
        "huber": cr.Huber,
        "gaussian_nll": cr.GaussianNLL,
    }
    rule = cr.CustomLoss(own, reduction=reduction) if loss == "own" else kinds[loss](reduction=reduction)
    net, twin = (make(sizes=[4, 6, 2], dtype=dtype) for _ in range(2))
    given, few = (X, y, weight), (X[rows], y[rows], weight[rows])
    values = [net.evaluate(*part[:2], loss=rule, sample_weight=part[2]) for part in (given, few)]
    assert values[0] == pytest.approx(values[1], rel=1e-6) and math.isfinite(values[0])
    (value, grads), (few_value, few_grads) = (
        net.value_and_grad(*part[:2], loss=rule, sample_weight=part[2]) for part in (given, few)
    )
    assert value == pytest.approx(few_value, rel=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, few_grads[name], rtol=1e-4, atol=1e-5)
    if loss != "own":
        Hv = [cr.hvp(net, *part[:2], rule, grads, sample_weight=part[2]) for part in (given, few)]
        for name, product in Hv[0].items():
            np.testing.assert_allclose(product, Hv[1][name], rtol=1e-3, atol=1e-4)
    how = {"loss": rule, "optimizer": cr.SGD(0.001), "batch_size": 23, "epochs": 3, "shuffle": False}
    for one, part in ((net, given), (twin, few)):
        one.fit(*part[:2], sample_weight=part[2], **how)
    for name, array in net.state_dict().items():
        np.testing.assert_allclose(array, twin.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_weight_changes_nothing(data):
    X, y = data
    weight = np.zeros(23)
    weight[:5] = 1
    a, history = fitted(X, y, sample_weight=weight, shuffle=False, optimizer=cr.SGD(0.1), epochs=1)
    b = make()
    b.train_step(X[:5], y[:5], loss="mse", optimizer=cr.SGD(0.1))
    assert_same_weights(a, b)
    assert math.isfinite(history["loss"][0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_loss_of_an_epoch_is_the_weighted_mean_over_its_rows(shuffle, dtype, data, rng):
    """Whatever the batches, one without any weight among them: at rate 0 it is what `evaluate` says."""
    X, y = data
    weight = rng.random(23) * rng.integers(0, 3, 23)
    weight[5:10] = 0
    net = make(dtype=dtype)
    expected = net.evaluate(X, y, loss="mse", sample_weight=weight)
    for batch_size in (1, 5, 22, 23):
        how = {"sample_weight": weight, "batch_size": batch_size, "shuffle": shuffle}
        _, history = fitted(X, y, net=net, optimizer=cr.SGD(0.0), epochs=2, **how)
        np.testing.assert_allclose(history["loss"], expected, rtol=30 * np.finfo(dtype).eps)


LABELS = np.arange(23) % 4 % 3  # 0 1 2 0 0 1 2 0 …


@pytest.mark.parametrize(
    "class_weight, of_label",
    [
        ({0: 0.5, 1: 2.0, 2: 3.0}, [0.5, 2.0, 3.0]),
        ({1: 4}, [1, 4, 1]),
        ({np.int64(2): 0}, [1, 1, 0]),
        ("balanced", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("weighted", [True, False])
def test_class_weights_are_sample_weights(class_weight, of_label, weighted, data, rng):
    X, _ = data
    own = rng.random(23) + 0.5 if weighted else np.ones(23)
    if of_label is None:
        of_label = 23 / (3 * np.bincount(LABELS))  # scikit-learn's rule
    expected, _ = fitted(X, LABELS, loss="cross_entropy", sample_weight=own * np.asarray(of_label)[LABELS])
    got, _ = fitted(
        X, LABELS, loss="cross_entropy", class_weight=class_weight, sample_weight=own if weighted else None
    )
    assert_same_weights(got, expected)


@pytest.mark.parametrize("shape", [(23,), (23, 1)])
def test_class_weights_for_yes_and_no(shape, data):
    X, yes = data[0], LABELS > 0
    arguments = {"loss": "logistic", "epochs": 2}
    expected, _ = fitted(X, yes, net=make(sizes=[4, 1]), sample_weight=np.where(yes, 3.0, 1.0), **arguments)
    got, _ = fitted(
        X, yes.reshape(shape), net=make(sizes=[4, 1]), class_weight={True: 3.0, False: 1.0}, **arguments
    )
    assert_same_weights(got, expected)


def own_quartic(f, y):
    d = f[:, 0] - y
    return d**4, (4 * d**3)[:, None]


@pytest.mark.parametrize(
    "outputs, loss, y",
    [
        (3, "cross_entropy", np.eye(3)[LABELS]),
        (3, "least_squares", np.eye(3)[LABELS]),
        (3, "logistic", np.eye(3)[LABELS]),
        (1, "mse", LABELS),
        (1, "mae", LABELS[:, None] - 1.0),  # −1, 0, 1
        (1, "huber", LABELS),
        (1, "pinball", LABELS),
        (1, "poisson", LABELS),
        (2, "gaussian_nll", LABELS),
        (1, own_quartic, LABELS),
    ],
)
def test_class_weights_for_every_loss_with_labels(outputs, loss, y, data):
    """A loss left out, a one-hot row whose label is lost, a label below zero."""
    low = int(np.min(y)) if y.shape == (23, 1) else 0
    arguments = {"loss": loss, "epochs": 2}
    weight = np.array([0.5, 1.0, 3.0])[LABELS]
    expected, _ = fitted(data[0], y, net=make(sizes=[4, outputs]), sample_weight=weight, **arguments)
    by_class = {low: 0.5, low + 2: 3.0}
    got, _ = fitted(data[0], y, net=make(sizes=[4, outputs]), class_weight=by_class, **arguments)
    assert_same_weights(got, expected)


def test_balanced_counts_the_rows_it_trains_on(data):
    X, _ = data
    a, _ = fitted(X, LABELS, loss="cross_entropy", class_weight="balanced", validation_split=0.3)
    b, _ = fitted(X[:-7], LABELS[:-7], loss="cross_entropy", class_weight="balanced")
    assert_same_weights(a, b)


# ---- callbacks, early stopping, history ----------------------------------------------------------


def test_callbacks_are_told_everything_in_order(data):
    recorder, plain = Recorder(), []
    _, history = fitted(
        *data, validation_split=0.2, callbacks=[recorder, lambda epoch, logs: plain.append((epoch, logs))]
    )
    assert recorder.calls == ["begin", *plain, "end"]
    assert [epoch for epoch, _ in plain] == [0, 1, 2, 3]
    for epoch, logs in plain:
        assert logs == {name: values[epoch] for name, values in history.history.items()}
    assert set(history.history) == {"loss", "val_loss", "lr"}


def test_logs_belong_to_each_callback(data):
    class Spoiler:
        def on_epoch_end(self, epoch, logs):
            logs.clear()

    seen = []
    spoilers = [Spoiler(), lambda epoch, logs: logs.clear()]
    fitted(*data, callbacks=[*spoilers, lambda epoch, logs: seen.append(len(logs))])
    assert seen == [2] * 4


def test_all_are_told_of_the_epoch_that_one_stops_at(data):
    recorder = Recorder()
    fitted(*data, callbacks=[lambda epoch, logs: True, recorder])
    assert [call if isinstance(call, str) else call[0] for call in recorder.calls] == ["begin", 0, "end"]


@pytest.mark.parametrize("wish", [True, np.True_])
def test_true_stops(wish, data):
    net, history = fitted(*data, epochs=9, callbacks=[lambda epoch, logs: wish if epoch == 2 else None])
    assert history.epochs == 3 and history.stopped_epoch == 2
    assert_same_weights(net, fitted(*data, epochs=3)[0])


@pytest.mark.parametrize("answer", [None, False, 1, "yes", [1]])
def test_only_true_stops(answer, data):
    """A callback that ends with file.write(…) gives a number back, and wants no stop by it."""
    history = fitted(*data, callbacks=[lambda epoch, logs: answer])[1]
    assert history.epochs == 4 and history.stopped_epoch is None


def test_early_stopping_puts_the_best_weights_back(data, rng):
    """The best epoch by the history, its weights bit for bit, and patience counted right."""
    X, y = data
    stop, weights = cr.EarlyStopping(patience=3), []
    net = make()
    history = net.fit(X, y, loss="mse", optimizer=cr.Adam(0.3), batch_size=5, epochs=200, callbacks=[
        lambda epoch, logs: weights.append(net.state_dict()), stop],
        validation_data=(rng.standard_normal((9, 4)), rng.standard_normal((9, 3))))  # fmt: skip
    best = int(np.argmin(history["val_loss"]))
    assert history.epochs == best + 1 + 3 and history.stopped_epoch == best + 3
    assert stop.best_epoch == best and stop.best == history["val_loss"][best]
    for name, value in net.state_dict().items():
        assert_same_bits(value, weights[best][name])


def test_early_stopping_watches_one_fit_at_a_time(data):
    """Else the weights of one network would end in another; and a fit that fails lets it go."""
    stop, inner = cr.EarlyStopping("loss"), make()
    before = inner.state_dict()

    def nested(epoch, logs):
        inner.fit(*data, loss="mse", epochs=3, callbacks=[stop])

    with pytest.raises(RuntimeError, match=r"\[EarlyStopping\] one fit at a time: expected an idle one"):
        fitted(*data, callbacks=[stop, nested])
    for name, value in inner.state_dict().items():
        assert_same_bits(value, before[name])

    def refused(epoch, logs):
        with pytest.raises(RuntimeError, match="one fit at a time"):
            inner.fit(*data, loss="mse", callbacks=[stop])

    assert fitted(*data, callbacks=[stop, refused])[1].epochs == 4  # it goes on for the fit outside

    class Alike(cr.Sequential):
        def __eq__(self, other):
            return True

        __hash__ = cr.Sequential.__hash__

    inner, outer = (Alike(cr.Linear(4, 3), dtype="float64") for _ in range(2))
    outer.fit(*data, loss="mse", callbacks=[stop, refused])
    net = make()
    kept = weakref.ref(net)
    with pytest.raises(ZeroDivisionError):
        net.fit(*data, loss="mse", callbacks=[stop, lambda epoch, logs: 1 / 0])
    del net
    gc.collect()
    assert kept() is None and vars(stop)["weights"] is None
    assert fitted(*data, callbacks=[stop])[1].epochs == 4


def test_a_schedule_by_steps_is_asked_for_few_epochs_at_a_time():
    """All of them at once took gigabytes."""

    class Recorded(optim.Schedule):
        def rates(self, lr, first, epochs, steps):
            asked.append(epochs * steps)
            raise ZeroDivisionError  # it needs no training

    asked = []
    with pytest.raises(ZeroDivisionError):
        make(sizes=[1, 1]).fit(
            np.zeros((70_000, 1)),
            np.zeros(70_000),
            loss="mse",
            batch_size=1,
            epochs=2000,
            schedule=Recorded(),
        )
    assert 1 << 21 < asked[0] <= 1 << 22


def test_a_history_is_asked_for_its_names(data):
    history = fitted(*data)[1]
    assert list(history) == ["loss", "lr"] and "loss" in history and "val_loss" not in history


def test_a_loss_that_is_a_sum_is_added_up(data):
    """Over the epoch's batches, each with its penalty: what the steps went down on."""
    X, y = data
    for batch_size in (1, 5, len(X)):
        net = make(dtype="float64")
        history = net.fit(
            X, y, loss=cr.MSE(reduction="sum"), optimizer=cr.SGD(0.0), batch_size=batch_size, l2=0.1
        )
        loss = ((net.predict(X) - y) ** 2).mean(axis=1).sum()
        penalty = sum(0.1 * (w**2).sum() / 2 for name, w in net.state_dict().items() if "weight" in name)
        expected = loss + -(-len(X) // batch_size) * penalty
        assert history["loss"][0] == pytest.approx(expected, rel=1e-12)


def test_early_stopping_can_leave_the_last_weights(data):
    arguments = {"optimizer": cr.Adam(1.0), "epochs": 50}
    net, history = fitted(*data, **arguments, callbacks=[cr.EarlyStopping("loss", 0, restore_best=False)])
    arguments = {"optimizer": cr.Adam(1.0), "epochs": history.epochs}
    assert_same_weights(net, fitted(*data, **arguments)[0])


@pytest.mark.parametrize("values, patience, min_delta, mode, expected", [
    ([5, 4, 4, 4], 2, 0, "min", 3),      # equal is no improvement
    ([5, 4, 3.9, 3.8], 2, 0.5, "min", 3),  # nor is little
    ([5, 4, math.nan, 3, 3], 1, 0, "min", 2),  # nor is NaN
    ([1, 2, 2, 2], 2, 0, "max", 3),
    ([3, 2, 1], 0, 0, "min", None),
    ([3, 3], 0, 0, "min", 1),
])  # fmt: skip
def test_early_stopping_rule(values, patience, min_delta, mode, expected):
    stop = cr.EarlyStopping("loss", patience, min_delta, mode, restore_best=False)
    for _ in range(2):  # an object may serve one fit after the other
        stop.on_train_begin(make())
        stops = [stop.on_epoch_end(epoch, {"loss": value}) for epoch, value in enumerate(values)]
        assert (stops.index(True) if True in stops else None) == expected
        stop.on_train_end(make())


def test_history(data):
    _, history = fitted(*data)
    assert history.epochs == len(history["loss"]) == 4
    assert all(type(value) is float for values in history.history.values() for value in values)
    assert re.fullmatch(r"<History of 4 epochs, loss=[\d.]+, lr=0.001>", repr(history))
    with pytest.raises(KeyError, match=r"expected one of 'loss', 'lr', got 'val_loss'"):
        history["val_loss"]


def test_a_history_is_a_mapping(data):
    _, history = fitted(*data)
    assert list(history) == list(history.keys()) == ["loss", "lr"] and len(history) == 2
    assert dict(history) == dict(history.items()) == history.history
    assert "loss" in history and "val_loss" not in history
    assert history.get("lr") is history["lr"] and history.get("val_loss") is None
    twin = copy.deepcopy(history)
    assert twin.history == history.history and twin != history and len({twin, history}) == 2
    frame = pytest.importorskip("pandas").DataFrame(dict(history))
    assert frame.shape == (4, 2)


# ---- progress ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2


class Notebook(io.StringIO):
    """Like ipykernel's: no terminal, but "\\r" takes a line back."""

    __module__ = "ipykernel.iostream"


class Clock:
    """time.perf_counter, which a callback moves on."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 100.0, seconds
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def __call__(self, epoch, logs):
        self.now += self.seconds


def shown(monkeypatch, stream, **arguments):
    monkeypatch.setattr("sys.stderr", stream)
    fitted(np.eye(4), np.eye(4)[:, :3], **{"epochs": 40, **arguments})
    return stream.getvalue()


def test_silence(monkeypatch, capsys):
    assert shown(monkeypatch, Terminal(), verbose=0) == ""
    assert shown(monkeypatch, io.StringIO()) == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tqdm", [True, False])
@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_short_fits_are_silent_and_long_ones_begin_after_a_second(stream, tqdm, monkeypatch):
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    assert shown(monkeypatch, stream(), callbacks=[Clock(monkeypatch, 0.02)]) == ""
    text = shown(monkeypatch, stream(), callbacks=[Clock(monkeypatch, 0.125)])
    assert "40/40" in text and "\r" in text and text.count("\n") == 1
    assert " 9/40" in text.replace("|", " ") and " 8/40" not in text.replace("|", " ")


def test_the_bar_that_comes_late_counts_from_the_beginning(monkeypatch):
    pytest.importorskip("tqdm")
    text = shown(monkeypatch, Terminal(), callbacks=[Clock(monkeypatch, 100)])
    assert re.search(r" 2/40 \[01:40<.*50\.\d\ds/epoch", text)


def test_no_line_is_left_of_a_fit_that_ends_before_its_first_epoch(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    with pytest.raises(FloatingPointError):
        shown(monkeypatch, stream, optimizer=cr.SGD(1e30), callbacks=[Clock(monkeypatch, 0.0)])
    assert stream.getvalue() == ""


@pytest.mark.parametrize("watched", [{}, {"callbacks": [lambda epoch, logs: None]}])
def test_a_line_for_every_tenth_of_the_run(watched, monkeypatch):
    lines = shown(monkeypatch, io.StringIO(), verbose=1, **watched).splitlines()
    assert 1 <= len(lines) <= 10
    assert re.fullmatch(r"epoch 40/40  loss [\d.]+  lr 0\.001", lines[-1])


def test_a_line_for_every_epoch(monkeypatch):
    lines = shown(monkeypatch, io.StringIO(), verbose=2, epochs=7).splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/7" for n in range(1, 8)]


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_a_bar_where_a_person_looks_on(stream, monkeypatch):
    text = shown(monkeypatch, stream(), verbose=1)
    assert "| 0/40" in text and "40/40" in text and text.count("\n") == 1


@pytest.mark.parametrize("stream", [Terminal, Notebook])
def test_a_line_where_a_person_looks_on_without_tqdm(stream, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    text = shown(monkeypatch, stream(), verbose=1)
    assert text.startswith("\repoch") and "epoch 40/40" in text and text.count("\n") == 1


@pytest.mark.parametrize("columns", [1, 2, 13, 40, 200])
def test_the_line_stays_within_the_terminal(columns, monkeypatch):
    """A line that wraps, which \\r does not take back: one line left behind at every update."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((columns, 24)))
    lines = shown(monkeypatch, Terminal(), verbose=1, epochs=100).rstrip("\n").split("\r")
    assert max(map(len, lines)) <= columns - 1
    assert "epoch 100/100  loss"[: columns - 1] in lines[-1]


def closed():
    stream = Terminal()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, closed()])
@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_no_stderr_at_all(verbose, stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    fitted(np.eye(4), np.eye(4)[:, :3], verbose=verbose)


@pytest.mark.parametrize("tqdm", [True, False])
@pytest.mark.parametrize("verbose", [1, 2])
def test_a_stderr_that_is_closed_meanwhile(verbose, tqdm, monkeypatch):
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    closes = [lambda epoch, logs: stream.close() if epoch == 1 else None]
    _, history = fitted(np.eye(4), np.eye(4)[:, :3], verbose=verbose, callbacks=closes)
    assert history.epochs == 4


def test_warnings_need_no_stderr_and_stay_errors_where_they_are(monkeypatch):
    monkeypatch.setattr("sys.stderr", closed())
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", lambda *message: sys.stderr.write("as Python does"))
        warn("nobody reads this", RuntimeWarning, 1)
    with pytest.warns(RuntimeWarning, match="seen") as caught:
        warn("seen", RuntimeWarning, 1)
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeWarning):
        warn("an error here", RuntimeWarning, 1)


def test_a_plateau_begins_with_the_rate_that_a_callback_has_set(data):
    class Sets:
        def on_train_begin(self, net):
            sgd.lr = 0.5

    X, y = data
    for schedule in (None, cr.StepLR(9), cr.ReduceLROnPlateau("loss", patience=99)):
        sgd = cr.SGD(0.01)
        history = make().fit(X, y, loss="mse", optimizer=sgd, epochs=2, callbacks=[Sets()], schedule=schedule)
        assert history["lr"] == [0.5, 0.5]


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("watched", [{}, {"callbacks": [cr.EarlyStopping("loss")]}], ids=str)
def test_divergence_puts_the_weights_back(watched, data):
    X, y = data
    net, sgd = make(dtype="float32"), cr.SGD(1e30, momentum=0.9)
    before = copy.deepcopy(net)
    with pytest.raises(FloatingPointError) as caught:
        net.fit(X, y, loss="mse", optimizer=sgd, batch_size=5, epochs=7, **watched)
    assert re.fullmatch(
        r"\[fit\] loss must stay finite: expected numbers, got (nan|inf) in epoch 1 of 7 "
        r"at learning rate 1e\+30; the weights are those from before this fit\. "
        r"Lower lr, scale X and y to about unit size, or set clip_norm=1\.0",
        str(caught.value),
    )
    assert_same_weights(net, before)
    sgd.lr = 1e-3  # its momentum must not remember the infinities
    for n, o in ((net, sgd), (before, cr.SGD(1e-3, momentum=0.9))):
        n.fit(X, y, loss="mse", optimizer=o)
    assert_same_weights(net, before)


def test_divergence_puts_the_optimizer_back(data):
    X, y = data
    net, adam = make(dtype="float32"), cr.Adam()
    net.fit(X, y, loss="mse", optimizer=adam)
    kept, state = net.state_dict(), adam.state_dict(net)
    with pytest.raises(FloatingPointError):
        net.fit(X, y * 1e30, loss="mse", optimizer=adam, epochs=2)
    assert adam.state_dict(net)["step"] == state["step"]
    for a, b in zip(adam.state_dict(net)["slots"], state["slots"], strict=True):
        assert_same_bits(a, b)
    for name, value in net.state_dict().items():
        assert_same_bits(value, kept[name])


def test_an_overflow_in_the_last_update_is_noticed():
    """The loss of the only batch is finite; the weights after it are not."""
    net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
    with pytest.raises(
        FloatingPointError,
        match="parameters must stay finite: expected numbers, got NaN or infinity in epoch 1",
    ):
        net.fit([[1e15]], [1e3], loss="mse", optimizer=cr.SGD(1e30))
    assert not net.state_dict()["0.weight"].any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 16, 19])
@pytest.mark.parametrize("more", [{}, {"l1": 0.01, "l2": 0.01}, {"clip_norm": 1.0}], ids=str)
def test_a_network_that_diverged_trains_again_from_good_weights(width, dtype, more):
    """NaN that stayed in the padding of the weights, where no loaded array reaches."""
    X, y = np.arange(24.0).reshape(6, 4) / 24, np.arange(6 * width).reshape(6, width) / (6 * width)
    net, fresh = (cr.mlp([4, width, width], seed=0, dtype=dtype) for _ in range(2))
    sgd = cr.SGD(lr=1e30 if dtype == "float32" else 1e200)
    for _ in range(6):
        value = net.train_step(X, y, loss="mse", optimizer=sgd)
    assert not np.isfinite(value)
    assert not np.isfinite(net.state_dict()["0.weight"]).all()
    net.load_state_dict(fresh.state_dict())
    for one in (net, fresh):
        one.fit(X, y, loss="mse", epochs=2, **more)
    assert_same_weights(net, fresh)


@pytest.mark.parametrize(
    "error", [KeyError("mine"), KeyboardInterrupt(), SystemExit(3), FloatingPointError("mine")]
)
@pytest.mark.parametrize("hook", ["on_train_begin", "on_epoch_end", "on_train_end"])
def test_errors_of_callbacks_come_through(error, hook, data):
    """Swallowed, replaced, or leaving a network locked or half-trained: the weights are as trained so far."""

    class Failing:
        pass

    def fail(*arguments):
        if hook != "on_epoch_end" or arguments[0] == 1:
            raise error

    setattr(Failing, hook, staticmethod(fail))
    net, adam = make(), cr.Adam()
    with pytest.raises(type(error)) as caught:
        fitted(*data, net=net, optimizer=adam, callbacks=[Failing()])
    assert caught.value is error
    other = cr.Adam()
    expected = make()
    epochs = {"on_train_begin": 0, "on_epoch_end": 2, "on_train_end": 4}[hook]
    if epochs:
        fitted(*data, net=expected, optimizer=other, epochs=epochs)
    assert_same_weights(net, expected)
    for n, o in ((net, adam), (expected, other)):
        fitted(*data, net=n, optimizer=o)
    assert_same_weights(net, expected)


def test_ctrl_c_stops_a_long_fit(data):
    """A fit that is one engine call, and hears of the signal only after 10⁹ epochs."""
    import signal

    net = make()
    before = net.state_dict()
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fitted(*data, net=net, epochs=10**9)
    timer.join()
    assert any((value != before[name]).any() for name, value in net.state_dict().items())
    assert all(np.isfinite(value).all() for value in net.state_dict().values())
    fitted(*data, net=net)


def test_two_threads_cannot_train_one_network(data):
    net, errors = make(), []
    started, go_on = threading.Event(), threading.Event()

    def slow(f, y):
        started.set()
        go_on.wait(10)
        return ((f - y) ** 2).sum(), 2 * (f - y)

    thread = threading.Thread(target=lambda: fitted(*data, net=net, loss=slow, epochs=1, batch_size=23))
    thread.start()
    started.wait(10)
    try:
        fitted(*data, net=net)
    except RuntimeError as error:
        errors.append(str(error))
    go_on.set()
    thread.join()
    assert len(errors) == 1 and "trains in one place at a time" in errors[0]
    fitted(*data, net=net)


def test_a_schedule_of_ones_own(data):
    class Halves(optim.Schedule):
        def rates(self, lr, epoch, epochs, steps):
            return [[lr / 2**epoch] * steps]  # one epoch at a time, a rate for each step

    mine, history = fitted(*data, schedule=Halves(), optimizer=cr.SGD(0.1))
    stock, expected = fitted(*data, schedule=cr.ExponentialLR(0.5), optimizer=cr.SGD(0.1))
    assert_same_weights(mine, stock)
    assert history.history == expected.history
