"""What a site can be lowered to: a pattern of zeros, and the type of the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from sparsecc.sparse.floats import Floats
from sparsecc.sparse.pattern import Pattern

__all__ = ["INT8_DENSE", "Layout", "Values"]

Values: TypeAlias = Literal[Floats, "int8"]
"""Type of the values of a weight; with ``int8`` the activations are quantised too."""

_DEFAULT: Values = "fp32"


@dataclass(frozen=True)
class Layout:
    """A form of a weight; its text, such as ``16x1``, ``fp16 16x1`` or ``int8 16x4``, is what a mark holds.

    Attributes:
        pattern: of the stored zeros; ``dense`` stores all weights, in standard operators.
        values: type of the values.
    """

    pattern: Pattern
    values: Values = _DEFAULT

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout of a text that ``str`` gave.

        Raises:
            SpecError: it is none.
        """
        first, _, rest = text.partition(" ")
        if first in _NAMES:
            return cls(Pattern.parse(rest), cast(Values, first))
        return cls(Pattern.parse(text))

    @property
    def int8(self) -> bool:
        """Whether values are int8 and the activations are quantised."""
        return self.values == "int8"

    @property
    def sparse(self) -> bool:
        """Whether it needs a sparse operator."""
        return self.pattern.kind != "dense"

    def __str__(self) -> str:
        return f"{self.pattern}" if self.values == _DEFAULT else f"{self.values} {self.pattern}"


_NAMES = frozenset(get_args(Values)) - {_DEFAULT}

INT8_DENSE = Layout(Pattern("dense"), "int8")
