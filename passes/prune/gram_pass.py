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
from sparsecc.passes.prune.gram import (
    Matrix,
    centred,
    check_fit,
    correction_for,
    damped,
    irreducible_error,
    quadratic_error,
    shifted_target,
)
from sparsecc.passes.prune.resume import Solution, Solved
from sparsecc.passes.prune.scarcity import Scarcity
from sparsecc.passes.prune.scores import compared
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.tidy.graph import float_attribute
from sparsecc.pm import CalibrationSource, MomentsLike, PassContext, PassReport

__all__ = ["GramPass", "Problem", "WalkPass"]

Found = TypeVar("Found")

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
        irreducible: share of the outputs that no weights could give back (``irreducible_error``); None if unknown.
    """

    target: Matrix
    gram: Matrix
    energy: NDArray[np.float64]
    selection: Selection
    protected: Mask | None
    irreducible: float | None

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

    def solutions(
        self,
        model: Model,
        dense: Model,
        work: Sequence[Work],
        solve: Callable[[Work, MomentsLike], Found | str],
        ctx: PassContext,
        report: PassReport,
    ) -> Iterator[tuple[Work, Found]]:
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

        def solved(item: Work, moments: MomentsLike) -> Found | str:
            if not (np.isfinite(moments.gram).all() and np.isfinite(moments.cross).all()):
                return "its input is NaN or infinite on the calibration data"
            return solve(item, moments)

        waiting = {item.site.name: item for item in work}
        scarcity = Scarcity()
        with ThreadPoolExecutor(ctx.threads or os.cpu_count() or 1) as pool:
            for found in self._measured(model, dense, work, calibration):
                items = [waiting.pop(name) for name in found if name in waiting]
                results = pool.map(solved, items, [found[item.site.name] for item in items])
                for item, result in zip(items, results, strict=True):
                    if isinstance(result, str):
                        report.skip(item.site.name, result)
                    else:
                        scarcity.count(item.site, found[item.site.name])
                        yield item, result
                ctx.progress(self.name, len(work) - len(waiting), len(work))
                del found  # the matrices of one step go before those of the next come
        for name in waiting:
            reason = calibration.unavailable.get(name, "calibration does not reach it")
            report.skip(name, f"not measured: {reason}")
        scarcity.tell(report)

    def _measured(
        self, model: Model, dense: Model, work: Sequence[Work], calibration: CalibrationSource
    ) -> Iterator[Mapping[str, MomentsLike]]:
        names = {item.site.name for item in work}
        if not names:
            return iter(())
        if self.sequential:
            return calibration.walk(model, [item.site for item in work], dense)
        return calibration.walk(dense, [site for site in dense.sites() if site.name in names])

    def problems(
        self, item: Work, weight: NDArray[Any], moments: MomentsLike, *, affine: bool = False
    ) -> Iterator[Problem]:
        """Yield one problem per group of rows, its columns in the order of the pattern.

        Where rows are chosen by themselves and are many, some of them are a problem.

        Args:
            item: the site.
            weight: ``[N, K]`` in the order of the pattern.
            moments: of what the site reads.
            affine: the bias is fitted too (``fitted_bias``): weights need not explain the means.
        """
        groups, share = item.site.groups, correction_for(item.site.op, self.correction)
        stays = [None] * groups if item.protected is None else np.split(item.ordered(item.protected), groups)
        for group, rows in enumerate(np.split(weight, groups)):
            gram, cross, reference = _moments(moments, group, groups, item.order, affine)
            matrix, _ = damped(gram, self.damping)
            energy = np.maximum(np.diag(gram), 0.0)  # centring leaves rounding of either sign
            for some in _row_parts(rows.shape, item.selection) if self.by_rows else [slice(None)]:
                target = rows[some].astype(np.float64)
                lost = None
                if self.sequential and reference is not None:
                    lost = irreducible_error(target, reference, cross, gram, self.damping)
                if self.sequential and share:
                    target = shifted_target(target, gram, cross, self.damping, share)
                stay = stays[group]
                protected = None if stay is None else stay[some]
                yield Problem(target, matrix, energy, item.selection, protected, lost)


@dataclass(frozen=True)
class GramPass(WalkPass):
    """Base of passes that drop weights and change the others by the second moments of their inputs."""

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
        biases = self._biases(model, work)
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
            return self._solve(item, biases.get(item.site.name), moments)

        for item, solution in self.solutions(model, dense, waiting, solve, ctx, report):
            if solved is not None:
                solved.put(item.site.name, item.site.numpy(), solution)
            _store(item, biases.get(item.site.name), solution, report)

    def _biases(self, model: Model, work: Sequence[Work]) -> dict[str, SiteBias]:
        """The biases that are fitted with the weights, by the name of the site."""
        if not self.bias:
            return {}
        found = {item.site.name: site_bias(model, item.site, add=False) for item in work}
        return {name: bias for name, bias in found.items() if isinstance(bias, SiteBias)}

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

    def _solve(self, item: Work, bias: SiteBias | None, moments: MomentsLike) -> Solution:
        """Return what the site becomes, with its error relative to its outputs."""
        weight = item.ordered(item.site.numpy())
        fitted, scores, lost = [], [], []
        error, total = 0.0, 0.0
        for problem in self.problems(item, weight, moments, affine=bias is not None):
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
        shifted = None if bias is None else fitted_bias(item, bias, weight, pruned, moments)
        kept = compared(weight, pruned, np.concatenate(scores)).kept_score
        return Solution(pruned, shifted, kept, numbers)


def fitted_bias(
    item: Work, bias: SiteBias, weight: NDArray[Any], pruned: NDArray[Any], moments: MomentsLike
) -> NDArray[np.float64]:
    """The bias ``[N]`` that gives the outputs of ``pruned`` the means that those of ``weight`` have in the dense model.

    Both weights are in the order of the pattern.
    """
    groups = item.site.groups
    here, there = (np.split(part.reshape(-1), groups) for part in (moments.mean, moments.reference_mean))
    dense, now = (np.split(item.restored(part), groups) for part in (weight, pruned))
    lost = np.concatenate([dense[g] @ there[g] - now[g] @ here[g] for g in range(groups)])
    alpha = float_attribute(item.site.node, "alpha", 1.0) if item.site.op == "Gemm" else 1.0
    return np.asarray(bias.numpy() + alpha * lost, np.float64)


def _moments(
    moments: MomentsLike, group: int, groups: int, order: NDArray[np.intp] | None, affine: bool
) -> tuple[Matrix, Matrix, Matrix | None]:
    """Gram matrix, cross moments and those of the reference for one group, in ``order``; centred if ``affine``."""
    here, there = (part.reshape(groups, -1)[group] for part in (moments.mean, moments.reference_mean))
    found: list[Matrix | None] = []
    for matrix, left, right in (
        (moments.gram, here, here),
        (moments.cross, there, here),
        (moments.reference_gram, there, there),
    ):
        own = None if matrix is None else matrix.reshape(groups, len(left), len(right))[group]
        own = centred(own, left, right) if affine and own is not None else own
        found.append(own if own is None or order is None else own[np.ix_(order, order)])
    gram, cross, reference = found
    assert gram is not None, "only the reference may be missing"
    assert cross is not None, "only the reference may be missing"
    return gram, cross, reference


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
