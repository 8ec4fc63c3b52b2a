"""Fewer layers: residual blocks that hardly change their stream are removed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsecc.errors import SpecError
from sparsecc.ir import Model, name_matches
from sparsecc.ir.axes import AxisGraph
from sparsecc.ir.names import value_names
from sparsecc.passes.recover.base import output_error
from sparsecc.passes.structure.blocks import Block, count_before, find_blocks, remove_block, runs
from sparsecc.passes.structure.depth_fit import Fit, Hole, fit_front, fit_norm
from sparsecc.passes.structure.flops import Flops, keep_ratio, ratio_before
from sparsecc.passes.structure.influence import Score, block_scores, channel_axis
from sparsecc.passes.tidy.graph import only_consumer, remove_dead
from sparsecc.pm import CalibrationSource, Lineage, Pass, PassContext, PassReport
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["PruneDepth"]

#: Key of the metadata under which the number of removed blocks is kept for a later run.
_REMOVED = "sparsecc.blocks_removed"


@dataclass(frozen=True)
class PruneDepth(Pass):
    """Remove residual blocks whose outputs are most like their inputs, and let the layer before them make up for it.

    A block is what lies between two states of a stream, ``x -> Add(x, f(x))``, with the LayerNormalization or Relu
    behind the Add where x comes from one too: half a transformer layer, or a basic block of a ResNet. The one with
    the least distance between input and output on the calibration data leaves (``influence``: Men et al., "ShortGPT",
    2024; ``angular``: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024); then all are
    measured again. The linear layer in front of each hole is fitted by least squares, weights and bias, to what came
    out of the block in the whole model, then scale and bias of a LayerNormalization there; whatever does not bring
    the outputs of the model closer is taken back.

    Changes: nodes go; values of weights and biases in front of a hole. Only standard operators; what stays keeps its
    shapes.
    Skips with the reason: blocks with inner tensors that are read elsewhere or are outputs, that change the shape,
    whose shortcut is not the identity; layers in no block. Weights that a block shares with others stay.

    Sample: ``prune-depth{blocks=2 span=2}``

    Attributes:
        blocks: how many to remove, those of earlier runs included; 1 if flops-ratio is not given either.
        flops_ratio: remove blocks until this share of the multiplications of MatMul, Gemm and Conv is left, in (0, 1),
            of those before the first such pass.
        span: remove so many neighbouring blocks at a time and count them as one (2: a whole transformer layer).
        match: which blocks: a glob on the name of the Add, or ``re:`` and an expression.
        score: ``angular``: angle between input and output; ``influence``: 1 - its cosine.
        compensation: ``least-squares`` or ``none``.
        damping: ridge of the least squares, relative to the mean of the diagonal.
    """

    name: ClassVar[str] = "prune-depth"
    requires_calibration: ClassVar[bool] = True

    blocks: int | None = None
    flops_ratio: float | None = None
    span: int = 1
    match: str = "*"
    score: Score = "angular"
    compensation: Literal["least-squares", "none"] = "least-squares"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.flops_ratio is not None:
            raise SpecError("prune-depth: give blocks or flops-ratio, not both")
        if (self.blocks is not None and self.blocks < 1) or self.span < 1:
            raise SpecError("prune-depth: blocks and span must be 1 or more")
        if self.flops_ratio is not None and not 0 < self.flops_ratio < 1:
            raise SpecError(f"prune-depth: flops-ratio must be in (0, 1), got {self.flops_ratio:g}")
        if not 0 < self.damping < 10:
            raise SpecError(f"prune-depth: damping must be in (0, 10), got {self.damping:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Measure, remove and fit, one block after the other.

        Raises:
            UsageError: there is no calibration source, or ``match`` matches nothing.
        """
        calibration = ctx.calibration_for(self.name)
        report = PassReport(self.name)
        names = [block.name for block in runs(model, find_blocks(model)[0], self.span)]
        refuse_unmatched(self.match, names, "match")
        removal = _Removal(self, model, calibration, ctx.threads, report, ctx.lineage or Lineage())
        whole = removal.flops() / ratio_before(model)
        removed = start = count_before(model, _REMOVED)
        ratio = removal.flops() / whole if whole else 1.0
        scores: dict[str, float | str] = {}
        while self._wants_more(removed, ratio):
            ctx.progress(self.name, removed - start, max(1, (self.blocks or len(names)) - start))
            scores, best = removal.measured()
            if best is None:
                report.note(f"no more blocks can be removed: {removed} are gone")
                break
            removal.remove(best, scores[best.name])
            removed += 1
            ratio = removal.flops() / whole if whole else 1.0
        if removed > start:
            ctx.lineage = removal.lineage
            remove_dead(model.onnx)  # constants that a fit replaced
            scores = removal.measured()[0]
            model.metadata[_REMOVED] = str(removed)
            keep_ratio(model, ratio)
            report.note(f"{100 * ratio:.1f} % of the multiplications of linear layers are left")
        removal.tell_others(scores)
        return report

    def _wants_more(self, removed: int, ratio: float) -> bool:
        if self.flops_ratio is not None:
            return ratio > self.flops_ratio + 1e-9
        return removed < (self.blocks or 1)


