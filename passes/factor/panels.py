"""Products with the blocks of a block-diagonal matrix, and what moves their results: nodes for structured forms.

Few blocks are cheapest as one MatMul each between Split and Concat: a session packs each of their weights once. Many
blocks are one batched MatMul with the rows of x as the last axis: what moves blocks around then copies whole rows
instead of single numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.chain import Chain

__all__ = ["Columns", "block_products", "refusal"]


def refusal(site: Site) -> str | None:
    """Return why blocks of the inputs of ``site`` cannot be multiplied each by itself, or None."""
    if site.op == "Conv":
        return "it is a convolution: this form is for products"
    if site.op == "MatMul":
        if site.input is None or site.input.shape is None:
            return "the rank of its input is not known"
        if site.input.shape.rank() < 2:
            return "its input is one vector"
    return None


def block_products(
    chain: Chain, x: onnx_ir.Value, blocks: Sequence[NDArray[Any]], name: str
) -> list[onnx_ir.Value]:
    """Return the products of the parts of ``x`` with ``blocks``, ``[outputs, inputs]`` each, one after the other."""
    parts = chain.split(x, [block.shape[1] for block in blocks], f"{name}.split")
    return [
        chain.matmul(part, block, f"{name}{at}")
        for at, (part, block) in enumerate(zip(parts, blocks, strict=True))
    ]


class Columns:
    """A value ``[..., channels..., rows of x]``, the last two axes of x turned, so that channels can be cut.

    An empty batch cannot be computed: the rows that there are follow from the number of values.

    Args:
        chain: its input has two axes or more.
        value: ``[..., M, channels]``, turned here.
    """

    def __init__(self, chain: Chain, value: onnx_ir.Value) -> None:
        self._chain = chain
        self._before = chain.leading - 1
        self._value = self._turned(value, "turn", 0)

    def cut(self, sizes: Sequence[int], name: str) -> None:
        """Let the channels be axes of these ``sizes``."""
        shape = self._chain.shape([0] * self._before + [*sizes, -1], f"{name}.shape")
        self._value = self._chain.node("Reshape", [self._value, shape], name)

    def swap(self, name: str, more: int) -> None:
        """Swap the first two axes of channels; ``more`` axes of channels stand behind them."""
        self._value = self._turned(self._value, name, more + 1)

    def multiply(self, blocks: NDArray[Any], name: str) -> None:
        """Multiply channels ``[count, inputs]`` with ``blocks [count, outputs, inputs]``."""
        weight = self._chain.constant(blocks, f"{name}.weight")
        self._value = self._chain.node("MatMul", [weight, self._value], name)

    def finish(self) -> None:
        """Turn the one axis of channels back and finish the chain."""
        self._chain.finish(self._turned(self._value, "back", 0))

    def _turned(self, value: onnx_ir.Value, name: str, behind: int) -> onnx_ir.Value:
        """Swap the two axes behind the leading ones, with ``behind`` more after them."""
        first = self._before
        perm = [*range(first), first + 1, first, *range(first + 2, first + 2 + behind)]
        return self._chain.node("Transpose", [value], name, {"perm": perm})
