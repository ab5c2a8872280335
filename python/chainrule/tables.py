# SPDX-License-Identifier: MIT
"""Tables of named columns, read from CSV or Parquet files.

A cell is missing when it is empty or, in CSV, one of `MISSING`; elsewhere null, NaN or None. A column is
numeric when every other cell is a number, else it is text. Columns without a name are left out, with a note:
they are row numbers more often than not.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    Path = str | os.PathLike[str]

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "None", "?"})
DELIMITERS = ",;\t|"
_NULLS = frozenset({"None", "nan", "NaN", "<NA>", "NaT"})  # how what is no text says that it is no value
_VALUES = (str, int, float, np.generic, date, type(None))  # of a record: what a CSV's cell may have been
_CHUNK = 2048  # rows turned into numbers together, few enough that the cells' text stays in the cache
_OTHERS = {  # how they begin, read as text
    "\x1f\ufffd": "a gzip file; gunzip it first",
    "PK\x03\x04": "a ZIP archive or Excel workbook; unpack it, or export the sheet as CSV",
}

Column = NDArray[Any]  # float64 with NaN for a missing cell, or objects: str, and None for a missing cell


@dataclass(frozen=True)
class Table:
    """Named columns of equal length: float64 (NaN = missing) or objects (str, None = missing).

    >>> table = Table.from_columns({"size": [1, 2, None], "kind": ["a", None, "b"]})
    >>> len(table), table.columns["size"], table.columns["kind"]
    (3, array([ 1.,  2., nan]), array(['a', None, 'b'], dtype=object))
    """

    columns: dict[str, Column]
    notes: tuple[str, ...] = ()
    text: frozenset[str] = frozenset()  # the columns that were to stay text, whatever their cells look like

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, rows: NDArray[Any]) -> Table:
        """The table of these rows, an index or boolean array."""
        return replace(self, columns={name: column[rows] for name, column in self.columns.items()})

    def column(self, name: str) -> Column:
        """One column; ValueError lists the known names."""
        if name not in self.columns:
            why = "".join(f"; {note}" for note in self.notes if note.startswith(f"column {name!r} left out"))
            raise ValueError(f"[table] column {name!r}: expected one of {listed(self.columns)}{why}")
        return self.columns[name]

    @staticmethod
    def from_columns(columns: Any, text: Collection[str] = ()) -> Table:
        """A table from a dict of sequences, a data frame, or records {name: value}, one or a list of them.

        `text` names columns whose text stays text.

        >>> Table.from_columns([{"size": 1, "kind": "a"}, {"size": 2}]).columns
        {'size': array([1., 2.]), 'kind': array(['a', None], dtype=object)}

        Raises: TypeError for what has no named columns; ValueError for unequal lengths or duplicate names.
        """
        columns = _by_columns(columns)
        if not hasattr(columns, "columns") and not isinstance(columns, Mapping):
            raise TypeError(
                "[table] columns must have names: expected a path, a dict of columns, records or a data "
                f"frame, got {type(columns).__name__}"
            )
        names = list(columns.columns) if hasattr(columns, "columns") else list(columns)
        _require_different("[table] columns", map(str, names))
        found = {str(name): to_column(columns[name], str(name) in text) for name in names}
        lengths = {len(column) for column in found.values()}
        if len(lengths) != 1:
            raise ValueError(
                f"[table] columns: expected one length for all, got {sorted(lengths) or 'no columns'}"
            )
        return Table(found, text=frozenset(text))


def _by_columns(given: Any) -> Any:
    """Records as a dict of columns, None where one lacks a value; all else as it is."""
    if isinstance(given, Mapping) and given and all(isinstance(v, _VALUES) for v in given.values()):
        given = [given]
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(r, Mapping) for r in given):
        return given
    names = dict.fromkeys(name for record in given for name in record)
    return {name: [record.get(name) for record in given] for name in names}


def read_table(path: Path, text: Collection[str] = ()) -> Table:
    """Read a CSV file (UTF-8, header line; comma, semicolon, tab or bar) or, by its suffix, a Parquet file.

    Args:
        path: the file; `.parquet` and `.pq` are Parquet, everything else is CSV.
        text: columns to keep as text even if every cell is a number.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or ragged file (the message names the line), a missing header, duplicate names,
            another format; a pipe, for the file is gone through more than once.
        ImportError: Parquet without pyarrow.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "homes.csv"
        ...     _ = file.write_text("rooms;town\\n3;Ulm\\n4;?\\n")
        ...     read_table(file).columns
        {'rooms': array([3., 4.]), 'town': array(['Ulm', None], dtype=object)}
    """
    if os.path.splitext(os.fspath(path))[1].lower() in {".parquet", ".pq"}:
        return _read_parquet(path, text)
    mode = os.stat(path).st_mode  # before opening: a pipe would block for ever
    if stat.S_ISDIR(mode):  # Windows would say that it is not permitted
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"[read] {os.fspath(path)!r}: expected a file on disk, got a pipe or device; save it first"
        )
    delimiter = _delimiter(path)
    table, misjudged = _read_csv(path, delimiter, set(text))
    if misjudged:  # numbers in the first rows, text further down: once more, now knowing
        table, _ = _read_csv(path, delimiter, misjudged.union(text))
    return replace(table, text=frozenset(text))


def _read_csv(path: Path, delimiter: str, forced: Collection[str]) -> tuple[Table, set[str]]:
    """The table, and the columns that turned out to be text after rows of theirs had become numbers."""
    records = _records(path, delimiter)
    names = _header(path, next(records, []))
    parts: list[list[Column]] = [[] for _ in names]
    text, misjudged = {name for name in names if name in forced}, set[str]()
    known: dict[str, str] = {}  # one str object for each distinct text
    while chunk := list(itertools.islice(records, _CHUNK)):
        for name, part, cells in zip(names, parts, zip(*chunk, strict=True), strict=True):
            numbers = None if not name or name in text or name in misjudged else parse_numbers(cells)
            if numbers is None and name and name not in text:
                (misjudged if part else text).add(name)
            part.append(_texts(cells, known, MISSING) if numbers is None else numbers)
    columns = {
        name: np.concatenate(part or [np.zeros(0)]) for name, part in zip(names, parts, strict=True) if name
    }
    nameless = [k for k, name in enumerate(names, 1) if not name]
    notes = tuple(f"column {k} left out: it has no name (row numbers?)" for k in nameless)
    return Table(columns, notes), misjudged


def _records(path: Path, delimiter: str) -> Iterator[list[str]]:
    """The file's records, blank lines skipped, every one as wide as the first."""
    width = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)

        def bad(expected: str) -> ValueError:
            where = f"line {reader.line_num} of {os.fspath(path)!r}"
            return ValueError(f"[read] {where}: expected {expected}")

        try:
            for record in reader:
                if not record or (width != 1 and len(record) == 1 and not record[0].strip()):
                    continue
                width = width or len(record)
                if len(record) != width:
                    raise bad(f"{width} cells as in the header, got {len(record)}")
                yield record
        except csv.Error as error:
            raise bad(f"well-formed CSV, got: {error}; is a quote unclosed?") from error
        except UnicodeDecodeError as error:
            got = f"byte 0x{error.object[error.start]:02x}"
            raise ValueError(
                f"[read] {os.fspath(path)!r}: expected UTF-8 text, got {got}; save it as UTF-8"
            ) from error


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    where = f"header of {os.fspath(path)!r}"
    if not any(names):
        got = "only empty ones" if names else "an empty file"
        raise ValueError(f"[read] {where}: expected column names, got {got}")
    numbers = parse_numbers([name for name in names if name])
    if numbers is not None and np.isfinite(numbers).any():
        raise ValueError(f"[read] {where}: expected column names, got numbers; put a line with names on top")
    _require_different(f"[read] {where}", filter(None, names))
    return names


