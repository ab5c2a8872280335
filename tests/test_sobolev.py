# SPDX-License-Identifier: MIT
"""Training on slopes: the gradient against formulas and differences, the fit against a loop of our own."""

import copy
import re

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core, losses, reference
from conftest import assert_same_bits, assert_within
from test_calculus import (
    ACTIVATIONS,
    SMOOTH,
    Cube,
    away_from_kinks,
    direction,
    each_activation,
    flat,
    moved,
    random_chain,
    randomize,
    size,
)
from test_own_parts import Affine, Gain, OwnTanh, own_mean, own_mse


def problem(net, rng, rows=9):
    """X, y, dy and weights, one of them 0."""
    weight = rng.random(rows) + 0.5
    weight[rows // 2] = 0
    X = rng.standard_normal((rows, net.in_features))
    y = rng.standard_normal((rows, net.out_features))
    return X, y, rng.standard_normal((rows, net.out_features, net.in_features)), weight


def objective(net, X, y, dy, dy_weight, loss, weight):
    """loss + λ Σ ω ½ ‖J − dy‖², each J by itself."""
    squares = np.array(
        [((cr.jacobian(net, x) - slope) ** 2).sum() / 2 for x, slope in zip(X, dy, strict=True)]
    )
    omega = np.ones(len(X)) if weight is None else weight
    scale = 1 if getattr(loss, "reduction", "mean") == "sum" else 1 / omega.sum()
    return net.evaluate(X, y, loss=loss, sample_weight=weight) + dy_weight * scale * float(omega @ squares)


def check_gradient(net, rng, loss="mse", weighted=True, within=1e-7):
    """Value and gradient of value_and_grad, the latter against a central difference along one direction."""
    X, y, dy, weight = problem(net, rng)
    while not away_from_kinks(net, X):
        X = rng.standard_normal(X.shape)
    weight = weight if weighted else None
    args = X, y, dy, 0.7, loss, weight
    value, grads = net.value_and_grad(X, y, loss=loss, sample_weight=weight, dy=dy, dy_weight=0.7)
    assert_within(value, objective(net, *args), 1e-12 * size(value))
    check_against_reference(net, args, value, grads)
    v, h = direction(net, rng), 1e-6
    expected = (objective(moved(net, v, h), *args) - objective(moved(net, v, -h), *args)) / (2 * h)
    got = sum(float((grads[name] * v[name]).sum()) for name in grads)
    assert_within(got, expected, within * size(value, expected, flat(grads)))


def slope_penalty(net, X, dy, omega):
    """Σ ωₙ ½ ‖Jₙ − dyₙ‖² and its gradient by the reference, column by column: ḟ along an input is one of J.

    ∂/∂θ of ½ ω ‖ḟ − dy‖² is r J_θ[ḟ] with r = ω (ḟ − dy): the tangent of the gradient r J_θ[f].
    """
    phi, value, still = net.forward(X), 0.0, [0 * w for w in net.params]
    grads = still
    for slopes, unit in zip(np.moveaxis(dy, 2, 0), np.eye(X.shape[1]), strict=True):
        dots = net.tangent(phi, unit + 0 * X)
        r = omega[:, None] * (dots[-1] - slopes)
        value += float((r * (dots[-1] - slopes)).sum()) / 2
        more = net.tangent_backward(phi, dots, net.backward(phi, r)[0], 0 * r, still)
        grads = [g + m for g, m in zip(grads, more, strict=True)]
    return value, grads


def check_against_reference(net, args, value, grads):
    """The reference goes input by input, the engine output by output; it knows no parts of one's own."""
    X, y, dy, dy_weight, loss, weight = args
    rule = losses.resolve("test", loss)
    if isinstance(rule, losses.CustomLoss) or not all(
        hasattr(layer, "op") and layer.op != "dropout" for layer in net
    ):
        return
    state = net.state_dict()
    links = [
        reference.Linear(state[f"{k}.weight"], state.get(f"{k}.bias"))
        if layer.op == "linear"
        else reference.Op(layer.op, layer._param)
        for k, layer in enumerate(net)
    ]
    shares = reference.shares(len(X), weight, rule.reduction)
    right, expected = reference.Network(links).value_and_grad(
        X, y, rule.name, weight=weight, reduction=rule.reduction, a=getattr(rule, "delta", 0.0)
    )
    term, slopes = slope_penalty(reference.Network(links), X, dy, dy_weight * shares)
    assert_within(value, right + term, 1e-12 * size(value))
    for (name, grad), one, two in zip(grads.items(), expected, slopes, strict=True):
        assert_within(grad, one + two, 1e-12 * size(value, *expected, *slopes), name)


# ---- the gradient ------------------------------------------------------------------------------------------


@each_activation
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_gradient_is_that_of_the_value(activation, depth, rng):
    others = ACTIVATIONS if activation.op in ("relu", "leaky_relu", "elu") else SMOOTH
    net = None
    while net is None or not away_from_kinks(net, rng.standard_normal((9, net.in_features))):
        # A ReLU of another's zeros is at its kink for every X: draw the network anew as well.
        net = random_chain(rng, activation, others, depth, widths=[1, 2, 3, 7, 17])
    check_gradient(net, rng)


@pytest.mark.parametrize("loss", [cr.MSE(), cr.LeastSquares(reduction="sum"), cr.Huber(0.5), own_mse])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 65])
def test_losses_weights_and_outputs(loss, weighted, outputs, rng):
    net = randomize(cr.mlp([4, 17, outputs], activation="tanh", dtype="float64"), rng)
    check_gradient(net, rng, loss, weighted and loss is not own_mse)


