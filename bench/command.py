# SPDX-License-Identifier: MIT
"""The options that the benchmarks share; lists are comma-separated and checked while they are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from report import result_path
from timing import usable_cpus


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: names out of `known`."""
    names = list(known)

    def read(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, got {', '.join(unknown)}")
        return chosen

    return read


def thread_counts(text: str) -> list[int]:
    """An argparse type: numbers of threads, ascending."""
    try:
        counts = sorted({int(n) for n in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of threads like 1,2, got {text}")
    return counts


def parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark understands; the description is the first line of its docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    every = sorted({1, usable_cpus()})
    add("--threads", type=thread_counts, default=every, help="to measure with (default: 1 and all CPUs)")
    add("--quick", action="store_true", help="smoke test: less of everything, no result file")
    add("--output", type=Path, help="result file (default: in bench/results)")
    add("--python", default=sys.executable, help="interpreter of the workers (default: this one)")
    return parser


def add_sampling(parser: argparse.ArgumentParser, rounds: int = 7, seconds: float = 0.3) -> None:
    """--rounds and --seconds, for what is timed in rounds."""
    parser.set_defaults(usual=(rounds, seconds))
    parser.add_argument("--rounds", type=int, help=f"samples of each (default: {rounds}; quick: 3)")
    parser.add_argument(
        "--seconds", type=float, help=f"least time of a sample (default: {seconds}; quick: 0.05)"
    )


def add_workloads(parser: argparse.ArgumentParser, known: Iterable[str], usual: str, quick: str) -> None:
    """--workloads out of `known`, with what runs when none is named."""
    names = list(known)
    parser.set_defaults(usual_workloads=(usual.split(","), quick.split(",")))
    text = f"of {', '.join(names)} (default: {usual}; quick: {quick})"
    parser.add_argument("--workloads", type=some_of(names), help=text)


def add_peers(parser: argparse.ArgumentParser, peers: Iterable[str]) -> None:
    """--peers out of `peers`."""
    names = list(peers)
    parser.add_argument(
        "--peers", type=some_of(names), default=names, help=f"of {', '.join(names)} (default: all)"
    )


def parse(
    parser: argparse.ArgumentParser, what: str, arguments: list[str] | None = None
) -> argparse.Namespace:
    """Read the command line and fill in what depends on --quick."""
    options = parser.parse_args(arguments)
    if hasattr(options, "usual"):
        rounds, seconds = (3, 0.05) if options.quick else options.usual
        options.rounds, options.seconds = options.rounds or rounds, options.seconds or seconds
    if hasattr(options, "usual_workloads"):
        options.workloads = options.workloads or options.usual_workloads[options.quick]
    if not options.quick:
        options.output = options.output or result_path(what)
    return options
