"""Quantised weights as sites: what they are in real numbers, and storing new ones."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sparsecc import emit, verify
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline

RNG = np.random.default_rng(8)
MICROSOFT = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'


def codes(*shape: int, dtype: type = np.int8) -> np.ndarray:
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max + 1, shape).astype(dtype)


def scales(count: int) -> np.ndarray:
    return (0.01 + RNG.random(count)).astype(np.float32)


def weights(dtype: type = np.int8, zero: int = 0, count: int = 6, shape: tuple[int, ...] = (8, 6)):
    return {
        "w": codes(*shape, dtype=dtype),
        "s": scales(count) if count > 1 else np.float32(0.5),
        "z": np.full(count, zero, dtype) if count > 1 else np.array(zero, dtype),
    }


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("count", [1, 6])
def test_behind_dequantize_linear(model, run, dtype, count):
    given = weights(dtype, zero=7, count=count)
    m = model(
        "g (float[3,8] x) => (float[3,6] y) { r = DequantizeLinear(w, s, z) [mm] y = MatMul(x, r) }", **given
    )
    (site,) = m.sites()
    assert (site.name, site.op, site.shape, site.dtype, site.input_name) == (
        "mm",
        "MatMul",
        (6, 8),
        dtype,
        "x",
    )
    real = ((given["w"].astype(np.int32) - 7) * np.float64(given["s"])).T
    assert np.allclose(site.numpy(), real, rtol=1e-6)
    assert (site.codes() == given["w"].astype(np.int32).T - 7).all()
    assert np.allclose(site.output_scales(), np.broadcast_to(given["s"], 6))
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    assert np.allclose(run(m, {"x": x})[0], x @ real.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_gemm_and_scales_along_either_axis(model, axis):
    given = weights(count=(6, 8)[axis], shape=(6, 8))
    del given["z"]
    m = model(
        f"g (float[3,8] x) => (float[3,6] y) {{ r = DequantizeLinear <axis = {axis}> (w, s) "
        "y = Gemm <transB = 1> (x, r) }",
        **given,
    )
    (site,) = m.sites()
    along = given["s"][:, None] if axis == 0 else given["s"]
    assert np.array_equal(site.numpy(), given["w"].astype(np.float32) * along)
    if axis == 0:
        assert np.array_equal(site.output_scales(), given["s"])
    else:
        assert site.output_scales() is None


def test_convolution(model):
    given = {"w": codes(4, 3, 2, 2), "s": scales(4)}
    m = model(
        "g (float[1,3,5,5] x) => (float[1,4,4,4] y) { r = DequantizeLinear <axis = 0> (w, s) y = Conv(x, r) }",
        **given,
    )
    (site,) = m.sites()
    assert site.conv is not None
    assert np.array_equal(site.numpy(), (given["w"] * given["s"].reshape(4, 1, 1, 1)).reshape(4, 12))


@pytest.mark.parametrize(
    ("body", "op", "name"),
    [
        ("y = DynamicQuantizeMatMul(x, w, s, z)", "MatMul", "x"),
        ("y = DynamicQuantizeMatMul(x, w, s)", "MatMul", "x"),
        ("q, a, b = DynamicQuantizeLinear(x) y = MatMulIntegerToFloat(q, w, a, s, b, z)", "MatMul", "x"),
        (
            "q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b, z) f = Cast <to = 1> (i) "
            "t = Mul(a, s) y = Mul(f, t)",
            "MatMul",
            "x",
        ),
        (
            "q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b) f = Cast <to = 1> (i) "
            "t = Mul(f, a) y = Mul(s, t)",
            "MatMul",
            "x",
        ),
        (
            "q = QuantizeLinear(x, xs, xz) p = QLinearMatMul(q, xs, xz, w, s, z, ys, xz) "
            "y = DequantizeLinear(p, ys, xz)",
            "MatMul",
            "x",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zero", [0, 3])
def test_operators_on_integers(model, run, body, op, name, zero):
    given = weights(zero=zero)
    if not re.search(r"\bz\b", body):
        zero = 0
    body = body.replace("DynamicQuantizeMatMul(", "com.microsoft.DynamicQuantizeMatMul(")
    body = body.replace("MatMulIntegerToFloat(", "com.microsoft.MatMulIntegerToFloat(")
    given |= {"xs": np.float32(0.02), "xz": np.array(120, np.uint8), "ys": np.float32(4)}
    used = {
        key: value
        for key, value in given.items()
        if f"{key})" in body or f"{key}," in body or f"({key}" in body
    }
    m = model(f"g (float[3,8] x) => (float[3,6] y) {{ {body} }}", MICROSOFT, **used)
    (site,) = m.sites()
    assert m.unsupported_sites() == []
    assert (site.op, site.shape, site.input_name) == (op, (6, 8), name)
    real = (given["w"].astype(np.float32) - zero) * given["s"]
    assert np.allclose(site.numpy(), real.T)
    x = RNG.uniform(-1, 1, (3, 8)).astype(np.float32)
    assert np.linalg.norm(run(m, {"x": x})[0] - x @ real) < 0.1 * np.linalg.norm(x @ real)


def test_what_numpy_gives_can_be_stored_without_loss_and_zeros_are_exact(model):
    given = weights(np.uint8, zero=130)
    given["s"] = scales(6) * np.float32(1e-3)
    m = model(
        "g (float[3,8] x) => (float[3,6] y) { r = DequantizeLinear(w, s, z) y = MatMul(x, r) }", **given
    )
    copy = m.copy()
    (site,) = copy.sites()
    site.replace(site.numpy())
    assert copy.fingerprint() == m.fingerprint()
    pruned = site.numpy().copy()
    pruned[::2] = 0
    site.replace(pruned)
    assert np.array_equal(site.numpy(), pruned)
    assert not np.array_equal(m.sites()[0].numpy(), pruned)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = DequantizeLinear(w, t) y = MatMul(x, r)", "scale of the quantised weight is not constant"),
        ("r = DequantizeLinear(w, minus) y = MatMul(x, r)", "finite and positive"),
        ("r = DequantizeLinear(w, five) y = MatMul(x, r)", "do not fit a weight of shape"),
        ("r = DequantizeLinear <axis = 0> (w, s) y = MatMul(x, r)", "do not fit a weight of shape"),
        ("r = DequantizeLinear(wide, s) y = MatMul(x, r)", "INT32"),
        ("v = Transpose(w) r = DequantizeLinear(v, one) y = MatMul(x, r)", "before its DequantizeLinear"),
        (
            "q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, b) y = Cast <to = 1> (i)",
            "not followed by a Mul",
        ),
        ("q, a, b = DynamicQuantizeLinear(x) i = MatMulInteger(q, w) y = Cast <to = 1> (i)", "zero point"),
    ],
)
def test_refused_with_the_reason(model, body, reason):
    constants = {
        "w": codes(8, 6), "s": scales(6), "minus": np.float32(-1), "five": scales(5), "one": np.float32(1),
        "wide": np.ones((8, 6), np.int32),
    }  # fmt: skip
    used = {key: value for key, value in constants.items() if f"{key}," in body or f"{key})" in body}
    extra = ", float t" if " t)" in body else ""
    m = model(f"g (float[3,8] x{extra}) => (float[?,?] y) {{ {body} }}", **used)
    assert m.sites() == []
    ((_, found),) = m.unsupported_sites()
    assert reason in found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("library", [False, True])
def test_fused_operators_of_onnxruntime_are_pruned_and_lowered_exactly(model, bias, library):
    given = {
        "w": np.maximum(codes(64, 32), -127),
        "s": scales(32),
        "b": RNG.standard_normal(32).astype(np.float32),
    }
    body = "h = com.microsoft.DynamicQuantizeMatMul(x, w, s, , b) y = Relu(h)"
    if not bias:
        body = body.replace(", , b", "")
        del given["b"]
    m: Model = model(f"g (float[M,64] x) => (float[M,32] y) {{ {body} }}", MICROSOFT, **given)
    before = m.sites()[0].codes()
    Pipeline.parse("prune-magnitude{pattern=16x4 sparsity=0.5}").run(m, PassContext())
    after = m.sites()[0].codes()
    assert np.array_equal(after[after != 0], before[after != 0])
    assert 0.4 < np.mean(after == 0) < 0.6
    lowered = m.copy()
    Pipeline.parse("choose-layout{layout=16x4},lower-sparse").run(lowered, PassContext())
    emit.finalize(lowered)
    assert [node.op_type for node in lowered.onnx.graph] == ["BlockSparseMatMulInt8Relu"]
    inputs = verify.make_inputs(m, None, 0, {"x": (5, 64)})
    assert verify.worst_rel_l2(verify.compare(m, lowered, inputs, library=(False, library))) <= 1e-6
