# SPDX-License-Identifier: MIT
"""Training as a whole: the same bits however it is run, the right optimum; forks, threads and time."""

import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import chainrule as cr
from chainrule import _core
from conftest import FREED_IS_FREE, assert_same_bits, engine, eps, layers_of, typed


def run_python(code, timeout=120, **environment):
    """Runs the code in a fresh interpreter and returns its output; a hang ends at the timeout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---- the same bits -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": [0.9, 0.0, 1.0, 0.01],
    "adam": [0.9, 0.999, 1e-8, 0.0],
    "adamw": [0.9, 0.999, 1e-8, 0.01],
    "rmsprop": [0.9, 1e-8, 0.0, 0.5, 1.0],
}
LAYERS = layers_of([40, 130, 66, 3], "gelu", "tanh")  # widths that divide no tile
LAYERS.insert(2, ("dropout", 130, 130, 0.3, False, None))


def whole_fit(dtype, optimizer, clip_norm):
    """Losses, parameters and state after three epochs; the steps are large enough for several threads."""
    rng = np.random.default_rng(5)
    net = engine(LAYERS, dtype, rng)
    x, y = rng.standard_normal((301, 40)).astype(dtype), rng.integers(0, 3, 301)
    weight = (rng.random(301) + 0.5).astype(dtype)
    state = typed("Optimizer", dtype)(net, optimizer, OPTIMIZERS[optimizer])
    how = _core.Loss("cross_entropy", 0.0, "mean", None)
    trainer = typed("Trainer", dtype)(net, state, how, x, y, weight, 128, True, 9, 1e-5, 1e-4, 0.0, clip_norm)
    losses = trainer.run(0, np.full(3, 0.003))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    return [losses, *(net.get_parameter(k) for k in range(6)), *state.get_state(), net.predict(x)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_bits_do_not_depend_on_threads(optimizer, clip_norm, isa, dtype, on_threads):
    """A sum whose order follows the partition, a mask drawn per thread, two threads that share a tile."""
    first, *others = on_threads(lambda: whole_fit(dtype, optimizer, clip_norm))
    for count, other in zip((2, 3, 4, 7), others, strict=True):
        for k, (a, b) in enumerate(zip(first, other, strict=True)):
            assert_same_bits(a, b, f"{count} threads, array {k}")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_bits_do_not_depend_on_the_instruction_set(optimizer, clip_norm, dtype, on_fused_isas):
    first, *others = on_fused_isas(lambda: whole_fit(dtype, optimizer, clip_norm))
    for other in others:
        for k, (a, b) in enumerate(zip(first, other, strict=True)):
            assert_same_bits(a, b, f"array {k}")


def fitted(seed=0, fit_seed=0, dtype="float32", epochs=5, **arguments):
    rng = np.random.default_rng(8)
    X, y = rng.standard_normal((70, 4)), rng.standard_normal(70)
    net = cr.mlp([4, 9, 1], dropout=0.2, seed=seed, dtype=dtype)
    how = {"loss": "mse", "epochs": epochs, "batch_size": 16, "seed": fit_seed, "verbose": 0, **arguments}
    history = net.fit(X, y, **how)
    return np.concatenate([p.ravel() for p in net.state_dict().values()]), np.array(history["loss"])


def test_equal_seeds_mean_equal_bits(dtype):
    """A global generator, memory that was not initialised, the time of day: anything that is not the seed."""
    a, b = fitted(dtype=dtype.name), fitted(dtype=dtype.name)
    assert_same_bits(a[0], b[0])
    assert_same_bits(a[1], b[1])
    for other in (fitted(seed=1, dtype=dtype.name), fitted(fit_seed=1, dtype=dtype.name)):
        assert (other[0] != a[0]).mean() > 0.5


def test_who_is_watching_changes_no_bit():
    """One engine call for a whole fit, one an epoch for a callback or validation: the same training."""
    alone = fitted()
    assert_same_bits(fitted(callbacks=[lambda epoch, logs: None])[0], alone[0])
    assert_same_bits(fitted(validation_data=(np.zeros((3, 4)), np.zeros(3)))[0], alone[0])
    assert_same_bits(fitted(schedule=cr.StepLR(100))[0], alone[0])


def test_two_fits_go_on_like_one_of_twice_the_length():
    """State lost between fits with one optimizer object; without shuffling nothing else may differ."""
    optimizer, X = cr.Adam(1e-2), np.random.default_rng(8).standard_normal((40, 4))
    one, two = (cr.mlp([4, 9, 1], seed=3) for _ in range(2))
    how = {"loss": "mse", "batch_size": 16, "shuffle": False, "verbose": 0}
    one.fit(X, X[:, 0], optimizer=cr.Adam(1e-2), epochs=6, **how)
    for _ in range(2):
        two.fit(X, X[:, 0], optimizer=optimizer, epochs=3, **how)
    for name, p in one.state_dict().items():
        assert_same_bits(two.state_dict()[name], p, name)


# ---- the right optimum -------------------------------------------------------------------------------------


def test_gradient_descent_solves_least_squares(rng):
    """The normal equations as judge. After k steps of rate 1/λ₁ the error is (1 − λ₄/λ₁)ᵏ: below 1e-14."""
    X, Y = rng.standard_normal((60, 3)), rng.standard_normal((60, 2))
    A = np.hstack([X, np.ones((60, 1))])
    exact = np.linalg.lstsq(A, Y, rcond=None)[0]
    eigenvalues = np.linalg.eigvalsh(A.T @ A / 60)
    net = cr.Sequential(cr.Linear(3, 2), dtype="float64", seed=1)
    steps = int(40 * eigenvalues[-1] / eigenvalues[0])
    net.fit(X, Y, loss="least_squares", optimizer=cr.GD(1 / eigenvalues[-1]), epochs=steps, verbose=0)
    got = net.state_dict()
    np.testing.assert_allclose(got["0.weight"], exact[:3].T, atol=1e-12)
    np.testing.assert_allclose(got["0.bias"], exact[3], atol=1e-12)


def newton(A, y, mean):
    """Maximum likelihood with the natural link: θ ← θ + (Aᵀ diag(μ′) A)⁻¹ Aᵀ(y − μ)."""
    theta = np.zeros(A.shape[1])
    for _ in range(30):
        mu, slope = mean(A @ theta)
        theta += np.linalg.solve(A.T @ (slope[:, None] * A), A.T @ (y - mu))
    return theta, np.linalg.eigvalsh(A.T @ (slope[:, None] * A) / len(y))


@pytest.mark.parametrize("loss", ["logistic", "poisson"])
def test_generalised_linear_models_reach_maximum_likelihood(loss, rng):
    """A loss that is not the likelihood it says it is: Newton's iteration in NumPy finds other coefficients
    then.

    At the optimum the gradient vanishes like (1 − λ₁/λ₄)ᵏ, here below 1e-14 of the start.
    """
    X = rng.standard_normal((200, 3))
    A, signal = np.hstack([X, np.ones((200, 1))]), X @ [1.0, -0.5, 0.3] + 0.2
    if loss == "logistic":
        y = (rng.random(200) < 1 / (1 + np.exp(-signal))).astype(float)
        theta, curvature = newton(A, y, lambda f: (s := 1 / (1 + np.exp(-f)), s * (1 - s)))
    else:
        y = rng.poisson(np.exp(signal)).astype(float)
        theta, curvature = newton(A, y, lambda f: (np.exp(f), np.exp(f)))
    net = cr.Sequential(cr.Linear(3, 1), dtype="float64", seed=1)
    rate = 0.5 / curvature[-1] if loss == "poisson" else 4 / 10
    steps = int(40 / (rate * curvature[0]))
    net.fit(X, y, loss=loss, optimizer=cr.GD(rate), epochs=steps, verbose=0)
    got = net.state_dict()
    np.testing.assert_allclose([*got["0.weight"][0], got["0.bias"][0]], theta, atol=1e-11)


@pytest.mark.parametrize("shape", [[3, 5, 2], [64, 128, 2]])  # for one thread, and for two
def test_fading_moments_are_never_subnormal(shape, isa, rng):
    """Subnormal moments of units that died stay for ever; some processors need a hundred cycles for each."""
    net = engine(layers_of(shape, "relu"), np.float32, rng)
    state = _core.Optimizer32(net, "adam", [0.9, 0.9, 1e-8, 0.0])
    x, y = (rng.standard_normal((64, n)).astype(np.float32) for n in (shape[0], shape[-1]))
    how = _core.Loss("least_squares", 0.0, "mean", None)
    trainer = _core.Trainer32(net, state, how, x, y, None, 64, False, 0, 0.0, 0.0, 0.0, 0.0)
    trainer.step(x, y, None, 0.001)
    assert all(slot.any() for slot in state.get_state()[:2])
    for _ in range(1200):  # 0.9 ** 1200 is 1e-55
        trainer.step(x, y, np.zeros(64, np.float32), 0.001)
    for slot in state.get_state():
        assert not ((slot != 0) & (abs(slot) < np.finfo(np.float32).tiny)).any()


# ---- steps and data of any size ----------------------------------------------------------------------------


def trainer_of(net, dtype, x, y, batch_size=4, loss="least_squares"):
    optimizer = typed("Optimizer", dtype)(net, "sgd", [0.0, 0.0, 0.0, 0.0])
    how = _core.Loss(loss, 0.0, "mean", None)
    return typed("Trainer", dtype)(net, optimizer, how, x, y, None, batch_size, False, 0, 0.0, 0.0, 0.0, 0.0)


def test_steps_of_growing_and_shrinking_batches(dtype, rng):
    """Buffers of an earlier batch, larger or smaller, read again: each step is as if it were the first."""
    layers = layers_of([7, 33, 2], "relu")
    net = engine(layers, dtype, rng)
    x, y = rng.standard_normal((200, 7)).astype(dtype), rng.standard_normal((200, 2)).astype(dtype)
    lasting = trainer_of(net, dtype, x[:4].copy(), y[:4].copy())
    for rows in (1, 4, 200, 3, 97, 1, 150, 2):
        start = net.snapshot()
        loss = lasting.step(x[:rows].copy(), y[:rows].copy(), None, 0.1)
        after = net.snapshot()
        net.restore(start)
        fresh = trainer_of(net, dtype, x[:rows].copy(), y[:rows].copy())
        assert fresh.step(x[:rows].copy(), y[:rows].copy(), None, 0.1) == loss
        assert_same_bits(net.snapshot(), after, f"{rows} rows")


def test_the_trainer_keeps_its_data(rng):
    """Arrays freed while the engine still points to them."""
    net = engine(layers_of([7, 2]), np.float64, rng)
    x, y = rng.standard_normal((5000, 7)), rng.standard_normal((5000, 2))
    expected = trainer_of(net, np.float64, x, y).run(0, np.zeros(1))
    trainer = trainer_of(net, np.float64, x.copy(), y.copy())
    gc.collect()
    trash = [np.full(35000, np.nan) for _ in range(8)]
    assert_same_bits(trainer.run(0, np.zeros(1)), expected)
    assert len(trash) == 8


@pytest.mark.parametrize("rows", [1, 3, 1023, 1024, 1025, 3000])
def test_evaluation_is_the_loss_of_all_rows(rows, dtype, rng):
    """Pieces averaged without regard to their sizes or weights. Bound: the rounding of a mean."""
    net = engine(layers_of([4, 6, 3], "tanh"), dtype, rng)
    x, y = rng.standard_normal((rows, 4)).astype(dtype), rng.integers(0, 3, rows)
    weight = (rng.random(rows) * (np.arange(rows) % 3)).astype(dtype) + dtype.type(0.01)
    for w in (None, weight):
        for reduction in ("mean", "sum"):
            expected = _core.loss("cross_entropy", net.predict(x), y, w, 0.0, reduction)[0]
            got = net.evaluate(x, y, w, _core.Loss("cross_entropy", 0.0, reduction, None))
            assert got == pytest.approx(expected, rel=32 * eps(dtype))


def test_a_rate_of_zero_changes_nothing(dtype, rng):
    """A step that touches weights it was not to move, or a transposed copy that differs from them."""
    net = engine(layers_of([5, 17, 3], "tanh"), dtype, rng)
    x, y = rng.standard_normal((30, 5)).astype(dtype), rng.standard_normal((30, 3)).astype(dtype)
    before = net.snapshot()
    losses = trainer_of(net, dtype, x, y).run(0, np.zeros(4))
    assert_same_bits(net.snapshot(), before)
    assert (losses == losses[0]).all()


def test_training_ends_with_the_first_loss_that_is_not_finite(dtype, rng):
    """Epochs of NaN instead of an answer: at a rate far too large, the engine stops at the overflow."""
    net = engine(layers_of([5, 17, 3], "relu"), dtype, rng)
    x, y = rng.standard_normal((30, 5)).astype(dtype), rng.standard_normal((30, 3)).astype(dtype)
    losses = trainer_of(net, dtype, x, y).run(0, np.full(500, 1e3))
    assert len(losses) < 500 and not np.isfinite(losses[-1]) and np.isfinite(losses[:-1]).all()


# ---- forks, threads, time ----------------------------------------------------------------------------------

BIG_FIT = """
import os, sys
import numpy as np
import chainrule as cr

