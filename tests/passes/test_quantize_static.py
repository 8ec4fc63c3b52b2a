"""quantize{activations=static}: which tensors are held in uint8, and what onnxruntime makes of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from sparsecc import emit, verify
from sparsecc.calib import Calibration
from sparsecc.calib.ranges import Histogram
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.passes.quantize.ranges import activation_scale, choose_range
from sparsecc.pm import PassContext, PassReport, Pipeline

RESIDUAL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 4, 8, 8] x) => (float[n, 10] y) {
    [stem] a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
    [one] c = Conv<pads = [1, 1, 1, 1]>(p, w1, b0)
    d = Clip(c, zero, six)
    [two] e = Conv(d, w2)
    f = Add(e, p)
    h = Relu(f)
    [three] i = Conv<group = 16, pads = [1, 1, 1, 1]>(h, w3)
    j = Concat<axis = 1>(i, h)
    k = GlobalAveragePool(j)
    l = Flatten(k)
    [head] y = Gemm<transB = 1>(l, w4, b4)
}"""
RNG = np.random.default_rng(2)


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


WEIGHTS = {
    "w0": normal(16, 4, 3, 3), "b0": normal(16), "w1": normal(16, 16, 3, 3), "w2": normal(16, 16, 1, 1),
    "w3": normal(16, 1, 3, 3), "w4": normal(10, 32), "b4": normal(10), "zero": np.float32(0), "six": np.float32(6),
}  # fmt: skip


class FakeCosts:
    """int8 takes this long wherever float32 takes 1."""

    def __init__(self, int8: float) -> None:
        self.int8 = int8

    def site_times_ms(self, model, site, layouts, base=None):
        return {"dense": 1.0, **{str(layout): self.int8 for layout in layouts}}

    def relative_time(self, model, sites, quantization=None):
        return 0.5 if sites else 1.0


STATIC = "quantize{activations=static method=absmax}"


