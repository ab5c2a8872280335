# SPDX-License-Identifier: MIT
"""Layers: the links of the chain x = φ⁰ → φ¹ → … → φᴸ = f.

A built-in layer is a description, its constructor's arguments and no more; the arithmetic is the engine's.
A layer of your own is a subclass of `Layer` that brings its three maps along.

In the docstrings B is the number of examples (rows), I and O are the numbers of inputs and outputs of a
layer, and J_x[y] is the Jacobian in numerator layout: a cotangent c = ∂L/∂y is a row, and c·J_x[y] = ∂L/∂x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final
from weakref import WeakValueDictionary, ref

import numpy as np

from . import _core
from .checks import Description, flag, listed, one_of, real, short, undefined, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# ------------------------------------------------------------ the base class


class Layer:
    """A link of the chain, y = g(x); subclass it to make a layer of your own.

    forward(x) -> y           x (B, I) to y (B, O)
    vjp(x, y, dy) -> dx       the row cotangents dy (B, O) times J_x[y], row by row: (B, I);
                              (dx, {name: gradient}) if the layer has parameters
    jvp(x, y, dx) -> dy       J_x[y] times the tangents dx (B, I): (B, O); training does without, forward mode
                              does not. With parameters, jvp(x, y, dx, dparams) adds their tangents' part,
                              dparams a dict like params; without the fourth argument, a difference of forward
    vjp_jvp(x, y, dy, dx, ddy, dparams) -> ddx
                              optional: the tangent of what vjp returns, where y has the cotangents dy with
                              tangents ddy, x the tangents dx; without it, a difference of vjp (see below)
    out_features(I) -> O      how many outputs for I inputs; as many as inputs unless you say otherwise
    params                    optional dict of named arrays to learn; the network keeps the values and puts
                              arrays of its own into the dict, so read self.params[name] in every call; they
                              are read-only, net.load_state_dict changes them
    config()                  optional: the constructor's arguments as a dict, for net.save

    Rows are examples: row i of y may depend on row i of x only. A layer that does not take any width it is
    given says so with an attribute `in_features`.

    Differences are central, (m(p + h v) − m(p − h v))/2h with h = ∛eps in units of the numbers' size, of each
    row's own: right to about 10 digits in float64 and 4 in float32.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> class Square(cr.Layer):
        ...     def forward(self, x): return x * x
        ...     def vjp(self, x, y, dy): return 2 * x * dy
        ...     def jvp(self, x, y, dx): return 2 * x * dx
        >>> net = cr.Sequential(cr.Linear(3, 2), Square())
        >>> bool((net(np.ones((5, 3))) >= 0).all())
        True
    """

    def forward(self, x: Array) -> Array:
        """y = g(x) row by row: x (B, I) to y (B, O)."""
        raise NotImplementedError(undefined(self, "forward"))

    def vjp(self, x: Array, y: Array, dy: Array) -> Array | tuple[Array, dict[str, Array]]:
        """dx = dy·J_x[y] row by row: dy (B, O) to dx (B, I); with parameters (dx, {name: gradient})."""
        raise NotImplementedError(undefined(self, "vjp"))

    def jvp(self, x: Array, y: Array, dx: Array) -> Array:
        """dy = J_x[y]·dx row by row: dx (B, I) to dy (B, O)."""
        raise NotImplementedError(undefined(self, "jvp"))

    def out_features(self, in_features: int) -> int:
        """O for I inputs."""
        return in_features

    def __repr__(self) -> str:
        name, config = type(self).__name__, getattr(self, "config", None)
        if config is None:
            return f"<{name}>"
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in config().items())})"


class _BuiltIn(Description, Layer):
    """Base of the layers that are rows of the engine's list of ops; `op` is the row's name."""

    op: ClassVar[str]

    @property
    def _param(self) -> float:
        return 0.0

    def forward(self, x: Array) -> Array:
        return _core.op_forward(self.op, _rows(x), self._param)

    def vjp(self, x: Array, y: Array, dy: Array) -> Array:
        return _core.op_vjp(self.op, _rows(dy), _rows(self._saved(x, y)), self._param)

    def jvp(self, x: Array, y: Array, dx: Array) -> Array:
        return _core.op_jvp(self.op, _rows(dx), _rows(self._saved(x, y)), self._param)

    def _saved(self, x: Array, y: Array) -> Array:
        """What the derivative is read off, as the engine's list says."""
        return x if _SAVES[self.op] == "input" else y


