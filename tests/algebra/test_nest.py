"""Loops of expressions: what each walks, where the work is cut anew, how results are written, what is refused."""

from __future__ import annotations

import pytest

from sparsecc.algebra.nest import nests
from sparsecc.algebra.notation import parse
from sparsecc.algebra.ordering import Storage, storage_order
from sparsecc.errors import SpecError

# Expression, formats, format of the result, loops (index: kind; walked; looked up; |: a phase ends), tail, class.
NESTS = {
    "SpMV": ("y(i) = A(i,j) * x(j)", {"A": "csr"}, None, "i: dense A, j: one operand A", "", 2),
    "SpMV of CSC": ("y(i) = A(i,j) * x(j)", {"A": "csc"}, None, "j: dense A, i: one operand A", "", 2),
    "SpMM": ("Y(i,n) = A(i,j) * B(j,n)", {"A": "csr"}, None, "i: dense A, j: one operand A", "n", 2),
    "SDDMM": ("S(i,j) = A(i,j) * U(i,k) * V(k,j)", {"A": "csr"}, "csr", "i: dense A, j: one operand A", "k", 1),
    "add": (
        "S(i,j) = A(i,j) + B(i,j) + C(i,j)", {"A": "csr", "B": "coo", "C": "dcsr"}, "csr",
        "i: union A B C, j: union A B C", "", 1,
    ),
    "product, CSR": (
        "S(i,j) = A(i,j) * B(i,j)", {"A": "csr", "B": "csr"}, "csr", "i: dense A B, j: intersection A B", "", 1,
    ),
    "product, DCSR": (
        "S(i,j) = A(i,j) * B(i,j)", {"A": "dcsr", "B": "dcsr"}, "csr",
        "i: intersection A B | j: intersection A B", "", 1,
    ),
    "product, DCSR and CSR": (
        "S(i,j) = A(i,j) * B(i,j)", {"A": "dcsr", "B": "csr"}, "csr",
        "i: one operand A; B | j: intersection A B", "", 1,
    ),
    "mixed": (
        "S(i,j) = (A(i,j) + B(i,j)) * C(i,j)", {"A": "csr", "B": "csr", "C": "csr"}, "csr",
        "i: dense A B C, j: mixed A B C", "", 1,
    ),
    "mixed that prunes": (
        "S(i,j) = (A(i,j) + B(i,j)) * C(i,j)", {"A": "csr", "B": "csr", "C": "dcsr"}, "csr",
        "i: one operand C; A B | j: mixed A B C", "", 1,
    ),
    "SpGEMM": (
        "Y(i,k) = A(i,j) * B(j,k)", {"A": "csr", "B": "csr"}, "csr",
        "i: dense A, j: one operand A; B | k: one operand B", "", 3,
    ),
    "SpGEMM into an array": (
        "Y(i,k) = A(i,j) * B(j,k)", {"A": "csr", "B": "csr"}, None,
        "i: dense A, j: one operand A; B | k: one operand B", "", 2,
    ),
    "masked SpGEMM": (
        "S(i,j) = C(i,j) * A(i,k) * B(k,j)", {"A": "csr", "B": "csr", "C": "csr"}, "csr",
        "i: dense C A, k: one operand A; B | j: intersection B; C", "", 3,
    ),
    "MTTKRP": (
        "M(i,j) = T(i,k,l) * C(k,j) * D(l,j)", {"T": "csf"}, None,
        "i: one operand T, k: one operand T, l: one operand T", "j", 2,
    ),
    "TTV": (
        "S(i,j) = T(i,j,k) * c(k)", {"T": "csf", "c": "compressed"}, "csf",
        "i: one operand T, j: one operand T, k: intersection T; c", "", 2,
    ),
    "TTM": (
        "S(i,j,n) = T(i,j,k) * C(k,n)", {"T": "csf"}, "csf",
        "i: one operand T, j: one operand T, k: one operand T", "n", 2,
    ),
    "inner product": (
        "a = T(i,j,k) * R(i,j,k)", {"T": "csf", "R": "csf"}, None,
        "i: intersection T R | j: intersection T R | k: intersection T R", "", 2,
    ),
    "sum with an array": (
        "y(i) = b(i) + A(i,j) * x(j)", {"A": "dcsr"}, None, "i: union A all_i, j: one operand A", "", 2,
    ),
    "arrays alone": ("Y(i,k) = A(i,j) * B(j,k)", {}, None, "", "i,j,k", 1),
    "stored by other loops": (
        "a = A(i,j) * B(k,j)", {"A": "csr", "B": "csr"}, None, "i: dense A | k: dense B, j: intersection B; A", "", 2,
    ),
}  # fmt: skip


