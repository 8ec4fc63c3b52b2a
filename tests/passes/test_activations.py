"""Activations are recognised by their values, whatever nodes spell them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest

from sparsecc.passes.lower.activations import elementwise_region

HEADER = '<ir_version: 8, opset_import: ["" : 20]> g (float[N] x) => (float[N] y)'

FLOAT32_MAX = float(np.finfo(np.float32).max)
SPELLINGS = {
    "relu": ("v = Identity(x) y = Relu(v)", "Relu", {}),
    "clip-without-upper-bound": (
        "v = Identity(x) lo = Constant<value_float = 1e-6>() y = Clip(v, lo)",
        "Clip",
        {"lo": float(np.float32(1e-6)), "hi": FLOAT32_MAX},
    ),
    "max-above-zero": (
        "v = Identity(x) lo = Constant<value_float = 1e-7>() y = Max(v, lo)",
        "Clip",
        {"lo": float(np.float32(1e-7)), "hi": FLOAT32_MAX},
    ),
    "relu-max": ("v = Identity(x) zero = Constant<value_float = 0.0>() y = Max(v, zero)", "Relu", {}),
    "clip": (
        "v = Identity(x) lo = Constant<value_float = 0.0>() hi = Constant<value_float = 6.0>() y = Clip(v, lo, hi)",
        "Clip",
        {"lo": 0.0, "hi": 6.0},
    ),
    "leaky": (
        "v = Identity(x) y = LeakyRelu<alpha = 0.2>(v)",
        "LeakyRelu",
        {"alpha": float(np.float32(0.2))},
    ),
    "sigmoid": ("v = Identity(x) y = Sigmoid(v)", "Sigmoid", {}),
    "tanh": ("v = Identity(x) y = Tanh(v)", "Tanh", {}),
    "gelu-op": ("v = Identity(x) y = Gelu(v)", "Gelu", {}),
    "gelu-op-tanh": ('v = Identity(x) y = Gelu<approximate = "tanh">(v)', "GeluTanh", {}),
    "gelu-div-erf": (
        "v = Identity(x) r = Constant<value_float = 1.41421354>() o = Constant<value_float = 1.0>() "
        "h = Constant<value_float = 0.5>() d = Div(v, r) e = Erf(d) a = Add(e, o) m = Mul(v, a) y = Mul(m, h)",
        "Gelu",
        {},
    ),
    "gelu-mul-first": (
        "v = Identity(x) r = Constant<value_float = 0.707106769>() o = Constant<value_float = 1.0>() "
        "h = Constant<value_float = 0.5>() d = Mul(v, r) e = Erf(d) a = Add(o, e) m = Mul(v, h) y = Mul(m, a)",
        "Gelu",
        {},
    ),
    "gelu-tanh": (
        "v = Identity(x) c = Constant<value_float = 0.044715>() s = Constant<value_float = 0.797884583>() "
        "o = Constant<value_float = 1.0>() h = Constant<value_float = 0.5>() t = Constant<value_float = 3.0>() "
        "p = Pow(v, t) q = Mul(p, c) r = Add(v, q) u = Mul(r, s) w = Tanh(u) a = Add(w, o) m = Mul(v, a) y = Mul(m, h)",
        "GeluTanh",
        {},
    ),
    "silu": ("v = Identity(x) s = Sigmoid(v) y = Mul(v, s)", "Silu", {}),
    "swish-op": ("v = Identity(x) y = Swish(v)", "Silu", {}),
    "hardswish-op": ("v = Identity(x) y = HardSwish(v)", "HardSwish", {}),
    "hardswish-spelled": (
        "v = Identity(x) s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(v) y = Mul(v, s)",
        "HardSwish",
        {},
    ),
}


def _value(body: str) -> tuple[onnx_ir.Graph, onnx_ir.Value]:
    text = HEADER + "{ " + body + " }"
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        if node.op_type == "Constant":
            node.outputs[0].const_value = onnx_ir.tensor(
                [node.attributes["value_float"].as_float()], dtype=onnx_ir.DataType.FLOAT
            )
    return model.graph, model.graph.node(0).outputs[0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_recognised(name: str) -> None:
    body, suffix, parameters = SPELLINGS[name]
    graph, start = _value(body)
    region = elementwise_region(start)
    assert region is not None
    assert region.activation.suffix == suffix
    assert dict(region.activation.parameters) == pytest.approx(parameters, rel=1e-12)
    assert region.output is graph.outputs[0]


@pytest.mark.parametrize(
    "body",
    [
        "v = Identity(x) y = Exp(v)",
        "v = Identity(x) w = Relu(v) y = Add(w, v) z = Neg(w)",
        "v = Identity(x) t = Constant<value_float = 2.0>() y = Mul(v, t)",
        "v = Identity(x) s = Sigmoid(v) y = Add(v, s)",
    ],
)
def test_anything_else_is_not(body: str) -> None:
    _, start = _value(body)
    assert elementwise_region(start) is None


def test_value_used_elsewhere_is_not_fused() -> None:
    text = HEADER.replace("float[N] y", "float[N] y, float[N] v") + "{ v = Identity(x) y = Relu(v) }"
    model = onnx_ir.from_proto(onnx.parser.parse_model(text))
    assert elementwise_region(model.graph.node(0).outputs[0]) is None


@pytest.mark.parametrize(
    ("body", "operator"),
    [
        ("v = Identity(x) w = Relu(v) t = Constant<value_float = 2.0>() y = Mul(w, t)", "Relu"),
        ("v = Identity(x) s = Sigmoid(v) t = Constant<value_float = 1e-7>() y = Add(s, t)", "Sigmoid"),
        ("v = Identity(x) s = Relu(v) t = Constant<value_float = 1e-6>() y = Add(s, t)", "Relu"),
        (
            "v = Identity(x) s = Sigmoid(v) lo = Constant<value_float = 1e-7>() "
            "hi = Constant<value_float = 0.999999>() y = Clip(s, lo, hi)",
            "Sigmoid",
        ),
    ],
)
def test_stops_before_what_does_not_fuse(body: str, operator: str) -> None:
    _, start = _value(body)
    region = elementwise_region(start)
    assert region is not None
    assert region.activation.suffix == operator
    assert [node.op_type for node in region.nodes] == [operator]
