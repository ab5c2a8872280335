# SPDX-License-Identifier: MIT
"""The chain as a whole: every φˡ, every gradient, rows that know nothing of their batch, dropout's masks."""

import numpy as np
import pytest

from chainrule import _core, reference
from conftest import assert_same_bits, assert_within, engine, eps, layers_of, twin, typed, values

WIDTHS = [1, 2, 3, 7, 16, 17, 64, 65]
OPS = [name for kind, name, _ in _core.ops() if kind in ("elementwise", "rowwise")]
PARAMETERS = {"leaky_relu": 0.1, "elu": 1.0}
SMOOTH = [name for name in OPS if name not in ("relu", "leaky_relu")]


def with_parameter(name):
    return name, PARAMETERS.get(name, 0.0)


def random_chain(rng, first, names=OPS):
    """Depth 1 to 6, the op `first` somewhere in it, others drawn; some without bias, some ops doubled."""
    depth = int(rng.integers(1, 7))
    sizes = rng.choice(WIDTHS, depth + 1).tolist()
    ops = [with_parameter(str(name)) for name in rng.choice(names, depth)]
    ops[int(rng.integers(depth))] = with_parameter(first)
    layers = layers_of(sizes, *ops, bias=bool(rng.integers(2)))
    if rng.integers(
        2
    ):  # an op behind an op, and one in front of all: each shares or saves buffers in its own way
        name, n = with_parameter(str(rng.choice(names))), layers[-1][2]
        layers.append((name[0], n, n, name[1], False, None))
        layers.insert(0, ("tanh", sizes[0], sizes[0], 0.0, False, None))
    return layers


def data(rng, layers, rows, dtype):
    x = rng.standard_normal((rows, layers[0][1])).astype(dtype)
    y = rng.standard_normal((rows, layers[-1][2])).astype(dtype)
    return x, y


def sizes_of_terms(layers, net, phi, c):
    """The sweeps over absolute values: how large the terms are of which each φˡ and each gradient is a sum.

    |slope| < 1.2 for every op; a row-wise op adds the row's sum. A rounding anywhere moves a result by at
    most its own size along all paths, so the error is a small multiple of eps times these.
    """
    up, cotangents, grads = [np.abs(phi[0])], np.abs(c), []
    for (name, *_), link, y in zip(layers, net.layers, phi[1:], strict=True):
        size = up[-1]
        if name == "linear":
            up.append(size @ np.abs(link.params[0]).T + sum(np.abs(b) for b in link.params[1:]))
        else:
            rows = size.max(axis=1, keepdims=True) if "softmax" in name else 0.0
            up.append(1.2 * size + rows + np.abs(y))
    for (name, *_), link, size in reversed(list(zip(layers, net.layers, up[:-1], strict=True))):
        if name == "linear":
            grads = [cotangents.T @ (size + 1), cotangents.sum(axis=0)][: len(link.params)] + grads
            cotangents = cotangents @ np.abs(link.params[0])
        else:
            # A slope is itself moved by the error of what it is read off, hence the factor size + 1.
            cotangents = cotangents * 1.2 * (size + 1)
            if "softmax" in name:
                cotangents = cotangents + cotangents.sum(axis=1, keepdims=True)
    return up, grads


@pytest.mark.parametrize("first", OPS)
def test_trace_and_gradients_equal_reference(first, isa, dtype, rng):
    """Any slip in the chain: order, transposition, a buffer shared by two layers that both still need it.

    Bound: 8 roundings a layer and one a term of each sum, each as large as the terms (sizes_of_terms).
    """
    for _ in range(6):
        layers = random_chain(rng, first)
        net = engine(layers, dtype, rng)
        own = twin(layers, net)
        x, y = data(rng, layers, int(rng.choice([1, 3, 8, 33])), dtype)
        phi = own.forward(x.astype(float))
        value, grads = own.value_and_grad(x.astype(float), y.astype(float), "least_squares")
        df = reference.loss("least_squares", phi[-1], y.astype(float))[1]
        up, sizes = sizes_of_terms(layers, own, phi, df)
        step = eps(dtype) * (8 * len(layers) + max(layer[1] for layer in layers) + len(x))
        trace = net.trace(x)
        assert len(trace) == len(layers)
        for k, got in enumerate(trace, start=1):
            assert_within(got, phi[k], step * up[k], f"φ{k} of {layers} ")
        assert_same_bits(trace[-1], net.predict(x))
        got, got_grads = net.value_and_grad(x, y, None, _core.Loss("least_squares", 0.0, "mean", None))
        size_of_value = ((up[-1] + np.abs(y)) ** 2).sum() / len(x)
        assert_within(np.array(got), np.array(value), step * size_of_value)
        for (k, name, shape), ours, theirs, size in zip(net.parameters, got_grads, grads, sizes, strict=True):
            assert ours.shape == shape and ours.dtype == dtype
            assert_within(ours, theirs, 4 * step * size, f"{k}.{name} of {layers} ")


