# SPDX-License-Identifier: MIT
"""From a table to the matrix that a network eats, and from the network's outputs back to answers.

    read_table  →  Table  →  Preprocessor.fit / transform  →  X (B, D)  →  network  →  TableModel.predict

The rules, all of them. Numeric column: missing cells take the median of the training rows, then it is
standardised by their mean and standard deviation; a 0/1 column "was missing" follows when any of them lacked
it. Text column: one 0/1 column for each category of the training rows, at most the 50 most frequent; a
missing or unknown category is all zeros. Left out, with a note: columns without a value, and text that never
repeats (an id). Refused: numbers with a few texts among them. A regression target is standardised too, and
predictions are turned back into its unit. Nothing is learnt from rows outside the training part.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ._core import random_uniform
from .checks import EXACT
from .io import load_with_metadata, parse_json, save
from .tables import Column, Table, as_text, is_missing, label_of, listed, parse_numbers, read_table

if TYPE_CHECKING:
    from .model import Sequential

    Path = str | os.PathLike[str]

MAX_CATEGORIES = 50  # of one text column; each is a column of X
MAX_INTEGER_CLASSES = 20  # an integer target with more values is a quantity, not a label
METADATA = "chainrule.table"  # the key in the model file
FORMAT = 1
_SPLIT_STREAM = 0x5EED  # of the random generator; the network's weights come from other streams


# ------------------------------------------------------------ splitting


def split_rows(
    rows: int, shares: Sequence[float], seed: int, labels: NDArray[Any] | None = None
) -> list[NDArray[np.int64]]:
    """Cut 0 … rows−1 into random parts, one for each share and the rest as the last part.

    With labels, each class is cut in these shares (stratified), and keeps at least one row in the last part.

    Raises:
        ValueError: shares that leave nothing, or a part that would be empty.

    Example:
        >>> test, train = split_rows(10, [0.2], seed=0)
        >>> len(test), len(train), sorted([*test, *train]) == list(range(10))
        (2, 8, True)
    """
    if not all(0 <= share < 1 for share in shares) or sum(shares) >= 1:
        raise ValueError(f"[split] shares: expected each at least 0, their sum below 1, got {list(shares)}")
    shuffled = np.argsort(random_uniform(rows, seed, _SPLIT_STREAM), kind="stable")
    of_row = np.zeros(rows, np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    parts: list[list[NDArray[Any]]] = [[shuffled[:0]] for _ in range(len(shares) + 1)]
    for label in np.unique(of_row):
        group = shuffled[of_row[shuffled] == label]
        begin = 0
        for part, share in zip(parts, shares, strict=False):
            end = min(begin + math.floor(share * len(group) + 0.5), len(group) - 1)
            part.append(group[begin:end])
            begin = end
        parts[-1].append(group[begin:])
    found = [np.sort(np.concatenate(part)) for part in parts]
    for chosen, share in zip(found, [*shares, 1.0], strict=True):
        if share > 0 and not len(chosen):
            raise ValueError(
                f"[split] rows: expected enough for shares {list(shares)} and a rest, got {rows}; "
                "add rows, or change the shares (--test-size, --validation-size)"
            )
    return found


# ------------------------------------------------------------ preprocessing


@dataclass(frozen=True)
class Feature:
    """What the training rows taught about one column, and how it becomes columns of X."""

    name: str
    median: float = 0.0
    mean: float = 0.0
    std: float = 1.0
    indicator: bool = False  # numeric: a 0/1 column "was missing" follows
    categories: tuple[str, ...] | None = None  # text: one 0/1 column each; None for a numeric column

    @property
    def width(self) -> int:
        return 1 + self.indicator if self.categories is None else len(self.categories)

    @staticmethod
    def fit(name: str, column: Column) -> Feature:
        """Learn from a training column that has at least one value."""
        if column.dtype == object:
            counts = Counter(cell for cell in column if cell is not None)
            frequent = sorted(counts, key=lambda cell: (-counts[cell], cell))[:MAX_CATEGORIES]
            return Feature(name, categories=tuple(sorted(frequent)))
        require_finite(name, column)
        missing = np.isnan(column)
        median = float(np.median(column[~missing]))
        mean, std = _moments(name, np.where(missing, median, column))
        return Feature(name, median, mean, std, bool(missing.any()))

    def transform(self, column: Column, out: NDArray[Any]) -> None:
        """Fill this feature's columns of X, out (B, width)."""
        if self.categories is not None:
            found = _places(self.categories, column)
            rows = np.flatnonzero(found >= 0)
            out[rows, found[rows]] = 1
            return
        column = self._as_numbers(column)
        require_finite(self.name, column)
        missing = np.isnan(column)
        out[:, 0] = (np.where(missing, self.median, column) - self.mean) / self.std
        if self.indicator:
            out[:, 1] = missing

    def warn(self, column: Column, part: NDArray[Any]) -> None:
        """RuntimeWarning if training knew few or none of these cells; part (B, width) is their code."""
        categories = self.categories or ()
        present = ~is_missing(column)
        others, rows = column[present & ~part.any(axis=1)], present.sum()
        cut = len(categories) == MAX_CATEGORIES  # training had others, too
        if len(others) == rows > 9 * cut or (not cut and 2 * len(others) > rows > 9):
            known, got = listed(categories[:3]), listed([*dict.fromkeys(others)][:2])
            message = f"[TableModel.predict] column {self.name!r}: expected categories such as {known}, "
            message += f"got others in {len(others)} of {rows} cells, such as {got}; in another spelling?"
            warnings.warn(message, RuntimeWarning, stacklevel=6)  # of who called predict

    def _as_numbers(self, column: Column) -> Column:
        if column.dtype != object:
            return column
        for row, cell in enumerate(column, 1):
            if cell is not None and not _is_number(cell):
                where = f"[table] column {self.name!r}"
                raise ValueError(f"{where}: expected numbers as in training, got {cell!r} in row {row}")
        return np.array([math.nan if cell is None else float(cell) for cell in column])


