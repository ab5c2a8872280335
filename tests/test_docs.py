# SPDX-License-Identifier: MIT
"""Every example runs: the code blocks of README.md, in order, and the examples in the docstrings."""

import ast
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import chainrule
from conftest import posix

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# The two commands of the first screen set up an environment of their own; .ci/run runs them in a fresh clone.
SET_UP = "python3 -m venv "


class Block(NamedTuple):
    line: int  # of README.md, where its first line of code stands
    language: str
    code: str


def readme_blocks():
    text = README.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(text.count("\n", 0, match.start()) + 2, *match.groups())


BLOCKS = list(readme_blocks())


def test_blocks_say_what_they_are():
    assert {b.language for b in BLOCKS} <= {"bash", "python", "text"}, "use text for what does not run"


def test_first_screen_has_the_two_set_up_commands():
    commands = [b for b in BLOCKS if b.code.startswith(SET_UP)]
    assert [len(b.code.splitlines()) for b in commands] == [1, 1]
    assert all(b.language == "bash" and b.line < 30 for b in commands)


def run_bash(block, folder):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}\n{done.stderr}"


def run_python(block, names):
    code = compile(
        "\n" * (block.line - 1) + block.code, str(README), "exec"
    )  # tracebacks show README's own lines
    exec(code, names)


@posix
def test_readme_runs(tmp_path, monkeypatch):
    """One reader from top to bottom: later blocks may use the files and names of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in BLOCKS:
        if block.language == "bash" and not block.code.startswith(SET_UP):
            run_bash(block, tmp_path)
        elif block.language == "python":
            run_python(block, names)


def test_readme_shows_five_lines_of_python_first():
    first = next(b for b in BLOCKS if b.language == "python")
    statements = [s for s in ast.parse(first.code).body if not isinstance(s, ast.Import | ast.ImportFrom)]
    assert len(statements) <= 5


def test_links_in_readme_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / target).exists(), target


MODULES = sorted(m.name for m in pkgutil.iter_modules(chainrule.__path__) if m.name != "_core")
PUBLIC = {
    "calculus", "data", "explanation", "gradient_check", "io", "layers", "losses", "metrics", "model",
    "optim", "plot", "reference", "sklearn", "training",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"chainrule.{name}")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(module, extraglobs={"cr": chainrule, "np": np}, optionflags=flags)
    assert failed == 0, "see the captured output"
    assert tried > 0 or name not in PUBLIC, f"chainrule.{name} has no example"


def test_examples_of_the_package():
    assert doctest.testmod(chainrule).failed == 0
