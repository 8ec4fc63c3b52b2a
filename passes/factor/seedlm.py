"""Weights as seeds (SeedLM), packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.packed import PackedForm, PackedPass, Unpacking
from sparsecc.passes.factor.seeds import SeedCode, SeedFormat, decode, encode, states
from sparsecc.passes.prune.gram import Matrix, Quadratic
from sparsecc.pm import Range

__all__ = ["FactorSeedlm", "SeedBlocks"]

#: Sizes of a block by bits per weight and bits of a seed.
_FORMATS = {
    (4, 16): SeedFormat(8, 3, 16),
    (3, 16): SeedFormat(12, 4, 16),
    (4, 12): SeedFormat(8, 4, 12),
    (3, 12): SeedFormat(8, 2, 12),
}

_NIBBLES = (np.arange(256)[:, None] >> np.array([0, 4])) & 15


@dataclass(frozen=True)
class SeedBlocks(PackedForm):
    """Blocks of weights in the order in which the constant has them, the last one filled up with zeros.

    Attributes:
        code: of the blocks.
        form: sizes of a block.
        size: N and K.
        flipped: whether the constant is ``[K, N]``.
    """

    code: SeedCode
    form: SeedFormat
    size: tuple[int, int]
    flipped: bool

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.size

    @property
    def bits(self) -> int:
        """4 for each nibble."""
        return 4 * self.code.nibbles.size

    def dense(self) -> Matrix:
        """Return what the seeds give."""
        rows, columns = self.size
        weights = decode(self.code, self.form).reshape(-1)[: rows * columns]
        return np.ascontiguousarray(
            weights.reshape(columns, rows).T if self.flipped else weights.reshape(rows, columns)
        )

    def describe(self) -> str:
        """Bits and sizes."""
        form, stored = self.form, f"{self.bits_per_weight:.3g} bits"
        return f"seeds of {form.bits} bits, {form.rank} coefficients for {form.block} weights, {stored}"

    def emit(self, chain: Chain) -> None:
        """Look up the states of the register and multiply them with the coefficients."""
        unpacking, form, places = Unpacking(chain), self.form, self.form.bits // 4
        parts = self._parts(unpacking)

        def columns(start: int, stop: int, name: str) -> onnx_ir.Value:
            chosen = unpacking.small(np.arange(start, stop, dtype=np.int64))
            return unpacking.node("Gather", [parts, chosen], name, axis=1)

        powers = unpacking.small(16 ** np.arange(places, dtype=np.float32)[:, None])
        seed = unpacking.node("MatMul", [columns(0, places, "seed.nibbles"), powers], "seed")
        steps = unpacking.small(form.places.astype(np.int32)[None])
        at = [unpacking.integers(seed, "seed.integer"), steps]
        at_states = unpacking.node("Add", at, "seed.states", onnx_ir.DataType.INT32)
        table = unpacking.floats(
            chain.shared(states(form), f"sparsecc.seeds.{form.bits}.{form.block * form.rank}"), "states.float"
        )
        middle = unpacking.small(np.array(1 << (form.bits - 1), np.float32))
        span = unpacking.small(np.array((1 << (form.bits - 1)) - 1, np.float32))
        centred = unpacking.node("Sub", [table, middle], "states.centred")
        scaled = unpacking.node("Div", [centred, span], "states.scaled")
        basis = unpacking.node("Gather", [scaled, at_states], "basis", axis=0)
        bases = unpacking.reshape(basis, [-1, form.block, form.rank], "basis.blocks")
        factors = unpacking.reshape(self._factors(unpacking, columns), [-1, form.rank, 1], "factors.blocks")
        self._finish(unpacking, unpacking.node("MatMul", [bases, factors], "blocks"))

    def _parts(self, unpacking: Unpacking) -> onnx_ir.Value:
        """Return all nibbles as float32, ``[blocks, format.nibbles]``."""
        chain, count = unpacking.chain, self.code.nibbles.size
        even = np.pad(self.code.nibbles.reshape(-1), (0, count % 2))
        packed = unpacking.integers(chain.constant(even[::2] | even[1::2] << 4, "codes"), "codes.bytes")
        table = chain.shared(_NIBBLES.astype(np.float32), "sparsecc.nibbles")
        line = unpacking.node("Gather", [table, packed], "codes.nibbles", axis=0)
        if count % 2:
            line = unpacking.head(unpacking.reshape(line, [-1], "codes.line"), count, 0, "codes.cut")
        return unpacking.reshape(line, [-1, self.form.nibbles], "codes.blocks")

    def _factors(
        self, unpacking: Unpacking, columns: Callable[[int, int, str], onnx_ir.Value]
    ) -> onnx_ir.Value:
        """Return the coefficients, ``[blocks, P]``."""
        chain, places = unpacking.chain, self.form.bits // 4
        steps = chain.constant((self.code.scale * np.exp2(-np.arange(16.0))).astype(np.float32), "steps")
        exponents = unpacking.integers(columns(places, places + 1, "exponents.nibbles"), "exponents")
        step = unpacking.node("Gather", [steps, exponents], "step", axis=0)
        middle = unpacking.small(np.array(8, np.float32))
        raw = columns(places + 1, self.form.nibbles, "factors.nibbles")
        signed = unpacking.node("Sub", [raw, middle], "factors.signed")
        return unpacking.node("Mul", [signed, step], "factors")

    def _finish(self, unpacking: Unpacking, blocks: onnx_ir.Value) -> None:
        site, (rows, columns) = unpacking.chain.site, self.size
        if rows * columns % self.form.block:
            blocks = unpacking.head(unpacking.reshape(blocks, [-1], "line"), rows * columns, 0, "cut")
        shape = site.weight_shape if site.op == "Conv" else (columns, rows)
        unpacking.multiply(unpacking.reshape(blocks, shape, "weight"))


@dataclass(frozen=True)
class FactorSeedlm(PackedPass):
    """Store blocks of weights as seeds of a pseudo-random generator: a smaller file, not a faster model.

    A block of 8 or 12 weights is a combination of a few vectors that a linear-feedback shift register makes of a
    seed; all seeds are tried for each block (SeedLM, Shafipour et al. 2024). Needs no calibration data.

    Changes: the product reads a weight that standard operators make of packed constants; a session computes it once,
    when it starts. 4 or 3 bits per weight; the states of the register, which all layers share, take 131 KB with seeds
    of 16 bits, 8 KB with 12.
    Skips with the reason: models below opset 12, sites that would not become smaller, weights shared by nodes,
    quantised, grouped, recurrent or tiny ones, NaN or infinite weights.

    Sample: ``factor-seedlm{bits=3}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the bits of each weight that may be stored, in (0, 1]; sites with less stay.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        bits: stored per weight, 3 or 4.
        seed_bits: of a seed, 12 or 16; with 12 the search takes seconds and the error is a fifth to a third larger.
    """

    name: ClassVar[str] = "factor-seedlm"
    search: ClassVar[tuple[Range, ...]] = (Range.of(),)

    bits: int = 4
    seed_bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bits, self.seed_bits) not in _FORMATS:
            raise SpecError(
                f"{self.name}: bits must be 3 or 4 and seed-bits 12 or 16, got {self.bits} and {self.seed_bits}"
            )

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> SeedBlocks | str:
        """Return random seeds."""
        rows, columns = site.shape
        form = _FORMATS[self.bits, self.seed_bits]
        nibbles = rng.integers(0, 16, (-(-rows * columns // form.block), form.nibbles), np.uint8)
        nibbles[:, : form.bits // 4] //= 2  # seeds that exist
        found = SeedBlocks(
            site.dtype.itemsize, SeedCode(nibbles, 1.0), form, (rows, columns), site.op != "Conv"
        )
        if found.numbers > numbers:
            return (
                f"{found.describe()} take {found.numbers} numbers, {numbers} are allowed: raise param-ratio"
            )
        return found

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> SeedBlocks:
        """Return the seeds and coefficients closest to the target; nothing of it is random."""
        assert isinstance(outline, SeedBlocks), "made by outline"
        block = outline.form.block
        line = (problem.target.T if outline.flipped else problem.target).reshape(-1)
        filled = np.pad(line, (0, -len(line) % block)).reshape(-1, block)
        return replace(outline, code=encode(filled, outline.form))
