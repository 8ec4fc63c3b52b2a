"""The cuts of sparse operands that a model stores: where parts of equal work begin."""

from __future__ import annotations

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import ModelError
from sparsecc.ir.ops_algebra import CUTS

__all__ = ["store_cuts", "stored_cuts"]


def stored_cuts(node: onnx_ir.Node) -> NDArray[np.int64] | None:
    """Return the table of a node, ``[2, parts + 1]``: rows and entries before each part; None if it has none.

    Raises:
        ModelError: it is malformed; whether it fits the operand is not looked at.
    """
    attribute = node.attributes.get(CUTS)
    if attribute is None:
        return None
    numbers = list(attribute.as_ints()) if attribute.type == onnx_ir.AttributeType.INTS else []
    if len(numbers) < 4 or len(numbers) % 2:
        raise ModelError(f"node '{node.name}': attribute '{CUTS}' is no table; run the pass partition again")
    table = np.array(numbers, np.int64).reshape(2, -1)
    if table[:, 0].any() or (np.diff(table) < 0).any():
        raise ModelError(
            f"node '{node.name}': attribute '{CUTS}' does not rise from 0; run the pass partition again"
        )
    return table


def store_cuts(node: onnx_ir.Node, table: NDArray[np.int64]) -> bool:
    """Give a node its table, as ``stored_cuts`` returns it; return whether it did not have that one already."""
    try:
        before = stored_cuts(node)
    except ModelError:
        before = None
    if before is not None and np.array_equal(before, table):
        return False
    node.attributes[CUTS] = onnx_ir.AttrInt64s(CUTS, table.reshape(-1).tolist())
    return True
