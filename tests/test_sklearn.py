# SPDX-License-Identifier: MIT
"""chainrule.sklearn beside scikit-learn: its own checks of estimators, and its MLP as oracle."""

import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import chainrule as cr

pytest.importorskip("sklearn")
from scipy import sparse
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from chainrule.sklearn import MLPClassifier, MLPRegressor
from chainrule.sklearn import _Rows as Rows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 5))
TARGETS = {
    "two": np.where(X[:, 0] + X[:, 1] > 0, "yes", "no"),
    "two labels": (X[:, 0] + X[:, 1] > 0).astype(int),
    "three": np.digitize(X[:, 0] * X[:, 1], [-0.3, 0.3]) * 10,
    "labels": (X[:, :3] + X[:, 1:4] > 0).astype(int),
    "number": X[:, 0] ** 2 + X[:, 1],
    "numbers": np.stack([X[:, 0] ** 2, X[:, 1] - X[:, 2]], axis=1),
}
PEERS = {MLPClassifier: neural_network.MLPClassifier, MLPRegressor: neural_network.MLPRegressor}
EXACT = {"shuffle": False, "random_state": 3, "batch_size": 50, "max_iter": 15}  # 50 divides 300


def kind_of(target):
    return MLPRegressor if target.startswith("number") else MLPClassifier


def fitted(estimator, X, y, **fit):
    """Without the warning that the few epochs of a test were not enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, y, **fit)


def both(target, X=X, **arguments):
    """Ours and scikit-learn's, trained alike."""
    ours, y = kind_of(target), TARGETS[target][: len(X)]
    return tuple(fitted(kind(**EXACT | arguments), X, y) for kind in (ours, PEERS[ours]))


# ------------------------------------------------------------ scikit-learn's own checks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([
    MLPClassifier(max_iter=100),
    MLPRegressor(max_iter=100),
    MLPClassifier((), solver="lbfgs", alpha=1.0),  # convex: with a hidden layer, rounding grows in 200 steps
    MLPRegressor("huber", (8,), solver=cr.RMSprop()),
])  # fmt: skip
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("ours", PEERS, ids=lambda kind: kind.__name__)
def test_the_arguments_are_scikit_learns_and_a_few_more(ours):
    theirs = {p.name: p for p in inspect.signature(PEERS[ours]).parameters.values()}
    mine = {p.name: p for p in inspect.signature(ours).parameters.values()}
    assert set(theirs) - set(mine) == {"max_fun"}
    for name in set(theirs) & set(mine) - {"hidden_layer_sizes"}:
        assert mine[name].default == theirs[name].default, name
    # "loss", which scikit-learn's regressor has from 1.7 on
    order = [name for name in mine if name != "loss" or name in theirs]
    assert order[: order.index("power_t")] == list(theirs)[: list(theirs).index("power_t")]
    assert set(mine) - set(theirs) <= {"loss", "class_weight", "dropout", "dtype", "device"}


# ------------------------------------------------------------ the same numbers


# In float64 both differ by rounding alone: a relative error of 1e-16 in each of 90 steps, and its growth.
@pytest.mark.parametrize("target", ["two", "three", "labels", "number", "numbers"])
@pytest.mark.parametrize("arguments", [
    {},
    {"nesterovs_momentum": False, "activation": "tanh", "hidden_layer_sizes": (7, 6)},
    {"learning_rate_init": 0.1, "momentum": 0.0, "learning_rate": "invscaling", "activation": "logistic"},
    {"momentum": 0.0, "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1},
    {"alpha": 2.0, "activation": "identity", "hidden_layer_sizes": 3},
], ids=["nesterov", "momentum", "invscaling", "adaptive", "alpha"])  # fmt: skip
def test_sgd_walks_scikit_learns_way(target, arguments):
    ours, theirs = both(target, solver="sgd", **{"learning_rate_init": 0.01} | arguments)
    if target == "numbers":  # in ours the mean over outputs is of the penalty, too
        penalty = arguments.get("alpha", 1e-4) / 100 * sum((w**2).sum() for w in theirs.coefs_)
        assert ours.loss_ == pytest.approx(theirs.loss_ - penalty / 2, abs=0.1 * penalty)
    else:
        np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-11)
        assert ours.best_loss_ == pytest.approx(theirs.best_loss_, rel=1e-11)
    for mine, other in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-11)
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(ours, name) == getattr(theirs, name), name
    predicted, expected = ours.predict(X), theirs.predict(X)
    assert predicted.dtype == expected.dtype
    if target.startswith("number"):
        np.testing.assert_allclose(predicted, expected, atol=1e-10)
    else:
        assert (predicted == expected).all() and (ours.classes_ == theirs.classes_).all()
        np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-11)
        np.testing.assert_allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), atol=1e-9)


