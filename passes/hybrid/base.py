"""What passes share that put several linear operators in the place of a site."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.hybrid.rewriting import Rewriter, refusal
from sparsecc.passes.prune.base import Work
from sparsecc.passes.prune.gram_pass import Problem, WalkPass
from sparsecc.passes.prune.scores import compared
from sparsecc.passes.prune.walk import fitted_bias, settable_biases, solutions
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import MomentsLike, PassContext, PassReport, SiteSettings
from sparsecc.sparse import density

__all__ = ["HybridPass", "Solution"]


@dataclass(frozen=True)
class Solution:
    """What a site becomes.

    Attributes:
        core: ``[N, K]``, what its own node multiplies with.
        parts: arrays of the nodes around it, by name, as the graph has them.
        total: ``[N, K]``, the weight that all of them together stand for.
        detail: what it is, in a few words.
        numbers: for the report.
        bias: ``[N]``, if that is fitted too.
    """

    core: NDArray[Any]
    parts: dict[str, NDArray[Any]]
    total: NDArray[Any]
    detail: str
    numbers: dict[str, float] = field(default_factory=dict)
    bias: NDArray[np.float64] | None = None

    def stored(self, item: Work, dtype: np.dtype[Any]) -> Solution:
        """Return what is to be written for ``item``, in its type, the core in its order of columns, without total."""
        parts = {name: array.astype(dtype) for name, array in self.parts.items()}
        core = item.restored(self.core).astype(dtype)
        return replace(self, core=core, parts=parts, total=core[:0])


@dataclass(frozen=True)
class HybridPass(WalkPass):
    """Base of passes that factorise or split the weights of sites and rewrite the graph at the end.

    While sites are measured front to back, each solved one has the whole weight that its parts stand for.
    """

    by_rows: ClassVar[bool] = False

    bias: bool = True

    @abstractmethod
    def solve(self, item: Work, problem: Problem, ctx: PassContext) -> Solution | str:
        """Return what becomes of a site without groups, or the reason why it stays as it is."""

    @abstractmethod
    def rewrite(self, rewriter: Rewriter, site: Site, parts: dict[str, NDArray[Any]]) -> None:
        """Put the parts around the node of ``site``, which has its new weight already."""

    def unsuited(self, site: Site) -> str | None:
        """Return why a site that could be rewritten, its shapes inferred as far as possible, stays as it is."""
        return None

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Run: only the fit knows the parts."""
        return self.run(model, ctx)

    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Solve front to back, then rewrite all sites."""
        dense = model.copy()
        inferred = model.copy()  # nothing of the model may change where nothing is rewritten
        inferred.infer_shapes()
        twins = {site.name: site for site in inferred.sites()}
        suited = []
        for item in work:
            reason = self.unsuited(twins[item.site.name])
            if reason is None:
                suited.append(item)
            else:
                report.skip(item.site.name, reason)

        biases = settable_biases(model, [item.site for item in suited]) if self.bias else {}

        def solve(item: Work, moments: MomentsLike) -> Solution | str:
            weight, bias = item.site.numpy(), biases.get(item.site.name)
            (problem,) = self.problems(item, item.ordered(weight), moments, ctx, affine=bias is not None)
            solution = self.solve(item, problem, ctx)
            if isinstance(solution, str) or bias is None:
                return solution
            total = item.restored(solution.total)
            return replace(solution, bias=fitted_bias(item.site, bias, weight, total, moments))

        found: list[tuple[Work, Solution]] = []
        for item, solution in solutions(
            self.name, model, dense, suited, solve, ctx, report, sequential=self.sequential
        ):
            weight = item.site.numpy()
            total = item.restored(solution.total).astype(weight.dtype)
            item.site.replace(total, item.scratch)
            if solution.bias is not None:
                biases[item.site.name].replace(solution.bias)
            found.append((item, solution.stored(item, weight.dtype)))
            report.change(
                item.site.name,
                solution.detail,
                density_before=density(weight),
                density_after=density(solution.core),
                relative_error=compared(weight, total, np.abs(weight)).relative_error,
                **solution.numbers,
            )
        if not found:
            return
        rewriter = Rewriter(model)
        for item, solution in found:
            item.site.replace(solution.core, item.scratch)
            self.rewrite(rewriter, item.site, solution.parts)
        remove_dead(model.onnx)
        model.infer_shapes()

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        return refusal(site) or super()._refusal(site, settings)
