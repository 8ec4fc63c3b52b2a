"""Function bodies of attention, in ONNX's text form.

Sizes are written out, not left to Reshape's -1, which an empty batch would make ambiguous.
"""

from __future__ import annotations

from sparsecc.ir.ops_transformer import AttentionVariant

__all__ = ["FIRST_WITH_NUM_OUTPUTS", "attention_body"]

FIRST_WITH_NUM_OUTPUTS = 18
"""Version of the default domain from which Split into equal parts must say how many."""


def attention_body(variant: AttentionVariant, opset: int) -> str:
    """Return the body of ``variant`` in version ``opset`` of the default domain."""
    if variant.kind:
        return _grouped_body(variant)
    equal = ", num_outputs = 3" if opset >= FIRST_WITH_NUM_OUTPUTS else ""
    split = f"  q, k, v = Split <axis = -1{equal}> (qkv)\n" if variant.packed else ""
    add = "  masked = Add (scaled, mask)\n" if variant.mask else "  masked = Identity (scaled)\n"
    return split + _HEADS + add + _CONTEXT


_HEADS = """
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  same = Constant <value = int64[2] {0, 0}> ()
  heads_scalar = Constant <value_int: int = @heads> ()
  heads_one = Reshape (heads_scalar, one)
  q_shape = Shape (q)
  width = Slice (q_shape, two, three)
  size = Div (width, heads_one)
  split_shape = Concat <axis = 0> (same, heads_one, size)
  q_split = Reshape (q, split_shape)
  k_split = Reshape (k, split_shape)
  v_split = Reshape (v, split_shape)
  q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
  k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
  v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
  scores = MatMul (q_heads, k_heads)
  factor = Constant <value_float: float = @scale> ()
  scaled = Mul (scores, factor)
"""

_CONTEXT = """
  weights = Softmax <axis = -1> (masked)
  context = MatMul (weights, v_heads)
  rows = Transpose <perm = [0, 2, 1, 3]> (context)
  joined_shape = Concat <axis = 0> (same, width)
  y = Reshape (rows, joined_shape)
"""

_SHARED_START = """
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  heads_scalar = Constant <value_int: int = @heads> ()
  kv_scalar = Constant <value_int: int = @kv_heads> ()
  heads_one = Reshape (heads_scalar, one)
  kv_one = Reshape (kv_scalar, one)
  group = Div (heads_one, kv_one)
"""

_SHARED_PACKED = """
  shape = Shape (qkv)
  all_width = Slice (shape, two, three)
  twice = Add (kv_one, kv_one)
  all_heads = Add (heads_one, twice)
  size = Div (all_width, all_heads)
  width = Mul (heads_one, size)
  kv_width = Mul (kv_one, size)
  widths = Concat <axis = 0> (width, kv_width, kv_width)
  q, k, v = Split <axis = -1> (qkv, widths)
"""

_SHARED_THREE = """
  shape = Shape (q)
  width = Slice (shape, two, three)
  size = Div (width, heads_one)
"""

_SHARED_HEADS = """
  q_cut = Concat <axis = 0> (zero, zero, heads_one, size)
  kv_cut = Concat <axis = 0> (zero, zero, kv_one, size)
  q_split = Reshape (q, q_cut)
  k_split = Reshape (k, kv_cut)
  v_split = Reshape (v, kv_cut)
  q_plain = Transpose <perm = [0, 2, 1, 3]> (q_split)
  k_plain = Transpose <perm = [0, 2, 1, 3]> (k_split)
  v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
"""

_SHARED_ROTARY = """
  half = Div (size, two)
  halves = Concat <axis = 0> (half, half)
"""

_TURN = """
  {x}_low, {x}_high = Split <axis = -1> ({x}_plain, halves)
  {x}_minus = Neg ({x}_high)
  {x}_other = Concat <axis = -1> ({x}_minus, {x}_low)
  {x}_by_cos = Mul ({x}_plain, cos)
  {x}_by_sin = Mul ({x}_other, sin)
  {x}_heads = Add ({x}_by_cos, {x}_by_sin)
"""

# The heads of q that share one of k and v stand along an axis of their own, along which k and v are broadcast.
_SHARED_END = """
  k_shape = Shape (k)
  rows = Slice (shape, one, two)
  keys = Slice (k_shape, one, two)
  q_grouping = Concat <axis = 0> (zero, kv_one, group, rows, size)
  q_grouped = Reshape (q_heads, q_grouping)
  k_turned = Transpose <perm = [0, 1, 3, 2]> (k_heads)
  k_grouped = Unsqueeze (k_turned, two)
  v_grouped = Unsqueeze (v_heads, two)
  scores = MatMul (q_grouped, k_grouped)
  factor = Constant <value_float: float = @scale> ()
  scaled = Mul (scores, factor)
  by_head = Concat <axis = 0> (zero, heads_one, rows, keys)
  by_group = Concat <axis = 0> (zero, kv_one, group, rows, keys)
  open = Reshape (scaled, by_head)
  masked = {masked}
  weights = Softmax <axis = -1> (masked)
  weights_grouped = Reshape (weights, by_group)
  context_grouped = MatMul (weights_grouped, v_grouped)
  context_shape = Concat <axis = 0> (zero, heads_one, rows, size)
  context = Reshape (context_grouped, context_shape)
  joined = Transpose <perm = [0, 2, 1, 3]> (context)
  joined_shape = Concat <axis = 0> (zero, zero, width)
  y = Reshape (joined, joined_shape)
"""


def _grouped_body(variant: AttentionVariant) -> str:
    turn = "".join(
        _TURN.format(x=x) if variant.kind == "Rotary" else f"  {x}_heads = Identity ({x}_plain)\n"
        for x in "qk"
    )
    return (
        _SHARED_START
        + (_SHARED_PACKED if variant.packed else _SHARED_THREE)
        + _SHARED_HEADS
        + _SHARED_ROTARY * (variant.kind == "Rotary")
        + turn
        + _SHARED_END.format(masked="Add (open, mask)" if variant.mask else "Identity (open)")
    )
