"""Choosing and lowering: what is rewritten, what is left alone and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.lower.choose_layout import GAIN_KEY, LAYOUT_KEY, candidate_patterns, fastest
from sparsecc.pm import PassContext, PassReport, Pipeline, Requantizer
from sparsecc.sparse import Layout, Pattern, keep_mask

CHAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 32] x) => (float[batch, 16] y) {
    [fc1] h = MatMul(x, w1)
    [bias1] hb = Add(h, b1)
    [relu] a = Relu(hb)
    [fc2] y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(a, w2, c2)
}"""
CONV = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 8, 9, 9] x) => (float[n, 16, 5, 5] y) {
    [conv1] h = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x, w1, b1)
    [act] a = HardSwish(h)
    [conv2] y = Conv<kernel_shape = [1, 1]>(a, w2)
}"""
SHAPES = {"w1": (32, 64), "b1": (64,), "w2": (16, 64), "c2": (16,)}
CONV_SHAPES = {"w1": (32, 8, 3, 3), "b1": (32,), "w2": (16, 32, 1, 1)}


def build(
    text: str, shapes: Mapping[str, tuple[int, ...]], sparsity: float = 0.8, pattern: str = "unstructured"
) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            matrix = array.T if array.ndim == 2 and name != "w2" else array.reshape(shape[0], -1)  # [N, K]
            matrix *= keep_mask(np.abs(matrix), Pattern.parse(pattern), sparsity)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


@dataclass
class FakeCosts:
    """Costs from a table; sites it does not know cannot be timed."""

    times: Mapping[str, Mapping[str, float]]
    relative: float = 0.5
    asked: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> Mapping[str, float]:
        self.asked.append((site.name, tuple(map(str, layouts))))
        if site.name not in self.times:
            raise MeasurementError("not timed: no such entry")
        return self.times[site.name]

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        return self.relative if sites else 1.0


def run(model: Model, pipeline: str, costs: FakeCosts | None = None) -> list[PassReport]:
    return Pipeline.parse(pipeline).run(model, PassContext(costs=costs))


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.onnx.graph]


@pytest.mark.parametrize(("text", "shapes"), [(CHAIN, SHAPES), (CONV, CONV_SHAPES)], ids=["chain", "conv"])
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "8x4"])
@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
def test_lowered_model_computes_the_same(
    text: str, shapes: Mapping[str, tuple[int, ...]], layout: str, library: bool
) -> None:
    dense = build(text, shapes, pattern=layout)
    model = dense.copy()
    run(model, f"choose-layout{{layout={layout}}},lower-sparse")
    emit.finalize(model)
    assert sum(node.domain == "ai.sparsecc" for node in model.onnx.graph) == 2
    onnx.checker.check_model(model.to_proto(), full_check=True)
    inputs = verify.make_inputs(dense, None, 0, {"x": (3, *dense.input_specs()[0].shape[1:])})
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs, library=(False, library))) <= 1e-6


def test_bias_and_activation_are_fused() -> None:
    model = build(CHAIN, SHAPES, pattern="16x1")
    run(model, "choose-layout{layout=16x1},lower-sparse")
    assert operators(model) == ["BlockSparseMatMulRelu", "BlockSparseMatMul"]
    model = build(CONV, CONV_SHAPES)
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    assert operators(model) == ["SparseConvHardSwish", "SparseConv"]
    assert not any(name in model.onnx.graph.initializers for name in ("w1", "w2"))


RESIDUAL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 32, 9, 9] x) => (float[n, 32, 9, 9] y) {
    [conv1] h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)
    [conv2] s = Conv<kernel_shape = [1, 1]>(x, w2)
    [act] a = Relu(s)
    [sum] t = Add(h, a)
    [last] y = Relu(t)
}"""
RESIDUAL_SHAPES = {"w1": (32, 32, 3, 3), "b1": (32,), "w2": (32, 32, 1, 1)}


@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
def test_shortcut_is_fused_into_a_convolution(library: bool) -> None:
    """The summand is computed after the convolution that takes it in, by another that is lowered too."""
    dense = build(RESIDUAL, RESIDUAL_SHAPES)
    model = dense.copy()
    report = run(model, "choose-layout{layout=unstructured},lower-sparse")[-1]
    emit.finalize(model)
    assert operators(model) == ["SparseConvRelu", "SparseConvAddRelu"]
    assert [change.detail for change in report.changed if change.site == "conv1"] == [
        "SparseConvAddRelu unstructured with Add, Relu fused"
    ]
    onnx.checker.check_model(model.to_proto(), full_check=True)
    inputs = verify.make_inputs(dense, None, 0, {"x": (3, 32, 9, 9)})
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs, library=(False, library))) <= 1e-6