# scikit-learn's Adam adds epsilon to √v, ours (PyTorch's) to √v̂: steps differ by epsilon's share of √v̂ or so.
@pytest.mark.parametrize("target", ["two", "three", "labels", "number", "numbers"])
def test_adam_is_scikit_learns_but_for_where_epsilon_stands(target):
    ours, theirs = both(target, epsilon=1e-14)
    for mine, other in zip(ours.coefs_, theirs.coefs_, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-8)
    assert ours.predict(X).shape == theirs.predict(X).shape
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-6) if "number" in target else None
    assert ours.score(X, TARGETS[target]) == pytest.approx(theirs.score(X, TARGETS[target]), abs=1e-6)


@pytest.mark.parametrize("columns", [0, slice(0, 3)], ids=["one output", "three"])
def test_poisson_regression_is_scikit_learns(columns):
    counts = np.floor(np.exp(X[:, columns]))
    if "loss" not in inspect.signature(neural_network.MLPRegressor).parameters:
        pytest.skip("this scikit-learn has no Poisson loss")
    ours, theirs = (
        fitted(kind(loss="poisson", solver="sgd", learning_rate_init=0.01, alpha=5.0, **EXACT), X, counts)
        for kind in (MLPRegressor, neural_network.MLPRegressor)
    )
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-10)
    assert ours.out_activation_ == theirs.out_activation_ == "exp"


def test_early_stopping_holds_out_the_rows_that_scikit_learn_does():
    # texts stop scikit-learn's own early stopping up to 1.7
    for target in ("two labels", "labels", "number"):
        ours, theirs = both(target, solver="sgd", learning_rate_init=0.02, early_stopping=True, alpha=0.0)
        np.testing.assert_allclose(ours.validation_scores_, theirs.validation_scores_, rtol=1e-9)
        assert ours.best_validation_score_ == pytest.approx(theirs.best_validation_score_, rel=1e-9)
        assert ours.best_loss_ is None
        np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], atol=1e-10)


@pytest.mark.parametrize("target", ["three", "number", "numbers"])
def test_tol_stops_where_scikit_learn_does(target):
    arguments = {"tol": 0.02, "n_iter_no_change": 3, "max_iter": 500, "alpha": 0.0}
    ours, theirs = both(target, solver="sgd", learning_rate_init=0.02, **arguments)
    assert ours.n_iter_ == theirs.n_iter_ < 500
    assert ours.validation_scores_ is None


def test_sample_weights_are_scikit_learns():
    if "sample_weight" not in inspect.signature(neural_network.MLPClassifier.fit).parameters:
        pytest.skip("this scikit-learn's MLP has no sample weights")
    weight = RNG.uniform(0.5, 2, 300)
    arguments = {"solver": "sgd", "learning_rate_init": 0.05, "alpha": 0.0, **EXACT}
    ours, theirs = (
        fitted(kind(**arguments), X, TARGETS["three"], sample_weight=weight)
        for kind in (MLPClassifier, neural_network.MLPClassifier)
    )
    np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], atol=1e-11)


def test_lbfgs_finds_the_one_minimum_of_a_convex_loss():
    arguments = {"hidden_layer_sizes": (), "solver": "lbfgs", "tol": 1e-9, "max_iter": 500, "alpha": 1.0}
    ours, theirs = both("three", **arguments)
    assert ours.loss_ == pytest.approx(theirs.loss_, rel=1e-9)
    np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], atol=1e-4)
    assert ours.n_iter_ < 500


def test_the_alpha_of_labels_has_scikit_learns_minimum():
    arguments = {"hidden_layer_sizes": (), "solver": "lbfgs", "tol": 1e-9, "max_iter": 500, "alpha": 5.0}
    ours, theirs = both("labels", **arguments)
    np.testing.assert_allclose(ours.coefs_[0], theirs.coefs_[0], atol=1e-4)


# ------------------------------------------------------------ what scikit-learn's has not


def test_class_weight_is_a_sample_weight_for_each_class():
    y = TARGETS["two"]
    by_class = fitted(MLPClassifier(class_weight={"yes": 3.0}, **EXACT), X, y)
    by_row = fitted(MLPClassifier(**EXACT), X, y, sample_weight=np.where(y == "yes", 3.0, 1.0))
    assert by_class.loss_curve_ == by_row.loss_curve_
    rare = RNG.random(300) < 0.1
    y = np.where(rare, "rare", "common")
    shifted = X + 0.7 * rare[:, None]
    plain, balanced = (
        fitted(MLPClassifier(max_iter=60, random_state=0, class_weight=weight), shifted, y)
        for weight in (None, "balanced")
    )
    found = [(model.predict(shifted)[rare] == "rare").mean() for model in (plain, balanced)]
    assert found[1] > found[0] + 0.1


def test_class_weights_of_classes_that_a_part_of_the_rows_has_not():
    y = TARGETS["three"]
    common = y != 20
    model = MLPClassifier(class_weight={20: 3.0}, random_state=0).partial_fit(X, y, classes=[0, 10, 20])
    model.partial_fit(X[common], y[common])
    balanced = MLPClassifier(class_weight="balanced", early_stopping=True, random_state=0, max_iter=3)
    fitted(balanced, X, y, X_val=X[common], y_val=y[common])
    with pytest.raises(ValueError, match="not in class_weight"):
        MLPClassifier(class_weight={30: 3.0}).fit(X, y)
    labels = MLPClassifier(class_weight="balanced", **EXACT)
    assert fitted(labels, X, TARGETS["labels"]).predict_log_proba(X).shape == (300, 3)


