"""SparseGPT pruning: a sweep over the columns, later ones making up for what was dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.gram_pass import GramPass, Problem
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.obs import sweep
from sparsecc.passes.prune.selection import Mask

__all__ = ["PruneSparseGpt"]

#: Steps of the last fit. After three quarters of them the error is at most three per cent above where it ends.
_STEPS = 20


@dataclass(frozen=True)
class PruneSparseGpt(GramPass):
    """Drop weights column by column, the columns behind making up for each.

    SparseGPT (Frantar and Alistarh, "Massive Language Models Can Be Accurately Pruned in One-Shot", 2023): what a
    weight costs is judged when the sweep reaches it, so that N:M groups choose knowing what was dropped before.
    Then the weights that stay are fitted by least squares, which never makes a layer worse. An exact number
    is kept of every block of columns, per row or in all.

    Changes: values of weights and biases, never the graph.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-sparsegpt{pattern=2:4}``

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
        block: columns that are chosen together where the pattern leaves it open.
        refit: fit the weights that stay once more at the end; false gives SparseGPT as published.
    """

    name: ClassVar[str] = "prune-sparsegpt"

    block: int = 128
    refit: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(block=1)

    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Sweep, then fit."""
        unit = problem.selection.unit
        every = unit if problem.selection.pattern.kind == "nm" else max(unit, self.block // unit * unit)
        swept = sweep(problem.target, problem.inverse_factor(), problem.choose, every, self.block)
        if not self.refit:
            return swept.weight, swept.mask
        if problem.trial is None:
            return refit_rows(problem.target, swept.mask, problem.gram, swept.weight, _STEPS), swept.mask
        narrow: list[Any] = [
            array.astype(np.float32) for array in (problem.target, problem.gram, swept.weight)
        ]
        target, gram, start = narrow
        found = refit_rows(target, swept.mask, gram, start, 3 * _STEPS // 4)
        return found.astype(np.float64), swept.mask
