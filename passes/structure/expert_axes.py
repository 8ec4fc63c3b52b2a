"""Where the experts of a mixture are in a graph: the axis that counts them, from the router on.

A router gives one number per expert. From there on, forwards and backwards, every tensor that has an axis for the
experts is found, and every constant on such an axis: these must be cut when experts go. Axes are counted from the
end, so that broadcasting does not move them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.passes.tidy.graph import constant_of, int_attribute

__all__ = ["Column", "Cut", "ExpertAxes", "NotUnderstoodError", "array_in"]

_ELEMENTWISE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Equal", "Erf", "Exp", "Gelu", "Identity", "LeakyRelu", "Log", "Mul", "Neg",
     "Pow", "Relu", "Sigmoid", "Silu", "Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Where"}
)  # fmt: skip
#: What hands indices of experts on as they are.
_MOVES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
#: Inputs of ``com.microsoft.MoE`` with one entry per expert on the first axis.
_MOE_INPUTS = range(2, 8)


class NotUnderstoodError(Exception):
    """The graph around a router has a form that is not known; the text is the reason."""


@dataclass(frozen=True)
class Cut:
    """A constant with an entry for each expert: input ``index`` of ``node``, on ``axis`` from the end."""

    node: onnx_ir.Node
    index: int
    axis: int


@dataclass(frozen=True)
class Column:
    """A node that takes the number of one expert out of those of all."""

    node: onnx_ir.Node
    expert: int


class ExpertAxes:
    """Everything with an entry for each of ``count`` experts whose numbers ``scores`` has on its last axis.

    Attributes:
        cuts: constants to cut.
        counts: integer constants, node and input, that hold the number of experts.
        columns: nodes that read the number of one expert.
        values: tensors with an entry for each expert.
        most: the largest number of experts that one token takes, 0 if it takes all.
        normalised: a softmax over all experts makes shares of their numbers.

    Raises:
        NotUnderstoodError: of a form that is not known.
    """

    def __init__(self, scores: onnx_ir.Value, count: int) -> None:
        self._count = count
        self._scores = scores
        self._axes: dict[onnx_ir.Value, int] = {}
        self._indices: set[onnx_ir.Value] = set()
        self._cuts: dict[tuple[onnx_ir.Node, int], Cut] = {}
        self.counts: list[tuple[onnx_ir.Node, int]] = []
        self.columns: list[Column] = []
        self.most = 0
        self.normalised = False
        self._waiting: list[onnx_ir.Value] = []
        self._new(scores, -1)
        self._complete = False
        while self._waiting:
            self._visit(self._waiting.pop())
        self._complete = True
        for node in {node: None for value in self._axes for node, _ in value.uses()}:
            self._rule(node)  # once more, knowing all
        self.cuts = list(self._cuts.values())
        self.values = list(self._axes)

    def _visit(self, value: onnx_ir.Value) -> None:
        graph = self._scores.graph
        if value.is_graph_output():
            raise NotUnderstoodError(
                f"{value.name}, with an entry for each expert, is an output of the model"
            )
        if value is not self._scores and value.producer() is None:
            raise NotUnderstoodError(f"{value.name}, with an entry for each expert, is an input of the model")
        producer = value.producer()
        if producer is not None and value is not self._scores and value in self._axes:
            self._rule(producer)
        for node, _ in value.uses():
            if node.graph is not graph:
                raise NotUnderstoodError(f"{node.op_type} inside a body reads numbers of experts")
            if value in self._indices:
                self._index_rule(node, value)
            else:
                self._rule(node)

    def _operand(self, node: onnx_ir.Node, index: int, axis: int) -> bool:
        """Whether an input has experts on ``axis``; constants that have are to be cut."""
        value = node.inputs[index]
        if value is None:
            return False
        if value in self._axes:
            if self._axes[value] != axis:
                raise NotUnderstoodError(f"{_name(node)} combines experts on two axes")
            return True
        dims = _dims(value)
        if dims is None:
            raise NotUnderstoodError(
                f"the shape of {value.name} is unknown, which {_name(node)} combines with experts"
            )
        if -axis > len(dims) or dims[axis] == 1:
            return False
        if dims[axis] != self._count:
            raise NotUnderstoodError(f"{value.name}, which meets experts in {_name(node)}, has another size")
        if array_in(value) is not None:
            self._cuts[node, index] = Cut(node, index, axis)
        else:
            self._new(value, axis)
        return True

    def _new(self, value: onnx_ir.Value, axis: int) -> None:
        if value in self._axes:
            if self._axes[value] != axis:
                raise NotUnderstoodError(f"{value.name} has experts on two axes")
            return
        dims = _dims(value)
        if dims is not None and (-axis > len(dims) or dims[axis] not in (self._count, None)):
            raise NotUnderstoodError(
                f"{value.name} has no axis of {self._count} experts where one is expected"
            )
        self._axes[value] = axis
        self._waiting.append(value)

    def _rule(self, node: onnx_ir.Node) -> None:
        if node.domain == "com.microsoft" and node.op_type == "MoE":
            self._moe(node)
            return
        if node.domain != "":
            raise NotUnderstoodError(f"{node.domain}.{node.op_type} reads numbers of experts")
        if node.op_type in _ELEMENTWISE:
            self._elementwise(node)
            return
        rule = {
            "Einsum": self._einsum,
            "Gather": self._column,
            "GatherElements": self._along,
            "LogSoftmax": self._softmax,
            "MatMul": self._matmul,
            "ReduceMax": self._reduce,
            "ReduceSum": self._reduce,
            "ScatterElements": self._along,
            "Shape": _nothing,
            "ConstantOfShape": _nothing,
            "Softmax": self._softmax,
            "Squeeze": self._squeeze,
            "OneHot": _nothing,
            "TopK": self._topk,
            "Transpose": self._transpose,
            "Unsqueeze": self._squeeze,
        }.get(node.op_type)
        if rule is None:
            raise NotUnderstoodError(
                f"{node.op_type} ({_name(node)}) on numbers of experts is not understood"
            )
        rule(node)

    def _known_axis(self, node: onnx_ir.Node) -> int:
        values = [*node.inputs, *node.outputs]
        return next(self._axes[value] for value in values if value is not None and value in self._axes)

    def _elementwise(self, node: onnx_ir.Node) -> None:
        axis = self._known_axis(node)
        inputs = range(1) if node.op_type in ("Cast", "Clip") else range(len(node.inputs))
        found = [self._operand(node, index, axis) for index in inputs]
        if any(found):
            self._new(node.outputs[0], axis)
        elif node.outputs[0] in self._axes:
            raise NotUnderstoodError(f"no input of {_name(node)} has the experts of its output")

    def _softmax(self, node: onnx_ir.Node) -> None:
        axis = self._known_axis(node)
        rank = _rank(node.inputs[0])
        over = int_attribute(node, "axis", -1)
        if (over if over < 0 else over - rank) == axis:
            self.normalised = True
        self._operand(node, 0, axis)
        self._new(node.outputs[0], axis)

    def _topk(self, node: onnx_ir.Node) -> None:
        axis = self._known_axis(node)
        over = int_attribute(node, "axis", -1)
        count = array_in(node.inputs[1])
        if (over if over < 0 else over - _rank(node.inputs[0])) != axis or count is None:
            raise NotUnderstoodError(f"{_name(node)} does not choose a fixed number of experts")
        self.most = max(self.most, int(count.reshape(-1)[0]))
        index = node.outputs[1]
        if index not in self._indices:
            self._indices.add(index)
            self._waiting.append(index)

    def _along(self, node: onnx_ir.Node) -> None:
        """GatherElements and ScatterElements, which reach into the axis of experts by indices of them."""
        data, index = node.inputs[0], node.inputs[1]
        if index not in self._indices:
            if not self._complete:
                return  # the choice may be found later
            raise NotUnderstoodError(f"{_name(node)} does not take its indices from the choice of experts")
        assert data is not None
        axis = int_attribute(node, "axis", 0)
        axis = axis if axis < 0 else axis - _rank(data)
        if node.op_type == "GatherElements":
            self._operand(node, 0, axis)
            return
        if not self._operand(node, 0, axis):
            raise NotUnderstoodError(f"{_name(node)} writes the numbers of experts into something else")
        self._new(node.outputs[0], axis)

    def _column(self, node: onnx_ir.Node) -> None:
        data, index = node.inputs[0], array_in(node.inputs[1])
        assert data is not None
        axis = int_attribute(node, "axis", 0)
        axis = axis if axis < 0 else axis - _rank(data)
        if self._axes.get(data) != axis or index is None or index.size != 1:
            raise NotUnderstoodError(f"{_name(node)} does not take the number of one expert")
        column = Column(node, int(index.reshape(-1)[0]) % self._count)
        if column not in self.columns:
            self.columns.append(column)

    def _index_rule(self, node: onnx_ir.Node, value: onnx_ir.Value) -> None:
        if node.domain == "" and node.op_type in _MOVES and node.inputs[0] is value:
            if node.outputs[0] not in self._indices:
                self._indices.add(node.outputs[0])
                self._waiting.append(node.outputs[0])
        elif node.domain == "" and node.op_type == "Gather" and node.inputs[1] is value:
            self._stack(node)
        elif node.domain == "" and node.op_type == "OneHot" and node.inputs[0] is value:
            depth = array_in(node.inputs[1])
            if depth is None or int(depth.reshape(-1)[0]) != self._count:
                raise NotUnderstoodError(
                    f"{_name(node)} spreads indices over another number than that of experts"
                )
            axis = int_attribute(node, "axis", -1)
            self.counts.append((node, 1))
            self._new(node.outputs[0], axis if axis < 0 else axis - _rank(node.outputs[0]))
        elif (
            node.domain == ""
            and node.op_type in ("GatherElements", "ScatterElements")
            and node.inputs[1] is value
        ):
            self._along(node)
        elif node.op_type != "Shape":
            raise NotUnderstoodError(
                f"{node.op_type} ({_name(node)}) on indices of experts is not understood"
            )

    def _stack(self, node: onnx_ir.Node) -> None:
        data = node.inputs[0]
        axis = int_attribute(node, "axis", 0)
        if data is None or array_in(data) is None or not self._operand(node, 0, axis - _rank(data)):
            raise NotUnderstoodError(f"{_name(node)} does not look the experts up in a constant")

    def _moe(self, node: onnx_ir.Node) -> None:
        if node.inputs[1] not in self._axes:
            raise NotUnderstoodError(f"{_name(node)} reads experts in another place than its router")
        self.most = max(self.most, int_attribute(node, "k", 1))
        for index in _MOE_INPUTS:
            if index < len(node.inputs) and (value := node.inputs[index]) is not None:
                dims = _dims(value)
                if array_in(value) is None or dims is None or dims[0] != self._count:
                    raise NotUnderstoodError(
                        f"{_name(node)} has no constant weight per expert as input {index}"
                    )
                self._cuts[node, index] = Cut(node, index, -len(dims))

    def _matmul(self, node: onnx_ir.Node) -> None:
        left, right = node.inputs[0], node.inputs[1]
        result = self._axes.get(node.outputs[0])
        sides = [None if value is None else self._axes.get(value) for value in (left, right)]
        if (sides[0] == -1 and result is None) or (sides[1] == -2 and result is None):
            if not (self._operand(node, 0, -1) and self._operand(node, 1, -2)):
                raise NotUnderstoodError(f"{_name(node)} does not sum over experts on both sides")
            return
        axis = self._known_axis(node)
        if axis == -1 or (axis == -2 and sides[1] is not None):
            raise NotUnderstoodError(f"{_name(node)} mixes experts with other numbers")
        if axis == -2:
            self._operand(node, 0, -2)
        else:
            found = [self._operand(node, index, axis) for index in (0, 1)]
            if not any(found):
                raise NotUnderstoodError(f"no input of {_name(node)} has the experts of its output")
        self._new(node.outputs[0], axis)

    def _einsum(self, node: onnx_ir.Node) -> None:
        equation = (node.attributes.get_string("equation", "") or "").replace(" ", "")
        terms, arrow, result = equation.partition("->")
        letters = terms.split(",")
        if not arrow or "." in equation or len(letters) != len(node.inputs):
            raise NotUnderstoodError(f"{_name(node)} has an equation that is not written out")
        values = [*node.inputs, node.outputs[0]]
        found = {
            term[self._axes[value]]
            for value, term in zip(values, [*letters, result], strict=True)
            if value is not None and value in self._axes
        }
        if len(found) != 1:
            raise NotUnderstoodError(f"{_name(node)} has experts on two axes")
        (letter,) = found
        for index, term in enumerate(letters):
            if letter in term and not self._operand(node, index, term.index(letter) - len(term)):
                raise NotUnderstoodError(f"{_name(node)} combines experts with a single one")
        if letter in result:
            self._new(node.outputs[0], result.index(letter) - len(result))

    def _reduce(self, node: onnx_ir.Node) -> None:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        if value not in self._axes:
            raise NotUnderstoodError(f"{_name(node)} has experts on an axis that it does not reduce")
        rank, axis = _rank(value), self._axes[value]
        axes = _axes_of(node)
        if axes is None:
            raise NotUnderstoodError(f"{_name(node)} reduces axes that are not constant")
        over = {item if item < 0 else item - rank for item in axes}
        if axis in over:
            return
        keep = int_attribute(node, "keepdims", 1)
        self._new(output, axis if keep else axis + sum(item > axis for item in over))

    def _squeeze(self, node: onnx_ir.Node) -> None:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        axes = _axes_of(node)
        if not axes:
            raise NotUnderstoodError(f"{_name(node)} moves axes that are not constant")
        longer = max(_rank(value), _rank(output))
        moved = {item if item < 0 else item - longer for item in axes}
        kept = [item for item in range(-longer, 0) if item not in moved]

        def shorter_axis(axis: int) -> int:
            if axis in moved:
                raise NotUnderstoodError(f"{_name(node)} removes the axis of experts")
            return kept.index(axis) - len(kept)

        squeezes = node.op_type == "Squeeze"
        if value in self._axes:
            before = self._axes[value]
        else:
            before = kept[self._axes[output]] if squeezes else shorter_axis(self._axes[output])
        self._operand(node, 0, before)
        self._new(output, shorter_axis(before) if squeezes else kept[before])

    def _transpose(self, node: onnx_ir.Node) -> None:
        value, output = node.inputs[0], node.outputs[0]
        assert value is not None
        rank = _rank(value)
        order = node.attributes.get_ints("perm", None) or tuple(reversed(range(rank)))
        before = self._axes[value] if value in self._axes else order[self._axes[output] + rank] - rank
        self._operand(node, 0, before)
        self._new(output, order.index(before + rank) - rank)


def _nothing(_: onnx_ir.Node) -> None:
    """Sizes that are computed at run time follow by themselves."""


def array_in(value: onnx_ir.Value | None) -> NDArray[np.generic] | None:
    """Return the numbers of an initializer that no caller can override, else None."""
    tensor = constant_of(value)
    return None if tensor is None else tensor.numpy()


def _axes_of(node: onnx_ir.Node) -> list[int] | None:
    """The axes of a node, which are an attribute or, in later operator sets, an input."""
    given = node.attributes.get_ints("axes", None)
    if given is not None:
        return [int(item) for item in given]
    found = array_in(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if found is None else [int(item) for item in found.reshape(-1)]


def _dims(value: onnx_ir.Value) -> list[int | None] | None:
    found = array_in(value)
    if found is not None:
        return list(found.shape)
    if value.shape is None:
        return None
    return [item if isinstance(item, int) else None for item in value.shape]


def _rank(value: onnx_ir.Value | None) -> int:
    dims = None if value is None else _dims(value)
    if dims is None:
        raise NotUnderstoodError(f"the shape of {'' if value is None else value.name} is unknown")
    return len(dims)


def _name(node: onnx_ir.Node) -> str:
    return node.name or f"the {node.op_type} of {node.outputs[0].name}"
