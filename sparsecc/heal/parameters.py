"""Which constants of a model healing may change, and where their zeros must stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.heal.states import downstream
from sparsecc.ir import Model
from sparsecc.ir.slots import Slot

__all__ = ["Parameter", "trainable"]

_FLOATS = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)

#: Operator -> positions of its inputs that hold a bias or a gain.
_VECTORS = {
    "Add": (0, 1),
    "Sub": (1,),
    "Mul": (0, 1),
    "Conv": (2,),
    "Gemm": (2,),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "PRelu": (1,),
    "LSTM": (3,),
    "GRU": (3,),
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """A constant that may change.

    Attributes:
        name: of the site, or of the tensor where it is a bias or a gain.
        value: what holds the constant.
        is_weight: whether it is the weight of a site; its zeros stay zeros.
    """

    name: str
    value: onnx_ir.Value
    is_weight: bool

    def numpy(self) -> NDArray[Any]:
        """The constant as stored, in its own type."""
        return self._slot.get().numpy()

    def mask(self) -> NDArray[np.bool_] | None:
        """Where the constant may be non-zero, in the shape as stored; None: everywhere."""
        if not self.is_weight:
            return None
        kept: NDArray[np.bool_] = self.numpy() != 0
        return None if kept.all() else kept

    def replace(self, array: NDArray[Any]) -> None:
        """Store ``array`` in the type and shape of the constant; copies of the model keep theirs."""
        old = self._slot.get()
        stored = np.array(array.reshape(old.shape.numpy()), old.dtype.numpy(), order="C")
        self._slot.set(onnx_ir.Tensor(stored, dtype=old.dtype, name=old.name, doc_string=old.doc_string))

    @property
    def _slot(self) -> Slot:
        producer = self.value.producer()
        return Slot(self.value) if producer is None else Slot(producer, "value")


def trainable(model: Model) -> list[Parameter]:
    """The weights of floating-point sites, then biases and gains of what depends on them.

    Tables that are looked up, scalars, and what is computed before the first site stay as they are.
    """
    weights = [
        Parameter(site.name, site.weight, True)
        for site in model.sites()
        if site.quantization is None and site.scope != "function"
    ]
    taken = {parameter.value for parameter in weights}
    vectors = dict.fromkeys(value for value in _vectors(model) if value not in taken)
    return weights + [Parameter(str(value.name), value, False) for value in vectors]


def _vectors(model: Model) -> Iterator[onnx_ir.Value]:
    reached = downstream(model)
    for node in model.onnx.graph:
        if node.domain == "" and any(value in reached for value in node.outputs):
            for position in _VECTORS.get(node.op_type, ()):
                value = node.inputs[position] if position < len(node.inputs) else None
                if value is not None and _is_vector(value, node.op_type):
                    yield value


def _is_vector(value: onnx_ir.Value, op: str) -> bool:
    """Whether ``value`` is a floating-point constant of more than one element, all along one axis."""
    producer = value.producer()
    if producer is not None:
        attr = producer.attributes.get("value") if producer.op_type == "Constant" else None
        tensor = None if attr is None or attr.is_ref() else attr.as_tensor()
    else:
        tensor = None if value.is_graph_input() else value.const_value
    if tensor is None or tensor.dtype not in _FLOATS or tensor.size < 2:
        return False
    shape = tuple(tensor.shape.numpy())
    return op in ("LSTM", "GRU") or math.prod(shape) == max(shape)