class _Removal:
    """Removes blocks from a model, beside a copy of what it was."""

    def __init__(
        self,
        options: PruneDepth,
        model: Model,
        calibration: CalibrationSource,
        threads: int,
        report: PassReport,
        lineage: Lineage,
    ) -> None:
        self._options = options
        self._model = model
        self._dense = model.copy()
        self._calibration = calibration
        self._threads = threads
        self._report = report
        self.lineage = lineage
        self._stands_for: dict[str, str] = {}

    def flops(self) -> float:
        """Multiplications of the linear layers as they are."""
        axes = AxisGraph(self._model)
        inputs = next(iter(self._calibration), None)
        flops = Flops(self._model, axes, self._model.sites(), None if inputs is None else dict(inputs))
        return flops.total(np.zeros(len(axes.removal), bool))

    def measured(self) -> tuple[dict[str, float | str], Block | None]:
        """Score, or reason to stay, of all blocks by name, and the block to remove next."""
        options = self._options
        found = runs(self._model, find_blocks(self._model)[0], options.span)
        matching = [block for block in found if name_matches(options.match, block.name)]
        free = [block for block in matching if block.reason is None]
        scores = block_scores(self._model, free, options.score, self._calibration, self._threads)
        by_name: dict[str, float | str] = {
            block.name: str(block.reason) for block in matching if block.reason
        }
        by_name.update({block.name: score for block, score in zip(free, scores, strict=True)})
        ranked = [(score, at) for at, score in enumerate(scores) if not isinstance(score, str)]
        return by_name, free[min(ranked)[1]] if ranked else None

    def remove(self, block: Block, score: float | str) -> None:
        """Take ``block`` out, make up for it, and report both."""
        layers = len({site.node for site in self._model.sites()} & block.nodes)
        elsewhere = _read_elsewhere(self._model, block)
        end = str(block.end.name)
        target = self._stands_for.get(end, end)
        name = remove_block(self._model, block)
        self._stands_for[name] = target
        if name != end:
            self.lineage = self.lineage.bridged(name, end)
        before = after = self._error()
        fitted: list[str] = []
        known = value_names(self._model.onnx)
        if self._options.compensation != "none" and before > 0:
            if elsewhere is None:
                hole = Hole(
                    *(self._model, name, self._dense, target, channel_axis(block)),
                    *(self._calibration, self._threads),
                )
                after = self._compensate(block.name, hole, before, fitted)
            else:
                self._report.note(f"{block.name}: nothing makes up for it: {elsewhere}")
        self._tell_biases(known)
        self._report.change(
            block.name,
            f"removed with {layers} linear layers"
            + (f"; {' and '.join(fitted)} fitted to make up for it" if fitted else ""),
            density_before=1.0,
            density_after=0.0,
            relative_error=float(np.sqrt(after)),
            score=score,
            output_error_uncompensated=before,
            output_error=after,
        )

    def _compensate(self, block: str, hole: Hole, error: float, fitted: list[str]) -> float:
        """Fit what stands in front; return the error of the outputs then, never more than ``error``."""
        reasons = []
        fits: tuple[Callable[[Hole], Fit], ...] = (
            functools.partial(fit_front, damping=self._options.damping),
            fit_norm,
        )
        for fit in fits:
            found = fit(hole)
            if isinstance(found, str):
                reasons.append(found)
                continue
            name, undo = found
            now = self._error()
            if now < error:
                error = now
                fitted.append(repr(name))
                self.lineage = self.lineage.standing_in(name)
            else:
                undo()
                reasons.append(f"fitting {name!r} brings the outputs no closer")
        if not fitted:
            self._report.note(f"{block}: nothing makes up for it: {'; '.join(reasons)}")
        return error

    def _tell_biases(self, known: set[str]) -> None:
        """Let the lineage know the products that got an Add for a bias, fitted or not."""
        for node in self._model.onnx.graph:
            product = node.outputs[0]
            add = only_consumer(product)
            if str(product.name) not in known and add is not None:
                names = str(product.name), str(add.outputs[0].name)
                self.lineage = self.lineage.biased(*names, known)

    def _error(self) -> float:
        return output_error(self._model, self._dense, self._calibration, self._threads)

    def tell_others(self, scores: dict[str, float | str]) -> None:
        """Reasons for the blocks that stay, and for the linear layers in none."""
        blocks, others = find_blocks(self._model)
        inside = frozenset[object]().union(*(block.nodes for block in blocks))
        for name, score in scores.items():
            kept = "others change their stream less" if self._report.changed else "it is not measured"
            reason = (
                score if isinstance(score, str) else f"{kept}: {self._options.score} distance {score:.4g}"
            )
            self._report.skip(name, reason)
        for name, reason in [*others, *self._model.unsupported_sites()]:
            self._report.skip(name, reason)
        for site in self._model.sites():
            whole = all(node in inside for node in site.nodes)
            self._report.skip(site.name, "its block stays" if whole else "it is in no residual block")


def _read_elsewhere(model: Model, block: Block) -> str | None:
    """Who else depends on the input of a block, which may not be fitted to its outputs then."""
    name = block.start.name
    if block.start.is_graph_output():
        return f"its input {name!r} is an output of the model"
    held = {use.node for use in block.start.uses()} <= block.nodes
    return None if held else f"its input {name!r} is read elsewhere too"
