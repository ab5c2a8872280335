# SPDX-License-Identifier: MIT
"""scikit-learn's MLPClassifier and MLPRegressor on this engine: change the import, keep the rest.

Arguments, defaults, penalty, stopping, first weights and the rows held out are scikit-learn's, for the same
`random_state`; so are the losses, to rounding, where nothing is shuffled. Different on purpose:

- Rows are shuffled by our generator, and alpha counts alike in every batch, the smaller last one included.
- `loss_` for "poisson" lacks a constant, e^f − y f; of weighted rows it is the mean by weight; over several
  outputs it is a mean of the penalty, too.
- A warm fit with early_stopping begins anew with its best score.
- With momentum, a learning rate that falls counts for all of the velocity at once.
- solver="lbfgs" is our L-BFGS: no max_fun, a loss_curve_, and early_stopping works with it, too.
- Sparse rows are made dense: all of them to train, in pieces to predict.
- `coefs_` and `intercepts_` are copies to read; `network_` is what is trained, and has load_state_dict.
- Training that diverges is a FloatingPointError, and a fit that fails leaves the estimator as it was.
"""

from __future__ import annotations

import math
from copy import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import layers, losses, model, optim
from .checks import flag, one_of, real, short, whole
from .display import warn

try:
    from scipy.special import expit, log_expit, log_softmax, softmax
    from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelEncoder
    from sklearn.utils import check_random_state, compute_class_weight, compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets, type_of_target, unique_labels
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError(
        "[chainrule.sklearn] these estimators stand on scikit-learn: expected version 1.6 or newer, "
        f"got none ({error}); pip install -U scikit-learn"
    ) from error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["MLPClassifier", "MLPRegressor"]

_PIECE = 1 << 24  # numbers of sparse rows that predict makes dense at once


class _Rows(NamedTuple):
    """Rows to train on or to look at; y as the network's loss takes it, once they are checked."""

    X: Any
    y: Any
    weight: Any = None

    def dense(self) -> _Rows:
        return self._replace(X=self.X.toarray()) if hasattr(self.X, "toarray") else self


class _Before:
    """An estimator as it was, to put it back if a fit fails."""

    def __init__(self, estimator: _MLP, goes_on: bool) -> None:
        self.attributes = dict(estimator.__dict__)
        self.network = estimator.network_ if goes_on else None
        self.optimizer = getattr(estimator, "_optimizer", None) if goes_on else None
        if self.network is not None:
            self.weights = self.network._core.snapshot()
        if self.optimizer is not None:
            self.moments = self.optimizer.state_dict(self.network)
            self.lr = getattr(self.optimizer, "lr", None)  # LevenbergMarquardt has none

    def put_back(self, estimator: _MLP) -> None:
        if self.network is not None:
            self.network._core.restore(self.weights)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(self.network, self.moments)
            if self.lr is not None:
                self.optimizer.lr = self.lr
        estimator.__dict__.clear()
        estimator.__dict__.update(self.attributes)


class _Watch:
    """scikit-learn's rule of stopping and of the learning rate, asked after every epoch."""

    def __init__(self, estimator: _MLP, rows: int, validation: _Rows | None, best_loss: float | None) -> None:
        self.estimator, self.optimizer = estimator, estimator._optimizer
        self.rows, self.validation = rows, validation
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.weights: Any = None  # of the best score
        self.best = -math.inf if best_loss is None or validation else -best_loss  # score, or negative loss
        self.waited = 0  # epochs for something better than the best by tol

    def on_train_begin(self, net: Any) -> None:
        self.net = net

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> bool:
        self.losses.append(logs["loss"] * self.estimator._scale())
        value = -self.losses[-1]
        if self.validation is not None:
            f = self.net.predict(self.validation.X)
            value = self.estimator._score(f, *self.validation[1:])
            self.scores.append(value)
        self.waited = 0 if value >= self.best + self.estimator.tol else self.waited + 1
        if value > self.best:
            self.best = value
            self.weights = None if self.validation is None else self.net._core.snapshot()
        return self._ends()

    def _ends(self) -> bool:
        asked, optimizer = self.estimator, self.optimizer
        kind = asked.learning_rate if asked.solver == "sgd" else "constant"
        if kind == "invscaling":
            seen = asked.t_ + self.rows * len(self.losses)
            optimizer.lr = asked._rate() / (seen + 1) ** asked.power_t
        if self.waited <= asked.n_iter_no_change:
            return False
        if kind == "adaptive" and optimizer.lr > 1e-6 * asked._averaged():
            optimizer.lr /= 5
            self.waited = 0
            return False
        # The optimizers that take all rows at once have a rule of their own for their loss.
        return self.validation is not None or not isinstance(optimizer, optim.WholeBatch)

    def on_train_end(self, net: Any) -> None:
        if self.weights is not None:
            net._core.restore(self.weights)