_SAVES = {name: saves for _, name, saves in _core.ops()}


def _rows(x: Array) -> Array:
    x = np.asarray(x)
    return np.ascontiguousarray(x, dtype=np.float32 if x.dtype == np.float32 else np.float64)


# ------------------------------------------------------------ Linear, and its first weights


@final
class Linear(_BuiltIn):
    """An affine map of every row.

    Z = X Wᵀ + b

    Shapes: X (B, I), Z (B, O); parameters "weight" W (O, I) and "bias" b (O,), as in PyTorch.
    Gradient: for C = ∂L/∂Z, row by row: ∂L/∂X = C W, ∂L/∂W = Cᵀ X, ∂L/∂b = column sums of C.
    Initialisation: by `init`, from the network's seed and the layer's place in it; biases are 0 unless said.
        "auto"             He normal before ReLU, LeakyReLU, ELU, GELU, SiLU and Softplus, else Glorot uniform
        "glorot_uniform"   U(±√(6/(I+O)))        "glorot_normal"   N(0, 2/(I+O))
        "he_uniform"       U(±√(6/I))            "he_normal"       N(0, 2/I)
        "lecun_uniform"    U(±√(3/I))            "lecun_normal"    N(0, 1/I)
        "torch"            U(±1/√I), biases too: the distribution of torch.nn.Linear
        "sklearn"          U(±√(6/(I+O))), 2 for 6 before Sigmoid, biases too: scikit-learn's distribution
        "zeros"            0

    Raises: TypeError or ValueError for a width that is no positive int, or an unknown `init`.

    Example:
        >>> import chainrule as cr
        >>> cr.Linear(3, 2)
        Linear(3, 2)
        >>> sorted((k, v.shape) for k, v in cr.Sequential(cr.Linear(3, 2)).state_dict().items())
        [('0.bias', (2,)), ('0.weight', (2, 3))]
    """

    op = "linear"
    in_features: int
    out_features: int  # type: ignore[assignment]  # PyTorch's word for a fixed width; Layer's is a function
    bias: bool
    init: str

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: str = "auto") -> None:
        self._set(
            in_features=whole("Linear", "in_features", in_features),
            out_features=whole("Linear", "out_features", out_features),
            bias=flag("Linear", "bias", bias),
            init=one_of("Linear", "init", init, INITS),
        )

    def forward(self, *given: Any, **named: Any) -> Any:
        raise TypeError(
            "[Linear] a layer has no weights of its own: expected a network, got a layer; use Sequential"
        )

    vjp = jvp = forward


# name: (distribution, (I, O) -> its half width or standard deviation, whether biases are drawn too)
INITS: dict[str, tuple[str, Callable[[int, int], float], bool]] = {
    "auto": ("", lambda i, o: 0.0, False),  # one of the others, see below
    "glorot_uniform": ("uniform", lambda i, o: math.sqrt(6 / (i + o)), False),
    "glorot_normal": ("normal", lambda i, o: math.sqrt(2 / (i + o)), False),
    "he_uniform": ("uniform", lambda i, o: math.sqrt(6 / i), False),
    "he_normal": ("normal", lambda i, o: math.sqrt(2 / i), False),
    "lecun_uniform": ("uniform", lambda i, o: math.sqrt(3 / i), False),
    "lecun_normal": ("normal", lambda i, o: math.sqrt(1 / i), False),
    "torch": ("uniform", lambda i, o: math.sqrt(1 / i), True),
    "sklearn": ("uniform", lambda i, o: math.sqrt(6 / (i + o)), True),
    "zeros": ("zeros", lambda i, o: 0.0, False),
}


