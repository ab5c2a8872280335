# SPDX-License-Identifier: MIT
"""The shape of the house: which file may know which, and no list of ops forgets what another one has."""

import ast
import fnmatch
import functools
import importlib
import math
import re
from pathlib import Path

import pytest

import chainrule
from chainrule import _core, losses, optim, reference

ROOT = Path(__file__).resolve().parent.parent
CPP = ROOT / "cpp"
PACKAGE = ROOT / "python" / "chainrule"

TOP_LEVEL = {
    "pyproject.toml",
    "CMakeLists.txt",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "cpp",
    "python",
    "tests",
    "bench",
}

# Arrows point down: a file includes files of its own level or below, and never in a circle.
CPP_LEVELS = {
    "interrupt": 0,
    "platform": 0,
    "pool": 0,
    "random": 0,
    "simd": 1,
    "lane": 1,
    "gemm": 1,
    "ops/*": 2,
    "optim": 2,
    "kernels": 2,
    "dispatch": 2,
    "network": 3,
    "columns": 3,
    "loss": 3,
    "tiles": 3,
    "tape": 3,
    "sobolev": 3,
    "example_clipping": 3,
    "calculus": 3,
    "train": 3,
    "cuda/sizes": 0,
    "cuda/memory": 1,
    "cuda/cublaslt": 1,
    "cuda/runtime": 1,
    "cuda/mma": 2,
    "cuda/formulas": 2,
    "cuda/multiply": 2,
    "cuda/maps": 2,
    "cuda/library": 2,
    "cuda/*": 3,
    "cuda": 3,
    "bindings*": 4,
}

# The same for Python: a module imports modules of lower levels.
PYTHON_LEVELS = {
    "_core": 0,
    "_cuda": 0,
    "reference": 0,
    "checks": 0,
    "display": 0,
    "metrics": 0,
    "solvers": 0,
    "terminal": 0,
    "devices": 1,
    "layers": 1,
    "losses": 1,
    "optim": 1,
    "export": 2,
    "machine": 2,
    "batch": 2,
    "calculus": 3,
    "callbacks": 3,
    "training": 4,
    "wholebatch": 5,
    "model": 6,
    "io": 7,
    "links": 7,
    "many": 7,
    "sklearn": 7,
    "tables": 7,
    "checkpoint": 8,
    "data": 8,
    "explanation": 8,
    "gradient_check": 8,
    "plot": 8,
    "cli": 9,
    "__main__": 10,
}
# These go up and import what they call only then: net.save(path) and net.fit(checkpoint=path) write files.
UPWARD_CALLS = {("model", "io"), ("model", "checkpoint")}

MAX_FILE_LINES = 900
MAX_FUNCTION_LINES = 60  # a screen; docstrings and comments do not count
MAX_OP_LINES = 70


# --------------------------------------------------------------------------------------------- C++ includes
def cpp_files():
    return sorted(p for p in CPP.rglob("*") if p.suffix in {".hpp", ".cpp", ".def", ".cu", ".cuh"})


def level_of(path):
    stem = path.relative_to(CPP).with_suffix("").as_posix()
    levels = [level for pattern, level in CPP_LEVELS.items() if fnmatch.fnmatch(stem, pattern)]
    assert levels, f"cpp/{path.name} has no level: give it one in CPP_LEVELS"
    return levels[0]


def included_by(path):
    """Our own files that `path` includes."""
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for name in names:
        places = [p for p in ((path.parent / name).resolve(), CPP / name) if p.is_file()]
        assert places, f"{path.relative_to(ROOT)} includes {name}, which does not exist"
        found.append(places[0])
    return found


def reach(path):
    """Every file of ours that compiling `path` reads, `path` included."""
    seen, todo = set(), [path]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += included_by(here)
    return seen


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: p.relative_to(CPP).as_posix())
def test_includes_point_down(path):
    for target in included_by(path):
        assert level_of(target) <= level_of(path), (
            f"{path.relative_to(CPP)} (level {level_of(path)}) includes {target.relative_to(CPP)} "
            f"(level {level_of(target)}): arrows point down only"
        )
        assert path not in reach(target), f"{path.name} includes itself through {target.relative_to(CPP)}"


def test_only_the_bindings_know_python():
    for path in cpp_files():
        knows = re.search(
            r"#\s*include\s*[<\"](pybind11/|Python\.h|bindings)", path.read_text(encoding="utf-8")
        )
        assert bool(knows) == path.name.startswith("bindings"), path.name


