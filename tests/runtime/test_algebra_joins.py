"""Sums and element-wise products of sparse tensors on every instruction set, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

from sparsecc.algebra import Tensor
from sparsecc.runtime import isas
from sparsecc.runtime.capi_algebra import Level, NativeTensor, Threads, native_add, native_multiply

pytestmark = pytest.mark.parametrize("isa", isas())
Csr = scipy.sparse.csr_array


@pytest.fixture(autouse=True)
def _instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSECC_ISA", isa)


def random_csr(rng: np.random.Generator, lengths: Any, columns: int, dtype: Any) -> Csr:
    """Rows of these lengths with random values."""
    lengths = np.minimum(lengths, columns)
    indices = [np.sort(rng.choice(columns, int(length), replace=False)) for length in lengths]
    positions = np.concatenate([[0], np.cumsum(lengths)])
    values = rng.standard_normal(int(positions[-1])).astype(dtype)
    return Csr(
        (values, np.concatenate([*indices, np.zeros(0, np.int64)]), positions), (len(lengths), columns)
    )


def matrices(rng: np.random.Generator, count: int, dtype: Any) -> dict[str, list[Csr]]:
    """Operands by what is special about them."""

    def several(lengths: Any, columns: int) -> list[Csr]:
        return [random_csr(rng, lengths(), columns, dtype) for _ in range(count)]

    giant = several(lambda: np.where(np.arange(19) == 7, 9_000, rng.integers(0, 4, 19)), 16_001)
    one = random_csr(rng, rng.integers(0, 40, 61), 97, dtype)
    apart = random_csr(rng, np.full(23, 300), 1_200, dtype).tocoo()
    return {
        "short rows": several(lambda: rng.integers(0, 23, 701), 1_009),
        "rows of one": several(lambda: np.ones(97, int), 3),
        "full": several(lambda: np.full(31, 33), 33),
        "empty rows, then full": several(lambda: np.where(np.arange(600) < 590, 0, 211), 223),
        "all empty": several(lambda: np.zeros(13, int), 5),
        "no columns": several(lambda: np.zeros(13, int), 0),
        "no rows": several(lambda: np.zeros(0, int), 7),
        "giant row": giant,
        "giant row in one": [giant[0], *several(lambda: rng.integers(0, 4, 19), 16_001)][:count],
        "identical": [one] * count,
        "disjoint": [
            Csr((apart.data[kept], (apart.row[kept], apart.col[kept])), apart.shape)
            for kept in (apart.col % count == t for t in range(count))
        ],
    }


def native(matrix: Csr, index: Any) -> NativeTensor:
    return NativeTensor(
        [Level(matrix.shape[0]), Level(matrix.shape[1], matrix.indptr, matrix.indices)],
        matrix.data,
        index_type=index,
    )


def reference(operands: list[Csr], name: str) -> Csr:
    """From left to right in the type of the values; what an operand lacks is zero; entries that are zero stay."""
    stored = [Csr((np.ones(m.nnz), m.indices, m.indptr), m.shape).toarray() > 0 for m in operands]
    dense = [matrix.toarray() for matrix in operands]
    kept, values = stored[0], dense[0]
    for more, other in zip(stored[1:], dense[1:], strict=True):
        kept, values = (kept | more, values + other) if name == "add" else (kept & more, values * other)
    positions = np.concatenate([[0], np.cumsum(kept.sum(1))])
    return Csr((values[kept], np.nonzero(kept)[1], positions), kept.shape)


def same(got: NativeTensor, wanted: Csr) -> None:
    np.testing.assert_array_equal(got.levels[1].pos, wanted.indptr)
    np.testing.assert_array_equal(got.levels[1].crd, wanted.indices)
    np.testing.assert_array_equal(got.values.view(np.uint8), wanted.data.view(np.uint8))


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_kind_of_rows(count: int, dtype: Any, index: Any) -> None:
    with Threads(2) as threads:
        for operands in matrices(np.random.default_rng(count), count, dtype).values():
            own = [native(matrix, index) for matrix in operands]
            for name, join in (("add", native_add), ("multiply", native_multiply)):
                wanted = reference(operands, name)
                same(join(own), wanted)
                same(join(own, threads=threads), wanted)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 2047, 2048, 2049, 4096])
def test_lists_about_as_long_as_registers_and_pieces(length: int) -> None:
    rng = np.random.default_rng(length)
    for columns in (length, 2 * length):
        for other in (0, 1, 16, length - 1, length):
            operands = [random_csr(rng, [n], columns, np.float32) for n in (length, other, length)]
            for count in (2, 3):
                for name, join in (("add", native_add), ("multiply", native_multiply)):
                    same(
                        join([native(m, np.int32) for m in operands[:count]]),
                        reference(operands[:count], name),
                    )


def test_more_operands_than_a_piece_has_coordinates() -> None:
    rng = np.random.default_rng(9)
    several = [random_csr(rng, [3, 1, 2], 17, np.float64) for _ in range(10)]
    values = sum((matrix.toarray() for matrix in several * 450), np.zeros((3, 17)))
    kept = np.logical_or.reduce([matrix.toarray() != 0 for matrix in several])
    own = [native(matrix, np.int32) for matrix in several] * 450
    np.testing.assert_array_equal(native_add(own).values, values[kept])
    assert not len(native_multiply(own).values)


@pytest.mark.parametrize("columns", [2**30, 2**31 - 1, 2**31 + 5, 2**63 - 1])
def test_coordinates_of_very_wide_modes(columns: int) -> None:
    """Keys hold 30 bits of a coordinate."""
    rng = np.random.default_rng(3)
    index = np.int32 if columns < 2**31 else np.int64
    operands = []
    for _ in range(2):
        near = np.arange(100) * 3 + rng.integers(0, 3, 100)
        rows = [
            np.unique(np.concatenate([near, columns - 1 - near, rng.integers(0, columns, size)]))
            for size in (0, 50, 9_000)
        ]
        positions = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        operands.append((positions, np.concatenate(rows), rng.standard_normal(int(positions[-1]))))
    own = [
        NativeTensor([Level(3), Level(columns, pos, crd)], values, index_type=index)
        for pos, crd, values in operands
    ]
    for join, together in ((native_add, np.union1d), (native_multiply, np.intersect1d)):
        got = join(own)
        for row in range(3):
            found = [
                dict(zip(crd[pos[row] : pos[row + 1]].tolist(), values[pos[row] : pos[row + 1]], strict=True))
                for pos, crd, values in operands
            ]
            wanted = together(*(np.array(sorted(entries)) for entries in found))
            mine = slice(got.levels[1].pos[row], got.levels[1].pos[row + 1])
            np.testing.assert_array_equal(got.levels[1].crd[mine], wanted)
            values = [[entries.get(int(c), 0.0) for c in wanted] for entries in found]
            expected = np.add(*values) if join is native_add else np.multiply(*values)
            np.testing.assert_array_equal(got.values[mine], expected)


def test_zeros_and_numbers_that_are_none() -> None:
    """A negative zero and nothing are zero, as in a dense sum."""
    a = Csr((np.array([-0.0, np.nan, np.inf, 1.0], np.float32), [0, 1, 2, 5], [0, 4]), (1, 40))
    b = Csr((np.array([2.0, -np.inf, -1.0, -0.0], np.float32), [1, 2, 5, 39], [0, 4]), (1, 40))
    with np.errstate(invalid="ignore"):
        for name, join in (("add", native_add), ("multiply", native_multiply)):
            for operands in ([a, b], [b, a]):
                wanted, got = reference(operands, name), join([native(m, np.int32) for m in operands])
                np.testing.assert_array_equal(got.values, wanted.data)
                np.testing.assert_array_equal(np.signbit(got.values), np.signbit(wanted.data))


def test_fibres_that_do_not_follow_each_other() -> None:
    """Below an intersection of rows, and of slices of a tensor."""
    rng = np.random.default_rng(5)
    for shape, form in (((300, 90), "dcsr"), ((20, 30, 40), "csf")):
        dense = []
        for _ in range(3):
            kept = (rng.random(shape) < 0.4) & (rng.random(shape[:1]) < 0.7).reshape(
                -1, *[1] * (len(shape) - 1)
            )
            dense.append(np.where(kept, rng.integers(1, 9, shape), 0).astype(np.float64))
        operands = [Tensor.from_coordinates(np.argwhere(d), d[d != 0], shape, form) for d in dense]
        with Threads(2) as threads:
            for join, wanted in ((native_add, sum(dense)), (native_multiply, np.multiply.reduce(dense))):
                for lent in (None, threads):
                    got = join(operands, threads=lent)
                    np.testing.assert_array_equal(got.values, wanted[wanted != 0])
                    np.testing.assert_array_equal(got.levels[-1].crd, np.nonzero(wanted)[-1])
