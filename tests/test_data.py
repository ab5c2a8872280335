# SPDX-License-Identifier: MIT
"""Tables: what is read, how it becomes numbers, and that nothing is learnt outside the training rows."""

import csv
import datetime
import gzip
import io as streams
import json
import os
import warnings
import zipfile

import numpy as np
import pytest

import chainrule as cr
from chainrule import io, metrics, tables
from chainrule.data import Feature, Preprocessor, TableModel, infer_task, softmax, split_rows
from chainrule.tables import MISSING, Table, read_table


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def zipped(content):
    """An archive, which is what an .xlsx file is, too."""
    file = streams.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", content)
    return file.getvalue()


def assert_table(table, expected):
    assert list(table.columns) == list(expected)
    for name, values in expected.items():
        column = table.columns[name]
        kind = object if any(isinstance(v, str) for v in values) else float
        assert column.dtype == kind, name
        same = [a == b or (a != a and b != b) for a, b in zip(column, values, strict=True)]
        assert all(same), (name, column)


NAN = float("nan")


# ------------------------------------------------------------ CSV


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b\n1,2\n3,4\n", {"a": [1, 3], "b": [2, 4]}),
        ("a,b\n1,2\n3,4", {"a": [1, 3], "b": [2, 4]}),
        ("a,b\r\n1,2\r\n3,4\r\n", {"a": [1, 3], "b": [2, 4]}),
        ("a;b\n1;x,y\n3;z\n", {"a": [1, 3], "b": ["x,y", "z"]}),
        ("a\tb\n1\tx y\n", {"a": [1], "b": ["x y"]}),
        ("a|b\n1|2\n", {"a": [1], "b": [2]}),
        ("a\n1\n2\n", {"a": [1, 2]}),
        ("\ufeffa,b\n1,2\n", {"a": [1], "b": [2]}),
        ('"a, first",b\n"1","x ""y"""\n', {"a, first": [1], "b": ['x "y"']}),
        ('a,b\n1,"two\nlines"\n', {"a": [1], "b": ["two\nlines"]}),
        ('a, b\n 1 , "x, y"\n', {"a": [1], "b": ["x, y"]}),
        ("a,b\n\n1,2\n   \n3,4\n\n", {"a": [1, 3], "b": [2, 4]}),
        ("a,b\n1,x\n,?\n", {"a": [1, NAN], "b": ["x", None]}),
        ("a,b\n-1.5e3,+2\n.5,NaN\n", {"a": [-1500, 0.5], "b": [2, NAN]}),
        ("a,b\n1_000,2\n5,2\n", {"a": ["1_000", "5"], "b": [2, 2]}),
        ("a,b\n,1\n,2\n", {"a": [NAN, NAN], "b": [1, 2]}),
        ("a,b\n", {"a": [], "b": []}),
        ("größe,名前\n1,猫\n", {"größe": [1], "名前": ["猫"]}),
    ],
)
def test_csv(tmp_path, text, expected):
    assert_table(read_table(write(tmp_path / "t.csv", text)), expected)


