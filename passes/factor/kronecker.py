"""Sums of Kronecker products in the place of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.kronecker_fit import KroneckerSum, fit
from sparsecc.passes.factor.panels import refusal
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["FactorKronecker", "Kronecker"]

#: Unknowns that least squares may have at once for a row of one factor.
_UNKNOWNS = 2048


@dataclass(frozen=True)
class Kronecker(Form):
    """``sum_t left_t (x) right_t``.

    Attributes:
        left: ``[t, n1, k1]``.
        right: ``[t, n2, k2]``.
    """

    left: NDArray[Any]
    right: NDArray[Any]

    def dense(self) -> Matrix:
        """Return the sum."""
        return KroneckerSum(self.left.astype(np.float64), self.right.astype(np.float64)).total()

    @property
    def macs(self) -> int:
        """Multiplications per row: k1 products with all right factors, then n2 with all left ones."""
        return int(self.left.shape[2] * self.right.size + self.right.shape[1] * self.left.size)

    def describe(self) -> str:
        """Terms and sizes."""
        (terms, n1, k1), (_, n2, k2) = self.left.shape, self.right.shape
        return f"{terms} Kronecker products of {n1} x {k1} and {n2} x {k2}"

    def emit(self, chain: Chain) -> None:
        """Add two products with Reshape around them; nothing is transposed."""
        (terms, n1, k1), (_, n2, k2) = self.left.shape, self.right.shape
        panels = chain.reshape(chain.source, [k1, k2], "panels")
        inner = chain.matmul(panels, self.right.reshape(terms * n2, k2), "right")
        inner = chain.reshape(inner, [k1 * terms, n2], "inner")
        left = chain.constant(self.left.transpose(1, 2, 0).reshape(n1, k1 * terms), "left.weight")
        chain.finish(chain.reshape(chain.node("MatMul", [left, inner], "left"), [n1 * n2], "joined"))


@dataclass(frozen=True)
class FactorKronecker(CalibratedFactorPass):
    """Replace weights by sums of Kronecker products, fitted to the outputs.

    The nearest sum (Van Loan and Pitsianis 1993) is where left and right factors start; least squares with all second
    moments of the inputs improves them in turns. Factors of about equal size take many times the multiplications of
    the weight; among sizes that take fewer, those with the most terms are taken. A form for few numbers: on trained
    layers ``factor-rrr`` of the same size loses less.

    Changes: two MatMul with Reshape around them, nothing is transposed; onnxruntime computes no empty batch of them.
    Standard operators only.
    Skips with the reason: convolutions, inputs of unknown rank or of one vector, sizes without suitable divisors,
    sites whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or tiny ones, NaN
    or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-kronecker{param-ratio=0.3 keep-slower=true}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: no effect: it is the number of terms that the budget decides.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        sweeps: over both sides, at most; 0 leaves the nearest sum, which knows nothing of the inputs.
    """

    name: ClassVar[str] = "factor-kronecker"

    sweeps: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(sweeps=0)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Kronecker | str:
        """Return random factors: of the sizes allowed those with the most terms, then the fewest multiplications."""
        if reason := refusal(site):
            return reason
        rows, columns = site.shape
        most = None if self.keep_slower else rows * columns
        best: tuple[int, int, int, int] | None = None
        for n1 in _divisors(rows):
            for k1 in _divisors(columns):
                terms = _terms((rows, columns), (n1, k1), numbers)
                macs = terms * rows // n1 * (columns + n1 * k1)
                if terms and (most is None or macs < most):
                    best = max(best or (0, 0, 0, 0), (terms, -macs, n1, k1))
        if best is None:
            return f"{numbers} numbers do not hold a sum of Kronecker products of {rows} x {columns} weights"
        terms, _, n1, k1 = best
        left, right = (terms, n1, k1), (terms, rows // n1, columns // k1)
        return Kronecker(rng.standard_normal(left), rng.standard_normal(right))

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Kronecker:
        """Return the factors with the shapes that ``outline`` has."""
        assert isinstance(outline, Kronecker), "made by outline"
        terms, n1, k1 = outline.left.shape
        found = fit(problem.target, problem.gram, (n1, k1), terms, self.sweeps)[0].balanced()
        return Kronecker(found.left, found.right)


def _divisors(size: int) -> list[int]:
    return [count for count in range(1, size + 1) if size % count == 0]


def _terms(shape: tuple[int, int], outer: tuple[int, int], numbers: int) -> int:
    """Return how many products of these sizes are allowed and can be fitted; 0 where a factor is one number."""
    (rows, columns), (n1, k1) = shape, outer
    left, right = n1 * k1, rows // n1 * (columns // k1)
    if min(left, right) < 2:
        return 0
    return min(numbers // (left + right), left, right, _UNKNOWNS // max(k1, columns // k1))
