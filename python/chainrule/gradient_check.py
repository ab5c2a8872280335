# SPDX-License-Identifier: MIT
"""gradcheck: every derivative against central differences, in float64, and a wrong map named.

    ∂L/∂w ≈ (L(w + h) − L(w − h)) / 2h,   h = eps·max(1, |w|),   with an error of h²|L‴|/6 + u·|L|/h

u = 2⁻⁵² is the rounding of float64; eps = ∛u makes both parts small. Three things can go wrong with such a
check, and each has its answer here: a float32 network drowns in rounding, so its float64 twin is checked; a
kink between w − h and w + h makes the difference a mean of two slopes, so it is reported and not judged; and
a chain says only that something is wrong, so each map of layers and losses of your own is checked by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import batch, losses
from .calculus import exact
from .checks import flag, real, whole
from .display import html_table, markdown_table, number, text_table
from .layers import ELU, Layer, LeakyReLU, ReLU, _takes_four
from .links import Chain, Link, as_passed, value_and_gradient
from .losses import MAE, CustomLoss, Loss, Pinball
from .model import Sequential

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

EPS = 6e-6  # ∛u
_ROWS = 16  # of the batch, for the maps of one layer: rows do not mix, so more would say the same
_BENT = 1e-3  # of the largest slope: one-sided slopes that differ by more deserve a second look
_CLOSER = 4  # times: rounding grows as much, and the two slopes of a smooth function come as much closer
_ROUNDING = 16 * float(np.finfo(np.float64).eps)  # of a value that came about in a few operations

# ------------------------------------------------------------ the result


class Check(NamedTuple):
    """One derivative: how it compares with finite differences."""

    name: str  # a parameter, "x", or a map such as "Sine.vjp"
    shape: tuple[int, ...]
    checked: int  # coordinates compared
    size: int  # coordinates there are
    kinks: int  # coordinates left out: the function has a kink there
    error: float  # the largest |analytic − numeric|, relative to the largest derivative of the block
    ok: bool
    message: str  # what is wrong, or what there is to know; "" where there is nothing to say


class GradCheck:
    """What `gradcheck` found: `.ok`, `.rows` (a Check each), `.failures` (messages); prints as a table."""

    def __init__(self, rows: Sequence[Check], tolerance: float) -> None:
        self.rows, self.tolerance = tuple(rows), tolerance

    @property
    def ok(self) -> bool:
        """Whether every derivative agrees."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """What is wrong, the maps of layers and losses of your own first: they are the cause of the rest."""
        return [row.message for row in self.rows if not row.ok]

    def _headline(self) -> str:
        good = sum(row.ok for row in self.rows)
        verdict = "all" if self.ok else f"{good} of"
        return f"gradcheck: {verdict} {len(self.rows)} agree with central differences to {self.tolerance:g}"

    def _table(self) -> list[tuple[str, ...]]:
        head = ("derivative", "shape", "checked", "kinks", "relative error", "")
        rows: list[tuple[str, ...]] = [
            (
                row.name,
                " × ".join(map(str, row.shape)) or "number",
                f"{row.checked:,}" + (f" of {row.size:,}" if row.checked != row.size else ""),
                f"{row.kinks:,}" if row.kinks else "",
                f"{row.error:.1e}" if row.checked else "",
                "ok" if row.ok else "WRONG",
            )
            for row in self.rows
        ]
        return [head, *rows]

    def _messages(self) -> list[str]:
        kinks = sum(row.kinks for row in self.rows)
        note = f"{kinks:,} left out: the function has a kink there, and the difference is no derivative"
        return [row.message for row in self.rows if row.message] + ([note] if kinks else [])

    def __str__(self) -> str:
        return "\n".join([self._headline(), text_table(self._table(), "lrrrrl"), *self._messages()])

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        notes = [f"- {message}" for message in self._messages()]
        return "\n\n".join([self._headline(), markdown_table(self._table(), "lrrrrl"), "\n".join(notes)])

    def _repr_html_(self) -> str:
        from html import escape

        notes = "".join(f"<p>{escape(message)}</p>" for message in self._messages())
        return f"<p>{escape(self._headline())}</p>{html_table(self._table(), 'lrrrrl')}{notes}"


def gradcheck(
    net: Sequential,
    X: Any,
    y: Any,
    loss: Any,
    *,
    eps: float = EPS,
    tolerance: float = 1e-6,
    coordinates: int = 100,
    seed: int = 0,
    raise_on_failure: bool = False,
) -> GradCheck:
    """Compare every derivative with central differences in float64.

    ∂L/∂w ≈ (L(w + h) − L(w − h)) / 2h, h = eps·max(1, |w|)

    Checked are ∂L/∂W for each parameter and ∂L/∂X, on a float64 twin of the network; for layers of your own
    each map by itself: vjp and jvp against differences of forward, vjp_jvp of vjp, ⟨u, J t⟩ = ⟨u J, t⟩, the
    gradients of parameters, and that rows do not mix; for a loss of your own ∂L/∂f against the value. Where
    the function has a kink within h of the point, the difference is no derivative: reported as a kink, not as
    a failure.

    Args:
        tolerance: the greatest error, relative to the largest derivative of the block (a parameter, a map);
            an error below the rounding of the difference itself is none.
        coordinates: how many elements of a block to check; of larger blocks random ones, drawn from `seed`.
        raise_on_failure: whether to raise an AssertionError that says what is wrong.

    Raises: TypeError or ValueError as value_and_grad, and ValueError for a bfloat16 network.

    Example:
        >>> import chainrule as cr
        >>> net = cr.mlp([2, 3, 1], activation="tanh", seed=0)
        >>> check = cr.gradcheck(net, [[1.0, 2.0]], [0.5], "least_squares")
        >>> check.ok, [row.name for row in check.rows]
        (True, ['0.weight', '0.bias', '2.weight', '2.bias', 'x'])
    """
    rule = losses.resolve("gradcheck", loss)
    settings = _Settings(
        real("gradcheck", "eps", eps, above=0, below=1),
        real("gradcheck", "tolerance", tolerance, above=0),
        whole("gradcheck", "coordinates", coordinates),
        np.random.default_rng(whole("gradcheck", "seed", seed, 0)),
    )
    raising = flag("gradcheck", "raise_on_failure", raise_on_failure)
    exact("gradcheck", net)
    data = batch.take("gradcheck", net, rule, X, y)
    problem = _Problem(net, data.X.astype(np.float64), _in_float64(data, rule), rule)
    rows = [
        check for link in problem.chain.links if link.own for check in _check_maps(link, problem, settings)
    ]
    if isinstance(rule, CustomLoss):
        rows.append(_check_loss(rule, problem, settings))
    rows += _check_chain(problem, settings)
    found = GradCheck(rows, settings.tolerance)
    if raising and not found.ok:
        raise AssertionError("[gradcheck] derivatives must agree: " + "; ".join(found.failures))
    return found


class _Settings(NamedTuple):
    eps: float
    tolerance: float
    coordinates: int
    rng: np.random.Generator

    def chosen(self, size: int) -> Array:
        """The coordinates to check, in order."""
        if size <= self.coordinates:
            return np.arange(size)
        return np.sort(self.rng.choice(size, self.coordinates, replace=False))


def _in_float64(data: batch.Data, rule: Loss) -> Array:
    y = as_passed(data.y, data.flat)
    return y if y.dtype.kind == "i" else y.astype(np.float64)


# ------------------------------------------------------------ differences, and how they are judged


class _Differences(NamedTuple):
    """Of a function at some coordinates (along the first axis): central, from the left, from the right."""

    central: Array
    left: Array
    right: Array
    noise: Array  # what rounding alone can make of `central`
    crossed: Array  # whether a kink is known to lie between the two points

    @property
    def gap(self) -> Array:
        """How far apart the two one-sided slopes are: h·|L″|, or the height of a kink."""
        return np.asarray(np.abs(self.right - self.left))

    def encloses(self, slope: Array) -> Array:
        """Whether a slope lies between the one from the left and the one from the right: right, at a kink."""
        low, high = np.minimum(self.left, self.right), np.maximum(self.left, self.right)
        inside: Array = (low - self.noise <= slope) & (slope <= high + self.noise)
        return inside

    def error(self, analytic: Array, scale: float, tolerance: float) -> Array:
        """|analytic − central| in units of `scale`, or, if that is larger, of what rounding can hide."""
        unit = np.maximum(np.maximum(scale, self.noise / tolerance), np.finfo(np.float64).tiny)
        relative = np.abs(analytic - self.central) / unit
        return np.where(np.isnan(relative), math.inf, relative)


class _Block(NamedTuple):
    """Derivatives to check together: a parameter, the input, a map."""

    name: str
    shape: tuple[int, ...]
    size: int
    analytic: Array
    look: Callable[[Array, float], _Differences]  # (places along the first axis, eps)
    where: Callable[[tuple[int, ...]], str]  # an index in words
    blame: str = ""  # what a message begins with


def _differences(
    function: Callable[[], Any], array: Array, places: Array, eps: float, size: Array | float
) -> _Differences:
    """Of a function that reads `array`, moved in place at each of `places` and put back.

    `function` gives a value, or a value and the signs on which side of its kinks it is; `size` is the size
    of the numbers whose rounding the value carries.
    """
    middle, signs = _value_and_signs(function())
    central, left, right, noise, crossed = ([] for _ in range(5))
    for place in places:
        kept = array.flat[place]
        step = eps * max(1.0, abs(kept))
        array.flat[place] = high = kept + step
        above, signs_above = _value_and_signs(function())
        array.flat[place] = low = kept - step
        below, signs_below = _value_and_signs(function())
        array.flat[place] = kept
        central.append((above - below) / (high - low))
        left.append((middle - below) / (kept - low))
        right.append((above - middle) / (high - kept))
        noise.append(_ROUNDING * size / step)
        crossed.append(not (np.array_equal(signs, signs_above) and np.array_equal(signs, signs_below)))
    values = [np.array(numbers, dtype=np.float64) for numbers in (central, left, right, noise)]
    return _Differences._make([*values, np.array(crossed, dtype=bool)])


def _value_and_signs(answer: Any) -> tuple[Any, Array]:
    return answer if isinstance(answer, tuple) else (answer, np.zeros(0))


def _judge(block: _Block, settings: _Settings) -> Check:
    """Compare a block's derivatives with differences, and look again, closer, where they raise suspicion.

    Closer, the slopes left and right of a smooth point approach each other; those of a kink stay apart.
    """
    analytic, tolerance = block.analytic, settings.tolerance
    with np.errstate(invalid="ignore", over="ignore"):
        found = block.look(np.arange(len(analytic)), settings.eps)
        scale = float(np.max(np.maximum(np.abs(analytic), np.abs(found.central)), initial=0.0))
        error = found.error(analytic, scale, tolerance)
        crossed = found.crossed.reshape(-1, *[1] * (analytic.ndim - 1))
        kinks = np.broadcast_to(crossed, analytic.shape) & np.isfinite(analytic)
        bent = found.gap > _BENT * scale + 4 * found.noise
        again = np.flatnonzero(((error > tolerance) | bent).reshape(len(analytic), -1).any(axis=1))
        if len(again):
            closer, part = block.look(again, settings.eps / _CLOSER), analytic[again]
            # Richardson: errors in h² cancel, which counts where a small slope changes fast.
            square = _CLOSER**2
            better = closer._replace(central=(square * closer.central - found.central[again]) / (square - 1))
            now = np.minimum(*(look.error(part, scale, tolerance) for look in (closer, better)))
            wrong = error[again] > tolerance
            stays = bent[again] & (closer.gap > np.maximum(found.gap[again] / 2, 4 * closer.noise))
            kinks[again] |= closer.encloses(part) & np.where(wrong, now > tolerance, stays)
            error[again] = np.where(wrong, now, error[again])
    return _checked(block, found, error, kinks, tolerance)


def _checked(block: _Block, found: _Differences, error: Array, kinks: Array, tolerance: float) -> Check:
    """The check's row of the table, with the worst place in words where it fails."""
    wrong = (error > tolerance) & ~kinks
    message = ""
    if wrong.any():
        flat = int(np.where(wrong, error, -1.0).argmax())
        place = tuple(int(k) for k in np.unravel_index(flat, error.shape))
        got, expected = (number(float(values[place]), 6) for values in (block.analytic, found.central))
        where = f"relative error {error[place]:.2g} {block.where(place)}"
        message = f"{block.blame}{where}, {got} instead of {expected}"
    largest = float(error[~kinks].max(initial=0.0))
    count = int(kinks.sum())
    return Check(
        block.name, block.shape, kinks.size - count, block.size, count, largest, not message, message
    )


