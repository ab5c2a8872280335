# SPDX-License-Identifier: MIT
"""What is installed, and what `import chainrule` does to a process: little, and nothing."""

import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import chainrule

INSTALLED = Path(chainrule.__file__).parent

# Slow parts of the standard library: they may come in with what needs them, not with `import chainrule`.
SLOW = {
    "argparse",
    "asyncio",
    "concurrent",
    "csv",
    "ctypes",
    "doctest",
    "http",
    "multiprocessing",
    "pdb",
    "sqlite3",
    "tomllib",
    "unittest",
    "urllib",
    "xml",
}


def fresh_python(code):
    """Run `code` in a new interpreter; what it prints, from JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_brings_numpy_and_nothing_else():
    code = """
import json, sys
import numpy
before = set(sys.modules)
import chainrule
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    new = set(fresh_python(code))
    assert "chainrule" in new
    assert new - {"chainrule"} <= set(sys.stdlib_module_names), sorted(new)
    assert not new & SLOW, sorted(new & SLOW)


def test_import_leaves_the_command_line_and_the_data_readers_alone():
    loaded = fresh_python("import json, sys, chainrule; print(json.dumps(sorted(sys.modules)))")
    assert not {"chainrule.__main__", "chainrule.data", "chainrule.reference"} & set(loaded)


def test_only_numpy_is_required():
    needed = [r for r in importlib.metadata.requires("chainrule") if "extra ==" not in r]
    assert [re.match(r"[\w-]+", r).group() for r in needed] == ["numpy"]


def test_extras_are_the_documented_ones():
    extras = set(importlib.metadata.metadata("chainrule").get_all("Provides-Extra"))
    assert extras == {"demo", "progress", "parquet", "config", "sklearn", "io", "onnx", "test", "lint", "dev"}


def test_installed_package_is_small():
    """What the wheel brings; the bytecode that Python caches beside it is not ours to size."""
    files = [p for p in INSTALLED.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    files = [p for p in files if not p.name.startswith("_cuda.")]  # the GPU's engine comes when asked for
    size = sum(p.stat().st_size for p in files)
    most = 2.3e6 if sys.platform == "win32" else 1.5e6  # there the C++ runtime library is in the module
    assert size < most, {p.name: p.stat().st_size for p in files if p.stat().st_size > 50_000}


def test_types_are_shipped():
    assert (INSTALLED / "py.typed").is_file()
    assert (INSTALLED / "_core.pyi").is_file()


def test_command_is_installed():
    commands = importlib.metadata.entry_points(group="console_scripts", name="chainrule")
    assert [c.value for c in commands] == ["chainrule.__main__:main"]


def test_all_lists_every_public_name():
    public = {
        name
        for name, value in vars(chainrule).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("chainrule")
    }
    assert len(set(chainrule.__all__)) == len(chainrule.__all__)
    assert public <= set(chainrule.__all__)
    assert all(hasattr(chainrule, name) for name in chainrule.__all__)


def test_completion_shows_what_there_is():
    """Names that are imported later as well, and none that only the module itself needs."""
    names = set(dir(chainrule))
    assert {*chainrule.__all__, "data", "io", "reference"} == names
    assert all(hasattr(chainrule, name) for name in names)


@pytest.mark.parametrize(
    "names",
    [
        "Sequential mlp load Layer Linear Identity Sigmoid Tanh ReLU LeakyReLU ELU GELU SiLU Softplus",
        "Softmax LogSoftmax Dropout",
        "GD SGD Adam AdamW RMSprop StepLR ExponentialLR CosineAnnealingLR WarmupLR ReduceLROnPlateau",
        "EarlyStopping History set_num_threads get_num_threads info",
    ],
)
def test_the_names_that_were_promised(names):
    assert set(names.split()) <= set(chainrule.__all__)


@pytest.mark.parametrize("name", chainrule.__all__)
def test_methods_explain_themselves(name):
    """A hook or a map without a word has none to inherit either."""
    value = getattr(chainrule, name)
    for method, function in vars(value).items() if isinstance(value, type) else ():
        if inspect.isfunction(function) and not method.startswith("_"):
            assert inspect.getdoc(getattr(value, method)), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("name", chainrule.__all__)
def test_public_names_explain_themselves(name):
    value = getattr(chainrule, name)
    if not callable(value):
        return
    assert value.__doc__, f"{name} has no docstring"
    first = value.__doc__.strip().splitlines()[0].strip()
    assert first[-1] in ".:", f"{name}: the first line of the docstring is one sentence"
    assert ">>>" in value.__doc__, f"{name} has no example"
    assert value.__module__.split(".")[0] == "chainrule"