def test_one_class_is_predicted_as_surely_as_it_is():
    model = fitted(MLPClassifier(**EXACT), X, np.full(300, "only"))
    assert (model.predict(X) == "only").all() and list(model.classes_) == ["only"]
    assert (model.predict_proba(X) == 1).all() and (model.predict_log_proba(X) == 0).all()
    assert model.predict_proba(X).shape == (300, 1)


def test_losses_solvers_and_activations_of_chainrule():
    y = TARGETS["number"]
    high = fitted(
        MLPRegressor(cr.Pinball(0.9), (16,), "gelu", solver=cr.AdamW(lr=0.01), random_state=0), X, y
    )
    assert 0.8 < (y < high.predict(X)).mean() < 0.97

    def half_square(f, y):  # y as in Sequential.fit: one-dimensional where the user's is
        d = f[:, 0] - y
        return 0.5 * d**2, d[:, None]

    own, named = (fitted(MLPRegressor(loss, **EXACT), X, y) for loss in (half_square, "squared_error"))
    np.testing.assert_allclose(own.loss_curve_, named.loss_curve_, rtol=1e-12)
    steps = fitted(
        MLPRegressor(solver=cr.LevenbergMarquardt(), hidden_layer_sizes=(8,), random_state=0), X, y
    )
    assert steps.score(X, y) > 0.98
    descent = MLPRegressor(solver=cr.GD(0.05), max_iter=3000, tol=1e-2, n_iter_no_change=5, random_state=0)
    assert descent.fit(X, y).n_iter_ < 300


def test_validation_rows_of_ones_own():
    y, half = TARGETS["three"], slice(0, 150)
    rest = {"X_val": X[150:], "y_val": y[150:]}
    model = MLPClassifier(early_stopping=True, n_iter_no_change=3, random_state=0, learning_rate_init=0.01)
    model.fit(X[half], y[half], **rest)
    assert len(model.validation_scores_) == model.n_iter_ and model.t_ == 150 * model.n_iter_
    assert model.score(rest["X_val"], rest["y_val"]) == model.best_validation_score_
    with pytest.raises(ValueError, match="early_stopping=True, got early_stopping=False and X_val"):
        MLPClassifier().fit(X[half], y[half], **rest)
    with pytest.raises(ValueError, match="got early_stopping=True and no X_val"):
        clone(model).fit(X[half], y[half], y_val=y)
    with pytest.raises(ValueError, match="X_val must have at least 2 rows: got 1"):
        clone(model).fit(X[half], y[half], X_val=X[:1], y_val=y[:1])
    with pytest.raises(ValueError, match="unseen labels"):
        clone(model).fit(X[half], y[half], X_val=X[150:], y_val=y[150:] + 1)


def test_callbacks_hear_of_every_epoch_and_may_stop():
    seen = []
    model = MLPRegressor(random_state=0).fit(
        X, TARGETS["number"], callbacks=[lambda epoch, logs: seen.append(epoch) or epoch == 4]
    )
    assert seen == [0, 1, 2, 3, 4] and model.n_iter_ == 5


def test_the_weights_are_to_be_read():
    model = fitted(MLPRegressor(**EXACT), X, TARGETS["number"])
    for array in (model.coefs_[0], model.intercepts_[0]):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    model.network_.load_state_dict({name: 0 * w for name, w in model.network_.state_dict().items()})
    assert not model.coefs_[0].any() and not model.predict(X).any()


def test_the_network_inside_is_a_whole_network():
    model = fitted(MLPClassifier(dropout=0.2, **EXACT), X, TARGETS["three"])
    f = model.network_(X)
    assert repr(model.network_[2]) == "Dropout(p=0.2)"
    np.testing.assert_array_equal(model.classes_[f.argmax(axis=1)], model.predict(X))
    assert cr.jacobian(model.network_, X[:2]).shape == (2, 3, 5)


def test_float32_rows_make_a_float32_network():
    rows, y = X.astype(np.float32), TARGETS["two"]
    assert fitted(MLPClassifier(**EXACT), rows, y).network_.dtype == "float32"
    assert fitted(MLPClassifier(**EXACT), X, y).network_.dtype == "float64"
    assert fitted(MLPClassifier(dtype="float32", **EXACT), X, y).network_.dtype == "float32"
    assert fitted(MLPClassifier(**EXACT), rows, y).predict_proba(rows).dtype == np.float32


# ------------------------------------------------------------ lives in scikit-learn's world