def test_code_of_an_instruction_set_is_compiled_by_kernels_cpp_alone():
    """A header with code for one instruction set, included elsewhere, would be built for the wrong one."""
    for source in sorted(CPP.glob("*.cpp")):
        if source.name == "kernels.cpp":
            continue
        for header in reach(source):
            text = header.read_text(encoding="utf-8")
            assert "namespace CHAINRULE_ISA" not in text, f"{source.name} reaches {header.relative_to(CPP)}"


# ------------------------------------------------------------------------------------------- Python imports
def python_modules():
    return sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


def module_imports(name):
    """(modules of the package, other top-level packages) that a module imports, function bodies included.

    Imports under `if TYPE_CHECKING` are for the type checker; they are no arrows.
    """
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            node.body = []
    ours, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = "chainrule" if node.level else ""
            base = ".".join(filter(None, [package, node.module]))
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, member in targets:
            top, *rest = base.split(".")
            if top != "chainrule":
                others.add(top)
            elif rest:
                ours.add(rest[0])
            elif member:
                ours.add(member)  # from chainrule import model / a public name
            else:
                ours.add("__init__")
    return ours, others


@pytest.mark.parametrize("name", python_modules())
def test_imports_point_down(name):
    assert name in PYTHON_LEVELS, f"chainrule.{name} has no level: give it one in PYTHON_LEVELS"
    ours, _ = module_imports(name)
    for target in ours:
        down = PYTHON_LEVELS.get(target, math.inf) < PYTHON_LEVELS[name]
        assert down or (name, target) in UPWARD_CALLS, f"chainrule.{name} may not import chainrule.{target}"


def test_reference_is_plain_numpy():
    ours, others = module_imports("reference")
    assert not ours
    assert others <= {"__future__", "collections", "math", "typing", "numpy"}, sorted(others)


# ----------------------------------------------------------------------------- one list of ops, five places
@functools.cache
def rows_of_ops_def():
    text = (CPP / "ops" / "ops.def").read_text(encoding="utf-8")
    rows = re.findall(r"^\s*CHAINRULE_([A-Z]+)\((\w+)", text, re.MULTILINE)
    return [(kind.lower(), name) for kind, name in rows]


def names_of(*kinds):
    return [name for kind, name in rows_of_ops_def() if kind in kinds]


ELEMENTWISE_AND_ROWWISE = ("elementwise", "rowwise")
OTHER_OPS = ("linear", "linear_bfloat16", "dropout")


def test_ops_def_has_no_row_twice():
    rows = rows_of_ops_def()
    assert rows and len(set(rows)) == len(rows)


def test_module_has_the_rows_of_ops_def():
    rows = {(kind, name) for kind, name, _ in _core.ops() if kind not in {"linear", "dropout"}}
    assert rows == {row for row in rows_of_ops_def() if row[0] not in {"linear", "dropout"}}


@pytest.mark.parametrize("name", [*names_of(*ELEMENTWISE_AND_ROWWISE, "loss"), *OTHER_OPS])
def test_each_op_has_its_own_short_header(name):
    header = CPP / "ops" / f"{name}.hpp"
    assert header.is_file(), f"{name} is in ops.def and has no cpp/ops/{name}.hpp"
    assert len(header.read_text(encoding="utf-8").splitlines()) <= MAX_OP_LINES


def test_no_header_without_a_row():
    headers = {p.stem for p in (CPP / "ops").glob("*.hpp")} - {"op"}
    assert headers == {*names_of(*ELEMENTWISE_AND_ROWWISE, "loss"), *OTHER_OPS}


def classes_of(module, base):
    """op name without underscores -> class, for the public classes of a module: `LeakyReLU` is leakyrelu."""
    found = {}
    for cls in vars(importlib.import_module(f"chainrule.{module}")).values():
        public = isinstance(cls, type) and issubclass(cls, base) and not cls.__name__.startswith("_")
        if public and cls is not base:
            found[cls.__name__.lower()] = cls
    return found


def squeezed(names):
    return {name.replace("_", "") for name in names}


def test_each_layer_has_a_python_class():
    classes = classes_of("layers", chainrule.Layer)
    assert set(classes) == squeezed(names_of(*ELEMENTWISE_AND_ROWWISE)) | {"linear", "dropout"}
    assert {cls.__name__ for cls in classes.values()} <= set(chainrule.__all__)


def test_each_loss_and_optimizer_has_a_python_class():
    assert set(losses.LOSSES) - {"bce"} == set(names_of("loss"))  # bce is another name for logistic
    assert set(optim.OPTIMIZERS) == set(names_of("optimizer"))
    classes = {*losses.LOSSES.values(), *optim.OPTIMIZERS.values(), *optim.WHOLE_BATCH.values()}
    assert {cls.__name__ for cls in classes} <= set(chainrule.__all__)


