# SPDX-License-Identifier: MIT
"""The chain rule itself: derivatives of a network in both modes, to second order, each by the cheaper sweep.

Numerator layout, as in the lecture: J_x[y] is M×N for y ∈ Rᴹ and x ∈ Rᴺ, the gradient of a scalar is a row.
Examples are rows: X is (B, I), f is (B, O), and one Jacobian for each example makes (B, O, I). Brackets name
sections of the lecture. All of it is exact to rounding, in float32 and float64; dropout is off. Where a layer
or a loss of your own takes part, second derivatives are central differences of its `vjp`, or of its ∂L/∂f,
unless it brings its own; see `Layer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import numpy as np

from . import _core, batch, losses
from .checks import converted, flag, listed, one_of, real_array, short, whole
from .layers import Linear

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Gradient = dict[str, Array]


class Network(batch.Network, Protocol):
    """What the calculus needs to know of a network."""

    layers: tuple[Any, ...]
    dtype: str


_MOST_PARAMETERS = 5000  # whose Hessian is formed: 200 MB in float64


def exact(op: str, net: Network) -> Any:
    """The engine's network, if its derivatives are exact."""
    core = getattr(net, "_core", None)
    if core is None:
        raise TypeError(f"[{op}] net must be a network: expected a Sequential, got {short(net)}")
    if net.dtype != net.array_dtype:
        raise ValueError(f"[{op}] derivatives are exact: expected dtype float32 or float64, got {net.dtype}")
    return core


# ------------------------------------------------------------ arguments


def _inputs(op: str, net: Network, X: Any, name: str = "X") -> Array:
    return batch.as_matrix(op, X, net.in_features, net.array_dtype, name=name, finite=False)


def _rows_like(op: str, net: Network, name: str, value: Any, rows: int, columns: int) -> Array:
    """`value` as a (rows, columns) matrix of the network's dtype."""
    array = real_array(op, name, value)
    if array.shape != (rows, columns):
        raise ValueError(
            f"[{op}] {name} must have a row for each row of X: expected shape ({rows}, {columns}), "
            f"got {array.shape}"
        )
    return converted(op, name, array, net.array_dtype)


def _shapes(net: Network) -> dict[str, tuple[int, ...]]:
    return {f"{layer}.{name}": tuple(shape) for layer, name, shape in net._core.parameters}


def _direction(op: str, net: Network, name: str, value: Any) -> Gradient:
    """A direction in the parameters: a dict like a state dict, or one vector of all of them."""
    shapes = _shapes(net)
    if not isinstance(value, Mapping):
        return _split(op, name, value, shapes, net.array_dtype)
    unknown = [key for key in value if key not in shapes]
    if unknown:
        raise ValueError(
            f"[{op}] {name} must name parameters: expected some of {listed(shapes)}, got {listed(unknown)}"
        )
    arrays = {key: real_array(op, f"{name}[{key!r}]", array) for key, array in value.items()}
    for key, array in arrays.items():
        if array.shape != shapes[key]:
            raise ValueError(
                f"[{op}] {name}[{key!r}] must have the parameter's shape: "
                f"expected {shapes[key]}, got {array.shape}"
            )
    return {key: converted(op, f"{name}[{key!r}]", array, net.array_dtype) for key, array in arrays.items()}


