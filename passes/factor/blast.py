"""Blocks with shared bases in the place of a weight: BLAST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.blast_fit import SharedBlocks, fit
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.panels import Columns, refusal
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["Blast", "FactorBlast"]


@dataclass(frozen=True)
class Blast(Form):
    """A grid of ``k x r`` blocks ``left_i diag(mix_ij) right_j``.

    Attributes:
        left: ``[k, p, t]``.
        mix: ``[k, r, t]``.
        right: ``[r, t, s]``.
    """

    left: NDArray[Any]
    mix: NDArray[Any]
    right: NDArray[Any]

    def dense(self) -> Matrix:
        """Return the weight."""
        return SharedBlocks(*(part.astype(np.float64) for part in (self.left, self.mix, self.right))).total()

    @property
    def macs(self) -> int:
        """Multiplications per row: every value once."""
        return self.numbers

    def describe(self) -> str:
        """Grid and rank."""
        down, across, rank = self.mix.shape
        return f"{down} x {across} blocks of shared rank {rank}"

    def emit(self, chain: Chain) -> None:
        """Add a batched product for each of the three parts, rows of x last."""
        down, across = self.mix.shape[:2]
        value = Columns(chain, chain.source)
        value.cut([across, self.right.shape[2]], "panels")
        value.multiply(self.right, "right")
        value.swap("inner.turn", 0)
        value.multiply(self.mix.transpose(2, 0, 1), "mix")
        value.swap("mixed.turn", 0)
        value.multiply(self.left, "left")
        value.cut([down * self.left.shape[1]], "joined")
        value.finish()


@dataclass(frozen=True)
class FactorBlast(CalibratedFactorPass):
    """Replace weights by blocks that share their bases and differ by a diagonal, fitted to the outputs.

    BLAST (Lee et al. 2024): block (i, j) is ``U_i diag(s_ij) V_j``, which holds as many numbers as low rank and a few
    for the diagonals, and is more general. It starts as the best weight of its rank and is fitted by exact steps with
    all second moments of the inputs instead of gradients. On trained layers 8 x 8 blocks lose a fifth to a third less
    than ``factor-rrr`` of the same size, but what mixes their diagonals eats the time that they save: a form for size.

    Changes: three batched MatMul with Reshape and Transpose between, which compute no empty batch; standard operators.
    Skips with the reason: convolutions, inputs of unknown rank or of one vector, sizes that are no multiples of
    ``blocks``, sites whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or
    tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-blast{param-ratio=0.6 blocks=8}``

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
        blocks: into how many parts outputs and inputs are cut.
        sweeps: over all parts, at most; 0 leaves low rank.
    """

    name: ClassVar[str] = "factor-blast"

    blocks: int = 4
    sweeps: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(blocks=1, sweeps=0)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Blast | str:
        """Return random parts of the largest rank that ``numbers`` allow."""
        if reason := refusal(site):
            return reason
        (rows, columns), count = site.shape, self.blocks
        if rows % count or columns % count:
            return f"{rows} x {columns} weights cannot be cut into {count} x {count} blocks"
        rank = min(numbers // (rows + columns + count**2), rows, columns) // self.multiple * self.multiple
        if not rank:
            return (
                f"{numbers} numbers do not hold {count} x {count} blocks of shared rank {self.multiple} of "
                f"{rows} x {columns} weights"
            )
        shapes = (count, rows // count, rank), (count, count, rank), (count, rank, columns // count)
        return Blast(*(rng.standard_normal(shape) for shape in shapes))

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Blast:
        """Return the blocks with the shapes that ``outline`` has."""
        assert isinstance(outline, Blast), "made by outline"
        down, across, rank = outline.mix.shape
        found = fit(problem.target, problem.gram, (down, across), rank, self.sweeps)[0].balanced()
        return Blast(found.left, found.mix, found.right)
