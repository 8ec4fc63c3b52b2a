"""Thin factors with weights on inputs or outputs: ASVD, FWSVD, GFWSVD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.fisher import FisherFile
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.thin_factors import LowRank, LowRankPass, random_factors
from sparsecc.passes.factor.weighted import Importance, asvd_factors, asvd_scale, fisher_factors
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.prune.gram import Quadratic
from sparsecc.pm import PassContext, PassReport, Range, select_sites

__all__ = ["FactorAsvd", "FactorFwsvd"]


@dataclass(frozen=True)
class FactorAsvd(LowRankPass, CalibratedFactorPass):
    """Replace weights by two thin factors, an SVD with each input scaled by how large it is (ASVD).

    Yuan et al. 2023. A step from ``factor-svd`` to ``factor-rrr``, which knows how inputs go together too and always
    has the smaller error on the calibration data: here for comparison, and where that data is very little.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-asvd{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        alpha: power of the root mean square of each input that scales it, in [0, 1]; 0 is the plain SVD.
    """

    name: ClassVar[str] = "factor-asvd"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise SpecError(f"{self.name}: alpha must be in [0, 1], got {self.alpha:g}")

    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the SVD of the scaled target, scaled back."""
        return asvd_factors(problem.target, asvd_scale(np.sqrt(problem.energy), self.alpha), rank)


@dataclass(frozen=True)
class Traced(LowRank):
    """Factors of a named site.

    Attributes:
        site: its name.
    """

    site: str = ""


@dataclass(frozen=True)
class FactorFwsvd(CalibratedFactorPass):
    """Replace weights by two thin factors that keep what the loss of the model depends on (FWSVD, GFWSVD).

    An SVD with each output scaled by the gradients of its weights (Hsu et al. 2022), or between two matrices whose
    Kronecker product stands for the Fisher information (Chekalina et al. 2025). The gradients come from a file;
    ``bench/fisher.py`` writes one for models that ``heal`` can run.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites that the file has nothing of, sites whose bytes or measured time would not fall,
    weights shared by nodes, quantised, grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites
    that calibration does not reach.

    Sample: ``factor-fwsvd{param-ratio=0.6 fisher=fisher.npz}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of matrices of second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        fisher: an ``.npz`` with, for a site ``S``, squared gradients ``S [N, K]``, their sums over rows ``S.rows [N]``,
            or ``S.A [K, K]`` and ``S.B [N, N]``.
        whiten: where the file weighs outputs only, weigh inputs by their second moments as ``factor-rrr`` does.
    """

    name: ClassVar[str] = "factor-fwsvd"
    search: ClassVar[tuple[Range, ...]] = ()

    fisher: str | None = None
    whiten: bool = False

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Factorise every matching site that the file has gradients of.

        Raises:
            UsageError: the file is none, holds nothing of these sites, or arrays that do not fit.
        """
        if self.fisher is not None:
            sites = select_sites(model, self.match, PassReport(self.name))
            FisherFile(self.fisher).refuse_unknown([site.name for site in sites])
        return super().run(model, ctx)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Traced | str:
        """Return random factors; what the file says of the site is checked, and read again when it is needed."""
        if self.fisher is None:
            return "no gradients: give a file of them as fisher=PATH"
        found = random_factors(site.shape, numbers, self.multiple, rng)
        if isinstance(found, str):
            return found
        importance = FisherFile(self.fisher).importance(site.name, site.shape)
        return importance if isinstance(importance, str) else Traced(found.left, found.right, site.name)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> LowRank:
        """Return the factors with the least weighted error."""
        assert isinstance(outline, Traced), "made by outline"
        importance = FisherFile(str(self.fisher)).importance(outline.site, problem.target.shape)
        assert isinstance(importance, Importance), "checked by outline"
        damping = self.damping
        if self.whiten and importance.inputs is None:  # which are damped already
            importance, damping = replace(importance, inputs=problem.gram), 0.0
        return LowRank.of(fisher_factors(problem.target, importance, len(outline.right), damping))
