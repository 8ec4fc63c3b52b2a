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
from typing import TYPE_CHECKING, Any

from sparsecc.emit import reference
from sparsecc.emit.operator import Attribute, Dim, Input, Operator, Output
from sparsecc.ir.sparse_ops import ACTIVATIONS, FAMILIES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LinearOp", "operators"]


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
        return self.family.endswith("Conv")

    @property
    def int8(self) -> bool:
        """Whether weights are int8 with a scale per output, and ``x`` is quantised inside."""
        return self.family.endswith("Int8")

    @property
    def blocks(self) -> bool:
        """Whether its layout is RxC; otherwise ``unstructured`` or N:M."""
        return self.family.startswith("Block")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order. Everything but ``x`` must be a constant initializer."""
        x_shape = "[B,C,H,W] or [B,C,L]" if self.conv else "[...,K]"
        shape = "[Cout,Cin/group,kh,kw] or [Cout,Cin/group,kw]" if self.conv else "[N,K]"
        values = "int8" if self.int8 else "float32"
        scales = Input("scales", "float32", "[N]", "what the values of each output are to be multiplied by")
        bounds = (
            Input("lo", "float32", "scalar", "lower bound of the result"),
            Input("hi", "float32", "scalar", "upper bound of the result"),
        )
        return (
            Input("x", "float32", x_shape, "the activations"),
            Input("values", values, "[blocks,R,C]" if self.blocks else "[kept]", "the kept weights"),
            Input("indices", "uint8", "[bytes]", "where they stand: the gap stream"),
            Input("shape", "int64", "[rank]", f"the dense shape of the weight: {shape}"),
            *((scales,) if self.int8 else ()),
            Input("bias", "float32", "[Cout]" if self.conv else "[N]", "added before the activation"),
            *(bounds if self.activation == "Clip" else ()),
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
        axes = len(weight) - 2
        extents = (
            _conv_extent(
                x[2 + axis],
                weight[2 + axis],
                attributes["strides"][axis],
                attributes["pads"][axis] + attributes["pads"][axes + axis],
                attributes["dilations"][axis],
            )
            for axis in range(axes)
        )
        return (x[0], weight[0], *extents)

    def output_shapes(
        self,
        inputs: Sequence[Sequence[Dim] | None],
        constants: Mapping[str, NDArray[Any]],
        attributes: Mapping[str, Any],
    ) -> tuple[tuple[Dim, ...] | None]:
        """Return the shape of y, where x and the weight's own shape are known."""
        x, shape = inputs[0], constants.get("shape")
        if x is None or shape is None:
            return (None,)
        weight = [int(side) for side in shape]
        return (
            self.output_shape(x, weight, attributes) if len(x) >= (len(weight) if self.conv else 1) else None,
        )

    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form."""
        body = "".join(
            (
                _CONSTANTS,
                _GRID_OF_BLOCKS if self.blocks else _GRID_OF_ELEMENTS,
                _FILL_THE_GRID % {"zero": "int8[1] {0}" if self.int8 else "float[1] {0}"},
                _DENSE_WEIGHT[self.family.removesuffix("Int8")],
                _CONV if self.conv else _MATMUL_INT8 if self.int8 else _MATMUL,
                _ACTIVATION_BODIES[self.activation],
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
        arrays = {item.name: array for item, array in zip(self.inputs, inputs, strict=True)}
        if self.int8:
            return (reference.evaluate_int8(arrays, attributes, self.activation),)
        return (reference.evaluate(arrays, attributes, self.activation, conv=self.conv),)


@cache
def operators() -> Mapping[str, Operator]:
    """Return every operator by name."""
    linear = (LinearOp(family, activation) for family in FAMILIES for activation in ACTIVATIONS)
    ops: tuple[Operator, ...] = (*linear,)
    return {op.name: op for op in ops}


def _conv_extent(size: Dim, kernel: int, stride: int, pad: int, dilation: int) -> Dim:
    span = dilation * (kernel - 1)
    if isinstance(size, int):
        return (size + pad - span - 1) // stride + 1
    return size if stride == 1 and pad == span else None


# ---- function bodies ------------------------------------------------------------------------------------
# Two rules. The forms avoid what changed between opsets: no axes attributes (Unsqueeze, ReduceSum, Squeeze),
# no Split, and ReduceProd without axes. And no shape depends on data (no Compress, no NonZero): since 1.27
# onnxruntime folds a constant node only if its output size, at most 1 GiB, is known beforehand.

_CONSTANTS = """
  minus_one = Constant <value = int64[1] {-1}> ()
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  fifteen = Constant <value = int64[1] {15}> ()
  sixteen = Constant <value = int64[1] {16}> ()
  one_int32 = Constant <value = int32[1] {1}> ()
  as_column = Constant <value = int64[2] {-1, 1}> ()
  corner = Constant <value = int64[2] {0, 0}> ()
  first_axis = Constant <value = int64 {0}> ()
"""

# The grid whose cells the gap stream counts: the entries of the weight, or its blocks.
_GRID_OF_ELEMENTS = """
  cells = ReduceProd <keepdims = 1> (shape)
  grid_shape = Identity (shape)
  one_unit = Identity (one)
