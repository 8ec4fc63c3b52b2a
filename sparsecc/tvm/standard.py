"""A model in standard operators only, for targets that our kernels do not run on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsecc.calib.synthetic import resolve_shapes
from sparsecc.errors import UnsupportedModelError
from sparsecc.ir import Model
from sparsecc.tvm.prepare import Prepared, raised, settle

__all__ = ["prepare_standard"]


def prepare_standard(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Prepared:
    """Return ``model`` ready to be imported, without kernels of ours; it stays as it was.

    onnxruntime puts the function bodies of our operators in their place and computes what is constant at these shapes:
    packed weights become dense ones, shape arithmetic goes.

    Raises:
        UsageError: ``shapes`` do not fit, or the weights are more than 1.5 GB.
        UnsupportedModelError: onnxruntime cannot.
    """
    import onnxruntime

    settled = resolve_shapes(model, shapes)
    model = raised(model)
    settle(model, settled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        options.log_severity_level = 3
        try:
            onnxruntime.InferenceSession(
                model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exception classes are not public
            text = " ".join(str(error).split())[:300]
            raise UnsupportedModelError(f"onnxruntime cannot fold the model: {text}") from error
        folded = Model.load(path).to_proto()
    return Prepared(Model.from_proto(folded), (), settled)
