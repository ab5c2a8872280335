# SPDX-License-Identifier: MIT
"""Line charts as one self-contained SVG: what the examples draw with, and no more than they need.

>>> x = [k / 10 for k in range(11)]
>>> picture = svg(Chart("A parabola", "x", "x²", [Series("x²", x, [v * v for v in x])]))
>>> picture.startswith("<svg ")
True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Array = Any  # an ndarray, or a list of lists
Place = tuple[str, str]  # x and y, in pixels

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 420, 330, 70, 20, 54  # of a chart and its margins, in pixels
LEGEND, ROW = 48, 17  # where the legend begins below the title, and the height of one of its rows
COLOURS = ("#1b6ca8", "#d1661b", "#3c8d5a", "#7a4fa3", "#8a8a8a")
STYLE = """
  .chart text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #444 }
  .chart .title { font-size: 14px; font-weight: 600; fill: #111 }
  .chart .mark { font-size: 11px; fill: #888 }
  .chart .grid { stroke: #ececec } .chart .axis { stroke: #999 }
  .chart .place { stroke: #aaa; stroke-dasharray: 2 3 }
"""


@dataclass(frozen=True)
class Series:
    """Points (x, y) as a "line", "faint" or "dashed", as "points", or as "both"; `band` is around each y."""

    name: str  # in the legend; no row there without one
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "line"
    colour: int = -1  # of COLOURS; its place in the chart unless said
    band: tuple[Sequence[float], Sequence[float]] | None = None  # its lower and its upper edge


@dataclass(frozen=True)
class Chart:
    """A pair of axes and what is drawn in them; `marks` are named places on the x axis."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[tuple[float, str]] = ()

    def named(self) -> list[tuple[Series, str]]:
        """The rows of the legend, with their colours."""
        return [(s, colour(s, k)) for k, s in enumerate(self.series) if s.name]


class Axis:
    """Values to pixels, from `first` to `last`, with a little room at both ends."""

    def __init__(self, values: Sequence[float], log: bool, first: float, last: float) -> None:
        self.log, self.first, self.last = log, first, last
        low, high = self._scale(min(values)), self._scale(max(values))
        room = 0.04 * (high - low) or 0.5
        self.low, self.high = low - room, high + room

    def _scale(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Some round values: steps of 1, 2 or 5 times a power of ten; on logarithmic axes powers of ten."""
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / 7))
        step = next(size * m for m in (1, 2, 5, 10) if span / (size * m) <= 7)
        if self.log and span < 2:  # powers of ten alone would be one or two
            values = [
                m * 10.0**k for k in range(math.floor(self.low), math.ceil(self.high)) for m in (1, 2, 5)
            ]
            return [v for v in values if self.low <= math.log10(v) <= self.high]
        step = max(step, 1.0) if self.log else step
        counts = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [10.0 ** (k * step) if self.log else k * step for k in counts]

    def numbered(self) -> list[tuple[float, str]]:
        """The ticks and what stands beside them: powers of ten as powers where some are large or small."""
        ticks = self.ticks()
        powers = self.log and not all(1e-2 <= tick < 1e4 for tick in ticks)
        return [(tick, power(tick) if powers and tick != 1 else plain(tick)) for tick in ticks]


def colour(series: Series, place: int) -> str:
    """Its own, or that of its place in the chart."""
    return COLOURS[(series.colour if series.colour >= 0 else place) % len(COLOURS)]


def plain(value: float) -> str:
    """'0', '−0.5', '2000'."""
    return f"{value:.10g}".replace("-", "−")


def power(value: float) -> str:
    """'10⁻⁶'."""
    return "10" + f"{math.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "middle", turn: str = "") -> str:
    """A line of text at x, y."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"' + (f' transform="{turn}"' if turn else "")
    return f'<text {place} class="{kind}">{escape(what)}</text>'


def stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def page(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """A whole SVG, white, with a label for those who cannot see it."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    about = f'class="chart" role="img" aria-label="{escape(label, quote=True)}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {about} {size}>\n<style>{STYLE}</style>'
    return "\n".join([start, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])


def points(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> list[Place]:
    """Data to pixels."""
    return [(f"{x(a):.1f}", f"{y(b):.1f}") for a, b in zip(xs, ys, strict=True)]


def path(places: Sequence[Place]) -> str:
    """Pixels as SVG's `points`."""
    return " ".join(f"{a},{b}" for a, b in places)


def frame(chart: Chart, x: Axis, y: Axis, top: float) -> Iterator[str]:
    """Title, grid, axes with their numbers and labels, marked places."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    yield text(LEFT, 22, chart.title, "title", "start")
    for value, name in x.numbered():
        yield stroke(x(value), top, x(value), bottom, "grid")
        yield text(x(value), bottom + 17, name)
    for value, name in y.numbered():
        yield stroke(LEFT, y(value), right, y(value), "grid")
        yield text(LEFT - 7, y(value) + 4, name, anchor="end")
    for value, name in chart.marks:
        yield stroke(x(value), top, x(value), bottom, "place")
        yield text(x(value) + 4, top + 11, name, "mark", "start")
    yield stroke(LEFT, bottom, right, bottom, "axis")
    yield stroke(LEFT, top, LEFT, bottom, "axis")
    yield text((LEFT + right) / 2, HEIGHT - 14, chart.x_label)
    middle = (top + bottom) / 2
    yield text(16, middle, chart.y_label, turn=f"rotate(-90 16 {middle:.1f})")


def ink(series: Series, paint: str, line: Sequence[Place], dots: Sequence[Place]) -> Iterator[str]:
    """A line, dots, or both."""
    if series.kind != "points":
        how = {"dashed": 'stroke-width="1.6" stroke-dasharray="5 4"', "faint": 'stroke-width="0.8"'}
        style = how.get(series.kind, 'stroke-width="1.8"')
        yield f'<polyline points="{path(line)}" fill="none" stroke="{paint}" {style}/>'
    if series.kind in ("points", "both"):
        for a, b in dots:
            yield f'<circle cx="{a}" cy="{b}" r="2.6" fill="{paint}"/>'


def curve(series: Series, paint: str, x: Axis, y: Axis) -> Iterator[str]:
    """The points of a series over their band."""
    if series.band:
        low, high = (points(x, y, series.x, edge) for edge in series.band)
        yield f'<polygon points="{path([*low, *high[::-1]])}" fill="{paint}" opacity="0.15"/>'
    places = points(x, y, series.x, series.y)
    yield from ink(series, paint, places, places)


def legend(chart: Chart) -> Iterator[str]:
    """A row for each series that has a name."""
    for k, (series, paint) in enumerate(chart.named()):
        height = LEGEND - 8 + ROW * k
        start, middle, end = ((str(LEFT + across), str(height)) for across in (0, 11, 22))
        yield from ink(series, paint, [start, end], [middle])
        yield text(LEFT + 29, height + 4, series.name, anchor="start")


def drawn(chart: Chart, top: float) -> Iterator[str]:
    """Axes, legend and curves of one chart."""
    bands = [edge for series in chart.series for edge in series.band or ()]
    heights = [value for values in [*(series.y for series in chart.series), *bands] for value in values]
    x = Axis([value for series in chart.series for value in series.x], chart.log_x, LEFT, WIDTH - RIGHT)
    y = Axis(heights, chart.log_y, HEIGHT - BOTTOM, top)
    yield from frame(chart, x, y, top)
    yield from legend(chart)
    for place, series in enumerate(chart.series):
        yield from curve(series, colour(series, place), x, y)


def svg(*charts: Chart) -> str:
    """The charts, two in a row, as text that is a file of its own and can stand in a page as well."""
    top = LEGEND + ROW * max(len(chart.named()) for chart in charts) - 4
    parts = list[str]()
    for k, chart in enumerate(charts):
        corner = f"{WIDTH * (k % 2)} {HEIGHT * (k // 2)}"
        parts += [f'<g transform="translate({corner})">', *drawn(chart, top), "</g>"]
    wide, high = WIDTH * min(len(charts), 2), HEIGHT * math.ceil(len(charts) / 2)
    return page(wide, high, "; ".join(chart.title for chart in charts), parts)


# ------------------------------------------------------------ matrices

CELL, GAP, HEAD, FOOT = 30, 34, 44, 34  # of a matrix of coloured cells


def paint_of(value: float, most: float) -> str:
    """Blue for negative, orange for positive, white for 0."""
    share = min(abs(value) / most, 1.0) if most else 0.0
    full = (209, 102, 27) if value > 0 else (27, 108, 168)
    return f"rgb({', '.join(f'{255 - share * (255 - part):.0f}' for part in full)})"


def grid(values: Sequence[Sequence[float]], left: float, top: float) -> Iterator[str]:
    """One coloured cell for each number."""
    most = max(abs(v) for row in values for v in row)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            place = f'x="{left + CELL * j:.1f}" y="{top + CELL * i:.1f}" width="{CELL}" height="{CELL}"'
            yield f'<rect {place} fill="{paint_of(value, most)}" stroke="#bbb"/>'


def matrices(factors: Sequence[tuple[str, Array]], product: tuple[str, Array]) -> str:
    """A product of matrices and its result, drawn to size, a cell for each number."""
    everything = [*factors, product]
    tall = CELL * max(len(values) for _, values in everything)
    left, parts = float(GAP), list[str]()
    for k, (name, values) in enumerate(everything):
        rows, columns = len(values), len(values[0])
        top, middle = HEAD + (tall - CELL * rows) / 2, left + CELL * columns / 2
        parts += [text(middle, top - 10, name, "title"), *grid(values, left, top)]
        parts.append(text(middle, top + CELL * rows + 18, f"{rows} × {columns}"))
        left += CELL * columns
        if k < len(factors):
            parts.append(
                text(left + GAP / 2, HEAD + tall / 2 + 5, "=" if k == len(factors) - 1 else "·", "title")
            )
            left += GAP
    return page(left + GAP, HEAD + tall + FOOT, f"{' · '.join(n for n, _ in factors)} = {product[0]}", parts)
