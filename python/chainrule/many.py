# SPDX-License-Identifier: MIT
"""Networks of one architecture trained side by side: at once on a GPU, one after the other on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import devices, optim, training
from .checks import listed, short
from .model import Sequential
from .wholebatch import RUNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def fit_many(
    nets: Sequence[Sequential],
    X: Any,
    y: Any,
    *,
    loss: Any,
    optimizer: Any = "adam",
    seed: Any = 0,
    **options: Any,
) -> list[training.History]:
    """`fit` for many networks alike; each gets the bits that it would get alone.

    Args:
        nets: different networks of the same layers, dtype and device.
        X, y: rows for all of them; or X (K, n, I) and y (K, n, ...), for each of K networks its own.
        optimizer: a name; an object, which keeps a state for each network; or a list of K of one class.
        seed: of the order of rows and of dropout; or a list of K.
        options: the others of `fit`, but for callbacks, validation, verbose and ReduceLROnPlateau.

    Raises: as `fit`; FloatingPointError for networks that diverge comes when the others have been trained,
        with all histories in its attribute `histories`.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> X = np.linspace(-1, 1, 50)[:, None]
        >>> nets = [cr.mlp([1, 8, 1], seed=seed) for seed in range(3)]
        >>> [len(history["loss"]) for history in cr.fit_many(nets, X, X**2, loss="mse", epochs=2)]
        [2, 2, 2]
    """
    nets = _alike(nets)
    _refuse_watching(options)
    plans = _plans(nets, X, y, optimizer, seed, {"loss": loss, **options})
    if nets[0].device == "cpu" or type(plans[0].optimizer) in RUNS:
        return _histories([_alone(net, plan) for net, plan in zip(nets, plans, strict=True)])
    return _histories(_at_once(nets, plans))


# ------------------------------------------------------------ arguments


def _alike(given: Sequence[Sequential]) -> list[Sequential]:
    nets = list(given)
    for net in nets:
        if not isinstance(net, Sequential):
            raise TypeError(f"[fit_many] nets must be networks: expected Sequentials, got {short(net)}")
    kinds = {(repr(net.layers), net.dtype, net.device) for net in nets}
    if len(kinds) != 1 or len(set(map(id, nets))) != len(nets):
        got = "one of them twice" if len(kinds) == 1 else f"{len(kinds)} kinds"
        raise ValueError(f"[fit_many] nets must be different networks: expected all of one kind, got {got}")
    return nets


def _refuse_watching(options: dict[str, Any]) -> None:
    watching = {"callbacks", "validation_data", "validation_split", "verbose"} & options.keys()
    if isinstance(options.get("schedule"), optim.ReduceLROnPlateau):
        watching |= {"ReduceLROnPlateau"}
    if watching:
        raise ValueError(
            f"[fit_many] nobody looks between epochs: expected no {min(watching)}, got one; use net.fit"
        )


def _each(name: str, value: Any, count: int) -> list[Any]:
    """What is given for each network, or for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"[fit_many] {name} must be one or a list: expected {count}, got {len(value)}")
    return list(value)


def _plans(
    nets: list[Sequential], X: Any, y: Any, optimizer: Any, seed: Any, options: dict[str, Any]
) -> list[training.Plan]:
    """A plan for each network; what they share is one array."""
    count = len(nets)
    shared = np.ndim(X) != 3
    if not shared and not len(X) == len(y) == count:
        raise ValueError(
            f"[fit_many] X and y must have rows for each network: expected {count} times some, "
            f"got {len(X)} and {len(y)}"
        )
    hows, seeds = _each("optimizer", optimizer, count), _each("seed", seed, count)
    plans: list[training.Plan] = []
    for k, net in enumerate(nets):
        rows = (X, y) if shared else (X[k], y[k])
        plans.append(training.plan(net, *rows, optimizer=hows[k], seed=seeds[k], **options))
        if shared:
            plans[k] = plans[k]._replace(data=plans[0].data)
    kinds = sorted({type(plan.optimizer).__name__ for plan in plans})
    if len(kinds) > 1:
        raise ValueError(f"[fit_many] optimizers must be alike: expected one class, got {listed(kinds)}")
    return plans


# ------------------------------------------------------------ training


class Outcome(NamedTuple):
    """Of one network's training; the error if it has diverged."""

    history: training.History
    error: FloatingPointError | None


def _alone(net: Sequential, plan: training.Plan) -> Outcome:
    run = RUNS.get(type(plan.optimizer), training.EngineRun)(net, plan)
    return Outcome(run.history, _error(run.run))


def _error(act: Any, *arguments: Any) -> FloatingPointError | None:
    try:
        act(*arguments)
    except FloatingPointError as error:
        return error
    return None


def _at_once(nets: list[Sequential], plans: list[training.Plan]) -> list[Outcome]:
    """All networks by the same calls of the GPU's engine."""
    uploaded: dict[int, training.Data] = {}  # by id: data that are shared lie there once
    runs, errors = [], {}
    for net, plan in zip(nets, plans, strict=True):
        key = id(plan.data)
        if key not in uploaded:
            uploaded[key] = training.Data(*(devices.upload(part, net.device) for part in plan.data))
        runs.append(training.EngineRun(net, plan, uploaded[key]))
    chunks = [run.chunks() for run in runs]
    live = list(range(len(runs)))
    while live:
        rates = np.stack([next(chunks[k]) for k in live])
        first = runs[live[0]].history.epochs
        values = devices.run_many([runs[k].trainer for k in live], first, rates)
        for k, row, rate in zip(live, values, rates, strict=True):
            errors[k] = _error(_record, runs[k], row, rate)
        live = [k for k in live if errors[k] is None and runs[k].history.epochs < runs[k].plan.epochs]
    return [Outcome(run.history, errors[k] or _error(run.check_parameters)) for k, run in enumerate(runs)]


def _record(run: training.EngineRun, losses: Array, rates: Array) -> None:
    """As `fit` does, which ends with the first epoch whose loss is not finite."""
    bad = np.flatnonzero(~np.isfinite(losses))
    run.record(*run.paced(losses[: bad[0] + 1] if bad.size else losses, rates))


def _histories(outcomes: list[Outcome]) -> list[training.History]:
    histories = [history for history, _ in outcomes]
    diverged = [k for k, outcome in enumerate(outcomes) if outcome.error]
    if diverged:
        error = FloatingPointError(
            f"[fit_many] losses must stay finite: expected numbers, got others in networks {diverged}, which "
            f"have their weights from before; the first: {outcomes[diverged[0]].error}"
        )
        error.histories = histories  # type: ignore[attr-defined]
        raise error
    return histories
