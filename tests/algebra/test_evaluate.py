"""Expressions against NumPy's einsum and plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Tensor, einsum, evaluate, parse
from sparsecc.algebra.notation import Access, Number, Product, Sum, indices_of
from sparsecc.errors import SpecError

SIZES = {"i": 4, "j": 5, "k": 3, "l": 2}
FORMATS = {
    1: ["compressed", "dense"],
    2: ["csr", "dcsr", "coo", "csc"],
    3: ["csf", "coo", "dense,compressed,dense"],
}


def plain_loops(assignment, arrays):
    """The value by its definition: each index is summed over in the smallest term that holds all its uses."""

    def value(expression, place):
        if isinstance(expression, Number):
            return expression.value
        if isinstance(expression, Sum):
            return sum(value(term, place) for term in expression.terms)
        parts = expression.factors if isinstance(expression, Product) else (expression,)
        used = [index for part in parts for index in indices_of(part)]
        direct = {index for part in parts if isinstance(part, Access) for index in part.indices}
        own = [i for i in dict.fromkeys(used) if i not in place and (i in direct or used.count(i) > 1)]
        total = 0.0
        for chosen in itertools.product(*(range(SIZES[index]) for index in own)):
            here = {**place, **dict(zip(own, chosen, strict=True))}
            if isinstance(expression, Access):
                total += arrays[expression.name][tuple(here[index] for index in expression.indices)]
            else:
                factor = 1.0
                for part in expression.factors:
                    factor *= value(part, here)
                total += factor
        return total

    out = np.zeros([SIZES[index] for index in assignment.output.indices])
    for place in np.ndindex(out.shape):
        out[place] = value(assignment.value, dict(zip(assignment.output.indices, place, strict=True)))
    return out


EXPRESSIONS = [
    "y(i) = A(i,j) * x(j)",
    "y(j) = A(i,j) * x(i)",
    "Y(i,k) = A(i,j) * B(j,k)",
    "Y(k,i) = A(i,j) * B(j,k)",
    "S(i,j) = A(i,j) * U(i,k) * V(k,j)",
    "S(i,j) = A(i,j) + B(i,j) + C(i,j)",
    "S(i,j) = A(i,j) - 2 * B(i,j)",
    "S(i,j) = -A(i,j) * B(i,j) * C(i,j)",
    "S(i,j) = (A(i,j) + B(i,j)) * C(i,j)",
    "S(i,j) = A(i,j) * B(i,j) + C(i,j) * D(i,j)",
    "S(i,j) = C(i,j) * A(i,k) * B(k,j)",
    "M(i,j) = T(i,k,l) * C(k,j) * D(l,j)",
    "S(i,j) = T(i,j,k) * c(k)",
    "Y(i,j,l) = T(i,j,k) * C(k,l)",
    "a() = T(i,j,k) * R(i,j,k)",
    "a() = T(i,j,k) * R(i,j,k) * Q(i,j,k)",
    "a = A(i,j)",
    "y(i) = b(i) + A(i,j) * x(j)",
    "y(i) = x(i) * (A(i,j) * z(j) + b(i))",
    "y(i) = (A(i,j) + B(i,j)) * x(j)",
    "y(i) = alpha() * A(i,j) * x(j)",
    "Y(i,j) = x(i) * z(j)",
    "y(i) = A(i,j)",
]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_values_are_those_of_plain_loops(data):
    text = data.draw(st.sampled_from(EXPRESSIONS))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    assignment = parse(text)
    arrays, operands = {}, {}
    for access in assignment.inputs:
        shape = tuple(SIZES[index] for index in access.indices)
        density = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        arrays[access.name] = np.where(rng.random(shape) < density, rng.integers(-4, 5, shape), 0).astype(
            float
        )
        form = data.draw(st.sampled_from(["array", *FORMATS.get(len(shape), [])]))
        operands[access.name] = arrays[access.name]
        if form != "array":
            places = np.argwhere(arrays[access.name])
            values = arrays[access.name][tuple(places.T)]
            operands[access.name] = Tensor.from_coordinates(places, values, shape, form)
    expected = plain_loops(assignment, arrays)
    np.testing.assert_array_equal(evaluate(assignment, operands), expected)
    np.testing.assert_array_equal(
        einsum(str(assignment), operands, parts=data.draw(st.integers(1, 5))), expected
    )
    if assignment.output.indices:
        form = data.draw(st.sampled_from(["coo", *FORMATS[len(assignment.output.indices)]]))
        result = evaluate(assignment, operands, form)
        np.testing.assert_array_equal(result.validated().to_dense(), expected)


def test_einsum_subscripts_are_the_same():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 5)) * (rng.random((4, 5)) < 0.5), rng.random((5, 3))
    sparse = Tensor.from_coordinates(np.argwhere(a), a[a != 0], a.shape, "csr")
    np.testing.assert_allclose(evaluate("ij,jk->ik", {"A": sparse, "B": b}), a @ b)
    assert str(parse("ij, jk -> ki", ["X", "Y"])) == "out(k,i) = X(i,j) * Y(j,k)"
    assert str(parse("ij->i")) == "out(i) = A(i,j)"


def test_what_is_dense_and_large_is_looked_up_in_pieces(monkeypatch):
    rng = np.random.default_rng(1)
    a = rng.integers(0, 9, (40, 30)) * (rng.random((40, 30)) < 0.4) * 1.0
    u, v = rng.integers(0, 9, (40, 6)) * 1.0, rng.integers(0, 9, (6, 30)) * 1.0
    sparse = Tensor.from_coordinates(np.argwhere(a), a[a != 0], a.shape, "csr")
    monkeypatch.setattr("sparsecc.algebra.joins._PIECE", 64)
    np.testing.assert_array_equal(evaluate("ij,ik,kj->ij", {"A": sparse, "B": u, "C": v}), a * (u @ v))
    np.testing.assert_array_equal(evaluate("ij,jk->ik", {"A": sparse, "B": v.T}), a @ v.T)


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_text_and_expression_are_inverse(text):
    assert parse(str(parse(text))) == parse(text)


def test_structure():
    assert parse("y(i) = b(i) + A(i,j)*x(j)").value == Sum(
        (Access("b", ("i",)), Product((Access("A", ("i", "j")), Access("x", ("j",)))))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y(i) = A(i,i)", r"A\(i,i\) uses an index twice"),
        ("y(k) = A(i,j)", r"index k of y\(k\) is nowhere on the right"),
        ("y(i) = A(i,j) + b(j)", "terms of a sum need the same indices"),
        ("y(i) = A(i,j) * A(j)", "A is used with 2 and with 1 indices"),
        ("y(i) = y(i)", "y is on both sides"),
        ("y(i) = ", "expected a tensor, a number or"),
        ("y(i) = A(i", "expected '?[)]'?, got 'the end'"),
        ("y(i) = A(i) B(i)", "expected the end, got 'B'"),
        ("y(i) = A(i) % 2", "unexpected '%' at column 13"),
        ("= A(i)", "expected the name of the result"),
        ("ij,jk", "expected the name|expected '?="),
        ("ij,j1->i", "is no einsum"),
        ("y(i) = " + "(" * 80 + "A(i)" + ")" * 80, "nests deeper than 50"),
    ],
)
def test_wrong_text_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        parse(text)


def test_wrong_operands_are_refused():
    with pytest.raises(SpecError, match="no operand x"):
        evaluate("y(i) = A(i,j) * x(j)", {"A": np.ones((2, 3))})
    with pytest.raises(SpecError, match="index j is 3 and, in x"):
        evaluate("y(i) = A(i,j) * x(j)", {"A": np.ones((2, 3)), "x": np.ones(4)})
    with pytest.raises(SpecError, match="has 1 indices, the operand 2 modes"):
        evaluate("y(i) = A(i)", {"A": np.ones((2, 3))})
    with pytest.raises(SpecError, match="has 2 operands, got 1 names"):
        parse("ij,j->i", ["A"])