@pytest.mark.slow
def test_searches_pipelines_and_processes():
    digits, y = load_digits(return_X_y=True)
    model = MLPClassifier((32,), max_iter=20, learning_rate_init=0.01, dtype="float32", random_state=0)
    pipeline = make_pipeline(StandardScaler(), model)
    grid = {"mlpclassifier__alpha": [1e-4, 1e-1], "mlpclassifier__activation": ["relu", "silu"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 20 epochs; and the workers' own
        search = GridSearchCV(pipeline, grid, n_jobs=2, cv=2).fit(digits, y)
        scores = cross_val_score(search.best_estimator_, digits, y, cv=2)
    assert search.best_score_ > 0.9 and scores.mean() > 0.9


def test_frames_sparse_rows_and_names():
    pd = pytest.importorskip("pandas")
    data = load_breast_cancer(as_frame=True)
    frame = (data.data - data.data.mean()) / data.data.std()
    model = fitted(MLPClassifier(**EXACT), frame, data.target)
    assert list(model.feature_names_in_) == list(data.data.columns)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[frame.columns[::-1]])
    rows = np.where(X > 0.5, X, 0)
    dense = fitted(MLPClassifier(**EXACT), rows, TARGETS["three"])
    for kind in (sparse.csr_matrix, sparse.csc_array):
        thin = fitted(MLPClassifier(**EXACT), kind(rows), pd.Series(TARGETS["three"]))
        assert thin.loss_curve_ == dense.loss_curve_
        np.testing.assert_array_equal(thin.predict_proba(kind(rows)), dense.predict_proba(rows))


def test_sparse_rows_are_predicted_in_pieces(monkeypatch):
    rows = np.where(X > 0.5, X, 0)
    model = fitted(MLPRegressor(**EXACT), rows, TARGETS["number"])
    monkeypatch.setattr("chainrule.sklearn._PIECE", 5 * 7)  # 7 rows, which do not divide 300
    np.testing.assert_array_equal(model.predict(sparse.csr_array(rows)), model.predict(rows))


def test_partial_fit_goes_on_and_so_does_its_pickle():
    y = TARGETS["three"]
    model = MLPClassifier(random_state=0)
    model.partial_fit(X[:100], y[:100], classes=[0, 10, 20])
    again = pickle.loads(pickle.dumps(model))
    for part in (slice(100, 200), slice(200, 300)):
        for one in (model, again):
            one.partial_fit(X[part], y[part])
    assert model.t_ == 300 and len(model.loss_curve_) == 3
    for mine, other in zip(model.coefs_, again.coefs_, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert model._optimizer.state_dict(model.network_)["step"] == 3
    np.testing.assert_array_equal(clone(model).partial_fit(X, y, classes=[0, 10, 20]).classes_, [0, 10, 20])


def test_warm_start_goes_on_from_the_weights_there_are():
    arguments = {**EXACT, "warm_start": True, "max_iter": 3, "solver": "sgd"}
    ours, theirs = (
        fitted(fitted(kind(**arguments), X, TARGETS["two"]), X, TARGETS["two"])
        for kind in (MLPClassifier, neural_network.MLPClassifier)
    )
    np.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-11)
    assert ours.t_ == theirs.t_ == 1800 and ours.n_iter_ == theirs.n_iter_ == 3


def test_warm_starts_draw_other_dropout_masks_each_time():
    """With the same in every fit a row would always train the same part of the network."""
    rows, y = X[:1], np.array([1.0])
    model = MLPRegressor(dropout=0.5, warm_start=True, max_iter=1, random_state=0, solver="sgd", momentum=0.0,
                         learning_rate_init=1e-9, alpha=0.0)  # fmt: skip
    assert len({round(fitted(model, rows, y).loss_, 5) for _ in range(10)}) > 5  # the steps are smaller


def test_partial_fit_follows_the_solver():
    model = fitted(MLPRegressor(solver="lbfgs", **EXACT), X, TARGETS["number"])
    for name, kind in (("adam", cr.Adam), ("sgd", cr.SGD)):
        model.set_params(solver=name).partial_fit(X, TARGETS["number"])
        assert type(model._optimizer) is kind


def test_an_adaptive_rate_falls_over_calls_of_partial_fit():
    arguments = {"solver": "sgd", "learning_rate": "adaptive", "tol": 10.0, "n_iter_no_change": 2}
    ours, theirs = MLPRegressor(**arguments), neural_network.MLPRegressor(**arguments)
    for _ in range(20):
        ours.partial_fit(X, TARGETS["number"])
        theirs.partial_fit(X, TARGETS["number"])
    assert ours._optimizer.lr == pytest.approx(theirs._optimizer.learning_rate) and ours._optimizer.lr < 1e-5


# ------------------------------------------------------------ errors


def test_a_fit_that_fails_changes_nothing():
    model = fitted(MLPClassifier(**EXACT), X, TARGETS["three"])
    before, predicted = dict(vars(model)), model.predict(X)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.full((4, 2), np.nan), ["a", "b", "a", "b"])
    with pytest.raises(FloatingPointError, match="must stay finite"):
        model.set_params(solver=cr.SGD(lr=1e300)).fit(X[:, :2], TARGETS["two"])

    def stop(epoch, logs):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.set_params(solver="adam").fit(X[:, :2], TARGETS["two"], callbacks=[stop])
    assert vars(model) == before
    np.testing.assert_array_equal(model.predict(X), predicted)


