"""Attention of LLaMA-like decoders as torch exports it: shared keys, rotary positions, sizes that are computed."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.ir import Model
from sparsecc.pm import PassContext, PassReport, Pipeline

HEADS, KV, SIZE = 4, 2, 6
WIDTH = HEADS * SIZE

# What torch.onnx.export makes of transformers' LlamaAttention (eager, dynamic axes), as far as it matters here: the
# sizes are read from tensors in the middle, halves are two slices, `expand` asks Where for every size.
ROTARY = """
    {x}_size = Gather<axis=0>({x}_shape, three)  {x}_half = Div({x}_size, two_scalar)
    {x}_halves = Unsqueeze({x}_half, zero)
    {x}_low = Slice({x}h, zero, {x}_halves, last_axis, one)
    {x}_high = Slice({x}h, {x}_halves, far, last_axis, one)
    {x}_neg = Neg({x}_high)
    {x}_turned = Concat<axis=-1>({x}_neg, {x}_low)
    {x}_cos = Mul({x}h, cos)  {x}_sin = Mul({x}_turned, {sin})
    {x}r = Add({x}_cos, {x}_sin)
"""
REPEAT = """
    {x}_s = Shape({source})
    {x}_b = Gather<axis=0>({x}_s, zero)  {x}_t = Gather<axis=0>({x}_s, two)
    {x}_wide = Unsqueeze({source}, {axis})
    {x}_wanted = Concat<axis=0>({x}_b, {order}, {x}_t, size)
    {x}_count = Shape({x}_wanted)
    {x}_ones = ConstantOfShape<value = int64[1] {{1}}>({x}_count)
    {x}_minus = Mul({x}_ones, minus_one)
    {x}_free = Equal({x}_wanted, {x}_minus)
    {x}_target = Where({x}_free, {x}_ones, {x}_wanted)
    {x}_expanded = Expand({x}_wide, {x}_target)
    {x}_joined = Concat<axis=0>({x}_b, heads, {x}_t, size)
    {x}_all = Reshape({x}_expanded, {x}_joined)
