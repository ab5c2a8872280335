# SPDX-License-Identifier: MIT
"""A stand-in for chainrule._cuda on machines without GPU: two "GPUs" that compute as the CPU does.

It tests the Python layer: which module is asked, with which arguments, and where arrays are said to lie.
"""

import numpy as np

from chainrule import _core

__version__ = _core.__version__
GPUS = 2
calls = []  # of run_many: how many trainers each had


def state():
    return ""


def device_count():
    return GPUS


def device_name(device):
    return f"Fake {device}"


def schedules():
    return ["fake"]


def force_schedule(name):
    assert name in ("", "fake")


class Array:
    """NumPy memory that says it lies on a GPU."""

    def __init__(self, array, device):
        self.array, self.device, self.shape, self.dtype = array, device, array.shape, array.dtype

    def numpy(self):
        return self.array.copy()

    def all_finite(self):
        return np.isfinite(self.array).all()

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return Array(self.array[rows], self.device)

    def __dlpack_device__(self):
        return 2, self.device

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert cuda device type tensor to numpy")  # as PyTorch says


def upload(array, device):
    return Array(array.copy(), device)


def from_dlpack(source):
    return source


def on_host(value):
    return value.array if isinstance(value, Array) else value


def network(kind):
    class Network(kind):
        def __init__(self, layers, precision, device):
            assert precision in {"float32", "tf32", "bfloat16", "float64"} and 0 <= device < GPUS
            super().__init__(layers, precision == "bfloat16")
            self.device = device

        def predict_array(self, X):
            return Array(self.predict(X.array), X.device)

        def evaluate(self, *arguments):
            return super().evaluate(*map(on_host, arguments))

    return Network


def trainer(kind):
    class Trainer(kind):
        def __init__(self, net, optimizer, loss, *arguments):
            super().__init__(net, optimizer, loss, *map(on_host, arguments))

        def step(self, *arguments):
            return super().step(*map(on_host, arguments))

    return Trainer


Network32, Network64 = network(_core.Network32), network(_core.Network64)
Optimizer32, Optimizer64 = _core.Optimizer32, _core.Optimizer64
Trainer32, Trainer64 = trainer(_core.Trainer32), trainer(_core.Trainer64)


def run_many(trainers, first_epoch, lr):
    calls.append(len(trainers))
    losses = np.zeros((len(trainers), lr.shape[1]))
    for row, one, rates in zip(losses, trainers, lr, strict=True):
        values = one.run(first_epoch, np.ascontiguousarray(rates))
        row[: len(values)] = values
    return losses
