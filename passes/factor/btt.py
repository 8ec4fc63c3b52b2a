"""Blocks of low rank in the place of a weight: Monarch and block tensor-train."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.btt_fit import BlockFactors, fit
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.panels import Columns, block_products, refusal
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["BlockTensorTrain", "FactorBtt", "FactorMonarch"]

Grid = tuple[int, int]

#: Up to so many blocks, one MatMul each is faster than a batched one (docs/adr/0036-structured-matrices.md).
_FEW_BLOCKS = 16


@dataclass(frozen=True)
class BlockTensorTrain(Form):
    """A grid of ``k x r`` blocks, each a product of rank ``t``.

    Attributes:
        left: ``[k, r, p, t]``.
        right: ``[k, r, t, s]``.
        shape: ``(N, K)``; where the grid does not divide them, what goes beyond is zero and not stored.
    """

    left: NDArray[Any]
    right: NDArray[Any]
    shape: tuple[int, int]

    @property
    def grid(self) -> Grid:
        """``(k, r)``."""
        return self.left.shape[0], self.left.shape[1]

    @property
    def rank(self) -> int:
        """Of each block."""
        return int(self.left.shape[3])

    def dense(self) -> Matrix:
        """Return the weight."""
        rows, columns = self.shape
        whole = BlockFactors(self.left.astype(np.float64), self.right.astype(np.float64)).total()
        return whole[:rows, :columns]

    @property
    def numbers(self) -> int:
        """Values of both factors of all blocks."""
        return _numbers(self.shape, self.grid, self.rank)

    @property
    def macs(self) -> int:
        """Multiplications per row: every value once."""
        return self.numbers

    def describe(self) -> str:
        """Grid and rank."""
        down, across = self.grid
        return f"{down} x {across} blocks of rank {self.rank}"

    def emit(self, chain: Chain) -> None:
        """Add a product per panel of inputs and one per panel of outputs, or two batched ones if blocks are many."""
        if math.prod(self.grid) <= _FEW_BLOCKS or not _divides(self.grid, self.shape):
            self._emit_each(chain)
        else:
            self._emit_batched(chain)

    def _first(self) -> NDArray[Any]:
        """What panels of inputs are multiplied with, ``[r, k t, s]``."""
        down, across, rank, width = self.right.shape
        return self.right.transpose(1, 0, 2, 3).reshape(across, down * rank, width)

    def _second(self) -> NDArray[Any]:
        """What panels of outputs come of, ``[k, p, r t]``."""
        down, across, height, rank = self.left.shape
        return self.left.transpose(0, 2, 1, 3).reshape(down, height, across * rank)

    def _emit_each(self, chain: Chain) -> None:
        (rows, columns), (down, across) = self.shape, self.grid
        heights, widths = _sizes(rows, down), _sizes(columns, across)
        panels = [block[:, :width] for block, width in zip(self._first(), widths, strict=True)]
        inner = [
            chain.split(value, [self.rank] * down, f"inner.split{at}")
            for at, value in enumerate(block_products(chain, chain.source, panels, "right"))
        ]
        results = []
        for at, (block, height) in enumerate(zip(self._second(), heights, strict=True)):
            parts = [pieces[at] for pieces in inner]
            results.append(chain.matmul(chain.concat(parts, f"inner{at}"), block[:height], f"left{at}"))
        chain.finish(chain.concat(results, "joined"))

    def _emit_batched(self, chain: Chain) -> None:
        (rows, columns), (down, across) = self.shape, self.grid
        value = Columns(chain, chain.source)
        value.cut([across, columns // across], "panels")
        value.multiply(self._first(), "right")
        value.cut([across, down, self.rank], "inner.cut")
        value.swap("inner.turn", 1)
        value.cut([down, across * self.rank], "inner")
        value.multiply(self._second(), "left")
        value.cut([rows], "joined")
        value.finish()


@dataclass(frozen=True)
class GridPass(CalibratedFactorPass):
    """Base of passes that find a grid of blocks of low rank."""

    sweeps: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(sweeps=0)

    @abstractmethod
    def shapes(self, shape: tuple[int, int], numbers: int) -> tuple[Grid, int] | str:
        """Return grid and rank for a weight, or why there are none."""

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> BlockTensorTrain | str:
        """Return random factors of the blocks that ``numbers`` allow."""
        if reason := refusal(site):
            return reason
        found = self.shapes(site.shape, numbers)
        if isinstance(found, str):
            return found
        (down, across), rank = found
        height, width = (math.ceil(size / count) for size, count in zip(site.shape, found[0], strict=True))
        left, right = (down, across, height, rank), (down, across, rank, width)
        return BlockTensorTrain(rng.standard_normal(left), rng.standard_normal(right), site.shape)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> BlockTensorTrain:
        """Return the blocks with the shapes that ``outline`` has."""
        assert isinstance(outline, BlockTensorTrain), "made by outline"
        down, across, height, rank = outline.left.shape
        target, gram = _padded(problem, down * height, across * outline.right.shape[3])
        found = fit(target, gram, (down, across), rank, self.sweeps)[0].balanced()
        return replace(outline, left=found.left, right=found.right)


@dataclass(frozen=True)
class FactorBtt(GridPass):
    """Replace weights by grids of blocks of low rank, fitted to the outputs (block tensor-train).

    A grid of k x r blocks, each a product of one rank (BTT, Qiu et al. 2024, with the outputs of a block side by side).
    Every panel of inputs in turn gets the best factors beside the others, which is reduced-rank regression, then the
    left factors of a row of blocks are solved together; each step lowers the error. One row of panels, the default, is
    as fast as ``factor-rrr`` of the same size; four of them lose as little on square weights of transformers and a
    third less on those with many more inputs than outputs.

    Changes: Split, a MatMul per panel of inputs, Concat, a MatMul per row of blocks, Concat; grids of more than 16
    blocks become two batched MatMul between Reshape and Transpose, which compute no empty batch. Standard operators.
    Skips with the reason: convolutions, inputs of unknown rank or of one vector, weights too small for the grid, sites
    whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or tiny ones, NaN or
    infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-btt{param-ratio=0.6 across=8}``

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
        sweeps: over the panels, at most; 0 leaves each as if inputs of different panels did not correlate.
        down: rows of blocks.
        across: panels of inputs; 0 means 4, or 2 where there are more outputs than inputs.
    """

    name: ClassVar[str] = "factor-btt"

    down: int = 1
    across: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(down=1, across=0)

    def shapes(self, shape: tuple[int, int], numbers: int) -> tuple[Grid, int] | str:
        """Return the grid asked for and the largest rank that ``numbers`` allow."""
        rows, columns = shape
        grid = (self.down, self.across or (4 if rows <= columns else 2))
        fits = all(_sizes(size, count)[-1] > 0 for size, count in zip(shape, grid, strict=True))
        if not fits:
            return f"{rows} x {columns} weights do not fill a grid of {grid[0]} x {grid[1]} blocks"
        rank = numbers // _numbers(shape, grid, 1) // self.multiple * self.multiple
        rank = min(rank, math.ceil(rows / grid[0]), math.ceil(columns / grid[1]))
        if not rank:
            return f"{numbers} numbers do not hold {grid[0]} x {grid[1]} blocks of rank {self.multiple}"
        return grid, rank


@dataclass(frozen=True)
class FactorMonarch(GridPass):
    """Replace weights by Monarch matrices, fitted to the outputs: grids of blocks of rank 1.

    Monarch (Dao et al. 2022) is two block-diagonal matrices with a permutation between; the finest grid that
    ``param-ratio`` allows is taken. It starts as the projection that is exact for uncorrelated panels of inputs and is
    fitted as ``factor-btt`` does, which loses several times less. A form for transforms and for training: on trained
    weights ``factor-rrr`` of the same size loses less and is faster.

    Changes: two batched MatMul between Reshape and Transpose, which compute no empty batch; grids of up to 16 blocks
    become a MatMul per panel between Split and Concat. Standard operators only.
    Skips with the reason: convolutions, inputs of unknown rank or of one vector, sizes without divisors that make
    such a grid, sites whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or
    tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-monarch{param-ratio=0.3 keep-slower=true}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: no effect: ranks are 1.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        sweeps: over the panels, at most; 0 leaves each as if inputs of different panels did not correlate.
    """

    name: ClassVar[str] = "factor-monarch"

    sweeps: int = 4

    def shapes(self, shape: tuple[int, int], numbers: int) -> tuple[Grid, int] | str:
        """Return the grid of divisors with the most numbers allowed; of equal ones, that of the most equal sides."""
        rows, columns = shape
        grids = [(down, across) for down in _counts(rows) for across in _counts(columns)]
        allowed = [grid for grid in grids if _numbers(shape, grid, 1) <= numbers]
        if not allowed:
            return f"{numbers} numbers do not hold blocks of rank 1 of {rows} x {columns} weights"
        return max(allowed, key=lambda grid: (_numbers(shape, grid, 1), -abs(grid[0] - grid[1]))), 1


def _numbers(shape: tuple[int, int], grid: Grid, rank: int) -> int:
    """What both factors of all blocks of a weight hold."""
    return rank * (grid[1] * shape[0] + grid[0] * shape[1])


def _sizes(size: int, count: int) -> list[int]:
    """Cut ``size`` into ``count`` parts, all alike but for the last: smaller, or not above 0 if so many do not fit."""
    part = math.ceil(size / count)
    return [part] * (count - 1) + [size - part * (count - 1)]


def _divides(grid: Grid, shape: tuple[int, int]) -> bool:
    return all(size % count == 0 for size, count in zip(shape, grid, strict=True))


def _counts(size: int) -> list[int]:
    """In how many parts of two or more ``size`` can be cut evenly, and up to 4 with a smaller last one."""
    even = {count for count in range(1, size // 2 + 1) if size % count == 0}
    uneven = {count for count in (2, 3, 4) if _sizes(size, count)[-1] > 0}
    return sorted(even | uneven)


def _padded(problem: Quadratic, rows: int, columns: int) -> tuple[Matrix, Matrix]:
    """Return target and Gram matrix with outputs and inputs of 0 up to these sizes."""
    own_rows, own_columns = problem.target.shape
    if (rows, columns) == (own_rows, own_columns):
        return problem.target, problem.gram
    target = np.zeros((rows, columns))
    target[:own_rows, :own_columns] = problem.target
    gram = np.eye(columns) * np.trace(problem.gram) / own_columns
    gram[:own_columns, :own_columns] = problem.gram
    return target, gram