@pytest.mark.parametrize("marker", sorted(MISSING))
def test_every_missing_marker(tmp_path, marker):
    table = read_table(write(tmp_path / "t.csv", f"n,t\n1,x\n{marker},{marker}\n"))
    assert_table(table, {"n": [1, NAN], "t": ["x", None]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected column names, got an empty file"),
        ("\n\n", "expected column names, got an empty file"),
        (",,\n1,2,3\n", "expected column names, got only empty ones"),
        ("1,2\n3,4\n", "expected column names, got numbers"),
        ("a,b,a\n1,2,3\n", "expected different names, got 'a' more than once"),
        ("a,b\n1,2\n3\n5,6\n", "line 3 of .*expected 2 cells as in the header, got 1"),
        ("a,b\n1,2\n\n3,4,5\n", "line 4 of .*expected 2 cells as in the header, got 3"),
        ('a,b\n1,"x\ny"\n3\n', "line 4 of .*expected 2 cells"),
        ('a,b\n1,"x\n2,3\n', "line 3 of .*well-formed CSV.*is a quote unclosed"),
        ('a,b\n"x"y,3\n', "line 2 of .*well-formed CSV"),
        ("a,b\n1," + "x" * 200_000 + "\n", "line 2 of .*well-formed CSV.*field larger"),
    ],
)
def test_what_is_no_table_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"\[read\].*{message}") as caught:
        read_table(write(tmp_path / "bad.csv", text))
    assert "bad.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, "expected CSV, got a gzip file; gunzip it first"),
        (zipped, "expected CSV, got a ZIP archive or Excel workbook; unpack it, or export the sheet as CSV"),
    ],
)
def test_packed_tables_are_refused_by_what_they_are(tmp_path, pack, message):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(pack(b"a,b\n1,2\n"))
    with pytest.raises(ValueError, match=rf"\[read\] '.*t\.csv\.gz': {message}"):
        read_table(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = write(tmp_path / "bad.csv", "größe,name\n1,é\n", encoding)
    with pytest.raises(ValueError, match=r"bad\.csv.*expected UTF-8 text, got byte 0x.*save it as UTF-8"):
        read_table(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(IsADirectoryError):
        read_table(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="pipes have names here where /dev/fd is")
def test_a_pipe_is_refused():
    """A table gone through more than once, of which a pipe gives nothing the second time."""
    inside, outside = os.pipe()
    os.write(outside, b"a,b\n1,2\n")
    os.close(outside)
    with pytest.raises(ValueError, match="expected a file on disk, got a pipe or device"):
        read_table(f"/dev/fd/{inside}")
    os.close(inside)


def test_columns_without_a_name_are_left_out_with_a_note(tmp_path):
    table = read_table(write(tmp_path / "t.csv", ",a,\n0,5,\n1,6,\n"))
    assert_table(table, {"a": [5, 6]})
    assert table.notes == tuple(f"column {k} left out: it has no name (row numbers?)" for k in (1, 3))


def test_a_column_may_turn_out_to_be_text_late_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK", 4)
    for rows in range(3, 14):
        for late in range(rows):
            cells = [f"{k}.50" for k in range(rows)]
            cells[late] = "x"
            text = "a,b\n" + "".join(f"{cell},{k}\n" for k, cell in enumerate(cells))
            assert_table(read_table(write(tmp_path / "t.csv", text)), {"a": cells, "b": range(rows)})


def test_columns_can_be_kept_as_text(tmp_path):
    path = write(tmp_path / "t.csv", "zip,n\n01069,1\n,2\n")
    assert_table(read_table(path, text=["zip"]), {"zip": ["01069", None], "n": [1, 2]})


def test_any_table_survives_a_trip_through_csv(tmp_path):
    """Cells of every awkward kind, in every delimiter."""
    draw = np.random.default_rng(0)
    awkward = [
        "plain",
        "a,b",
        "a;b",
        'say "x"',
        "two\nlines",
        "tab\there",
        "bar|bar",
        "ä €",
        "x" * 500,
        "1,5",
        "'",
    ]
    for delimiter in ",;\t|":
        rows = [[awkward[draw.integers(len(awkward))], f"{draw.normal():.17g}"] for _ in range(60)]
        with open(tmp_path / "t.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["text", "number"], *rows])
        table = read_table(tmp_path / "t.csv")
        assert_table(table, {"text": [t for t, _ in rows], "number": [float(n) for _, n in rows]})


# ------------------------------------------------------------ Parquet and columns in memory


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pa.table(
        {
            "i": pa.array([1, None, 3]),
            "f": pa.array([0.5, 1.5, None], pa.float32()),
            "t": pa.array(["x", None, "?"]),
            "b": pa.array([True, None, False]),
            "c": pa.array(["u", "v", "u"]).dictionary_encode(),
            "d": pa.array([1, 2, 3], pa.duration("ms")),
        }
    )
    parquet.write_table(arrow, tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", text=["i"])
    expected = {
        "i": ["1", None, "3"],
        "f": [0.5, 1.5, NAN],
        "t": ["x", None, "?"],
        "b": ["True", None, "False"],
    }
    assert_table(table, {**expected, "c": ["u", "v", "u"]})
    assert table.notes == ("column 'd' left out: duration[ms] is no number, text, boolean or date",)
    with pytest.raises(
        ValueError, match=r"column 'd': expected one of 'i', .*; column 'd' left out: duration"
    ):
        table.column("d")
    with pytest.raises(ValueError, match=r"bad\.parquet.*expected a Parquet file"):
        read_table(write(tmp_path / "bad.parquet", "a,b\n1,2\n"))
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.parquet")


def test_parquet_as_data_frames_write_it(tmp_path):
    """A row index that is no range, whole numbers that float64 rounds, text of every kind."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pa.table(
        {
            "x": [1.0, 2.0],
            "id": [2**60 + 1, 2**60 + 3],
            "large": pa.array(["u", "v"], pa.large_string()),
            "view": pa.array(["u", "v"], pa.string_view()),
            "__index_level_0__": [17, 4],
        }
    )
    parquet.write_table(arrow, tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert_table(table, {"x": [1, 2], "id": [2.0**60] * 2, "large": ["u", "v"], "view": ["u", "v"]})
    assert table.notes == ("column '__index_level_0__' left out: it is the row index of a data frame",)


def test_days_and_times_in_parquet_are_those_of_the_csv_file(tmp_path):
    """The table that pandas wrote both ways, with gaps, a time zone and the days of pyarrow's own type."""
    pd = pytest.importorskip("pandas")
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    days = pd.to_datetime(["2024-05-05", None, "2023-12-31"])
    frame = pd.DataFrame({"x": [1, 2, 3], "day": days, "noon": days + pd.Timedelta("12h30min")})
    frame["there"] = days.tz_localize("Europe/Berlin")
    for unit in ("s", "ms", "us", "ns"):
        frame["day"] = frame["day"].astype(f"datetime64[{unit}]")
        frame.to_csv(tmp_path / "t.csv", index=False)
        arrow = pa.Table.from_pandas(frame)
        parquet.write_table(arrow, tmp_path / "t.parquet")
        expected = read_table(tmp_path / "t.csv")
        assert expected.columns["day"].tolist() == ["2024-05-05", None, "2023-12-31"]
        assert_table(read_table(tmp_path / "t.parquet"), expected.columns)
        assert_table(Table.from_columns(frame), expected.columns)
    arrow = arrow.set_column(1, "day", arrow["day"].cast(pa.date32()))
    parquet.write_table(arrow, tmp_path / "t.parquet")
    assert_table(read_table(tmp_path / "t.parquet"), expected.columns)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array(["2024-05-05", "NaT"], "M8[ns]"), ["2024-05-05", None]),
        (
            np.array(["2024-05-05", "2024-05-06T10:30"], "M8[ns]"),
            ["2024-05-05 00:00:00", "2024-05-06 10:30:00"],
        ),
        ([np.datetime64("2024-05-05")], ["2024-05-05"]),
        ([datetime.date(2024, 5, 5), None], ["2024-05-05", None]),
        ([datetime.datetime(2024, 5, 5), None], ["2024-05-05", None]),
        ([datetime.datetime(2024, 5, 5, 10, 30)], ["2024-05-05 10:30:00"]),
        (["2024-05-05 00:00:00"], ["2024-05-05 00:00:00"]),  # text stays as it is
        ([True, None, False], ["True", None, "False"]),
        ([True, NAN, False], ["True", None, "False"]),
        ([np.True_, 1.5, NAN], ["True", "1.5", None]),
        ((1, NAN, 0), [1, NAN, 0]),
        (["x", NAN, None], ["x", None, None]),
        (["None", "N/A", "nan", "?", "", None], ["None", "N/A", "nan", "?", None, None]),
        (["1", "2.5", None], [1, 2.5, NAN]),
    ],
    ids=str,
)
def test_values_in_memory_are_the_cells_of_a_csv_file(values, expected):
    assert_table(Table.from_columns({"t": values}), {"t": expected})


def test_a_class_called_none_is_missing_in_csv_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = ["None", "mild", "N/A", "None", "mild", "N/A", None]
    parquet.write_table(pa.table({"symptom": cells, "x": range(7)}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet")
    assert_table(table, {"symptom": cells, "x": range(7)})
    p = Preprocessor.fit(table.take(np.arange(6)), "symptom")
    assert p.classes == ("N/A", "None", "mild")
    numbers = Preprocessor.fit(Table.from_columns({"x": [1.0, 2.0], "y": [0.5, 1.5]}), "y")
    with pytest.raises(ValueError, match="expected numbers as in training, got 'N/A' in row 2"):
        numbers.transform(Table.from_columns({"x": ["1", "N/A"]}))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "chainrule\[parquet\]"'):
        read_table(tmp_path / "t.parquet")


def test_columns_in_memory():
    table = Table.from_columns(
        {"i": [1, 2], "b": [True, False], "o": [None, "x"], "n": np.array([None, 2.5])}
    )
    assert_table(table, {"i": [1, 2], "b": ["True", "False"], "o": [None, "x"], "n": [NAN, 2.5]})
    with pytest.raises(ValueError, match=r"expected one length for all, got \[1, 2\]"):
        Table.from_columns({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="got no columns"):
        Table.from_columns({})
    with pytest.raises(TypeError, match=r"columns must have names: expected a path, a dict .* got ndarray"):
        Table.from_columns(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected one dimension, got 2"):
        Table.from_columns({"a": [[1]]})


def test_records_are_rows():
    """One as a service gets it, and several; a value that is not there is missing."""
    assert_table(Table.from_columns({"n": 3, "t": "x", "b": True}), {"n": [3], "t": ["x"], "b": ["True"]})
    assert_table(
        Table.from_columns([{"n": 1.5, "t": "x"}, {"t": None, "n": np.float32(2)}, {"u": 7}]),
        {"n": [1.5, 2, NAN], "t": ["x", None, None], "u": [NAN, NAN, 7]},
    )
    for given in ([{"n": 1}, 2], [], [[1, 2]]):
        with pytest.raises(TypeError, match="columns must have names"):
            Table.from_columns(given)
    with pytest.raises(ValueError, match="expected one dimension, got 0"):
        Table.from_columns({"n": 1, "t": ["x"]})


def test_a_frame_with_a_name_twice_is_refused_by_that_name():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame([[1, 2, 3]], columns=["a", "b", "a"])
    with pytest.raises(
        ValueError, match=r"\[table\] columns: expected different names, got 'a' more than once"
    ):
        Table.from_columns(frame)


def test_a_pandas_frame(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": pd.array([1, None], dtype="Int64"), "t": ["x", None], "f": [0.5, np.nan]})
    assert_table(Table.from_columns(frame), {"a": [1, NAN], "t": ["x", None], "f": [0.5, NAN]})


# ------------------------------------------------------------ splitting


@pytest.mark.parametrize("labels", [None, np.array(list("aab") * 40)])
def test_parts_are_disjoint_complete_sized_and_seeded(labels):
    test, validation, training = split_rows(120, [0.2, 0.1], 3, labels)
    assert (len(test), len(validation), len(training)) == (24, 12, 84)
    assert sorted([*test, *validation, *training]) == list(range(120))
    again = split_rows(120, [0.2, 0.1], 3, labels)
    assert all(np.array_equal(a, b) for a, b in zip([test, validation, training], again, strict=True))
    assert not np.array_equal(test, split_rows(120, [0.2, 0.1], 4, labels)[0])


def test_a_stratified_split_keeps_the_shares_and_the_rare():
    labels = np.array(["often"] * 90 + ["seldom"] * 10 + ["once"])
    test, training = split_rows(101, [0.2], 0, labels)
    assert {label: int((labels[test] == label).sum()) for label in np.unique(labels)} == {
        "often": 18,
        "seldom": 2,
        "once": 0,
    }
    assert "once" in labels[training]


@pytest.mark.parametrize("shares", [[1.0], [0.6, 0.5], [-0.1], [float("nan")]])
def test_impossible_shares(shares):
    with pytest.raises(ValueError, match=r"\[split\] shares"):
        split_rows(10, shares, 0)


def test_parts_that_would_be_empty():
    with pytest.raises(ValueError, match=r"\[split\] rows: expected enough.*got 2; add rows, .*--test-size"):
        split_rows(2, [0.1], 0)
    with pytest.raises(ValueError, match=r"\[split\] rows"):
        split_rows(3, [0.2], 0, np.array(["a", "b", "c"]))
    test, training = split_rows(2, [0.0], 0)
    assert len(test) == 0 and len(training) == 2


# ------------------------------------------------------------ preprocessing


def test_the_stated_rules_by_hand():
    table = Table.from_columns(
        {
            "n": [1.0, 3.0, None, 8.0],
            "constant": [0.1, 0.1, 0.1, 0.1],
            "t": ["b", "a", "a", None],
            "nothing": [None, None, None, None],
            "id": ["p", "q", "r", "s"],
            "y": [1.5, 2.5, 3.5, 4.5],
        }
    )
    p = Preprocessor.fit(table, "y")
    assert p.notes == (
        "column 'nothing' left out: it has no values",
        "column 'id' left out: its text never repeats (an id?)",
    )
    n = np.array([1, 3, 3, 8.0])
    expected = np.stack(
        [(n - n.mean()) / n.std(), [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]], axis=1
    )
    np.testing.assert_allclose(p.transform(table), expected, rtol=1e-15, atol=1e-15)
    new = Table.from_columns({"t": ["a", "z"], "n": [None, 5.0], "constant": [None, 0.2]})
    got = p.transform(new, np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:, 3:], [[1, 0], [0, 0]])
    np.testing.assert_allclose(got[:, 1], [1, 0])
    np.testing.assert_allclose(got[:, 2], [0, 0.1], rtol=1e-6)
    assert p.text_columns == ("t",)
    np.testing.assert_allclose(p.targets(table), (np.arange(4) - 1.5) / np.arange(4).std())


@pytest.mark.parametrize(
    ("trained", "asked", "expected"),
    [
        (["01", "02", "A4", "01"], ["01", "02"], [0, 1]),  # text that would be numbers
        (["01", "02", "A4", "01"], [1, 2.0], [0, 1]),  # numbers, as pandas reads them
        (["1", "01", "x", "1"], ["1", "01", 1], [1, 0, 1]),  # as it stands comes first
        (["1", "1.5", "x", "1"], ["1.0", "1.50", "x", "2"], [0, 1, 2, -1]),
        (["12345678901234567", "x"] * 2, ["12345678901234568", 12345678901234567.0], [-1, -1]),
        (["12E3", "0e12"] * 2, ["12000", "12e3", "0", "0e99", 12000, 0], [-1] * 6),
        (["true", "false", "true", "false"], [True, False], [1, 0]),
        (["TRUE", "FALSE", "TRUE", "FALSE"], [True, False, None], [1, 0, -1]),
        ([True, False, True, False], ["true", "FALSE", "yes"], [1, 0, -1]),
        (["True", "False"] * 2, [1, 0.0, NAN, 2], [1, 0, -1, -1]),
        (["true", "false"] * 2, ["1", "0", "1.0", "yes"], [1, 0, 1, -1]),
        (["True", "False", "maybe", "True"], [1, 0], [-1, -1]),  # no booleans
    ],
    ids=str,
)
def test_categories_in_another_spelling(trained, asked, expected):
    """The same cells from a CSV file, a Parquet file, a data frame and a dict are the same categories."""
    p = Preprocessor.fit(Table.from_columns({"t": trained, "y": [0.5, 1.5, 2.5, 3.5]}, {"t"}), "y")
    got = p.transform(Table.from_columns({"t": asked}, p.text_columns))
    np.testing.assert_array_equal(np.where(got.any(axis=1), got.argmax(axis=1), -1), expected)
    classes = Preprocessor("classification", "t", (), tuple(sorted({str(cell) for cell in trained})))
    if -1 not in expected:
        np.testing.assert_array_equal(classes.targets(Table.from_columns({"t": asked}, {"t"})), expected)


@pytest.mark.parametrize(
    ("cells", "refused"),
    [
        (["1,5", "2,25", "3,75"], True),  # never twice: not an id
        (["1,5", "2", "3,75", "1,5"], True),
        (["1", "2", "1,2", "1"], False),  # lists of choices
        (["1,5", "2,5 m", "1,5"], False),
    ],
    ids=str,
)
def test_decimal_commas(cells, refused):
    columns = {"x": cells, "n": np.arange(len(cells)), "c": ["u", "v", "u", "v"][: len(cells)]}
    table = Table.from_columns(columns)
    if not refused:
        Preprocessor.fit(table, "c")
        return
    with pytest.raises(ValueError, match=r"column 'x': expected a decimal point, got '1,5' with a comma"):
        Preprocessor.fit(table, "c")
    for task in (None, "regression"):
        with pytest.raises(ValueError, match=r"target.*: expected a decimal point"):
            Preprocessor.fit(table, "x", task)
    table = Table.from_columns({"x": ["0,1", "1,0"] * 2, "n": [1, 2, 3, 4]})
    assert Preprocessor.fit(table, "x", "classification").classes == ("0,1", "1,0")


def marked(numbers, odd):
    """Columns with a target, and among the numbers of x something else."""
    cells = [f"{value:g}" for value in numbers] + odd
    return {"x": cells, "n": np.arange(len(cells)) / 7, "c": ["u", "v"] * (len(cells) // 2)}


def test_numbers_with_a_few_texts_among_them_are_refused(tmp_path):
    """594 numbers and six dashes made a worthless code of 600 texts, and not one error."""
    columns = marked(np.arange(594) / 8, ["-"] * 6)
    expected = (
        r"\[table\] column 'x': expected numbers, got 594 of 600 cells that are, and '-'; leave such cells "
    )
    with pytest.raises(ValueError, match=expected + r"empty or keep it as text \(--text, text=\)"):
        Preprocessor.fit(Table.from_columns(columns), "c")
    text = "\n".join(",".join(map(str, row)) for row in [columns, *zip(*columns.values(), strict=True)])
    path = write(tmp_path / "t.csv", text)
    with pytest.raises(ValueError, match=expected):
        Preprocessor.fit(read_table(path), "c")
    for table in (read_table(path, text=["x"]), Table.from_columns(columns, text=["x"])):
        rows = table.take(np.arange(500, 600))  # what is to be text is so in each part
        assert [feature.name for feature in Preprocessor.fit(table, "c").features] == ["x", "n"]
        assert Preprocessor.fit(rows, "c").task == "classification"
    assert Preprocessor.fit(Table.from_columns(columns), "c", ignore=["x"]).width == 1
    with pytest.raises(
        ValueError, match=r"target: expected numbers, .*, and '-'; .* say task 'classification'"
    ):
        Preprocessor.fit(Table.from_columns(columns), "x")
    three = marked(np.arange(46), ["12a", "n/k", "-", "13 b"])
    with pytest.raises(ValueError, match="got 46 of 50 cells that are, and '12a', 'n/k', '-'; leave"):
        Preprocessor.fit(Table.from_columns(three), "c")


@pytest.mark.parametrize(
    "columns",
    [
        marked(np.arange(20).repeat(10), ["X9"] * 8),  # a short list of codes
        marked(np.arange(60), ["x", "y"] * 9),  # texts that are no exception
        {**marked(np.arange(60), ["x", "y"]), "x": [f"{k:05}" for k in range(1060, 1120)] + ["X1", "X2"]},
    ],
    ids=["few", "text", "leading zeros"],
)
def test_codes_among_which_are_numbers_stay_text(columns):
    columns["x"] = [*columns["x"][:-1], columns["x"][0]]  # one at least repeats
    assert Preprocessor.fit(Table.from_columns(columns), "c").text_columns == ("x",)


def test_labels_that_float64_cannot_tell_apart_are_refused():
    table = Table.from_columns({"x": [1, 2, 1, 2], "y": [2**53, 2**53 + 1] * 2})
    with pytest.raises(
        ValueError, match=r"target 'y': expected labels below 2\*\*53, .* got 9007199254740992"
    ):
        Preprocessor.fit(table, "y", "classification")
    with pytest.raises(ValueError, match="expected finite numbers, got inf in row 2"):
        Preprocessor.fit(Table.from_columns({"x": [1, 2], "y": [1, np.inf]}), "y", "classification")
    features = Table.from_columns({"x": [2**60, 2**61], "y": [0.5, 1.5]})
    assert Preprocessor.fit(features, "y").width == 1  # as quantities they serve


def test_the_same_matrix_as_a_scikit_learn_pipeline():
    pytest.importorskip("sklearn")
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    draw = np.random.default_rng(1)
    numbers = draw.normal(3, 20, (50, 3))
    numbers[draw.random(numbers.shape) < 0.1] = np.nan
    text = np.array([["a", "b", "c", "d"][k] for k in draw.integers(0, 4, 50)], dtype=object)
    table = Table.from_columns(
        {"x0": numbers[:, 0], "x1": numbers[:, 1], "x2": numbers[:, 2], "t": text, "y": draw.random(50)}
    )
    train, new = table.take(np.arange(30)), table.take(np.arange(30, 50))
    p = Preprocessor.fit(train, "y")

    def frame(t):
        return np.stack([t.columns[name] for name in ("x0", "x1", "x2", "t")], axis=1)

    theirs = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), [0, 1, 2]),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), [3]),
    ).fit(frame(train))
    got = p.transform(new)
    indicators = np.array([feature.indicator for feature in p.features[:3]])
    kept = [0, 1 + indicators[0], 2 + indicators[:2].sum(), *range(got.shape[1] - 4, got.shape[1])]
    np.testing.assert_allclose(got[:, kept], theirs.transform(frame(new)), rtol=1e-12, atol=1e-12)


def test_rows_outside_the_training_part_teach_nothing():
    draw = np.random.default_rng(2)
    columns = {"n": draw.normal(size=40), "t": draw.choice(["a", "b"], 40), "y": draw.normal(size=40)}
    changed = {**columns, "n": columns["n"].copy(), "t": columns["t"].copy(), "y": columns["y"].copy()}
    changed["n"][30:], changed["t"][30:], changed["y"][30:] = 1e6, "z", -1e6
    rows = np.arange(30)
    first, second = (Preprocessor.fit(Table.from_columns(c).take(rows), "y") for c in (columns, changed))
    assert first == second


def test_at_most_fifty_categories_the_most_frequent():
    cells = [f"c{k:02}" for k in range(60) for _ in range(1 + (k >= 10))]
    table = Table.from_columns({"t": cells, "y": np.arange(len(cells)) / 7})
    p = Preprocessor.fit(table, "y")
    assert p.features[0].categories == tuple(f"c{k:02}" for k in range(10, 60))
    assert p.notes == ("column 't': 60 different texts, the 50 most frequent count",)
    assert p.transform(table).sum() == 100


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (["a", "b"], "classification"),
        ([True, False], "classification"),
        ([0, 1, 1, 2], "classification"),
        ([0, None, 1], "classification"),
        (range(20), "classification"),
        (range(21), "regression"),
        ([0.5, 1.0], "regression"),
        ([1e300, 2.5], "regression"),
    ],
)
def test_the_task_is_inferred_from_the_target(values, task):
    assert infer_task(Table.from_columns({"y": values}).columns["y"]) == task


