"""Solving one problem per site, front to back, by the second moments of what the sites read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.gram import Matrix, centred
from sparsecc.passes.prune.scarcity import Scarcity
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.tidy.graph import float_attribute
from sparsecc.pm import CalibrationSource, MomentsLike, PassContext, PassReport

__all__ = ["fitted_bias", "group_moments", "settable_biases", "solutions"]


class HasSite(Protocol):
    """Something to do for a site."""

    @property
    def site(self) -> Site:
        """Where the weight is."""


Item = TypeVar("Item", bound=HasSite)
Found = TypeVar("Found")


def solutions(
    name: str,
    model: Model,
    dense: Model,
    work: Sequence[Item],
    solve: Callable[[Item, MomentsLike], Found | str],
    ctx: PassContext,
    report: PassReport,
    *,
    sequential: bool,
) -> Iterator[tuple[Item, Found]]:
    """Yield what ``solve`` finds for each site; whoever takes it changes the weight before taking the next.

    Sites that do not read one another are solved side by side. Reasons that ``solve`` gives instead, and those
    of sites that cannot be measured, go into the report.

    Args:
        name: of the pass.
        model: being changed.
        dense: as it was before.
        work: sites of ``model``.
        solve: finds the solution of a site by its moments, which are finite, or says why there is none.
        ctx: with a calibration source.
        report: takes the reasons.
        sequential: measure each site on what the changed sites before it give, else all on ``dense``.

    Raises:
        UsageError: there is no calibration source.
    """
    calibration = ctx.calibration_for(name)

    def solved(item: Item, moments: MomentsLike) -> Found | str:
        if not (np.isfinite(moments.gram).all() and np.isfinite(moments.cross).all()):
            return "its input is NaN or infinite on the calibration data"
        return solve(item, moments)

    waiting = {item.site.name: item for item in work}
    scarcity = Scarcity()
    with ThreadPoolExecutor(ctx.threads or os.cpu_count() or 1) as pool:
        for found in _measured(model, dense, work, calibration, sequential):
            items = [waiting.pop(name) for name in found if name in waiting]
            results = pool.map(solved, items, [found[item.site.name] for item in items])
            for item, result in zip(items, results, strict=True):
                if isinstance(result, str):
                    report.skip(item.site.name, result)
                else:
                    scarcity.count(item.site, found[item.site.name])
                    yield item, result
            ctx.progress(name, len(work) - len(waiting), len(work))
            del found  # the matrices of one step go before those of the next come
    for left in waiting:
        reason = calibration.unavailable.get(left, "calibration does not reach it")
        report.skip(left, f"not measured: {reason}")
    scarcity.tell(report)


def _measured(
    model: Model, dense: Model, work: Sequence[Item], calibration: CalibrationSource, sequential: bool
) -> Iterator[Mapping[str, MomentsLike]]:
    names = {item.site.name for item in work}
    if not names:
        return iter(())
    if sequential:
        return calibration.walk(model, [item.site for item in work], dense)
    return calibration.walk(dense, [site for site in dense.sites() if site.name in names])


def group_moments(
    moments: MomentsLike, group: int, groups: int, order: NDArray[np.intp] | None, affine: bool
) -> tuple[Matrix, Matrix, Matrix | None]:
    """Return Gram matrix, cross moments and those of the reference (None: unknown) of one group of inputs.

    Where there is no reference that differs, all three are one array.

    Args:
        moments: of what a site reads.
        group: which one.
        groups: of how many.
        order: of the columns; None for the one they have.
        affine: the bias is fitted too (``fitted_bias``), so that means need no weights: moments are centred.
    """
    here, there = (part.reshape(groups, -1)[group] for part in (moments.mean, moments.reference_mean))
    same = moments.reference_mean is moments.mean
    found: list[Matrix | None] = []
    for matrix, left, right in (
        (moments.gram, here, here),
        (moments.cross, there, here),
        (moments.reference_gram, there, there),
    ):
        if same and found and matrix is moments.gram:
            found.append(found[0])
            continue
        own = None if matrix is None else matrix.reshape(groups, len(left), len(right))[group]
        own = centred(own, left, right) if affine and own is not None else own
        found.append(own if own is None or order is None else own[np.ix_(order, order)])
    gram, cross, reference = found
    assert gram is not None, "only the reference may be missing"
    assert cross is not None, "only the reference may be missing"
    return gram, cross, reference


def settable_biases(model: Model, sites: Sequence[Site]) -> dict[str, SiteBias]:
    """Return by name the biases of those sites that have one which can be fitted with the weight."""
    found = {site.name: site_bias(model, site, add=False) for site in sites}
    return {name: bias for name, bias in found.items() if isinstance(bias, SiteBias)}


def fitted_bias(
    site: Site, bias: SiteBias, weight: NDArray[Any], changed: NDArray[Any], moments: MomentsLike
) -> NDArray[np.float64]:
    """Return the bias ``[N]`` that keeps the means which the outputs of ``weight`` have in the dense model.

    Args:
        site: with ``groups`` of inputs.
        bias: as it is.
        weight: ``[N, K]``, dense.
        changed: ``[N, K]``, in its place.
        moments: of what the site reads.
    """
    groups = site.groups
    here, there = (np.split(part.reshape(-1), groups) for part in (moments.mean, moments.reference_mean))
    dense, now = (np.split(part, groups) for part in (weight, changed))
    lost = np.concatenate([dense[g] @ there[g] - now[g] @ here[g] for g in range(groups)])
    alpha = float_attribute(site.node, "alpha", 1.0) if site.op == "Gemm" else 1.0
    return np.asarray(bias.numpy() + alpha * lost, np.float64)
