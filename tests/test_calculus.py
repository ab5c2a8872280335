# SPDX-License-Identifier: MIT
"""Every derivative of a network against explicit Jacobians, finite differences and reference.py."""

import copy
import itertools
import math
import re
import threading

import numpy as np
import pytest

import chainrule as cr
from chainrule import losses, reference
from conftest import assert_same_bits, assert_within, eps
from test_own_parts import Affine, Gain, OwnTanh, Vandal, own_mean, own_mse

WIDTHS = [1, 2, 3, 7, 17, 64, 65]
ACTIVATIONS = [cr.Identity(), cr.Sigmoid(), cr.Tanh(), cr.ReLU(), cr.LeakyReLU(0.1), cr.ELU(0.8), cr.GELU(),
               cr.SiLU(), cr.Softplus(), cr.Softmax(), cr.LogSoftmax()]  # fmt: skip
SMOOTH = [a for a in ACTIVATIONS if not isinstance(a, (cr.ReLU, cr.LeakyReLU, cr.ELU))]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.op)
each_smooth = pytest.mark.parametrize("activation", SMOOTH, ids=lambda a: a.op)


def randomize(net, rng):
    """Weights N(0, 1/I), biases N(0, 1)."""
    for name, value in net.state_dict().items():
        spread = math.sqrt(value.shape[-1]) if value.ndim > 1 else 1
        net.load_state_dict({name: rng.standard_normal(value.shape) / spread}, strict=False)
    return net


def random_chain(rng, activation, others, depth, dtype="float64", widths=WIDTHS):
    """`depth` layers, `activation` among them, Linear ones with and without bias, dropout now and then."""
    width = int(rng.choice(widths))
    layers, place = [], int(rng.integers(depth))
    for index in range(depth):
        if index == place:
            layers.append(activation)
        elif index % 2 == 0 or rng.integers(3) == 0:
            out = int(rng.choice(widths))
            layers.append(cr.Linear(width, out, bias=bool(rng.integers(2))))
            width = out
        else:
            layers.append(others[int(rng.integers(len(others)))])
    if not any(isinstance(layer, cr.Linear) for layer in layers):
        layers.insert(int(rng.integers(len(layers) + 1)), cr.Linear(width, int(rng.choice(widths))))
    layers.insert(int(rng.integers(len(layers) + 1)), cr.Dropout(0.5))
    return randomize(cr.Sequential(*layers, dtype=dtype), rng)


def twin(net):
    """The same network in reference.py."""
    state = {name: value.astype(float) for name, value in net.state_dict().items()}
    links = []
    for index, layer in enumerate(net):
        if isinstance(layer, cr.Linear):
            links.append(reference.Linear(state[f"{index}.weight"], state.get(f"{index}.bias")))
        else:
            links.append(
                reference.Dropout() if layer.op == "dropout" else reference.Op(layer.op, layer._param)
            )
    return reference.Network(links)


def explicit_jacobians(net, x):
    """J_φˡ⁻¹[φˡ] of every layer for one row x: unit rows through the reference's vjp."""
    own = twin(net)
    phi = own.forward(x[None, :])
    for link, a, b in zip(own.layers, phi[:-1], phi[1:], strict=True):
        rows = np.eye(b.shape[1])
        yield link.vjp(rows, np.repeat(a, len(rows), 0), np.repeat(b, len(rows), 0))[0]


def away_from_kinks(net, X, least=1e-4):
    """Whether no activation with a kink gets an input too near to it."""
    phi = net.trace(X).phi
    return not any(
        isinstance(layer, (cr.ReLU, cr.LeakyReLU, cr.ELU)) and np.abs(phi[index]).min() < least
        for index, layer in enumerate(net)
    )


def sides(net, X):
    """On which side of their kinks all inputs of activations with a kink are, in one vector."""
    kinked = (cr.ReLU, cr.LeakyReLU, cr.ELU)
    inputs = [phi for layer, phi in zip(net, net.trace(X).phi, strict=False) if isinstance(layer, kinked)]
    return np.sign(np.concatenate([np.zeros(0), *(phi.ravel() for phi in inputs)]))


def direction(net, rng):
    return {name: rng.standard_normal(value.shape) for name, value in net.state_dict().items()}


def moved(net, v, h):
    """A copy of the network whose parameters have gone h along v."""
    other = copy.deepcopy(net)
    other.load_state_dict({name: value + h * v[name] for name, value in net.state_dict().items()})
    return other


def flat(grads):
    return np.concatenate([g.ravel() for g in grads.values()])


def size(*arrays):
    return max(1.0, *(float(np.abs(a).max(initial=0)) for a in arrays))


# ---- first order -------------------------------------------------------------------------------------------


