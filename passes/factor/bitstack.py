"""Weights as stacks of sign planes (BitStack), packed so that the last planes can be left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir

from sparsecc.calib import Calibration
from sparsecc.ir import Model, Site
from sparsecc.ir.planes import PARTS, Planes, plane_name
from sparsecc.passes.factor.base import CalibratedFactorPass, Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.packed import HALF, PackedForm, PackedPass, Unpacking, packed_rows
from sparsecc.passes.factor.signs import SignPlane, fit_plane, refit_plane
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.hybrid.rewriting import Rewriter
from sparsecc.passes.prune.effect import OutputChange
from sparsecc.passes.prune.gram import Matrix, Quadratic, quadratic_error
from sparsecc.pm import PassContext, PassReport, Range, select_sites

__all__ = ["BitStack", "FactorBitstack", "stack_planes"]

#: Entries of all planes of a weight: onnxruntime computes constants of up to 1 GiB.
_MOST_ENTRIES = 1 << 28


@dataclass(frozen=True)
class BitStack(PackedForm):
    """A sum of planes ``B * (U V)``: a bit per sign, factors in half precision.

    Attributes:
        planes: at least one.
        errors: what is left of the outputs' squares without planes, with the first, with the first two, ...
        places: of each plane among all planes of the model; the order of the planes by default.
    """

    planes: tuple[SignPlane, ...]
    errors: tuple[float, ...] = ()
    places: tuple[int, ...] = field(default=(), compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.planes[0].positive.shape
        return rows, columns

    @property
    def bits(self) -> int:
        """A bit per sign, 16 per number of the factors."""
        return sum(plane.positive.size + 16 * plane.factors.size for plane in self.planes)

    def dense(self) -> Matrix:
        """Return the sum of all planes."""
        return self.partial(len(self.planes))

    def partial(self, count: int) -> Matrix:
        """Return the sum of the first ``count`` planes."""
        return np.asarray(sum((plane.dense() for plane in self.planes[:count]), np.zeros(self.shape)))

    def describe(self) -> str:
        """Planes, rank, bits."""
        rank = self.planes[0].factors.rank
        return f"{len(self.planes)} planes of signs of rank {rank}, {self.bits_per_weight:.3g} bits"

    def emit(self, chain: Chain) -> None:
        """Unpack all planes at once and add them up."""
        unpacking = Unpacking(chain)
        packed = [self._packed(unpacking, plane) for plane in self.planes]
        places = self.places or range(len(packed))
        types = (onnx_ir.DataType.UINT8, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT16)
        stacked = []
        for part, dtype, arrays in zip(PARTS, types, zip(*packed, strict=True), strict=True):
            values = [
                chain.shared(array, plane_name(place, part))
                for place, array in zip(places, arrays, strict=True)
            ]
            stacked.append(unpacking.node("Concat", values, part, dtype, axis=0))
        signs = unpacking.signs(stacked[0], "signs.float")
        left, right = (unpacking.floats(value, f"{value.name}.float") for value in stacked[1:])
        inputs, equation = [signs, left, right], "mnce,mnr,mrce->nce"
        unpacking.finish(unpacking.node("Einsum", inputs, "planes", equation=equation))

    @staticmethod
    def _packed(unpacking: Unpacking, plane: SignPlane) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return signs ``[1, rows, bytes]`` and factors ``[1, rows, r]`` and ``[1, r, bytes, 8]``."""
        signs = packed_rows(np.asarray(unpacking.stored(plane.positive), bool))
        left, right = plane.factors.left, plane.factors.right
        if unpacking.chain.site.op != "Conv":
            left, right = right.T, left.T
        return signs[None], left.astype(HALF)[None], unpacking.by_bytes(right)[None]


def stack_planes(
    target: Matrix, gram: Matrix, rank: int, count: int, steps: int, rng: np.random.Generator
) -> tuple[tuple[SignPlane, ...], tuple[float, ...]]:
    """Return planes whose sum comes closer to ``target`` with each, and ``Q`` of what is left from the start on.

    Each is fitted to what those before it left, as it is rounded; at least one is returned, and fewer than ``count`` if
    nothing more is gained.

    Args:
        target: ``[N, K]``.
        gram: ``[K, K]``, positive definite, of ``Q``.
        rank: of the magnitudes.
        count: planes at most.
        steps: of the fit of each factor by ``refit_plane``.
        rng: for first guesses.
    """
    rest, scale = target, np.sqrt(np.diag(gram))
    planes: list[SignPlane] = []
    errors = [quadratic_error(target, gram)]
    for _ in range(count):
        start = fit_plane(rest, scale, rank, rng)
        plane = refit_plane(start, rest, gram, steps).astype(HALF)
        left = rest - plane.dense()
        error = quadratic_error(left, gram)
        if planes and not error < errors[-1]:
            break
        planes.append(plane)
        errors.append(error)
        rest = left
    return tuple(planes), tuple(errors)


