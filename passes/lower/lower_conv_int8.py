"""Run regions of quantised convolutions on bytes in quad planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir

from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model, name_matches
from sparsecc.passes.lower.byte_regions import Step, find_steps, fuse_additions, regions_of
from sparsecc.passes.lower.byte_rewriting import rewrite
from sparsecc.passes.lower.confirm_layout import best_subset
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["LowerConvInt8"]

_MIN_OPSET = 13  # of the function bodies


@dataclass(frozen=True)
class LowerConvInt8(Pass):
    """Rewrite connected regions of QDQ convolutions so that bytes stay in quad planes between them.

    A region is convolutions, additions, Concat of channels and pooling (MaxPool, AveragePool, GlobalAveragePool)
    between which tensors are stored by QuantizeLinear with one constant scale. Its convolutions become
    ``BlockSparseConvQuads``, dense ones too; what enters and leaves it is converted. A region is rewritten if one of
    its convolutions has zeros enough and the whole model is measured faster with it.

    Results are those of the quantised model up to the rounding of float32, except where a convolution takes over the
    addition behind it: its result is then not rounded before, which is nearer to the model before quantisation.

    Sample: ``lower-conv-int8{min-gain=1.1}``

    Attributes:
        match: regions with a convolution of this name: a glob, or ``re:`` and a regular expression.
        min_gain: time before / time after that the whole model must reach.
        max_density: of the sparsest convolution of a region; above, the region is left alone.
        fuse_add: let convolutions take over additions behind them.
        keep_slower: rewrite every region without measuring.
        max_trials: most sets of regions measured.
    """

    name: ClassVar[str] = "lower-conv-int8"
    lossless: ClassVar[bool] = True

    match: str = "*"
    min_gain: float = 1.02
    max_density: float = 0.85
    fuse_add: bool = True
    keep_slower: bool = False
    max_trials: int = 6

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Find the regions, measure, and rewrite those that pay."""
        report = PassReport(self.name)
        if model.opset < _MIN_OPSET:
            report.note(f"opset {model.opset} is below {_MIN_OPSET}, which operators on quad planes need")
            return report
        work = model.copy()  # a model that stays as it is must not even get new shapes
        work.infer_shapes()
        regions = self._regions(work, report)
        worth = [region for region in regions if self._is_worth_trying(region, report)]
        if not worth:
            report.note("no region of quantised convolutions to rewrite")
            return report
        chosen, gain = worth, ""
        if not self.keep_slower:
            chosen, gain = self._measured(work, worth, ctx, report)
        for region in chosen:
            for step in _convolutions(region):
                assert step.conv is not None
                detail = f"quad planes, density {step.conv.density:.3f}{gain}"
                report.change(_name(step.node), detail, density=round(step.conv.density, 6))
        if chosen:
            rewrite(work.onnx, [step for region in chosen for step in region])
            model.onnx = work.onnx
            ctx.quantization = None  # what it wrote is gone: no site can go back to float32 alone
        return report

    def _regions(self, model: Model, report: PassReport | None) -> list[list[Step]]:
        def refuse(node: onnx_ir.Node, reason: str) -> None:
            if report is not None and name_matches(self.match, _name(node)):
                report.skip(_name(node), reason)

        steps = find_steps(model.onnx.graph, refuse)
        regions = regions_of(fuse_additions(steps) if self.fuse_add else steps)
        return [
            region
            for region in regions
            if any(name_matches(self.match, _name(step.node)) for step in _convolutions(region))
        ]

    def _is_worth_trying(self, region: list[Step], report: PassReport) -> bool:
        densities = [step.conv.density for step in _convolutions(region) if step.conv is not None]
        if self.keep_slower or min(densities) <= self.max_density:
            return True
        for step in _convolutions(region):
            report.skip(
                _name(step.node), f"no convolution of its region has zeros enough: {min(densities):.3f}"
            )
        return False

    def _measured(
        self, model: Model, regions: list[list[Step]], ctx: PassContext, report: PassReport
    ) -> tuple[list[list[Step]], str]:
        """The regions that make the whole model fastest, and what they gain."""
        costs = ctx.costs
        if costs is None:
            raise UsageError(
                "lower-conv-int8 needs a source of measured costs; run it through sparsecc.optimize, or give "
                "keep-slower=true to rewrite without measuring"
            )
        by_name = {_region_name(region): region for region in regions}
        trials = 0

        def relative_time(names: frozenset[str]) -> float:
            nonlocal trials
            if not names:
                return 1.0
            trials += 1
            ctx.progress("timing whole models", trials, trials + 1)
            candidate = model.copy()
            again = [r for r in self._regions(candidate, None) if _region_name(r) in names]
            rewrite(candidate.onnx, [step for region in again for step in region])
            return costs.relative_time_of(model, candidate)

        try:
            best, relative = best_subset(dict.fromkeys(by_name, 1.0), relative_time, self.max_trials)
        except MeasurementError as error:
            for step in (step for region in regions for step in _convolutions(region)):
                report.skip(_name(step.node), str(error))
            return [], ""
        ctx.progress("timing whole models", trials, trials)
        if relative * self.min_gain > 1:
            best = frozenset()
        for name, region in by_name.items():
            if name not in best:
                for step in _convolutions(region):
                    report.skip(_name(step.node), "its region does not make the whole model faster")
        if best:
            report.note(
                f"{len(best)} of {len(regions)} regions rewritten: {1 / relative:.2f}x the speed before"
            )
        return [region for name, region in by_name.items() if name in best], f", model {1 / relative:.2f}x"


def _convolutions(region: Sequence[Step]) -> list[Step]:
    return [step for step in region if step.node.op_type == "Conv"]


def _name(node: onnx_ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _region_name(region: Sequence[Step]) -> str:
    return region[0].target.quantizer.outputs[0].name or ""