def test_the_reference_has_every_op():
    assert set(reference.OPS) == set(names_of(*ELEMENTWISE_AND_ROWWISE))
    assert set(reference.LOSSES) == set(names_of("loss"))
    assert set(reference.OPTIMIZERS) == set(names_of("optimizer"))


def test_each_op_and_loss_has_a_row_in_the_tests():
    """The tables themselves; that each row is tested is the business of the files they stand in."""
    for table, kinds in (("test_ops", ELEMENTWISE_AND_ROWWISE), ("test_losses", ("loss",))):
        rows = [row.name for row in importlib.import_module(table).ROWS]
        assert set(rows) == set(names_of(*kinds))


# ------------------------------------------------------------------------------------------ files and sizes
def source_files():
    places = [CPP, ROOT / "python", ROOT / "tests", ROOT / "bench", ROOT / ".ci"]
    files = [p for place in places for p in place.rglob("*") if p.is_file()]
    code = {".hpp", ".cpp", ".def", ".cu", ".cuh", ".h", ".py", ".pyi", ".sh", ""}
    return sorted(p for p in files if p.suffix in code and p.name != "py.typed")


def ignored_by_git():
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return [line.strip("/") for line in lines if not line.startswith("#")]


def test_top_level_holds_only_what_it_should():
    ignored = ignored_by_git()
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    kept = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert kept - {"PKG-INFO"} == TOP_LEVEL  # which sdists bring


@pytest.mark.parametrize("path", source_files(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_short_and_say_their_licence(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert not lines or any("SPDX-License-Identifier: MIT" in line for line in lines[:2])


def python_function_lengths(text):
    """(name, lines of code) of each function: docstring, comments and blank lines are free."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if body:
            span = lines[body[0].lineno - 1 : body[-1].end_lineno]
            yield node.name, sum(bool(line.strip()) and not line.strip().startswith("#") for line in span)


def blank_out(match):
    """Comments and literals become spaces, so that braces inside them do not count; lines stay lines."""
    return re.sub(r"[^\n]", " ", match.group())


COMMENT_OR_LITERAL = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"\(.*?\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])\'', re.DOTALL
)


def cpp_function_lengths(text):
    """(what stands before the brace, lines of code) of each function body; a brace matcher, not a parser."""
    text = COMMENT_OR_LITERAL.sub(blank_out, text)
    text = re.sub(r"^\s*#.*(?:\\\n.*)*$", blank_out, text, flags=re.MULTILINE)
    stack, last = [], 0  # stack of (is a function, head, start)
    for match in re.finditer(r"[{};]", text):
        if match.group() == "{":
            head = " ".join(text[last : match.start()].split())
            scope = re.search(r"\b(namespace|struct|class|enum|union|extern)\b(?!.*\))", head)
            inside = any(function for function, _, _ in stack)
            stack.append((not scope and "(" in head and not inside, head, match.end()))
        elif match.group() == "}" and stack:
            function, head, start = stack.pop()
            if function:
                yield head[-60:], sum(bool(line.strip()) for line in text[start : match.start()].splitlines())
        last = match.end()


LENGTHS = {".py": python_function_lengths} | dict.fromkeys(
    [".hpp", ".cpp", ".cu", ".cuh", ".h"], cpp_function_lengths
)


@pytest.mark.parametrize(
    "path",
    [p for p in source_files() if p.suffix in LENGTHS],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_functions_fit_on_a_screen(path):
    lengths = LENGTHS[path.suffix]
    long = [(name, n) for name, n in lengths(path.read_text(encoding="utf-8")) if n > MAX_FUNCTION_LINES]
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"


def test_the_measure_of_functions_works():
    python = 'def f():\n    """Doc."""\n    # why\n    a = 1\n\n    return a\n'
    assert list(python_function_lengths(python)) == [("f", 2)]
    cpp = 'namespace a {\nstruct B {\nint f(int x) const {\n  if (x) {\n    g("}");\n  }\n}\n};\n}\n'
    assert list(cpp_function_lengths(cpp)) == [("int f(int x) const", 3)]


# -------------------------------------------------------------------------------------------------- version
def test_one_version():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', project, re.MULTILINE).group(1)
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version == _core.__version__ == chainrule.__version__ == changes[0]
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert version not in cmake, "CMake reads the version from pyproject.toml"