@pytest.mark.parametrize("kind", ["warm", "partial"])
def test_further_training_that_fails_is_undone(kind):
    def stop(epoch, logs):
        raise RuntimeError("enough")

    y = TARGETS["number"]
    model = MLPRegressor(random_state=0, max_iter=5, warm_start=kind == "warm").partial_fit(X, y)
    twin = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="enough"):
        model._train(Rows(X, y), None, [stop], incremental=kind == "partial")
    assert model.t_ == 300 and model.loss_curve_ == twin.loss_curve_
    for one in (model, twin):
        one.partial_fit(X, y)
    np.testing.assert_array_equal(model.predict(X), twin.predict(X))


def test_a_network_that_is_trained_further_keeps_its_form():
    model = fitted(MLPClassifier(warm_start=True, **EXACT), X, TARGETS["three"])
    for change in (
        {"hidden_layer_sizes": (7,)},
        {"activation": "tanh"},
        {"dropout": 0.1},
        {"dtype": "float32"},
    ):
        before = model.get_params()
        with pytest.raises(ValueError, match=f"keeps its form: .*{next(iter(change))}"):
            model.set_params(**change).fit(X, TARGETS["three"])
        model.set_params(**before)


def test_divergence_is_told_as_such_where_scores_are_looked_at():
    for rate in (1.0, 1e3, 1e10):
        model = MLPRegressor(early_stopping=True, solver="sgd", learning_rate_init=rate, random_state=0)
        with pytest.raises(FloatingPointError, match="must stay finite"):
            model.fit(X, 100 * TARGETS["number"])


@pytest.mark.parametrize(
    ("solver", "remedy"),
    [("sgd", "lower learning_rate_init"), (cr.SGD(1e300), "lower lr"), ("lbfgs", "use solver='adam'")],
    ids=str,
)
def test_the_advice_against_divergence_is_in_the_estimators_words(solver, remedy):
    model = MLPRegressor(lambda f, y: (np.nan, f), solver=solver)
    with pytest.raises(FloatingPointError, match="must stay finite") as caught:
        model.fit(X, TARGETS["number"])
    told = str(caught.value)
    assert told.endswith(f"from before this fit. Scale X and y to about unit size, or {remedy}")


class AtOnce:
    def on_train_begin(self, net):
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_is_trained():
    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        model = MLPClassifier(random_state=0).fit(X, TARGETS["two"], callbacks=[interrupt])
    assert model.n_iter_ == 3 and model.predict(X).shape == (300,)
    with pytest.raises(KeyboardInterrupt):
        MLPClassifier().fit(X, TARGETS["two"], callbacks=[AtOnce()])


def test_too_few_epochs_are_told():
    with pytest.warns(ConvergenceWarning, match="2 epochs were not enough"):
        MLPRegressor(max_iter=2).fit(X, TARGETS["number"])


BAD = [
    (MLPClassifier(solver="newton"), "three", ValueError, "solver must be a known name"),
    (MLPClassifier(alpha=-1), "three", ValueError, "alpha must be a finite number"),
    (MLPClassifier(max_iter=0), "three", ValueError, "max_iter must be a positive int"),
    (MLPClassifier(batch_size="all"), "three", TypeError, "batch_size must be a positive int"),
    (MLPClassifier(hidden_layer_sizes=(3, 0)), "three", ValueError, "hidden_layer_sizes must be a positive"),
    (MLPClassifier(hidden_layer_sizes=None), "three", TypeError, "expected an int, got None"),
    (MLPRegressor(hidden_layer_sizes=(8, 2.5)), "number", TypeError, "expected an int, got 2.5"),
    (MLPClassifier(activation="sine"), "three", ValueError, "activation must be a known name"),
    (MLPClassifier(learning_rate="fast"), "three", ValueError, "learning_rate must be a known name"),
    (MLPClassifier(verbose=-1), "three", ValueError, "verbose"),
    (MLPClassifier(early_stopping=1), "three", TypeError, "early_stopping must be a bool"),
    (MLPClassifier(early_stopping=True, validation_fraction=0.003), "three", ValueError, "at least 2, got"),
    (MLPClassifier(solver=cr.LBFGS(), dropout=0.5), "three", ValueError, "no dropout"),
    (MLPClassifier(n_iter_no_change=0.5), "three", TypeError, "n_iter_no_change"),
    (MLPClassifier(), "number", ValueError, "Unknown label type"),
    (MLPRegressor("cross_entropy"), "number", ValueError, "one output for each number"),
    (MLPRegressor("gaussian_nll"), "number", ValueError, "one output for each number"),
    (MLPRegressor("squares"), "number", ValueError, "loss must be a known name"),
    (MLPRegressor(cr.MSE(reduction="sum")), "number", ValueError, "a mean over rows"),
    (
        MLPRegressor(activation=cr.Linear(100, 100)),
        "number",
        ValueError,
        "activation must have no parameters",
    ),
    (MLPRegressor(dtype="foo"), "number", ValueError, "dtype must be a float type"),
    (MLPRegressor(momentum=2.0, solver="sgd"), "number", ValueError, "momentum must be a finite number"),
    (MLPRegressor(epsilon=0.0), "number", ValueError, "epsilon must be a finite number"),
    (MLPRegressor(solver=cr.SGD(), learning_rate="adaptive"), "number", ValueError, "is for solver='sgd'"),
    (MLPRegressor("poisson"), "number", ValueError, "≥ 0 for loss 'poisson'"),
]


