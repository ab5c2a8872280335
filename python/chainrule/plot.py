# SPDX-License-Identifier: MIT
"""draw: a network as the lecture's reverse-mode diagram, a self-contained SVG.

    above    φˡ, as numbers or as bars
    middle   boxes for layers, an arrow to the right (forward) and one to the left (reverse) between them
    below    ∂L/∂φˡ, and the size of ∂L/∂Wˡ under its layer

What is not computed is grey and dashed, which is not the same as 0. Long chains continue in the next row. The
picture brings its own background, follows the reader's light or dark scheme, and needs no script and no font.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import io, losses
from .calculus import exact
from .checks import whole
from .display import number, superscript
from .layers import Linear, _BuiltIn
from .links import Chain, Link, one_row, one_target, value_and_gradient
from .losses import CustomLoss, Loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .model import Sequential

    Array = NDArray[Any]
    Path = str | os.PathLike[str]

# ------------------------------------------------------------ measures, in pixels

_SLOT, _BOX = 104, 116  # widths: the place of a value between two boxes, a box
_HEIGHT = 76  # of a box
_PANEL = 60  # height of the numbers or bars of a value
_LABEL = 20  # height of a line with a label
_BAND = _LABEL + _PANEL + 16 + _HEIGHT + _LABEL + _PANEL  # one row of the chain
_GAP = 44  # between two rows: the arrows that lead from one to the other
_MARGIN, _TOP = 44, 22
_BARS, _BAR_HEIGHT = 84, 42
_LEAST, _SMALL, _NORMAL, _TITLE = 8, 10, 11, 13  # font sizes
_EM = 0.64  # mean width of a character, in font sizes, of the widest common sans-serif
_MOST_NUMBERS = 4  # of a value written out; longer ones are bars
_MOST_BARS = 28
_FORWARD_Y, _REVERSE_Y = 16, 60  # of the arrows, below a box's upper edge

# What a mark looks like: light as attributes, which every renderer knows, dark as a style sheet over them.
_LIGHT = {
    "back": 'fill="#ffffff"',
    "ink": 'fill="#1f2328"',
    "muted": 'fill="#59636e"',
    "forward": 'fill="#0860ca"',
    "reverse": 'fill="#b34000"',
    "box": 'fill="#f6f8fa" stroke="#8c959f"',
    "off": 'fill="none" stroke="#8c959f" stroke-dasharray="4 3"',
    "zero": 'stroke="#8c959f"',
    "forward-line": 'fill="none" stroke="#0860ca" stroke-width="1.6"',
    "reverse-line": 'fill="none" stroke="#b34000" stroke-width="1.6"',
    "off-line": 'fill="none" stroke="#8c959f" stroke-width="1.6" stroke-dasharray="4 3"',
}
_DARK = (
    "@media (prefers-color-scheme:dark){.cr-back{fill:#0d1117}.cr-ink{fill:#e6edf3}.cr-muted{fill:#9198a1}"
    ".cr-forward{fill:#58a6ff}.cr-reverse{fill:#f0883e}.cr-box{fill:#161b22;stroke:#656c76}"
    ".cr-off,.cr-off-line,.cr-zero{stroke:#656c76}.cr-forward-line{stroke:#58a6ff}"
    ".cr-reverse-line{stroke:#f0883e}}"
)

# ------------------------------------------------------------ the result


class Drawing:
    """A picture: shown by notebooks, `.save("g.svg")`, and its SVG as str()."""

    def __init__(self, svg: str, description: str) -> None:
        self.svg, self.description = svg, description

    def __str__(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing: {self.description}>"

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: Path) -> None:
        """Write the picture, whole or not at all; ValueError for another suffix than .svg, or OSError."""
        require_svg("save", path)
        io.write_atomically(path, [self.svg.encode()])


def require_svg(op: str, path: Path) -> None:
    """ValueError unless `path` ends in .svg."""
    io.require_suffix(op, path, ".svg")


def draw(net: Sequential, x: Any = None, y: Any = None, loss: Any = None, *, per_row: int = 4) -> Drawing:
    """The network as a diagram: forward values above, cotangents ∂L/∂φˡ below, for one example.

    ∂L/∂φˡ⁻¹ = ∂L/∂φˡ · J_{φˡ⁻¹}[φˡ], drawn as an arrow back through the box of layer l

    Without data only the structure is drawn; with x the values φˡ; with x, y and loss the cotangents too.
    What is not computed is grey. Dropout is off; values are computed in float64.

    Shapes: x (I,) or (1, I), y the target of this example.

    Args:
        per_row: how many layers in a row before the chain continues in the next.

    Returns: a Drawing: an SVG for notebooks, `.save("g.svg")`, str().

    Raises: TypeError or ValueError as value_and_grad, for more than one example, for y without x or loss,
        and with data for a bfloat16 network.

    Example:
        >>> import chainrule as cr
        >>> cr.draw(cr.mlp([2, 3, 1], activation="tanh", seed=0), [1.0, 2.0], 0.5, "mse")
        <Drawing: x → Linear → Tanh → Linear → f → mse; forward and reverse>
    """
    whole("draw", "per_row", per_row)
    rule = None if loss is None else losses.resolve("draw", loss)
    if y is not None and (x is None or rule is None):
        missing = "x" if x is None else "loss"
        raise ValueError(f"[draw] y needs {missing}: expected x, y and loss for cotangents, got no {missing}")
    scene = _seen(net, x, y, rule)
    return Drawing(_render(scene, per_row), scene.headline)


# ------------------------------------------------------------ what there is to see


class _Scene(NamedTuple):
    """Links and loss with what is computed of them; None is not computed."""

    links: list[Link]
    rule: Loss | None
    phi: list[Array] | None
    dphi: list[Array] | None
    grads: dict[str, Array]
    value: float | None
    target: Array | None

    @property
    def headline(self) -> str:
        names = [link.kind for link in self.links] + ["f"] + ([_name(self.rule)] if self.rule else [])
        state = "structure" if self.phi is None else "forward" if self.dphi is None else "forward and reverse"
        return f"{' → '.join(['x', *names])}; {state}"

    @property
    def stages(self) -> int:
        """Boxes: the layers, and the loss."""
        return len(self.links) + (self.rule is not None)


def _seen(net: Sequential, x: Any, y: Any, rule: Loss | None) -> _Scene:
    if x is not None or not hasattr(net, "_core"):
        exact("draw", net)
    chain = Chain(net)
    if x is None:
        return _Scene(chain.links, rule, None, None, {}, None, None)
    row = one_row("draw", net, x)
    target = None if y is None or rule is None else one_target("draw", net, rule, y)
    phi = chain.forward(row)
    if target is None or rule is None:
        return _Scene(chain.links, rule, phi, None, {}, None, None)
    value, df = value_and_gradient(rule, phi[-1], target)
    dphi, grads = chain.backward(phi, df)
    return _Scene(chain.links, rule, phi, dphi, grads, value, target)


def _name(rule: Loss) -> str:
    if isinstance(rule, CustomLoss):
        return str(getattr(rule.function, "__name__", "your loss"))
    return rule.name


def _described(scene: _Scene) -> str:
    """The picture in words, for who cannot see it."""
    count = len(scene.links)
    parts = [f"A chain of {count} layer{'s'[: count - 1]}: {', '.join(repr(k.layer) for k in scene.links)}."]
    if scene.phi is not None:
        parts.append(f"x = {_said(scene.phi[0])}, f = {_said(scene.phi[-1])}.")
    if scene.dphi is not None and scene.value is not None:
        parts.append(
            f"L = {number(scene.value)}, ∂L/∂f = {_said(scene.dphi[-1])}, ∂L/∂x = {_said(scene.dphi[0])}."
        )
    return " ".join(parts)


def _said(row: Array) -> str:
    values = row.ravel()
    if len(values) <= _MOST_NUMBERS:
        return f"[{', '.join(number(float(v), 3) for v in values)}]"
    return (
        f"{len(values):,} numbers from {number(float(values.min()), 3)} to {number(float(values.max()), 3)}"
    )


# ------------------------------------------------------------ marks


class _Canvas:
    """SVG elements in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, kind: str = "ink", size: float = _NORMAL, bold: bool = False,
        width: float = math.inf, anchor: str = "middle",
    ) -> None:  # fmt: skip
        """A line of text at x, its baseline at y, made smaller and then cut to fit into `width`."""
        size = max(_LEAST, min(size, width / (_EM * max(len(text), 1))))
        most = int(min(width / (_EM * size), 1e6))
        text = text if len(text) <= most else text[: most - 1] + "…"
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text {_look_of(kind)} x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" text-anchor="{anchor}"'
            f"{weight}>{_escaped(text)}</text>"
        )

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(
            f'<rect {_look_of(kind)} x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            'rx="6"/>'
        )

    def path(self, d: str, kind: str) -> None:
        self.parts.append(f'<path {_look_of(kind)} d="{d}"/>')

    def arrow(self, points: Sequence[tuple[float, float]], direction: str, on: bool) -> None:
        """Through the points, with round corners and a head at the end; dashed where nothing has passed."""
        kind = direction if on else "muted"
        self.path(_rounded(points), f"{direction}-line" if on else "off-line")
        (x0, y0), (x, y) = points[-2:]
        back = -7.0 if x > x0 else 7.0
        if y != y0:
            raise AssertionError("arrows end horizontally")
        self.path(f"M{_n(x)} {_n(y)}l{_n(back)} -4v8z", kind)


