# SPDX-License-Identifier: MIT
"""C headers: what a compiler makes of them computes what the network does."""

import os
import shutil
import subprocess

import numpy as np
import pytest

import chainrule as cr
from chainrule import layers
from test_own_parts import OwnTanh

CC = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = pytest.mark.skipif(CC is None, reason="there is no C compiler here")

STRICT = ["-Wall", "-Wextra", "-pedantic", "-Wconversion", "-Wdouble-promotion", "-Wshadow", "-Werror"]
LAYERS = [kind() for kind in layers.BUILT_IN.values() if kind is not layers.Linear]
LAYERS += [cr.LeakyReLU(0.3), cr.ELU(1.7)]
# Rows on standard input, outputs on standard output, both as they lie in memory.
PROGRAM = """
#include "{name}.h"
#include <stdio.h>
int main(void) {{
    {real} x[{name}_INPUTS], f[{name}_OUTPUTS];
    while (fread(x, sizeof x[0], {name}_INPUTS, stdin) == {name}_INPUTS) {{
        {name}_predict(x, f);
        fwrite(f, sizeof f[0], {name}_OUTPUTS, stdout);
    }}
    return 0;
}}
"""


def compiled(folder, name, real, *options):
    (folder / "main.c").write_text(PROGRAM.format(name=name, real=real))
    command = [CC, *(options or ["-std=c99"]), *STRICT, "main.c", "-o", "main", "-lm"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def outputs(program, net, X):
    done = subprocess.run([program], input=X.tobytes(), capture_output=True, timeout=120, check=True)
    return np.frombuffer(done.stdout, X.dtype).reshape(len(X), net.out_features)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layer_gives_the_same_outputs(layer, dtype, tmp_path, rng):
    """First, in the middle, and last; with and without biases."""
    net = cr.Sequential(
        layer, cr.Linear(3, 7), layer, cr.Linear(7, 2, bias=False), layer, seed=1, dtype=dtype
    )
    X = 2 * rng.standard_normal((50, 3)).astype(dtype)
    X[0], X[1], X[2] = 0.0, 30.0, -30.0
    net.save(tmp_path / "net.h")
    program = compiled(tmp_path, "net", {"float32": "float", "float64": "double"}[dtype])
    # Sums of 3 and 7 products and functions of a few units in the last place, of numbers up to 100.
    exact = {"float32": 2e-6, "float64": 1e-13}[dtype]
    np.testing.assert_allclose(outputs(program, net, X), net(X), rtol=exact, atol=100 * exact)


def test_what_overflows_and_what_is_no_number(tmp_path):
    """Infinity and NaN go the way that they go in the engine; infinity in a softmax is NaN, as in PyTorch."""
    values = np.array([[np.inf], [-np.inf], [np.nan], [1e30], [-1e30], [-0.0]], np.float32)
    for layer in LAYERS:
        net = cr.Sequential(cr.Linear(1, 1, init="zeros"), layer)
        net.load_state_dict({"0.weight": [[1.0]], "0.bias": [0.0]})
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        net.save(folder / "net.h")
        got = outputs(compiled(folder, "net", "float"), net, values)
        expected = net._core.predict(values)
        if isinstance(layer, (cr.Softmax, cr.LogSoftmax)):
            expected[:2] = np.nan
        np.testing.assert_allclose(got, expected, rtol=2e-6, err_msg=repr(layer))


def test_weights_are_short(tmp_path):
    net = cr.Sequential(cr.Linear(1, 1))
    net.load_state_dict({"0.weight": [[0.1]], "0.bias": [-2.5e-9]})
    net.save(tmp_path / "net.h")
    assert "    0.1f, -2.5e-09f\n" in (tmp_path / "net.h").read_text()


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_weights_that_are_no_numbers(value, tmp_path):
    net = cr.Sequential(cr.Linear(1, 1))
    net.load_state_dict({"0.weight": [[value]], "0.bias": [0.0]})
    net.save(tmp_path / "net.h")
    got = outputs(compiled(tmp_path, "net", "float"), net, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(got, [[value]])


@pytest.mark.parametrize(
    ("layer", "values"),
    [
        (cr.ELU(), -(10.0 ** -np.arange(1, 7))),
        (cr.Softplus(), -np.arange(5.0, 40, 5)),
        (cr.LeakyReLU(0.0), np.array([-np.inf, -1, 0, 2])),
        (cr.LeakyReLU(1e300), np.array([-1.0, 2])),
        (cr.ELU(1e39), np.array([1.0, 2])),
    ],
    ids=repr,
)
def test_small_numbers_keep_their_digits(layer, values, tmp_path):
    """expm1 and log1p; and parameters that are too large for a float, or 0."""
    net = cr.Sequential(cr.Linear(1, 1), layer)
    net.load_state_dict({"0.weight": [[1.0]], "0.bias": [0.0]})
    net.save(tmp_path / "net.h")
    X = values[:, None].astype(np.float32)
    got, expected = outputs(compiled(tmp_path, "net", "float"), net, X), net._core.predict(X)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (np.signbit(got) == np.signbit(expected)).all()


def test_two_files_of_one_program(tmp_path):
    """Networks whose names differ in capitals only, and one of them in two files."""
    for name, inputs in (("net", 2), ("Net", 3)):
        cr.mlp([inputs, 1], seed=inputs).save(tmp_path / f"{name}.h")
    (tmp_path / "other.c").write_text(
        '#include "net.h"\nvoid other(float *f);\nvoid other(float *f) { net_predict(f, f); }\n'
    )
    (tmp_path / "main.c").write_text(
        '#include "net.h"\n#include "Net.h"\n#include "net.h"\nvoid other(float *f);\n'
        "int main(void) { float a[2] = {1, 2}, b[3] = {1, 2, 3}, c[2] = {1, 2};\n"
        "    net_predict(a, a); Net_predict(b, b); other(c);\n    return a[0] != c[0]; }\n"
    )
    command = [CC, "-std=c99", *STRICT, "main.c", "other.c", "-o", "main", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    subprocess.run([tmp_path / "main"], check=True, timeout=60)


def test_weights_come_back_bit_for_bit(tmp_path, rng):
    """Through decimal digits: a Linear layer without sums, on rows that pick one weight each."""
    for dtype, real in (("float32", "float"), ("float64", "double")):
        net = cr.Sequential(cr.Linear(4, 25, bias=False), dtype=dtype)
        exponents = rng.integers(-37, 37, (25, 4))
        weight = (rng.standard_normal((25, 4)) * 10.0**exponents).astype(dtype)
        weight[0] = np.finfo(dtype).max, -np.finfo(dtype).tiny, np.inf, 1 / 3
        net.load_state_dict({"0.weight": weight})
        net.save(tmp_path / "net.h")
        program = compiled(tmp_path, "net", real)
        one = outputs(program, net, np.array([[0, 0, 0, 1]], dtype))[0]
        expected = weight[:, 3].copy()
        expected[0] = np.nan  # 0 · ∞ beside it
        np.testing.assert_array_equal(one, expected)
        net.load_state_dict({"0.weight": np.where(np.isinf(weight), 2, weight)})
        net.save(tmp_path / "net.h")
        for k, row in enumerate(np.eye(4, dtype=dtype)):
            one = outputs(compiled(tmp_path, "net", real), net, row[None])[0]
            np.testing.assert_array_equal(one, net.state_dict()["0.weight"][:, k])


@pytest.mark.parametrize(
    "sizes", [[1, 1], [1, 40, 1], [33, 5, 17, 64, 3], [8, 64, 64, 1], [900, 5, 3]], ids=str
)
def test_widths(sizes, tmp_path, rng):
    """The widest of them before, between and after the layers; nothing is written beyond it."""
    net = cr.mlp(sizes, activation="tanh", output_activation="softmax", dropout=0.5, seed=2)
    net.save(tmp_path / "wide.h")
    X = rng.standard_normal((9, sizes[0])).astype(np.float32)
    options = ("-std=c99", "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    got = outputs(compiled(tmp_path, "wide", "float", *options), net, X)
    np.testing.assert_allclose(got, net(X), rtol=1e-5, atol=1e-6)


def test_mixed_precision_is_written_as_float(tmp_path, rng):
    net = cr.mlp([4, 8, 3], dtype="bfloat16", seed=0)
    net.save(tmp_path / "net.h")
    again = cr.Sequential.from_config({**net.config(), "dtype": "float32"})
    again.load_state_dict(net.state_dict())
    X = rng.standard_normal((5, 4)).astype(np.float32)
    got = outputs(compiled(tmp_path, "net", "float"), net, X)
    np.testing.assert_allclose(got, again(X), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("file", "name"),
    [("Pump-3 (new).h", "Pump_3__new_"), ("3rd.h", "net_3rd"), ("_x.h", "net__x"), ("é.H", "net__")],
)
def test_names_are_made_of_the_file_s(file, name, tmp_path):
    """In C and in C++, twice in one program."""
    net = cr.mlp([2, 3, 1], activation="gelu", seed=0)
    net.save(tmp_path / file)
    shutil.copy(tmp_path / file, tmp_path / f"{name}.h")
    program = compiled(tmp_path, name, "float", "-std=c99", "-include", f"{name}.h")
    X = np.ones((1, 2), np.float32)
    np.testing.assert_allclose(outputs(program, net, X), net(X), rtol=2e-6)
    compiled(tmp_path, name, "float", "-x", "c++", "-std=c++11")


def test_texts_of_ones_own_end_no_comment(tmp_path):
    net = cr.mlp([2, 1], seed=0)
    texts = {
        "unit": "m */ s\n#error",
        "note": "$NAME ${name} /*/ ??/ \u202e \ud800 " + "long " * 60,
        "a": "b",
    }
    net.save(tmp_path / "net.h", texts)
    text = (tmp_path / "net.h").read_text()
    assert "unit: m * / s #error" in text and "note: $NAME ${name} / * / ? ? / ? ? long" in text
    assert text.index("a: b") < text.index("note:") < text.index("unit:")
    compiled(tmp_path, "net", "float", "-std=c99")
    assert max(map(len, text.splitlines())) <= 120
    net.save(tmp_path / "again.h")
    assert "unit" not in (tmp_path / "again.h").read_text()


def test_layers_of_ones_own_are_refused(tmp_path):
    net = cr.Sequential(cr.Linear(2, 2), OwnTanh())
    with pytest.raises(TypeError, match=r"^\[save\] layers must be built-in ones .*as layer 1"):
        net.save(tmp_path / "net.h")
    assert list(tmp_path.iterdir()) == []
