"""Products of bytes through the C interface, against plain integer arithmetic, on every instruction set.

The integers are checked bit for bit: where x is made so that its scale is exactly 1, and the weights' scales are
1, a result is the exact sum converted to float32. Otherwise a result may differ from the formula, evaluated in
double precision, by the rounding of one product of scales, one product and one sum.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sparsecc.emit.reference import quantize_linear, to_bytes
from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime import NativeInt8MatMul, NativeMatMul, get_library_path, int8_isas, isas
from sparsecc.runtime.capi import ACTIVATION_CODES
from sparsecc.runtime.capi_int8 import Int8WeightDesc
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor, keep_mask, pack_gaps

ISAS = int8_isas()
PATTERNS = (
    "16x4", "4x1", "8x1", "4x4", "1x4", "16x1", "32x4", "64x64", "1x1", "3x5", "20x3",
    "unstructured", "2:4", "1:4", "2:8", "3:7", "15:16",
)  # fmt: skip
EPS = float(np.finfo(np.float32).eps)
CANARY = np.float32(-12345.5)
ALPHA, BETA = 0.25, 0.75

LIBRARY = ctypes.CDLL(get_library_path())
LIBRARY.sparsecc_int8_kernel_table.restype = ctypes.c_char_p
KERNELS = [line.split()[0] for line in LIBRARY.sparsecc_int8_kernel_table().decode().splitlines()]


def without_tiles(isa: str) -> str:
    """The set with the same kernels but those on tile registers."""
    return "avx512vnni" if isa.startswith("avx512amx") else isa


def plain(isa: str) -> str:
    """The set that counts for everything but products of bytes."""
    return {"avx512vnni": "avx512", "avxvnni": "avx2"}.get(without_tiles(isa), isa.partition("_")[0])


def random_codes(
    rng: np.random.Generator, shape: tuple[int, int], pattern: str, sparsity: float
) -> np.ndarray:
    """An int8 matrix with the largest values among its weights, -128 too, which files may hold."""
    codes = rng.choice([*range(-128, 128), *[-128, -127, 127] * 20], shape)
    parsed = Pattern.parse(pattern)
    kept = keep_mask(rng.random(shape), parsed, sparsity if parsed.needs_sparsity else None)
    return (codes * kept).astype(np.int8)


def packed(codes: np.ndarray, pattern: str, scales: np.ndarray | None = None) -> QuantizedTensor:
    """These very codes in packed form."""
    tensor = SparseTensor.encode(codes.astype(np.float32), Pattern.parse(pattern))
    scales = np.ones(codes.shape[0], np.float32) if scales is None else scales
    return QuantizedTensor(
        tensor.pattern, tensor.shape, tensor.values.astype(np.int8), tensor.indices, scales
    )


def native(tensor: QuantizedTensor, **options: Any) -> NativeInt8MatMul:
    return NativeInt8MatMul(
        str(tensor.pattern), tensor.shape, tensor.values, tensor.indices, tensor.scales, **options
    )


def whole_numbers(rng: np.random.Generator, rows: int, inputs: int) -> tuple[np.ndarray, int]:
    """Rows of integers that are stored exactly, with scale 1, and their zero point."""
    zero_point = int(rng.choice([0, 1, 127, 128, 254, 255]))
    x = rng.integers(0, 256, (rows, inputs)) - zero_point
    if x.size > 1:
        x.flat[0], x.flat[-1] = -zero_point, 255 - zero_point
    else:
        x[:] = 255 - zero_point if zero_point == 0 else -zero_point
        zero_point = 0 if x.sum() > 0 else zero_point
    return x.astype(np.float32), zero_point


def plain_sums(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The oracle: one product after the other, and the sum modulo 2^32."""
    sums = np.zeros((x.shape[0], codes.shape[0]), np.int64)
    for k in range(x.shape[1]):
        sums += x[:, k : k + 1] * codes[:, k].astype(np.int64)
    return sums.astype(np.int32)


def run(op: NativeInt8MatMul, x: np.ndarray, executor: Any = None) -> np.ndarray:
    """The result of ``op``, which must be written whole, and nothing around it."""
    size = x.shape[0] * op.shape[0]
    whole = np.full(size + 128, CANARY, np.float32)
    y = whole[64 : 64 + size].reshape(x.shape[0], op.shape[0])
    op._call("run", op._handle, x.ctypes.data, x.shape[0], y.ctypes.data, executor)
    assert (whole[:64] == CANARY).all()
    assert (whole[64 + size :] == CANARY).all()
    assert not (y == CANARY).any()
    return y


