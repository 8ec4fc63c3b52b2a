"""Some columns of a weight, a small link and some of its rows in the place of it: CUR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass, Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.cur_fit import Link, affordable_link_rank, link
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.skeleton_selection import Selection, pick_columns, pick_rows, scaled
from sparsecc.passes.factor.thin_factors import LowRank
from sparsecc.passes.hybrid.lowrank import affordable_rank
from sparsecc.passes.prune.gram import Matrix, Quadratic
from sparsecc.pm import PassContext

__all__ = ["Cur", "FactorCur", "MergedCur"]


@dataclass(frozen=True)
class Cur(Form):
    """``left @ link @ right``.

    Attributes:
        left: C, columns of the weight, ``[N, r]``.
        link: U, ``[r, r]``.
        right: R, rows of the weight, ``[r, K]``.
    """

    left: Matrix
    link: Matrix
    right: Matrix

    def dense(self) -> Matrix:
        """Return the product."""
        left, middle, right = (item.astype(np.float64) for item in (self.left, self.link, self.right))
        return np.asarray(left @ middle @ right)

    @property
    def macs(self) -> int:
        """Multiplications per row: those of all three."""
        return self.numbers

    def describe(self) -> str:
        """How many rows and columns."""
        return f"{len(self.link)} own rows and columns"

    def emit(self, chain: Chain) -> None:
        """Add three products; of a convolution the first has the kernel and the others are 1x1."""
        if chain.site.op == "Conv":
            kernel = chain.site.weight_shape[1:]
            inner = chain.conv(chain.source, self.right.reshape(-1, *kernel), "rows", chain.geometry)
            inner = chain.pointwise(inner, self.link, "link")
            chain.finish(chain.pointwise(inner, self.left, "columns"))
        else:
            inner = chain.matmul(chain.matmul(chain.source, self.right, "rows"), self.link, "link")
            chain.finish(chain.matmul(inner, self.left, "columns"))


@dataclass(frozen=True)
class MergedCur(LowRank):
    """``(C U) @ R``: the rows on the right are the weight's own."""

    def describe(self) -> str:
        """How many rows."""
        return f"{len(self.right)} own rows"


@dataclass(frozen=True)
class _OfWeight(Quadratic):
    """A problem with the weight ``[N, K]`` that rows and columns are taken from, and the rounding of its type."""

    weight: Matrix
    precision: float


@dataclass(frozen=True)
class FactorCur(CalibratedFactorPass):
    """Replace weights by some of their own columns, a small link and some of their own rows.

    CUR as in CURing (Park and Moon 2025), with the link that suits the outputs. At the same number of parameters the
    error is several times that of ``factor-rrr``, by which no matrix of that rank is beaten; CUR is for where
    rows and columns of the weight itself shall stay: to be read, or because they keep a property of the weight.

    Changes: ``y = MatMul(MatMul(MatMul(x, R), U), C)``; of a convolution, one with the kernel into r channels, then
    two of 1x1. Standard operators only; the products are sites of their own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-cur{param-ratio=0.6 merge=true}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: numbers of rows and columns are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that the link
            makes up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        selection: ``deim``: rows and columns where the singular vectors of the weight behind its inputs are
            interpolated best; ``leverage``: those with the largest share in the leading outputs.
        absolute: ``deim`` looks at the weight without its signs, as CURing has it.
        link: ``output``: the link with the smallest error on the outputs; ``frobenius``: on the weight.
        merge: put the link into the columns: two products, with more rows and columns in the same numbers.
    """

    name: ClassVar[str] = "factor-cur"

    selection: Selection = "deim"
    absolute: bool = False
    link: Link = "output"
    merge: bool = False

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Cur | MergedCur | str:
        """Return random factors of the largest rank that ``numbers`` allow."""
        rows, columns = site.shape
        if self.merge:
            rank = affordable_rank(rows, columns, numbers / (rows * columns), self.multiple)
        else:
            rank = affordable_link_rank(rows, columns, numbers, self.multiple)
        if not rank:
            return f"{numbers} numbers do not hold {self.multiple} rows and columns of {rows} x {columns} weights"
        left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
        return MergedCur(left, right) if self.merge else Cur(left, rng.standard_normal((rank, rank)), right)

    def fitted(self, task: Task, problem: Quadratic, ctx: PassContext) -> Fitted | str:
        """Fit one site, or say why not."""
        weight = np.asarray(task.site.numpy(), np.float64)
        precision = float(ml_dtypes.finfo(task.site.dtype).eps)  # type: ignore[no-untyped-call]
        return super().fitted(task, _OfWeight(**vars(problem), weight=weight, precision=precision), ctx)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Cur | MergedCur:
        """Pick as many rows and columns as ``outline`` has, then link them."""
        assert isinstance(outline, Cur | MergedCur), "made by outline"
        assert isinstance(problem, _OfWeight), "made by fitted"
        count, weight, energy = len(outline.right), problem.weight, problem.energy
        root = np.asarray(np.linalg.cholesky(problem.gram), np.float64)
        seen = (
            weight @ root if self.selection == "leverage" else scaled(weight, energy, absolute=self.absolute)
        )
        right = weight[pick_rows(seen, count, self.selection)]
        left = weight[:, pick_columns(weight, seen, energy, count, self.selection)]
        middle = link(problem.target, left, right, root if self.link == "output" else None, problem.precision)
        return MergedCur(left @ middle, right) if self.merge else Cur(left, middle, right)
