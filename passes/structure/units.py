"""Where the units of coupled axes stand in weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.ir.axes import AxisGraph, Part
from sparsecc.pm import Lineage

__all__ = ["cut_lineage", "unit_columns"]

Index = NDArray[np.int64]


def cut_lineage(lineage: Lineage, model: Model, axes: AxisGraph, gone: Index) -> Lineage:
    """The lineage after these units are removed, site by site."""
    parts = {(part.value, part.role): part for part in axes.parts}
    for site in model.sites():
        rows = _alive(
            axes, parts.get((site.weight, "vector" if site.depthwise else "rows")), gone, site.shape[0]
        )
        columns = _alive(axes, parts.get((site.weight, "columns")), gone, site.shape[1])
        if not (rows.all() and columns.all()):
            lineage = lineage.cut(site.name, rows, columns)
    return lineage


def _alive(axes: AxisGraph, part: Part | None, gone: Index, size: int) -> NDArray[np.bool_]:
    """Which of ``size`` rows or columns of a weight stay."""
    if part is None:
        return np.ones(size, bool)
    alive = ~np.isin(axes.units(part.atoms, "removal"), gone)
    alive = alive[0] if part.role == "columns" and alive.ndim > 1 else alive.ravel()
    return np.repeat(alive, size // len(alive))


def unit_columns(units: Index, wanted: Index, size: int) -> Index:
    """Columns ``[units, width]`` of a weight that read each unit, all places and kernel entries of it."""
    kernel = size // len(units)
    where = np.flatnonzero(np.isin(units, wanted))
    ranked = where[np.argsort(units[where], kind="stable")].reshape(len(wanted), -1)
    places = ranked[np.argsort(np.argsort(wanted))]
    spread = places[:, :, None] * kernel + np.arange(kernel)
    return np.asarray(spread.reshape(len(wanted), -1), np.int64)