def test_formula_of_two_layers_of_tanh(rng):
    """J = (w₂ ∘ s) W₁ with s = 1 − a², and d/dθ of λ/2B Σ |J − dy|² term by term."""
    net = randomize(cr.mlp([3, 7, 1], activation="tanh", dtype="float64"), rng)
    X, y, dy, _ = problem(net, rng)
    W1, b1, W2, b2 = net.state_dict().values()
    a = np.tanh(X @ W1.T + b1)
    s, e = 1 - a**2, (a @ W2.T + b2 - y) / len(X)
    r = 0.3 / len(X) * ((W2 * s) @ W1 - dy[:, 0])
    through = (r @ W1.T) * W2 * -2 * a * s  # by way of s
    expected = {
        "0.weight": (e * W2 * s).T @ X + (W2 * s).T @ r + through.T @ X,
        "0.bias": (e * W2 * s).sum(0) + through.sum(0),
        "2.weight": e.T @ a + ((r @ W1.T) * s).sum(0),
        "2.bias": e.sum(0),
    }
    _, grads = net.value_and_grad(X, y, loss="least_squares", dy=dy, dy_weight=0.3)
    for name, grad in grads.items():
        assert_within(grad, expected[name], 1e-13 * size(expected[name]), name)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("own", [OwnTanh, Gain, Affine, Cube])
def test_layers_of_ones_own(own, outputs, rng):
    """Their second derivatives are differences of vjp: with error eps^(2/3) of float64, about 4e-11."""
    layer = Affine(2, 2) if own is Affine else own()
    net = randomize(
        cr.Sequential(
            cr.Linear(3, 2), layer, cr.Linear(2, 4), cr.Tanh(), cr.Linear(4, outputs), dtype="float64"
        ),
        rng,
    )
    check_gradient(net, rng)


def test_a_layer_of_ones_own_comes_first_or_last(rng):
    check_gradient(randomize(cr.Sequential(Gain(), cr.Linear(3, 2), dtype="float64"), rng), rng)
    check_gradient(randomize(cr.Sequential(cr.Linear(3, 2), cr.Tanh(), Gain(), dtype="float64"), rng), rng)


def test_slopes_of_one_output_need_no_axis_for_it(rng):
    net = randomize(cr.mlp([3, 5, 1], dtype="float64"), rng)
    X, y, dy, _ = problem(net, rng)
    flat_ones = net.value_and_grad(X, y, loss="mse", dy=dy[:, 0])[1]
    for name, grad in net.value_and_grad(X, y, loss="mse", dy=dy)[1].items():
        assert_same_bits(grad, flat_ones[name])