class _MLP(MultiOutputMixin, BaseEstimator):
    """What both estimators are made of."""

    network_: model.Sequential
    loss_curve_: list[float]
    best_loss_: float | None
    n_outputs_: int
    t_: int
    _optimizer: optim.Optimizer
    _asked: str  # the solver that it was made for

    def _keep(self, arguments: dict[str, Any]) -> None:
        """The constructor's arguments, untouched until `fit`, as scikit-learn wants it."""
        self.__dict__.update({name: value for name, value in arguments.items() if name != "self"})

    # ------------------------------------------------------------ training

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, *,
        X_val: Any = None, y_val: Any = None, sample_weight_val: Any = None, callbacks: Any = (),
    ) -> Any:  # fmt: skip
        """Train on rows X (n, features) and targets y (n,) or (n, outputs).

        Args:
            sample_weight: (n,) numbers ≥ 0.
            X_val, y_val, sample_weight_val: what early_stopping looks at, in place of a part of X.
            callbacks: as in Sequential.fit.

        Returns: the estimator itself.
        Raises: TypeError or ValueError for bad arguments; FloatingPointError if training diverges.
        """
        given = [part is not None for part in (X_val, y_val, sample_weight_val)]
        if any(given) and not (all(given[:2]) and self.early_stopping):
            raise ValueError(
                f"[{type(self).__name__}] validation rows are for early stopping: expected X_val, y_val and "
                f"early_stopping=True, got early_stopping={self.early_stopping!r} and "
                f"{'X_val' if given[0] else 'no X_val'}"
            )
        validation = _Rows(X_val, y_val, sample_weight_val) if any(given) else None
        return self._train(_Rows(X, y, sample_weight), validation, callbacks)

    def _train(
        self, rows: _Rows, validation: _Rows | None = None, callbacks: Any = (), classes: Any = None,
        incremental: bool = False,
    ) -> Any:  # fmt: skip
        goes_on = hasattr(self, "network_") and (self.warm_start or incremental)
        before = _Before(self, goes_on)
        try:
            self._check(incremental)
            random = check_random_state(self.random_state)
            rows = self._checked(rows, classes, first=not goes_on)
            self._begin(rows, random, goes_on, incremental)
            if validation is not None:
                validation = self._checked(validation).dense()
            elif self.early_stopping:
                rows, validation = self._hold_out(rows, random)
            watch = _Watch(self, rows.X.shape[0], validation, self.best_loss_ if goes_on else None)
            watch.waited = self._waited if goes_on and incremental else 0
            most = None if incremental else self.max_iter
            warning = self._epochs(most, rows.dense(), watch, callbacks, random)
        except BaseException:
            before.put_back(self)
            raise
        if warning is not None:  # at last: where it is an error, what is trained is kept
            warn(*warning, 3)
        return self

    def _begin(self, rows: _Rows, random: Any, goes_on: bool, incremental: bool) -> None:
        """Network and optimizer: new ones, or those there are."""
        form = self._form_asked()
        if not goes_on:
            self.network_, self.t_, self.loss_curve_, self._form = self._network(rows.X, random), 0, [], form
        elif form != self._form:
            raise ValueError(
                f"[{type(self).__name__}] a network that is trained further keeps its form: "
                f"expected {self._form}, got {form}; or fit without warm_start"
            )
        if not (goes_on and incremental and repr(self.solver) == self._asked):
            self._optimizer, self._asked = self._solver(), repr(self.solver)

    def _form_asked(self) -> str:
        """What makes the form of the network, in words that are the same for the same form."""
        activation = "sigmoid" if self.activation == "logistic" else self.activation
        dtype = self.dtype if self.dtype is None else model.dtype_name(self.dtype, self.device)
        return (
            f"hidden_layer_sizes={self._hidden()}, activation={activation!r}, dropout={self.dropout!r}, "
            f"dtype={dtype!r}, device={self.device!r}"
        )

    def _hidden(self) -> list[int]:
        op, sizes = type(self).__name__, self.hidden_layer_sizes
        return [whole(op, "hidden_layer_sizes", n) for n in (sizes if np.iterable(sizes) else [sizes])]

    def _epochs(
        self, most: int | None, rows: _Rows, watch: _Watch, callbacks: Any, random: Any
    ) -> tuple[str, type[Warning]] | None:
        """Train until the loss has settled, for None one epoch whatever becomes of it; a warning, if due."""
        warning: tuple[str, type[Warning]] | None = None
        callbacks = () if callbacks is None else callbacks
        seed = int(random.randint(np.iinfo(np.int32).max)) + self.t_  # not the same dropout in every warm fit
        try:
            history = self.network_.fit(
                rows.X, rows.y, loss=self._loss(), optimizer=watch.optimizer, epochs=most or 1, seed=seed,
                callbacks=[watch, *callbacks] if isinstance(callbacks, (list, tuple)) else callbacks,
                sample_weight=rows.weight, verbose=min(int(self.verbose), 2), **self._batches(rows),
            )  # fmt: skip
            if most is not None and history.stopped_epoch is None:
                told = f"{most} epochs were not enough for the loss to settle: raise max_iter or "
                warning = told + "learning_rate_init, or scale X", ConvergenceWarning
        except FloatingPointError as error:
            rate = "learning_rate_init" if isinstance(self.solver, str) else "lr"
            remedy = "use solver='adam'" if isinstance(watch.optimizer, optim.WholeBatch) else f"lower {rate}"
            told = str(error).partition(". ")[0]
            raise FloatingPointError(f"{told}. Scale X and y to about unit size, or {remedy}") from None
        except KeyboardInterrupt:  # what is trained so far is kept, as by scikit-learn
            if not watch.losses:
                raise
            watch.on_train_end(self.network_)
            warning = "Training interrupted by user.", UserWarning
        self._measured(watch)
        return warning

    def _measured(self, watch: _Watch) -> None:
        stopping = watch.validation is not None
        self._waited, self.n_iter_ = watch.waited, len(watch.losses)
        self.t_ += watch.rows * self.n_iter_
        self.loss_curve_ += watch.losses
        self.loss_ = self.loss_curve_[-1]
        self.best_loss_ = None if stopping else -watch.best
        self.validation_scores_ = watch.scores if stopping else None
        self.best_validation_score_ = watch.best if stopping else None

    # ------------------------------------------------------------ from the arguments to a network and a fit

    def _check(self, incremental: bool) -> None:
        """What neither the network nor its fit looks at."""
        op = type(self).__name__
        for name in ("alpha", "tol", "power_t"):
            real(op, name, getattr(self, name), least=0)
        real(op, "learning_rate_init", self.learning_rate_init, above=0)
        real(op, "epsilon", self.epsilon, above=0)
        real(op, "momentum", self.momentum, least=0, most=1)
        real(op, "validation_fraction", self.validation_fraction, least=0, below=1)
        for name, free in (("max_iter", None), ("n_iter_no_change", math.inf), ("batch_size", "auto")):
            if free is None or getattr(self, name) != free:
                whole(op, name, getattr(self, name))
        if not isinstance(self.verbose, (bool, np.bool_)):
            whole(op, "verbose", self.verbose, 0)
        for name in ("shuffle", "warm_start", "early_stopping", "nesterovs_momentum"):
            flag(op, name, getattr(self, name))
        rate = one_of(op, "learning_rate", self.learning_rate, ("constant", "invscaling", "adaptive"))
        if not isinstance(self.solver, optim.Optimizer):
            one_of(op, "solver", self.solver, ("adam", "sgd", "lbfgs"))
        elif rate != "constant":
            raise ValueError(f"[{op}] learning_rate={rate!r} is for solver='sgd': got {self.solver!r}")
        if incremental and self.early_stopping:
            raise ValueError(f"[{op}] partial_fit is one epoch: expected early_stopping=False, got True")

    def _checked(self, rows: _Rows, classes: Any = None, *, first: bool | None = None) -> _Rows:
        """Rows by scikit-learn's rules; `first`: whether to keep what they look like, None for validation."""
        X, y = validate_data(
            self, rows.X, rows.y, accept_sparse=("csr", "csc"), dtype=self._dtypes(), multi_output=True,
            y_numeric=isinstance(self, RegressorMixin), reset=bool(first),
        )  # fmt: skip
        if first is None and X.shape[0] < 2:
            raise ValueError(f"[{type(self).__name__}] X_val must have at least 2 rows: got {X.shape[0]}")
        y = self._targets(y, classes, bool(first))
        return _Rows(X, y, self._weight(y, rows.weight, training=first is not None))

    def _dtypes(self) -> Any:
        """What X may be: float32 as it is, all else float64; unless `dtype` says more."""
        if self.dtype is None:
            return np.float64, np.float32
        return np.dtype(model.array_dtype(model.dtype_name(self.dtype, self.device)))

    def _network(self, X: Any, random: Any) -> model.Sequential:
        """A network with the first weights that scikit-learn would draw."""
        sizes = [X.shape[1], *self._hidden(), self.n_outputs_]
        activation = "sigmoid" if self.activation == "logistic" else self.activation
        net = model.mlp(
            sizes, activation, dropout=self.dropout, init="zeros",
            dtype=X.dtype if self.dtype is None else self.dtype, device=self.device,
        )  # fmt: skip
        if len(net.state_dict()) != 2 * len(sizes) - 2:
            raise ValueError(
                f"[{type(self).__name__}] activation must have no parameters: expected such a layer, "
                f"got {short(activation)}"
            )
        factor = 2 if activation == "sigmoid" or isinstance(activation, layers.Sigmoid) else 6
        drawn: list[Array] = []
        for inputs, outputs in pairwise(sizes):
            bound = math.sqrt(factor / (inputs + outputs))
            drawn.append(random.uniform(-bound, bound, (inputs, outputs)).T)
            drawn.append(random.uniform(-bound, bound, outputs))
        net.load_state_dict(dict(zip(net.state_dict(), drawn, strict=True)))
        return net

    # scikit-learn's gradients are of sums over outputs; but for squares, our losses are means. So that the
    # arguments mean the same, the rate counts n times for those, and epsilon, tol and alpha 1/n.

    def _averaged(self) -> int:
        """Over how many outputs our loss is a mean."""
        summed = isinstance(self._loss(), (losses.LeastSquares, losses.CrossEntropy, losses.CustomLoss))
        return 1 if summed else self.n_outputs_

    def _scale(self) -> float:
        """`loss_` for a loss of 1 of ours."""
        raise NotImplementedError

    def _rate(self) -> float:
        """The first learning rate of solver="sgd"."""
        return float(self.learning_rate_init * self._averaged())

    def _solver(self) -> optim.Optimizer:
        if isinstance(self.solver, optim.Optimizer):
            return copy(self.solver)  # which starts afresh
        if self.solver == "lbfgs":
            return optim.LBFGS(tolerance_grad=self.tol / self._averaged())
        if self.solver == "adam":
            epsilon = self.epsilon / self._averaged()
            return optim.Adam(self.learning_rate_init, (self.beta_1, self.beta_2), epsilon)
        return optim.SGD(self._rate(), self.momentum, nesterov=self.nesterovs_momentum and self.momentum > 0)

    def _batches(self, rows: _Rows) -> dict[str, Any]:
        """Rows per step, and alpha/(2 n) Σw² beside a mean over n rows, or over their weights."""
        batch = len(rows.X)
        if not self._optimizer.whole_batch:
            batch = min(batch, 200 if self.batch_size == "auto" else self.batch_size)
        total = batch * (1.0 if rows.weight is None else float(np.mean(rows.weight))) * self._averaged()
        return {"batch_size": batch, "shuffle": self.shuffle, "l2": self.alpha / total}

    def _hold_out(self, rows: _Rows, random: Any) -> tuple[_Rows, _Rows]:
        """A part of the rows; of two classes as many of each as there are, which is scikit-learn's choice."""
        two = rows.y if isinstance(self, ClassifierMixin) and self.n_outputs_ == 1 else None
        parts = train_test_split(
            *(part for part in rows if part is not None),
            random_state=random, test_size=self.validation_fraction, stratify=two,
        )  # fmt: skip
        train, held_out = _Rows(*parts[::2]), _Rows(*parts[1::2])
        if held_out.X.shape[0] < 2:
            raise ValueError(
                f"[{type(self).__name__}] early_stopping must have rows to look at: expected at least 2, "
                f"got {held_out.X.shape[0]}; raise validation_fraction, or pass X_val and y_val"
            )
        return train, held_out.dense()

    # ------------------------------------------------------------ what is fitted

    def _outputs(self, X: Any) -> Array:
        """f of the network, for rows checked against those of `fit`."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=self._dtypes(), reset=False)
        if not hasattr(X, "toarray"):
            return np.asarray(self.network_.predict(X))
        rows = max(1, _PIECE // X.shape[1])
        parts = [self.network_.predict(X[k : k + rows].toarray()) for k in range(0, X.shape[0], rows)]
        return np.concatenate(parts)

    @property
    def coefs_(self) -> list[Array]:
        """The weights of each layer, (inputs, outputs): the transposes of the network's."""
        return [_read_only(w.T) for name, w in self._parameters() if name.endswith("weight")]

    @property
    def intercepts_(self) -> list[Array]:
        """The biases of each layer."""
        return [_read_only(b) for name, b in self._parameters() if name.endswith("bias")]

    @property
    def n_layers_(self) -> int:
        """How many layers of neurons there are, inputs and outputs counted."""
        return len(self.coefs_) + 1

    def _parameters(self) -> Any:
        check_is_fitted(self)
        return self.network_.state_dict().items()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "_optimizer" in state:  # its state travels along, so that partial_fit goes on
            state["_moments"] = self._optimizer.state_dict(self.network_)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        moments = state.get("_moments")
        super().__setstate__({name: value for name, value in state.items() if name != "_moments"})
        if moments is not None:
            self._optimizer.load_state_dict(self.network_, moments)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    # ------------------------------------------------------------ what the two differ in

    def _targets(self, y: Any, classes: Any, first: bool) -> Array:
        """y as the network's loss takes it; what it is like is kept the first time."""
        raise NotImplementedError

    def _weight(self, y: Array, sample_weight: Any, training: bool) -> Any:
        """The weights of the rows."""
        return losses.weights(type(self).__name__, sample_weight, len(y), "float64")

    def _loss(self) -> Any:
        raise NotImplementedError

    def _score(self, f: Array, y: Array, weight: Any) -> float:
        """How good outputs f are."""
        raise NotImplementedError


