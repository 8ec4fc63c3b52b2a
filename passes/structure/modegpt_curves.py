"""What smaller sizes of modules cost, as shares of the variance of what each module adds to the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.ir.axes import AxisGraph
from sparsecc.passes.prune.gram import centred, quadratic_error
from sparsecc.passes.structure.head_math import dimension_errors, pair_errors
from sparsecc.passes.structure.head_moments import score_moments, value_moments
from sparsecc.passes.structure.modegpt_modules import Heads, Module, Neurons
from sparsecc.passes.structure.obs import Consumer, removal_curve
from sparsecc.passes.structure.units import unit_columns
from sparsecc.pm import CalibrationSource, MomentsLike

__all__ = ["SEARCH_STEPS", "error_curves"]

Vector = NDArray[np.float64]

#: Most steps of the search for neurons to remove.
SEARCH_STEPS = 64


def error_curves(
    model: Model, modules: Sequence[Module], calibration: CalibrationSource, damping: float
) -> dict[str, tuple[Vector, ...]]:
    """Return for each size of each module the error by what is left of it; modules that are not measured are missing.

    Errors of scores count by what they change of the outputs: a small change d of the scores of a query, in their
    natural unit, moves its result by as much of what its values vary, squared ``mean(d^2)``.
    """
    axes = AxisGraph(model)
    names = {item.name: _sources(item) for item in modules}
    wanted = {name for found in names.values() for name in found}
    waiting = list(modules)
    moments: dict[str, MomentsLike] = {}
    curves: dict[str, tuple[Vector, ...]] = {}
    for step in calibration.walk(model, [site for site in model.sites() if site.name in wanted]):
        moments.update(step)
        for item in [item for item in waiting if moments.keys() >= set(names[item.name])]:
            waiting.remove(item)
            own = {name: moments[name] for name in names[item.name]}
            if all(np.isfinite(each.gram).all() and np.isfinite(each.mean).all() for each in own.values()):
                curves[item.name] = (
                    _of_heads(item, own)
                    if isinstance(item, Heads)
                    else (_of_neurons(item, axes, own, damping),)
                )
        needed = {name for item in waiting for name in names[item.name]}
        moments = {name: each for name, each in moments.items() if name in needed}
    return curves


def _sources(item: Module) -> list[str]:
    sites = item.attention.sites if isinstance(item, Heads) else [item.out]
    return [site.name for site in sites]


def _of_neurons(item: Neurons, axes: AxisGraph, moments: Mapping[str, MomentsLike], damping: float) -> Vector:
    found = moments[item.out.name]
    gram = centred(found.gram, found.mean, found.mean)
    (part,) = item.orbit.consumers()
    columns = unit_columns(axes.units(part.atoms, "removal"), item.orbit.units, item.out.shape[1])
    weight = item.out.numpy().astype(np.float64)
    curve = removal_curve([Consumer(weight, gram, columns)], SEARCH_STEPS, damping)
    return np.append(curve.error[-1], curve.error[::-1])[: item.now[0] + 1]


def _of_heads(item: Heads, moments: Mapping[str, MomentsLike]) -> tuple[Vector, Vector]:
    attention = item.attention
    q, k, v = (moments[part.site.name] for part in (attention.q, attention.k, attention.v))
    given = moments[attention.out.name]
    weight = attention.out.numpy().astype(np.float64)
    context = centred(given.gram, given.mean, given.mean)
    total = quadratic_error(weight, context) or 1.0
    tokens = centred(v.gram, v.mean, v.mean)
    makes = np.split(attention.v.weight(), attention.match.kv_heads)
    sides = score_moments(attention, q, k)
    group = attention.match.heads // attention.match.kv_heads
    scores, values = np.zeros(item.now[0] + 1), np.zeros(item.now[1] + 1)
    for make, side, (read, there) in zip(
        makes, sides, value_moments(attention, weight, context), strict=True
    ):
        vary = float(np.einsum("ij,ji->", read, make @ tokens @ make.T)) / total
        partners = attention.partners
        lost = dimension_errors(*side) if partners is None else pair_errors(*side, partners)
        scores += vary * attention.match.scale**2 / group * lost
        values += dimension_errors(read, there) / total
    return scores, values
