"""An attention whose heads have fewer dimensions, written anew in standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, value_names
from sparsecc.passes.lower.head_patterns import HEADS_BEFORE_ROWS, Turn
from sparsecc.passes.structure.heads import Attention, Projection, table_rank
from sparsecc.passes.tidy.graph import add_constant, bypass, remove_dead, set_constant

__all__ = ["Reduced", "rewrite"]

_KEYS_LAST = [0, 2, 3, 1]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Reduced:
    """What an attention becomes.

    Attributes:
        attention: as it is.
        weights: of q, k and v, ``[heads * size, K]``, the factor of the scores in that of q.
        biases: of q, k and v; None where a layer needs none any more.
        out: weight ``[N, heads * value size]`` of the layer that reads the result.
        dimensions: with rotary positions those that stay, ``[kv_heads, size]``: lower ones of pairs, then partners.
    """

    attention: Attention
    weights: tuple[Array, Array, Array]
    biases: tuple[Array, Array | None, Array | None]
    out: Array
    dimensions: NDArray[np.int64] | None


def rewrite(model: Model, reduced: Sequence[Reduced]) -> tuple[set[str], set[str]]:
    """Put the reduced attentions in the place of what they are now.

    Returns the names of the tensors that are new, and of the layers that compute something else.
    """
    used = value_names(model.onnx)
    before = {value.name for node in model.onnx.graph for value in node.outputs}
    nodes = {node.name for graph in model.graphs() for node in graph if node.name}
    for item in reduced:
        _Writer(item, used, nodes).write()
    remove_dead(model.onnx)
    ends = set(model.onnx.graph.inputs) | set(model.onnx.graph.outputs)
    for node in model.onnx.graph:
        for value in node.outputs:
            if value not in ends:
                value.shape = None  # sizes that were known before no longer hold
    model.infer_shapes()
    after = {str(value.name) for node in model.onnx.graph for value in node.outputs}
    return after - before, {site.name for item in reduced for site in item.attention.sites}


class _Writer:
    """Writes one attention; nodes are put in front of ``_before``."""

    def __init__(self, item: Reduced, used: set[str], nodes: set[str]) -> None:
        self._item = item
        self._match = item.attention.match
        self._used = used
        self._nodes = nodes
        self._before = item.attention.softmax
        graph = self._before.graph
        assert isinstance(graph, onnx_ir.Graph), "find_attentions looks at the main graph"
        self._graph = graph
        heads, kv_heads = self._match.heads, self._match.kv_heads
        self._heads, self._kv_heads = heads, kv_heads
        self._whole = self._match.sizes[0]
        self._rows = list(self._match.inputs)
        self._size = len(item.weights[0]) // heads
        self._value_size = len(item.weights[2]) // kv_heads

    def write(self) -> None:
        self._store_layers()
        match, shared = self._match, self._heads != self._kv_heads
        q = self._heads_of(self._rows[0], match.q.turn, self._heads)
        q = self._node("Transpose", [q], "q", perm=HEADS_BEFORE_ROWS)
        if shared:  # the queries of all heads that share a key are rows of one product
            q = self._reshaped(q, [0, self._kv_heads, -1, self._size], "q")
        k = self._heads_of(self._rows[1], match.k.turn, self._kv_heads)
        k = self._node("Transpose", [k], "k", perm=_KEYS_LAST)
        scores = self._node("MatMul", [q, k], "scores")
        if shared:
            scores = self._reshaped(scores, [0, self._heads, -1, 0], "scores")
        if match.mask is not None:
            scores = self._node("Add", [scores, match.mask], "masked")
        softmax = self._item.attention.softmax
        softmax.replace_input_with(0, scores)
        softmax.attributes["axis"] = onnx_ir.AttrInt64("axis", -1)
        last = match.output.producer()
        assert last is not None, "a match ends at a node"
        self._before = last
        shares = softmax.outputs[0]
        if shared:
            shares = self._reshaped(shares, [0, self._kv_heads, -1, 0], "shares")
        v = self._reshaped(self._rows[2], [0, 0, self._kv_heads, self._value_size], "v")
        v = self._node("Transpose", [v], "v", perm=HEADS_BEFORE_ROWS)
        context = self._node("MatMul", [shares, v], "context")
        if shared:
            context = self._reshaped(context, [0, self._heads, -1, self._value_size], "context")
        context = self._node("Transpose", [context], "context", perm=HEADS_BEFORE_ROWS)
        rows = self._reshaped(context, [0, 0, self._heads * self._value_size], "rows")
        onnx_ir.convenience.replace_all_uses_with(match.output, rows)

    def _heads_of(self, rows: onnx_ir.Value, turn: Turn | None, heads: int) -> onnx_ir.Value:
        """``[B, S, heads, size]``, turned by their positions."""
        x = self._reshaped(rows, [0, 0, heads, self._size], "heads")
        if turn is None or self._item.dimensions is None:
            return x
        half = self._size // 2
        kept = np.repeat(self._item.dimensions, heads // self._kv_heads, axis=0)
        cosines, sines = (self._table(turn, table, kept) for table in turn.tables)
        low, high = self._slice(x, 0, half), self._slice(x, half, self._size)
        if turn.partners is None:
            high = self._node("Neg", [high], "turned")
        turned = self._node("Concat", [high, low], "turned", axis=-1)
        parts = [self._node("Mul", pair, "turned") for pair in ([x, cosines], [turned, sines])]
        return self._node("Add", parts, "turned")

    def _table(self, turn: Turn, table: onnx_ir.Value, kept: NDArray[np.int64]) -> onnx_ir.Value:
        """The columns of a table that each head keeps, ``[..., S, heads, size]``."""
        if table_rank(turn, self._whole) == 4:  # [B, 1, S, size]
            table = self._reshaped(table, [0, -1, self._whole], "table")
        return self._node("Gather", [table, self._constant("dimensions", kept)], "table", axis=-1)

    def _slice(self, x: onnx_ir.Value, start: int, end: int) -> onnx_ir.Value:
        bounds = [self._constant("bound", np.array([number], np.int64)) for number in (start, end, -1)]
        return self._node("Slice", [x, *bounds], "half")

    def _reshaped(self, x: onnx_ir.Value, shape: Sequence[int], name: str) -> onnx_ir.Value:
        return self._node("Reshape", [x, self._constant("shape", np.array(shape, np.int64))], name)

    def _constant(self, name: str, array: Array) -> onnx_ir.Value:
        return add_constant(self._graph, f"{self._item.attention.name}.{name}", array, self._used)

    def _node(self, op: str, inputs: Sequence[onnx_ir.Value], name: str, **attributes: Any) -> onnx_ir.Value:
        name = f"{self._item.attention.name}.{name}"
        node = onnx_ir.node(op, inputs, attributes, name=free_name(name, self._nodes))
        node.outputs[0].name = free_name(f"{name}.out", self._used)
        node.outputs[0].type = inputs[0].type
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    # ---- layers

    def _store_layers(self) -> None:
        attention, item = self._item.attention, self._item
        projections = (attention.q, attention.k, attention.v)
        grouped: dict[str, list[int]] = {}
        for number, projection in enumerate(projections):
            grouped.setdefault(projection.site.name, []).append(number)
        for numbers in grouped.values():
            numbers.sort(key=lambda number: projections[number].rows.start)
            first = projections[numbers[0]]
            _store(first.site, np.concatenate([item.weights[number] for number in numbers]))
            if first.holder is not None:
                self._store_bias(first, numbers)
            if first.split is not None:
                self._store_sizes(first.split, [len(item.weights[number]) for number in numbers])
        _store(attention.out, item.out)

    def _store_bias(self, projection: Projection, numbers: Sequence[int]) -> None:
        assert projection.holder is not None, "looked before"
        parts = [self._item.biases[number] for number in numbers]
        if any(part is not None for part in parts):
            sizes = [len(self._item.weights[number]) for number in numbers]
            pairs = zip(parts, sizes, strict=True)
            bias = np.concatenate([np.zeros(size) if part is None else part for part, size in pairs])
            projection.store_bias(bias, self._used)
            return
        node, index = projection.holder
        if node.op_type == "Gemm":
            node.resize_inputs(2)
            return
        product = node.inputs[1 - index]
        assert product is not None, "Add needs it"
        bypass(node, product)
        if projection.split is None:
            self._rows[numbers[0]] = product

    def _store_sizes(self, split: onnx_ir.Node, sizes: Sequence[int]) -> None:
        split.attributes.pop("num_outputs", None)
        if "split" in split.attributes:
            split.attributes["split"] = onnx_ir.AttrInt64s("split", list(sizes))
            return
        if len(split.inputs) < 2:
            split.resize_inputs(2)
        split.replace_input_with(1, self._constant("sizes", np.array(sizes, np.int64)))


def _store(site: Site, weight: Array) -> None:
    """Give a layer a weight ``[N, K]`` of another shape."""
    stored = weight.T if site.transposed else weight
    set_constant(site.weight, np.ascontiguousarray(stored).astype(site.dtype))