@pytest.mark.parametrize(
    "change",
    [
        ("[sum] t = Add(h, a)", "[sum] t = Add(h, h)"),
        ("[sum] t = Add(h, a)", "[mean] m = ReduceMean<axes = [2]>(a) [sum] t = Add(h, m)"),
        ("[sum] t = Add(h, a)", "[half] m = Sigmoid(h) [sum] t = Add(h, m)"),
        ("float[n, 32, 9, 9] y)", "float[n, 32, 9, 9] y, float[n, 32, 9, 9] h)"),
    ],
    ids=["twice", "broadcast", "two readers", "graph output"],
)
def test_other_sums_stay(change: tuple[str, str]) -> None:
    dense = build(RESIDUAL.replace(*change), RESIDUAL_SHAPES)
    model = dense.copy()
    run(model, "choose-layout{match=conv1 layout=unstructured},lower-sparse")
    emit.finalize(model)
    assert "Add" in operators(model)
    inputs = verify.make_inputs(dense, None, 0, {"x": (3, 32, 9, 9)})
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs)) <= 1e-6


@pytest.mark.parametrize("stored", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16])
def test_weight_in_16_bits_with_a_cast_is_lowered(stored: int) -> None:
    """Kept in half the bytes in the file, computed with in float32: what ``tidy`` folds is a site like others."""
    text = CHAIN.replace("[fc1] h = MatMul(x, w1)", "[wide] w = Cast<to = 1>(w1) [fc1] h = MatMul(x, w)")
    proto = build(text, SHAPES).to_proto()
    (weight,) = (item for item in proto.graph.initializer if item.name == "w1")
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.helper.make_tensor("w1", stored, array.shape, array.ravel()))
    dense = Model.from_proto(proto)
    model = dense.copy()
    run(model, "tidy,choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    assert operators(model) == ["SparseMatMulRelu", "SparseMatMul"]
    assert verify.worst_rel_l2(verify.compare(dense, model, verify.make_inputs(dense))) <= 1e-6


def test_graph_output_in_the_middle_is_kept() -> None:
    text = CHAIN.replace("float[batch, 16] y)", "float[batch, 16] y, float[batch, 64] hb)")
    dense = build(text, SHAPES)
    model = dense.copy()
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    assert operators(model) == ["SparseMatMul", "Relu", "SparseMatMul"]
    inputs = verify.make_inputs(dense)
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs)) <= 1e-6


def test_fastest_layout_is_marked_with_its_gain() -> None:
    model = build(CHAIN, SHAPES)
    costs = FakeCosts(
        {"fc1": {"dense": 1.0, "unstructured": 0.25}, "fc2": {"dense": 1.0, "unstructured": 1.5}}
    )
    (report,) = run(model, "choose-layout", costs)
    assert [change.site for change in report.changed] == ["fc1"]
    assert report.changed[0].numbers["gain"] == 4.0
    assert [(skip.site, "dense is faster" in skip.reason) for skip in report.skipped] == [("fc2", True)]
    marks = {site.name: site.node.metadata_props.get(LAYOUT_KEY) for site in model.sites()}
    assert marks == {"fc1": "unstructured", "fc2": None}


SIBLINGS = """<ir_version: 8, opset_import: ["": 17]>
g (float[5,32] x) => (float[5,48] y, float[5,48] z) {
    [fc1] y = MatMul(x, w1)
    [fc2] z = MatMul(x, w3)
}"""


@pytest.mark.parametrize(
    ("dense", "block", "expected"),
    [(1.0, 0.24, "16x1"), (1.0, 0.3, "unstructured"), (0.235, 0.24, "unstructured")],
    ids=["nearly as fast", "too slow", "slower than dense"],
)
def test_products_of_the_same_value_are_stored_alike(dense: float, block: float, expected: str) -> None:
    times = {
        "fc1": {"dense": 1.0, "16x1": 0.2, "8x1": 0.5, "unstructured": 0.3},
        "fc2": {"dense": dense, "16x1": block, "8x1": 0.5, "unstructured": 0.22},
    }
    model = build(SIBLINGS, {"w1": (32, 48), "w3": (32, 48)}, sparsity=0.5, pattern="16x1")
    (report,) = run(model, "choose-layout", FakeCosts(times))
    marks = {site.name: site.node.metadata_props[LAYOUT_KEY] for site in model.sites()}
    assert marks == {"fc1": "16x1", "fc2": expected}
    assert bool(report.notes) == (expected == "16x1")


def test_min_gain_and_keep_slower() -> None:
    times = {"fc1": {"dense": 1.0, "unstructured": 0.9}, "fc2": {"dense": 1.0, "unstructured": 1.5}}
    (report,) = run(build(CHAIN, SHAPES), "choose-layout{min-gain=1.2}", FakeCosts(times))
    assert not report.changed
    (report,) = run(build(CHAIN, SHAPES), "choose-layout{keep-slower=true}", FakeCosts(times))
    assert [change.site for change in report.changed] == ["fc1", "fc2"]


