# SPDX-License-Identifier: MIT
"""Networks where there is no chainrule: the forward pass as an ONNX graph, or as a C header."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from string import Template
from textwrap import wrap
from typing import Any

import numpy as np

from ._core import __version__
from .checks import short
from .layers import ELU, LeakyReLU, Linear, SiLU, _BuiltIn

# ------------------------------------------------------------ ONNX

OPSET = 20  # the first that has Gelu
_WITH_PARAMETER = (LeakyReLU, ELU)


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
    _require_built_in(layer, index)
    if isinstance(layer, Linear):
        parameters = [f"{index}.{name}" for name in ("weight", "bias")[: 1 + layer.bias]]
        return [("Gemm", [x, *parameters], y, {"transB": 1})]
    if isinstance(layer, SiLU):
        return [("Sigmoid", [x], f"{y}.gate", {}), ("Mul", [x, f"{y}.gate"], y, {})]
    attributes = {"alpha": layer._param} if isinstance(layer, _WITH_PARAMETER) else {}
    operator = "identity" if layer.op == "dropout" else layer.op  # log_softmax is their LogSoftmax
    return [("".join(word.capitalize() for word in operator.split("_")), [x], y, attributes)]


def _require_built_in(layer: Any, index: int) -> None:
    if not isinstance(layer, _BuiltIn):
        raise TypeError(
            f"[save] layers must be built-in ones for other runtimes: expected such, got {short(layer)} as "
            f"layer {index}, which none of them knows"
        )


# ------------------------------------------------------------ C

# y[i] after an elementwise layer; $f is the suffix of float's functions and numbers.
_ELEMENTS = {
    "sigmoid": "1.0$f / (1.0$f + exp$f(-y[i]))",
    "tanh": "tanh$f(y[i])",
    "relu": "y[i] < 0.0$f ? 0.0$f : y[i]",
    "leaky_relu": "y[i] > 0.0$f ? y[i] : p * y[i]",
    "elu": "y[i] > 0.0$f ? y[i] : p * expm1$f(y[i])",
    "gelu": "${name}_share(0.5$f * erfc$f(-0.70710678118654752440$f * y[i]), y[i])",
    "silu": "${name}_share(1.0$f / (1.0$f + exp$f(-y[i])), y[i])",
    "softplus": "(y[i] < 0.0$f ? 0.0$f : y[i]) + log1p$f(exp$f(-fabs$f(y[i])))",
}
_SHARE = """
static inline $real ${name}_share($real share, $real y) { return share == 0.0$f ? 0.0$f : share * y; }
"""
_ELEMENTWISE = """
static inline void ${name}_OP(int n, $real *y) {
    for (int i = 0; i < n; i++) y[i] = ELEMENT;
}
"""
_BY_ROW = """
static inline void ${name}_OP(int n, $real *y) {
    $real largest = y[0], sum = 0.0$f;
    for (int i = 1; i < n; i++) largest = y[i] > largest ? y[i] : largest;
    for (int i = 0; i < n; i++) sum += exp$f(y[i] - largest);
    for (int i = 0; i < n; i++) y[i] = ELEMENT;
}
"""
_ROWS = {"softmax": "exp$f(y[i] - largest) / sum", "log_softmax": "y[i] - largest - log$f(sum)"}

_HEADER = """\
/* $introduction

       $real x[${name}_INPUTS] = {0}, f[${name}_OUTPUTS];
       ${name}_predict(x, f);
*/
#ifndef CHAINRULE_${name}_H
#define CHAINRULE_${name}_H

#include <math.h>

#define ${name}_INPUTS $inputs
#define ${name}_OUTPUTS $outputs
$weights
/* y = x W + b: the rows of w are those of W, then b. */
static inline void ${name}_linear(int inputs, int outputs, const $real *w, const $real *x, $real *y) {
    for (int o = 0; o < outputs; o++) y[o] = w[inputs * outputs + o];
    for (int i = 0; i < inputs; i++)
        for (int o = 0; o < outputs; o++) y[o] += x[i] * w[i * outputs + o];
}
FUNCTIONS

/* The outputs f of one row x. */
static inline void ${name}_predict(const $real *x, $real *f) {
    $real a[$widest], b[$widest];
    for (int i = 0; i < $inputs; i++) a[i] = x[i];
    $calls
}

