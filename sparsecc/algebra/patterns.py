"""Expressions for which somebody has a kernel: recognised, and handed to a backend."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.levels import Compressed, Dense, Tensor
from sparsecc.algebra.nest import Nest
from sparsecc.algebra.notation import Access
from sparsecc.algebra.ordering import Storage
from sparsecc.algebra.relevel import alike, releveled
from sparsecc.algebra.work import Problem

__all__ = ["KERNELS", "Call", "computed", "recognise", "signature"]

#: One product each: indices of the sparse operands, of the arrays, of the result (a, b, c, … in the order of loops);
#: MTTKRP as it is for three modes.
KERNELS = {
    "spmv": (("ab",), ("b",), "a"),
    "spmm": (("ab",), ("bc",), "ac"),
    "sddmm": (("ab",), ("ac", "bc"), "ab"),
    "ttv": (("abc",), ("c",), "ab"),
    "ttm": (("abc",), ("cd",), "abd"),
    "mttkrp": (("abc",), ("bd", "cd"), "ad"),
    "spgemm": (("ab", "bc"), (), "ac"),
    "masked_spgemm": (("ac", "ab", "bc"), (), "ac"),
}


def signature(name: str, modes: int) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return what ``KERNELS`` says of one for tensors of so many modes: MTTKRP takes any number from three on."""
    if name != "mttkrp" or modes < 3:
        return KERNELS[name]
    letters, column = string.ascii_lowercase[:modes], string.ascii_lowercase[modes]
    return (letters,), tuple(letter + column for letter in letters[1:]), letters[0] + column


#: Those whose results are dense arrays; the others' are sparse.
_DENSE_RESULTS = frozenset({"spmv", "spmm", "mttkrp", "inner"})


@dataclass(frozen=True, eq=False)
class Call:
    """What a backend is asked to compute.

    Attributes:
        kernel: its method: one of ``KERNELS``, or ``add``, ``multiply`` or ``inner`` of any number of tensors.
        tensors: sparse operands in the order of ``KERNELS``, levels in the order of the loops.
        arrays: dense operands in the order of ``KERNELS``, axes too.
        coefficient: of the result.
        indices: of the result in the order in which the kernel has them.
    """

    kernel: str
    tensors: tuple[Tensor, ...]
    arrays: tuple[NDArray[Any], ...]
    coefficient: float
    indices: tuple[str, ...]

    @property
    def dense(self) -> bool:
        """Whether the result is a dense array."""
        return self.kernel in _DENSE_RESULTS


def recognise(problem: Problem, format: str | None) -> Call | None:
    """Return the call that computes an expression, None if it is none of the known ones.

    Args:
        problem: the expression and its operands.
        format: of the result; None: a dense array, which sparse results can become, but not the other way round.
    """
    if len(problem.nests) != 1:
        return None
    nest = problem.nests[0]
    call = _sum(problem, nest) if len(nest.terms) > 1 else _product(problem, nest)
    return None if call is None or (call.dense and format is not None) else call


def _tensors(problem: Problem, nest: Nest) -> list[Tensor]:
    found = [problem.inputs[operand.access] for operand in nest.operands if operand.access is not None]
    return [item for item in found if isinstance(item, Tensor)]


def _sum(problem: Problem, nest: Nest) -> Call | None:
    """Tensors that are added, each with a number before it."""
    alone = all(
        len(term.operands) == 1 and not term.arrays and term.indices == nest.order for term in nest.terms
    )
    if not alone or len(nest.outputs) != len(nest.order) or len(nest.terms) != len(nest.operands):
        return None
    tensors = list(_tensors(problem, nest))
    for term in nest.terms:
        at = term.operands[0]
        if term.coefficient != 1:
            tensors[at] = replace(tensors[at], values=tensors[at].values * term.coefficient)
    return Call("add", tuple(tensors), (), 1.0, nest.order)


def _product(problem: Problem, nest: Nest) -> Call | None:
    term = nest.terms[0]
    tensors = _tensors(problem, nest)
    letter = dict(zip((*nest.order, *nest.tail), string.ascii_lowercase, strict=False))

    def spelled(indices: Sequence[str]) -> str:
        return "".join(sorted(letter[index] for index in indices))

    lists = [spelled(operand.indices) for operand in nest.operands]
    arrays = {spelled(access.indices): _axes(problem, access, letter) for access in term.arrays}
    result = spelled(problem.assignment.output.indices)
    if (
        len(tensors) > 1
        and not term.arrays
        and set(lists) == {spelled(nest.order)}
        and result in ("", lists[0])
    ):
        return Call(
            "multiply" if result else "inner",
            tuple(tensors),
            (),
            term.coefficient,
            nest.order if result else (),
        )
    for name in KERNELS:
        sparse, dense, out = signature(name, len(nest.order))
        same = (
            sorted(lists) == sorted(sparse) and len(term.arrays) == len(dense) and set(arrays) == set(dense)
        )
        if same and result == out:
            index = {short: long for long, short in letter.items()}
            return Call(
                name,
                tuple(tensors[lists.index(mine)] for mine in sparse),
                tuple(arrays[mine] for mine in dense),
                term.coefficient,
                tuple(index[short] for short in out),
            )
    return None


def _axes(problem: Problem, access: Access, letter: Mapping[str, str]) -> NDArray[Any]:
    """A dense operand with its axes in the order of the loops."""
    found = problem.array(access.name)
    order = sorted(range(len(access.indices)), key=lambda at: letter[access.indices[at]])
    return found.transpose(order)


def computed(
    problem: Problem, call: Call, backend: Any, threads: int, format: str | None
) -> Tensor | NDArray[Any] | None:
    """Return what a backend computes, as a dense array or in a format; None if it does not take the call.

    Args:
        problem: the expression.
        call: what is asked for.
        backend: an object with methods that are called as the kernels, ``spmv(A, x, threads=2)`` and so on; ``add``,
            ``multiply`` and ``inner`` take a list of tensors. Sparse results are anything with ``levels`` and
            ``values``. A method that is missing, or returns None, leaves the call to NumPy.
        threads: for the backend.
        format: of the result.
    """
    method = getattr(backend, call.kernel, None)
    if method is None:
        return None
    indices = problem.assignment.output.indices
    order = tuple(indices.index(index) for index in call.indices)
    stored = None if format is None else Storage.named(format, len(indices))
    several = call.kernel in ("add", "multiply", "inner")
    wanted = stored.formats if stored is not None and stored.order == order else None
    found = (
        method(alike(call.tensors, wanted), threads=threads)
        if several
        else method(*call.tensors, *call.arrays, threads=threads)
    )
    if found is None:
        return None
    if call.dense:
        array = np.asarray(found).transpose([call.indices.index(index) for index in indices])
        return array if call.coefficient == 1 else array * call.coefficient
    levels = tuple(
        Dense(level.size)
        if getattr(level, "pos", None) is None
        else Compressed(level.size, level.pos, level.crd)
        for level in found.levels
    )
    values = found.values if call.coefficient == 1 else found.values * call.coefficient
    tensor = Tensor(problem.shape, order, levels, values)
    if stored is None:
        return tensor.to_dense()
    if stored == Storage.of(tensor):
        return tensor
    changed = releveled(tensor, stored.formats) if stored.order == order else None
    return changed if changed is not None else tensor.converted(str(format))