@each_activation
@pytest.mark.parametrize("depth", range(1, 9))
def test_jacobian_is_the_product_of_the_layers_jacobians(activation, depth, rng):
    """Order, transposition, or a layer left out; both modes, against each layer's explicit matrix.

    Bound: a rounding a term and a few a layer, of terms no larger than the product of absolute values.
    """
    net = random_chain(rng, activation, ACTIVATIONS, depth)
    X = rng.standard_normal((3, net.in_features))
    reverse, forward = (cr.jacobian(net, X, mode=mode) for mode in ("reverse", "forward"))
    for x, by_rows, by_columns in zip(X, reverse, forward, strict=True):
        product = bound = np.eye(net.in_features)
        for j in explicit_jacobians(net, x):
            product, bound = j @ product, (np.abs(j) + 1e-3) @ bound
        bound = 1e-13 * (bound + 1) * (size(*net.trace(X).phi) + 1) * len(net)
        assert_within(by_rows, product, bound, f"reverse, {net!r} ")
        assert_within(by_columns, product, bound, f"forward, {net!r} ")
        assert_within(cr.jacobian(net, x), product, bound)


@each_activation
@pytest.mark.parametrize("depth", range(1, 9))
def test_jacobian_is_the_slope_of_the_outputs(activation, depth, rng):
    """What engine and reference both have wrong: differences, to 1e-7 of the largest slope.

    (8 (f(x+h) − f(x−h)) − (f(x+2h) − f(x−2h))) / 12h = f′ + O(h⁴), of values that carry a rounding of ε φ/h.
    """
    net, h = random_chain(rng, activation, ACTIVATIONS, depth), 1e-4
    steps = h * np.eye(net.in_features)[:: 1 + net.in_features // 7]
    X = rng.standard_normal((2, net.in_features))
    while any((sides(net, X + 2 * e) != sides(net, X - 2 * e)).any() for e in steps):
        X = rng.standard_normal(X.shape)
    J, hidden = cr.jacobian(net, X), 1e-15 * size(*net.trace(X).phi) / h
    for e in steps:
        near, far = (net(X + k * e) - net(X - k * e) for k in (1, 2))
        slope, right = (8 * near - far) / (12 * h), J[:, :, e.argmax()]
        assert np.abs(right - slope).max() <= 1e-7 * np.abs(J).max() + hidden, net


@each_activation
@pytest.mark.parametrize("depth", range(1, 9))
def test_both_modes_are_transposes(activation, depth, rng):
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩ to 1e-14, in the inputs and in the parameters.

    Relative to the products that are summed: for the inputs |u| |Jᴸ| ⋯ |J¹| |v|, as terms may cancel in the
    chain already; for the parameters what stands in the two sums. 2000 chains had 4e-16 and 9e-16 at most.
    """
    net = random_chain(rng, activation, ACTIVATIONS, depth)
    X, v = rng.standard_normal((2, net.in_features)), direction(net, rng)
    t, c = rng.standard_normal(X.shape), rng.standard_normal((2, net.out_features))
    f, df = cr.jvp(net, X, t)
    again, down, grads = cr.vjp(net, X, c, params=True)
    assert_same_bits(f, net(X))
    assert_same_bits(f, again)
    scale = 0.0
    for x, u, column in zip(X, c, t, strict=True):
        column = np.abs(column)
        for j in explicit_jacobians(net, x):
            column = np.abs(j) @ column
        scale += np.abs(u) @ column
    assert abs((c * df).sum() - (down * t).sum()) <= 1e-14 * scale, net
    along = cr.jvp(net, X, dparams=v)[1]
    left, right = c * along, [grads[k] * v[k] for k in v]
    scale = np.abs(left).sum() + sum(np.abs(term).sum() for term in right)
    assert abs(left.sum() - sum(term.sum() for term in right)) <= 1e-14 * scale, net
    both = cr.jvp(net, X, t, v)[1]  # linear: the tangents add
    assert_within(both, df + along, 1e-13 * size(df, along) * size(*net.trace(X).phi))


@each_activation
def test_tangent_of_inputs_and_parameters_equals_reference(activation, dtype, rng):
    for depth in (2, 4, 7):
        net = random_chain(rng, activation, ACTIVATIONS, depth, dtype=dtype.name)
        own = twin(net)
        X, dX, v = *rng.standard_normal((2, 5, net.in_features)).astype(dtype), direction(net, rng)
        v = {k: d.astype(dtype) for k, d in v.items()}
        dots = own.tangent(
            own.forward(X.astype(float)), dX.astype(float), [d.astype(float) for d in v.values()]
        )
        bound = 3e3 * eps(dtype) * size(*dots) * size(*net.trace(X).phi)
        assert_within(cr.jvp(net, X, dX, v)[1], dots[-1], bound, f"{net!r} ")
        # linear in both; a missing parameter and a missing dX count as 0
        apart = cr.jvp(net, X, dX)[1] + cr.jvp(net, X, dparams=v)[1]
        assert_within(cr.jvp(net, X, dX, v)[1], apart, bound)
        assert (cr.jvp(net, X, np.zeros_like(X), {})[1] == 0).all()
        assert (cr.jvp(net, X)[1] == 0).all()


def test_gradients_are_those_of_training(dtype, rng):
    """The tape's gradient and the training step's have the same bits: one set of kernels, one order of sums.

    1500 rows are more than the tape takes at once. A caller's value_and_grad goes through the tape; so asked,
    the engine goes through the step.
    """
    for sizes, rows in (([7, 65, 3], 3), ([20, 64, 64, 10], 600), ([784, 17, 5], 1500)):
        net = randomize(cr.mlp(sizes, activation="gelu", dtype=dtype.name), rng)
        X, y = rng.standard_normal((rows, sizes[0])).astype(dtype), rng.standard_normal((rows, sizes[-1]))
        rule = losses.LeastSquares()
        step = net._core.value_and_grad(X, y.astype(dtype), None, rule.engine(False, False))[1]
        by_tape = (
            net.value_and_grad(X, y.astype(dtype), loss=rule)[1],
            cr.vjp(net, X, rule(net(X), y)[1], params=True)[2],
        )
        for grads in by_tape:
            for expected, (name, grad) in zip(step, grads.items(), strict=True):
                assert_same_bits(grad, expected, name)


@each_smooth
def test_input_gradient_is_the_slope_of_the_loss(activation, rng):
    h = 1e-6
    net = random_chain(rng, activation, SMOOTH, 4)
    X, y, w = (
        rng.standard_normal((7, net.in_features)),
        rng.standard_normal((7, net.out_features)),
        rng.random(7),
    )
    t = rng.standard_normal(X.shape)
    for loss in (cr.MSE(), cr.LeastSquares(reduction="sum"), cr.Huber(3.0)):
        ends = [net.evaluate(X + s * t, y, loss=loss, sample_weight=w) for s in (h, -h)]
        slope = (cr.input_gradient(net, X, y, loss, sample_weight=w) * t).sum()
        assert slope == pytest.approx(
            (ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-7 * size(*net.trace(X).phi) ** 2
        )
    rows = cr.input_gradient(net, X, y, "mse")
    parts = [cr.input_gradient(net, X[i : i + 1], y[i : i + 1], "mse") for i in range(7)]
    np.testing.assert_allclose(rows, np.concatenate(parts) / 7, rtol=1e-12, atol=1e-14)


def test_sensitivity_is_a_column(rng):
    net = random_chain(rng, cr.Tanh(), SMOOTH, 5)
    X, y = rng.standard_normal((6, net.in_features)), rng.standard_normal((6, net.out_features))
    J = cr.jacobian(net, X)
    for d in {0, net.in_features // 2, net.in_features - 1}:
        np.testing.assert_allclose(cr.sensitivity(net, X, d), J[:, :, d], rtol=1e-11, atol=1e-13 * size(J))
        for loss in (cr.MSE(), cr.MSE(reduction="sum"), own_mse, own_mean):
            by_rows = np.concatenate(
                [cr.input_gradient(net, X[i : i + 1], y[i : i + 1], "mse") for i in range(6)]
            )
            got = cr.sensitivity(net, X, d, y=y, loss=loss)
            np.testing.assert_allclose(got, by_rows[:, d], rtol=1e-10, atol=1e-12 * size(by_rows))


def test_classes_and_probabilities(rng):
    """Labels reach the engine as indices, in every function that takes a loss."""
    net = randomize(cr.mlp([5, 9, 4], activation="tanh", dtype="float64"), rng)
    X, y, v = rng.standard_normal((8, 5)), rng.integers(0, 4, 8), direction(net, rng)
    p = np.eye(4)[y]
    for ask in (cr.input_gradient, cr.per_example_grad_norms, lambda *a: flat(cr.hvp(*a, v)),
                lambda *a: flat(cr.gauss_newton_product(*a, v)), cr.hessian):  # fmt: skip
        np.testing.assert_allclose(
            ask(net, X, y, "cross_entropy"), ask(net, X, p, "cross_entropy"), rtol=1e-11, atol=1e-14
        )
    labels = [cr.sensitivity(net, X, 2, y=t, loss="cross_entropy") for t in (y, p, y.astype(np.int8))]
    np.testing.assert_allclose(labels[0], labels[1], rtol=1e-11, atol=1e-14)
    assert_same_bits(labels[0], labels[2])


# ---- one example at a time ---------------------------------------------------------------------------------


@each_activation
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_examples_add_up_to_the_batch(activation, reduction, rng):
    """Each example's gradient is that of a batch of one, all together are the batch's; and their lengths."""
    net = random_chain(rng, activation, ACTIVATIONS, 5)
    X, y = rng.standard_normal((11, net.in_features)), rng.standard_normal((11, net.out_features))
    loss = cr.MSE(reduction=reduction)
    each = cr.per_example_grads(net, X, y, loss)
    batch = net.value_and_grad(X, y, loss=loss)[1]
    for name, grads in each.items():
        whole = grads.sum(axis=0) / (11 if reduction == "mean" else 1)
        assert_within(whole, batch[name], 1e-14 * np.abs(grads).sum(axis=0) + 1e-300, name)
    for i in range(11):
        alone = net.value_and_grad(X[i : i + 1], y[i : i + 1], loss="mse")[1]
        for name, grads in each.items():
            assert_same_bits(grads[i], alone[name], name)
    norms = np.sqrt(sum((g.reshape(11, -1) ** 2).sum(axis=1) for g in each.values()))
    np.testing.assert_allclose(cr.per_example_grad_norms(net, X, y, loss), norms, rtol=1e-13)


@each_activation
def test_parameter_jacobian(activation, rng):
    """Row o is the gradient for the cotangent e_o; forward mode gives the same, by columns."""
    net = random_chain(rng, activation, ACTIVATIONS, 4, widths=[1, 3, 7])
    X = rng.standard_normal((3, net.in_features))
    J = cr.jacobian(net, X, wrt="parameters")
    for b in range(3):
        for o in range(net.out_features):
            grads = cr.vjp(net, X[b : b + 1], np.eye(net.out_features)[o : o + 1], params=True)[2]
            for name in grads:
                assert_same_bits(J[name][b, o], grads[name], name)
    for mode in ("auto", "forward"):
        alone = cr.jacobian(net, X[1], wrt="parameters", mode=mode)
        batch = cr.jacobian(net, X, wrt="parameters", mode=mode)
        for name in J:
            assert_same_bits(alone[name], batch[name][1], name)
    by_columns = cr.jacobian(net, X, wrt="parameters", mode="forward")
    for name in J:
        assert J[name].shape == by_columns[name].shape == (3, net.out_features, *net.state_dict()[name].shape)
        np.testing.assert_allclose(by_columns[name], J[name], rtol=1e-10, atol=1e-12 * size(*J.values()))


# ---- layers and losses of the user's own -------------------------------------------------------------------


class ExactTanh(OwnTanh):
    """With its second derivative."""

    def vjp_jvp(self, x, y, dy, dx, ddy, dparams):
        slope = (1 - y) * (1 + y)
        return ddy * slope - 2 * dy * y * slope * dx


class ExactAffine(Affine):
    """With tangents of its parameters, and the tangents of its vjp."""

    def jvp(self, x, y, dx, dparams=None):
        moved = dparams or {name: np.zeros_like(p) for name, p in self.params.items()}
        return dx @ self.params["A"].T + x @ moved["A"].T + moved["b"]

    def vjp_jvp(self, x, y, dy, dx, ddy, dparams):
        moved = dparams or {name: np.zeros_like(p) for name, p in self.params.items()}
        grads = {"A": ddy.T @ x + dy.T @ dx, "b": ddy.sum(axis=0)}
        return ddy @ self.params["A"] + dy @ moved["A"], grads


def own_and_built_in(affine, tanh, rng):
    own = cr.Sequential(affine(4, 6), tanh(), cr.Linear(6, 5), tanh(), affine(5, 3, seed=1), dtype="float64")
    built_in = cr.Sequential(
        cr.Linear(4, 6), cr.Tanh(), cr.Linear(6, 5), cr.Tanh(), cr.Linear(5, 3), dtype="float64"
    )
    built_in.load_state_dict(dict(zip(built_in.state_dict(), own.state_dict().values(), strict=True)))
    return own, built_in, rng.standard_normal((7, 4)), rng.standard_normal((7, 3))


@pytest.mark.parametrize("affine, tanh, digits", [(Affine, OwnTanh, 1e-8), (ExactAffine, ExactTanh, 1e-12)])
def test_own_layers_have_all_derivatives(affine, tanh, digits, rng):
    """Marshalling of every map; differences to the digits they have, exact methods to rounding."""
    own, built_in, X, y = own_and_built_in(affine, tanh, rng)
    c, dX = rng.standard_normal((7, 3)), rng.standard_normal((7, 4))
    v = direction(built_in, rng)
    named = dict(zip(own.state_dict(), v.values(), strict=True))

    def close(a, b, rtol=1e-12):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * size(b))

    for mode in ("forward", "reverse"):
        close(cr.jacobian(own, X, mode=mode), cr.jacobian(built_in, X, mode=mode))
    close(cr.jvp(own, X, dX)[1], cr.jvp(built_in, X, dX)[1])
    close(cr.jvp(own, X, dX, named)[1], cr.jvp(built_in, X, dX, v)[1], digits)
    for a, b in zip(
        cr.vjp(own, X, c, True)[2].values(), cr.vjp(built_in, X, c, True)[2].values(), strict=True
    ):
        close(a, b)
    close(cr.per_example_grad_norms(own, X, y, "mse"), cr.per_example_grad_norms(built_in, X, y, "mse"))
    for ask in (
        lambda net: cr.per_example_grads(net, X, y, "mse"),
        lambda net: cr.jacobian(net, X, "parameters"),
    ):
        for a, b in zip(ask(own).values(), ask(built_in).values(), strict=True):
            close(a, b)
    for product in (cr.hvp, cr.gauss_newton_product):
        for a, b in zip(
            *(product(net, X, y, "mse", d).values() for net, d in ((own, named), (built_in, v))), strict=True
        ):
            close(a, b, digits)
    close(cr.laplacian(own, X), cr.laplacian(built_in, X), 1e-8)
    trace = own.trace(X).backward(c)
    close(trace.dphi[0], cr.vjp(built_in, X, c)[1])


def test_own_layers_may_spoil_what_they_are_given(rng):
    nets = [
        cr.Sequential(cr.Linear(3, 4), kind(), cr.Linear(4, 2), kind(), dtype="float64")
        for kind in (Vandal, OwnTanh)
    ]
    X, y, v = rng.standard_normal((5, 3)), rng.standard_normal((5, 2)), direction(nets[0], rng)
    for ask in (lambda n: cr.jacobian(n, X, mode="forward"), lambda n: cr.jacobian(n, X, mode="reverse"),
                lambda n: cr.laplacian(n, X), lambda n: flat(cr.hvp(n, X, y, "mse", v))):  # fmt: skip
        assert_same_bits(*map(ask, nets))


def test_a_difference_leaves_the_layer_alone(rng):
    """Parameters are moved in a copy: an error, or another thread, never sees them moved."""
    layer = Gain(2.0)
    net = cr.Sequential(layer, cr.Linear(3, 1), dtype="float64")
    params = layer.params
    X = rng.standard_normal((4, 3))
    assert_within(cr.jvp(net, X, dparams={"0.g": np.ones(())})[1], X @ net.state_dict()["1.weight"].T, 1e-9)
    assert layer.params is params and params["g"] == 2.0


@pytest.mark.parametrize("own", [own_mse, own_mean])
def test_own_losses_have_all_derivatives(own, rng):
    """A loss of values (B,), one of a single number: H_L by differences, each example's gradient exactly."""
    net = randomize(cr.mlp([4, 6, 3], activation="tanh", dtype="float64"), rng)
    X, y, v = rng.standard_normal((7, 4)), rng.standard_normal((7, 3)), direction(net, rng)
    np.testing.assert_allclose(
        cr.input_gradient(net, X, y, own), cr.input_gradient(net, X, y, "mse"), rtol=1e-12
    )
    for product in (cr.hvp, cr.gauss_newton_product):
        for a, b in zip(*(product(net, X, y, loss, v).values() for loss in (own, "mse")), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    for a, b in zip(*(cr.per_example_grads(net, X, y, loss).values() for loss in (own, "mse")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    norms = [cr.per_example_grad_norms(net, X, y, loss) for loss in (own, "mse")]
    np.testing.assert_allclose(*norms, rtol=1e-12)


def test_a_wrong_own_map_is_named(rng):
    class Short(OwnTanh):
        def jvp(self, x, y, dx):
            return dx[:, :1]

    class Without(cr.Layer):
        def forward(self, x):
            return x

        def vjp(self, x, y, dy):
            return dy

    X = np.zeros((2, 3))
    with pytest.raises(ValueError, match=re.escape("[Short] jvp: expected shape (2, 3), got (2, 1)")):
        cr.jvp(cr.Sequential(cr.Linear(3, 3), Short()), X, X)
    with pytest.raises(NotImplementedError, match=re.escape("[Without] jvp must be defined")):
        cr.jvp(cr.Sequential(cr.Linear(3, 3), Without()), X, X)


# ---- the same numbers everywhere ---------------------------------------------------------------------------


def everything(net, X, y, v):
    """All derivatives, as a list of arrays."""
    c = np.ascontiguousarray(net(X)[:, ::-1])
    trace = net.trace(X).backward(c)
    return [
        *cr.jvp(net, X, X[::-1].copy(), v), *cr.vjp(net, X, c), *cr.vjp(net, X, c, True)[2].values(),
        cr.jacobian(net, X, mode="forward"), cr.jacobian(net, X, mode="reverse"), *trace.dphi,
        cr.input_gradient(net, X, y, "mse"), cr.per_example_grad_norms(net, X, y, "mse"),
        *cr.per_example_grads(net, X, y, "mse").values(), *cr.hvp(net, X, y, "mse", v).values(),
        *cr.gauss_newton_product(net, X, y, "mse", v).values(), cr.laplacian(net, X),
    ]  # fmt: skip


def case(rng, dtype, rows, sizes=(13, 65, 33, 5), activation="gelu"):
    net = randomize(cr.mlp(sizes, activation=activation, dtype=dtype.name), rng)
    X, y = (
        rng.standard_normal((rows, sizes[0])).astype(dtype),
        rng.standard_normal((rows, sizes[-1])).astype(dtype),
    )
    return net, X, y, {name: d.astype(dtype) for name, d in direction(net, rng).items()}


def test_threads_change_nothing(dtype, rng, on_threads):
    args = case(rng, dtype, 211)
    first, *others = on_threads(lambda: everything(*args), (1, 2, 3, 7))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)


@each_activation
def test_instruction_sets_agree_bit_for_bit(activation, dtype, rng, on_fused_isas):
    args = case(rng, dtype, 19, activation=activation)
    first, *others = on_fused_isas(lambda: everything(*args))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)


@each_activation
def test_a_row_does_not_know_its_batch(activation, isa, dtype, rng):
    """Where a row stands, how many there are, whether its example was cut in two (batches are 1024 rows)."""
    net, X, y, _ = case(rng, dtype, 230, sizes=(9, 17, 5), activation=activation)
    c, dX = rng.standard_normal((230, 5)).astype(dtype), rng.standard_normal((230, 9)).astype(dtype)
    loss = cr.MSE(reduction="sum")
    asked = [
        (lambda r: cr.jvp(net, X[r], dX[r])[1]), (lambda r: cr.vjp(net, X[r], c[r])[1]),
        (lambda r: cr.jacobian(net, X[r], mode="forward")),
        (lambda r: cr.jacobian(net, X[r], mode="reverse")),
        (lambda r: cr.laplacian(net, X[r])), (lambda r: cr.input_gradient(net, X[r], y[r], loss)),
        (lambda r: cr.per_example_grads(net, X[r], y[r], loss)["0.weight"]),
        (lambda r: cr.jacobian(net, X[r], wrt="parameters")["2.weight"]),
    ]  # fmt: skip
    for ask in asked:
        whole = ask(slice(None))
        for start, rows in ((0, 1), (113, 1), (204, 2), (100, 30), (229, 1)):
            assert_same_bits(
                ask(slice(start, start + rows)), whole[start : start + rows], f"{rows} from {start}"
            )


def test_float32_is_float64_rounded(rng):
    for activation in ACTIVATIONS:
        net, X, y, v = case(rng, np.dtype("float64"), 6, sizes=(7, 17, 9, 4), activation=activation)
        low = cr.mlp((7, 17, 9, 4), activation=activation)
        low.load_state_dict(net.state_dict())
        net.load_state_dict(low.state_dict())
        X32, y32, v32 = (
            X.astype(np.float32),
            y.astype(np.float32),
            {k: d.astype(np.float32) for k, d in v.items()},
        )
        exact = everything(
            net, X32.astype(float), y32.astype(float), {k: d.astype(float) for k, d in v32.items()}
        )
        for a, b in zip(everything(low, X32, y32, v32), exact, strict=True):
            assert a.dtype == np.float32
            assert np.abs(a - b).max() <= 3e-5 * size(b, *net.trace(X).phi), activation


def test_subnormal_numbers_keep_their_value():
    net = cr.Sequential(cr.Linear(2, 2, bias=False), cr.ReLU())
    net.load_state_dict({"0.weight": np.eye(2)})
    tiny = np.full((1, 2), 1e-40, np.float32)
    assert_same_bits(cr.jvp(net, np.ones((1, 2)), tiny)[1], tiny)
    assert_same_bits(cr.vjp(net, np.ones((1, 2)), tiny)[1], tiny)


def test_weights_that_changed_are_seen(rng):
    """The transposed copy of the first weights is made for derivatives only, and again after every change."""
    net = randomize(cr.mlp([20, 9, 2], dtype="float64"), rng)
    X, c, y = rng.standard_normal((3, 20)), rng.standard_normal((3, 2)), rng.standard_normal((3, 2))

    def right():
        return cr.vjp(net, X, c)[1], np.einsum("bo,boi->bi", c, cr.jacobian(net, X, mode="forward"))

    changes = [
        lambda: None,
        lambda: net.train_step(X, y, loss="mse", optimizer=cr.SGD(0.1)),
        lambda: net.fit(X, y, loss="mse", optimizer="adam", epochs=2, clip_norm=1.0),
        lambda: net.load_state_dict({"0.weight": rng.standard_normal((9, 20))}, strict=False),
        lambda: net._core.restore(snapshot),
    ]
    snapshot, seen = net._core.snapshot(), []
    for change in changes:
        change()
        np.testing.assert_allclose(*right(), rtol=1e-12, atol=1e-14)
        seen.append(right()[0])
    assert not any((a == b).all() for a, b in itertools.pairwise(seen))
    assert_same_bits(seen[0], seen[-1])


def test_python_threads_do_not_disturb_each_other(rng):
    """The network keeps memory for one caller at a time: a second one has its own."""
    args = case(rng, np.dtype("float32"), 64, sizes=(50, 128, 64, 5))
    expected, wrong = everything(*args), []

    def work():
        for _ in range(5):
            wrong.extend(not (a == b).all() for a, b in zip(everything(*args), expected, strict=True))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong and not any(wrong)


def test_nan_stays_in_its_row(rng):
    net, X, _, _ = case(rng, np.dtype("float64"), 5)
    X[2, 1] = math.nan
    for got in (cr.jacobian(net, X), cr.jvp(net, X, np.ones_like(X))[1], cr.laplacian(net, X)):
        bad = np.isnan(got).reshape(5, -1).any(axis=1)
        assert bad.tolist() == [False, False, True, False, False]


def test_no_rows_and_no_parameters(rng):
    net = cr.mlp([3, 4, 2])
    none = np.empty((0, 3), np.float32)
    assert cr.jacobian(net, none).shape == (0, 2, 3)
    assert [a.shape for a in cr.jvp(net, none, none)] == [(0, 2), (0, 2)]
    f, dX, grads = cr.vjp(net, none, np.empty((0, 2)), params=True)
    assert f.shape == (0, 2) and dX.shape == (0, 3) and not any(g.any() for g in grads.values())
    assert cr.laplacian(net, none).shape == (0, 2)
    bare = cr.Sequential(Cube())
    X = rng.standard_normal((4, 2))
    assert cr.hvp(bare, X, X, "mse", {}) == cr.per_example_grads(bare, X, X, "mse") == {}
    assert (cr.per_example_grad_norms(bare, X, X, "mse") == 0).all()
    assert cr.hessian(bare, X, X, "mse").shape == (0, 0)
    np.testing.assert_allclose(cr.input_hessian_diagonal(bare, X)[:, 0, 0], 6 * X[:, 0], rtol=1e-3, atol=1e-3)


class Cube(cr.Layer):
    """x³, a layer that stands alone."""

    in_features = 2

    def forward(self, x):
        return x**3

    def vjp(self, x, y, dy):
        return 3 * x**2 * dy

    def jvp(self, x, y, dx):
        return 3 * x**2 * dx


# ---- trace -------------------------------------------------------------------------------------------------


@each_activation
def test_trace_there_and_back(activation, rng):
    net = random_chain(rng, activation, ACTIVATIONS, 6)
    own = twin(net)
    X, c = rng.standard_normal((5, net.in_features)), rng.standard_normal((5, net.out_features))
    trace = net.trace(X)
    assert trace.dphi is None and trace.grads is None
    assert list(trace.z) == [index for index, layer in enumerate(net) if isinstance(layer, cr.Linear)]
    assert all(z is trace.phi[index + 1] for index, z in trace.z.items())
    assert trace.backward(c) is trace
    phi = own.forward(X)
    dphi, grads = own.backward(phi, c)
    bound = 1e-13 * size(*phi) * size(*dphi) * 10
    for ours, theirs in zip([*trace.phi, *trace.dphi], [*phi, *dphi], strict=True):
        assert_within(ours, theirs, bound)
    for (name, ours), theirs in zip(trace.grads.items(), grads, strict=True):
        assert_within(ours, theirs, 5 * bound, name)
    assert "and back" in repr(trace)
    again = trace.backward(2 * c).dphi[0]
    assert_same_bits(again, 2 * cr.vjp(net, X, c)[1])


def test_trace_belongs_to_its_weights(rng):
    net = cr.mlp([3, 4, 2], seed=1)
    trace = net.trace(np.ones((2, 3)))
    net.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match=re.escape("[backward] the network must be the one that was traced")):
        trace.backward(np.ones((2, 2)))
    assert trace.dphi is None


# ---- errors ------------------------------------------------------------------------------------------------

NET = cr.mlp([3, 4, 2], seed=0)
X5, Y5 = np.zeros((5, 3)), np.zeros((5, 2))
V = NET.state_dict()
NAN = math.nan
# fmt: off
ERRORS = [
    (lambda: cr.jvp(NET, X5[:, :2], X5), ValueError, "[jvp] X must have one column per input of the network"),
    (lambda: cr.jvp(NET, X5, X5[:4]), ValueError,
     "[jvp] dX must have a row for each row of X: expected shape (5, 3), got (4, 3)"),
    (lambda: cr.jvp(NET, X5, dparams={"0.wight": 1}), ValueError,
     "[jvp] dparams must name parameters: expected some of '0.weight', '0.bias', '2.weight', '2.bias', got"),
    (lambda: cr.jvp(NET, X5, dparams={"0.bias": np.ones(3)}), ValueError,
     "[jvp] dparams['0.bias'] must have the parameter's shape: expected (4,), got (3,)"),
    (lambda: cr.jvp(NET, X5, dparams={"0.bias": ["a"] * 4}), TypeError,
     "[jvp] dparams['0.bias'] must hold real numbers"),
    (lambda: cr.jvp(NET, X5, dparams=np.ones(3)), ValueError,
     "[jvp] dparams must be a dict like state_dict(), or all parameters in one vector: expected shape (26,)"),
    (lambda: cr.vjp(NET, X5, X5), ValueError,
     "[vjp] c must have a row for each row of X: expected shape (5, 2), got (5, 3)"),
    (lambda: cr.vjp(NET, X5, Y5, params=1), TypeError, "[vjp] params must be a bool"),
    (lambda: cr.vjp(NET, "abc", Y5), TypeError, "[vjp] X must hold real numbers"),
    (lambda: cr.jacobian(NET, X5, wrt="weights"), ValueError, "[jacobian] wrt must be a known name"),
    (lambda: cr.jacobian(NET, X5, mode="both"), ValueError, "[jacobian] mode must be a known name"),
    (lambda: cr.jacobian(NET, np.zeros(4)), ValueError, "[jacobian] X must be 2-D: expected (rows, 3)"),
    (lambda: cr.sensitivity(NET, X5, 3), ValueError,
     "[sensitivity] d must be a non-negative int: expected ≤ 2, got 3"),
    (lambda: cr.sensitivity(NET, X5, 0.5), TypeError, "[sensitivity] d must be a non-negative int"),
    (lambda: cr.sensitivity(NET, X5, 0, y=Y5), ValueError,
     "[sensitivity] y and loss belong together: expected both or neither, got y"),
    (lambda: cr.input_gradient(NET, X5, Y5[:4], "mse"), ValueError,
     "[input_gradient] y must have one row per row of X"),
    (lambda: cr.input_gradient(NET, X5 + NAN, Y5, "mse"), ValueError, "[input_gradient] X must be finite"),
    (lambda: cr.hvp(NET, X5, Y5 + NAN, "mse", V), ValueError,
     "[hvp] y must be in range: expected finite numbers, got nan in row 0"),
    (lambda: cr.hvp(NET, X5, Y5 - 1, "poisson", V), ValueError,
     "[hvp] y must be in range: expected counts ≥ 0"),
    (lambda: cr.hvp(NET, X5, [0, 1, 2, 0, 1], "cross_entropy", V), ValueError,
     "[hvp] y must be in range: expected labels 0 to 1, got 2 in row 2"),
    (lambda: cr.hvp(NET, X5, Y5, "mse", {"0.weight": np.ones((3, 4))}), ValueError,
     "[hvp] v['0.weight'] must have the parameter's shape: expected (4, 3), got (3, 4)"),
    (lambda: cr.hvp(NET, X5, Y5, "mse", np.ones(25)), ValueError,
     "[hvp] v must be a dict like state_dict(), or all parameters in one vector: expected shape (26,)"),
    (lambda: cr.hvp(NET, X5, Y5, "mse", V, sample_weight=-np.ones(5)), ValueError,
     "[hvp] sample_weight must be in range"),
    (lambda: cr.hvp(NET, X5, Y5, "msse", V), ValueError, "[hvp] loss must be a known name"),
    (lambda: cr.gauss_newton_product(NET, X5, Y5, "mse", {"x": 1}), ValueError,
     "[gauss_newton_product] v must name parameters"),
    (lambda: cr.per_example_grads(NET, X5[:0], Y5[:0], "mse"), ValueError,
     "[per_example_grads] X must not be empty"),
    (lambda: cr.hessian(cr.mlp([99, 60, 1]), np.zeros((1, 99)), [0.0], "mse"), ValueError,
     "[hessian] the matrix must be small: expected at most 5000 parameters, got 6061; use hvp"),
    (lambda: NET.trace(X5).backward(X5), ValueError,
     "[backward] dL_df must have a row for each row of X: expected shape (5, 2), got (5, 3)"),
    (lambda: cr.laplacian("net", X5), TypeError,
     "[laplacian] net must be a network: expected a Sequential, got 'net'"),
]
# fmt: on


@pytest.mark.parametrize("call, kind, text", ERRORS, ids=[text[:60] for _, _, text in ERRORS])
def test_errors(call, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        call()


def test_bfloat16_is_not_exact():
    net = cr.mlp([3, 4, 2], dtype="bfloat16")
    asked = [
        lambda: cr.jvp(net, X5, X5), lambda: cr.vjp(net, X5, Y5), lambda: cr.jacobian(net, X5),
        lambda: cr.input_gradient(net, X5, Y5, "mse"), lambda: cr.sensitivity(net, X5, 0),
        lambda: cr.per_example_grads(net, X5, Y5, "mse"), lambda: cr.hvp(net, X5, Y5, "mse", V),
        lambda: cr.per_example_grad_norms(net, X5, Y5, "mse"), lambda: cr.hessian(net, X5, Y5, "mse"),
        lambda: cr.gauss_newton_product(net, X5, Y5, "mse", V), lambda: cr.laplacian(net, X5),
        lambda: cr.input_hessian_diagonal(net, X5), lambda: net.trace(X5).backward(Y5),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(
            ValueError, match=r"derivatives are exact: expected dtype float32 or float64, got bfloat16"
        ):
            ask()


def test_what_does_not_fit_as_it_is_gives_the_same(rng):
    """Lists, other dtypes, other orders: converted once, with the same result."""
    net, X, y, v = case(rng, np.dtype("float32"), 4, sizes=(3, 5, 2))
    other = [
        X.astype(float).tolist(),
        np.asfortranarray(y),
        {k: d.astype(float).tolist() for k, d in v.items()},
    ]
    for a, b in zip(cr.jvp(net, X, X, v), cr.jvp(net, other[0], np.asfortranarray(X), other[2]), strict=True):
        assert_same_bits(a, b)
    for a, b in zip(
        cr.hvp(net, X, y, "mse", v).values(), cr.hvp(net, *other[:2], "mse", other[2]).values(), strict=True
    ):
        assert_same_bits(a, b)
    assert_same_bits(cr.vjp(net, X, y)[1], cr.vjp(net, other[0], other[1])[1])
    assert_same_bits(cr.laplacian(net, X), cr.laplacian(net, other[0]))
