"""Modules of a transformer while the model is walked front to back: measured, reduced, their readers refitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.ir.axes import AxisGraph, Orbit
from sparsecc.passes.prune.gram import (
    Matrix,
    centred,
    correction_for,
    damped,
    quadratic_error,
    shifted_target,
)
from sparsecc.passes.structure.head_math import (
    Reduction,
    best_dimensions,
    best_pairs,
    block_diagonal,
    refitted,
)
from sparsecc.passes.structure.head_moments import score_moments, value_moments
from sparsecc.passes.structure.head_rewriting import Reduced
from sparsecc.passes.structure.heads import Attention
from sparsecc.passes.structure.modegpt_curves import SEARCH_STEPS
from sparsecc.passes.structure.obs import Consumer, compensate, removal_curve
from sparsecc.passes.structure.units import unit_columns
from sparsecc.passes.tidy.linear import Linear
from sparsecc.pm import MomentsLike

__all__ = ["HeadsFit", "NeuronsFit", "Reader"]

Vector = NDArray[np.float64]

_NOT_FINITE = "its input is NaN or infinite on the calibration data"


@dataclass(frozen=True, eq=False)
class Reader:
    """The layer behind a module, which is fitted to what the module gives.

    Attributes:
        site: its weight.
        linear: with a bias that can be set.
        damping: ridge, relative to the mean of the diagonal.
        correction: share of what was lost in front to make up for; None for the default.
    """

    site: Site
    linear: Linear
    damping: float
    correction: float | None

    def problem(self, moments: MomentsLike) -> tuple[Matrix, Matrix, Matrix]:
        """Return target, damped Gram matrix and cross moments, all without means: the bias takes those."""
        gram = centred(moments.gram, moments.mean, moments.mean)
        cross = centred(moments.cross, moments.reference_mean, moments.mean)
        share = correction_for(self.site.op, self.correction)
        weight = self.site.numpy().astype(np.float64)
        target = shifted_target(weight, gram, cross, self.damping, share)
        return target, damped(gram, self.damping)[0], share * cross + (1 - share) * gram

    def store(self, weight: Matrix, moments: MomentsLike, used: set[str]) -> None:
        """Write ``weight [N, K]`` and the bias with which outputs keep their means."""
        before, bias = self.site.numpy().astype(np.float64), self.linear.bias()
        assert bias is not None, "biased() looked"
        self.site.replace(weight)
        self.linear.set_bias(bias + before @ moments.reference_mean - weight @ moments.mean, used)


class NeuronsFit:
    """Neurons between layers that make them and the one layer that reads them (type I).

    Attributes:
        name: of the first layer.
        gone: units to remove, once fitted.
        error: share of the variance of the reader's outputs that is lost.
        fault: why it stays as it is, or None.
    """

    def __init__(self, orbit: Orbit, axes: AxisGraph, reader: Reader, kept: int) -> None:
        self.name = orbit.name
        self.sites = [reader.site.name]
        self.kept = kept
        self.gone = np.empty(0, np.int64)
        self.error = 0.0
        self.fault: str | None = None
        self._orbit = orbit
        self._reader = reader
        (part,) = orbit.consumers()
        self._columns = unit_columns(axes.units(part.atoms, "removal"), orbit.units, reader.site.shape[1])

    def take(self, step: Mapping[str, MomentsLike], used: set[str]) -> None:
        """Fit, if ``step`` holds what the reader reads."""
        moments = step.get(self._reader.site.name)
        if moments is None:
            return
        if not _finite(moments):
            self.fault = _NOT_FINITE
            return
        target, gram, cross = self._reader.problem(moments)
        count = len(self._orbit.units) - self.kept
        damping = self._reader.damping
        curve = removal_curve([Consumer(target, gram, self._columns)], SEARCH_STEPS, damping)
        leaving = curve.order[:count]
        kept = np.ones(self._reader.site.shape[1], bool)
        kept[self._columns[leaving].ravel()] = False
        weight = self._reader.site.numpy().astype(np.float64)
        plain = centred(moments.gram, moments.mean, moments.mean)
        fitted = compensate(weight, kept, plain, cross, damping)
        if not np.isfinite(fitted).all():
            self.fault = "its fit is not finite"
            return
        self.error = _share(fitted - target, target, gram)
        self._reader.store(fitted, moments, used)
        self.gone = np.asarray(self._orbit.units[leaving], np.int64)


class HeadsFit:
    """Dimensions of the heads of one attention: of queries and keys (type II), of values and outputs (type III).

    While the model is walked its layers have the weights of the same shape that the smaller ones stand for.

    Attributes:
        name: of the attention.
        sizes: dimensions of a head of q and k, and of one of v, to keep.
        error: share of the variance of the outputs that is lost.
        scores_error: share of the energy of the scores that is lost.
        fault: why it stays as it is, or None.
    """

    def __init__(self, attention: Attention, reader: Reader, sizes: tuple[int, int]) -> None:
        self.name = attention.name
        self.attention = attention
        self.sizes = sizes
        self.sites = [attention.q.site.name, attention.k.site.name, reader.site.name]
        self.error = self.scores_error = 0.0
        self.fault: str | None = None
        self._reader = reader
        self._weights = [part.weight() for part in (attention.q, attention.k, attention.v)]
        self._biases = [part.own_bias() for part in (attention.q, attention.k, attention.v)]
        self._moments: dict[str, MomentsLike] = {}
        self._scores: list[Reduction] = []
        self._dimensions: list[list[int]] = []
        self._values: list[Matrix] = []
        self._out: Matrix | None = None

    def take(self, step: Mapping[str, MomentsLike], used: set[str]) -> None:
        """Fit what ``step`` has the moments for."""
        *sources, reader = self.sites
        new = {name: step[name] for name in self.sites if name in step}
        if not new or self.fault is not None:
            return
        if not all(map(_finite, new.values())):
            self.fault = _NOT_FINITE
            self._put_back(used)
            return
        self._moments.update((name, new[name]) for name in sources if name in new)
        if not self._scores and set(sources) <= self._moments.keys():
            self._fit_scores(sources[0] in new, used)
            self._moments.clear()
        if reader in new:
            self._fit_values(new[reader], used)

    def reduced(self, used: set[str]) -> Reduced:
        """Return what the attention becomes; the bias of the values goes into that of the outputs."""
        match = self.attention.match
        group, rotary = match.heads // match.kv_heads, self.attention.partners is not None
        assert self._out is not None, "only called after the fit"
        left = block_diagonal([item.left for item in self._scores for _ in range(group)])
        right = block_diagonal([item.right for item in self._scores])
        values = block_diagonal(self._values)
        shared = block_diagonal([item for item in self._values for _ in range(group)])
        bias = self._reader.linear.bias()
        assert bias is not None, "biased() looked"
        shift = np.concatenate(
            [part for part in np.split(self._biases[2], match.kv_heads) for _ in range(group)]
        )
        self._reader.linear.set_bias(bias + self._out @ (shared @ shift), used)
        left = match.scale * left
        return Reduced(
            self.attention,
            (left @ self._weights[0], right @ self._weights[1], values @ self._weights[2]),
            # Without rotary positions the bias of the keys adds the same to all scores of a query.
            (left @ self._biases[0], right @ self._biases[1] if rotary else None, None),
            self._out,
            np.array(self._dimensions, np.int64) if rotary else None,
        )

    def _fit_scores(self, queries_now: bool, used: set[str]) -> None:
        """Choose the dimensions of q and k, and let the layer that is not run yet do without the others."""
        attention, match = self.attention, self.attention.match
        group, size = match.heads // match.kv_heads, match.sizes[0]
        q, k = (self._moments[name] for name in self.sites[:2])
        for left, right in score_moments(attention, q, k):
            if attention.partners is not None:
                chosen, found = best_pairs(left, right, attention.partners, self.sizes[0])
                self._dimensions.append(chosen)
            elif self.sizes[0] == size:
                found = Reduction(np.eye(size), np.eye(size), 0.0, float(np.einsum("ij,ji->", left, right)))
            else:
                found = best_dimensions(left, right, self.sizes[0])
            self._scores.append(found)
        total = sum(item.total for item in self._scores)
        self.scores_error = sum(item.error for item in self._scores) / total if total else 0.0
        products = [item.product() for item in self._scores]
        if queries_now:
            whole = block_diagonal([item.T for item in products for _ in range(group)])
            attention.q.change(whole @ self._weights[0], whole @ self._biases[0], used)
        else:
            whole = block_diagonal(products)
            attention.k.change(whole @ self._weights[1], whole @ self._biases[1], used)

    def _fit_values(self, moments: MomentsLike, used: set[str]) -> None:
        """Choose the dimensions of v and fit the output layer to them."""
        match = self.attention.match
        group, size = match.heads // match.kv_heads, match.sizes[1]
        target, gram, _ = self._reader.problem(moments)
        for read, given in value_moments(self.attention, target, gram):
            keep = self.sizes[1] == size
            self._values.append(np.eye(size) if keep else best_dimensions(read, given, self.sizes[1]).right)
        basis = block_diagonal([item for item in self._values for _ in range(group)])
        fitted = refitted(target, gram, basis)
        if not np.isfinite(fitted).all():
            self.fault = "its fit is not finite"
            self._put_back(used)
            return
        self.error = _share(fitted @ basis - target, target, gram)
        self._reader.store(fitted @ basis, moments, used)
        self._out = fitted

    def _put_back(self, used: set[str]) -> None:
        attention = self.attention
        for part, weight, bias in zip((attention.q, attention.k), self._weights, self._biases, strict=False):
            part.change(weight, bias, used)


def _finite(moments: MomentsLike) -> bool:
    parts = (moments.gram, moments.cross, moments.mean, moments.reference_mean)
    return all(bool(np.isfinite(part).all()) for part in parts)


def _share(error: Matrix, target: Matrix, gram: Matrix) -> float:
    energy = quadratic_error(target, gram)
    return quadratic_error(error, gram) / energy if energy else 0.0