@pytest.mark.parametrize(("model", "target", "kind", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_arguments(model, target, kind, message):
    with pytest.raises(kind, match=message):
        model.fit(X, TARGETS[target])
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert not hasattr(model, "coefs_")


def test_what_partial_fit_cannot_do():
    y = TARGETS["three"]
    assert not hasattr(MLPClassifier(solver="lbfgs"), "partial_fit")
    assert not hasattr(MLPRegressor(solver=cr.GD(0.1)), "partial_fit")
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        MLPClassifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="early_stopping=False, got True"):
        MLPClassifier(early_stopping=True).partial_fit(X, y, classes=[0, 10, 20])
    with pytest.raises(ValueError, match="class_weight"):
        MLPClassifier(class_weight="balanced").partial_fit(X, y, classes=[0, 10, 20])
    model = MLPClassifier().partial_fit(X, y, classes=[0, 10, 20])
    with pytest.raises(ValueError, match="classes must stay the same"):
        model.partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="unseen labels"):
        model.partial_fit(X, y + 1)
    with pytest.raises(ValueError, match="y must be as it was"):
        model.partial_fit(X, TARGETS["labels"])
    labels = MLPClassifier().partial_fit(X, TARGETS["labels"], classes=[0, 1, 2])
    with pytest.raises(ValueError, match="y must be as it was: expected 3 columns"):
        labels.partial_fit(X, TARGETS["labels"][:, :2])
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        MLPClassifier().fit(X, 2 * TARGETS["labels"] - 1)
    with pytest.raises(TypeError, match="callbacks must be a list"):
        MLPClassifier().fit(X, y, callbacks=print)
    assert fitted(MLPClassifier(max_iter=1), X, y, callbacks=None).n_iter_ == 1


def test_without_scikit_learn_one_line_says_what_is_missing():
    code = "import sys; sys.modules['sklearn'] = None; import chainrule.sklearn"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode and "ImportError: [chainrule.sklearn] these estimators" in done.stderr


# ------------------------------------------------------------ one line each: what a change of it would do


