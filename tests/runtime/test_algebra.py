"""Sparse tensor algebra of the library against NumPy in float64: parts, products with dense operands, threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Compressed, Dense, Tensor, Walk, even_targets, read_tensor
from sparsecc.algebra import find_splits as reference_splits
from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime import isas
from sparsecc.runtime.capi_algebra import (
    Level,
    NativeTensor,
    Threads,
    find_splits,
    native_add,
    native_inner,
    native_matmul,
    native_mttkrp,
    native_multiply,
    native_sddmm,
    native_spmm,
    native_spmv,
)

ISAS = isas()
FORMATS = {
    1: ["dense", "compressed"],
    2: ["csr", "dcsr", "coo", "dense,dense", "compressed,dense"],
    3: ["csf", "coo", "dense,compressed,compressed", "compressed,dense,compressed", "dense,dense,compressed"],
}


def random_tensor(
    rng: np.random.Generator, shape: tuple[int, ...], density: float, form: str, dtype: Any = np.float64
) -> Tensor:
    mask = rng.random(shape) < density
    return Tensor.from_coordinates(
        np.argwhere(mask), rng.standard_normal(int(mask.sum())).astype(dtype), shape, form
    )


def narrow(tensor: Tensor) -> NativeTensor:
    """With 32-bit coordinates."""
    return NativeTensor.of(tensor, np.int32)


def giant(rows: int, columns: int, entries: int, rng: np.random.Generator) -> Tensor:
    """One row has nearly all entries; some rows have none."""
    coordinates = {(rows // 2, int(c)) for c in rng.choice(columns, min(entries, columns), replace=False)}
    coordinates |= {
        (int(r), int(c)) for r, c in zip(rng.integers(0, rows, 20), rng.integers(0, columns, 20), strict=True)
    }
    places = np.array(sorted(coordinates))
    return Tensor.from_coordinates(places, rng.standard_normal(len(places)), (rows, columns), "csr")


def matrices() -> dict[str, Tensor]:
    rng = np.random.default_rng(3)
    return {
        "odd": random_tensor(rng, (37, 53), 0.2, "csr"),
        "one row": random_tensor(rng, (1, 97), 0.5, "csr"),
        "one column": random_tensor(rng, (61, 1), 0.4, "csr"),
        "giant row": giant(21, 9_001, 8_500, rng),
        "all empty": random_tensor(rng, (20, 30), 0.0, "csr"),
        "all empty dcsr": random_tensor(rng, (20, 30), 0.0, "dcsr"),
        "no rows": Tensor.from_coordinates(np.zeros((0, 2), np.int64), np.zeros(0), (0, 7), "csr"),
        "no columns": Tensor.from_coordinates(np.zeros((0, 2), np.int64), np.zeros(0), (7, 0), "csr"),
        "hypersparse": random_tensor(rng, (900, 40), 0.0005, "dcsr"),
        "many parts": random_tensor(rng, (111, 201), 0.9, "csr"),
        "many parts dcsr": random_tensor(rng, (111, 201), 0.9, "dcsr"),
        "short rows": random_tensor(rng, (1_500, 40), 0.2, "csr"),
        "rows around 32": random_tensor(rng, (90, 48), 0.67, "csr"),
        "empty rows, then full": Tensor.from_coordinates(
            np.array([(r, c) for r in range(1_990, 2_000) for c in range(490)]), rng.standard_normal(4_900),
            (2_000, 500), "csr",
        ),
    }  # fmt: skip


MATRICES = matrices()


def close(got: np.ndarray, wanted: np.ndarray, scale: np.ndarray, terms: int) -> None:
    """Within what sums of so many products of this size may be wrong by."""
    assert got.shape == wanted.shape
    eps = float(np.finfo(got.dtype).eps)
    assert (np.abs(got - wanted) <= eps * (terms + 4) * scale + np.finfo(np.float32).tiny).all()


@st.composite
def many_walks(draw: Any) -> list[Walk]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loops = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 6)) for _ in range(loops))
    walks = []
    for _ in range(draw(st.integers(1, 4))):
        form = draw(st.sampled_from(FORMATS[loops]))
        tensor = random_tensor(rng, shape, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), form)
        walks.append(Walk.of(tensor, [draw(st.integers(0, 3)) for _ in range(loops)]))
    if draw(st.booleans()):
        depth = draw(st.integers(0, loops - 1))
        walks.append(Walk(walks[0].levels[:depth], walks[0].costs[:depth]))
    return walks


def same_cuts(walks: list[Walk], targets: np.ndarray, threads: Threads | None = None) -> None:
    expected, paths = reference_splits(walks, targets)
    found, found_paths = find_splits(walks, targets, threads)
    for wanted, got in zip(expected, found, strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(found_paths, paths)


@settings(max_examples=60, deadline=None)
@given(many_walks(), st.sampled_from([1, 2, 3, 7, 16, 64, 1000]))
def test_cuts_are_those_of_the_reference(walks: list[Walk], parts: int) -> None:
    same_cuts(walks, even_targets(sum(walk.work for walk in walks), parts))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("costs", [(1, 1), (0, 1), (3, 2), (5, 0)])
def test_cuts_of_large_and_odd_matrices(name: str, costs: tuple[int, int]) -> None:
    matrix = MATRICES[name]
    walk = Walk.of(matrix, costs)
    with Threads(3) as threads:
        for walks in ([walk], [walk, walk]):
            for parts in (64, 1500):
                same_cuts(walks, even_targets(sum(w.work for w in walks), parts), threads)


@pytest.mark.parametrize("name", ["bcsstk13.mtx", "mbeacxc.mtx", "3D_12031.tns"])
def test_cuts_of_real_tensors(data_dir: Any, name: str) -> None:
    walk = Walk.of(read_tensor(data_dir / "matrices" / name))
    same_cuts([walk], even_targets(walk.work, 64))
    same_cuts([walk, Walk(walk.levels[:1], (2,)), walk], even_targets(2 * walk.work + 2 * walk.nodes[0], 64))


def test_wrong_splits_are_refused() -> None:
    walk = Walk.of(MATRICES["odd"])
    other = Walk.of(MATRICES["one row"])
    for walks, targets, message in (
        ([walk], [-1], "not between"),
        ([walk], [walk.work + 1], "not between"),
        ([walk, other], [0], "different sizes"),
    ):
        with pytest.raises(UsageError, match=message):
            find_splits(walks, np.array(targets))
    assert find_splits([], np.zeros(1, np.int64))[0] == []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_with_dense_operands(isa: str, name: str, dtype: Any) -> None:
    matrix = MATRICES[name].astype(dtype)
    dense, rng = matrix.to_dense().astype(np.float64), np.random.default_rng(0)
    longest = int((dense != 0).sum(1).max(initial=0))
    for tensor in (matrix, narrow(matrix)):
        x = rng.standard_normal(matrix.shape[1]).astype(dtype)
        close(native_spmv(tensor, x, isa=isa), dense @ x, np.abs(dense) @ np.abs(x), longest)
        for columns in (0, 3, 31):
            b = rng.standard_normal((matrix.shape[1], columns)).astype(dtype)
            close(native_spmm(tensor, b, isa=isa), dense @ b, np.abs(dense) @ np.abs(b), longest)
        for inner in (0, 35):
            u, v = (rng.standard_normal((size, inner)).astype(dtype) for size in matrix.shape)
            rows, columns_of = matrix.coordinates().T
            terms = u[rows].astype(np.float64) * v[columns_of] * matrix.values[:, None]
            close(native_sddmm(tensor, u, v, isa=isa), terms.sum(1), np.abs(terms).sum(1), inner + 1)


@pytest.mark.parametrize("columns", [1, 2, 31, 129, 300])
@pytest.mark.parametrize("isa", ISAS)
def test_every_width_of_tiles(isa: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    for dtype in (np.float32, np.float64):
        matrix = random_tensor(rng, (13, 17), 0.5, "csr", dtype)
        b = rng.standard_normal((17, columns)).astype(dtype)
        dense = matrix.to_dense().astype(np.float64)
        close(native_spmm(matrix, b, isa=isa), dense @ b, np.abs(dense) @ np.abs(b), 17)


def test_fibres_of_a_tensor() -> None:
    """TTV and TTM: one result per fibre."""
    rng = np.random.default_rng(5)
    tensor = random_tensor(rng, (6, 7, 11), 0.2, "csf")
    dense, x, b = tensor.to_dense(), rng.standard_normal(11), rng.standard_normal((11, 9))
    entries = tensor.coordinates()
    fibres = np.unique(entries[:, :2], axis=0)
    np.testing.assert_allclose(native_spmv(tensor, x), (dense @ x)[tuple(fibres.T)], atol=1e-12)
    np.testing.assert_allclose(native_spmm(tensor, b), (dense @ b)[tuple(fibres.T)], atol=1e-12)


@pytest.mark.parametrize(
    "name", ["giant row", "many parts", "many parts dcsr", "empty rows, then full", "short rows"]
)
def test_threads_change_no_bit(name: str) -> None:
    matrix = narrow(MATRICES[name].astype(np.float32))
    rng = np.random.default_rng(1)
    columns = MATRICES[name].shape[1]
    x, b = rng.standard_normal(columns), rng.standard_normal((columns, 19))
    u, v = rng.standard_normal((matrix.result_rows, 9)), rng.standard_normal((columns, 9))
    alone = native_spmv(matrix, x), native_spmm(matrix, b), native_sddmm(matrix, u, v)
    for count in (1, 2, 5):
        with Threads(count) as threads:
            for _ in range(3):
                results = (
                    native_spmv(matrix, x, threads=threads),
                    native_spmm(matrix, b, threads=threads),
                    native_sddmm(matrix, u, v, threads=threads),
                )
                for got, wanted in zip(results, alone, strict=True):
                    np.testing.assert_array_equal(got, wanted)


def tensor_of(native: NativeTensor, shape: tuple[int, ...]) -> Tensor:
    """A checked tensor from what a kernel has written."""
    levels = tuple(
        Dense(level.size) if level.pos is None else Compressed(level.size, level.pos, level.crd)
        for level in native.levels
    )
    return Tensor(shape, tuple(range(len(shape))), levels, native.values).validated()


def check_joins(operands: list[Tensor], shape: tuple[int, ...], threads: Threads | None = None) -> None:
    """Values are small integers: sums and products are exact."""
    dense = [operand.to_dense() for operand in operands]
    stored = [np.zeros(shape, bool) for _ in operands]
    for mask, operand in zip(stored, operands, strict=True):
        mask[tuple(operand.coordinates().T)] = True
    for join, wanted, kept in (
        (native_add, np.add.reduce(dense), np.logical_or.reduce(stored)),
        (native_multiply, np.multiply.reduce(dense), np.logical_and.reduce(stored)),
    ):
        result = tensor_of(join(operands, threads=threads), shape)
        np.testing.assert_array_equal(result.to_dense(), wanted)
        np.testing.assert_array_equal(result.coordinates(), np.argwhere(kept))


def with_integers(rng: np.random.Generator, shape: tuple[int, ...], density: float, form: str) -> Tensor:
    tensor = random_tensor(rng, shape, density, form)
    tensor.values[:] = rng.integers(-3, 4, len(tensor.values))
    return tensor


@pytest.mark.parametrize("form", ["compressed", "csr", "dcsr", "csf", "dense,compressed,compressed"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sums_and_products(form: str, count: int) -> None:
    modes = {"compressed": 1, "csr": 2, "dcsr": 2}.get(form, 3)
    for seed in range(12):
        rng = np.random.default_rng([seed, count])
        shape = tuple(int(size) for size in rng.integers(0 if seed == 0 else 1, 20, modes))
        operands = [
            with_integers(rng, shape, float(rng.choice([0.0, 0.05, 0.5, 1.0])), form) for _ in range(count)
        ]
        check_joins(operands, shape)


@pytest.mark.parametrize("form", ["csr", "dcsr", "csf"])
def test_sums_and_products_in_many_parts(form: str) -> None:
    rng = np.random.default_rng(11)
    shape = (40, 50, 60) if form == "csf" else (3, 70_000)
    density = 0.4
    operands = [with_integers(rng, shape, density, form) for _ in range(3)]
    with Threads(3) as threads:
        check_joins(operands[:2], shape, threads)
        check_joins(operands, shape, threads)


def test_operands_of_different_types_and_without_common_rows() -> None:
    rng = np.random.default_rng(2)
    top, bottom = (with_integers(rng, (10, 9), 0.5, "dcsr").to_dense() for _ in range(2))
    top[5:], bottom[:5] = 0, 0
    one, other = (
        Tensor.from_coordinates(np.argwhere(part), part[part != 0], part.shape, "dcsr")
        for part in (top, bottom)
    )
    check_joins([one.astype(np.float32), other], (10, 9))
    mixed = native_add([narrow(one), other])
    assert mixed.index_type == np.int64
    assert not len(native_multiply([one, other]).levels[0].crd)
    for operands, message in (
        ([], "at least one"),
        ([one, MATRICES["all empty dcsr"]], "different shapes"),
        ([one, one.converted("csr")], "different formats"),
        ([one, MATRICES["odd"]], "different"),
        ([random_tensor(rng, (3, 4), 0.5, "compressed,dense")] * 2, "last level must be compressed"),
        ([random_tensor(rng, (3, 4, 2), 0.5, "compressed,dense,compressed")] * 2, "below a compressed one"),
    ):
        with pytest.raises(UsageError, match=message):
            native_add(operands)


@pytest.mark.parametrize("form", ["csr", "dcsr"])
@pytest.mark.parametrize(
    "sizes", [(7, 9, 5), (1, 30, 4000), (3, 400, 3001), (150, 120, 210), (0, 4, 3), (5, 0, 7)]
)
def test_products_of_sparse_matrices(form: str, sizes: tuple[int, int, int]) -> None:
    """Rows are cut inside of products at the larger sizes; what is stored is where there are products."""
    rng = np.random.default_rng(sizes)
    rows, inner, columns = sizes
    with Threads(3) as threads:
        for densities in ((0.05, 0.5), (0.8, 0.6), (0.0, 0.5), (0.3, 0.0)):
            a, b = (
                with_integers(rng, (rows, inner), densities[0], form),
                with_integers(rng, (inner, columns), densities[1], "csr"),
            )
            wanted = a.to_dense() @ b.to_dense()
            kept = _pattern(a) @ _pattern(b) > 0
            mask = with_integers(rng, (rows, columns), 0.3, "csr")
            results = [tensor_of(native_matmul(a, b, threads=lent), wanted.shape) for lent in (None, threads)]
            for result in results:
                np.testing.assert_array_equal(result.to_dense(), wanted)
                np.testing.assert_array_equal(result.coordinates(), np.argwhere(kept))
            if form == "csr":
                masked = tensor_of(native_matmul(a, b, mask, threads=threads), wanted.shape)
                np.testing.assert_array_equal(masked.to_dense(), wanted * mask.to_dense())
                np.testing.assert_array_equal(masked.coordinates(), np.argwhere(kept & (_pattern(mask) > 0)))


def _pattern(tensor: Tensor) -> np.ndarray:
    found = np.zeros(tensor.shape)
    found[tuple(tensor.coordinates().T)] = 1
    return found


def test_threads_change_no_bit_of_a_product_of_matrices() -> None:
    rng = np.random.default_rng(8)
    a = Tensor.from_coordinates(
        np.array([(1, c) for c in range(300)]), rng.standard_normal(300), (3, 300), "csr"
    )
    b = random_tensor(rng, (300, 2_000), 0.5, "csr")
    for dtype in (np.float32, np.float64):
        operands = a.astype(dtype), b.astype(dtype)
        alone = native_matmul(*operands)
        for count in (2, 5):
            with Threads(count) as threads:
                np.testing.assert_array_equal(native_matmul(*operands, threads=threads).values, alone.values)
        dense = a.to_dense() @ b.to_dense()
        np.testing.assert_allclose(
            tensor_of(alone, (3, 2_000)).to_dense(), dense, atol=3e-4 if dtype == np.float32 else 1e-12
        )


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_a_product_that_many_parts_share(rows: int) -> None:
    """Long enough for their sums to be cut by columns; integers, so that every order of adding up gives the same."""
    rng = np.random.default_rng(rows)
    a = with_integers(rng, (rows, 900), 0.9, "csr")
    b = with_integers(rng, (900, 3_000), 0.3, "csr")
    wanted = a.to_dense() @ b.to_dense()
    with Threads(3) as threads:
        found = tensor_of(native_matmul(a, b, threads=threads), wanted.shape)
        np.testing.assert_array_equal(found.validated().to_dense(), wanted)
        mask = with_integers(rng, (rows, 3_000), 0.9, "csr")
        found = tensor_of(native_matmul(a, b, mask, threads=threads), wanted.shape)
        np.testing.assert_array_equal(found.validated().to_dense(), wanted * mask.to_dense())


@pytest.mark.parametrize("gaps", [True, False])
def test_rows_of_a_mask_are_work(gaps: bool) -> None:
    """Cuts fall into the rows of the mask, for which there is hardly a product, or none."""
    rng = np.random.default_rng(1)
    a = with_integers(rng, (40, 60), 0.05, "csr")
    if gaps:
        kept = a.coordinates()[:, 0] % 3 == 0
        a = Tensor.from_coordinates(a.coordinates()[kept], a.values[kept], a.shape, "csr")
    b, mask = with_integers(rng, (60, 30_000), 0.001, "csr"), with_integers(rng, (40, 30_000), 0.4, "csr")
    alone = tensor_of(native_matmul(a, b, mask), mask.shape)
    np.testing.assert_array_equal(alone.validated().to_dense(), a.to_dense() @ b.to_dense() * mask.to_dense())
    with Threads(3) as threads:
        np.testing.assert_array_equal(native_matmul(a, b, mask, threads=threads).values, alone.values)


def test_matrices_that_cannot_be_multiplied() -> None:
    rng = np.random.default_rng(0)
    a, b = random_tensor(rng, (4, 5), 0.5, "csr"), random_tensor(rng, (5, 6), 0.5, "csr")
    for operands, message in (
        ((b, a), "inner sizes"),
        ((a, b.converted("dcsr")), "CSR matrices"),
        ((a.converted("dcsr"), b, random_tensor(rng, (4, 6), 0.5, "csr")), "CSR matrices"),
        ((a, b, a), "mask has another shape"),
    ):
        with pytest.raises(UsageError, match=message):
            native_matmul(*operands)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((6, 9), "csr"),
        ((5, 7, 9), "csf"),
        ((1, 40, 60), "csf"),
        ((30, 1, 50), "dense,compressed,compressed"),
        ((5, 6, 7, 8), "csf"),
        ((9, 3, 2, 4, 3), "csf"),
    ],
)
def test_tensor_times_factors(isa: str, shape: tuple[int, ...], form: str) -> None:
    rng = np.random.default_rng(shape)
    letters = "abcde"[: len(shape)]
    subscripts = f"{letters},{','.join(f'{letter}n' for letter in letters[1:])}->{letters[0]}n"
    with Threads(3) as threads:
        for dtype, density, columns in ((np.float32, 0.3, 16), (np.float64, 0.9, 5), (np.float64, 0.0, 3)):
            tensor = random_tensor(rng, shape, density, form, dtype)
            factors = [rng.standard_normal((size, columns)).astype(dtype) for size in shape[1:]]
            wanted, scale = (
                np.einsum(subscripts, *(array.astype(np.float64) for array in arrays))
                for arrays in ([tensor.to_dense(), *factors], [abs(tensor.to_dense()), *map(np.abs, factors)])
            )
            alone = native_mttkrp(narrow(tensor), factors, isa=isa)
            for result in (alone, native_mttkrp(tensor, factors, isa=isa)):
                close(result, wanted, scale, int(np.prod(shape[1:])))
            np.testing.assert_array_equal(
                native_mttkrp(narrow(tensor), factors, isa=isa, threads=threads), alone
            )


def test_giant_slice_of_a_tensor_is_cut() -> None:
    rng = np.random.default_rng(4)
    entries = np.argwhere(rng.random((3, 60, 70)) < np.array([0.001, 0.9, 0.002])[:, None, None])
    tensor = Tensor.from_coordinates(entries, rng.standard_normal(len(entries)), (3, 60, 70), "csf")
    factors = [rng.standard_normal((size, 33)) for size in (60, 70)]
    wanted = np.einsum("abc,bn,cn->an", tensor.to_dense(), *factors)
    alone = native_mttkrp(tensor, factors)
    np.testing.assert_allclose(alone, wanted, atol=1e-10)
    with Threads(4) as threads:
        np.testing.assert_array_equal(native_mttkrp(tensor, factors, threads=threads), alone)
    for wrong, message in (
        (factors[:1], "1 factors for 3 modes"),
        (factors[::-1], "factor 0 has shape"),
        ([factors[0], factors[1][:, 1:]], "factor 1 has shape"),
    ):
        with pytest.raises(UsageError, match=message):
            native_mttkrp(tensor, wrong)
    with pytest.raises(UsageError, match="must be compressed"):
        native_mttkrp(tensor.converted("dense,dense,compressed"), factors)


def test_inner_products_of_tensors() -> None:
    rng = np.random.default_rng(6)
    tensors = [with_integers(rng, (7, 8, 9), density, "csf") for density in (0.5, 0.2, 0.9)]
    for count in (1, 2, 3):
        dense = np.multiply.reduce([tensor.to_dense() for tensor in tensors[:count]])
        assert native_inner(tensors[:count]) == dense.sum()


def test_busy_time_is_of_every_thread_and_starts_again() -> None:
    matrix, b = MATRICES["many parts"], np.ones((201, 400))
    with Threads(2) as threads:
        for _ in range(20):
            native_spmm(matrix, b, threads=threads)
        busy = threads.busy()
        assert busy.shape == (2,)
        assert busy[0] > 0
        np.testing.assert_array_equal(threads.busy(), 0)


def test_wrong_operands_are_refused() -> None:
    matrix = MATRICES["odd"]
    with pytest.raises(UsageError, match=r"x has shape \(5,\), expected \(53\)"):
        native_spmv(matrix, np.ones(5))
    with pytest.raises(UsageError, match=r"expected \(53, any\)"):
        native_spmm(matrix, np.ones((37, 2)))
    with pytest.raises(UsageError, match="v has shape"):
        native_sddmm(matrix, np.ones((37, 2)), np.ones((53, 3)))
    with pytest.raises(UsageError, match="last level of the tensor must be compressed"):
        native_spmv(random_tensor(np.random.default_rng(0), (3, 4), 0.5, "dense"), np.ones(4))
    with pytest.raises(UsageError, match="isa is"):
        native_spmv(matrix, np.ones(53), isa="avx1024")
    with pytest.raises(UsageError, match="threads must be"):
        Threads(0)
    with pytest.raises(ModelError, match="unique coordinates"):
        native_spmv(matrix.converted("coo"), np.ones(53))


@pytest.mark.parametrize(
    ("pos", "crd", "message"),
    [
        ([0, 1], [0], "one position more"),
        ([0, 1, 3], [0, 1], "last position"),
        ([1, 1, 2], [0, 1], "do not begin at 0"),
        ([0, 3, 2], [0, 1], "do not rise"),
        ([0, -1, 2], [0, 1], "do not rise"),
        ([0, 2, 2], [1, 0], "coordinate 0 is out of range, unsorted"),
        ([0, 2, 2], [1, 1], "there twice"),
        ([0, 2, 2], [0, 4], "coordinate 4 is out of range"),
        ([0, 2, 2], [-1, 3], "coordinate -1"),
    ],
)
def test_malformed_tensors_are_refused(pos: list[int], crd: list[int], message: str) -> None:
    levels = (Level(2), Level(4, np.array(pos), np.array(crd)))
    with pytest.raises(ModelError, match=message):
        NativeTensor(levels, np.ones(len(crd)))
    with pytest.raises(ModelError, match="one value for each"):
        NativeTensor((Level(2), Level(4, np.array([0, 1, 2]), np.array([0, 1]))), np.ones(3))
