"""Products of sparse factors in the place of one product (FAuST): fast transforms in the weights of a graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.factor.base import FactorPass, Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.palm import product, sparse_factors
from sparsecc.passes.factor.tensor_train_fit import near_factors
from sparsecc.passes.prune.gram import Matrix, Quadratic
from sparsecc.pm import PassContext, Range

__all__ = ["FactorFaust", "SparseProduct"]

#: Bytes that say where a value of a sparse factor is.
_INDEX_BYTES = 1

#: Most factors that are looked for.
_MOST = 12

#: Largest side of a weight: every step of a fit takes several products of matrices of that size.
_LARGEST = 2048


@dataclass(frozen=True)
class SparseProduct(Form):
    """A product of square sparse matrices.

    Attributes:
        factors: ``[n, n]`` each with zeros, the one that meets the inputs last.
        radices: entries per row of each, in blocks.
        block: sides of the blocks.
    """

    factors: tuple[NDArray[Any], ...]
    radices: tuple[int, ...]
    block: int

    def dense(self) -> Matrix:
        """Return the product."""
        return np.asarray(product([factor.astype(np.float64) for factor in self.factors]), np.float64)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The factors."""
        return {f"factor{at}": factor for at, factor in enumerate(self.factors, 1)}

    def astype(self, dtype: np.dtype[Any]) -> Self:
        """Return it with its factors rounded to ``dtype``."""
        return replace(self, factors=tuple(factor.astype(dtype) for factor in self.factors))

    @property
    def numbers(self) -> int:
        """Entries of the factors that are not zero."""
        return sum(int(np.count_nonzero(factor)) for factor in self.factors)

    @property
    def macs(self) -> int:
        """Multiplications per row: one for each entry."""
        return self.numbers

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Return the bytes of the entries and their places; standard operators store the zeros too."""
        if custom_ops:
            return self.numbers * (itemsize + _INDEX_BYTES)
        return sum(factor.size for factor in self.factors) * itemsize

    def describe(self) -> str:
        """Entries per row of each factor."""
        return (
            f"{len(self.factors)} sparse factors with "
            + ", ".join(str(radix * self.block) for radix in self.radices)
            + " entries per row"
        )

    def emit(self, chain: Chain) -> None:
        """Add one product for each factor, the last factor first."""
        value = chain.source
        for at, factor in enumerate(reversed(self.factors)):
            value = chain.matmul(value, factor, f"factor{at}")
        chain.finish(value)


@dataclass(frozen=True)
class FactorFaust(FactorPass):
    """Replace weights that are fast transforms by products of sparse factors, which give the same outputs.

    Hadamard and Fourier matrices (rows or columns scaled, real or as real 2 x 2 blocks) of any size with small
    factors are found by palm4MSA, one factor after another (Le Magoarou and Gribonval 2016). Trained weights are no
    such products: what comes out further from the weight than ``max-error`` is refused. Inputs in their own order and
    with reversed digits are tried, other orders are not.

    Changes: one MatMul per factor, with zeros, for ``choose-layout`` and ``lower-sparse``.
    Skips with the reason: convolutions, weights that are not square, sizes without fitting factors, larger sides than
    2048, weights further from the product than ``max-error``, sites whose bytes or measured time would not fall,
    weights shared by nodes, quantised, recurrent or tiny ones, NaN or infinite weights.

    Sample: ``factor-faust{fan-in=8 max-error=0.0001}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: entries per row of each factor are multiples of it; 1 by default.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        fan_in: most entries in a row of a factor; there are as few factors as that allows.
        factors: how many, instead, of nearly equal fan-in.
        block: 2 where the weight has complex numbers as blocks of 2 x 2 real ones; else 1.
        max_error: distance of the product from the weight that is accepted, relative to the weight.
        custom_ops: sparse operators may be used; without them the zeros of the factors are stored and multiplied.
    """

    name: ClassVar[str] = "factor-faust"
    search: ClassVar[tuple[Range, ...]] = ()

    multiple: int = 1
    fan_in: int = 16
    factors: int | None = None
    block: int = 1
    max_error: float = 1e-3
    custom_ops: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(fan_in=2, factors=2)
        if self.block not in (1, 2):
            raise SpecError(f"{self.name}: block must be 1 or 2, got {self.block}")
        if not self.max_error >= 0:
            raise SpecError(f"{self.name}: max-error must be 0 or more, got {self.max_error:g}")

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> SparseProduct | str:
        """Return factors with as many entries as the pass may find, in places of their own."""
        rows, columns = site.shape
        if site.op == "Conv":
            return "it is a convolution: sparse factors are for products"
        if rows != columns:
            return f"it is {rows} x {columns}: only square transforms are looked for"
        if rows > _LARGEST:
            return f"it has more than {_LARGEST} inputs: finding its factors would take too long"
        radices = self._radices(rows)
        if radices is None:
            return f"{rows} is no product of what its factors may have in a row"
        found = SparseProduct(tuple(_spread(radices, self.block, rng)), radices, self.block)
        if found.numbers > numbers:
            return f"{found.describe()} hold {found.numbers} numbers, {numbers} are allowed"
        return found

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> SparseProduct:
        """Return factors with as many entries per row as those of ``outline``."""
        assert isinstance(outline, SparseProduct), "made by outline"
        factors, _ = sparse_factors(problem.target, outline.radices, block=outline.block)
        return replace(outline, factors=tuple(factors))

    def fitted(self, task: Task, problem: Quadratic, ctx: PassContext) -> Fitted | str:
        """Fit one site, or say why not: its weight is no such product."""
        found = super().fitted(task, problem, ctx)
        if isinstance(found, str):
            return found
        whole = float(np.linalg.norm(problem.target)) or 1.0
        error = float(np.linalg.norm(found.total - problem.target)) / whole
        if error > self.max_error:
            return (
                f"its weight is {error:.2g} away from {found.form.describe()} (max-error={self.max_error:g})"
            )
        return found

    def _radices(self, size: int) -> tuple[int, ...] | None:
        """Return how many blocks a row of each factor has, for a weight of this side."""
        if size % self.block:
            return None
        counts = range(2, _MOST + 1) if self.factors is None else [self.factors]
        most = size if self.factors is not None else self.fan_in // self.block
        for count in counts:
            radices = near_factors(size // self.block, count)
            if radices is not None and max(radices) <= most:
                fits = all(radix * self.block % self.multiple == 0 for radix in radices)
                return radices if fits else None
        return None


def _spread(radices: Sequence[int], block: int, rng: np.random.Generator) -> Iterator[Matrix]:
    """Yield random factors with as many blocks per row, evenly spread."""
    size = math.prod(radices)
    for at, radix in enumerate(radices):
        behind = math.prod(radices[at + 1 :])
        places = np.kron(np.kron(np.eye(size // (radix * behind)), np.ones((radix, radix))), np.eye(behind))
        places = np.kron(places, np.ones((block, block)))
        yield places * rng.standard_normal(places.shape)