# ---- fit ---------------------------------------------------------------------------------------------------


def trained(net, X, y, dy, loss, epochs, batch, shuffle, weight=None, l2=0.0, clip_norm=0.0):
    """`fit` with SGD(0.05) and seed 3 as a loop over value_and_grad."""
    for epoch in range(epochs):
        order = _core.permutation(len(X), 3, epoch) if shuffle else np.arange(len(X))
        for first in range(0, len(X), batch):
            rows = order[first : first + batch]
            _, grads = net.value_and_grad(
                X[rows], y[rows], loss=loss, dy=dy[rows], dy_weight=0.4,
                sample_weight=None if weight is None else weight[rows],
            )  # fmt: skip
            state = net.state_dict()
            for name in grads:
                grads[name] = grads[name] + l2 * state[name] * name.endswith("weight")
            norm = np.linalg.norm(flat(grads))
            factor = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
            net.load_state_dict({name: state[name] - 0.05 * factor * grads[name] for name in grads})
    return net


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("outputs", [1, 2, 17])
@pytest.mark.parametrize("more", [{}, {"l2": 0.1}, {"clip_norm": 0.2}, {"weight": True}])
def test_fit_is_a_loop_over_the_gradient(outputs, more, shuffle, rng):
    """With a last batch of its own size, so that what larger ones left behind must not count."""
    net = randomize(cr.mlp([5, 65, 3, outputs], activation="tanh", dtype="float64"), rng)
    X, y, dy, weight = problem(net, rng, 13)
    more = {**more, "weight": weight + 0.1} if "weight" in more else more
    expected = trained(copy.deepcopy(net), X, y, dy, "mse", 3, 5, shuffle, **more)
    more = {"sample_weight": more["weight"]} if "weight" in more else more
    net.fit(
        X, y, loss="mse", optimizer=cr.SGD(0.05), batch_size=5, epochs=3, seed=3, shuffle=shuffle, dy=dy,
        dy_weight=0.4, **more,
    )  # fmt: skip
    for name, value in expected.state_dict().items():
        assert_within(net.state_dict()[name], value, 1e-12 * size(value), name)


def test_weight_0_is_training_on_values(rng):
    net = randomize(cr.mlp([3, 9, 2], dtype="float64"), rng)
    other = copy.deepcopy(net)
    X, y, dy, _ = problem(net, rng, 20)
    net.fit(X, y, loss="mse", epochs=4, dy=dy, dy_weight=0)
    other.fit(X, y, loss="mse", epochs=4)
    for name, value in other.state_dict().items():
        assert_within(net.state_dict()[name], value, 1e-9, name)  # Adam divides by √v̂, where g is small too


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_for_any_threads_and_instruction_set(optimizer, dtype, on_threads, on_fused_isas, rng):
    X = rng.standard_normal((300, 20))
    y, dy = np.sin(X[:, :3]), rng.standard_normal((300, 3, 20))

    def run():
        net = cr.mlp([20, 65, 33, 3], activation="silu", seed=1, dtype=dtype)
        history = net.fit(X, y, loss="mse", optimizer=optimizer, batch_size=128, epochs=2, dy=dy, l1=1e-4)
        return np.concatenate([flat(net.state_dict()), np.array(history["loss"], dtype)])

    results = on_threads(run) + on_fused_isas(run)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_validation_is_of_values_alone(rng):
    net = randomize(cr.mlp([2, 6, 1], dtype="float64"), rng)
    X, y, dy, _ = problem(net, rng, 20)
    before = objective(net, X[:15], y[:15], dy[:15], 2.0, "mse", None)
    history = net.fit(
        X, y, loss="mse", optimizer=cr.SGD(1e-12), batch_size=20, dy=dy, dy_weight=2.0, validation_split=0.25
    )
    assert_within(history["loss"][0], before, 1e-9 * before)
    assert_within(history["val_loss"][0], net.evaluate(X[15:], y[15:], loss="mse"), 1e-12)