def _finite(array: Array) -> bool:
    return bool(np.isfinite(array).all())


def _read_only(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _by_batches(estimator: _MLP) -> bool:
    """Whether partial_fit makes sense: not where every step takes all rows."""
    solver = estimator.solver
    return not solver.whole_batch if isinstance(solver, optim.Optimizer) else solver != "lbfgs"


# ------------------------------------------------------------ classification


class MLPClassifier(ClassifierMixin, _MLP):
    """A network for classes, or for several labels at once, by scikit-learn's rules.

    L = mean of log losses + alpha/(2 batch) Σw²; softmax over three classes or more, σ for two and for labels

    The arguments are those of sklearn.neural_network.MLPClassifier but max_fun, and more:

        activation     "gelu", "silu", "elu", "leaky_relu", "softplus", … as well, or a layer
        solver         an optimizer, cr.AdamW(lr=1e-3) or another, as well, whose own arguments then count
        class_weight   {class: weight}, 1 for those left out, or "balanced"
        dropout        share of the hidden activations to drop in training
        dtype          of the network, "float32", "float64", … ; None is float32 for float32 X, else float64
        device         "cpu", "cuda", "auto"

    Fitted: `network_`, the Sequential with logits as outputs, and scikit-learn's attributes.

    Raises: what `fit` says; nothing here.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> X, y = load_iris(return_X_y=True)
        >>> pipeline = make_pipeline(StandardScaler(), MLPClassifier((16,), solver="lbfgs", random_state=0))
        >>> pipeline.fit(X, y).score(X, y) > 0.95
        True
    """

    classes_: Array

    def __init__(
        self, hidden_layer_sizes=(100,), activation="relu", *, solver="adam", alpha=0.0001, batch_size="auto",
        learning_rate="constant", learning_rate_init=0.001, power_t=0.5, max_iter=200, shuffle=True,
        random_state=None, tol=1e-4, verbose=False, warm_start=False, momentum=0.9, nesterovs_momentum=True,
        early_stopping=False, validation_fraction=0.1, beta_1=0.9, beta_2=0.999, epsilon=1e-8,
        n_iter_no_change=10, class_weight=None, dropout=0.0, dtype=None, device="cpu",
    ) -> None:  # fmt: skip
        self._keep(locals())

    @available_if(_by_batches)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Any:
        """One epoch over these rows; the first call must be told all `classes`."""
        if classes is None and not hasattr(self, "network_"):
            raise ValueError("[partial_fit] classes must be passed on the first call to partial_fit")
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"[partial_fit] class_weight must be known: expected a dict, got {self.class_weight!r}"
            )
        return self._train(_Rows(X, y, sample_weight), classes=classes, incremental=True)

    def predict(self, X: Any) -> Array:
        """The likeliest class of each row (n,); of several labels those likelier than not, (n, labels)."""
        place = self._places(self._outputs(X))
        return place if self._labels else self.classes_[place]

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class (n, classes), in the order of `classes_`, or of each label."""
        f = self._outputs(X)
        return np.asarray(expit(f) if self._labels else softmax(self._logits(f), axis=1))

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of the probabilities, exact where those round to 0."""
        f = self._outputs(X)
        return np.asarray(log_expit(f) if self._labels else log_softmax(self._logits(f), axis=1))

    def _logits(self, f: Array) -> Array:
        """One for each class, from outputs f."""
        return np.hstack([np.zeros_like(f), f]) if len(self.classes_) == 2 else f

    def _places(self, f: Array) -> Array:
        """`_targets` that outputs f are most like."""
        return (f > 0).astype(int) if self._labels else np.asarray(self._logits(f).argmax(axis=1))

    def _targets(self, y: Any, classes: Any, first: bool) -> Array:
        """Places in `classes_`; a 0 or 1 for each of several labels."""
        check_classification_targets(y)
        labels = type_of_target(y).startswith("multilabel")
        y = y.toarray() if hasattr(y, "toarray") else y if labels else column_or_1d(y, warn=True)
        if first:
            self._labels, self.classes_ = labels, unique_labels(y if labels or classes is None else classes)
            self.n_outputs_ = len(self.classes_) if labels or len(self.classes_) > 2 else 1
            self.out_activation_ = "softmax" if self.n_outputs_ > 1 and not labels else "logistic"
        if classes is not None and not np.array_equal(unique_labels(classes), self.classes_):
            raise ValueError(
                f"[partial_fit] classes must stay the same: expected {self.classes_}, got {short(classes)}"
            )
        if labels != self._labels or (labels and y.shape[1] != self.n_outputs_):
            columns = self.n_outputs_ if self._labels else "no"
            raise ValueError(
                f"[fit] y must be as it was: expected {columns} columns of 0 and 1, got shape {y.shape}"
            )
        if labels and not np.isin(y, (0, 1)).all():
            raise ValueError(f"[fit] labels must be 0 or 1: got {short(np.unique(y).tolist())}")
        if not labels and len(unique_labels(self.classes_, y)) > len(self.classes_):
            raise ValueError(f"[fit] y has unseen labels: expected some of {short(self.classes_.tolist())}")
        return np.asarray(y if labels else LabelEncoder().fit(self.classes_).transform(y))

    def _weight(self, y: Array, sample_weight: Any, training: bool) -> Any:
        weight = super()._weight(y, sample_weight, training)
        if self.class_weight is None:
            return weight
        if self._labels:
            by_class = compute_sample_weight(self.class_weight, y)
        else:
            if training:  # "balanced" is by the rows to train on
                labelled = self.classes_[y]
                self._class_weights = compute_class_weight(
                    self.class_weight, classes=self.classes_, y=labelled
                )
            by_class = self._class_weights[y]
        weight = by_class if weight is None else weight * by_class
        return losses.weights(type(self).__name__, weight, len(y), "float64", "class_weight · sample_weight")

    def _loss(self) -> losses.Loss:
        return losses.CrossEntropy() if self.out_activation_ == "softmax" else losses.Logistic()

    def _scale(self) -> float:
        return self._averaged()  # a sum over labels

    def _score(self, f: Array, y: Array, weight: Any) -> float:
        return float(accuracy_score(y, self._places(f), sample_weight=weight)) if _finite(f) else math.nan

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


