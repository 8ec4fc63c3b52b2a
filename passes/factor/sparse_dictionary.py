"""A dense product with dictionary atoms, then a sparse one: COMPOT, CoSpaDi, ROCKET."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.dictionary import (
    Coding,
    Support,
    compot,
    fit_atoms,
    principal_samples,
    refit,
    rocket,
)
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.pursuit import cospadi
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.prune.gram import Matrix, Quadratic
from sparsecc.pm import Range
from sparsecc.sparse import Pattern, SparseTensor

__all__ = ["DictionaryPass", "FactorCompot", "FactorCospadi", "FactorRocket", "SparseDictionary"]


@dataclass(frozen=True)
class SparseDictionary(Form):
    """``codes @ atoms`` with as many codes in every row.

    Attributes:
        codes: ``[N, k]``, exactly zero outside its support.
        atoms: ``[k, K]``.
        support: of the codes.
    """

    codes: Matrix
    atoms: Matrix
    support: Support

    def dense(self) -> Matrix:
        """Return the product."""
        return self.codes.astype(np.float64) @ self.atoms.astype(np.float64)

    @property
    def numbers(self) -> int:
        """Atoms, and codes that are not zero."""
        return self.atoms.size + int(np.count_nonzero(self.codes))

    @property
    def macs(self) -> int:
        """Multiplications per row, those with zeros left out."""
        return self.numbers

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Bytes of atoms and codes; sparse operators store codes with their places, without them all zeros stay."""
        dense = (self.atoms.size + self.codes.size) * itemsize
        if not custom_ops:
            return dense
        packed = SparseTensor.encode(self.codes, self.support.pattern)
        return min(dense, self.atoms.size * itemsize + packed.nbytes)

    def describe(self) -> str:
        """Number of atoms, of codes per output, and their pattern."""
        return f"{len(self.atoms)} atoms, {self.support.kept} {self.support.pattern} per output"

    def emit(self, chain: Chain) -> None:
        """Add two products; of a convolution the atoms have the kernel and the codes are 1x1."""
        if chain.site.op == "Conv":
            kernel = chain.site.weight_shape[1:]
            inner = chain.conv(chain.source, self.atoms.reshape(-1, *kernel), "atoms", chain.geometry)
            chain.finish(chain.pointwise(inner, self.codes, "codes"))
        else:
            chain.finish(chain.matmul(chain.matmul(chain.source, self.atoms, "atoms"), self.codes, "codes"))


