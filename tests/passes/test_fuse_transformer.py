"""Fusing around sparse products: what is recognised, what is refused and why, and that nothing changes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model
from sparsecc.pm import PassContext, PassReport, Pipeline

LOWER = "tidy,choose-layout{layout=4x1},lower-sparse"
LOWER_INT8 = "tidy,quantize,choose-layout{layout=4x1},lower-sparse"


@pytest.fixture(scope="module")
def zoo(root):
    sys.path.insert(0, str(root / "models"))
    yield importlib.import_module("zoo")
    sys.path.pop(0)


class Costs:
    """Says that the n-th pair of models asked for has the n-th of these relative times."""

    def __init__(self, *relative: float) -> None:
        self.relative = list(relative)
        self.asked = 0

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        assert model.fingerprint() != candidate.fingerprint()
        self.asked += 1
        return self.relative.pop(0)


def lowered(proto: onnx.ModelProto, pipeline: str = LOWER) -> Model:
    model = Model.from_proto(proto)
    Pipeline.parse(pipeline).run(model, PassContext())
    return model


def fuse(model: Model, costs: Costs | None = None) -> PassReport:
    text = "fuse-transformer{min-gain=0}" if costs is None else "fuse-transformer"
    (report,) = Pipeline.parse(text).run(model, PassContext(costs=costs))
    return report


def op_types(model: Model) -> list[str]:
    return [node.op_type for node in model.onnx.graph]


def check_same(before: Model, after: Model, tolerance: float = 1e-5, **shapes: Sequence[int]) -> None:
    """Both compute the same with the library and without."""
    pair = [before.copy(), after.copy()]
    for each in pair:
        emit.finalize(each)
        onnx.checker.check_model(each.to_proto(), full_check=True)
    inputs = verify.make_inputs(pair[0], None, 0, shapes or None)
    for library in (True, False):
        assert verify.worst_rel_l2(verify.compare(*pair, inputs, library=(library, library))) <= tolerance


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_encoder(zoo, opset: int) -> None:
    proto = zoo.build(
        "minilm_l6", layers=2, hidden=32, heads=4, intermediate=64, vocabulary=50, positions=16, seq=9,
        pattern="4x1", sparsity=0.5, opset=opset,
    )  # fmt: skip
    before = lowered(proto)
    after = before.copy()
    report = fuse(after)
    assert not report.skipped
    assert sorted(set(op_types(after)) - {"Gather", "Cast", "Sub", "Mul", "Unsqueeze", "Add"}) == [
        "AddLayerNorm", "BlockSparseMatMul", "BlockSparseMatMulGelu", "PackedAttentionMask",
    ]  # fmt: skip
    assert op_types(after).count("AddLayerNorm") == 5
    assert op_types(after).count("BlockSparseMatMul") == 6  # q/k/v, output and the second of the MLP, twice
    check_same(before, after)
    second = fuse(after)
    assert not second.changed


def test_what_cannot_be_timed_is_not_fused(zoo) -> None:
    class Elsewhere:
        def relative_time_of(self, model: Model, candidate: Model) -> float:
            raise MeasurementError("for another machine")

    proto = zoo.build(
        "minilm_l6", layers=1, hidden=32, heads=4, intermediate=64, vocabulary=50, positions=16, seq=5,
        pattern="4x1", sparsity=0.5,
    )  # fmt: skip
    model = lowered(proto)
    before = model.fingerprint()
    report = fuse(model, Elsewhere())
    assert not report.changed
    assert any("for another machine" in note for note in report.notes)
    assert model.fingerprint() == before


def test_encoder_with_int8_weights_gives_the_same_integers(zoo) -> None:
    proto = zoo.build(
        "minilm_l6", layers=1, hidden=32, heads=4, intermediate=64, vocabulary=50, positions=16, seq=5,
        pattern="4x1", sparsity=0.5,
    )  # fmt: skip
    before = lowered(proto, LOWER_INT8)
    assert "BlockSparseMatMulInt8" in op_types(before)
    after = before.copy()
    fuse(after)
    assert op_types(after).count("PackedAttentionMask") == 1
    check_same(before, after, 1e-2)  # a value near the middle between two integers may become the other one


def test_decoder(zoo) -> None:
    proto = zoo.build(
        "llama_block",
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        intermediate=64,
        seq=6,
        pattern="4x1",
        sparsity=0.5,
    )
    before = lowered(proto)
    after = before.copy()
    report = fuse(after)
    types = op_types(after)
    assert types.count("RmsNorm") == 1
    assert types.count("AddRmsNormSum") == 3
    assert types.count("GatedSilu") == 2
    assert types.count("PackedRotaryAttentionMask") == 2
    assert not report.skipped
    check_same(before, after)


def text_model(text: str, opset: int = 17, **constants: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


def weight(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)
    matrix[:, : outputs // 2] = 0
    return matrix


ATTENTION = """g (float[B,S,8] x, float[{mask}] m) => (float[B,S,8] y) {{
    q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    {q_scaled} = Mul(q, factor)
    q4 = Reshape(qs, cut)  k4 = Reshape(k, cut)  v4 = Reshape(v, cut)
    qh = Transpose<perm=[0,2,1,3]>(q4)
    kh = Transpose<perm={k_perm}>(k4)
    kt = Transpose<perm=[0,1,3,2]>(kh)
    vh = Transpose<perm=[0,2,1,3]>(v4)
    s = MatMul(qh, kt)
    a = Add(m, s)
    [att] p = Softmax<axis={axis}>(a)
    c = MatMul(p, vh)
    ch = Transpose<perm=[0,2,1,3]>(c)
    y = Reshape(ch, join)
}}"""


def attention_model(
    mask: str = "B,1,1,S",
    cut: Sequence[int] = (0, 0, 2, 4),
    axis: int = -1,
    k_perm: str = "[0,2,1,3]",
    join: Sequence[int] = (0, 0, 8),
) -> Model:
    text = ATTENTION.format(mask=mask, q_scaled="qs", axis=axis, k_perm=k_perm)
    constants = {
        "factor": np.array(0.25, np.float32), "cut": np.array(cut), "join": np.array(join),
        **{name: weight(8, 8, seed) for seed, name in enumerate(("wq", "wk", "wv"))},
    }  # fmt: skip
    return lowered(text_model(text, **constants))


@pytest.mark.parametrize("mask", ["B,1,1,S", "S", "T", "B,1,1,T", "1,2,S,S", "1,1,1,1", "B,2,S,S"])
def test_attention_scaled_before_it_is_cut(mask: str) -> None:
    before = attention_model(mask)
    after = before.copy()
    fuse(after)
    assert op_types(after) == ["BlockSparseMatMul", "PackedAttentionMask"]
    check_same(
        before,
        after,
        x=(2, 5, 8),
        m=tuple({"B": 2, "S": 5, "T": 5}.get(d) or int(d) for d in mask.split(",")),
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "Z,1,1,S"}, "may be larger"),
        ({"mask": "B,1,T,S"}, "may be larger"),
        ({"mask": "1,B,1,1,S"}, "more than four"),
        ({"axis": 1}, "not over the keys"),
        ({"k_perm": "[0,2,3,1]"}, "not made of heads"),
        ({"cut": (-1, 0, 2, 4)}, None),
        ({"cut": (0, -1, 2, 4)}, None),
        ({"cut": (-1, 1, 2, 4)}, "may move rows"),
        ({"join": (0, -1, 8)}, None),
        ({"join": (1, -1, 8)}, "not joined to rows"),
        ({"join": (5, 2, -1)}, "not joined to rows"),
    ],
)
def test_attention_refused_with_the_reason(options: dict, reason: str | None) -> None:
    model = attention_model(**options)
    report = fuse(model)
    if reason is None:
        assert [change.site for change in report.changed] == ["att", "att"]
        return
    assert not report.changed
    assert reason in report.skipped[0].reason


NORM = """g (float[B,S,8] x, float[{other}] r) => (float[B,S,8] y, float[B,S,8] z) {{
    h = MatMul(x, w)
    z0 = Add(h, r)
    [norm] n = LayerNormalization<axis={axis}, epsilon=0.01>(z0, gain, shift)
    y = MatMul(n, w)
    z = {last}(z0)
}}"""


@pytest.mark.parametrize("last", ["Neg", "Identity"])
@pytest.mark.parametrize(
    ("other", "axis", "found"),
    [
        ("B,S,8", -1, "AddLayerNormSum"),
        ("S,8", 2, "AddLayerNormSum"),
        ("1,S,8", -1, "AddLayerNormSum"),
        ("B,1,8", -1, "LayerNorm"),
        ("B,T,8", -1, "LayerNorm"),
        ("B,S,8", 1, None),
    ],
)
def test_norm_of_a_sum(other: str, axis: int, found: str | None, last: str) -> None:
    wide = (8,) if axis != 1 else (5, 8)
    text = NORM.format(other=other, axis=axis, last=last).replace(
        "float[B,S,8] ", "float[B,5,8] " if axis == 1 else "float[B,S,8] "
    )
    before = lowered(
        text_model(text, w=weight(8, 8), gain=np.full(wide, 2, np.float32), shift=np.ones(wide, np.float32))
    )
    after = before.copy()
    report = fuse(after)
    if found is None:
        assert "more than the last axis" in report.skipped[0].reason
        return
    assert found in op_types(after)
    sizes = {"B": 2, "S": 5, "T": 5}
    check_same(before, after, x=(2, 5, 8), r=tuple(sizes.get(d) or int(d) for d in other.split(",")))


def test_norm_whose_parameters_are_computed_is_left_alone() -> None:
    text = """g (float[B,8] x, float[8] gain) => (float[B,8] y) {
        h = MatMul(x, w)
        [norm] y = LayerNormalization(h, gain, shift)
    }"""
    report = fuse(lowered(text_model(text, w=weight(8, 8), shift=np.ones(8, np.float32))))
    assert "not one constant per column" in report.skipped[0].reason


def test_norm_whose_constants_are_nodes_behind_the_sum() -> None:
    text = """g (float[B,8] x) => (float[B,8] y) {
        m = MatMul(x, w)
        a = Add(m, x)
        gain = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>()
        y = LayerNormalization(a, gain, shift)
    }"""
    constants = {"w": weight(8, 8), "shift": np.arange(8, dtype=np.float32)}
    before = lowered(text_model(text, **constants), LOWER.removeprefix("tidy,"))
    after = before.copy()
    fuse(after)
    assert op_types(after) == ["BlockSparseMatMul", "Constant", "AddLayerNorm"]
    check_same(before, after, x=(3, 8))


def test_gate_that_is_broadcast_is_left_alone() -> None:
    text = """g (float[B,8] x) => (float[B,12] y) {
        g = MatMul(x, wg)
        u = MatMul(x, wu)
        s = Sigmoid(g)
        h = Mul(g, s)
        y = Mul(h, u)
    }"""
    before = lowered(
        text_model(text, wg=weight(1, 8).T, wu=weight(8, 12)),
        "tidy,choose-layout{layout=unstructured},lower-sparse",
    )
    after = before.copy()
    (skip,) = fuse(after).skipped
    assert "equally wide" in skip.reason
    check_same(before, after, x=(3, 8))


def test_gates_of_different_kinds() -> None:
    text = """g (float[B,8] x, float[B,8] z) => (float[B,16] y) {
        g = MatMul(x, wg)  u = MatMul(z, wu)
        e = Sigmoid(g)  a = Mul(g, e)
        [unit] y = Mul(u, a)
    }"""
    constants = {"wg": weight(8, 16), "wu": weight(8, 16, 1)}
    report = fuse(lowered(text_model(text, **constants)))
    assert report.skipped[0].reason == "its products read different values"
    before = lowered(text_model(text.replace("(z, wu)", "(x, wu)"), **constants))
    after = before.copy()
    fuse(after)
    assert op_types(after) == ["BlockSparseMatMul", "GatedSilu"]
    check_same(before, after, x=(3, 8), z=(3, 8))


def test_only_what_is_measured_faster_stays(zoo) -> None:
    proto = zoo.build(
        "minilm_l6", layers=1, hidden=16, heads=2, intermediate=32, vocabulary=50, positions=16, seq=4,
        pattern="4x1", sparsity=0.5,
    )  # fmt: skip
    model = lowered(proto)
    costs = Costs(0.9, 1.1)  # norms pay, attention does not, and there is nothing for the other steps then
    report = fuse(model, costs)
    assert costs.asked == 2
    assert "AddLayerNorm" in op_types(model)
    assert "Softmax" in op_types(model)
    assert any("undone" in note for note in report.notes)
    with pytest.raises(UsageError, match="measured costs"):
        Pipeline.parse("fuse-transformer").run(lowered(proto), PassContext())


def test_models_it_has_nothing_to_do_with(zoo) -> None:
    dense = Model.from_proto(
        zoo.build("minilm_l6", layers=1, hidden=16, heads=2, intermediate=32, vocabulary=50, seq=4)
    )
    before = dense.fingerprint()
    assert "no sparse operator" in fuse(dense).notes[0]
    assert dense.fingerprint() == before
    old = lowered(
        text_model("g (float[B,8] x) => (float[B,8] y) { y = MatMul(x, w) }", opset=12, w=weight(8, 8))
    )
    assert "opset 12 is below 13" in fuse(old).notes[0]
