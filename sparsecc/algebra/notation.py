"""Index notation: ``y(i) = A(i,j) * x(j)``, and einsum subscripts: ``ij,j->i``.

Indices that are not on the left are summed over, in the smallest term that holds all their uses: in
``y(i) = b(i) + A(i,j) * x(j)`` only the product is summed over j, as in the tensor algebra compiler taco (Kjolstad et
al. 2017).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sparsecc.errors import SpecError

__all__ = [
    "Access",
    "Assignment",
    "Expression",
    "Number",
    "Product",
    "Sum",
    "accesses",
    "indices_of",
    "parse",
]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>[-+*(),=]))"
)
_EINSUM = re.compile(r"^[A-Za-z,\s]*->[A-Za-z\s]*$")

#: Expressions nest no deeper: text of strangers must not exhaust the stack.
_DEEPEST = 50


@dataclass(frozen=True)
class Access:
    """A tensor at some indices; a number if there are none.

    Attributes:
        name: of the tensor.
        indices: one per mode, no two alike.
    """

    name: str
    indices: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}({','.join(self.indices)})"


@dataclass(frozen=True)
class Number:
    """A constant."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Product:
    """Factors that are multiplied: where one has nothing, there is nothing."""

    factors: tuple[Expression, ...]

    def __str__(self) -> str:
        return " * ".join(f"({item})" if isinstance(item, Sum) else str(item) for item in self.factors)


@dataclass(frozen=True)
class Sum:
    """Terms that are added: where one has something, there is something."""

    terms: tuple[Expression, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))


Expression = Access | Number | Product | Sum


@dataclass(frozen=True)
class Assignment:
    """A whole expression.

    Attributes:
        output: what is computed.
        value: by what.
    """

    output: Access
    value: Expression

    def __str__(self) -> str:
        return f"{self.output} = {self.value}"

    @property
    def inputs(self) -> tuple[Access, ...]:
        """All accesses on the right, in order."""
        return tuple(accesses(self.value))


def accesses(expression: Expression) -> Iterator[Access]:
    """Yield the accesses in an expression, in order."""
    if isinstance(expression, Access):
        yield expression
    elif isinstance(expression, Product | Sum):
        for part in expression.factors if isinstance(expression, Product) else expression.terms:
            yield from accesses(part)


def indices_of(expression: Expression) -> tuple[str, ...]:
    """Return the indices that an expression uses, in the order in which they first come."""
    return tuple(dict.fromkeys(index for item in accesses(expression) for index in item.indices))


def parse(text: str, names: Sequence[str] | None = None) -> Assignment:
    """Read an expression in index notation or as einsum subscripts.

    Args:
        text: ``y(i) = A(i,j) * x(j)`` with ``+``, ``-``, ``*``, brackets and numbers, or ``ij,j->i``.
        names: of the operands of einsum subscripts, A, B, C, ... by default; the output is ``out``.

    Raises:
        SpecError: the text is no such expression, an access repeats an index, an index of the output is nowhere on the
            right, a term of a sum lacks one that others have, or a tensor has different numbers of indices.
    """
    if "=" not in text and "->" in text:
        return checked(_einsum(text, names))
    return checked(_Parser(text).assignment())


def _einsum(text: str, names: Sequence[str] | None) -> Assignment:
    if not _EINSUM.match(text):
        raise SpecError(
            f"'{text}' is no einsum: write letters with commas, then -> and letters, as in ij,j->i"
        )
    left, _, right = text.replace(" ", "").partition("->")
    operands = left.split(",")
    if names is None:
        names = [chr(ord("A") + at) for at in range(len(operands))]
    if len(names) != len(operands):
        raise SpecError(f"'{text}' has {len(operands)} operands, got {len(names)} names")
    factors = tuple(Access(name, tuple(letters)) for name, letters in zip(names, operands, strict=True))
    return Assignment(Access("out", tuple(right)), factors[0] if len(factors) == 1 else Product(factors))


