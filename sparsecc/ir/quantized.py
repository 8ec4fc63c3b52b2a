"""Quantised weights: how the integers of a constant become real numbers, and what the operators around them say.

Forms read: ``DequantizeLinear`` in front of MatMul, Gemm and Conv; ``MatMulInteger`` followed by a Cast and the
scales; ``QLinearMatMul`` and ``QLinearConv``; onnxruntime's ``DynamicQuantizeMatMul``, ``MatMulIntegerToFloat`` and
``QGemm``. Scales and zero points come from files: their types and shapes are checked before use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir.slots import Tensor
from sparsecc.ir.trace import RefusedError

__all__ = [
    "INTEGER_OPERATORS",
    "IntegerChain",
    "IntegerOperator",
    "WeightScale",
    "data_input",
    "dequantized_scale",
    "integer_chain",
    "operator_scale",
]

_MICROSOFT = "com.microsoft"
_CODES = (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8)
_PRODUCES_BYTES = ("QuantizeLinear", "DynamicQuantizeLinear")


class IntegerOperator(NamedTuple):
    """Where an operator on integers has its operands: input positions, or None for what it has not.

    ``op`` is the floating-point operator it computes.
    """

    op: str
    weight: int
    weight_scale: int | None
    weight_zero_point: int
    scale: int | None
    zero_point: int | None
    bias: int | None = None


INTEGER_OPERATORS: Mapping[tuple[str, str], IntegerOperator] = {
    ("", "MatMulInteger"): IntegerOperator("MatMul", 1, None, 3, None, 2),
    (_MICROSOFT, "DynamicQuantizeMatMul"): IntegerOperator("MatMul", 1, 2, 3, None, None, 4),
    (_MICROSOFT, "MatMulIntegerToFloat"): IntegerOperator("MatMul", 1, 3, 5, 2, 4, 6),
    ("", "QLinearMatMul"): IntegerOperator("MatMul", 3, 4, 5, 1, 2),
    ("", "QLinearConv"): IntegerOperator("Conv", 3, 4, 5, 1, 2, 8),
    (_MICROSOFT, "QGemm"): IntegerOperator("Gemm", 3, 4, 5, 1, 2, 6),
}
"""The operators whose weight operand holds integers, by (domain, name)."""


@dataclass(frozen=True, eq=False)
class WeightScale:
    """Real weight = (stored integer - ``zero_point``) * ``scale``, along ``axis`` of the stored constant.

    Attributes:
        scale: float32, one element, or one per index along ``axis``; finite and positive.
        zero_point: int32, shaped as ``scale``; within the range of the stored type.
        axis: of the constant as it is stored; of no meaning with one element.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int

    @property
    def key(self) -> tuple[bytes, bytes, int]:
        """Equal for equal scales."""
        return self.scale.tobytes(), self.zero_point.tobytes(), self.axis if self.scale.size > 1 else 0

    def dequantize(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """Return the real weights of the stored ``codes``, in their shape."""
        scale, zero_point = self._broadcast(codes.ndim)
        return (codes.astype(np.int32) - zero_point).astype(np.float32) * scale

    def quantize(self, weights: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the nearest codes of ``weights``, in the type of the constant; zeros are exact.

        Weights that came from ``dequantize`` get their own codes back.
        """
        scale, zero_point = self._broadcast(weights.ndim)
        codes = np.rint(weights.astype(np.float64) / scale) + zero_point
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(codes, limits.min, limits.max).astype(dtype))

    def shifted(self, codes: NDArray[Any]) -> NDArray[np.int32]:
        """Return the stored integers less the zero point."""
        return np.asarray(codes.astype(np.int32) - self._broadcast(codes.ndim)[1])

    def _broadcast(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        if self.scale.size == 1:
            return self.scale.reshape(()), self.zero_point.reshape(())
        shape = [1] * rank
        shape[self.axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)


@dataclass(frozen=True, eq=False)
class IntegerChain:
    """A MatMulInteger and the nodes that bring its result back to real numbers.

    Attributes:
        source: the floating-point value that was quantised.
        dynamic: its scale is computed at run time, by DynamicQuantizeLinear.
        weight_scale: of the weight.
        nodes: what follows the MatMulInteger up to ``output``.
        output: the real product.
    """

    source: onnx_ir.Value
    dynamic: bool
    weight_scale: onnx_ir.Value
    nodes: tuple[onnx_ir.Node, ...]
    output: onnx_ir.Value


def data_input(node: onnx_ir.Node) -> onnx_ir.Value | None:
    """Return the floating-point value that a linear node multiplies, before it was quantised if it was.

    None where only the quantised form exists in the graph.
    """
    value = node.inputs[0] if node.inputs else None
    key = (node.domain, node.op_type)
    if key not in INTEGER_OPERATORS or node.op_type == "DynamicQuantizeMatMul":
        return value
    producer = value.producer() if value is not None else None
    if producer is None or producer.domain != "" or producer.op_type not in _PRODUCES_BYTES:
        return None
    return producer.inputs[0]


def integer_chain(node: onnx_ir.Node) -> IntegerChain:
    """Return how the result of a MatMulInteger is scaled back to real numbers.

    Raises:
        RefusedError: it is not, in a form that is known.
    """
    data = node.inputs[0] if node.inputs else None
    quantizer = data.producer() if data is not None else None
    if quantizer is None or quantizer.domain != "" or quantizer.op_type not in _PRODUCES_BYTES:
        raise RefusedError("MatMulInteger reads bytes that no QuantizeLinear in front of it makes")
    source = quantizer.inputs[0]
    dynamic = quantizer.op_type == "DynamicQuantizeLinear"
    scale = quantizer.outputs[1] if dynamic else quantizer.inputs[1]
    zero_point = quantizer.outputs[2] if dynamic else _input(quantizer, 2)
    if source is None or scale is None or zero_point is not _input(node, 2):
        raise RefusedError("MatMulInteger does not have the zero point of the QuantizeLinear in front of it")
    cast = _next(node.outputs[0], "Cast")
    if cast is None or cast.attributes.get_int("to", 0) != onnx_ir.DataType.FLOAT:
        raise RefusedError("MatMulInteger is not followed by a Cast to float32 alone")
    first = _next(cast.outputs[0], "Mul")
    if first is None:
        raise RefusedError("MatMulInteger is not followed by a Mul with its scales")
    factor = _other(first, cast.outputs[0])
    made_by = factor.producer() if factor is not None else None
    if made_by is not None and made_by.op_type == "Mul" and scale in made_by.inputs:
        weight_scale = _other(made_by, scale)
        nodes: tuple[onnx_ir.Node, ...] = (cast, first)
    else:
        second = _next(first.outputs[0], "Mul")
        factors = [] if second is None else [factor, _other(second, first.outputs[0])]
        if second is None or scale not in factors:
            raise RefusedError("the result of MatMulInteger is not multiplied with both scales")
        factors.remove(scale)
        weight_scale, nodes = factors[0], (cast, first, second)
    if weight_scale is None:
        raise RefusedError("the result of MatMulInteger is not multiplied with the scale of its weight")
    return IntegerChain(source, dynamic, weight_scale, nodes, nodes[-1].outputs[0])


def dequantized_scale(node: onnx_ir.Node, tensor: Tensor) -> WeightScale:
    """Return the scale that a DequantizeLinear gives the constant ``tensor`` it reads.

    Raises:
        RefusedError: it is of a form that is not known, or does not fit.
    """
    if node.attributes.get_int("block_size", 0):
        raise RefusedError("weight is quantised in blocks along an axis: not supported")
    axis = node.attributes.get_int("axis", 1)
    return _scale(tensor, _input(node, 1), _input(node, 2), 1 if axis is None else axis)


def operator_scale(node: onnx_ir.Node, tensor: Tensor) -> WeightScale:
    """Return the scale that an operator of ``INTEGER_OPERATORS`` gives its weight ``tensor``.

    Raises:
        RefusedError: it is of a form that is not known, or does not fit.
    """
    spec = INTEGER_OPERATORS[node.domain, node.op_type]
    index = spec.weight_scale
    scale = integer_chain(node).weight_scale if index is None else _input(node, index)
    rows_first = spec.op == "Conv" or (spec.op == "Gemm" and node.attributes.get_int("transB", 0) == 1)
    return _scale(tensor, scale, _input(node, spec.weight_zero_point), 0 if rows_first else -1)


def _scale(
    tensor: Tensor, scale: onnx_ir.Value | None, zero_point: onnx_ir.Value | None, axis: int
) -> WeightScale:
    if tensor.dtype not in _CODES:
        raise RefusedError(
            f"quantised weight has type {tensor.dtype.name}: only int8 and uint8 are supported"
        )
    shape = tuple(tensor.shape.numpy())
    scales = _constant(scale, "scale")
    if scales.dtype != np.float32 or not (np.isfinite(scales) & (scales > 0)).all():
        raise RefusedError("scale of the quantised weight is not float32, finite and positive")
    axis = axis + len(shape) if axis < 0 else axis
    zeros = np.zeros(scales.shape, np.int32)
    if zero_point is not None:
        stored = _constant(zero_point, "zero point")
        if stored.dtype != tensor.dtype.numpy():
            raise RefusedError(f"zero point of the quantised weight has type {stored.dtype}")
        zeros = stored.astype(np.int32)
    if zeros.size == 1:
        zeros = np.full(scales.shape, zeros.reshape(()), np.int32)
    if scales.size == 1 and zeros.size > 1:
        scales = np.full(zeros.shape, scales.reshape(()), np.float32)
    length = shape[axis] if 0 <= axis < len(shape) else -1
    if scales.size != zeros.size or (scales.size != 1 and scales.size != length):
        raise RefusedError(
            f"{scales.size} scales and {zeros.size} zero points do not fit a weight of shape {list(shape)}"
        )
    return WeightScale(scales.reshape(-1), zeros.reshape(-1), axis)


def _constant(value: onnx_ir.Value | None, what: str) -> NDArray[Any]:
    tensor = None if value is None or value.is_graph_input() else onnx_ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise RefusedError(f"{what} of the quantised weight is not constant")
    return np.asarray(tensor.numpy())


def _input(node: onnx_ir.Node, index: int) -> onnx_ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _next(value: onnx_ir.Value, op_type: str) -> onnx_ir.Node | None:
    """The only reader of ``value``, if it is this operator in the same graph."""
    uses = list(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    node, producer = uses[0].node, value.producer()
    same = producer is not None and producer.graph is node.graph
    return node if same and node.domain == "" and node.op_type == op_type else None


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    """The operand of a two-operand node that is not ``value``."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]