@pytest.mark.parametrize("first", SMOOTH)
@pytest.mark.parametrize("loss", ["least_squares", "logistic", "poisson"])
def test_gradient_is_that_of_the_loss(first, loss, isa, rng):
    """What engine and reference both have wrong: (L(θ + hu) − L(θ − hu)) / 2h for a random direction u of all
    parameters.

    Errors: h² times third derivatives, and the rounding of L over h. Both are measured against the length of
    the gradient in the bound 1e-6; a wrong factor or sign anywhere is of order 1.
    """
    h = 1e-5
    layers = random_chain(rng, first, SMOOTH)
    net = engine(layers, np.float64, rng)
    x, y = data(rng, layers, 9, np.float64)
    y, weight = np.abs(y) if loss == "poisson" else 1 / (1 + np.exp(-y)), rng.random(9) + 0.1
    how = _core.Loss(loss, 0.0, "mean", None)
    value, grads = net.value_and_grad(x, y, weight, how)
    start = [net.get_parameter(k) for k in range(len(grads))]
    direction = [rng.choice([-1.0, 1.0], g.shape) / np.sqrt(sum(g.size for g in grads)) for g in grads]
    losses = []
    for sign in (1, -1):
        for k, (p, u) in enumerate(zip(start, direction, strict=True)):
            net.set_parameter(k, p + sign * h * u)
        losses.append(net.evaluate(x, y, weight, how))
    slope = sum((g * u).sum() for g, u in zip(grads, direction, strict=True))
    length = np.sqrt(sum((g * g).sum() for g in grads))
    assert slope == pytest.approx(
        (losses[0] - losses[1]) / (2 * h), rel=0, abs=1e-6 * (length + abs(value) + 1)
    )


def test_gradients_add_over_the_batch(isa, dtype, rng):
    """A batch whose tail is summed twice or not at all: the gradient of a sum of losses is the sum over any
    parts.

    Bound: the two sides differ in the order of 200 additions, of terms no larger than the sum of their
    absolute values.
    """
    layers = layers_of([7, 17, 3], "tanh")
    net = engine(layers, dtype, rng)
    x, y = data(rng, layers, 200, dtype)
    how = _core.Loss("least_squares", 0.0, "sum", None)
    whole = net.value_and_grad(x, y, None, how)[1]
    rows = [net.value_and_grad(x[i : i + 1], y[i : i + 1], None, how)[1] for i in range(200)]
    for cut in (1, 5, 96, 97, 199):
        parts = [net.value_and_grad(x[part], y[part], None, how)[1] for part in (slice(cut), slice(cut, 200))]
        for k, g in enumerate(whole):
            bound = 200 * eps(dtype) * sum(np.abs(row[k].astype(float)) for row in rows)
            assert_within(parts[0][k].astype(float) + parts[1][k], g, bound, f"cut at {cut}, parameter {k} ")


@pytest.mark.parametrize("op", OPS)
def test_a_row_does_not_know_its_batch(op, isa, dtype, rng, on_threads):
    """Bits that depend on where in a block of rows a row stands, or on the number of threads."""
    layers = layers_of([13, 65, 31, 5], with_parameter(op), with_parameter(op))
    net = engine(layers, dtype, rng)
    x, _ = data(rng, layers, 97, dtype)
    whole = net.predict(x)
    for rows in (1, 2, 5, 6, 7, 96):
        for start in (0, 3, 97 - rows):
            part = np.ascontiguousarray(x[start : start + rows])
            assert_same_bits(net.predict(part), whole[start : start + rows], f"{rows} rows from {start}")
    for predicted in on_threads(lambda: net.predict(x)):
        assert_same_bits(predicted, whole)
    assert net.predict(x[:0]).shape == (0, 5)