def check_exact(
    rng: np.random.Generator, rows: int, codes: np.ndarray, pattern: str, isa: str, executor: Any = None
) -> None:
    x, zero_point = whole_numbers(rng, rows, codes.shape[1])
    if x.size == 1 and abs(x.item()) != 255:  # one number alone has its own scale
        x[:] = 255 if x.item() >= 0 else -255
    stored, scale, found = quantize_linear(x)
    assert scale == 1
    assert found == zero_point or x.size == 1
    expected = plain_sums(stored.astype(np.int64) - found, codes).astype(np.float32)
    with native(packed(codes, pattern), isa=isa) as op:
        np.testing.assert_array_equal(run(op, x, executor), expected)


# --- selection ---------------------------------------------------------------------------------------


def test_every_isa_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = packed(np.eye(16, dtype=np.int8), "16x4")
    seen = set()
    for isa in ISAS:
        with native(tensor, isa=isa) as op:
            assert op.kernel(1) == f"quads-{without_tiles(isa)}"
            seen.add(op.kernel(1))
        monkeypatch.setenv("SPARSECC_ISA", isa)
        with native(tensor) as op:
            assert op.kernel(1) == f"quads-{without_tiles(isa)}"
        with native(tensor, isa="generic") as op:
            assert op.kernel(1) == "quads-generic"
    assert seen == {name for name in KERNELS if name.startswith("quads")}
    assert ISAS[-1] == "generic"
    monkeypatch.delenv("SPARSECC_ISA")
    with native(tensor) as op:
        assert op.kernel(1) == f"quads-{without_tiles(ISAS[0])}"
    with pytest.raises(ModelError, match=f'"mmx".*{" ".join(ISAS)}'):
        native(tensor, isa="mmx")
    with pytest.raises(ModelError, match='"quads-mmx"'):
        native(tensor, isa="quads-mmx")
    monkeypatch.setenv("SPARSECC_ISA", "mmx")
    for use in (int8_isas, lambda: native(tensor)):
        with pytest.raises(UsageError, match=f"SPARSECC_ISA is 'mmx', usable here: {' '.join(ISAS)}"):
            use()


def test_inputs_are_picked_where_neighbours_would_hold_many_zeros() -> None:
    rng = np.random.default_rng(11)
    # Neighbours are two and three times as fast as picks by dot and matrix products of ARM.
    for isa in set(map(without_tiles, ISAS)) - {"generic", "neon_dotprod", "neon_i8mm"}:
        width = 64 if f"windows64-{isa}" in KERNELS else 16
        for pattern, sparsity, picks in (
            ("16x4", 0.9, False), ("32x8", 0.9, False), ("unstructured", 0.1, False), ("4x1", 0.1, False),
            ("unstructured", 0.85, True), ("2:8", 0.0, True), ("4x1", 0.85, True), ("1x4", 0.85, True),
        ):  # fmt: skip
            codes = np.maximum(random_codes(rng, (64, 256), pattern, sparsity), -127)
            with native(packed(codes, pattern), isa=isa) as op:
                assert op.kernel(1) == (f"windows{width}-{isa}" if picks else f"quads-{isa}")


@pytest.mark.skipif("lanes-avx512vnni" not in KERNELS, reason="no VBMI here")
def test_rows_in_the_lanes_where_there_are_many() -> None:
    """For outputs that share inputs; whole thirty-twos of rows and what is nearly one, the rest as few rows."""
    rng = np.random.default_rng(15)
    for pattern, many in (
        ("4x1", "lanes"), ("8x1", "lanes"), ("16x1", "lanes"), ("4x4", "lanes"), ("12x2", "lanes"),
        ("unstructured", "windows64"), ("1x4", "windows64"), ("16x4", "quads"),
    ):  # fmt: skip
        codes = random_codes(rng, (70, 256), pattern, 0.8)
        with native(packed(codes, pattern), isa="avx512vnni") as op:
            for rows in (1, 24, 25, 32, 100):
                few = "windows64" if many == "lanes" and rows < 25 else many
                assert op.kernel(rows) == f"{few}-avx512vnni"
        for rows in (24, 25, 31, 33, 56, 57, 63, 96, 100):
            check_exact(rng, rows, codes, pattern, "avx512vnni")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.startswith("avx512amx")])
