"""A block-diagonal product beside two thin ones in the place of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.blockdiag_fit import fit, spread
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.panels import block_products, refusal
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["BlockDiagonalLowRank", "FactorBlockdiagLowrank"]


@dataclass(frozen=True)
class BlockDiagonalLowRank(Form):
    """Blocks on the diagonal plus ``left @ right``.

    Attributes:
        blocks: ``[b, p, s]``.
        left: ``[N, t]``.
        right: ``[t, K]``.
    """

    blocks: NDArray[Any]
    left: NDArray[Any]
    right: NDArray[Any]

    def dense(self) -> Matrix:
        """Return the sum."""
        blocks, left, right = (part.astype(np.float64) for part in (self.blocks, self.left, self.right))
        return np.asarray(spread(blocks) + left @ right)

    @property
    def macs(self) -> int:
        """Multiplications per row: every value once."""
        return self.numbers

    def describe(self) -> str:
        """Blocks and rank."""
        return f"{len(self.blocks)} blocks on the diagonal and rank {self.left.shape[1]}"

    def emit(self, chain: Chain) -> None:
        """Add a product per block, the two thin ones, and the sum."""
        diagonal = chain.concat(block_products(chain, chain.source, list(self.blocks), "block"), "blocks")
        thin = chain.matmul(chain.matmul(chain.source, self.right, "right"), self.left, "left")
        chain.finish(chain.node("Add", [diagonal, thin], "sum"))


@dataclass(frozen=True)
class FactorBlockdiagLowrank(CalibratedFactorPass):
    """Replace weights by a block-diagonal matrix plus one of low rank, fitted to the outputs.

    Both parts are solved exactly in turns: the blocks by least squares on their inputs, the factors by a whitened SVD
    of what the blocks leave. The error starts at that of low rank without blocks and only falls; on trained layers
    with no more outputs than inputs it ends a few percent below that of ``factor-rrr`` of the same size.

    Changes: Split, a MatMul per block, Concat; two thin MatMul beside them; Add. Standard operators only.
    Skips with the reason: convolutions, inputs of unknown rank or of one vector, sizes that are no multiples of
    ``blocks``, sites whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or
    tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-blockdiag-lowrank{param-ratio=0.6 blocks=16}``

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
        blocks: how many; they hold a share of 1 / blocks of the weight.
        sweeps: over both parts, at most.
    """

    name: ClassVar[str] = "factor-blockdiag-lowrank"

    blocks: int = 8
    sweeps: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(blocks=2, sweeps=1)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> BlockDiagonalLowRank | str:
        """Return random blocks, and factors of the largest rank that the rest of ``numbers`` allows."""
        if reason := refusal(site):
            return reason
        (rows, columns), count = site.shape, self.blocks
        if rows % count or columns % count:
            return f"{rows} x {columns} weights cannot be cut into {count} blocks on the diagonal"
        rest = numbers - rows * columns // count
        rank = min(rest // (rows + columns), rows, columns) // self.multiple * self.multiple
        if rank < 1:
            return (
                f"{numbers} numbers do not hold {count} blocks and factors of rank {self.multiple} of "
                f"{rows} x {columns} weights"
            )
        shapes = (count, rows // count, columns // count), (rows, rank), (rank, columns)
        return BlockDiagonalLowRank(*(rng.standard_normal(shape) for shape in shapes))

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> BlockDiagonalLowRank:
        """Return both parts with the shapes that ``outline`` has."""
        assert isinstance(outline, BlockDiagonalLowRank), "made by outline"
        count, rank = len(outline.blocks), outline.left.shape[1]
        found, _ = fit(problem.target, problem.gram, count, rank, self.sweeps)
        factors = found.factors.balanced()
        return BlockDiagonalLowRank(found.blocks, factors.left, factors.right)
