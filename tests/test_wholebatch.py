# SPDX-License-Identifier: MIT
"""Whole-batch optimizers through fit: optima known in closed form, and all the rest of fit's promises."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
from scipy.optimize import minimize

import chainrule as cr
from chainrule import optim, wholebatch
from conftest import assert_same_bits, eps
from test_own_parts import OwnTanh

NAMES = ("lbfgs", "levenberg_marquardt")
both = pytest.mark.parametrize("name", NAMES)


def make(sizes=(3, 5, 2), seed=0, dtype="float64"):
    return cr.mlp(sizes, activation="tanh", seed=seed, dtype=dtype)


def optimizer(name, **more):
    return optim.WHOLE_BATCH[name](**more)


def vector(arrays):
    return np.concatenate([np.ravel(a) for a in arrays]).astype(np.float64)


def weights_of(net):
    return vector(net.state_dict().values())


def assert_same_weights(a, b):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert_same_bits(x, y)


@pytest.fixture
def data(rng):
    return rng.standard_normal((31, 3)), rng.standard_normal((31, 2))


def with_ones(X):
    return np.column_stack([X, np.ones(len(X))])


# ------------------------------------------------------------------------------------------- L-BFGS: optima


def test_lbfgs_solves_linear_least_squares(data):
    X, y = data
    net = cr.Sequential(cr.Linear(3, 2), dtype="float64")
    history = net.fit(X, y, loss="least_squares", optimizer=cr.LBFGS(tolerance_change=0), epochs=100)
    exact = np.linalg.lstsq(with_ones(X), y, rcond=None)[0]
    # max|g| ≤ 1e-7, and the least eigenvalue of the Hessian XᵀX/n is about a half.
    assert np.abs(net.state_dict()["0.weight"].T - exact[:-1]).max() < 1e-6
    assert np.abs(net.state_dict()["0.bias"] - exact[-1]).max() < 1e-6
    assert history.epochs <= 15 and history.stopped_epoch == history.epochs - 1


def newton_logistic(X, y, l2, weight):
    """The minimum of the mean logistic loss + ½ l2 |w|², without a penalty on the bias."""
    A, beta = with_ones(X), np.zeros(X.shape[1] + 1)
    ridge = l2 * np.diag([*np.ones(X.shape[1]), 0.0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-A @ beta))
        gradient = A.T @ (weight * (p - y)) + ridge @ beta
        beta -= np.linalg.solve(A.T @ (A * (weight * p * (1 - p))[:, None]) + ridge, gradient)
    assert np.abs(gradient).max() < 1e-13
    return beta


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_lbfgs_finds_the_maximum_likelihood_coefficients(l2, weighted, rng):
    X = rng.standard_normal((200, 3))
    y = rng.random(200) < 1 / (1 + np.exp(-X @ [1.0, -2.0, 0.5] - 0.3))
    weight = rng.random(200) + 0.1 if weighted else None
    net = cr.Sequential(cr.Linear(3, 1), dtype="float64")
    history = net.fit(
        X, y, loss="logistic", optimizer=cr.LBFGS(tolerance_change=0), epochs=100, l2=l2, sample_weight=weight
    )
    share = np.full(200, 1 / 200) if weight is None else weight / weight.sum()
    exact = newton_logistic(X, y, l2, share)
    assert np.abs(weights_of(net) - exact).max() < 1e-5  # 1e-7 over the least eigenvalue, about 0.02
    assert history.epochs < 40


def test_lbfgs_ends_where_scipy_does(rng):
    X, y = rng.standard_normal((150, 4)), rng.integers(0, 3, 150)
    net = cr.Sequential(cr.Linear(4, 3), dtype="float64", seed=3)
    net.fit(X, y, loss="cross_entropy", optimizer=cr.LBFGS(tolerance_change=0), epochs=200, l2=0.05)

    def objective(theta):
        W, b = theta[:12].reshape(3, 4), theta[12:]
        f = X @ W.T + b
        f -= f.max(axis=1, keepdims=True)
        log_p = f - np.log(np.exp(f).sum(axis=1, keepdims=True))
        df = (np.exp(log_p) - np.eye(3)[y]) / len(y)
        value = -log_p[np.arange(len(y)), y].mean() + 0.025 * (W * W).sum()
        return value, np.concatenate([(df.T @ X + 0.05 * W).ravel(), df.sum(axis=0)])

    found = minimize(
        objective, np.zeros(15), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    mine = weights_of(net)
    assert objective(mine)[0] == pytest.approx(found.fun, rel=1e-12)
    # Adding a number to all biases changes nothing, so the biases are compared without their mean.
    for theta in (mine, found.x):
        theta[12:] -= theta[12:].mean()
    assert np.abs(mine - found.x).max() < 1e-5


def test_lbfgs_in_float32_comes_as_close_as_its_rounding_allows(data):
    X, y = data
    net = cr.Sequential(cr.Linear(3, 2), dtype="float32")
    history = net.fit(X, y, loss="least_squares", optimizer="lbfgs", epochs=200)
    exact = np.linalg.lstsq(with_ones(X), y, rcond=None)[0]
    least = 0.5 * ((with_ones(X) @ exact - y) ** 2).sum() / len(X)
    assert history.epochs < 50
    assert history["loss"][-1] - least <= 16 * eps(np.float32) * least


def test_every_accepted_step_satisfies_the_wolfe_conditions(data, monkeypatch):
    searches = []

    def recorded(phi, start, t):
        found = strong_wolfe(phi, start, t)
        searches.append((start, found))
        return found

    strong_wolfe = wholebatch.solvers.strong_wolfe
    monkeypatch.setattr(wholebatch.solvers, "strong_wolfe", recorded)
    history = make().fit(*data, loss="mse", optimizer="lbfgs", epochs=60)
    assert len(searches) == 60
    for start, found in searches:
        assert found.value <= start.value + 1e-4 * found.t * start.slope
        assert abs(found.slope) <= 0.9 * abs(start.slope)
    assert (np.diff(history["loss"]) < 0).all()


def test_without_line_search_the_first_step_is_a_scaled_gradient_step(data):
    net = make()
    before, (_, grads) = weights_of(net), net.value_and_grad(*data, loss="mse")
    g = vector(grads.values())
    net.fit(*data, loss="mse", optimizer=cr.LBFGS(lr=0.1, line_search=None))
    expected = before - 0.1 * min(1, 1 / np.abs(g).sum()) * g
    assert np.abs(weights_of(net) - expected).max() < 1e-15


def test_an_infinite_loss_on_the_way_is_no_divergence(data):
    def walled(f, y):
        """½ |f − y|² inside, infinite where an output is beyond 3."""
        value = 0.5 * ((f - y) ** 2).sum(axis=1)
        return np.where(np.abs(f).max(axis=1) > 3, np.inf, value), f - y

    X, y = data
    y = np.clip(y, -1, 1)
    net = cr.Sequential(cr.Linear(3, 2, init="zeros"), dtype="float64")
    # A first step to the wall: the gradient's sum is scaled to 1, lr multiplies that.
    net.fit(X, y, loss=walled, optimizer=cr.LBFGS(lr=100.0, tolerance_change=0), epochs=100)
    exact = np.linalg.lstsq(with_ones(X), y, rcond=None)[0]
    assert np.abs(with_ones(X) @ exact).max() < 3
    assert np.abs(net.state_dict()["0.weight"].T - exact[:-1]).max() < 1e-6


# ------------------------------------------------------------------------------ Levenberg-Marquardt: optima


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("rows", [2, 31])  # fewer and more residuals than parameters
def test_steps_hardly_damped_solve_linear_least_squares(l2, rows, data):
    """The first arrives up to the rounding of a system whose condition is 1e12, others take that away, until
    the loss is flat to its last bit: errors of √ε = 1.5e-8 in the weights."""
    X, y = (a[:rows] for a in data)
    net = cr.Sequential(cr.Linear(3, 2), dtype="float64")
    history = net.fit(
        X, y, loss="least_squares", epochs=5, l2=l2,
        optimizer=cr.LevenbergMarquardt(damping=1e-12, tolerance_grad=0, tolerance_change=0),
    )  # fmt: skip
    if rows == 2 and not l2:
        assert history["loss"][-1] < 1e-20  # two rows can be met exactly
        return
    A = with_ones(X)
    ridge = l2 * np.diag([1.0, 1.0, 1.0, 0.0])
    exact = np.linalg.solve(A.T @ A / rows + ridge, A.T @ y / rows)
    assert np.abs(net.state_dict()["0.weight"].T - exact[:-1]).max() < 1e-7
    assert np.abs(net.state_dict()["0.bias"] - exact[-1]).max() < 1e-7


def test_a_step_is_the_damped_gauss_newton_step(data, rng):
    """Against J by central differences of the outputs, which err by about 1e-10."""
    X, y = data
    net = make()
    weight, damping, l2 = rng.random(31), 0.2, 0.01
    theta, parameters = weights_of(net), wholebatch.Parameters(net)

    def residual(at):
        parameters.put(at)
        return np.sqrt(weight / weight.sum())[:, None] * (net(X) - y)

    h = 1e-6 * np.eye(theta.size)
    J = np.stack([(residual(theta + e) - residual(theta - e)).ravel() / 2e-6 for e in h], axis=1)
    r = residual(theta).ravel()
    ridge = l2 * parameters.penalized()
    system = J.T @ J
    system += np.diag(ridge + damping * system.diagonal().max())
    expected = theta - np.linalg.solve(system, J.T @ r + ridge * theta)

    net.fit(X, y, loss="least_squares", sample_weight=weight, l2=l2, optimizer=cr.LevenbergMarquardt(damping))
    assert np.abs(weights_of(net) - expected).max() < 1e-8


def test_mean_and_sum_mse_and_least_squares_take_the_same_steps(data):
    """They differ by a factor, which the first damping is measured by."""
    ends = []
    for loss in (cr.MSE(), cr.MSE(reduction="sum"), cr.LeastSquares(), cr.LeastSquares(reduction="sum")):
        net = make()
        net.fit(*data, loss=loss, optimizer="levenberg_marquardt", epochs=5)
        ends.append(weights_of(net))
    for end in ends[1:]:
        assert np.abs(end - ends[0]).max() < 1e-10


def test_blocks_of_rows_are_summed(data, monkeypatch):
    whole, blocks = make(), make()
    whole.fit(*data, loss="mse", optimizer="levenberg_marquardt", epochs=4)
    monkeypatch.setattr(wholebatch, "BLOCK_ELEMENTS", 7 * 2 * whole.num_parameters)  # seven rows, four times
    blocks.fit(*data, loss="mse", optimizer="levenberg_marquardt", epochs=4)
    assert np.abs(weights_of(whole) - weights_of(blocks)).max() < 1e-11


def test_parameters_that_nothing_depends_on_stay(rng):
    """A column of zeros, twice the same column: JᵀJ is singular, the damped system is not."""
    X = rng.standard_normal((20, 1)) * [1.0, 1.0, 0.0]
    net = cr.Sequential(cr.Linear(3, 1), dtype="float64")
    before = net.state_dict()["0.weight"]
    history = net.fit(X, 2 * X[:, 0] + 1, loss="mse", optimizer="levenberg_marquardt", epochs=50)
    after = net.state_dict()["0.weight"]
    assert history["loss"][-1] < 1e-14
    assert after[0, 2] == before[0, 2]
    assert after[0, 0] - before[0, 0] == pytest.approx(after[0, 1] - before[0, 1], abs=1e-9)


def sinc(rows=100):
    """sin(x)/x on −10 … 10, x scaled to unit variance."""
    x = np.linspace(-10, 10, rows)
    return x[:, None] / x.std(), np.sinc(x / np.pi)


def steps_to(X, y, target, how, most):
    """Whole-batch steps that a 1-20-1 tanh network takes to a mean squared error below `target`."""
    net = cr.mlp([1, 20, 1], activation="tanh", seed=0, dtype="float64")

    def reached(epoch, logs):
        return logs["loss"] < target

    history = net.fit(X, y, loss="mse", optimizer=how, epochs=most, batch_size=len(X), callbacks=[reached])
    return history.epochs if history["loss"][-1] < target else math.inf


def test_levenberg_marquardt_needs_a_tenth_of_adams_steps():
    X, y = sinc()
    steps = steps_to(X, y, 1e-6, cr.LevenbergMarquardt(), 200)
    assert steps < 100
    assert min(steps_to(X, y, 1e-6, cr.Adam(lr), 10 * steps) for lr in (1e-3, 3e-3, 1e-2, 3e-2)) == math.inf


# ----------------------------------------------------------------------------------------- what fit promises


@both
def test_the_loss_of_an_epoch_is_that_of_the_weights_after_it(name, data, dtype):
    X, y = data
    net, seen = make(dtype=dtype.name), []

    def look(epoch, logs):
        W = [w for key, w in net.state_dict().items() if key.endswith("weight")]
        penalty = 0.5 * 0.1 * sum((w.astype(np.float64) ** 2).sum() for w in W)
        seen.append(net.evaluate(X[:20], y[:20], loss="mse") + penalty)
        assert logs["val_loss"] == net.evaluate(X[20:], y[20:], loss="mse")

    history = net.fit(
        X[:20], y[:20], loss="mse", optimizer=name, epochs=8, l2=0.1, callbacks=[look],
        validation_data=(X[20:], y[20:]),
    )  # fmt: skip
    # Sums of 40 squares in different orders; in float32 the outputs that they are of are rounded, too.
    assert history["loss"] == pytest.approx(seen, rel=64 * eps(dtype))
    assert sorted(history.history) == sorted(["loss", "val_loss", optimizer(name).pace])


@both
def test_weights_count_rows(name, data, rng):
    X, y = data
    count = rng.integers(0, 4, 31)
    a, b = make(), make()
    a.fit(X, y, loss="mse", optimizer=name, epochs=5, sample_weight=count)
    b.fit(np.repeat(X, count, axis=0), np.repeat(y, count, axis=0), loss="mse", optimizer=name, epochs=5)
    assert np.abs(weights_of(a) - weights_of(b)).max() < 1e-9


def test_class_weights_are_sample_weights(rng):
    X, y = rng.standard_normal((30, 3)), rng.integers(0, 2, 30)
    a, b = make(), make()
    a.fit(X, y, loss="cross_entropy", optimizer="lbfgs", epochs=5, class_weight={0: 3.0})
    b.fit(X, y, loss="cross_entropy", optimizer="lbfgs", epochs=5, sample_weight=np.where(y == 0, 3.0, 1.0))
    assert_same_weights(a, b)


@both
def test_an_optimizer_object_goes_on_and_a_name_starts_afresh(name, data, dtype):
    nets = [make(dtype=dtype.name) for _ in range(4)]
    nets[0].fit(*data, loss="mse", optimizer=name, epochs=10)
    how, first, second = optimizer(name), optimizer(name), optimizer(name)
    for _ in range(2):
        nets[1].fit(*data, loss="mse", optimizer=how, epochs=5)
        nets[2].fit(*data, loss="mse", optimizer=name, epochs=5)
    nets[3].fit(*data, loss="mse", optimizer=first, epochs=5)
    second.load_state_dict(nets[3], first.state_dict(nets[3]))
    nets[3].fit(*data, loss="mse", optimizer=second, epochs=5)
    assert_same_weights(nets[0], nets[1])
    assert_same_weights(nets[0], nets[3])
    assert (weights_of(nets[0]) != weights_of(nets[2])).any()
    assert how.state_dict(nets[1])["step"] == 10
    how.reset(nets[1])
    assert how.state_dict(nets[1])["step"] == 0
    assert not any(slot.any() for slot in how.state_dict(nets[1])["slots"])


@both
def test_a_copy_has_the_arguments_and_no_state(name, data):
    how = optimizer(name, tolerance_grad=1e-3)
    net = make()
    net.fit(*data, loss="mse", optimizer=how)
    for twin in (copy.deepcopy(how), pickle.loads(pickle.dumps(how)), type(how)(**how.config())):
        assert repr(twin) == repr(how)
        assert twin.state_dict(net)["step"] == 0


@both
def test_convergence_ends_the_fit(name, data):
    X = data[0]
    net = cr.Sequential(cr.Linear(3, 1), dtype="float64")
    history = net.fit(X, X @ [1.0, 2.0, 3.0], loss="mse", optimizer=name, epochs=1000)
    assert history.epochs < 30 and history.stopped_epoch == history.epochs - 1
    before = weights_of(net)
    assert net.fit(X, X @ [1.0, 2.0, 3.0], loss="mse", optimizer=name, epochs=9).epochs == 1
    assert_same_bits(weights_of(net), before)


@both
def test_tolerances_end_the_fit(name, data):
    net = make()
    first = net.evaluate(*data, loss="mse")
    loose = net.fit(*data, loss="mse", optimizer=optimizer(name, tolerance_change=0.05), epochs=100)
    losses = np.array([first, *loose["loss"]])
    falls = 1 - losses[1:] / losses[:-1]
    assert falls[-1] <= 0.05 and (falls[:-1] > 0.05).all()
    net = cr.Sequential(cr.Linear(3, 2), dtype="float64")
    history = net.fit(*data, loss="mse", optimizer=optimizer(name, tolerance_grad=0.01), epochs=100)
    _, grads = net.value_and_grad(*data, loss="mse")
    assert 0 < np.abs(vector(grads.values())).max() <= 0.01
    assert history.epochs < 10


@both
def test_early_stopping_puts_the_best_weights_back(name, data):
    X, y = data
    net, kept = make(sizes=(3, 30, 2)), {}
    stop = cr.EarlyStopping(patience=3)
    history = net.fit(
        X[:15], y[:15], loss="mse", optimizer=name, epochs=100, validation_data=(X[15:], y[15:]),
        callbacks=[lambda epoch, logs: kept.update({epoch: weights_of(net)}), stop],
    )  # fmt: skip
    assert history.stopped_epoch == stop.best_epoch + 3
    assert_same_bits(weights_of(net), kept[stop.best_epoch])


@both
def test_a_callback_may_change_the_weights(name, data):
    """The next step starts from them, not from where the last one ended."""
    good = make(seed=1)
    good.fit(*data, loss="mse", optimizer=name, epochs=60)
    least = good.evaluate(*data, loss="mse")
    net = make()

    def swap(epoch, logs):
        if epoch == 0:
            net.load_state_dict(good.state_dict())

    history = net.fit(
        *data, loss="mse", optimizer=optimizer(name, tolerance_change=0), epochs=2, callbacks=[swap]
    )
    assert history["loss"][1] <= least < history["loss"][0]


def test_a_schedule_sets_the_first_length_tried(data):
    history = make().fit(
        *data,
        loss="mse",
        optimizer=cr.LBFGS(0.01, line_search=None),
        epochs=3,
        schedule=cr.ExponentialLR(0.5),
    )
    assert history["lr"] == [0.01, 0.005, 0.0025]


def test_a_rate_of_zero_is_no_step(data):
    net = make()
    before = weights_of(net)
    history = net.fit(*data, loss="mse", optimizer=cr.LBFGS(0.0), epochs=3)
    assert history.epochs == 3
    assert_same_bits(weights_of(net), before)


def test_a_step_without_search_costs_one_evaluation(data, dtype):
    """In float32, too: where a step ends is where the network is."""
    calls = []

    def counting(f, y):
        calls.append(None)
        return 0.5 * ((f - y) ** 2).sum() / len(f), (f - y) / len(f)

    make(dtype=dtype.name).fit(*data, loss=counting, optimizer=cr.LBFGS(0.1, line_search=None), epochs=5)
    assert len(calls) == 1 + 5


def test_no_trials_for_falls_that_rounding_hides(data, monkeypatch):
    """At the minimum λ would have to grow to 1e16, by half at a time; for the next fit it is small again."""
    trials, trial = [], wholebatch.LevenbergMarquardtRun._trial

    def counted(self, theta):
        trials.append(None)
        return trial(self, theta)

    monkeypatch.setattr(wholebatch.LevenbergMarquardtRun, "_trial", counted)
    net, how = (
        cr.Sequential(cr.Linear(3, 2), dtype="float64"),
        cr.LevenbergMarquardt(tolerance_grad=0, tolerance_change=0),
    )
    history = net.fit(*data, loss="mse", optimizer=how, epochs=100)
    assert history.stopped_epoch is not None
    assert len(trials) < 20
    assert history["damping"][-1] == how.state_dict(net)["slots"][0][0] < 0.1


class Cube(cr.Layer):
    """x³ and a factor of its own."""

    def __init__(self):
        self.params = {"factor": np.array([0.5, 0.5])}

    def forward(self, x):
        return self.params["factor"] * x**3

    def vjp(self, x, y, dy):
        return dy * self.params["factor"] * 3 * x**2, {"factor": (dy * x**3).sum(axis=0)}

    def jvp(self, x, y, dx):
        return self.params["factor"] * 3 * x**2 * dx


@both
def test_l2_is_about_the_weights_of_linear_layers(name, data):
    class Named(cr.Layer):
        def __init__(self):
            self.params = {"weight": np.array([2.0, 3.0])}

        def forward(self, x):
            return self.params["weight"] * x

        def vjp(self, x, y, dy):
            return dy * self.params["weight"], {"weight": (dy * x).sum(axis=0)}

        def jvp(self, x, y, dx):
            return self.params["weight"] * dx

    net = cr.Sequential(cr.Linear(3, 2), Named(), dtype="float64")
    history = net.fit(*data, loss="mse", optimizer=name, epochs=3, l2=0.5)
    penalty = 0.25 * (net.state_dict()["0.weight"] ** 2).sum()
    assert history["loss"][-1] == pytest.approx(net.evaluate(*data, loss="mse") + penalty, rel=1e-14)


@both
def test_layers_of_ones_own(name, rng):
    X = rng.uniform(0.5, 1, (40, 2))
    net = cr.Sequential(cr.Linear(2, 2), Cube(), cr.Linear(2, 1), dtype="float64")
    history = net.fit(X, X.sum(axis=1) ** 3, loss="mse", optimizer=name, epochs=300)
    assert history["loss"][-1] < 1e-3 * history["loss"][0]


@both
def test_a_layer_of_ones_own_trains_as_ours_does(name, data):
    ours, own = (cr.Sequential(cr.Linear(3, 4), layer, cr.Linear(4, 2), dtype="float64", seed=1)
                 for layer in (cr.Tanh(), OwnTanh()))  # fmt: skip
    own.load_state_dict(ours.state_dict())
    for net in (ours, own):
        net.fit(*data, loss="mse", optimizer=name, epochs=5)
    assert np.abs(weights_of(ours) - weights_of(own)).max() < 1e-9


# ------------------------------------------------------------------------------------- when things go wrong


@pytest.mark.parametrize("lr", [1e30, 1e40])  # the loss overflows, or the weights do already
@pytest.mark.parametrize("trained", [False, True])
def test_divergence_puts_the_weights_and_the_memory_back(trained, lr, data):
    net, how = make(dtype="float32"), cr.LBFGS(line_search=None)
    if trained:
        net.fit(*data, loss="mse", optimizer=how, epochs=3)
    how.lr = lr
    before, state = weights_of(net), how.state_dict(net)
    with pytest.raises(FloatingPointError, match=r"loss must stay finite.* at learning rate 1e"):
        net.fit(*data, loss="mse", optimizer=how, epochs=50)
    assert_same_bits(weights_of(net), before)
    assert how.state_dict(net)["step"] == state["step"]
    for a, b in zip(how.state_dict(net)["slots"], state["slots"], strict=True):
        assert_same_bits(a, b)


@both
def test_weights_beyond_all_numbers_are_refused(name, data):
    net = make(dtype="float32")
    net.load_state_dict({key: np.full_like(w, 1e38) for key, w in net.state_dict().items()})
    before = weights_of(net)
    with pytest.raises(FloatingPointError, match="loss must stay finite"):
        net.fit(*data, loss="mse", optimizer=name)
    assert_same_bits(weights_of(net), before)


def test_a_gradient_that_is_not_finite_is_noticed(data):
    def steep(f, y):
        return 1.0, np.full_like(f, np.inf)

    net = make()
    before = weights_of(net)
    with pytest.raises(FloatingPointError, match=r"gradient must stay finite.* before the first step"):
        net.fit(*data, loss=steep, optimizer="lbfgs")
    assert_same_bits(weights_of(net), before)


def test_derivatives_that_are_not_finite_are_noticed(data):
    class Vertical(Cube):
        def vjp(self, x, y, dy):
            return np.full_like(x, np.inf), {"factor": np.full(2, np.inf)}

    net = cr.Sequential(cr.Linear(3, 2), Vertical(), dtype="float64")
    before = weights_of(net)
    with pytest.raises(FloatingPointError, match=r"derivatives must stay finite.* before the first step"):
        net.fit(*data, loss="mse", optimizer="levenberg_marquardt")
    assert_same_bits(weights_of(net), before)


def test_a_search_without_a_fall_leaves_the_weights(data):
    calls = []

    def rising(f, y):
        calls.append(None)
        return float(len(calls)), f - y

    net = make()
    before = weights_of(net)
    history = net.fit(*data, loss=rising, optimizer="lbfgs", epochs=9)
    assert history["loss"] == [1.0] and history.stopped_epoch == 0
    assert len(calls) > 1
    assert_same_bits(weights_of(net), before)


def test_a_memory_that_misleads_is_dropped(data):
    """A pair that makes the step 1e300 times too long: it is forgotten, and the step is a gradient's."""
    net, how = make(), cr.LBFGS()
    s = np.eye(net.num_parameters)[0]
    slots = [np.outer(np.arange(10) == 9, scale * s) for scale in (1e150, 1e-150)]
    how.load_state_dict(net, {"step": 1, "slots": slots})
    first = net.evaluate(*data, loss="mse")
    history = net.fit(*data, loss="mse", optimizer=how)
    assert history["loss"][0] < first and history.stopped_epoch is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_in_a_line_search_leaves_the_last_accepted_weights(error, data):
    calls, kept = [], []

    def failing(f, y):
        calls.append(None)
        if len(calls) == 20:
            raise error
        return ((f - y) ** 2).sum(), 2 * (f - y)

    net = make()
    with pytest.raises(error):
        net.fit(*data, loss=failing, optimizer="lbfgs", epochs=50,
                callbacks=[lambda epoch, logs: kept.append(weights_of(net))])  # fmt: skip
    assert kept
    assert_same_bits(weights_of(net), kept[-1])
    net.fit(*data, loss="mse", optimizer="lbfgs")  # it is free to be trained


