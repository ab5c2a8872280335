# SPDX-License-Identifier: MIT
"""Arrays that fit are used as they are: the same bits and the same errors as the long way round."""

import copy
import itertools
import math
import pickle
import threading
import time
from unittest import mock

import numpy as np
import pytest

import chainrule as cr
from chainrule import calculus, training
from conftest import assert_same_bits

ROWS, INPUTS, OUTPUTS = 11, 3, 4
FLOATS = ("float32", "float64")
NAN, INF = math.nan, math.inf

LOSSES = {
    "least_squares": cr.LeastSquares(),
    "mse": cr.MSE(),
    "mae": cr.MAE(),
    "huber": cr.Huber(0.3),
    "pinball": cr.Pinball(0.2),
    "poisson": cr.Poisson(),
    "gaussian_nll": cr.GaussianNLL(),
    "logistic": cr.Logistic(reduction="sum"),
    "labels": cr.CrossEntropy(),
    "probabilities": cr.CrossEntropy(),
}


def test_all_losses_are_here():
    assert {loss.name for loss in LOSSES.values()} == {loss.name for loss in cr.losses.LOSSES.values()}


def batch(kind, dtype, rng, outputs=OUTPUTS):
    """X and y that fit: numbers that float32 holds, targets from 0 to 1 that every loss takes, or labels."""
    X = rng.standard_normal((ROWS, INPUTS)).astype("float32").astype(dtype)
    if kind == "labels":
        return X, rng.integers(0, outputs, ROWS)
    columns = outputs // 2 if kind == "gaussian_nll" else outputs
    return X, rng.random((ROWS, columns), dtype="float32").astype(dtype)


class Trained:
    """A network that has done a step, so that it has a trainer; `checked`: always the long way round."""

    def __init__(self, kind, dtype, X, y, *, checked=False, outputs=OUTPUTS):
        self.net = cr.mlp([INPUTS, 5, outputs], activation="tanh", seed=3, dtype=dtype)
        self.loss, self.adam, self.checked = LOSSES[kind], cr.Adam(0.05), checked
        self.step(X, y)

    def step(self, X, y):
        """The loss or the error; and whether the arrays were taken as they are."""
        for stepper in self.net._steppers.values() if self.checked else ():
            stepper.as_is = training._never
        with mock.patch.object(training, "take", wraps=training.take) as take:
            try:
                answer = self.net.train_step(X, y, loss=self.loss, optimizer=self.adam)
            except (TypeError, ValueError) as error:
                answer = type(error), str(error)
        return answer, not take.called

    def bits(self):
        state = self.adam.state_dict(self.net)
        return [*self.net.state_dict().values(), *state["slots"], np.array(state["step"])]


def assert_same_state(a, b):
    for mine, other in zip(a.bits(), b.bits(), strict=True):
        assert_same_bits(mine, other)


def unaligned(a):
    shifted = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    shifted[...] = a
    return shifted


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


class Subclass(np.ndarray):
    pass


