"""Copies of a model that return tensors from inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.engine import Arrays, open_session
from sparsecc.calib.lift import SHAPE_LENGTH, Lifted, Lifter, LiftError, twins
from sparsecc.calib.stepwise import Stepwise
from sparsecc.errors import UsageError
from sparsecc.ir import Model

__all__ = ["tap", "tensor_shapes", "value_rounds", "value_shapes"]

#: Bytes of activations kept in memory between the parts of a large model.
_BYTE_BUDGET = 256 << 20


def tap(model: Model, names: Iterable[str]) -> Model:
    """Return a copy of ``model`` whose outputs are exactly the named tensors of its main graph, in this
    order.

    Weights are shared with ``model``. What only the former outputs needed is left to onnxruntime to drop.

    Raises:
        UsageError: a name is no tensor of the main graph (one inside a subgraph or function body cannot be
            tapped).
    """
    copy = model.copy()
    values = _main_graph_values(copy)
    wanted = list(names)
    unknown = [name for name in wanted if name not in values]
    if unknown:
        raise UsageError(f"no tensor {', '.join(unknown)} in the main graph; inspect the model for the names")
    copy.onnx.graph.outputs[:] = [values[name] for name in wanted]
    return copy


def tensor_shapes(model: Model, names: Iterable[str], inputs: Arrays) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the named tensors have when ``model`` is fed ``inputs``.

    Only ``Shape`` nodes are added, so the run needs no more memory than an ordinary one, and a large model runs in
    parts. Names that are no
    tensor of the main graph are left out.

    Raises:
        UsageError: the inputs do not fit.
        ModelError: onnxruntime refuses the model.
    """
    copy = model.copy()
    values = _main_graph_values(copy)
    found = [name for name in dict.fromkeys(names) if name in values]
    if not found:
        return {}
    graph = copy.onnx.graph
    nodes = [onnx_ir.node("Shape", [values[name]], name=f"sparsecc_shape_{name}") for name in found]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"sparsecc_shape_of_{index}"
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    graph.extend(nodes)
    graph.outputs[:] = [node.outputs[0] for node in nodes]
    steps = Stepwise(copy.copy, lambda: iter([dict(inputs)]), byte_budget=_BYTE_BUDGET, threads=1)
    (shapes,) = steps.run([str(node.outputs[0].name) for node in nodes], (), ())
    return {
        name: tuple(int(size) for size in shape) for name, shape in zip(found, shapes.values(), strict=True)
    }


def value_shapes(
    model: Model, values: Iterable[onnx_ir.Value], inputs: Arrays
) -> dict[onnx_ir.Value, tuple[int, ...]]:
    """Return the shapes that values of the main graph and of bodies in it have when ``model`` is fed ``inputs``.

    Left out are values that are never computed (a branch not taken, a loop of no round), those of functions, and
    those of a loop whose shape changes from round to round.

    Raises:
        UsageError: the inputs do not fit.
        ModelError: onnxruntime refuses the model.
    """
    shapes = {}
    for value, rounds in value_rounds(model, values, inputs).items():
        if len(rounds) and (rounds == rounds[0]).all():
            shapes[value] = tuple(int(size) for size in rounds[0, 1 : 1 + rounds[0, 0]])
    return shapes


def value_rounds(
    model: Model, values: Iterable[onnx_ir.Value], inputs: Arrays
) -> dict[onnx_ir.Value, NDArray[np.int64]]:
    """Return the shapes that values have each time they are computed, ``[times, SHAPE_LENGTH]``.

    A row holds the rank, then the sizes. Left out are values of functions.

    Raises:
        UsageError: the inputs do not fit.
        ModelError: onnxruntime refuses the model.
    """
    copy = model.copy()
    graph, copied, lifter = copy.onnx.graph, twins(model.onnx.graph, copy.onnx.graph), Lifter.of(copy.onnx)
    lifted: dict[onnx_ir.Value, Lifted] = {}
    for value in dict.fromkeys(values):
        with contextlib.suppress(LiftError):
            if value in copied:
                lifted[value] = lifter.shape_of(copied[value])
    if not lifted:
        return {}
    graph.outputs[:] = [item.value for item in lifted.values()]
    results = open_session(copy).run(inputs)
    found = {}
    for value, array in zip(lifted, results.values(), strict=True):
        rounds = array.reshape(-1, SHAPE_LENGTH)
        found[value] = rounds[rounds[:, 0] >= 0]
    return found


def _main_graph_values(model: Model) -> dict[str, onnx_ir.Value]:
    graph = model.onnx.graph
    produced = (value for node in graph for value in node.outputs)
    values = [*graph.inputs, *graph.initializers.values(), *produced]
    return {value.name: value for value in values if value.name}