@dataclass(frozen=True)
class Preprocessor:
    """All that the training rows of a table taught, except the weights; it travels in the model file.

    >>> table = Table.from_columns({"size": [1, 2, None, 3], "kind": list("aabb"), "price": [1.5, 2, 3, 9]})
    >>> p = Preprocessor.fit(table, target="price")
    >>> p.task, p.width, [feature.name for feature in p.features]
    ('regression', 4, ['size', 'kind'])
    >>> p.transform(table).round(2)
    array([[-1.41,  0.  ,  1.  ,  0.  ],
           [ 0.  ,  0.  ,  1.  ,  0.  ],
           [ 0.  ,  1.  ,  0.  ,  1.  ],
           [ 1.41,  0.  ,  0.  ,  1.  ]])
    """

    task: str  # "classification" or "regression"
    target: str
    features: tuple[Feature, ...]
    classes: tuple[str, ...] = ()
    mean: float = 0.0  # of the target, in a regression
    std: float = 1.0
    notes: tuple[str, ...] = field(default=(), compare=False)  # what was left out, and why; not saved

    @property
    def width(self) -> int:
        """D, the number of columns of X."""
        return sum(feature.width for feature in self.features)

    @property
    def probability_columns(self) -> tuple[str, ...]:
        """Their names in the answers, one for each class, none of them the target's own.

        >>> Preprocessor("classification", "kind", (), classes=("a", "b")).probability_columns
        ('p_a', 'p_b')
        """
        usual = tuple(f"p_{label}" for label in self.classes)
        return tuple(f"probability_{label}" for label in self.classes) if self.target in usual else usual

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns to read as text even where a new file holds nothing but numbers."""
        return tuple(feature.name for feature in self.features if feature.categories is not None)

    @staticmethod
    def fit(
        table: Table,
        target: str,
        task: str | None = None,
        ignore: Collection[str] = (),
        standardise_target: bool = True,
    ) -> Preprocessor:
        """Learn from the training rows; the target must have a value in each.

        Raises:
            ValueError: no rows or features, unknown columns, infinite numbers, a target that does not fit.
        """
        if not len(table):
            raise ValueError("[table] rows: expected at least one, got none; the file has only a header")
        column = table.column(target)
        if task is None:
            task = infer_task(column)
        elif task not in {"classification", "regression"}:
            raise ValueError(f"[table] task: expected 'classification' or 'regression', got {task!r}")
        refuse_unusable(table, target, ignore)
        features, notes = _fit_features(table, {target, *ignore})
        if task == "classification":
            return Preprocessor(task, target, features, class_labels(target, column), notes=notes)
        _require_numbers(target, column)
        mean, std = _moments(target, column) if standardise_target else (0.0, 1.0)
        return Preprocessor(task, target, features, mean=mean, std=std, notes=notes)

    def transform(self, table: Table, dtype: DTypeLike = np.float64, warn: bool = False) -> NDArray[Any]:
        """X (B, D) of a table with the same feature columns; ValueError names those missing or different.

        With `warn`, RuntimeWarning names the text columns of which few cells or none are known.
        """
        missing = [feature.name for feature in self.features if feature.name not in table.columns]
        if missing:
            raise ValueError(f"[table] columns: expected also {listed(missing)}, got {listed(table.columns)}")
        out = np.zeros((len(table), self.width), dtype=dtype)
        begin = 0
        for feature in self.features:
            part = out[:, begin : begin + feature.width]
            with np.errstate(over="ignore"):  # seen and named right below
                feature.transform(table.columns[feature.name], part)
            if not np.isfinite(part).all():
                got = f"some too far from training's for {out.dtype}"
                raise ValueError(f"[table] column {feature.name!r}: expected moderate numbers, got {got}")
            if warn and feature.categories:
                feature.warn(as_text(table.columns[feature.name]), part)
            begin += feature.width
        return out

    def targets(self, table: Table) -> NDArray[Any]:
        """y (B,) of a table: class indices, int64, or standardised values, float64; ValueError if unknown."""
        column = table.column(self.target)
        if self.task == "regression":
            _require_numbers(self.target, column)
            return (column - self.mean) / self.std
        found = _places(self.classes, column)
        if (found < 0).any():
            got = repr(as_text(column)[found.argmin()])
            raise ValueError(
                f"[table] target {self.target!r}: expected one of {listed(self.classes)}, got {got}"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` is the way back."""
        fields = asdict(self)
        del fields["notes"]
        return fields

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Preprocessor:
        """The preprocessor that `to_dict` described; ValueError when the description is damaged.

        >>> p = Preprocessor("regression", "price", (Feature("size", 2.0, 2.0, 0.5),), mean=3.0, std=2.0)
        >>> Preprocessor.from_dict(json.loads(json.dumps(p.to_dict()))) == p
        True
        """
        try:
            features = tuple(
                Feature(**{**given, "categories": _strings(given["categories"])})
                for given in fields["features"]
            )
            found = Preprocessor(
                **{**fields, "features": features, "classes": _strings(fields["classes"]) or ()}
            )
            if not found._is_sound():
                raise TypeError("values out of range")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"[load] preprocessing: expected a table's description, got {error}") from error
        return found

    def _is_sound(self) -> bool:
        numbers, texts = [self.mean, self.std], [self.target, *(feature.name for feature in self.features)]
        for feature in self.features:
            numbers += [feature.median, feature.mean, feature.std]
        return (
            all(type(n) in {int, float} and math.isfinite(n) for n in numbers)
            and all(type(text) is str for text in texts)
            and all(type(feature.indicator) is bool and feature.std > 0 for feature in self.features)
            and self.std > 0
            and self.task in {"classification", "regression"}
            and (len(self.classes) > 1) == (self.task == "classification")
        )


