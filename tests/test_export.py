# SPDX-License-Identifier: MIT
"""ONNX files: other runtimes compute what the network does."""

import subprocess
import sys

import numpy as np
import pytest

import chainrule as cr
from chainrule import layers

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator

RNG = np.random.default_rng(0)
LAYERS = [kind() for kind in layers.BUILT_IN.values() if kind is not layers.Linear]
LAYERS += [cr.LeakyReLU(0.3), cr.ELU(1.7), cr.Dropout(0.0)]
# onnxruntime has these for float32 alone; onnx's own evaluator has all, some only in float32's precision.
FLOAT32_ONLY = (cr.LeakyReLU, cr.ELU, cr.GELU, cr.Softplus)


def run(path, X):
    # to 1.23 it joins float64 operators to some that it has in float32 only
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x"]
    (f,) = session.run(["f"], {"x": X})
    return f


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layer_gives_the_same_outputs(layer, dtype, tmp_path):
    net = cr.Sequential(cr.Linear(3, 7), layer, cr.Linear(7, 2, bias=False), layer, seed=1, dtype=dtype)
    X = 2 * RNG.normal(size=(11, 3)).astype(dtype)
    net.save(tmp_path / "net.onnx")
    if dtype == "float64" and isinstance(layer, FLOAT32_ONLY):
        (f,) = ReferenceEvaluator(str(tmp_path / "net.onnx")).run(["f"], {"x": X})
        exact = 1e-6  # alpha is a float32 in the format, and its erf comes from there
    else:
        f, exact = run(tmp_path / "net.onnx", X), {"float32": 2e-6, "float64": 1e-13}[dtype]
    assert f.dtype == dtype and f.shape == (11, 2)
    np.testing.assert_allclose(f, net(X), rtol=exact, atol=exact)


def test_any_number_of_rows_and_texts_of_ones_own(tmp_path):
    net = cr.mlp([4, 8, 3], activation="silu", seed=0)
    net.save(tmp_path / "net.ONNX", {"unit": "metres"})
    for rows in (1, 5):
        X = RNG.normal(size=(rows, 4)).astype(np.float32)
        np.testing.assert_allclose(run(tmp_path / "net.ONNX", X), net(X), rtol=2e-6, atol=2e-6)
    model = onnx.load(tmp_path / "net.ONNX")
    assert {p.key: p.value for p in model.metadata_props} == {"unit": "metres"}
    assert model.producer_name == "chainrule" and model.producer_version == cr.__version__
    assert [w.name for w in model.graph.initializer] == list(net.state_dict())
    ends = [*model.graph.input, *model.graph.output]
    shapes = [[d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim] for end in ends]
    assert shapes == [["rows", 4], ["rows", 3]] and model.ir_version == 9


def test_mixed_precision_is_written_as_float32(tmp_path):
    net = cr.mlp([4, 8, 3], dtype="bfloat16", seed=0)
    net.save(tmp_path / "net.onnx")
    X = RNG.normal(size=(5, 4)).astype(np.float32)
    again = cr.Sequential.from_config({**net.config(), "dtype": "float32"})
    again.load_state_dict(net.state_dict())
    np.testing.assert_allclose(run(tmp_path / "net.onnx", X), again(X), rtol=2e-6, atol=2e-6)


def test_equal_networks_give_equal_bytes(tmp_path):
    for name in "ab":
        cr.mlp([4, 8, 3], seed=0).save(tmp_path / f"{name}.onnx", {"y": "2", "x": "1"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


class Sine(cr.Layer):
    def forward(self, x):
        return np.sin(x)

    def vjp(self, x, y, dy):
        return dy * np.cos(x)


def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "net.onnx"
    cr.mlp([2, 1]).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"\[save\] layers must be built-in ones for other runtimes: .*Sine"):
        cr.Sequential(cr.Linear(2, 2), Sine()).save(path)
    with pytest.raises(TypeError, match="metadata 'note': expected text, got int"):
        cr.mlp([3, 1]).save(path, {"note": 1})
    with pytest.raises(ValueError, match=r"expected the suffix \.safetensors or \.onnx or \.h, got '\.pt'"):
        cr.mlp([3, 1]).save(tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"\[load\] .*expected the suffix \.safetensors, got '\.onnx'"):
        cr.load(path)
    assert path.read_bytes() == before


def test_without_the_onnx_package_one_line_says_so(tmp_path):
    code = "import sys; sys.modules['onnx'] = None; import chainrule; chainrule.mlp([2, 1]).save('net.onnx')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode and "ImportError: [save] .onnx files need the onnx package" in done.stderr
    assert not list(tmp_path.iterdir())
