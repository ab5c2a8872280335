# SPDX-License-Identifier: MIT
"""How results leave: aligned tables, one line of progress, files that say what was measured on what."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import HERE, cpu_model, machine


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def progress(text: str) -> None:
    """One line rewritten in place, only on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def commit() -> str:
    """The commit that was measured, with '+' where files have changed since."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(versions: dict[str, str], missing: dict[str, str]) -> dict[str, Any]:
    """When, which commit, on which machine, beside what: the head of every result."""
    return {
        "measured": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions,
        "missing": missing,
    }


def result_path(what: str) -> Path:
    """bench/results/<date>-<what>-<cpu>.json; without <what> for the training step."""
    cpu = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    name = "-".join(filter(None, (f"{datetime.date.today():%Y-%m-%d}", what, cpu)))
    return HERE / "results" / f"{name}.json"


def add_workload(path: Path, name: str, record: dict[str, Any]) -> None:
    """Put one workload into a result file beside those that are there."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault("workloads", {})[name] = record
    write_json(path, results)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a result file, at once: whoever is killed meanwhile leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(path)