FORMS = {
    "same": lambda a: a,
    "read-only": read_only,
    "part of another": lambda a: np.concatenate([a, a])[: len(a)],
    "dtype of its own": lambda a: pickle.loads(pickle.dumps(a)),  # not NumPy's only object for this type
    "Fortran order": np.asfortranarray,
    "gaps": lambda a: np.repeat(a, 2, axis=0)[::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "unaligned": unaligned,
    "subclass": lambda a: a.view(Subclass),
    "masked": np.ma.masked_array,
    "list": lambda a: a.tolist(),
    "other width": lambda a: a.astype({"f4": "f8", "f8": "f4", "i8": "i4"}[a.dtype.str[1:]]),
    "the widest": lambda a: a.astype(np.longlong if a.dtype.kind == "i" else np.longdouble),
}


def fits(a, dtype):
    """Whether an array can be used as it is."""
    return (
        type(a) is np.ndarray
        and (a.dtype.char, a.dtype.isnative) == (np.dtype(dtype).char, True)
        and (a.flags.c_contiguous and a.flags.aligned)
    )


# ---- steps: the same bits ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_on_arrays_as_they_are_is_the_checked_step(kind, dtype, rng):
    """A value, weight or moment that depends on the way the arrays came in; or fits, and goes round."""
    X, y = batch(kind, dtype, rng)
    quick, slow = Trained(kind, dtype, X, y), Trained(kind, dtype, X, y, checked=True)
    for rows, lr in ((ROWS, 0.05), (1, 0.2), (7, 0.0), (ROWS, 0.01)):
        quick.adam.lr = slow.adam.lr = lr
        (value, as_is), (expected, other) = (t.step(X[:rows], y[:rows]) for t in (quick, slow))
        assert as_is and not other
        assert type(value) is float and value == expected
        assert_same_state(quick, slow)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_numbers_gives_the_same_step(form, kind, dtype, rng):
    """Memory read in the wrong order, byte order, width or stride."""
    change = FORMS[form]
    X, y = batch(kind, dtype, rng)
    plain = Trained(kind, dtype, X, y)
    expected, _ = plain.step(X, y)
    for odd_x, odd_y in ((change(X), y), (X, change(y)), (change(X), change(y))):
        odd = Trained(kind, dtype, X, y)
        as_is = fits(odd_x, dtype) and fits(odd_y, "int64" if kind == "labels" else dtype)
        assert odd.step(odd_x, odd_y) == (expected, as_is)
        assert_same_state(odd, plain)


def test_some_forms_fit_and_most_do_not():
    a = np.zeros((ROWS, INPUTS))
    assert [form for form in FORMS if fits(FORMS[form](a), "float64")] == list(FORMS)[:4]


@pytest.mark.parametrize("kind", ["mse", "logistic", "poisson"])
def test_one_column_of_targets_may_be_flat(kind, rng):
    X, y = batch(kind, "float32", rng, outputs=1)
    quick, slow = (Trained(kind, "float32", X, y, checked=c, outputs=1) for c in (False, True))
    for targets, as_is in ((y, True), (y[:, 0].copy(), True), (y[:, 0].astype(int), False), (y, True)):
        value, taken = quick.step(X, targets)
        assert value == slow.step(X, targets)[0] and taken == as_is
    assert_same_state(quick, slow)


def test_labels_and_probabilities_in_turn(rng):
    """Two trainers of one loss: a batch given to the other one's."""
    X, labels = batch("labels", "float32", rng)
    quick, slow = (Trained("labels", "float32", X, labels, checked=c) for c in (False, True))
    one_hot = np.eye(OUTPUTS, dtype="float32")[labels]
    for y in (labels, one_hot, one_hot, labels, labels):
        assert quick.step(X, y)[0] == slow.step(X, y)[0]
    assert quick.step(X, labels)[1]
    slow.step(X, labels)
    assert_same_state(quick, slow)


def test_weighted_steps_are_weighted(rng):
    """Weights dropped on the short way, or kept for the step after."""
    X, y = batch("mse", "float32", rng)
    steps = [Trained("mse", "float32", X, y, checked=c) for c in (False, True)]
    for trained in steps:
        weight = np.arange(ROWS)
        trained.net.train_step(X, y, loss=trained.loss, optimizer=trained.adam, sample_weight=weight)
        trained.step(X, y)
    assert_same_state(*steps)
    plain = Trained("mse", "float32", X, y)
    plain.step(X, y)
    plain.step(X, y)
    assert (plain.bits()[0] != steps[0].bits()[0]).any()


class Gain(cr.Layer):
    """y = g x, with one number g to learn."""

    def __init__(self):
        self.params = {"g": np.array(2.0)}

    def forward(self, x):
        return self.params["g"] * x

    def vjp(self, x, y, dy):
        return self.params["g"] * dy, {"g": (dy * x).sum()}


def own_loss(f, y):
    return ((f - y) ** 2).mean(), 2 * (f - y) / f.size


@pytest.mark.parametrize("loss", [cr.MSE(), own_loss], ids=["mse", "own"])
@pytest.mark.parametrize("own", [False, True])
def test_parts_of_ones_own_train_as_ever(own, loss, rng):
    """The short way is the engine's alone: a layer of the user's that is not shown what it has learned."""
    X, y = batch("mse", "float32", rng)
    gains = [Gain(), Gain()]
    nets = [cr.Sequential(cr.Linear(INPUTS, OUTPUTS), *[gain][:own], seed=1) for gain in gains]
    sgd = cr.SGD(0.1)
    for _ in range(3):
        value = nets[0].train_step(X, y, loss=loss, optimizer=sgd)
        assert value == nets[1].train_step(X.tolist(), y.tolist(), loss=loss, optimizer=sgd)
        for gain, net in zip(gains[: 2 * own], nets, strict=False):
            assert_same_bits(gain.params["g"], net.state_dict()["1.g"])
        assert_same_bits(nets[0](X), nets[1](X.tolist()))  # which shows them, too
    assert not own or gains[0].params["g"] != 2


def test_a_loss_of_ones_own_sees_the_shapes_given(rng):
    """Targets that fit the engine, in another shape than the user's."""
    X, y = batch("mse", "float32", rng, outputs=1)
    net, sgd, seen = cr.mlp([INPUTS, 1]), cr.SGD(0.1), []

    def watching(f, y):
        seen.append(y.shape)
        return own_loss(f, y.reshape(-1, 1))

    forms = [y, y[:, 0].copy(), y[:, 0].copy(), y, y]
    for targets in forms:
        net.train_step(X, targets, loss=watching, optimizer=sgd)
    assert seen == [targets.shape for targets in forms]


# ---- steps: the same errors ----------------------------------------------------------------------


def at(array, place, value):
    changed = array.copy()
    changed[place] = value
    return changed


def wide(array, columns):
    return np.zeros((len(array), columns), array.dtype)


SPOILED = {
    "X: NaN": lambda X, y: (at(X, (10, 2), NAN), y),
    "X: NaN first": lambda X, y: (at(X, (0, 0), NAN), y),
    "X: inf": lambda X, y: (at(X, (4, 1), INF), y),
    "X: -inf": lambda X, y: (at(X, (5, 0), -INF), y),
    "X: no rows": lambda X, y: (X[:0], y[:0]),
    "X: too wide": lambda X, y: (wide(X, INPUTS + 1), y),
    "X: too narrow": lambda X, y: (wide(X, INPUTS - 1), y),
    "X: no columns": lambda X, y: (wide(X, 0), y),
    "X: flat": lambda X, y: (X[0].copy(), y[:1]),
    "X: deep": lambda X, y: (X[:, :, None].copy(), y),
    "X: a number": lambda X, y: (X[0, 0], y),
    "X: 0-D": lambda X, y: (np.array(X[0, 0]), y),
    "X: None": lambda X, y: (None, y),
    "X: text": lambda X, y: (X.astype(str), y),
    "X: too large": lambda X, y: (X.astype("float64") * 1e300, y),
    "y: too few": lambda X, y: (X, y[:-1]),
    "y: too many": lambda X, y: (X[:-1], y),
    "y: none": lambda X, y: (X, y[:0]),
    "y: 0-D": lambda X, y: (X, np.array(1.0, X.dtype)),
    "y: None": lambda X, y: (X, None),
    "y: complex": lambda X, y: (X, y.astype(complex)),
    "y: flat reals": lambda X, y: (X, np.zeros(ROWS, X.dtype)),
    "y: one column": lambda X, y: (X, np.zeros((ROWS, 1), X.dtype)),
    "y: a column too many": lambda X, y: (X, wide(X, OUTPUTS + 1)),
    "y: no column": lambda X, y: (X, wide(X, 0)),
    "y: deep": lambda X, y: (X, np.zeros((ROWS, OUTPUTS, 1), X.dtype)),
    "y: labels": lambda X, y: (X, np.arange(ROWS) % OUTPUTS),
    "y: labels in a column": lambda X, y: (X, np.arange(ROWS)[:, None] % OUTPUTS),
    "y: last label": lambda X, y: (X, np.full(ROWS, OUTPUTS - 1)),
    "y: label too large": lambda X, y: (X, at(np.zeros(ROWS, int), 10, OUTPUTS)),
    "y: label -1": lambda X, y: (X, at(np.zeros(ROWS, int), 3, -1)),
    "y: label of 63 bits": lambda X, y: (X, at(np.zeros(ROWS, int), 3, 2**63 - 1)),
    "y: label of -63 bits": lambda X, y: (X, at(np.zeros(ROWS, int), 3, -(2**63))),
    "y: label of 64 bits": lambda X, y: (X, at(np.zeros(ROWS, "u8"), 3, np.uint64(2**64 - 1))),
    "both: NaN": lambda X, y: (at(X, (1, 1), NAN), np.full((ROWS, OUTPUTS), NAN, X.dtype)),
}


def test_a_column_of_probabilities_is_no_list_of_labels(rng):
    """Reals in one dimension are refused as labels, where there is a trainer for one probability a row."""
    X, y = batch("probabilities", "float32", rng, outputs=1)
    quick, slow = (Trained("probabilities", "float32", X, y, checked=c, outputs=1) for c in (False, True))
    for targets in (y, y[:, 0].copy(), np.zeros(ROWS, int), y[:, 0].copy(), y):
        assert quick.step(X, targets)[0] == slow.step(X, targets)[0]
    assert quick.step(X, y[:, 0].copy())[0][0] is TypeError


VALUES = (NAN, INF, -INF, -1.0, -0.0, 0.0, 1.0, -1e-30, 1 + 2**-20, 2.0, 1e30)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("spoil", SPOILED)
def test_the_same_is_refused_in_the_same_words(spoil, kind, dtype, rng):
    """A check left out of the short way, a change before the check, a network that is stuck after it."""
    X, y = batch(kind, dtype, rng)
    quick, slow = Trained(kind, dtype, X, y), Trained(kind, dtype, X, y, checked=True)
    bad = SPOILED[spoil](X, y)
    answer, expected = quick.step(*bad)[0], slow.step(*bad)[0]
    assert answer == expected
    assert_same_state(quick, slow)
    assert quick.step(X, y)[0] == slow.step(X, y)[0]
    assert_same_state(quick, slow)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "labels"])
