"""The names of the sparse recurrent operators, and the making of their nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.names import graph_names
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION, check_value_type, initializer
from sparsecc.sparse import LAYOUT_VERSION, SparseTensor

__all__ = ["GATES", "RecurrentVariant", "recurrent_op_node"]

Cell = Literal["LSTM", "GRU"]

#: Gates by cell.
GATES = {"LSTM": 4, "GRU": 3}


@dataclass(frozen=True)
class RecurrentVariant:
    """Which operator: every input of an operator is always there, so what ONNX leaves open is in the name.

    Attributes:
        cell: ``LSTM`` or ``GRU``.
        lengths: whether each sequence has a length of its own.
        state: whether an initial state is given; otherwise it is zeros.
    """

    cell: Cell
    lengths: bool = False
    state: bool = False

    @property
    def family(self) -> str:
        """``SparseLSTM`` or ``SparseGRU``."""
        return f"Sparse{self.cell}"

    @property
    def name(self) -> str:
        """The operator's type, for instance ``SparseLSTMLengthsState``."""
        return self.family + "Lengths" * self.lengths + "State" * self.state


def recurrent_op_node(
    graph: ir.Graph,
    x: ir.Value | None,
    input_weight: SparseTensor,
    state_weight: SparseTensor,
    *,
    cell: Cell,
    hidden: int,
    name: str,
    bias: NDArray[np.float32] | None = None,
    direction: str = "forward",
    linear_before_reset: bool = False,
    lengths: ir.Value | None = None,
    initial: tuple[ir.Value, ...] = (),
    taken: set[str] | None = None,
) -> ir.Node:
    """Return a new operator node, not yet in ``graph``, whose constants are initializers of ``graph``.

    It means ONNX's LSTM or GRU with default activations and layout 0, whose three (GRU: two) outputs it has.

    Args:
        graph: the graph (or subgraph) which the node will be put into, for the reason given in
            ``sparse_op_node``.
        x: float32 ``[T, B, I]``.
        input_weight: W as a packed matrix ``[D * gates * H, I]``; blocks must not cross gates.
        state_weight: R as a packed matrix ``[D * gates * H, H]``; its pattern may differ.
        cell: ``LSTM`` or ``GRU``.
        hidden: H.
        name: name of the node and prefix of its initializers.
        bias: ``[D, 2 * gates * H]``; ``None`` is zeros.
        direction: ``forward``, ``reverse`` or ``bidirectional`` (D = 2).
        linear_before_reset: of a GRU.
        lengths: int32 ``[B]``, or none.
        initial: the initial states ``[D, B, H]`` (LSTM: h and c; GRU: h), or none of them.
        taken: as for ``sparse_op_node``.

    Raises:
        ValueError: the arguments do not fit together (a mistake of the calling pass).
    """
    rows = (2 if direction == "bidirectional" else 1) * GATES[cell] * hidden
    if input_weight.shape[0] != rows or state_weight.shape != (rows, hidden):
        raise ValueError(f"{cell} of {hidden} units: weights {input_weight.shape} and {state_weight.shape}")
    if any(w.pattern.kind == "block" and hidden % w.pattern.rows for w in (input_weight, state_weight)):
        raise ValueError(f"blocks cross the gates of {hidden} hidden units")
    if len(initial) not in (0, 2 if cell == "LSTM" else 1):
        raise ValueError(f"{cell} with {len(initial)} initial states")
    for weight in (input_weight, state_weight):
        check_value_type(graph, weight)
    directions = rows // (GATES[cell] * hidden)
    shape = (directions, 2 * GATES[cell] * hidden)
    bias = np.zeros(shape, np.float32) if bias is None else bias.astype(np.float32, copy=False)
    if bias.shape != shape:
        raise ValueError(f"bias has shape {bias.shape}, expected {shape}")
    taken = graph_names(graph) if taken is None else taken
    constants: list[ir.Value | None] = []
    for operand, weight in (("w", input_weight), ("r", state_weight)):
        values = weight.values if weight.values.ndim == 3 else weight.values.reshape(-1, 1, 1)
        constants += [
            initializer(graph, taken, f"{name}.{operand}_values", values),
            initializer(graph, taken, f"{name}.{operand}_indices", weight.indices),
            initializer(graph, taken, f"{name}.{operand}_shape", np.array(weight.shape, np.int64)),
        ]
    constants.append(initializer(graph, taken, f"{name}.bias", bias))
    attributes = [
        ir.AttrInt64("hidden_size", hidden),
        ir.AttrString("direction", direction),
        ir.AttrString("layout_w", str(input_weight.pattern)),
        ir.AttrString("layout_r", str(state_weight.pattern)),
        ir.AttrInt64("layout_version", LAYOUT_VERSION),
    ]
    if cell == "GRU":
        attributes.append(ir.AttrInt64("linear_before_reset", int(linear_before_reset)))
    return ir.Node(
        DOMAIN,
        RecurrentVariant(cell, lengths is not None, bool(initial)).name,
        [x, *constants, *([lengths] if lengths is not None else []), *initial],
        attributes,
        name=name,
        num_outputs=3 if cell == "LSTM" else 2,
        version=DOMAIN_VERSION,
    )
