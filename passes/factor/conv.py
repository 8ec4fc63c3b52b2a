"""Convolutions as several smaller ones: spatial SVD, Tucker-2, CP, depthwise and pointwise."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.conv_forms import Canonical, KernelForm, Separable, Spatial, Tucker
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.kernels import (
    canonical,
    separable,
    spatial_svd,
    tucker,
    tucker_ranks,
)
from sparsecc.passes.prune.gram import Quadratic
from sparsecc.pm import Range

__all__ = ["FactorCp", "FactorSeparable", "FactorSpatialSvd", "FactorTucker"]


@dataclass(frozen=True)
class ConvFactorPass(CalibratedFactorPass):
    """Base of passes for convolutions of one group whose kernels have several entries."""

    @abstractmethod
    def kernel_outline(
        self, site: Site, kernel: tuple[int, ...], numbers: int, rng: np.random.Generator
    ) -> KernelForm | str:
        """Return the outline for a weight ``[N, C, *kernel]``, or why there is none."""

    def refusal(self, site: Site) -> str | None:
        """Refuse what has no kernel to take apart."""
        if site.conv is None:
            return f"{self.name} takes the kernels of convolutions apart; for {site.op} use factor-rrr"
        if site.conv.is_pointwise:
            return "its kernel has one entry: use factor-rrr"
        return super().refusal(site)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Form | str:
        """Return random factors that ``numbers`` allow."""
        assert site.conv is not None, "refused before"
        return self.kernel_outline(site, site.conv.kernel_shape, numbers, rng)

    def _too_small(self, numbers: int, least: str) -> str:
        return f"{numbers} numbers do not hold {least}"


@dataclass(frozen=True)
class FactorSpatialSvd(ConvFactorPass):
    """Replace a convolution by one along the first axis of its kernel and one along the others.

    A kernel of 3x3 becomes 3x1 into r channels, then 1x3 (spatial SVD, Jaderberg et al. 2014), found for what the
    site reads and fitted by alternating least squares, which count how all entries of the input depend on one another.

    Changes: ``y = Conv(Conv(x, V), U)``; V steps, pads and dilates along the first axis, U along the others and has
    the bias. Standard operators only.
    Skips with the reason: everything but convolutions, kernels of one axis or one entry, sites whose bytes or
    measured time would not fall, weights shared by nodes, quantised, grouped or tiny ones, NaN or infinite weights or
    statistics, sites that calibration does not reach.

    Sample: ``factor-spatial-svd{param-ratio=0.6}``

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
            make up for, in [0, 1]; none means 1.
        bias: fit the bias of a site that has one together with its weight.
    """

    name: ClassVar[str] = "factor-spatial-svd"
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),)

    def kernel_outline(
        self, site: Site, kernel: tuple[int, ...], numbers: int, rng: np.random.Generator
    ) -> Spatial | str:
        """Return the widest that fits."""
        first, rest = kernel[0], math.prod(kernel[1:])
        if first == 1 or rest == 1:
            return "its kernel has entries along one axis only: use factor-rrr or factor-tucker"
        outputs, channels = site.shape[0], site.weight_shape[1]
        rank = min(numbers // (channels * first + outputs * rest), channels * first, outputs * rest)
        rank = rank // self.multiple * self.multiple
        if not rank:
            return self._too_small(numbers, f"{self.multiple} channels between two convolutions")
        assert site.conv is not None, "refused before"
        return Spatial(
            site.conv.strides,
            rng.standard_normal((outputs, rank, *kernel[1:])),
            rng.standard_normal((rank, channels, first)),
        )

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Spatial:
        """Return both convolutions."""
        assert isinstance(outline, Spatial), "made by outline"
        rank, _, first = outline.right.shape
        kernel = (first, *outline.left.shape[2:])
        return Spatial(outline.strides, *spatial_svd(problem.target, problem.gram, kernel, rank).factors)


@dataclass(frozen=True)
class FactorTucker(ConvFactorPass):
    """Replace a convolution by one with fewer channels in and out, and 1x1 convolutions around it.

    Tucker-2 (Kim et al. 2016) for what the site reads: the channels in are cut on the whitened weight, those out by
    reduced-rank regression, and both are fitted by alternating least squares. The ranks are those that lose least of
    the weight for the numbers allowed. A side that keeps all its channels gets no 1x1.

    Changes: ``y = Conv(Conv(Conv(x, U_in), core), U_out)``; the core has the geometry, the last one the bias. Standard
    operators only.
    Skips with the reason: everything but convolutions, kernels of one entry, sites whose bytes or measured time would
    not fall, weights shared by nodes, quantised, grouped or tiny ones, NaN or infinite weights or statistics, sites
    that calibration does not reach.

    Sample: ``factor-tucker{param-ratio=0.6}``

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
            make up for, in [0, 1]; none means 1.
        bias: fit the bias of a site that has one together with its weight.
    """

    name: ClassVar[str] = "factor-tucker"
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),)

    def kernel_outline(
        self, site: Site, kernel: tuple[int, ...], numbers: int, rng: np.random.Generator
    ) -> Tucker | str:
        """Return random factors of the ranks that lose least of the weight."""
        outputs, channels = site.shape[0], site.weight_shape[1]
        ranks = tucker_ranks(np.asarray(site.numpy(), np.float64), kernel, numbers, self.multiple)
        if ranks is None or ranks == (channels, outputs):
            return self._too_small(numbers, f"a core of {self.multiple} channels")
        inner, outer = ranks
        assert site.conv is not None, "refused before"
        return Tucker(
            site.conv.strides,
            rng.standard_normal((outer, inner, *kernel)),
            None if outer == outputs else rng.standard_normal((outputs, outer)),
            None if inner == channels else rng.standard_normal((inner, channels)),
        )

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Tucker:
        """Return core and bases."""
        assert isinstance(outline, Tucker), "made by outline"
        outer, inner, *kernel = outline.core.shape
        left, core, right = tucker(problem.target, problem.gram, kernel, (inner, outer)).factors
        return Tucker(
            outline.strides,
            core,
            None if outline.left is None else left,
            None if outline.right is None else right,
        )


@dataclass(frozen=True)
class FactorCp(ConvFactorPass):
    """Replace a convolution by 1x1, one kernel per channel, and 1x1: a sum of products of vectors.

    CP (Lebedev et al. 2015), with the kernel's entries as one axis: the products of one kernel per component hold
    hardly more numbers than one vector per axis, run as one operator, and express more. Found by alternating least
    squares for what the site reads, from several starts, with a ridge that keeps components from growing against one
    another.

    Changes: ``y = Conv(Conv(Conv(x, B), D), A)``; D is depthwise with the geometry of the site, A has the bias.
    Standard operators only.
    Skips with the reason: everything but convolutions, kernels of one entry, sites whose bytes or measured time would
    not fall, weights shared by nodes, quantised, grouped or tiny ones, NaN or infinite weights or statistics, sites
    that calibration does not reach.

    Sample: ``factor-cp{param-ratio=0.6}``

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
            make up for, in [0, 1]; none means 1.
        bias: fit the bias of a site that has one together with its weight.
        rounds: of alternating least squares at most, 1 or more: they gain slowly, but for long.
    """

    name: ClassVar[str] = "factor-cp"

    rounds: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(rounds=1)

    def kernel_outline(
        self, site: Site, kernel: tuple[int, ...], numbers: int, rng: np.random.Generator
    ) -> Canonical | str:
        """Return as many random components as fit."""
        outputs, channels, places = site.shape[0], site.weight_shape[1], math.prod(kernel)
        rank = numbers // (outputs + channels + places) // self.multiple * self.multiple
        if not rank:
            return self._too_small(numbers, f"{self.multiple} components")
        assert site.conv is not None, "refused before"
        return Canonical(
            site.conv.strides,
            rng.standard_normal((outputs, rank)),
            rng.standard_normal((rank, channels)),
            rng.standard_normal((rank, places)),
            kernel,
        )

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Canonical:
        """Return the components."""
        assert isinstance(outline, Canonical), "made by outline"
        rank, places = outline.kernels.shape
        found = canonical(problem.target, problem.gram, (places,), rank, rng, self.rounds)
        left, right, kernels = found.factors
        return Canonical(outline.strides, left, right, kernels, outline.kernel)


@dataclass(frozen=True)
class FactorSeparable(ConvFactorPass):
    """Replace a convolution by some depthwise kernels for each channel and a 1x1 convolution behind them.

    The best matrix of rank r for the kernels of each channel on its own inputs (depthwise separable convolution, Guo
    et al. 2018, with inputs counted), then alternating least squares over all channels together.

    Changes: ``y = Conv(Concat(Conv(x, D1) ... Conv(x, Dr)), P)``; each D is depthwise with the geometry of the site, P
    is 1x1 and has the bias. Standard operators only.
    Skips with the reason: everything but convolutions, kernels of one entry, sites whose bytes or measured time would
    not fall, weights shared by nodes, quantised, grouped or tiny ones, NaN or infinite weights or statistics, sites
    that calibration does not reach.

    Sample: ``factor-separable{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: the channels in front of the 1x1 are a multiple of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1.
        bias: fit the bias of a site that has one together with its weight.
    """

    name: ClassVar[str] = "factor-separable"

    def kernel_outline(
        self, site: Site, kernel: tuple[int, ...], numbers: int, rng: np.random.Generator
    ) -> Separable | str:
        """Return as many random kernels per channel as fit."""
        outputs, channels, places = site.shape[0], site.weight_shape[1], math.prod(kernel)
        step = self.multiple // math.gcd(self.multiple, channels)
        rank = min(numbers // (channels * (outputs + places)), outputs, places) // step * step
        if not rank:
            return self._too_small(numbers, f"{step} kernels per channel")
        assert site.conv is not None, "refused before"
        return Separable(
            site.conv.strides,
            rng.standard_normal((outputs, channels, rank)),
            rng.standard_normal((channels, rank, *kernel)),
        )

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Separable:
        """Return kernels and what mixes them."""
        assert isinstance(outline, Separable), "made by outline"
        _, rank, *kernel = outline.right.shape
        return Separable(outline.strides, *separable(problem.target, problem.gram, kernel, rank).factors)
