"""The way in: operands of any kind, calls that a backend takes, errors."""

from __future__ import annotations

import doctest
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

from sparsecc.algebra import Tensor, einsum, evaluate, parse
from sparsecc.algebra.nest import nests
from sparsecc.algebra.patterns import KERNELS, signature
from sparsecc.errors import ModelError, SpecError

RNG = np.random.default_rng(9)


def sparse(*shape, form="csr"):
    array = np.where(RNG.random(shape) < 0.4, RNG.integers(-4, 5, shape), 0).astype(float)
    found = np.argwhere(array)
    return Tensor.from_coordinates(found, array[tuple(found.T)], shape, form)


OPERANDS = {
    "A": sparse(6, 7), "B": sparse(6, 7), "D": sparse(7, 5), "C": sparse(6, 5), "T": sparse(6, 7, 5, form="csf"),
    "R": sparse(6, 7, 5, form="csf"), "x": np.arange(7.0), "c": np.arange(5.0), "N": RNG.integers(0, 9, (7, 3)) * 1.0,
    "M": RNG.integers(0, 9, (5, 3)) * 1.0, "U": RNG.integers(0, 9, (6, 3)) * 1.0, "two": 2.0,
    "F": sparse(6, 7, 5, 4, form="csf"), "L": RNG.integers(0, 9, (4, 3)) * 1.0,
}  # fmt: skip

# Expression, format of the result, the kernel that is asked for, its operands.
NAMED = [
    ("y(i) = A(i,j) * x(j)", None, "spmv", "A x"),
    ("y(i) = 3 * x(j) * A(i,j)", None, "spmv", "A x"),
    ("Y(i,n) = A(i,j) * N(j,n)", None, "spmm", "A N"),
    ("Y(n,i) = A(i,j) * N(j,n)", None, "spmm", "A N"),
    ("S(i,j) = A(i,j) * N(j,n) * U(i,n)", "csr", "sddmm", "A U N"),
    ("S(i,j) = A(i,j) + B(i,j)", "csr", "add", "A B"),
    ("S(i,j) = A(i,j) - 2 * B(i,j) + A(i,j)", "csr", "add", "A -2B A"),
    ("S(j,i) = A(i,j) * B(i,j)", "csc", "multiply", "A B"),
    ("Y(i,k) = A(i,j) * D(j,k)", "csr", "spgemm", "A D"),
    ("Y(i,k) = D(j,k) * A(i,j)", None, "spgemm", "A D"),
    ("Y(i,k) = C(i,k) * A(i,j) * D(j,k)", "csr", "masked_spgemm", "C A D"),
    ("Y(i,n) = T(i,j,k) * N(j,n) * M(k,n)", None, "mttkrp", "T N M"),
    ("Y(i,n) = L(l,n) * 2 * F(i,j,k,l) * M(k,n) * N(j,n)", None, "mttkrp", "F N M L"),
    ("S(i,j) = T(i,j,k) * c(k)", "csf", "ttv", "T c"),
    ("S(i,j,n) = T(i,j,k) * M(k,n)", "csf", "ttm", "T M"),
    ("a = T(i,j,k) * R(i,j,k) * T(i,j,k)", None, "inner", "T R T"),
]


