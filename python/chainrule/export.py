# SPDX-License-Identifier: MIT
"""Networks for other runtimes: an ONNX graph of the forward pass, made with the onnx package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._core import __version__
from .checks import short
from .layers import ELU, LeakyReLU, Linear, SiLU, _BuiltIn

OPSET = 20  # the first that has Gelu


def onnx_bytes(net: Any, texts: Mapping[str, str]) -> bytes:
    """The network as an ONNX model: input "x" (rows, I), output "f" (rows, O), weights by their names here.

    Numbers are float64 where the network's are, else float32; dropout is off.

    Raises: ImportError without the onnx package; TypeError for layers of the user's own.
    """
    try:
        from onnx import checker, helper, numpy_helper
    except ImportError as error:
        raise ImportError(
            f"[save] .onnx files need the onnx package: expected it, got none ({error}); pip install onnx"
        ) from error
    values = ["x", *(f"phi{k}" for k in range(1, len(net.layers))), "f"]
    nodes = [
        helper.make_node(operator, inputs, [output], **attributes)
        for index, layer in enumerate(net.layers)
        for operator, inputs, output, attributes in _nodes(layer, index, values[index], values[index + 1])
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(net.array_dtype))
    x = helper.make_tensor_value_info("x", kind, ["rows", net.in_features])
    f = helper.make_tensor_value_info("f", kind, ["rows", net.out_features])
    weights = [numpy_helper.from_array(array, name) for name, array in net.state_dict().items()]
    model = helper.make_model(
        helper.make_graph(nodes, "network", [x], [f], weights),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9,
        producer_name="chainrule", producer_version=__version__,
    )  # fmt: skip
    helper.set_model_props(model, dict(texts))
    checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _nodes(layer: Any, index: int, x: str, y: str) -> list[tuple[str, list[str], str, dict[str, Any]]]:
    """What makes y of x: operators, each with inputs, output and attributes."""
    if not isinstance(layer, _BuiltIn):
        raise TypeError(
            f"[save] layers in .onnx files must be built-in ones: expected such, got {short(layer)} as layer "
            f"{index}, which no other runtime knows"
        )
    if isinstance(layer, Linear):
        parameters = [f"{index}.{name}" for name in ("weight", "bias")[: 1 + layer.bias]]
        return [("Gemm", [x, *parameters], y, {"transB": 1})]
    if isinstance(layer, SiLU):
        return [("Sigmoid", [x], f"{y}.gate", {}), ("Mul", [x, f"{y}.gate"], y, {})]
    attributes = {"alpha": layer._param} if isinstance(layer, (LeakyReLU, ELU)) else {}
    operator = "identity" if layer.op == "dropout" else layer.op  # log_softmax is their LogSoftmax
    return [("".join(word.capitalize() for word in operator.split("_")), [x], y, attributes)]