cr.set_num_threads(4)
rng = np.random.default_rng(0)
X, y = rng.standard_normal((512, 64)), rng.standard_normal(512)

def fit():
    net = cr.mlp([64, 256, 128, 1], seed=0)
    net.fit(X, y, loss="mse", epochs=3, batch_size=256, verbose=0)
    return net.predict(X).tobytes()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_a_fit_then_fit_in_the_child():
    """The child has the pool's memory but not its threads: it must start them anew, not wait for ever."""
    run_python(
        BIG_FIT
        + textwrap.dedent("""
        before = fit()
        for generation in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if fit() == before and fit() == before else 1)
            assert os.waitpid(child, 0)[1] == 0, generation
            assert fit() == before
        """)
    )


def test_threads_with_networks_of_their_own(rng):
    """Scratch memory shared by all networks, a pool entered twice, a deadlock with the interpreter's lock."""
    before = _core.num_threads()
    _core.set_num_threads(3)
    try:
        expected = [whole_fit(np.float32, optimizer, 0.5) for optimizer in OPTIMIZERS]
        results = [None] * 8

        def work(i):
            results[i] = whole_fit(np.float32, list(OPTIMIZERS)[i % 4], 0.5)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        _core.set_num_threads(before)
    for i, result in enumerate(results):
        for a, b in zip(expected[i % 4], result, strict=True):
            assert_same_bits(a, b, f"thread {i}")