# ------------------------------------------------------------ the whole chain


class _Problem:
    """A network's float64 twin with a batch, and where on its kinks it is."""

    def __init__(self, net: Sequential, X: Array, y: Array, rule: Loss) -> None:
        self.X, self.y, self.rule = X, y, rule
        self.twin = Sequential(*deepcopy(net.layers), dtype="float64")
        self.twin.load_state_dict(net.state_dict())
        self.chain = Chain(self.twin)
        self.phi = self.twin.trace(X).phi
        value, df = value_and_gradient(rule, self.phi[-1], y)
        self.dphi, _ = self.chain.backward(self.phi, df)
        # First order: each φˡ is rounded once, and ∂L/∂φˡ says what that does to L.
        self.size = abs(value) + sum(
            float(np.nansum(np.abs(c * phi))) for c, phi in zip(self.dphi, self.phi, strict=True)
        )

    def evaluate(self) -> tuple[float, Array]:
        """L, and the signs of all that has a kink at 0 or, as ELU with alpha 1, a jump of its bend."""
        phi = self.twin.trace(self.X).phi
        value, _ = value_and_gradient(self.rule, phi[-1], self.y)
        kinked = (ReLU, LeakyReLU, ELU)
        bent = [x for layer, x in zip(self.twin.layers, phi, strict=False) if isinstance(layer, kinked)]
        if isinstance(self.rule, (MAE, Pinball)):
            bent.append(phi[-1] - self.y.reshape(phi[-1].shape))
        return value, np.concatenate([np.sign(x).ravel() for x in bent]) if bent else np.zeros(0)


