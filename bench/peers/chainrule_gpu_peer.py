# SPDX-License-Identifier: MIT
"""chainrule on a GPU: the whole run in one `fit` or `fit_many`."""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np

import chainrule as cr
from chainrule import devices, training

from . import chainrule_peer
from .problem import ROUNDED, Workload


def configure(threads: int) -> None:
    """CHAINRULE_CUDA_MODULE names another build of the GPU's engine, such as the emulated one."""
    if path := os.environ.get("CHAINRULE_CUDA_MODULE"):
        spec = spec_from_file_location("chainrule._cuda", path)
        assert spec is not None and spec.loader is not None
        module = sys.modules["chainrule._cuda"] = module_from_spec(spec)
        spec.loader.exec_module(module)


def versions() -> dict[str, str]:
    """Version and GPUs."""
    return {"chainrule": cr.__version__, "chainrule GPU": devices.state()}


def _engine() -> object:
    return sys.modules["chainrule._cuda"]


class Watched(training.EngineRun):
    """A fit that leaves word of how its trainer worked: what falls back in silence should be seen here."""

    way = ""

    def train(self, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answer = super().train(rates)
        trainer, (made, given) = self.trainer, self.trainer.library_shapes
        Watched.way = {
            "resident": f"resident, {trainer.blocks} blocks",
            "fused": f"layer by layer, {trainer.graphs} graphs",
            "library": f"cuBLASLt for {made} of {given} kinds of products, {trainer.graphs} graphs",
        }[trainer.schedule]
        return answer


training.EngineRun = Watched  # type: ignore[misc]


class Fit(chainrule_peer.Fit):
    """All epochs in one call; losses are read, so that the end is the end."""

    device = "cuda"

    @property
    def note(self) -> str:
        """How the last fit was trained."""
        return Watched.way

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.dtype, self.tolerance = work.precision, ROUNDED[work.precision]
        super().__init__(work, problem)


class FitInOneBlock(Fit):
    """The same without clusters, to see whether they pay."""

    form = "cr.fit, each network in one block"

    def _fit(self, epochs: int) -> dict[str, list[float]]:
        _engine().force_schedule("resident", 1)
        try:
            return super()._fit(epochs)
        finally:
            _engine().force_schedule("", 0)


class FitMany(chainrule_peer.Fit):
    """All networks and all epochs in one call."""

    form = "cr.fit_many(nets, X, y, epochs=...), shuffle=False"
    device = "cuda"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.dtype, self.tolerance = work.precision, ROUNDED[work.precision]
        super().__init__(work, problem)
        self.nets = [self.net, *(self.net.to(self.device) for _ in range(work.networks - 1))]

    def reset(self) -> None:
        """Initial weights, fresh optimizer."""
        super().reset()
        for net in self.nets[1:]:
            net.load_state_dict(self.initial)

    def _fit(self, epochs: int) -> dict[str, list[float]]:
        histories = cr.fit_many(
            self.nets,
            self.X,
            self.y,
            loss=self.work.loss,
            optimizer=self.optimizer,
            batch_size=self.work.batch,
            epochs=epochs,
            shuffle=False,
        )
        return {"loss": np.mean([history["loss"] for history in histories], axis=0).tolist()}

    def parameters(self) -> list[np.ndarray]:
        """Of the last network."""
        state = self.nets[-1].state_dict()
        return [state[name] for name in self.names]


class Predict(chainrule_peer.Predict):
    """Rows that lie on the GPU; outputs stay there."""

    form = "net(x), device arrays in and out"
    device = "cuda"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        self.net(self.X[:1])  # loads the engine
        self.X = _engine().upload(self.X, 0)

    def run(self, calls: int) -> None:
        """Each call waits for its outputs."""
        super().run(calls)

    def outputs(self) -> np.ndarray:
        """Of one call."""
        return np.asarray(self.net(self.X).numpy())


VARIANTS = {"chainrule fit": Fit, "chainrule fit in one block": FitInOneBlock, "chainrule fit_many": FitMany}
PREDICTORS = {"chainrule": Predict}
