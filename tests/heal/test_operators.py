"""Every operator of the interpreter against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")

from sparsecc.calib import open_session
from sparsecc.errors import ModelError, UnsupportedModelError, UsageError
from sparsecc.heal.graph import SUPPORTED, TorchGraph
from sparsecc.ir import Model

TYPES = {"float32": "float", "float16": "float16", "int64": "int64", "bool": "bool", "float64": "double"}


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def normal(*shape: int, dtype=np.float32) -> np.ndarray:
    return rng().standard_normal(shape).astype(dtype)


def positive(*shape: int) -> np.ndarray:
    return (rng().random(shape) + 0.5).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def truth(*shape: int) -> np.ndarray:
    return rng().random(shape) < 0.5


def graph(body: str, inputs: dict[str, np.ndarray], outputs: int, opset: int, constants) -> Model:
    declared = ", ".join(
        f"{TYPES[array.dtype.name]}[{','.join(map(str, array.shape))}] {name}"
        for name, array in inputs.items()
    )
    names = ["y", "z", "u"][:outputs]
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]>\n g ({declared}) => ({", ".join(f"float {n}" for n in names)}) '
        f"{{ {body} }}"
    )
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for output in proto.graph.output:
        output.type.Clear()
    inferred = onnx.shape_inference.infer_shapes(proto)
    for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return Model.from_proto(proto)


#: operator -> cases (body, inputs, constants, opset, outputs). Inputs are named a, b, c; constants anything else.
CASES: dict[str, list[tuple]] = {}


def case(
    body: str, *inputs: np.ndarray, opset: int = 17, outputs: int = 1, op: str = "", **constants: np.ndarray
):
    name = op or body.split("=")[1].split("<")[0].split("(")[0].strip()
    named = dict(zip("abc", inputs, strict=False))
    CASES.setdefault(name, []).append((body, named, constants, opset, outputs))


for unary in ("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
              "Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Tanh"):  # fmt: skip
    case(f"y = {unary} (a)", 2 * normal(3, 5))
for unary in ("Log", "Reciprocal", "Sqrt"):
    case(f"y = {unary} (a)", positive(3, 5))
for binary in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mean", "Sum"):
    case(f"y = {binary} (a, b)", normal(3, 5), positive(5))
for compare in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
    case(f"y = {compare} (a, b)", np.round(normal(4, 5)), np.round(normal(5)))
for logic in ("And", "Or"):
    case(f"y = {logic} (a, b)", truth(3, 4), truth(4))
case("y = Max (a, b, c)", normal(3, 4), normal(4), normal(3, 1))
case("y = Div (a, b)", ints(-7, 7, 9), ints(2, -2, 4))
case("y = Mod (a, b)", ints(-7, 7, 9), ints(2, -2, 4))
case("y = Mod <fmod=1> (a, b)", normal(6), positive(6))
case("y = Not (a)", truth(3, 4))
case("y = Where (a, b, c)", truth(3, 4), normal(3, 4), normal(4))
case("y = Pow (a, p)", positive(3, 4), p=np.float32(2.5).reshape(()))
case("y = PRelu (a, slope)", normal(2, 3, 4), slope=normal(3, 1))
case("y = Clip (a, low, high)", normal(3, 4), low=np.float32(-0.3), high=np.float32(0.4))
case("y = Clip (a, , high)", normal(3, 4), high=np.float32(0.4))
case("y = Clip <min=-0.5> (a)", normal(3, 4), opset=8)
case("y = Cast <to=7> (a)", 3 * normal(3, 4))
case("y = Cast <to=1> (a)", ints(1, 2, 3))
case("y = Dropout (a)", normal(3, 4))
case("y = Gelu (a)", normal(3, 4), opset=20)
case('y = Gelu <approximate="tanh"> (a)', normal(3, 4), opset=20)
for soft in ("Softmax", "LogSoftmax"):
    case(f"y = {soft} <axis=1> (a)", normal(2, 3, 4))
    case(f"y = {soft} (a)", normal(2, 3, 4), opset=11)
case("y = Shape (a)", normal(2, 3, 4))
case("y = Shape <start=1, end=-1> (a)", normal(2, 3, 4))
case("y = Size (a)", normal(2, 3, 4))
case("y = Reshape (a, s)", normal(2, 3, 4), s=ints(0, -1, 2))
case("y = Transpose (a)", normal(2, 3, 4))
case("y = Transpose <perm=[1,0,2]> (a)", normal(2, 3, 4))
case("y = Unsqueeze (a, axes)", normal(2, 3), axes=ints(-1, 0))
case("y = Unsqueeze <axes=[0,2]> (a)", normal(2, 3), opset=11)
case("y = Squeeze (a)", normal(2, 1, 3, 1))
case("y = Squeeze (a, axes)", normal(2, 1, 3, 1), axes=ints(-1))
case("y = Squeeze <axes=[1]> (a)", normal(2, 1, 3), opset=11)
case("y = Flatten (a)", normal(2, 3, 4))
case("y = Flatten <axis=-1> (a)", normal(2, 3, 4))
case("y = Flatten <axis=0> (a)", normal(2, 3, 4))
case("y = Concat <axis=-1> (a, b)", normal(2, 3), normal(2, 4))
case("y, z = Split <axis=1> (a, s)", normal(2, 5), outputs=2, op="Split", s=ints(2, 3))
case("y, z = Split <axis=1> (a)", normal(2, 6), outputs=2, op="Split")
case("y, z = Split <axis=0, num_outputs=2> (a)", normal(5, 2), outputs=2, op="Split", opset=18)
case("y = Slice (a, s, e)", normal(5, 6), s=ints(1, -4), e=ints(4, -1))
case(
    "y = Slice (a, s, e, axes, steps)",
    normal(5, 6),
    s=ints(-1, 1),
    e=ints(-99, 99),
    axes=ints(0, -1),
    steps=ints(-2, 2),
)
case("y = Slice <starts=[1], ends=[9], axes=[1]> (a)", normal(5, 6), opset=9)
case("y = Gather <axis=1> (a, i)", normal(3, 4, 2), i=np.array([[0, -1], [2, 1]]))
case("y = Gather (a, i)", normal(3, 4), i=np.array(-2))
case("y = GatherElements <axis=1> (a, i)", normal(2, 3), i=np.array([[0, -1], [2, 1]]))
case("y = Expand (a, s)", normal(3, 1), s=ints(2, 1, 4))
case("y = Tile (a, r)", normal(2, 3), r=ints(2, 2))
case("y = Range (s, l, d)", s=np.int64(1), l=np.int64(9), d=np.int64(3))
case("y = ConstantOfShape (s)", s=ints(2, 3))
case("y = ConstantOfShape <value = int64[1] {7}> (s)", s=ints(2, 3))
case("y = Pad (a, p)", normal(2, 3), p=ints(1, 0, 0, 2))
case("y = Pad (a, p, v, axes)", normal(2, 3), opset=18, p=ints(1, 2), v=np.float32(3), axes=ints(1))
case("y = Pad <pads=[0,1,1,0], value=2.0> (a)", normal(2, 3), opset=10)
for mode in ("reflect", "edge"):
    case(
        f'y = Pad <mode="{mode}"> (a, p)',
        normal(2, 4),
        p=ints(0, 2, 1, 3),
    )
case('y = Pad <mode="wrap"> (a, p)', normal(2, 4), opset=19, p=ints(0, 2, 0, 3))
case("y = Trilu <upper=0> (a)", normal(3, 4))
case("y = Trilu (a, k)", normal(3, 4), k=np.int64(1))
case("y = CumSum (a, axis)", normal(3, 4), axis=np.int64(1))
case("y = CumSum <exclusive=1, reverse=1> (a, axis)", normal(3, 4), axis=np.int64(0))
for reduce in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"):
    case(f"y = {reduce} <axes=[0,-1], keepdims=0> (a)", normal(2, 3, 4))
    case(f"y = {reduce} (a)", normal(2, 3))
    case(f"y = {reduce} (a, axes)", normal(2, 3, 4), opset=18, axes=ints(1))
case("y = ReduceSum (a, axes)", normal(2, 3, 4), axes=ints(-1))
case("y = ReduceSum <noop_with_empty_axes=1> (a)", normal(2, 3))
for arg in ("ArgMax", "ArgMin"):
    case(f"y = {arg} <axis=1, keepdims=0> (a)", normal(3, 5))
case("y = MatMul (a, b)", normal(2, 1, 3, 4), normal(5, 4, 6))
case("y = MatMul (a, b)", normal(4), normal(4, 6))
case("y = Gemm (a, w)", normal(3, 4), w=normal(4, 5))
case(
    "y = Gemm <transA=1, transB=1, alpha=0.5, beta=2.0> (a, w, bias)",
    normal(4, 3),
    w=normal(5, 4),
    bias=normal(5),
)
case('y = Einsum <equation="bij,bjk->bik"> (a, b)', normal(2, 3, 4), normal(2, 4, 5))
case("y = Conv (a, w)", normal(2, 3, 7), w=normal(4, 3, 3))
case(
    "y = Conv <pads=[1,0,1,2], strides=[2,1], dilations=[1,2]> (a, w, bias)",
    normal(2, 3, 8, 9),
    w=normal(4, 3, 3, 3),
    bias=normal(4),
)
case("y = Conv <group=4, pads=[1,1,1,1]> (a, w)", normal(2, 4, 6, 6), w=normal(8, 1, 3, 3))
for auto in ("SAME_UPPER", "SAME_LOWER", "VALID"):
    case(f'y = Conv <auto_pad="{auto}", strides=[2,2]> (a, w)', normal(1, 3, 7, 8), w=normal(4, 3, 3, 2))
case("y = MaxPool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,1]> (a)", normal(2, 3, 8, 9))
case("y = MaxPool <kernel_shape=[3,2], strides=[2,3], ceil_mode=1> (a)", normal(2, 3, 8, 9))
case('y = MaxPool <kernel_shape=[2,2], strides=[2,2], auto_pad="SAME_UPPER"> (a)', normal(1, 2, 7, 7))
for options in ("", ", count_include_pad=1", ", ceil_mode=1", ", ceil_mode=1, count_include_pad=1"):
    case(
        f"y = AveragePool <kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]{options}> (a)",
        normal(2, 3, 8, 9),
        opset=19,
    )
case("y = GlobalAveragePool (a)", normal(2, 3, 4, 5))
case("y = GlobalMaxPool (a)", normal(2, 3, 4, 5))
case(
    "y = BatchNormalization <epsilon=0.01> (a, s, b1, m, v)",
    normal(2, 3, 4, 4),
    s=normal(3),
    b1=normal(3),
    m=normal(3),
    v=positive(3),
)
case("y = InstanceNormalization (a, s, b1)", normal(2, 3, 4, 4), s=normal(3), b1=normal(3))
case("y = LayerNormalization (a, s, b1)", normal(2, 3, 8), s=normal(8), b1=normal(8))
case("y = LayerNormalization <axis=1, epsilon=0.1> (a, s)", normal(2, 3, 8), s=normal(3, 8))
case("y = RMSNormalization <axis=-1, epsilon=0.01> (a, s)", normal(2, 3, 8), opset=23, s=normal(8))
for direction, count in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
    for op, gates, states in (("LSTM", 4, "h0, c0"), ("GRU", 3, "h0")):
        weights = {
            "w": normal(count, gates * 5, 3),
            "r": normal(count, gates * 5, 5),
            "b1": normal(count, 2 * gates * 5),
            "h0": normal(count, 2, 5),
            "c0": normal(count, 2, 5),
        }
        used = {name: array for name, array in weights.items() if name != "c0" or op == "LSTM"}
        targets, count_out = ("y, z, u", 3) if op == "LSTM" else ("y, z", 2)
        text = f'{targets} = {op} <hidden_size=5, direction="{direction}"> (a, w, r, b1, , {states})'
        case(text, normal(4, 2, 3), outputs=count_out, op=op, **used)
case("y, z = GRU <hidden_size=5, linear_before_reset=1> (a, w, r, b1)", normal(4, 2, 3), outputs=2, op="GRU",
     w=normal(1, 15, 3), r=normal(1, 15, 5), b1=normal(1, 30))  # fmt: skip
case(
    "y, z = GRU <hidden_size=5> (a, w, r)",
    normal(4, 2, 3),
    outputs=2,
    op="GRU",
    w=normal(1, 15, 3),
    r=normal(1, 15, 5),
)
case("k = Constant <value_float=2.0> () y = Mul (a, k)", normal(3), op="Constant")
case("k = Constant <value_ints=[0,-1]> () y = Reshape (a, k)", normal(3, 4), op="Constant")
case("k = Constant <value = float[2] {1, 2}> () y = Mul (a, k)", normal(3, 2), op="Constant")
BRANCHES = "then_branch = t () => (float[3] p) { p = Add (b, b) }, else_branch = e () => (float[3] q) { q = Neg (b) }"
case(f"y = If (a) <{BRANCHES}>", np.array(True), normal(3), op="If")
case(f"h = Not (a) y = If (h) <{BRANCHES}>", np.array(True), normal(3), op="If")

ALL = [(name, number) for name, cases in sorted(CASES.items()) for number in range(len(cases))]


@pytest.mark.parametrize(("name", "number"), ALL)
def test_agrees_with_onnxruntime(name, number):
    body, inputs, constants, opset, outputs = CASES[name][number]
    model = graph(body, inputs, outputs, opset, constants)
    expected = open_session(model, optimization="disable").run(inputs)
    found = TorchGraph(model).run(inputs, list(expected))
    for key, array in expected.items():
        assert tuple(found[key].shape) == array.shape
        np.testing.assert_allclose(found[key].numpy().astype(array.dtype), array, rtol=2e-5, atol=2e-5)


def test_every_supported_operator_has_a_case():
    assert set(CASES) == set(SUPPORTED)


def test_gradients_reach_the_weights_through_a_graph():
    model = graph(
        "h = MatMul (a, w) r = Relu (h) y = ReduceMean (r)", {"a": normal(4, 3)}, 1, 17, {"w": normal(3, 2)}
    )
    torch_graph = TorchGraph(model)
    (weight,) = torch_graph.constants.values()
    weight.requires_grad_(True)
    torch_graph.run({"a": normal(4, 3)}, ["y"])["y"].sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_half_precision_is_computed_in_float32():
    model = graph(
        "y = MatMul (a, w)",
        {"a": normal(4, 3, dtype=np.float16)},
        1,
        17,
        {"w": normal(3, 2, dtype=np.float16)},
    )
    y = TorchGraph(model).run({"a": normal(4, 3, dtype=np.float16)}, ["y"])["y"]
    assert str(y.dtype) == "torch.float32"


def test_names_every_operator_it_lacks():
    model = graph("h = Hardmax (a) k = Det (h) y = Relu (k)", {"a": normal(3, 3)}, 1, 17, {})
    with pytest.raises(UnsupportedModelError, match="Hardmax, Det"):
        TorchGraph(model)


def test_refuses_recurrence_it_would_get_wrong():
    text = "y, z = GRU <hidden_size=5, clip=1.0> (a, w, r)"
    model = graph(text, {"a": normal(4, 2, 3)}, 2, 17, {"w": normal(1, 15, 3), "r": normal(1, 15, 5)})
    with pytest.raises(UnsupportedModelError, match="clip"):
        TorchGraph(model)


def test_errors_are_one_line_with_what_to_do():
    model = graph("y = MatMul (a, w)", {"a": normal(4, 3)}, 1, 17, {"w": normal(3, 2)})
    with pytest.raises(UsageError, match="no array for input a"):
        TorchGraph(model).run({}, ["y"])
    with pytest.raises(UsageError, match="no tensor nowhere"):
        TorchGraph(model).run({"a": normal(4, 3)}, ["nowhere"])
    with pytest.raises(ModelError, match="MatMul"):
        TorchGraph(model).run({"a": normal(4, 7)}, ["y"])
