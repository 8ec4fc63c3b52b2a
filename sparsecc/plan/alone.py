"""Models of single sites and of parts, cut out of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.ir import Model
from sparsecc.ir.sparse_ops import initializer
from sparsecc.passes.lower.linear_form import Borders, LinearForm
from sparsecc.passes.lower.recurrent import RecurrentForm

__all__ = [
    "begin_with_bytes",
    "constant_bytes",
    "form_ends",
    "part_model",
    "random_inputs",
    "recurrent_model",
    "site_model",
]

#: Name of the input x in a model of one LSTM or GRU.
_SEQUENCES = "x"


def random_inputs(model: Model, seed: int) -> dict[str, npt.NDArray[np.generic]]:
    """Activations for a model of one site; sequences that have lengths are all of the whole length."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, npt.NDArray[np.generic]] = {}
    for spec in model.input_specs():
        shape = [dim for dim in spec.shape or () if isinstance(dim, int)]
        if spec.dtype == "int32":
            inputs[spec.name] = np.full(shape, inputs[_SEQUENCES].shape[0], np.int32)
        elif spec.dtype == "uint8":
            inputs[spec.name] = rng.integers(0, 256, shape, np.uint8)
        else:
            inputs[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


def site_model(form: LinearForm, shape: tuple[int, ...], model: Model) -> Model:
    """The site with its bias and activation as a model of its own, input of static ``shape``.

    ``model`` is where the form is from, in the main graph or in a body.
    """
    return part_model([form_ends(form)], shape, model)


def form_ends(form: LinearForm) -> Borders:
    """Where a form begins and ends."""
    dtype = onnx_ir.DataType.FLOAT if form.dequantize is None else onnx_ir.DataType.UINT8
    return Borders(form.source, form.output, dtype)


def part_model(ends: Sequence[Borders], shape: tuple[int, ...], model: Model) -> Model:
    """What lies between ``ends``, which begin with the same value, as a model of its own; constants come along.

    Args:
        ends: of each output; nodes are in their order.
        shape: of the input, static.
        model: where they are.
    """
    source = ends[0].source
    x = _input(str(source.name), shape, ends[0].source_type)
    copied: dict[onnx_ir.Value, onnx_ir.Value] = {source: x}
    part = onnx_ir.Graph([x], [], nodes=[], opset_imports=dict(model.onnx.opset_imports), name="site")
    for item in ends:
        made = _copy_into(part, item.output, copied)
        made.type = onnx_ir.TensorType(item.output_type)
        part.outputs.append(made)
    return Model(onnx_ir.Model(part, ir_version=8))


def _copy_into(
    graph: onnx_ir.Graph, value: onnx_ir.Value, copied: dict[onnx_ir.Value, onnx_ir.Value]
) -> onnx_ir.Value:
    """Copy the nodes and constants behind ``value``, whichever graphs they are in, as far as they are not yet."""
    if value in copied:
        return copied[value]
    producer = value.producer()
    if producer is None:
        assert value.const_value is not None, f"{value.name} is no constant"
        # The tensor is shared and takes the name of the value that holds it: another one would change the model.
        name, tensor = str(value.name), value.const_value
        if name in {str(other.name) for other in copied.values()}:
            name = f"{name}_{len(copied)}"
            tensor = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
        copied[value] = onnx_ir.Value(name=name, const_value=tensor, shape=value.shape, type=value.type)
        graph.register_initializer(copied[value])
        return copied[value]
    inputs = [None if item is None else _copy_into(graph, item, copied) for item in producer.inputs]
    node = onnx_ir.Node(
        producer.domain, producer.op_type, inputs, list(producer.attributes.values()),
        num_outputs=len(producer.outputs), name=producer.name,
    )  # fmt: skip
    graph.append(node)
    copied.update(zip(producer.outputs, node.outputs, strict=True))
    return copied[value]


def recurrent_model(form: RecurrentForm, shape: tuple[int, ...], opset: int) -> Model:
    """An LSTM or GRU as a model of its own that gives all its outputs, input of static ``shape``."""
    directions = 2 if form.direction == "bidirectional" else 1
    state = (directions, shape[1], form.hidden)
    inputs = [_input(_SEQUENCES, shape)]
    lengths = None
    if form.lengths is not None:
        lengths = _input("lengths", shape[1:2], onnx_ir.DataType.INT32)
        inputs.append(lengths)
    initial = [_input(f"initial_{number}", state) for number in range(len(form.initial))]
    graph = onnx_ir.Graph([*inputs, *initial], [], nodes=[], opset_imports={"": opset}, name="site")
    weights = [w.reshape(directions, -1, w.shape[1]) for w in (form.input_weight, form.state_weight)]
    taken: set[str] = set()
    constants = [
        initializer(graph, taken, name, array)
        for name, array in zip(("W", "R", "B"), (*weights, form.bias), strict=True)
    ]
    node = onnx_ir.Node(
        "", form.cell, [inputs[0], *constants, lengths, *initial], list(form.node.attributes.values()),
        num_outputs=3 if form.cell == "LSTM" else 2, name="site",
    )  # fmt: skip
    graph.append(node)
    for value in node.outputs:
        value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.extend(node.outputs)
    return Model(onnx_ir.Model(graph, ir_version=8))


def _input(
    name: str, shape: Sequence[int], dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT
) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype))


def begin_with_bytes(model: Model) -> None:
    """Let a part that quantises its input with a given range begin, and end, with the bytes its neighbours hold."""
    graph = model.onnx.graph
    for at, value in enumerate(graph.inputs):
        readers = value.consumers()
        if len(readers) == 1 and readers[0].op_type == "QuantizeLinear":
            codes = readers[0].outputs[0]
            shape = [size for size in value.shape or () if isinstance(size, int)]
            begin = _input(f"{value.name}.codes", shape, onnx_ir.DataType.UINT8)
            codes.replace_all_uses_with(begin)
            graph.remove(readers[0])
            graph.inputs[at] = begin
    for at, value in enumerate(graph.outputs):
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
            codes = producer.inputs[0]
            if codes.producer() is not None and not value.consumers():
                codes.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
                graph.outputs[at] = codes
                graph.remove(producer)


def constant_bytes(model: Model) -> int:
    """Bytes of all initialisers."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
