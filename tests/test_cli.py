# SPDX-License-Identifier: MIT
"""The command line: what it prints, what it writes, and one clear line for each mistake a user may make."""

import csv
import importlib
import io as streams
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import chainrule as cr
from chainrule.__main__ import main
from chainrule.data import TableModel, split_rows
from chainrule.io import save
from chainrule.tables import MISSING, read_table
from conftest import posix


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = cr.get_num_threads()
    yield
    cr.set_num_threads(threads)


def write_csv(path, rows=150, seed=0):
    """Flowers with a size, a colour (some missing), an id, a kind to classify and a price to predict."""
    draw = np.random.default_rng(seed)
    size = draw.normal(5, 2, rows)
    colour = draw.choice(["red", "blue"], rows)
    kind = np.where(size > 5, "big", "small")
    price = 3 * size + 10 * (colour == "red") + 100
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "size", "colour", "kind", "price"])
        for k in range(rows):
            shown = "" if k % 10 == 3 else f"{size[k]:.4f}"
            writer.writerow([f"n{k}", shown, colour[k], kind[k], f"{price[k]:.3f}"])
    return path


@pytest.fixture
def flowers():
    write_csv("flowers.csv")
    write_csv("new.csv", rows=7, seed=1)


def run(capsys, *arguments):
    """(exit code, standard output, standard error) of one command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse's way to end
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def read_csv(text):
    return list(csv.DictReader(streams.StringIO(text)))


# ------------------------------------------------------------ train and predict


def test_training_goes_on_from_its_checkpoint(flowers, capsys):
    """The same model as from a run that was not cut; not with other rows."""
    command = ["train", "flowers.csv", "--target", "kind"]
    assert run(capsys, *command, "--epochs", 4, "--checkpoint", "run.safetensors")[0] == 0
    code, out, err = run(capsys, *command, "--epochs", 9, "--checkpoint", "run.safetensors")
    assert code == 0 and "5 epochs in" in out and ", after 4 of 'run.safetensors'" in out
    content = Path("model.safetensors").read_bytes()
    assert run(capsys, *command, "--epochs", 9)[0] == 0
    assert Path("model.safetensors").read_bytes() == content
    write_csv("flowers.csv", seed=5)
    code, out, err = run(capsys, *command, "--epochs", 9, "--checkpoint", "run.safetensors")
    assert code == 1, (code, out)
    assert "checkpoint 'run.safetensors' must be of this fit: expected data" in err


def test_classification_from_table_to_answers(flowers, capsys):
    code, out, err = run(capsys, "train", "flowers.csv", "--target", "kind", "--ignore", "price")
    assert (code, err) == (0, "")
    for expected in [
        "102 to train, 18 to validate, 30 held out",
        "1 numeric, 1 text → 4 inputs",
        "classification of 2 classes (inferred; --task regression overrides)",
        "4 → 64 → 64 → 2, relu",
        "column 'id' left out: its text never repeats",
        "On the 30 rows held out",
        "accuracy",
        "log-loss",
        "true ↓  predicted →",
        "chainrule predict model.safetensors new.csv",
        "from chainrule.data import TableModel",
    ]:
        assert expected in out, expected
    assert float(re.search(r"accuracy +([\d.]+) %", out).group(1)) > 85

    code, out, err = run(capsys, "predict", "model.safetensors", "new.csv")
    assert (code, err) == (0, "")
    rows = read_csv(out)
    assert list(rows[0]) == ["kind", "p_big", "p_small"] and len(rows) == 7
    for row in rows:
        p = {label: float(row[f"p_{label}"]) for label in ("big", "small")}
        assert row["kind"] == max(p, key=p.get) and sum(p.values()) == pytest.approx(1, abs=1e-6)


def test_regression_from_table_to_answers(flowers, capsys):
    code, out, _ = run(capsys, "train", "flowers.csv", "--target", "price", "--output", "p.safetensors")
    assert code == 0
    assert "regression (inferred; --task classification overrides)" in out
    assert float(re.search(r"R² +([\d.]+)", out).group(1)) > 0.7
    assert "RMSE" in out and "MAE" in out
    code, out, _ = run(capsys, "predict", "p.safetensors", "new.csv", "--output", "answers.csv")
    assert (code, out) == (0, "")
    answers = [float(row["price"]) for row in read_csv(Path("answers.csv").read_text())]
    truth = [float(row["price"]) for row in read_csv(Path("new.csv").read_text())]
    assert np.corrcoef(answers, truth)[0, 1] > 0.8


def test_the_lines_of_python_it_prints_run(flowers, capsys):
    _, out, _ = run(capsys, "train", "flowers.csv", "--target", "price", "--epochs", 5)
    code = "\n".join(line.strip() for line in out.split("To use it:")[1].splitlines()[3:])
    assert code.count("\n") == 3
    exec(code, {})
    assert len(capsys.readouterr().out.split()) >= 7


def test_the_same_command_writes_the_same_file(flowers, capsys):
    for name in ("a.safetensors", "b.safetensors"):
        run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 5, "--output", name)
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    run(
        capsys,
        "train",
        "flowers.csv",
        "--target",
        "kind",
        "--epochs",
        5,
        "--seed",
        1,
        "--output",
        "c.safetensors",
    )
    assert Path("a.safetensors").read_bytes() != Path("c.safetensors").read_bytes()


@pytest.mark.parametrize(
    "loss", ["least_squares", "mse", "mae", "huber", "pinball", "poisson", "gaussian_nll"]
)
def test_every_loss_of_a_regression_learns(flowers, capsys, loss):
    options = ["--loss", loss, "--lr", "0.01", "--epochs", 60]
    code, out, _ = run(capsys, "train", "flowers.csv", "--target", "price", "--quiet", *options)
    assert code == 0
    assert float(re.search(r"R² +(-?[\d.]+)", out).group(1)) > 0.5
    _, out, _ = run(capsys, "predict", "model.safetensors", "new.csv")
    names = ["price", "price_std"] if loss == "gaussian_nll" else ["price"]
    assert list(read_csv(out)[0]) == names


@pytest.mark.parametrize(
    "options",
    [
        ["--hidden", "none"],
        ["--hidden", "8"],
        ["--hidden", "8,4,3", "--activation", "tanh", "--dropout", "0.1", "--dtype", "float64"],
        ["--optimizer", "gd", "--lr", "0.1"],
        ["--optimizer", "sgd", "--batch-size", "7"],
        ["--optimizer", "adamw", "--l2", "0.01"],
        ["--optimizer", "rmsprop", "--patience", "0"],
        ["--validation-size", "0", "--test-size", "0.5", "--threads", "1"],
        ["--task", "classification", "--ignore", "id,colour", "--ignore", "price"],
    ],
)
def test_options_reach_the_training(flowers, capsys, options):
    code, out, err = run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 3, *options)
    assert (code, err) == (0, "")
    net = TableModel.load("model.safetensors").net
    if options[1] == "none":
        assert len(net) == 1
    if "--dtype" in options:
        assert net.dtype == "float64" and "→ 8 → 4 → 3 → 2, tanh" in out
    if "--threads" in options:
        assert cr.get_num_threads() == 1


def test_nothing_is_learnt_from_the_rows_held_out(flowers, capsys):
    """Other features in these rows, and even other answers: the model file stays the same, byte for byte."""
    lines = Path("flowers.csv").read_text().splitlines()
    held_out, _ = split_rows(len(lines) - 1, [0.2], 0)
    for k in held_out:
        lines[k + 1] = f"n{k},1e6,green,big,-1e6"
    Path("other.csv").write_text("\n".join(lines))
    for name in ("flowers", "other"):
        code, _, _ = run(
            capsys, "train", f"{name}.csv", "--target", "price", "--output", f"{name}.safetensors"
        )
        assert code == 0
    assert Path("flowers.safetensors").read_bytes() == Path("other.safetensors").read_bytes()


def test_no_rows_held_out(flowers, capsys):
    code, out, _ = run(capsys, "train", "flowers.csv", "--target", "kind", "--test-size", 0, "--epochs", 2)
    assert code == 0 and "held out" not in out and os.path.exists("model.safetensors")


def test_an_integer_target_can_be_a_quantity(capsys):
    Path("dice.csv").write_text("x,y\n" + "".join(f"{k % 6 + k / 1000},{k % 6}\n" for k in range(60)))
    _, out, _ = run(capsys, "train", "dice.csv", "--target", "y", "--epochs", 2)
    assert "classification of 6 classes" in out
    _, out, _ = run(capsys, "train", "dice.csv", "--target", "y", "--epochs", 2, "--task", "regression")
    assert "RMSE" in out and "inferred" not in out


def test_rows_without_a_target_are_left_out(capsys):
    Path("t.csv").write_text("x,y\n" + "".join(f"{k},{'ab'[k % 2] if k % 5 else '?'}\n" for k in range(50)))
    code, out, _ = run(capsys, "train", "t.csv", "--target", "y", "--epochs", 2)
    assert code == 0
    assert "10 rows left out: no value in 'y'" in out


def test_one_of_a_thing_is_no_plural(capsys):
    Path("t.csv").write_text("x,y\n" + "".join(f"{k},{k / 7}\n" for k in range(9)) + "3,\n")
    _, out, _ = run(capsys, "train", "t.csv", "--target", "y", "--epochs", 1, "--test-size", 0.1)
    for line in ("1 numeric → 1 input\n", "1 row left out: no", " 1 epoch in", "On the 1 row held out\n"):
        assert line in out


def test_rare_classes_can_count_as_much_as_frequent_ones(capsys, monkeypatch):
    Path("t.csv").write_text("x,n,y\n" + "".join(f"{k % 10},{k},{'ab'[k % 10 == 9]}\n" for k in range(200)))
    given = []
    fit = cr.Sequential.fit
    monkeypatch.setattr(
        cr.Sequential, "fit", lambda *a, **k: (given.append(k["class_weight"]), fit(*a, **k))[1]
    )
    for options, expected in (([], None), (["--class-weight", "balanced"], "balanced")):
        code, out, _ = run(capsys, "train", "t.csv", "--target", "y", "--epochs", 1, *options)
        assert code == 0 and given.pop() == expected
        assert ("classes   balanced: all weigh the same" in out) == bool(expected)
    code, _, err = run(capsys, "train", "t.csv", "--target", "n", "--class-weight", "balanced")
    assert code == 1 and "--class-weight: expected a classification, got a regression; leave it out" in err


@pytest.mark.parametrize(
    "odd", [{7, 70, 99}, set(split_rows(120, [0.2], 0)[0][:1])], ids=["anywhere", "held out"]
)
def test_numbers_with_a_dash_among_them_are_refused_or_kept_as_text(capsys, odd):
    """Also where training would not see the dash, and take all the numbers for different texts."""
    cells = ["-" if k in odd else f"{k % 60}" for k in range(120)]
    Path("t.csv").write_text("a,b,y\n" + "".join(f"{cell},{k % 7},{k / 7}\n" for k, cell in enumerate(cells)))
    Path("o.toml").write_text('text = ["a"]')
    command = ["train", "t.csv", "--target", "y", "--epochs", 1]
    code, out, err = run(capsys, *command)
    expected = f"column 'a': expected numbers, got {120 - len(odd)} of 120 cells that are, and '-'"
    assert code == 1 and expected in err and "--text" in err and err.count("\n") == 1
    for options, columns in [
        (["--text", "a,b"], "2 text"),
        (["--text", "a", "--text", "b"], "2 text"),
        (["--config", "o.toml"], "1 numeric, 1 text"),
        (["--ignore", "a"], "1 numeric →"),
    ]:
        code, out, err = run(capsys, *command, *options)
        assert (code, err) == (0, "") and f"columns   {columns}" in out
    assert "column 'z': expected one of" in run(capsys, *command, "--text", "z")[2]


def test_many_classes_show_the_mistakes_alone(capsys):
    Path("t.csv").write_text("x,y\n" + "".join(f"{k % 30},label number {k % 30}\n" for k in range(300)))
    code, out, _ = run(capsys, "train", "t.csv", "--target", "y", "--epochs", 1)
    assert code == 0
    assert "most frequent mistakes" in out and "predicted →" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_parquet_all_the_way(flowers, capsys):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    for name in ("flowers", "new"):
        pandas.read_csv(f"{name}.csv").to_parquet(f"{name}.parquet")
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 3, "--output", "a.safetensors")
    _, out, _ = run(
        capsys, "train", "flowers.parquet", "--target", "kind", "--epochs", 3, "--output", "b.safetensors"
    )
    assert "chainrule predict b.safetensors new.parquet" in out
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert run(capsys, "predict", "a.safetensors", "new.csv") == run(
        capsys, "predict", "b.safetensors", "new.parquet"
    )


def test_a_toml_file_holds_options_and_the_command_line_overrides_them(flowers, capsys):
    with open("o.toml", "w") as file:
        file.write('target = "kind"\nignore = ["id", "price"]\nhidden = [8, 4]\nbatch_size = 16\n')
        file.write("lr = 0.01\nepochs = 3\nquiet = false\noutput = 'toml.safetensors'\n")
    code, out, _ = run(capsys, "train", "flowers.csv", "--config", "o.toml", "--batch-size", 10)
    assert code == 0
    assert "4 → 8 → 4 → 2" in out and "learning rate 0.01, batches of 10" in out
    assert os.path.exists("toml.safetensors")


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("nonsense = 1", 1, "expected options among .*'target'.* got 'nonsense'"),
        ("config = 'x'", 1, "'validation_size', .*'seed', 'threads', got 'config'"),
        ("lr = [", 1, "expected TOML, got"),
        ("[lr]\nx = 1", 1, "expected a value for 'lr', got a table"),
        ("lr = 'fast'", 2, "argument --lr: expected a number above 0, got 'fast'"),
    ],
)
def test_toml_files_that_cannot_be_used(flowers, capsys, text, code, message):
    Path("o.toml").write_text(text)
    got, _, err = run(capsys, "train", "flowers.csv", "--target", "kind", "--config", "o.toml")
    assert got == code and re.search(message, err)


@pytest.mark.parametrize("installed", [True, False])
def test_python_3_10_reads_toml_with_another_package(flowers, capsys, monkeypatch, installed):
    """An import that only older Pythons reach, and the advice where it fails."""
    Path("o.toml").write_text("epochs = 3")
    reader = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    monkeypatch.setitem(sys.modules, "tomli", reader if installed else None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))
    code, _, err = run(capsys, "train", "flowers.csv", "--target", "kind", "--config", "o.toml")
    if installed:
        assert code == 0
    else:
        assert code == 1 and re.search(
            r"o\.toml: expected .* tomli, got .*pip install .chainrule\[config\]", err
        )


def test_quiet_prints_the_scores_only(flowers, capsys):
    code, out, err = run(capsys, "train", "flowers.csv", "--target", "price", "--quiet")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["RMSE", "MAE", "R²"]


# ------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, ["--target", "y"], "t.csv: No such file or directory"),
        ("", ["--target", "y"], "expected column names, got an empty file"),
        ("x,y\n", ["--target", "y"], "expected values to learn from, got a file without rows"),
        ("x,y\n1,2\n3\n", ["--target", "y"], "line 3 of 't.csv': expected 2 cells as in the header, got 1"),
        ("1,2\n3,4\n", ["--target", "y"], "expected column names, got numbers"),
        ("x,y\n1,2\n", ["--target", "z"], "column 'z': expected one of 'x', 'y'"),
        ("x,y\n1,2\n", ["--target", "y", "--ignore", "q"], "column 'q': expected one of 'x', 'y'"),
        ("x,y\n1,?\n2,NA\n", ["--target", "y"], "expected values to learn from, got only missing cells"),
        ("x,y\n" + "".join(f"1,n{k}\n" for k in range(50)), ["--target", "y"], "expected labels that repeat"),
        ("x,y\n1,a\n2,b\n", ["--target", "y"], "expected enough for shares"),
        ("x,y\n" + "1,a\n2,b\n" * 9, ["--target", "y", "--ignore", "x"], "at least one to predict from"),
        ("x,y\n" + "1,a\n" * 9, ["--target", "y"], "expected at least 2 classes, got 1"),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--task", "regression"],
            "expected numbers for a regression",
        ),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--loss", "mse"],
            "expected one of cross_entropy, got 'mse'",
        ),
        (
            "x,y\n" + "1,a\n1,\n2,b\n" * 9 + "inf,a\n",
            ["--target", "y"],
            "column 'x': expected finite numbers, got inf in row 28",
        ),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--output", "m.safetensors", "--checkpoint", "./m.safetensors"],
            "[train] --checkpoint: expected a file beside --output",
        ),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--output", "m.pt"],
            "expected the suffix .safetensors",
        ),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--output", "no/m.safetensors"],
            "expected a folder that exists",
        ),
        (
            "x,y\n" + "1,a\n2,b\n" * 9,
            ["--target", "y", "--output", "folder.safetensors"],
            "expected the name of a file, got the folder 'folder.safetensors'",
        ),
        ("x,y\n" + "1,a\n2,b\n" * 9, ["--target", "y", "--config", "none.toml"], "none.toml: No such file"),
        ("x,y\n" + "1,1.5\n2,-2.5\n" * 9, ["--target", "y", "--loss", "poisson"], "expected counts ≥ 0"),
        (
            "x,y\n" + "1,1.5\n2,2.5\n" * 9,
            ["--target", "y", "--optimizer", "sgd", "--lr", "1e30"],
            "learning rate",
        ),
    ],
)
def test_mistakes_in_training_are_one_line_and_leave_no_file(capsys, text, arguments, message):
    if text is not None:
        Path("t.csv").write_text(text)
    Path("folder.safetensors").mkdir()
    code, out, err = run(capsys, "train", "t.csv", *arguments)
    assert code == 1 and "trained" not in out
    assert err.startswith("chainrule: error: ") and err.count("\n") == 1
    assert message in err
    assert not os.path.exists("model.safetensors")


def test_a_read_only_folder_is_noticed_before_training(flowers, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    code, out, err = run(capsys, "train", "flowers.csv", "--target", "price")
    assert (code, out) == (1, "")
    assert "expected a folder to write to, got '.', which is read-only" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: data"),
        (["train", "t.csv"], "usage: chainrule train data.csv --target COLUMN [options]\n"),
        (["train", "t.csv"], "chainrule train: error: the following arguments are required: --target\n"),
        (["train", "t.csv", "--target", "y", "--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
        (["train", "t.csv", "--target", "y", "--lr", "nan"], "--lr: expected a number above 0, got 'nan'"),
        (
            ["train", "t.csv", "--target", "y", "--hidden", "8,x"],
            "--hidden: expected a whole number of at least 1",
        ),
        (
            ["train", "t.csv", "--target", "y", "--hidden", "0"],
            "--hidden: expected a whole number of at least 1",
        ),
        (["train", "t.csv", "--target", "y", "--epochs", "1.5"], "--epochs: expected a whole number"),
        (
            ["train", "t.csv", "--target", "y", "--dropout", "1"],
            "--dropout: expected a number of at least 0 and below 1",
        ),
        (["train", "t.csv", "--target", "y", "--test-size", "1"], "--test-size: expected"),
        (["train", "t.csv", "--target", "y", "--task", "x"], "--task: invalid choice"),
        (["train", "t.csv", "--target", "y", "--activation", "x"], "--activation: invalid choice"),
        (["train", "t.csv", "--target", "y", "--opt", "sgd"], "unrecognized arguments: --opt"),
        (
            ["train", "t.csv", "--target", "y", "--seed", str(2**64)],
            "a whole number of at most 18446744073709551615",
        ),
        (["predict", "m.safetensors"], "required: data"),
    ],
)
def test_options_that_cannot_be_read_end_with_2(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err


def test_mistakes_in_prediction(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    save(cr.mlp([2, 2]), "plain.safetensors")
    raw = Path("model.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(raw[:-1])
    Path("short.csv").write_text("id,colour\na,red\n")
    Path("text.csv").write_text("size,colour,price\nhuge,red,1\n")
    for arguments, message in [
        (["none.safetensors", "new.csv"], "none.safetensors: No such file or directory"),
        (["model.safetensors", "none.csv"], "none.csv: No such file or directory"),
        (["plain.safetensors", "new.csv"], "expected a file of `chainrule train`, got only a network"),
        (["cut.safetensors", "new.csv"], "truncated"),
        (["new.csv", "new.csv"], "expected the suffix .safetensors"),
        (["model.safetensors", "short.csv"], "expected also 'size', 'price', got 'id', 'colour'"),
        (
            ["model.safetensors", "text.csv"],
            "column 'size': expected numbers as in training, got 'huge' in row 1",
        ),
        (["model.safetensors", "new.csv", "--output", "new.csv"], "expected another file than the data"),
        (
            ["model.safetensors", "new.csv", "--output", "model.safetensors"],
            "expected another file than the model",
        ),
        (["model.safetensors", "new.csv", "--output", "no/a.csv"], "no/a.csv: No such file or directory"),
    ]:
        code, out, err = run(capsys, "predict", *arguments)
        assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("chainrule: error: ")
        assert message in err


def test_unknown_categories_are_a_note(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    Path("new.csv").write_text("size,colour,price\n" + "3,rot,1\n" * 9)
    code, out, err = run(capsys, "predict", "model.safetensors", "new.csv")
    assert code == 0 and len(read_csv(out)) == 9
    assert err.startswith(
        "chainrule: note: [TableModel.predict] column 'colour': expected categories such as "
    )
    assert "'blue', 'red', got others in 9 of 9 cells, such as 'rot'" in err and err.count("\n") == 1


@posix
def test_answers_are_written_whole_or_not_at_all(flowers, capsys):
    """To a disk that is full after 4 kB, which is a limit of the shell's here."""
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    write_csv("many.csv", rows=5000)
    Path("answers.csv").write_text("of before")
    before = set(os.listdir())
    command = f"{sys.executable} -m chainrule predict model.safetensors many.csv --output answers.csv"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 4; {command}"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"chainrule: error: answers\.csv: .+\n", done.stderr)
    assert Path("answers.csv").read_text() == "of before" and set(os.listdir()) == before


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="pipes have names here where /dev/fd is")
def test_answers_go_into_a_pipe_that_is_named(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    expected = run(capsys, "predict", "model.safetensors", "new.csv")
    inside, outside = os.pipe()
    run(capsys, "predict", "model.safetensors", "new.csv", "--output", f"/dev/fd/{outside}")
    os.close(outside)
    with open(inside, encoding="utf-8") as file:
        assert (0, file.read(), "") == expected


def test_who_looks_on_is_told_that_a_large_file_is_being_read(flowers, capsys, monkeypatch):
    class Terminal(streams.StringIO):
        def isatty(self):
            return True

    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    train = ["train", "flowers.csv", "--target", "kind", "--epochs", "1"]
    for size, screen, arguments, expected in [
        (5e6, Terminal(), ["predict", "model.safetensors", "new.csv"], "reading new.csv …\n"),
        (5e6, Terminal(), train, "reading flowers.csv …\n"),
        (5e6, Terminal(), [*train, "--quiet"], ""),
        (5e6, streams.StringIO(), train, ""),
        (1e6, Terminal(), train, ""),
    ]:
        monkeypatch.setattr(os.path, "getsize", lambda path, size=size: size)
        monkeypatch.setattr(sys, "stderr", screen)
        assert main(arguments) == 0
        assert screen.getvalue().startswith(expected)
        assert screen.getvalue().count("reading") == bool(expected)


def test_predicting_no_rows_prints_the_header(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    Path("empty.csv").write_text("id,size,colour,price\n")
    assert run(capsys, "predict", "model.safetensors", "empty.csv") == (0, "kind,p_big,p_small\n", "")


def test_interrupted(flowers, capsys, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cr.Sequential, "fit", interrupt)
    code, _, err = run(capsys, "train", "flowers.csv", "--target", "kind")
    assert (code, err) == (130, "chainrule: error: interrupted\n")
    command = ["train", "flowers.csv", "--target", "kind", "--checkpoint", "run.safetensors"]
    assert run(capsys, *command)[2] == "chainrule: error: interrupted\n"  # before there is one
    Path("run.safetensors").touch()
    code, _, err = run(capsys, *command)
    assert code == 130 and "interrupted; the last checkpoint is in 'run.safetensors'" in err
    assert not os.path.exists("model.safetensors")


# ------------------------------------------------------------ explain and draw


@pytest.fixture
def flower_model(flowers, capsys):
    """A classifier of `kind`, 4 inputs → 3 → 2, that has the row's target to explain."""
    options = ["--ignore", "price", "--hidden", 3, "--activation", "tanh", "--epochs", 3]
    assert run(capsys, "train", "flowers.csv", "--target", "kind", *options)[0] == 0
    return TableModel.load("model.safetensors")


def write_row(path, **cells):
    row = {"id": "n0", "size": "4.5", "colour": "red", "kind": "small", "price": "1"} | cells
    Path(path).write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n", encoding="utf-8")
    return path


def test_explaining_a_row(flower_model, capsys):
    """What it prints is explain's own text, for that row as the model sees it and its encoded target."""
    with open("new.csv", encoding="utf-8") as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    table = read_table("new.csv")
    for options, row, wrt in (([], 1, "0.weight"), (["--row", 4, "--wrt", "2.bias"], 4, "2.bias")):
        code, out, err = run(capsys, "explain", "model.safetensors", "new.csv", *options)
        assert (code, err) == (0, "")
        x = flower_model.preprocessor.transform(table, np.float32)[row - 1]
        y = ("big", "small").index(kinds[row - 1])
        expected = str(cr.explain(flower_model.net, x, y, "cross_entropy", wrt=wrt))
        assert out == "\n".join(line.rstrip() for line in expected.split("\n")) + "\n"
        assert "softmax(f) − onehot(y)" in out


def test_explaining_a_class_that_looks_like_a_number(capsys):
    rows = "".join(f"{k % 3},{('01', '02', 'x3')[k % 3]}\n" for k in range(60))
    Path("t.csv").write_text("x,c\n" + rows)
    Path("row.csv").write_text("x,c\n0,01\n")
    assert run(capsys, "train", "t.csv", "--target", "c", "--epochs", 1)[0] == 0
    code, out, err = run(capsys, "explain", "model.safetensors", "row.csv")
    assert (code, err) == (0, "") and "softmax(f) − onehot(y)" in out


def test_explaining_a_regression(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "price", "--hidden", "none", "--epochs", 2)
    code, out, _ = run(capsys, "explain", "model.safetensors", "new.csv", "--wrt", "x")
    assert code == 0 and out.startswith("∂L/∂x = ∂L/∂f · J_{x}[φ¹]\n") and "2 (f − y)" in out


@pytest.mark.parametrize(
    ("options", "state"),
    [([], "structure"), (["new.csv"], "forward and reverse"), (["row.csv", "--row", 1], "forward")],
)
def test_drawing(flower_model, capsys, options, state):
    write_row("row.csv", kind="")  # no target: no cotangents
    code, out, err = run(capsys, "draw", "model.safetensors", *options, "-o", "picture.svg")
    assert (code, err) == (0, "")
    chain = "x → Linear → Tanh → Linear → f" + ("" if state == "structure" else " → cross_entropy")
    assert out == f"Saved as picture.svg: {chain}; {state}\n"
    assert ElementTree.parse("picture.svg").getroot().tag.endswith("svg")


def test_drawing_a_row_draws_that_row(flower_model, capsys):
    run(capsys, "draw", "model.safetensors", "new.csv", "--row", 3)
    table = read_table("new.csv")
    x = flower_model.preprocessor.transform(table, np.float32)[2]
    y = flower_model.preprocessor.targets(table)[2]
    assert Path("graph.svg").read_text("utf-8") == str(cr.draw(flower_model.net, x, y, "cross_entropy"))


def test_drawing_any_network(capsys):
    cr.mlp([2, 1]).save("net.safetensors")
    assert run(capsys, "draw", "net.safetensors")[:2] == (
        0,
        "Saved as graph.svg: x → Linear → f; structure\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "nowhere.safetensors", "new.csv"], "nowhere.safetensors: No such file or directory"),
        (["explain", "model.safetensors", "nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["explain", "model.safetensors", "new.csv", "--row", 8], "[explain] --row: expected 1 to 7, got 8"),
        (["explain", "model.safetensors", "empty.csv"], "[explain] --row: expected a file with rows, got 1"),
        (
            ["explain", "model.safetensors", "unknown.csv"],
            "[explain] target 'kind': expected a value in row 1 of 'unknown.csv', got none; a loss needs one",
        ),
        (
            ["explain", "model.safetensors", "other.csv"],
            "[table] target 'kind': expected one of 'big', 'small', got 'blue'",
        ),
        (
            ["explain", "model.safetensors", "new.csv", "--wrt", "1.weight"],
            "[explain] wrt must be a known name: expected one of '0.weight', '0.bias', '2.weight', '2.bias', "
            "'x', got '1.weight'",
        ),
        (
            ["explain", "net.safetensors", "new.csv"],
            "[load] preprocessing of 'net.safetensors': expected a file of `chainrule train`, "
            "got only a network; use chainrule.load",
        ),
        (
            ["draw", "model.safetensors", "-o", "graph.png"],
            "[draw] file name 'graph.png': expected the suffix .svg, got '.png'",
        ),
        (
            ["draw", "model.safetensors", "--row", 2],
            "[draw] --row: expected a data file to take it from, got only row 2",
        ),
        (["draw", "model.safetensors", "new.csv", "--row", 9], "[draw] --row: expected 1 to 7, got 9"),
        (["draw", "model.safetensors", "-o", "nowhere/g.svg"], "nowhere/g.svg: No such file or directory"),
    ],
)
def test_mistakes_in_explaining_and_drawing(flower_model, capsys, arguments, message):
    cr.mlp([2, 1]).save("net.safetensors")
    Path("empty.csv").write_text("id,size,colour,kind,price\n")
    write_row("unknown.csv", kind="")
    write_row("other.csv", kind="blue")
    assert run(capsys, *arguments) == (1, "", f"chainrule: error: {message}\n")
    assert not Path("graph.svg").exists() and not Path("graph.png").exists()


# ------------------------------------------------------------ demo, info and the like


def test_demo_reads_97_percent_of_the_digits_it_never_saw(capsys):
    pytest.importorskip("sklearn")
    code, out, _ = run(capsys, "demo")
    assert code == 0
    assert float(re.search(r"accuracy +([\d.]+) %", out).group(1)) >= 97
    for expected in [
        "451 held out",
        "training loss",
        "per step of 32 images",
        cr.info()["isa"],
        "█",
        "⣀",
        "(is a ",
    ]:
        assert expected in out, expected
    assert max(map(len, out.splitlines())) <= 100
    accuracies = [float(re.search(r"accuracy +([\d.]+) %", out).group(1))]
    for seed in (1, 2):
        _, out, _ = run(capsys, "demo", "--seed", seed)
        accuracies.append(float(re.search(r"accuracy +([\d.]+) %", out).group(1)))
    assert np.mean(accuracies) >= 97.3


def test_the_lines_of_python_the_demo_prints_run(capsys):
    datasets = pytest.importorskip("sklearn.datasets")
    _, out, _ = run(capsys, "demo", "--epochs", 1, "--threads", 1)
    lines = [line.strip() for line in out.splitlines()]
    begin = lines.index("import chainrule as cr")
    X, y = datasets.load_digits(return_X_y=True)
    exec("\n".join(lines[begin : begin + 3]), {"X": X, "y": y})


def test_demo_without_scikit_learn_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = run(capsys, "demo")
    assert code == 1 and 'pip install "chainrule[demo]"' in err


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(facts) == ["chainrule", "engine", "threads", "GPU", "NumPy", "Python"]
    assert facts["chainrule"] == cr.__version__ and facts["NumPy"] == np.__version__
    assert facts["engine"].startswith(cr.info()["isa"])


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"chainrule {cr.__version__}\n", "")
    for command in ([], ["train"], ["predict"], ["explain"], ["draw"], ["demo"], ["info"]):
        code, out, _ = run(capsys, *command, "--help")
        assert code == 0 and out.startswith("usage: chainrule") and out.isascii()
        assert "(None)" not in out and "SUPPRESS" not in out
    out = run(capsys, "train", "--help")[1]
    markers = re.search(r"Missing cells \(empty, or in CSV (.*)\) become the median", out).group(1)
    assert {"", *markers.split(", ")} == MISSING


# ------------------------------------------------------------ as a program


def program(*arguments, **options):
    command = [sys.executable, "-m", "chainrule", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **options)


def test_as_a_module(flowers):
    done = program("train", "flowers.csv", "--target", "kind", text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == "" and "accuracy" in done.stdout
    done = program("predict", "model.safetensors", "new.csv", text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 8
    done = program("predict", "model.safetensors", "none.csv", text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "chainrule: error: none.csv: No such file or directory\n"


def test_an_ascii_terminal_gets_ascii(flowers):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = program("train", "flowers.csv", "--target", "kind", "--epochs", "3", env=environment)
    assert done.returncode == 0, done.stderr
    assert "4 -> 64 -> 64 -> 2" in done.stdout.decode("ascii") or "-> 64 -> 64 -> 2" in done.stdout.decode(
        "ascii"
    )
    done = program("explain", "model.safetensors", "new.csv", env=environment)
    text = done.stdout.decode("ascii")
    assert "dL/dW1 = dL/df * J_{phi4}[phi5] * " in text and "?" not in text


def test_a_reader_that_goes_away_does_not_take_the_model_along(flowers):
    """`chainrule train … | head`, each line written at once: all that is printed after training fails."""
    options = ["--target", "kind", "--epochs", "3000", "--patience", "0"]
    command = [sys.executable, "-u", "-m", "chainrule", "train", "flowers.csv", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while b"note" not in process.stdout.readline():  # the last line before training
            pass
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1 and TableModel.load("model.safetensors").preprocessor.target == "kind"


@posix
def test_a_reader_that_goes_away_ends_it_in_silence(flowers, capsys):
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    write_csv("many.csv", rows=20_000)
    command = f"{sys.executable} -m chainrule predict model.safetensors many.csv | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("kind,p_big,p_small\n", "")


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("where", "message"), [(">&-", "use --output FILE"), ("> /dev/full", "No space left on device")]
)
def test_output_that_cannot_be_written_is_one_line(flowers, capsys, where, message, unbuffered):
    """What Python still has in its buffer at the end would make another line of it, and another exit code."""
    if "/dev/full" in where and not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    run(capsys, "train", "flowers.csv", "--target", "kind", "--epochs", 1)
    command = f"{sys.executable} -m chainrule predict model.safetensors new.csv {where}"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.startswith("chainrule: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


@posix
@pytest.mark.parametrize("size", [(24, 80), (0, 0)])  # rows, columns; a new pseudo-terminal says 0 × 0
def test_on_a_terminal_there_is_progress_and_nothing_is_left_of_it_in_the_output(flowers, size):
    """A real terminal for standard error: the bar goes there, the report stays clean."""
    fcntl, pty, struct, termios = map(importlib.import_module, ("fcntl", "pty", "struct", "termios"))
    inside, outside = pty.openpty()
    fcntl.ioctl(outside, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    try:
        code = "from chainrule import __main__, callbacks; callbacks.PATIENCE = 0; __main__.main()"  # at once
        command = [sys.executable, "-c", code, "train", "flowers.csv", "--target", "price"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=outside, timeout=120, check=False)
        os.close(outside)
        seen = b""
        while chunk := read_some(inside):
            seen += chunk
    finally:
        os.close(inside)
    assert done.returncode == 0
    assert b"epoch" in seen
    assert b"\r" not in done.stdout and b"\x1b" not in done.stdout and b"RMSE" in done.stdout


def read_some(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that the other end is closed
        return b""