def initial(layer: Linear, after: Layer | None, seed: int, index: int, dtype: str) -> tuple[Array, Array]:
    """First weight (O, I) and bias (O,) of the Linear layer number `index` that `after` follows."""
    inputs, outputs = layer.in_features, layer.out_features
    name = layer.init
    if name == "auto":
        name = "he_normal" if isinstance(after, _RELU_FAMILY) else "glorot_uniform"
    distribution, size, biases = INITS[name]
    scale = size(inputs, outputs)
    if name == "sklearn" and isinstance(after, Sigmoid):
        scale = math.sqrt(2 / (inputs + outputs))
    weight = _draw(distribution, scale, inputs * outputs, seed, 2 * index, dtype).reshape(outputs, inputs)
    return weight, _draw(distribution if biases else "zeros", scale, outputs, seed, 2 * index + 1, dtype)


def _draw(distribution: str, scale: float, n: int, seed: int, stream: int, dtype: str) -> Array:
    """In pieces: the float64 numbers of all of a large layer would be the peak of its network's memory."""
    drawn = np.zeros(n, dtype)
    for first in range(0, n if distribution != "zeros" else 0, _PIECE):
        piece = drawn[first : first + _PIECE]
        if distribution == "uniform":
            piece[:] = scale * (2 * _core.random_uniform(len(piece), seed, stream, first) - 1)
        else:
            piece[:] = scale * _core.random_normal(len(piece), seed, stream, first)
    return drawn


_PIECE = 1 << 14


# ------------------------------------------------------------ elementwise layers


@final
class Identity(_BuiltIn):
    """The input, unchanged.

    y = x

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = 1, so c·J = c.

    Example:
        >>> Identity().forward([[-1.0, 2.0]])
        array([[-1.,  2.]])
    """

    op = "identity"


@final
class Sigmoid(_BuiltIn):
    """The logistic function, from 0 to 1.

    y = σ(x) = 1/(1 + e⁻ˣ)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(y (1 − y)).

    Example:
        >>> Sigmoid().forward([[0.0]])
        array([[0.5]])
    """

    op = "sigmoid"


@final
class Tanh(_BuiltIn):
    """The hyperbolic tangent, from −1 to 1.

    y = tanh(x)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag((1 − y)(1 + y)).

    Example:
        >>> Tanh().forward([[0.0]])
        array([[0.]])
    """

    op = "tanh"


@final
class ReLU(_BuiltIn):
    """The positive part.

    y = max(x, 0)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(1 where x > 0, else 0); at the kink x = 0 it is 0.

    Example:
        >>> ReLU().forward([[-1.0, 2.0]])
        array([[0., 2.]])
    """

    op = "relu"


@final
class LeakyReLU(_BuiltIn):
    """ReLU with a slope s = `negative_slope` ≥ 0 on the negative side.

    y = x where x > 0, else s x

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(1 where x > 0, else s); at the kink x = 0 it is s.

    Raises: TypeError or ValueError for a slope that is no finite number ≥ 0.

    Example:
        >>> LeakyReLU(0.5).forward([[-1.0, 2.0]])
        array([[-0.5,  2. ]])
    """

    op = "leaky_relu"
    negative_slope: float

    def __init__(self, negative_slope: float = 0.01) -> None:
        self._set(negative_slope=real("LeakyReLU", "negative_slope", negative_slope, least=0))

    @property
    def _param(self) -> float:
        return self.negative_slope


@final
class ELU(_BuiltIn):
    """The exponential linear unit, down to −a for a = `alpha` > 0.

    y = x where x > 0, else a (eˣ − 1)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(1 where x > 0, else y + a).

    Raises: TypeError or ValueError for an alpha that is no finite number > 0.

    Example:
        >>> ELU().forward([[0.0, 2.0]])
        array([[0., 2.]])
    """

    op = "elu"
    alpha: float

    def __init__(self, alpha: float = 1.0) -> None:
        self._set(alpha=real("ELU", "alpha", alpha, above=0))

    @property
    def _param(self) -> float:
        return self.alpha


@final
class GELU(_BuiltIn):
    """The Gaussian error linear unit, the exact one.

    y = x Φ(x), with Φ the standard normal distribution function

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(Φ(x) + x Φ′(x)).

    Example:
        >>> GELU().forward([[0.0]])
        array([[0.]])
    """

    op = "gelu"


