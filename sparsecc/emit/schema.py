"""The sparse operators, each declared once: inputs, attributes, shape rule, function body, reference.

Other kinds of operators are declared in modules of their own and listed in ``operators``. The linear ones, here,
are the families of ``sparsecc.ir.sparse_ops`` times the fused activations. Everything about
an operator is generated from the few tables here; the C++ table (``runtime/csrc/ort/op_table.h``) and
``docs/operators.md`` are checked against them by tests.

A function body uses only standard operators in forms which are the same at every opset from 11 on, so that
one text serves all models. Its decoding part reads constants only: a runtime without our library folds it
when it loads the model, and then runs one dense MatMul or Conv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from sparsecc.emit import reference
from sparsecc.emit.activations import ACTIVATION_BODIES
from sparsecc.emit.decoding import (
    BYTES,
    CONSTANTS,
    DENSE_WEIGHT,
    FILL_THE_GRID,
    FLOATS,
    GRID_OF_BLOCKS,
    GRID_OF_ELEMENTS,
)
from sparsecc.emit.operator import (
    STORED_VALUES,
    Attribute,
    Attributes,
    Constants,
    Dim,
    Input,
    Operator,
    Output,
    Shapes,
    window_sizes,
)
from sparsecc.emit.ops_algebra import algebra_operators
from sparsecc.emit.ops_planes import plane_operators
from sparsecc.emit.ops_recurrent import recurrent_operators
from sparsecc.emit.ops_transformer import transformer_operators
from sparsecc.ir.ops_algebra import CUTS
from sparsecc.ir.sparse_ops import ACTIVATIONS, FAMILIES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LinearOp", "operators"]

_CUTS = Attribute(
    CUTS,
    "ints",
    "rows of blocks (or of single weights), then blocks, before each part, as the pass `partition` writes it for "
    "kernels that read it; optional, and no kernel for CPUs does",
    optional=True,
)


@dataclass(frozen=True)
class LinearOp(Operator):
    """A matrix product or convolution: a storage family with one fused activation."""

    storage: str
    activation: str

    @property
    def family(self) -> str:
        """The storage family."""
        return self.storage

    @property
    def name(self) -> str:
        """The operator's type, for instance ``BlockSparseConvRelu``."""
        return self.family + self.activation

    @property
    def conv(self) -> bool:
        """Whether it is a convolution; otherwise a matrix multiplication."""
        return "Conv" in self.family

    @property
    def adds(self) -> bool:
        """Whether its last input is another summand."""
        return self.family.endswith("Add")

    @property
    def int8(self) -> bool:
        """Whether weights are int8 with a scale per output, and ``x`` is or becomes uint8."""
        return "Int8" in self.family

    @property
    def x_form(self) -> str:
        """With int8 weights: ``Static`` or ``Bytes`` where scale and zero point of ``x`` are given, else empty."""
        return self.family.partition("Int8")[2]

    @property
    def blocks(self) -> bool:
        """Whether its layout is RxC; otherwise ``unstructured`` or N:M."""
        return self.family.startswith("Block")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Those that come with a weight must be constant initializers."""
        x_shape = "[B,C,H,W] or [B,C,L]" if self.conv else "[...,K]"
        shape = "[Cout,Cin/group,kh,kw] or [Cout,Cin/group,kw]" if self.conv else "[N,K]"
        values = "int8" if self.int8 else STORED_VALUES
        scales = Input("scales", "float32", "[N]", "what the values of each output are to be multiplied by")
        bounds = (
            Input("lo", "float32", "scalar", "lower bound of the result"),
            Input("hi", "float32", "scalar", "upper bound of the result"),
        )
        given = (
            Input("x_scale", "float32", "scalar", "finite and positive; need not be constant"),
            Input("x_zero_point", "uint8", "scalar", "need not be constant"),
        )
        return (
            Input("x", "uint8" if self.x_form == "Bytes" else "float32", x_shape, "the activations"),
            Input("values", values, "[blocks,R,C]" if self.blocks else "[kept]", "the kept weights"),
            Input("indices", "uint8", "[bytes]", "where they stand: the gap stream"),
            Input("shape", "int64", "[rank]", f"the dense shape of the weight: {shape}"),
            *((scales,) if self.int8 else ()),
            Input("bias", "float32", "[Cout]" if self.conv else "[N]", "added before the activation"),
            *(bounds if self.activation == "Clip" else ()),
            *(given if self.x_form else ()),
            *((Input("residual", "float32", "[B,Cout,...]", "the same shape as y"),) if self.adds else ()),
        )

    @property
    def outputs(self) -> tuple[Output, ...]:
        """The result alone."""
        return (Output("y", "float32", "[B,Cout,...]" if self.conv else "[...,N]", "the result"),)

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes."""
        layout = "R outputs by C inputs a block, such as `16x1`" if self.blocks else "`unstructured` or N:M"
        conv = (
            Attribute("strides", "ints", "as in Conv, one per spatial axis"),
            Attribute("pads", "ints", "as in Conv, begins then ends"),
            Attribute("dilations", "ints", "as in Conv, one per spatial axis"),
            Attribute("group", "int", "as in Conv" + ("; R divides Cout / group" if self.blocks else "")),
        )
        return (
            Attribute("layout", "string", layout),
            Attribute("layout_version", "int", "1"),
            *((Attribute("alpha", "float", "slope below zero"),) if self.activation == "LeakyRelu" else ()),
            *(conv if self.conv else ()),
            _CUTS,
        )

    def output_shape(
        self, x: Sequence[Dim], weight: Sequence[int], attributes: Mapping[str, Sequence[int]]
    ) -> tuple[Dim, ...]:
        """Return the shape of y.

        Args:
            x: shape of the input; symbols are kept where the result has the same size.
            weight: the dense shape of the weight, as in input ``shape``.
            attributes: ``strides``, ``pads``, ``dilations`` of a convolution.
        """
        if not self.conv:
            return (*x[:-1], weight[0])
        return (x[0], weight[0], *window_sizes(x[2:], weight[2:], attributes))

    def output_shapes(
        self, inputs: Shapes, constants: Constants, attributes: Attributes
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where the weight's own shape and (convolutions: at best) that of x are known."""
        x, shape = inputs[0], constants.get("shape")
        if shape is None or (x is None and not self.conv):
            return (None,)
        weight = [int(side) for side in shape]
        if x is None:
            x = [None] * len(weight)
        return (
            self.output_shape(x, weight, attributes) if len(x) >= (len(weight) if self.conv else 1) else None,
        )

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = "".join(
            (
                CONSTANTS,
                GRID_OF_BLOCKS if self.blocks else GRID_OF_ELEMENTS,
                BYTES if self.int8 else FLOATS,
                FILL_THE_GRID,
                DENSE_WEIGHT[self.family.partition("Int8")[0].removesuffix("Add")],
                _X_TO_BYTES[self.x_form] if self.int8 else "",
                _CONV_ADD if self.adds else _CONV if self.conv else _MATMUL_INT8 if self.int8 else _MATMUL,
                ACTIVATION_BODIES[self.activation],
            )
        )
        return self.function_in(opset, body)

    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[NDArray[np.float32]]:
        """Return y computed by NumPy, in double precision once x is quantised (where it is).

        Args:
            inputs: arrays in the order of ``inputs``.
            attributes: values by name, as on the node (``layout`` a text).

        Raises:
            ModelError: the packed weight is malformed.
        """
        arrays = self.by_name(inputs)
        if self.int8:
            return (reference.evaluate_int8(arrays, attributes, self.activation),)
        return (reference.evaluate(arrays, attributes, self.activation, conv=self.conv),)


@cache
def operators() -> Mapping[str, Operator]:
    """Return every operator by name."""
    linear = (LinearOp(family, activation) for family in FAMILIES for activation in ACTIVATIONS)
    ops: tuple[Operator, ...] = (
        *linear,
        *recurrent_operators(),
        *plane_operators(),
        *transformer_operators(),
        *algebra_operators(),
    )
    return {op.name: op for op in ops}


# ---- function bodies ------------------------------------------------------------------------------------
# The two rules of ``sparsecc.emit.decoding`` hold here too.

_MATMUL = """
  product = MatMul (x, weight_t)
  z = Add (product, bias)
"""

_X_TO_BYTES: Mapping[str, str] = {
    "": """
  x_int8, x_scale, x_zero_point = DynamicQuantizeLinear (x)
""",
    "Static": """
  x_int8 = QuantizeLinear (x, x_scale, x_zero_point)
""",
    "Bytes": """
  x_int8 = Identity (x)
""",
}

# The grid is int8 here. The scales are multiplied with each other first, which onnxruntime can then fuse.
_MATMUL_INT8 = """
  product = MatMulInteger (x_int8, weight_t, x_zero_point)
  exact = Cast <to = 1> (product)
  product_scale = Mul (x_scale, scales)
  real_product = Mul (exact, product_scale)
  z = Add (real_product, bias)
"""

_CONV = """
  z = Conv <strides: ints = @strides, pads: ints = @pads, dilations: ints = @dilations, group: int = @group>
    (x, weight, bias)
"""

_CONV_ADD = _CONV.replace("z =", "alone =") + "  z = Add (alone, residual)\n"
