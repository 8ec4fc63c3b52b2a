"""Tables of vectors that Gather reads by number, and the products that read the same table as the head of a model.

A table ``[V, d]`` is no site: what reads it is no product. Its head is one, ``y = x table^T``, with the table as its
weight ``[N, K] = [V, d]``; exporters write it as a product with the transposed table, or with a copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.trace import RefusedError, all_readers, trace_back
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.passes.tidy.graph import int_attribute

__all__ = ["Table", "find_tables"]

_FLOATS = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)


@dataclass(frozen=True, eq=False)
class Table:
    """A constant ``[V, d]`` of the main graph whose rows are read by number. Good until its graph changes.

    Attributes:
        name: of the first Gather, of its output if that has none.
        weight: the initialiser.
        gathers: nodes that read rows of it.
        head: products with its transpose, as a site; None without any.
        copies: sites whose own weight is equal to the table.
    """

    name: str
    weight: onnx_ir.Value
    gathers: tuple[onnx_ir.Node, ...]
    head: Site | None
    copies: tuple[Site, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, d)."""
        rows, columns = self._tensor.shape.numpy()
        return rows, columns

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of its values."""
        return np.dtype(self._tensor.dtype.numpy())

    def numpy(self) -> NDArray[Any]:
        """Return the values ``[V, d]``; read-only."""
        return self._tensor.numpy()

    @property
    def heads(self) -> tuple[Site, ...]:
        """All products with its values, through this constant or a copy of it."""
        return self.copies if self.head is None else (self.head, *self.copies)

    @property
    def _tensor(self) -> onnx_ir.TensorProtocol:
        assert self.weight.const_value is not None, "an initialiser"
        return self.weight.const_value


def find_tables(model: Model) -> tuple[list[Table], list[tuple[str, str]]]:
    """Return the tables in graph order, and (name, reason) for every Gather of floating-point rows that reads none."""
    tables: dict[onnx_ir.Value, Table] = {}
    refused: list[tuple[str, str]] = []
    sites = model.sites()
    seen: set[onnx_ir.Value] = set()
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.onnx.graph):
        if node.domain != "" or node.op_type != "Gather" or node.inputs[0] is None:
            continue
        try:
            traced = trace_back(node.inputs[0])
        except RefusedError:
            continue  # rows of something computed
        weight = traced.constant
        if weight in seen or not _is_table(weight, quantised=traced.dequantize is not None):
            continue
        seen.add(weight)
        name = node.name or str(node.outputs[0].name)
        try:
            if traced.dequantize is not None:
                raise RefusedError("it is quantised: rewrite first, quantise after that")
            tables[weight] = _table(name, weight, model.onnx.graph, sites)
        except RefusedError as reason:
            refused.append((name, str(reason)))
    return list(tables.values()), refused


def _is_table(weight: onnx_ir.Value, *, quantised: bool) -> bool:
    tensor = weight.const_value
    if tensor is None:  # a Constant node
        producer = weight.producer()
        tensor = None if producer is None else producer.attributes["value"].as_tensor()
    return tensor is not None and len(tensor.shape) == 2 and (quantised or tensor.dtype in _FLOATS)


def _table(name: str, weight: onnx_ir.Value, main: onnx_ir.Graph, sites: list[Site]) -> Table:
    if weight.producer() is not None:
        raise RefusedError("its table is the output of a Constant node: fold constants first (pass tidy)")
    if main.initializers.get(str(weight.name)) is not weight:
        raise RefusedError("its table is inside a body of If, Loop or Scan")
    if weight.dtype == onnx_ir.DataType.BFLOAT16:
        raise RefusedError("its table is bfloat16, which onnxruntime does not multiply: store it as float16")
    gathers: list[onnx_ir.Node] = []
    heads: list[onnx_ir.Node] = []
    for node, index in all_readers(weight):
        if node.graph is not main:
            raise RefusedError(
                f"its table is also read inside a body, by {node.op_type} {node.name}".rstrip()
            )
        flipped = trace_back(node.inputs[index]).flipped
        if node.op_type == "Gather" and node.domain == "" and index == 0:
            if flipped or int_attribute(node, "axis", 0) != 0:
                raise RefusedError(f"{node.name or name} reads columns of its table, not rows")
            gathers.append(node)
        elif _is_head(node, index, flipped=flipped):
            heads.append(node)
        else:
            raise RefusedError(f"its table is also read by {node.op_type} {node.name}".rstrip())
    if any(PART_KEY in node.metadata_props for node in gathers):
        raise RefusedError("it is part of a layer that was rewritten already")
    head = _site(heads, weight) if heads else None
    return Table(name, weight, tuple(gathers), head, _copies(weight, sites))


def _is_head(node: onnx_ir.Node, index: int, *, flipped: bool) -> bool:
    """Whether the node multiplies with the transposed table."""
    if node.domain != "" or index != 1 or node.inputs[0] is None:
        return False
    if node.op_type == "Gemm":
        return not int_attribute(node, "transA", 0) and bool(int_attribute(node, "transB", 0)) != flipped
    return node.op_type == "MatMul" and flipped


def _site(heads: list[onnx_ir.Node], weight: onnx_ir.Value) -> Site:
    """The head as a site of the shape ``[V, d]``, to measure what it reads."""
    tensor = weight.const_value
    assert tensor is not None, "an initialiser"
    rows, columns = tensor.shape.numpy()
    return Site(
        name=heads[0].name or str(heads[0].outputs[0].name),
        op="Gemm" if heads[0].op_type == "Gemm" else "MatMul",
        nodes=tuple(dict.fromkeys(heads)),
        weight=weight,
        shape=(rows, columns),
        transposed=False,
        groups=1,
        input=heads[0].inputs[0],
        conv=None,
        scope="main",
    )


def _copies(weight: onnx_ir.Value, sites: list[Site]) -> tuple[Site, ...]:
    tensor = weight.const_value
    assert tensor is not None, "an initialiser"
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    return tuple(
        site
        for site in sites
        if site.op in ("MatMul", "Gemm")
        and site.shape == shape
        and site.dtype == dtype
        and site.in_main_graph
        and site.quantization is None
        and not any(PART_KEY in node.metadata_props for node in site.nodes)
        and np.array_equal(site.numpy(), tensor.numpy())
    )
