# SPDX-License-Identifier: MIT
"""The command line: `chainrule train data.csv --target price`, `predict`, `explain`, `draw`, `demo`, `info`.

Exit codes: 0 done; 1 a file or value that cannot be used, with one line on standard error; 2 options that
cannot be read; 130 interrupted. `python -m chainrule` is the same program.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import _core, cli
from .checks import listed
from .tables import MISSING
from .terminal import Screen


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; options that cannot be read end in SystemExit(2), as usual.

    >>> main(["predict", "nowhere.safetensors", "new.csv"])  # and says why on standard error
    1
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _read(arguments)
        args.command(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", 130)
    except OSError as error:
        _let_go()
        if _reader_has_gone(error):  # nobody is left to be told
            return 1
        if isinstance(error, FileNotFoundError) and error.filename:  # in English on every system
            return _fail(f"{error.filename}: {os.strerror(errno.ENOENT)}")
        named = error.filename and error.strerror
        return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except (ValueError, ImportError, FloatingPointError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    return 0


def _read(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command is not cli.train:
        return args
    if args.config:  # what stands in the file goes first, so that typed options override it
        place = arguments.index("train") + 1
        options = _options_from(args.config, args.known)
        args = parser.parse_args([*arguments[:place], *options, *arguments[place:]])
    if args.target is None:
        args.error("the following arguments are required: --target")
    return args


def _let_go() -> None:
    """What stdout does not take goes nowhere; Python would try again at its end, and exit with 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_gone(error: OSError) -> bool:
    """On Windows, to write to a pipe that nobody reads is an invalid argument, of no file's name."""
    nameless = error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or (os.name == "nt" and nameless)


def _fail(message: str, code: int = 1) -> int:
    Screen(sys.stderr).line(" ".join(f"chainrule: error: {message}".split()))
    return code


# ------------------------------------------------------------ options


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"max_help_position": 28, **options})

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = type(action.default) in (str, int, float) and action.default != argparse.SUPPRESS
        return f"{action.help} (%(default)s)" if says_something else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chainrule",
        description="Fast small neural networks, for tables and from Python.",
        epilog="Begin with `chainrule demo`; `chainrule train --help` shows the options of a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chainrule {_core.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    _train_options(_command(commands, cli.train, "data.csv --target COLUMN", "train a network on a table"))
    predict = _command(commands, cli.predict, "model.safetensors data.csv", "answer for the rows of a table")
    predict.add_argument("model", help="a file that `chainrule train` wrote")
    predict.add_argument("data", help="a CSV or Parquet file with the same columns")
    predict.add_argument("--output", metavar="FILE", help="write the answers there as CSV, not to the screen")
    _explain_options(
        _command(
            commands, cli.explain, "model.safetensors data.csv", "show a gradient as a chain-rule product"
        )
    )
    _draw_options(
        _command(commands, cli.draw, "model.safetensors [data.csv]", "draw a network as an SVG file")
    )
    demo = _command(commands, cli.demo, "", "read handwritten digits: a first look, no file needed")
    demo.add_argument("--epochs", type=_whole(1), default=60, metavar="N", help="passes over the images")
    _common_options(demo)
    _command(commands, cli.info, "", "show version, instruction set, threads and GPU state")
    return parser


def _command(commands: Any, run: Callable[..., None], usage: str, line: str) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = commands.add_parser(
        run.__name__,
        usage=" ".join(f"chainrule {run.__name__} {usage} [options]".split()),
        help=line,
        description=f"{line[0].upper()}{line[1:]}.",
        formatter_class=_Layout,
        allow_abbrev=False,
    )
    found.set_defaults(command=run)
    return found