def _check_chain(problem: _Problem, settings: _Settings) -> list[Check]:
    """∂L/∂W for each parameter, and ∂L/∂X."""
    twin = problem.twin
    _, grads = twin.value_and_grad(problem.X, problem.y, loss=problem.rule)
    checks = []
    for name, value in twin.state_dict().items():

        def moved(name: str = name, value: Array = value) -> tuple[float, Array]:
            twin.load_state_dict({name: value}, strict=False)
            return problem.evaluate()

        checks.append(_check_array(name, f"∂L/∂{name}: ", value, grads[name], moved, problem.size, settings))
        moved()  # the last difference has left its own value there
    X, dX = problem.X, problem.dphi[0]
    return [*checks, _check_array("x", "∂L/∂x: ", X, dX, problem.evaluate, problem.size, settings)]


def _check_array(
    name: str, blame: str, array: Array, analytic: Array, function: Callable[[], Any], size: float,
    settings: _Settings,
) -> Check:  # fmt: skip
    """The derivatives of a function in the elements of an array that it reads."""
    places = settings.chosen(array.size)

    def look(which: Array, eps: float) -> _Differences:
        return _differences(function, array, places[which], eps, size)

    def where(place: tuple[int, ...]) -> str:
        return f"at {_index(places[place[0]], array.shape)}"

    chosen = analytic.ravel()[places]
    return _judge(_Block(name, array.shape, array.size, chosen, look, where, blame), settings)