def test_large_batches_do_not_depend_on_threads(isa, dtype, rng, on_threads):
    """Work that is really shared out: enough of it for each thread count to cut the rows elsewhere."""
    layers = layers_of([64, 130, 10], "gelu")
    net = engine(layers, dtype, rng)
    x, y = data(rng, layers, 1003, dtype)
    how = _core.Loss("least_squares", 0.0, "mean", None)

    def run():
        value, grads = net.value_and_grad(x, y, None, how)
        return [net.predict(x), np.array([value, net.evaluate(x, y, None, how)]), *grads]

    first, *others = on_threads(run)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert_same_bits(a, b)


WIDE = [70, 384, 256, 256]  # whole panels, which 2, 3 and 4 threads share by columns


@pytest.mark.parametrize(
    "layers",
    [
        layers_of(WIDE, "tanh", "relu"),
        layers_of([*WIDE, 10], "gelu", "silu", "sigmoid"),
        layers_of([*WIDE, 3], "relu", "softmax", "relu"),
        layers_of([*WIDE, 3], "relu", "log_softmax", "relu"),
        layers_of([70, 100, 256, 10], "relu", "relu"),
        [("relu", 70, 70, 0.0, False, None), *layers_of([*WIDE, 10], "relu", "relu")],
        layers_of(WIDE, "tanh", "relu", "relu", bias=False),
    ],
    ids=[
        "nothing by rows",
        "by columns, then rows",
        "row-wise op",
        "log_softmax",
        "uneven first",
        "op first",
        "no bias",
    ],
)
def test_threads_that_share_columns(layers, dtype, rng, on_threads):
    """Columns taken twice or by nobody, a bias's ones forgotten, a cotangent read before it is whole."""
    net = engine(layers, dtype, rng)
    x, y = data(rng, layers, 131, dtype)
    how = _core.Loss("least_squares", 0.0, "mean", None)

    def run():
        value, grads = net.value_and_grad(x, y, None, how)
        return [np.array([value, net.evaluate(x, y, None, how)]), *grads]

    first, *others = on_threads(run)
    for count, other in zip((2, 3, 4, 7), others, strict=True):
        for k, (a, b) in enumerate(zip(first, other, strict=True)):
            assert_same_bits(a, b, f"{count} threads, array {k}")


def test_parameters_come_back_as_they_went_in(dtype, rng):
    """Weights packed or unpacked wrongly, at widths around the panels; snapshots that alias the network."""
    for n_in, n_out in [(1, 1), (3, 2), (17, 65), (65, 17), (130, 129)]:
        net = engine(layers_of([n_in, n_out, 2], "tanh"), dtype, rng)
        assert net.parameters == [
            (0, "weight", (n_out, n_in)), (0, "bias", (n_out,)), (2, "weight", (2, n_out)), (2, "bias", (2,)),
        ]  # fmt: skip
        snapshot, before = net.snapshot(), [net.get_parameter(k) for k in range(4)]
        new = [rng.standard_normal(p.shape).astype(dtype) for p in before]
        for k, p in enumerate(new):
            net.set_parameter(k, p)
        for k, p in enumerate(new):
            assert_same_bits(net.get_parameter(k), p)
            net.get_parameter(k)[:] = 7  # a copy: writing to it changes nothing
            assert_same_bits(net.get_parameter(k), p)
        net.restore(snapshot)
        for k, p in enumerate(before):
            assert_same_bits(net.get_parameter(k), p)


# ---- dropout -----------------------------------------------------------------------------------------------


def mask(rows, columns, p=0.5, seed=1, layer=0, step=0, dtype=np.float64):
    return _core.dropout(np.ones((rows, columns), dtype), p, seed, layer, step)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean(p, isa, dtype):
    """A share other than p, or a scale other than 1/(1 − p): 40 000 draws, five standard deviations."""
    m = mask(200, 200, p, dtype=dtype)
    assert set(np.unique(m)) <= {0, dtype.type(1 / (1 - p))}
    assert abs((m == 0).mean() - p) <= 5 * np.sqrt(p * (1 - p) / 40_000)


