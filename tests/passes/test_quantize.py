"""The pass quantize, and what choosing, restoring and lowering make of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.ir import Model, Site
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.pm import PassContext, PassReport, Pipeline, Requantizer
from sparsecc.sparse import Layout, Pattern, density, keep_mask

SIBLINGS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[batch, 5, 64] x) => (float[batch, 5, 32] y) {
    [q] a = MatMul(x, wq)
    ab = Add(a, b)
    [k] c = MatMul(x, wk)
    r = Relu(c)
    s = Add(ab, r)
    f = Reshape(s, flat)
    [out] g = Gemm<transB = 1>(f, wo, bo)
    y = Reshape(g, shape)
}"""
WEIGHTS = {"wq": (64, 32), "wk": (64, 32), "wo": (32, 32)}
RNG = np.random.default_rng(5)


def build(text: str = SIBLINGS, pattern: str | None = "16x4", **constants: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(3)
    arrays: dict[str, np.ndarray] = {
        "b": rng.standard_normal(32).astype(np.float32),
        "bo": rng.standard_normal(32).astype(np.float32),
        "flat": np.array([-1, 32]),
        "shape": np.array([-1, 5, 32]),
        **constants,
    }
    for name, shape in WEIGHTS.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if pattern is not None:
            matrix = array if name == "wo" else array.T  # a view [N, K]
            matrix *= keep_mask(np.abs(matrix), Pattern.parse(pattern), 0.5)
        arrays.setdefault(name, array)
    for name, array in arrays.items():
        if name in text:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


class FakeCosts:
    """Times of every site by layout text; what is not named takes long."""

    def __init__(self, times: Mapping[str, float], relative: float = 0.5) -> None:
        self.times = {"dense": 1.0, **times}
        self.relative = relative
        self.bases: list[Model | None] = []

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> Mapping[str, float]:
        self.bases.append(base)
        return {**{str(layout): 9.0 for layout in layouts}, **self.times}

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        return self.relative if sites else 1.0


def run(model: Model, pipeline: str, costs: FakeCosts | None = None) -> list[PassReport]:
    return Pipeline.parse(pipeline).run(model, PassContext(costs=costs))


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.onnx.graph]


def distance(a: Model, b: Model, library: bool = False) -> float:
    inputs = verify.make_inputs(a, None, 0, {"x": (3, 5, 64)})
    return verify.worst_rel_l2(verify.compare(a, b, inputs, library=(False, library)))


WHOLE = "quantize,choose-layout,confirm-layout,restore-dense,lower-sparse"


def test_result_is_near_and_keeps_sites_zeros_and_bias() -> None:
    model = build()
    dense = model.copy()
    (report,) = run(model, "quantize")
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert 0 < distance(dense, model) < 0.02
    before, after = dense.sites(), model.sites()
    assert [(s.name, s.shape) for s in after] == [(s.name, s.shape) for s in before]
    for old, new in zip(before, after, strict=True):
        assert new.dtype == np.int8
        assert not new.numpy()[old.numpy() == 0].any()
        assert np.linalg.norm(new.numpy() - old.numpy()) < 0.01 * np.linalg.norm(old.numpy())
    assert {change.site for change in report.changed} == {"q", "k", "out"}
    for change in report.changed:
        assert 0 < change.numbers["relative_error"] < 0.01
        assert change.numbers["density_after"] <= change.numbers["density_before"] == 0.5
        assert change.numbers["nbytes_after"] < change.numbers["nbytes_before"] / 3


def test_siblings_share_one_quantisation_and_onnxruntime_fuses_it(tmp_path) -> None:
    import onnxruntime

    model = build()
    run(model, "quantize")
    assert operators(model).count("DynamicQuantizeLinear") == 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert fused.count("MatMulIntegerToFloat") == 2
    assert fused.count("DynamicQuantizeMatMul") == 1
    assert "MatMulInteger" not in fused


def test_siblings_quantised_one_after_the_other_share_one_quantisation_too() -> None:
    whole, steps = build(), build()
    run(whole, "quantize")
    run(steps, ",".join(f"quantize{{match={site.name}}}" for site in steps.sites()))
    assert sorted(operators(steps)) == sorted(operators(whole))
    assert distance(whole, steps) == 0
    names = [node.name for node in steps.onnx.graph if node.name]
    assert len(set(names)) == len(names)


def test_what_cannot_be_quantised_has_a_reason() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[B, 4, 8, 8] x) => (float[B, 4, 8, 8] y, float[N, 32] z) {
        [conv] y = Conv(x, w)
        f = Reshape(y, flat)
        [bad] h = MatMul(f, nan)
        [scaled] z = Gemm<alpha = 2.0>(h, wo)
    }"""
    nan = RNG.standard_normal((32, 32)).astype(np.float32)
    nan[3, 3] = np.nan
    model = build(text, w=RNG.standard_normal((4, 4, 1, 1)).astype(np.float32), nan=nan)
    before = model.fingerprint()
    (report,) = run(model, "quantize")
    reasons = {skip.site: skip.reason for skip in report.skipped}
    assert "convolution" in reasons["conv"]
    assert "NaN" in reasons["bad"]
    assert "alpha" in reasons["scaled"]
    assert not report.changed
    assert model.fingerprint() == before
    model = build()
    run(model, "quantize")
    (report,) = run(model, "quantize")
    assert {skip.reason for skip in report.skipped} == {"it is quantised already"}


def test_inside_a_branch_and_tied() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (bool c, float[3, 5, 64] x) => (float[3, 5, 32] y) {
        y = If(c) <
            then_branch = t () => (float[3, 5, 32] p) { [then] p = MatMul(x, wq) },
            else_branch = e () => (float[3, 5, 32] n) { [else] m = MatMul(x, wq) n = Neg(m) }
        >
    }"""
    model = build(text)
    dense = model.copy()
    run(model, "quantize")
    onnx.checker.check_model(model.to_proto(), full_check=True)
    (site,) = model.sites()
    assert site.name == "then"
    assert len(site.nodes) == 2
    inputs = {"x": RNG.standard_normal((3, 5, 64)).astype(np.float32)}
    for choice in (True, False):
        got = verify.compare(dense, model, {**inputs, "c": np.array(choice)}, library=(False, False))
        assert 0 < verify.worst_rel_l2(got) < 0.02


