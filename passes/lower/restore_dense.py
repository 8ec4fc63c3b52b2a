"""Give sites that stay dense their own weights back: accuracy is not to be lost for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsecc.ir import Model
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.pm import Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import density

__all__ = ["RestoreDense"]


@dataclass(frozen=True)
class RestoreDense(Pass):
    """Undo the pruning of every site that no sparse layout makes faster.

    Changes: weights of sites without a ``sparsecc.layout`` mark go back to what they were before the first lossy
    pass of the pipeline. Runs between ``confirm-layout`` and ``lower-sparse``.

    Sample: ``restore-dense{match=re:.*mlp.*}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "restore-dense"
    lossless: ClassVar[bool] = False

    match: str = "*"

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Restore the unmarked sites among the matching ones."""
        report = PassReport(self.name)
        if ctx.before_lossy is None:
            report.note("no lossy pass ran before: there is nothing to restore")
            return report
        own = {site.name: site for site in ctx.before_lossy.sites()}
        for site in select_sites(model, self.match, report):
            if LAYOUT_KEY in site.node.metadata_props:
                report.skip(site.name, "it is lowered as it is")
                continue
            if site.name not in own or own[site.name].shape != site.shape:
                report.skip(site.name, "the graph around it changed: its own weights do not fit any more")
                continue
            pruned, whole = site.numpy(), own[site.name].numpy()
            if np.array_equal(whole, pruned, equal_nan=True):
                report.skip(site.name, "it has its own weights")
            elif not np.array_equal(np.where(pruned != 0, whole, 0), pruned):
                report.skip(
                    site.name, "what pruning left of its weights was changed since: they cannot go back"
                )
            else:
                site.replace(whole)
                report.change(
                    site.name,
                    "not pruned after all",
                    density_before=density(pruned),
                    density_after=density(whole),
                    relative_error=0.0,
                )
        return report
