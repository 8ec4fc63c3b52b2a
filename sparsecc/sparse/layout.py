"""What a site can be lowered to: a pattern of zeros, and the type of the values."""

from __future__ import annotations

from dataclasses import dataclass

from sparsecc.sparse.pattern import Pattern

__all__ = ["INT8_DENSE", "Layout"]

_INT8 = "int8 "


@dataclass(frozen=True)
class Layout:
    """A form of a weight; its text, such as ``16x1`` or ``int8 16x4``, is what a mark holds.

    Attributes:
        pattern: of the stored zeros; ``dense`` stores all weights, in standard operators.
        int8: values are int8 and the activations are quantised; otherwise float32.
    """

    pattern: Pattern
    int8: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Return the layout of a text that ``str`` gave.

        Raises:
            SpecError: it is none.
        """
        return cls(Pattern.parse(text.removeprefix(_INT8)), text.startswith(_INT8))

    @property
    def sparse(self) -> bool:
        """Whether it needs a sparse operator."""
        return self.pattern.kind != "dense"

    def __str__(self) -> str:
        return f"{_INT8 if self.int8 else ''}{self.pattern}"


INT8_DENSE = Layout(Pattern("dense"), int8=True)
