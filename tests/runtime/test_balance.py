"""How work is dealt to threads: evenly, and without a trace in the results."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparsecc.runtime import NativeInt8MatMul, NativeMatMul, isas
from sparsecc.sparse import Pattern, QuantizedTensor, SparseTensor

PARTS = (1, 2, 4, 8, 16, 32, 64)
GROUP = 16  # outputs that a thread computes together
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
PARALLEL_FOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, TASK, ctypes.c_void_p)

Mask = NDArray[np.bool_]


class Executor(ctypes.Structure):
    _fields_ = (("context", ctypes.c_void_p), ("threads", ctypes.c_int32), ("parallel_for", PARALLEL_FOR))


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
    """A part exceeds the mean by less than one unit; fewer parts are unions, so they are no worse."""
    mask = skewed_masks(groups, inputs, kind, seed)
    work = mask.sum(axis=1) + 4  # what a group costs beside its blocks
    with block_op(mask) as op:
        found = [op.balance(1, parts) for parts in PARTS]
    assert found[0] == pytest.approx(1)
    for parts, balance, finer in zip(PARTS, found, [*found[1:], found[-1]], strict=True):
        assert 1 - 1e-9 <= balance <= finer + 1e-9
        assert balance <= 1 + work.max() * 64 / work.sum() + 1e-9
        assert balance * work.sum() / parts >= work.max() - 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_skewed_masks_of_many_groups_are_even_up_to_64_parts(kind: str, seed: int) -> None:
    mask = skewed_masks(1024, 1024, kind, seed)
    work = mask.sum(axis=1) + 4
    with block_op(mask) as op:
        for parts in PARTS:
            if work.max() * parts <= work.sum():  # a group is never cut
                assert op.balance(1, parts) <= 1.05, parts


def test_a_group_heavier_than_a_share_is_a_part_of_its_own() -> None:
    mask = skewed_masks(256, 1024, "even", 0)
    mask[:, 64:] = False
    mask[77] = True
    work = mask.sum(axis=1) + 4
    with block_op(mask) as op:
        assert op.balance(1, 64) == pytest.approx(work.max() * 64 / work.sum())


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


def shuffled(threads: int) -> Executor:
    """Runs tasks one by one in a random order, as if there were that many threads."""
    rng = np.random.default_rng(threads)

    def parallel_for(_context: int, tasks: int, call: Any, argument: int) -> None:
        for task in rng.permutation(tasks):
            call(argument, int(task))

    return Executor(None, threads, PARALLEL_FOR(parallel_for))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("layout", ["unstructured", "2:4", "16x1", "32x1"])
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 130])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, layout: str, rows: int) -> None:
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
    error = ctypes.create_string_buffer(200)
    with NativeMatMul(layout, tensor.shape, tensor.values, tensor.indices, isa=isa) as op:
        expected = op(x)
        np.testing.assert_allclose(expected, x @ (weight * keep).T, rtol=0, atol=1e-3)
        for threads in (2, 3, 7, 16, 64):
            y = np.full_like(expected, np.nan)
            executor = shuffled(threads)
            assert not op._library.sparsecc_matmul_run(
                op._handle, x.ctypes.data, rows, y.ctypes.data, ctypes.byref(executor), error, 200
            ), error.value
            np.testing.assert_array_equal(y, expected)
