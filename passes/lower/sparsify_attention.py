"""Attention with a constant mask over the keys that it lets through, where that is measured faster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparsecc.errors import MeasurementError, SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.names import value_names
from sparsecc.ir.ops_algebra import sparse_attention_node
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION, initializer
from sparsecc.passes.lower.constant_masks import MaskedAttention, match_masked
from sparsecc.passes.lower.fuse_prepare import prepare, replace
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.sparse_steps import match_steps
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport

__all__ = ["SparsifyAttention"]

#: The function body needs ScatterElements that adds.
_MIN_OPSET = 16

_Found = dict[bytes, list[tuple[ir.Node, MaskedAttention]]]


@dataclass(frozen=True)
class SparsifyAttention(Pass):
    """Compute attention with a constant mask only for the keys that each query sees.

    Sliding windows, blocks, causal masks and mixtures of them: the scores of hidden keys are neither computed nor
    stored. Each pattern is kept only if the whole model is measured faster with it.

    Changes: ``softmax(scale q k^T + mask) v`` on ``[batch, heads, rows, size]``, or with ``Where`` in place of the
    addition, becomes one ``SparseAttention`` node; the mask becomes the list of seen keys. A guard that puts 0 for
    weights that are NaN goes with it. So does attention in three sparse operators over one constant pattern
    (``SparseEinsumSampled``, ``SparseSoftmax``, ``SparseEinsum``), which runs part by part in one. Run ``tidy`` first,
    which folds masks that are computed from constants.
    Skips: masks that are computed, differ between heads, hide nothing or a whole row, hold numbers between ``hidden``
    and 0, or where it does not pay; each with the reason.

    Sample: ``sparsify-attention{hidden=-10000.0}``

    Attributes:
        hidden: mask entries up to this one hide a key: its weight is taken as 0, which it is unless its score is above
            the largest seen one by about as much.
        min_gain: time before / time after that each pattern must reach on the whole model; 0 keeps all without
            measuring.
    """

    name: ClassVar[str] = "sparsify-attention"
    lossless: ClassVar[bool] = True

    hidden: float = -1e9
    min_gain: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden < 0:
            raise SpecError(f"{self.name}: option 'hidden': must be below 0, got {self.hidden:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Rewrite the attentions of each pattern if the model is faster with it."""
        report = PassReport(self.name)
        work = model.copy()
        prepare(work.onnx)
        found, refused = self._found(work)
        for name, reason in refused:
            report.skip(name, reason)
        if not found:
            return report
        if model.opset < _MIN_OPSET:
            report.note(f"opset {model.opset} is below {_MIN_OPSET}: nothing is changed")
            return report
        if self.min_gain > 0 and ctx.costs is None:
            raise UsageError(
                "sparsify-attention needs a source of measured costs; run it through sparsecc.optimize, or with "
                "min-gain=0"
            )
        for number, key in enumerate(list(found)):
            ctx.progress("timing sparse attention", number, len(found))
            self._try(key, model, ctx, report)
        ctx.progress("timing sparse attention", len(found), len(found))
        return report

    def _found(self, model: Model) -> tuple[_Found, list[tuple[str, str]]]:
        """Attentions of the main graph by pattern, and (node, reason) of those left alone."""
        found: _Found = defaultdict(list)
        refused = []
        for node in model.onnx.graph:
            try:
                match = match_masked(node, self.hidden) or match_steps(node)
            except Refusal as refusal:
                refused.append((str(node.name), str(refusal)))
                continue
            if match is not None:
                found[match.seen.key()].append((node, match))
        return found, refused

    def _try(self, key: bytes, model: Model, ctx: PassContext, report: PassReport) -> None:
        candidate = model.copy()
        changed = self._rewrite(key, candidate)
        gain = 1.0
        if self.min_gain > 0:
            assert ctx.costs is not None, "checked before"
            try:
                gain = 1 / ctx.costs.relative_time_of(model, candidate)
            except MeasurementError as error:
                for name, _ in changed:
                    report.skip(name, str(error))
                return
            if gain < self.min_gain:
                for name, match in changed:
                    report.skip(
                        name, f"sparse attention over {match.seen.density:.1%} of the pairs of queries and keys "
                        f"would make the model {gain:.3f}x as fast"
                    )  # fmt: skip
                return
        self._rewrite(key, model)
        for name, match in changed:
            report.change(
                name, f"SparseAttention over {match.seen.density:.1%} of the pairs of queries and keys",
                density=match.seen.density, nbytes_before=match.mask_nbytes, nbytes_after=match.seen.nbytes,
                **({"gain": gain} if self.min_gain > 0 else {}),
            )  # fmt: skip

    def _rewrite(self, key: bytes, model: Model) -> list[tuple[str, MaskedAttention]]:
        """Put the operator in place of all attentions of one pattern; return them."""
        prepare(model.onnx)
        matches = self._found(model)[0][key]
        graph = model.onnx.graph
        model.onnx.opset_imports[DOMAIN] = DOMAIN_VERSION
        taken = value_names(model.onnx)
        seen = matches[0][1].seen
        name = str(matches[0][0].name)
        parts = {
            "positions": seen.positions,
            "coordinates": seen.coordinates,
            "shape": np.array(seen.shape, np.int64),
        }
        pattern = [initializer(graph, taken, f"{name}.{part}", array) for part, array in parts.items()]
        for node, match in matches:
            _replace(graph, node, match, pattern)
        remove_dead(model.onnx)
        return [(str(node.name), match) for node, match in matches]


def _replace(graph: ir.Graph, node: ir.Node, match: MaskedAttention, pattern: list[ir.Value]) -> None:
    last = match.output.producer()
    assert last is not None, "a match ends at a node"
    k = match.k
    if match.k_axes is not None:
        turn = ir.Node("", "Transpose", [k], [ir.AttrInt64s("perm", list(match.k_axes))])
        graph.insert_before(last, turn)
        k = turn.outputs[0]
    sparse = sparse_attention_node(match.q, k, match.v, *pattern, scale=match.scale, name=str(node.name))
    replace(match.output, sparse, sparse.outputs[0], last)
