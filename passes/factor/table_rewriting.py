"""Putting the factors of a table, or the table itself, in the place of it and of its copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.passes.factor.tables import Table
from sparsecc.passes.hybrid.rewriting import PART_KEY, Rewriter
from sparsecc.passes.tidy.graph import int_attribute, remove_dead, set_constant

__all__ = ["TableFactors", "share", "split"]


@dataclass(frozen=True)
class TableFactors:
    """``near [V, r]``, whose rows are read, and ``back [r, d]``, both as the graph stores them."""

    near: NDArray[Any]
    back: NDArray[Any]


def share(model: Model, table: Table) -> None:
    """Let heads that multiply with a copy read the table itself."""
    rewriter = Rewriter(model)
    _mark(table)
    for site in table.copies:
        for node in site.nodes:
            _read_table(rewriter, node, table)
    remove_dead(model.onnx)
    model.infer_shapes()


def split(model: Model, table: Table, factors: TableFactors) -> None:
    """Store A in the place of the table and put the products with B behind what reads it, before what is tied."""
    rewriter = Rewriter(model)
    _forget_shapes(table.weight)
    set_constant(table.weight, factors.near)
    _mark(table)
    first = table.gathers[0]
    back = rewriter.constant(first, f"{table.name}.back", factors.back)
    for node in table.gathers:
        made = rewriter.node(node, "MatMul", [node.outputs[0], back], f"{table.name}.expand")
        made.metadata_props[PART_KEY] = table.name
        rewriter.replace(node, [made])
        node.outputs[0].shape = None  # its rows are shorter now
    if table.heads:
        _rewrite_heads(rewriter, table, rewriter.constant(first, f"{table.name}.into", factors.back.T.copy()))
    remove_dead(model.onnx)
    model.infer_shapes()


def _rewrite_heads(rewriter: Rewriter, table: Table, into: onnx_ir.Value) -> None:
    for site in table.heads:
        for node in site.nodes:
            made = rewriter.node(node, "MatMul", [node.inputs[0], into], f"{table.name}.reduce")
            node.replace_input_with(0, made.outputs[0])
            _insert(node, made, table.name)
            if site is not table.head:
                _read_table(rewriter, node, table)


def _forget_shapes(weight: onnx_ir.Value) -> None:
    """Let what hands the table on have any shape: it is narrower now."""
    pending = [weight]
    while pending:
        for node, _ in pending.pop().uses():
            if node.op_type in ("Identity", "Transpose"):
                node.outputs[0].shape = None
                pending.append(node.outputs[0])


def _mark(table: Table) -> None:
    """Mark all that reads the table or a copy of it, so that no pass rewrites it again."""
    heads = [node for site in table.heads for node in site.nodes]
    for node in (*table.gathers, *heads):
        node.metadata_props[PART_KEY] = table.name


def _read_table(rewriter: Rewriter, node: onnx_ir.Node, table: Table) -> None:
    """Let a head with a copy read the table."""
    operand = table.weight
    if not int_attribute(node, "transB", 0):
        flip = rewriter.node(node, "Transpose", [operand], f"{table.name}.transposed", {"perm": [1, 0]})
        _insert(node, flip, table.name)
        operand = flip.outputs[0]
    node.replace_input_with(1, operand)


def _insert(node: onnx_ir.Node, made: onnx_ir.Node, name: str) -> None:
    """Put ``made`` before ``node``, as part of what stands for the table."""
    assert node.graph is not None, "a node of the main graph"
    made.metadata_props[PART_KEY] = name
    node.graph.insert_before(node, made)
