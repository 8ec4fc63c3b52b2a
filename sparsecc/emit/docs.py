"""The text of ``docs/operators.md``, made from the schema by ``make docs``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsecc.emit.operator import OLDEST_OPSET, Operator
from sparsecc.emit.schema import operators
from sparsecc.ir.sparse_ops import ACTIVATIONS, DOMAIN, DOMAIN_VERSION

__all__ = ["operators_markdown"]

_FORMULAS = {
    "": "z",
    "Relu": "max(z, 0)",
    "LeakyRelu": "z below zero times `alpha`",
    "Clip": "min(max(z, `lo`), `hi`)",
    "Sigmoid": "1 / (1 + exp(-z))",
    "Tanh": "tanh(z)",
    "Gelu": "z/2 (1 + erf(z / sqrt 2))",
    "GeluTanh": "z/2 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))",
    "Silu": "z / (1 + exp(-z))",
    "HardSwish": "z max(0, min(1, z/6 + 1/2))",
}

_INTRODUCTION = f"""\
# Operators

Made by `make docs` from the declarations in `sparsecc/emit`; do not edit.

Domain `{DOMAIN}`, version {DOMAIN_VERSION}. An operator's name is its family followed by its fused
activation, for instance `BlockSparseConvRelu`. It computes `y = activation(z)` with `z = x W^T + bias` or
`z = conv(x, W) + bias`, in float32. Families ending in `Add` have `residual` in that sum too. Families ending in
`Int8` bring `x` to bytes first, as
`DynamicQuantizeLinear` of the whole tensor does, multiply bytes exactly, as `MatMulInteger` does, and scale the
sums back to float32; NaN or infinity in `x` has no such form, and the kernels then make every result NaN. Those
ending in `Int8Static` do it as `QuantizeLinear` with the scale and zero point of two more inputs (infinity saturates,
NaN becomes byte 0); those ending in `Int8Bytes` take `x` in bytes, with its scale and zero point.
Every model carries each operator it uses as a model-local function of
standard operators (opset {OLDEST_OPSET} or later), so it runs where the operator library is not loaded. The
packed weight format (gap stream, block order) is described in `runtime/csrc/include/sparsecc/c_api.h`.

All inputs but `x` (also its scale and zero point in `Int8` families, of recurrent operators `lengths` and the initial
states, and `residual`) must be constant initializers of the graph that holds the node; all attributes are
always present. This does not hold for operators without packed weights: attention, normalisation, gates and those of
sparse tensor algebra.

Names ending in `Quads` work on quad planes: bytes `[B, ceil(C / 4), H, W, 4]`, one scale and zero point a tensor,
channels beyond the last hold anything. `y` is what `DequantizeLinear`, the operator in float32 and `QuantizeLinear`
give, then clipped to `bounds`; where float32 rounds in another order, a result next to the middle between two
integers may be the other one. The columns of their weights are in the order (kh, kw, cin). These bodies need opset 13.

`SparseLSTM` and `SparseGRU` are ONNX's LSTM and GRU with the default activations, without clip, peepholes and coupled
gates, layout 0. Their further forms have `Lengths` (input `lengths` after `bias`), `State` (the initial states after
that) or both in the name, such as `SparseLSTMLengthsState`. A sequence of length 0 ends in zeros.

`SparseEinsum`, `SparseEinsumVector`, `SparseEinsumSampled`, `SparseSoftmax` and `SparseAttention` take sparse operands
as the arrays of their storage (CSR), computed or constant: positions and coordinates of one integer type, 0-based,
coordinates rising and unique in each row. The library checks them at each run, constants once, and what does not fit is
an error; bodies, which run without it, do not: of malformed arrays they make wrong results, or an error of a standard
operator. They need memory for the entries times the width of the dense operand, never for the dense matrix; only that
of `SparseAttention` is the dense operator with a mask. These bodies need opset 16, `SparseSoftmax` 18.
"""


def operators_markdown() -> str:
    """Return the page: families with their inputs and attributes, then the activations."""
    sections = [_INTRODUCTION]
    families: dict[str, Operator] = {}
    for op in operators().values():
        families.setdefault(op.family, op)  # the first one is without activation
    sections += [_family(op) for op in families.values()]
    rows = [
        (f"`{name}`" if name else "(none)", _FORMULAS[name], ", ".join(f"`{p}`" for p in ACTIVATIONS[name]))
        for name in ACTIVATIONS
    ]
    note = "`alpha` is a float attribute; `lo` and `hi` are two more inputs after `bias`, float32 scalars.\n"
    sections.append(f"## Activations\n\n{_table(('suffix', 'activation(z)', 'parameters'), rows)}\n{note}")
    return "\n".join(sections)


def _family(op: Operator) -> str:
    inputs = [(f"`{i.name}`", i.dtype, i.shape, i.doc) for i in op.inputs]
    outputs = [(f"`{o.name}`", o.dtype, o.shape, o.doc) for o in op.outputs]
    attributes = [(f"`{a.name}`", a.type, a.doc) for a in op.attributes]
    return (
        f"## {op.family}\n\n{_table(('input', 'type', 'shape', 'meaning'), inputs)}\n"
        f"{_table(('output', 'type', 'shape', 'meaning'), outputs)}\n"
        f"{_table(('attribute', 'type', 'meaning'), attributes)}"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
