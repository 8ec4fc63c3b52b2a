"""Well-known expressions by name, with operands made from one tensor: for reports and measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.joins import index_sizes
from sparsecc.algebra.levels import Tensor
from sparsecc.algebra.notation import Assignment, parse
from sparsecc.errors import SpecError, UsageError

__all__ = ["EXPRESSIONS", "SOURCES", "case", "shifted", "usual_format"]

#: Name -> expression and where its sparse operands beside A come from. ``*`` are all indices of A.
EXPRESSIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "spmv": ("y(i) = A(i,j) * x(j)", {}),
    "spmm": ("Y(i,n) = A(i,j) * X(j,n)", {}),
    "sddmm": ("Y(i,j) = A(i,j) * U(i,n) * V(j,n)", {}),
    "spgemm": ("Y(i,k) = A(i,j) * B(j,k)", {"B": "transposed"}),
    "masked-spgemm": ("Y(i,k) = A(i,k) * B(i,j) * C(j,k)", {"B": "same", "C": "same"}),
    "add": ("Y(*) = A(*) + B(*)", {"B": "shifted"}),
    "add3": ("Y(*) = A(*) + B(*) + C(*)", {"B": "shifted", "C": "shifted2"}),
    "multiply": ("Y(*) = A(*) * B(*)", {"B": "shifted"}),
    "mixed": ("Y(*) = A(*) * D(*) + B(*)", {"B": "shifted"}),
    "fused": ("y(i) = A(i,j) * x(j) + B(i,j) * z(j)", {"B": "shifted"}),
    "mttkrp": ("Y(i,n) = A(i,k,l) * C(k,n) * D(l,n)", {}),
    "ttv": ("Y(i,j) = A(i,j,k) * c(k)", {}),
    "ttm": ("Y(i,j,n) = A(i,j,k) * C(k,n)", {}),
    "inner": ("y() = A(i,j,k) * B(i,j,k)", {"B": "shifted"}),
}

_LETTERS = "ijklmopqrs"

#: Rows that CSR may have whatever is in them, and rows for each entry: it keeps a position of 8 bytes for every row.
_MANY_ROWS, _ROWS_PER_ENTRY = 1 << 22, 8

#: Of float32 in an array, also one that takes no memory.
_MOST_NUMBERS = np.iinfo(np.intp).max // 4


def shifted(tensor: Tensor, by: int = 1) -> Tensor:
    """Return the tensor with all coordinates moved on in every mode; what leaves at the end comes back at the start."""
    places = (tensor.coordinates() + by) % np.maximum(np.array(tensor.shape, np.int64), 1)
    return Tensor.from_coordinates(
        places, tensor.values, tensor.shape, ",".join(tensor.tree().formats), tensor.order
    )


def usual_format(shape: Sequence[int], entries: int) -> str:
    """Return the format that suits a tensor: CSR for matrices, unless most of very many rows are empty, else CSF."""
    if len(shape) == 2 and shape[0] <= max(_MANY_ROWS, _ROWS_PER_ENTRY * entries):
        return "csr"
    return "csf"


def _transposed(tensor: Tensor) -> Tensor:
    turned = tensor.coordinates()[:, ::-1]
    shape = tensor.shape[::-1]
    return Tensor.from_coordinates(turned, tensor.values, shape, usual_format(shape, len(tensor.values)))


#: How operands are made from the tensor.
SOURCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "same": lambda tensor: tensor,
    "shifted": shifted,
    "shifted2": lambda tensor: shifted(tensor, 2),
    "transposed": _transposed,
}


def case(
    text: str, tensor: Tensor, given: Mapping[str, Tensor | str] | None = None, columns: int = 64
) -> tuple[Assignment, dict[str, Tensor | NDArray[Any]]]:
    """Return an expression and operands for it.

    Args:
        text: a key of ``EXPRESSIONS``, or an expression for ``notation.parse``, whose first operand is ``tensor``.
        tensor: the first operand.
        given: other sparse operands by name: tensors, or keys of ``SOURCES``. All others are dense and hold ones.
        columns: size of an index that only dense operands have.

    Raises:
        SpecError: no such expression or source, a name that is no operand, or operands do not fit each other.
        UsageError: the expression takes tensors of another order.
    """
    written, sources = EXPRESSIONS.get(text, (text, {}))
    if text not in EXPRESSIONS and not set("=>") & set(text):
        raise SpecError(
            f"no expression '{text}'; known: {', '.join(EXPRESSIONS)}, or one such as y(i) = A(i,j) * x(j)"
        )
    assignment = parse(written.replace("*)", ",".join(_LETTERS[: len(tensor.shape)]) + ")"))
    first = assignment.inputs[0]
    if len(first.indices) != len(tensor.shape):
        raise UsageError(f"{assignment} takes {len(first.indices)} modes, the tensor has {len(tensor.shape)}")
    operands: dict[str, Tensor | NDArray[Any]] = {first.name: tensor}
    names = {access.name for access in assignment.inputs}
    for name, source in {**sources, **(given or {})}.items():
        if name not in names:
            raise SpecError(f"{assignment} has no operand {name}; it has {', '.join(sorted(names))}")
        operands[name] = _made(source, tensor) if isinstance(source, str) else source
    _add_dense(assignment, operands, columns)
    index_sizes(assignment, operands)
    return assignment, operands


def _made(source: str, tensor: Tensor) -> Tensor:
    if source not in SOURCES:
        raise SpecError(f"no operand '{source}'; known: {', '.join(SOURCES)}, or a tensor")
    return SOURCES[source](tensor)


def _add_dense(assignment: Assignment, operands: dict[str, Tensor | NDArray[Any]], columns: int) -> None:
    """Add what is missing as dense arrays that take no memory: only their shape matters to the work."""
    sizes: dict[str, int] = {}
    for access in assignment.inputs:
        if access.name in operands:
            sizes.update(zip(access.indices, operands[access.name].shape, strict=False))
    for access in assignment.inputs:
        if access.name not in operands:
            shape = [sizes.setdefault(index, columns) for index in access.indices]
            if math.prod(shape) > _MOST_NUMBERS:
                raise SpecError(
                    f"{access} would be {' x '.join(map(str, shape))}: more than NumPy can address"
                )
            operands[access.name] = np.broadcast_to(np.float32(1), shape)
