"""From ONNX to Relax: TVM's own importer, to which nodes of ours are calls of a function in the module."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from sparsecc.emit import Dim
from sparsecc.errors import MissingExtraError, UnsupportedModelError
from sparsecc.tvm.prepare import NODE, NUMBER, KernelNode, Prepared

__all__ = ["import_model", "load_tvm"]

#: Name under which a module finds our kernels.
RUN = "sparsecc_run"

_DIRECT = frozenset({NODE, "If", "Constant"})


def load_tvm() -> Any:
    """Return the package ``tvm``.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import tvm
        import tvm.relax
    except ImportError as error:
        raise MissingExtraError("modules of TVM need it: pip install 'sparsecc[tvm]'") from error
    return tvm


def import_model(prepared: Prepared) -> Any:
    """Return the Relax module of a model, its function named ``main``.

    Raises:
        MissingExtraError: TVM is not installed.
        UnsupportedModelError: TVM's importer lacks operators, which are named, or fails.
        UsageError: what is left of the weights is more than 1.5 GB.
    """
    load_tvm()
    _refuse_unknown(prepared)
    proto = prepared.model.to_proto()
    importer = _importer_class()(prepared.kernels)
    try:
        # It prints and warns on its own.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return importer.from_onnx(proto.graph, prepared.model.opset)
    except Exception as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UnsupportedModelError(
            f"TVM's importer cannot take the model: {text}: leave out --emit tvm, which writes ONNX for onnxruntime"
        ) from error


def _refuse_unknown(prepared: Prepared) -> None:
    from tvm.relax.frontend.onnx import onnx_frontend

    known = onnx_frontend._get_convert_map().keys() | _DIRECT
    lacking = sorted(
        {
            f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            for graph in prepared.model.graphs()
            for node in graph
            if node.op_type not in known or node.domain not in ("", "ai.onnx")
        }
    )
    if lacking:
        raise UnsupportedModelError(
            f"TVM's importer has no {', '.join(lacking)}: leave out --emit tvm, which writes ONNX for onnxruntime"
        )


@cache
def _importer_class() -> Any:
    """A subclass of TVM's importer; the class exists only where TVM does."""
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import onnx_frontend

    take = tvm.ir.Op.get("relax.take")

    class Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
        def __init__(self, kernels: Sequence[KernelNode]) -> None:
            super().__init__({}, "float32")
            self._dtype: dict[str, str] = {}  # of inputs: what they are
            self._kernels = kernels

        def _check_for_unsupported_ops(self, graph: object) -> None:
            """Done before, with all domains."""

        def _convert_operator(self, op_name: str, inputs: Any, attrs: Any, opset: int) -> Any:
            if op_name != NODE:
                return self._safe(super()._convert_operator(op_name, inputs, attrs, opset))
            number = attrs[NUMBER]
            given = [_tensor(value) for value in inputs]
            types = [
                relax.TensorType(shape, dtype) for shape, dtype in _outputs(self._kernels[number], given)
            ]
            call = relax.call_dps_packed(
                RUN, [relax.prim_value(number), *given], out_ty=types[0] if len(types) == 1 else types
            )
            return self.bb.normalize(call)

        def _safe(self, value: Any) -> Any:
            """Keep indices that a caller gives inside the table: TVM's own default reads whatever lies there."""
            if isinstance(value, relax.Call) and value.op.same_as(take) and value.attrs.mode == "fast":
                inside = relax.op.take(*value.args, axis=value.attrs.axis, mode="clip")
                return self.bb.normalize(inside)
            return value

    def _tensor(value: Any) -> Any:
        return relax.op.shape_to_tensor(value) if isinstance(value.ty, relax.ShapeType) else value

    return Importer


def _outputs(kernel: KernelNode, given: Sequence[Any]) -> list[tuple[tuple[int, ...], str]]:
    """Shape and type of each output of a node."""
    constants = kernel.record.constants
    computed = iter(given)
    inputs: list[list[Dim] | None] = []
    for constant in constants:
        shape = next(computed).ty.shape.values if constant is None else constant.shape.numpy()
        inputs.append([int(dim) for dim in shape])
    values = {
        item.name: np.asarray(constant.numpy())
        for item, constant in zip(kernel.operator.inputs, constants, strict=True)
        if constant is not None
    }
    shapes = kernel.operator.output_shapes(inputs, values, kernel.record.attributes)
    found = []
    for output, shape in zip(kernel.operator.outputs, shapes, strict=True):
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            raise UnsupportedModelError(
                f"node '{kernel.record.name}' ({kernel.record.op}): the shape of its result is not known in advance"
            )
        found.append((tuple(int(dim) for dim in shape if isinstance(dim, int)), output.dtype))
    return found
