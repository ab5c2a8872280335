# SPDX-License-Identifier: MIT
"""Log-log plots as one self-contained SVG: points with their spread, lines, marked places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from timing import Spread, show_time

WIDTH, LEFT, RIGHT, BOTTOM = 430, 74, 22, 58  # of a panel, and its margins beside and below
FIRST_NAME, NAME, PLOT = (
    42,
    16,
    224,
)  # where the names of its series begin, the height of each, and of the plot below
COLOURS = ("#1b6ca8", "#d1661b", "#3c8d5a", "#7a4fa3", "#8a8a8a")
STYLE = """
  text { font: 12px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #333 }
  .title { font-size: 15px; font-weight: 600; fill: #111 }
  .label { fill: #555 }
  .mark { font-size: 10px; fill: #999 }
  .grid { stroke: #e9e9e9 } .axis { stroke: #888 } .place { stroke: #bbb; stroke-dasharray: 2 3 }
"""


@dataclass(frozen=True)
class Series:
    """Points (x, seconds) in one colour, and the line that was fitted to them; None: from point to point."""

    name: str
    points: Sequence[tuple[float, Spread]]
    line: Callable[[float], float] | None = None


@dataclass(frozen=True)
class Panel:
    """One plot; `marks` are places on the x axis with a name."""

    title: str
    x_label: str
    series: Sequence[Series]
    marks: Sequence[tuple[float, str]] = ()


def short(value: float) -> str:
    """'256', '16384', '100k', '10M'."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


class Axis:
    """Values on a logarithmic scale to pixels."""

    def __init__(self, values: Sequence[float], first: float, last: float) -> None:
        low, high = math.log(min(values)), math.log(max(values))
        room = 0.05 * (high - low) or 0.5
        self.low, self.high, self.first, self.last = low - room, high + room, first, last

    def __call__(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def holds(self, value: float) -> bool:
        """Whether it is on the plot."""
        return self.low <= math.log(value) <= self.high

    def powers(self, base: int) -> list[float]:
        """Powers of the base on the axis."""
        start, end = math.ceil(self.low / math.log(base)), math.floor(self.high / math.log(base))
        return [float(base) ** k for k in range(start, end + 1)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _stroke(x1: float, y1: float, x2: float, y2: float, kind: str = "", style: str = "") -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} class="{kind}" style="{style}"/>'


def _frame(panel: Panel, x: Axis, y: Axis) -> Iterator[str]:
    yield _text(LEFT, 24, panel.title, "title", "start")
    bottom, top, right = y.first, y.last, x.last
    doublings = (x.high - x.low) / math.log(2)
    for value in x.powers(2 if doublings < 7 else 4 if doublings < 14 else 10):
        yield _stroke(x(value), top, x(value), bottom, "grid")
        yield _text(x(value), bottom + 18, short(value), "label")
    for value in y.powers(10):
        yield _stroke(LEFT, y(value), right, y(value), "grid")
        yield _text(
            LEFT - 8, y(value) + 4, show_time(value).replace(".00 ", " ").replace(".0 ", " "), "label", "end"
        )
    for value, name in panel.marks:
        if x.holds(value):
            yield _stroke(x(value), top, x(value), bottom, "place")
            yield _text(x(value) + 3, bottom - 6, name, "mark", "start")
    yield _stroke(LEFT, bottom, right, bottom, "axis")
    yield _stroke(LEFT, top, LEFT, bottom, "axis")
    yield _text((LEFT + right) / 2, bottom + 42, panel.x_label, "label")


def _curve(series: Series, colour: str, x: Axis, y: Axis) -> Iterator[str]:
    line = [(place, spread.median) for place, spread in series.points]
    if series.line is not None:
        first, last = line[0][0], line[-1][0]
        line = [(p, series.line(p)) for p in (first * (last / first) ** (k / 60) for k in range(61))]
    path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.6"/>'
    for place, spread in series.points:
        yield _stroke(x(place), y(spread.low), x(place), y(spread.high), style=f"stroke: {colour}")
        yield f'<circle cx="{x(place):.1f}" cy="{y(spread.median):.1f}" r="3" fill="{colour}"/>'


def _panel(panel: Panel, top: float) -> Iterator[str]:
    x = Axis([place for s in panel.series for place, _ in s.points], LEFT, WIDTH - RIGHT)
    times = [value for s in panel.series for _, t in s.points for value in (t.low, t.high)]
    y = Axis(times, top + PLOT, top)
    yield from _frame(panel, x, y)
    for k, series in enumerate(panel.series):
        place = FIRST_NAME + NAME * k
        yield f'<circle cx="{LEFT + 5}" cy="{place}" r="4" fill="{COLOURS[k % len(COLOURS)]}"/>'
        yield _text(LEFT + 15, place + 4, series.name, "label", "start")
        yield from _curve(series, COLOURS[k % len(COLOURS)], x, y)


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    top = FIRST_NAME + 4 + NAME * max(len(panel.series) for panel in panels)
    width, height = WIDTH * len(panels), top + PLOT + BOTTOM
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>"]
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for k, panel in enumerate(panels):
        parts += [f'<g transform="translate({WIDTH * k} 0)">', *_panel(panel, top), "</g>"]
    return "\n".join([*parts, "</svg>", ""])
