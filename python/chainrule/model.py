# SPDX-License-Identifier: MIT
"""Sequential: a chain of layers with its weights, and what can be done with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import batch, calculus, devices, losses, training, wholebatch
from .checks import converted, flag, listed, one_of, real_array, short, undefined, whole
from .display import TextTable, html_table, text_table
from .layers import BUILT_IN, Dropout, Guard, Identity, Layer, Linear, _BuiltIn, initial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .optim import Optimizer

    Array = NDArray[Any]


class Sequential:
    """A chain of layers f = gᴸ(… g¹(x)), with weights drawn from `seed`.

    φ⁰ = X, φˡ = gˡ(φˡ⁻¹), f = φᴸ

    Shapes: X (B, I), f (B, O); B is any number of rows, and a row's output does not depend on the others.
    Parameters are named as in PyTorch: "0.weight" is the weight of the layer number 0.

    Args:
        layers: Linear, activations, Dropout, or layers of your own (see Layer).
        seed: of the first weights; the same seed gives the same weights on every machine.
        dtype: "float32" or "float64", of weights, activations and results; "bfloat16" for matrix products of
            operands rounded to 8 bits, with sums, weights and results in float32: twice as fast on large
            networks where the processor has the instruction (AVX512_BF16), slower than float32 elsewhere;
            "tf32", on GPUs only, for products of operands rounded to 11 bits.
        device: "cpu"; "cuda", "cuda:1" and so on for an NVIDIA GPU; "auto" for one if it is usable, else the
            CPU. On a GPU, layers and losses of your own are errors.

    Raises: TypeError for what is no layer; ValueError for widths that do not fit or a missing device.

    Example:
        >>> import numpy as np, chainrule as cr
        >>> net = cr.Sequential(cr.Linear(2, 3), cr.Tanh(), cr.Linear(3, 1), seed=0)
        >>> net
        Sequential(Linear(2, 3), Tanh(), Linear(3, 1))
        >>> net(np.zeros((5, 2))).shape
        (5, 1)
    """

    layers: tuple[Layer, ...]
    in_features: int
    out_features: int
    dtype: str
    array_dtype: str  # of weights and results: float32 where dtype is bfloat16
    seed: int
    device: str

    def __init__(self, *layers: Layer, seed: int = 0, dtype: Any = "float32", device: str = "cpu") -> None:
        seed = whole("Sequential", "seed", seed, 0, 2**64 - 1)
        device = devices.resolve("Sequential", device)
        self._build(layers, seed, dtype_name(dtype, device), device)
        with _memory_for(layers, device):
            for index, layer in enumerate(layers):
                if isinstance(layer, Linear):
                    after = _activation_after(layers, index)
                    weight, bias = initial(layer, after, seed, index, self.array_dtype)
                    self._put({f"{index}.weight": weight} | ({f"{index}.bias": bias} if layer.bias else {}))

    def _build(self, layers: Sequence[Layer], seed: int, dtype: str, device: str) -> None:
        users = {*vars(self)}  # attributes of a subclass; later ones are the user's as well
        widths = _widths(layers)
        self.array_dtype = array_dtype(dtype)
        rows = [
            _row(layer, i, o, self.array_dtype, device)
            for layer, i, o in zip(layers, widths, widths[1:], strict=False)
        ]
        self.layers, self.seed, self.dtype, self.device = tuple(layers), seed, dtype, device
        self.in_features, self.out_features, self._widths = widths[0], widths[-1], widths
        self._engine = devices.engine(dtype, device)
        with _memory_for(layers, device):
            self._core: Any = self._engine.network(rows)
        self._places = {f"{layer}.{name}": k for k, (layer, name, _) in enumerate(self._core.parameters)}
        self._steppers: dict[tuple[int, ...], training.Stepper] = {}
        self._predict_as_is: Callable[[Any], Array | None] = self._core.predict_as_is
        self._made = {"_made", *(vars(self).keys() - users)}

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __repr__(self) -> str:
        parts = [repr(layer) for layer in self.layers]
        parts += [f"seed={self.seed}"] if self.seed else []
        parts += [f"dtype={self.dtype!r}"] if self.dtype != "float32" else []
        parts += [f"device={self.device!r}"] if self.device != "cpu" else []
        line = f"Sequential({', '.join(parts)})"
        return line if len(line) <= 100 else "Sequential(\n    " + ",\n    ".join(parts) + ",\n)"

    # -------------------------------------------------------- forward

    def predict(self, X: Any) -> Any:
        """The outputs f for rows X; dropout is off, and a row with NaN spoils its own output only.

        Shapes: X (B, I) to f (B, O), B may be 0; a single row (I,) to (O,).
        On a GPU: rows X that lie there, of PyTorch, JAX or CuPy, give outputs that stay there; both sides
            speak DLPack, as in torch.from_dlpack(net.predict(X)).
        Raises: TypeError or ValueError for what is no such matrix.

        Example:
            >>> import chainrule as cr
            >>> cr.Sequential(cr.Linear(2, 1, init="zeros")).predict([1.0, 2.0])
            array([0.], dtype=float32)
        """
        f = self._predict_as_is(X)
        if f is not None:
            return f
        if self.device != "cpu" and devices.on_gpu(X):
            return devices.predict(self._core, X, self.in_features, self.array_dtype, self.device)
        array = real_array("predict", "X", X)
        if array.ndim == 1 and len(array) == self.in_features:
            return np.asarray(self._core.predict(self._matrix("predict", array[None, :]))[0])
        return np.asarray(self._core.predict(self._matrix("predict", array)))

    __call__ = predict

    def _matrix(self, op: str, X: Any) -> Array:
        return batch.as_matrix(op, X, self.in_features, self.array_dtype, finite=False)

    def trace(self, X: Any) -> calculus.Trace:
        """Every activation on the way from X to f; its `backward` adds every derivative on the way back.

        trace.phi[l] = φˡ, trace.z[l] the output of the Linear layer l; after trace.backward(∂L/∂f):
        trace.dphi[l] = ∂L/∂φˡ, and trace.grads by name

        Example:
            >>> import chainrule as cr
            >>> [phi.shape for phi in cr.mlp([2, 3, 1]).trace([[1.0, 2.0]]).phi]
            [(1, 2), (1, 3), (1, 3), (1, 1)]
        """
        matrix = self._matrix("trace", X)
        changes = self._core.changes  # before, for another thread may train
        return calculus.Trace(self, changes, [matrix.copy(), *self._core.trace(matrix)])

    # -------------------------------------------------------- training

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        loss: Any,
        optimizer: Any = "adam",
        batch_size: int | None = None,
        epochs: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        validation_data: Any = None,
        validation_split: float = 0.0,
        callbacks: Any = (),
        verbose: Any = "auto",
        sample_weight: Any = None,
        class_weight: Any = None,
        schedule: Any = None,
        l1: float = 0.0,
        l2: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_example_norm: float | None = None,
        dy: Any = None,
        dy_weight: float = 1.0,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> training.History:
        """Train the network on rows X (n, I) and targets y.

        L = mean loss + l1 Σ|w| + ½ l2 Σw², over the weights w of Linear layers; with slopes dy also
        + dy_weight · mean ½ Σ (∂f_o/∂x_i − dy_oi)² over outputs o and inputs i (Sobolev training)

        Args:
            loss: a name ("least_squares", "mse", "mae", "huber", "pinball", "poisson", "gaussian_nll",
                "logistic" alias "bce", "cross_entropy"), a loss object, or your own callable (f, y) ->
                (value, ∂L/∂f).
            optimizer: a name ("sgd", "adam", "adamw", "rmsprop", "lbfgs", "levenberg_marquardt") or an
                object, as cr.GD(lr), which has a name on the command line only; an object keeps its state for
                the next fit, a name starts afresh.
            batch_size: rows per update; the last batch of an epoch takes what is left. None is 32, and all
                rows where the optimizer takes them all (GD, LBFGS, LevenbergMarquardt).
            epochs: how often to go through all rows; LBFGS and LevenbergMarquardt take one step an epoch, and
                fewer epochs where they have converged.
            shuffle: whether the rows come in a new order, drawn from `seed`, in every epoch.
            validation_data: (X, y) or (X, y, sample_weight) for history["val_loss"].
            validation_split: the last fraction of the rows, cut off before shuffling, instead.
            callbacks: a list of objects with any of on_train_begin(net), on_epoch_end(epoch, logs) and
                on_train_end(net), or callables f(epoch, logs), epochs from 0; True from one of them stops.
            verbose: 0 silent, 1 one progress display, 2 a line per epoch; "auto" is 1 on a terminal and in a
                notebook, once the fit has taken a second, else 0.
            sample_weight: (n,) numbers ≥ 0.
            class_weight: {label: weight}, or "balanced" for n / (classes · count), where targets are labels:
                one whole number per row, or rows of zeros and a one.
            schedule: StepLR, ExponentialLR, CosineAnnealingLR, WarmupLR or ReduceLROnPlateau.
            clip_value, clip_norm: limits for every element, and for the norm, of the gradient; in this order.
            clip_example_norm: limit for the norm of each example's own gradient of the loss, in all
                parameters; what is longer is scaled down to it, before sample weights and the mean. A loss of
                your own must give values (B,), a layer of your own must have no params.
            dy: slopes ∂y/∂x, (n, O, I), or (n, I) for one output. The mean is the loss's: weighted by
                `sample_weight`, a sum for reduction="sum". Not with dropout or bfloat16; in a layer of your
                own without vjp_jvp, second derivatives are differences. history["loss"] counts this part,
                history["val_loss"] is the plain loss. Czarnecki et al., "Sobolev Training", NIPS 2017.
            dy_weight: ≥ 0, how much the slopes count beside the values.
            checkpoint: a `.safetensors` file to keep what training has come to, written between epochs, once
                a second at most and for some 5 % of the time at most, and at the end. If it is there already,
                `fit` goes on from it, to the bits of a fit that nothing interrupted: give it the same data
                and arguments, or more epochs; one that a callback has stopped, or that has converged, has
                ended. A second fit wants a file of its own. `cr.load` reads the network in it, as of the last
                epoch. Callbacks of your own see the new epochs only; what a layer of your own keeps beside
                its params begins anew.

        Returns: a History of "loss" (mean over the epoch's batches as they come, or for reduction="sum" their
            sum, penalties with each; of LBFGS and LevenbergMarquardt after each step), "val_loss" and "lr".

        Raises: TypeError or ValueError for bad arguments, before anything changes; FloatingPointError if the
            loss does not stay finite, with the weights put back. Ctrl-C and the errors of callbacks, and of
            layers and losses of your own, come through and leave the weights as trained so far. OSError for a
            checkpoint's folder; a disk that refuses a later file is a RuntimeWarning, and training goes on.

        Example:
            >>> import numpy as np, chainrule as cr
            >>> X = np.linspace(-1, 1, 50)[:, None]
            >>> net = cr.mlp([1, 16, 1], activation="tanh", seed=0)
            >>> history = net.fit(X, X[:, 0] ** 2, loss="mse", optimizer=cr.Adam(lr=0.01), epochs=200)
            >>> bool(history["loss"][-1] < 0.01)
            True
        """
        plan = training.plan(
            self, X, y, loss=loss, optimizer=optimizer, batch_size=batch_size, epochs=epochs, shuffle=shuffle,
            seed=seed, validation_data=validation_data, validation_split=validation_split,
            callbacks=callbacks, verbose=verbose, sample_weight=sample_weight, class_weight=class_weight,
            schedule=schedule, l1=l1, l2=l2, clip_value=clip_value, clip_norm=clip_norm,
            clip_example_norm=clip_example_norm, dy=dy, dy_weight=dy_weight,
        )  # fmt: skip
        run = wholebatch.RUNS.get(type(plan.optimizer), training.EngineRun)(self, plan)
        if checkpoint is not None:
            from .checkpoint import Checkpoint

            run.keeper = Checkpoint(checkpoint, self, run)
        return run.run()

    def train_step(
        self, X: Any, y: Any, *, loss: Any, optimizer: Optimizer, sample_weight: Any = None
    ) -> float:
        """One update on exactly these rows; the loss before it.

        For loops of your own: make loss and optimizer once, before the loop. A loss that is not finite is
        returned, not raised.

        Example:
            >>> import chainrule as cr
            >>> net, opt = cr.Sequential(cr.Linear(1, 1, init="zeros")), cr.SGD(lr=0.5)
            >>> [net.train_step([[1.0]], [1.0], loss="least_squares", optimizer=opt) for _ in range(2)]
            [0.5, 0.0]
        """
        stepper = self._steppers.get((id(loss), id(optimizer)))
        if stepper is None:
            stepper = self._stepper(loss, optimizer)
        if sample_weight is None:
            value = stepper.as_is(X, y, optimizer.lr)
            if value is not None:
                return value
        return stepper.step(self, X, y, sample_weight)

    def _stepper(self, loss: Any, optimizer: Any) -> training.Stepper:
        """By the loss and the optimizer that it keeps alive; a method is a new object at each look."""
        method = isinstance(loss, MethodType)
        key = (id(loss.__self__), id(loss.__func__), id(optimizer)) if method else (id(loss), id(optimizer))
        if key not in self._steppers:
            if len(self._steppers) >= 8:  # somebody makes a new loss for every step: keep none for ever
                self._steppers.clear()
            self._steppers[key] = training.Stepper(self, loss, optimizer)
        return self._steppers[key]

    def value_and_grad(
        self,
        X: Any,
        y: Any,
        *,
        loss: Any,
        sample_weight: Any = None,
        dy: Any = None,
        dy_weight: float = 1.0,
    ) -> tuple[float, dict[str, Array]]:
        """The loss and its gradient in every parameter, keyed like `state_dict`; dropout is off.

        With slopes dy, of what `fit` makes small: loss + dy_weight · mean ½ Σ (∂f_o/∂x_i − dy_oi)².

        Shapes: a gradient ∂L/∂W has the shape of W.

        Example:
            >>> import chainrule as cr
            >>> net = cr.Sequential(cr.Linear(1, 1, init="zeros"))
            >>> value, grads = net.value_and_grad([[2.0]], [1.0], loss="least_squares")
            >>> value, grads["0.weight"]
            (0.5, array([[-2.]], dtype=float32))
        """
        plain = sample_weight is None and dy is None and dy_weight == 1.0 and self.dtype == self.array_dtype
        built_in = calculus.known(loss) if plain else None
        if built_in is not None:
            engine, domain = built_in.reduced, built_in.loss.domain
            answer: tuple[float, dict[str, Array]] | None
            answer = self._core.value_and_grad_as_is(X, y, engine, domain)
            if answer is not None:
                return answer
        rule = losses.resolve("value_and_grad", loss)
        data = batch.take("value_and_grad", self, rule, X, y, sample_weight)
        data, dy_weight = batch.with_slopes("value_and_grad", self, data, dy, dy_weight)
        engine = rule.engine(data.flat, data.weight is not None)
        value, grads = self._core.value_and_grad(data.X, data.y, data.weight, engine, data.dy, dy_weight)
        return value, dict(zip(self._places, grads, strict=True))

    def evaluate(self, X: Any, y: Any, *, loss: Any, sample_weight: Any = None) -> float:
        """The loss over all rows, without penalties; dropout is off.

        Example:
            >>> import chainrule as cr
            >>> cr.Sequential(cr.Linear(1, 1, init="zeros")).evaluate([[2.0]], [3.0], loss="mse")
            9.0
        """
        return training.evaluate(self, X, y, loss=loss, sample_weight=sample_weight)

    # -------------------------------------------------------- weights

    @property
    def num_parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(math.prod(shape) for _, _, shape in self._core.parameters)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name; a Linear layer's weight is (O, I), as in PyTorch.

        While another thread trains, they may be of different steps, here and in `save`: ask in a callback, or
        have `fit` write a checkpoint.

        Example:
            >>> import chainrule as cr
            >>> list(cr.mlp([2, 3, 1]).state_dict())
            ['0.weight', '0.bias', '2.weight', '2.bias']
        """
        return {name: self._core.get_parameter(k) for name, k in self._places.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> tuple[list[str], list[str]]:
        """Take over parameters by name; all are checked before any is changed.

        Args:
            strict: whether names that are missing or too many are errors.

        Returns: the names that were missing, and those that were too many.

        Raises: TypeError or ValueError that lists all names and shapes that do not fit; RuntimeError while
            another thread trains the network. Nothing has changed then.

        Example:
            >>> import chainrule as cr
            >>> net, other = cr.mlp([2, 3, 1], seed=1), cr.mlp([2, 3, 1], seed=2)
            >>> net.load_state_dict(other.state_dict())
            ([], [])
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"[load_state_dict] state must be a dict: expected {{name: array}}, got {short(state)}"
            )
        missing = [name for name in self._places if name not in state]
        unexpected = [name for name in state if name not in self._places]
        arrays = {
            name: real_array("load_state_dict", name, state[name]) for name in self._places if name in state
        }
        wrong = [
            f"{name} of shape {arrays[name].shape} instead of {shape}"
            for name, shape in self._shapes().items()
            if name in arrays and arrays[name].shape != shape
        ]
        if flag("load_state_dict", "strict", strict):
            wrong += [f"missing {listed(missing)}"] if missing else []
            wrong += [f"unexpected {listed(unexpected)}"] if unexpected else []
        if wrong:
            raise ValueError(
                "[load_state_dict] state must fit the network: "
                f"expected its names and shapes, got {'; '.join(wrong)}"
            )
        self._put(arrays)
        return missing, unexpected

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._core.parameters[k][2]) for name, k in self._places.items()}

    def _put(self, arrays: Mapping[str, Array]) -> None:
        self._core.set_parameters({
            self._places[name]: converted("load_state_dict", name, array, self.array_dtype)
            for name, array in arrays.items()
        })  # fmt: skip

    # -------------------------------------------------------- description, files, copies

    def config(self) -> dict[str, Any]:
        """The architecture as plain data: `Sequential.from_config` makes a network of it.

        Example:
            >>> import chainrule as cr
            >>> cr.Sequential(cr.Linear(2, 1), cr.LeakyReLU()).config()["layers"][1]
            {'class': 'LeakyReLU', 'negative_slope': 0.01}
        """
        return {
            "dtype": self.dtype,
            "seed": self.seed,
            "layers": [_layer_config(layer) for layer in self.layers],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], device: str = "cpu") -> Sequential:
        """A network of this architecture with first weights; layers of your own are found by class name.

        On the CPU a "tf32" network is a float32 one.

        Raises: TypeError or ValueError for what `config` does not give.

        Example:
            >>> import chainrule as cr
            >>> cr.Sequential.from_config(cr.mlp([2, 1]).config())
            Sequential(Linear(2, 1))
        """
        if not isinstance(config, Mapping) or not isinstance(config.get("layers"), (list, tuple)):
            raise ValueError(
                f"[from_config] config must hold layers: expected {{'layers': [...]}}, got {short(config)}"
            )
        layers = [_layer_from_config(layer) for layer in config["layers"]]
        device = devices.resolve("from_config", device)
        dtype = _dtype_on(device, config.get("dtype", "float32"))
        where = {} if device == "cpu" else {"device": device}  # subclasses need not know of devices
        return cls(*layers, seed=config.get("seed", 0), dtype=dtype, **where)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, str] | None = None) -> None:
        """Write weights and architecture to a `.safetensors` file, which `cr.load` reads.

        A name that ends in `.onnx` gives an ONNX model instead, for other runtimes: input "x", output "f"; of
        float64, onnxruntime lacks GELU, ELU, LeakyReLU and Softplus. One that ends in `.h` gives a C99 header
        that needs <math.h> alone: net_predict(x, f) for one row, if it is `net.h`.

        The file appears whole or not at all: it is written beside its final name, forced to disk, then
        renamed. One that was there before keeps its permissions; a symbolic link is followed.

        Args:
            extra: texts of your own to travel in the metadata.

        Raises: ValueError for another suffix, or a key of chainrule's in `extra`; TypeError for what is no
            path or text, for a layer of your own without config(), and for any in ONNX or C; ImportError for
            ONNX without the onnx package; OSError if the disk says no, with the old file untouched.

        Example:
            >>> import chainrule as cr, tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cr.mlp([2, 1]).save(f"{folder}/net.safetensors")
            ...     cr.load(f"{folder}/net.safetensors")
            Sequential(Linear(2, 1))
        """
        from .io import save

        save(self, path, extra)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "layers": self.layers, "seed": self.seed, "dtype": self.dtype,
            "weights": self.state_dict(),
            "attributes": {name: value for name, value in vars(self).items() if name not in self._made},
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state.get("device", "cpu")  # pickles are read where there may be no GPU
        self._build(state["layers"], state["seed"], _dtype_on(device, state["dtype"]), device)
        self._put(state["weights"])
        vars(self).update(state["attributes"])

    def __copy__(self) -> Sequential:
        return self._copy(self.device, {})  # one that shared its weights with another would be a trap

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequential:
        return self._copy(self.device, memo)

    def _copy(self, device: str, memo: dict[int, Any]) -> Sequential:
        from copy import deepcopy

        copy = memo[id(self)] = type(self).__new__(type(self))
        copy.__setstate__(deepcopy({**self.__getstate__(), "device": device}, memo))
        return copy

    def to(self, device: str) -> Sequential:
        """A copy of the network on another device: net = net.to("cuda"); this one stays where it is.

        Optimizers begin afresh with the copy. On the CPU a "tf32" network is a float32 one; files and pickles
        know of no device, they are loaded to the CPU.

        Raises: ValueError as Sequential does.

        Example:
            >>> import chainrule as cr
            >>> cr.mlp([2, 1]).to("cpu").device
            'cpu'
        """
        return self._copy(devices.resolve("to", device), {})

    def summary(self) -> TextTable:
        """A table of the layers: output shape, parameters, and multiplications per row in the forward pass.

        Returns: a str; a notebook shows it as an HTML table.

        Example:
            >>> import chainrule as cr
            >>> print(cr.mlp([64, 100, 10]).summary())
               layer              output  parameters  multiplies
            0  Linear(64, 100)  (B, 100)       6,500       6,400
            1  ReLU()           (B, 100)           0           0
            2  Linear(100, 10)   (B, 10)       1,010       1,000
               total                           7,510       7,400
        """
        counts = [0] * len(self.layers)
        for index, _, shape in self._core.parameters:
            counts[index] += math.prod(shape)
        rows = [("", "layer", "output", "parameters", "multiplies")]
        products = 0
        for index, layer in enumerate(self.layers):
            own = not isinstance(layer, _BuiltIn)  # the engine cannot count what happens in there
            product = layer.in_features * layer.out_features if isinstance(layer, Linear) else 0
            products += product
            output = f"(B, {self._widths[index + 1]})"
            rows.append(
                (str(index), repr(layer), output, f"{counts[index]:,}", "?" if own else f"{product:,}")
            )
        rows.append(("", "total", "", f"{sum(counts):,}", f"{products:,}"))
        return TextTable(text_table(rows, "rlrrr"), html_table(rows, "rlrrr", foot=True))


# ------------------------------------------------------------ construction


def mlp(
    sizes: Sequence[int],
    activation: str | Layer | None = "relu",
    output_activation: str | Layer | None = None,
    dropout: float = 0.0,
    init: str | None = None,
    seed: int = 0,
    dtype: Any = "float32",
    device: str = "cpu",
) -> Sequential:
    """A multilayer perceptron: Linear layers of these sizes, an activation after all but the last.

    Args:
        sizes: inputs, hidden widths, outputs.
        activation: a name such as "relu", "tanh", "gelu", or a layer; None for none.
        output_activation: the same, after the last Linear. Losses on logits want none.
        dropout: share of the hidden activations to drop in training.
        init: of all Linear layers, see Linear.
        dtype, device: as in Sequential.

    Raises: TypeError or ValueError as Sequential and Linear do.

    Example:
        >>> import chainrule as cr
        >>> cr.mlp([64, 100, 10], dropout=0.2)
        Sequential(Linear(64, 100), ReLU(), Dropout(p=0.2), Linear(100, 10))
    """
    several = hasattr(sizes, "__len__") and not isinstance(sizes, (str, bytes))
    if not several or len(sizes) < 2:
        raise (ValueError if several else TypeError)(
            f"[mlp] sizes must name inputs and outputs: expected at least two, got {short(sizes)}"
        )
    widths = [whole("mlp", f"sizes[{i}]", size) for i, size in enumerate(sizes)]
    drop = Dropout(dropout)
    layers: list[Layer] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        layers.append(Linear(inputs, outputs, init="auto" if init is None else init))
        layers += _activation(
            "output_activation" if last else "activation", output_activation if last else activation
        )
        layers += [drop] if drop.p and not last else []
    return Sequential(*layers, seed=seed, dtype=dtype, device=device)


_ACTIVATIONS = {layer.op: layer for layer in BUILT_IN.values() if layer not in (Linear, Dropout)}


def _activation(name: str, value: str | Layer | None) -> list[Layer]:
    if value is None:
        return []
    return [value if isinstance(value, Layer) else _ACTIVATIONS[one_of("mlp", name, value, _ACTIVATIONS)]()]


def _activation_after(layers: Sequence[Layer], index: int) -> Layer | None:
    following = (layer for layer in layers[index + 1 :] if not isinstance(layer, (Dropout, Identity)))
    return next(following, None)


def _widths(layers: Sequence[Any]) -> list[int]:
    """The width before every layer and after the last, proven to fit together."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, Layer):
            hint = f"{layer.__name__}(...), got the class" if isinstance(layer, type) else "a Layer, got"
            raise TypeError(f"[Sequential] layer {index} must be a layer: expected {hint} {short(layer)}")
    width = next(
        (whole("Sequential", "in_features", x.in_features) for x in layers if hasattr(x, "in_features")), None
    )
    if width is None:
        raise ValueError(
            "[Sequential] the number of inputs must be known: expected a Linear layer or an in_features, "
            f"got {len(layers)} layers without"
        )
    widths = [width]
    for index, layer in enumerate(layers):
        if getattr(layer, "in_features", width) != width:
            raise ValueError(
                f"[Sequential] layer {index}, {layer!r}, must fit the layers before it: "
                f"expected in_features={width}, got {layer.in_features}"
            )
        out = layer.out_features
        width = (
            out
            if isinstance(layer, Linear)
            else whole(type(layer).__name__, "out_features", out(width) if callable(out) else out)
        )
        widths.append(width)
    return widths


# More than any machine holds, and few enough for the engine's 64-bit sizes not to overflow.
_MOST_WEIGHTS = 2**48


@contextmanager
def _memory_for(layers: Sequence[Layer], device: str) -> Iterator[None]:
    """A block that asks for the weights' memory; MemoryError says how many there are, or what a GPU has."""
    count = sum((x.in_features + x.bias) * x.out_features for x in layers if isinstance(x, Linear))
    try:
        if count > _MOST_WEIGHTS:
            raise MemoryError
        yield
    except MemoryError:
        if device != "cpu" and count <= _MOST_WEIGHTS:
            raise
        raise MemoryError(
            f"[Sequential] the weights must fit in memory: expected fewer of them, got {count:,}"
        ) from None


def _row(
    layer: Layer, inputs: int, outputs: int, dtype: str, device: str
) -> tuple[str, int, int, float, bool, Any]:
    """A layer as the engine's constructor takes it."""
    if isinstance(layer, _BuiltIn):
        if type(layer) is not BUILT_IN.get(type(layer).__name__):
            raise TypeError(
                f"[{type(layer).__name__}] built-in layers are complete, their maps are the engine's: "
                "expected a subclass of cr.Layer, got one of theirs"
            )
        return layer.op, inputs, outputs, layer._param, isinstance(layer, Linear) and layer.bias, None
    for name in ("forward", "vjp"):
        if getattr(type(layer), name) is getattr(Layer, name):
            raise TypeError(undefined(layer, name))
    if device != "cpu":
        raise ValueError(
            f"[Sequential] a layer of your own runs on the CPU: expected built-in ones on device {device!r}, "
            f"got {type(layer).__name__}; use device='cpu'"
        )
    return "external", inputs, outputs, 0.0, False, Guard(layer, inputs, outputs, dtype)


def dtype_name(dtype: Any, device: str) -> str:
    """A network's dtype by its name; ValueError for one that there is not."""
    known = ("float32", "float64", "bfloat16", "tf32")
    if isinstance(dtype, str) and dtype in known:  # NumPy has no bfloat16
        if dtype == "tf32" and device == "cpu":
            raise ValueError(
                "[Sequential] dtype 'tf32' is of GPUs: expected device='cuda', got 'cpu'; use 'float32'"
            )
        return dtype
    try:
        name = str(np.dtype(dtype).name)
    except TypeError:
        name = ""
    if dtype is None or name not in known:
        raise ValueError(
            f"[Sequential] dtype must be a float type: expected one of {listed(known)}, got {short(dtype)}"
        )
    return name


def array_dtype(dtype: str) -> str:
    """NumPy's name for the dtype of the arrays of a network of that dtype."""
    return "float32" if dtype in ("bfloat16", "tf32") else dtype


def _dtype_on(device: str, dtype: str) -> str:
    """The dtype there of a network that comes from elsewhere."""
    return "float32" if device == "cpu" and dtype == "tf32" else dtype


def _layer_config(layer: Layer) -> dict[str, Any]:
    kind = type(layer).__name__
    if not hasattr(layer, "config"):
        raise TypeError(
            f"[save] layer {kind} must describe itself: expected a method config() that gives its "
            "constructor's arguments as a dict, got none"
        )
    config = layer.config()
    if not isinstance(config, dict) or "class" in config or (kind in BUILT_IN) != isinstance(layer, _BuiltIn):
        raise TypeError(
            f"[save] config() of {kind}: expected a dict of the arguments without 'class', for a class whose "
            f"name is not a built-in layer's, got {short(config)}"
        )
    return {"class": kind, **config}


def _layer_from_config(config: Any) -> Layer:
    if not isinstance(config, Mapping) or not isinstance(config.get("class"), str):
        raise ValueError(
            f"[from_config] a layer must name its class: expected {{'class': ...}}, got {short(config)}"
        )
    from inspect import signature

    arguments = {name: value for name, value in config.items() if name != "class"}
    name = config["class"]
    known: dict[str, Any] = {**_own_layers(Layer), **BUILT_IN}
    if name not in known:
        raise ValueError(
            f"[from_config] class must be a known layer: expected one of {listed(known)}, got {name!r}; "
            "import the module that defines it first"
        )
    try:
        layer: Layer = known[name](**arguments)
    except TypeError as error:
        if name not in BUILT_IN:
            raise
        takes = listed(signature(known[name]).parameters) or "none"
        raise ValueError(
            f"[from_config] arguments of {name} must be its constructor's: "
            f"expected {takes}, got {listed(arguments)} ({error})"
        ) from None
    return layer


def _own_layers(base: type[Layer]) -> dict[str, type[Layer]]:
    """The classes below `base` that can be made from a config."""
    found: dict[str, type[Layer]] = {}
    for kind in base.__subclasses__():
        found |= _own_layers(kind)
        if hasattr(kind, "config") and not issubclass(kind, _BuiltIn):
            found[kind.__name__] = kind
    return found
