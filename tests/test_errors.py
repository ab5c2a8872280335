# SPDX-License-Identifier: MIT
"""Bad arguments: the right exception, one form of message, nothing changed. Odd ones: taken, with the same result."""
# ruff: noqa: E501 (a table has one row a line)

import copy
import decimal
import fractions
import math
import re

import numpy as np
import pandas as pd
import pytest
from numpy.lib.stride_tricks import as_strided
from scipy import sparse

import chainrule as cr
from chainrule import losses, optim
from conftest import assert_same_bits

FORM = re.compile(r"^\[[\w]+\] .+: expected .+, got .+", re.DOTALL)

X = np.linspace(-1, 1, 36).reshape(12, 3)
Y = np.linspace(0, 1, 24).reshape(12, 2)
LABELS = np.arange(12) % 2
SLOPES = np.linspace(-1, 2, 72).reshape(12, 2, 3)
NAN, INF = math.nan, math.inf
OTHER = cr.mlp([3, 4, 2], seed=9).state_dict()  # weights to load that would be seen


def at(array, row, column, value):
    """A copy of a matrix with one element changed."""
    changed = np.array(array, dtype=float)
    changed[row, column] = value
    return changed


class Clipped(cr.ReLU):
    def forward(self, x):
        return np.clip(x, 0, 6)


class Halved(cr.MSE):
    pass


class Slow(cr.Adam):
    pass


class Stubborn:
    """As a tensor that wants a gradient."""

    def __array__(self, *args, **more):
        raise RuntimeError("wants a gradient")


class Backward(cr.Layer):
    def forward(self, x):
        return Stubborn()

    def vjp(self, x, y, dy):
        return dy


class Known(Backward):
    in_features = 3

    def forward(self, x):
        return x


class Stage:
    """A network with two outputs, and an optimizer that has already trained it: what no error may change."""

    def __init__(self):
        self.net = cr.mlp([3, 4, 2], seed=1)
        self.one = cr.mlp([3, 4, 1], seed=2)
        self.adam = cr.Adam()
        self.net.fit(X, Y, loss="mse", optimizer=self.adam, epochs=2)

    def fit(self, X=X, y=Y, loss="mse", **more):
        return self.net.fit(X, y, loss=loss, optimizer=more.pop("optimizer", self.adam), **more)

    def classify(self, y=LABELS, **more):
        return self.fit(y=y, loss="cross_entropy", **more)

    def step(self, X=X, y=Y, loss="mse", **more):
        return self.net.train_step(X, y, loss=loss, optimizer=more.pop("optimizer", self.adam), **more)

    def bits(self):
        state = self.adam.state_dict(self.net)
        weights = [*self.net.state_dict().values(), *self.one.state_dict().values()]
        return [*weights, *state["slots"]], state["step"]


class Own(cr.Layer):
    def forward(self, x):
        return x

    def vjp(self, x, y, dy):
        return dy


class Shift(Own):
    def __init__(self):
        self.params = {"a": np.ones(2)}


class WithoutVjp(cr.Layer):
    def forward(self, x):
        return x


class Widening(Own):
    def out_features(self, in_features):
        return 2.5


class NoDict(Own):
    params = (1, 2)


class BadName(Own):
    def __init__(self):
        self.params = {"a.b": np.ones(2)}


class BadValue(Own):
    def __init__(self):
        self.params = {"a": np.array([1.0, NAN])}


class BadKind(Own):
    def __init__(self):
        self.params = {"a": np.array(["x"])}


class RatesOf(optim.Schedule):
    def __init__(self, answer):
        self.answer = answer

    def rates(self, lr, epoch, epochs, steps):
        return self.answer


# fmt: off
LAYERS = [
    (lambda s: cr.Sequential(cr.Linear(3, 2), Clipped()), TypeError, "[Clipped] built-in layers are complete, their maps are the engine's: expected a subclass of cr.Layer, got one of theirs"),
    (lambda s: cr.Linear(-3, 1), ValueError, "[Linear] in_features must be a positive int: expected ≥ 1, got -3"),
    (lambda s: cr.Linear(0, 1), ValueError, "[Linear] in_features must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.Linear(3, 0), ValueError, "[Linear] out_features must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.Linear(2.0, 1), TypeError, "[Linear] in_features must be a positive int: expected an int, got 2.0 (float)"),
    (lambda s: cr.Linear(True, 1), TypeError, "expected an int, got True (bool)"),
    (lambda s: cr.Linear(np.True_, 1), TypeError, "expected an int"),
    (lambda s: cr.Linear("3", 1), TypeError, "expected an int, got '3' (str)"),
    (lambda s: cr.Linear(None, 1), TypeError, "expected an int, got None (NoneType)"),
    (lambda s: cr.Linear(2**70, 1), ValueError, "expected ≤ 9223372036854775807, got 1180591620717411303424"),
    (lambda s: cr.Linear(3, 1, bias=1), TypeError, "[Linear] bias must be a bool: expected True or False, got 1"),
    (lambda s: cr.Linear(3, 1, init="he"), ValueError, "[Linear] init must be a known name: expected one of 'auto', 'glorot_uniform'"),
    (lambda s: cr.Linear(3, 1, init=None), TypeError, "[Linear] init must be a string: expected one of 'auto'"),
    (lambda s: cr.LeakyReLU(-0.1), ValueError, "[LeakyReLU] negative_slope must be a finite number: expected ≥ 0, got -0.1"),
    (lambda s: cr.LeakyReLU(NAN), ValueError, "[LeakyReLU] negative_slope must be a finite number: expected ≥ 0, got nan"),
    (lambda s: cr.LeakyReLU("0.1"), TypeError, "[LeakyReLU] negative_slope must be a number: expected a float, got '0.1' (str)"),
    (lambda s: cr.ELU(0), ValueError, "[ELU] alpha must be a finite number: expected > 0, got 0"),
    (lambda s: cr.ELU(INF), ValueError, "[ELU] alpha must be a finite number: expected > 0, got inf"),
    (lambda s: cr.ELU(True), TypeError, "[ELU] alpha must be a number: expected a float, got True (bool)"),
    (lambda s: cr.Dropout(1.0), ValueError, "[Dropout] p must be a finite number: expected ≥ 0 and < 1, got 1.0"),
    (lambda s: cr.Dropout(-0.1), ValueError, "[Dropout] p must be a finite number: expected ≥ 0 and < 1, got -0.1"),
    (lambda s: cr.Dropout(decimal.Decimal("0.5")), TypeError, "[Dropout] p must be a number: expected a float"),
    (lambda s: cr.Linear(3, 1).forward(X), TypeError, "[Linear] a layer has no weights of its own: expected a network"),
    (lambda s: setattr(cr.ELU(), "alpha", 2.0), AttributeError, "[ELU] alpha is read-only: expected no assignment, got one; make a new ELU"),
]

