"""Putting several linear operators in the place of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, value_names
from sparsecc.ir.slots import all_graphs
from sparsecc.passes.tidy.graph import add_constant, int_attribute

__all__ = ["PART_KEY", "Rewriter", "refusal"]

#: Metadata key on nodes that stand for one site together; hybrid passes leave them as they are.
PART_KEY = "sparsecc.part"


def refusal(site: Site) -> str | None:
    """Return why the nodes of ``site`` cannot be replaced by several, or None."""
    if PART_KEY in site.node.metadata_props:
        return "it is part of a layer that was rewritten already"
    if site.op not in ("MatMul", "Gemm", "Conv"):
        return f"{site.op} holds its weights inside: it cannot be split into several operators"
    if site.quantization is not None:
        return "it is quantised: rewrite first, quantise after that"
    if len(site.nodes) > 1:
        return f"its weight is shared by {len(site.nodes)} nodes"
    if site.groups > 1:
        return f"it is a convolution of {site.groups} groups"
    if site.scope == "function":
        return "it is inside a local function: inline that first"
    return None


class Rewriter:
    """Adds nodes beside the node of a site and lets one of them take its place.

    Sites of ``model`` are stale after the first change; their nodes are not.

    Args:
        model: its shapes are inferred as far as they are missing.

    Attributes:
        opset: of standard operators in the model.
    """

    def __init__(self, model: Model) -> None:
        model.infer_shapes()
        self.opset = model.opset
        self._values = value_names(model.onnx)
        self._nodes = {node.name for graph in all_graphs(model.onnx) for node in graph if node.name}

    def short_name(self) -> str:
        """Return a name for a value, of a few letters."""
        return free_name(f"u{len(self._values)}", self._values)

    def part(self, site: Site) -> onnx_ir.Node:
        """Return the node of ``site``, named as the site and marked as part of a rewritten layer."""
        site.node.name = site.node.name or site.name
        site.node.metadata_props[PART_KEY] = site.name
        return site.node

    def constant(self, near: onnx_ir.Node, name: str, array: NDArray[Any]) -> onnx_ir.Value:
        """Return a new initialiser in the graph of ``near``."""
        graph = near.graph
        assert isinstance(graph, onnx_ir.Graph), "refused inside functions"
        return add_constant(graph, name, array, self._values)

    def linear(
        self, node: onnx_ir.Node, source: onnx_ir.Value, weight: NDArray[Any], name: str, op: str = "MatMul"
    ) -> onnx_ir.Node:
        """Add a product of ``source`` with ``weight`` behind ``node``, without a bias, and return it.

        Args:
            node: whose graph and attributes are taken: a Conv adds a Conv.
            source: multiplied.
            weight: ``[N, K]``; for a Conv as it stores it, ``[N, C, kernel...]``.
            name: of the node.
            op: ``Conv`` with the geometry of ``node``, ``pointwise``: Conv with a kernel of 1, or ``MatMul``.
        """
        attributes: Sequence[onnx_ir.Attr] = ()
        if op == "Conv":
            attributes = list(node.attributes.values())
        stored = weight.T if op == "MatMul" else weight
        constant = self.constant(node, f"{name}.weight", np.ascontiguousarray(stored))
        made = self.node(node, "MatMul" if op == "MatMul" else "Conv", [source, constant], name, attributes)
        made.metadata_props[PART_KEY] = node.metadata_props[PART_KEY]
        return made

    def node(
        self,
        near: onnx_ir.Node,
        op: str,
        inputs: Sequence[onnx_ir.Value | None],
        name: str,
        attributes: Sequence[onnx_ir.Attr] | Mapping[str, Any] = (),
        results: int = 1,
    ) -> onnx_ir.Node:
        """Add a node whose results have the type of that of ``near``, which it may not come before."""
        if isinstance(attributes, Mapping):
            attributes = [
                onnx_ir.convenience.convert_attribute(key, value) for key, value in attributes.items()
            ]
        made = onnx_ir.Node(
            "", op, inputs, attributes, num_outputs=results, name=free_name(name, self._nodes)
        )
        for value in made.outputs:
            value.name = free_name(f"{name}.out", self._values)
            value.type = near.outputs[0].type
        return made

    def replace(self, node: onnx_ir.Node, chain: Sequence[onnx_ir.Node]) -> None:
        """Put ``chain`` into the graph behind ``node``; its last result takes over name, shape and readers.

        Nodes of the chain may read the result of ``node``.
        """
        graph, old, new = node.graph, node.outputs[0], chain[-1].outputs[0]
        assert graph is not None
        own = [(item, at) for item in chain for at, value in enumerate(item.inputs) if value is old]
        new.shape, new.type = old.shape, old.type
        onnx_ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        for item, at in own:
            item.replace_input_with(at, old)
        name = str(old.name)
        old.name = free_name(f"{node.name}.part", self._values)
        new.name = name
        graph.insert_after(node, chain)

    def split_outputs(self, site: Site, sparse: slice) -> str | None:
        """Let the outputs ``sparse`` of ``site`` be a product of their own, which keeps the name of the site.

        The others become another product and Concat puts both together. Returns why not, or None when done.
        """
        weight, node = site.numpy(), site.node
        rows = len(weight)
        if not 0 < sparse.stop - sparse.start < rows:
            return "all its outputs are of one kind"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        held = None if bias is None else bias.const_value
        if bias is not None and (held is None or bias.is_graph_input() or held.shape.numpy()[-1:] != (rows,)):
            return "its bias is not one constant per output"
        self.part(site)
        rest = slice(sparse.stop, rows) if sparse.start == 0 else slice(0, sparse.start)
        shape = site.weight_shape
        name = str(node.name)

        def operands(part: slice, suffix: str) -> list[onnx_ir.Value]:
            own = weight[part]
            if site.op == "Conv":
                own = own.reshape(-1, *shape[1:])
            elif site.op == "MatMul" or not int_attribute(node, "transB", 0):
                own = own.T
            values = [self.constant(node, f"{name}.{suffix}.weight", np.ascontiguousarray(own))]
            if held is not None:
                values.append(self.constant(node, f"{name}.{suffix}.bias", held.numpy()[..., part].copy()))
            return values

        source = node.inputs[0]
        attributes = list(node.attributes.values())
        dense = self.node(node, site.op, [source, *operands(rest, "dense")], f"{name}.dense", attributes)
        dense.metadata_props[PART_KEY] = node.metadata_props[PART_KEY]
        for at, value in enumerate(operands(sparse, "sparse"), 1):
            node.replace_input_with(at, value)
        both = [node.outputs[0], dense.outputs[0]]
        axis = 1 if site.op == "Conv" else -1
        ordered = both if sparse.start == 0 else both[::-1]
        self.replace(node, [dense, self.node(node, "Concat", ordered, f"{name}.concat", {"axis": axis})])
        node.outputs[0].shape = None  # it has fewer channels now
        return None