def test_tiles_where_they_take_less_time(isa: str) -> None:
    """By the estimate of pack_tiles.cc: 16x64 and 16x4 unless hardly anything is left, fine masks only where dense."""
    rng = np.random.default_rng(13)
    for pattern, sparsity, kernel in (
        ("16x64", 0.8, "tiles"), ("16x4", 0.0, "tiles"), ("16x4", 0.9, "tiles"), ("32x8", 0.95, "tiles"),
        ("16x4", 0.995, "quads"), ("unstructured", 0.3, "tiles"), ("unstructured", 0.9, "windows"),
        ("1:8", 0.0, "windows"), ("4x1", 0.85, "windows"),
    ):  # fmt: skip
        codes = random_codes(rng, (64, 1024), pattern, sparsity)
        with native(packed(codes, pattern), isa=isa) as op:
            assert op.kernel(1).startswith(kernel)
            assert op.kernel(1).endswith(isa if kernel == "tiles" else without_tiles(isa))


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("tiles")])
def test_quads_of_tiles_stand_or_are_brought_together(kernel: str) -> None:
    """Every number of quads in a window of sixteen, alone and beside others; more tiles than are copied at once."""
    rng = np.random.default_rng(14)
    for trial in range(30):
        codes = rng.integers(-128, 128, (17, 1200)).astype(np.int8)
        share = np.repeat(rng.choice([0.0, 0.02, 0.3, 0.6, 1.0], 1216 // 64), 16)
        kept = rng.random((2, share.size)) < share * (trial % 3) / 2
        codes *= np.repeat(np.repeat(kept, 4, axis=1)[:, :1200], (16, 1), axis=0)
        check_exact(rng, (1, 9, 16, 17, 31, 32, 33, 65)[trial % 8], codes, "16x4", kernel)


def test_isas_match_the_machine(cpu_flags: frozenset[str]) -> None:
    assert set(isas()) <= set(ISAS)
    assert ("avx512vnni" in ISAS) == ("avx512" in ISAS and "avx512_vnni" in cpu_flags)
    assert ("avxvnni" in ISAS) == ("avx2" in ISAS and "avx_vnni" in cpu_flags)
    assert ("avx512amx" in ISAS) == (
        "avx512vnni" in ISAS and {"amx_tile", "amx_int8", "avx512vbmi"} <= cpu_flags
    )
    assert ("neon_dotprod" in ISAS) == ("neon" in ISAS and "asimddp" in cpu_flags)
    assert ("neon_i8mm" in ISAS) == ("neon_dotprod" in ISAS and "i8mm" in cpu_flags)
    assert ("windows64-avx512vnni" in KERNELS) == ("avx512vnni" in ISAS and "avx512vbmi" in cpu_flags)


def test_other_operators_take_the_set_that_is_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = SparseTensor.encode(np.eye(16, dtype=np.float32), Pattern.parse("16x1"))
    for isa in ISAS:
        monkeypatch.setenv("SPARSECC_ISA", isa)
        with NativeMatMul("16x1", weight.shape, weight.values, weight.indices) as op:
            assert op.kernel(1) == f"block16-{plain(isa)}"


# --- the integers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sums_are_exact(isa: str, pattern: str) -> None:
    rng = np.random.default_rng(PATTERNS.index(pattern))
    for trial in range(18):
        shape = int(rng.integers(1, 150)), int(rng.integers(1, 400))
        rows = (1, 2, 3, 5, 15, 16, 17, 40, 70)[trial % 9]
        codes = random_codes(rng, shape, pattern, float(rng.choice([0.3, 0.7, 0.9, 0.99])))
        check_exact(rng, rows, codes, pattern, isa)


@pytest.mark.parametrize("isa", KERNELS)
def test_every_number_of_rows_and_of_outputs_and_inputs(isa: str) -> None:
    rng = np.random.default_rng(1)
    codes = random_codes(rng, (37, 75), "16x4", 0.5)
    for rows in (*range(1, 35), 63, 64, 65):
        check_exact(rng, rows, codes, "16x4", isa)
    for side in range(1, 36):
        check_exact(rng, 3, random_codes(rng, (side, 20), "16x4", 0.3), "16x4", isa)
    for side in (*range(1, 70), 127, 128, 129):
        check_exact(rng, 3, random_codes(rng, (20, side), "16x4", 0.3), "16x4", isa)


@pytest.mark.parametrize("isa", KERNELS)
def test_nothing_saturates(isa: str) -> None:
    """The largest products, all of one sign: pairs of them do not fit 16 bits."""
    for code, value, rows in itertools.product((-128, 127), (0.0, 255.0), (1, 2, 16)):
        x = np.full((rows, 256), value, np.float32)
        x[:, 0] = 255 - value
        codes = np.full((16, 256), code, np.int8)
        with native(packed(codes, "16x4"), isa=isa) as op:
            expected = x.astype(np.int64) @ codes.T.astype(np.int64)
            np.testing.assert_array_equal(run(op, x), expected.astype(np.float32))


@pytest.mark.parametrize("isa", KERNELS)
def test_sums_wrap_as_those_of_matmulinteger(isa: str) -> None:
    codes = np.full((1, 70_000), 127, np.int8)
    for rows in (1, 5):
        x = np.full((rows, 70_000), 255, np.float32)
        with native(packed(codes, "16x4"), isa=isa) as op:
            expected = (np.int64(70_000 * 255 * 127) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
            np.testing.assert_array_equal(run(op, x), np.full((rows, 1), np.float32(expected)))


@pytest.mark.parametrize("isa", KERNELS)
@pytest.mark.parametrize("pattern", ["16x4", "4x1"])
def test_skewed_weights(isa: str, pattern: str) -> None:
    """All zero, empty rows, one giant row, a single weight in the last corner, wide and tall."""
    rng = np.random.default_rng(2)
    zero = np.zeros((70, 300), np.int8)
    giant, corner = zero.copy(), zero.copy()
    giant[33] = rng.integers(1, 128, 300)
    corner[-1, -1] = 2
    sparse_rows = random_codes(rng, (70, 300), pattern, 0.5)
    sparse_rows[rng.random(70) < 0.7] = 0
    wide, tall = random_codes(rng, (3, 5000), pattern, 0.95), random_codes(rng, (3000, 5), pattern, 0.5)
    for codes, rows in itertools.product((zero, giant, corner, sparse_rows, wide, tall), (1, 4, 20)):
        check_exact(rng, rows, codes, pattern, isa)


# --- x to bytes --------------------------------------------------------------------------------------


def stored_by_library(x: np.ndarray, isa: str) -> np.ndarray:
    """What the library makes of x, read off products with a diagonal of ones: stored minus zero point."""
    inputs = x.shape[1]
    scale = quantize_linear(x)[1]
    with native(packed(np.eye(inputs, dtype=np.int8), "16x4"), isa=isa) as op:
        y = run(op, x).astype(np.float64) / float(scale)
    rounded = np.rint(y)
    assert np.abs(y - rounded).max() < 1e-3
    return rounded.astype(np.int64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.37, 1.0, 1e30])
def test_x_is_rounded_as_dynamic_quantize_linear_rounds(isa: str, scale: float) -> None:
    """Near the middle between two integers too, where a product with the reciprocal would go wrong."""
    rng = np.random.default_rng(3)
    for trial in range(12):
        ends = np.sort(rng.standard_normal(2)) * scale
        step = (max(ends[1], 0) - min(ends[0], 0)) / 255
        middles = (rng.integers(-255, 256, (40, 96)) + 0.5) * step
        x = np.where(rng.random(middles.shape) < 0.7, middles, rng.standard_normal(middles.shape) * scale)
        x = x.astype(np.float32)
        nudged = rng.integers(-3, 4, x.shape)
        for _ in range(3):
            x = np.where(nudged > 0, np.nextafter(x, np.float32(np.inf)), x)
            x = np.where(nudged < 0, np.nextafter(x, np.float32(-np.inf)), x)
            nudged -= np.sign(nudged)
        x = np.clip(x, *ends).astype(np.float32)
        if trial % 3 == 0:
            x = np.abs(x)
        stored, _, zero_point = quantize_linear(x)
        np.testing.assert_array_equal(stored_by_library(x, isa), stored.astype(np.int64) - zero_point)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [0.0, 3.5, -3.5])
def test_x_all_alike(isa: str, value: float) -> None:
    tensor = packed(np.ones((5, 9), np.int8), "1x4")
    with native(tensor, isa=isa, bias=np.float32([1, 2, 3, 4, 5])) as op:
        y = run(op, np.full((2, 9), value, np.float32))
    np.testing.assert_allclose(y, np.tile(9 * value + np.float32([1, 2, 3, 4, 5]), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_spoils_every_result(isa: str, bad: float) -> None:
    tensor = packed(np.ones((21, 70), np.int8), "16x4")
    for rows, column in itertools.product((1, 20), (0, 33, 69)):
        x = np.ones((rows, 70), np.float32)
        x[-1, column] = bad
        with native(tensor, isa=isa) as op:
            assert np.isnan(run(op, x)).all()


def run_given(
    op: NativeInt8MatMul, function: str, x: np.ndarray, scale: float, zero_point: int
) -> np.ndarray:
    y = np.full((x.shape[0], op.shape[0]), CANARY, np.float32)
    op._call(function, op._handle, x.ctypes.data, x.shape[0], scale, zero_point, y.ctypes.data, None)
    return y


@pytest.mark.parametrize("isa", KERNELS)
def test_given_scale_and_bytes(isa: str) -> None:
    """Numbers far outside the range and near the middle between two integers; every number of rows and inputs."""
    rng = np.random.default_rng(12)
    for rows, inputs, zero_point in zip(
        (1, 2, 7, 16, 40), (1, 64, 65, 130, 300), (0, 255, 128, 3, 77), strict=True
    ):
        scale = np.float32(rng.lognormal())
        x = (rng.integers(-300, 300, (rows, inputs)) + rng.choice([0, 0.5, 0.3], (rows, inputs))) * scale
        x = x.astype(np.float32)
        x[rng.random(x.shape) < 0.05] = rng.choice([np.inf, -np.inf, 1e30, -1e30, 2147483500.0 * scale, -0.0])
        codes = random_codes(rng, (30, inputs), "unstructured", 0.5)
        stored = to_bytes(x, scale, zero_point)
        sums = plain_sums(stored.astype(np.int64) - zero_point, codes).astype(np.float32)
        with native(packed(codes, "unstructured"), isa=isa) as op:
            for function, source in (("run_given", x), ("run_bytes", stored)):
                y = run_given(op, function, source, float(scale), zero_point)
                np.testing.assert_allclose(y, sums * scale, rtol=2 * EPS)


@pytest.mark.parametrize("isa", KERNELS)
def test_what_is_no_number_becomes_the_least_byte(isa: str) -> None:
    x = np.array([[np.nan, 3.0]], np.float32)
    with native(packed(np.eye(2, dtype=np.int8), "1x1"), isa=isa) as op:
        np.testing.assert_array_equal(run_given(op, "run_given", x, 1.0, 100), [[-100, 3]])


def test_what_a_caller_may_get_wrong_about_a_scale() -> None:
    x = np.zeros((1, 2), np.float32)
    with native(packed(np.eye(2, dtype=np.int8), "1x1")) as op:
        for scale in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(UsageError, match="x_scale is not a finite positive number"):
                run_given(op, "run_given", x, scale, 0)
        for zero_point in (-1, 256):
            with pytest.raises(UsageError, match=r"x_zero_point must be in 0\.\.255"):
                run_given(op, "run_bytes", x, 1.0, zero_point)


# --- the whole formula -------------------------------------------------------------------------------


def expected_result(
    tensor: QuantizedTensor, x: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The result before the activation, in double precision, and how far a result may be from it."""
    stored, scale, zero_point = quantize_linear(x)
    sums = plain_sums(stored.astype(np.int64) - zero_point, tensor.decode_codes()).astype(np.float64)
    product = sums * (float(scale) * tensor.scales.astype(np.float64))
    return product + bias, 4 * EPS * (np.abs(product) + np.abs(bias))


@pytest.mark.parametrize("isa", KERNELS)
def test_scales_and_bias(isa: str) -> None:
    rng = np.random.default_rng(4)
    for rows, pattern in itertools.product((1, 3, 16, 50), ("16x4", "4x1", "16x1")):
        shape = int(rng.integers(1, 150)), int(rng.integers(1, 400))
        codes = random_codes(rng, shape, pattern, 0.6)
        tensor = packed(codes, pattern, rng.lognormal(-5, 3, shape[0]).astype(np.float32))
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        expected, bound = expected_result(tensor, x, bias)
        with native(tensor, isa=isa, bias=bias) as op:
            assert (np.abs(run(op, x) - expected) <= bound).all()
            np.testing.assert_array_equal(op(x.reshape(rows, 1, -1))[:, 0], run(op, x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATION_CODES)
def test_activations_are_those_of_float_operators(isa: str, activation: str) -> None:
    """The float kernels' activations are checked against mathematics; here: the same ones, of the same sums."""
    rng = np.random.default_rng(5)
    codes = random_codes(rng, (37, 40), "16x4", 0.3)
    tensor = packed(codes, "16x4", np.full(37, 0.004, np.float32))
    bias = rng.standard_normal(37).astype(np.float32)
    identity = SparseTensor.encode(np.eye(37, dtype=np.float32), Pattern.parse("16x1"))
    options = {"activation": activation, "alpha": ALPHA, "beta": BETA}
    for rows in (1, 3, 21):
        x = rng.standard_normal((rows, 40)).astype(np.float32)
        with native(tensor, isa=isa, bias=bias, **options) as op, native(tensor, isa=isa, bias=bias) as bare:
            y, z = run(op, x), run(bare, x)
        with NativeMatMul(
            "16x1", (37, 37), identity.values, identity.indices, isa=plain(isa), **options
        ) as only:
            np.testing.assert_allclose(y, only(z), rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("isa", ISAS)
def test_no_rows_and_no_inputs(isa: str) -> None:
    with native(packed(np.ones((3, 8), np.int8), "16x4"), isa=isa) as op:
        assert run(op, np.zeros((0, 8), np.float32)).shape == (0, 3)
    empty = np.zeros((0, 16, 4), np.int8), np.zeros(0, np.uint8), np.ones(3, np.float32)
    bias = np.float32([1, -2, 3])
    with NativeInt8MatMul("16x4", (3, 0), *empty, bias=bias, isa=isa) as op:
        for rows in (1, 40):
            np.testing.assert_array_equal(run(op, np.zeros((rows, 0), np.float32)), np.tile(bias, (rows, 1)))


# --- threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", KERNELS)
def test_threads_do_not_change_the_result(
    isa: str, pool_executor: Callable[..., Any], shuffled_executor: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(6)
    for rows, shape in itertools.product((1, 7, 100, 700), ((600, 400), (30, 500), (1, 17))):
        codes = random_codes(rng, shape, "16x4", 0.8)
        codes[shape[0] // 2] = 1  # one giant row
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        with native(packed(codes, "16x4"), isa=isa, bias=bias, activation="Gelu") as op:
            alone = run(op, x)
            for threads in (1, 2, 5, 64):
                log: list[int] = []
                np.testing.assert_array_equal(run(op, x, shuffled_executor(threads, log)), alone)
                assert threads > 1 or not log
            np.testing.assert_array_equal(run(op, x, pool_executor(4)), alone)


def test_one_operator_on_many_threads() -> None:
    rng = np.random.default_rng(7)
    inputs = [rng.standard_normal((rows, 300)).astype(np.float32) for rows in (1, 2, 9, 33, 64, 100) * 3]
    with (
        native(packed(random_codes(rng, (200, 300), "16x4", 0.8), "16x4")) as op,
        ThreadPoolExecutor(6) as pool,
    ):
        for x, y in zip(inputs, pool.map(lambda x: run(op, x), inputs), strict=True):
            np.testing.assert_array_equal(y, run(op, x))


# --- what a caller may get wrong ---------------------------------------------------------------------


def refused(change: Callable[[Int8WeightDesc], None], message: str) -> None:
    values, indices = np.ones((1, 16, 4), np.int8), pack_gaps(np.zeros(1, np.int64))
    scales = np.ones(16, np.float32)
    desc = Int8WeightDesc(
        ctypes.sizeof(Int8WeightDesc), 1, b"16x4", 16, 4, values.ctypes.data, 64,
        indices.ctypes.data, 1, scales.ctypes.data,
    )  # fmt: skip
    change(desc)
    handle, error = ctypes.c_void_p(), ctypes.create_string_buffer(300)
    code = LIBRARY.sparsecc_int8_matmul_create(
        ctypes.byref(desc), ctypes.byref(handle), error, ctypes.c_size_t(300)
    )
    if message:
        assert code != 0
        assert not handle
        assert message in error.value.decode()
        assert b"\n" not in error.value
    else:
        assert (code, error.value) == (0, b"")
        LIBRARY.sparsecc_int8_matmul_destroy(handle)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, ""),
        ({"struct_size": ctypes.sizeof(Int8WeightDesc) - 1}, "caller and library do not match"),
        ({"struct_size": 0}, "caller and library do not match"),
        ({"layout_version": 2}, "layout version 2"),
        ({"layout": None}, "no layout"),
        ({"layout": b"unstructured"}, "cannot place 64"),
        ({"layout": b"2:4"}, "cannot place 64"),
        ({"layout": b"16x"}, "unknown layout"),
        ({"layout": b"65x1"}, "unknown layout"),
        ({"outputs": 0}, "outputs is 0"),
        ({"outputs": 1 << 40}, "outputs is"),
        ({"inputs": -1}, "inputs is -1"),
        ({"outputs": 1 << 20, "inputs": 1 << 20}, "more than 2^31 elements"),
        ({"values": None}, "values or indices is null"),
        ({"indices": None}, "values or indices is null"),
        ({"value_count": -1}, "negative"),
        ({"value_count": 63}, "whole number of blocks"),
        ({"value_count": 0}, "more than the 0 stored"),
        ({"index_bytes": 0}, "cannot place"),
        ({"scales": None}, "no scales"),
        ({"activation": 99}, "unknown activation 99"),
        ({"isa": b"avx1024"}, "usable here"),
    ],
)
def test_malformed_descriptors(fields: dict[str, Any], message: str) -> None:
    def change(desc: Int8WeightDesc) -> None:
        for name, value in fields.items():
            setattr(desc, name, value)

    refused(change, message)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_must_be_finite_and_positive(scale: float) -> None:
    tensor = packed(np.ones((5, 4), np.int8), "16x4", np.float32([1, 1, scale, 1, 1]))
    with pytest.raises(ModelError, match="scale of output 2"):
        native(tensor)


def test_damaged_index_streams_are_refused_exactly_when_python_refuses() -> None:
    rng = np.random.default_rng(8)
    accepted = 0
    for _ in range(300):
        shape = int(rng.integers(1, 70)), int(rng.integers(1, 40))
        pattern = str(rng.choice(PATTERNS))
        tensor = packed(random_codes(rng, shape, pattern, float(rng.choice([0.3, 0.9]))), pattern)
        if not tensor.indices.size:
            continue
        indices = tensor.indices.copy()
        for _ in range(rng.integers(1, 4)):
            indices[rng.integers(indices.size)] ^= np.uint8(1 << rng.integers(8))
        damaged = QuantizedTensor(tensor.pattern, shape, tensor.values, indices, tensor.scales)
        try:
            codes = damaged.decode_codes()
        except ModelError:
            with pytest.raises(ModelError):
                native(damaged)
            continue
        accepted += 1
        with native(damaged) as op:
            x = np.eye(shape[1], dtype=np.float32) * 255
            np.testing.assert_array_equal(op(x), 255.0 * codes.T)
    assert accepted > 0


def test_calls_that_do_not_fit() -> None:
    tensor = packed(np.ones((5, 8), np.int8), "16x4")
    with native(tensor) as op:
        with pytest.raises(UsageError, match="last dimension of 8"):
            op(np.zeros((2, 9), np.float32))
        for arguments, message in (
            ((None, ctypes.c_int64(1), None), "x and y must not be null"),
            ((None, ctypes.c_int64(-1), None), "rows is negative"),
            ((None, ctypes.c_int64(1 << 60), None), "rows is negative or too large"),
        ):
            with pytest.raises(UsageError, match=message):
                op._call("run", op._handle, *arguments, None)
    op.close()
    with pytest.raises(UsageError, match="scales has shape"):
        NativeInt8MatMul("16x4", (5, 8), tensor.values, tensor.indices, tensor.scales[:-1])
    with pytest.raises(UsageError, match="bias has shape"):
        native(tensor, bias=np.zeros(4, np.float32))