def infer_task(column: Column) -> str:
    """Classification for text and for at most 20 different integers, regression for every other target.

    >>> infer_task(np.array([1.0, 2.0, 2.0])), infer_task(np.array([0.5, 2.0])), infer_task(np.arange(21.0))
    ('classification', 'regression', 'regression')
    """
    if column.dtype == object:
        _refuse_misread("target", column, _LABELS)
        return "classification"
    values = np.unique(column[~np.isnan(column)])
    few = len(values) <= MAX_INTEGER_CLASSES and bool((values == np.floor(values)).all())
    return "classification" if few else "regression"


def _fit_features(table: Table, leave_out: Collection[str]) -> tuple[tuple[Feature, ...], tuple[str, ...]]:
    features, notes = [], []
    for name, column in table.columns.items():
        if name in leave_out:
            continue
        values = column[~is_missing(column)]
        if not len(values):
            notes.append(f"column {name!r} left out: it has no values")
            continue
        if column.dtype == object:
            distinct = len(set(values))
            if distinct == len(values) > 1:
                notes.append(f"column {name!r} left out: its text never repeats (an id?)")
                continue
            if distinct > MAX_CATEGORIES:
                notes.append(
                    f"column {name!r}: {distinct} different texts, the {MAX_CATEGORIES} most frequent count"
                )
        features.append(Feature.fit(name, column))
    if not features:
        raise ValueError(
            f"[table] columns: expected at least one to predict from, got {listed(table.columns)}"
        )
    return tuple(features), tuple(notes)