def test_layout_that_the_zeros_do_not_obey_is_refused() -> None:
    (report,) = run(build(CHAIN, SHAPES), "choose-layout{layout=16x1}")
    assert [skip.reason for skip in report.skipped] == ["its zeros do not obey 16x1"] * 2


def test_every_site_left_alone_has_a_reason() -> None:
    costs = FakeCosts({"fc2": {"dense": 1.0, "unstructured": 0.5}})
    (report,) = run(build(CHAIN, SHAPES), "choose-layout", costs)
    assert {skip.site: skip.reason for skip in report.skipped} == {"fc1": "not timed: no such entry"}
    (report,) = run(build(CHAIN, SHAPES, sparsity=0.0), "choose-layout", FakeCosts({}))
    assert all("too few zeros" in skip.reason for skip in report.skipped)
    assert len(report.skipped) == 2


def test_choosing_without_costs_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="layout="):
        run(build(CHAIN, SHAPES), "choose-layout")
    with pytest.raises(UsageError, match="optimize"):
        run(build(CHAIN, SHAPES), "choose-layout{layout=unstructured},confirm-layout")


def test_confirm_unmarks_when_the_model_gains_nothing() -> None:
    model = build(CHAIN, SHAPES)
    times = {name: {"dense": 1.0, "unstructured": 0.5} for name in ("fc1", "fc2")}
    reports = run(model, "choose-layout,confirm-layout,lower-sparse", FakeCosts(times, relative=0.99))
    assert len(reports[1].changed) == 2
    assert not reports[2].changed
    assert operators(model) == ["MatMul", "Add", "Relu", "Gemm"]
    assert not any(GAIN_KEY in node.metadata_props for node in model.onnx.graph)


def test_old_opset_stays_dense_with_the_reason() -> None:
    model = build(CHAIN.replace('"" : 17', '"" : 10'), SHAPES)
    (report,) = run(model, "choose-layout{layout=unstructured}")
    assert all("opset 10" in skip.reason for skip in report.skipped)


def test_blocks_across_groups_are_refused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 8, 5, 5] x) => (float[n, 16, 5, 5] y) { [conv] y = Conv<group = 2, kernel_shape = [1, 1]>(x, w) }"""
    model = build(text, {"w": (16, 4, 1, 1)}, sparsity=0.5, pattern="16x1")
    reports = run(model, "choose-layout{layout=16x1},lower-sparse")
    assert "groups" in reports[1].skipped[0].reason
    dense = model.copy()
    run(model, "choose-layout{layout=8x1},lower-sparse")
    emit.finalize(model)
    assert operators(model) == ["BlockSparseConv"]
    assert verify.worst_rel_l2(verify.compare(dense, model, verify.make_inputs(dense))) <= 1e-6


def test_tied_weight_is_packed_once() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x) => (float[n, 32] y) { [a] h = MatMul(x, w) [r] t = Tanh(h) [b] y = MatMul(t, w) }"""
    dense = build(text, {"w": (32, 32)})
    model = dense.copy()
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    assert operators(model) == ["SparseMatMulTanh", "SparseMatMul"]
    first, second = model.onnx.graph
    assert first.inputs[1] is second.inputs[1]
    assert verify.worst_rel_l2(verify.compare(dense, model, verify.make_inputs(dense))) <= 1e-6


def test_ties_go_to_the_more_structured_layout() -> None:
    names = ["16x1", "8x1", "unstructured"]
    assert fastest(names, {"16x1": 1.0, "8x1": 0.99, "unstructured": 1.2}) == "16x1"
    assert fastest(names, {"16x1": 1.0, "8x1": 0.9, "unstructured": 0.89}) == "8x1"
    assert fastest(names, {"16x1": 1.0, "8x1": 0.9, "unstructured": 0.5}) == "unstructured"


def test_candidates_follow_the_zeros() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    blocks = np.repeat(rng.random((4, 64)) < 0.2, 16, axis=0)
    found = [str(pattern) for pattern in candidate_patterns(weight * blocks)]
    assert found[0] == "16x1"
    assert found[-1] == "unstructured"
    groups = np.tile(np.array([1, 0, 1, 0], bool), (64, 16))
    assert "1:2" in [str(pattern) for pattern in candidate_patterns(weight * groups)]


def test_restore_dense_gives_unmarked_sites_their_weights_back() -> None:
    dense = build(CHAIN, SHAPES, sparsity=0.0)
    model = dense.copy()
    times = {"fc1": {"dense": 1.0, "unstructured": 0.5}, "fc2": {"dense": 1.0, "unstructured": 2.0}}
    pipeline = "prune-magnitude{sparsity=0.5 min-elements=0},choose-layout,restore-dense"
    reports = run(model, pipeline, FakeCosts(times))
    assert [change.site for change in reports[2].changed] == ["fc2"]
    before, after = dense.sites(), model.sites()
    np.testing.assert_array_equal(before[1].numpy(), after[1].numpy())
    assert (after[0].numpy() == 0).mean() == 0.5


