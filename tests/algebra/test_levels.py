"""Tensors in every format: what goes in comes out, and what is wrong is refused with the reason."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Compressed, Dense, Singleton, Tensor, einsum, format_levels
from sparsecc.errors import ModelError, SpecError

RNG = np.random.default_rng(11)


def random_dense(rng, shape, density=0.4):
    return np.where(rng.random(shape) < density, rng.integers(1, 100, shape), 0).astype(np.float64)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_format_and_order_holds_the_tensor(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    modes = data.draw(st.integers(1, 4))
    shape = tuple(data.draw(st.integers(0, 5)) for _ in range(modes))
    dense = random_dense(rng, shape, data.draw(st.sampled_from([0.0, 0.2, 1.0])))
    entries = rng.permutation(np.argwhere(dense))
    order = data.draw(st.permutations(range(modes)))
    names = [",".join(form) for form in itertools.product(("dense", "compressed"), repeat=modes)]
    form = data.draw(st.sampled_from([*names, "coo", "csf"]))
    tensor = Tensor.from_coordinates(entries, dense[tuple(entries.T)], shape, form, order).validated()
    assert tensor.formats == format_levels(form, modes)
    np.testing.assert_array_equal(tensor.to_dense(), dense)
    np.testing.assert_array_equal(tensor.tree().validated().to_dense(), dense)
    np.testing.assert_array_equal(tensor.converted(data.draw(st.sampled_from(names))).to_dense(), dense)
    assert tensor.nodes[-1] == len(tensor.values)


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
@pytest.mark.parametrize("make", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_scipy_arrays_are_taken_over(form, make):
    dense = random_dense(RNG, (6, 9)).astype(np.float32)
    matrix = make(dense).asformat(form)
    tensor = Tensor.from_scipy(matrix)
    np.testing.assert_array_equal(tensor.to_dense(), dense)
    if form != "coo":
        assert tensor.levels[1].crd is matrix.indices
        assert tensor.levels[1].pos is matrix.indptr
        assert tensor.values is matrix.data
    back = tensor.to_scipy()
    assert back.format == form
    np.testing.assert_array_equal(back.toarray(), dense)
    np.testing.assert_array_equal(tensor.converted("compressed,compressed").to_scipy().toarray(), dense)
    with pytest.raises(SpecError, match="convert it with"):
        Tensor.from_scipy(matrix.asformat("lil"))


def test_only_matrices_go_to_scipy():
    with pytest.raises(SpecError, match="this tensor has 3 modes"):
        Tensor.from_coordinates(np.zeros((1, 3), int), np.ones(1), (2, 2, 2), "csf").to_scipy()


def test_repeated_entries_are_refused_or_added_up():
    entries = np.array([[1, 2], [0, 3], [1, 2]])
    with pytest.raises(ModelError, match=r"coordinate \(1, 2\) is there twice; sort the entries"):
        Tensor.from_coordinates(entries, np.ones(3), (2, 4))
    with pytest.raises(ModelError, match=r"coordinate \(1, 2\) is there twice"):
        Tensor.from_coordinates(entries, np.ones(3), (2, 4), order=(1, 0))
    tensor = Tensor.from_coordinates(entries, np.array([1.0, 5.0, 2.0]), (2, 4), "csr", sum_duplicates=True)
    assert tensor.to_dense().tolist() == [[0, 0, 0, 5], [0, 0, 3, 0]]


def test_added_entries_keep_their_type():
    for dtype in (np.int32, np.uint8, np.float32):
        tensor = Tensor.from_coordinates(
            np.array([[1], [1], [0]]), np.ones(3, dtype), (2,), sum_duplicates=True
        )
        assert tensor.values.dtype == dtype
        assert tensor.values.tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(6, 8), (0, 4), (4, 0)])
def test_blocks_are_those_of_scipy(shape):
    dense = np.where(RNG.random(shape) < 0.2, RNG.integers(1, 9, shape), 0).astype(np.float32)
    theirs = scipy.sparse.bsr_array(dense, blocksize=(2, 4))
    tensor = Tensor.from_scipy(theirs)
    assert tensor.formats == ("dense", "compressed", "dense", "dense")
    assert tensor.shape == (shape[0] // 2, shape[1] // 4, 2, 4)
    np.testing.assert_array_equal(tensor.to_dense().transpose(0, 2, 1, 3).reshape(shape), dense)
    again = tensor.to_scipy()
    assert again.format == "bsr"
    np.testing.assert_array_equal(again.toarray(), dense)
    if dense.any():
        assert np.shares_memory(again.data, theirs.data)
        x = RNG.random((shape[1] // 4, 4))
        y = einsum("y(i,p) = A(i,j,p,q) * x(j,q)", A=theirs, x=x)
        np.testing.assert_allclose(y.reshape(-1), dense @ x.reshape(-1))


def csr(pos, crd, size=4, values=None):
    crd = np.array(crd)
    count = len(crd) if values is None else values
    return Tensor(
        (len(pos) - 1, size),
        (0, 1),
        (Dense(len(pos) - 1), Compressed(size, np.array(pos), crd)),
        np.ones(count),
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (csr([0, 2, 3], [1, 0, 2]), "level 1: coordinate 0 is unsorted"),
        (csr([0, 2, 3], [1, 1, 2]), "level 1: coordinate 1 is there twice"),
        (csr([0, 2, 3], [1, 4, 2]), "level 1: coordinate 4 is outside of 0..3"),
        (csr([0, 2, 3], [-1, 3, 2]), "level 1: coordinate -1 is outside of 0..3"),
        (csr([0, 4, 3], [1, 2, 3]), "level 1: positions must rise from 0 to 3"),
        (csr([0, 2, 2], [1, 2, 3]), "level 1: positions must rise from 0 to 3"),
        (csr([1, 2, 3], [1, 2, 3]), "level 1: positions must rise from 0 to 3"),
        (csr([0, 2, 3], [1, 2, 3], values=2), "2 values for 3 stored coordinates"),
        (
            Tensor((3, 4), (0, 1), (Dense(3), Compressed(4, np.array([0, 1]), np.array([1]))), np.ones(1)),
            "level 1 has 2 positions for 3 nodes above",
        ),
        # Differences of these wrap around.
        (
            csr(np.array([0, 2**31 - 1, -(2**31), -1, 2], np.int32), [1, 2]),
            "level 1: positions must rise from 0 to 2",
        ),
        (csr([0, 2], np.array([2, 1], np.uint64)), "level 1: coordinate 1 is unsorted"),
        (csr([0, 2], [0.5, 1.5]), "level 1: crd must be a list of integers"),
        (csr([0.0, 2.0], [0, 1]), "level 1: pos must be a list of integers"),
    ],
)
def test_wrong_levels_are_refused(tensor, message):
    with pytest.raises(ModelError, match=message):
        tensor.validated()


def coo(rows, columns):
    pos = np.array([0, len(rows)])
    levels = (Compressed(4, pos, np.array(rows), unique=False), Singleton(4, np.array(columns)))
    return Tensor((4, 4), (0, 1), levels, np.ones(len(rows)))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (coo([0, 0, 1], [2, 1, 0]), r"coordinate \(0, 1\) is unsorted"),
        (coo([0, 0, 1], [1, 1, 0]), r"coordinate \(0, 1\) is there twice"),
        (coo([1, 0], [1, 1]), "level 0: coordinate 0 is unsorted"),
        (coo([0, 1], [1, 5]), "level 1: coordinate 5 is outside"),
        (coo([0, 1], [1]), "level 1 has 1 coordinates for 2 entries"),
    ],
)
def test_wrong_entries_are_refused(tensor, message):
    with pytest.raises(ModelError, match=message):
        tensor.validated()


def test_coo_shares_its_values_with_its_tree():
    tensor = coo([0, 0, 2], [1, 3, 0]).validated()
    tree = tensor.tree()
    assert tree.formats == ("compressed", "compressed")
    assert tree.levels[0].crd.tolist() == [0, 2]
    assert tree.values is tensor.values
    assert tree.tree() is tree


@pytest.mark.parametrize(
    ("form", "modes", "message"),
    [
        ("cst", 2, "unknown format 'cst'"),
        ("csr", 3, "format csr has 2 levels; the tensor has 3 modes"),
        ("singleton,dense", 2, "singleton levels follow one compressed level"),
        ("compressed,dense,singleton", 3, "singleton levels follow"),
    ],
)
def test_wrong_formats_are_refused(form, modes, message):
    with pytest.raises(SpecError, match=message):
        format_levels(form, modes)


@pytest.mark.parametrize(
    ("entries", "values", "shape", "error"),
    [
        (np.zeros((2, 3), int), np.ones(2), (4, 4), r"must be integers \[entries, 2\]"),
        (np.zeros((2, 2)), np.ones(2), (4, 4), "must be integers"),
        (np.zeros((2, 2), int), np.ones(3), (4, 4), r"\(3,\) values for 2 coordinates"),
        (np.array([[0, 4]]), np.ones(1), (4, 4), "mode 1: coordinate 4 is outside"),
        (np.array([[0, 0]]), np.ones(1), (1 << 40, 1 << 20), None),
    ],
)
def test_wrong_entries_to_pack_are_refused(entries, values, shape, error):
    if error is None:
        with pytest.raises(ModelError, match="choose compressed ones"):
            Tensor.from_coordinates(entries, values, shape, "dense")
        return
    with pytest.raises(ModelError, match=error):
        Tensor.from_coordinates(entries, values, shape)
    with pytest.raises(SpecError, match="no permutation"):
        Tensor.from_coordinates(np.zeros((0, 2), int), np.ones(0), (4, 4), order=(0, 0))
