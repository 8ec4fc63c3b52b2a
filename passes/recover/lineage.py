"""The dense model beside one of which units or blocks were removed, so that tensors of one name belong together."""

from __future__ import annotations

import onnx_ir

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, value_names
from sparsecc.pm import Lineage, PassContext
from sparsecc.pm.lineage import Index

__all__ = ["counterpart", "kept_rows"]


def counterpart(model: Model, reference: Model, lineage: Lineage | None) -> Model | str:
    """Return the dense model with the names that its tensors have in ``model``, or why there is none."""
    if lineage is None or not (lineage.tensors or lineage.added):
        same = _operators(model) == _operators(reference)
        return reference if same else "the nodes are not those of the dense model"
    beside = reference.copy()
    fault = _rename(beside, lineage)
    if fault is not None:
        return fault
    known = _operators(beside)
    for name, operator in _operators(model).items():
        ours = name in lineage.tensors or name in lineage.added
        if not ours and known.get(name) != operator:
            return f"{name!r} is nothing that the dense model computes"
    missing = sorted({*lineage.tensors} & _operators(model).keys() - known.keys())
    return f"{missing[0]!r} is nothing that the dense model computes" if missing else beside


def kept_rows(ctx: PassContext, site: Site) -> Index | None:
    """Return which rows of the dense weight a site has, or None for all."""
    kept = None if ctx.lineage is None else ctx.lineage.kept.get(site.name)
    return None if kept is None else kept.rows


def _operators(model: Model) -> dict[str, str]:
    """What makes each tensor of the main graph."""
    return {value.name: node.op_type for node in model.onnx.graph for value in node.outputs if value.name}


def _rename(beside: Model, lineage: Lineage) -> str | None:
    values = {value.name: value for node in beside.onnx.graph for value in node.outputs if value.name}
    for node in beside.onnx.graph:  # a site is called after its output where it has no name
        node.name = node.name or node.outputs[0].name
    inputs, outputs = (
        {value.name for value in ends} for ends in (beside.onnx.graph.inputs, beside.onnx.graph.outputs)
    )
    moved: dict[str, onnx_ir.Value] = {}
    for ours, theirs in lineage.tensors.items():
        if ours in inputs:
            return f"a block that read the input {ours!r} is gone"
        if ours in outputs and theirs != ours:
            return f"the output {ours!r} is read where a block is gone"
        if theirs in values:
            moved[ours] = values[theirs]
    used = value_names(beside.onnx)
    for name in moved:
        if name in values:
            values[name].name = free_name(f"{name}.dense", used)
    for name, value in moved.items():
        value.name = name
    return None