def test_tied_convolutions_keep_their_own_strides() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16, 8, 8] x) => (float[n, 16, 4, 4] y) {
        [a] h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w)
        [b] y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(h, w) }"""
    dense = build(text, {"w": (16, 16, 3, 3)})
    model = dense.copy()
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    assert operators(model) == ["SparseConv", "SparseConv"]
    assert verify.worst_rel_l2(verify.compare(dense, model, verify.make_inputs(dense))) <= 1e-6


def same(dense: Model, model: Model, **shapes: tuple[int, ...]) -> None:
    """Lower every site as unstructured and check that nothing changed but rounding."""
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    inputs = verify.make_inputs(dense, None, 0, shapes or None)
    assert verify.worst_rel_l2(verify.compare(dense, model, inputs)) <= 1e-6


def test_constants_that_raise_the_rank_are_not_fused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x) => (float[a, n, 16] y) <float[1, 1, 1] c = {0.5}> {
        [fc] h = MatMul(x, w) [shift] s = Add(h, c) [act] y = Relu(s) }"""
    dense = build(text, {"w": (32, 16)})
    model = dense.copy()
    same(dense, model)
    assert operators(model) == ["SparseMatMul", "Add", "Relu"]


def test_constants_a_caller_may_override_are_not_fused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x, float[16] c) => (float[n, 16] y) { [fc] h = MatMul(x, w) [shift] y = Add(h, c) }"""
    model = build(text, {"w": (32, 16)})
    c = next(value for value in model.onnx.graph.inputs if value.name == "c")
    c.const_value = onnx_ir.tensor(np.ones(16, np.float32), name="c")
    model.onnx.graph.register_initializer(c)
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    assert operators(model) == ["SparseMatMul", "Add"]


def test_add_inside_a_body_or_of_another_domain_is_not_fused() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[n, 32] x, bool c) => (float[n, 16] y) <float[16] b = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        [fc] h = MatMul(x, w)
        y = If (c) < then_branch = t () => (float[n, 16] p) { p = Add(h, b) },
                     else_branch = e () => (float[n, 16] q) { q = Neg(h) } > }"""
    dense = build(text, {"w": (32, 16)})
    model = dense.copy()
    same(dense, model)
    assert operators(model) == ["SparseMatMul", "If"]
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[n, 32] x) => (float[n, 16] y) <float[16] b = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        [fc] h = MatMul(x, w) [odd] y = my.Add(h, b) }
    <domain: "my", opset_import: ["" : 17]> Add (a, b) => (c) { c = Sub(a, b) }"""
    dense = build(text, {"w": (32, 16)})
    model = dense.copy()
    same(dense, model)
    assert operators(model) == ["SparseMatMul", "Add"]


def test_restore_dense_refuses_weights_that_were_rescaled_since() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x) => (float[n, 64] y) <float s = {10.0}> { [fc] h = MatMul(x, w) [ten] y = Mul(h, s) }"""
    model = build(text, {"w": (32, 64)}, sparsity=0.0)
    reports = run(model, "prune-magnitude{sparsity=0.5 min-elements=0},tidy,restore-dense")
    assert [skip.reason for skip in reports[2].skipped if "cannot go back" in skip.reason]
    assert not reports[2].changed


def test_packed_constants_take_no_name_of_another_scope() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 32] x, bool c) => (float[n, 16] y) <float[16] "fc.bias" = {1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1}> {
        y = If (c) < then_branch = t () => (float[n, 16] p) { [fc] h = MatMul(x, w) p = Mul(h, "fc.bias") },
                     else_branch = e () => (float[n, 16] q) { [other] q = MatMul(x, v) } > }"""
    proto = onnx.parser.parse_model(text.replace('"fc.bias"', "fc_bias"))
    rng = np.random.default_rng(1)
    for name in ("w", "v"):
        array = rng.standard_normal((32, 16), dtype=np.float32) * (rng.random((32, 16)) < 0.3)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    proto.graph.initializer[0].name = "fc.bias"
    proto.graph.node[0].attribute[0].g.node[1].input[1] = "fc.bias"
    dense = Model.from_proto(proto)
    model = dense.copy()
    run(model, "choose-layout{layout=unstructured},lower-sparse")
    emit.finalize(model)
    x = rng.standard_normal((3, 32), dtype=np.float32)
    for branch in (True, False):
        inputs = {"x": x, "c": np.array(branch)}
        for library in (True, False):
            diffs = verify.compare(dense, model, inputs, library=(False, library))
            assert verify.worst_rel_l2(diffs) <= 1e-6