def build(text: str = RESIDUAL, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    for name, array in {**WEIGHTS, **weights}.items():
        if f" {name})" in text or f" {name}," in text:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return Model.from_proto(proto)


def inputs(model: Model, samples: int = 16) -> dict[str, np.ndarray]:
    shape = [dim if isinstance(dim, int) else samples for dim in model.input_specs()[0].shape or ()]
    return {"x": np.random.default_rng(9).standard_normal(shape).astype(np.float32)}


def run(model: Model, pipeline: str, costs: FakeCosts | None = None) -> list[PassReport]:
    data = Calibration.from_batches([inputs(model)], model, threads=1)
    return Pipeline.parse(pipeline).run(model, PassContext(calibration=data, costs=costs))


def fused(model: Model, folder) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options, ["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "fused.onnx").graph.node]


def test_a_whole_region_is_computed_on_bytes(tmp_path) -> None:
    model = build()
    dense = model.copy()
    (report,) = run(model, STATIC)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert {change.site for change in report.changed} == {"stem", "one", "two", "three", "head"}
    operators = [node.op_type for node in model.onnx.graph]
    assert "Relu" not in operators
    assert "Clip" not in operators
    found = fused(model, tmp_path)
    assert found.count("QLinearConv") == 4
    assert {"QLinearAdd", "QLinearConcat", "QLinearGlobalAveragePool"} <= set(found)
    assert {"MaxPool", "NhwcMaxPool"} & set(found)
    assert found.count("QuantizeLinear") == 1
    assert "QGemm" in found
    assert not {"Conv", "Add"} & set(found)
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert 0 < verify.worst_rel_l2(difference) < 0.05


def test_weights_and_scales_are_what_they_should_be() -> None:
    model = build()
    dense = model.copy()
    run(model, STATIC)
    for before, after in zip(dense.sites(), model.sites(), strict=True):
        assert (before.name, before.shape, before.groups) == (after.name, after.shape, after.groups)
        assert np.linalg.norm(before.numpy() - after.numpy()) < 0.01 * np.linalg.norm(before.numpy())
        assert after.output_scales() is not None
    constants = model.onnx.graph.initializers
    for name in ("r", "d", "h"):  # after an activation bytes begin at zero
        assert constants[f"{name}.zero_point"].const_value.numpy() == 0
    assert constants["e.zero_point"].const_value.numpy() > 0
    assert "p.scale" not in constants  # MaxPool hands the scale of its input on
    scale = constants["d.scale"].const_value.numpy()
    assert scale * 255 <= 6 * (1 + 1e-6)


def test_what_others_read_or_return_stays_and_keeps_its_name(tmp_path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4, 8, 8] x) => (float[n, 16, 8, 8] r, float[n, 16, 8, 8] e, float[n, 16, 8, 8] t) {
        [stem] a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
        r = Relu(a)
        s = Sigmoid(a)
        [two] e = Conv(r, w2)
        t = Mul(e, s)
    }"""
    model = build(text)
    dense = model.copy()
    run(model, STATIC)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert [spec.name for spec in model.output_specs()] == ["r", "e", "t"]
    assert "Relu" in [node.op_type for node in model.onnx.graph]
    assert fused(model, tmp_path).count("QLinearConv") == 2
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert 0 < verify.worst_rel_l2(difference) < 0.05


def test_matmul_and_tied_weights(tmp_path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 3, 16] x) => (float[n, 3, 16] y) {
        [first] a = MatMul(x, w)
        b = Relu(a)
        [second] y = MatMul(b, w)
    }"""
    model = build(text, w=normal(16, 16))
    dense = model.copy()
    run(model, STATIC)
    (site,) = model.sites()
    assert (site.name, len(site.nodes)) == ("first", 2)
    assert (
        fused(model, tmp_path).count("MatMulIntegerToFloat") + fused(model, tmp_path).count("QLinearMatMul")
        == 2
    )
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert 0 < verify.worst_rel_l2(difference) < 0.05


def test_a_bias_that_outweighs_its_weights_fits() -> None:
    weight = WEIGHTS["w0"].copy()
    weight[3] *= 1e-12
    model = build(RESIDUAL, w0=weight)
    dense = model.copy()
    run(model, STATIC)
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert verify.worst_rel_l2(difference) < 0.05


def test_refused_with_the_reason() -> None:
    model = build(RESIDUAL.replace('"" : 17', '"" : 12'))
    (report,) = run(model, STATIC)
    assert all("opset 12 is below 13" in skip.reason for skip in report.skipped)
    with pytest.raises(UsageError, match="needs calibration"):
        Pipeline.parse(STATIC).run(build(), PassContext())
    with pytest.raises(SpecError, match="percentile"):
        Pipeline.parse("quantize{percentile=30}")


WHOLE = f"{STATIC},choose-layout,confirm-layout,restore-dense,lower-sparse"


def test_all_or_nothing_or_some_sites_stay_quantised() -> None:
    model = build()
    dense = model.copy()
    reports = run(model, WHOLE, FakeCosts(3.0))
    assert model.fingerprint() == dense.fingerprint()
    assert {change.detail for change in reports[3].changed} == {"float32 after all: dense"}
    model = build()
    run(model, WHOLE, FakeCosts(0.5))
    quantised = build()
    run(quantised, STATIC)
    assert [node.op_type for node in model.onnx.graph] == [node.op_type for node in quantised.onnx.graph]
    model = build()
    run(model, f"{STATIC},choose-layout{{match=t*}},restore-dense", FakeCosts(0.5))
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert {site.name for site in model.sites() if site.quantization is not None} == {"two", "three"}
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert 0 < verify.worst_rel_l2(difference) < 0.05


def histogram(values: np.ndarray) -> Histogram:
    counts, _ = np.histogram(values, 2048)
    return Histogram(float(values.min()), float(values.max()), counts, int((values == 0).sum()))


def test_ranges() -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    values[0] = 40
    found = histogram(values)
    assert choose_range(found, "absmax", 99.99) == (found.low, found.high)
    low, high = choose_range(found, "percentile", 99.9)
    assert -3.3 < low < -2.9
    assert 2.9 < high < 3.3
    low, high = choose_range(found, "mse", 99.9)
    assert 30 < high < 32  # where 2 (40 - h) = (h - low) / 255**2 / 6 * 200_000

    def error(low: float, high: float) -> float:
        scale, zero_point = activation_scale(low, high)
        codes = np.clip(np.rint(values / scale) + zero_point, 0, 255)
        return float((((codes - zero_point) * scale - values) ** 2).sum())

    assert error(low, high) < 0.9 * error(found.low, found.high)
    positive = choose_range(histogram(np.abs(values) + 1), "absmax", 99.9)
    assert positive[0] == 0
    assert activation_scale(0, 5.1) == (np.float32(0.02), 0)
    assert activation_scale(-5.1, 0).zero_point == 255
    assert activation_scale(0, 0) == (1, 0)
    constant = Histogram(3, 3, np.array([5]), 0)
    assert choose_range(constant, "mse", 99.9) == (0, 3)


def test_histograms_over_batches() -> None:
    model = build()
    x = inputs(model, 6)["x"]
    data = Calibration.from_batches([{"x": x[:2]}, {"x": x[2:]}], model, threads=1)
    found = data.histograms(model, ["x", "r"])
    assert (found["x"].low, found["x"].high) == (x.min(), x.max())
    assert found["x"].counts.sum() == x.size
    assert found["r"].low == 0
    assert found["r"].zeros > x.size / 4


@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
def test_products_of_bytes_are_lowered(library: bool) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 64] x) => (float[n, 64] b, float[n, 32] y) {
        [first] a = MatMul(x, w)
        b = Add(a, b0)
        c = Relu(b)
        [second] y = Gemm<transB = 1>(c, v, b5)
    }"""
    rng = np.random.default_rng(4)
    w, v = (
        rng.standard_normal((32, 64)) * np.kron(rng.random((2, 16)) < 0.5, np.ones((16, 4))) for _ in "wv"
    )
    arrays = {"w": np.hstack([w.T, w.T]).astype(np.float32), "v": v.astype(np.float32)}
    model = build(text, b0=normal(64, 1)[:, 0], b5=normal(32, 1)[:, 0], **arrays)
    run(model, STATIC)
    assert [node.op_type for node in model.onnx.graph].count("DequantizeLinear") == 6
    lowered = model.copy()
    run(lowered, "choose-layout{layout=16x4},lower-sparse")
    emit.finalize(lowered)
    assert [node.op_type for node in lowered.onnx.graph] == [
        "QuantizeLinear", "BlockSparseMatMulInt8Bytes", "Relu", "QuantizeLinear", "BlockSparseMatMulInt8Bytes",
    ]  # fmt: skip
    first, second = verify.compare(model, lowered, inputs(model), library=(False, library))
    assert first.rel_l2 < 1e-6
    assert second.rel_l2 < 1e-2  # a rounding of the first can be another byte


@pytest.mark.parametrize(
    ("operator", "activations"), [("MatMul", "dynamic"), ("MatMul", "static"), ("Conv", "static")]
)
def test_nodes_without_names_that_share_a_weight(operator: str, activations: str) -> None:
    shape = (16, 16, 1, 1) if operator == "Conv" else (16, 16)
    size = "n, 16, 3, 3" if operator == "Conv" else "n, 16"
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[{size}] x) => (float[{size}] y) {{
        a = {operator}(x, w)
        b = Relu(a)
        y = {operator}(b, w)
    }}"""
    model = build(text.replace("w)", "shared)"), shared=normal(*shape))
    dense = model.copy()
    run(model, f"quantize{{activations={activations}}}")
    names = [node.name for node in model.onnx.graph if node.name]
    assert len(set(names)) == len(names)
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert 0 < verify.worst_rel_l2(difference) < 0.05


