"""Weights as int8, one symmetric scale per output."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.sparse import ScaleMethod, quantize_rows

__all__ = ["Int8Weights", "WeightCache"]


@dataclass(frozen=True, eq=False)
class Int8Weights:
    """A quantised matrix.

    Attributes:
        codes: int8 ``[N, K]`` in -127..127; zeros of the weight are zero.
        scales: float32 ``[N]``.
        relative_error: ``||codes * scales - weight|| / ||weight||``, 0 for a weight of zeros.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    relative_error: float


@dataclass
class WeightCache:
    """Quantises weights, each once however often it is asked for.

    Attributes:
        method: how the scale of an output is chosen.
    """

    method: ScaleMethod
    _known: dict[bytes, Int8Weights] = field(default_factory=dict)

    def __call__(self, weight: NDArray[Any]) -> Int8Weights:
        """Return the int8 form of a finite ``weight [N, K]``."""
        weight = np.ascontiguousarray(weight, np.float32)
        key = hashlib.sha256(weight.tobytes() + str(weight.shape).encode()).digest()
        if key not in self._known:
            self._known[key] = _quantize(weight, self.method)
        return self._known[key]


def _quantize(weight: NDArray[np.float32], method: ScaleMethod) -> Int8Weights:
    outputs = weight.shape[0]
    codes, scales = quantize_rows(weight, np.arange(outputs), outputs, method)
    error = np.linalg.norm(codes * scales[:, None] - weight)
    norm = np.linalg.norm(weight)
    return Int8Weights(codes, scales, float(error / norm) if norm else 0.0)
