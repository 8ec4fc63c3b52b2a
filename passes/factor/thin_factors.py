"""Two thin products in the place of one."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from sparsecc.ir import Site
from sparsecc.passes.factor.base import FactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.hybrid.lowrank import Factors, affordable_rank
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["LowRank", "LowRankPass", "random_factors"]


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
