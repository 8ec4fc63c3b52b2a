"""Blocks in bfloat16 on tile registers, emulated where the machine has none, against NumPy in double precision."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparsecc.runtime import NativeMatMul, get_library_path
from sparsecc.sparse import FLOATS, Pattern, SparseTensor, keep_mask, rounded

LIBRARY = ctypes.CDLL(get_library_path())
LIBRARY.sparsecc_tile_kernel_table.restype = ctypes.c_char_p
TABLE = [line.split() for line in LIBRARY.sparsecc_tile_kernel_table().decode().splitlines()]
KERNELS = {row[0] for row in TABLE}
ISAS = sorted({row[1] for row in TABLE})
EPS = float(np.finfo(np.float32).eps)
CANARY = np.float32(-12345.5)


def native(weight: np.ndarray, pattern: str, **options: Any) -> NativeMatMul:
    """``weight`` must hold numbers of bfloat16."""
    tensor = SparseTensor.encode(weight, Pattern.parse(pattern)).stored_as("bf16")
    assert tensor.values.dtype == FLOATS["bf16"]
    return NativeMatMul(pattern, weight.shape, tensor.values, tensor.indices, **options)


def random_weight(
    rng: np.random.Generator, shape: tuple[int, int], pattern: str, sparsity: float
) -> np.ndarray:
    weight = rounded(rng.standard_normal(shape).astype(np.float32), "bf16").astype(np.float32)
    return weight * keep_mask(rng.random(shape), Pattern.parse(pattern), sparsity)


def run(op: NativeMatMul, x: np.ndarray, executor: Any = None) -> np.ndarray:
    """The result of ``op``, which must be written whole, and nothing around it."""
    size = x.shape[0] * op.shape[0]
    whole = np.full(size + 128, CANARY, np.float32)
    y = whole[64 : 64 + size].reshape(x.shape[0], op.shape[0])
    op._call("run", op._handle, x.ctypes.data, x.shape[0], y.ctypes.data, executor)
    assert (whole[:64] == CANARY).all()
    assert (whole[64 + size :] == CANARY).all()
    assert not (y == CANARY).any()
    return y


def assert_close(y: np.ndarray, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> None:
    """As close as sums in float32 are: parts of x that were lost or rounded would show."""
    expected = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
    sizes = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64) + np.abs(bias)
    assert (np.abs(y - expected) <= (8 + 2 * np.sqrt(x.shape[1])) * EPS * sizes).all()


@pytest.mark.skipif(not ISAS, reason="neither AMX nor a build with emulated tile registers")
def test_every_kernel_is_exercised() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for isa, pattern, rows in itertools.product(ISAS, ("16x1", "32x1", "48x2"), (1, 40)):
        with native(random_weight(rng, (96, 200), pattern, 0.5), pattern, isa=isa) as op:
            kernel = op.kernel(rows)
            assert kernel.startswith("block" if rows == 1 else "tiles")
            seen.add(kernel)
    assert {name for name in seen if name.startswith("tiles")} == KERNELS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", ["16x1", "16x2", "16x32", "32x1", "64x3", "48x1"])
def test_random(isa: str, pattern: str) -> None:
    """Odd shapes, empty groups, more tiles than are brought together at once, tails of rows and of outputs."""
    rng = np.random.default_rng(1)
    tiled = 0
    for trial in range(12):
        shape = int(rng.integers(1, 150)), int(rng.integers(1, 700))
        rows = (8, 9, 15, 16, 17, 24, 31, 32, 33, 70, 130, 2)[trial]
        weight = random_weight(rng, shape, pattern, float(rng.choice([0.3, 0.7, 0.9])))
        weight[: shape[0] // 3] *= trial % 3 > 0
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        bias = rng.standard_normal(shape[0]).astype(np.float32)
        relu = native(weight, pattern, isa=isa, bias=bias, activation="Relu")
        with native(weight, pattern, isa=isa, bias=bias) as op, relu:
            y = run(op, x)
            assert_close(y, x, weight, bias)
            np.testing.assert_array_equal(run(relu, x), np.maximum(y, 0))
            tiled += op.kernel(rows).startswith("tiles")
    assert tiled > 3


@pytest.mark.parametrize("isa", ISAS)
def test_no_bit_of_x_is_lost(isa: str) -> None:
    """Ones on the diagonal give x back: large and small numbers, such as round up in bfloat16, zeros of both signs."""
    rng = np.random.default_rng(2)
    x = rng.integers(0, 1 << 32, (33, 64), np.uint64).astype(np.uint32).view(np.float32)
    x = np.where(np.isfinite(x) & (np.abs(x) > 1e-30), x, np.float32(3.4e38))
    x[0, :6] = 0, -0.0, np.finfo(np.float32).max, -1 + EPS / 2, 1 + EPS, 16777215
    weight = np.eye(64, dtype=np.float32)
    for pattern in ("16x1", "32x1", "16x16"):
        with native(weight, pattern, isa=isa) as op:
            assert op.kernel(33).startswith("tiles")
            np.testing.assert_array_equal(run(op, x), x)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_reaches_the_outputs_that_read_it(isa: str) -> None:
    """Also from the first block of a tile that is not full, which padding must not multiply again."""
    weight = np.zeros((32, 70), np.float32)
    weight[:16, :40] = 2
    weight[16:, 30:] = 2
    for bad in (np.inf, -np.inf, np.nan):
        for row, column in itertools.product((0, 17), (0, 35, 39, 69)):
            x = np.ones((20, 70), np.float32)
            x[row, column] = bad
            with native(weight, "16x1", isa=isa) as op:
                assert op.kernel(20).startswith("tiles")
                np.testing.assert_array_equal(run(op, x), reached(x, weight))


def reached(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The product over stored weights alone."""
    return np.stack([x[:, row != 0] @ row[row != 0] for row in weight], axis=1)


@pytest.mark.parametrize("isa", ISAS)
def test_weights_that_stay_with_blocks(isa: str) -> None:
    """Other types of values, values that are not finite, and so few blocks that a tile would be empty."""
    rng = np.random.default_rng(3)
    weight = random_weight(rng, (32, 320), "16x1", 0.5)
    infinite, few = weight.copy(), np.zeros_like(weight)
    infinite[np.nonzero(weight)[0][0], np.nonzero(weight)[1][0]] = np.inf
    few[:, :3] = 1
    for kept in (infinite, few):
        with native(kept, "16x1", isa=isa) as op:
            assert not op.kernel(40).startswith("tiles")
    tensor = SparseTensor.encode(weight, Pattern.parse("16x1"))
    for values in (tensor.values, tensor.values.astype(np.float16)):
        with NativeMatMul("16x1", weight.shape, values, tensor.indices, isa=isa) as op:
            assert not op.kernel(40).startswith("tiles")
    for other in ("avx512", "avx512vnni", "generic"):
        with native(weight, "16x1", isa=other) as op:
            assert not op.kernel(40).startswith("tiles")


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_the_result(isa: str, pool_executor: Callable[[int], Any]) -> None:
    rng = np.random.default_rng(4)
    for rows, shape in itertools.product((9, 100, 700), ((600, 300), (30, 500))):
        weight = random_weight(rng, shape, "16x1", 0.8)
        weight[:16] = 1  # one full group
        x = rng.standard_normal((rows, shape[1])).astype(np.float32)
        with native(weight, "16x1", isa=isa) as op:
            assert op.kernel(rows).startswith("tiles")
            alone = run(op, x)
            for threads in (2, 5, 64):
                np.testing.assert_array_equal(run(op, x, pool_executor(threads)), alone)