# ------------------------------------------------------------ regression


_LOSSES = {"squared_error": "least_squares", "absolute_error": "mae"}  # scikit-learn's names of ours


class MLPRegressor(RegressorMixin, _MLP):
    """A network for one number a row or several, by scikit-learn's rules.

    L = mean of losses + alpha/(2 batch) Σw², a loss being ½ (y − f)² if nothing else is said

    The arguments are those of sklearn.neural_network.MLPRegressor but max_fun, and more:

        loss           "absolute_error", "huber", "pinball", … as well, cr.Pinball(0.9), or a callable, as in
                       Sequential.fit; with "poisson" predictions are e^f, with all others f
        activation, solver, dropout, dtype, device     as in MLPClassifier

    Fitted: `network_`, the Sequential with f as outputs, and scikit-learn's attributes.

    Raises: what `fit` says; nothing here.

    Example:
        >>> X = np.linspace(-1, 1, 100)[:, None]
        >>> y = X[:, 0] ** 2
        >>> MLPRegressor("huber", (32,), solver="lbfgs", random_state=0).fit(X, y).score(X, y) > 0.99
        True
    """

    def __init__(
        self, loss="squared_error", hidden_layer_sizes=(100,), activation="relu", *, solver="adam",
        alpha=0.0001, batch_size="auto", learning_rate="constant", learning_rate_init=0.001, power_t=0.5,
        max_iter=200, shuffle=True, random_state=None, tol=1e-4, verbose=False, warm_start=False,
        momentum=0.9, nesterovs_momentum=True, early_stopping=False, validation_fraction=0.1, beta_1=0.9,
        beta_2=0.999, epsilon=1e-8, n_iter_no_change=10, dropout=0.0, dtype=None, device="cpu",
    ) -> None:  # fmt: skip
        self._keep(locals())

    @available_if(_by_batches)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """One epoch over these rows."""
        return self._train(_Rows(X, y, sample_weight), incremental=True)

    def predict(self, X: Any) -> Array:
        """The numbers expected of each row, (n,) or (n, outputs)."""
        return self._expected(self._outputs(X))

    def _targets(self, y: Any, classes: Any, first: bool) -> Array:
        y = y if y.ndim == 2 and y.shape[1] > 1 else column_or_1d(y, warn=True)
        columns = 1 if y.ndim == 1 else y.shape[1]
        if first:
            self.n_outputs_ = columns
        if columns != self.n_outputs_:
            raise ValueError(
                f"[fit] y must have as many columns as before: expected {self.n_outputs_}, got {columns}"
            )
        self.out_activation_ = "exp" if isinstance(self._loss(), losses.Poisson) else "identity"
        return np.asarray(y if y.dtype.kind == "f" else y.astype(float))

    def _loss(self) -> losses.Loss:
        loss = _LOSSES.get(self.loss, self.loss) if isinstance(self.loss, str) else self.loss
        rule = losses.resolve("MLPRegressor", loss)
        if isinstance(rule, (losses.CrossEntropy, losses.GaussianNLL)) or rule.reduction != "mean":
            raise ValueError(
                "[MLPRegressor] loss must have one output for each number, and be a mean over rows: expected "
                f"'squared_error' or another such, got {short(self.loss)}"
            )
        return rule

    def _scale(self) -> float:
        """scikit-learn's squares are a mean over outputs, "poisson" a sum; a callable's value is its own."""
        rule = self._loss()
        if isinstance(rule, (losses.Poisson, losses.CustomLoss)):
            return self._averaged()
        return self._averaged() / self.n_outputs_

    def _score(self, f: Array, y: Array, weight: Any) -> float:
        f = self._expected(f)
        return float(r2_score(y, f, sample_weight=weight)) if _finite(f) else math.nan

    def _expected(self, f: Array) -> Array:
        with np.errstate(over="ignore"):  # infinity says it
            f = np.exp(f) if self.out_activation_ == "exp" else f
        return np.asarray(f[:, 0] if f.shape[1] == 1 else f)