def _index(place: int, shape: tuple[int, ...]) -> str:
    return str([int(k) for k in np.unravel_index(int(place), shape)]) if shape else "the number"


# ------------------------------------------------------------ layers and losses of the user's own


def _check_maps(link: Link, problem: _Problem, settings: _Settings) -> list[Check]:
    """forward, vjp and jvp of a layer of the user's own against each other, at the input it has here."""
    x = problem.phi[link.index][:_ROWS].copy()
    y = link.forward(x)
    u, t = (settings.rng.standard_normal(a.shape) for a in (y, x))
    rows = _check_rows(link, x, y)
    if not rows.ok:  # differences of a whole batch at once say nothing then
        return [rows]
    vjp, jvp = _check_products(link, x, y, u, settings)
    checks = [rows, *_in_words(link.kind, vjp, jvp)]
    if jvp is not None:
        checks.append(_check_transpose(link, x, y, u, t, settings.tolerance))
    for name in link.params:
        checks.append(_check_parameter(link, name, x, y, u, settings))
    if link.params and _takes_four(link.layer.jvp):
        checks.append(_check_tangent_of_parameters(link, x, y, settings))
    if hasattr(link.layer, "vjp_jvp"):
        checks.append(_check_second(link, x, y, u, t, settings))
    return checks