"""
BLOCK = """g (float[B,S,24] x, float[B,1,S,S] mask, int64[B,S] positions, float[B,2,P,6] past) => ({outputs}) {{
    n = Cast<to=1>(x)  square = Pow(n, two_float)  mean = ReduceMean<axes=[-1]>(square)
    more = Add(mean, epsilon)  root = Sqrt(more)  inverse = Div(one_float, root)
    unit = Mul(x, inverse)  norm = Mul(gain, unit)
    q = MatMul(norm, wq)  k = MatMul(norm, wk)  v = MatMul(norm, wv)
    shape = Shape(norm)  b = Gather<axis=0>(shape, zero)  s = Gather<axis=0>(shape, one)
    cut = Concat<axis=0>(b, s, minus_one, size)
    q4 = Reshape(q, cut)  k4 = Reshape(k, cut)  v4 = Reshape(v, cut)
    qh = Transpose<perm=[0,2,1,3]>(q4)  kh = Transpose<perm=[0,2,1,3]>(k4)  vh0 = Transpose<perm=[0,2,1,3]>(v4)
    wide = Unsqueeze(positions, one)  float = Cast<to=1>(wide)
    frequency = Mul(frequencies, float)  angles = Transpose<perm=[0,2,1]>(frequency)
    both = Concat<axis=-1>(angles, angles)
    cos3 = Cos(both)  sin3 = Sin(both)  cos = Unsqueeze(cos3, {table_axis})  sin = Unsqueeze(sin3, {table_axis})
    other_sin = Neg(sin)
    q_shape = Shape(qh)  k_shape = Shape(kh)
    {q_rotary}
    {k_rotary}
    kc = {k_cache}  vh = {v_cache}
    {k_repeat}
    {v_repeat}
    kt = Transpose<perm=[0,1,3,2]>(k_all)
    product = MatMul(qr, kt)  scaled = Mul(product, scale)
    total0 = Shape(k_all)  total = Gather<axis=0>(total0, two)
    mask4 = Slice(mask, zero, total, last_axis, one)
    masked = Add(scaled, mask4)
    [att] p0 = Softmax<axis={axis}>(masked)  p1 = Cast<to=1>(p0)
    context = MatMul(p1, v_all)
    rows = Transpose<perm=[0,2,1,3]>(context)
    joined = Concat<axis=0>(b, s, minus_one)
    y0 = Reshape(rows, joined)
    h = MatMul(y0, wo)
    y = Add(x, h)
}}"""


def weight(inputs: int, outputs: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    matrix[:, : outputs // 3 * 2] = 0
    return matrix


def decoder(
    *,
    cache: bool = False,
    k_from: str = "kr",
    order: str = "kv, group",
    axis: str = "two",
    k_sin: str = "sin",
    softmax: int = -1,
    table_axis: str = "one",
    change: tuple[str, str] = ("", ""),
    **constants: np.ndarray,
) -> Model:
    """The lowered block; ``change`` is a replacement in its text."""
    outputs = "float[B,S,24] y" + ", float[B,2,T,6] kc" * cache
    repeat = {"axis": axis, "order": order}
    text = BLOCK.format(
        outputs=outputs,
        k_cache="Concat<axis=2>(past, kr)" if cache else f"Identity({k_from})",
        v_cache="Concat<axis=2>(past, vh0)" if cache else "Identity(vh0)",
        table_axis=table_axis,
        q_rotary=ROTARY.format(x="q", sin="sin"),
        k_rotary=ROTARY.format(x="k", sin=k_sin),
        k_repeat=REPEAT.format(x="k", source="kc", **repeat),
        v_repeat=REPEAT.format(x="v", source="vh", **repeat),
        axis=softmax,
    )
    if change[0]:
        text, count = re.subn(re.escape(change[0]), change[1], text)
        assert count == 1
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    integers = {
        "zero": [0], "one": [1], "two": [2], "three": [3], "minus_one": [-1], "last_axis": [3], "far": [1 << 62],
        "heads": [HEADS], "kv": [KV], "group": [HEADS // KV], "size": [SIZE],
    }  # fmt: skip
    arrays = {
        **{name: np.array(value) for name, value in integers.items()},
        "two_scalar": np.array(2), "two_float": np.array(2, np.float32), "one_float": np.array(1, np.float32),
        "epsilon": np.array(1e-6, np.float32), "scale": np.array(SIZE**-0.5, np.float32),
        "gain": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32),
        "frequencies": (100.0 ** -np.arange(SIZE // 2)).astype(np.float32)[None, :, None],
        "wq": weight(WIDTH, WIDTH, 0), "wk": weight(WIDTH, KV * SIZE, 1), "wv": weight(WIDTH, KV * SIZE, 2),
        "wo": weight(WIDTH, WIDTH, 3), **constants,
    }  # fmt: skip
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    # Sizes of one element are vectors here and scalars in torch's files, which changes nothing.
    for node in proto.graph.node:
        if node.op_type == "Unsqueeze" and node.output[0].endswith("_halves"):
            node.op_type = "Identity"
            del node.input[1:]
    model = Model.from_proto(proto)
    Pipeline.parse("tidy,choose-layout{layout=4x1},lower-sparse").run(model, PassContext())
    return model


def fuse(model: Model) -> PassReport:
    (report,) = Pipeline.parse("fuse-transformer{min-gain=0}").run(model, PassContext())
    return report


def op_types(model: Model) -> set[str]:
    return {node.op_type for node in model.onnx.graph}


def check_same(before: Model, after: Model, batch: int, rows: int) -> None:
    """Both compute the same with the library and without."""
    pair = [before.copy(), after.copy()]
    for each in pair:
        emit.finalize(each)
        onnx.checker.check_model(each.to_proto(), full_check=True)
    rng = np.random.default_rng(0)
    mask = np.triu(np.full((rows, rows), np.finfo(np.float32).min, np.float32), 1)
    inputs = {
        "x": rng.standard_normal((batch, rows, WIDTH)).astype(np.float32),
        "mask": np.broadcast_to(mask, (batch, 1, rows, rows)),
        "positions": np.broadcast_to(np.arange(rows), (batch, rows)) + np.arange(batch)[:, None],
        "past": np.zeros((batch, KV, 0, SIZE), np.float32),
    }
    for library in (True, False):
        result = verify.compare(*pair, inputs, library=(library, library))
        assert verify.worst_rel_l2(result) <= 1e-5


def test_block_as_torch_exports_it() -> None:
    before = decoder()
    after = before.copy()
    report = fuse(after)
    assert not report.skipped
    assert {"RmsNorm", "PackedRotaryAttentionMask", "BlockSparseMatMul"} <= op_types(after)
    assert not {"Softmax", "Expand", "Neg", "Pow", "MatMul"} & op_types(after)
    for batch, rows in ((1, 1), (2, 5), (3, 19)):
        check_same(before, after, batch, rows)
    assert not fuse(after).changed


def test_heads_of_their_own_that_are_turned() -> None:
    own = {name: weight(WIDTH, WIDTH, seed) for seed, name in enumerate(("wk", "wv"))}
    before = decoder(kv=np.array([HEADS]), group=np.array([1]), **own)
    after = before.copy()
    fuse(after)
    assert "PackedRotaryAttentionMask" in op_types(after)
    check_same(before, after, 2, 7)


def test_keys_that_are_not_turned() -> None:
    half_turned = decoder(change=("q_cos = Mul(qh, cos)", "q_cos = Identity(qh)"))
    assert "not made of heads" in fuse(half_turned).skipped[0].reason
    one_turned = decoder(change=("product = MatMul(qr, kt)", "product = MatMul(qh, kt)"))
    assert "same positions" in fuse(one_turned).skipped[0].reason
    neither = {"change": ("product = MatMul(qr, kt)", "product = MatMul(qh, kt)"), "k_from": "kh"}
    before = decoder(**neither)
    after = before.copy()
    assert not fuse(after).skipped
    assert "PackedGroupedAttentionMask" in op_types(after)
    check_same(before, after, 2, 7)


def test_scale_computed_from_the_size_of_heads() -> None:
    """torch's scaled_dot_product_attention: both sides times the root of one over the root of the size."""
    computed = """last = Slice(q_shape, minus_one, far)  number = Cast<to=1>(last)  width_root = Sqrt(number)
    part = Div(one_float, width_root)  factor = Sqrt(part)
    qs = Mul(qr, factor)  ks = Mul(kt, factor)  product = MatMul(qs, ks)"""
    before = decoder(change=("product = MatMul(qr, kt)", computed), scale=np.array(1, np.float32))
    after = before.copy()
    assert not fuse(after).skipped
    (node,) = (node for node in after.onnx.graph if node.op_type == "PackedRotaryAttentionMask")
    assert node.attributes["scale"].as_float() == pytest.approx(SIZE**-0.5)
    check_same(before, after, 2, 5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache": True}, "from a cache"),
        ({"order": "group, kv", "axis": "one"}, "repeated is not known"),
        ({"k_sin": "other_sin"}, "same positions"),
        ({"softmax": 2}, "not over the keys"),
        ({"table_axis": "two"}, "same for all heads"),
        ({"change": ("k_neg = Neg(k_high)", "k_neg = Neg(k_low)")}, "not made of heads"),
        ({"change": ("q_turned = Concat<axis=-1>(q_neg, q_low)", "q_turned = Concat<axis=-1>(q_low, q_neg)")},
         "not made of heads"),
        ({"change": ("q_low = Slice(qh, zero, q_halves, last_axis, one)",
                     "q_low = Slice(qh, zero, q_halves, last_axis, one) q_quarter = Identity(q_low)"),
          "far": np.array([5])}, "not made of heads"),
        ({"change": ("kt = Transpose<perm=[0,1,3,2]>(k_all)", "ka = Relu(k_all) kt = Transpose<perm=[0,1,3,2]>(ka)")},
         "not made of heads"),
        ({"change": ("mask4 = Slice(mask,", "every = Tile(mask, tiles) mask4 = Slice(every,"),
          "tiles": np.array([1, 2, 1, 1])}, "may be larger"),
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_left_alone(options: dict, reason: str) -> None:
    model = decoder(**options)
    report = fuse(model)
    reasons = [skip.reason for skip in report.skipped if skip.site == "att"]
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert "Softmax" in op_types(model)


def test_keys_that_are_an_output_too_stay_computed() -> None:
    """A prefill without a cache hands its turned keys out; attention is fused beside what makes them."""
    before = decoder()
    graph = before.onnx.graph
    present = next(node.outputs[0] for node in graph if node.outputs[0].name == "kr")
    present.shape, present.type = (
        onnx_ir.Shape(["B", KV, "S", SIZE]),
        onnx_ir.TensorType(onnx_ir.DataType.FLOAT),
    )
    graph.outputs.append(present)
    after = before.copy()
    report = fuse(after)
    assert "RotaryAttentionMask" in op_types(after)
    assert any("three sparse products of its own" in skip.reason for skip in report.skipped)
    check_same(before, after, 2, 4)
