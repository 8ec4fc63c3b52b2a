"""Embedding tables, and heads tied to them, as two factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.collect import Tapped
from sparsecc.errors import MeasurementError, SpecError
from sparsecc.ir import Model, name_matches
from sparsecc.passes.factor.embedding_fit import (
    column_metric,
    project,
    row_moment,
    row_weights,
    subspace,
    weighted_error,
)
from sparsecc.passes.factor.table_rewriting import TableFactors, share, split
from sparsecc.passes.factor.tables import Table, find_tables
from sparsecc.passes.prune.gram import Matrix
from sparsecc.pm import Pass, PassContext, PassReport, Range
from sparsecc.pm.sites import refuse_unmatched
from sparsecc.sparse import density

__all__ = ["FactorEmbedding"]

#: How many times the old one's the measured time of a model may be whose products did not shrink.
_NOISE = 1.03


@dataclass(frozen=True)
class FactorEmbedding(Pass):
    """Replace tables of embeddings, and heads tied to them, by two factors.

    ``W [V, d]`` becomes ``A [V, r] B [r, d]`` with the smallest weighted error. Rows count by how often calibration
    data reads them, and directions by what a tied head reads; without data this is a truncated SVD. A head that
    multiplies with the table itself, or with a copy of it, shares A, and the copy goes; where that is saving enough,
    nothing else changes. Heads with a weight of their own are sites of the other ``factor-`` passes.

    Changes: ``Gather(W, ids)`` to ``MatMul(Gather(A, ids), B)``; ``MatMul(x, W^T)`` to ``MatMul(MatMul(x, B^T), A^T)``,
    of Gemm likewise. Standard operators only.
    Skips with the reason: tables that are small, quantised, NaN or infinite, that other operators read as well, or that
    are in a body of If, Loop or Scan; those with which the measured time of the model would rise by more than noise,
    or, where a head is tied, would not fall.

    Sample: ``factor-embedding{param-ratio=0.5}``

    Attributes:
        match: which tables: a glob on the name of their Gather, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of a table and its copies that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller tables, of positions for instance, stay as they are.
        keep_slower: rewrite also where the measured time does not fall.
        floor: share of the weight that is dealt out evenly to all rows, in (0, 1]: calibration data reads few of them.
    """

    name: ClassVar[str] = "factor-embedding"
    search: ClassVar[tuple[Range, ...]] = ()
    lossless: ClassVar[bool] = False

    match: str = "*"
    param_ratio: float = 0.7
    multiple: int = 8
    min_elements: int = 1 << 20
    keep_slower: bool = False
    floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("param-ratio", self.param_ratio), ("floor", self.floor)):
            if not 0 < value <= 1:
                raise SpecError(f"{self.name}: {option} must be in (0, 1], got {value:g}")
        self.require_at_least(multiple=1)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Factorise every matching table in place; each one left alone is reported with the reason."""
        report = PassReport(self.name)
        tables, refused = find_tables(model)
        names = [table.name for table in tables]
        refuse_unmatched(self.match, [*names, *(name for name, _ in refused)], "match")
        for name, reason in refused:
            if name_matches(self.match, name):
                _leave(name, reason, report)
        if not names and not refused:
            report.note("no Gather of the model reads rows of a constant table")
        for done, table in enumerate(tables):
            ctx.progress(self.name, done, len(tables))
            if name_matches(self.match, table.name):
                # Those before it may have changed the graph.
                self._factorise(model, _twin(model, table), ctx, report)
        ctx.progress(self.name, len(names), len(names))
        return report

    def _factorise(self, model: Model, table: Table, ctx: PassContext, report: PassReport) -> None:
        ratio = ctx.settings_for(table.name, self).param_ratio or 1.0
        rank = self._rank(table, ratio)
        if reason := self._refusal(table, ratio, rank, ctx):
            _leave(table.name, reason, report)
        elif ratio * _stored(table) >= table.numpy().size:
            self._share(model, table, report)
        elif reason := self._too_slow(model, table, rank, ctx):
            _leave(table.name, reason, report)
        else:
            self._split(model, table, rank, ctx, report)

    def _share(self, model: Model, table: Table, report: PassReport) -> None:
        """Let copies go: the table alone is within what may be stored."""
        weight, whole = table.numpy(), density(table.numpy())
        held = weight.size / _stored(table)
        detail = f"{_counted(len(table.copies), 'copy', 'copies')} of it gone: {held:.3g} of the numbers"
        report.note(f"{table.name}: {detail}")  # which no site tells
        report.change(
            table.name, detail, parameters=held, density_before=whole, density_after=whole,
            relative_error=0.0, output_error=0.0,
        )  # fmt: skip
        share(model, table)

    def _split(self, model: Model, table: Table, rank: int, ctx: PassContext, report: PassReport) -> None:
        """Fit factors of ``rank`` and put them into the graph."""
        weight, counts = table.numpy(), _counts(model, table, ctx, report)
        weights = row_weights(counts, len(weight), self.floor)
        moment, heads = row_moment(weight, weights), _head_moment(model, table, ctx, report)
        into, back = subspace(moment, column_metric(moment, heads), rank)
        factors = TableFactors(project(weight, into, table.dtype), back.astype(table.dtype))
        if not np.isfinite(factors.near).all():
            _leave(table.name, f"its factors do not fit into {table.dtype.name}", report)
            return
        held = _numbers(table, rank) / _stored(table)
        form = f"rank {rank} of {weight.shape[1]}"
        tied = f", with {_counted(len(table.heads), 'tied head', 'tied heads')}" if table.heads else ""
        report.change(
            table.name, f"{form}: {held:.3g} of the numbers{tied}", form=form, op="Gather",
            outputs=weight.shape[1], inputs=len(weight), parameters=held,
            rows_read=0 if counts is None else int(np.count_nonzero(counts)),
            density_before=density(weight), density_after=density(factors.near),
            **_errors(weight, factors, weights, heads),
        )  # fmt: skip
        split(model, table, factors)

    def _refusal(self, table: Table, ratio: float, rank: int, ctx: PassContext) -> str | None:
        (rows, columns), weight = table.shape, table.numpy()
        if ctx.settings_for(table.name, self).skip or ratio == 1:
            return "left alone: nothing of it is to be saved"
        if weight.size < self.min_elements:
            return f"only {weight.size} numbers (min-elements={self.min_elements})"
        if bad := weight.size - int(np.count_nonzero(np.isfinite(weight))):
            return f"{bad} of its {weight.size} numbers are NaN or infinite"
        if not rank:
            return f"{ratio:g} of {rows} x {columns} numbers do not hold factors of rank {self.multiple}"
        return None

    def _rank(self, table: Table, ratio: float) -> int:
        rows, columns = table.shape
        rank = int(ratio * _stored(table) + 1e-9) // _numbers(table, 1)
        return min(rank, rows, columns) // self.multiple * self.multiple

    def _too_slow(self, model: Model, table: Table, rank: int, ctx: PassContext) -> str | None:
        """Return why factors of this rank do not pay by the measured time of the model, or None."""
        if ctx.costs is None or self.keep_slower:
            return None
        candidate = model.copy()
        twin = _twin(candidate, table)
        rng, (rows, columns) = ctx.rng(self.name, table.name), table.shape
        near, back = rng.standard_normal((rows, rank), np.float32), rng.standard_normal((rank, columns))
        split(candidate, twin, TableFactors(near.astype(table.dtype), back.astype(table.dtype)))
        try:
            time = ctx.costs.relative_time_of(model, candidate)
        except MeasurementError as error:
            return str(error)
        if time < (1 if table.heads else _NOISE):
            return None
        return f"not faster: the model takes {time:.3g} times as long with rank {rank} of {columns}"