@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
@pytest.mark.parametrize("layout", ["16x4", "4x1", "1x4", "unstructured", "2:4"])
def test_lowered_computes_what_the_quantised_model_does(layout: str, library: bool) -> None:
    model = build(pattern=layout)
    run(model, "quantize")
    lowered = model.copy()
    run(lowered, f"choose-layout{{layout={layout}}},lower-sparse")
    emit.finalize(lowered)
    sparse = [node.op_type for node in lowered.onnx.graph if node.domain == emit.DOMAIN]
    assert len(sparse) == 3
    assert all("Int8" in op_type for op_type in sparse)
    assert any(op_type.endswith("Relu") for op_type in sparse)
    assert "DynamicQuantizeLinear" not in operators(lowered)
    assert distance(model, lowered, library) <= 1e-6


def test_the_fastest_form_wins() -> None:
    times = {"int8 dense": 0.5, "int8 16x4": 0.4, "16x4": 0.45}
    model = build()
    dense = model.copy()
    run(model, WHOLE, FakeCosts(times))
    assert [op for op in operators(model) if "Sparse" in op] == [
        "BlockSparseMatMulInt8", "BlockSparseMatMulInt8Relu", "BlockSparseMatMulInt8",
    ]  # fmt: skip
    model = build()
    run(model, WHOLE, FakeCosts({**times, "16x4": 0.2}))
    assert [op for op in operators(model) if "Sparse" in op] == [
        "BlockSparseMatMul", "BlockSparseMatMulRelu", "BlockSparseMatMul",
    ]  # fmt: skip
    emit.finalize(model)
    assert distance(dense, model) <= 1e-6
    model = build()
    reports = run(model, WHOLE, FakeCosts({**times, "int8 dense": 0.3}))
    assert operators(model).count("MatMulInteger") == 3
    assert {skip.reason for skip in reports[-1].skipped} == {"int8 dense was chosen"}
    assert "Sparse" not in " ".join(operators(model))


@pytest.mark.parametrize(
    "costs", [FakeCosts({}), FakeCosts({"int8 16x4": 0.1}, relative=1.0)], ids=["alone", "whole"]
)
def test_what_is_not_faster_goes_back_to_float32(costs: FakeCosts) -> None:
    model = build()
    dense = model.copy()
    reports = run(model, WHOLE, costs)
    assert model.fingerprint() == dense.fingerprint()
    restored = reports[3]
    assert {change.detail for change in restored.changed} == {"float32 after all: dense"}
    assert all(base is not None for base in costs.bases)


def test_sites_that_stay_dense_lose_their_zeros() -> None:
    """Neither float32 nor dense int8 gains from zeros, so accuracy is not to pay for them."""
    for times in ({}, {"int8 dense": 0.5}):
        model = build(pattern=None)
        run(model, f"prune-magnitude{{min-elements=1 pattern=16x4 sparsity=0.5}},{WHOLE}", FakeCosts(times))
        assert all(density(site.numpy()) > 0.9 for site in model.sites())
        assert all((site.quantization is None) == (not times) for site in model.sites())


def test_standard_operators_only() -> None:
    model = build(pattern=None)
    pipeline = (
        "prune-magnitude{min-elements=1 sparsity=0.5},quantize,choose-layout{custom-ops=false},confirm-layout,"
        "restore-dense{pruned=false}"
    )
    run(model, pipeline, FakeCosts({"int8 dense": 0.5}))
    assert operators(model).count("MatMulInteger") == 3
    assert all(density(site.numpy()) <= 0.5 for site in model.sites())


def test_a_model_changed_after_quantize_is_not_taken_back() -> None:
    model = build(pattern=None)
    pipeline = "quantize,prune-magnitude{min-elements=1 sparsity=0.5},choose-layout,restore-dense"
    reports = run(model, pipeline, FakeCosts({}))
    assert "changed after quantize" in reports[-1].notes[0]
    assert all(site.quantization is not None for site in model.sites())


def test_int8_input_models_compete_with_their_own_dense_form() -> None:
    model = build()
    run(model, "quantize")
    costs = FakeCosts({"int8 16x4": 0.5})
    run(model, "choose-layout", costs)
    assert {site.node.metadata_props[LAYOUT_KEY] for site in model.sites()} == {"int8 16x4"}
    assert costs.bases == [None] * 3


def test_names_of_unnamed_nodes_stay() -> None:
    model = build(SIBLINGS.replace("[q] ", "").replace("[k] ", ""))
    names = [site.name for site in model.sites()]
    run(model, "quantize")
    assert [site.name for site in model.sites()] == names
    assert isinstance(model.sites()[0].node, onnx_ir.Node)