def test_the_domain_of_targets_has_the_same_ends(kind, dtype, rng):
    """The ends themselves, what lies just outside, what is no number; in the first row and others."""
    X, y = batch(kind, dtype, rng)
    for value, row in itertools.product(VALUES, (0, 5, ROWS - 1)):
        quick, slow = Trained(kind, dtype, X, y), Trained(kind, dtype, X, y, checked=True)
        bad = at(y, (row, -1), value)
        (answer, as_is), (expected, _) = quick.step(X, bad), slow.step(X, bad)
        assert repr(answer) == repr(expected)  # infinite for 1e30, perhaps
        assert as_is == isinstance(expected, float)
        assert_same_state(quick, slow)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_number_hides_in_a_batch(dtype):
    """Every place in a vector and in what is left over; the greatest and least numbers are numbers."""
    net, loss, sgd = cr.mlp([9, 1], dtype=dtype), cr.MSE(), cr.SGD(0.0)
    limits = np.finfo(dtype)
    X, y = np.resize([limits.max, -limits.max, limits.tiny, -0.0], (5, 9)).astype(dtype), np.zeros(5, dtype)
    net.train_step(X, y, loss=loss, optimizer=sgd)
    step = next(iter(net._steppers.values())).as_is
    assert step(X, y, 0.0) is not None
    for value, place in itertools.product((NAN, -NAN, INF, -INF), np.ndindex(X.shape)):
        assert step(at(X, place, value), y, 0.0) is None