def _train_options(train: argparse.ArgumentParser) -> None:
    train.epilog = (
        f"Missing cells (empty, or in CSV {', '.join(sorted(MISSING - {''}))}) become the median of\n"
        "the training rows, and a 0/1 column beside theirs says where they were; in a column of text they\n"
        "belong to no category; a row without a target is left out.\n\n"
        "Example: chainrule train homes.csv --target price --ignore id,street --hidden 128,64\n"
        'The same in a TOML file: target = "price", ignore = ["id", "street"], hidden = [128, 64]'
    )
    add = train.add_argument
    add("data", help="a CSV file with a header line, or a Parquet file")
    add("--target", metavar="COLUMN", help="the column to predict")
    add("--ignore", metavar="COLUMNS", action="append", default=[], help="columns to leave out, like id,name")
    add("--text", metavar="COLUMNS", action="append", default=[], help="columns whose numbers are codes")
    add("--task", choices=("classification", "regression"), help="instead of inferring it from the target")
    add("--output", metavar="FILE", default="model.safetensors", help="the model file to write")
    add("--config", metavar="FILE", help="a TOML file with any of these options")
    add("--quiet", action="store_true", help="print the scores only")
    add = train.add_argument_group("network").add_argument
    names = ", ".join(cli.ACTIVATIONS)
    add("--hidden", type=_widths, default="64,64", metavar="WIDTHS", help='hidden layers, or "none"')
    add("--activation", choices=cli.ACTIVATIONS, default="relu", metavar="NAME", help=f"one of {names}")
    add("--dropout", type=_real(0, 1), default=0.0, metavar="P", help="share of activations dropped")
    add("--dtype", choices=("float32", "float64", "bfloat16"), default="float32", help="of arithmetic")
    add = train.add_argument_group("training").add_argument
    names = ", ".join(cli.REGRESSION_LOSSES)
    add("--loss", metavar="NAME", help=f"cross_entropy for classes; mse for numbers, or one of {names}")
    add("--optimizer", choices=cli.OPTIMIZER_NAMES, default="adam", metavar="NAME",
        help=f"one of {', '.join(cli.OPTIMIZER_NAMES)}")  # fmt: skip
    add("--lr", type=_real(0, math.inf, open_low=True), default=1e-3, metavar="X", help="learning rate")
    add("--batch-size", type=_whole(1), default=32, metavar="N", help="rows in one step")
    add("--epochs", type=_whole(1), default=500, metavar="N", help="most passes over the training rows")
    add("--patience", type=_whole(0), default=20, metavar="N",
        help="stop after so many epochs without a better validation loss; 0 for never")  # fmt: skip
    add("--class-weight", choices=("balanced",), help="rare classes count as much as frequent ones")
    add("--l2", type=_real(0, math.inf), default=0.0, metavar="X", help="strength of the penalty on weights")
    add("--test-size", type=_real(0, 1), default=0.2, metavar="SHARE", help="rows held out for the scores")
    add("--validation-size", type=_real(0, 1), default=0.15, metavar="SHARE",
        help="of the other rows, those that early stopping watches")  # fmt: skip
    add("--checkpoint", metavar="FILE",
        help="keep what training has come to in FILE; if it is there, go on from it")  # fmt: skip
    _common_options(train)
    known = [action.dest for action in train._actions if action.option_strings]
    known = [name for name in known if name not in {"help", "config"}]
    train.set_defaults(known=known, error=train.error)


def _explain_options(explain: argparse.ArgumentParser) -> None:
    explain.epilog = "Example: chainrule explain model.safetensors homes.csv --row 3 --wrt 2.bias"
    add = explain.add_argument
    add("model", help="a file that `chainrule train` wrote")
    add("data", help="a CSV or Parquet file with the same columns, the target among them")
    add("--row", type=_whole(1), default=1, metavar="N", help="which row of the file, from 1")
    add("--wrt", default="0.weight", metavar="NAME",
        help='the parameter whose gradient is shown, as in state_dict, or "x" for the inputs')  # fmt: skip


def _draw_options(draw: argparse.ArgumentParser) -> None:
    draw.epilog = "Example: chainrule draw model.safetensors homes.csv --row 3 -o graph.svg"
    add = draw.add_argument
    add("model", help="a model file; with data, one that `chainrule train` wrote")
    add("data", nargs="?", help="a CSV or Parquet file with the same columns; without it, structure alone")
    add("--row", type=_whole(1), metavar="N", help="which row of the file, from 1; the first if not given")
    add("-o", "--output", metavar="FILE", default="graph.svg", help="the picture to write")


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=_whole(0, 2**64 - 1), default=0, metavar="N", help="of split, weights and batches"
    )
    parser.add_argument("--threads", type=_whole(1), metavar="N", help="instead of one for each core")


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            limit = f"at least {least}" if number < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number of {limit}, got {text!r}")
        return number

    return parse


def _real(low: float, high: float, open_low: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (low < number < high or (number == low and not open_low)):
            above = "above" if open_low else "of at least"
            below = f" and below {high:g}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"expected a number {above} {low:g}{below}, got {text!r}")
        return number

    return parse


def _widths(text: str) -> list[int]:
    """Hidden widths as in "64,32"; "none" is no hidden layer, a linear model."""
    return [] if text.strip() in {"none", ""} else [_whole(1)(part.strip()) for part in text.split(",")]


def _options_from(path: str, known: Sequence[str]) -> list[str]:
    """A TOML file's entries as options, for the parser to judge them as if they had been typed."""
    options = []
    for key, value in _toml(path).items():
        if key.replace("-", "_") not in known:
            raise ValueError(f"[config] {path}: expected options among {listed(known)}, got {key!r}")
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            options += [name] if value else []
        elif isinstance(value, list) and name in {"--ignore", "--text"}:
            options += [f"{name}={item}" for item in value]
        elif isinstance(value, dict):
            raise ValueError(f"[config] {path}: expected a value for {key!r}, got a table")
        else:
            options.append(f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return options


def _toml(path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            wanted = 'expected Python 3.11 or tomli, got neither; pip install "chainrule[config]"'
            raise ImportError(f"[config] {path}: {wanted}") from None
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"[config] {path}: expected TOML, got: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
