"""What pruning passes share that choose new weights by the Gram matrix of the inputs."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.passes.prune.base import PrunePass, Work
from sparsecc.passes.prune.gram import Matrix, check_fit, damped, quadratic_error, shifted_target
from sparsecc.passes.prune.resume import Kept, Solved
from sparsecc.passes.prune.scores import Pruned, compared
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.pm import CalibrationSource, MomentsLike, PassContext, PassReport

__all__ = ["GramPass", "Problem", "WalkPass"]

Solution = TypeVar("Solution")

#: Weights that are one problem where rows can be taken by themselves: 128 MB each time they are held.
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Problem:
    """One matrix to prune: find weights of the pattern with small ``Q(weights - target)``.

    Attributes:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite, of ``Q``.
        energy: ``[K]``, mean square of each input, without what makes ``gram`` definite.
        selection: how much stays, in which pattern.
        protected: entries ``[N, K]`` that stay while there is room; None for none.
    """

    target: Matrix
    gram: Matrix
    energy: NDArray[np.float64]
    selection: Selection
    protected: Mask | None

    def choose(self, squares: NDArray[Any], start: int = 0) -> Mask:
        """Return the mask of the columns from ``start`` on by what dropping each weight costs."""
        if self.protected is not None:
            squares = np.where(self.protected[:, start : start + squares.shape[1]], np.inf, squares)
        return self.selection.part(squares, start, self.target.shape[1])

    def wanda_mask(self) -> Mask:
        """Return the best mask if inputs were uncorrelated."""
        return self.choose(np.square(self.target) * self.energy)


@dataclass(frozen=True)
class WalkPass(PrunePass):
    """Base of passes that solve one problem per site, front to back, by the second moments of its inputs."""

    requires_calibration: ClassVar[bool] = True

    scope: Literal["layer", "row"] = "row"
    damping: float = 0.01
    sequential: bool = True
    correction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, correction=self.correction)

    def solutions(
        self,
        model: Model,
        dense: Model,
        work: Sequence[Work],
        solve: Callable[[Work, MomentsLike], Solution | str],
        ctx: PassContext,
        report: PassReport,
    ) -> Iterator[tuple[Work, Solution]]:
        """Yield what ``solve`` finds for each site; whoever takes it changes the weight before taking the next.

        Sites that do not read one another are solved side by side. Reasons that ``solve`` gives instead, and those
        of sites that cannot be measured, go into the report.

        Args:
            model: being changed.
            dense: as it was before.
            work: sites of ``model``.
            solve: finds the solution of a site by its moments, which are finite, or says why there is none.
            ctx: with a calibration source.
            report: takes the reasons.

        Raises:
            UsageError: there is no calibration source.
        """
        calibration = ctx.calibration_for(self.name)

        def solved(item: Work, moments: MomentsLike) -> Solution | str:
            if not (np.isfinite(moments.gram).all() and np.isfinite(moments.cross).all()):
                return "its input is NaN or infinite on the calibration data"
            return solve(item, moments)

        waiting = {item.site.name: item for item in work}
        with ThreadPoolExecutor(ctx.threads or os.cpu_count() or 1) as pool:
            for found in self._measured(model, dense, work, calibration):
                items = [waiting.pop(name) for name in found if name in waiting]
                results = pool.map(solved, items, [found[item.site.name] for item in items])
                for item, result in zip(items, results, strict=True):
                    if isinstance(result, str):
                        report.skip(item.site.name, result)
                    else:
                        yield item, result
                ctx.progress(self.name, len(work) - len(waiting), len(work))
                del found  # the matrices of one step go before those of the next come
        for name in waiting:
            reason = calibration.unavailable.get(name, "calibration does not reach it")
            report.skip(name, f"not measured: {reason}")

    def _measured(
        self, model: Model, dense: Model, work: Sequence[Work], calibration: CalibrationSource
    ) -> Iterator[Mapping[str, MomentsLike]]:
        names = {item.site.name for item in work}
        if not names:
            return iter(())
        if self.sequential:
            return calibration.walk(model, [item.site for item in work], dense)
        return calibration.walk(dense, [site for site in dense.sites() if site.name in names])

    def problems(self, item: Work, weight: NDArray[Any], moments: MomentsLike) -> Iterator[Problem]:
        """Yield one problem per group of rows, its columns in the order of the pattern.

        Where rows are chosen by themselves and are many, some of them are a problem.
        """
        groups, (_, columns) = item.site.groups, item.site.shape
        grams, crosses = (
            matrix.reshape(groups, columns, columns) for matrix in (moments.gram, moments.cross)
        )
        if item.order is not None:
            grams, crosses = (m[:, item.order[:, None], item.order] for m in (grams, crosses))
        stays = [None] * groups if item.protected is None else np.split(item.ordered(item.protected), groups)
        for group, rows in enumerate(np.split(weight, groups)):
            gram, _ = damped(grams[group], self.damping)
            for some in _row_parts(rows.shape, item.selection):
                target = rows[some].astype(np.float64)
                if self.sequential and self.correction:
                    target = shifted_target(
                        target, grams[group], crosses[group], self.damping, self.correction
                    )
                stay = stays[group]
                protected = None if stay is None else stay[some]
                yield Problem(target, gram, np.diag(grams[group]), item.selection, protected)


@dataclass(frozen=True)
class GramPass(WalkPass):
    """Base of passes that drop weights and change the others by the second moments of their inputs."""

    resume: str | None = None

    @abstractmethod
    def fit(self, problem: Problem) -> tuple[Matrix, Mask]:
        """Return weights ``[N, K]`` in the pattern, zero outside the mask ``[N, K]`` that comes with them."""

    def prune(self, model: Model, work: Sequence[Work], ctx: PassContext, report: PassReport) -> None:
        """Measure and prune front to back; sites that do not read one another are solved side by side.

        Raises:
            UsageError: there is no calibration source.
        """
        calibration = ctx.calibration_for(self.name)
        dense = model.copy()
        solved = (
            None if self.resume is None else Solved(self.resume, self._key(dense, calibration, work, ctx))
        )
        waiting = [item for item in work if solved is None or not self._restore(item, solved, report)]
        for item, (pruned, error) in self.solutions(model, dense, waiting, self._solve, ctx, report):
            if solved is not None:
                solved.put(item.site.name, item.site.numpy(), Kept(pruned.weight, error, pruned.kept_score))
            item.record(report, pruned, output_error=error)

    def _key(
        self, dense: Model, calibration: CalibrationSource, work: Sequence[Work], ctx: PassContext
    ) -> str:
        """What all solutions depend on: model, inputs and their rows, options, which weights are pruned and how."""
        sites = [f"{item.site.name} {item.describe()} {_digest(item.protected)}" for item in work]
        whole = (
            dense.fingerprint(),
            calibration.fingerprint(),
            str(ctx.seed),
            str(replace(self, resume=None)),
        )
        return "|".join([*whole, *sites])

    def _restore(self, item: Work, solved: Solved, report: PassReport) -> bool:
        weight = item.site.numpy()
        found = solved.get(item.site.name, weight)
        if found is None:
            return False
        ordered = item.ordered(weight)
        pruned = compared(ordered, found.weight, np.abs(ordered))
        item.record(report, replace(pruned, kept_score=found.kept_score), output_error=found.error)
        return True

    def _solve(self, item: Work, moments: MomentsLike) -> tuple[Pruned, float]:
        """Return the pruned weight in the order of the pattern and its relative error on the outputs."""
        weight = item.ordered(item.site.numpy())
        fitted, scores, error, total = [], [], 0.0, 0.0
        for problem in self.problems(item, weight, moments):
            values, mask = self.fit(problem)
            fitted.append(np.where(mask, values, 0.0).astype(weight.dtype))
            scores.append(np.abs(problem.target) * np.sqrt(problem.energy))
            error += quadratic_error(values - problem.target, problem.gram)
            total += quadratic_error(problem.target, problem.gram)
        pruned = np.concatenate(fitted)
        return compared(weight, pruned, np.concatenate(scores)), error / total if total else 0.0


def _digest(mask: Mask | None) -> str:
    return "" if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()


def _row_parts(shape: tuple[int, ...], selection: Selection) -> Iterator[slice]:
    """Cut the rows of a matrix of this shape where no choice spans two parts, else give all of them."""
    rows, columns = shape
    step = rows
    if selection.scope == "row" or selection.pattern.kind == "nm":
        unit = max(1, selection.pattern.rows)
        step = max(unit, _ELEMENTS // columns // unit * unit)
    return (slice(start, start + step) for start in range(0, rows, step))
