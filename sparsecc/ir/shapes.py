"""Types and shapes of values: what the inputs are, and shape inference that never touches the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir

from sparsecc.ir.read import one_line
from sparsecc.ir.write import to_skeleton

__all__ = ["TensorSpec", "infer_shapes", "tensor_specs"]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    Attributes:
        name: its name.
        dtype: NumPy name such as ``float32``, ``bfloat16`` or ``string``; ``sequence`` or ``optional`` if it
            is no tensor; empty if unknown.
        shape: a number, a symbol, or None for each dimension; None if the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


def tensor_specs(values: Iterable[onnx_ir.Value]) -> list[TensorSpec]:
    """Return what is declared about ``values``."""
    return [TensorSpec(value.name or "", _dtype_name(value.type), _dims(value.shape)) for value in values]


def infer_shapes(model: onnx_ir.Model) -> str | None:
    """Fill in missing types and shapes of the main graph and its bodies; return why it failed, or None.

    Declared shapes stay. A failure leaves the model as it was: shapes are a help, not a condition.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(to_skeleton(model), data_prop=True)
    except Exception as error:  # the C++ side raises several kinds
        return f"shape inference failed: {one_line(error)}"
    _fill(model.graph, proto.graph)
    return None


def _fill(graph: onnx_ir.Graph, proto: onnx.GraphProto) -> None:
    known = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            _fill_value(value, known)
        bodies = {attr.name: attr for attr in node_proto.attribute}
        for name, attr in node.attributes.items():
            if attr.type == onnx_ir.AttributeType.GRAPH and not attr.is_ref():
                _fill(attr.as_graph(), bodies[name].g)
            elif attr.type == onnx_ir.AttributeType.GRAPHS and not attr.is_ref():
                for body, body_proto in zip(attr.as_graphs(), bodies[name].graphs, strict=True):
                    _fill(body, body_proto)


def _fill_value(value: onnx_ir.Value, known: Mapping[str, onnx.TypeProto]) -> None:
    found = known.get(value.name or "")
    if found is None or not found.HasField("tensor_type"):
        return
    if value.type is None:
        value.type = onnx_ir.serde.deserialize_type_proto_for_type(found)
    if value.shape is None:
        value.shape = onnx_ir.serde.deserialize_type_proto_for_shape(found)


def _dtype_name(type_: onnx_ir.TypeProtocol | None) -> str:
    if type_ is None:
        return ""
    if not isinstance(type_, onnx_ir.TensorType):
        return type(type_).__name__.removesuffix("Type").lower()
    if type_.dtype in (onnx_ir.DataType.STRING, onnx_ir.DataType.UNDEFINED):
        return "string" if type_.dtype == onnx_ir.DataType.STRING else ""
    return str(type_.dtype.numpy().name)


def _dims(shape: onnx_ir.ShapeProtocol | None) -> tuple[int | str | None, ...] | None:
    if shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)