class Backend:
    """Computes by the reference what it is asked for, by names in the order of ``KERNELS``."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        if name not in {*KERNELS, "add", "multiply", "inner"}:
            raise AttributeError(name)
        return lambda *operands, threads: self.run(name, operands, threads)

    def run(self, name, operands, threads):
        if name in KERNELS:
            tensors, arrays, out = signature(name, len(operands[0].shape))
            subscripts, form = f"{','.join((*tensors, *arrays))}->{out}", "csf"
        else:
            operands = operands[0]
            letters = "abc"[: len(operands[0].shape)]
            subscripts, form = f"{','.join([letters] * len(operands))}->{letters}", "csf"
            if name == "inner":
                subscripts = subscripts.split("->")[0] + "->"
        self.asked.append((name, operands, threads))
        names = [f"t{at}" for at in range(len(operands))]
        expression = parse(subscripts, names)
        if name == "add":
            terms = " + ".join(f"{one}({','.join(letters)})" for one in names)
            expression = parse(f"out({','.join(letters)}) = {terms}")
        dense = name in ("spmv", "spmm", "mttkrp", "inner")
        # tensors as the kernel walks them: modes in the order of the levels
        modes = [
            Tensor(tuple(item.shape[m] for m in item.order), tuple(range(len(item.order))), item.levels, item.values)
            if isinstance(item, Tensor) else item
            for item in operands
        ]  # fmt: skip
        return evaluate(expression, dict(zip(names, modes, strict=True)), None if dense else form)


@pytest.mark.parametrize(("text", "form", "kernel", "operands"), NAMED)
def test_known_expressions_are_handed_over(text, form, kernel, operands):
    backend = Backend()
    found = einsum(text, OPERANDS, format=form, backend=backend, threads=2)
    assert isinstance(found, Tensor) == (form is not None)
    expected = evaluate(text, OPERANDS)
    np.testing.assert_array_equal(found if form is None else found.validated().to_dense(), expected)
    if form is not None:
        assert found.formats == sparse(*found.shape, form=form).formats
    ((name, given, threads),) = backend.asked
    assert (name, threads) == (kernel, 2)
    for item, wanted in zip(given, operands.split(), strict=True):
        own = OPERANDS[wanted[-1]]
        factor = float(wanted[:-1] or 1)
        if isinstance(own, Tensor):
            np.testing.assert_array_equal(item.values, own.values * factor)
        else:
            np.testing.assert_array_equal(item, own)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("y(i) = A(i,j) * x(j) * x(j)", None),
        ("y(i) = two() * A(i,j) * x(j)", None),
        ("y(i) = A(i,j) * x(j) + B(i,j) * x(j)", None),
        ("y(i) = A(i,j) * x(j)", "compressed"),
        ("y(j) = A(i,j)", None),
        ("S(i,j) = A(i,j) + N(j,n) * U(i,n)", None),
        ("S(i,j) = (A(i,j) + B(i,j)) * A(i,j)", "csr"),
        ("a = A(i,j) + B(i,j)", None),
    ],
)
def test_all_others_are_computed_by_numpy(text, form):
    backend = Backend()
    found = einsum(text, OPERANDS, format=form, backend=backend)
    assert backend.asked == []
    np.testing.assert_array_equal(found if form is None else found.to_dense(), evaluate(text, ARRAYS))


ARRAYS = {name: np.asarray(item) if name == "two" else item for name, item in OPERANDS.items()}


def test_what_a_backend_leaves_is_computed_by_numpy():
    expected = evaluate("y(i) = A(i,j) * x(j)", OPERANDS)
    for backend in (SimpleNamespace(), SimpleNamespace(spmv=lambda a, x, threads: None)):
        np.testing.assert_array_equal(einsum("y(i) = A(i,j) * x(j)", OPERANDS, backend=backend), expected)


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_scipy_lists_and_numbers_are_taken(form):
    dense = OPERANDS["A"].to_dense()
    matrix = scipy.sparse.csr_array(dense).asformat(form)
    np.testing.assert_array_equal(
        einsum("y(i) = s() * A(i,j) * x(j)", A=matrix, x=list(range(7)), s=2), 2 * dense @ np.arange(7)
    )
    mask = scipy.sparse.csr_array(dense != 0).asformat(form)
    np.testing.assert_array_equal(einsum("y(i) = A(i,j)", A=mask), (dense != 0).sum(1))
    both = einsum("S(i,j) = A(i,j) + B(i,j)", A=matrix, B=OPERANDS["B"], format="csr")
    np.testing.assert_array_equal(both.to_dense(), dense + OPERANDS["B"].to_dense())


def test_levels_that_do_not_suit_are_stored_anew():
    left, right = OPERANDS["A"], OPERANDS["D"].converted("csc")
    assert nests("ij,jk->ik", {"A": "csr"})
    found = einsum("ij,jk->ik", A=left, B=right, format="dcsr")
    np.testing.assert_array_equal(found.to_dense(), left.to_dense() @ right.to_dense())


@pytest.mark.parametrize("threads", [1, 3])
def test_results_are_the_same_bits_for_any_number_of_threads(threads):
    array = RNG.random((300, 300)) * (RNG.random((300, 300)) < 0.3)
    matrix = scipy.sparse.csr_array(array)
    for text, form in (("ij,j->i", None), ("ji,j->i", None), ("ij,jk->ik", "csr")):
        operands = {"A": matrix, "B": matrix if form else np.ones(300)}
        found = [einsum(text, operands, format=form, parts=16, threads=count) for count in (1, threads)]
        bits = [item if form is None else item.values for item in found]
        assert bits[0].tobytes() == bits[1].tobytes()


def test_errors():
    with pytest.raises(SpecError, match="operand x has values of type object: convert them to numbers"):
        einsum("y(i) = A(i,j) * x(j)", A=OPERANDS["A"], x=np.array([None] * 7))
    with pytest.raises(SpecError, match="no operand x"):
        einsum("y(i) = A(i,j) * x(j)", A=OPERANDS["A"])
    matrix = scipy.sparse.csr_array((np.ones(2), [3, 1], [0, 2]), shape=(1, 4))
    with pytest.raises(ModelError, match="coordinate 1 is unsorted"):
        einsum("y(i) = A(i,j)", A=matrix)
    huge = Tensor.from_coordinates(np.array([[5, 5]]), np.ones(1), (10**6, 10**6), "dcsr")
    with pytest.raises(SpecError, match="a dense result has 1000000000000 values: ask for a sparse one"):
        einsum("S(i,j) = A(i,j) + A(i,j)", A=huge)
    assert einsum("S(i,j) = A(i,j) + A(i,j)", A=huge, format="dcsr").values == [2]
    with pytest.raises(SpecError, match="parts must be 1 or more"):
        einsum("y(i) = A(i,j)", A=huge, parts=0)


@pytest.mark.parametrize("module", ["nest", "work", "calls"])
def test_examples_in_the_documentation(module):
    found = doctest.testmod(importlib.import_module(f"sparsecc.algebra.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_operands_go_by_their_place_or_by_name():
    matrix, x = OPERANDS["A"], OPERANDS["x"]
    wanted = matrix.to_dense() @ x
    for call in (("ij,j->i", matrix, x), ("y(i) = A(i,j) * x(j)", {"A": matrix, "x": x})):
        np.testing.assert_array_equal(einsum(*call), wanted)
    np.testing.assert_array_equal(einsum("y(i) = x(j) * A(i,j)", x, A=matrix), wanted)
    with pytest.raises(SpecError, match="1 operands for 2 names: A, B"):
        einsum("ij,j->i", matrix)