#endif
"""


def c_header(net: Any, texts: Mapping[str, str], name: str) -> bytes:
    """The network as C99 that needs <math.h> alone: a header with `<name>_predict(x, f)` for one row.

    Numbers are double where the network's are float64, else float; dropout is off.

    Raises: TypeError for layers of the user's own.
    """
    for index, layer in enumerate(net.layers):
        _require_built_in(layer, index)
    name = re.sub(r"[^0-9A-Za-z_]", "_", name)
    name = name if name[:1].isalpha() else f"net_{name}"
    ops = sorted({_c_op(layer) for layer in net.layers})
    functions = [_SHARE] if {"gelu", "silu"} & set(ops) else []
    for frame, elements in ((_ELEMENTWISE, _ELEMENTS), (_BY_ROW, _ROWS)):
        functions += [
            frame.replace("OP", op).replace("ELEMENT", elements[op]) for op in ops if op in elements
        ]
    functions = [text.replace("*y) {", "*y, $real p) {") if "p * " in text else text for text in functions]
    real, f = ("double", "") if net.array_dtype == "float64" else ("float", "f")
    text = Template(_HEADER.replace("FUNCTIONS\n", "".join(functions))).substitute(
        name=name, real=real, f=f, inputs=net.in_features, outputs=net.out_features,
        introduction=_introduction(net, texts), weights="".join(_c_weights(net, name, real, f)),
        widest=max(net._widths), calls="\n    ".join(_c_calls(net, name, f)),
    )  # fmt: skip
    return text.encode()


def _introduction(net: Any, texts: Mapping[str, str]) -> str:
    lines = [
        f"{net!r}, by chainrule {__version__}.",
        *(f"{key}: {text}" for key, text in sorted(texts.items())),
    ]
    lines = [part for line in lines for part in wrap(" ".join(line.split()), 110)]
    text = "".join(
        letter if letter.isprintable() or letter == "\n" else "?" for letter in "\n   ".join(lines)
    )
    for special in ("*/", "/*", "??/"):  # the last is a backslash in C99
        text = text.replace(special, " ".join(special))
    return text


def _c_weights(net: Any, name: str, real: str, f: str) -> Iterator[str]:
    """Each Linear layer's Wᵀ, a row for each input, and its biases below."""
    state = net.state_dict()
    for index, layer in enumerate(net.layers):
        if isinstance(layer, Linear):
            weight = state[f"{index}.weight"].T
            rows = np.vstack([weight, state.get(f"{index}.bias", np.zeros_like(weight[0]))])
            numbers = [_c_number(value, f) for value in rows.ravel()]
            lines = (", ".join(numbers[k : k + 6]) for k in range(0, len(numbers), 6))
            inside = ",\n    ".join(lines)
            yield f"\nstatic const {real} {name}_{index}[{rows.size}] = {{\n    {inside}\n}};\n"


def _c_op(layer: Any) -> str:
    """0 · ∞ is NaN: a slope of 0 is not to be multiplied with."""
    return "relu" if layer.op == "leaky_relu" and layer._param == 0 else str(layer.op)


def _c_number(value: Any, f: str) -> str:
    """The shortest decimal that is exactly this number again."""
    text = str(value)
    return {"nan": "NAN", "inf": "INFINITY", "-inf": "-INFINITY"}.get(text, text + f)


def _c_parameter(net: Any, layer: Any, f: str) -> str:
    with np.errstate(over="ignore"):  # infinite, as in the engine
        return _c_number(np.dtype(net.array_dtype).type(layer._param), f)


def _c_calls(net: Any, name: str, f: str) -> Iterator[str]:
    """The layers, from x in a: a Linear one leads from one of two arrays to the other; the last is f."""
    here, there, width = "a", "b", net.in_features
    for index, layer in enumerate(net.layers):
        if isinstance(layer, Linear):
            yield f"{name}_linear({width}, {layer.out_features}, {name}_{index}, {here}, {there});"
            here, there, width = there, here, layer.out_features
        elif (op := _c_op(layer)) in _ELEMENTS or op in _ROWS:  # Identity and Dropout are not
            p = f", {_c_parameter(net, layer, f)}" if op in ("leaky_relu", "elu") else ""
            yield f"{name}_{op}({width}, {here}{p});"
    yield f"for (int i = 0; i < {width}; i++) f[i] = {here}[i];"
