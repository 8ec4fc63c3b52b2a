"""Expressions computed by the operator library agree with NumPy's; what it has no kernel for is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecc.algebra import Tensor, einsum, evaluate
from sparsecc.runtime.algebra_backend import NativeBackend

RNG = np.random.default_rng(13)


def sparse(*shape, form="csr", dtype=np.float64):
    array = np.where(RNG.random(shape) < 0.4, RNG.integers(-4, 5, shape), 0).astype(dtype)
    found = np.argwhere(array)
    return Tensor.from_coordinates(found, array[tuple(found.T)], shape, form)


NAMED = [
    ("y(i) = A(i,j) * x(j)", None),
    ("y(i) = 3 * A(i,j) * x(j)", None),
    ("Y(n,i) = A(i,j) * N(j,n)", None),
    ("S(i,j) = A(i,j) * U(i,n) * N(j,n)", "same"),
    ("S(i,j) = A(i,j) * U(i,n) * N(j,n)", None),
    ("S(i,j) = T(i,j,k) * c(k)", "csf"),
    ("S(i,j,n) = T(i,j,k) * M(k,n)", "csf"),
    ("S(i,j) = A(i,j) - 2 * B(i,j) + A(i,j)", "same"),
    ("S(j,i) = A(i,j) * B(i,j)", "csc"),
    ("Y(i,n) = T(i,j,k) * N(j,n) * M(k,n)", None),
    ("a = T(i,j,k) * R(i,j,k)", None),
    ("a = A(i,j) * B(i,j)", None),
    ("Y(i,k) = A(i,j) * D(j,k)", "same"),
    ("Y(i,k) = A(i,j) * D(j,k)", None),
    ("Y(i,k) = C(i,k) * E(i,j) * D(j,k)", "csr"),
    ("S(i,j,k) = T(i,j,k) + R(i,j,k)", "csf"),
    ("S(i,j,k) = T(i,j,k) * R(i,j,k)", "csf"),
]


@pytest.fixture(scope="module")
def backend():
    with NativeBackend() as found:
        yield found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["csr", "dcsr"])
@pytest.mark.parametrize(("text", "result"), NAMED)
def test_the_library_agrees_with_numpy(backend, text, result, form, dtype, monkeypatch):
    operands = {name: sparse(17, 11, form=form, dtype=dtype) for name in "AB"}
    operands |= {name: sparse(17, 11, 5, form="csf", dtype=dtype) for name in "TR"}
    operands |= {"x": np.arange(11, dtype=dtype), "c": np.arange(5, dtype=dtype), "M": np.ones((5, 3), dtype)}
    operands |= {name: RNG.integers(0, 9, (n, 3)).astype(dtype) for name, n in (("N", 11), ("U", 17))}
    operands |= {
        "C": sparse(17, 9, dtype=dtype),
        "D": sparse(11, 9, dtype=dtype),
        "E": sparse(17, 11, dtype=dtype),
    }
    result = form if result == "same" else result
    expected = evaluate(text, operands)
    monkeypatch.setattr("sparsecc.algebra.calls.execute", None)  # NumPy is not asked
    for threads in (1, 2):
        found = einsum(text, operands, format=result, backend=backend, threads=threads)
        values = found.values if isinstance(found, Tensor) else found
        assert values.dtype == dtype
        np.testing.assert_array_equal(
            found.validated().to_dense() if isinstance(found, Tensor) else found, expected
        )


@pytest.mark.parametrize(
    ("text", "forms", "result"),
    [
        ("S(i,j) = A(i,j) + B(i,j)", ("csr", "dcsr"), "csr"),
        ("S(i,j) = A(i,j) + B(i,j) - C(i,j)", ("coo", "csr", "dcsr"), "dcsr"),
        ("S(i,j) = A(i,j) * B(i,j)", ("csr", "coo"), "coo"),
        ("S(j,i) = A(i,j) * B(i,j)", ("dcsr", "csr"), None),
        ("S(j,i) = A(i,j) + B(i,j)", ("dcsr", "csr"), "csr"),
        ("S(i,j) = A(i,j) + B(i,j)", ("dcsr", "dcsr"), "csr"),
        ("a = A(i,j) * B(i,j)", ("csr", "dcsr"), None),
        ("S(i,j,k) = T(i,j,k) + R(i,j,k)", ("csf", "dense,compressed,compressed"), "csf"),
        ("S(i,j,k) = T(i,j,k) * R(i,j,k)", ("dense,dense,compressed", "compressed,dense,compressed"), "coo"),
        ("S(i,j,k) = T(i,j,k) + R(i,j,k)", ("compressed,dense,compressed",) * 2, "dense,dense,compressed"),
    ],
)
def test_operands_of_unlike_levels_are_joined_by_the_library(backend, text, forms, result, monkeypatch):
    shape, names = ((7, 9, 5), "TR") if "T" in text else ((17, 11), "ABC")
    operands = {name: sparse(*shape, form=form) for name, form in zip(names, forms, strict=False)}
    expected = evaluate(text, operands)
    monkeypatch.setattr("sparsecc.algebra.calls.execute", None)  # NumPy is not asked
    for threads in (1, 2):
        found = einsum(text, operands, format=result, backend=backend, threads=threads)
        assert isinstance(found, Tensor) == (result is not None)
        np.testing.assert_array_equal(found.validated().to_dense() if result else found, expected)


@pytest.mark.parametrize(
    "shape", [(9, 8, 7), (5, 7, 3, 4), (4, 1, 5, 3, 2), (3, 2, 4, 2, 3, 2), (2, 0, 3, 2)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tensors_of_any_order_times_factors(backend, shape, dtype, monkeypatch):
    tensor = sparse(*shape, form="csf", dtype=dtype)
    factors = [RNG.integers(-4, 5, (size, 6)).astype(dtype) for size in shape[1:]]
    letters = "abcdef"[: len(shape)]
    text = f"{letters},{','.join(f'{letter}n' for letter in letters[1:])}->{letters[0]}n"
    expected = np.einsum(text, tensor.to_dense(), *factors)
    monkeypatch.setattr("sparsecc.algebra.calls.execute", None)  # NumPy is not asked
    for threads in (1, 2):
        found = einsum(text, tensor, *factors, backend=backend, threads=threads)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


def test_tensors_of_too_many_modes_are_left_to_numpy(backend):
    tensor = sparse(*[2] * 17, form="csf")
    kept = tensor.coordinates()[:40]
    tensor = Tensor.from_coordinates(kept, tensor.values[:40], tensor.shape, "csf")
    assert backend.mttkrp(tensor, *[np.ones((2, 3))] * 16, threads=1) is None


def test_operands_without_a_kernel_are_left_to_numpy(backend):
    a, b = sparse(6, 7), sparse(6, 7, form="dcsr")
    whole = a.astype(np.int64)
    x = np.arange(7.0)
    cube = sparse(3, 4, 5, form="dense,dense,compressed")
    blocks = sparse(6, 7, form="compressed,dense")
    for text, operands, form in (
        ("ij,j->i", {"A": a, "B": x.astype(np.float32)}, None),
        ("ij,j->i", {"A": whole, "B": x.astype(np.int64)}, None),
        ("ij,j->i", {"A": blocks, "B": x}, None),
        ("ij,kj->ki", {"A": b, "B": b}, "csr"),
        ("ijk,jn,kn->in", {"A": cube, "B": np.ones((4, 2)), "C": np.ones((5, 2))}, None),
        ("ij,jk->ik", {"A": a, "B": sparse(7, 6, form="dcsr")}, "csr"),
        ("ik,ij,jk->ik", {"A": b, "B": a, "C": sparse(7, 7)}, "csr"),
        ("ij,ij->ij", {"A": blocks, "B": blocks}, "csr"),
        ("ij,ij->ij", {"A": whole, "B": whole}, "csr"),
    ):
        found = einsum(text, operands, format=form, backend=backend)
        expected = evaluate(text, operands)
        np.testing.assert_array_equal(found if form is None else found.to_dense(), expected)
    assert einsum("ij,j->i", A=whole, B=x.astype(np.int64), backend=backend).dtype == np.int64
