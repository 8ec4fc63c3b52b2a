"""Whether an array fits an input of the model, told before anything slow starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UnsupportedModelError, UsageError
from sparsecc.ir import TensorSpec

__all__ = ["check_names", "fit_array", "fit_batch", "require_numbers"]


def require_numbers(spec: TensorSpec) -> None:
    """Refuse an input that no array of numbers can be given to.

    Raises:
        UnsupportedModelError: it is a sequence, an optional, of strings, or of unknown type.
    """
    if spec.dtype in ("", "string", "sequence", "optional"):
        raise UnsupportedModelError(
            f"input '{spec.name}' is of type {spec.dtype or 'unknown'} and cannot be fed: only tensors of numbers "
            "can; export the model with such inputs"
        )


def check_names(given: Iterable[str], specs: Iterable[TensorSpec], where: str) -> None:
    """Refuse arrays whose names are not exactly those of the inputs.

    Raises:
        UsageError: a name is unknown or an input has no array; the message lists what is expected.
    """
    expected = [spec.name for spec in specs]
    names = list(given)
    unknown = [name for name in names if name not in expected]
    missing = [name for name in expected if name not in names]
    listed = ", ".join(expected)
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing, n=1, cutoff=0.4)
        hint = f"; rename it to '{near[0]}'" if near else ""
        raise UsageError(
            f"{where}: array '{unknown[0]}' is no input of the model, whose inputs are {listed}{hint}"
        )
    if missing:
        raise UsageError(f"{where}: no array for input {', '.join(missing)}; the model reads {listed}")


def fit_batch(
    arrays: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str
) -> dict[str, NDArray[Any]]:
    """Return the arrays in the types of the inputs, ready to run.

    Raises:
        UsageError: a name, type, rank or size does not fit, an array is empty or holds NaN, or two inputs
            give one symbolic dimension two sizes.
    """
    check_names(arrays, specs.values(), where)
    batch = {name: fit_array(np.asarray(arrays[name]), spec, where) for name, spec in specs.items()}
    sizes: dict[str, tuple[str, int]] = {}
    for name, spec in specs.items():
        for symbol, size in zip(spec.shape or (), batch[name].shape, strict=False):
            if not isinstance(symbol, str):
                continue
            other, known = sizes.setdefault(symbol, (name, size))
            if known != size:
                raise UsageError(
                    f"{where}: dimension '{symbol}' is {known} in '{other}' but {size} in '{name}'; "
                    "make them equal"
                )
    return batch


def fit_array(array: NDArray[Any], spec: TensorSpec, where: str, *, leading: int = 0) -> NDArray[Any]:
    """Return ``array`` in the type of the input.

    Casts that keep every value are made silently, and those to a shorter floating-point type.

    Args:
        array: what the caller gave.
        spec: the input.
        where: the file or function, for messages.
        leading: axes before those of the input (1 when the array holds several batches).

    Raises:
        UsageError: type, rank or a fixed size does not fit, or the array is empty, holds NaN or values that the
            type cannot hold.
        UnsupportedModelError: the input is no tensor of numbers.
    """
    name = f"{where}: array '{spec.name}'"
    _check_type(array, spec, name)
    shape = array.shape[leading:]
    if spec.shape is not None and len(shape) != len(spec.shape):
        raise UsageError(
            f"{name} has shape {list(array.shape)}, {array.ndim} axes, but the input has {len(spec.shape)}: "
            f"{_text(spec)}; reshape it"
        )
    if any(isinstance(want, int) and want != got for want, got in zip(spec.shape or (), shape, strict=False)):
        raise UsageError(
            f"{name} has shape {list(shape)} but the input has {_text(spec)}; reshape or resize it"
        )
    if array.size == 0:
        raise UsageError(f"{name} is empty (shape {list(array.shape)}); give at least one sample")
    if array.dtype.kind == "f" and (bad := int(np.isnan(array).sum())):
        raise UsageError(f"{name} holds {bad} NaN; remove those samples")
    return _converted(array, np.dtype(spec.dtype), name)


def _converted(array: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        converted = array.astype(dtype, copy=False)
    if dtype.kind == "f" and dtype != array.dtype:
        lost = int(np.isinf(converted).sum()) - int(np.isinf(array).sum())
        if lost:
            raise UsageError(f"{name} holds {lost} values that are too large for {dtype}; scale the samples")
    return converted


def _check_type(array: NDArray[Any], spec: TensorSpec, name: str) -> None:
    require_numbers(spec)
    wanted = np.dtype(spec.dtype)
    both_float = array.dtype.kind == wanted.kind == "f"
    # NumPy calls bool to float safe, but a mask where values are expected is a mistake.
    truth_as_value = array.dtype.kind == "b" and wanted.kind == "f"
    safe = both_float or np.can_cast(array.dtype, wanted, "safe")
    if array.dtype.kind not in "biuf" or truth_as_value or not safe:
        raise UsageError(
            f"{name} has type {array.dtype} but the input has {wanted}; convert it with astype('{wanted}')"
        )


def _text(spec: TensorSpec) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in spec.shape or ()) + "]"
