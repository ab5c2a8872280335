# SPDX-License-Identifier: MIT
"""Update rules, penalties, clipping, schedules and whole fits: the trajectories of reference.py."""

import math
from typing import NamedTuple

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core, reference
from conftest import assert_same_bits, assert_within, engine, layers_of, twin, typed, values


class Rule(NamedTuple):
    name: str
    hyper: dict  # reference.py's keyword arguments
    lr: float

    def engine_hyper(self):
        """The same numbers in the order that _core wants."""
        defaults = {
            "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
            "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
            "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
            "rmsprop": {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False},
        }[self.name]
        return [float(v) for v in {**defaults, **self.hyper}.values()]


RULES = [
    Rule("sgd", {}, 0.1),
    Rule("sgd", {"weight_decay": 0.3}, 0.1),
    Rule("sgd", {"momentum": 0.9}, 0.05),
    Rule("sgd", {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}, 0.05),
    Rule("sgd", {"momentum": 0.8, "nesterov": True}, 0.05),
    Rule("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, 0.05),
    Rule("adam", {}, 0.01),
    Rule("adam", {"beta1": 0.5, "beta2": 0.7, "eps": 1e-3, "weight_decay": 0.2}, 0.02),
    Rule("adamw", {}, 0.01),
    Rule("adamw", {"beta1": 0.0, "eps": 1e-2, "weight_decay": 0.5}, 0.02),
    Rule("rmsprop", {}, 0.01),
    Rule("rmsprop", {"alpha": 0.8, "eps": 1e-3, "weight_decay": 0.2}, 0.01),
    Rule("rmsprop", {"momentum": 0.7}, 0.005),
    Rule("rmsprop", {"centered": True, "eps": 1e-2}, 0.01),
    Rule("rmsprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-2}, 0.01),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{RULES.index(rule)}")
LAYERS = layers_of([5, 17, 9, 2], "tanh", "silu")


class Pair:
    """One training in the engine and its twin in reference.py, from the same weights on the same data."""

    def __init__(self, rng, rule, dtype=np.float64, weighted=False, batch_size=37, shuffle=False,
                 l1=0.0, l2=0.0, clip_value=0.0, clip_norm=0.0, layers=LAYERS):  # fmt: skip
        self.x, self.y = (rng.standard_normal((37, k)).astype(dtype) for k in (5, 2))
        self.weight = (rng.random(37) + 0.1).astype(dtype) if weighted else None
        self.net, self.lr = engine(layers, dtype, rng), rule.lr
        self.optimizer = typed("Optimizer", dtype)(self.net, rule.name, rule.engine_hyper())
        self.trainer = typed("Trainer", dtype)(
            self.net, self.optimizer, _core.Loss("least_squares", 0.0, "mean", None),
            self.x, self.y, self.weight, batch_size, shuffle, 11, l1, l2, clip_value, clip_norm,
        )  # fmt: skip
        self.reference = reference.Trainer(
            twin(layers, self.net), "least_squares", rule.name, l1=l1, l2=l2,
            clip_value=clip_value or math.inf, clip_norm=clip_norm or math.inf, **rule.hyper,
        )  # fmt: skip

    def assert_steps_equal(self, steps, rel):
        """Steps on the whole batch. The reference starts each where the engine stands, but keeps a memory of
        its own.

        (Training doubles any difference again and again: two trajectories would measure that and not the
        rule.)
        """
        for step in range(steps):
            for mine, theirs in zip(self.reference.net.params, values(self.net), strict=True):
                mine[:] = theirs
            got = self.trainer.step(self.x, self.y, self.weight, self.lr)
            weight = None if self.weight is None else self.weight.astype(float)
            expected = self.reference.step(self.x.astype(float), self.y.astype(float), self.lr, weight)
            assert got == pytest.approx(expected, rel=rel), f"step {step}"
            self.assert_equal(rel, f"step {step}: ")

    def assert_equal(self, rel, what=""):
        """Both have the same parameters, to `rel` of the largest of each array."""
        for k, (ours, theirs) in enumerate(zip(values(self.net), self.reference.net.params, strict=True)):
            assert_within(ours, theirs, rel * max(1.0, np.abs(theirs).max()), f"{what}parameter {k} ")


@each_rule
def test_fifty_steps_follow_reference(rule, isa, rng):
    """A wrong rule, a state that is not kept, a bias correction with the wrong step number.

    Bound: some 100 roundings of 1e-16 in a gradient, a hundred times as much where the adaptive rules divide
    it by its own size and it is what is left of terms a hundred times as large; all times a rate of at most
    0.1.
    """
    pair = Pair(rng, rule)
    pair.assert_steps_equal(50, 1e-12)
    assert pair.optimizer.step_count == 50


@each_rule
def test_float32_follows_too(rule, isa, rng):
    """A hyper-parameter lost in float32, whose rounding is 5e8 times as large; and so is the bound."""
    Pair(rng, rule, np.float32).assert_steps_equal(50, 5e-4)


@pytest.mark.parametrize("rule", RULES[::3], ids=lambda rule: rule.name)
@pytest.mark.parametrize("treatment", [
    {"l1": 0.03}, {"l2": 0.2}, {"l1": 0.01, "l2": 0.1}, {"clip_value": 0.02}, {"clip_norm": 0.1},
    {"clip_norm": 1e3}, {"l1": 0.01, "l2": 0.1, "clip_value": 0.05, "clip_norm": 0.1},
], ids=str)  # fmt: skip
def test_penalties_and_clipping_follow_reference(rule, treatment, isa, rng):
    """Done in another order than data + penalty, value, norm; to the biases too; or missing from the loss."""
    Pair(rng, rule, weighted=True, **treatment).assert_steps_equal(50, 1e-12)


@each_rule
@pytest.mark.parametrize("shuffle", [False, True])
def test_fit_follows_reference(rule, shuffle, rng):
    """Batches that skip, repeat or misplace rows, their targets or weights; the last batch is a smaller one.

    Bound: 30 steps, each of which may double the rounding of those before where a rate is as large as these.
    """
    pair = Pair(rng, rule, weighted=True, batch_size=8, shuffle=shuffle)
    orders = [_core.permutation(37, 11, epoch) if shuffle else np.arange(37) for epoch in range(6)]
    got = pair.trainer.run(0, np.full(6, rule.lr))
    expected = list(pair.reference.fit(pair.x, pair.y, rule.lr, 8, orders, pair.weight))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    pair.assert_equal(1e-10)


def test_a_rate_for_each_step(rng):
    """Rates of an array (epochs, steps) in another order, or only the first of each epoch."""
    rates = np.array([[0.1, 0.0, 0.02], [0.05, 0.2, 0.01]])
    pair = Pair(rng, RULES[2], batch_size=16, shuffle=True, l2=0.1)
    got = pair.trainer.run(3, rates)
    for epoch, losses in enumerate(rates):
        order = _core.permutation(37, 11, 3 + epoch)
        batches = [order[:16], order[16:32], order[32:]]
        steps = [pair.reference.step(pair.x[b], pair.y[b], lr) for b, lr in zip(batches, losses, strict=True)]
        assert got[epoch] == pytest.approx(np.average(steps, weights=[16, 16, 5]), rel=1e-12)
    pair.assert_equal(1e-11)


def test_dropout_follows_reference(rng):
    """A mask of another layer, step or row than `_core.dropout` names for it: nothing here would agree."""
    layers = layers_of([5, 17, 9, 2], "tanh", "silu")
    layers.insert(2, ("dropout", 17, 17, 0.4, False, None))
    layers.insert(0, ("dropout", 5, 5, 0.2, False, None))
    pair = Pair(rng, RULES[6], batch_size=8, layers=layers)
    got = pair.trainer.run(0, np.full(3, 0.01))
    places, losses, step = [k for k, layer in enumerate(layers) if layer[0] == "dropout"], [], 0
    for _ in range(3):
        for i in range(0, 37, 8):
            for k in places:
                ones = np.ones((len(pair.x[i : i + 8]), layers[k][1]))
                pair.reference.net.layers[k].a = _core.dropout(ones, layers[k][3], 11, k, step)
            losses.append(pair.reference.step(pair.x[i : i + 8], pair.y[i : i + 8], 0.01))
            step += 1
    np.testing.assert_allclose(
        got, [np.average(losses[e : e + 5], weights=[8, 8, 8, 8, 5]) for e in (0, 5, 10)]
    )
    pair.assert_equal(1e-11)


@each_rule
def test_seeing_the_gradient_first_changes_no_bit(rule, isa, dtype, rng):
    """The fused update and that of a stored gradient differ: a norm that never clips selects the second."""
    state = rng.bit_generator.state
    results = []
    for clip_norm in (0.0, 1e30):
        rng.bit_generator.state = state
        pair = Pair(rng, rule, dtype, batch_size=8, shuffle=True, l2=0.01, clip_norm=clip_norm)
        losses = pair.trainer.run(0, np.full(4, rule.lr))
        results.append([losses, *(pair.net.get_parameter(k) for k in range(6)), *pair.optimizer.get_state()])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@each_rule
def test_state_resumes_bit_for_bit(rule, dtype, rng):
    """A slot or the step number forgotten on the way through get_state and set_state."""
    state = rng.bit_generator.state
    whole = Pair(rng, rule, dtype, batch_size=8, shuffle=True)
    whole.trainer.run(0, np.full(6, rule.lr))
    rng.bit_generator.state = state
    first = Pair(rng, rule, dtype, batch_size=8, shuffle=True)
    first.trainer.run(0, np.full(2, rule.lr))
    saved = (
        [slot.copy() for slot in first.optimizer.get_state()],
        first.optimizer.step_count,
        first.net.snapshot(),
    )
    rng.bit_generator.state = state
    second = Pair(rng, rule, dtype, batch_size=8, shuffle=True)
    second.optimizer.set_state(saved[0])
    second.optimizer.step_count = saved[1]
    second.net.restore(saved[2])
    second.trainer.run(2, np.full(4, rule.lr))
    for k in range(6):
        assert_same_bits(second.net.get_parameter(k), whole.net.get_parameter(k), f"parameter {k}")


def test_centered_rmsprop_survives_a_constant_gradient(isa, dtype):
    """v − m² of a gradient that never changes is 0, or −1e-17 once rounded: its root must not be NaN."""
    net = typed("Network", dtype)([("linear", 3, 1, 0.0, False, None)])
    optimizer = typed("Optimizer", dtype)(net, "rmsprop", [0.9, 1e-8, 0.0, 0.0, 1.0])
    x, y = np.array([[0.1, 0.7, 1.3]], dtype), np.array([[1e6]], dtype)
    how = _core.Loss("mae", 0.0, "mean", None)
    trainer = typed("Trainer", dtype)(net, optimizer, how, x, y, None, 1, False, 0, 0.0, 0.0, 0.0, 0.0)
    assert np.isfinite(trainer.run(0, np.full(1000, 1e-9))).all()


# ---- schedules: on a loss whose gradient is always −1, the weight is the sum of all rates ------------------


def rates_of(schedule, epochs, rows=1, lr=0.1):
    """history["lr"], and the sum of the rates that the steps really took."""
    net = cr.Sequential(cr.Linear(1, 1, bias=False, init="zeros"), dtype="float64")
    X, y = np.ones((rows, 1)), np.full(rows, 1e6)
    how = {"loss": "mae", "optimizer": cr.SGD(lr), "batch_size": 1, "epochs": epochs, "verbose": 0}
    history = net.fit(X, y, schedule=schedule, **how)
    return np.array(history["lr"]), float(net.state_dict()["0.weight"][0, 0])


CLOSED_FORMS = [
    (lambda: None, lambda t: 0.1),
    (lambda: cr.StepLR(3, gamma=0.5), lambda t: 0.1 * 0.5 ** (t // 3)),
    (lambda: cr.StepLR(2), lambda t: 0.1 * 0.1 ** (t // 2)),
    (lambda: cr.ExponentialLR(0.9), lambda t: 0.1 * 0.9**t),
    (lambda: cr.CosineAnnealingLR(8), lambda t: 0.05 * (1 + math.cos(math.pi * t / 8))),
    (
        lambda: cr.CosineAnnealingLR(10, eta_min=0.02),
        lambda t: 0.02 + 0.04 * (1 + math.cos(math.pi * t / 10)),
    ),
]


@pytest.mark.parametrize(
    "schedule, closed_form", CLOSED_FORMS, ids=[repr(schedule()) for schedule, _ in CLOSED_FORMS]
)
def test_schedules_have_their_closed_forms(schedule, closed_form):
    """An epoch late or early; rates in the history that no step took. Bound: a few roundings of a sum."""
    rates, moved = rates_of(schedule(), 10, rows=3)
    expected = np.array([closed_form(t) for t in range(10)])
    np.testing.assert_allclose(rates, expected, rtol=1e-14, atol=1e-17)
    assert moved == pytest.approx(3 * expected.sum(), rel=1e-12)


@pytest.mark.parametrize("start", [0.0, 0.25])
def test_warm_up_rises_with_every_step(start):
    """Rates by epoch instead of by step, or a schedule behind it that does not begin at its own epoch 0."""
    rates, moved = rates_of(cr.WarmupLR(2, start_factor=start, after=cr.ExponentialLR(0.5)), 5, rows=4)
    ramp = 0.1 * (start + (1 - start) * np.arange(1, 9) / 8)
    after = 0.1 * 0.5 ** np.arange(3)
    np.testing.assert_allclose(rates, [ramp[3], ramp[7], *after], rtol=1e-14)
    assert moved == pytest.approx(ramp.sum() + 4 * after.sum(), rel=1e-12)
    rates, moved = rates_of(cr.WarmupLR(1), 3, rows=2)
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.1])
    assert moved == pytest.approx(0.05 + 5 * 0.1)


def test_plateau_waits_then_lowers():
    """patience one too many or few: a loss of 10⁶ that falls by 10⁻⁷ of itself an epoch does not fall."""
    rates, moved = rates_of(cr.ReduceLROnPlateau("loss", factor=0.5, patience=2, min_lr=0.03), 9)
    expected = [
        0.1,
        0.1,
        0.1,
        0.1,
        0.05,
        0.05,
        0.05,
        0.03,
        0.03,
    ]  # the best, 3 without a fall; 3 more; the floor
    np.testing.assert_allclose(rates, expected, rtol=1e-14)
    assert moved == pytest.approx(sum(expected), rel=1e-12)


# ---- the order of the rows, and random numbers -------------------------------------------------------------


def test_permutations_are_permutations():
    for n in (0, 1, 2, 3, 10, 1000):
        assert sorted(_core.permutation(n, 5, 0)) == list(range(n))
    first = _core.permutation(1000, 5, 0)
    assert (first == _core.permutation(1000, 5, 0)).all()
    for other in (_core.permutation(1000, 6, 0), _core.permutation(1000, 5, 1), np.arange(1000)):
        assert (first == other).mean() < 0.02  # by chance one in a thousand agrees


def test_permutations_are_fair():
    """A shuffle that favours some orders: 6000 of three rows, each order within five standard deviations."""
    drawn = [_core.permutation(3, 2, epoch) for epoch in range(6000)]
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000 * 5 / 6)


@pytest.mark.parametrize("stream", [0, 1, 2**40])
def test_random_numbers_have_their_distribution(stream):
    """Moments within five standard deviations of 10⁵ draws, and neighbours that are uncorrelated."""
    n = 100_000
    for numbers, mean, variance, fourth in (
        (_core.random_uniform(n, 3, stream), 1 / 2, 1 / 12, 1 / 80),
        (_core.random_normal(n, 3, stream), 0, 1, 3),
    ):
        centred = numbers - mean
        assert abs(centred.mean()) < 5 * math.sqrt(variance / n)
        assert abs((centred**2).mean() - variance) < 5 * math.sqrt((fourth - variance**2) / n)
        assert abs((centred[1:] * centred[:-1]).mean()) < 5 * variance / math.sqrt(n)
    u = np.sort(_core.random_uniform(n, 3, stream))
    assert u[0] >= 0 and u[-1] < 1
    # Kolmogorov and Smirnov: the distance exceeds 2.5/√n once in 10⁵ times
    assert np.abs(u - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n)


def test_random_numbers_are_counter_based():
    """A longer draw holds the shorter ones; another seed or stream shares nothing."""
    for draw in (_core.random_uniform, _core.random_normal):
        long = draw(1001, 7, 3)
        for n in (0, 1, 2, 3, 500):
            assert_same_bits(draw(n, 7, 3), long[:n])
            assert_same_bits(draw(n, 7, 3, 501), long[501 : 501 + n])
        for other in (draw(1001, 8, 3), draw(1001, 7, 4)):
            assert not np.intersect1d(long, other).size
            assert abs(np.corrcoef(long, other)[0, 1]) < 5 / math.sqrt(1001)


# ------------------------------------------------------------ whose state it is


class Alike(cr.Sequential):
    """Equal to every other one of its kind."""

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 1


@pytest.mark.parametrize("optimizer", [cr.Adam, cr.SGD, cr.RMSprop])
def test_state_belongs_to_a_network_not_to_its_equals(optimizer):
    """Moments of another size would be written past their end."""
    opt, X, y = optimizer(0.01), np.ones((8, 3)), np.ones(8)
    one, other = Alike(cr.Linear(3, 1)), Alike(cr.Linear(3, 2000), cr.Linear(2000, 1))
    for net in (one, other):
        net.fit(X, y, loss="mse", optimizer=opt)
        assert opt.state_dict(net)["step"] == 1
    one.__init__(cr.Linear(3, 2000), cr.Linear(2000, 1))
    assert opt.state_dict(one)["step"] == 0
    one.fit(X, y, loss="mse", optimizer=opt)


def test_the_engine_refuses_the_state_of_another_network():
    one, other = (_core.Network64([("linear", 3, width, 0.0, True, None)]) for width in (1, 2))
    adam = _core.Optimizer64(one, "adam", [0.9, 0.999, 1e-8, 0.0])
    loss = _core.Loss("mse", 0.0, "mean", None)
    with pytest.raises(ValueError, match=r"\[fit\] the optimizer's state .* expected \d+ numbers, got"):
        _core.Trainer64(
            other, adam, loss, np.ones((2, 3)), np.ones((2, 2)), None, 2, False, 0, 0.0, 0.0, 0.0, 0.0
        )


def test_uniform_numbers_have_53_bits():
    """One fewer, and every draw is even in units of 2⁻⁵³."""
    units = _core.random_uniform(100, 3, 1) * 2**53
    assert (units == np.floor(units)).all() and (units % 2 == 1).any()