NETWORKS = [
    (lambda s: cr.Sequential(), ValueError, "the number of inputs must be known: expected a Linear layer or an in_features, got 0 layers"),
    (lambda s: cr.Sequential(cr.ReLU()), ValueError, "expected a Linear layer or an in_features, got 1 layers without"),
    (lambda s: cr.Sequential([cr.Linear(3, 1)]), TypeError, "[Sequential] layer 0 must be a layer: expected a Layer, got [Linear(3, 1)]"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), "relu"), TypeError, "[Sequential] layer 1 must be a layer: expected a Layer, got 'relu'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), cr.ReLU), TypeError, "[Sequential] layer 1 must be a layer: expected ReLU(...), got the class"),
    (lambda s: cr.Sequential(cr.Linear(3, 4), cr.Tanh(), cr.Linear(5, 1)), ValueError,
     "[Sequential] layer 2, Linear(5, 1), must fit the layers before it: expected in_features=4, got 5"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), seed=-1), ValueError, "[Sequential] seed must be a non-negative int: expected ≥ 0, got -1"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), seed=2**64), ValueError, "expected ≤ 18446744073709551615, got 18446744073709551616"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), seed=None), TypeError, "[Sequential] seed must be a non-negative int: expected an int, got None"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), seed=0.5), TypeError, "expected an int, got 0.5 (float)"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), dtype="float16"), ValueError, "[Sequential] dtype must be a float type: expected one of 'float32', 'float64', 'bfloat16', 'tf32'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), dtype=int), ValueError, "expected one of 'float32', 'float64', 'bfloat16', 'tf32', got <class 'int'>"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), dtype=None), ValueError, "expected one of 'float32', 'float64', 'bfloat16', 'tf32', got None"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), dtype="real"), ValueError, "expected one of 'float32', 'float64', 'bfloat16', 'tf32', got 'real'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), device="gpu"), ValueError,
     "[Sequential] device must be known: expected 'cpu', 'cuda', 'cuda:1' and so on, or 'auto', got 'gpu'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), device="cuda:-1"), ValueError, "or 'auto', got 'cuda:-1'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), device=0), TypeError, "or 'auto', got 0"),
    (lambda s: cr.mlp([3, 1], device=None), TypeError, "[Sequential] device must be known: expected 'cpu', 'cuda', 'cuda:1' and so on, or 'auto', got None"),
    (lambda s: cr.mlp([3, 1], device="CPU"), ValueError, "[Sequential] device must be known"),
    (lambda s: s.net.to("disk"), ValueError, "[to] device must be known"),
    (lambda s: cr.Sequential.from_config(s.net.config(), "disk"), ValueError, "[from_config] device must be known"),
    (lambda s: cr.load("net.safetensors", "disk"), ValueError, "[load] device must be known"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), dtype="tf32"), ValueError,
     "[Sequential] dtype 'tf32' is of GPUs: expected device='cuda', got 'cpu'; use 'float32'"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), WithoutVjp()), TypeError, "[WithoutVjp] vjp must be defined: expected a method, got none"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), cr.Layer()), TypeError, "[Layer] forward must be defined: expected a method, got none"),
    (lambda s: cr.Sequential(cr.Linear(3, 1), Widening()), TypeError, "[Widening] out_features must be a positive int: expected an int, got 2.5"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), NoDict()), TypeError, "[NoDict] params must be a dict: expected {name: array}, got (1, 2)"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), BadName()), ValueError, "[BadName] params must have plain names: expected text without a dot, got 'a.b'"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), BadValue()), ValueError, "[BadValue] params['a'] must hold finite numbers"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), BadKind()), TypeError, "[BadKind] params['a'] must hold real numbers: expected floats, got <U1"),
    (lambda s: cr.mlp([3]), ValueError, "[mlp] sizes must name inputs and outputs: expected at least two, got [3]"),
    (lambda s: cr.mlp(3), TypeError, "expected at least two, got 3"),
    (lambda s: cr.mlp(None), TypeError, "[mlp] sizes must name inputs and outputs: expected at least two, got None"),
    (lambda s: cr.mlp("34"), TypeError, "expected at least two, got '34'"),
    (lambda s: cr.mlp([3, 0, 1]), ValueError, "[mlp] sizes[1] must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.mlp([3, 4, 1], activation="ReLU"), ValueError, "[mlp] activation must be a known name: expected one of 'identity', 'sigmoid'"),
    (lambda s: cr.mlp([3, 4, 1], activation=cr.ReLU), TypeError, "[mlp] activation must be a string"),
    (lambda s: cr.mlp([3, 4, 1], output_activation=1), TypeError, "[mlp] output_activation must be a string"),
    (lambda s: cr.mlp([3, 4, 1], dropout=1), ValueError, "[Dropout] p must be a finite number"),
    (lambda s: cr.mlp([3, 4, 1], init="best"), ValueError, "[Linear] init must be a known name"),
    (lambda s: cr.Sequential.from_config({}), ValueError, "[from_config] config must hold layers: expected {'layers': [...]}, got {}"),
    (lambda s: cr.Sequential.from_config([]), ValueError, "[from_config] config must hold layers"),
    (lambda s: cr.Sequential.from_config({"layers": [{"in_features": 3}]}), ValueError, "[from_config] a layer must name its class"),
    (lambda s: cr.Sequential.from_config({"layers": [{"class": "Conv2d"}]}), ValueError, "[from_config] class must be a known layer"),
    (lambda s: cr.Sequential.from_config({"layers": [{"class": "Guard"}]}), ValueError, "got 'Guard'"),
    (lambda s: cr.Sequential.from_config({"layers": [{"class": "ReLU", "x": 1}]}), ValueError,
     "[from_config] arguments of ReLU must be its constructor's: expected none, got 'x'"),
    (lambda s: cr.Sequential.from_config({"layers": [{"class": "Linear", "in_features": 1}]}), ValueError,
     "expected 'in_features', 'out_features', 'bias', 'init', got 'in_features'"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), Own()).config(), TypeError, "[save] layer Own must describe itself: expected a method config()"),
    (lambda s: s.net.load_state_dict([]), TypeError, "[load_state_dict] state must be a dict: expected {name: array}, got []"),
    (lambda s: s.net.load_state_dict({}), ValueError, "got missing '0.weight', '0.bias', '2.weight', '2.bias'"),
    (lambda s: s.net.load_state_dict({**OTHER, "x": 1}), ValueError,
     "[load_state_dict] state must fit the network: expected its names and shapes, got unexpected 'x'"),
    (lambda s: s.net.load_state_dict({**OTHER, "0.weight": np.zeros((3, 4))}), ValueError, "0.weight of shape (3, 4) instead of (4, 3)"),
    (lambda s: s.net.load_state_dict({"0.weight": np.zeros((4, 3)), "2.bias": np.zeros(3)}, strict=False), ValueError, "2.bias of shape (3,) instead of (2,)"),
    (lambda s: s.net.load_state_dict({**OTHER, "0.bias": ["a"] * 4}), TypeError, "[load_state_dict] 0.bias must hold real numbers"),
    (lambda s: s.net.load_state_dict({**OTHER, "2.bias": [1e300, 0]}), ValueError, "[load_state_dict] 2.bias must fit in float32"),
    (lambda s: s.net.load_state_dict(OTHER, strict=1), TypeError, "[load_state_dict] strict must be a bool"),
    (lambda s: cr.Sequential(cr.Linear(2**40, 2**40)), MemoryError,
     "[Sequential] the weights must fit in memory: expected fewer of them, got 1,208,925,819,615,728,686,333,952"),
    (lambda s: cr.Sequential(cr.Linear(2**32, 2**32, bias=False)), MemoryError, "expected fewer of them, got 18,446,744,073,709,551,616"),
    (lambda s: cr.Sequential(cr.Linear(2**62, 1, init="zeros")), MemoryError, "expected fewer of them"),
    (lambda s: cr.mlp([3, 2**44, 1]), MemoryError, "expected fewer of them, got 87,960,930,222,081"),
    (lambda s: cr.set_num_threads(0), ValueError, "[set_num_threads] n must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.set_num_threads(2.0), TypeError, "[set_num_threads] n must be a positive int: expected an int, got 2.0 (float)"),
    (lambda s: cr.set_num_threads(10**6), ValueError, "expected ≤ 1024, got 1000000"),
    (lambda s: cr.threads(-1).__enter__(), ValueError, "[set_num_threads] n must be a positive int: expected ≥ 1, got -1"),
]

