# SPDX-License-Identifier: MIT
"""scikit-learn's MLP, driven so that its mathematics is ours: no penalty, momentum, shuffling or stopping.

Its squared error is half the mean over outputs as a number, but its gradient is that of half the *sum* over
outputs. So for "mse" over n outputs the gradient is n/2 times ours; the learning rate (SGD) or epsilon (Adam)
absorbs the factor exactly. Its Adam adds epsilon to the root of the *uncorrected* second moment: another
update where gradients are small, so its weights may differ by some percent of the distance they travel. The
arithmetic of a step is the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import sklearn
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

from .problem import ADAM, PREDICTION_ROUNDING, ROUNDING, Workload


def configure(threads: int) -> None:
    """The parent has set OPENBLAS_NUM_THREADS and OMP_NUM_THREADS."""
    warnings.simplefilter("ignore", ConvergenceWarning)


def versions() -> dict[str, str]:
    """Versions that decide the speed."""
    import scipy

    return {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__}


class _Sklearn:
    note: str
    tolerance: tuple[float, ...]

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        self.work = work
        self.initial = [
            (problem[f"W{k}"].T.copy(), problem[f"b{k}"].copy()) for k in range(len(work.sizes) - 1)
        ]
        self.classifies = work.loss in ("cross_entropy", "logistic")
        self.X, self.y = problem["X"], problem["y"]
        if work.loss == "logistic":
            self.y = self.y.astype(np.int64)
        if self.y.ndim == 2 and self.y.shape[1] == 1:
            self.y = self.y.ravel()
        outputs = work.sizes[-1]
        gradient_scale = outputs / 2.0 if work.loss == "mse" else 1.0
        self.loss_scale = {"mse": 2.0, "least_squares": float(outputs)}.get(work.loss, 1.0)
        adam = work.optimizer == "adam"
        scaled = gradient_scale != 1.0
        if adam:
            self.note = "Adam's epsilon is added before the bias correction"
            self.note += f", and times {gradient_scale:g}" if scaled else ""
            self.tolerance = (1e-3, 5e-2)
        else:
            self.note = f"learning rate over {gradient_scale:g}" if scaled else ""
            self.tolerance = ROUNDING
        kind = MLPClassifier if self.classifies else MLPRegressor
        self.net = kind(
            hidden_layer_sizes=work.sizes[1:-1],
            activation=work.activation,
            solver=work.optimizer,
            alpha=0.0,
            batch_size=work.batch,
            learning_rate="constant",
            learning_rate_init=work.lr if adam else work.lr / gradient_scale,
            momentum=0.0,
            nesterovs_momentum=False,
            beta_1=ADAM["beta1"],
            beta_2=ADAM["beta2"],
            epsilon=ADAM["eps"] * gradient_scale,
            shuffle=False,
            tol=0.0,
            n_iter_no_change=10**9,
            max_iter=1,
            warm_start=True,
            random_state=0,
        )
        self.net.fit(self.X, self.y)  # allocates everything; reset() then puts our weights in

    def reset(self) -> None:
        """Our weights; without `_optimizer` scikit-learn makes a fresh one."""
        self.net.coefs_ = [w.copy() for w, _ in self.initial]
        self.net.intercepts_ = [b.copy() for _, b in self.initial]
        self.net.loss_curve_ = []
        self.net.best_loss_ = np.inf
        if hasattr(self.net, "_optimizer"):
            del self.net._optimizer

    def parameters(self) -> list[np.ndarray]:
        """Back to (out, in)."""
        pairs = zip(self.net.coefs_, self.net.intercepts_, strict=True)
        return [a for w, b in pairs for a in (w.T, b)]


class Fit(_Sklearn):
    """All epochs in one call."""

    form = "MLP.fit(X, y), shuffle=False, float32, max_iter = epochs"

    def run(self, epochs: int) -> None:
        """One call."""
        self.net.max_iter = epochs
        self.net.fit(self.X, self.y)

    def losses(self, epochs: int) -> list[float]:
        """One mean per epoch."""
        self.run(epochs)
        return [v * self.loss_scale for v in self.net.loss_curve_]


class PartialFit(_Sklearn):
    """One call per batch, as in a streaming loop."""

    form = "MLP.partial_fit(x, y) per batch, float32"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        starts = range(0, len(self.X), work.batch)
        self.batches = [(self.X[s : s + work.batch], self.y[s : s + work.batch]) for s in starts]

    def run(self, epochs: int) -> None:
        """One call a step."""
        for _ in range(epochs):
            for x, y in self.batches:
                self.net.partial_fit(x, y)

    def losses(self, epochs: int) -> list[float]:
        """Per step."""
        self.run(epochs)
        return [v * self.loss_scale for v in self.net.loss_curve_]


class Predict(_Sklearn):
    """The regressor called on one batch of rows."""

    form = "MLPRegressor.predict(x), float32"

    def __init__(self, work: Workload, problem: dict[str, np.ndarray]) -> None:
        super().__init__(work, problem)
        super().reset()
        self.note, self.tolerance = "", PREDICTION_ROUNDING

    def reset(self) -> None:
        """Nothing changes."""

    def run(self, calls: int) -> None:
        """The results are dropped."""
        predict, x = self.net.predict, self.X
        for _ in range(calls):
            predict(x)

    def outputs(self) -> np.ndarray:
        """Of one call."""
        return np.asarray(self.net.predict(self.X)).reshape(len(self.X), -1)


VARIANTS: dict[str, Any] = {"sklearn fit": Fit, "sklearn partial_fit": PartialFit}
PREDICTORS: dict[str, Any] = {"sklearn": Predict}
DERIVATIVES: dict[str, Any] = {}  # it has none to ask for