def _twin(model: Model, table: Table) -> Table:
    """Return the table of ``model``, a copy or as it is now, that has the same initialiser."""
    return next(found for found in find_tables(model)[0] if found.weight.name == table.weight.name)


def _numbers(table: Table, rank: int) -> int:
    """Numbers of the factors: A, B for the rows that are read, and its transpose for heads."""
    rows, columns = table.shape
    return rank * (rows + columns * (2 if table.heads else 1))


def _leave(name: str, reason: str, report: PassReport) -> None:
    """Say why a table stays, also where only sites are listed."""
    report.skip(name, reason)
    report.note(f"{name} stays: {reason}")


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _stored(table: Table) -> int:
    """Numbers of the table and of its copies."""
    return table.numpy().size * (1 + len(table.copies))


def _counts(model: Model, table: Table, ctx: PassContext, report: PassReport) -> NDArray[np.int64] | None:
    """Return how often calibration data reads each row, ``[V]``, or None."""
    if ctx.calibration is None:
        return None
    rows = table.shape[0]
    read = dict.fromkeys(node.inputs[1] for node in table.gathers)
    computed = [str(value.name) for value in read if value is not None and value.const_value is None]
    counts = np.zeros(rows, np.int64)
    if computed:
        tapped = Tapped(model, computed, ctx.threads)
        for batch in ctx.calibration:
            for numbers in tapped.run(dict(batch)).values():
                inside = numbers[(numbers >= -rows) & (numbers < rows)]
                counts += np.bincount(inside.ravel() % rows, minlength=rows)
    if not counts.any():
        report.note(f"{table.name}: calibration data reads no row of it, so that all count alike")
        return None
    return counts


def _head_moment(model: Model, table: Table, ctx: PassContext, report: PassReport) -> Matrix | None:
    """Return the summed second moments of what its heads read, ``[d, d]``; None where nothing is known of them."""
    if ctx.calibration is None or not table.heads:
        return None
    moments = ctx.calibration.gram(model, table.heads)
    total = np.sum(list(moments.values()), axis=0) if moments else None
    if total is None or not np.isfinite(total).all():
        report.note(
            f"{table.name}: what its head reads could not be measured, so that all directions count alike"
        )
        return None
    return np.asarray(total, np.float64)


def _errors(
    weight: NDArray[Any], factors: TableFactors, weights: NDArray[np.float64], heads: Matrix | None
) -> dict[str, float]:
    """Relative errors of the numbers, of what is read (squared), and of what heads compute (squared)."""
    alike, even = np.ones(len(weight)), np.eye(weight.shape[1])
    back = factors.back.astype(np.float64)
    errors = {
        "relative_error": weighted_error(weight, factors.near, back, alike, even) ** 0.5,
        "output_error": weighted_error(weight, factors.near, back, weights, even),
    }
    if heads is not None:
        errors["head_error"] = weighted_error(weight, factors.near, back, weights, heads)
    return errors
