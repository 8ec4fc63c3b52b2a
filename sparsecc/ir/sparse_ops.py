"""The names of the sparse operators, and the making of their nodes.

Only what a rewriting pass needs to write a node down; what the operators mean (function bodies, shape
rule, reference) is in ``sparsecc.emit.schema``, which takes its names from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.geometry import ConvGeometry
from sparsecc.ir.names import free_name, graph_names
from sparsecc.sparse import FLOATS, LAYOUT_VERSION, Pattern, QuantizedTensor, SparseTensor

__all__ = [
    "ACTIVATIONS",
    "BF16_OPSET",
    "DOMAIN",
    "DOMAIN_VERSION",
    "FAMILIES",
    "MEMBERS_KEY",
    "XForm",
    "check_value_type",
    "family_name",
    "initializer",
    "sparse_op_node",
]

DOMAIN = "ai.sparsecc"
DOMAIN_VERSION = 1

BF16_OPSET = 13
"""Lowest version of the default domain whose Cast takes bfloat16; float16 goes with all versions that bodies need."""

MEMBERS_KEY = "sparsecc.members"
"""Metadata of a node that does the work of several sites: their names as a JSON list."""

FAMILIES = (
    "SparseMatMul",
    "SparseConv",
    "SparseConvAdd",
    "BlockSparseMatMul",
    "BlockSparseConv",
    "BlockSparseConvAdd",
    "SparseMatMulInt8",
    "BlockSparseMatMulInt8",
    "SparseMatMulInt8Static",
    "BlockSparseMatMulInt8Static",
    "SparseMatMulInt8Bytes",
    "BlockSparseMatMulInt8Bytes",
)
"""Operator families; the operator's name is the family's followed by the activation's."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "": (),
    "Relu": (),
    "LeakyRelu": ("alpha",),
    "Clip": ("lo", "hi"),
    "Sigmoid": (),
    "Tanh": (),
    "Gelu": (),
    "GeluTanh": (),
    "Silu": (),
    "HardSwish": (),
}
"""Fused activations by name suffix, with the parameters each takes."""


XForm = Literal["", "Static", "Bytes"]
"""How x comes to an operator with int8 weights: float32, quantised inside by its own range; float32, quantised
inside by a given scale and zero point; or uint8 with these given."""


def family_name(
    pattern: Pattern, *, conv: bool, int8: bool = False, x_form: XForm = "", adds: bool = False
) -> str:
    """Return which operator family stores a weight of ``pattern``.

    ``int8`` exists for products only, and ``x_form`` says something about those; ``adds`` for convolutions only.
    """
    prefix = "Block" if pattern.kind == "block" else ""
    kind = ("SparseConv" if conv else "SparseMatMul") + (f"Int8{x_form}" if int8 else "")
    return prefix + kind + ("Add" if adds else "")