def test_slopes_teach_more_than_values(rng):
    """sin(x₁) x₂ from 24 points: with slopes, the error elsewhere is lower for every draw of the points, and
    on the (geometric) mean of five less than half of that without."""

    def ratio():
        X, T = rng.uniform(-2, 2, (24, 2)), rng.uniform(-2, 2, (1000, 2))
        y, wanted = np.sin(X[:, 0]) * X[:, 1], np.sin(T[:, 0]) * T[:, 1]
        dy = np.stack([np.cos(X[:, 0]) * X[:, 1], np.sin(X[:, 0])], axis=1)

        def error(**more):
            net = cr.mlp([2, 32, 32, 1], activation="tanh", seed=2)
            net.fit(X, y, loss="mse", optimizer=cr.Adam(0.005), batch_size=8, epochs=400, **more)
            return float(np.sqrt(np.mean((net(T)[:, 0] - wanted) ** 2)))

        return error(dy=dy) / error()

    ratios = [ratio() for _ in range(5)]
    assert max(ratios) < 1
    assert np.exp(np.mean(np.log(ratios))) < 1 / 2


def test_single_steps_know_no_slopes(rng):
    """The engine's own trainer, which would read the slopes of a batch that has none."""
    net = cr.mlp([2, 5, 1], dtype="float64")
    X, y, dy = rng.standard_normal((4, 2)), rng.standard_normal((4, 1)), rng.standard_normal((4, 1, 2))
    state = _core.Optimizer64(net._core, "sgd", [0.0, 0.0, 0.0, 0.0])
    how = _core.Loss("mse", 0.0, "mean", None)
    trainer = _core.Trainer64(
        net._core, state, how, X, y, None, 4, False, 0, 0.0, 0.0, 0.0, 0.0, dy=dy, dy_weight=1.0
    )
    before = net.state_dict()
    with pytest.raises(ValueError, match="slopes and clipped examples are for fit"):
        trainer.step(X, y, None, 0.1)
    assert all((value == before[name]).all() for name, value in net.state_dict().items())


def test_a_layer_of_ones_own_learns_slopes(rng):
    net = randomize(cr.Sequential(cr.Linear(2, 8), OwnTanh(), Gain(), cr.Linear(8, 1), dtype="float64"), rng)
    twin = copy.deepcopy(net)
    X, y, dy, _ = problem(net, rng, 10)
    net.fit(X, y, loss="mse", optimizer=cr.SGD(0.05), epochs=3, batch_size=5, seed=3, dy=dy, dy_weight=0.4)
    expected = trained(twin, X, y, dy, "mse", 3, 5, True).state_dict()
    for name, value in expected.items():
        assert_within(net.state_dict()[name], value, 1e-12 * size(value), name)


def test_a_loss_of_the_whole_batch(rng):
    check_gradient(
        randomize(cr.mlp([3, 5, 2], dtype="float64", activation="gelu"), rng), rng, own_mean, False
    )


def test_data_do_not_change(rng):
    net = cr.mlp([2, 3, 1])
    X, y, dy, _ = problem(net, rng)
    before = dy.copy()
    net.fit(X, y, loss="mse", dy=dy, epochs=2)
    assert_same_bits(dy, before)
    with pytest.raises(
        ValueError, match=re.escape("[fit] dy must be in range: expected finite numbers, got inf")
    ):
        net.fit(X, y, loss="mse", dy=np.where(dy == dy[3], np.inf, dy))


def test_slopes_of_weight_0_do_not_count(rng):
    """Even where their square overflows: 0 · ∞ = 0."""
    net = cr.mlp([3, 5, 2], activation="tanh", seed=0, dtype="float64")
    X, y, dy, weight = problem(net, rng)
    expected = net.value_and_grad(X, y, loss="mse", sample_weight=weight, dy=dy)
    dy[weight == 0] = 1e200
    value, grads = net.value_and_grad(X, y, loss="mse", sample_weight=weight, dy=dy)
    assert value == expected[0]
    for name, grad in grads.items():
        assert_same_bits(grad, expected[1][name])
    net.fit(X, y, loss="mse", sample_weight=weight, dy=dy, epochs=2)
