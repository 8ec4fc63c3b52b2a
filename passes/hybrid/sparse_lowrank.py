"""A sparse product beside one of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.hybrid.base import HybridPass, Solution
from sparsecc.passes.hybrid.lowrank import affordable_rank
from sparsecc.passes.hybrid.rewriting import Rewriter
from sparsecc.passes.hybrid.sparse_plus_rank import decompose, refit
from sparsecc.passes.prune.base import Work
from sparsecc.passes.prune.gram import quadratic_error
from sparsecc.passes.prune.gram_pass import Problem
from sparsecc.passes.prune.selection import Selection
from sparsecc.passes.tidy.graph import float_attribute
from sparsecc.pm import PassContext, Range, SiteSettings

__all__ = ["SparseLowRank"]


@dataclass(frozen=True)
class RankSelection(Selection):
    """A sparse part and the rank of what stands beside it.

    Attributes:
        rank: of the dense factors.
    """

    rank: int = 0

    def describe(self) -> str:
        """Pattern, sparsity and rank."""
        return f"{super().describe()} beside rank {self.rank}"


@dataclass(frozen=True)
class SparseLowRank(HybridPass):
    """Replace a weight by a sparse one plus a product of two thin ones, fitted to the calibration data.

    The start is the alternation of OATS (Zhang and Papyan 2024); then both parts are solved exactly in turns, the
    factors by a whitened SVD of what the sparse part lacks, the sparse weights by least squares on their mask, so
    that the error on the outputs only falls. The factors count: together with what stays of the sparse part they
    hold as many numbers as pruning alone would leave.

    Changes: ``y = MatMul(x, S) + MatMul(MatMul(x, V), U)``, convolutions likewise (V has the kernel, U is 1x1). The
    node of the site keeps its name and holds S; all three products are sites of their own. Standard operators only.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, weights shared by nodes,
    quantised, grouped or recurrent ones, those whose share is less than the smallest rank, sites that are as sparse
    already, sites that calibration does not reach.

    Sample: ``sparse-lowrank{sparsity=0.6 rank-share=0.3}``

    Attributes:
        pattern: of the sparse part: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of the numbers of a weight to save, in [0, 1), factors counted; none means 0.5. Not for
            N:M, where the sparse part keeps N/M and the factors come on top.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights within each output ``row`` or over the whole ``layer``.
        caps: with an unstructured pattern, nested limits ``n:m`` beside the count: at most n of every m inputs.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw).
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already rewritten, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        rank_share: share of the numbers kept that the factors hold, in [0, 1); 0 is pruning alone.
        multiple: ranks are multiples of it; sites that cannot afford one stay as they are.
        iterations: most of the alternation that finds the mask.
        rounds: most of the exact one after it; 0 leaves what OATS gives.
    """

    name: ClassVar[str] = "sparse-lowrank"
    search: ClassVar[tuple[Range, ...]] = (
        Range.of("sparsity", (0.5, 0.7, 0.8)),
        Range.of("sparsity", (0.5, 0.7, 0.8), pattern="16x1"),
    )

    rank_share: float = 0.25
    multiple: int = 4
    iterations: int = 80
    rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rank_share < 1:
            raise SpecError(f"{self.name}: rank-share must be in [0, 1), got {self.rank_share:g}")
        self.require_at_least(multiple=1, iterations=1, rounds=0)

    def selection_of(self, site: Site, settings: SiteSettings) -> RankSelection:
        """Return the sparse part and the rank beside it that keep the numbers asked for."""
        rank, plain = self._rank(site, settings), super().selection_of(site, settings)
        sparsity = plain.sparsity
        if sparsity is not None and plain.pattern.kind != "nm":
            rows, columns = site.shape
            sparsity = min(1.0, sparsity + rank * (rows + columns) / (rows * columns))
        return RankSelection(plain.pattern, sparsity, plain.scope, plain.caps, rank)

    def _rank(self, site: Site, settings: SiteSettings) -> int:
        pattern = settings.pattern
        assert pattern is not None  # the base has refused that
        if pattern.kind == "nm":
            share = pattern.n / pattern.m * self.rank_share / (1 - self.rank_share)
        else:
            share = (1 - (settings.sparsity or 0.0)) * self.rank_share
        return affordable_rank(*site.shape, share, self.multiple)

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        reason = super()._refusal(site, settings)
        if reason is None and self.rank_share and not self._rank(site, settings):
            return (
                f"a share of {self.rank_share:g} of what stays of {site.shape[0]} x {site.shape[1]} weights "
                f"does not hold factors of rank {self.multiple}"
            )
        return reason

    def solve(self, item: Work, problem: Problem, ctx: PassContext) -> Solution:
        """Decompose the target, then fit both parts."""
        selection = item.selection
        assert isinstance(selection, RankSelection)
        rng = ctx.rng(self.name, item.site.name)
        start = decompose(
            problem.target, problem.energy, selection.rank, problem.choose, self.iterations, rng
        )
        found = refit(start, problem.target, problem.gram, self.rounds)
        energy = quadratic_error(problem.target, problem.gram) or 1.0
        factors = found.factors.balanced()
        held = int(np.count_nonzero(found.sparse)) + factors.size
        return Solution(
            core=found.sparse,
            parts={"left": factors.left, "right": item.restored(factors.right)} if factors.rank else {},
            total=found.total(),
            detail=f"{item.describe()}: {held / found.sparse.size:.4g} of the numbers stay",
            numbers={
                "rank": factors.rank,
                "parameters": held / found.sparse.size,
                "output_error": found.objectives[-1] / energy,
                "output_error_before_fit": found.objectives[0] / energy,
            },
        )

    def rewrite(self, rewriter: Rewriter, site: Site, parts: dict[str, NDArray[Any]]) -> None:
        """Add the thin products beside the sparse one."""
        if not parts:
            return
        node, left, right = rewriter.part(site), parts["left"], parts["right"]
        source = node.inputs[0]
        assert source is not None, "a site reads something"
        if site.op == "Conv":
            kernel = site.weight_shape[1:]
            first = rewriter.linear(node, source, right.reshape(-1, *kernel), f"{node.name}.right", "Conv")
            pointwise = left.reshape(*left.shape, *(1 for _ in kernel[1:]))
            second = rewriter.linear(node, first.outputs[0], pointwise, f"{node.name}.left", "pointwise")
        else:
            first = rewriter.linear(node, source, right, f"{node.name}.right")
            scaled = left * left.dtype.type(float_attribute(node, "alpha", 1.0))
            second = rewriter.linear(node, first.outputs[0], scaled, f"{node.name}.left")
        both = [node.outputs[0], second.outputs[0]]
        rewriter.replace(node, [first, second, rewriter.node(node, "Add", both, f"{node.name}.sum")])