def test_classes_sort_as_numbers_and_are_written_as_integers():
    table = Table.from_columns({"x": np.arange(8.0), "y": [10, 9, 10, 9, -1, 10, -1, 9]})
    p = Preprocessor.fit(table, "y")
    assert p.classes == ("-1", "9", "10")
    assert p.targets(table).tolist() == [2, 1, 2, 1, 0, 2, 0, 1]


GOOD = {
    "x": [1.0, 2.0, 3.0, 4.0],
    "t": ["a", "b", "a", "b"],
    "y": [0.5, 1.0, 2.0, 3.0],
    "k": ["u", "v", "u", "v"],
}


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (GOOD, {"target": "z"}, "column 'z': expected one of 'x', 't', 'y', 'k'"),
        (GOOD, {"target": "y", "ignore": ["z"]}, "column 'z': expected one of"),
        (GOOD, {"target": "y", "ignore": ["x", "t", "k"]}, "expected at least one to predict from"),
        (GOOD, {"target": "y", "task": "clustering"}, "expected 'classification' or 'regression'"),
        (GOOD, {"target": "t", "task": "regression"}, "target 't': expected numbers.*text such as 'a'"),
        (
            GOOD,
            {"target": "y", "task": "classification"},
            "expected labels that repeat.*an id, or a quantity",
        ),
        ({**GOOD, "k": ["u"] * 4}, {"target": "k"}, "expected at least 2 classes, got 1"),
        ({**GOOD, "x": [1, 2, 3, np.inf]}, {"target": "y"}, "column 'x': expected finite numbers, got inf"),
        ({**GOOD, "x": [0, 0, 0, 1e308]}, {"target": "y"}, "column 'x': expected a finite spread"),
        ({**GOOD, "y": [1, 2, 3, np.nan]}, {"target": "y", "task": "regression"}, "a value in every row"),
        ({**GOOD, "k": ["u", "v", "u", None]}, {"target": "k"}, "a value in every row"),
        (
            {**GOOD, "t": ["1,5", "2,5", "1,5", "-3,25"]},
            {"target": "y"},
            "expected a decimal point, got '1,5'",
        ),
        ({name: [] for name in GOOD}, {"target": "y"}, "rows: expected at least one"),
    ],
)
def test_what_cannot_be_learnt_is_refused_by_name(columns, arguments, message):
    with pytest.raises(ValueError, match=rf"\[table\].*{message}"):
        Preprocessor.fit(Table.from_columns(columns), **arguments)