def _look_of(kind: str) -> str:
    return f'class="cr-{kind}" {_LIGHT[kind]}'


def _rounded(points: Sequence[tuple[float, float]], radius: float = 8.0) -> str:
    """A polyline of horizontal and vertical pieces whose corners are arcs."""
    d = [f"M{_n(points[0][0])} {_n(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        enter, leave = (_towards(corner, other, radius) for other in (before, after))
        d.append(
            f"L{_n(enter[0])} {_n(enter[1])}Q{_n(corner[0])} {_n(corner[1])} {_n(leave[0])} {_n(leave[1])}"
        )
    return "".join(d) + f"L{_n(points[-1][0])} {_n(points[-1][1])}"


def _towards(start: tuple[float, float], end: tuple[float, float], distance: float) -> tuple[float, float]:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    share = min(distance / length, 0.5) if length else 0.0
    return start[0] + share * dx, start[1] + share * dy


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ------------------------------------------------------------ the picture


class _Grid(NamedTuple):
    """Where the k-th box stands: rows of `columns` boxes, each with the slot of its input on its left."""

    columns: int

    def slot(self, k: int) -> tuple[float, float]:
        """The left upper corner of the slot before box k."""
        row, column = divmod(k, self.columns)
        return _MARGIN + column * (_SLOT + _BOX), _TOP + row * (_BAND + _GAP)

    def box(self, k: int) -> tuple[float, float]:
        """The left upper corner of box k."""
        x, y = self.slot(k)
        return x + _SLOT, y + _LABEL + _PANEL + 16


def _render(scene: _Scene, per_row: int) -> str:
    bands = math.ceil(scene.stages / per_row)
    grid = _Grid(math.ceil(scene.stages / bands))
    canvas = _Canvas()
    for level in range(len(scene.links) + 1):
        _draw_value(canvas, grid, scene, level)
    for link in scene.links:
        _draw_layer(canvas, grid, scene, link)
    if scene.rule is not None:
        _draw_loss(canvas, grid, scene, scene.rule)
    open_end = _SLOT if scene.rule is None and scene.stages % grid.columns == 0 else 0
    width = 2 * _MARGIN + grid.columns * (_SLOT + _BOX) + open_end
    bottom = _TOP + bands * (_BAND + _GAP) - _GAP
    complete = scene.dphi is not None
    _draw_legend(canvas, bottom + 24, complete)
    return _document(canvas, width, bottom + (60 if complete else 78), scene)


def _document(canvas: _Canvas, width: int, height: int, scene: _Scene) -> str:
    title, body = f"chainrule: {scene.headline}", "\n".join(canvas.parts)
    mark = f"cr{zlib.crc32(body.encode()):08x}"  # ids must differ between the pictures of one page
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" style="max-width:100%" role="img" '
        f'aria-labelledby="{mark}t {mark}d" font-family="ui-sans-serif,system-ui,Segoe UI,Roboto,Helvetica,'
        f'Arial,sans-serif">\n<title id="{mark}t">{_escaped(title)}</title>\n'
        f'<desc id="{mark}d">{_escaped(_described(scene))}</desc>\n<style>{_DARK}</style>\n'
        f'<rect {_look_of("back")} width="{width}" height="{height}" rx="10"/>\n{body}\n</svg>\n'
    )