def same_weights(one, other):
    for a, b in zip(one.coefs_ + one.intercepts_, other.coefs_ + other.intercepts_, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def stop(epoch, logs):
    raise RuntimeError("enough")


@pytest.mark.parametrize("target", ["two", "three", "labels", "number", "numbers"])
def test_epsilon_counts_for_sums_over_outputs(target):
    same_weights(*both(target, epsilon=0.1, beta_2=0.0))  # both Adams are one where β2 is 0


def test_alpha_counts_beside_the_sum_of_weights():
    arguments = {"solver": "sgd", "learning_rate_init": 0.05, "alpha": 5.0, **EXACT}
    twice = np.full(300, 2.0)
    if "sample_weight" not in inspect.signature(neural_network.MLPClassifier.fit).parameters:
        pytest.skip("this scikit-learn's MLP has no sample weights")
    same_weights(*(
        fitted(kind(**arguments), X, TARGETS["three"], sample_weight=twice)
        for kind in (MLPClassifier, neural_network.MLPClassifier)
    ))  # fmt: skip


@pytest.mark.parametrize("tol", [0.1, 0.03, 0.005])
def test_tol_of_lbfgs_is_of_the_sum_over_labels(tol):
    y = TARGETS["labels"]
    model = MLPClassifier((), solver="lbfgs", alpha=1.0, tol=tol, random_state=0).fit(X, y)
    gradient = (X.T @ (model.predict_proba(X) - y) + model.coefs_[0]) / 300
    assert np.abs(gradient).max() <= tol * (1 + 1e-9)


def test_an_adaptive_rate_ends_where_scikit_learns_does():
    arguments = {"learning_rate": "adaptive", "learning_rate_init": 0.01, "momentum": 0.0, "max_iter": 99}
    ours, theirs = both("labels", solver="sgd", tol=10.0, n_iter_no_change=1, **arguments)
    assert ours.n_iter_ == theirs.n_iter_ < 99


def test_poisson_stops_where_scikit_learn_does():
    if "loss" not in inspect.signature(neural_network.MLPRegressor).parameters:
        pytest.skip("this scikit-learn has no Poisson loss")
    counts = np.floor(np.exp(X[:, :3]))
    arguments = {**EXACT, "loss": "poisson", "solver": "sgd", "learning_rate_init": 0.01}
    arguments |= {"tol": 3e-3, "n_iter_no_change": 4, "max_iter": 500}
    ours, theirs = (fitted(kind(**arguments), X, counts) for kind in (MLPRegressor, PEERS[MLPRegressor]))
    assert ours.n_iter_ == theirs.n_iter_ < 500


def test_scores_that_are_equal_are_progress_where_tol_is_0():
    arguments = {"early_stopping": True, "tol": 0.0, "n_iter_no_change": 2, "batch_size": 54}
    ours, theirs = both("two labels", solver="sgd", learning_rate_init=1e-4, **arguments)
    assert ours.n_iter_ == theirs.n_iter_
    assert len(set(ours.validation_scores_)) < len(ours.validation_scores_) - 3


@pytest.mark.parametrize("target", ["labels", "number"])
def test_an_inverse_scaling_rate_goes_on_over_calls_of_partial_fit(target):
    arguments = {**EXACT, "solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.5}
    models = [kind(momentum=0.0, **arguments) for kind in (kind_of(target), PEERS[kind_of(target)])]
    for _ in range(4):
        for model in models:
            model.partial_fit(X, TARGETS[target], **({} if target == "number" else {"classes": [0, 1, 2]}))
    same_weights(*models)
    rate = models[0]._optimizer.lr
    with pytest.raises(RuntimeError, match="enough"):
        models[0]._train(Rows(X, TARGETS[target]), None, [stop], incremental=True)
    assert models[0]._optimizer.lr == rate


def test_a_warm_fit_waits_anew_and_scores_anew():
    y = TARGETS["number"]
    model = MLPRegressor(random_state=0, warm_start=True, tol=0.01, n_iter_no_change=3).fit(X, y)
    assert model.fit(X, y).n_iter_ > 3
    fitted(model.set_params(early_stopping=True, max_iter=3), X, y, X_val=X, y_val=y - 100)
    assert model.best_validation_score_ == max(model.validation_scores_)


def test_ctrl_c_keeps_the_best_scored():
    def interrupt(epoch, logs):
        if epoch == 12:
            raise KeyboardInterrupt

    y = TARGETS["number"]
    arguments = {"solver": "sgd", "learning_rate_init": 0.15, "early_stopping": True, "n_iter_no_change": 50}
    with pytest.warns(UserWarning, match="interrupted"):
        model = MLPRegressor(random_state=0, **arguments).fit(
            X, y, X_val=X[:50], y_val=y[:50], callbacks=[interrupt]
        )
    assert model.validation_scores_[-1] < model.best_validation_score_ == model.score(X[:50], y[:50])


def test_ctrl_c_in_the_first_epoch_of_another_fit_is_undone():
    model = fitted(MLPClassifier(**EXACT), X, TARGETS["three"])
    before = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X[:, :2], TARGETS["two"], callbacks=[AtOnce()])
    assert vars(model) == before


@pytest.mark.parametrize("early", [False, True])
def test_lbfgs_has_a_rule_of_its_own_for_its_loss_but_not_for_scores(early):
    arguments = {"early_stopping": early, "tol": 10.0, "n_iter_no_change": 2, "max_iter": 30}
    model = fitted(MLPRegressor(solver=cr.LBFGS(), random_state=0, **arguments), X, TARGETS["number"])
    assert model.n_iter_ == (4 if early else 30)


def test_a_sigmoid_layer_begins_as_logistic_does():
    a, b = (
        fitted(MLPRegressor(activation=activation, **EXACT), X, TARGETS["number"])
        for activation in ("logistic", cr.Sigmoid())
    )
    assert a.loss_curve_ == b.loss_curve_


def test_optimizers_that_are_passed_are_left_alone():
    model = fitted(MLPRegressor(solver=cr.Adam(), warm_start=True, **EXACT), X, TARGETS["number"])
    fitted(model, X, TARGETS["number"])
    assert model._optimizer is not model.solver and model._optimizer.state_dict(model.network_)["step"] == 90
    stream = MLPRegressor(solver=cr.SGD(1e-3)).partial_fit(X, TARGETS["number"])
    for solver, rate in ((cr.SGD(0.05), 0.05), ("sgd", 1e-3), (cr.SGD(0.02), 0.02)):
        assert stream.set_params(solver=solver).partial_fit(X, TARGETS["number"])._optimizer.lr == rate


def test_class_and_sample_weights_multiply():
    y, weight = TARGETS["two"], RNG.uniform(0.5, 2, 300)
    both_kinds = fitted(MLPClassifier(class_weight={"yes": 3.0}, **EXACT), X, y, sample_weight=weight)
    product = weight * np.where(y == "yes", 3.0, 1.0)
    assert both_kinds.loss_curve_ == fitted(MLPClassifier(**EXACT), X, y, sample_weight=product).loss_curve_
    for weights, given in (({"yes": 0, "no": 0}, None), ({"yes": 0}, (y == "yes").astype(float))):
        with pytest.raises(ValueError, match="class_weight · sample_weight must not be all zero"):
            MLPClassifier(class_weight=weights).fit(X, y, sample_weight=given)


def test_class_weights_are_those_of_this_fit():
    y, rare = TARGETS["two"], np.where(X[:, 0] > 1.5, "yes", "no")
    model = MLPClassifier(class_weight="balanced", **EXACT)
    again, fresh = fitted(fitted(model, X, y), X, rare).loss_curve_, fitted(clone(model), X, rare).loss_curve_
    assert again == fresh and len(again) == model.n_iter_
    warm = fitted(MLPClassifier(warm_start=True, **EXACT), X, y)
    fitted(warm.set_params(class_weight={"yes": 3.0}), X, y)


@pytest.mark.parametrize("solver", ["sgd", "adam", "lbfgs"])
def test_a_callable_is_taken_as_it_is_over_several_outputs(solver):
    def half(f, y):
        d = f - y
        return 0.5 * (d**2).sum(axis=1), d

    arguments = {**EXACT, "solver": solver, "alpha": 3.0}
    one, other = (
        fitted(MLPRegressor(loss, **arguments), X, TARGETS["numbers"]) for loss in (half, "squared_error")
    )
    same_weights(one, other)
    np.testing.assert_allclose(one.loss_curve_, 2 * np.array(other.loss_curve_))  # theirs is a mean over two


@pytest.mark.parametrize("target", ["two", "three", "labels", "number", "numbers", "counts"])
def test_weights_count_in_validation_scores(target):
    weight = RNG.uniform(0, 2, 300)
    counts = target == "counts"
    y = np.floor(np.exp(X[:, 0])) if counts else TARGETS[target]
    kind, more = (MLPRegressor, {"loss": "poisson"}) if counts else (kind_of(target), {})
    rest = {"X_val": X[:100], "y_val": y[:100], "sample_weight_val": weight[:100]}
    model = fitted(kind(early_stopping=True, **EXACT, **more), X, y, **rest)
    weighted, plain = (model.score(X[:100], y[:100], sample_weight=w) for w in (weight[:100], None))
    assert weighted == pytest.approx(model.best_validation_score_, rel=1e-12)
    assert plain != pytest.approx(model.best_validation_score_, rel=1e-6)


def test_an_infinite_prediction_is_a_score_that_is_not_better():
    rows, counts = X.copy(), np.floor(np.exp(X[:, 0]))
    rows[:8] *= 1e4
    model = MLPRegressor("poisson", early_stopping=True, random_state=0, max_iter=3)
    assert np.isnan(fitted(model, X, counts, X_val=rows, y_val=counts).validation_scores_).any()


@pytest.mark.parametrize("given", [False, True])
def test_sparse_rows_stop_early_where_dense_ones_do(given):
    y = TARGETS["three"]
    one, other = (
        fitted(MLPClassifier(early_stopping=True, **EXACT), rows, y,
               **({"X_val": rows[:50], "y_val": y[:50]} if given else {}))
        for rows in (sparse.csr_array(X), X)
    )  # fmt: skip
    assert one.validation_scores_ == other.validation_scores_


def test_what_is_said_and_where(capsys):
    fitted(MLPRegressor(verbose=5, max_iter=3), X, TARGETS["number"])
    assert "epoch 3/3" in capsys.readouterr().err
    with pytest.warns(ConvergenceWarning) as told:
        MLPRegressor(max_iter=2).fit(X, TARGETS["number"])
    assert told[0].filename == __file__


def test_the_random_state_orders_the_rows():
    y = TARGETS["number"]
    model = MLPRegressor(random_state=0).partial_fit(X, y)
    one, other = (
        pickle.loads(pickle.dumps(model)).set_params(random_state=k, batch_size=10).partial_fit(X, y)
        for k in (1, 2)
    )
    assert (one.coefs_[0] != other.coefs_[0]).any()


def test_the_best_loss_is_not_the_last():
    model = MLPRegressor(learning_rate_init=0.3, batch_size=10, random_state=0, max_iter=20)
    assert fitted(model, X, TARGETS["number"]).best_loss_ == min(model.loss_curve_) < model.loss_


def test_unseen_classes_are_never_taken_for_others():
    """scikit-learn's encoder casts labels to the classes' own type: "yesterday" to "yes", 256 to 0."""
    seen = [
        (["yes", "no"], "yesterday"),
        (np.array([0, 1], np.int8), 256),
        ([False, True], 2),
    ]
    for classes, other in seen:
        y = np.resize(np.array(classes), 300)
        strange = np.array([other if k == 7 else label for k, label in enumerate(y.tolist())])
        for model in (MLPClassifier(warm_start=True, **EXACT), MLPClassifier(early_stopping=True, **EXACT)):
            with pytest.raises(ValueError, match="unseen labels"):
                if model.warm_start:
                    fitted(model, X, y).fit(X, strange)
                else:
                    model.fit(X, y, X_val=X, y_val=strange)


def test_the_same_form_in_other_words():
    model = fitted(
        MLPClassifier((8,), "logistic", warm_start=True, dtype="float32", **EXACT), X, TARGETS["two"]
    )
    for change in (
        {"hidden_layer_sizes": [8]},
        {"hidden_layer_sizes": 8},
        {"activation": "sigmoid"},
        {"dtype": np.float32},
    ):
        fitted(model.set_params(**change), X, TARGETS["two"])
    with pytest.raises(ValueError, match="as many columns as before: expected 1, got 2"):
        fitted(MLPRegressor(warm_start=True, **EXACT), X, TARGETS["number"]).fit(X, TARGETS["numbers"])
