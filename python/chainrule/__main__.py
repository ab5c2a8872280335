# SPDX-License-Identifier: MIT
"""The command line: `chainrule train data.csv --target price`, `predict`, `demo`, `info`.

Exit codes: 0 done; 1 a file or value that cannot be used, with one line on standard error; 2 options that
cannot be read; 130 interrupted. `python -m chainrule` is the same program.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import _core, cli
from .tables import listed

_WIDTH_OF_OPTIONS = 28


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; options that cannot be read end in SystemExit(2), as usual.

    >>> main(["predict", "nowhere.safetensors", "new.csv"])  # and says why on standard error
    1
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if getattr(args, "config", None):
            command = arguments.index(
                "train"
            )  # what stands in the file goes first, so that options override it
            arguments[command + 1 : command + 1] = _options_from(args.config, args.known)
            args = parser.parse_args(arguments)
        if args.command is cli.train and args.target is None:
            parser.error("the following option is required: --target COLUMN")
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(
            f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except (ValueError, ImportError, FloatingPointError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    return 0


def _fail(message: str, code: int = 1) -> int:
    line = " ".join(f"chainrule: error: {message}".split())
    sys.stderr.write(
        line.encode(sys.stderr.encoding or "utf-8", "replace").decode(sys.stderr.encoding or "utf-8") + "\n"
    )
    return code


# ------------------------------------------------------------ options


def _parser() -> argparse.ArgumentParser:
    def layout(prog: str) -> argparse.HelpFormatter:
        return argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=_WIDTH_OF_OPTIONS)

    parser = argparse.ArgumentParser(
        prog="chainrule",
        description="Fast small neural networks, for tables and from Python.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chainrule {_core.__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(run: Callable[[argparse.Namespace], None], line: str) -> argparse.ArgumentParser:
        found = commands.add_parser(
            run.__name__, help=line, description=f"{line[0].upper()}{line[1:]}.", formatter_class=layout,
            allow_abbrev=False,
        )  # fmt: skip
        found.set_defaults(command=run)
        return found

    _train_options(command(cli.train, "train a network on a CSV or Parquet file"))
    predict = command(cli.predict, "answer for the rows of a file with a trained network")
    predict.add_argument("model", help="a file of `chainrule train`")
    predict.add_argument("data", help="a CSV or Parquet file with the same columns")
    predict.add_argument("--output", metavar="FILE", help="write CSV there", default=argparse.SUPPRESS)
    predict.set_defaults(output=None)
    demo = command(cli.demo, "train on handwritten digits and show what happened")
    demo.add_argument("--epochs", type=_whole(1), default=40, help="passes over the training images")
    _common_options(demo)
    command(cli.info, "show version, instruction set, threads and GPU state")
    return parser


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("data", help="a CSV file with a header line, or a Parquet file")
    add = train.add_argument
    add("--target", metavar="COLUMN", help="the column to predict (required)", default=argparse.SUPPRESS)
    add(
        "--ignore",
        metavar="COLUMNS",
        action="append",
        default=[],
        help="columns to leave out, separated by commas",
    )
    add("--task", choices=("classification", "regression"), help="instead of inferring it from the target",
        default=argparse.SUPPRESS)  # fmt: skip
    add("--output", metavar="FILE", default="model.safetensors", help="the model file to write")
    add("--config", metavar="FILE", help="a TOML file with any of these options", default=argparse.SUPPRESS)
    add("--quiet", action="store_true", help="print the scores only", default=argparse.SUPPRESS)
    train.set_defaults(target=None, task=None, config=None, quiet=False, loss=None)
    net = train.add_argument_group("the network")
    net.add_argument(
        "--hidden", type=_widths, default="64,64", metavar="WIDTHS", help="hidden layers; none for none"
    )
    net.add_argument("--activation", choices=cli.ACTIVATIONS, default="relu", metavar="NAME",
                     help=f"one of {', '.join(cli.ACTIVATIONS)}")  # fmt: skip
    net.add_argument(
        "--dropout", type=_real(0, 1), default=0.0, metavar="P", help="share of activations dropped"
    )
    net.add_argument(
        "--dtype", choices=("float32", "float64"), default="float32", help="of weights and arithmetic"
    )
    fit = train.add_argument_group("training")
    fit.add_argument("--loss", metavar="NAME", default=argparse.SUPPRESS,
                     help=f"cross_entropy for classes; mse (the default for numbers), or one of "
                          f"{', '.join(n for n in cli.REGRESSION_LOSSES if n != 'mse')}")  # fmt: skip
    fit.add_argument("--optimizer", choices=cli.OPTIMIZER_NAMES, default="adam", help="the update rule")
    fit.add_argument("--lr", type=_real(0, math.inf, open_low=True), default=1e-3, help="learning rate")
    fit.add_argument("--batch-size", type=_whole(1), default=32, metavar="N", help="rows in one step")
    fit.add_argument(
        "--epochs", type=_whole(1), default=500, metavar="N", help="most passes over the training rows"
    )
    fit.add_argument("--patience", type=_whole(0), default=20, metavar="N",
                     help="epochs without a better validation loss, then stop; 0: never stop")  # fmt: skip
    fit.add_argument(
        "--l2", type=_real(0, math.inf), default=0.0, metavar="X", help="penalty ½·X·Σw² on weights"
    )
    fit.add_argument(
        "--test-size", type=_real(0, 1), default=0.2, metavar="SHARE", help="rows held out for the scores"
    )
    fit.add_argument("--validation-size", type=_real(0, 1), default=0.15, metavar="SHARE",
                     help="of the other rows, for early stopping")  # fmt: skip
    _common_options(train)
    train.set_defaults(
        known=sorted(
            action.dest for action in train._actions if action.dest not in {"help", "config", "data"}
        )
    )


def _common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed", type=_whole(0), default=0, metavar="N", help="of split, weights and batches"
    )
    parser.add_argument(
        "--threads", type=_whole(1), metavar="N", help="instead of one per core", default=argparse.SUPPRESS
    )
    parser.set_defaults(threads=None)


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
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
    """Hidden widths as in "64,32"; "none" is no hidden layer, a linear model.

    >>> _widths("64,32"), _widths("none")
    ([64, 32], [])
    """
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
        elif isinstance(value, list) and name == "--ignore":
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
            raise ImportError(
                "[config] TOML: expected Python 3.11 or tomli, got neither; pip install tomli"
            ) from None
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"[config] {path}: expected TOML, got: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