def _draw_value(canvas: _Canvas, grid: _Grid, scene: _Scene, level: int) -> None:
    """φˡ above, ∂L/∂φˡ below, and between them the two arrows with the length of both."""
    last = level == len(scene.links)
    left, top = grid.slot(level)
    if last and scene.rule is None and level % grid.columns == 0:  # no box follows: stay on the row
        left, top = grid.box(level - 1)[0] + _BOX, grid.slot(level - 1)[1]
    centre, box_top = left + _SLOT / 2, top + _LABEL + _PANEL + 16
    name = f"φ{superscript(level)}"
    alias = "x = " if level == 0 else "f = " if last else ""
    canvas.text(centre, top + 13, alias + name, "ink", 12, bold=True)
    _draw_vector(canvas, centre, top + _LABEL, None if scene.phi is None else scene.phi[level], "forward")
    size = scene.links[0].inputs if level == 0 else scene.links[level - 1].outputs
    canvas.text(centre, box_top + _HEIGHT / 2 + 4, f"ℝ{superscript(size)}", "muted", _TITLE)
    below = box_top + _HEIGHT
    canvas.text(centre, below + 15, f"∂L/∂{name}", "ink", 12, bold=True)
    _draw_vector(canvas, centre, below + _LABEL, None if scene.dphi is None else scene.dphi[level], "reverse")
    _draw_arrows(canvas, grid, scene, level, left, box_top)


