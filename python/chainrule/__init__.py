# SPDX-License-Identifier: MIT
"""Fast small neural networks: dense networks trained by the chain rule, on a C++ engine of our own.

>>> import numpy as np, chainrule as cr
>>> X = np.random.default_rng(0).normal(size=(200, 2))
>>> net = cr.mlp([2, 16, 1], seed=0)
>>> history = net.fit(X, X[:, 0] * X[:, 1] > 0, loss="logistic", epochs=100, batch_size=20)
>>> bool(history["loss"][-1] < 0.2 < history["loss"][0])
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import machine as _machine
from ._core import __version__
from .calculus import (
    gauss_newton_product,
    hessian,
    hvp,
    input_gradient,
    input_hessian_diagonal,
    jacobian,
    jvp,
    laplacian,
    per_example_grad_norms,
    per_example_grads,
    sensitivity,
    vjp,
)
from .callbacks import EarlyStopping
from .layers import (
    ELU,
    GELU,
    Dropout,
    Identity,
    Layer,
    LeakyReLU,
    Linear,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from .losses import (
    MAE,
    MSE,
    CrossEntropy,
    CustomLoss,
    GaussianNLL,
    Huber,
    LeastSquares,
    Logistic,
    Pinball,
    Poisson,
)
from .machine import get_num_threads, info, set_num_threads, threads
from .model import Sequential, mlp
from .optim import (
    GD,
    LBFGS,
    SGD,
    Adam,
    AdamW,
    CosineAnnealingLR,
    ExponentialLR,
    LevenbergMarquardt,
    ReduceLROnPlateau,
    RMSprop,
    Schedule,
    StepLR,
    WarmupLR,
)
from .training import History

if TYPE_CHECKING:
    from .explanation import explain
    from .gradient_check import gradcheck
    from .io import load
    from .many import fit_many
    from .plot import draw

__all__ = [
    "ELU", "GD", "GELU", "LBFGS", "MAE", "MSE", "SGD", "Adam", "AdamW", "CosineAnnealingLR", "CrossEntropy",
    "CustomLoss", "Dropout", "EarlyStopping", "ExponentialLR", "GaussianNLL", "History", "Huber", "Identity",
    "Layer", "LeakyReLU", "LeastSquares", "LevenbergMarquardt", "Linear", "LogSoftmax", "Logistic",
    "Pinball", "Poisson", "RMSprop", "ReLU", "ReduceLROnPlateau", "Schedule", "Sequential", "SiLU",
    "Sigmoid", "Softmax", "Softplus", "StepLR", "Tanh", "WarmupLR", "__version__", "draw", "explain",
    "fit_many", "gauss_newton_product", "get_num_threads", "gradcheck", "hessian", "hvp", "info",
    "input_gradient", "input_hessian_diagonal", "jacobian", "jvp", "laplacian", "load", "mlp",
    "per_example_grad_norms", "per_example_grads", "sensitivity", "set_num_threads", "threads", "vjp",
]  # fmt: skip


# What training does not need, and where it is. The modules have other names than their functions: importing
# chainrule.x binds the name x here to the module, over a function that is called the same.
_LATER = {
    "load": "io",
    "fit_many": "many",
    "gradcheck": "gradient_check",
    "explain": "explanation",
    "draw": "plot",
}
_MODULES = "data", "io", "reference"


def __getattr__(name: str) -> Any:
    """Modules that training does not need are imported when they are first asked for."""
    from importlib import import_module

    if name in _LATER:
        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_MODULES]


_machine.warn_of_settings()