def _require_different(where: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{where}: expected different names, got {twice[0]!r} more than once")


def _delimiter(path: Path) -> str:
    """The delimiter under which most of the first lines are as wide as the header."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        sample = file.read(65536)
        for start, what in _OTHERS.items():
            if sample.startswith(start):
                raise ValueError(f"[read] {os.fspath(path)!r}: expected CSV, got {what}")
        complete = sample if not file.read(1) else sample[: sample.rfind("\n") + 1] or sample

    def agreement(delimiter: str) -> tuple[float, int]:
        try:
            reader = csv.reader(io.StringIO(complete, newline=""), delimiter=delimiter, skipinitialspace=True)
            widths = [len(row) for row in itertools.islice(reader, 50) if row]
        except csv.Error:
            return 0.0, 0
        if not widths or widths[0] < 2:
            return 0.0, 0
        return sum(width == widths[0] for width in widths) / len(widths), widths[0]

    return max(DELIMITERS, key=agreement)


def parse_numbers(cells: Sequence[str], missing: Collection[str] = MISSING) -> Column | None:
    """Cells as numbers, missing ones NaN; None when any is something else. Python's 1_000 is no number."""
    try:
        values = [math.nan if cell in missing else float(cell) for cell in map(str.strip, cells)]
    except ValueError:
        return None
    return None if "_" in "".join(cells) else np.array(values, dtype=np.float64)


def _texts(cells: Iterable[str], known: dict[str, str], missing: Collection[str]) -> Column:
    found = [None if cell in missing else known.setdefault(cell, cell) for cell in map(str.strip, cells)]
    column = np.empty(len(found), dtype=object)
    column[:] = found
    return column


def to_column(values: Any, text: bool = False) -> Column:
    """Any sequence as a column: numbers stay numbers, all else is read as the text of a CSV cell is.

    With `text`, text stays text even if every cell is a number: "01" is no 1.
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"[table] column: expected one dimension, got {array.ndim}")
    is_array = hasattr(values, "dtype")
    if array.dtype.kind in "iuf" and (is_array or not any(isinstance(v, (bool, np.bool_)) for v in values)):
        return array.astype(np.float64)
    if array.dtype.kind == "M":
        array, is_array = array.astype("M8[us]"), True  # in nanoseconds, its list would be one of integers
    cells = _written(array.tolist() if is_array else values)  # a list's own: NumPy makes "nan" of a NaN there
    numbers = None if text else parse_numbers(cells, {""})
    return _texts(cells, {}, {""}) if numbers is None else numbers


def _written(values: Sequence[Any]) -> list[str]:
    """Values as a CSV file has them: null is empty, and days have no time of day."""
    cells = ["" if not isinstance(v, str) and str(v) in _NULLS else str(v) for v in values]
    midnight = all(cell.endswith(" 00:00:00") for cell in cells if cell)
    if midnight and any(isinstance(v, datetime) for v in values):
        cells = [cell[:10] for cell in cells]
    return cells


def _read_parquet(path: Path, text: Collection[str]) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        wanted = 'expected pyarrow, got no such module; pip install "chainrule[parquet]"'
        raise ImportError(f"[read] {os.fspath(path)!r}: {wanted}") from None
    try:
        arrow = pyarrow.parquet.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"[read] {os.fspath(path)!r}: expected a Parquet file, got: {error}") from error
    names = _header(path, arrow.column_names)
    columns, notes = {}, []
    for name, column in zip(names, arrow.columns, strict=True):
        kind = str(column.type.value_type if pa.types.is_dictionary(column.type) else column.type)
        if re.fullmatch(r"__index_level_\d+__", name):
            notes.append(f"column {name!r} left out: it is the row index of a data frame")
        elif re.match("u?int|half|float|double|decimal", kind):
            columns[name] = np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
        elif re.match("(large_)?string|bool|date|timestamp", kind):
            columns[name] = to_column(column.to_pylist(), text=True)
        else:
            notes.append(f"column {name!r} left out: {column.type} is no number, text, boolean or date")
        if name in text and name in columns:
            columns[name] = as_text(columns[name])
    return Table(columns, tuple(notes), frozenset(text))


# ------------------------------------------------------------ cells


def is_missing(column: Column) -> NDArray[np.bool_]:
    """Where a column (B,) has no value."""
    if column.dtype == object:
        return np.array([cell is None for cell in column], dtype=bool)
    return np.isnan(column)


def label_of(value: Any) -> str | None:
    """A cell as the text of a class or category: 3.0 is "3"."""
    if isinstance(value, str) or value is None:
        return value
    if value != value:
        return None
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))


def as_text(column: Column) -> Column:
    """A column with its numbers written out."""
    if column.dtype == object:
        return column
    found = np.empty(len(column), dtype=object)
    found[:] = [label_of(value) for value in column.tolist()]
    return found


def listed(names: Iterable[str]) -> str:
    """Names for a message, cut where it would fill the screen."""
    known = [repr(name) for name in names]
    return ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