@final
class SiLU(_BuiltIn):
    """The sigmoid linear unit, also called swish.

    y = x σ(x)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(σ(x) (1 + x (1 − σ(x)))).

    Example:
        >>> SiLU().forward([[0.0]])
        array([[0.]])
    """

    op = "silu"


@final
class Softplus(_BuiltIn):
    """A smooth ReLU.

    y = log(1 + eˣ)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(σ(x)).

    Example:
        >>> Softplus().forward([[0.0]]).round(4)
        array([[0.6931]])
    """

    op = "softplus"


_RELU_FAMILY = (ReLU, LeakyReLU, ELU, GELU, SiLU, Softplus)

# ------------------------------------------------------------ row-wise layers


@final
class Softmax(_BuiltIn):
    """Positive numbers that sum to 1 in each row; for training prefer logits and loss="cross_entropy".

    yⱼ = exp(xⱼ) / Σₖ exp(xₖ)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(y) − yᵀy for a row y, so c·J = (c − (c·y)) y.

    Example:
        >>> Softmax().forward([[0.0, 0.0]])
        array([[0.5, 0.5]])
    """

    op = "softmax"


@final
class LogSoftmax(_BuiltIn):
    """The logarithm of softmax, without its underflow.

    yⱼ = xⱼ − log Σₖ exp(xₖ)

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = 1 − 1ᵀ softmax(x), so c·J = c − (Σ c) softmax(x).

    Example:
        >>> LogSoftmax().forward([[0.0, 0.0]]).round(4)
        array([[-0.6931, -0.6931]])
    """

    op = "log_softmax"


# ------------------------------------------------------------ dropout


@final
class Dropout(_BuiltIn):
    """Sets a random share p of the elements to 0 while the network is trained; nothing otherwise.

    y = x m / (1 − p) with m = 0 with probability p, else 1, in `fit` and `train_step`; y = x elsewhere

    Shapes: x (B, I), y (B, I).
    Gradient: J_x[y] = diag(m / (1 − p)).

    Raises: TypeError or ValueError for a p that is no number in [0, 1).
    Source: Srivastava et al., JMLR 15, 2014.

    Example:
        >>> Dropout(0.2).forward([[1.0, 2.0]])
        array([[1., 2.]])
    """

    op = "dropout"
    p: float

    def __init__(self, p: float = 0.5) -> None:
        self._set(p=real("Dropout", "p", p, least=0, below=1))

    @property
    def _param(self) -> float:
        return self.p

    def forward(self, x: Array) -> Array:
        return _rows(x)

    def vjp(self, x: Array, y: Array, dy: Array) -> Array:
        return _rows(dy)

    def jvp(self, x: Array, y: Array, dx: Array) -> Array:
        return _rows(dx)


BUILT_IN: dict[str, type[_BuiltIn]] = {
    layer.__name__: layer
    for layer in (
        Linear, Identity, Sigmoid, Tanh, ReLU, LeakyReLU, ELU, GELU, SiLU, Softplus, Softmax, LogSoftmax,
        Dropout,
    )
}  # fmt: skip


# ------------------------------------------------------------ layers of the user's own