def _draw_arrows(
    canvas: _Canvas, grid: _Grid, scene: _Scene, level: int, left: float, box_top: float
) -> None:
    forward, reverse = scene.phi is not None, scene.dphi is not None
    right = left + _SLOT
    ends = level == len(scene.links) and scene.rule is None
    wraps = level > 0 and level % grid.columns == 0 and not ends
    up, down = box_top + _FORWARD_Y, box_top + _REVERSE_Y
    start = left + (14 if level == 0 else 2)
    stop = right - (14 if ends else 2)
    if not wraps:
        canvas.arrow([(start, up), (stop, up)], "forward", forward)
        canvas.arrow([(stop, down), (start, down)], "reverse", reverse)
        return
    # From the end of the row above; the forward arrow runs outside on the right and inside on the left, so
    # that the two never cross.
    x, y = grid.box(level - 1)
    x += _BOX
    middle = y + _HEIGHT + _LABEL + _PANEL + _GAP / 2
    canvas.arrow(
        [(x + 2, y + _FORWARD_Y), (x + 26, y + _FORWARD_Y), (x + 26, middle + 5), (left - 18, middle + 5),
         (left - 18, up), (stop, up)], "forward", forward,
    )  # fmt: skip
    canvas.arrow(
        [(stop, down), (left - 28, down), (left - 28, middle - 5), (x + 16, middle - 5),
         (x + 16, y + _REVERSE_Y), (x + 2, y + _REVERSE_Y)], "reverse", reverse,
    )  # fmt: skip


def _draw_vector(canvas: _Canvas, centre: float, top: float, row: Array | None, kind: str) -> None:
    """A value: its numbers if there are few, else bars; a dashed frame if it is not computed."""
    if row is None:
        canvas.rect(centre - _BARS / 2, top + 4, _BARS, _BAR_HEIGHT, "off")
        canvas.text(centre, top + 4 + _BAR_HEIGHT / 2 + 3, "not computed", "muted", _SMALL)
        return
    values = row.ravel()
    if len(values) <= _MOST_NUMBERS:
        for k, value in enumerate(values):
            canvas.text(centre, top + 13 + 14 * k, number(float(value), 3), kind)
        return
    _draw_bars(canvas, centre - _BARS / 2, top + 2, values, kind)
    ends = (number(float(v), 2) for v in (values.min(), values.max()))
    canvas.text(centre, top + _BAR_HEIGHT + 15, " … ".join(ends), kind, _SMALL, width=_SLOT + 24)


def _draw_bars(canvas: _Canvas, left: float, top: float, values: Array, kind: str) -> None:
    """Bars from a zero line; of many numbers, each bar spans the least to the greatest of some neighbours."""
    finite = np.where(np.isfinite(values), values, 0.0)
    groups = np.array_split(finite, min(len(finite), _MOST_BARS))
    low, high = min(0.0, float(finite.min())), max(0.0, float(finite.max()))
    span = (high - low) or 1.0
    pitch = _BARS / len(groups)
    zero = top + high / span * _BAR_HEIGHT
    canvas.path(f"M{_n(left - 3)} {_n(zero)}h{_BARS + 6}", "zero")
    bars = []
    for k, group in enumerate(groups):
        above, below = max(0.0, float(group.max())), min(0.0, float(group.min()))
        height = (above - below) / span * _BAR_HEIGHT
        start = top + (high - above) / span * _BAR_HEIGHT
        wide = 0.8 * pitch
        bars.append(f"M{left + (k + 0.1) * pitch:.2f} {start:.2f}h{wide:.2f}v{height:.2f}h{-wide:.2f}z")
    canvas.path("".join(bars), kind)


