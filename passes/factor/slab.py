"""A sparse weight beside a plane of signs (SLaB), packed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.packed import HALF, PackedForm, PackedPass, Unpacking, packed_rows
from sparsecc.passes.factor.signs import SignPlane, SparseSigns, decompose, refit
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.prune.gram import Matrix, Quadratic
from sparsecc.passes.prune.selection import Mask, Selection
from sparsecc.pm import Range
from sparsecc.sparse import Pattern

__all__ = ["FactorSlab", "SparseBesideSigns"]

#: Conjugate gradient steps on each factor in a round.
_STEPS = 3


@dataclass(frozen=True)
class SparseBesideSigns(PackedForm):
    """``S + B * (U V)``: values in half precision with a bitmap, a bit per sign, thin factors in half precision.

    Attributes:
        sparse: ``[N, K]``, zero outside the mask.
        mask: ``[N, K]``.
        plane: signs and factors.
    """

    sparse: Matrix
    mask: Mask
    plane: SignPlane

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.mask.shape
        return rows, columns

    @property
    def bits(self) -> int:
        """A bit of the bitmap and one of the signs per weight, 16 per value."""
        return 2 * self.mask.size + 16 * (int(np.count_nonzero(self.mask)) + self.plane.factors.size)

    def dense(self) -> Matrix:
        """Return the sum."""
        return self.sparse + self.plane.dense()

    def describe(self) -> str:
        """Share of sparse weights, rank, bits."""
        share = np.count_nonzero(self.mask) / self.mask.size
        return f"{share:.3g} sparse beside signs of rank {self.plane.factors.rank}, {self.bits_per_weight:.3g} bits"

    def emit(self, chain: Chain) -> None:
        """Unpack both parts and add them up."""
        unpacking = Unpacking(chain)
        values = self._unpacked_values(unpacking)
        positive = chain.constant(
            packed_rows(np.asarray(unpacking.stored(self.plane.positive), bool)), "signs"
        )
        factors = self.plane.factors
        left, right = factors.left, factors.right
        if chain.site.op != "Conv":
            left, right = right.T, left.T
        thin = unpacking.floats(chain.constant(left.astype(HALF), "left"), "left.float")
        wide = unpacking.by_bytes(right).reshape(len(right), -1)
        flat = unpacking.floats(chain.constant(wide, "right"), "right.float")
        sizes = unpacking.node("MatMul", [thin, flat], "magnitudes")
        by_bytes = unpacking.reshape(sizes, [unpacking.rows, -1, 8], "magnitudes.bytes")
        plane = unpacking.node("Mul", [unpacking.signs(positive, "signs.float"), by_bytes], "plane")
        unpacking.finish(unpacking.node("Add", [plane, values], "sum"))

    def _unpacked_values(self, unpacking: Unpacking) -> onnx_ir.Value:
        """Return the sparse part, ``[rows, bytes, 8]``: bits are counted, which says where each value is."""
        chain, integer = unpacking.chain, onnx_ir.DataType.INT32
        mask = np.asarray(unpacking.stored(self.mask), bool)
        held = np.concatenate([[0.0], unpacking.stored(self.sparse)[mask]]).astype(HALF)
        values = unpacking.floats(chain.constant(held, "values"), "values.float")
        ones = unpacking.ones(chain.constant(packed_rows(mask), "mask"), "mask.bits")
        line = unpacking.reshape(ones, [-1], "mask.line", integer)
        first = unpacking.small(np.array(0, np.int64))
        counted = unpacking.node("CumSum", [line, first], "mask.counted", integer)
        place = unpacking.node("Mul", [counted, line], "mask.place", integer)
        found = unpacking.node("Gather", [values, place], "values.placed", axis=0)
        return unpacking.reshape(found, [unpacking.rows, -1, 8], "values.bytes")


@dataclass(frozen=True)
class FactorSlab(PackedPass, CalibratedFactorPass):
    """Store weights as a sparse part beside signs with magnitudes of low rank: a smaller file, not a faster model.

    ``S + B * (U V)`` as SLaB has it: S by Wanda's scores of what the plane leaves, signs and factors of what S leaves,
    in turns; then the values of all parts are fitted to the outputs, so that the error only falls.

    Changes: the product reads a weight that standard operators make of packed constants; a session computes it once,
    when it starts. Bits per weight: 2 + 16 for each sparse weight and each number of the factors.
    Skips with the reason: models below opset 12, sites that would not become smaller, weights shared by nodes,
    quantised, grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not
    reach.

    Sample: ``factor-slab{param-ratio=0.2 rank=2}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the bits of each weight that may be stored, in (0, 1]; it decides the sparsity.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already rewritten, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        rank: of the magnitudes.
        iterations: most of the alternation that finds mask and signs.
        rounds: most of the fit after it; 0 leaves what SLaB gives.
    """

    name: ClassVar[str] = "factor-slab"
    search: ClassVar[tuple[Range, ...]] = (Range.of(),)

    rank: int = 1
    iterations: int = 30
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(rank=1, iterations=1, rounds=0)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> SparseBesideSigns | str:
        """Return a random mask beside random signs that fill ``numbers``."""
        rows, columns = site.shape
        itemsize, rank = site.dtype.itemsize, min(self.rank, rows, columns)
        whole = 8 * itemsize * numbers - 2 * rows * columns - 16 * rank * (rows + columns)
        kept = whole // 16
        if kept < 0:
            return f"{numbers} numbers do not hold signs, a bitmap and factors of rank {rank} of {rows} x {columns}"
        share = min(columns, kept // rows) / columns
        pattern = Pattern.parse("unstructured")
        mask = Selection(pattern, 1 - share, "row").mask(rng.random((rows, columns)))
        factors = Factors(rng.random((rows, rank)), rng.random((rank, columns)))
        plane = SignPlane(rng.random((rows, columns)) < 0.5, factors)
        return SparseBesideSigns(itemsize, np.where(mask, 1.0, 0.0), mask, plane)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> SparseBesideSigns:
        """Return sparse part and plane of the sizes of ``outline``."""
        assert isinstance(outline, SparseBesideSigns), "made by outline"
        kept = int(np.count_nonzero(outline.mask[0]))
        columns = outline.mask.shape[1]
        selection = Selection(Pattern.parse("unstructured"), 1 - kept / columns, "row")
        rank = outline.plane.factors.rank
        start = decompose(problem.target, problem.energy, rank, selection.mask, self.iterations, rng)
        found: SparseSigns = refit(start, problem.target, problem.gram, self.rounds, _STEPS)
        return replace(
            outline,
            sparse=found.sparse.astype(HALF).astype(np.float64),
            mask=found.mask,
            plane=found.plane.astype(HALF),
        )
