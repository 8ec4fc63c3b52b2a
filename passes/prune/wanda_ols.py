"""Wanda's mask with the best weights for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.gram_pass import GramPass, Problem
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.selection import Mask

__all__ = ["PruneWandaOls"]


@dataclass(frozen=True)
class PruneWandaOls(GramPass):
    """Drop the weights of smallest ``|W_ij| * ||x_j||``, then fit those that stay by least squares.

    The mask is Wanda's (Sun et al. 2023); the weights of each row that stay take over what the others did as
    well as they can on the calibration data. How the rest is fitted matters more than how it is chosen.

    Changes: values of weights and biases, never the graph.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-wanda-ols{pattern=16x1 sparsity=0.5}``

    Attributes:
        pattern: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of weights or blocks to remove, in [0, 1); none means 0.5, or what N:M implies.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights within each output ``row`` or over the whole ``layer``.
        caps: with an unstructured pattern, nested limits ``n:m`` beside the count: at most n of every m inputs.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw): what int8 convolutions (``lower-conv-int8``) want of blocks wider than one input.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already pruned, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit biases, where sites have one, together with the weights.
        resume: folder that keeps each solved site, so that the same run goes on there after a stop.
    """

    name: ClassVar[str] = "prune-wanda-ols"

    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Return the least-squares weights on Wanda's mask."""
        mask = problem.wanda_mask()
        return refit_rows(problem.target, mask, problem.gram), mask
