"""ALPS pruning: mask and weights found together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.passes.prune.admm import alternate
from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.gram_pass import GramPass, Problem
from sparsecc.passes.prune.selection import Mask

__all__ = ["PruneAlps"]


@dataclass(frozen=True)
class PruneAlps(GramPass):
    """Find mask and weights together by ADMM, for high sparsities.

    ALPS (Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
    Models", 2024), started from Wanda's mask and never worse on a layer than least squares on that mask. Takes
    several times as long as ``prune-wanda-ols``.

    Changes: values of weights and biases, never the graph.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-alps{sparsity=0.7}``

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
        steps: most alternating steps per site.
    """

    name: ClassVar[str] = "prune-alps"

    steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(steps=1)

    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Return what the alternating steps end with."""
        return alternate(problem.target, problem.gram, problem.choose, problem.wanda_mask(), self.steps)
