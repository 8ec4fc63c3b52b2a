"""Sites rewritten to integers with activations quantised at run time, as onnxruntime fuses them.

::

    MatMul(x, W)   ->  q, s, z = DynamicQuantizeLinear(x)        once for all sites that read x
                       Mul(Cast(MatMulInteger(q, W_int8, z)), Mul(s, W_scale))

onnxruntime makes one ``DynamicQuantizeMatMul`` of it, or a ``MatMulIntegerToFloat`` where x is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, value_names
from sparsecc.ir.slots import all_graphs
from sparsecc.passes.quantize.weights import Int8Weights, name_of
from sparsecc.passes.tidy.graph import add_constant, float_attribute

__all__ = ["DynamicWriter", "dynamic_refusal"]

_MIN_OPSET = 11  # DynamicQuantizeLinear


def dynamic_refusal(model: Model, site: Site) -> str | None:
    """Return why ``site`` cannot be written in this form, or None."""
    if site.op == "Conv":
        return "a convolution with dynamic activations is slow in onnxruntime: use activations=static"
    if model.opset < _MIN_OPSET:
        return f"opset {model.opset} is below {_MIN_OPSET}; convert the model to a newer opset first"
    for node in site.nodes:
        if node.op_type == "Gemm" and (float_attribute(node, "alpha", 1), float_attribute(node, "beta", 1)) != (
            1, 1
        ):  # fmt: skip
            return "Gemm with alpha or beta: run tidy first"
    return None


@dataclass
class DynamicWriter:
    """Rewrites sites of one model; sites that read the same value share its quantisation, also with earlier ones."""

    model: onnx_ir.Model
    _taken: set[str] = field(init=False)
    _quantized: dict[tuple[onnx_ir.Graph, onnx_ir.Value], onnx_ir.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._taken = value_names(self.model)
        for graph in all_graphs(self.model):
            for node in graph:
                if node.op_type == "DynamicQuantizeLinear" and node.inputs[0] is not None:
                    self._quantized[graph, node.inputs[0]] = node

    def write(self, site: Site, weights: Int8Weights) -> None:
        """Replace all nodes of ``site``."""
        graphs = {node.graph for node in site.nodes}
        holder = self.model.graph if len(graphs) > 1 else site.node.graph
        assert isinstance(holder, onnx_ir.Graph)  # functions are refused
        codes = add_constant(
            holder, f"{site.weight_name}.int8", np.ascontiguousarray(weights.codes.T), self._taken
        )
        scale = add_constant(holder, f"{site.weight_name}.scale", weights.scales, self._taken)
        for node in site.nodes:
            self._replace(node, name_of(site, node), codes, scale)

    def _replace(self, node: onnx_ir.Node, name: str, codes: onnx_ir.Value, scale: onnx_ir.Value) -> None:
        graph, x = node.graph, node.inputs[0]
        assert isinstance(graph, onnx_ir.Graph)
        assert x is not None
        data, x_scale, zero_point = self._quantizer(graph, x).outputs
        product = self._node("MatMulInteger", [data, codes, zero_point], name)
        exact = self._node("Cast", [product.outputs[0]], f"{name}.cast", to=onnx_ir.DataType.FLOAT)
        factor = self._node("Mul", [x_scale, scale], f"{name}.scale")
        real = self._node("Mul", [exact.outputs[0], factor.outputs[0]], f"{name}.real")
        nodes = [product, exact, factor, real]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            nodes.append(self._node("Add", [real.outputs[0], node.inputs[2]], f"{name}.bias"))
        onnx_ir.convenience.replace_nodes_and_values(
            graph, node, [node], nodes, node.outputs, nodes[-1].outputs
        )

    def _quantizer(self, graph: onnx_ir.Graph, x: onnx_ir.Value) -> onnx_ir.Node:
        key = graph, x
        if key not in self._quantized:
            name = f"{x.name}.quantized"
            node = self._node("DynamicQuantizeLinear", [x], name, outputs=("", ".scale", ".zero_point"))
            producer = x.producer()
            if producer is not None and producer.graph is graph:
                graph.insert_after(producer, node)
            else:
                graph.insert_before(graph[0], node)
            self._quantized[key] = node
        return self._quantized[key]

    def _node(
        self,
        op_type: str,
        inputs: list[onnx_ir.Value],
        name: str,
        outputs: tuple[str, ...] = (".out",),
        **attributes: int,
    ) -> onnx_ir.Node:
        node = onnx_ir.node(op_type, inputs, attributes, num_outputs=len(outputs), name=name)
        for value, suffix in zip(node.outputs, outputs, strict=True):
            value.name = free_name(f"{name}{suffix}", self._taken)
        return node