def _draw_layer(canvas: _Canvas, grid: _Grid, scene: _Scene, link: Link) -> None:
    x, y = grid.box(link.index)
    centre, below = x + _BOX / 2, y + _HEIGHT
    canvas.text(centre, y - 6, f"layer {link.index}", "muted", _SMALL)
    canvas.rect(x, y, _BOX, _HEIGHT, "box")
    details = _details(link)
    line = y + _HEIGHT / 2 + 4 - 8 * len(details)
    canvas.text(centre, line, link.kind, "ink", _TITLE, bold=True, width=_BOX - 12)
    for k, detail in enumerate(details, 1):
        canvas.text(centre, line + 16 * k, detail, "muted", _NORMAL, width=_BOX - 12)
    for k, (name, symbol) in enumerate(_symbols(link)[:2]):
        gradient = scene.grads.get(f"{link.index}.{name}")
        kind = "muted" if gradient is None else "reverse"
        canvas.text(
            centre, below + 15 + 32 * k, f"‖∂L/∂{symbol}‖", "ink" if scene.grads else "muted", width=_BOX
        )
        size = "not computed" if gradient is None else number(float(np.linalg.norm(gradient)), 3)
        canvas.text(centre, below + 29 + 32 * k, size, kind, _NORMAL if scene.grads else _SMALL)


def _symbols(link: Link) -> list[tuple[str, str]]:
    """(name, symbol) of the parameters: the weight of the layer that makes φ³ is W³."""
    letters = {"weight": "W", "bias": "b"} if isinstance(link.layer, Linear) else {}
    return [(name, f"{letters.get(name, name)}{superscript(link.index + 1)}") for name in link.params]


def _details(link: Link) -> list[str]:
    """What stands in the box under the layer's name."""
    if link.params:
        shown = [
            f"{symbol} {'×'.join(map(str, link.params[name].shape))}".strip()
            for name, symbol in _symbols(link)
        ]
        return shown if len(shown) <= 2 else [shown[0], f"and {len(shown) - 1} more"]
    if isinstance(link.layer, _BuiltIn):
        return [f"{name.split('_')[-1]} {value:g}" for name, value in link.layer.config().items()]
    return []


def _draw_loss(canvas: _Canvas, grid: _Grid, scene: _Scene, rule: Loss) -> None:
    x, y = grid.box(len(scene.links))
    centre, on = x + _BOX / 2, scene.value is not None
    canvas.text(centre, y - 6, "loss", "muted", _SMALL)
    canvas.rect(x, y, _BOX, _HEIGHT, "box" if on else "off")
    canvas.text(centre, y + 34, _name(rule), "ink" if on else "muted", _TITLE, bold=True, width=_BOX - 12)
    target = scene.target
    if target is None:
        shown = "no y"
    elif target.size == 1:
        shown = f"y = {number(float(target.ravel()[0]))}"
    else:
        shown = f"y ∈ ℝ{superscript(target.size)}"
    canvas.text(centre, y + 52, shown, "muted", _NORMAL, width=_BOX - 12)
    if scene.value is None:
        canvas.text(centre, y - 32, "L not computed", "muted", _SMALL)
        return
    canvas.text(centre, y - 32, f"L = {number(scene.value)}", "forward", _TITLE, bold=True, width=_BOX + 20)
    canvas.text(centre, y + _HEIGHT + 15, "∂L/∂L = 1", "reverse", 12, bold=True)


def _draw_legend(canvas: _Canvas, y: float, complete: bool) -> None:
    """What the two arrows are, and what grey is, below the chain."""
    rows = [("forward", True, "forward: φˡ from φˡ⁻¹"), ("reverse", True, "reverse: ∂L/∂φˡ⁻¹ from ∂L/∂φˡ")]
    if not complete:
        rows.append(("forward", False, "not computed"))
    for k, (direction, on, text) in enumerate(rows):
        ends = [(_MARGIN, y + 18 * k), (_MARGIN + 30, y + 18 * k)]
        canvas.arrow(ends[::-1] if direction == "reverse" else ends, direction, on)
        canvas.text(_MARGIN + 38, y + 18 * k + 4, text, "muted", anchor="start")
