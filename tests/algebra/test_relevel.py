"""Upper levels in other formats: the same tensor over the same entries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsecc.algebra import Compressed, Dense, Tensor
from sparsecc.algebra.relevel import alike, releveled

RNG = np.random.default_rng(7)
UPPER = ("dense", "compressed")


def sparse(shape, form, density=0.2, order=None):
    dense = np.where(RNG.random(shape) < density, RNG.integers(1, 9, shape), 0).astype(np.float32)
    places = np.argwhere(dense)
    return Tensor.from_coordinates(places, dense[tuple(places.T)], shape, form, order), dense


@pytest.mark.parametrize("shape", [(9,), (7, 5), (1, 4), (0, 3), (3, 0), (4, 3, 5), (2, 0, 3), (3, 1, 2, 4)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_every_format_becomes_every_other(shape, density):
    forms = [(*upper, "compressed") for upper in itertools.product(UPPER, repeat=len(shape) - 1)]
    order = tuple(RNG.permutation(len(shape)).tolist())
    for before, after in itertools.product(forms, forms):
        tensor, dense = sparse(shape, ",".join(before), density, order)
        found = releveled(tensor, after)
        assert found.formats == after
        assert found.order == order
        assert found.values is tensor.values
        assert found.levels[-1].crd is tensor.levels[-1].crd
        np.testing.assert_array_equal(found.validated().to_dense(), dense)


def test_types_of_coordinates_are_kept_where_they_fit():
    narrow = (Dense(2), Compressed(1 << 40, np.array([0, 1, 2], np.int32), np.array([5, 7], np.int32)))
    tensor = Tensor((2, 1 << 40), (0, 1), narrow, np.ones(2))
    rows, columns = releveled(tensor, ("compressed", "compressed")).levels
    assert {array.dtype for array in (rows.pos, rows.crd, columns.pos, columns.crd)} == {np.dtype(np.int32)}
    turned = Tensor((1 << 40, 2), (1, 0), narrow, np.ones(2))
    above = Tensor((1, 2, 1 << 40), (0, 1, 2), (Dense(1), *narrow), np.ones(2))
    for found in (releveled(turned, ("compressed",) * 2), releveled(above, ("compressed",) * 3)):
        assert found.validated().levels[-1].crd.dtype == np.int32


def test_what_cannot_be_is_left_alone():
    csr, _ = sparse((5, 4), "csr")
    leaf, _ = sparse((5, 4), "compressed,dense")
    coo, _ = sparse((5, 4), "coo")
    assert releveled(csr, ("dense", "dense")) is None
    assert releveled(csr, ("compressed", "singleton")) is None
    assert releveled(leaf, ("dense", "compressed")) is None
    assert releveled(coo, ("dense", "compressed")) is None
    assert alike([csr, leaf]) == (csr, leaf)
    wide = Tensor.from_coordinates(np.array([[1 << 39, 0]]), np.ones(1), (1 << 40, 4), "csf")
    assert releveled(wide, ("dense", "compressed")) is None
    assert alike([wide, wide], ("dense", "compressed")) == (wide, wide)


def test_tensors_are_made_alike():
    csr, dcsr = sparse((5, 4), "csr")[0], sparse((5, 4), "csf")[0]
    assert alike([csr, csr], ("compressed", "compressed")) == (csr, csr)  # they are already
    assert [item.formats for item in alike([csr, dcsr])] == [("compressed", "compressed")] * 2
    assert [item.formats for item in alike([csr, dcsr], ("dense", "compressed"))] == [
        ("dense", "compressed")
    ] * 2
    assert [item.formats for item in alike([csr, dcsr], ("compressed", "singleton"))] == [
        ("compressed",) * 2
    ] * 2
    dense, _ = sparse((2, 3, 4), "dense,dense,compressed")
    mixed, _ = sparse((2, 3, 4), "dense,compressed,compressed")
    assert [item.formats for item in alike([dense, mixed])] == [("dense", "compressed", "compressed")] * 2
