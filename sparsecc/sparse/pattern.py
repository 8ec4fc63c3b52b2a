"""Which entries of a weight matrix may be non-zero, as a small value with a text form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from sparsecc.errors import SpecError

__all__ = ["Pattern"]

_MAX_GROUP = 16
_MAX_BLOCK_SIDE = 64
_FORMS = (
    f"write dense, unstructured, N:M (1 <= N < M <= {_MAX_GROUP}, N kept of every M) "
    f"or RxC (R outputs x C inputs, each 1..{_MAX_BLOCK_SIDE})"
)


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros over a weight matrix ``[N outputs, K inputs]``.

    ``nm`` keeps ``n`` of every ``m`` consecutive entries of a row (along the reduction axis); a last
    group of length r < m keeps ``min(n, r)``. ``block`` shares one mask bit among ``rows`` outputs x
    ``cols`` consecutive inputs; where N or K is no multiple, the partial blocks at the edge are units
    like the others. ``parse`` and ``str`` are inverse.
    """

    kind: Literal["dense", "unstructured", "nm", "block"]
    n: int = 0
    m: int = 0
    rows: int = 0
    cols: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "unstructured", "nm", "block"):
            raise SpecError(f"unknown pattern kind {self.kind!r}: {_FORMS}")
        if self.kind == "nm" and not 0 < self.n < self.m <= _MAX_GROUP:
            raise SpecError(f"pattern {self.n}:{self.m} is out of range: {_FORMS}")
        sides = (self.rows, self.cols)
        if self.kind == "block" and not all(1 <= side <= _MAX_BLOCK_SIDE for side in sides):
            raise SpecError(f"pattern {self.rows}x{self.cols} is out of range: {_FORMS}")
        unused = sides if self.kind == "nm" else (self.n, self.m) if self.kind == "block" else (
            self.n, self.m, *sides)  # fmt: skip
        if any(unused):
            raise SpecError(f"pattern kind {self.kind!r} takes no such numbers: {unused}")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern written as ``dense``, ``unstructured``, ``2:4`` or ``16x1``.

        Raises:
            SpecError: the text is none of the forms, or a number is out of range.
        """
        text = text.strip()
        if text == "dense":
            return cls("dense")
        if text == "unstructured":
            return cls("unstructured")
        if found := re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text):
            return cls("nm", n=int(found[1]), m=int(found[2]))
        if found := re.fullmatch(r"([0-9]{1,3})x([0-9]{1,3})", text):
            return cls("block", rows=int(found[1]), cols=int(found[2]))
        raise SpecError(f"unknown pattern {text!r}: {_FORMS}")

    def __str__(self) -> str:
        if self.kind == "nm":
            return f"{self.n}:{self.m}"
        if self.kind == "block":
            return f"{self.rows}x{self.cols}"
        return self.kind

    @property
    def needs_sparsity(self) -> bool:
        """Whether the number of kept units is free, that is must be given as a sparsity."""
        return self.kind in ("unstructured", "block")

    def density(self, sparsity: float | None = None) -> float:
        """Return the fraction of units kept, 0..1. ``sparsity`` is ignored where the pattern implies it.

        Raises:
            SpecError: a sparsity is needed and is missing or outside 0..1.
        """
        if self.kind == "dense":
            return 1.0
        if self.kind == "nm":
            return self.n / self.m
        return 1.0 - self._checked(sparsity)

    def keep_count(self, total: int, sparsity: float | None) -> int:
        """Return how many of ``total`` units are kept: (1 - sparsity) * total, halves rounded up.

        Exact: the sparsity counts as the decimal it prints as, so 0.9 of 5 units keeps 1 (from 0.5).
        """
        kept = (1 - Fraction(repr(self._checked(sparsity)))) * total
        return int(kept + Fraction(1, 2))

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the shape of the grid of positions: blocks for ``block``, otherwise the matrix itself."""
        if self.kind != "block":
            return shape
        return -(-shape[0] // self.rows), -(-shape[1] // self.cols)

    def _checked(self, sparsity: float | None) -> float:
        if sparsity is None:
            raise SpecError(f"pattern {self} needs a sparsity: give a number between 0 and 1")
        if not 0.0 <= sparsity <= 1.0:
            raise SpecError(f"sparsity must lie between 0 and 1, got {sparsity}")
        return float(sparsity)
