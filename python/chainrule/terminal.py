# SPDX-License-Identifier: MIT
"""What the command line draws: plain text that stays readable on every terminal, in a file, and in ASCII."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

_ASCII = {"→": "->", "↓": "v", "×": "x", "µ": "u", "…": "...", "✓": "ok",
          "│": "|", "┤": "+", "└": "+", "─": "-",
          "φ": "phi", "∂": "d", "σ": "sigma", "Φ": "Phi", "μ": "mu", "Σ": "sum ", "∈": "in", "−": "-",
          "·": "*", "⊗": "(x)", "′": "'", "ᵀ": "'", "½": "1/2", "ˡ": "^l", "ᴹ": "^M", "ᴺ": "^N", "ˢ": "s",
          "⁻": "^-",
          **{power: str(k) for k, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}}  # fmt: skip
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # the dot at row, column of a 4 × 2 cell
_SHADES = " .:-=+*#%@"


class Screen:
    """A stream to write to, and what it can show: Unicode, colour, how many columns."""

    def __init__(self, stream: TextIO | None) -> None:  # None: nothing is shown
        self.stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.unicode = _can_encode("→²▀█⣿┤", self.encoding)
        self.terminal = stream is not None and stream.isatty()
        shown = self.terminal and os.environ.get("TERM") != "dumb"
        knows = os.name != "nt" or "WT_SESSION" in os.environ  # Windows' older console prints the codes
        self.colour = shown and knows and not os.environ.get("NO_COLOR")
        self.width = min(shutil.get_terminal_size((80, 24)).columns, 100) if shown else 80

    def plain(self, text: str) -> str:
        """The text as this stream's encoding can hold it."""
        if not self.unicode:
            text = "".join(_ASCII.get(character, character) for character in text)
        return text.encode(self.encoding, "replace").decode(self.encoding)

    def line(self, text: str = "") -> None:
        """Write one line."""
        if self.stream is not None:
            self.stream.write(self.plain(text).rstrip() + "\n")

    def bold(self, text: str) -> str:
        return f"\x1b[1m{text}\x1b[22m" if self.colour else text

    def dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[22m" if self.colour else text

    def heading(self, text: str) -> None:
        """A line that opens a section."""
        self.line()
        self.line(self.bold(text))
        self.line()

    def facts(self, *rows: tuple[str, str]) -> None:
        """Label and text, the texts below each other."""
        for label, text in rows:
            self.line(f"  {self.dim(f'{label:<10}')}{text}")


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def curve(values: Sequence[float], screen: Screen, name: str, height: int = 8) -> list[str]:
    """A series over 1 … n as lines of text, on a logarithmic axis when all values are positive."""
    series = np.asarray(values, dtype=np.float64)
    logarithmic = bool(series.min() > 0)
    heights = np.log(series) if logarithmic else series
    columns = max(16, min(screen.width - 14, 64))
    across, down = (2, 4) if screen.unicode else (1, 1)
    dots = _trace(heights, columns * across, height * down)
    cells = (
        _braille(dots) if screen.unicode else ["".join("*" if dot else " " for dot in row) for row in dots]
    )
    low, high = f"{series.min():.3g}", f"{series.max():.3g}"
    labels = [high, *[""] * (height - 2), low]
    lines = [f"  {label:>8} {'┤' if label else '│'}{row}" for label, row in zip(labels, cells, strict=True)]
    scale = ", logarithmic" if logarithmic else ""
    end = f"{len(series)} epochs"
    return [*lines, f"  {'':8} └{'─' * columns}", f"  {'':8}  {name + scale:<{columns - len(end)}}{end}"]


def _trace(heights: NDArray[Any], columns: int, rows: int) -> NDArray[np.bool_]:
    """Dots (rows, columns) of the line through the heights, the largest in row 0, without gaps."""
    places = np.linspace(0, len(heights) - 1, columns)
    sampled = np.interp(places, np.arange(len(heights)), heights)
    span = float(heights.max() - heights.min())
    relative = (heights.max() - sampled) / span if span > 0 else np.full(columns, 0.5)
    row = np.rint(relative * (rows - 1)).astype(int)
    dots = np.zeros((rows, columns), dtype=bool)
    for column, here in enumerate(row):
        before = row[column - 1] if column else here
        dots[min(before, here) : max(before, here) + 1, column] = True
    return dots


def _braille(dots: NDArray[np.bool_]) -> list[str]:
    rows, columns = dots.shape[0] // 4, dots.shape[1] // 2
    codes = np.full((rows, columns), 0x2800)
    for r, bits in enumerate(_BRAILLE):
        for c, bit in enumerate(bits):
            codes += bit * dots[r::4, c::2]
    return ["".join(map(chr, row)).replace("\u2800", " ") for row in codes]  # some fonts draw the empty cell


def picture(image: NDArray[Any], screen: Screen) -> list[str]:
    """A grey image (H, W), values 0 to 1, H even, as text: two pixels a character, or shades in ASCII."""
    if not screen.unicode:
        levels = (np.clip(image, 0, 1) * (len(_SHADES) - 1)).round().astype(int)
        return ["".join(2 * _SHADES[level] for level in row) for row in levels]
    upper, lower = image[0::2], image[1::2]
    if screen.colour:
        return ["".join(map(_grey, *pair)) + "\x1b[0m" for pair in zip(upper, lower, strict=True)]
    return [
        "".join(_half(*pixels) for pixels in zip(*pair, strict=True))
        for pair in zip(upper, lower, strict=True)
    ]


def enlarged(image: NDArray[Any], size: int) -> NDArray[np.float64]:
    """A square image drawn with size × size pixels, interpolated linearly."""
    old = np.arange(len(image))
    new = np.linspace(0, len(image) - 1, size)
    rows = np.array([np.interp(new, old, row) for row in image])
    return np.array([np.interp(new, old, column) for column in rows.T]).T


def _half(upper: float, lower: float) -> str:
    return " ▄▀█"[2 * (upper >= 0.5) + (lower >= 0.5)]


def _grey(upper: float, lower: float) -> str:
    """Two pixels in one character, in the 24 greys that terminals number from 232 (black) to 255 (white)."""
    front, back = (232 + round(23 * min(max(value, 0.0), 1.0)) for value in (float(upper), float(lower)))
    return f"\x1b[38;5;{front};48;5;{back}m▀"


def clip(text: str, width: int) -> str:
    """The text in at most `width` characters.

    >>> clip("versicolor", 6)
    'versi…'
    """
    return text if len(text) <= width else text[: width - 1] + "…"


def confusion_lines(counts: NDArray[Any], classes: Sequence[str], width: int) -> list[str]:
    """A confusion table, rows true and columns predicted; where it is too wide, the worst mistakes alone."""
    classes = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in classes]
    names = [clip(name, 14) for name in classes]
    first = max(len("true ↓  predicted →"), *(len(name) + 2 for name in names))
    sizes = [max(len(name), len(str(counts.max()))) for name in names]
    fits = 2 + first + sum(size + 2 for size in sizes) <= width and len(names) <= 20
    if fits and len(set(names)) == len(set(classes)):
        head = "".join(f"  {name:>{size}}" for name, size in zip(names, sizes, strict=True))
        lines = [f"  {'true ↓  predicted →':<{first}}{head}"]
        for name, row in zip(names, counts, strict=True):
            lines.append(
                f"  {name:<{first}}" + "".join(f"  {n:>{size}}" for n, size in zip(row, sizes, strict=True))
            )
        return lines
    names = [clip(name, max(14, (width - 24) // 2)) for name in classes]
    wrong = counts * (1 - np.eye(len(names), dtype=counts.dtype))
    worst = [divmod(int(k), len(names)) for k in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    found = [f"  {names[t]} taken for {names[p]}: {wrong[t, p]} times" for t, p in worst if wrong[t, p]]
    return ["  most frequent mistakes", *found] if found else ["  no mistakes"]


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(0.0000123), duration(0.25), duration(75)
    ('12.3 µs', '0.25 s', '75 s')
    """
    if not math.isfinite(seconds):
        return "unknown"
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (0.1, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.3g} s"