def test_new_tables_must_match():
    p = Preprocessor.fit(Table.from_columns(GOOD), "y")
    with pytest.raises(ValueError, match=r"expected also 't', 'k', got 'x'"):
        p.transform(Table.from_columns({"x": [1.0]}))
    with pytest.raises(ValueError, match=r"column 'x': expected numbers as in training, got 'red' in row 2"):
        p.transform(Table.from_columns({**GOOD, "x": ["1", "red", "2", "blue"]}))
    with pytest.raises(ValueError, match=r"column 'x': expected finite numbers, got -inf"):
        p.transform(Table.from_columns({**GOOD, "x": [1, 2, -np.inf, 3]}))
    with pytest.raises(ValueError, match=r"column 'x': expected moderate numbers.*float32"):
        p.transform(Table.from_columns({**GOOD, "x": [1, 2, 1e300, 3]}), np.float32)
    q = Preprocessor.fit(Table.from_columns(GOOD), "k")
    with pytest.raises(ValueError, match=r"target 'k': expected one of 'u', 'v', got 'w'"):
        q.targets(Table.from_columns({**GOOD, "k": ["u", "w", "v", "v"]}))


def test_categories_that_look_like_numbers_are_found_again():
    table = Table.from_columns({"t": ["1", "2", "x", "1", "2", "x"], "y": [1.5, 2, 3, 4, 5, 6]})
    p = Preprocessor.fit(table, "y")
    assert p.features[0].categories == ("1", "2", "x")
    np.testing.assert_array_equal(
        p.transform(Table.from_columns({"t": [2.0, 1, np.nan]})), [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    )


def test_an_empty_table_makes_an_empty_matrix():
    p = Preprocessor.fit(Table.from_columns(GOOD), "y")
    assert p.transform(Table.from_columns({name: [] for name in GOOD})).shape == (0, p.width)


# ------------------------------------------------------------ the model file


def trained(target, loss, **changes):
    draw = np.random.default_rng(0)
    columns = {"x": draw.normal(size=60), "t": draw.choice(["a", "b", "1"], 60)}
    columns["y"] = columns["x"] * 3 + 10
    columns["k"] = np.where(columns["x"] > 0, "up", "down")
    table = Table.from_columns(columns)
    p = Preprocessor.fit(table, target, ignore=[{"y": "k", "k": "y"}[target]], **changes)
    net = cr.mlp([p.width, 8, len(p.classes) or (2 if loss == "gaussian_nll" else 1)], seed=0)
    net.fit(p.transform(table), p.targets(table), loss=loss, epochs=60, optimizer=cr.Adam(lr=1e-2))
    return TableModel(net, p, loss), table


def test_a_model_file_answers_as_the_model_did(tmp_path):
    model, table = trained("k", "cross_entropy")
    model.save(tmp_path / "m.safetensors")
    again = TableModel.load(tmp_path / "m.safetensors")
    assert again.preprocessor == model.preprocessor
    expected = model.answers(table)
    assert list(expected) == ["k", "p_down", "p_up"]
    for name, column in again.answers(table).items():
        np.testing.assert_array_equal(column, expected[name])
    assert np.mean(again.predict(table) == table.columns["k"]) > 0.9
    np.testing.assert_allclose(again.predict_proba(table).sum(axis=1), 1)
    np.testing.assert_array_equal(again.predict_proba(table)[:, 1], expected["p_up"])


def test_answers_for_a_file_a_dict_and_a_table_are_the_same(tmp_path):
    model, table = trained("y", "mse")
    columns = {"t": table.columns["t"][:5], "x": table.columns["x"][:5]}
    with open(tmp_path / "new.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    expected = model.predict(table)[:5]
    np.testing.assert_array_equal(model.predict(tmp_path / "new.csv"), expected)
    np.testing.assert_array_equal(model.predict(columns), expected)
    np.testing.assert_allclose(expected, table.columns["y"][:5], atol=3)
    with pytest.raises(ValueError, match="expected a classification"):
        model.predict_proba(columns)


def test_a_target_named_like_a_probability_keeps_its_answers():
    """Labels written over by the probabilities of a class, and not one error."""
    table = Table.from_columns({"a": [1, 2, 3, 4], "p_x": list("xyxy")})
    p = Preprocessor.fit(table, "p_x")
    answers = TableModel(cr.mlp([p.width, 2]), p, "cross_entropy").answers(table)
    assert list(answers) == ["p_x", "probability_x", "probability_y"]
    assert set(answers["p_x"]) <= {"x", "y"}


def test_text_in_a_dict_stays_text_where_training_saw_text(tmp_path):
    """Even where every cell is a number: "01" is another category than "1"."""
    table = Table.from_columns({"t": ["01", "1", "x"] * 2, "y": [1.5, 2.5, 3.5] * 2})
    p = Preprocessor.fit(table, "y")
    net = cr.Sequential(cr.Linear(3, 1, bias=False), dtype="float64")
    net.load_state_dict({"0.weight": [[10.0, 20.0, 30.0]]})
    model = TableModel(net, p, "mse")
    expected = p.mean + p.std * np.array([10.0, 20.0])
    for given in ({"t": ["01", "1"]}, write(tmp_path / "t.csv", "t\n01\n1\n")):
        np.testing.assert_allclose(model.predict(given), expected)


def told(model, cells):
    """The RuntimeWarnings of a prediction, each of which names this file as the place of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.predict({"t": cells})
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_unknown_categories_are_told_once():
    """All zeros for every row, as dates in another spelling gave, and not one word."""
    days = [f"2024-05-0{k}" for k in range(1, 6)] * 4
    p = Preprocessor.fit(Table.from_columns({"t": days, "y": np.arange(20) / 7}), "y")
    model = TableModel(cr.mlp([p.width, 1]), p, "mse")
    expected = (
        "[TableModel.predict] column 't': expected categories such as '2024-05-01', '2024-05-02', "
        "'2024-05-03', got others in {} of {} cells, such as {}; in another spelling?"
    )
    other = [f"{k}.5.24" for k in range(1, 8)]
    assert told(model, other) == [expected.format(7, 7, "'1.5.24', '2.5.24'")]
    assert told(model, [None, "x", None]) == [expected.format(1, 1, "'x'")]
    assert told(model, [*days[:5], None, *other[:6]]) == [expected.format(6, 11, "'1.5.24', '2.5.24'")]
    for quiet in (days, [*days[:5], *other[:5]], [days[0], "x", "y"], [None, None], []):
        assert told(model, quiet) == []


def test_categories_beyond_the_most_frequent_are_no_surprise():
    cells = [f"c{k:02}" for k in range(70)] * 2
    p = Preprocessor.fit(Table.from_columns({"t": cells, "y": np.arange(140) / 7}), "y")
    model = TableModel(cr.mlp([p.width, 1]), p, "mse")
    assert told(model, cells) == told(model, cells[45:70]) == told(model, cells[55:64]) == []
    assert len(told(model, cells[55:65])) == 1  # ten, and not one known


def test_answers_are_in_the_targets_own_unit():
    model, table = trained("y", "gaussian_nll")
    answers = model.answers(table)
    assert list(answers) == ["y", "y_std"]
    f = model.outputs(table).astype(float)
    np.testing.assert_allclose(answers["y"], f[:, 0] * model.preprocessor.std + model.preprocessor.mean)
    np.testing.assert_allclose(answers["y_std"], np.exp(f[:, 1] / 2) * model.preprocessor.std)
    counts = TableModel(model.net, model.preprocessor, "poisson")
    np.testing.assert_allclose(counts.answers(table)["y"], np.exp(f[:, 0]))


def test_forged_preprocessing_is_refused(tmp_path):
    model, _ = trained("k", "cross_entropy")
    path = tmp_path / "m.safetensors"
    good = json.loads(json.dumps(model.preprocessor.to_dict()))
    feature = good["features"][0]

    def load(document):
        text = document if isinstance(document, str) else json.dumps(document)
        io.save(model.net, path, {"chainrule.table": text})
        return TableModel.load(path)

    def forged(**fields):
        return {"format": 1, "loss": "cross_entropy", "preprocessor": {**good, **fields}}

    assert load(forged()).preprocessor == model.preprocessor
    for document in [
        "",
        "[]",
        "[" * 100_000,
        "{}",
        {"format": 2},
        {"format": 1},
        {"format": 1, "preprocessor": 3},
        forged(task="clustering"),
        forged(task="regression"),
        forged(target=3),
        forged(classes=["up", 3]),
        forged(classes=["up"]),
        forged(classes=["up", "down", "sideways"]),
        forged(features=3),
        forged(features=[]),
        forged(features=[3]),
        forged(features=[{**feature, "std": 0}]),
        forged(features=[{**feature, "mean": "3"}]),
        forged(features=[{**feature, "indicator": 1}]),
        forged(features=[{**feature, "code": "x"}]),
        forged(features=[feature]),
        forged(surprise=1),
    ]:
        with pytest.raises(ValueError, match=r"\[load\] preprocessing"):
            load(document)


def test_a_network_alone_is_no_table_model(tmp_path):
    io.save(cr.mlp([2, 2]), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"expected a file of `chainrule train`, got only a network"):
        TableModel.load(tmp_path / "net.safetensors")
    io.write_safetensors(tmp_path / "a.safetensors", {})
    with pytest.raises(ValueError, match="an architecture"):
        TableModel.load(tmp_path / "a.safetensors")


# ------------------------------------------------------------ metrics


def test_metrics_agree_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(3)
    y, best = draw.integers(0, 4, 50), draw.integers(0, 4, 50)
    p = softmax(draw.normal(size=(50, 4)))
    assert metrics.accuracy(y, best) == sk.accuracy_score(y, best)
    assert metrics.log_loss(y, p) == pytest.approx(sk.log_loss(y, p), rel=1e-14)
    np.testing.assert_array_equal(
        metrics.confusion(y, best, 4), sk.confusion_matrix(y, best, labels=range(4))
    )
    target, predicted = draw.normal(size=50), draw.normal(size=50)
    assert metrics.rmse(target, predicted) == pytest.approx(
        sk.root_mean_squared_error(target, predicted), rel=1e-14
    )
    assert metrics.mae(target, predicted) == pytest.approx(
        sk.mean_absolute_error(target, predicted), rel=1e-14
    )
    assert metrics.r2(target, predicted) == pytest.approx(sk.r2_score(target, predicted), rel=1e-14)


def test_metrics_refuse_what_would_broadcast():
    column = np.zeros((3, 1))
    for metric in (metrics.accuracy, metrics.rmse, metrics.mae, metrics.r2):
        with pytest.raises(ValueError, match=r"expected \(B,\) twice.*\(3,\) and \(3, 1\)"):
            metric(np.zeros(3), column)
        with pytest.raises(ValueError, match="B ≥ 1"):
            metric([], [])
    for labels in ([-1, 0], [0, 2]):
        with pytest.raises(ValueError, match=r"labels: expected 0 to 1"):
            metrics.log_loss(labels, [[0.5, 0.5], [0.5, 0.5]])
        with pytest.raises(ValueError, match=r"labels: expected 0 to 1"):
            metrics.confusion(labels, [0, 1], 2)
    assert np.isnan(metrics.r2([1.0, 1.0], [1.0, 2.0]))
    assert np.isfinite(metrics.log_loss([0], [[0.0, 1.0]]))


def test_a_feature_of_one_constant_has_spread_one():
    """np.std of fifty times 0.1 is 1e-17; division by it would blow rounding up to a signal's size."""
    feature = Feature.fit("x", np.full(50, 0.1))
    assert (feature.mean, feature.std) == (0.1, 1.0)