LOSSES = [
    (lambda s: s.fit(loss=Halved()), TypeError, "[fit] losses are complete, their formulas are the engine's: expected a function (f, y) -> (value, dL/df), got the subclass Halved"),
    (lambda s: s.fit(loss=lambda f, y: (Stubborn(), f)), ValueError, "[loss] your loss: expected arrays (value, dL/df), got ragged ones or others (wants a gradient)"),
    (lambda s: s.one.fit(X, LABELS, loss=lambda f, y: (((f - y) ** 2).mean(), f - y)), ValueError,
     "[loss] gradient of your loss: expected shape (12, 1), got (12, 12); y came as (12,), and f − y is (12, 12): use f[:, 0] - y, and [:, None] for the gradient"),
    (lambda s: s.one.fit(X, LABELS, loss=lambda f, y: ((f - y) ** 2, f - y)), ValueError,
     "[loss] value of your loss: expected a number or shape (12,), got (12, 12); y came as (12,)"),
    (lambda s: s.fit(loss="mean_squared"), ValueError, "[fit] loss must be a known name: expected one of 'least_squares', 'mse', 'mae', 'huber', "
     "'pinball', 'poisson', 'gaussian_nll', 'logistic', 'cross_entropy', 'bce', got 'mean_squared'"),
    (lambda s: s.fit(loss=cr.MSE), TypeError, "[fit] loss must be an object: expected MSE(...), got the class MSE"),
    (lambda s: s.fit(loss=None), TypeError, "[fit] loss must be a name, a loss or a callable"),
    (lambda s: s.fit(loss=3), TypeError, "[fit] loss must be a name, a loss or a callable"),
    (lambda s: cr.MSE(reduction="none"), ValueError, "[MSE] reduction must be a known name: expected one of 'mean', 'sum', got 'none'"),
    (lambda s: cr.MSE(reduction=None), TypeError, "[MSE] reduction must be a string"),
    (lambda s: cr.Huber(0.0), ValueError, "[Huber] delta must be a finite number: expected > 0, got 0.0"),
    (lambda s: cr.Huber(NAN), ValueError, "[Huber] delta must be a finite number"),
    (lambda s: cr.Pinball(0), ValueError, "[Pinball] quantile must be a finite number: expected > 0 and < 1, got 0"),
    (lambda s: cr.Pinball(1.0), ValueError, "[Pinball] quantile must be a finite number: expected > 0 and < 1, got 1.0"),
    (lambda s: cr.CustomLoss("mse"), TypeError, "[CustomLoss] function must be callable: expected (f, y) -> (value, dL/df), got 'mse'"),
    (lambda s: cr.MSE()([1.0], [1.0]), ValueError, "[MSE] f must be 2-D: expected (B, n), got shape (1,)"),
    (lambda s: cr.MSE()([[1.0]], [1.0, 2.0]), ValueError, "[MSE] y must have one row per row of X: expected 1, got 2"),
    (lambda s: setattr(cr.Huber(), "delta", 2), AttributeError, "[Huber] delta is read-only"),
]

