"""What pruning passes share that choose new weights by the Gram matrix of the inputs."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.passes.prune.base import PrunePass, Work
from sparsecc.passes.prune.gram import (
    Matrix,
    Quadratic,
    Ridged,
    check_fit,
    correction_for,
    inverse_factor,
    irreducible_error,
    quadratic_error,
    shifted_target,
)
from sparsecc.passes.prune.resume import Solution, Solved
from sparsecc.passes.prune.scores import compared
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.passes.prune.walk import fitted_bias, group_moments, settable_biases, solutions
from sparsecc.passes.recover.biases import SiteBias
from sparsecc.pm import CalibrationSource, MomentsLike, PassContext, PassReport

__all__ = ["GramPass", "Problem", "WalkPass"]

#: Weights that are one problem where rows can be taken by themselves: 128 MB each time they are held.
_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Problem(Quadratic):
    """One matrix to prune: find weights of the pattern with small ``Q(weights - target)``.

    Attributes:
        selection: how much stays, in which pattern.
        protected: entries ``[N, K]`` that stay while there is room; None for none.
        ridged: what ``gram`` is from.
    """

    selection: Selection
    protected: Mask | None
    ridged: Ridged

    def choose(self, squares: NDArray[Any], start: int = 0) -> Mask:
        """Return the mask of the columns from ``start`` on by what dropping each weight costs."""
        if self.protected is not None:
            squares = np.where(self.protected[:, start : start + squares.shape[1]], np.inf, squares)
        return self.selection.part(squares, start, self.target.shape[1])

    def inverse_factor(self) -> Matrix:
        """Return the upper triangular ``R`` with ``R^T R = gram^-1``; only in a trial it is kept for other problems."""
        return inverse_factor(self.gram) if self.trial is None else self.ridged.inverse_factor

    def wanda_mask(self) -> Mask:
        """Return the best mask if inputs were uncorrelated."""
        return self.choose(np.square(self.target) * self.energy)


@dataclass(frozen=True)
class WalkPass(PrunePass):
    """Base of passes that solve one problem per site, front to back, by the second moments of its inputs.

    Class attributes:
        by_rows: a problem falls apart into one per row where the selection does, so that a part is a problem too.
    """

    requires_calibration: ClassVar[bool] = True
    by_rows: ClassVar[bool] = True

    scope: Literal["layer", "row"] = "row"
    damping: float = 0.01
    sequential: bool = True
    correction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, correction=self.correction)

    def problems(
        self,
        item: Work,
        weight: NDArray[Any],
        moments: MomentsLike,
        ctx: PassContext,
        *,
        affine: bool = False,
    ) -> Iterator[Problem]:
        """Yield one problem per group of rows, its columns in the order of the pattern.

        Where rows are chosen by themselves and are many, some of them are a problem.

        Args:
            item: the site.
            weight: ``[N, K]`` in the order of the pattern.
            moments: of what the site reads.
            ctx: of the run.
            affine: the bias is fitted too (``fitted_bias``): weights need not explain the means.
        """
        groups, share = item.site.groups, correction_for(item.site.op, self.correction)
        stays = [None] * groups if item.protected is None else np.split(item.ordered(item.protected), groups)
        for group, rows in enumerate(np.split(weight, groups)):
            ridged, differing = ctx.once(
                ("ridged", item.site.name, group, item.order is None, affine, self.damping),
                partial(self._ridged, moments, group, groups, item.order, affine),
            )
            for some in _row_parts(rows.shape, item.selection) if self.by_rows else [slice(None)]:
                target = rows[some].astype(np.float64)
                lost = 0.0 if self.sequential else None
                if self.sequential and differing is not None:
                    gram, cross, reference = differing
                    lost = None
                    if reference is not None:
                        lost = irreducible_error(target, reference, cross, gram, self.damping)
                    if share:
                        target = shifted_target(target, gram, cross, self.damping, share)
                stay = stays[group]
                protected = None if stay is None else stay[some]
                yield Problem(
                    target, ridged.matrix, ridged.energy, lost, item.selection, protected, ridged,
                    trial=ctx.trial,
                )  # fmt: skip

    def _ridged(
        self, moments: MomentsLike, group: int, groups: int, order: NDArray[np.intp] | None, affine: bool
    ) -> tuple[Ridged, tuple[Matrix, Matrix, Matrix | None] | None]:
        """The Gram matrix to fit to; and all of ``group_moments`` where a reference differs, else None."""
        gram, cross, reference = group_moments(moments, group, groups, order, affine)
        same = cross is gram and reference is gram
        return Ridged(gram, self.damping), None if same else (gram, cross, reference)


@dataclass(frozen=True)
class GramPass(WalkPass):
    """Base of passes that drop weights and change the others by the second moments of their inputs."""

    by_outputs: ClassVar[bool] = True

    bias: bool = True
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
        biases = settable_biases(model, [item.site for item in work]) if self.bias else {}
        solved = (
            None if self.resume is None else Solved(self.resume, self._key(dense, calibration, work, ctx))
        )
        waiting = []
        for item in work:
            kept = None if solved is None else solved.get(item.site.name, item.site.numpy())
            if kept is None:
                waiting.append(item)
            else:
                _store(item, biases.get(item.site.name), kept, report)

        def solve(item: Work, moments: MomentsLike) -> Solution:
            return self._solve(item, biases.get(item.site.name), moments, ctx)

        for item, solution in solutions(
            self.name, model, dense, waiting, solve, ctx, report, sequential=self.sequential
        ):
            if solved is not None:
                solved.put(item.site.name, item.site.numpy(), solution)
            _store(item, biases.get(item.site.name), solution, report)

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

    def _solve(self, item: Work, bias: SiteBias | None, moments: MomentsLike, ctx: PassContext) -> Solution:
        """Return what the site becomes, with its error relative to its outputs."""
        weight = item.ordered(item.site.numpy())
        fitted, scores, lost = [], [], []
        error, total = 0.0, 0.0
        for problem in self.problems(item, weight, moments, ctx, affine=bias is not None):
            values, mask = self.fit(problem)
            fitted.append(np.where(mask, values, 0.0).astype(weight.dtype))
            scores.append(np.abs(problem.target) * np.sqrt(problem.energy))
            error += quadratic_error(values - problem.target, problem.gram)
            total += quadratic_error(problem.target, problem.gram)
            lost += [] if problem.irreducible is None else [problem.irreducible]
        pruned = np.concatenate(fitted)
        numbers = {"output_error": error / total if total else 0.0}
        if lost:
            numbers["irreducible_error"] = float(np.mean(lost))
        shifted = None
        if bias is not None:
            shifted = fitted_bias(item.site, bias, item.restored(weight), item.restored(pruned), moments)
        kept = compared(weight, pruned, np.concatenate(scores)).kept_score
        return Solution(pruned, shifted, kept, numbers)


def _store(item: Work, bias: SiteBias | None, solution: Solution, report: PassReport) -> None:
    before = item.ordered(item.site.numpy())
    pruned = compared(before, solution.weight, np.abs(before))
    item.record(report, replace(pruned, kept_score=solution.kept_score), **solution.numbers)
    if bias is not None and solution.bias is not None:
        bias.replace(solution.bias)


def _row_parts(shape: tuple[int, ...], selection: Selection) -> Iterator[slice]:
    """Cut the rows of a matrix of this shape where no choice spans two parts, else give all of them."""
    rows, columns = shape
    step = rows
    if selection.scope == "row" or selection.pattern.kind == "nm":
        unit = max(1, selection.pattern.rows)
        step = max(unit, _ELEMENTS // columns // unit * unit)
    return (slice(start, start + step) for start in range(0, rows, step))


def _digest(mask: Mask | None) -> str:
    return "" if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
