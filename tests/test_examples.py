# SPDX-License-Identifier: MIT
"""The lecture in python/examples: every script runs, is a page long, and stands in the page of all.py."""

import ast
import doctest
import functools
import importlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import chainrule

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "python" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9][0-9]_*.py"))
HELPERS = ("differences", "figures", "formulas")
MAX_LINES = 80

SECTIONS = (  # of the lecture, in its order
    "Loss Function For Regression",
    "Loss Function For Classification",
    "Detour: Vector Chain Rule",
    "Let's Now Finish The Optimization",
    "Let's Generalize Everything",
    "Why does this all work?",
)
SLOW = {"10_over_parameterised"}


@pytest.fixture
def helper(monkeypatch):
    """name -> a module beside the examples, imported as they import it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in HELPERS:
        sys.modules.pop(name, None)


def run(*command, cwd=None):
    done = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        cwd=cwd, capture_output=True, encoding="utf-8", timeout=300,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


@functools.cache
def output_of(script):
    return run(script)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


# ------------------------------------------------------------------------------------------------ the scripts
def test_the_scripts_cover_the_lecture():
    assert [script.name[:2] for script in SCRIPTS] == [f"{k:02}" for k in range(1, 11)]
    docstrings = [ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) for script in SCRIPTS]
    places = [next(k for k, text in enumerate(docstrings) if section in text) for section in SECTIONS]
    assert places == sorted(places)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_is_a_page_with_a_card(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    title, lecture, formulas, *prose = ast.get_docstring(ast.parse(text)).split("\n\n")
    assert "\n" not in title and lecture.startswith("Lecture: ")
    assert formulas.startswith("    ") and prose


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_uses_what_is_public(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert set(imports(tree)) <= {"numpy", "time", "timeit", "chainrule", *HELPERS}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "cr"
    }
    assert used and used <= set(chainrule.__all__)


@pytest.mark.parametrize(
    "script",
    [pytest.param(s, marks=[pytest.mark.slow] if s.stem in SLOW else [], id=s.stem) for s in SCRIPTS],
)
def test_script_runs(script):
    lines = output_of(script).splitlines()
    assert lines and max(map(len, lines)) <= 100


# --------------------------------------------------------------------------------------------------- the page
def local(element):
    return element.tag.rpartition("}")[2]


@pytest.mark.slow
def test_the_page_holds_everything(tmp_path):
    run(EXAMPLES / "all.py", "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#)', text), "the page stands alone"
    body = next(e for e in ET.fromstring(text) if local(e) == "body")
    sections = [e for e in body if local(e) == "section"]
    assert [section.get("id") for section in sections] == [script.stem for script in SCRIPTS]
    for section, script in zip(sections, SCRIPTS, strict=True):
        names = [local(e) for e in section.iter()]
        source = script.read_text(encoding="utf-8")
        assert "math" in names
        assert ("svg" in names) == ("def figure(" in source)
        details = next(e for e in section if local(e) == "details")
        assert "".join(details[1].itertext()) == source
        printed = "".join(next(e for e in section if e.get("class") == "output").itertext())
        if not {"time", "timeit"} & set(imports(ast.parse(source))):
            assert printed == output_of(script).rstrip()


def test_sections_can_be_chosen(tmp_path):
    assert "03_vector_chain_rule" in run(EXAMPLES / "all.py", "03", cwd=tmp_path)
    text = (tmp_path / "lecture.html").read_text(encoding="utf-8")
    assert re.findall('<section id="(.*)">', text) == ["03_vector_chain_rule"]


# ------------------------------------------------------------------------------------------------ the helpers
@pytest.mark.parametrize("name", HELPERS)
def test_docstring_examples(name, helper):
    failed, tried = doctest.testmod(helper(name), extraglobs={"np": np})
    assert failed == 0 and tried > 0


def test_differences_leave_the_network_as_it_was(helper):
    net = chainrule.mlp([2, 3, 1], activation="tanh", dtype="float64")
    before, X, y = net.state_dict(), [[0.5, -1.0]], [1.0]
    slopes = helper("differences").in_parameters(net, lambda: net.evaluate(X, y, loss="mse"))
    _, grads = net.value_and_grad(X, y, loss="mse")
    assert list(slopes) == list(grads)
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, grads[name], atol=1e-8)
        assert np.array_equal(net.state_dict()[name], before[name])


def test_a_chart_puts_points_where_they_belong(helper):
    """A straight line stays straight, on logarithmic axes a power law does; all within the frame."""
    figures = helper("figures")
    x = [1.0, 10.0, 100.0, 1000.0]
    for log, y in ((True, [v**2 for v in x]), (False, [3 * v - 2 for v in x])):
        curve = figures.Series("", x, y)
        drawn = ET.fromstring(figures.svg(figures.Chart("<&>", "x", "y", [curve], log_x=log, log_y=log)))
        line = next(e for e in drawn.iter() if local(e) == "polyline").get("points")
        places = np.array([[float(v) for v in place.split(",")] for place in line.split()])
        assert (places >= 0).all() and (places <= (figures.WIDTH, figures.HEIGHT)).all()
        right, down = np.diff(places, axis=0).T
        assert (right > 0).all() and (down < 0).all()
        np.testing.assert_allclose(down / right, down[-1] / right[-1], rtol=0.05)  # rounded to 0.1 pixel


@pytest.mark.parametrize(
    "log, low, high, names",
    [
        (False, 0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (False, -3.0, 2500.0, ["0", "500", "1000", "1500", "2000", "2500"]),
        (True, 1e-12, 1.0, ["10⁻¹²", "10⁻¹⁰", "10⁻⁸", "10⁻⁶", "10⁻⁴", "10⁻²", "1"]),
        (True, 1.0, 320.0, ["1", "10", "100"]),
        (True, 64.0, 1024.0, ["100", "200", "500", "1000"]),
    ],
)
def test_ticks_are_round(log, low, high, names, helper):
    axis = helper("figures").Axis([low, high], log, 0, 100)
    assert [name for _, name in axis.numbered()] == names


def test_a_product_of_matrices_has_a_cell_for_each_number(helper):
    product = helper("figures").matrices(
        [("a", np.ones((1, 4))), ("b", np.ones((4, 3)))], ("c", np.ones((1, 3)))
    )
    cells = [e for e in ET.fromstring(product).iter() if local(e) == "rect" and e.get("fill") != "white"]
    assert len(cells) == 4 + 12 + 3


@pytest.mark.parametrize(
    "formula, result",
    [
        ("φᴸ⁻¹", "<msup>φ<mrow>L−1</mrow></msup>"),
        ("x_{nd}", "<msub>x<mrow>nd</mrow></msub>"),
        ("W^{k}", "<msup>Wk</msup>"),
        ("1/(1 + a)", "<mfrac>1<mrow>1+a</mrow></mfrac>"),
        ("∂σ(z)/∂z", "<mfrac><mrow>∂σ<mrow>(z)</mrow></mrow><mrow>∂z</mrow></mfrac>"),
        ("∑ₙ J′", "<munder>∑n</munder> J′"),
        ("(a)(b)/c", "<mrow>(a)</mrow><mfrac>bc</mfrac>"),
        ("½(−a + b)", "<mfrac>12</mfrac><mrow>(<mrow>−a+b</mrow>)</mrow>"),
        ("a < b", "a&lt;b"),
    ],
)
def test_formulas(formula, result, helper):
    """The structure; the leaves are names, numbers and signs."""
    text = helper("formulas").mathml(formula)
    ET.fromstring(text)
    text = text.replace('<mspace width="0.22em"/>', " ")
    text = re.sub(r"</?(mi|mn|mo|math)( [^>]*)?>", "", text)
    assert text == result