class Guard:
    """A layer of your own behind checks, so that a wrong map is named instead of trusted."""

    def __init__(self, layer: Layer, in_features: int, out_features: int, dtype: str) -> None:
        # Weakly: the engine holds this guard, and Python's collector could not see that the layer, which may
        # know its network, belongs to it. The network itself keeps the layer.
        self._layer, self.name = ref(layer), type(layer).__name__
        self.inputs, self.outputs, self.dtype = in_features, out_features, np.dtype(dtype)
        if (owner := _OWNERS.get(id(layer))) and owner.layer is layer:
            raise ValueError(
                "[Sequential] a layer with parameters belongs to one network: "
                f"expected a new {self.name}, got one in use; copy.deepcopy makes another"
            )
        self._check_parameters()
        self.takes_dparams = _takes_four(layer.jvp)
        if self.params:
            _OWNERS[id(layer)] = self

    @property
    def layer(self) -> Layer:
        layer = self._layer()
        if layer is None:
            raise ReferenceError(
                f"[{self.name}] the layer must be there: expected one, got none; keep its network"
            )
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_layer": ref(state["_layer"])})

    @property
    def params(self) -> dict[str, Array]:
        """The user's own dict; the engine puts copies of what it trains there, and insists on them."""
        return getattr(self.layer, "params", None) or {}

    def _check_parameters(self) -> None:
        """Afterwards, values are in the network's dtype."""
        params = getattr(self.layer, "params", None)
        if params is None:
            return
        if not isinstance(params, dict):
            raise TypeError(
                f"[{self.name}] params must be a dict: expected {{name: array}}, got {short(params)}"
            )
        arrays = {}
        for name, value in params.items():
            if not isinstance(name, str) or not name.isprintable() or not name or "." in name:
                raise ValueError(
                    f"[{self.name}] params must have plain names: "
                    f"expected text without a dot, got {short(name)}"
                )
            array = np.asarray(value)
            if array.dtype.kind not in "biuf":
                raise TypeError(
                    f"[{self.name}] params[{name!r}] must hold real numbers: "
                    f"expected floats, got {array.dtype}"
                )
            if array.size == 0 or not np.isfinite(array).all():
                raise ValueError(
                    f"[{self.name}] params[{name!r}] must hold finite numbers: expected at least one, "
                    f"got {short(array)}"
                )
            arrays[name] = np.asarray(array, dtype=self.dtype, order="C")
        params.update(arrays)

    def forward(self, x: Array) -> Array:
        return self._matrix("forward", self.layer.forward(x), (len(x), self.outputs))

    def vjp(self, x: Array, y: Array, dy: Array) -> Array | tuple[Array, dict[str, Array]]:
        return self._gradients("vjp", self.layer.vjp(x, y, dy), x)

    # What only derivatives ask for. A map is given copies where its arrays are needed again.

    def jvp(self, x: Array, y: Array, dx: Array | None, dparams: dict[str, Array] | None = None) -> Array:
        still = np.zeros_like(x) if dx is None else dx
        if dparams is not None and self.takes_dparams:
            return self._matrix("jvp", self.layer.jvp(x, y, still, dparams), y.shape)  # type: ignore[call-arg]
        dy = np.zeros_like(y)
        if dx is not None:
            dy = dy + self._matrix("jvp", self.layer.jvp(x.copy(), y, dx), y.shape)
        if not dparams:
            return dy

        def output(layer: Layer) -> Array:
            return self._matrix("forward", layer.forward(x.copy()), y.shape)

        return dy + self._along_parameters(output, dparams)

    def vjp_jvp(
        self, x: Array, y: Array, dy: Array, dx: Array | None, ddy: Array, dparams: dict[str, Array] | None
    ) -> Array | tuple[Array, dict[str, Array]]:
        own = getattr(self.layer, "vjp_jvp", None)
        if own is not None:
            still = np.zeros_like(x) if dx is None else dx
            return self._gradients("vjp_jvp", own(x, y, dy, still, ddy, dparams), x)

        def cotangents(layer: Layer, x: Array, dy: Array) -> Array:  # all that vjp gives, in one vector
            answer = self._gradients("vjp", layer.vjp(x, layer.forward(x.copy()), dy.copy()), x)
            parts = [answer[0], *answer[1].values()] if isinstance(answer, tuple) else [answer]
            return np.concatenate([part.ravel() for part in parts])

        bends = [] if dx is None else [self._along_rows(partial(cotangents, self.layer), x, dx, dy)]
        if dparams:
            bends.append(self._along_parameters(lambda layer: cotangents(layer, x.copy(), dy), dparams))
        straight = self.vjp(x, y, ddy)  # the part that is linear in the cotangents' tangents
        if not bends:
            return straight
        bent = sum(bends[1:], bends[0])
        if not isinstance(straight, tuple):
            return straight + bent.reshape(x.shape)
        ddx, grads = straight
        pieces = np.split(bent, np.cumsum([x.size, *(grad.size for grad in grads.values())])[:-1])
        named = zip(grads, pieces[1:], strict=True)
        return ddx + pieces[0].reshape(x.shape), {k: grads[k] + d.reshape(grads[k].shape) for k, d in named}

    def jvp_jvp(self, x: Array, y: Array, dx: Array, ddx: Array) -> Array:
        def tangent(x: Array, dx: Array) -> Array:
            return self._matrix("jvp", self.layer.jvp(x, self.layer.forward(x.copy()), dx.copy()), y.shape)

        bent = self._along_rows(tangent, x, dx, dx)
        return self._matrix("jvp", self.layer.jvp(x, y, ddx), y.shape) + bent

    def _along_rows(self, f: Callable[[Array, Array], Array], x: Array, dx: Array, v: Array) -> Array:
        """The central difference along dx of f(x, v), linear in the rows of v; each row has its own step."""
        with np.errstate(over="ignore", invalid="ignore"):  # of such rows alone
            h = self._step(1 + np.abs(x).max(axis=1, initial=0), np.abs(dx).max(axis=1, initial=0))[:, None]
            ahead, behind, share = x + h * dx, x - h * dx, v / (2 * h)
        return self._less(f(ahead, share.copy()), f(behind, share))

    def _along_parameters(self, f: Callable[[Layer], Array], dparams: dict[str, Array]) -> Array:
        """The central difference of f(layer) along dparams; the layer itself stays as it is."""
        most = [max(float(np.abs(p[name]).max()) for name in dparams) for p in (self.params, dparams)]
        h = self._step(1 + most[0], most[1])

        def at(step: Array) -> Array:
            layer, moved = copy(self.layer), {k: self.params[k] + step * move for k, move in dparams.items()}
            layer.params = {**self.params, **moved}  # type: ignore[attr-defined]
            return f(layer)

        return np.asarray(self._less(at(h), at(-h)) / (2 * h))

    def _step(self, size: Any, moved: Any) -> Array:
        """∛eps in units of what is moved: truncation errs by its square, rounding by eps over it."""
        return np.asarray(
            np.cbrt(np.finfo(self.dtype).eps) * size / np.where(moved > 0, moved, 1), self.dtype
        )

    def _less(self, ahead: Array, behind: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return np.asarray(ahead - behind, self.dtype)

    def _gradients(self, which: str, answer: Any, x: Array) -> Array | tuple[Array, dict[str, Array]]:
        """What vjp or vjp_jvp gave back, checked."""
        if not self.params:
            return self._matrix(which, answer, x.shape)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise ValueError(
                f"[{self.name}] {which} of a layer with parameters: expected (dx, {{name: gradient}}), "
                f"got {type(answer).__name__}"
            )
        dx, grads = answer
        if grads.keys() != self.params.keys():
            raise ValueError(
                f"[{self.name}] {which}: expected gradients of {listed(self.params)}, "
                f"got {listed(grads) or 'none'}"
            )
        return self._matrix(which, dx, x.shape), {
            name: self._matrix(f"{which} of parameter {name!r}", grads[name], value.shape)
            for name, value in self.params.items()
        }

    def _matrix(self, which: str, value: object, shape: tuple[int, ...]) -> Array:
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors that want a gradient
            raise ValueError(
                f"[{self.name}] {which}: expected shape {shape}, got {type(value).__name__} ({error})"
            ) from None
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"[{self.name}] {which}: expected real numbers of shape {shape}, got dtype {array.dtype}"
            )
        if array.shape != shape:
            raise ValueError(f"[{self.name}] {which}: expected shape {shape}, got {array.shape}")
        return np.require(array, self.dtype, ["C", "A"])


def _takes_four(jvp: Callable[..., Array]) -> bool:
    """Whether a layer's jvp takes (x, y, dx, dparams)."""
    from inspect import signature

    try:
        signature(jvp).bind(*range(4))
    except (TypeError, ValueError):
        return False
    return True


_OWNERS: WeakValueDictionary[int, Guard] = WeakValueDictionary()  # by the layer's id
