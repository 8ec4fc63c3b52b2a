"""Two thin products in the place of one: SVD, whitened SVD, reduced-rank regression."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass, FactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.hybrid.lowrank import Factors, affordable_rank, best_factors
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["FactorRrr", "FactorSvd", "LowRank", "LowRankPass", "random_factors"]


@dataclass(frozen=True)
class LowRank(Form):
    """``left @ right``.

    Attributes:
        left: ``[N, r]``.
        right: ``[r, K]``.
    """

    left: Matrix
    right: Matrix

    @classmethod
    def of(cls, factors: Factors) -> LowRank:
        """Return these factors, made of equal size, which is what narrow types want."""
        balanced = factors.balanced()
        return cls(balanced.left, balanced.right)

    def dense(self) -> Matrix:
        """Return the product."""
        return self.left.astype(np.float64) @ self.right.astype(np.float64)

    @property
    def macs(self) -> int:
        """Multiplications per row: those of both factors."""
        return self.numbers

    def describe(self) -> str:
        """The rank."""
        return f"rank {self.left.shape[1]}"

    def emit(self, chain: Chain) -> None:
        """Add two products; of a convolution the first has the kernel and the second is 1x1."""
        if chain.site.op == "Conv":
            kernel = chain.site.weight_shape[1:]
            inner = chain.conv(chain.source, self.right.reshape(-1, *kernel), "right", chain.geometry)
            chain.finish(chain.pointwise(inner, self.left, "left"))
        else:
            chain.finish(chain.matmul(chain.matmul(chain.source, self.right, "right"), self.left, "left"))


def random_factors(
    shape: tuple[int, int], numbers: int, multiple: int, rng: np.random.Generator
) -> LowRank | str:
    """Return random factors of the largest rank, a multiple of ``multiple``, that ``numbers`` allow, or why not."""
    rows, columns = shape
    rank = affordable_rank(rows, columns, numbers / (rows * columns), multiple)
    if not rank:
        return f"{numbers} numbers do not hold factors of rank {multiple} of {rows} x {columns} weights"
    return LowRank(rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns)))


@dataclass(frozen=True)
class LowRankPass(FactorPass):
    """Base of passes that find a weight of low rank."""

    @abstractmethod
    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the factors ``[N, r]``, ``[r, K]`` of the target."""

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> LowRank | str:
        """Return random factors of the largest rank that ``numbers`` allow."""
        return random_factors(site.shape, numbers, self.multiple, rng)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> LowRank:
        """Return the factors of the rank that ``outline`` has."""
        assert isinstance(outline, LowRank), "made by outline"
        return LowRank.of(self.factors(problem, len(outline.right)))


@dataclass(frozen=True)
class FactorSvd(LowRankPass):
    """Replace weights by two thin factors, a truncated SVD: the closest weights of that rank.

    Needs no calibration data and knows nothing of the inputs: ``factor-rrr`` loses much less.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights.

    Sample: ``factor-svd{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
    """

    name: ClassVar[str] = "factor-svd"

    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the truncated SVD (Eckart and Young 1936); ``gram`` is the identity."""
        return best_factors(problem.target, problem.gram, rank)


@dataclass(frozen=True)
class FactorRrr(LowRankPass, CalibratedFactorPass):
    """Replace weights by two thin factors with the outputs closest to those of the dense model.

    Reduced-rank regression (Izenman 1975) on what each site reads after the sites before it have changed. With
    ``sequential=false`` this is whitened SVD (SVD-LLM, Wang et al. 2024), or the principal components of the outputs
    (LLM-ROM), which is the same matrix: no weight of that rank has a smaller error on the calibration data.

    Changes: ``y = MatMul(MatMul(x, V), U)``; of a convolution, one with the kernel into r channels, then 1x1.
    Standard operators only; both products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-rrr{param-ratio=0.6}``

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
    """

    name: ClassVar[str] = "factor-rrr"

    def factors(self, problem: Quadratic, rank: int) -> Factors:
        """Return the factors with the smallest error on the outputs."""
        return best_factors(problem.target, problem.gram, rank)
