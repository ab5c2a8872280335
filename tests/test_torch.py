# SPDX-License-Identifier: MIT
"""Beside PyTorch: fifty steps from the same weights to the same ones, and the derivatives of torch.func."""

import itertools

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core
from conftest import engine, layers_of, typed, values

torch = pytest.importorskip("torch")
F, func = torch.nn.functional, torch.func
# torch.func.jvp, at its first call, runs what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
torch.set_num_threads(1)  # on networks this small its threads would only wait for each other


def tensor(a):
    return torch.from_numpy(np.array(a))


LAYERS = layers_of([6, 15, 8, 4], "tanh", "silu")


def torch_net(net):
    """The same chain in PyTorch, with copies of the same parameters."""
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 15),
        torch.nn.Tanh(),
        torch.nn.Linear(15, 8),
        torch.nn.SiLU(),
        torch.nn.Linear(8, 4),
    ).double()
    with torch.no_grad():
        for p, value in zip(module.parameters(), values(net), strict=True):
            p.copy_(tensor(value))
    return module


@pytest.mark.parametrize("X, remedy", [
    (torch.ones(2, 6, requires_grad=True), ".detach()"),
    (torch.ones(2, 6, dtype=torch.bfloat16), ".float()"),
    ([torch.ones(6, requires_grad=True)] * 2, ".detach()"),
])  # fmt: skip
def test_tensors_that_numpy_does_not_take(X, remedy):
    with pytest.raises((TypeError, ValueError), match=r"^\[predict\] X must be an array: expected") as caught:
        cr.mlp([6, 1]).predict(X)
    assert str(caught.value).endswith(f"; use {remedy}")
    assert "rows of equal length" not in str(caught.value)


def pinball(f, y):
    return torch.maximum(0.3 * (y - f), -0.7 * (y - f)).mean()


LOSSES = {  # ours, with its parameter: PyTorch's, and what y is drawn from
    ("least_squares", 0.0): (lambda f, y: 0.5 * ((y - f) ** 2).sum(dim=1).mean(), "real"),
    ("mse", 0.0): (F.mse_loss, "real"),
    ("mae", 0.0): (F.l1_loss, "real"),
    ("huber", 0.6): (lambda f, y: F.huber_loss(f, y, delta=0.6), "real"),
    ("pinball", 0.3): (pinball, "real"),
    ("poisson", 0.0): (lambda f, y: F.poisson_nll_loss(f, y, log_input=True), "count"),
    ("gaussian_nll", 0.0): (lambda f, y: F.gaussian_nll_loss(f[:, :2], y, f[:, 2:].exp()), "pairs"),
    ("logistic", 0.0): (F.binary_cross_entropy_with_logits, "share"),
    ("cross_entropy", 0.0): (F.cross_entropy, "label"),
    ("cross_entropy", 1.0): (
        F.cross_entropy,
        "probability",
    ),  # the parameter is not used; it tells the rows apart
}

