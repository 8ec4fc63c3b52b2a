"""The pass ``recover-bn``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir

from sparsecc.ir import Model
from sparsecc.passes.recover.base import RecoverPass, change_numbers, sites_to_recover
from sparsecc.passes.recover.bias import correct_outputs
from sparsecc.passes.recover.lineage import kept_rows
from sparsecc.passes.recover.outputs import Channels, Tap, walk_tensors
from sparsecc.passes.tidy.graph import float_attribute, float_constant, set_constant
from sparsecc.pm import PassContext, PassReport

__all__ = ["RecoverBn"]


@dataclass(frozen=True)
class RecoverBn(RecoverPass):
    """Give channels the mean and the standard deviation they have in the dense model, front to back.

    Pruning shrinks and shifts activations, and what follows expects the statistics of training. Where the graph
    still has BatchNormalization, its running mean and variance are set so that its outputs have, on the calibration
    inputs, the statistics they have in the dense model (the re-estimation of "Optimal Brain Compression", Frantar and
    Alistarh 2022, made exact for a small sample: a dense model stays as it is). Where it was folded into a
    convolution, the factors and shifts go into weights and bias. If the outputs of the model get worse, everything is
    taken back.

    Changes: running statistics of BatchNormalization; weights and biases of convolutions without one behind them.
    Skips with the reason: what ``recover-bias`` skips.

    Sample: ``recover-bn``

    Attributes:
        match: which convolutions, with the BatchNormalization behind each: a glob on the name, or ``re:`` and a
            regular expression.
    """

    name: ClassVar[str] = "recover-bn"

    def recover(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        """Normalisations first, then the convolutions that have none: the two are never in one chain."""
        assert ctx.calibration is not None  # RecoverPass.run
        sites = [site for site in sites_to_recover(model, self, ctx, report) if site.op == "Conv"]
        if not sites:
            report.note("no convolution of the model matches: there are no channel statistics to match")
            return
        behind = {site.name: _normalisation(site.node) for site in sites}
        norms = {behind[site.name]: site for site in sites if behind[site.name] is not None}
        found = [node for node in model.onnx.graph if node in norms]
        taps = [
            Tap(str(node.inputs[0].name), 1, (node,), kept_rows(ctx, norms[node]))
            for node in found
            if node.inputs[0] is not None
        ]
        measured = walk_tensors(model, reference, taps, ctx.calibration, ctx.threads)
        for node, (_, channels) in zip(found, measured, strict=True):
            if isinstance(channels, str):
                report.skip(str(node.name or node.outputs[0].name), channels)
            else:
                _renormalise(node, channels, report)
        folded = [site for site in sites if behind[site.name] is None]
        correct_outputs(model, reference, folded, "variance", True, ctx, report)


def _normalisation(conv: onnx_ir.Node) -> onnx_ir.Node | None:
    """The BatchNormalization with constants of its own that reads the outputs of a convolution."""
    for node, position in conv.outputs[0].uses():
        if node.op_type == "BatchNormalization" and position == 0:
            own = [value for value in node.inputs[3:5] if value is not None and len(value.uses()) == 1]
            return node if len([value for value in own if float_constant(value) is not None]) == 2 else None
    return None


def _renormalise(node: onnx_ir.Node, found: Channels, report: PassReport) -> None:
    """Set mean and variance so that the outputs have the statistics they have in the dense model."""
    holders = [value for value in node.inputs[3:5] if value is not None]
    mean, variance = (value.const_value.numpy().astype(np.float64) for value in holders if value.const_value)
    epsilon = float_attribute(node, "epsilon", 1e-5)
    ratio = np.sqrt(found.variance / np.where(found.dense_variance > 0, found.dense_variance, 1.0))
    ratio = np.where((found.dense_variance > 0) & (ratio > 0), ratio, 1.0)
    new_mean = found.mean - (found.dense_mean - mean) * ratio
    new_variance = np.maximum((variance + epsilon) * ratio**2 - epsilon, 0.0)
    for value, array in zip(holders, (new_mean, new_variance), strict=True):
        assert value.const_value is not None  # _normalisation
        set_constant(value, array.astype(value.const_value.dtype.numpy()))
    report.change(
        str(node.name or node.outputs[0].name),
        "running mean and variance matched to the dense model",
        **change_numbers(np.concatenate([mean, variance]), np.concatenate([new_mean, new_variance])),
        output_error_before=found.error,
    )
