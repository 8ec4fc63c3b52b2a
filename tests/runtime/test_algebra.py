"""Sparse tensor algebra of the library against NumPy in float64: parts, products with dense operands, threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Tensor, Walk, even_targets, read_tensor
from sparsecc.algebra import find_splits as reference_splits
from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime import isas
from sparsecc.runtime.capi_algebra import (
    Level,
    NativeTensor,
    Threads,
    find_splits,
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


@pytest.mark.parametrize("name", ["giant row", "many parts", "many parts dcsr", "empty rows, then full"])
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
