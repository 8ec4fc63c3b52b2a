"""Sparse tensor algebra: declaration, shape rule, function body, reference.

Sparse operands are arrays of components, which need not be constant: graphs, masks and activations of run time.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.emit.bodies_algebra import ATTENTION, EINSUM, EINSUM_SAMPLED, EINSUM_VECTOR, SOFTMAX
from sparsecc.emit.operator import Attribute, Attributes, Constants, Dim, Input, Operator, Output, Shapes
from sparsecc.errors import ModelError
from sparsecc.ir.ops_algebra import CUTS, EINSUMS, FORMAT

__all__ = ["AlgebraOp", "algebra_operators"]

Array = NDArray[np.float64]

_FIRST_WITH_SUMS = 16  # ScatterElements and ScatterND that add
_FIRST_WITH_MAXIMA = 18  # and that take the largest

_POSITIONS = Input("positions", "int32/int64", "[rows+1]", "where the entries of each row begin, and the end")
_COORDINATES = Input("coordinates", "int32/int64", "[entries]", "their columns, rising in each row")
_VALUES = Input(
    "values", "float32", "[...,entries]", "of the entries; the pattern is the same for all leading axes"
)
_SHAPE = Input("shape", "int64", "[2]", "rows and columns")
_CUTS = Attribute(
    CUTS,
    "ints",
    "rows, then entries, before each part: where the work is cut, as the pass `partition` writes it for constant "
    "operands; optional, and never changes more than the order of sums",
    optional=True,
)
_FORMAT = Attribute("format", "string", f"`{FORMAT}`: how the sparse operand is stored")


@dataclass(frozen=True)
class AlgebraOp(Operator, ABC):
    """An operator with a sparse operand that comes as the arrays of its storage."""

    type: str

    @property
    def name(self) -> str:
        """The operator's type."""
        return self.type

    @property
    def oldest_opset(self) -> int:
        """Lowest version of the default domain that the body can be written in."""
        return _FIRST_WITH_SUMS


