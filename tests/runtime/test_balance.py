"""How work is dealt to threads: evenly, and without a trace in the results."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecc.runtime import NativeInt8MatMul, NativeMatMul, int8_isas, isas
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor

PARTS = (1, 2, 4, 8, 16, 32, 64)
GROUP = 16  # outputs that a thread computes together

Mask = NDArray[np.bool_]


def skewed_masks(groups: int, inputs: int, kind: str, seed: int) -> Mask:
    """A mask [groups, inputs] of blocks of 16 outputs by one input."""
    rng = np.random.default_rng(seed)
    mask = rng.random((groups, inputs)) < 0.1
    if kind == "one giant":
        mask[rng.integers(groups)] = True
    elif kind == "empty half":
        half = slice(groups // 2, None) if seed % 2 else slice(0, groups // 2)
        mask[half] = False
    elif kind == "power law":
        lengths = np.minimum(inputs, 0.03 * inputs * (rng.pareto(1.5, groups) + 1)).astype(int)
        mask[:] = np.arange(inputs) < lengths[:, None]
        mask = rng.permuted(mask, axis=1)
    elif kind == "growing":
        mask = rng.random((groups, inputs)) < np.linspace(0, 0.2, groups)[:, None]
    return mask


KINDS = ("even", "one giant", "empty half", "power law", "growing")


def block_op(mask: Mask) -> NativeMatMul:
    """An operator with this mask and weights of one."""
    tensor = SparseTensor.encode(np.repeat(mask, GROUP, axis=0).astype(np.float32), Pattern.parse("16x1"))
    return NativeMatMul("16x1", tensor.shape, tensor.values, tensor.indices)


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 400), st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_no_part_has_much_more_than_its_share(groups: int, inputs: int, kind: str, seed: int) -> None:
    """A part exceeds the mean by less than one group; fewer parts are no worse, unless both are even."""
    mask = skewed_masks(groups, inputs, kind, seed)
    work = mask.sum(axis=1) + 4  # what a group costs beside its blocks
    with block_op(mask) as op:
        found = [op.balance(1, parts) for parts in PARTS]
    assert found[0] == pytest.approx(1)
    for balance, finer in zip(found, [*found[1:], found[-1]], strict=True):
        assert 1 - 1e-9 <= balance <= max(finer + 0.01, 1.03) + 1e-9
        assert balance <= 1 + work.max() * 64 / work.sum() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_skewed_masks_of_many_groups_are_even_up_to_64_parts(kind: str, seed: int) -> None:
    with block_op(skewed_masks(1024, 1024, kind, seed)) as op:
        assert max(op.balance(1, parts) for parts in PARTS) <= 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_single_weights_and_bytes_are_even_up_to_64_parts(kind: str) -> None:
    weight = np.repeat(skewed_masks(256, 768, kind, 0), GROUP, axis=0).astype(np.float32)
    single = SparseTensor.encode(weight, Pattern.parse("unstructured"))
    with NativeMatMul("unstructured", single.shape, single.values, single.indices) as op:
        assert max(op.balance(1, parts) for parts in PARTS) <= 1.05
    bytes_ = QuantizedTensor.encode(weight, Pattern.parse("16x1"))
    with NativeInt8MatMul("16x1", bytes_.shape, bytes_.values, bytes_.indices, bytes_.scales) as int8:
        assert max(int8.balance(parts) for parts in PARTS) <= 1.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [30, 128, 320])
def test_many_rows_are_even_on_a_machine_of_64_threads(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSECC_THREADS", "64")
    mask = np.repeat(skewed_masks(256, 512, kind, 0), GROUP, axis=0)
    tensor = SparseTensor.encode(mask.astype(np.float32), Pattern.parse("unstructured"))
    work = mask.sum(axis=1) + 1  # an output is never cut
    with NativeMatMul("unstructured", tensor.shape, tensor.values, tensor.indices) as op:
        found = max(op.balance(rows, threads) for threads in PARTS)
    assert found <= max(1.05, 1 + work.max() * 64 / work.sum())


@pytest.mark.parametrize("rows", [1, 40])
def test_balance_of_single_weights_and_of_bytes(rows: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2048, 256)).astype(np.float32) * (rng.random((2048, 256)) < 0.1)
    single = SparseTensor.encode(weight, Pattern.parse("unstructured"))
    with NativeMatMul("unstructured", single.shape, single.values, single.indices) as op:
        for parts in (2, 4):
            assert 1 <= op.balance(rows, parts) <= 1.05
    blocks = np.kron(rng.random((128, 64)) < 0.1, np.ones((16, 4))).astype(np.float32)
    coded = QuantizedTensor.encode(blocks, Pattern.parse("16x4"))
    with NativeInt8MatMul("16x4", coded.shape, coded.values, coded.indices, coded.scales) as int8:
        for parts in (2, 4, 8):
            assert 1 <= int8.balance(parts) <= 1.05
        assert int8.balance(3) == int8.balance(4)


def threaded(
    op: NativeMatMul | NativeInt8MatMul, x: NDArray[np.float32], executor: Any
) -> NDArray[np.float32]:
    """What ``op`` computes on the threads of ``executor``."""
    y = np.full((len(x), op.shape[0]), np.nan, np.float32)
    error = ctypes.create_string_buffer(200)
    run = getattr(op._library, f"sparsecc_{op._family}_run")
    code = run(op._handle, x.ctypes.data, len(x), y.ctypes.data, executor, error, 200)
    assert not code, error.value
    return y


def giants(outputs: int, inputs: int, height: int) -> Mask:
    """A sparse mask of which two neighbouring groups and the last one, not a whole group, have every weight."""
    keep = np.random.default_rng(0).random((-(-outputs // height), inputs)) < 0.05
    keep = np.repeat(keep, height, axis=0)[:outputs]
    keep[32:96] = True
    keep[outputs - outputs % GROUP :] = True
    return keep


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1"])
@pytest.mark.parametrize("rows", [1, 3, 16, 39, 200])
def test_sums_of_groups_that_are_cut(
    isa: str, layout: str, rows: int, shuffled_executor: Callable[..., Any]
) -> None:
    """Against NumPy, with bias and activation, and the same bits for every number of threads."""
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((1035, 500)).astype(np.float32)
    weight *= giants(*weight.shape, max(1, Pattern.parse(layout).rows))
    tensor = SparseTensor.encode(weight, Pattern.parse(layout))
    bias = rng.standard_normal(len(weight)).astype(np.float32)
    x = rng.standard_normal((rows, 500)).astype(np.float32)
    options = {"bias": bias, "activation": "Relu", "isa": isa}
    with NativeMatMul(layout, tensor.shape, tensor.values, tensor.indices, **options) as op:
        assert op.balance(1, 16) < 1.1  # without cuts one group alone is more than a sixteenth
        expected = op(x)
        exact = np.maximum(x.astype(np.float64) @ weight.T.astype(np.float64) + bias, 0)
        np.testing.assert_allclose(expected, exact, rtol=0, atol=2e-4)
        for threads in (2, 5, 64):
            np.testing.assert_array_equal(threaded(op, x, shuffled_executor(threads)), expected)


@pytest.mark.parametrize("isa", int8_isas())
@pytest.mark.parametrize("layout", ["16x4", "4x1", "unstructured"])
@pytest.mark.parametrize("rows", [1, 16, 39])
def test_sums_of_bytes_that_are_cut(
    isa: str, layout: str, rows: int, shuffled_executor: Callable[..., Any]
) -> None:
    """The same bits as without cuts: every output alone in a weight that is too small for them."""
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((1035, 600)).astype(np.float32) * giants(1035, 600, 16)
    tensor = QuantizedTensor.encode(weight, Pattern.parse(layout))
    packed = (tensor.values, tensor.indices, tensor.scales)
    x = rng.standard_normal((rows, 600)).astype(np.float32)
    with NativeInt8MatMul(layout, tensor.shape, *packed, isa=isa, activation="Silu") as op:
        assert "tiles" in op.kernel(1) or op.balance(16) < 1.1  # tiles are never cut
        got = op(x)
        for threads in (2, 5, 64):
            np.testing.assert_array_equal(threaded(op, x, shuffled_executor(threads)), got)
    for first in (0, 32, 1024):
        some = QuantizedTensor.encode(weight[first : first + GROUP], Pattern.parse(layout))
        packed = (some.values, some.indices, some.scales)
        with NativeInt8MatMul(layout, some.shape, *packed, isa=isa, activation="Silu") as op:
            np.testing.assert_array_equal(op(x), got[:, first : first + GROUP])


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("layout", ["unstructured", "2:4", "16x1", "32x1"])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 130])
def test_results_do_not_depend_on_the_number_of_threads(
    isa: str, layout: str, rows: int, shuffled_executor: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(rows)
    weight = rng.standard_normal((700, 300)).astype(np.float32)
    pattern = Pattern.parse(layout)
    height = pattern.rows if pattern.kind == "block" else 1
    keep = np.repeat(rng.random((-(-700 // height), 300)) < 0.15, height, axis=0)[:700]
    if layout == "2:4":
        keep = np.tile([True, False, True, False], (700, 75))
    else:
        keep[:64] = True  # skewed: units are scattered
    tensor = SparseTensor.encode(weight * keep, pattern)
    x = rng.standard_normal((rows, 300)).astype(np.float32)
    with NativeMatMul(layout, tensor.shape, tensor.values, tensor.indices, isa=isa) as op:
        expected = op(x)
        np.testing.assert_allclose(expected, x @ (weight * keep).T, rtol=0, atol=1e-3)
        for threads in (2, 3, 7, 16, 64):
            np.testing.assert_array_equal(threaded(op, x, shuffled_executor(threads)), expected)