def _check_rows(link: Link, x: Array, y: Array) -> Check:
    """Row i of y may depend on row i of x only."""
    alone = np.concatenate([link.forward(x[i : i + 1]) for i in range(len(x))])
    difference = np.abs(alone - y)
    error = float(difference.max(initial=0.0)) / (float(np.abs(y).max(initial=0.0)) or 1.0)
    ok = error <= 1e-9  # the order of a sum may depend on the number of rows, and no more
    row = int(difference.max(axis=1, initial=0.0).argmax())
    message = (
        f"{link.kind}.forward mixes rows: row {row} of y differs by {error:.2g} (relative) "
        "when it is alone in the batch; row i of y may depend on row i of x only"
    )
    return Check(f"{link.kind}.forward", y.shape, len(y), len(y), 0, error, ok, "" if ok else message)


def _check_products(
    link: Link, x: Array, y: Array, u: Array, settings: _Settings
) -> tuple[Check, Check | None]:
    """vjp and jvp against differences of forward, a column of x at a time for all rows together."""
    columns = settings.chosen(link.inputs)

    def jacobian(which: Array, eps: float) -> _Differences:
        return _jacobian_by_differences(link, x, y, columns[which], eps)

    def product(which: Array, eps: float) -> _Differences:
        found = jacobian(which, eps)
        slopes = ((u * slope).sum(axis=2) for slope in (found.central, found.left, found.right))
        noise = (np.abs(u) * found.noise).sum(axis=2)
        return _Differences._make([*slopes, noise, found.crossed])

    def where(place: tuple[int, ...]) -> str:
        return f"at row {place[1]}, input {columns[place[0]]}"

    pulled = link.vjp(x, y, u)[0].T[columns]
    vjp = _judge(_Block(f"{link.kind}.vjp", x.shape, x.size, pulled, product, where), settings)
    if type(link.layer).jvp is Layer.jvp:
        return vjp, None
    units = np.eye(link.inputs)[columns]
    pushed = np.stack([link.jvp(x, y, np.tile(unit, (len(x), 1))) for unit in units])
    shape = (link.outputs, link.inputs)
    block = _Block(f"{link.kind}.jvp", shape, x.size * link.outputs, pushed, jacobian, where)
    return vjp, _judge(block, settings)


def _jacobian_by_differences(link: Link, x: Array, y: Array, columns: Array, eps: float) -> _Differences:
    """J_x[y] of every row, arrays (columns, B, O)."""
    step = eps * np.maximum(1.0, np.abs(x))
    parts = []
    for d in columns:
        high, low = x.copy(), x.copy()
        high[:, d] += step[:, d]
        low[:, d] -= step[:, d]
        above, below = link.forward(high), link.forward(low)
        wide, before, after = ((a - b)[:, d, None] for a, b in ((high, low), (x, low), (high, x)))
        noise = _ROUNDING * np.maximum(np.abs(above), np.abs(below)) / step[:, d, None]
        parts.append([(above - below) / wide, (y - below) / before, (above - y) / after, noise])
    arrays = [np.stack(part) for part in zip(*parts, strict=True)]
    return _Differences._make([*arrays, np.zeros(len(columns), dtype=bool)])


def _in_words(kind: str, vjp: Check, jvp: Check | None) -> list[Check]:
    """The two products' checks, with messages that say which of the three maps is the odd one out."""
    if jvp is None:
        message = f"{kind}.jvp is not defined: forward mode cannot pass this layer"
        undefined = Check(f"{kind}.jvp", (), 0, 0, 0, 0.0, True, message)
        text = f"{kind}.vjp disagrees with {kind}.forward: {vjp.message}"
        return [vjp if vjp.ok else vjp._replace(message=text), undefined]
    found = []
    for this, other in ((vjp, jvp), (jvp, vjp)):
        if this.ok:
            found.append(this)
            continue
        end = f"its {other.name.split('.')[1]} {'agrees' if other.ok else 'disagrees too'}"
        found.append(
            this._replace(message=f"{this.name} disagrees with {kind}.forward: {this.message}; {end}")
        )
    return found