@dataclass(frozen=True)
class EinsumOp(AlgebraOp):
    """A product of a sparse matrix and dense operands, summed over what the result lacks."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order; none needs to be constant."""
        dense = {
            "SparseEinsumVector": (Input("x", "float32", "[...,columns]", "the dense operand"),),
            "SparseEinsum": (Input("x", "float32", "[...,columns,N]", "the dense operand"),),
            "SparseEinsumSampled": (
                Input("u", "float32", "[...,rows,K]", "the second operand"),
                Input("v", "float32", "[...,columns,K]", "the third operand"),
            ),
        }
        return (_POSITIONS, _COORDINATES, _VALUES, _SHAPE, *dense[self.type])

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        shape, meaning = {
            "SparseEinsumVector": ("[...,rows]", "the result"),
            "SparseEinsum": ("[...,rows,N]", "the result"),
            "SparseEinsumSampled": (
                "[...,entries]",
                "values of the result, which has the pattern of the operand",
            ),
        }[self.type]
        return (Output("y", "float32", shape, meaning),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        equation = f"`{EINSUMS[self.type]}` in any letters; each term may have leading ones, which broadcast"
        return (Attribute("equation", "string", equation), _FORMAT, _CUTS)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where the ranks of the operands are known."""
        own = 1 if self.type == "SparseEinsumVector" else 2
        values, dense = inputs[2], inputs[4:]
        if values is None or any(item is None or len(item) < own for item in dense):
            return (None,)
        given = [item for item in dense if item is not None]
        batch = _broadcast([values[:-1], *(item[:-own] for item in given)])
        if batch is None:
            return (None,)
        if self.type == "SparseEinsumSampled":
            return ((*batch, values[-1]),)
        rows = constants.get("shape")
        return ((*batch, None if rows is None else int(rows[0]), *(given[0][-1:] if own == 2 else ())),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        bodies = {
            "SparseEinsumVector": EINSUM_VECTOR,
            "SparseEinsum": EINSUM,
            "SparseEinsumSampled": EINSUM_SAMPLED,
        }
        return self.function_in(opset, bodies[self.type])

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return y in double precision."""
        positions, coordinates, values, shape = inputs[:4]
        size = tuple(int(side) for side in cast(NDArray[np.int64], shape))
        rows, columns = _entries(positions, coordinates, size)
        values = values.astype(np.float64)
        dense = [item.astype(np.float64) for item in inputs[4:]]
        if self.type == "SparseEinsumSampled":
            return (values * (dense[0][..., rows, :] * dense[1][..., columns, :]).sum(-1),)
        x = dense[0][..., None] if self.type == "SparseEinsumVector" else dense[0]
        matrix = np.zeros((*values.shape[:-1], *size))
        matrix[..., rows, columns] = values
        y = matrix @ x
        return (y[..., 0] if self.type == "SparseEinsumVector" else y,)


@dataclass(frozen=True)
class SoftmaxOp(AlgebraOp):
    """Softmax over the stored entries of each row."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order; none needs to be constant."""
        return (_POSITIONS, _VALUES)

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        return (Output("y", "float32", "[...,entries]", "softmax over the entries of each row"),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        return (_FORMAT,)

    @property
    def oldest_opset(self) -> int:
        """Lowest version of the default domain that the body can be written in."""
        return _FIRST_WITH_MAXIMA

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of the values."""
        return (None if inputs[1] is None else tuple(inputs[1]),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        return self.function_in(opset, SOFTMAX)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return y in double precision."""
        positions, values = cast(NDArray[np.int64], inputs[0]), inputs[1].astype(np.float64)
        y = np.empty_like(values)
        for first, last in pairwise(positions):
            if last > first:
                y[..., first:last] = _softmax(values[..., first:last])
        return (y,)


@dataclass(frozen=True)
class SparseAttentionOp(AlgebraOp):
    """``softmax(scale q k^T) v`` of every head, each query over the keys it sees."""

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order; none needs to be constant."""
        return (
            Input("q", "float32", "[B,heads,S,D]", "queries"),
            Input("k", "float32", "[B,heads,T,D]", "keys"),
            Input("v", "float32", "[B,heads,T,D]", "values"),
            Input("positions", "int32/int64", "[S+1]", "where the keys of each query begin, and the end"),
            Input("coordinates", "int32/int64", "[entries]", "the keys that each query sees, rising"),
            Input("shape", "int64", "[2]", "S and T"),
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        meaning = "softmax(`scale` q k^T) v over the keys that a query sees; zeros where it sees none"
        return (Output("y", "float32", "[B,heads,S,D]", meaning),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        return (Attribute("scale", "float", "factor of the scores"), _FORMAT)

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of q."""
        return (None if inputs[0] is None else tuple(inputs[0]),)

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        return self.function_in(opset, ATTENTION)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[Array, ...]:
        """Return y in double precision."""
        q, k, v = (item.astype(np.float64) for item in inputs[:3])
        rows, columns = _entries(inputs[3], inputs[4], (q.shape[2], k.shape[2]))
        y = np.zeros(q.shape)
        for row in np.unique(rows):
            seen = columns[rows == row]
            scores = np.einsum("bhd,bhtd->bht", q[:, :, row], k[:, :, seen]) * cast(
                float, attributes["scale"]
            )
            y[:, :, row] = np.einsum("bht,bhtd->bhd", _softmax(scores), v[:, :, seen])
        return (y,)


def algebra_operators() -> tuple[Operator, ...]:
    """Return every operator of this module."""
    return (
        *(EinsumOp(name) for name in EINSUMS),
        SoftmaxOp("SparseSoftmax"),
        SparseAttentionOp("SparseAttention"),
    )


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return cast(Array, weights / weights.sum(axis=-1, keepdims=True))


def _entries(
    positions: NDArray[Any], coordinates: NDArray[Any], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the entries.

    Raises:
        ModelError: the components do not describe a matrix of this shape.
    """
    lengths = np.diff(positions)
    if len(positions) != shape[0] + 1 or positions[0] != 0 or (lengths < 0).any():
        raise ModelError(f"positions must rise from 0, {shape[0] + 1} of them")
    if positions[-1] != len(coordinates) or ((coordinates < 0) | (coordinates >= shape[1])).any():
        raise ModelError(f"{positions[-1]} coordinates below {shape[1]} are needed")
    return np.repeat(np.arange(shape[0]), lengths), coordinates.astype(np.int64)


def _broadcast(shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...] | None:
    """NumPy's rule where sizes are known; ``None`` where they contradict each other."""
    rank = max(map(len, shapes))
    found: list[Dim] = []
    for axis in range(-rank, 0):
        dims = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        sizes = {dim for dim in dims if isinstance(dim, int)}
        if len(sizes) > 1:
            return None
        found.append(sizes.pop() if sizes else 1 if not dims else dims.pop() if len(dims) == 1 else None)
    return tuple(found)
