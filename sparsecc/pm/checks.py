"""The promise of every pass, checked by the framework: a valid graph with the inputs and outputs it had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsecc.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir

    from sparsecc.ir import Model

__all__ = ["Signature", "graph_fault", "signature", "signature_fault"]


@dataclass(frozen=True)
class Signature:
    """Names, dtypes and ranks of graph inputs and outputs; rank ``None`` when the file does not say.

    Inputs that carry a default (an initialiser of the same name) are weights, not part of the signature.
    """

    inputs: tuple[tuple[str, str, int | None], ...]
    outputs: tuple[tuple[str, str, int | None], ...]


def signature(model: Model) -> Signature:
    """Return the signature of the main graph."""
    graph = model.onnx.graph
    inputs = tuple(_entry(value) for value in graph.inputs if value.name not in graph.initializers)
    return Signature(inputs, tuple(_entry(value) for value in graph.outputs))


def signature_fault(before: Signature, after: Signature) -> str | None:
    """Return what differs between two signatures in words, or ``None``. An unknown rank equals any."""
    for kind, old, new in (
        ("inputs", before.inputs, after.inputs),
        ("outputs", before.outputs, after.outputs),
    ):
        if [item[0] for item in old] != [item[0] for item in new]:
            return f"graph {kind} were {[item[0] for item in old]} and are now {[item[0] for item in new]}"
        for (name, old_type, old_rank), (_, new_type, new_rank) in zip(old, new, strict=True):
            if old_type != new_type:
                return f"graph {kind[:-1]} '{name}' was {old_type} and is now {new_type}"
            if None not in (old_rank, new_rank) and old_rank != new_rank:
                return f"graph {kind[:-1]} '{name}' had rank {old_rank} and has now rank {new_rank}"
    return None


def graph_fault(model: Model) -> str | None:
    """Return the first complaint of ``onnx.checker`` or strict shape inference in one line, or ``None``.

    Large weights count by type and shape only, so a model of any size is checked in little memory.
    """
    import onnx

    try:
        model.check()
        onnx.shape_inference.infer_shapes(model.skeleton(), check_type=True, strict_mode=True)
    except (ModelError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def _entry(value: onnx_ir.Value) -> tuple[str, str, int | None]:
    return value.name or "", str(value.type), None if value.shape is None else value.shape.rank()
