"""Ranges that a search over the options of a pass goes through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from sparsecc.pm.base import Pass

__all__ = ["Range", "search_families", "search_specs"]

Value = str | float | int | bool


@dataclass(frozen=True)
class Range:
    """Values of one option that are worth trying while others are fixed. Each of them changes more than the one before.

    Attributes:
        fixed: other options, and their values as text.
        option: what is varied, in kebab-case; empty for nothing: the fixed options alone are one thing to try.
        values: as text, from the mildest to the strongest.
    """

    fixed: tuple[tuple[str, str], ...] = ()
    option: str = ""
    values: tuple[str, ...] = ()

    @classmethod
    def of(cls, option: str = "", values: tuple[Value, ...] = (), **fixed: Value) -> Self:
        """Return the range of ``option`` over ``values``, with the ``fixed`` options (``_`` for ``-``)."""
        others = tuple((key.replace("_", "-"), _text(value)) for key, value in fixed.items())
        return cls(others, option, tuple(_text(value) for value in values))

    def options(self) -> list[dict[str, str]]:
        """Return the options of each point, mildest first."""
        if not self.option:
            return [dict(self.fixed)]
        return [{**dict(self.fixed), self.option: value} for value in self.values]

    def finer(self) -> Self:
        """Return the same range with one more value between any two neighbours, where these are numbers."""
        try:
            numbers = [float(value) for value in self.values]
        except ValueError:
            return self
        between = [f"{(one + other) / 2:.6g}" for one, other in pairwise(numbers)]
        mixed = (text for pair in zip_longest(self.values, between) for text in pair if text is not None)
        return replace(self, values=tuple(mixed))

    def __str__(self) -> str:
        fixed = " ".join(f"{key}={value}" for key, value in self.fixed)
        varied = f"{self.option}={'|'.join(self.values)}" if self.option else ""
        return " ".join(part for part in (fixed, varied) if part)


def search_families(pass_type: type[Pass], *, fine: bool = False) -> tuple[tuple[str, ...], ...]:
    """Return one tuple of specs per range that the pass declares, mildest first; none for passes without.

    With ``fine`` there is one amount more between any two that are declared.
    """
    return tuple(
        tuple(str(pass_type.from_options(options)) for options in (item.finer() if fine else item).options())
        for item in pass_type.search
    )


def search_specs(pass_type: type[Pass]) -> tuple[str, ...]:
    """Return the specs that are worth trying of a pass, without ``match``."""
    return tuple(spec for family in search_families(pass_type) for spec in family)


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
