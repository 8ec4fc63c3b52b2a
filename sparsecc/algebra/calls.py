"""The way in: an expression and its operands of any kind, the result out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.execute import execute
from sparsecc.algebra.levels import Tensor
from sparsecc.algebra.notation import parse
from sparsecc.algebra.patterns import computed, recognise
from sparsecc.algebra.work import cut, problem
from sparsecc.errors import SpecError

__all__ = ["einsum"]


def einsum(
    expression: str,
    /,
    *operands: Any,
    format: str | None = None,
    parts: int | None = None,
    threads: int = 1,
    backend: Any = None,
    **named: Any,
) -> Tensor | NDArray[Any]:
    """Compute an expression of sparse tensors and dense arrays in parts of equal work.

    >>> import numpy as np, scipy.sparse
    >>> A = scipy.sparse.csr_array(np.array([[1.0, 0, 2], [0, 0, 3]]))
    >>> einsum("y(i) = A(i,j) * x(j)", A=A, x=np.array([1.0, 1, 1]))
    array([3., 3.])
    >>> einsum("ij,kj->ik", A, A, format="csr").to_dense()
    array([[5., 6.],
           [6., 9.]])
    >>> einsum("S(i,j) = A(i,j) - 2 * B(i,j)", A=A, B=A, parts=3, format="csr").values
    array([-1., -2., -3.])

    Operands whose levels suit no common order of loops are stored anew, those with fewest entries first.

    Args:
        expression: in index notation or as einsum subscripts, see ``notation.parse``.
        operands: tensors, arrays, numbers, or scipy sparse matrices in CSR, CSC, COO or BSR (four modes, see
            ``Tensor.from_scipy``); in the order in which the expression first names them, or one mapping by their
            names.
        format: of the result (``levels.format_levels``); None: a dense array.
        parts: how many; by default up to 64, fewer where there is little work.
        threads: that parts run on. Results are the same bits for any number of them; they depend on ``parts``.
        backend: an object with kernels for some expressions, such as ``sparsecc.runtime.algebra_backend.NativeBackend``
            (see ``patterns.computed``), which choose their parts themselves; or with a method ``execute(plan, format,
            threads)`` for any, such as ``tvm_codegen.TvmBackend``. What it does not take is computed by NumPy.
        named: more operands.

    Returns:
        A dense array, or a tensor in the format that was asked for.

    Raises:
        SpecError: the expression is none, or operands are missing or do not fit.
        ModelError: coordinates of an operand are unsorted, there twice or out of range, or the result is too large.
    """
    given = {name: _operand(name, item) for name, item in _by_name(expression, operands, named).items()}
    whole = problem(expression, given, format, convert=True)
    call = recognise(whole, format) if backend is not None else None
    found = computed(whole, call, backend, threads, format) if call is not None else None
    if found is not None:
        return found
    divided = cut(whole, parts)
    compiled = getattr(backend, "execute", None)
    found = compiled(divided, format, threads) if compiled is not None else None
    return found if found is not None else execute(divided, format, threads)


def _by_name(expression: str, operands: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    if len(operands) == 1 and isinstance(operands[0], Mapping):
        return {**operands[0], **named}
    inputs = parse(expression).inputs
    names = [name for name in dict.fromkeys(access.name for access in inputs) if name not in named]
    if len(operands) != len(names) and operands:
        raise SpecError(f"{len(operands)} operands for {len(names)} names: {', '.join(names)}")
    return {**dict(zip(names, operands, strict=False)), **named}


def _operand(name: str, item: Any) -> Tensor | NDArray[Any]:
    found: Tensor | NDArray[Any]
    if isinstance(item, Tensor):
        found = item
    else:
        found = Tensor.from_scipy(item) if hasattr(item, "tocsr") else np.asarray(item)
    dtype = found.values.dtype if isinstance(found, Tensor) else found.dtype
    if dtype.kind not in "biufc":
        raise SpecError(f"operand {name} has values of type {dtype}: convert them to numbers")
    return found.astype(np.int64) if dtype.kind == "b" else found
