"""Low rank with weights on inputs and outputs: ASVD, FWSVD, GFWSVD. Arrays in, arrays out; float64, no ONNX.

All of them are one truncated SVD: of the weight after a change of basis, which the factors undo.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.hybrid.lowrank import Factors, best_factors, truncated
from sparsecc.passes.prune.gram import Matrix, damped

__all__ = ["Importance", "asvd_factors", "asvd_scale", "fisher_factors"]

Vector = NDArray[np.float64]

#: Least scale of an input or an output, as a share of the mean of all: what nothing depends on must not be divided by.
_FLOOR = 1e-3


@dataclass(frozen=True)
class Importance:
    """How much the loss of a model depends on each weight of a layer, as one weight per output or two matrices.

    With matrices the Fisher information of the layer is taken for the Kronecker product ``inputs (x) outputs``, so
    that ``tr(outputs E inputs E^T)`` is what an error ``E [N, K]`` costs.

    Attributes:
        outputs: ``[N, N]``, positive semi-definite, or ``[N]``: sums of squared gradients over each row, at least 0.
        inputs: ``[K, K]``, positive semi-definite; None for the unit matrix.
    """

    outputs: Matrix | Vector
    inputs: Matrix | None = None

    def cost(self, error: Matrix) -> float:
        """Return what ``error [N, K]`` costs, nothing floored or damped; rows alone weigh squared errors."""
        weighed = error if self.inputs is None else error @ self.inputs
        if self.outputs.ndim == 1:
            return float(np.einsum("i,ij,ij->", self.outputs, weighed, error))
        return float(np.einsum("ij,ij->", self.outputs @ weighed, error))


def floored(scale: Vector) -> Vector:
    """Return ``scale`` with nothing below a thousandth of its mean; ones where all of it is 0."""
    mean = float(scale.mean()) if scale.size else 0.0
    return np.maximum(scale, _FLOOR * mean) if mean > 0 else np.ones_like(scale)


def asvd_scale(magnitude: Vector, alpha: float) -> Vector:
    """Return the factor ``[K]`` of each input in ASVD (Yuan et al., 2023): its magnitude to the power ``alpha``.

    Args:
        magnitude: ``[K]``, mean absolute value of each input or the root of its mean square.
        alpha: 0 gives ones, 0.5 is the authors' choice, 1 weighs errors like the diagonal of a Gram matrix.
    """
    return np.asarray(floored(magnitude) ** alpha, np.float64)


def asvd_factors(weight: Matrix, scale: Vector, rank: int) -> Factors:
    """Return the factors of ``rank`` that are nearest to ``weight [N, K]`` with its columns times ``scale [K]``.

    Their error on outputs is that of a diagonal Gram matrix made smallest, never below ``best_factors`` with the whole.
    """
    found = truncated(weight * scale, rank)
    return Factors(found.left, found.right / scale)


def fisher_factors(weight: Matrix, importance: Importance, rank: int, damping: float = 0.0) -> Factors:
    """Return the factors of ``rank`` with the smallest ``tr(B E A E^T)``, ``E`` what they lack of ``weight [N, K]``.

    With weights of outputs alone this is FWSVD (Hsu et al., 2022), with matrices on both sides GFWSVD (Chekalina et
    al., 2025). The unit matrix for outputs gives the whitened SVD by ``A``, both unit matrices the plain SVD.

    Args:
        weight: ``[N, K]``.
        importance: ``B`` of outputs and ``A`` of inputs.
        rank: at most ``min(N, K)``.
        damping: added to the diagonals of matrices, as a share of their means; weights of rows have a floor instead.

    Raises:
        numpy.linalg.LinAlgError: a matrix is not definite, and ``damping`` is too small to make it so.
    """
    inputs = None if importance.inputs is None else damped(importance.inputs, damping)[0]
    if importance.outputs.ndim == 1:
        scale = floored(np.sqrt(importance.outputs))
        found = _factors(scale[:, None] * weight, inputs, rank)
        return Factors(found.left / scale[:, None], found.right)
    root = np.linalg.cholesky(damped(importance.outputs, damping)[0])
    found = _factors(root.T @ weight, inputs, rank)
    return Factors(np.asarray(np.linalg.solve(root.T, found.left)), found.right)


def _factors(weight: Matrix, gram: Matrix | None, rank: int) -> Factors:
    return truncated(weight, rank) if gram is None else best_factors(weight, gram, rank)
