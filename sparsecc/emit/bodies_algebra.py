"""Function bodies of sparse tensor algebra, in ONNX's text form.

Memory is that of the entries, never that of the dense matrix (but for attention, whose body is the dense operator with
a mask). Each entry learns its row from the positions: ones are counted at the ends of the rows and summed up. Sizes
are written out, not left to Reshape's -1, which empty tensors would make ambiguous.
"""

from __future__ import annotations

__all__ = ["ATTENTION", "EINSUM", "EINSUM_SAMPLED", "EINSUM_VECTOR", "SOFTMAX"]

# `entries` holds how many there are.
_ROWS = """
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  last = Constant <value = int64[1] {-1}> ()
  end = Constant <value = int64[1] {9223372036854775807}> ()
  axis = Constant <value = int64 {0}> ()
  positions_64 = Cast <to = 7> (positions)
  ends = Slice (positions_64, one, end)
  row_count = Shape (ends)
  ends_ones = ConstantOfShape <value = int64[1] {1}> (row_count)
  places = Add (entries, one)
  nothing = ConstantOfShape <value = int64[1] {0}> (places)
  marks = ScatterElements <axis = 0, reduction = "add"> (nothing, ends, ends_ones)
  sums = CumSum (marks, axis)
  rows = Slice (sums, zero, entries)
  at = Unsqueeze (rows, one)
"""

_COORDINATES = """
  coordinates_64 = Cast <to = 7> (coordinates)
  entries = Shape (coordinates_64)
"""

# What each entry contributes, [..., entries, n], added up by rows.
_ADD_UP = """
  two_last = Constant <value = int64[1] {-2}> ()
  terms_shape = Shape (terms)
  batch = Slice (terms_shape, zero, two_last)
  width = Slice (terms_shape, last, end)
  batch_sizes = Concat <axis = 0> (one, batch)
  count = ReduceProd <keepdims = 1> (batch_sizes)
  flat_shape = Concat <axis = 0> (count, entries, width)
  flat = Reshape <allowzero = 1> (terms, flat_shape)
  by_entry = Transpose <perm = [1, 0, 2]> (flat)
  sum_shape = Concat <axis = 0> (row_count, count, width)
  empty = ConstantOfShape <value = float[1] {0.0}> (sum_shape)
  by_row = ScatterND <reduction = "add"> (empty, at, by_entry)
  by_batch = Transpose <perm = [1, 0, 2]> (by_row)
"""

_TERMS = """
  gathered = Gather <axis = -2> (x, coordinates_64)
  column = Unsqueeze (values, last)
  terms = Mul (column, gathered)
"""

_VECTOR_TERMS = """
  gathered = Gather <axis = -1> (x, coordinates_64)
  products = Mul (values, gathered)
  terms = Unsqueeze (products, last)
"""

EINSUM = f"""{_COORDINATES}{_ROWS}{_TERMS}{_ADD_UP}
  y_shape = Concat <axis = 0> (batch, row_count, width)
  y = Reshape <allowzero = 1> (by_batch, y_shape)
"""
"""Of ``ij,jn->in``."""

EINSUM_VECTOR = f"""{_COORDINATES}{_ROWS}{_VECTOR_TERMS}{_ADD_UP}
  y_shape = Concat <axis = 0> (batch, row_count)
  y = Reshape <allowzero = 1> (by_batch, y_shape)
"""
"""Of ``ij,j->i``."""

# Summed by a product with ones: onnxruntime's ReduceSum of nothing has another shape.
EINSUM_SAMPLED = f"""{_COORDINATES}{_ROWS}
  own_rows = Gather <axis = -2> (u, rows)
  own_columns = Gather <axis = -2> (v, coordinates_64)
  products = Mul (own_rows, own_columns)
  u_shape = Shape (u)
  depth = Slice (u_shape, last, end)
  depth_one = Concat <axis = 0> (depth, one)
  ones = ConstantOfShape <value = float[1] {{1.0}}> (depth_one)
  inner_column = MatMul (products, ones)
  inner = Squeeze (inner_column, last)
  y = Mul (values, inner)
"""
"""Of ``ij,ik,jk->ij``."""

SOFTMAX = f"""
  values_shape = Shape (values)
  from_last = Constant <value = int64[1] {{-1}}> ()
  to_end = Constant <value = int64[1] {{9223372036854775807}}> ()
  entries = Slice (values_shape, from_last, to_end)
{_ROWS}
  batch = Slice (values_shape, zero, last)
  batch_sizes = Concat <axis = 0> (one, batch)
  count = ReduceProd <keepdims = 1> (batch_sizes)
  flat_shape = Concat <axis = 0> (count, entries)
  flat = Reshape <allowzero = 1> (values, flat_shape)
  by_entry = Transpose <perm = [1, 0]> (flat)
  row_shape = Concat <axis = 0> (row_count, count)
  lowest = ConstantOfShape <value = float[1] {{-3.4028234663852886e38}}> (row_shape)
  most = ScatterND <reduction = "max"> (lowest, at, by_entry)
  own_most = Gather <axis = 0> (most, rows)
  below = Sub (by_entry, own_most)
  weights = Exp (below)
  empty = ConstantOfShape <value = float[1] {{0.0}}> (row_shape)
  weight_sums = ScatterND <reduction = "add"> (empty, at, weights)
  own_sums = Gather <axis = 0> (weight_sums, rows)
  shares = Div (weights, own_sums)
  by_batch = Transpose <perm = [1, 0]> (shares)
  y = Reshape <allowzero = 1> (by_batch, values_shape)
"""

# The mask is made of the components alone, so that it is folded where those are constant. Rows without any key get a
# mask of zeros, which keeps NaN away, and become zero in the end.
ATTENTION = f"""{_COORDINATES}{_ROWS}
  columns = Unsqueeze (coordinates_64, one)
  pairs = Concat <axis = 1> (at, columns)
  starts = Slice (positions_64, zero, last)
  lengths = Sub (ends, starts)
  rows_some = Cast <to = 9> (lengths)
  row_some = Unsqueeze (rows_some, one)
  nothing_32 = Constant <value = float {{0.0}}> ()
  never = Constant <value = float {{-inf}}> ()
  outside = Where (row_some, never, nothing_32)
  hidden = Expand (outside, shape)
  seen = ConstantOfShape <value = float[1] {{0.0}}> (entries)
  mask = ScatterND (hidden, pairs, seen)
  k_turned = Transpose <perm = [0, 1, 3, 2]> (k)
  scores = MatMul (q, k_turned)
  factor = Constant <value_float: float = @scale> ()
  scaled = Mul (scores, factor)
  masked = Add (scaled, mask)
  weights = Softmax <axis = -1> (masked)
  context = MatMul (weights, v)
  y = Where (row_some, context, nothing_32)
"""
