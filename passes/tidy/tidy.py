"""The first pass of every pipeline: fewer, plainer nodes with the same outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecc.ir import Model
from sparsecc.ir.names import value_names
from sparsecc.passes.tidy.constants import lift_constants, remove_identities
from sparsecc.passes.tidy.folding import fold_constants
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.passes.tidy.linear import Linear, adopt_add, affine_after, find_linear, fold_affine, plain_gemm
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["Tidy"]


@dataclass(frozen=True)
class Tidy(Pass):
    """Fold constants, BatchNormalization and per-channel arithmetic; remove what does nothing.

    ========================================  ==============================================
    before                                    after
    ========================================  ==============================================
    Constant                                  initialiser
    nodes on constants only                   initialiser, if the file grows little
    Identity, Dropout (inference)             nothing
    nodes and initialisers no output needs    nothing
    Gemm with alpha, beta, bias [1, N]        Gemm with alpha = beta = 1, bias [N]
    MatMul, Add(bias, y) with bias [1, N]     MatMul, Add(y, bias) with bias [N]
    Conv | ConvTranspose | Gemm | MatMul      the same with folded weight and bias (an Add
    then BatchNormalization, or Add, Sub,     after MatMul)
    Mul, Div by a constant per channel
    ========================================  ==============================================

    Keeps: outputs to rounding (folding is computed in float64 and rounded once), names of inputs, outputs
    and weights. Skips with the reason: folding into a weight that is shared or would overflow. What others
    read in between is never folded. Model-local functions are left alone.

    Sample: ``tidy{max-growth=0}``

    Attributes:
        max_growth: bytes that folding one region of constant nodes may add to the file.
    """

    name: ClassVar[str] = "tidy"
    lossless: ClassVar[bool] = True

    max_growth: int = 1 << 16

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Rewrite the main graph and its subgraphs."""
        report = PassReport(self.name)
        graph_model = model.onnx
        used = value_names(graph_model)
        _count(report, sum(remove_dead(graph_model)), "unused nodes and initialisers removed")
        _count(report, lift_constants(graph_model), "Constant nodes made initialisers")
        _count(report, remove_identities(graph_model), "Identity and Dropout nodes removed")
        _count(report, fold_constants(graph_model, used, self.max_growth), "constant nodes folded")
        remove_dead(graph_model)
        for node in [node for graph in graph_model.graphs() for node in graph]:
            linear = find_linear(node) if node.graph is not None else None
            if linear is not None:
                _absorb(linear, used, report)
        remove_dead(graph_model)
        return report


def _absorb(linear: Linear, used: set[str], report: PassReport) -> None:
    """Fold into one linear operator all it can take."""
    name = linear.node.name or str(linear.node.outputs[0].name)
    if (done := plain_gemm(linear, used)) is not None:
        report.change(name, done)
    while (affine := affine_after(linear)) is not None:
        op_type = affine.node.op_type
        if op_type == "Add" and linear.node.op_type == "MatMul" and linear.add is None:
            if adopt_add(linear, affine, used):
                report.change(name, "bias of MatMul made plain")
            continue
        reason = fold_affine(linear, affine, used)
        if reason is not None:
            report.skip(name, f"{op_type} stays: {reason}")
            return
        report.change(name, f"{op_type} folded into {linear.node.op_type}")


def _count(report: PassReport, number: int, what: str) -> None:
    if number:
        report.change("(graph)", f"{number} {what}", count=number)