@dataclass(frozen=True)
class FactorBitstack(PackedPass, CalibratedFactorPass):
    """Store weights as stacks of sign planes, from which a model of any smaller size can be taken.

    Each plane is a bit per weight and magnitudes of low rank for what the planes before it left (BitStack, Wang et al.
    2024), fitted to the outputs, so that a layer's error falls with every plane. Planes of all layers are ordered by
    how much they bring per byte: the fall of the layer's error, times what that error does to the model's outputs.
    ``sparsecc resize`` takes the first of them.

    Changes: the product reads a weight that standard operators make of packed constants; a session computes it once,
    when it starts. Bits per weight and plane: 1 + 16 for each number of the factors.
    Skips with the reason: models below opset 12 or with such planes already, sites that would not become smaller,
    weights shared by nodes, quantised, grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites
    that calibration does not reach.

    Sample: ``factor-bitstack{param-ratio=0.2}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the bits of each weight that all its planes may take, in (0, 1].
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already rewritten, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        rank: of the magnitudes of a plane.
        planes: of a weight, at most.
        steps: of the fit of each factor of a plane to the outputs; 0 only makes a plane as long as suits them. Some
            help the first two planes and cost the later ones, which find less order in what is left.
    """

    name: ClassVar[str] = "factor-bitstack"
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.5, 0.25)),)

    rank: int = 1
    planes: int = 16
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(rank=1, planes=1, steps=0)

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Stack every matching site in place; each one left alone is reported with the reason."""
        if Planes.of(model) is None:
            return super().run(model, ctx)
        report = PassReport(self.name)
        for site in select_sites(model, self.match, report):
            report.skip(site.name, "the model has planes already: stack all sites in one run")
        return report

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> BitStack | str:
        """Return random planes, as many as ``numbers`` hold."""
        rows, columns = site.shape
        itemsize, rank = site.dtype.itemsize, min(self.rank, rows, columns)
        each = rows * columns + 16 * rank * (rows + columns)
        count = min(8 * itemsize * numbers // each, self.planes, _MOST_ENTRIES // (rows * columns))
        if not count:
            return f"{numbers} numbers do not hold a plane of rank {rank} of {rows} x {columns} signs"
        planes = [
            SignPlane(
                rng.random((rows, columns)) < 0.5,
                Factors(rng.random((rows, rank)), rng.random((rank, columns))),
            )
            for _ in range(count)
        ]
        return BitStack(itemsize, tuple(planes))

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> BitStack:
        """Return the planes, one after the other."""
        assert isinstance(outline, BitStack), "made by outline"
        rank, count = outline.planes[0].factors.rank, len(outline.planes)
        planes, errors = stack_planes(problem.target, problem.gram, rank, count, self.steps, rng)
        energy = errors[0] or 1.0
        return replace(outline, planes=planes, errors=tuple(error / energy for error in errors))

    def write(
        self, model: Model, found: Sequence[tuple[Task, Fitted]], ctx: PassContext, report: PassReport
    ) -> None:
        """Order the planes of all sites and put them into the graph."""
        stacks = [(task.site, fitted.form) for task, fitted in found if isinstance(fitted.form, BitStack)]
        effects = self._effects(model, stacks, ctx)
        order = _order([form for _, form in stacks], effects)
        rewriter = Rewriter(model)
        report.note(
            f"{len(order)} planes: 'sparsecc resize' takes smaller models from the file, 'sparsecc inspect' says which"
        )
        for index, (site, form) in enumerate(stacks):
            places = tuple(place for place, own in enumerate(order) if own == index)
            replace(form, places=places).emit(Chain(rewriter, site))
            shares = ", ".join(f"{error:.3g}" for error in form.errors[1:])
            report.note(f"{site.name}: error with one plane more each: {shares}")
        Planes(tuple(site.name for site, _ in stacks), tuple(order)).describe(model)

    def _effects(
        self, model: Model, stacks: Sequence[tuple[Site, BitStack]], ctx: PassContext
    ) -> list[float]:
        """Return for each site what its error does to the outputs of the model, in one unit; else 1 for all.

        Measured with half of the planes of the site, all others whole.
        """
        if not isinstance(ctx.calibration, Calibration):
            return [1.0] * len(stacks)
        change, effects = OutputChange(model, ctx.calibration), []
        for done, (site, form) in enumerate(stacks):
            ctx.progress(f"{self.name}: ordering", done, len(stacks))
            half = len(form.planes) // 2
            copy = model.copy()
            (own,) = (item for item in copy.sites() if item.name == site.name)
            own.replace(form.partial(half).astype(site.dtype))
            risen = form.errors[half] - form.errors[-1]
            effect = change.of(copy) / risen if risen > 0 else 0.0
            effects.append(effect if np.isfinite(effect) else 0.0)
        ctx.progress(f"{self.name}: ordering", len(stacks), len(stacks))
        return effects


def _order(forms: Sequence[BitStack], effects: Sequence[float]) -> list[int]:
    """Return the form that each plane belongs to: first one plane of each, then by what a byte brings.

    Planes of a form keep their order: none counts more than the one before it.
    """
    ranked = []
    for index, (form, effect) in enumerate(zip(forms, effects, strict=True)):
        gains = -effect * np.diff(form.errors) / (form.bits / len(form.planes))
        falling = np.minimum.accumulate(gains)
        ranked += [(number > 0, -float(gain), number, index) for number, gain in enumerate(falling)]
    return [index for *_, index in sorted(ranked)]
