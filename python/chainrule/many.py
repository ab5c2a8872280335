# SPDX-License-Identifier: MIT
"""Networks of one architecture trained side by side: at once on a GPU, one after the other on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from inspect import signature
from typing import Any

import numpy as np

from . import batch, devices, optim, training
from .callbacks import Progress, verbosity
from .checks import listed, short
from .model import Sequential
from .wholebatch import RUNS


def fit_many(
    nets: Sequence[Sequential],
    X: Any,
    y: Any,
    *,
    loss: Any,
    optimizer: Any = "adam",
    seed: Any = 0,
    verbose: Any = "auto",
    **options: Any,
) -> list[training.History]:
    """`fit` for many networks alike; each gets the bits that it would get alone.

    On a GPU that is so while there are processors for all: one network alone may have several, of which each
    adds up a part of its gradient, and is then the same to rounding.

    Args:
        nets: different networks of the same layers, dtype and device.
        X, y: rows for all of them; or X (K, n, I) and y (K, n, ...), for each of K networks its own.
        optimizer: a name; an object, which keeps a state for each network; or a list of K of one class.
        seed: of the order of rows and of dropout; or a list of K.
        verbose: as in `fit`; of networks done on the CPU, of epochs on a GPU.
        options: the others of `fit`, but for callbacks, validation and ReduceLROnPlateau.

    Raises: as `fit`; FloatingPointError for networks that diverge comes when the others have been trained,
        with all histories in its attribute `histories`.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> X = np.linspace(-1, 1, 50)[:, None]
        >>> nets = [cr.mlp([1, 8, 1], seed=seed) for seed in range(3)]
        >>> [len(history["loss"]) for history in cr.fit_many(nets, X, X**2, loss="mse", epochs=2)]
        [2, 2, 2]
    """
    _check(nets := list(nets) if np.iterable(nets) else [nets], options)
    plans = _plans(nets, X, y, optimizer, seed, {"loss": loss, "verbose": verbose, **options})
    alone = nets[0].device == "cpu" or type(plans[0].optimizer) in RUNS
    total, unit = (len(nets), "network") if alone else (plans[0].epochs, "epoch")
    with closing(Progress(verbosity(verbose), total, unit)) as progress:
        histories, errors = (_one_by_one if alone else _at_once)(nets, plans, progress)
    if errors:
        error = FloatingPointError(
            f"[fit_many] losses must stay finite: expected numbers, got others in networks {sorted(errors)}, "
            f"which have their weights from before; the first: {errors[min(errors)]}"
        )
        error.histories = histories  # type: ignore[attr-defined]
        raise error
    return histories


# ------------------------------------------------------------ arguments


def _check(nets: Sequence[Any], options: dict[str, Any]) -> None:
    for net in nets:
        if not isinstance(net, Sequential):
            raise TypeError(f"[fit_many] nets must be networks: expected Sequentials, got {short(net)}")
    kinds = {(repr(net.layers), net.dtype, net.device) for net in nets}
    if len(kinds) != 1 or len(set(map(id, nets))) != len(nets):
        got = "one of them twice" if len(kinds) == 1 else f"{len(kinds)} kinds"
        raise ValueError(f"[fit_many] nets must be different networks: expected all of one kind, got {got}")
    known = signature(training.plan).parameters.keys() - {"net", "X", "y"}
    if unknown := options.keys() - known:
        raise TypeError(f"[fit_many] options are those of fit: expected no {min(unknown)!r}, got one")
    watching = {"callbacks", "validation_data", "validation_split"} & options.keys()
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


def _is_stacked(X: Any) -> bool:
    if devices.on_gpu(X):
        if len(X.shape) == 3:
            raise TypeError(
                "[fit_many] rows of each network's own are the host's: expected an array there, or one X for "
                f"all networks, got {type(X).__name__} on a GPU"
            )
        return False
    try:
        return np.ndim(X) == 3
    except ValueError:  # ragged, as a plan will say
        return False


def _plans(
    nets: list[Sequential], X: Any, y: Any, optimizer: Any, seed: Any, options: dict[str, Any]
) -> list[training.Plan]:
    """A plan for each network; what they share is one array."""
    count, shared = len(nets), not _is_stacked(X)
    if not shared and (np.ndim(y) == 0 or not len(X) == len(y) == count):
        got = short(y) if np.ndim(y) == 0 else len(y)
        raise ValueError(
            f"[fit_many] X and y must have rows for each network: expected {count} times some, "
            f"got {len(X)} and {got}"
        )
    plans: list[training.Plan] = []
    given = zip(nets, _each("optimizer", optimizer, count), _each("seed", seed, count), strict=True)
    for k, (net, how, number) in enumerate(given):
        rows = (X, y) if shared else (X[k], y[k])
        plan = training.plan(net, *rows, optimizer=how, seed=number, **options)
        plans.append(plan._replace(data=plans[0].data) if k and shared else plan)
    kinds = sorted({type(plan.optimizer).__name__ for plan in plans})
    if len(kinds) > 1:
        raise ValueError(f"[fit_many] optimizers must be alike: expected one class, got {listed(kinds)}")
    return plans


# ------------------------------------------------------------ training

Errors = dict[int, FloatingPointError]  # of networks that diverged, by their place


@contextmanager
def _kept(errors: Errors, place: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        errors[place] = error


def _one_by_one(
    nets: list[Sequential], plans: list[training.Plan], progress: Progress
) -> tuple[list[training.History], Errors]:
    histories: list[training.History] = []
    errors: Errors = {}
    for k, (net, plan) in enumerate(zip(nets, plans, strict=True)):
        run = RUNS.get(type(plan.optimizer), training.EngineRun)(net, plan._replace(verbose=0))
        histories.append(run.history)
        with _kept(errors, k):
            run.run()
        progress.show(k + 1, run.history.logs())
    return histories, errors


def _at_once(
    nets: list[Sequential], plans: list[training.Plan], progress: Progress
) -> tuple[list[training.History], Errors]:
    """By calls of the GPU's engine that train all networks."""
    uploaded: dict[int, batch.Data] = {}  # by id: data that are shared lie there once
    for plan in plans:
        if id(plan.data) not in uploaded:
            uploaded[id(plan.data)] = plan.data.on(nets[0].device)
    runs = [
        training.EngineRun(net, plan, uploaded[id(plan.data)]) for net, plan in zip(nets, plans, strict=True)
    ]
    for run in runs:
        run.together = len(runs)
    chunks = [run.chunks() for run in runs]
    errors: Errors = {}
    live = list(range(len(runs)))
    while live:
        own = [next(chunks[k]) for k in live]
        fewest = min(map(len, own))  # each goes by its own clock, if somebody looks on
        rates = np.stack([rate[:fewest] for rate in own])
        values = devices.run_many([runs[k].trainer for k in live], runs[live[0]].history.epochs, rates)
        for k, losses, rate in zip(live, values, rates, strict=True):
            bad = np.flatnonzero(~np.isfinite(losses))  # the first of these ends a fit
            with _kept(errors, k):
                runs[k].record(*runs[k].paced(losses[: bad[0] + 1] if bad.size else losses, rate))
        progress.show(max(run.history.epochs for run in runs), runs[live[0]].history.logs())
        live = [k for k in live if k not in errors and runs[k].history.epochs < plans[k].epochs]
    for k, run in enumerate(runs):
        if k not in errors:
            with _kept(errors, k):
                run.check_parameters()
    return [run.history for run in runs], errors