def _check_transpose(link: Link, x: Array, y: Array, u: Array, t: Array, tolerance: float) -> Check:
    """⟨u, J t⟩ = ⟨u J, t⟩: vjp and jvp are products with one and the same matrix."""
    forward, reverse = u * link.jvp(x, y, t), link.vjp(x, y, u)[0] * t
    scale = float(np.abs(forward).sum() + np.abs(reverse).sum())
    error = abs(float(forward.sum() - reverse.sum())) / (scale or 1.0)
    error = math.inf if math.isnan(error) else error
    ok = error <= tolerance
    message = (
        f"{link.kind}.vjp and {link.kind}.jvp are not each other's transpose: "
        f"⟨u, J t⟩ = {number(float(forward.sum()), 6)}, ⟨u J, t⟩ = {number(float(reverse.sum()), 6)}"
    )
    return Check(f"{link.kind} ⟨u, J t⟩ = ⟨u J, t⟩", (), 1, 1, 0, error, ok, "" if ok else message)


def _check_parameter(link: Link, name: str, x: Array, y: Array, u: Array, settings: _Settings) -> Check:
    """What vjp gives for a parameter against differences of ⟨u, forward⟩."""
    array, analytic = link.params[name], link.vjp(x, y, u)[1][name]
    blame = f"{link.kind}.vjp's gradient of {name!r} disagrees with {link.kind}.forward: "
    return _check_array(
        f"{link.kind}.vjp of {name!r}", blame, array, analytic,
        lambda: float((u * link.forward(x)).sum()), float(np.abs(u * y).sum()), settings,
    )  # fmt: skip


def _check_tangent_of_parameters(link: Link, x: Array, y: Array, settings: _Settings) -> Check:
    """jvp(x, y, 0, dparams) along one random direction in all parameters."""
    direction = _random(link.params, settings)
    analytic = np.asarray(link.layer.jvp(x, y, np.zeros_like(x), direction))  # type: ignore[call-arg]
    names = "jvp of its parameters", f"jvp along the parameters disagrees with {link.kind}.forward"
    return _check_along(link, names, direction, analytic, lambda h: link.forward(x), settings)


def _check_second(link: Link, x: Array, y: Array, dy: Array, dx: Array, settings: _Settings) -> Check:
    """vjp_jvp along one random direction in everything that vjp reads."""
    ddy, direction = settings.rng.standard_normal(dy.shape), _random(link.params, settings)

    def flat(answer: Any) -> Array:
        c, grads = answer if isinstance(answer, tuple) else (answer, {})
        return np.concatenate([c.ravel(), *(np.ravel(grads[name]) for name in link.params)])

    def pulled(h: float) -> Array:
        moved = x + h * dx
        return flat(link.vjp(moved, link.forward(moved), dy + h * ddy))

    analytic = flat(link.vjp_jvp(x, y, dy, dx, ddy, direction or None))
    names = "vjp_jvp", f"vjp_jvp disagrees with {link.kind}.vjp"
    return _check_along(link, names, direction, analytic, pulled, settings)


def _random(params: dict[str, Array], settings: _Settings) -> dict[str, Array]:
    return {name: settings.rng.standard_normal(value.shape) for name, value in params.items()}


def _check_along(
    link: Link, names: tuple[str, str], direction: dict[str, Array], analytic: Array,
    function: Callable[[float], Array], settings: _Settings,
) -> Check:  # fmt: skip
    """A tangent against differences of function(h), the parameters h along the direction."""
    start = {name: value.copy() for name, value in link.params.items()}
    h = np.zeros(1)

    def along() -> Array:
        for name, value in link.params.items():
            value[...] = start[name] + h[0] * direction[name]
        return function(h[0])

    def look(which: Array, eps: float) -> _Differences:
        return _differences(along, h, which, eps, size)

    def where(place: tuple[int, ...]) -> str:
        return f"at {list(place[1:])}"

    title, blame = (f"{link.kind}.{name}" for name in names)
    size, shape = np.abs(along()), analytic.shape
    check = _judge(_Block(title, shape, analytic.size, analytic[None], look, where, f"{blame}: "), settings)
    along()
    return check


def _check_loss(rule: CustomLoss, problem: _Problem, settings: _Settings) -> Check:
    """∂L/∂f of a loss of the user's own against differences of its value."""
    f = problem.phi[-1].copy()
    name = getattr(rule.function, "__name__", type(rule.function).__name__)
    value, df = value_and_gradient(rule, f, problem.y)
    size = abs(value) + float(np.abs(df * f).sum())
    return _check_array(
        f"{name}: ∂L/∂f", f"{name}'s gradient ∂L/∂f disagrees with its value: ", f, df,
        lambda: value_and_gradient(rule, f, problem.y)[0], size, settings,
    )  # fmt: skip
