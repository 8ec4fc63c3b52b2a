"""Give sites that stay dense their own weights back: accuracy is not to be lost for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from sparsecc.ir import Model
from sparsecc.passes.lower.choose_layout import GAIN_KEY, LAYOUT_KEY, mark, unmark
from sparsecc.pm import Pass, PassContext, PassReport, Requantizer, select_sites
from sparsecc.sparse import FLOATS, Layout, density, rounded

__all__ = ["RestoreDense", "quantized_where_marked"]

#: (layout text, gain) by site name.
Marks = Mapping[str, tuple[str, float]]


def marks_of(model: Model) -> dict[str, tuple[str, float]]:
    """The layout marks of ``model`` by site name."""
    return {
        site.name: (props[LAYOUT_KEY], float(props.get(GAIN_KEY, "1")))
        for site in model.sites()
        if LAYOUT_KEY in (props := site.node.metadata_props)
    }


def quantized_where_marked(quantization: Requantizer, marks: Marks, model: Model | None = None) -> Model:
    """Return ``model`` (default: a copy of the model before ``quantize``) with the sites marked int8 quantised.

    The result carries the marks.
    """
    result = quantization.base.copy() if model is None else model
    quantization.apply(result, {name for name, (layout, _) in marks.items() if _first(layout).int8})
    for site in result.sites():
        if site.name in marks:
            mark(site, *marks[site.name])
    return result


@dataclass(frozen=True)
class RestoreDense(Pass):
    """Undo the pruning and quantisation of every site that they do not make faster.

    Changes: weights of sites without a ``sparsecc.layout`` mark go back to what they were before the first lossy
    pass of the pipeline, float32 if ``quantize`` changed them; those of sites marked ``int8 dense`` lose their
    zeros; what ``round-weights`` rounded goes back where the layout stores float32. Runs between ``confirm-layout``
    and ``lower-sparse``.

    Sample: ``restore-dense{match=re:.*mlp.*}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        pruned: also undo pruning, not only quantisation.
    """

    name: ClassVar[str] = "restore-dense"
    lossless: ClassVar[bool] = False

    match: str = "*"
    pruned: bool = True

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Restore the sites among the matching ones that gain nothing."""
        report = PassReport(self.name)
        if ctx.before_lossy is None:
            report.note("no lossy pass ran before: there is nothing to restore")
            return report
        marks = marks_of(model)
        quantization = ctx.quantization
        if quantization is not None and not _is_result(model, quantization):
            report.note("the model was changed after quantize: no site goes back to float32")
            quantization = None
        kept = {name: _first(layout) for name, (layout, _) in marks.items() if _first(layout).sparse}
        if quantization is None:
            self._restore(model, ctx.before_lossy, kept, ctx, report)
            return report
        select_sites(model, self.match, PassReport(self.name))  # refuses a match that matches nothing
        base = quantization.base.copy()
        self._restore(base, ctx.before_lossy, kept, ctx, report)
        chosen = self._quantization_to_keep(model, base, marks)
        final = quantized_where_marked(quantization, chosen, base)
        quantized = {site.name for site in model.sites() if site.quantization is not None}
        for site in final.sites():
            if site.name in quantized and site.quantization is None:
                layout = marks[site.name][0] if site.name in marks else "dense"
                report.change(site.name, f"float32 after all: {layout}", relative_error=0.0)
            if site.name not in marks:
                unmark(site)
        model.onnx = final.onnx
        return report

    def _quantization_to_keep(self, model: Model, base: Model, marks: Marks) -> dict[str, tuple[str, float]]:
        """The marks, and one for each site that is int8 and does not match: it stays what it is."""
        chosen = dict(marks)
        matching = {site.name for site in base.sites(self.match)}
        for site in model.sites():
            if site.quantization is not None and site.name not in matching | marks.keys():
                chosen[site.name] = ("int8 dense", 1.0)
        return chosen

    def _restore(
        self, model: Model, own: Model, kept: Mapping[str, Layout], ctx: PassContext, report: PassReport
    ) -> None:
        """Give the matching sites of ``model`` their weights in ``own`` back, as far as ``kept`` allows it.

        Those in ``kept`` keep their zeros, and what was rounded unless their layout stores float32.
        """
        before = {site.name: site for site in own.sites()}
        for site in select_sites(model, self.match, report):
            layout = kept.get(site.name)
            if not self.pruned or (layout is not None and layout.values != "fp32"):
                report.skip(site.name, "it is lowered as it is")
                continue
            own_site = before.get(site.name)
            if own_site is None:
                report.skip(site.name, "the graph around it changed: it is new")
                continue
            if layout is None and density(site.numpy()) < density(own_site.numpy()):
                ctx.unpaid[site.name] = False
            if own_site.shape != site.shape:
                report.skip(site.name, "the graph around it changed: its own weights do not fit any more")
                continue
            if ctx.recovered:
                report.skip(site.name, "a recovery pass has fitted the model around its zeros")
                continue
            if site.quantization is not None and own_site.quantization is None:
                report.skip(site.name, "it is quantised: its own weights have another type")
                continue
            pruned, whole = site.numpy(), own_site.numpy()
            unrounded = np.where(pruned != 0, whole, 0)
            exact = np.array_equal(unrounded, pruned)
            if np.array_equal(whole, pruned, equal_nan=True):
                report.skip(site.name, "it has its own weights")
            elif layout is not None and (exact or not _is_rounding(unrounded, pruned)):
                report.skip(site.name, "it is lowered as it is")
            elif not exact and not _is_rounding(unrounded, pruned):
                report.skip(
                    site.name, "what pruning left of its weights was changed since: they cannot go back"
                )
            elif layout is not None:
                site.replace(unrounded)
                report.change(site.name, f"not rounded after all: {layout}", relative_error=0.0)
            else:
                site.replace(whole)
                ctx.unpaid[site.name] = True
                report.change(
                    site.name,
                    "not pruned after all",
                    density_before=density(pruned),
                    density_after=density(whole),
                    relative_error=0.0,
                )


def _is_rounding(weight: npt.NDArray[Any], result: npt.NDArray[Any]) -> bool:
    """Whether ``round-weights`` can have made ``result`` of ``weight``."""
    return weight.dtype == np.float32 and any(
        np.array_equal(rounded(weight, floats), result) for floats in FLOATS if floats != "fp32"
    )


def _first(mark_text: str) -> Layout:
    """The layout of a mark; of the two of an LSTM or GRU, which agree in what is asked here, the first."""
    return Layout.parse(mark_text.partition("+")[0])


def _is_result(model: Model, quantization: Requantizer) -> bool:
    """Whether ``model`` is what ``quantize`` left, layout marks apart."""
    copy = model.copy()
    for site in copy.sites():
        unmark(site)
    return copy.fingerprint() == quantization.fingerprint
