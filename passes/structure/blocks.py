"""Residual blocks of a model: what lies between two states of a stream of equal shape, found and taken out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir

from sparsecc.calib.stepwise import ancestors
from sparsecc.ir import Model
from sparsecc.ir.axes import known_shapes
from sparsecc.ir.trace import captured_inputs
from sparsecc.passes.tidy.graph import bypass, constant_of, only_consumer, remove_dead

__all__ = ["Block", "count_before", "find_blocks", "remove_block", "runs"]

#: What may stand between an addition and the stream, if it stands before the block too.
_TAILS = frozenset(
    {
        "BatchNormalization",
        "Clip",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "Relu",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
    }
)


@dataclass(frozen=True, eq=False)
class Block:
    """A part of the main graph ``x -> Add(x, f(x))``, or several one after the other.

    Attributes:
        name: of the Add; of several the first and the last.
        start: x.
        end: the outputs of the Add, or of the norm or activation behind it where x comes from the same operator.
        nodes: all that is computed from x for the end.
        reason: why it has to stay; None if it can leave.
    """

    name: str
    start: onnx_ir.Value
    end: onnx_ir.Value
    nodes: frozenset[onnx_ir.Node]
    reason: str | None


def find_blocks(model: Model) -> tuple[list[Block], list[tuple[str, str]]]:
    """Return the blocks of the main graph in its order, and name and reason of other additions of two branches."""
    with known_shapes(model):
        return _Search(model).result()


def runs(model: Model, blocks: Sequence[Block], span: int) -> list[Block]:
    """Return what ``span`` neighbouring blocks are together, for each block that starts so many."""
    if span == 1:
        return list(blocks)
    following = {block.start: block for block in reversed(blocks)}
    readers = _readers(model)
    found = []
    for first in blocks:
        members = [first]
        while len(members) < span and members[-1].end in following:
            members.append(following[members[-1].end])
        if len(members) < span:
            continue
        nodes = frozenset[onnx_ir.Node]().union(*(block.nodes for block in members))
        last = members[-1]
        reason = next((block.reason for block in members if block.reason), None)
        reason = reason or _read_outside(nodes, last.end, readers) or _ends(first.start, last.end)
        found.append(Block(f"{first.name} to {last.name}", first.start, last.end, nodes, reason))
    return found


def remove_block(model: Model, block: Block) -> str:
    """Let the start of a free ``block`` stand for its end; return the name that the start has now."""
    last = block.end.producer()
    assert last is not None, "a block ends in a node"
    assert bypass(last, block.start), "_ends() looked"
    remove_dead(model.onnx)
    return str(block.start.name)


def count_before(model: Model, key: str) -> int:
    """Return the number that an earlier run left in the metadata under ``key``, or 0."""
    text = model.metadata.get(key, "0")
    return int(text) if text.isdecimal() and len(text) < 6 else 0


class _Search:
    """Looks at every addition of two computed tensors."""

    def __init__(self, model: Model) -> None:
        self._nodes = list(model.onnx.graph)
        self._readers = _readers(model)
        self._fixed = all(
            isinstance(size, int) for spec in model.input_specs() for size in spec.shape or (None,)
        )
        self._linear = {node for site in model.sites() for node in site.nodes}

    def result(self) -> tuple[list[Block], list[tuple[str, str]]]:
        blocks: list[Block] = []
        others: list[tuple[str, str]] = []
        for node in self._nodes:
            operands = list(node.inputs)
            if (node.op_type, node.domain) != ("Add", "") or None in operands:
                continue
            computed = [value for value in operands if value is not None and constant_of(value) is None]
            if len(computed) < 2:
                continue
            block = next(self._blocks(node, computed), None)
            if block is not None:
                blocks.append(block)
            elif self._is_join(computed):
                others.append((_name(node), "neither of its inputs is the other branch's input: no identity"))
        return blocks, others

    def _blocks(self, node: onnx_ir.Node, operands: Sequence[onnx_ir.Value]) -> Iterator[Block]:
        for start, branch in (operands, reversed(operands)):
            inside = self._between(start, branch)
            if not any(item in self._linear for item in inside):
                continue
            tail = _tail(node, start)
            nodes = frozenset([*inside, node, *([] if tail is None else [tail])])
            end = (tail or node).outputs[0]
            reason = (
                _shapes(start, end, self._fixed)
                or _read_outside(nodes, end, self._readers)
                or _ends(start, end)
            )
            yield Block(_name(node), start, end, nodes, reason)

    def _between(self, start: onnx_ir.Value, branch: onnx_ir.Value) -> list[onnx_ir.Node]:
        """Nodes that ``branch`` is computed by from ``start``."""
        reached, found = {start}, []
        for at in sorted(ancestors(self._nodes, [branch])):
            node = self._nodes[at]
            if any(value in reached for value in captured_inputs(node)):
                reached.update(node.outputs)
                found.append(node)
        return found if branch in reached else []

    def _is_join(self, operands: Sequence[onnx_ir.Value]) -> bool:
        """Whether two branches of linear layers that come from one tensor are added."""
        left, right = (ancestors(self._nodes, [value]) for value in operands)
        return bool(left & right) and any(self._nodes[at] in self._linear for at in left ^ right)


def _tail(add: onnx_ir.Node, start: onnx_ir.Value) -> onnx_ir.Node | None:
    """The norm or activation behind ``add``, where the start of the block is made by the same operator."""
    behind, before = only_consumer(add.outputs[0]), start.producer()
    if behind is None or before is None or behind.op_type not in _TAILS:
        return None
    same = (behind.op_type, behind.domain) == (before.op_type, before.domain)
    return behind if same and behind.inputs[0] is add.outputs[0] else None


def _shapes(start: onnx_ir.Value, end: onnx_ir.Value, fixed: bool) -> str | None:
    """A size of 1 might grow in the sum, unless all sizes are fixed and calibration sees them."""
    if start.shape is None or end.shape is None:
        return None
    sizes = [tuple(item if isinstance(item, int) else None for item in v.shape or ()) for v in (start, end)]
    known = zip(*sizes, strict=False)
    same = all(a == b or (None in (a, b) and (fixed or 1 not in (a, b))) for a, b in known)
    if same and len(sizes[0]) == len(sizes[1]):
        return None
    return f"its input has shape {start.shape}, its output {end.shape}"


def _read_outside(
    nodes: frozenset[onnx_ir.Node], end: onnx_ir.Value, readers: dict[onnx_ir.Value, list[onnx_ir.Node]]
) -> str | None:
    for node in nodes:
        for value in node.outputs:
            if value is end:
                continue
            if value.is_graph_output():
                return f"{value.name!r} inside it is an output of the model"
            other = next((item for item in readers.get(value, []) if item not in nodes), None)
            if other is not None:
                return f"{value.name!r} inside it is read by {_name(other)!r} outside"
    return None


def _ends(start: onnx_ir.Value, end: onnx_ir.Value) -> str | None:
    """An output keeps its name, which the start can take over only where it has no name to keep itself."""
    if not end.is_graph_output():
        return None
    if start.producer() is None:
        return f"it is all that lies between the input {start.name!r} and the output {end.name!r}"
    if start.is_graph_output():
        return f"both its ends, {start.name!r} and {end.name!r}, are outputs of the model"
    return None


def _readers(model: Model) -> dict[onnx_ir.Value, list[onnx_ir.Node]]:
    """Nodes of the main graph by what they or bodies in them read."""
    readers: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
    for node in model.onnx.graph:
        for value in captured_inputs(node):
            readers.setdefault(value, []).append(node)
    return readers


def _name(node: onnx_ir.Node) -> str:
    return str(node.name or node.outputs[0].name)