def test_an_error_in_a_trial_leaves_the_last_accepted_weights(data):
    kept = []

    class Failing(Cube):
        def forward(self, x):
            if len(kept) == 3 and (self.params["factor"] != kept[-1][-2:]).any():
                raise ZeroDivisionError
            return super().forward(x)

    net = cr.Sequential(cr.Linear(3, 2), Failing(), dtype="float64")
    with pytest.raises(ZeroDivisionError):
        net.fit(*data, loss="mse", optimizer="levenberg_marquardt", epochs=50,
                callbacks=[lambda epoch, logs: kept.append(weights_of(net))])  # fmt: skip
    assert_same_bits(weights_of(net), kept[-1])


@both
def test_two_threads_cannot_train_one_network(name, data):
    started, go_on = threading.Event(), threading.Event()

    class Slow(Cube):
        def forward(self, x):
            started.set()
            go_on.wait(10)
            return super().forward(x)

    net = cr.Sequential(cr.Linear(3, 2), Slow(), dtype="float64")
    thread = threading.Thread(target=lambda: net.fit(*data, loss="mse", optimizer=name))
    thread.start()
    started.wait(10)
    errors = []
    for other in (name, "adam"):
        with pytest.raises(RuntimeError, match="trains in one place at a time") as caught:
            net.fit(*data, loss="mse", optimizer=other)
        errors.append(caught)
    go_on.set()
    thread.join()
    net.fit(*data, loss="mse", optimizer=name)


@both
def test_all_rows_may_be_asked_for(name, data):
    a, b = make(), make()
    a.fit(*data, loss="mse", optimizer=name, epochs=3)
    b.fit(*data, loss="mse", optimizer=name, epochs=3, batch_size=31, shuffle=False)
    assert_same_weights(a, b)


def test_levenberg_marquardt_refuses_what_does_not_fit_in_memory(data, monkeypatch):
    net = make()
    monkeypatch.setattr(wholebatch, "MOST_ELEMENTS", net.num_parameters**2 - 1)
    with pytest.raises(ValueError, match=r"must fit in 1 GiB: .*min\(62, 32\) · 32; use LBFGS"):
        net.fit(*data, loss="mse", optimizer="levenberg_marquardt")
    net.fit(data[0][:15], data[1][:15], loss="mse", optimizer="levenberg_marquardt")  # 30 residuals only
