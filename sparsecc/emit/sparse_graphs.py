"""Models around sparse operands, built from matrices: a layer of a graph network, attention over a pattern."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.algebra.levels import Compressed, Tensor
from sparsecc.emit.finalize import finalize
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.ir.names import graph_names
from sparsecc.ir.ops_algebra import Csr, einsum_node, sparse_softmax_node
from sparsecc.ir.sparse_ops import initializer

__all__ = ["csr_constants", "csr_inputs", "gnn_layer_model", "sparse_attention_model"]

_IR_VERSION = 8
_OPSET = 18  # that of ScatterND with the largest, in the body of SparseSoftmax

Integers = Literal["int32", "int64"]


def _integers(tensor: Tensor) -> Integers:
    return "int32" if max(tensor.shape[1], len(tensor.values)) <= np.iinfo(np.int32).max else "int64"


def _as_csr(matrix: Any) -> Tensor:
    tensor = matrix if isinstance(matrix, Tensor) else Tensor.from_scipy(matrix)
    if len(tensor.shape) != 2:
        raise UsageError(f"a sparse operand of a graph is a matrix, this one has {len(tensor.shape)} modes")
    plain = tensor.formats == ("dense", "compressed") and tensor.order == (0, 1)
    return (tensor if plain else tensor.converted("csr")).validated()


def csr_constants(graph: ir.Graph, matrix: Any, name: str, *, integers: Integers | None = None) -> Csr:
    """Return a sparse matrix as constants of ``graph``.

    Args:
        graph: where the initializers go.
        matrix: a ``Tensor`` of two modes, or a scipy sparse matrix or array in CSR, CSC or COO.
        name: prefix of their names.
        integers: type of positions and coordinates; ``None``: int32 where they fit.

    Raises:
        ModelError: coordinates are out of range, unsorted or there twice.
        UsageError: it is no matrix.
    """
    tensor = _as_csr(matrix)
    level = tensor.levels[1]
    assert isinstance(level, Compressed), "that is what CSR has"
    kind, taken = np.dtype(integers or _integers(tensor)), graph_names(graph)
    arrays: dict[str, NDArray[Any]] = {
        "positions": level.pos.astype(kind, copy=False),
        "coordinates": level.crd.astype(kind, copy=False),
        "values": tensor.values.astype(np.float32, copy=False),
        "shape": np.array(tensor.shape, np.int64),
    }
    return Csr(**{part: initializer(graph, taken, f"{name}.{part}", array) for part, array in arrays.items()})


def csr_inputs(graph: ir.Graph, name: str, *, integers: Integers = "int64") -> Csr:
    """Return a sparse matrix of any size as four new inputs of ``graph``: ``<name>.positions`` and so on.

    Args:
        graph: where the inputs go.
        name: prefix of their names.
        integers: type of positions and coordinates.
    """
    kind = ir.DataType[integers.upper()]
    entries = f"{name}.entries"
    parts = {
        "positions": _value(f"{name}.positions", kind, None),
        "coordinates": _value(f"{name}.coordinates", kind, entries),
        "values": _value(f"{name}.values", ir.DataType.FLOAT, entries),
        "shape": _value(f"{name}.shape", ir.DataType.INT64, 2),
    }
    graph.inputs.extend(parts.values())
    return Csr(**parts)


def gnn_layer_model(
    adjacency: Any,
    weight: NDArray[Any],
    bias: NDArray[Any] | None = None,
    *,
    activation: str = "Relu",
    batch: str | int | None = None,
    integers: Integers | None = None,
) -> Model:
    """Return a layer of a graph network, ``y = activation(A x W + bias)``, as a model with input x and output y.

    The weight is multiplied on the side of the product with A where that is cheaper.

    Args:
        adjacency: A as in ``csr_constants``, ``[nodes, nodes of x]``; ``None``: it comes as inputs ``adjacency.*``, and
            may be another graph at each run.
        weight: ``[features, features of y]``.
        bias: ``[features of y]``, or ``None``.
        activation: a standard operator of one input, or an empty string.
        batch: leading dimension of x and y; ``None``: they have two dimensions.
        integers: type of positions and coordinates; ``None``: int32 where they fit, int64 for inputs.

    Raises:
        ModelError: see ``csr_constants``.
        UsageError: likewise, or the bias does not fit the weight.
    """
    features, out = weight.shape
    if bias is not None and bias.shape != (out,):
        raise UsageError(f"the bias has shape {bias.shape}, the weight {weight.shape}")
    graph = _graph("gnn_layer")
    if adjacency is None:
        operand, nodes, sources = csr_inputs(graph, "adjacency", integers=integers or "int64"), None, None
    else:
        operand = csr_constants(graph, adjacency, "adjacency", integers=integers)
        nodes, sources = (int(size) for size in adjacency.shape)
    lead = () if batch is None else (batch,)
    x = _value("x", ir.DataType.FLOAT, *lead, sources, features)
    graph.inputs.append(x)
    taken = graph_names(graph)
    dense = initializer(graph, taken, "weight", weight.astype(np.float32, copy=False))
    equation = "ij,jn->in" if batch is None else "ij,bjn->bin"
    y = x
    for step in ("dense", "sparse") if out < features else ("sparse", "dense"):
        sparse = step == "sparse"
        node = (
            einsum_node(equation, operand, y, name="aggregate")
            if sparse
            else ir.Node("", "MatMul", [y, dense], name="transform")
        )
        y = _add(graph, node)
    if bias is not None:
        offset = initializer(graph, taken, "bias", bias.astype(np.float32, copy=False))
        y = _add(graph, ir.Node("", "Add", [y, offset], name="shift"))
    if activation:
        y = _add(graph, ir.Node("", activation, [y], name="activate"))
    return _finished(graph, y, *lead, nodes, out)


def sparse_attention_model(
    pattern: Any, *, heads: int | str, size: int, scale: float | None = None, integers: Integers | None = None
) -> Model:
    """Return attention over a pattern in three steps, as a model with inputs q, k, v ``[B, heads, rows, size]``.

    The scores of the stored pairs (``ij,bhik,bhjk->bhij``), softmax over each row, and the product with the values
    (``bhij,bhjn->bhin``). The values of the pattern are factors of the scores, as ``scale`` is.

    Args:
        pattern: ``[queries, keys]`` as in ``csr_constants``.
        heads: how many, or a symbol.
        size: of a head.
        scale: factor of the scores; ``None``: one over the root of ``size``.
        integers: type of positions and coordinates; ``None``: int32 where they fit.

    Raises:
        ModelError, UsageError: see ``csr_constants``.
    """
    queries, keys = (int(side) for side in pattern.shape)
    factor = size**-0.5 if scale is None else scale
    tensor = _as_csr(pattern)
    graph = _graph("sparse_attention")
    scaled = Tensor(
        tensor.shape, tensor.order, tensor.levels, tensor.values.astype(np.float32) * np.float32(factor)
    )
    operand = csr_constants(graph, scaled, "pattern", integers=integers)
    q = _value("q", ir.DataType.FLOAT, "B", heads, queries, size)
    k, v = (_value(name, ir.DataType.FLOAT, "B", heads, keys, size) for name in "kv")
    graph.inputs.extend((q, k, v))
    scores = _add(graph, einsum_node("ij,bhik,bhjk->bhij", operand, q, k, name="scores"))
    weights = _add(graph, sparse_softmax_node(operand.positions, scores, name="weights"))
    weighted = Csr(operand.positions, operand.coordinates, weights, operand.shape)
    y = _add(graph, einsum_node("bhij,bhjn->bhin", weighted, v, name="context"))
    return _finished(graph, y, "B", heads, queries, size)


def _graph(name: str) -> ir.Graph:
    return ir.Graph([], [], nodes=[], opset_imports={"": _OPSET}, name=name)


def _value(name: str, kind: ir.DataType, *shape: int | str | None) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _add(graph: ir.Graph, node: ir.Node) -> ir.Value:
    graph.append(node)
    node.outputs[0].name = f"{node.name}_out"
    return node.outputs[0]


def _finished(graph: ir.Graph, y: ir.Value, *shape: int | str | None) -> Model:
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph.outputs.append(y)
    model = Model(ir.Model(graph, ir_version=_IR_VERSION))
    finalize(model)
    return model
