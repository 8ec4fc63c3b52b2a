"""SVD, whitened SVD, reduced-rank regression."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.siblings import SharingPass
from sparsecc.passes.hybrid.lowrank import Factors, best_factors
from sparsecc.passes.prune.gram import Quadratic
from sparsecc.pm import Range

__all__ = ["FactorRrr", "FactorSvd"]


@dataclass(frozen=True)
class FactorSvd(SharingPass):
    """Replace weights by two thin factors, a truncated SVD: the closest weights of that rank.

    Needs no calibration data and knows nothing of the inputs: ``factor-rrr`` loses much less.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights.

    Sample: ``factor-svd{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        share_inputs: sites that read the same, such as query, key and value, or gate and up, have the first factor in
            common where that pays and loses less than factors of their own in the same numbers.
    """

    name: ClassVar[str] = "factor-svd"
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),)

    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the truncated SVD (Eckart and Young 1936); ``gram`` is the identity."""
        return best_factors(problem.target, problem.gram, rank)


@dataclass(frozen=True)
class FactorRrr(SharingPass, CalibratedFactorPass):
    """Replace weights by two thin factors with the outputs closest to those of the dense model.

    Reduced-rank regression (Izenman 1975) on what each site reads after the sites before it have changed. With
    ``sequential=false`` this is whitened SVD (SVD-LLM, Wang et al. 2024), or the principal components of the outputs
    (LLM-ROM), which is the same matrix: no weight of that rank has a smaller error on the calibration data.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-rrr{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        share_inputs: sites that read the same, such as query, key and value, or gate and up, have the first factor in
            common where that pays and loses less than factors of their own in the same numbers.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
    """

    name: ClassVar[str] = "factor-rrr"
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),)

    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the factors with the smallest error on the outputs."""
        if problem.trial is None:
            return best_factors(problem.target, problem.gram, rank)
        weight = problem.target
        key = self.name, hashlib.sha256(weight.tobytes()).hexdigest()
        whole = problem.trial.once(key, lambda: best_factors(weight, problem.gram, min(weight.shape)))
        start = whole.rank - rank  # the strongest come last
        return Factors(whole.left[:, start:], whole.right[start:])
