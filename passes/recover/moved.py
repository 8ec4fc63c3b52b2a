"""Least squares for sites whose inputs are other ones than in the dense model, since units or blocks are gone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.gram import Matrix, centred, damped, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.tidy.graph import float_attribute
from sparsecc.pm import Kept, MomentsLike

__all__ = ["Fitted", "Moved", "moved_refusal", "moved_target"]

Vector = NDArray[np.float64]

#: Relative squared error that comes of float32 alone: in front of what was removed nothing is to be fitted.
_ROUNDING = 1e-10


@dataclass(frozen=True, eq=False)
class Fitted:
    """New values of a site, and its relative squared error towards the dense outputs before and after."""

    weight: Matrix
    bias: Vector | None
    error_before: float
    error_after: float


def moved_target(
    now: Matrix, dense: Matrix, gram: Matrix, cross: Matrix, damping: float, correction: float
) -> Matrix:
    """Return the weights that come closest to the dense outputs on the inputs there are.

    With ``cross = X^T Xh`` that is ``dense cross gram^-1``, also where ``X`` has more columns than ``Xh``; the ridge
    pulls towards ``now``, and so does a ``correction`` below 1.

    Args:
        now: ``[N, K]``.
        dense: ``[N, L]``.
        gram: ``[K, K]``.
        cross: ``[L, K]``.
        damping: ridge, as for ``damped``.
        correction: share of the way to go.
    """
    matrix, ridge = damped(gram, damping)
    wanted = correction * (dense @ cross) + (1 - correction) * (now @ gram) + ridge * now
    return np.asarray(np.linalg.solve(matrix, wanted.T).T, np.float64)


def moved_refusal(site: Site) -> str | None:
    """Why such a site is not fitted, or None."""
    if site.groups > 1 or site.op not in ("MatMul", "Gemm", "Conv"):
        return "grouped or recurrent: it is fitted only where no units or blocks are gone"
    if site.op == "Gemm" and float_attribute(site.node, "alpha", 1.0) != 1.0:
        return "Gemm with alpha: fold it first (pass tidy)"
    if len(site.nodes) > 1 or not site.in_main_graph:
        return "in a body, or shared by several nodes"
    return None


@dataclass(frozen=True, eq=False)
class Moved:
    """A site, its bias, and what the same rows of the dense model are."""

    site: Site
    bias: SiteBias | None
    dense: Matrix
    dense_bias: Vector

    @classmethod
    def of(cls, model: Model, site: Site, reference: Model, dense: Site, kept: Kept | None) -> Moved:
        """Find the biases; a dense site without one has zeros, a site without one keeps none."""
        own = site_bias(model, site, add=False)
        theirs = site_bias(reference, dense, add=False)
        weight = dense.numpy().astype(np.float64)
        bias = theirs.numpy() if isinstance(theirs, SiteBias) else np.zeros(len(weight))
        rows = slice(None) if kept is None else kept.rows
        return cls(site, own if isinstance(own, SiteBias) else None, weight[rows], bias[rows])

    def fitted(self, moments: MomentsLike, damping: float, correction: float) -> Fitted | str:
        """Return the fitted values, or why the site is best left alone."""
        parts = (moments.gram, moments.cross, moments.mean, moments.reference_mean)
        if not all(np.isfinite(part).all() for part in parts):
            return "its input is NaN or infinite on the calibration data"
        now = self.site.numpy().astype(np.float64)
        gram, cross, mean, dense_mean = moments.gram, moments.cross, moments.mean, moments.reference_mean
        if self.bias is not None:
            gram, cross = centred(gram, mean, mean), centred(cross, dense_mean, mean)
        target = moved_target(now, self.dense, gram, cross, damping, correction)
        if not np.isfinite(target).all():
            return "its fit is not finite"
        matrix, mask = damped(gram, damping)[0], now != 0
        weight = target if mask.all() else refit_rows(target, mask, matrix, start=now)
        weight[mask & (weight == 0)] = np.finfo(self.site.dtype).tiny  # no more zeros than there were
        before, after = (quadratic_error(values - target, matrix) for values in (now, weight))
        bias = None
        if self.bias is not None:
            wanted = self.dense_bias + self.dense @ dense_mean
            before += float(np.square(wanted - now @ mean - self.bias.numpy()).sum())
            bias = wanted - weight @ mean
        energy = quadratic_error(target, matrix)
        if not after < before - _ROUNDING * energy:
            return "its weights are the best for its inputs already"
        return Fitted(weight, bias, *(error / energy if energy else 0.0 for error in (before, after)))

    def store(self, fitted: Fitted) -> None:
        """Write the fitted values into the model."""
        self.site.replace(fitted.weight.astype(self.site.dtype))
        if self.bias is not None and fitted.bias is not None:
            self.bias.replace(fitted.bias)