def test_dropout_is_a_function_of_seed_layer_step_and_place(isa, dtype, rng):
    """Masks that repeat or depend on the batch's shape: equal calls agree, all others are independent."""
    base = mask(60, 70, dtype=dtype)
    assert_same_bits(mask(60, 70, dtype=dtype), base)
    for other in ({"seed": 2}, {"layer": 1}, {"step": 1}, {"seed": 2**40 + 1}, {"step": 2**33}):
        agree = ((mask(60, 70, **other) == 0) == (base == 0)).mean()
        assert abs(agree - 0.5) < 5 * 0.5 / np.sqrt(60 * 70), other
    for rows, columns in [(1, 1), (7, 3), (59, 17), (60, 69)]:
        assert_same_bits(mask(rows, columns, dtype=dtype), base[:rows, :columns], f"{rows}×{columns}")
    for a in (base[:-1] != base[1:], base[:, :-1] != base[:, 1:]):  # neighbours are independent too
        assert abs(a.mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)
    x = rng.standard_normal((60, 70)).astype(dtype)
    assert (_core.dropout(x, 0.5, 1, 0, 0) == base * x).all()


def test_dropout_masks_are_the_same_for_both_types():
    assert ((mask(30, 40, dtype=np.float32) == 0) == (mask(30, 40) == 0)).all()


def test_backward_uses_the_mask_of_forward(isa, rng):
    """Two sweeps with different masks: the update, measured, must be the slope of the loss under the very
    same mask.

    `step` returns the loss before its update, so with lr = 0 it is L(θ) for the mask of that step number,
    nothing moved. Error bound as in test_gradient_is_that_of_the_loss.
    """
    h, lr = 1e-5, 1e-3
    layers = layers_of([9, 17, 17, 2], "tanh", "dropout")
    layers[3] = ("dropout", 17, 17, 0.4, False, None)
    layers.insert(0, ("dropout", 9, 9, 0.3, False, None))
    net = engine(layers, np.float64, rng)
    x, y = data(rng, layers, 11, np.float64)
    optimizer = typed("Optimizer", np.float64)(net, "sgd", [0.0, 0.0, 0.0, 0.0])
    how = _core.Loss("least_squares", 0.0, "mean", None)
    trainer = typed("Trainer", np.float64)(net, optimizer, how, x, y, None, 11, False, 5, 0.0, 0.0, 0.0, 0.0)
    start, losses = values(net), []

    def loss_at(parameters, rate=0.0):
        for k, p in enumerate(parameters):
            net.set_parameter(k, p)
        optimizer.step_count = 3
        return trainer.step(x, y, None, rate)

    value = loss_at(start, lr)
    grads = [(p - q) / lr for p, q in zip(start, values(net), strict=True)]
    direction = [rng.choice([-1.0, 1.0], g.shape) / np.sqrt(sum(g.size for g in grads)) for g in grads]
    for sign in (h, -h):
        losses.append(loss_at([p + sign * u for p, u in zip(start, direction, strict=True)]))
    slope = sum((g * u).sum() for g, u in zip(grads, direction, strict=True))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=0, abs=1e-6 * (abs(value) + 1))
    assert net.evaluate(x, y, None, how) != value  # and outside training there is no mask


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_parameter_hides_what_is_not_finite(bad, dtype, rng):
    """The first and last numbers of each, in layers that are packed either way; padding is looked at, too."""
    for sizes in ([1, 1], [3, 2], [17, 65, 4], [65, 5]):
        net = engine(layers_of(sizes), dtype, rng)
        assert net.all_finite()
        for k in range(len(net.parameters)):
            good = net.get_parameter(k)
            for place in (0, -1):
                spoiled = good.copy()
                spoiled.flat[place] = bad
                net.set_parameter(k, spoiled)
                assert not net.all_finite(), (sizes, k, place)
            net.set_parameter(k, good)
        assert net.all_finite()
