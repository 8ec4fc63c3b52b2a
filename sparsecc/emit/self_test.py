"""Models of a single sparse operator, and the check that one runs: library and onnxruntime fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.emit.finalize import finalize
from sparsecc.emit.schema import operators
from sparsecc.errors import ModelError
from sparsecc.ir import ConvGeometry, Model
from sparsecc.ir.sparse_ops import XForm, sparse_op_node
from sparsecc.sparse import LAYOUT_VERSION, Pattern, QuantizedTensor, SparseTensor, keep_mask

__all__ = ["self_test", "single_op_model"]

_IR_VERSION = 8


def single_op_model(
    weight: SparseTensor | QuantizedTensor,
    x_shape: Sequence[int | str | None],
    *,
    opset: int = 17,
    bias: NDArray[np.float32] | None = None,
    activation: str = "",
    parameters: Mapping[str, float] | None = None,
    weight_shape: Sequence[int] | None = None,
    conv: ConvGeometry | None = None,
    x_form: XForm = "",
    x_scale: float = 1.0,
    x_zero_point: int = 0,
    residual_shape: Sequence[int | str | None] | None = None,
) -> Model:
    """Return a finished model with one node named ``op``, input ``x`` and output ``y``.

    The arguments are those of ``sparse_op_node``; shapes may hold symbols. Scale and zero point of ``x`` are
    constants here, and count unless ``x_form`` is empty. With ``residual_shape`` there is an input ``residual`` too.

    Raises:
        UnsupportedModelError: the opset is older than the operators need.
    """
    x_type = onnx_ir.DataType.UINT8 if x_form == "Bytes" else onnx_ir.DataType.FLOAT
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(x_shape), type=onnx_ir.TensorType(x_type))
    inputs = [x]
    if residual_shape is not None:
        inputs.append(onnx_ir.Value(name="residual", shape=onnx_ir.Shape(residual_shape), type=x.type))
    graph = onnx_ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="single_op")
    given: dict[str, NDArray[Any]] = {}
    if x_form:
        given["x_scale"] = np.array(x_scale, np.float32)
        given["x_zero_point"] = np.array(x_zero_point, np.uint8)
    for name, array in given.items():
        graph.register_initializer(
            onnx_ir.Value(name=name, const_value=onnx_ir.Tensor(array, name=name), shape=onnx_ir.Shape(()),
                          type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)))
        )  # fmt: skip
    node = sparse_op_node(
        graph, x, weight, name="op", bias=bias, activation=activation, parameters=parameters,
        weight_shape=weight_shape, conv=conv, residual=inputs[1] if len(inputs) > 1 else None,
        x_scale=graph.initializers.get("x_scale"),
        x_zero_point=graph.initializers.get("x_zero_point"),
    )  # fmt: skip
    node.outputs[0].name = "y"
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = Model(onnx_ir.Model(graph, ir_version=_IR_VERSION))
    finalize(model)
    return model


def self_test() -> float:
    """Run a small operator of the library in onnxruntime; return its relative L2 distance from NumPy.

    Raises:
        ModelError: onnxruntime refuses the model.
        RuntimeMissingError: the library is missing or cannot be loaded.
    """
    import onnxruntime

    from sparsecc import runtime

    rng = np.random.default_rng(0)
    dense = rng.standard_normal((32, 24)).astype(np.float32)
    pattern = Pattern.parse("16x1")
    weight = SparseTensor.encode(dense * keep_mask(np.abs(dense), pattern, 0.5), pattern)
    bias = rng.standard_normal(32).astype(np.float32)
    x = rng.standard_normal((3, 24)).astype(np.float32)
    model = single_op_model(weight, x.shape, bias=bias, activation="Relu")
    model.onnx.functions.clear()  # nothing to fall back on: only the library can run the node
    options = onnxruntime.SessionOptions()
    runtime.register(options)
    try:
        session = onnxruntime.InferenceSession(
            model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        y = session.run(None, {"x": x})[0]
    except Exception as error:  # onnxruntime's exception classes are not public
        raise ModelError(
            f"onnxruntime cannot run a sparse operator: {' '.join(str(error).split())}"
        ) from error
    (expected,) = operators()["BlockSparseMatMulRelu"].reference(
        [x, weight.values, weight.indices, np.array(dense.shape), bias],
        {"layout": str(pattern), "layout_version": LAYOUT_VERSION},
    )
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