def sparse_op_node(
    graph: ir.Graph,
    x: ir.Value | None,
    weight: SparseTensor | QuantizedTensor,
    *,
    name: str,
    bias: NDArray[np.float32] | None = None,
    activation: str = "",
    parameters: Mapping[str, float] | None = None,
    weight_shape: Sequence[int] | None = None,
    conv: ConvGeometry | None = None,
    residual: ir.Value | None = None,
    share: ir.Node | None = None,
    taken: set[str] | None = None,
    x_scale: ir.Value | None = None,
    x_zero_point: ir.Value | None = None,
) -> ir.Node:
    """Return a new operator node, not yet in ``graph``, whose constants are initializers of ``graph``.

    ``y = activation(x W^T + bias + residual)``; with ``conv`` a convolution of ``x`` by W.

    Args:
        graph: the graph (or subgraph) which the node will be put into. onnxruntime up to 1.24 hands a kernel
            only the constants of the node's own graph, so the packed weight goes there too.
        x: float32, ``[..., K]``, or ``[B, C, H, W]`` or ``[B, C, L]`` with ``conv``.
        weight: the packed matrix ``[N, K]``; K runs over (Cin / group, kernel...) with ``conv``. With int8
            values, which convolutions do not take yet, the operator quantises ``x`` on its way in.
        name: name of the node and prefix of its initializers.
        bias: ``[N]``; ``None`` is zeros.
        activation: a key of ``ACTIVATIONS``.
        parameters: exactly the numbers that ``ACTIVATIONS`` lists for it.
        weight_shape: the original ``[Cout, Cin / group, kernel...]``; needed with ``conv``.
        conv: geometry of a convolution; ``None`` makes a matrix multiplication.
        residual: float32 of the shape of y, for convolutions only; ``None`` adds nothing.
        share: an operator node of the same graph with the same weight, whose packed tensors are used again.
        taken: names that the constants must not have; theirs are added. A graph does not know what lies
            around it, so the caller passes ``value_names`` of the model if ``graph`` may be the body of an If,
            Loop or Scan. Default: the names in ``graph`` and in the bodies in it, and those they read from
            outside, which is enough for right results but not for names that differ in the whole model.
        x_scale: with int8 values: float32 scalar, constant or not, to quantise ``x`` by; ``x`` may be of type
            uint8, and then is quantised already. ``None``: by the range of ``x``.
        x_zero_point: uint8 scalar; needed with ``x_scale``.

    Raises:
        ValueError: the arguments do not fit together (a mistake of the calling pass).
    """
    wanted = ACTIVATIONS[activation]
    parameters = parameters or {}
    if set(parameters) != set(wanted):
        raise ValueError(f"activation '{activation}' takes {wanted}, got {tuple(parameters)}")
    shape = tuple(weight.shape if conv is None else weight_shape or ())
    if len(shape) < 2 or (shape[0], int(np.prod(shape[1:]))) != weight.shape:
        raise ValueError(f"weight_shape {shape} is no shape of a packed weight {weight.shape}")
    check_value_type(graph, weight)
    int8 = isinstance(weight, QuantizedTensor)
    if int8 and conv is not None:
        raise ValueError("a convolution takes no int8 weights")
    if (x_scale is None) != (x_zero_point is None) or (x_scale is not None and not int8):
        raise ValueError("x_scale and x_zero_point belong together, and to int8 weights")
    if residual is not None and conv is None:
        raise ValueError("only a convolution adds something")
    bias = np.zeros(shape[0], np.float32) if bias is None else bias.astype(np.float32, copy=False)
    if bias.shape != shape[:1]:
        raise ValueError(f"bias has shape {bias.shape}, the weight has {shape[0]} outputs")

    if taken is None:
        taken = graph_names(graph)
    if share is not None:
        constants = list(share.inputs[1 : 5 if int8 else 4])
    else:
        constants = [
            initializer(graph, taken, f"{name}.values", weight.values),
            initializer(graph, taken, f"{name}.indices", weight.indices),
            initializer(graph, taken, f"{name}.shape", np.array(shape, np.int64)),
        ]
        if isinstance(weight, QuantizedTensor):
            constants.append(initializer(graph, taken, f"{name}.scales", weight.scales))
    constants.append(initializer(graph, taken, f"{name}.bias", bias))
    if activation == "Clip":
        constants += [
            initializer(graph, taken, f"{name}.{bound}", np.array(parameters[bound], np.float32))
            for bound in ("lo", "hi")
        ]
    x_form: XForm = ""
    if x_scale is not None:
        constants += [x_scale, x_zero_point]
        x_form = "Bytes" if x is not None and x.dtype == ir.DataType.UINT8 else "Static"
    attributes = [
        ir.AttrString("layout", str(weight.pattern)),
        ir.AttrInt64("layout_version", LAYOUT_VERSION),
    ]
    if activation == "LeakyRelu":
        attributes.append(ir.AttrFloat32("alpha", parameters["alpha"]))
    if conv is not None:
        attributes += _conv_attributes(conv)
    return ir.Node(
        DOMAIN,
        family_name(
            weight.pattern, conv=conv is not None, int8=int8, x_form=x_form, adds=residual is not None
        )
        + activation,
        [x, *constants, *(() if residual is None else (residual,))],
        attributes,
        name=name,
        version=DOMAIN_VERSION,
    )


def check_value_type(graph: ir.Graph, weight: SparseTensor | QuantizedTensor) -> None:
    """Raise ``ValueError`` where the functions of ``graph`` have no operator for the type of the values."""
    opset = graph.opset_imports.get("")  # a body of If, Loop or Scan does not say it
    if weight.values.dtype == FLOATS["bf16"] and opset is not None and opset < BF16_OPSET:
        raise ValueError(f"bfloat16 values need opset {BF16_OPSET}, the model has {opset}")


def _conv_attributes(conv: ConvGeometry) -> list[ir.Attr]:
    if conv.pads is None:
        raise ValueError("a sparse convolution needs explicit pads")
    return [
        ir.AttrInt64s("strides", list(conv.strides)),
        ir.AttrInt64s("pads", list(conv.pads)),
        ir.AttrInt64s("dilations", list(conv.dilations)),
        ir.AttrInt64("group", conv.group),
    ]


def initializer(graph: ir.Graph, taken: set[str], name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return a new initializer of ``graph`` that holds ``array``; its name is ``name`` or not in ``taken``."""
    name = free_name(name, taken)
    value = ir.Value(
        name=name,
        const_value=ir.Tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value