"""

_GRID_OF_BLOCKS = """
  rank = Shape (shape)
  outputs = Slice (shape, zero, one)
  reduced = Slice (shape, one, rank)
  columns = ReduceProd <keepdims = 1> (reduced)
  values_shape = Shape (values)
  block_rows = Slice (values_shape, one, two)
  block_cols = Slice (values_shape, two, three)
  outputs_up = Add (outputs, block_rows)
  outputs_last = Sub (outputs_up, one)
  grid_rows = Div (outputs_last, block_rows)
  columns_up = Add (columns, block_cols)
  columns_last = Sub (columns_up, one)
  grid_cols = Div (columns_last, block_cols)
  cells = Mul (grid_rows, grid_cols)
  grid_shape = Concat <axis = 0> (grid_rows, grid_cols)
  padded_rows = Mul (grid_rows, block_rows)
  padded_cols = Mul (grid_cols, block_cols)
  one_unit = Concat <axis = 0> (one, block_rows, block_cols)
"""

# For every token the position it ends at and how many values were stored before it; from these, for every
# cell, which stored value (block) fills it. A token that stores nothing writes to a cell beyond the grid,
# and -1 finds the zeros appended to the values.
_FILL_THE_GRID = """
  bytes = Cast <to = 7> (indices)
  high = Div (bytes, sixteen)
  high_part = Mul (high, sixteen)
  low = Sub (bytes, high_part)
  low_column = Reshape (low, as_column)
  high_column = Reshape (high, as_column)
  pairs = Concat <axis = 1> (low_column, high_column)
  tokens = Reshape (pairs, minus_one)
  reached = CumSum (tokens, first_axis)
  position = Sub (reached, one)
  stores = Less (tokens, fifteen)
  stored = Cast <to = 6> (stores)
  stored_so_far = CumSum (stored, first_axis)
  number = Sub (stored_so_far, one_int32)
  cell = Where (stores, position, cells)
  cells_and_beyond = Add (cells, one)
  nobody = ConstantOfShape <value = int32[1] {-1}> (cells_and_beyond)
  owner_and_beyond = ScatterElements <axis = 0> (nobody, cell, number)
  owner = Slice (owner_and_beyond, zero, cells)
  owner_of_cell = Reshape (owner, grid_shape)
  nothing = ConstantOfShape <value = %(zero)s> (one_unit)
  choices = Concat <axis = 0> (values, nothing)
  grid = Gather <axis = 0> (choices, owner_of_cell)
"""

# From the grid, [N, K] (the weight's own shape for a Conv) or [rows, columns, R, C] with blocks, to what
# MatMul or Conv reads. What a block holds beyond the edge of the weight is cut off.
_DENSE_WEIGHT: Mapping[str, str] = {
    "SparseMatMul": """
  weight_t = Transpose <perm = [1, 0]> (grid)
""",
    "SparseConv": """
  weight = Identity (grid)
""",
    "BlockSparseMatMul": """
  columns_first = Transpose <perm = [1, 3, 0, 2]> (grid)
  padded_shape = Concat <axis = 0> (padded_cols, padded_rows)
  padded = Reshape (columns_first, padded_shape)
  ends = Concat <axis = 0> (columns, outputs)
  weight_t = Slice (padded, corner, ends)
""",
    "BlockSparseConv": """
  rows_first = Transpose <perm = [0, 2, 1, 3]> (grid)
  padded_shape = Concat <axis = 0> (padded_rows, padded_cols)
  padded = Reshape (rows_first, padded_shape)
  ends = Concat <axis = 0> (outputs, columns)
  matrix = Slice (padded, corner, ends)
  weight = Reshape (matrix, shape)
""",
}

_MATMUL = """
  product = MatMul (x, weight_t)
  z = Add (product, bias)
"""

# The grid is int8 here. The scales are multiplied with each other first, which onnxruntime can then fuse.
_MATMUL_INT8 = """
  x_int8, x_scale, x_zero_point = DynamicQuantizeLinear (x)
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

_ACTIVATION_BODIES: Mapping[str, str] = {
    "": "  y = Identity (z)\n",
    "Relu": "  y = Relu (z)\n",
    "LeakyRelu": "  y = LeakyRelu <alpha: float = @alpha> (z)\n",
    "Clip": "  y = Clip (z, lo, hi)\n",
    "Sigmoid": "  y = Sigmoid (z)\n",
    "Tanh": "  y = Tanh (z)\n",
    "Gelu": """
  root_two = Constant <value = float {1.4142135}> ()
  unit = Constant <value = float {1.0}> ()
  half = Constant <value = float {0.5}> ()
  scaled = Div (z, root_two)
  error = Erf (scaled)
  gate = Add (error, unit)
  gated = Mul (z, gate)
  y = Mul (gated, half)
""",
    "GeluTanh": """
  cubic = Constant <value = float {0.044715}> ()
  root = Constant <value = float {0.7978846}> ()
  unit = Constant <value = float {1.0}> ()
  half = Constant <value = float {0.5}> ()
  squared = Mul (z, z)
  cubed = Mul (squared, z)
  bent = Mul (cubed, cubic)
  sum = Add (z, bent)
  inner = Mul (sum, root)
  tanh = Tanh (inner)
  gate = Add (tanh, unit)
  gated = Mul (z, gate)
  y = Mul (gated, half)
""",
    "Silu": """
  gate = Sigmoid (z)
  y = Mul (z, gate)
""",
    "HardSwish": """
  gate = HardSigmoid <alpha = 0.16666667, beta = 0.5> (z)
  y = Mul (z, gate)
""",
}
