"""The part of a function body that turns a packed weight into a dense one, in ONNX's text form."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "BYTES",
    "CONSTANTS",
    "DENSE_WEIGHT",
    "FILL_THE_GRID",
    "FLOATS",
    "GRID_OF_BLOCKS",
    "GRID_OF_ELEMENTS",
    "packed_matrix",
]

# Two rules. The forms avoid what changed between opsets: no axes attributes (Unsqueeze, ReduceSum, Squeeze),
# no Split, and ReduceProd without axes. And no shape depends on data (no Compress, no NonZero): since 1.27
# onnxruntime folds a constant node only if its output size, at most 1 GiB, is known beforehand.

CONSTANTS = """
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
GRID_OF_ELEMENTS = """
  cells = ReduceProd <keepdims = 1> (shape)
  grid_shape = Identity (shape)
  one_unit = Identity (one)
"""

GRID_OF_BLOCKS = """
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

# Values as they are multiplied: float32, whatever they are stored in, or bytes.
FLOATS = """
  numbers = Cast <to = 1> (values)
  nothing = ConstantOfShape <value = float[1] {0}> (one_unit)
"""

BYTES = """
  numbers = Identity (values)
  nothing = ConstantOfShape <value = int8[1] {0}> (one_unit)
"""

# For every token the position it ends at and how many values were stored before it; from these, for every
# cell, which stored value (block) fills it. A token that stores nothing writes to a cell beyond the grid,
# and -1 finds the zeros appended to the values.
FILL_THE_GRID = """
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
  choices = Concat <axis = 0> (numbers, nothing)
  grid = Gather <axis = 0> (choices, owner_of_cell)
"""

# From the grid, [N, K] (the weight's own shape for a Conv) or [rows, columns, R, C] with blocks, to what
# MatMul or Conv reads. What a block holds beyond the edge of the weight is cut off.
DENSE_WEIGHT: Mapping[str, str] = {
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


def packed_matrix(name: str) -> str:
    """Return the text that makes ``<name>_weight`` ``[N, K]`` of ``<name>_values`` ``[blocks, R, C]``,
    ``<name>_indices`` and ``<name>_shape``; single weights are blocks of 1 by 1. Needs ``CONSTANTS``.
    """
    text = GRID_OF_BLOCKS + FLOATS + FILL_THE_GRID + DENSE_WEIGHT["BlockSparseConv"]
    own = {"values", "indices", "shape", *re.findall(r"^  (\w+) =", text, re.MULTILINE)}
    return re.sub(r"\w+", lambda word: f"{name}_{word[0]}" if word[0] in own else word[0], text)