def test_threads_with_one_network(rng):
    """Prediction, derivative and loss of one network from eight threads: none may use shared scratch."""
    net = engine(LAYERS, np.float32, rng)
    x, y = rng.standard_normal((97, 40)).astype(np.float32), rng.integers(0, 3, 97)
    how = _core.Loss("cross_entropy", 0.0, "mean", None)

    def look():
        value, grads = net.value_and_grad(x, y, None, how)
        return [net.predict(x), *net.trace(x), np.array([value, net.evaluate(x, y, None, how)]), *grads]

    expected, results = look(), []
    workers = [threading.Thread(target=lambda: results.extend(look() for _ in range(20))) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 160
    for result in results:
        for a, b in zip(expected, result, strict=True):
            assert_same_bits(a, b)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module on this system")
def test_memory_does_not_grow(rng):
    """A buffer or reference leaked by each step, prediction or error: 20 000 of each may add 4 MiB at most.

    In an interpreter of its own, whose peak is that of this work; 200 bytes lost a step would be seen.
    """
    run_python("""
        import resource, sys
        import numpy as np
        import chainrule as cr

        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
        net, optimizer = cr.mlp([8, 16, 1], seed=0), cr.Adam()

        def work(times):
            for _ in range(times):
                net.train_step(X, y, loss="mse", optimizer=optimizer)
                net.predict(X)
                try:
                    net.predict(X[:, :3])
                except ValueError:
                    pass
            for _ in range(times // 100):
                net.fit(X, y, loss="mse", epochs=2, verbose=0)
                net.value_and_grad(X, y, loss="mse")

        def peak():
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

        work(2000)
        before = peak()
        work(20_000)
        assert peak() - before < 4 << 20, f"{(peak() - before) / 2**20:.1f} MiB"
        """, **FREED_IS_FREE)  # fmt: skip
