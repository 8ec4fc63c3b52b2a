"""Weights as int8, one symmetric scale per output."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.sparse import ScaleMethod, quantize_rows

__all__ = ["Int8Weights", "WeightCache", "name_of"]


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
    exact = weight.astype(np.float64)  # squares of large float32 overflow
    error = np.linalg.norm(codes * scales[:, None].astype(np.float64) - exact)
    norm = np.linalg.norm(exact)
    return Int8Weights(codes, scales, float(error / norm) if norm else 0.0)


def name_of(site: Site, node: onnx_ir.Node) -> str:
    """Return the name of a node of ``site``, for one without a name one that no other node of it has.

    onnxruntime refuses models in which two nodes have the same name.
    """
    first = node is site.nodes[0]
    return node.name or (site.name if first else "") or node.outputs[0].name or site.name