def _split(op: str, name: str, value: Any, shapes: dict[str, tuple[int, ...]], dtype: str) -> Gradient:
    """One vector of all parameters, in the order of the state dict, as a dict of views."""
    flat = real_array(op, name, value)
    count = sum(math.prod(shape) for shape in shapes.values())
    if flat.shape != (count,):
        raise ValueError(
            f"[{op}] {name} must be a dict like state_dict(), or all parameters in one vector: "
            f"expected shape ({count},), got {flat.shape}"
        )
    flat = converted(op, name, flat, dtype)
    parts, at = {}, 0
    for key, shape in shapes.items():
        parts[key] = flat[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return parts


class _Rule(NamedTuple):
    """A built-in loss as the engine takes it: reduced, and example by example."""

    loss: losses.Loss
    reduced: _core.Loss
    each: _core.Loss


@lru_cache(maxsize=64)
def _rule(loss: Any) -> _Rule:
    rule = losses.resolve("calculus", loss)
    return _Rule(rule, rule.engine(False, False), rule.each(False))


def known(loss: Any) -> _Rule | None:
    """The rule of a built-in loss; None for what must be looked at more closely."""
    built_in = type(loss) is str and loss in losses.LOSSES
    if built_in or (isinstance(loss, losses.Loss) and not isinstance(loss, losses.CustomLoss)):
        return _rule(loss)
    return None


Ask = Callable[[Any, Any, Any, _core.Loss, tuple[float, float]], Any]


def _of_loss(
    op: str, net: Network, X: Any, y: Any, loss: Any, sample_weight: Any, ask: Ask, each: bool = False
) -> Any:
    """The answer of `ask(X, y, weight, loss, domain)` to arrays that fit as is, else to checked ones."""
    built_in = known(loss)
    if built_in is not None and sample_weight is None:
        answer = ask(X, y, None, built_in.each if each else built_in.reduced, built_in.loss.domain)
        if answer is not None:
            return answer
    rule = losses.resolve(op, loss)
    data = batch.take(op, net, rule, X, y, sample_weight)
    engine = rule.each(data.flat) if each else rule.engine(data.flat, data.weight is not None)
    return ask(data.X, data.y, data.weight, engine, rule.domain)


# ------------------------------------------------------------ the lecture's two steps, step by step


@final
class Trace:
    """One pass through the chain, and back; made by `net.trace(X)`. [Let's generalize everything]

    phi[l] (B, width) is φˡ: phi[0] = X, phi[-1] = f, "store all φˡ"; z[l] the output of the Linear layer l.
    After `backward`: dphi[l] is ∂L/∂φˡ for every l, and grads has ∂L/∂W by name, as in `state_dict`; until
    then both are None, which is not 0.
    """

    phi: list[Array]
    z: dict[int, Array]
    dphi: list[Array] | None
    grads: Gradient | None

    def __init__(self, net: Network, changes: int, phi: list[Array]) -> None:
        self._net, self._changes = net, changes
        self.phi, self.dphi, self.grads = phi, None, None
        linear = (index for index, layer in enumerate(net.layers) if isinstance(layer, Linear))
        self.z = {index: phi[index + 1] for index in linear}

    def backward(self, dL_df: Any) -> Trace:
        """Step 2 of the lecture: from ∂L/∂f down to every ∂L/∂φˡ, and to ∂L/∂Wˡ = ∂L/∂φˡ J_Wˡ[φˡ].

        ∂L/∂φˡ⁻¹ = ∂L/∂φˡ J_φˡ⁻¹[φˡ]

        Shapes: dL_df (B, O), a row for each example; the gradients are summed over the rows.
        Raises: ValueError for another shape, or if the network has changed since; TypeError for no numbers.

        Example:
            >>> import chainrule as cr
            >>> net = cr.Sequential(cr.Linear(2, 1, init="zeros"))
            >>> trace = net.trace([[1.0, 2.0]]).backward([[1.0]])
            >>> trace.dphi[0], trace.grads["0.weight"]
            (array([[0., 0.]], dtype=float32), array([[1., 2.]], dtype=float32))
        """
        core = exact("backward", self._net)
        self._check(core)
        c = _rows_like("backward", self._net, "dL_df", dL_df, *self.phi[-1].shape)
        found = core.backward(_inputs("backward", self._net, self.phi[0]), c)
        self._check(core)  # another thread may have trained meanwhile
        self.dphi, self.grads = found
        return self

    def _check(self, core: Any) -> None:
        if core.changes != self._changes:
            raise ValueError(
                "[backward] the network must be the one that was traced: "
                "expected the same weights, got weights that have changed since; trace again"
            )

    def __repr__(self) -> str:
        chain = " → ".join(str(phi.shape[1]) for phi in self.phi)
        return f"<Trace of {len(self.phi[0])} rows, {chain}{', and back' if self.dphi is not None else ''}>"


# ------------------------------------------------------------ first order


def vjp(net: Network, X: Any, c: Any, params: bool = False) -> Any:
    """Reverse mode: cotangents c of the outputs back to the inputs, row by row (lecture: step 2).

    dX = c J_X[f];  with params=True also Σ c J_W[f] for every parameter W

    Shapes: X (B, I), c (B, O); f (B, O), dX (B, I); gradients shaped like the parameters, summed over rows.
    Returns: (f, dX), or (f, dX, grads) with grads keyed like `state_dict`.
    Raises: TypeError or ValueError for shapes that do not fit and for dtype bfloat16.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(2, 1))
        >>> f, dX = cr.vjp(net, [[1.0, 2.0]], [[1.0]])
        >>> bool((dX == net.state_dict()["0.weight"]).all())
        True
    """
    core = exact("vjp", net)
    answer = core.vjp(X, c, params) if params is False or params is True else None
    if answer is None:
        matrix = _inputs("vjp", net, X)
        c = _rows_like("vjp", net, "c", c, len(matrix), net.out_features)
        answer = core.vjp(matrix, c, flag("vjp", "params", params))
    return answer


def jvp(net: Network, X: Any, dX: Any = None, dparams: Any = None) -> tuple[Array, Array]:
    """Forward mode: how f moves as the inputs move along dX and the parameters along dparams.

    df = J_X[f] dX + Σ J_W[f] Ẇ, row by row. [We can also do "forward-mode" diff]

    Shapes: X and dX (B, I), f and df (B, O); dX None stands for 0; dparams is a dict like `state_dict`, in
        which what is missing is 0.
    Returns: (f, df).
    Raises: TypeError or ValueError for shapes or names that do not fit and for dtype bfloat16.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(2, 1))
        >>> f, df = cr.jvp(net, [[1.0, 2.0]], dparams={"0.bias": np.ones(1)})
        >>> df
        array([[1.]], dtype=float32)
    """
    core = exact("jvp", net)
    answer: tuple[Array, Array] | None = core.jvp(X, dX, dparams)
    if answer is None:
        matrix = _inputs("jvp", net, X)
        if dX is not None:
            dX = _rows_like("jvp", net, "dX", dX, *matrix.shape)
        if dparams is not None:
            dparams = _direction("jvp", net, "dparams", dparams)
        answer = core.jvp(matrix, dX, dparams)
        assert answer is not None
    return answer


def jacobian(net: Network, X: Any, wrt: str = "inputs", mode: str = "auto") -> Any:
    """The whole Jacobian of every example, in the inputs or in the parameters (lecture: Vector Chain Rule).

    J_x[f], one O×I matrix a row; with wrt="parameters" J_W[f] for every parameter W

    Args:
        mode: "reverse" makes it row by row, O sweeps down; "forward" column by column, one sweep up for each
            input (or parameter); "auto" takes whichever are fewer.

    Shapes: X (B, I): (B, O, I), in the parameters a dict of (B, O, *shape); a single row (I,): without the B.
    Raises: TypeError or ValueError for what does not fit, an unknown name, or dtype bfloat16.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(3, 2))
        >>> bool((cr.jacobian(net, np.zeros(3)) == net.state_dict()["0.weight"]).all())
        True
        >>> {name: J.shape for name, J in cr.jacobian(net, np.zeros((5, 3)), wrt="parameters").items()}
        {'0.weight': (5, 2, 2, 3), '0.bias': (5, 2, 2)}
    """
    core = exact("jacobian", net)
    inputs = one_of("jacobian", "wrt", wrt, ("inputs", "parameters")) == "inputs"
    mode = one_of("jacobian", "mode", mode, ("auto", "forward", "reverse"))
    reverse = net.out_features <= net.in_features if mode == "auto" else mode == "reverse"
    answer = core.jacobian(X, reverse) if inputs else None
    if answer is not None:
        return answer
    array = real_array("jacobian", "X", X)
    single = array.shape == (net.in_features,)
    matrix = _inputs("jacobian", net, array[None, :] if single else array)
    if inputs:
        answer = core.jacobian(matrix, reverse)
        return answer[0] if single else answer
    answer = _forward_in_parameters(net, matrix) if mode == "forward" else core.parameter_jacobian(matrix)
    return {name: J[0] for name, J in answer.items()} if single else answer


def _forward_in_parameters(net: Network, X: Array) -> Gradient:
    """J_W[f] column by column: the tangent along each parameter in turn."""
    flat, parts = _units(net)
    columns = np.empty((len(X), net.out_features, flat.size), net.array_dtype)
    for i in range(flat.size):
        flat[i] = 1
        columns[:, :, i] = net._core.jvp(X, None, parts)[1]
        flat[i] = 0
    ends = np.cumsum([part.size for part in parts.values()])[:-1]
    pieces = np.split(columns, ends, axis=2) if parts else []
    return {
        name: np.ascontiguousarray(piece).reshape(*columns.shape[:2], *parts[name].shape)
        for name, piece in zip(parts, pieces, strict=True)
    }


def _units(net: Network) -> tuple[Array, Gradient]:
    """A vector of zeros for all parameters, and the same memory as a dict of arrays."""
    shapes = _shapes(net)
    flat = np.zeros(sum(math.prod(shape) for shape in shapes.values()), net.array_dtype)
    return flat, _split("calculus", "v", flat, shapes, net.array_dtype)


def input_gradient(net: Network, X: Any, y: Any, loss: Any, sample_weight: Any = None) -> Array:
    """The gradient of the loss in the inputs: what would have to change in X to change L.

    ∂L/∂X by reverse mode, L the loss over all rows, reduced and weighted. [Let's generalize everything]

    Shapes: X (B, I), y as in `fit`; (B, I).
    Raises: TypeError or ValueError for data that do not fit or are not finite, and for dtype bfloat16.

    Example:
        >>> import chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
        >>> net.load_state_dict({"0.weight": [[2.0]], "0.bias": [0.0]})
        ([], [])
        >>> cr.input_gradient(net, [[1.0]], [1.0], loss="least_squares")  # (f − y) ∂f/∂x = (2 − 1) 2
        array([[2.]], dtype=float32)
    """
    core = exact("input_gradient", net)
    answer: Array = _of_loss("input_gradient", net, X, y, loss, sample_weight, core.input_gradient)
    return answer


def sensitivity(net: Network, X: Any, d: int, y: Any = None, loss: Any = None) -> Array:
    """How each example's output, or loss, reacts to its input number d: one sweep of forward mode.

    ∂f_n/∂x_nd, or with y and loss ∂L_n/∂x_nd = ∂L_n/∂f_n ∂f_n/∂x_nd for each example's own L_n. "Suppose we
    wanted just a derivative/sensitivity test": nothing is computed for the other inputs d′ ≠ d; of the first
    layer's weights only column d takes part.

    Shapes: X (B, I), d from 0 to I − 1; (B, O), with a loss (B,).
    Raises: TypeError or ValueError for data that do not fit, a d outside, y without loss, and dtype bfloat16.

    Example:
        >>> import chainrule as cr
        >>> net = cr.Sequential(cr.Linear(2, 1, init="zeros"))
        >>> net.load_state_dict({"0.weight": [[2.0, 3.0]], "0.bias": [0.0]})
        ([], [])
        >>> cr.sensitivity(net, [[1.0, 1.0]], 1)
        array([[3.]], dtype=float32)
        >>> cr.sensitivity(net, [[1.0, 1.0]], 1, y=[4.0], loss="least_squares")  # (5 − 4) 3
        array([3.], dtype=float32)
    """
    op = "sensitivity"
    core = exact(op, net)
    d = whole(op, "d", d, 0, net.in_features - 1)
    if (y is None) != (loss is None):
        raise ValueError(
            f"[{op}] y and loss belong together: expected both or neither, got {'loss' if y is None else 'y'}"
        )
    if loss is None:
        answer = core.sensitivity(X, d) or core.sensitivity(_inputs(op, net, X), d)
        return np.asarray(answer[1])
    rule = losses.resolve(op, loss)
    data = batch.take(op, net, rule, X, y)
    f, df = core.sensitivity(data.X, d)
    gradient = rule.gradients(f, data.y, data.flat)
    return np.asarray((gradient * df).sum(axis=1))


# ------------------------------------------------------------ one example at a time


def per_example_grads(net: Network, X: Any, y: Any, loss: Any) -> Gradient:
    """The gradient of each example's own loss L_n in every parameter.

    ∂L_n/∂W = cᵀx for c = ∂L_n/∂z of the Linear layer; their mean (for reduction="sum" their sum) over the
    examples is the gradient of `value_and_grad`

    Shapes: X (B, I), y as in `fit`; a dict of (B, *shape), B times the parameters: for the norms alone see
        `per_example_grad_norms`.
    Raises: TypeError or ValueError for data that do not fit or are not finite, and for dtype bfloat16.

    Example:
        >>> import chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
        >>> cr.per_example_grads(net, [[1.0], [2.0]], [1.0, 1.0], loss="least_squares")["0.weight"].ravel()
        array([-1., -2.], dtype=float32)
    """
    core = exact("per_example_grads", net)

    def ask(X: Any, y: Any, weight: None, loss: _core.Loss, domain: tuple[float, float]) -> Any:
        return core.example_gradients(X, y, loss, domain)

    answer: Gradient = _of_loss("per_example_grads", net, X, y, loss, None, ask, each=True)
    return answer


def per_example_grad_norms(net: Network, X: Any, y: Any, loss: Any) -> Array:
    """The length of each example's gradient over all parameters, which need not be formed for it.

    |∂L_n/∂θ|² = Σ |c|² (|x|² + 1) over the Linear layers, c = ∂L_n/∂z and x its inputs (+ 1 for the bias)

    Shapes: X (B, I), y as in `fit`; (B,).
    Raises: TypeError or ValueError for data that do not fit or are not finite, and for dtype bfloat16.

    Example:
        >>> import chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, bias=False, init="zeros"))
        >>> cr.per_example_grad_norms(net, [[1.0], [2.0]], [1.0, 1.0], loss="least_squares")
        array([1., 2.], dtype=float32)
    """
    core = exact("per_example_grad_norms", net)

    def ask(X: Any, y: Any, weight: None, loss: _core.Loss, domain: tuple[float, float]) -> Any:
        return core.example_norms(X, y, loss, domain)

    answer: Array = _of_loss("per_example_grad_norms", net, X, y, loss, None, ask, each=True)
    return answer


# ------------------------------------------------------------ second order, in the parameters


def _product(
    op: str, net: Network, X: Any, y: Any, loss: Any, v: Any, weight: Any, gauss_newton: bool
) -> Any:
    core = exact(op, net)

    def ask(X: Any, y: Any, weight: Any, loss: _core.Loss, domain: tuple[float, float]) -> Any:
        return core.hvp(X, y, weight, loss, domain, v, gauss_newton)

    if not isinstance(v, dict):
        v = _direction(op, net, "v", v)
    answer = _of_loss(op, net, X, y, loss, weight, ask)
    if answer is None:  # X and y fit: it is v that does not
        v = _direction(op, net, "v", v)
        answer = _of_loss(op, net, X, y, loss, weight, ask)
    return answer


def hvp(net: Network, X: Any, y: Any, loss: Any, v: Any, sample_weight: Any = None) -> Gradient:
    """The Hessian of the loss in the parameters times a direction v, without the Hessian.

    H v = the derivative of ∂L/∂θ along v: forward mode over reverse mode, for about three gradients' work

    Shapes: X (B, I), y as in `fit`; v a dict like `state_dict` (what is missing is 0), or all parameters in
        one vector (P,) in that order; a dict shaped like the parameters.
    Raises: TypeError or ValueError for data, names or shapes that do not fit, and for dtype bfloat16.
    Source: Pearlmutter, Neural Computation 6, 1994.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
        >>> v = {"0.weight": np.ones((1, 1))}
        >>> cr.hvp(net, [[3.0]], [1.0], "least_squares", v)  # ∂²/∂w² ½(wx + b − y)² = x²
        {'0.weight': array([[9.]], dtype=float32), '0.bias': array([3.], dtype=float32)}
    """
    answer: Gradient = _product("hvp", net, X, y, loss, v, sample_weight, False)
    return answer


def gauss_newton_product(
    net: Network, X: Any, y: Any, loss: Any, v: Any, sample_weight: Any = None
) -> Gradient:
    """The Gauss-Newton matrix of the loss times a direction v: the Hessian without the network's curvature.

    G v = Jᵀ H_L J v, J = J_θ[f] and H_L the Hessian of the loss in f; never negative where the loss is convex

    Shapes: as `hvp`.
    Raises: as `hvp`.
    Source: Schraudolph, Neural Computation 14, 2002.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
        >>> cr.gauss_newton_product(net, [[3.0]], [1.0], "mse", {"0.bias": np.ones(1)})["0.weight"]
        array([[6.]], dtype=float32)
    """
    answer: Gradient = _product("gauss_newton_product", net, X, y, loss, v, sample_weight, True)
    return answer


def hessian(net: Network, X: Any, y: Any, loss: Any, sample_weight: Any = None) -> Array:
    """The Hessian of the loss in all parameters, for networks with few of them.

    H_ij = ∂²L/∂θ_i ∂θ_j, θ the parameters in the order of `state_dict`, each flattened

    Shapes: X (B, I), y as in `fit`; (P, P) for P ≤ 5000 parameters, one Hessian-vector product each.
    Raises: ValueError for more parameters; else as `hvp`.

    Example:
        >>> import chainrule as cr
        >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
        >>> cr.hessian(net, [[3.0]], [1.0], loss="least_squares")
        array([[9., 3.],
               [3., 1.]], dtype=float32)
    """
    core = exact("hessian", net)
    count = sum(math.prod(shape) for shape in _shapes(net).values())
    if count > _MOST_PARAMETERS:
        raise ValueError(
            f"[hessian] the matrix must be small: expected at most {_MOST_PARAMETERS} parameters, "
            f"got {count}; use hvp for its products with vectors"
        )
    rule = losses.resolve("hessian", loss)
    data = batch.take("hessian", net, rule, X, y, sample_weight)
    engine = rule.engine(data.flat, data.weight is not None)
    flat, parts = _units(net)
    matrix = np.empty((count, count), net.array_dtype)
    for i in range(count):
        flat[i] = 1
        row = core.hvp(data.X, data.y, data.weight, engine, rule.domain, parts, False)
        np.concatenate([part.ravel() for part in row.values()], out=matrix[i])
        flat[i] = 0
    return matrix


# ------------------------------------------------------------ second order, in the inputs


def laplacian(net: Network, X: Any) -> Array:
    """The Laplacian of every output in the inputs: the trace of its Hessian, for physics in the loss.

    Δf_o = Σ_d ∂²f_o/∂x_d², by tangents and second tangents along each input in turn

    Shapes: X (B, I); (B, O).
    Raises: TypeError or ValueError for an X that does not fit and for dtype bfloat16.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(2, 1), cr.ReLU())
        >>> cr.laplacian(net, np.ones((1, 2)))  # piecewise linear
        array([[0.]], dtype=float32)
    """
    return _second("laplacian", net, X, True)


def input_hessian_diagonal(net: Network, X: Any) -> Array:
    """The second derivative of every output in every single input.

    ∂²f_o/∂x_d², the diagonal of the Hessian of f_o; `laplacian` is its sum

    Shapes: X (B, I); (B, O, I).
    Raises: TypeError or ValueError for an X that does not fit and for dtype bfloat16.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> cr.input_hessian_diagonal(cr.mlp([3, 4, 2], activation="tanh"), np.ones((5, 3))).shape
        (5, 2, 3)
    """
    return _second("input_hessian_diagonal", net, X, False)


def _second(op: str, net: Network, X: Any, total: bool) -> Array:
    core = exact(op, net)
    answer: Array | None = core.second(X, total)
    if answer is None:
        answer = core.second(_inputs(op, net, X), total)
        assert answer is not None
    return answer