# ---- steps: one place at a time ------------------------------------------------------------------


def test_a_busy_network_refuses_in_the_same_words(rng):
    """Trained in two places at once, or the complaint about the network before the one about the data."""
    X, y = batch("mse", "float32", rng)
    trained = Trained("mse", "float32", X, y)
    answers = []

    def slow_loss(f, targets):
        for data in (X, at(X, (0, 0), NAN)):
            try:
                answers.append(trained.step(data, y))
            except RuntimeError as error:
                answers.append(str(error))
        return own_loss(f, targets)

    before = trained.bits()[0]
    trained.net.fit(X, y, loss=slow_loss, optimizer=cr.SGD(0.0), batch_size=ROWS)
    assert "trains in one place at a time" in answers[0]
    assert answers[1][0][0] is ValueError and "must be finite" in answers[1][0][1]
    assert_same_bits(trained.bits()[0], before)
    assert trained.step(X, y)[1]


# ---- predictions ---------------------------------------------------------------------------------


def deep(dtype="float32", **more):
    return cr.mlp([INPUTS, 40, 30, OUTPUTS], activation="tanh", seed=5, dtype=dtype, **more)


def checked(net, X):
    """The prediction the long way round."""
    with mock.patch.object(net, "_predict_as_is", lambda X: None):
        return net(X)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rows_gives_the_same_prediction(form, dtype, rng):
    net, X = deep(dtype), rng.standard_normal((ROWS, INPUTS)).astype("float32").astype(dtype)
    odd = FORMS[form](X)
    assert (net._predict_as_is(odd) is not None) == fits(odd, dtype)
    assert_same_bits(net(odd), checked(net, X))
    row = odd[4]
    assert net(row).shape == (OUTPUTS,)
    assert_same_bits(net(row), checked(net, X)[4])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("outputs", ["identity", "softmax"])
