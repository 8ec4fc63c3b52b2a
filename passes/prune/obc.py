"""Exact optimal brain surgeon for layers with few inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.prune.exact_obs import (
    Curves,
    counts_by_merging,
    inverse_of,
    kept,
    removal_curves,
    without,
)
from sparsecc.passes.prune.gram import Matrix
from sparsecc.passes.prune.gram_pass import GramPass, Problem
from sparsecc.passes.prune.selection import Mask
from sparsecc.pm import SiteSettings

__all__ = ["PruneObc"]


@dataclass(frozen=True)
class PruneObc(GramPass):
    """Drop weights one by one, the cheapest first, all others of the row making up for each.

    ExactOBS of "Optimal Brain Compression" (Frantar, Singh and Alistarh, 2022), for rows of blocks too. What is left of
    a row is always the least-squares optimum for its zeros. One pass gives the error at every sparsity: with
    ``scope=layer`` rows lose as many weights as their curves say, with ``scope=row`` all the same number. The work
    grows with the third power of the inputs of a site: for convolutional networks; use ``prune-alps`` for others.

    Changes: values of weights and biases, never the graph.
    Skips with the reason: depthwise and tiny sites, sites with too many inputs, NaN or infinite weights or statistics,
    sites that are as sparse already, sites that calibration does not reach.

    Sample: ``prune-obc{sparsity=0.6 correction=1.0}``

    Attributes:
        pattern: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of weights or blocks to remove, in [0, 1); none means 0.5, or what N:M implies.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights within each output ``row`` or over the whole ``layer``.
        caps: with an unstructured pattern and ``scope=row``, nested limits ``n:m`` beside the count: at most n of
            every m inputs.
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
        max_inputs: sites with more inputs per output stay dense.
    """

    name: ClassVar[str] = "prune-obc"

    max_inputs: int = 1200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(max_inputs=1)
        if self.caps and self.scope == "layer":
            raise SpecError(f"{self.name}: caps go with scope=row")

    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Remove unit after unit."""
        pattern, shape = problem.selection.pattern, (len(problem.target), problem.target.shape[1])
        lines, units = pattern.grid(shape)
        inverse = inverse_of(problem.gram)
        counts: NDArray[np.intp] | int
        if pattern.kind != "nm" and problem.selection.scope == "layer":
            curves = _curves(problem, inverse, units, ())
            total = lines * units - pattern.keep_count(lines * units, problem.selection.sparsity)
            counts = counts_by_merging(curves, total)
        else:
            # The mask of any one line says how many stay, and refuses caps that leave too few.
            line = problem.selection.mask(np.zeros((1, shape[1])))
            counts = units - int(line[0, :: max(1, pattern.cols)].sum())
            caps = [(cap.n, cap.m) for cap in problem.selection.caps]
            curves = _curves(
                problem, inverse, counts, [(pattern.n, pattern.m)] if pattern.kind == "nm" else caps
            )
        mask = kept(curves, counts, pattern, shape)
        return without(problem.target, inverse, mask), mask

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        columns = site.shape[1]
        if columns > self.max_inputs:
            return f"{columns} inputs per output are too many (max-inputs={self.max_inputs}): use prune-alps"
        return super()._refusal(site, settings)


def _curves(problem: Problem, inverse: Matrix, steps: int, caps: Sequence[tuple[int, int]]) -> Curves:
    return removal_curves(problem.target, inverse, problem.selection.pattern, steps, caps, problem.protected)
