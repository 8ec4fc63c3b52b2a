"""Types in which the values of a packed weight can be stored; arithmetic is float32 whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError

__all__ = ["FLOATS", "Floats", "floats_of", "holds", "rounded"]

Floats = Literal["fp32", "fp16", "bf16"]
"""IEEE 754 single precision, half precision, and the upper half of single precision."""

FLOATS: Mapping[Floats, np.dtype[Any]] = dict(
    zip(get_args(Floats), map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)), strict=True)
)
"""NumPy's types by name."""


def floats_of(dtype: np.dtype[Any]) -> Floats:
    """Return the name of ``dtype``.

    Raises:
        ModelError: it is none of ``FLOATS``.
    """
    for name, known in FLOATS.items():
        if dtype == known:
            return name
    raise ModelError(f"packed weight: values must be float32, float16 or bfloat16, got {dtype}")


def rounded(array: NDArray[np.float32], to: Floats) -> NDArray[np.float32]:
    """Return float32 ``array`` rounded to the nearest numbers (ties to even) of type ``to``, as float32.

    What is too large becomes infinite, what is too small zero.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # NaN stays what it is
        return array.astype(FLOATS[to]).astype(np.float32)


def holds(array: NDArray[np.float32], to: Floats) -> bool:
    """Whether every number of ``array`` is one of type ``to``, so that storing it so loses nothing."""
    return to == "fp32" or np.array_equal(rounded(array, to), array, equal_nan=True)