OPTIMIZERS = {
    "sgd": (0.05, "sgd", [0.0, 0.0, 0.0, 0.0], torch.optim.SGD, {}),
    "sgd, decay": (0.05, "sgd", [0.0, 0.0, 0.0, 0.1], torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (0.02, "sgd", [0.9, 0.3, 0.0, 0.01], torch.optim.SGD,
                 {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": (0.02, "sgd", [0.9, 0.0, 1.0, 0.01], torch.optim.SGD,
                 {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (0.003, "adam", [0.9, 0.999, 1e-8, 0.0], torch.optim.Adam, {}),
    "adam, decay": (0.003, "adam", [0.8, 0.95, 1e-6, 0.1], torch.optim.Adam,
                    {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw": (0.003, "adamw", [0.9, 0.999, 1e-8, 0.2], torch.optim.AdamW, {"weight_decay": 0.2}),
    "rmsprop": (0.001, "rmsprop", [0.99, 1e-8, 0.0, 0.0, 0.0], torch.optim.RMSprop, {}),
    "rmsprop, momentum": (0.001, "rmsprop", [0.9, 1e-6, 0.1, 0.5, 0.0], torch.optim.RMSprop,
                          {"alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1, "momentum": 0.5}),
    "rmsprop, centered": (0.001, "rmsprop", [0.9, 1e-6, 0.0, 0.5, 1.0], torch.optim.RMSprop,
                          {"alpha": 0.9, "eps": 1e-6, "momentum": 0.5, "centered": True}),
}  # fmt: skip


def targets(rng, kind, rows):
    if kind == "label":
        return rng.integers(0, 4, rows)
    if kind == "probability":
        p = rng.random((rows, 4))
        return p / p.sum(axis=1, keepdims=True)
    if kind == "count":
        return rng.poisson(1.5, (rows, 4)).astype(float)
    return (
        rng.random((rows, 4)) if kind == "share" else rng.standard_normal((rows, 2 if kind == "pairs" else 4))
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss[0])
def test_fifty_steps_beside_pytorch(loss, optimizer, rng):
    """A definition that differs from PyTorch's by a factor, a sign, an order of operations.

    Bound: rounding of 1e-16 a step, which 50 steps at these rates let grow by less than 10⁶.
    """
    criterion, kind = LOSSES[loss]
    lr, rule, hyper, other, keywords = OPTIMIZERS[optimizer]
    net = engine(LAYERS, np.float64, rng)
    module = torch_net(net)
    theirs = other(module.parameters(), lr=lr, **keywords)
    ours = typed("Optimizer", np.float64)(net, rule, hyper)
    x, y = rng.standard_normal((64, 6)), targets(rng, kind, 64)
    how = _core.Loss(loss[0], loss[1], "mean", None)
    trainer = typed("Trainer", np.float64)(net, ours, how, x, y, None, 16, False, 0, 0.0, 0.0, 0.0, 0.0)
    for step in range(50):
        rows = slice(step % 4 * 16, step % 4 * 16 + 16)
        got = trainer.step(np.ascontiguousarray(x[rows]), np.ascontiguousarray(y[rows]), None, lr)
        theirs.zero_grad()
        value = criterion(module(tensor(x[rows])), tensor(y[rows]))
        value.backward()
        theirs.step()
        assert got == pytest.approx(value.item(), rel=1e-9, abs=1e-9), f"step {step}"
    for ours_p, p in zip(values(net), module.parameters(), strict=True):
        np.testing.assert_allclose(ours_p, p.detach().numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_is_pytorchs(clip, rng):
    net = engine(LAYERS, np.float64, rng)
    module = torch_net(net)
    x, y = rng.standard_normal((16, 6)), rng.standard_normal((16, 4))
    theirs = torch.optim.SGD(module.parameters(), lr=0.1)
    ours = typed("Optimizer", np.float64)(net, "sgd", [0.0, 0.0, 0.0, 0.0])
    how, limits = _core.Loss("mse", 0.0, "mean", None), (0.0, 0.05) if clip == "norm" else (0.01, 0.0)
    trainer = typed("Trainer", np.float64)(net, ours, how, x, y, None, 16, False, 0, 0.0, 0.0, *limits)
    for _ in range(20):
        trainer.step(x, y, None, 0.1)
        theirs.zero_grad()
        F.mse_loss(module(tensor(x)), tensor(y)).backward()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05)
        else:
            torch.nn.utils.clip_grad_value_(module.parameters(), 0.01)
        theirs.step()
    for ours_p, p in zip(values(net), module.parameters(), strict=True):
        np.testing.assert_allclose(ours_p, p.detach().numpy(), rtol=0, atol=1e-12)


def test_every_loss_is_compared():
    assert {name for name, _ in LOSSES} == {name for kind, name, _ in _core.ops() if kind == "loss"}


# ---- derivatives ------------------------------------------------------------------------------------------

ACTIVATIONS = {  # name: ours, PyTorch's
    "identity": (cr.Identity(), lambda x: x),
    "sigmoid": (cr.Sigmoid(), torch.sigmoid),
    "tanh": (cr.Tanh(), torch.tanh),
    "relu": (cr.ReLU(), F.relu),
    "leaky_relu": (cr.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1)),
    "elu": (cr.ELU(0.8), lambda x: F.elu(x, 0.8)),
    "gelu": (cr.GELU(), F.gelu),
    "silu": (cr.SiLU(), F.silu),
    "softplus": (cr.Softplus(), F.softplus),
    "softmax": (cr.Softmax(), lambda x: F.softmax(x, dim=-1)),
    "log_softmax": (cr.LogSoftmax(), lambda x: F.log_softmax(x, dim=-1)),
}
OWN = {"huber": cr.Huber(0.6), "pinball": cr.Pinball(0.3)}  # those of LOSSES that have a parameter
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_shape = pytest.mark.parametrize("sizes", [(3, 4), (6, 9, 4), (40, 70, 33, 4)], ids=str)


def chain(sizes, activation, rng):
    """Linear layers, every second one without bias, and the activation behind each, the last included."""
    layers = []
    for k, (i, o) in enumerate(itertools.pairwise(sizes)):
        layers += [cr.Linear(i, o, bias=k % 2 == 0), ACTIVATIONS[activation][0]]
    net = cr.Sequential(*layers, dtype="float64")
    start = {
        name: rng.standard_normal(value.shape) / np.sqrt(value.shape[-1] if value.ndim > 1 else 1)
        for name, value in net.state_dict().items()
    }
    net.load_state_dict(start)
    return net


def function_of(net):
    """The same chain as PyTorch's function of (parameters by name, x); and these parameters."""

    def f(parameters, x):
        for k, layer in enumerate(net):
            if isinstance(layer, cr.Linear):
                x = F.linear(x, parameters[f"{k}.weight"], parameters.get(f"{k}.bias"))
            else:
                x = ACTIVATIONS[layer.op][1](x)
        return x

    return f, {name: tensor(value) for name, value in net.state_dict().items()}


def assert_agree(ours, theirs, what=""):
    """To 1e-10, and where numbers cancelled to 1e-12 of the largest.

    Sums of up to 70 products err by less than 70 roundings of 1e-16, and a few layers multiply that by a few.
    """
    want = theirs.detach().numpy()
    assert ours.shape == want.shape, what
    np.testing.assert_allclose(ours, want, rtol=1e-10, atol=1e-12 * np.abs(want).max(), err_msg=what)


def assert_agree_by_name(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert_agree(value, theirs[name], name)


def each_gradient(f, criterion, parameters, x, y):
    """The gradient of each row's own loss; by a loop, since not all of PyTorch's losses know vmap."""
    slopes = func.grad(lambda p, n: criterion(f(p, x[n : n + 1]), y[n : n + 1]))
    rows = [slopes(parameters, n) for n in range(len(x))]
    return {name: torch.stack([row[name] for row in rows]) for name in parameters}


def directions(net, rng):
    """One direction in the parameters, as ours and as theirs."""
    v = {name: rng.standard_normal(value.shape) for name, value in net.state_dict().items()}
    return v, {name: tensor(value) for name, value in v.items()}


@each_shape
@each_activation
def test_both_modes_are_those_of_torch_func(activation, sizes, rng):
    net = chain(sizes, activation, rng)
    f, parameters = function_of(net)
    X, dX = rng.standard_normal((2, 7, sizes[0]))
    c, (v, their_v) = rng.standard_normal((7, sizes[-1])), directions(net, rng)
    out, moved = func.jvp(lambda x, p: f(p, x), (tensor(X), parameters), (tensor(dX), their_v))
    ours = cr.jvp(net, X, dX, v)
    assert_agree(ours[0], out, "f")
    assert_agree(ours[1], moved, "jvp")
    _, pull = func.vjp(lambda x, p: f(p, x), tensor(X), parameters)
    dx, gradients = pull(tensor(c))
    ours = cr.vjp(net, X, c, params=True)
    assert_agree(ours[1], dx, "vjp")
    assert_agree_by_name(ours[2], gradients)


@each_shape
@each_activation
def test_jacobians_are_those_of_torch_func(activation, sizes, rng):
    net = chain(sizes, activation, rng)
    f, parameters = function_of(net)
    X = rng.standard_normal((7, sizes[0]))
    theirs = func.vmap(func.jacrev(lambda x: f(parameters, x)))(tensor(X))
    for mode in ("forward", "reverse"):
        assert_agree(cr.jacobian(net, X, mode=mode), theirs, mode)
    by_name = func.vmap(func.jacrev(f), in_dims=(None, 0))(parameters, tensor(X))
    assert_agree_by_name(cr.jacobian(net, X, wrt="parameters"), by_name)


@each_shape
@each_activation
def test_examples_and_curvature_are_those_of_torch_func(activation, sizes, rng):
    """Each example's gradient and norm; and H v, ours by forward over reverse, theirs by reverse twice."""
    net = chain(sizes, activation, rng)
    compare_with_loss(net, cr.CrossEntropy(), F.cross_entropy, rng.integers(0, 4, 7), rng)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss[0])
def test_every_loss_has_the_curvature_of_torch_func(loss, rng):
    criterion, kind = LOSSES[loss]
    net = chain((6, 15, 4), "tanh", rng)
    compare_with_loss(net, OWN.get(loss[0], loss[0]), criterion, targets(rng, kind, 7), rng)


def compare_with_loss(net, loss, criterion, y, rng):
    f, parameters = function_of(net)
    X, (v, their_v) = rng.standard_normal((len(y), net.in_features)), directions(net, rng)
    x, t = tensor(X), tensor(y)
    theirs = each_gradient(f, criterion, parameters, x, t)
    assert_agree_by_name(cr.per_example_grads(net, X, y, loss), theirs)
    squares = [g.flatten(1).square().sum(dim=1) for g in theirs.values()]
    assert_agree(cr.per_example_grad_norms(net, X, y, loss), sum(squares).sqrt(), "norms")
    gradient = func.grad(lambda p: criterion(f(p, x), t))

    def along(p):
        return sum((g * their_v[name]).sum() for name, g in gradient(p).items())

    assert_agree_by_name(cr.hvp(net, X, y, loss, v), func.grad(along)(parameters))


def test_every_activation_is_compared():
    ops = {name for kind, name, _ in _core.ops() if kind in ("elementwise", "rowwise")}
    assert set(ACTIVATIONS) == ops
