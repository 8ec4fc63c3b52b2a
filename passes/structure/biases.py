"""A constant bias for any linear operator, where it has none yet too."""

from __future__ import annotations

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir.names import free_name
from sparsecc.passes.tidy.graph import add_constant
from sparsecc.passes.tidy.linear import Linear, adopt_add, affine_after, find_linear, plain_gemm

__all__ = ["biased"]


def biased(node: onnx_ir.Node, used: set[str]) -> Linear | str:
    """Return the linear operator of ``node`` with a bias that can be set, or the reason why there is none.

    A MatMul without an Add gets one of zeros. Convolutions and Gemm need no node for it.
    """
    linear = find_linear(node)
    if linear is None:
        return "it is no plain linear operator with a constant weight"
    # A site without a name is called after its output, which may get another name below.
    node.name = node.name or node.outputs[0].name
    plain_gemm(linear, used)
    if node.op_type == "MatMul":
        affine = affine_after(linear)
        if affine is not None and affine.node.op_type == "Add":
            adopt_add(linear, affine, used)
        else:
            _add_zeros(linear, used)
    bias = linear.bias()
    if bias is None:
        return "its bias is no constant per channel"
    linear.set_bias(np.asarray(bias, np.float64), used)
    return linear


def _add_zeros(linear: Linear, used: set[str]) -> None:
    node, product = linear.node, linear.node.outputs[0]
    assert node.graph is not None, "the nodes of a model belong to a graph"
    zeros: NDArray[np.float64] = np.zeros(linear.channels)
    dtype = linear.weight.const_value.dtype.numpy() if linear.weight.const_value is not None else np.float32
    bias = add_constant(node.graph, f"{product.name}.bias", zeros.astype(dtype), used)
    add = onnx_ir.Node("", "Add", [product, bias], name=f"{node.name}.bias")
    result = add.outputs[0]
    result.shape, result.type = product.shape, product.type
    onnx_ir.convenience.replace_all_uses_with(product, result, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    name = product.name
    if result.is_graph_output():
        product.name = free_name(f"{name}.unbiased", used)
        result.name = name
    else:
        result.name = free_name(f"{name}.biased", used)
    node.graph.insert_after(node, add)
    linear.add = add