@dataclass(frozen=True)
class DictionaryPass(CalibratedFactorPass):
    """Base of passes that write the rows of a weight as sparse combinations of common atoms."""

    pattern: Pattern = Pattern("block", rows=4, cols=1)  # noqa: RUF009  a frozen value, safe to share
    ratio: float = 2.0
    rounds: int = 8
    custom_ops: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind == "dense" or self.pattern.cols > 1:
            raise SpecError(
                f"{self.name}: pattern must be unstructured, N:M or Rx1, got {self.pattern}; without zeros it is "
                "low rank: factor-rrr"
            )
        if not self.ratio > 1:
            raise SpecError(f"{self.name}: ratio must be above 1, got {self.ratio:g}")
        self.require_at_least(rounds=0)

    @abstractmethod
    def code(self, samples: Matrix, weight: Matrix, atoms: int, support: Support) -> Coding:
        """Return the first coding of ``samples [N, d]``, which stand for ``weight [N, K]``."""

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> SparseDictionary | str:
        """Return random atoms and codes, as many as ``numbers`` allow."""
        rows, columns = site.shape
        atoms, kept = self._sizes(rows, columns, numbers)
        if not atoms or not kept:
            return f"{numbers} numbers do not hold a dictionary of {self.multiple} atoms for {rows} x {columns} weights"
        if kept == atoms:
            return f"{numbers} numbers hold every code of {atoms} atoms: that is low rank, use factor-rrr"
        support = Support(self.pattern, kept)
        codes = rng.standard_normal((rows, atoms))
        codes[~support.mask(np.square(codes))] = 0
        return SparseDictionary(codes, rng.standard_normal((atoms, columns)), support)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> SparseDictionary:
        """Return a dictionary of the sizes of ``outline``."""
        assert isinstance(outline, SparseDictionary), "made by outline"
        samples = principal_samples(problem.target, problem.gram)
        found = self.code(samples, problem.target, len(outline.atoms), outline.support)
        codes = refit(samples, found, self.rounds).codes
        balanced = Factors(codes, fit_atoms(codes, problem.target)).balanced()
        return SparseDictionary(balanced.left, balanced.right, outline.support)

    def _sizes(self, rows: int, columns: int, numbers: int) -> tuple[int, int]:
        """Atoms and codes per row: about ``ratio`` atoms for each code, all within ``numbers``."""
        pattern = self.pattern
        share = pattern.n / pattern.m if pattern.kind == "nm" else 1 / self.ratio
        most = min(rows, columns, int(numbers / (columns + rows * share)))
        for atoms in range(most // self.multiple * self.multiple, 0, -self.multiple):
            kept = min(atoms, (numbers - columns * atoms) // rows)
            if pattern.kind != "nm":
                return atoms, kept
            implied = atoms // pattern.m * pattern.n + min(pattern.n, atoms % pattern.m)
            if implied <= kept:
                return atoms, implied
        return 0, 0


@dataclass(frozen=True)
class FactorCompot(DictionaryPass):
    """Replace weights by an orthonormal dictionary of their outputs and sparse codes, then fit both.

    COMPOT: with orthonormal atoms the best sparse codes are the largest ones, and the best atoms for codes are a
    Procrustes problem; both in turns, in the space where distances are those of the outputs. Then atoms, free now,
    and codes are fitted by least squares in turns. The best of the dictionaries here, and fast.

    Changes: ``y = MatMul(MatMul(x, atoms), codes)``; of a convolution, one with the kernel into the atoms, then 1x1.
    The codes have as many zeros in each output and are a site that ``choose-layout`` and ``lower-sparse`` take;
    every node is a standard operator.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-compot{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that atoms and codes may hold, in (0, 1].
        multiple: numbers of atoms are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        pattern: of the codes: ``Rx1`` (R outputs use the same atoms; 4x1 is fast from 16 rows of x on, 16x1 for one),
            ``N:M`` (N of every M atoms) or ``unstructured`` (smallest error, slowest).
        ratio: atoms for each code of an output, above 1; not for N:M, which has its own.
        rounds: most turns of least squares at the end.
        custom_ops: sparse operators may stand for the codes; without them all their zeros take room and time.
        iterations: most turns of coding and Procrustes.
    """

    name: ClassVar[str] = "factor-compot"

    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(iterations=0)

    def code(self, samples: Matrix, weight: Matrix, atoms: int, support: Support) -> Coding:
        """Return codes of orthonormal atoms."""
        return compot(samples, atoms, support, self.iterations)


@dataclass(frozen=True)
class FactorCospadi(DictionaryPass):
    """Replace weights by a dictionary of their outputs and sparse codes, learned by K-SVD.

    CoSpaDi (Shopkhoev et al. 2025): orthogonal matching pursuit and K-SVD in turns, in the space where distances are
    those of the outputs; atoms are added several at a time, for all outputs at once. Then atoms and codes are fitted
    by least squares in turns. Several times as slow as ``factor-compot`` for about the same error.

    Changes: ``y = MatMul(MatMul(x, atoms), codes)``; of a convolution, one with the kernel into the atoms, then 1x1.
    The codes have as many zeros in each output and are a site that ``choose-layout`` and ``lower-sparse`` take;
    every node is a standard operator.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-cospadi{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that atoms and codes may hold, in (0, 1].
        multiple: numbers of atoms are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        pattern: of the codes: ``Rx1`` (R outputs use the same atoms; 4x1 is fast from 16 rows of x on, 16x1 for one),
            ``N:M`` (N of every M atoms) or ``unstructured`` (smallest error, slowest).
        ratio: atoms for each code of an output, above 1; not for N:M, which has its own.
        rounds: most turns of least squares at the end.
        custom_ops: sparse operators may stand for the codes; without them all their zeros take room and time.
        iterations: most turns of pursuit and K-SVD.
        stages: in how many a pursuit adds its atoms; as many as there are codes per output is the plain pursuit.
    """

    name: ClassVar[str] = "factor-cospadi"
    search: ClassVar[tuple[Range, ...]] = ()

    iterations: int = 10
    stages: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(iterations=0, stages=1)

    def code(self, samples: Matrix, weight: Matrix, atoms: int, support: Support) -> Coding:
        """Return codes of atoms by K-SVD."""
        return cospadi(samples, atoms, support, self.iterations, self.stages)


@dataclass(frozen=True)
class FactorRocket(DictionaryPass):
    """Replace weights by principal atoms of their outputs and sparse codes found in one step, then fit both.

    ROCKET's single shot: codes of the first principal axes stay by what they add to outputs and to the weight. Its
    training afterwards is replaced by least squares of atoms and codes in turns, which never raises the error, and
    the codes that it admits again are left out, so that every output has as many. The fastest of the dictionaries.

    Changes: ``y = MatMul(MatMul(x, atoms), codes)``; of a convolution, one with the kernel into the atoms, then 1x1.
    The codes have as many zeros in each output and are a site that ``choose-layout`` and ``lower-sparse`` take;
    every node is a standard operator.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-rocket{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that atoms and codes may hold, in (0, 1].
        multiple: numbers of atoms are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        pattern: of the codes: ``Rx1`` (R outputs use the same atoms; 4x1 is fast from 16 rows of x on, 16x1 for one),
            ``N:M`` (N of every M atoms) or ``unstructured`` (smallest error, slowest).
        ratio: atoms for each code of an output, above 1; not for N:M, which has its own.
        rounds: most turns of least squares at the end.
        custom_ops: sparse operators may stand for the codes; without them all their zeros take room and time.
    """

    name: ClassVar[str] = "factor-rocket"
    search: ClassVar[tuple[Range, ...]] = ()

    def code(self, samples: Matrix, weight: Matrix, atoms: int, support: Support) -> Coding:
        """Return the codes of principal axes that matter most."""
        return rocket(samples, weight, atoms, support)
