"""Patterns of zeros, exact-count masks and the packed weight format. Knows NumPy only, no ONNX.

A weight is always a matrix ``[N, K]``: N outputs by K inputs, the reduction running along K.
*Pattern* is about which entries are zero, *layout* is about bytes; density = kept / total and
sparsity = 1 - density.
"""

from __future__ import annotations

from sparsecc.sparse.detect import BLOCK_WORTH, GROUP_WORTH, density, detect, matches
from sparsecc.sparse.floats import FLOATS, Floats, floats_of, holds, rounded
from sparsecc.sparse.gaps import pack_gaps, unpack_gaps
from sparsecc.sparse.layout import INT8_DENSE, Layout, Values
from sparsecc.sparse.mask import Scope, keep_capped, keep_mask, keep_units
from sparsecc.sparse.pattern import Pattern
from sparsecc.sparse.quantized import QuantizedTensor, ScaleMethod, quantize_rows
from sparsecc.sparse.stack import stack_outputs
from sparsecc.sparse.tensor import LAYOUT_VERSION, SparseTensor

__all__ = [
    "BLOCK_WORTH",
    "FLOATS",
    "GROUP_WORTH",
    "INT8_DENSE",
    "LAYOUT_VERSION",
    "Floats",
    "Layout",
    "Pattern",
    "QuantizedTensor",
    "ScaleMethod",
    "Scope",
    "SparseTensor",
    "Values",
    "density",
    "detect",
    "floats_of",
    "holds",
    "keep_capped",
    "keep_mask",
    "keep_units",
    "matches",
    "pack_gaps",
    "quantize_rows",
    "rounded",
    "stack_outputs",
    "unpack_gaps",
]