def test_no_prediction_sees_the_one_before(outputs, dtype, rng):
    """Memory that is used again with what another call left in it: more rows, fewer, or NaN."""
    net, X = deep(dtype, output_activation=outputs), rng.standard_normal((300, INPUTS)).astype(dtype)
    expected = [checked(deep(dtype, output_activation=outputs), X[i : i + 1]) for i in range(300)]
    spoiled = np.full((70, INPUTS), NAN, dtype)
    for rows in (1, 64, 1, 65, 3, 300, 2, 1, 200, 64):
        assert np.isnan(net(spoiled[:rows])).all()
        for first in (0, 300 - rows):
            assert_same_bits(net(X[first : first + rows]), np.concatenate(expected[first : first + rows]))
        assert_same_bits(net(X[7]), expected[7][0])


def test_a_prediction_belongs_to_the_caller(rng):
    """A result that the next call writes over, or that nobody may write to."""
    net, X = deep(), rng.standard_normal((2, INPUTS), dtype="float32")
    for a, b in ((X[:1], X[1:]), (X[0], X[1])):
        first, copied = net(a), net(a).copy()
        assert first.flags.owndata and first.flags.writeable and first.flags.c_contiguous
        first_again = net(b)
        assert_same_bits(first, copied)
        first_again[...] = 0
        assert_same_bits(net(a), copied)


NOT_ROWS = {name: spoil for name, spoil in SPOILED.items() if name.startswith("X")}