def test_bias_that_is_wider_than_the_product_stays_an_addition() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16] x) => (float[n, 5] y) {
        a = MatMul(x, narrow)
        y = Add(a, wide)
    }"""
    model = build(text, narrow=normal(16, 1), wide=normal(5))
    dense = model.copy()
    run(model, STATIC)
    assert [node.op_type for node in model.onnx.graph][-1] == "Add"
    difference = verify.compare(dense, model, inputs(model), library=(False, False))
    assert verify.worst_rel_l2(difference) < 0.05


@pytest.mark.parametrize("value", [0.0, 1.0, -3e38])
def test_tensor_whose_values_are_all_equal(value: float) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16] x) => (float[n, 8] y) {
        zero = Sub(x, x)
        same = Add(zero, value)
        y = MatMul(same, one)
    }"""
    model = build(text.replace("one)", "matrix)"), matrix=normal(16, 8), value=np.float32(value))
    (report,) = run(model, "quantize{activations=static}")
    assert len(report.changed) == 1


def test_error_of_large_weights_is_a_number() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, large) }"""
    model = build(text, large=normal(16, 8) * np.float32(1e37))
    (report,) = run(model, "quantize")
    assert 0 < report.changed[0].numbers["relative_error"] < 0.05


@pytest.mark.parametrize(("alpha", "operator"), [(0.5, "SparseMatMulInt8Bytes"), (-2.0, "Gemm")])
def test_factor_of_a_quantised_gemm_is_kept(alpha: float, operator: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16] x) => (float[n, 8] y) {{
        q = QuantizeLinear(x, x_scale, x_zero)
        d = DequantizeLinear(q, x_scale, x_zero)
        w = DequantizeLinear<axis = 1>( codes, scales)
        y = Gemm<alpha = {alpha}, beta = 2.0>(d, w, bias)
    }}"""
    codes = RNG.integers(-127, 128, (16, 8)) * (RNG.random((16, 8)) < 0.5)
    model = build(
        text, codes=codes.astype(np.int8), bias=normal(8), x_scale=np.float32(0.03), x_zero=np.uint8(128),
        scales=np.linspace(0.01, 0.02, 8, dtype=np.float32),
    )  # fmt: skip
    before = model.copy()
    (site,) = model.sites()
    site.node.metadata_props[LAYOUT_KEY] = "int8 unstructured"
    run(model, "lower-sparse")
    assert operator in [node.op_type for node in model.onnx.graph]
    emit.finalize(model)
    difference = verify.compare(before, model, inputs(before), library=(False, True))
    assert verify.worst_rel_l2(difference) < 1e-2


def test_float32_layout_of_a_site_with_fixed_ranges_reads_floats() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 16] x) => (float[n, 8] y) { y = MatMul(x, zeros) }"""
    model = build(text, zeros=normal(16, 8) * (RNG.random((16, 8)) < 0.3).astype(np.float32))
    run(model, STATIC)
    before = model.copy()
    (site,) = model.sites()
    site.node.metadata_props[LAYOUT_KEY] = "unstructured"
    run(model, "lower-sparse")
    assert [node.op_type for node in model.onnx.graph] == [
        "QuantizeLinear",
        "DequantizeLinear",
        "SparseMatMul",
    ]
    emit.finalize(model)
    difference = verify.compare(before, model, inputs(before), library=(False, True))
    assert verify.worst_rel_l2(difference) < 1e-2