OPTIMIZERS = [
    (lambda s: s.fit(optimizer=Slow()), TypeError, "[fit] optimizers are complete, their rules are the engine's: expected one of 'sgd', 'adam', "),
    (lambda s: cr.GD(-1), ValueError, "[GD] lr must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.SGD(lr=NAN), ValueError, "[SGD] lr must be a finite number: expected ≥ 0, got nan"),
    (lambda s: cr.SGD(lr=INF), ValueError, "[SGD] lr must be a finite number: expected ≥ 0, got inf"),
    (lambda s: cr.SGD(lr=10**400), ValueError, "[SGD] lr must be a finite number: expected ≥ 0, got 1000"),
    (lambda s: cr.SGD(lr="fast"), TypeError, "[SGD] lr must be a number: expected a float, got 'fast' (str)"),
    (lambda s: cr.SGD(lr=None), TypeError, "[SGD] lr must be a number"),
    (lambda s: cr.SGD(lr=1j), TypeError, "[SGD] lr must be a number"),
    (lambda s: cr.SGD(momentum=-0.1), ValueError, "[SGD] momentum must be a finite number: expected ≥ 0, got -0.1"),
    (lambda s: cr.SGD(dampening=NAN), ValueError, "[SGD] dampening must be a finite number: expected one, got nan"),
    (lambda s: cr.SGD(weight_decay=-1), ValueError, "[SGD] weight_decay must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.SGD(nesterov=True), ValueError, "[SGD] nesterov needs a momentum and no dampening: expected momentum > 0 and dampening = 0, got 0 and 0"),
    (lambda s: cr.SGD(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "got 0.9 and 0.1"),
    (lambda s: cr.SGD(nesterov=1), TypeError, "[SGD] nesterov must be a bool"),
    (lambda s: cr.Adam(lr=-1e-3), ValueError, "[Adam] lr must be a finite number"),
    (lambda s: cr.Adam(betas=0.9), TypeError, "[Adam] betas must be a pair: expected (β1, β2), got 0.9"),
    (lambda s: cr.Adam(betas=(0.9,)), TypeError, "[Adam] betas must be a pair"),
    (lambda s: cr.Adam(betas=(0.9, 1.0)), ValueError, "[Adam] betas[1] must be a finite number: expected ≥ 0 and < 1, got 1.0"),
    (lambda s: cr.Adam(betas=(-0.1, 0.9)), ValueError, "[Adam] betas[0] must be a finite number: expected ≥ 0 and < 1, got -0.1"),
    (lambda s: cr.Adam(eps=-1e-8), ValueError, "[Adam] eps must be a finite number"),
    (lambda s: cr.AdamW(weight_decay=NAN), ValueError, "[AdamW] weight_decay must be a finite number: expected ≥ 0, got nan"),
    (lambda s: cr.RMSprop(alpha=1), ValueError, "[RMSprop] alpha must be a finite number: expected ≥ 0 and < 1, got 1"),
    (lambda s: cr.RMSprop(centered="no"), TypeError, "[RMSprop] centered must be a bool"),
    (lambda s: setattr(s.adam, "lr", NAN), ValueError, "[Adam] lr must be a finite number"),
    (lambda s: setattr(s.adam, "betas", (0, 0)), AttributeError, "[Adam] betas is read-only"),
    (lambda s: s.fit(optimizer="momentum"), ValueError, "[fit] optimizer must be a known name: expected one of 'sgd', 'adam', 'adamw', 'rmsprop', 'lbfgs', 'levenberg_marquardt', got 'momentum'"),
    (lambda s: s.fit(optimizer=cr.Adam), TypeError, "[fit] optimizer must be a name or an optimizer: expected Adam(...), got the class"),
    (lambda s: s.fit(optimizer=0.1), TypeError, "[fit] optimizer must be a name or an optimizer: expected one of 'sgd'"),
    (lambda s: s.adam.load_state_dict(s.net, {}), ValueError, "[Adam] state must be a state_dict: expected step and slots, got {}"),
    (lambda s: s.adam.load_state_dict(s.net, {"step": -1, "slots": []}), ValueError, "[Adam] step must be a non-negative int"),
    (lambda s: s.adam.load_state_dict(s.net, {"step": 1, "slots": []}), ValueError, "[Adam] slots must be of the same network"),
    (lambda s: s.adam.load_state_dict(s.net, s.adam.state_dict(cr.mlp([3, 40, 2]))), ValueError, "[Adam] slots must be of the same network"),
    (lambda s: cr.StepLR(0), ValueError, "[StepLR] step_size must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.StepLR(1, gamma=0), ValueError, "[StepLR] gamma must be a finite number: expected > 0, got 0"),
    (lambda s: cr.ExponentialLR(-0.5), ValueError, "[ExponentialLR] gamma must be a finite number: expected > 0, got -0.5"),
    (lambda s: cr.CosineAnnealingLR(2.5), TypeError, "[CosineAnnealingLR] T_max must be a positive int: expected an int, got 2.5"),
    (lambda s: cr.CosineAnnealingLR(2, eta_min=-1), ValueError, "[CosineAnnealingLR] eta_min must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.WarmupLR(0), ValueError, "[WarmupLR] epochs must be a positive int"),
    (lambda s: cr.WarmupLR(1, start_factor=2), ValueError, "[WarmupLR] start_factor must be a finite number: expected ≥ 0 and ≤ 1, got 2"),
    (lambda s: cr.WarmupLR(1, after="cosine"), TypeError, "[WarmupLR] after must be a schedule: expected one or None, got 'cosine'"),
    (lambda s: cr.ReduceLROnPlateau("accuracy"), ValueError, "[ReduceLROnPlateau] monitor must be a known name: expected one of 'val_loss', 'loss', got 'accuracy'"),
    (lambda s: cr.ReduceLROnPlateau(factor=1.0), ValueError, "[ReduceLROnPlateau] factor must be a finite number: expected > 0 and < 1, got 1.0"),
    (lambda s: cr.ReduceLROnPlateau(patience=-1), ValueError, "[ReduceLROnPlateau] patience must be a non-negative int"),
    (lambda s: s.fit(schedule="cosine"), TypeError, "[fit] schedule must be a schedule: expected StepLR(...) or the like, got 'cosine'"),
    (lambda s: s.fit(schedule=cr.ReduceLROnPlateau()), ValueError, "[fit] ReduceLROnPlateau monitors 'val_loss': expected validation_data or validation_split, got neither"),
    (lambda s: s.fit(schedule=RatesOf(np.array([-1.0]))), ValueError, "[fit] rates of RatesOf must be one per epoch or step: expected finite numbers ≥ 0"),
    (lambda s: s.fit(schedule=RatesOf(np.ones(5)), epochs=2), ValueError, "got array([1., 1., 1., 1., 1.]) of shape (5,)"),
    (lambda s: s.fit(schedule=RatesOf("fast")), TypeError, "[fit] rates of RatesOf must hold real numbers"),
    (lambda s: s.fit(schedule=optim.Schedule()), NotImplementedError, "[Schedule] rates must be defined: expected a method, got none"),
]

WHOLE_BATCH = [
    (lambda s: cr.LBFGS(lr=-1), ValueError, "[LBFGS] lr must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.LBFGS(history_size=0), ValueError, "[LBFGS] history_size must be a positive int: expected ≥ 1, got 0"),
    (lambda s: cr.LBFGS(line_search="armijo"), ValueError, "[LBFGS] line_search must be a known name: expected one of 'strong_wolfe', got 'armijo'"),
    (lambda s: cr.LBFGS(line_search=True), TypeError, "[LBFGS] line_search must be a string"),
    (lambda s: cr.LBFGS(tolerance_grad=-1), ValueError, "[LBFGS] tolerance_grad must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.LBFGS(tolerance_change=NAN), ValueError, "[LBFGS] tolerance_change must be a finite number"),
    (lambda s: setattr(cr.LBFGS(), "history_size", 3), AttributeError, "[LBFGS] history_size is read-only"),
    (lambda s: cr.LevenbergMarquardt(damping=0), ValueError, "[LevenbergMarquardt] damping must be a finite number: expected > 0, got 0"),
    (lambda s: cr.LevenbergMarquardt(up=1), ValueError, "[LevenbergMarquardt] up must be a finite number: expected > 1, got 1"),
    (lambda s: cr.LevenbergMarquardt(down=0.5), ValueError, "[LevenbergMarquardt] down must be a finite number: expected ≥ 1, got 0.5"),
    (lambda s: cr.LevenbergMarquardt(tolerance_grad="tight"), TypeError, "[LevenbergMarquardt] tolerance_grad must be a number"),
    (lambda s: setattr(cr.LevenbergMarquardt(), "lr", 0.1), AttributeError, "[LevenbergMarquardt] lr is read-only"),
    (lambda s: cr.LBFGS().load_state_dict(s.net, {"step": 1, "slots": []}), ValueError, "[LBFGS] slots must be of the same network"),
    (lambda s: cr.LBFGS().load_state_dict(s.net, cr.LBFGS(history_size=3).state_dict(s.net)), ValueError, "[LBFGS] slots must be of the same network"),
    (lambda s: s.step(optimizer=cr.LBFGS()), TypeError, "[train_step] optimizer must take one gradient a step: expected cr.Adam() or the like, got LBFGS(), which takes a whole fit"),
    (lambda s: s.fit(optimizer=cr.LBFGS), TypeError, "[fit] optimizer must be a name or an optimizer: expected LBFGS(...), got the class"),
    (lambda s: s.fit(optimizer="lbfgs", batch_size=11), ValueError, "[fit] LBFGS takes all rows at once: expected no batch_size, or one ≥ 12, got 11"),
    (lambda s: s.fit(optimizer="lbfgs", batch_size=0), ValueError, "[fit] batch_size must be a positive int: expected ≥ 1, got 0"),
    (lambda s: s.fit(optimizer="lbfgs", l1=0.1), ValueError, "[fit] LBFGS needs a smooth loss: expected no l1, got l1=0.1"),
    (lambda s: s.fit(optimizer="lbfgs", clip_norm=1.0), ValueError, "[fit] LBFGS needs whole gradients: expected no clip_norm, got clip_norm=1"),
    (lambda s: s.fit(optimizer="lbfgs", clip_value=2), ValueError, "[fit] LBFGS needs whole gradients: expected no clip_value, got clip_value=2"),
    (lambda s: s.fit(optimizer="lbfgs", y=at(Y, 0, 0, NAN)), ValueError, "[fit] y must be in range"),
    (lambda s: s.fit(optimizer="lbfgs", schedule=cr.ReduceLROnPlateau()), ValueError, "[fit] ReduceLROnPlateau monitors 'val_loss'"),
    (lambda s: cr.mlp([3, 4, 2], dropout=0.2).fit(X, Y, loss="mse", optimizer="lbfgs"), ValueError, "[fit] LBFGS compares losses of one and the same network: expected no dropout, got Dropout(p=0.2) as layer 2; use l2"),
    (lambda s: cr.mlp([3, 4, 2], dtype="bfloat16").fit(X, Y, loss="mse", optimizer="lbfgs"), ValueError, "[fit] LBFGS needs exact derivatives: expected dtype float32 or float64, got bfloat16"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", batch_size=4), ValueError, "[fit] LevenbergMarquardt takes all rows at once"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", l1=0.1), ValueError, "[fit] LevenbergMarquardt needs a smooth loss"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", loss="mae"), ValueError, "[fit] LevenbergMarquardt needs a sum of squares: expected loss 'least_squares' or 'mse', got MAE(); use LBFGS"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", loss=lambda f, y: (0.0, f)), ValueError, "expected loss 'least_squares' or 'mse', got CustomLoss("),
    (lambda s: s.classify(optimizer="levenberg_marquardt"), ValueError, "got CrossEntropy(); use LBFGS"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", schedule=cr.StepLR(2)), ValueError, "[fit] LevenbergMarquardt has no lr: expected no schedule, got StepLR(2)"),
]

INPUTS = [
    (lambda s: s.fit(X=X[0]), ValueError, "[fit] X must be 2-D: expected (rows, 3), got shape (3,); use X.reshape(1, -1) for one row"),
    (lambda s: s.fit(X=X[:, :1].ravel()), ValueError, "[fit] X must be 2-D: expected (rows, 3), got shape (12,)"),
    (lambda s: s.fit(X=X[None]), ValueError, "got shape (1, 12, 3); use X.reshape(len(X), -1) for one row per example"),
    (lambda s: s.fit(X=1.0), ValueError, "[fit] X must be 2-D: expected (rows, 3), got shape ()"),
    (lambda s: s.fit(X=X[:, :2]), ValueError, "[fit] X must have one column per input of the network: expected 3 columns, got 2"),
    (lambda s: s.fit(X=X[:, :0]), ValueError, "expected 3 columns, got 0"),
    (lambda s: s.fit(X=X[:0], y=Y[:0]), ValueError, "[fit] X must not be empty: expected at least one row, got 0"),
    (lambda s: s.fit(X=[]), ValueError, "[fit] X must be 2-D: expected (rows, 3), got shape (0,)"),
    (lambda s: s.fit(X=[[1, 2, 3], [4, 5]]), ValueError, "[fit] X must be an array: expected rows of equal length, got list"),
    (lambda s: s.fit(X=Stubborn()), ValueError, "[fit] X must be an array: expected what NumPy can convert, got Stubborn (wants a gradient)"),
    (lambda s: s.fit(X=None), TypeError, "[fit] X must hold real numbers: expected floats, integers or booleans, got dtype object"),
    (lambda s: s.fit(X=X.astype(object)), TypeError, "got dtype object; a mixture, text or missing values: convert it to numbers first"),
    (lambda s: s.fit(X=X.astype(str)), TypeError, "encode text as numbers first"),
    (lambda s: s.fit(X=X.astype("S8")), TypeError, "got dtype |S8"),
    (lambda s: s.fit(X=X.astype(complex)), TypeError, "got dtype complex128; use .real and .imag as separate columns"),
    (lambda s: s.fit(X=np.zeros((12, 3), "M8[s]")), TypeError, "got dtype datetime64[s]; subtract a date and divide by a time unit first"),
    (lambda s: s.fit(X=np.zeros((12, 3), "m8[s]")), TypeError, "divide by a time unit first"),
    (lambda s: s.fit(X=np.zeros(12, [("a", float)])), TypeError, "[fit] X must hold real numbers"),
    (lambda s: s.fit(X={"a": 1}), TypeError, "[fit] X must hold real numbers"),
    (lambda s: s.fit(X=[[10**30, 2, 3]] * 12), TypeError, "got dtype object"),
    (lambda s: s.fit(X=at(X, 7, 2, NAN)), ValueError, "[fit] X must be finite: expected numbers, got nan in row 7, column 2"),
    (lambda s: s.fit(X=at(X, 0, 1, -INF)), ValueError, "got -inf in row 0, column 1; fill or drop missing values first"),
    (lambda s: s.fit(X=at(X, 3, 0, 1e39)), ValueError, "[fit] X must fit in float32: expected numbers up to 3.4e+38, got larger ones; scale it, or use dtype='float64'"),
    (lambda s: s.fit(X=pd.DataFrame({"a": X[:, 0], "age": at(X, 4, 0, NAN)[:, 0], "c": X[:, 2]})), ValueError, "got nan in row 4, column 1 ('age')"),
    (lambda s: s.fit(X=pd.DataFrame({"a": X[:, 0], "b": ["x"] * 12, "c": X[:, 2]})), TypeError, "got dtype object"),
    (lambda s: s.fit(X=pd.DataFrame({"a": pd.array([1, None] * 6, "Int64"), "b": X[:, 0], "c": X[:, 2]})), ValueError, "got nan in row 1, column 0 ('a')"),
    (lambda s: s.fit(X=np.ma.masked_array(X, X > 0)), ValueError, "[fit] X must hold no masked values: expected none, got some; use .filled(...)"),
    (lambda s: s.fit(X=sparse.csr_array(X)), TypeError, "[fit] X must be dense: expected an array, got a sparse one; use .toarray()"),
    (lambda s: s.fit(X=Sparse()), TypeError, "[fit] X must be dense: expected an array, got a sparse one; use .toarray()"),
    (lambda s: s.net(X[:, :2]), ValueError, "[predict] X must have one column per input of the network: expected 3 columns, got 2"),
    (lambda s: s.net(X[0, :2]), ValueError, "[predict] X must be 2-D: expected (rows, 3), got shape (2,)"),
    (lambda s: s.net("abc"), TypeError, "[predict] X must hold real numbers"),
    (lambda s: s.net(at(X, 0, 0, 1e39)), ValueError, "[predict] X must fit in float32"),
    (lambda s: s.net.trace(X[0]), ValueError, "[trace] X must be 2-D"),
    (lambda s: s.net.evaluate(at(X, 0, 0, NAN), Y, loss="mse"), ValueError, "[evaluate] X must be finite"),
    (lambda s: s.net.evaluate(X[:0], Y[:0], loss="mse"), ValueError, "[evaluate] X must not be empty"),
    (lambda s: s.net.value_and_grad(X, Y, loss="l2"), ValueError, "[value_and_grad] loss must be a known name"),
    (lambda s: s.net.value_and_grad(X, Y[1:], loss="mse"), ValueError, "[value_and_grad] y must have one row per row of X: expected 12, got 11"),
    (lambda s: s.step(X=at(X, 1, 1, NAN)), ValueError, "[train_step] X must be finite: expected numbers, got nan in row 1, column 1"),
    (lambda s: s.step(y=Y[:, :1]), ValueError, "[train_step] y must have one column per output of the network"),
    (lambda s: s.step(X=X[:0], y=Y[:0]), ValueError, "[train_step] X must not be empty"),
    (lambda s: s.step(optimizer="adam"), TypeError, "[train_step] optimizer must be an object, whose state lasts from step to step"),
    (lambda s: s.step(optimizer=None), TypeError, "[train_step] optimizer must be a name or an optimizer"),
    (lambda s: s.step(loss="nll"), ValueError, "[train_step] loss must be a known name"),
    (lambda s: s.step(sample_weight=np.zeros(12)), ValueError, "[train_step] sample_weight must not be all zero, nor too large"),
]

TARGETS = [
    (lambda s: s.classify(y=[0.0, NAN] * 6), ValueError, "[fit] y must be in range: expected a label in every row, got nan in row 1; leave it out"),
    (lambda s: s.fit(y=Y[:-1]), ValueError, "[fit] y must have one row per row of X: expected 12, got 11"),
    (lambda s: s.fit(y=1.0), ValueError, "[fit] y must have one row per row of X: expected 12, got a single number"),
    (lambda s: s.fit(y=None), TypeError, "[fit] y must hold real numbers"),
    (lambda s: s.fit(y=Y[:, 0]), ValueError, "[fit] y must have one column per output of the network: expected shape (12, 2), got (12,)"),
    (lambda s: s.fit(y=Y[:, :1]), ValueError, "expected shape (12, 2), got (12, 1)"),
    (lambda s: s.fit(y=Y[:, :, None]), ValueError, "expected shape (12, 2), got (12, 2, 1)"),
    (lambda s: s.fit(y=LABELS), ValueError, "expected shape (12, 2), got (12,); class labels need loss='cross_entropy'"),
    (lambda s: s.one.fit(X, Y, loss="mse"), ValueError, "expected shape (12, 1) or (12,), got (12, 2)"),
    (lambda s: s.one.fit(X, Y.T, loss="mse"), ValueError, "expected 12, got 2"),
    (lambda s: s.fit(y=at(Y, 5, 1, NAN)), ValueError, "[fit] y must be in range: expected finite numbers, got nan in row 5"),
    (lambda s: s.fit(y=at(Y, 0, 0, INF)), ValueError, "[fit] y must be in range: expected finite numbers, got inf in row 0"),
    (lambda s: s.fit(y=at(Y, 0, 0, 1e40)), ValueError, "[fit] y must fit in float32"),
    (lambda s: s.fit(y=Y.astype(str)), TypeError, "[fit] y must hold real numbers"),
    (lambda s: s.fit(y=Y.astype(complex)), TypeError, "[fit] y must hold real numbers"),
    (lambda s: s.classify(["cat", "dog"] * 6), TypeError, "encode text as numbers first: np.unique(values, return_inverse=True)[1]"),
    (lambda s: s.classify(LABELS * 2), ValueError, "[fit] y must be in range: expected labels 0 to 1, got 2 in row 1"),
    (lambda s: s.classify(LABELS - 1), ValueError, "expected labels 0 to 1, got -1 in row 0"),
    (lambda s: s.classify(LABELS.astype("u8") + np.uint64(2**64 - 1)), ValueError, "expected labels 0 to 1, got 18446744073709551615 in row 0"),
    (lambda s: s.classify(np.full(12, 2**32, "i8")), ValueError, "got 4294967296 in row 0"),
    (lambda s: s.classify(np.full(12, -(2**63), "i8")), ValueError, "got -9223372036854775808 in row 0"),
    (lambda s: s.classify((LABELS * 200).astype("u1")), ValueError, "got 200 in row 1"),
    (lambda s: s.classify(LABELS.astype(float)), TypeError, "[fit] y must be class labels: expected integers or booleans, got float64; use y.astype(int)"),
    (lambda s: s.classify(LABELS[:, None]), ValueError, "[fit] y must be 1-D labels: expected (12,), got (12, 1); use y.ravel()"),
    (lambda s: s.classify(np.eye(3)[LABELS]), ValueError, "expected shape (12, 2), got (12, 3)"),
    (lambda s: s.classify(-Y), ValueError, "expected probabilities ≥ 0 for loss 'cross_entropy', got"),
    (lambda s: s.classify(at(Y, 2, 0, NAN)), ValueError, "expected finite numbers, got nan in row 2"),
    (lambda s: s.one.fit(X, LABELS, loss="cross_entropy"), ValueError, "expected labels 0 to 0, got 1 in row 1; two classes with one output need loss='logistic'"),
    (lambda s: s.one.fit(X, LABELS * 2, loss="logistic"), ValueError, "expected 0 to 1 for loss 'logistic', got 2.0 in row 1; several classes need loss='cross_entropy'"),
    (lambda s: s.one.fit(X, LABELS - 0.5, loss="bce"), ValueError, "expected 0 to 1 for loss 'logistic', got -0.5 in row 0"),
    (lambda s: s.one.fit(X, LABELS - 2, loss="poisson"), ValueError, "expected counts ≥ 0 for loss 'poisson', got -2.0 in row 0"),
    (lambda s: s.one.fit(X, LABELS, loss="gaussian_nll"), ValueError, "[fit] loss 'gaussian_nll' needs a mean and a log variance per target: expected an even number of outputs, got 1"),
    (lambda s: s.fit(loss="gaussian_nll"), ValueError, "expected shape (12, 1) or (12,), got (12, 2)"),
    (lambda s: s.fit(y=np.zeros((12, 0)), loss=lambda f, y: (0.0, f)), ValueError, "[fit] y must be 1-D or 2-D: expected (12,) or (12, k), got (12, 0)"),
    (lambda s: s.fit(y=np.zeros((12, 1, 1)), loss=lambda f, y: (0.0, f)), ValueError, "expected (12,) or (12, k), got (12, 1, 1)"),
    (lambda s: s.fit(y=at(Y, 1, 0, NAN), loss=lambda f, y: (0.0, f)), ValueError, "expected finite numbers, got nan in row 1"),
]

WEIGHTS = [
    (lambda s: s.fit(sample_weight=np.ones(11)), ValueError, "[fit] sample_weight must have one number per row: expected (12,), got (11,)"),
    (lambda s: s.fit(sample_weight=np.ones((12, 1))), ValueError, "expected (12,), got (12, 1)"),
    (lambda s: s.fit(sample_weight=2.0), ValueError, "expected (12,), got ()"),
    (lambda s: s.fit(sample_weight=np.arange(12) - 3.0), ValueError, "[fit] sample_weight must be in range: expected finite numbers ≥ 0, got -3.0 in row 0"),
    (lambda s: s.fit(sample_weight=[NAN] * 12), ValueError, "got nan in row 0"),
    (lambda s: s.fit(sample_weight=[1.0] * 11 + [INF]), ValueError, "got inf in row 11"),
    (lambda s: s.fit(sample_weight=np.zeros(12)), ValueError, "[fit] sample_weight must not be all zero, nor too large: expected a positive finite sum, got 0"),
    (lambda s: s.fit(sample_weight=np.full(12, 1e38)), ValueError, "[fit] sample_weight must not be all zero, nor too large"),
    (lambda s: s.fit(sample_weight=["a"] * 12), TypeError, "[fit] sample_weight must hold real numbers"),
    (lambda s: s.fit(sample_weight=[0] * 6 + [1] * 6, validation_split=0.5), ValueError, "[fit] sample_weight must not be all 0 in the training part"),
    (lambda s: s.fit(sample_weight=[1] * 6 + [0] * 6, validation_split=0.5), ValueError, "[fit] sample_weight must not be all 0 in the validation part"),
    (lambda s: s.classify(class_weight="even"), ValueError, "[fit] class_weight must be a known name: expected one of 'balanced', got 'even'"),
    (lambda s: s.classify(class_weight=[1, 2]), TypeError, "[fit] class_weight must be a dict or 'balanced': expected {label: weight}, got [1, 2]"),
    (lambda s: s.classify(class_weight={2: 1.0}), ValueError, "[fit] a label in class_weight must be a non-negative int: expected ≤ 1, got 2"),
    (lambda s: s.classify(class_weight={"a": 1.0}), TypeError, "[fit] a label in class_weight must be a non-negative int: expected an int, got 'a'"),
    (lambda s: s.classify(class_weight={0: -1.0}), ValueError, "[fit] class_weight[0] must be a finite number: expected ≥ 0, got -1.0"),
    (lambda s: s.classify(class_weight={0: 0, 1: 0}), ValueError, "[fit] class_weight times sample_weight must not be all zero, nor too large"),
    (lambda s: s.classify(np.full((12, 2), 0.5), class_weight="balanced"), ValueError, "[fit] class_weight needs one label per row: expected whole numbers, or rows of zeros and a one, got [0.5, 0.5] in row 0"),
    (lambda s: s.classify(np.ones((12, 2)), class_weight="balanced"), ValueError, "got [1.0, 1.0] in row 0"),
    (lambda s: s.classify(np.zeros((12, 2)), class_weight="balanced"), ValueError, "got [0.0, 0.0] in row 0"),
    (lambda s: s.classify(np.eye(2)[LABELS], class_weight={2: 1.0}), ValueError, "expected ≤ 1, got 2"),
    (lambda s: s.fit(class_weight="balanced"), ValueError, "[fit] class_weight needs one label per row"),
    (lambda s: s.one.fit(X, LABELS / 2, loss="logistic", class_weight={0: 2}), ValueError, "or rows of zeros and a one, got [0.5] in row 1"),
    (lambda s: s.one.fit(X, LABELS, loss="logistic", class_weight={2: 2}), ValueError, "[fit] a label in class_weight must be a non-negative int: expected ≤ 1, got 2"),
    (lambda s: s.one.fit(X, LABELS * 1e30, loss="mse", class_weight={0: 2}), ValueError, "or rows of zeros and a one, got [1.0000000150474662e+30] in row 1"),
]

FIT = [
    (lambda s: cr.fit_many(None, X, Y, loss="mse"), TypeError, "[fit_many] nets must be networks: expected Sequentials, got None"),
    (lambda s: cr.load(None), TypeError, "[load] file name must be a path: expected text or a Path, got None"),
    (lambda s: s.net.save(None), TypeError, "[save] file name must be a path: expected text or a Path, got None"),
    (lambda s: s.net.save("a\0b.safetensors"), ValueError, "[save] file name must be one: expected no NUL, got 'a\\x00b.safetensors'"),
    (lambda s: s.net.save("a.safetensors", extra=["a"]), TypeError, "[save] metadata must be a dict: expected {name: text}, got ['a']"),
    (lambda s: cr.fit_many([s.net], X[None], np.array(1.0), loss="mse"), ValueError, "got 1 and array(1.)"),
    (lambda s: cr.fit_many([s.net], X, Y, loss="mse", net=3), TypeError, "[fit_many] options are those of fit: expected no 'net', got one"),
    (lambda s: cr.fit_many([s.net], X[None], None, loss="mse"), ValueError, "[fit_many] X and y must have rows for each network: expected 1 times some, got 1 and None"),
    (lambda s: cr.fit_many([s.net], [[[1.0], [2.0, 3.0]]], Y, loss="mse"), ValueError, "[fit] X must be an array: expected rows of equal length, got list"),
    (lambda s: cr.Sequential(Known()).fit(X, X, loss="mse", optimizer="levenberg_marquardt"), ValueError, "[fit] LevenbergMarquardt solves for parameters: expected at least one, got none"),
    (lambda s: cr.fit_many([s.net], X, Y, loss="mse", epoch=3), TypeError, "[fit_many] options are those of fit: expected no 'epoch', got one"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), Backward()).fit(X, Y, loss="mse"), ValueError, "[Backward] forward: expected shape (12, 2), got Stubborn (wants a gradient)"),
    (lambda s: s.fit(batch_size=0), ValueError, "[fit] batch_size must be a positive int: expected ≥ 1, got 0"),
    (lambda s: s.fit(batch_size="all"), TypeError, "[fit] batch_size must be a positive int: expected an int, got 'all'"),
    (lambda s: s.fit(batch_size=3.0), TypeError, "expected an int, got 3.0 (float)"),
    (lambda s: s.fit(epochs=0), ValueError, "[fit] epochs must be a positive int: expected ≥ 1, got 0"),
    (lambda s: s.fit(epochs=-1), ValueError, "[fit] epochs must be a positive int: expected ≥ 1, got -1"),
    (lambda s: s.fit(epochs=True), TypeError, "[fit] epochs must be a positive int: expected an int, got True (bool)"),
    (lambda s: s.fit(shuffle="yes"), TypeError, "[fit] shuffle must be a bool: expected True or False, got 'yes'"),
    (lambda s: s.fit(seed=-1), ValueError, "[fit] seed must be a non-negative int: expected ≥ 0, got -1"),
    (lambda s: s.fit(seed=np.random.default_rng()), TypeError, "[fit] seed must be a non-negative int: expected an int"),
    (lambda s: s.fit(l1=-1), ValueError, "[fit] l1 must be a finite number: expected ≥ 0, got -1"),
    (lambda s: s.fit(l1=None), TypeError, "[fit] l1 must be a number"),
    (lambda s: s.fit(l2=NAN), ValueError, "[fit] l2 must be a finite number: expected ≥ 0, got nan"),
    (lambda s: s.fit(clip_value=0), ValueError, "[fit] clip_value must be a finite number: expected > 0, got 0"),
    (lambda s: s.fit(clip_norm=-1.0), ValueError, "[fit] clip_norm must be a finite number: expected > 0, got -1.0"),
    (lambda s: s.fit(clip_norm=INF), ValueError, "[fit] clip_norm must be a finite number: expected > 0, got inf"),
    (lambda s: s.fit(clip_example_norm=0), ValueError, "[fit] clip_example_norm must be a finite number: expected > 0, got 0"),
    (lambda s: s.fit(clip_example_norm="1"), TypeError, "[fit] clip_example_norm must be a number: expected a float, got '1' (str)"),
    (lambda s: s.fit(clip_example_norm=1.0, dy=SLOPES), ValueError, "[fit] clip_example_norm limits gradients of the loss alone: expected no dy, got both; use clip_norm"),
    (lambda s: s.fit(optimizer="lbfgs", clip_example_norm=1.0), ValueError, "[fit] LBFGS needs whole gradients: expected no clip_example_norm, got clip_example_norm=1"),
    (lambda s: s.fit(optimizer="lbfgs", dy=SLOPES), ValueError, "[fit] LBFGS sees values only: expected no dy, got slopes; use Adam or SGD"),
    (lambda s: s.fit(optimizer="levenberg_marquardt", dy=SLOPES), ValueError, "[fit] LevenbergMarquardt sees values only: expected no dy, got slopes; use Adam or SGD"),
    (lambda s: s.fit(dy=SLOPES[:5]), ValueError, "[fit] dy must have a slope for each row, output and input: expected shape (12, 2, 3), got (5, 2, 3)"),
    (lambda s: s.fit(dy=SLOPES[:, 0]), ValueError, "[fit] dy must have a slope for each row, output and input: expected shape (12, 2, 3), got (12, 3)"),
    (lambda s: s.one.fit(X, Y[:, 0], loss="mse", dy=SLOPES), ValueError, "[fit] dy must have a slope for each row, output and input: expected shape (12, 1, 3) or (12, 3), got (12, 2, 3)"),
    (lambda s: s.fit(dy=np.where(SLOPES[7, 1, 2] == SLOPES, NAN, SLOPES)), ValueError, "[fit] dy must be in range: expected finite numbers, got nan in row 7"),
    (lambda s: s.fit(dy="steep"), TypeError, "[fit] dy must hold real numbers: expected floats, integers or booleans, got dtype <U5"),
    (lambda s: s.fit(dy=SLOPES, dy_weight=-1), ValueError, "[fit] dy_weight must be a finite number: expected ≥ 0, got -1"),
    (lambda s: s.fit(dy=SLOPES, dy_weight=None), TypeError, "[fit] dy_weight must be a number: expected a float, got None (NoneType)"),
    (lambda s: s.fit(dy_weight=2), ValueError, "[fit] dy_weight must come with dy: expected slopes, got dy_weight=2 alone"),
    (lambda s: s.net.value_and_grad(X, Y, loss="mse", dy=SLOPES[:5]), ValueError, "[value_and_grad] dy must have a slope for each row"),
    (lambda s: cr.mlp([3, 4, 2], dropout=0.2).fit(X, Y, loss="mse", dy=SLOPES), ValueError, "[fit] dy needs one function to have slopes of: expected no dropout, got Dropout(p=0.2) as layer 2; use l2"),
    (lambda s: cr.mlp([3, 4, 2], dtype="bfloat16").fit(X, Y, loss="mse", dy=SLOPES), ValueError, "[fit] dy needs exact derivatives: expected dtype float32 or float64, got bfloat16"),
    (lambda s: cr.Sequential(cr.Linear(3, 2), Shift()).fit(X, Y, loss="mse", clip_example_norm=1.0), ValueError, "[fit] clip_example_norm needs each example's gradient, and vjp of a layer of your own gives their sum: expected no params in it, got Shift as layer 1"),
    (lambda s: s.fit(verbose=3), ValueError, "[fit] verbose must be a non-negative int: expected ≤ 2, got 3"),
    (lambda s: s.fit(verbose="loud"), ValueError, "[fit] verbose must be a known name: expected one of 'auto', got 'loud'"),
    (lambda s: s.fit(verbose=None), TypeError, "[fit] verbose must be a non-negative int"),
    (lambda s: s.fit(validation_split=1.0), ValueError, "[fit] validation_split must be a finite number: expected ≥ 0 and < 1, got 1.0"),
    (lambda s: s.fit(validation_split=-0.1), ValueError, "expected ≥ 0 and < 1, got -0.1"),
    (lambda s: s.fit(X=X[:1], y=Y[:1], validation_split=0.5), ValueError, "[fit] validation_split must leave rows to train on: expected fewer than 1 rows for validation, got 1"),
    (lambda s: s.fit(validation_split=0.99), ValueError, "expected fewer than 12 rows for validation, got 12"),
    (lambda s: s.fit(validation_split=0.5, validation_data=(X, Y)), ValueError, "[fit] validation comes from one place: expected validation_data or validation_split, got both"),
    (lambda s: s.fit(validation_data=X), TypeError, "[fit] validation_data must be a tuple: expected (X, y) or (X, y, sample_weight), got ndarray"),
    (lambda s: s.fit(validation_data=(X,)), TypeError, "expected (X, y) or (X, y, sample_weight), got tuple of 1"),
    (lambda s: s.fit(validation_data=(X[:, :2], Y)), ValueError, "[fit] validation X must have one column per input of the network: expected 3 columns, got 2"),
    (lambda s: s.fit(validation_data=(X[:0], Y[:0])), ValueError, "[fit] validation X must not be empty"),
    (lambda s: s.fit(validation_data=(X, at(Y, 0, 0, NAN))), ValueError, "[fit] validation y must be in range"),
    (lambda s: s.fit(validation_data=(X, Y, np.zeros(12))), ValueError, "[fit] validation sample_weight must not be all zero, nor too large"),
    (lambda s: s.fit(callbacks=print), TypeError, "[fit] callbacks must be a list: expected [callback, ...], got <built-in function print>"),
    (lambda s: s.fit(callbacks=[3]), TypeError, "[fit] a callback must be an object with one of on_train_begin, on_epoch_end, on_train_end, or a callable"),
    (lambda s: s.fit(callbacks=[cr.EarlyStopping]), TypeError, "[fit] a callback must be an object"),
    (lambda s: s.fit(callbacks=[cr.EarlyStopping()]), ValueError, "[fit] EarlyStopping monitors 'val_loss': expected validation_data or validation_split, got neither; or use EarlyStopping(monitor='loss')"),
    (lambda s: cr.EarlyStopping("accuracy"), ValueError, "[EarlyStopping] monitor must be a known name"),
    (lambda s: cr.EarlyStopping(patience=1.5), TypeError, "[EarlyStopping] patience must be a non-negative int"),
    (lambda s: cr.EarlyStopping(min_delta=-1), ValueError, "[EarlyStopping] min_delta must be a finite number: expected ≥ 0, got -1"),
    (lambda s: cr.EarlyStopping(mode="up"), ValueError, "[EarlyStopping] mode must be a known name: expected one of 'min', 'max', got 'up'"),
    (lambda s: cr.EarlyStopping(restore_best=0), TypeError, "[EarlyStopping] restore_best must be a bool"),
]
# fmt: on


class Sparse:
    def toarray(self):
        return X


TABLES = {
    "layers": LAYERS, "networks": NETWORKS, "losses": LOSSES, "optimizers": OPTIMIZERS,
    "whole batch": WHOLE_BATCH, "inputs": INPUTS,
    "targets": TARGETS, "weights": WEIGHTS, "fit": FIT,
}  # fmt: skip
CASES = [
    pytest.param(*row, id=f"{name}-{number}")
    for name, rows in TABLES.items()
    for number, row in enumerate(rows)
]


@pytest.mark.parametrize("call, kind, text", CASES)
def test_refused(call, kind, text):
    """The wrong exception, a message that does not help, or a change made before the check."""
    stage = Stage()
    given = [a.copy() for a in (X, Y, LABELS)]
    before, steps = stage.bits()
    before = copy.deepcopy(before)
    with pytest.raises(kind) as caught:
        call(stage)
    message = str(caught.value)
    assert text in message
    assert FORM.match(message), f"not of the form [op] rule: expected …, got …: {message}"
    assert type(caught.value) is kind
    after, steps_after = stage.bits()
    assert steps_after == steps
    for old, new in zip(before, after, strict=True):
        assert_same_bits(old, new)
    for old, new in zip(given, (X, Y, LABELS), strict=True):
        assert_same_bits(old, new, "the caller's array")


def test_the_table_is_broad():
    assert len(CASES) >= 200


def test_a_network_is_usable_after_errors():
    """State left half-way by an error shows in the next training: it must equal that of a network without errors."""
    stage, clean = Stage(), Stage()
    for rows in (INPUTS, TARGETS, WEIGHTS, FIT):
        for call, kind, _ in rows:
            with pytest.raises(kind):
                call(stage)
    for s in (stage, clean):
        s.fit(epochs=3)
    for a, b in zip(stage.bits()[0], clean.bits()[0], strict=True):
        assert_same_bits(a, b)


# ---- what is odd and right -----------------------------------------------------------------------


def negative_strides(a):
    return a[::-1, ::-1].copy()[::-1, ::-1]


def strided(a):
    wide = np.full((2 * a.shape[0], 3 * a.shape[1]), NAN, a.dtype)
    wide[::2, ::3] = a
    return wide[::2, ::3]


def misaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape) if a.flags.c_contiguous else None
    view[...] = a
    assert not view.flags.aligned
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


ODD = {
    "list": lambda a: a.tolist(),
    "tuple of rows": lambda a: tuple(map(tuple, a.tolist())),
    "Fortran order": np.asfortranarray,
    "negative strides": negative_strides,
    "gaps": strided,
    "misaligned": misaligned,
    "read-only": read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "float64": lambda a: a.astype(np.float64),
    "long double": lambda a: a.astype(np.longdouble),
    "DataFrame": pd.DataFrame,
    "nullable DataFrame": lambda a: pd.DataFrame(a).astype("Float64"),
    "matrix subclass": lambda a: a.view(np.recarray).view(type("Mine", (np.ndarray,), {})),
    "empty mask": lambda a: np.ma.masked_array(a),
    "memory map": lambda a: a,  # see the test
}


@pytest.mark.parametrize("form", ODD)
def test_any_array_of_numbers_gives_the_same_bits(form, tmp_path, rng):
    """An array read with the wrong stride, order or byte order, or copied where it must not be changed."""
    x, y = rng.standard_normal((12, 3)).astype(np.float32), rng.standard_normal((12, 2)).astype(np.float32)
    odd_x, odd_y = ODD[form](x), ODD[form](y)
    if form == "memory map":
        x.tofile(tmp_path / "x")
        odd_x = np.memmap(tmp_path / "x", np.float32, "r", shape=(12, 3))
    results = []
    for a, b in ((x, y), (odd_x, odd_y)):
        net = cr.mlp([3, 4, 2], seed=3)
        net.fit(a, b, loss="mse", epochs=2, batch_size=5)
        net.train_step(a, b, loss="mse", optimizer=cr.SGD())
        value, grads = net.value_and_grad(a, b, loss="mse")
        results.append(
            [net(a), *net.trace(a).phi, np.array(value), *grads.values(), *net.state_dict().values()]
        )
    for plain, odd in zip(*results, strict=True):
        assert_same_bits(plain, odd, form)


@pytest.mark.parametrize("zero_axis", [0, 1])
def test_strides_of_zero(zero_axis):
    base = np.arange(12.0).reshape(12, 1) if zero_axis else np.arange(3.0).reshape(1, 3)
    repeated = np.broadcast_to(base, (12, 3))
    net = cr.mlp([3, 4, 2])
    assert_same_bits(net(repeated), net(repeated.copy()))


def test_absurd_strides_on_an_axis_of_length_one():
    row = as_strided(np.arange(3.0), shape=(1, 3), strides=(10**9, 8))
    net = cr.mlp([3, 4, 2])
    assert_same_bits(net(row), net(np.arange(3.0)[None]))


@pytest.mark.parametrize("kind", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", "e", "f", "d"])
def test_every_number_type(kind):
    x = np.array([[0, 1, 1], [1, 0, 1]])
    net = cr.mlp([3, 4, 2])
    assert_same_bits(net(x.astype(kind)), net(x.astype(np.float32)))


@pytest.mark.parametrize("kind", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i8"])
def test_every_integer_type_is_a_label(kind):
    """A label cut down or sign-extended on the way; the loss would change."""
    net = cr.mlp([3, 4, 2])
    expected = net.evaluate(X, np.eye(2)[LABELS], loss="cross_entropy")
    assert net.evaluate(X, LABELS.astype(kind), loss="cross_entropy") == pytest.approx(expected, rel=1e-6)


def test_large_integers_are_rounded_to_the_dtype():
    net = cr.Sequential(cr.Linear(1, 1, bias=False), dtype="float64")
    net.load_state_dict({"0.weight": [[1.0]]})
    assert net([[2**62 + 1]]) == float(2**62 + 1)
    assert net(np.array([[2**64 - 1]], "u8")) == float(2**64 - 1)


def test_numbers_of_other_kinds_are_numbers():
    assert cr.Dropout(fractions.Fraction(1, 4)).p == 0.25
    assert repr(cr.LeakyReLU(np.float32(0.5))) == "LeakyReLU(negative_slope=0.5)"
    assert repr(cr.Linear(np.int64(3), np.uint8(2))) == "Linear(3, 2)"


def test_labels_at_the_border_of_each_width():
    """Comparing labels in their own width, where the number of outputs may not exist."""
    net = cr.Sequential(cr.Linear(3, 300))
    net.fit(X, (LABELS * 255).astype("u1"), loss="cross_entropy")
    net.fit(X, (LABELS * 127).astype("i1"), loss="cross_entropy")
    with pytest.raises(ValueError, match="expected labels 0 to 299, got 300 in row 1"):
        net.fit(X, (LABELS * 300).astype("u2"), loss="cross_entropy")


def test_predict_lets_nan_through_in_its_row_only():
    net = cr.mlp([3, 4, 2])
    x = at(X, 3, 1, NAN)
    rows = np.arange(12) != 3
    assert_same_bits(net(x)[rows], net(X)[rows])
    assert np.isnan(net(x)[3]).all()


def test_the_losses_table_is_complete():
    assert set(losses.LOSSES) == {
        "least_squares", "mse", "mae", "huber", "pinball", "poisson", "gaussian_nll", "logistic", "cross_entropy", "bce",
    }  # fmt: skip
