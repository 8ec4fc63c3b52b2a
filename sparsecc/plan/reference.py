"""The dense model that recovery aims at, where the input was pruned before."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import signature, signature_fault

__all__ = ["load_reference"]


def load_reference(path: Path, model: Model, pipeline: Pipeline) -> Model:
    """Return the dense model in the form that ``model`` will have when ``pipeline`` recovers it.

    Tensors are matched by name, so the reference is tidied as the model is.

    Args:
        path: its file.
        model: what was made from it.
        pipeline: what will run on ``model``.

    Raises:
        UsageError: nothing in the pipeline recovers, or its order of channels changes, or the inputs or outputs are
            not those of ``model``.
        ModelError: the file is unreadable, unsafe or unsupported.
    """
    if not any(item.recovers for item in pipeline.passes):
        raise UsageError("--reference is what recovery aims at: give --recover NAMES too")
    if any(item.name == "permute" for item in pipeline.passes):
        raise UsageError(
            "permute reorders channels, the reference would keep its own: leave one of the two out"
        )
    reference = Model.load(path)
    fault = signature_fault(signature(reference), signature(model))
    if fault is not None:
        raise UsageError(f"{path.name} is not what the model was made from: {fault}")
    leading = tuple(takewhile(lambda item: item.name == "tidy", pipeline.passes))
    Pipeline(leading).run(reference, PassContext())
    return reference
