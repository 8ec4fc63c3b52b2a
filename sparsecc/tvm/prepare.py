"""A model as TVM gets it: shapes settled, every heavy operator one of ours, and those of ours taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx.version_converter
import onnx_ir as ir

from sparsecc.calib.synthetic import resolve_shapes
from sparsecc.emit import DOMAIN, Operator, operators
from sparsecc.errors import ModelError
from sparsecc.ir import Model, Site
from sparsecc.ir.ops_recurrent import GATES
from sparsecc.passes.lower.choose_layout import mark
from sparsecc.passes.lower.fuse_transformer import FuseTransformer
from sparsecc.passes.lower.known_sizes import infer_more_shapes
from sparsecc.passes.lower.linear_form import MIN_OPSET
from sparsecc.passes.lower.lower_sparse import LowerSparse
from sparsecc.passes.tidy.tidy import Tidy
from sparsecc.pm import PassContext
from sparsecc.sparse import Layout, Pattern
from sparsecc.tvm.record import NodeRecord

__all__ = ["NODE", "NUMBER", "KernelNode", "Prepared", "prepare", "raised", "settle"]

#: Name of the operator that stands for a node of ours, and its attribute: which.
NODE = "SparseccKernel"
NUMBER = "number"

#: Blocks in which a dense weight is packed, the widest first that fits the groups of a convolution.
_BLOCKS = (16, 8, 4)


@dataclass(frozen=True)
class KernelNode:
    """A node that runs on our kernels.

    Attributes:
        record: what the module stores of it.
        operator: what it computes.
        node: as it was.
    """

    record: NodeRecord
    operator: Operator
    node: ir.Node


@dataclass(frozen=True)
class Prepared:
    """What there is to compile.

    Attributes:
        model: standard operators and nodes of ``NODE``, whose attribute ``NUMBER`` is a place in ``kernels``.
        kernels: what these stand for.
        shapes: the shape of each input.
    """

    model: Model
    kernels: tuple[KernelNode, ...]
    shapes: dict[str, tuple[int, ...]]


def prepare(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Prepared:
    """Return ``model`` ready to be imported; it stays as it was.

    Args:
        model: as ``optimize`` wrote it, or any other.
        shapes: of inputs with symbolic dimensions; see ``resolve_shapes`` for what is taken else.

    Raises:
        UsageError: ``shapes`` do not fit.
        ModelError: a node of ours is none of this release.
    """
    settled = resolve_shapes(model, shapes)
    model = raised(model)
    settle(model, settled)
    context = PassContext()
    Tidy().run(model, context)
    infer_more_shapes(model.onnx)
    for site in model.sites():
        _mark_for_kernel(site)
    LowerSparse().run(model, context)
    FuseTransformer(min_gain=0).run(model, context)
    kernels: list[KernelNode] = []
    for graph in model.graphs():
        for node in list(graph):
            if node.domain == DOMAIN:
                _take_out(node, kernels)
    model.onnx.functions.clear()
    model.onnx.opset_imports.pop(DOMAIN, None)
    _drop_unused(model.onnx.graph)
    return Prepared(model, tuple(kernels), settled)


def raised(model: Model) -> Model:
    """A copy, of a version of ONNX in which sites can be lowered where onnx can convert it."""
    if model.opset >= MIN_OPSET or model.onnx.functions:
        return model.copy()
    try:
        return Model.from_proto(onnx.version_converter.convert_version(model.to_proto(), MIN_OPSET))
    except Exception:  # the C++ side raises several kinds
        return model.copy()


def settle(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the inputs their shapes; what was known of others by symbols is found out again."""
    for value in model.onnx.graph.inputs:
        if value.name is not None and value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and not all(isinstance(dim, int) for dim in value.shape):
                    value.shape = None


def _mark_for_kernel(site: Site) -> None:
    """Mark a site that is still a standard operator; lowering then leaves those alone that no kernel can take.

    A block kernel with every block kept is a dense product, about as fast as onnxruntime's (ADR 0061).
    """
    if site.op in GATES:  # W and R [directions, gates * hidden, ...]
        rows = _rows(site.weight_shape[1] // GATES[site.op])
    else:
        rows = _rows(site.shape[0] // site.groups) if site.groups > 1 else _BLOCKS[0]
    int8 = site.quantization is not None
    pattern = Pattern("block", rows=rows, cols=4 if int8 else 1) if rows > 1 else Pattern("unstructured")
    mark(site, str(Layout(pattern, "int8" if int8 else "fp32")), 1.0)


def _rows(outputs: int) -> int:
    """Outputs of a block that must not cross groups of so many."""
    return next((rows for rows in _BLOCKS if outputs % rows == 0), 1)


def _take_out(node: ir.Node, kernels: list[KernelNode]) -> None:
    """Put a node of ``NODE`` in the place of one of ours, which reads what is not constant."""
    operator = operators().get(node.op_type)
    if operator is None:
        raise ModelError(f"node '{node.name}' is {DOMAIN}.{node.op_type}, which this release does not know")
    constants = tuple(None if value is None else value.const_value for value in node.inputs)
    attributes = {name: _plain(attribute) for name, attribute in node.attributes.items()}
    record = NodeRecord(node.name or "", node.op_type, attributes, constants)
    computed = [value for value, constant in zip(node.inputs, constants, strict=True) if constant is None]
    stand_in = ir.node(
        NODE, computed, attributes={NUMBER: len(kernels)}, num_outputs=len(node.outputs), name=node.name
    )
    kernels.append(KernelNode(record, operator, node))
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [stand_in], node.outputs, stand_in.outputs
    )


def _plain(attribute: ir.Attr) -> int | float | str | tuple[int, ...]:
    if attribute.type == ir.AttributeType.INTS:
        return tuple(attribute.as_ints())
    if attribute.type == ir.AttributeType.STRING:
        return attribute.as_string()
    return attribute.as_float() if attribute.type == ir.AttributeType.FLOAT else attribute.as_int()


def _drop_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
