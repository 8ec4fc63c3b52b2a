"""Tables of embeddings in int8, one scale for each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, name_matches
from sparsecc.passes.factor.tables import Table, find_tables
from sparsecc.passes.hybrid.rewriting import PART_KEY, Rewriter
from sparsecc.passes.tidy.graph import set_constant
from sparsecc.pm import Pass, PassContext, PassReport, Range
from sparsecc.pm.sites import refuse_unmatched
from sparsecc.sparse import density

__all__ = ["QuantizeEmbedding", "row_codes"]

#: Largest integer; -128 is not used, so that rows may change sign.
_MOST = 127


@dataclass(frozen=True)
class QuantizeEmbedding(Pass):
    """Store tables of embeddings as int8 with one scale for each row, a quarter of the bytes.

    Rows are looked up as integers and multiplied with their scales, which are looked up as well: ``round(W / s)`` with
    ``s`` the largest magnitude of a row over 127. It saves bytes of the file and of memory, no time.

    Changes: ``Gather(W, ids)`` to ``Cast(Gather(Q, ids)) * Gather(s, ids)``. Standard operators only.
    Skips with the reason: tables that are small, no float32, quantised, NaN or infinite, that a product reads as well,
    that other operators read, or that are in a body of If, Loop or Scan.

    Sample: ``quantize-embedding{match=*word_embeddings*}``

    Attributes:
        match: which tables: a glob on the name of their Gather, or ``re:`` and a regular expression.
        min_elements: smaller tables, of positions for instance, stay as they are.
    """

    name: ClassVar[str] = "quantize-embedding"
    search: ClassVar[tuple[Range, ...]] = (Range.of(),)
    lossless: ClassVar[bool] = False

    match: str = "*"
    min_elements: int = 1 << 15

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Quantise every matching table in place; each one left alone is reported with the reason."""
        report = PassReport(self.name)
        tables, refused = find_tables(model)
        refuse_unmatched(
            self.match, [*(table.name for table in tables), *(name for name, _ in refused)], "match"
        )
        for name, why in refused:
            if name_matches(self.match, name):
                report.skip(name, why)
        if not tables and not refused:
            report.note("no Gather of the model reads rows of a constant table")
        for table in tables:
            if not name_matches(self.match, table.name):
                continue
            reason = self.refusal(table)
            if ctx.settings_for(table.name, self).skip:
                reason = "left alone by an override"
            if reason is not None:
                report.skip(table.name, reason)
                continue
            before = table.numpy()
            codes, scales = row_codes(before)
            _rewrite(model, table, codes, scales)
            error = float(np.linalg.norm(codes * scales - before) / np.linalg.norm(before))
            detail = f"int8 with a scale for each of {len(codes)} rows"
            report.note(f"{table.name}: {detail}")  # which no site tells
            report.change(
                table.name, detail, density_before=density(before), density_after=density(codes), relative_error=error,
            )  # fmt: skip
        if report.changed:
            model.infer_shapes()
        return report

    def refusal(self, table: Table) -> str | None:
        """Why ``table`` stays as it is; None where it can be quantised."""
        weight = table.numpy()
        if weight.size < self.min_elements:
            return f"only {weight.size} numbers (min-elements={self.min_elements})"
        if table.dtype != np.float32:
            return f"its numbers are {table.dtype.name}: only float32 is quantised"
        if table.head is not None:
            return "a product reads it too and would need it in float32 beside the integers"
        if not np.isfinite(weight).all():
            return "some of its numbers are NaN or infinite"
        return None if weight.any() else "all its numbers are zero"


def row_codes(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers ``[V, d]`` from -127 to 127 and the scale of each row, ``[V, 1]``, of a table ``[V, d]``."""
    scales = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / _MOST
    scales[scales == 0] = 1
    return np.rint(np.clip(weight / scales, -_MOST, _MOST)).astype(np.int8), scales


def _rewrite(model: Model, table: Table, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    """Let every Gather of the table look up integers and scales."""
    rewriter = Rewriter(model)
    set_constant(table.weight, codes)
    held = rewriter.constant(table.gathers[0], f"{table.name}.scales", scales)
    for node in table.gathers:
        wide = rewriter.node(
            node, "Cast", [node.outputs[0]], f"{table.name}.cast", {"to": int(onnx_ir.DataType.FLOAT)}
        )
        attributes = list(node.attributes.values())
        scale = rewriter.node(node, "Gather", [held, node.inputs[1]], f"{table.name}.scale", attributes)
        scale.metadata_props[PART_KEY] = table.name  # no table to be rewritten itself
        product = rewriter.node(node, "Mul", [wide.outputs[0], scale.outputs[0]], f"{table.name}.dequantized")
        rewriter.replace(node, [wide, scale, product])
        wide.outputs[0].shape = product.outputs[0].shape
        node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT8)
