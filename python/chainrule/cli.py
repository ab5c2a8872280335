# SPDX-License-Identifier: MIT
"""The commands behind `chainrule train`, `predict`, `explain`, `draw`, `demo` and `info`; `__main__` reads
their options.

A command takes the parsed options, writes to standard output and returns nothing; what the user got wrong is
raised as ValueError, OSError or ImportError and becomes one line on standard error there.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from . import _core, devices, explanation, metrics, plot
from .callbacks import EarlyStopping
from .data import Preprocessor, TableModel, class_labels, infer_task, outputs_for, refuse_unusable, split_rows
from .io import load, require_place, require_suffix, write_atomically
from .losses import LOSSES
from .machine import set_num_threads
from .model import array_dtype, mlp
from .optim import GD, OPTIMIZERS
from .tables import Table, as_text, is_missing, read_table
from .terminal import Screen, confusion_lines, curve, duration, enlarged, picture

OPTIMIZER_NAMES = ("gd", *OPTIMIZERS)
ACTIVATIONS = tuple(name for kind, name, _ in _core.ops() if kind == "elementwise")
REGRESSION_LOSSES = tuple(name for name in LOSSES if name not in {"cross_entropy", "logistic", "bce"})

# Small first weights: a few hundred rows need not unlearn a random function first. Means over 16 splits, with
# early stopping: diabetes R² 0.38 with "auto", 0.45 "glorot_uniform", 0.47 "torch"; iris 91, 95 and 95 %.
_INIT = "torch"


# ------------------------------------------------------------ train


@dataclass(frozen=True)
class Part:
    """Some rows of the table, and what the network sees of them."""

    table: Table
    x: NDArray[Any]
    y: NDArray[Any]

    def __len__(self) -> int:
        return len(self.table)


def train(args: Namespace) -> None:
    """Train on a table, measure on rows held out, write one model file."""
    screen = Screen(None if args.quiet else sys.stdout)
    for option, path in (("--output", args.output), ("--checkpoint", args.checkpoint)):
        if path is not None:
            require_suffix("save", path)
            require_place(f"[train] {option}", path)
    if args.checkpoint and os.path.realpath(args.checkpoint) == os.path.realpath(args.output):
        raise ValueError(
            f"[train] --checkpoint: expected a file beside --output, got {args.output!r} twice; name another"
        )
    if args.threads:
        set_num_threads(args.threads)
    table = _read(args, [name for item in args.text for name in (item, *item.split(","))])
    _names(args.text, table)
    args.ignore = _names(args.ignore, table)
    refuse_unusable(table, args.target, args.ignore)  # while its rows are those of the file
    table, notes = _labelled(table, args.target)
    loss = _loss(args, table)
    preprocessor, test, validation, training = _prepare(args, table, loss)
    sizes = [preprocessor.width, *args.hidden, outputs_for(preprocessor, loss)]
    net = mlp(sizes, args.activation, None, args.dropout, _INIT, args.seed, args.dtype)
    model = TableModel(net, preprocessor, loss)
    screen.line(
        screen.bold(f"chainrule {_core.__version__}: {args.target} from {os.path.basename(args.data)}")
    )
    screen.line()
    screen.facts(*_plan(args, model, [training, validation, test]))
    screen.facts(*(("note", note) for note in (*table.notes, *notes, *preprocessor.notes)))
    trained = _fit(args, model, training, validation)
    model.save(args.output)  # before anything is printed about it: its reader may have gone meanwhile
    screen.facts(("trained", trained))
    if len(test):
        screen.heading(f"On the {_count(len(test), 'row')} held out")
        _show_scores(model, test, Screen(sys.stdout))
    screen.heading(f"Saved as {args.output}. To use it:")
    _show_usage(args, screen)


def _read(args: Namespace, text: Collection[str]) -> Table:
    """The table; who looks on is told what takes so long."""
    screen = Screen(sys.stderr)
    if screen.terminal and os.path.getsize(args.data) > 4e6 and not getattr(args, "quiet", False):
        screen.line(f"reading {os.path.basename(args.data)} …")
    return read_table(args.data, text)


def _labelled(table: Table, target: str) -> tuple[Table, list[str]]:
    """The rows that have a target, and a note about the others."""
    missing = is_missing(table.column(target))
    if missing.all():
        got = "only missing cells" if len(table) else "a file without rows"
        raise ValueError(f"[train] target {target!r}: expected values to learn from, got {got}")
    if not missing.any():
        return table, []
    return table.take(~missing), [f"{_count(int(missing.sum()), 'row')} left out: no value in {target!r}"]


def _loss(args: Namespace, table: Table) -> str:
    args.inferred = args.task is None
    args.task = args.task or infer_task(table.column(args.target))
    known = ("cross_entropy",) if args.task == "classification" else REGRESSION_LOSSES
    loss = str(args.loss or ("cross_entropy" if args.task == "classification" else "mse"))
    if loss not in known:
        raise ValueError(f"[train] --loss of a {args.task}: expected one of {', '.join(known)}, got {loss!r}")
    if args.class_weight and args.task == "regression":
        raise ValueError("[train] --class-weight: expected a classification, got a regression; leave it out")
    return loss


def _prepare(args: Namespace, table: Table, loss: str) -> tuple[Preprocessor, Part, Part, Part]:
    """The parts test, validation and training; everything is learnt from the last."""
    labels = None
    if args.task == "classification":
        class_labels(args.target, table.column(args.target))  # an id would leave nothing to hold out
        labels = as_text(table.column(args.target))
    shares = [args.test_size, (1 - args.test_size) * args.validation_size]
    rows = split_rows(len(table), shares, args.seed, labels)
    tables = [table.take(part) for part in rows]
    preprocessor = Preprocessor.fit(tables[-1], args.target, args.task, args.ignore, loss != "poisson")
    parts = [
        Part(t, preprocessor.transform(t, array_dtype(args.dtype)), preprocessor.targets(t)) for t in tables
    ]
    return preprocessor, parts[0], parts[1], parts[2]


def _names(given: Iterable[str], table: Table) -> list[str]:
    """Column names from options like "id,name"; a name that itself holds a comma is found first."""
    names = [n for item in given for n in ([item] if item in table.columns else item.split(","))]
    for name in names:
        table.column(name)  # raises, and lists the columns
    return names


def _plan(args: Namespace, model: TableModel, parts: Sequence[Part]) -> list[tuple[str, str]]:
    p = model.preprocessor
    names = ("to train", "to validate", "held out")
    rows = ", ".join(f"{len(part):,} {name}" for part, name in zip(parts, names, strict=True) if len(part))
    text = len(p.text_columns)
    kinds = {"numeric": len(p.features) - text, "text": text}
    columns = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    task = f"classification of {len(p.classes)} classes" if p.classes else "regression"
    other = "regression" if p.classes else "classification"
    widths = " → ".join(str(n) for n in (p.width, *args.hidden, outputs_for(p, model.loss)))
    batches = "the whole batch" if args.optimizer == "gd" else f"batches of {args.batch_size}"
    weights = [("classes", "balanced: all weigh the same")] if args.class_weight else []
    return [
        ("rows", rows),
        ("columns", f"{columns} → {_count(p.width, 'input')}"),
        ("task", task + (f" (inferred; --task {other} overrides)" if args.inferred else "")),
        *weights,
        ("network", f"{widths}, {args.activation}, {model.net.num_parameters:,} weights, {args.dtype}"),
        ("training", f"{model.loss}, {args.optimizer} at learning rate {args.lr:g}, {batches}"),
    ]


def _fit(args: Namespace, model: TableModel, training: Part, validation: Part) -> str:
    """Train; where the user interrupts it, say how to go on."""
    try:
        return _trained(args, model, training, validation)
    except KeyboardInterrupt:
        if not args.checkpoint or not os.path.exists(args.checkpoint):
            raise
        kept = f"the last checkpoint is in {args.checkpoint!r}: the same command goes on from there"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None


def _trained(args: Namespace, model: TableModel, training: Part, validation: Part) -> str:
    """Train, and say how long it took."""
    stopping = len(validation) > 0 and args.patience > 0
    whole = args.optimizer == "gd"
    start = time.perf_counter()
    history = model.net.fit(
        training.x,
        training.y,
        loss=model.loss,
        optimizer=GD(args.lr) if whole else OPTIMIZERS[args.optimizer](lr=args.lr),
        batch_size=len(training) if whole else args.batch_size,
        epochs=args.epochs,
        seed=args.seed,
        validation_data=(validation.x, validation.y) if len(validation) else None,
        callbacks=[EarlyStopping(patience=args.patience)] if stopping else [],
        l2=args.l2,
        class_weight=args.class_weight,
        verbose=0 if args.quiet else "auto",
        checkpoint=args.checkpoint,
    )
    seconds = time.perf_counter() - start
    earlier = history.first_epoch
    taken = f"{_count(history.epochs - earlier, 'epoch')} in {duration(seconds)}"
    if earlier:
        taken += f", after {earlier:,} of {args.checkpoint!r}"
    if stopping:
        best = int(np.argmin(history["val_loss"])) + 1
        taken += f"; the weights of epoch {best}, the best on the validation rows, are kept"
    return taken


def _show_scores(model: TableModel, part: Part, screen: Screen) -> None:
    f = model.net.predict(part.x)
    p = model.preprocessor
    answers = model.decode(f)
    if p.task == "regression":
        y = part.table.column(p.target)
        predicted = answers[p.target]
        screen.facts(
            ("RMSE", f"{metrics.rmse(y, predicted):.5g}"),
            ("MAE", f"{metrics.mae(y, predicted):.5g}"),
            ("R²", f"{metrics.r2(y, predicted):.4f}" if len(y) > 1 else "needs two rows"),
        )
        return
    best = f.argmax(axis=1)
    probabilities = np.stack([answers[name] for name in p.probability_columns], axis=1)
    counts = metrics.confusion(part.y, best, len(p.classes))
    usual = counts.sum(axis=1).max() / len(part)
    accuracy = metrics.accuracy(part.y, best)
    screen.facts(
        ("accuracy", f"{100 * accuracy:.1f} %   (the most frequent class alone: {100 * usual:.1f} %)"),
        ("log-loss", f"{metrics.log_loss(part.y, probabilities):.4f}"),
    )
    screen.line()
    for line in confusion_lines(counts, p.classes, screen.width):
        screen.line(line)


def _show_usage(args: Namespace, screen: Screen) -> None:
    suffix = os.path.splitext(args.data)[1] or ".csv"
    screen.line(f"  chainrule predict {args.output} new{suffix}")
    screen.line()
    screen.line("  from chainrule.data import TableModel")
    screen.line(f"  model = TableModel.load({args.output!r})")
    screen.line(f'  print(model.predict("new{suffix}"))')


# ------------------------------------------------------------ predict


def predict(args: Namespace) -> None:
    """Write one line of answers for each row of a table, as CSV."""
    for what, path in (("model", args.model), ("data", args.data)):
        if args.output and os.path.exists(args.output) and os.path.samefile(args.output, path):
            raise ValueError(
                f"[predict] --output: expected another file than the {what}, got {args.output!r}"
            )
    if not args.output and sys.stdout is None:
        raise ValueError("[predict] standard output: expected an open one, got none; use --output FILE")
    model = TableModel.load(args.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        answers = model.answers(_read(args, model.preprocessor.text_columns))
    for warning in caught:
        Screen(sys.stderr).line(f"chainrule: note: {warning.message}")
    with _answers_to(args.output) as file:
        _write_csv(file, answers)


@contextmanager
def _answers_to(path: str | None) -> Iterator[TextIO]:
    """A file, whole or not at all, or a device; standard output like a file, on Windows as well."""
    if not path:
        if os.name == "nt" and not sys.stdout.isatty() and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="")
        yield sys.stdout
        return
    device = os.path.exists(path) and not os.path.isfile(path)
    try:
        with open(path, "w", encoding="utf-8") if device else io.StringIO() as file:
            yield file
            if isinstance(file, io.StringIO):
                write_atomically(path, [file.getvalue().encode()])
    except OSError as error:
        error.filename = error.filename or path  # a full disk names none
        raise


def _write_csv(file: TextIO, columns: dict[str, NDArray[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    texts = [
        column if column.dtype == object else [f"{v:.8g}" for v in column] for column in columns.values()
    ]
    writer.writerows(zip(*texts, strict=True))


# ------------------------------------------------------------ explain, draw


def explain(args: Namespace) -> None:
    """Show the chain-rule product of one gradient, for one row of a table."""
    model, x, y = _example("explain", args)
    if y is None:
        target = model.preprocessor.target
        raise ValueError(
            f"[explain] target {target!r}: expected a value in row {args.row} of {args.data!r}, got none; "
            "a loss needs one"
        )
    screen = Screen(sys.stdout)
    for line in str(explanation.explain(model.net, x, y, model.loss, args.wrt)).split("\n"):
        screen.line(line)


def draw(args: Namespace) -> None:
    """Draw a network, with the values of one row of a table if there is one, as an SVG file."""
    plot.require_svg("draw", args.output)
    if args.data is None:
        if args.row is not None:
            raise ValueError(f"[draw] --row: expected a data file to take it from, got only row {args.row}")
        drawing = plot.draw(load(args.model))
    else:
        args.row = args.row or 1
        model, x, y = _example("draw", args)
        drawing = plot.draw(model.net, x, y, model.loss)
    drawing.save(args.output)
    Screen(sys.stdout).line(f"Saved as {args.output}: {drawing.description}")


def _example(op: str, args: Namespace) -> tuple[TableModel, NDArray[Any], NDArray[Any] | None]:
    """The model, one row as it sees it, and its target; None where the table does not hold one."""
    model = TableModel.load(args.model)
    p = model.preprocessor
    table = _read(args, (*p.text_columns, p.target) if p.classes else p.text_columns)
    if not 1 <= args.row <= len(table):
        rows = f"1 to {len(table):,}" if len(table) else "a file with rows"
        raise ValueError(f"[{op}] --row: expected {rows}, got {args.row}")
    row = table.take(np.array([args.row - 1]))
    known = p.target in row.columns and not is_missing(row.column(p.target)).any()
    return model, p.transform(row, model.dtype), p.targets(row) if known else None


# ------------------------------------------------------------ demo


def demo(args: Namespace) -> None:
    """Train on handwritten digits and show what happened."""
    screen = Screen(sys.stdout)
    if args.threads:
        set_num_threads(args.threads)
    images, labels = _digits()
    test, training = split_rows(len(images), [0.25], args.seed, labels)
    x = images.reshape(len(images), -1)
    mean, std = x[training].mean(axis=0), x[training].std(axis=0)
    x = ((x - mean) / np.where(std > 0, std, 1)).astype(np.float32)
    net = mlp([64, 256, 10], seed=args.seed)
    screen.line(screen.bold(f"chainrule {_core.__version__}: reading handwritten digits"))
    screen.line()
    screen.facts(
        ("data", f"{len(x):,} scans of 8 × 8 pixels (UCI); {len(training):,} to train, {len(test)} held out"),
        ("network", f"64 → 256 → 10, relu, {net.num_parameters:,} weights, {net.dtype}"),
        ("training", f"cross_entropy, adam, l2 0.002, {args.epochs} epochs in batches of 32"),
    )
    start = time.perf_counter()
    history = net.fit(
        x[training], labels[training], loss="cross_entropy", epochs=args.epochs, l2=2e-3, seed=args.seed
    )
    seconds = time.perf_counter() - start
    predicted = net.predict(x[test]).argmax(axis=1)
    screen.line()
    for line in curve(history["loss"], screen, "training loss"):
        screen.line(line)
    screen.line()
    right = int((predicted == labels[test]).sum())
    steps = args.epochs * -(-len(training) // 32)
    accuracy = f"{100 * right / len(test):.1f} % of the digits held out, {right} of {len(test)}"
    screen.facts(
        ("accuracy", screen.bold(accuracy)),
        ("time", f"{duration(seconds)} of training, {duration(seconds / steps)} per step of 32 images"),
        ("engine", f"{_core.isa()}, {_count(_core.num_threads(), 'thread')}"),
    )
    screen.line()
    _show_digits(images[test] / 16, labels[test], predicted, screen)
    _show_next(screen)


def _digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Images (1797, 8, 8) with values 0 to 16, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        wanted = 'expected scikit-learn, which brings them, got no such module; pip install "chainrule[demo]"'
        raise ImportError(f"[demo] digits: {wanted}") from None
    digits = load_digits()
    return digits.images, digits.target.astype(np.int64)


def _show_digits(images: NDArray[Any], labels: NDArray[Any], predicted: NDArray[Any], screen: Screen) -> None:
    """One row of scans with what the network read, a mistake among them if there is one."""
    size, width = (12, 12) if screen.unicode else (8, 16)
    count = min(6, (screen.width - 2) // (width + 3))
    wrong = np.flatnonzero(predicted != labels)[:1]
    right = np.flatnonzero(predicted == labels)
    _, first = np.unique(labels[right], return_index=True)  # different digits tell more than equal ones
    chosen = np.concatenate([np.sort(right[first])[: count - len(wrong)], wrong])
    drawn = [picture(enlarged(images[k], size), screen) for k in chosen]
    for row in zip(*drawn, strict=True):
        screen.line("  " + "   ".join(row))
    read = [
        f"{p} ✓" if p == y else f"{p} (is a {y})"
        for p, y in zip(predicted[chosen], labels[chosen], strict=True)
    ]
    screen.line("  " + "   ".join(f"{text:^{width}}" for text in read))


def _show_next(screen: Screen) -> None:
    screen.heading("The same in Python, and what to run next:")
    for line in (
        "import chainrule as cr",
        "net = cr.mlp([64, 256, 10])",
        'net.fit(X, y, loss="cross_entropy", epochs=60, l2=2e-3)',
        "",
        "chainrule train data.csv --target column    a network for your own table",
        "chainrule train --help                      all its options",
    ):
        screen.line(f"  {line}")


# ------------------------------------------------------------ info


def info(args: Namespace) -> None:
    """What this installation is and what it runs on."""
    others = [name for name in _core.isas() if name != _core.isa()]
    Screen(sys.stdout).facts(
        ("chainrule", _core.__version__),
        ("engine", _core.isa() + (f" (this machine also runs {', '.join(others)})" if others else "")),
        ("threads", _count(_core.num_threads(), "thread")),
        ("GPU", devices.state()),
        ("NumPy", np.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
