"""Linear operators with constant weights, and folding what follows them into weight and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sparsecc.ir.names import free_name
from sparsecc.passes.tidy.graph import (
    add_constant,
    bypass,
    constant_of,
    float_attribute,
    float_constant,
    int_attribute,
    only_consumer,
    set_constant,
)

__all__ = ["Affine", "Linear", "adopt_add", "affine_after", "find_linear", "fold_affine", "plain_gemm"]

_BIAS_INPUT = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """A node that maps channel c of its input to ``scale[c] * x + shift[c]``; both float64 ``[channels]``."""

    node: ir.Node
    scale: Float64
    shift: Float64


@dataclass
class Linear:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant weight, and where its bias stands.

    Attributes:
        node: the operator.
        weight: the initialiser it multiplies by.
        channels: number of outputs.
        add: for MatMul the Add that follows and holds the bias, once there is one.
    """

    node: ir.Node
    weight: ir.Value
    channels: int
    add: ir.Node | None = None

    @property
    def output(self) -> ir.Value:
        """What the operator and its bias compute together."""
        return (self.add or self.node).outputs[0]

    @property
    def rank(self) -> int | None:
        """Rank of the output, ``None`` when a MatMul's input does not say."""
        if self.node.op_type == "Gemm":
            return 2
        if self.node.op_type == "MatMul":
            shape = self.node.inputs[0].shape if self.node.inputs[0] is not None else None
            return None if shape is None else shape.rank()
        return None if self.weight.shape is None else self.weight.shape.rank()

    @property
    def channel_axis(self) -> int:
        """Axis of the output that the channels run along."""
        return -1 if self.node.op_type == "MatMul" else 1

    def bias(self) -> Float64 | None:
        """Return the bias ``[channels]``, zeros when there is none; ``None`` when it is no such constant."""
        holder, index = self._bias_place()
        value = holder.inputs[index] if holder is not None and index < len(holder.inputs) else None
        if value is None:
            return np.zeros(self.channels)
        array = float_constant(value)
        rank = 2 if self.node.op_type == "Gemm" else 1
        return None if array is None else _per_channel(array, self.channels, rank, -1)

    def set_bias(self, bias: Float64, used: set[str]) -> None:
        """Store ``bias [channels]``; not for a MatMul without an Add."""
        holder, index = self._bias_place()
        assert holder is not None, "a MatMul needs its Add first"
        array = bias.astype(_numpy_type(self.weight))
        value = holder.inputs[index] if index < len(holder.inputs) else None
        owned = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        if value is not None and owned and constant_of(value) is not None:
            set_constant(value, array)
            return
        assert holder.graph is not None, "the nodes of a model belong to a graph"
        if index >= len(holder.inputs):
            holder.resize_inputs(index + 1)
        holder.replace_input_with(
            index, add_constant(holder.graph, f"{holder.outputs[0].name}.bias", array, used)
        )

    def _bias_place(self) -> tuple[ir.Node | None, int]:
        return (self.add, 1) if self.node.op_type == "MatMul" else (self.node, _BIAS_INPUT[self.node.op_type])


