# SPDX-License-Identifier: MIT
"""Fifty steps beside PyTorch: the same weights and batches in, the same weights out."""

import numpy as np
import pytest

from chainrule import _core
from conftest import engine, layers_of, typed, values

torch = pytest.importorskip("torch")
F = torch.nn.functional
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