def checked(assignment: Assignment) -> Assignment:
    """Return ``assignment``; see ``parse`` for what is refused."""
    sizes: dict[str, int] = {}
    for item in (assignment.output, *assignment.inputs):
        if len(set(item.indices)) < len(item.indices):
            raise SpecError(f"{item} uses an index twice: take the diagonal first")
        if sizes.setdefault(item.name, len(item.indices)) != len(item.indices):
            raise SpecError(
                f"{item.name} is used with {sizes[item.name]} and with {len(item.indices)} indices"
            )
    if assignment.output.name in {item.name for item in assignment.inputs}:
        raise SpecError(f"{assignment.output.name} is on both sides: give the result another name")
    known = set(indices_of(assignment.value))
    for index in assignment.output.indices:
        if index not in known:
            raise SpecError(f"index {index} of {assignment.output} is nowhere on the right")
    left_of(assignment.value, assignment.output.indices)
    return assignment


def left_of(expression: Expression, needed: Collection[str]) -> frozenset[str]:
    """Return which indices an expression has once those that nobody else needs are summed over.

    Args:
        expression: any.
        needed: indices that are used outside of it.

    Raises:
        SpecError: terms of a sum have different ones.
    """
    if isinstance(expression, Access):
        return frozenset(expression.indices) & frozenset(needed)
    if isinstance(expression, Number):
        return frozenset()
    if isinstance(expression, Product):
        found: set[str] = set()
        for at, factor in enumerate(expression.factors):
            found |= left_of(factor, needed_by_others(expression, at, needed))
        return frozenset(found) & frozenset(needed)
    sets = [left_of(term, needed) for term in expression.terms]
    if any(other != sets[0] for other in sets):
        shown = "; ".join(
            f"{term} has {','.join(sorted(s)) or 'none'}"
            for term, s in zip(expression.terms, sets, strict=True)
        )
        raise SpecError(f"terms of a sum need the same indices: {shown}")
    return sets[0]


def needed_by_others(product: Product, at: int, needed: Collection[str]) -> frozenset[str]:
    """Return the indices that are needed outside of a product or by its other factors."""
    others = (indices_of(factor) for number, factor in enumerate(product.factors) if number != at)
    return frozenset(needed).union(*others)


class _Parser:
    """Recursive descent over the tokens of one assignment."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text.rstrip()):
            found = _TOKEN.match(text, at)
            if found is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise SpecError(f"'{text}': unexpected {text[at]!r} at column {at + 1}")
            self.tokens.append((str(found.lastgroup), found[found.lastgroup or 0]))
            at = found.end()
        self.at = 0
        self.depth = 0

    def assignment(self) -> Assignment:
        output = self._access(self._take("name", "the name of the result"))
        self._take("sign", "=", "=")
        value = self._sum()
        if self.at < len(self.tokens):
            raise self._error("the end")
        return Assignment(output, value)

    def _sum(self) -> Expression:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise SpecError(f"the expression nests deeper than {_DEEPEST} brackets")
        terms = [self._product(negative=self._next("-"))]
        while self._peek() in ("+", "-"):
            terms.append(self._product(negative=self._next("-") or not self._next("+")))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Sum(tuple(terms))

    def _product(self, negative: bool) -> Expression:
        if self._next("-"):
            negative = not negative
        factors = [self._factor()]
        while self._next("*"):
            factors.append(self._factor())
        if negative:
            first = factors[0]
            factors[:1] = [Number(-first.value)] if isinstance(first, Number) else [Number(-1.0), first]
        return factors[0] if len(factors) == 1 else Product(tuple(factors))

    def _factor(self) -> Expression:
        if self._next("("):
            inner = self._sum()
            self._take("sign", ")", ")")
            return inner
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "number":
            self.at += 1
            return Number(float(self.tokens[self.at - 1][1]))
        return self._access(self._take("name", "a tensor, a number or ("))

    def _access(self, name: str) -> Access:
        indices: list[str] = []
        if self._next("(") and not self._next(")"):
            indices.append(self._take("name", "an index"))
            while self._next(","):
                indices.append(self._take("name", "an index"))
            self._take("sign", ")", ")")
        return Access(name, tuple(indices))

    def _peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _next(self, sign: str) -> bool:
        if self._peek() != sign:
            return False
        self.at += 1
        return True

    def _take(self, kind: str, wanted: str, text: str | None = None) -> str:
        if self.at >= len(self.tokens) or self.tokens[self.at][0] != kind or text not in (None, self._peek()):
            raise self._error(wanted)
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _error(self, wanted: str) -> SpecError:
        return SpecError(f"'{self.text}': expected {wanted}, got {self._peek() or 'the end'!r}")