def find_linear(node: ir.Node) -> Linear | None:
    """Return the linear operator of this node, or ``None`` if it is none with a constant floating weight."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = constant_of(weight)
    if weight is None or tensor is None or not tensor.dtype.is_floating_point():
        return None
    shape = tensor.shape.numpy()
    if node.op_type in ("Gemm", "MatMul"):
        if len(shape) != 2:
            return None
        return Linear(node, weight, shape[0] if int_attribute(node, "transB", 0) else shape[1])
    if len(shape) < 3:
        return None
    groups = int_attribute(node, "group", 1)
    return Linear(node, weight, shape[0] if node.op_type == "Conv" else shape[1] * groups)


def plain_gemm(linear: Linear, used: set[str]) -> str | None:
    """Fold alpha and beta of a Gemm into weight and bias, make the bias 1-D; return what was done."""
    node = linear.node
    if node.op_type != "Gemm":
        return None
    done = []
    if (alpha := float_attribute(node, "alpha", 1.0)) != 1 and scale_weight(
        linear, np.full(linear.channels, alpha)
    ):
        node.attributes.pop("alpha")
        done.append("alpha")
    beta, bias = float_attribute(node, "beta", 1.0), linear.bias()
    stored = node.inputs[2] if len(node.inputs) > 2 else None
    if stored is None:
        node.attributes.pop("beta", None)
    elif bias is not None and (beta != 1 or not _has_shape(stored, (linear.channels,))):
        linear.set_bias(bias * beta, used)
        node.attributes.pop("beta", None)
        done.append("beta and bias")
    return f"{' and '.join(done)} of Gemm made plain" if done else None


def affine_after(linear: Linear) -> Affine | None:
    """Return the next node if it alone reads the output and is a constant affine map per channel."""
    node = only_consumer(linear.output)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node, linear)
    if node.op_type in ("Add", "Sub", "Mul", "Div") and len(node.inputs) == 2:
        return _arithmetic(node, linear)
    return None


def adopt_add(linear: Linear, affine: Affine, used: set[str]) -> bool:
    """Take the Add after a MatMul as its bias: input 0 the product, input 1 the bias ``[channels]``.

    Returns whether the node had to change for that.
    """
    node, linear.add = affine.node, affine.node
    if node.inputs[0] is linear.node.outputs[0] and _has_shape(node.inputs[1], (linear.channels,)):
        return False
    graph = node.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    array = affine.shift.astype(_numpy_type(linear.weight))
    node.replace_input_with(0, linear.node.outputs[0])
    node.replace_input_with(1, add_constant(graph, f"{node.outputs[0].name}.bias", array, used))
    return True


def fold_affine(linear: Linear, affine: Affine, used: set[str]) -> str | None:
    """Move an affine node into weight and bias; return why not, or ``None`` when done.

    A MatMul has no bias of its own: the first node that shifts it is replaced by an Add of the bias.
    """
    bias = linear.bias()
    if bias is None:
        return "the bias is not constant per channel"
    shift = bias * affine.scale + affine.shift
    if not np.isfinite(shift.astype(_numpy_type(linear.weight))).all():
        return "the folded bias would overflow"
    if (affine.scale != 1).any() and not scale_weight(linear, affine.scale):
        return "the weight is shared, or would overflow"
    if linear.node.op_type == "MatMul" and linear.add is None and shift.any():
        linear.add = _insert_add(affine.node, linear.node.outputs[0], used)
    if linear.add is not None or linear.node.op_type != "MatMul":
        linear.set_bias(shift, used)
    removed = bypass(affine.node, linear.output)
    assert removed, "the output of a linear operator with one consumer can take any name"
    return None


def scale_weight(linear: Linear, scale: Float64) -> bool:
    """Multiply output channel c of the weight by ``scale[c]``; refuse when shared or when it overflows."""
    tensor = constant_of(linear.weight)
    if tensor is None or len(linear.weight.uses()) != 1 or linear.weight.is_graph_output():
        return False
    weight = tensor.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (weight.astype(np.float64) * _along_outputs(linear, weight, scale)).astype(weight.dtype)
    if not np.isfinite(scaled).all():
        return False
    set_constant(linear.weight, scaled)
    return True


def _along_outputs(linear: Linear, weight: NDArray[Any], scale: Float64) -> Float64:
    """Return ``scale`` shaped so that it multiplies the output channels of the stored weight."""
    if linear.node.op_type == "MatMul" or (
        linear.node.op_type == "Gemm" and not int_attribute(linear.node, "transB", 0)
    ):
        return scale[None, :]
    spatial = (1,) * (weight.ndim - 2)
    if linear.node.op_type != "ConvTranspose":
        return scale.reshape(-1, 1, *spatial)
    groups = int_attribute(linear.node, "group", 1)
    per_group = scale.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)
    return per_group.reshape(*per_group.shape, *spatial)


def _batch_norm(node: ir.Node, linear: Linear) -> Affine | None:
    """Return y = gamma * (x - mean) / sqrt(variance + epsilon) + beta as scale and shift."""
    training = int_attribute(node, "training_mode", 0) or not int_attribute(node, "is_test", 1)
    if training or len(node.outputs) != 1 or not int_attribute(node, "spatial", 1):
        return None
    if linear.rank is None or (linear.node.op_type == "MatMul" and linear.rank != 2):
        return None  # channels of BatchNormalization run along axis 1, those of a MatMul along the last
    arrays = [float_constant(value) for value in node.inputs[1:5]]
    constants = [array for array in arrays if array is not None and array.shape == (linear.channels,)]
    if len(constants) != 4:
        return None
    gamma, beta, mean, variance = constants
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + float_attribute(node, "epsilon", 1e-5))
    if not np.isfinite(scale).all():
        return None
    return Affine(node, scale, beta - mean * scale)


def _arithmetic(node: ir.Node, linear: Linear) -> Affine | None:
    """Return Add, Sub, Mul or Div by a constant per channel as scale and shift."""
    first = node.inputs[0] is linear.output
    array = float_constant(node.inputs[1 if first else 0])
    if array is None or (linear.rank is None and array.ndim > 1) or (node.op_type == "Div" and not first):
        return None
    rank = max(1, array.ndim) if linear.rank is None else linear.rank
    constant = _per_channel(array, linear.channels, rank, linear.channel_axis)
    if constant is None:
        return None
    one, zero = np.ones(linear.channels), np.zeros(linear.channels)
    if node.op_type == "Mul":
        return Affine(node, constant, zero)
    if node.op_type == "Div":
        return Affine(node, 1 / constant, zero) if constant.all() else None
    if node.op_type == "Add":
        return Affine(node, one, constant)
    return Affine(node, one, -constant) if first else Affine(node, -one, constant)


def _insert_add(node: ir.Node, product: ir.Value, used: set[str]) -> ir.Node:
    """Return a new Add of ``product`` and a bias yet to be set, placed before ``node``."""
    graph = node.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    add = ir.Node("", "Add", [product, None], name=f"{node.name}.bias")
    add.outputs[0].name = free_name(f"{node.outputs[0].name}.biased", used)
    add.outputs[0].shape, add.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, add)
    return add


def _per_channel(array: Float64, channels: int, rank: int, axis: int) -> Float64 | None:
    """Return ``array`` as ``[channels]`` if, broadcast to ``rank`` axes, it varies along ``axis`` only."""
    if array.ndim > rank:
        return None
    shape = [1] * (rank - array.ndim) + list(array.shape)
    length = shape.pop(axis)
    if any(size != 1 for size in shape) or length not in (1, channels):
        return None
    return np.broadcast_to(array.reshape(-1), (channels,)).copy()


def _has_shape(value: ir.Value | None, shape: tuple[int, ...]) -> bool:
    tensor = constant_of(value)
    return tensor is not None and tuple(tensor.shape.numpy()) == shape


def _numpy_type(value: ir.Value) -> np.dtype[Any]:
    tensor = constant_of(value)
    assert tensor is not None, "find_linear checked that the weight is constant"
    return tensor.dtype.numpy()