def class_labels(name: str, column: Column) -> tuple[str, ...]:
    """The classes of a target in order, as text; ValueError for missing cells, one class only, or an id.

    >>> class_labels("kind", np.array([10.0, 9.0, 10.0, 9.0]))
    ('9', '10')
    """
    require_finite(name, column)
    _require_all(name, column)
    values = set(column.tolist())
    vast = [value for value in values if not isinstance(value, str) and abs(value) >= EXACT]
    if vast:
        raise ValueError(
            f"[table] target {name!r}: expected labels below 2**53, which float64 tells apart, "
            f"got {vast[0]:.0f}; write a letter before them"
        )
    if len(values) < 2:
        raise ValueError(f"[table] target {name!r}: expected at least 2 classes, got {len(values)}")
    if len(values) > max(2, len(column) // 2):
        got = f"{len(values)} different ones in {len(column)} rows; is it an id, or a quantity?"
        raise ValueError(f"[table] target {name!r}: expected labels that repeat, got {got}")
    return tuple(str(label_of(value)) for value in sorted(values))


# ------------------------------------------------------------ a trained table model


@dataclass(frozen=True)
class TableModel:
    """A network with the preprocessing it was trained behind: from tables to answers.

    `chainrule train` writes one; `TableModel.load("model.safetensors").predict("new.csv")` answers.
    """

    net: Sequential
    preprocessor: Preprocessor
    loss: str

    def save(self, path: Path) -> None:
        """Write network and preprocessing to one `.safetensors` file; raises as `chainrule.save` does."""
        table = {"format": FORMAT, "loss": self.loss, "preprocessor": self.preprocessor.to_dict()}
        save(
            self.net, path, {METADATA: json.dumps(table, sort_keys=True, ensure_ascii=False, allow_nan=False)}
        )

    @staticmethod
    def load(path: Path) -> TableModel:
        """Read what `save` wrote; ValueError for a file that is damaged or holds a network alone."""
        net, metadata = load_with_metadata(path)
        where = f"[load] preprocessing of {os.fspath(path)!r}"
        if METADATA not in metadata:
            raise ValueError(
                f"{where}: expected a file of `chainrule train`, got only a network; use chainrule.load"
            )
        table = parse_json(path, metadata[METADATA], "preprocessing", floats=True)
        if table.get("format") != FORMAT:
            got = repr(table.get("format"))
            raise ValueError(f"{where}: expected format {FORMAT}, got {got}; a newer chainrule may read it")
        model = TableModel(net, Preprocessor.from_dict(table.get("preprocessor", {})), str(table.get("loss")))
        expected = (1, outputs_for(model.preprocessor, model.loss))
        try:
            shape = net.predict(np.zeros((1, model.preprocessor.width), model.dtype)).shape
        except ValueError as error:
            raise ValueError(
                f"{where}: expected a network for its {model.preprocessor.width} inputs, got another"
            ) from error
        if shape != expected:
            raise ValueError(f"{where}: expected a network with {expected[1]} outputs, got {shape[1]}")
        return model

    def outputs(self, table: Any) -> NDArray[Any]:
        """The network's raw outputs (B, O) for a path, a `Table`, columns, records, or a data frame."""
        if isinstance(table, (str, os.PathLike)):
            table = read_table(table, self.preprocessor.text_columns)
        elif not isinstance(table, Table):
            table = Table.from_columns(table, self.preprocessor.text_columns)
        return np.asarray(self.net.predict(self.preprocessor.transform(table, self.dtype, warn=True)))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the network."""
        return np.dtype(self.net.array_dtype)

    def answers(self, table: Any) -> dict[str, NDArray[Any]]:
        """Columns (B,): the target, then each class's probability, or the spread if the loss has one."""
        return self.decode(self.outputs(table))

    def predict(self, table: Any) -> NDArray[Any]:
        """The target (B,): class labels as text, or values in the target's own unit."""
        return self.answers(table)[self.preprocessor.target]

    def predict_proba(self, table: Any) -> NDArray[Any]:
        """Class probabilities (B, k) in the order of `preprocessor.classes`; ValueError for a regression."""
        if self.preprocessor.task != "classification":
            raise ValueError(
                "[predict] probabilities: expected a classification, got a regression; use predict"
            )
        return softmax(self.outputs(table))

    def decode(self, f: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The answers that raw outputs (B, O) stand for."""
        p = self.preprocessor
        if p.task == "classification":
            labels = np.array(p.classes, dtype=object)[f.argmax(axis=1)]
            return {p.target: labels} | dict(zip(p.probability_columns, softmax(f).T, strict=True))
        f = f.astype(np.float64)
        if self.loss == "poisson":  # f is the logarithm of the rate
            return {p.target: np.exp(f[:, 0])}
        found = {p.target: f[:, 0] * p.std + p.mean}
        if self.loss == "gaussian_nll":  # f = [mean, log variance]
            found[f"{p.target}_std"] = np.exp(f[:, 1] / 2) * p.std
        return found


def outputs_for(preprocessor: Preprocessor, loss: str) -> int:
    """O, the outputs a network needs: one for each class, or one, or mean and log variance."""
    return len(preprocessor.classes) or (2 if loss == "gaussian_nll" else 1)


def softmax(f: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities (B, k) of logits (B, k), in float64.

    >>> softmax(np.array([[0.0, 0.0], [1000.0, 0.0]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    shifted = f.astype(np.float64) - f.max(axis=1, keepdims=True, initial=-np.inf)
    e = np.exp(shifted)
    return np.asarray(e / e.sum(axis=1, keepdims=True))


# ------------------------------------------------------------ helpers


def _moments(name: str, values: Column) -> tuple[float, float]:
    """Mean and standard deviation; those of a constant column are its value and 1, whatever rounding says."""
    if values.min() == values.max():
        return float(values[0]), 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(values.mean()), float(values.std())
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(
            f"[table] column {name!r}: expected a finite spread, got numbers up to {np.abs(values).max()}"
        )
    return mean, std


def require_finite(name: str, column: Column) -> None:
    """ValueError for infinity in a numeric column, by name and row (from 1); a text column has none."""
    if column.dtype == object:
        return
    infinite = np.flatnonzero(np.isinf(column))
    if len(infinite):
        where = f"row {infinite[0] + 1}"
        raise ValueError(
            f"[table] column {name!r}: expected finite numbers, got {column[infinite[0]]} in {where}"
        )


def _require_numbers(name: str, column: Column) -> None:
    _refuse_misread(f"target {name!r}", column, _LABELS)
    if column.dtype == object:
        text = next((cell for cell in column if cell is not None and not _is_number(cell)), None)
        raise ValueError(
            f"[table] target {name!r}: expected numbers for a regression, got text such as {text!r}"
        )
    require_finite(name, column)
    _require_all(name, column)


def _require_all(name: str, column: Column) -> None:
    if is_missing(column).any():
        raise ValueError(
            f"[table] target {name!r}: expected a value in every row, got missing cells; leave them out"
        )


_LABELS = "; if these are labels, say task 'classification'"


def refuse_unusable(table: Table, target: str, ignore: Collection[str]) -> None:
    """ValueError for infinity, and for numbers that were read as text, in the columns to learn from."""
    for name in ignore:
        table.column(name)  # raises, and lists the columns
    for name, column in table.columns.items():
        if name not in ignore:
            require_finite(name, column)
        if name not in {target, *ignore, *table.text}:
            _refuse_misread(f"column {name!r}", column)


def _refuse_misread(what: str, column: Column, hint: str = " or keep it as text (--text, text=)") -> None:
    """One-hot codes of 3,14 and 2,72, or of numbers and a few -, would train in silence and be worthless."""
    cells = [cell for cell in column if cell is not None] if column.dtype == object else []
    commas = [cell for cell in cells if "," in cell]  # the others may be whole
    if 0 < len(cells) <= 2 * len(commas) and all(re.fullmatch(r"[+-]?\d+(,\d+)?", cell) for cell in cells):
        raise ValueError(
            f"[table] {what}: expected a decimal point, got {commas[0]!r} with a comma; replace it{hint}"
        )
    numbers = {cell for cell in set(cells) if _is_number(cell)}
    count = sum(cell in numbers for cell in cells)
    if len(numbers) <= MAX_INTEGER_CLASSES or not 0.8 * len(cells) <= count < len(cells):
        return
    if not any(re.match("0[0-9]", cell) for cell in numbers):  # those are codes
        odd = listed([*dict.fromkeys(cell for cell in cells if cell not in numbers)][:3])
        got = f"{count} of {len(cells)} cells that are, and {odd}"
        raise ValueError(f"[table] {what}: expected numbers, got {got}; leave such cells empty{hint}")


def _is_number(cell: str) -> bool:
    return parse_numbers([cell], ()) is not None


def _places(names: Sequence[str], column: Column) -> NDArray[np.int64]:
    """Where each cell (B,) is among names, -1 for none of them; as it stands, else in another spelling."""
    place: dict[str | None, int] = {name: k for k, name in enumerate(names)}
    binary = {name.lower() for name in names} <= {"true", "false"}  # then 1 and 0 say the same
    for k, name in enumerate(names):
        for spelling in [*_spellings(name), *(["01"[name.lower() == "true"]] if binary else [])]:
            place.setdefault(spelling, k)

    def of(cell: str | None) -> int:
        if cell is not None and cell not in place:
            place[cell] = next((place[other] for other in _spellings(cell) if other in place), -1)
        return place.get(cell, -1)

    return np.array([of(cell) for cell in as_text(column)], dtype=np.int64)


def _spellings(text: str) -> list[str]:
    """How another program writes the same: pandas has True for a file's true, and 1.0 for 01.

    Digits alone: 12E3 is a code, and of more than 15 digits float64 has a neighbour's.
    """
    if text.lower() in {"true", "false"}:
        return [text.lower(), text.upper(), text.capitalize()]
    digits = re.fullmatch(r"[+-]?[0-9]{1,15}([.][0-9]{1,15})?", text)
    label = label_of(float(text)) if digits and len(text) <= 16 else None
    return [label] if label else []


def _strings(values: Any) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not all(isinstance(value, str) for value in values):
        raise TypeError("something that is not text")
    return tuple(values)