@pytest.mark.parametrize("spoil", NOT_ROWS)
def test_predictions_are_refused_in_the_same_words(spoil):
    net = deep()
    X = NOT_ROWS[spoil](np.zeros((ROWS, INPUTS), "float32"), np.zeros((ROWS, OUTPUTS), "float32"))[0]
    answers = []
    for predict in (net, lambda X: checked(net, X)):
        try:
            answers.append(predict(X))
        except (TypeError, ValueError) as error:
            answers.append((type(error), str(error)))
    if isinstance(answers[0], np.ndarray):
        assert_same_bits(*answers)
    else:
        assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_that_predict_do_not_meet(dtype, rng):
    """Two callers in the memory that a network keeps for one; the calls do run at the same time."""
    net = cr.mlp([INPUTS, 300, 300, OUTPUTS], seed=1, dtype=dtype)
    data = [rng.standard_normal((rows, INPUTS)).astype(dtype) for rows in (2, 3, 64, 65, 5, 4)]
    expected, wrong = [checked(net, X) for X in data], []

    def work(X, f):
        wrong.extend(1 for _ in range(150) if (net(X) != f).any())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(data, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_predictions_while_another_thread_trains(rng):
    """Old weights, new ones or some of each, but finite numbers and no crash."""
    net, X = deep(), rng.standard_normal((64, INPUTS), dtype="float32")
    y = np.zeros((64, OUTPUTS), "float32")
    thread = threading.Thread(target=lambda: net.fit(X, y, loss="mse", epochs=3000, batch_size=64))
    thread.start()
    while thread.is_alive():
        assert np.isfinite(net(X[:1])).all() and np.isfinite(net(X)).all()
    thread.join()
    assert_same_bits(net(X), checked(net, X))


def test_derivatives_while_another_thread_trains_are_forgotten(rng):
    """A copy of weights that a step was writing was kept for ever: half of these rounds found it."""
    net = cr.Sequential(cr.Linear(600, 600), cr.Tanh(), cr.Linear(600, 3), seed=0)
    X, Y = (rng.standard_normal((64, width)).astype("f4") for width in (600, 3))
    c, adam = np.ones((1, 3), "f4"), cr.Adam(0.01)
    for _ in range(30):
        done = threading.Event()

        def ask(done=done):
            while not done.is_set():
                cr.vjp(net, X[:1], c)

        other = threading.Thread(target=ask)
        other.start()
        net.train_step(X, Y, loss="mse", optimizer=adam)
        done.set()
        other.join()
        assert_same_bits(cr.vjp(net, X[:1], c)[1], cr.vjp(copy.deepcopy(net), X[:1], c)[1])


def test_a_trace_goes_back_by_the_weights_that_it_came_up_by(rng):
    """Or not at all, where another thread's step is writing them."""
    net = cr.Sequential(cr.Linear(600, 600), cr.Tanh(), cr.Linear(600, 3), seed=0)
    X, Y = (rng.standard_normal((64, width)).astype("f4") for width in (600, 3))
    c, adam = np.ones((1, 3), "f4"), cr.Adam(0.01)
    for _ in range(20):
        trace, twin = net.trace(X[:1]), copy.deepcopy(net)
        expected = twin.trace(X[:1]).backward(c).dphi[0]
        other = threading.Thread(target=lambda: net.train_step(X, Y, loss="mse", optimizer=adam))
        other.start()
        while other.is_alive():
            try:
                got = trace.backward(c).dphi[0]
            except ValueError as error:
                assert "trace again" in str(error)
            else:
                assert_same_bits(got, expected)
        other.join()


def test_weights_are_loaded_all_or_none(rng):
    """Another thread's step may begin at any time: it must not meet half of them."""
    net = cr.mlp([300] * 8 + [1], seed=0)
    new = {name: value + 1 for name, value in net.state_dict().items()}
    X, y, still = rng.standard_normal((64, 300)).astype("f4"), np.zeros((64, 1), "f4"), cr.SGD(0.0)
    for _ in range(10):
        other = threading.Thread(target=lambda: net.train_step(X, y, loss="mse", optimizer=still))
        old = net.state_dict()
        other.start()
        try:
            net.load_state_dict(new)
            expected = new
        except RuntimeError as error:
            assert "[load_state_dict] weights are written between steps" in str(error)
            expected = old
        other.join()
        for name, value in net.state_dict().items():
            assert_same_bits(value, expected[name])
        net.load_state_dict(old)


def test_nobody_writes_weights_beside_the_engine(rng):
    """Other threads, and losses of the user's own, which are asked in the middle of a step."""
    net, errors = cr.mlp([3, 4, 2], seed=0), []
    state, snapshot = net.state_dict(), net._core.snapshot()

    def meddling(f, y):
        for write in (lambda: net.load_state_dict(state), lambda: net._core.restore(snapshot)):
            with pytest.raises(RuntimeError, match="weights are written between steps") as caught:
                write()
            errors.append(caught.value)
        return float(((f - y) ** 2).sum()), 2 * (f - y)

    X, y = rng.standard_normal((8, 3)), rng.standard_normal((8, 2))
    net.fit(X, y, loss=meddling)
    net.train_step(X, y, loss=meddling, optimizer=cr.Adam())
    assert len(errors) == 4
    net.load_state_dict(state)
    for name, value in net.state_dict().items():
        assert_same_bits(value, state[name])


LONG = {
    "predict": lambda net, X, y, loss, sgd: net(X),
    "step": lambda net, X, y, loss, sgd: net.train_step(X, y, loss=loss, optimizer=sgd),
    "weighted step": lambda net, X, y, loss, sgd: net.train_step(
        X, y, loss=loss, optimizer=sgd, sample_weight=np.ones(len(X))
    ),
    "fit": lambda net, X, y, loss, sgd: net.fit(X, y, loss=loss, optimizer=sgd, epochs=1, batch_size=64),
    "evaluate": lambda net, X, y, loss, sgd: net.evaluate(X, y, loss=loss),
    "weighted gradient": lambda net, X, y, loss, sgd: net.value_and_grad(
        X, y, loss=loss, sample_weight=np.ones(len(X))
    ),
    "hvp": lambda net, X, y, loss, sgd: cr.hvp(net, X, y, loss, {"0.bias": np.ones(400, "float32")}),
    "jacobian": lambda net, X, y, loss, sgd: cr.jacobian(net, X, mode="reverse"),
}


@pytest.mark.parametrize("call", LONG.values(), ids=LONG)
def test_other_threads_run_during_a_long_call(call):
    """The interpreter's lock kept for a call that takes a while."""
    net, loss, sgd = cr.mlp([200, 400, 400, 1]), cr.MSE(), cr.SGD(0.0)
    net.train_step(np.zeros((1, 200)), [0.0], loss=loss, optimizer=sgd)
    rows, seconds, ticks = 500, 0.0, 0
    while seconds < 0.1:
        rows *= 2
        data = net, np.zeros((rows, 200), "float32"), np.zeros((rows, 1), "float32"), loss, sgd
        thread, ticks, start = threading.Thread(target=call, args=data), 0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            time.sleep(0.002)
            ticks += 1
        seconds = time.perf_counter() - start
    assert ticks >= 5


# ---- gradients -----------------------------------------------------------------------------------


def gradient(net, loss, X, y, *, checked=False):
    """Value and gradients, or the error; and whether the arrays were taken as they are."""
    known = (lambda loss: None) if checked else calculus.known
    with (
        mock.patch.object(calculus, "known", known),
        mock.patch.object(cr.batch, "take", wraps=cr.batch.take) as take,
    ):
        try:
            answer = net.value_and_grad(X, y, loss=loss)
        except (TypeError, ValueError) as error:
            answer = type(error), str(error)
    return answer, not take.called


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_gradient_of_arrays_as_they_are_is_the_checked_one(kind, dtype, rng):
    """The same bits in every form; the same words for what does not fit."""
    X, y = batch(kind, dtype, rng)
    net, loss = cr.mlp([INPUTS, 5, OUTPUTS], activation="tanh", seed=3, dtype=dtype), LOSSES[kind]
    expected, exact = gradient(net, loss, X, y, checked=True)[0]
    for form in FORMS.values():
        x, t = form(X), form(y)
        (value, grads), short_way = gradient(net, loss, x, t)
        assert short_way == (fits(x, dtype) and fits(t, y.dtype))
        assert type(value) is float and value == expected
        assert list(grads) == list(exact)
        for name in exact:
            assert_same_bits(grads[name], exact[name], name)
    for spoil in SPOILED.values():
        bad = spoil(X, y)
        assert repr(gradient(net, loss, *bad)[0]) == repr(gradient(net, loss, *bad, checked=True)[0])


def test_labels_of_growing_batches(rng):
    """Labels are copied into room that the steps before have left, which a larger batch does not fit."""
    X, y = rng.standard_normal((4000, 3)).astype("float32"), rng.integers(0, 4, 4000)
    nets = [cr.mlp([3, 5, 4], seed=3) for _ in range(2)]
    adams = [cr.Adam(0.05), cr.Adam(0.05)]
    for rows in (2, 7, 100, 4000, 3):
        quick, slow = (
            net.train_step(X[:rows], labels, loss="cross_entropy", optimizer=adam)
            for net, adam, labels in zip(nets, adams, (y[:rows], y[:rows].tolist()), strict=True)
        )
        assert quick == slow, rows
    for a, b in zip(*(net.state_dict().values() for net in nets), strict=True):
        assert_same_bits(a, b)
