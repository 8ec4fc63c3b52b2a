"""Which weights stay, by score: one rule for every pruning method. Arrays in, arrays out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.sparse import Pattern, Scope, keep_capped, keep_mask, keep_units

__all__ = ["Cap", "Mask", "Selection"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Cap:
    """At most ``n`` weights of every ``m`` consecutive inputs of an output; text form ``n:m``."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Cap:
        """Return the cap written as ``n:m``.

        Raises:
            SpecError: another form, or not 1 <= n < m.
        """
        found = re.fullmatch(r"\s*([0-9]{1,6}):([0-9]{1,6})\s*", text)
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise SpecError(f"unknown cap {text!r}: write n:m with 1 <= n < m, at most n of every m inputs")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Selection:
    """A pattern with the number of units that stay.

    Attributes:
        pattern: unstructured, N:M or blocks.
        sparsity: fraction of units to drop; None where the pattern implies it.
        scope: whether one count spans the ``layer`` or each ``row`` (row of blocks).
        caps: with an unstructured pattern, limits within groups of a row beside the count.
    """

    pattern: Pattern
    sparsity: float | None
    scope: Scope = "row"
    caps: tuple[Cap, ...] = ()

    @property
    def unit(self) -> int:
        """Columns that are chosen together."""
        widths = [cap.m for cap in self.caps]
        return self.pattern.m if self.pattern.kind == "nm" else max([1, self.pattern.cols, *widths])

    def describe(self) -> str:
        """Pattern and sparsity."""
        amount = "" if self.sparsity is None else f" at sparsity {self.sparsity:g}"
        return f"{self.pattern}{amount}"

    def mask(self, squares: NDArray[Any]) -> Mask:
        """Return the mask ``[N, K]`` that keeps the largest sum of ``squares``, what dropping a weight costs."""
        return self.part(squares, 0, squares.shape[1])

    def part(self, squares: NDArray[Any], start: int, columns: int) -> Mask:
        """Return the mask of the columns from ``start`` on, of ``columns`` in all, that ``squares`` is about.

        ``start`` is a multiple of ``unit``. The counts of parts that follow one another add up to that of the whole.
        """
        if self.pattern.kind == "nm":
            return keep_mask(squares, self.pattern)
        stop = start + squares.shape[1]
        count = self._count_up_to(stop, squares, columns) - self._count_up_to(start, squares, columns)
        if self.caps:
            return keep_capped(squares, [(cap.n, cap.m) for cap in self.caps], count, self.scope)
        return keep_units(squares, self.pattern, count, self.scope)

    def _count_up_to(self, column: int, squares: NDArray[Any], columns: int) -> int:
        """Units kept in the columns before ``column``."""
        rows, whole = self.pattern.grid((len(squares), columns))
        _, before = self.pattern.grid((len(squares), column))
        lines = 1 if self.scope == "row" else rows
        total = self.pattern.keep_count(whole * lines, self.sparsity)
        return round(total * before / whole) if before else 0