def shown(nest):
    def names(numbers):
        return " ".join(nest.operands[at].name.replace(" ", "_") for at in numbers)

    text = ""
    for at, loop in enumerate(nest.loops):
        text += f"{loop.index}: {loop.kind} {names(loop.walked)}"
        text += f"; {names(loop.located)}" if loop.located else ""
        text += " | " if loop.ends_phase else ", " if at + 1 < len(nest.loops) else ""
    return text


@pytest.mark.parametrize("name", NESTS)
def test_loops(name):
    text, formats, output, loops, tail, output_class = NESTS[name]
    (nest,) = nests(text, formats, output)
    assert shown(nest) == loops
    assert ",".join(nest.tail) == tail
    assert nest.output_class == output_class
    assert sum(map(len, nest.phases)) == len(nest.loops)


def test_products_without_common_loops_are_nests_of_their_own():
    first, second = nests("y(i) = A(i,j) * x(j) + B(i,k) * C(k,i)", {"A": "csr", "B": "csr", "C": "csc"})
    assert shown(first) == "i: dense A, j: one operand A"
    assert shown(second) == "i: dense B C, k: intersection B C"
    both = nests("y(i) = A(i,j) * x(j) + B(i,j) * z(j)", {"A": "csr", "B": "csr"})
    assert [shown(nest) for nest in both] == ["i: dense A B, j: union A B"]


def test_brackets_become_products():
    (nest,) = nests("y(i) = 2 * (A(i,j) - 3 * B(i,j)) * (x(j) + 1 * z(j))", {"A": "csr", "B": "csr"})
    found = [
        (term.coefficient, [nest.operands[at].name for at in term.operands], [str(a) for a in term.arrays])
        for term in nest.terms
    ]
    assert found == [
        (2.0, ["A"], ["x(j)"]), (2.0, ["A"], ["z(j)"]), (-6.0, ["B"], ["x(j)"]), (-6.0, ["B"], ["z(j)"]),
    ]  # fmt: skip
    large = " * ".join(["(a(i) + b(i))"] * 7)
    with pytest.raises(SpecError, match="becomes more than 64 products: compute it in several steps"):
        nests(f"y(i) = {large}", {"a": "compressed"})


def test_what_no_order_suits_is_refused_with_the_fix():
    formats = {"A": "csr", "B": "csc"}
    with pytest.raises(SpecError, match=r"convert it: B\.converted\('dense,compressed', \(0, 1\)\)"):
        nests("S(i,j) = A(i,j) + B(i,j)", formats)
    with pytest.raises(
        SpecError, match=r"suits T\(k,j,i\).*T\.converted\('compressed,compressed,compressed', \(2, 1, 0\)\)"
    ):
        nests("S(i,j) = A(i,j) * T(k,j,i)", {"A": "csr", "T": "coo"})
    assignment = parse("S(i,j) = A(i,j) + B(i,j)")
    stored = [Storage.named(formats[access.name], 2) for access in assignment.inputs]
    assert storage_order(assignment, stored) == {1: (0, 1)}
    assert storage_order(assignment, stored, [1, 9]) == {0: (1, 0)}
    assert storage_order(assignment, [stored[0], stored[0]]) == {}


def test_text_tells_what_happens():
    (nest,) = nests("S(i,j) = C(i,j) * A(i,k) * B(k,j)", dict.fromkeys("ABC", "csr"), "csr")
    assert str(nest).splitlines() == [
        "i: dense, walks C, A",
        "k: one operand, walks A, looks up B",
        "-- the work is cut anew --",
        "j: intersection, walks B, looks up C",
        "output: class 3",
    ]
