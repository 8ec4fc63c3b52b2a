"""The quadratic that layer-wise pruning minimises, ``Q(E) = tr(E G E^T)``. Arrays in, arrays out; float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError, SpecError
from sparsecc.pm import Trial

__all__ = [
    "Matrix",
    "Quadratic",
    "Ridged",
    "centred",
    "check_fit",
    "correction_for",
    "damped",
    "inverse_factor",
    "irreducible_error",
    "quadratic_error",
    "shifted_target",
]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Quadratic:
    """What the weight of a layer is fitted to: find another one with small ``Q(it - target)``.

    Attributes:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite, of ``Q``.
        energy: ``[K]``, mean square of each input, without what makes ``gram`` definite.
        irreducible: share of the outputs that no weights could give back (``irreducible_error``); None if unknown.
        trial: in which other forms of the same weight are tried; None: this one is to be kept.
    """

    target: Matrix
    gram: Matrix
    energy: NDArray[np.float64]
    irreducible: float | None
    trial: Trial | None = field(default=None, kw_only=True)


class Ridged:
    """A Gram matrix made definite, and what follows from it.

    Attributes:
        matrix: ``[K, K]``, with the ridge.
        energy: ``[K]``, its diagonal without it.
    """

    def __init__(self, gram: Matrix, damping: float) -> None:
        self.matrix, _ = damped(gram, damping)
        self.energy = np.maximum(np.diag(gram), 0.0)  # centring leaves rounding of either sign

    @cached_property
    def inverse_factor(self) -> Matrix:
        """See the function ``inverse_factor``."""
        return inverse_factor(self.matrix)


#: Columns of a matrix that are mixed at a time, and the size up to which a triangle is inverted in one piece.
_COLUMNS = 512

#: How often the damping is raised tenfold before a matrix counts as unusable.
_RAISES = 8


def check_fit(pass_name: str, damping: float, **share: float | None) -> None:
    """Refuse options of a fit.

    Args:
        pass_name: whose options they are.
        damping: must be above 0.
        share: what must be in [0, 1], by the option's name; None for the default.

    Raises:
        SpecError: one of them is out of range.
    """
    if not damping > 0:
        raise SpecError(f"{pass_name}: damping must be above 0, got {damping:g}")
    for option, value in share.items():
        if value is not None and not 0 <= value <= 1:
            raise SpecError(f"{pass_name}: {option} must be in [0, 1], got {value:g}")


def correction_for(op: str, correction: float | None) -> float:
    """Return the share of what the front lost that a site of this operator makes up for.

    The default, None, is what was measured to suit (``docs/adr/0023-fitted-weights.md``): all of it for convolutions,
    half for products, which in deep transformers lose more by the shrinking of outputs than they gain.
    """
    if correction is not None:
        return correction
    return 1.0 if op == "Conv" else 0.5


def quadratic_error(error: Matrix, gram: Matrix) -> float:
    """Return ``tr(error gram error^T)``, what ``error [N, K]`` changes of the outputs, squared and summed."""
    return float(np.einsum("ij,ij->", error @ gram, error))


def damped(gram: Matrix, damping: float) -> tuple[Matrix, float]:
    """Return ``gram + ridge * I`` and the ridge, ``damping`` times the mean of the diagonal (1 if that is 0).

    Inputs that are always zero get the ridge alone: they cost next to nothing and are pruned first.
    """
    mean = float(np.trace(gram)) / len(gram)
    ridge = damping * mean if mean > 0 else 1.0
    matrix = gram.copy()
    matrix.flat[:: len(gram) + 1] += ridge
    return matrix, ridge


def centred(moment: Matrix, left: NDArray[np.float64], right: NDArray[np.float64]) -> Matrix:
    """Return ``mean((x - left)^T (y - right))`` for ``moment [K, K] = mean(x^T y)`` and the means of x and y, ``[K]``.

    With a bias that is fitted too, this is all that weights have to explain: a fit on centred moments, with the
    bias that makes the means agree, is the best of weights and bias together.
    """
    product = np.outer(left, right)
    return np.asarray(np.subtract(moment, product, out=product))  # one matrix less in memory


def irreducible_error(
    weight: Matrix, reference: Matrix, cross: Matrix, gram: Matrix, damping: float
) -> float:
    """Return the share of a site's outputs that no weights could give back on the inputs there are now.

    That is ``min ||X W^T - Xh V^T||^2 / ||X W^T||^2`` over all ``V``, with the ridge of ``shifted_target``: what
    the layers in front lost for good. 0 without a difference between ``X`` and ``Xh``: all three are one array.

    Args:
        weight: ``[N, K]``.
        reference: mean of ``X^T X``, ``[K, K]``.
        cross: mean of ``X^T Xh``.
        gram: mean of ``Xh^T Xh``, not damped.
        damping: as for ``damped``.
    """
    if cross is gram and reference is gram:
        return 0.0
    best = shifted_target(weight, gram, cross, damping, 1.0)
    total = quadratic_error(weight, reference)
    left = total - 2 * float(np.einsum("ij,ij->", weight @ cross, best)) + quadratic_error(best, gram)
    return max(0.0, left) / total if total else 0.0


def shifted_target(weight: Matrix, gram: Matrix, cross: Matrix, damping: float, correction: float) -> Matrix:
    """Return the weights that come closest to the reference's outputs on the inputs there are now.

    For inputs ``Xh`` with ``gram = Xh^T Xh`` and ``cross = X^T Xh`` that is ``W cross gram^-1``, and
    ``||X W^T - Xh V^T||^2`` is a constant plus ``Q(V - it)``. Both matrices get the same ridge, which pulls the
    result towards ``weight``: it is ``weight`` without a difference between ``X`` and ``Xh``, where ``cross`` is
    ``gram`` itself.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, not damped.
        cross: ``[K, K]``.
        damping: as for ``damped``.
        correction: share of what separates ``X`` from ``Xh`` to make up for: 0 gives ``weight``, 1 all of it.
            Noise in ``Xh`` makes least squares shrink outputs, more with every layer; less than 1 limits that.
    """
    if cross is gram:
        return weight
    matrix, ridge = damped(gram, damping)
    wanted = ridge * weight
    for start in range(0, len(gram), _COLUMNS):
        some = slice(start, start + _COLUMNS)
        wanted[:, some] += weight @ (correction * cross[:, some] + (1 - correction) * gram[:, some])
    return np.asarray(np.linalg.solve(matrix, wanted.T).T, np.float64)


def inverse_factor(gram: Matrix) -> Matrix:
    """Return the upper triangular ``R`` with ``R^T R = gram^-1``; a matrix that is not definite is damped first.

    Raises:
        ModelError: it holds NaN or infinities, or cannot be made definite.
    """
    if not np.isfinite(gram).all():
        raise ModelError("the Gram matrix holds NaN or infinity: repair the calibration data")
    matrix, raised = gram, 1e-8
    for _ in range(_RAISES):
        try:
            # Factored from the last column up, gram = U U^T with U upper; its inverse is R^T R with R = U^-1.
            flipped = np.linalg.cholesky(matrix[::-1, ::-1])
        except np.linalg.LinAlgError:
            matrix = damped(gram, raised)[0]
            raised *= 10
            continue
        return _inverse_of_upper(np.asarray(flipped[::-1, ::-1], np.float64))
    raise ModelError("the Gram matrix is not positive semi-definite: repair the calibration data")


def _inverse_of_upper(upper: Matrix) -> Matrix:
    """Return the inverse of an upper triangular matrix, halves first: a quarter of the work of a general one."""
    size = len(upper)
    if size <= _COLUMNS:
        return np.asarray(np.linalg.solve(upper, np.eye(size)), np.float64)
    half = size // 2
    inverse = np.zeros_like(upper)
    inverse[:half, :half] = _inverse_of_upper(upper[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(upper[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ (upper[:half, half:] @ inverse[half:, half:])
    return inverse
