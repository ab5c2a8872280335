# SPDX-License-Identifier: MIT
"""Networks whose products round their operands to bfloat16: what is rounded, what not, and the same bits.

The oracle rounds the operands with integers and sums in float64. Spies between the layers tell it what each
product of the engine was given, number for number, so nothing is left to differ but how sums are rounded.
"""

import numpy as np
import pytest

from chainrule import _core
from conftest import assert_same_bits, assert_within, engine, eps, layers_of

MSE = _core.Loss("mse", 0.0, "mean", None)
SIZES = [37, 70, 71, 11]
OPTIMIZERS = {"sgd": [0.9, 0.0, 1.0, 0.01], "adam": [0.9, 0.999, 1e-8, 0.0]}


def nearest(x):
    """x (float32) rounded to bfloat16, ties to even, in float64."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    up = (bits >> 16) & 1
    return ((bits + 0x7FFF + up) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)


class Spy:
    """A layer that changes nothing and keeps what goes through it."""

    def forward(self, x):
        self.x = x
        return x

    def vjp(self, x, y, dy):
        self.dy = dy
        return dy


def spied(layers):
    """The layers with a spy before and behind each Linear, and these pairs of spies."""
    rows, pairs = [], []
    for layer in layers:
        if layer[0] != "linear":
            rows.append(layer)
            continue
        pairs.append((Spy(), Spy()))
        before, behind = (
            ("external", n, n, 0.0, False, s) for n, s in zip(layer[1:3], pairs[-1], strict=True)
        )
        rows += [before, layer, behind]
    return rows, pairs


def paired(layers, like=None):
    """A network of the layers, in bfloat16; with the parameters of another if one is given."""
    net = _core.Network32(layers, True)
    for k in range(len(like.parameters) if like else 0):
        net.set_parameter(k, like.get_parameter(k))
    return net


def example(rng, sizes=SIZES, rows=301, bias=True):
    """A float32 network, its twin in bfloat16, and data."""
    layers = layers_of(sizes, *["gelu"] * (len(sizes) - 2), bias=bias)
    net = engine(layers, np.float32, rng)
    x, y = (rng.standard_normal((rows, n)).astype(np.float32) for n in (sizes[0], sizes[-1]))
    return layers, net, paired(layers, net), x, y


def look(net, x, y):
    """All that a network says about the data."""
    value, grads = net.value_and_grad(x, y, None, MSE)
    return [net.predict(x), *net.trace(x), np.array([value, net.evaluate(x, y, None, MSE)]), *grads]


def assert_same(got, expected, what=""):
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same_bits(a, b, f"{what} {k}")


def trainer_of(net, x, y, optimizer="adam", batch_size=64, clip_norm=0.0):
    state = _core.Optimizer32(net, optimizer, OPTIMIZERS[optimizer])
    return _core.Trainer32(net, state, MSE, x, y, None, batch_size, True, 3, 1e-5, 1e-4, 0.0, clip_norm)


# ---- what is rounded ---------------------------------------------------------------------------------------


def products(x, weight, bias, dz):
    """z, dx, dW and db with a bound for each: K terms and the sums of their blocks, a rounding of eps/2 each.

    A product of two bfloat16 numbers is a float32 number; the bias enters as it is; db sums dz rounded.
    """
    x, w, dz, one = nearest(x), nearest(weight), nearest(dz), np.ones((len(x), 1))
    for a, b, c in ((x, w.T, bias.astype(float)), (dz, w, 0.0), (dz.T, x, 0.0), (dz.T, one, 0.0)):
        yield a @ b + c, (a.shape[1] + 4) / 2 * eps("float32") * (np.abs(a) @ np.abs(b) + np.abs(c))


def judged(layers, net, bfloat16, x, y):
    """Every product of one sweep: (which, what the engine says, what `products` says, its bound)."""
    chain, spies = spied(layers)
    own = _core.Network32(chain, bfloat16)
    for k in range(len(net.parameters)):
        own.set_parameter(k, net.get_parameter(k))
    grads = dict(
        zip([tuple(p[:2]) for p in own.parameters], own.value_and_grad(x, y, None, MSE)[1], strict=True)
    )
    params = {tuple(p[:2]): own.get_parameter(k) for k, p in enumerate(own.parameters)}
    for layer in sorted({place for place, _ in params}):
        before, behind = spies.pop(0)
        weight, none = params[layer, "weight"], np.zeros(behind.x.shape[1], np.float32)
        db = grads.get((layer, "bias"))
        got = (behind.x, vars(before).get("dy"), grads[layer, "weight"], None if db is None else db[:, None])
        wanted = products(before.x, weight, params.get((layer, "bias"), none), behind.dy)
        for name, ours, (want, bound) in zip(("z", "dx", "dW", "db"), got, wanted, strict=True):
            if ours is not None:  # the first layer's dx, and db without a bias
                yield f"{name} of layer {layer} ", ours, want, bound


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes, rows", [(SIZES, 301), ([5, 7, 9, 6], 1), ([1, 6, 5], 3), ([521, 33, 5], 40), ([19, 65, 6], 1031)]
)
def test_products_round_their_operands_and_nothing_else(sizes, rows, bias, isa, rng):
    """An operand not rounded or rounded twice, a sum or a bias in too few bits, an odd term left out.

    A float32 network is outside of each bound, so the bounds tell them apart.
    """
    layers, net, _, x, y = example(rng, sizes, rows, bias)
    found = list(judged(layers, net, True, x, y))
    assert len(found) == (3 + bias) * (len(sizes) - 1) - 1
    for what, got, want, bound in found:
        assert_within(got, want, bound, what)
    for what, got, want, bound in judged(layers, net, False, x, y):
        assert (np.abs(got - want) > bound).any(), what


def test_spies_and_traces_change_no_bit(isa, rng):
    """What the test above judges is what a network without spies computes."""
    layers, _, net, x, y = example(rng)
    seen = paired(spied(layers)[0], net)
    assert_same_bits(seen.predict(x), net.predict(x))
    assert_same_bits(net.trace(x)[-1], net.predict(x))
    (a, a_grads), (b, b_grads) = (n.value_and_grad(x, y, None, MSE) for n in (seen, net))
    assert a == b and a == pytest.approx(net.evaluate(x, y, None, MSE), rel=1e-6)
    assert_same(a_grads, b_grads, "gradient")


@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
def test_narrow_layers_stay_in_float32(outputs, isa, rng):
    """Up to four outputs are dot products of their own, to the bit, even behind a layer in bfloat16."""
    _, full, net, x, y = example(rng, [37, outputs], 33)
    assert_same(look(net, x, y), look(full, x, y))
    _, full, net, x, y = example(rng, [37, 70, outputs], 33)
    last = paired(layers_of([70, outputs]))
    for k in (0, 1):
        last.set_parameter(k, full.get_parameter(2 + k))
    hidden = net.trace(x)[1]
    assert (hidden != full.trace(x)[1]).mean() > 0.9
    assert_same_bits(net.predict(x), last.predict(hidden))


def test_double_precision_knows_no_bfloat16(isa, rng):
    layers = layers_of(SIZES, "tanh", "tanh")
    net, marked = engine(layers, np.float64, rng), _core.Network64(layers, True)
    for k in range(len(net.parameters)):
        marked.set_parameter(k, net.get_parameter(k))
    x, y = rng.standard_normal((33, 37)), rng.standard_normal((33, 11))
    assert_same(look(marked, x, y), look(net, x, y))


def test_weights_are_kept_in_float32(isa, rng):
    """Updates that rounded weights would lose: bfloat16 numbers are 0.4 to 0.8 % apart."""
    _, full, net, x, y = example(rng)
    before = [net.get_parameter(k) for k in range(6)]
    assert_same(before, [full.get_parameter(k) for k in range(6)])
    grads = net.value_and_grad(x, y, None, MSE)[1]
    state = _core.Optimizer32(net, "sgd", [0.0, 0.0, 0.0, 0.0])
    trainer = _core.Trainer32(net, state, MSE, x, y, None, 301, False, 0, 0.0, 0.0, 0.0, 0.0)
    lr = 1e-4
    trainer.step(x, y, None, lr)
    for k, (p, g) in enumerate(zip(before, grads, strict=True)):
        step = lr * g.astype(float)
        assert_within(net.get_parameter(k), p - step, eps("float32") * (np.abs(p) + np.abs(step)), f"{k} ")
        assert (np.abs(step) < np.abs(p) / 512).mean() > 0.9
        assert (net.get_parameter(k) != p).mean() > 0.5


# ---- the copies of the weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sizes, rows, batch", [(SIZES, 301, 64), ([401, 70, 71, 6], 600, 600)])
def test_the_rounded_copies_follow_the_weights(sizes, rows, batch, optimizer, clip_norm, isa, rng):
    """A copy, or a tile of one, as it was before the last step; a network of the same weights tells."""
    layers, _, net, x, y = example(rng, sizes, rows)
    start, first = net.snapshot(), look(net, x[:40], y[:40])
    losses = trainer_of(net, x, y, optimizer, batch, clip_norm).run(0, np.full(3, 1e-3))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert_same(look(net, x[:40], y[:40]), look(paired(layers, net), x[:40], y[:40]), "after training")
    net.restore(start)
    assert_same(look(net, x[:40], y[:40]), first, "after restore")


def test_weights_given_after_nan_are_as_good_as_new(isa, rng):
    """NaN that outlives a divergence where nobody sees it: in what pads odd numbers of outputs."""
    _, full, net, x, y = example(rng, [8, 33, 35, 5])
    first = look(net, x, y)
    trainer = trainer_of(net, x, y, "sgd")
    for _ in range(4):
        loss = trainer.step(x, y, None, 1e30)
    assert np.isnan(loss) and not any(np.isfinite(net.get_parameter(k)).any() for k in range(6))
    for k in range(6):
        net.set_parameter(k, full.get_parameter(k))
    assert_same(look(net, x, y), first)


# ---- rows and threads --------------------------------------------------------------------------------------


def test_bits_do_not_depend_on_threads(isa, rng, on_threads):
    """A sum whose order follows the partition; room for pairs that two threads share."""
    layers, _, net, x, y = example(rng, [64, 130, 71, 10], 700)

    def run():
        own = paired(layers, net)
        losses = trainer_of(own, x, y, batch_size=600).run(0, np.full(2, 1e-3))
        return [losses, *(own.get_parameter(k) for k in range(6)), *look(own, x, y)]

    first, *others = on_threads(run)
    for other in others:
        assert_same(other, first)


def test_a_row_does_not_know_its_batch(isa, rng):
    _, _, net, x, _ = example(rng, rows=203)  # more than a block of rows
    whole = net.predict(x)
    for rows in (1, 2, 5, 6, 7, 192, 202):
        for start in (0, 3, 203 - rows):
            part = np.ascontiguousarray(x[start : start + rows])
            assert_same_bits(net.predict(part), whole[start : start + rows], f"{rows} rows from {start}")
    assert net.predict(x[:0]).shape == (0, 11) and net.trace(x[:0])[0].shape == (0, 70)


def test_what_is_no_number_spoils_its_own_row(isa, rng):
    """NaN that becomes a number where its bits are rounded; ∞ and what is rounded to it."""
    layers = layers_of([7, 9])
    net = paired(layers, engine(layers, np.float32, rng))
    x = rng.standard_normal((12, 7)).astype(np.float32)
    clean = net.predict(x)
    x[1, 6], x[4, 0], x[7, 3] = (
        np.nan,
        np.inf,
        -np.float32(3.4e38),
    )  # the last is nearer to 2¹²⁸ than to a bfloat16
    x[10, 2] = np.array([0x7F800001], np.uint32).view(np.float32)[
        0
    ]  # all that makes it a NaN is rounded away
    f = net.predict(x)
    w = net.get_parameter(0)
    assert np.isnan(f[[1, 10]]).all()
    assert (f[4] == np.inf * np.sign(w[:, 0])).all() and (f[7] == -np.inf * np.sign(w[:, 3])).all()
    others = [0, 2, 3, 5, 6, 8, 9, 11]
    assert_same_bits(f[others], clean[others])
