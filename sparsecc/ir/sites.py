"""Linear operators with a constant weight, found and seen as matrices ``[N outputs, K inputs]``."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import PassError, SpecError
from sparsecc.ir.geometry import ConvGeometry, conv_geometry
from sparsecc.ir.mapped import Scratch, array_of, is_mapped, release
from sparsecc.ir.quantized import (
    INTEGER_OPERATORS,
    WeightScale,
    data_input,
    dequantized_scale,
    operator_scale,
)
from sparsecc.ir.slots import Slot, Tensor
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.ir.trace import UNPACKS_KEY, RefusedError, Traced, all_readers, refuse_matmul, trace_back

__all__ = ["Site", "find_sites", "name_matches"]

SiteOp = Literal["MatMul", "Gemm", "Conv", "LSTM", "GRU"]
Scope = Literal["main", "subgraph", "function"]

_DTYPES = (
    onnx_ir.DataType.FLOAT,
    onnx_ir.DataType.FLOAT16,
    onnx_ir.DataType.BFLOAT16,
    onnx_ir.DataType.DOUBLE,
)
_LINEAR = {("", "MatMul"), ("", "Gemm"), ("", "Conv")}
_WITHOUT_VIEW = {
    ("", "ConvTranspose"): "ConvTranspose is not supported yet",
    ("", "Einsum"): "Einsum is not supported: export it as MatMul",
    ("", "RNN"): "RNN is not supported yet",
    (
        "",
        "ConvInteger",
    ): "ConvInteger is not supported: quantise convolutions with QuantizeLinear around them",
    ("com.microsoft", "MatMulNBits"): "weights of less than 8 bits in blocks along K are not supported",
    ("com.microsoft", "MatMulBnb4"): "weights of less than 8 bits in blocks along K are not supported",
    ("com.microsoft", "DynamicQuantizeLSTM"): "quantised recurrent weights are not supported",
    ("com.microsoft", "FusedMatMul"): "fused by onnxruntime: start from the model before its optimizer",
    ("com.microsoft", "FusedGemm"): "fused by onnxruntime: start from the model before its optimizer",
    ("com.microsoft", "FusedConv"): "fused by onnxruntime: start from the model before its optimizer",
    ("com.microsoft", "Attention"): "fused by onnxruntime: start from the model before its optimizer",
}


def name_matches(match: str, name: str) -> bool:
    """Return whether ``match`` selects ``name``.

    It is a glob over the whole name, or ``re:`` and a regular expression searched anywhere in it.

    Raises:
        SpecError: the regular expression does not compile.
    """
    if not match.startswith("re:"):
        return fnmatch.fnmatchcase(name, match)
    try:
        return re.search(match[3:], name) is not None
    except re.error as error:
        raise SpecError(f"match {match!r} is no regular expression: {error}") from None


@dataclass(frozen=True, eq=False)
class Site:
    """One constant weight, however many nodes read it, as a matrix whose columns are the reduction axis.

    A site is good until its graph changes; look for sites again after a rewrite.

    Attributes:
        name: unique in the model: name of the first node that reads the weight (unnamed: of its output); in a
            function body ``function/`` goes before it, and ``.W`` or ``.R`` after it for LSTM and GRU.
        op: operator of the first node; of one that computes on integers, what it computes.
        nodes: all readers, in graph order; they agree on ``shape``, ``groups`` and orientation.
        weight: the value that holds the constant: an initializer or the output of a Constant node.
            Identity, Transpose and DequantizeLinear may stand between it and the nodes.
        shape: (N, K). Gemm and MatMul: outputs, inputs. Conv: Cout, Cin/groups * kernel, in the order
            (cin, kh, kw). LSTM and GRU: directions * gates * hidden, inputs (W) or hidden (R).
        transposed: whether the constant is stored ``[K, N]``.
        groups: of a convolution, otherwise 1.
        input: what is multiplied with the weight, for the first node, before quantisation; None for R, and where
            the model holds only the quantised form.
        conv: geometry of the first node if it is a Conv. Tied nodes may differ: see ``conv_geometry``.
        scope: which kind of graph the first node is in.
        quantization: how the integers of the constant become real weights; None for floating-point constants.
    """

    name: str
    op: SiteOp
    nodes: tuple[onnx_ir.Node, ...]
    weight: onnx_ir.Value
    shape: tuple[int, int]
    transposed: bool
    groups: int
    input: onnx_ir.Value | None
    conv: ConvGeometry | None
    scope: Scope
    quantization: WeightScale | None = None

    @property
    def node(self) -> onnx_ir.Node:
        """The first reader."""
        return self.nodes[0]

    @property
    def weight_name(self) -> str:
        """Name of the constant."""
        return self.weight.name or ""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the constant as stored."""
        return tuple(self._slot.get().shape.numpy())

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy type of the constant: float32, float16, float64, ml_dtypes' bfloat16; int8 or uint8 if quantised."""
        return np.dtype(self._slot.get().dtype.numpy())

    @property
    def input_name(self) -> str:
        """Name of ``input``, empty if there is none."""
        return (self.input.name or "") if self.input is not None else ""

    @property
    def in_main_graph(self) -> bool:
        """Whether all readers are in the main graph, not inside If, Loop, Scan or a function."""
        return self.scope == "main" and all(node.graph is self.node.graph for node in self.nodes)

    @property
    def depthwise(self) -> bool:
        """Whether each group of a convolution has one input channel."""
        return self.groups > 1 and self.weight_shape[1] == 1

    @property
    def kernel_size(self) -> int:
        """Columns of the weight per input channel: entries of a convolution's kernel, else 1."""
        return 1 if self.conv is None else math.prod(self.conv.kernel_shape)

    def numpy(self) -> NDArray[Any]:
        """Return the real weight ``[N, K]``, C-contiguous; may be read-only (copy to change).

        In the dtype of the constant, float32 where that is quantised.
        """
        stored = self._slot.get().numpy()
        if self.quantization is not None:
            stored = self.quantization.dequantize(stored)
        return self._as_matrix(stored)

    def codes(self) -> NDArray[np.int32]:
        """Return the integers ``[N, K]`` of a quantised weight, less the zero point.

        Raises:
            PassError: the weight is not quantised.
        """
        return self._as_matrix(self._scale.shifted(self._slot.get().numpy()))

    def output_scales(self) -> NDArray[np.float32] | None:
        """Return the scale of each output, ``[N]``, of a quantised weight; None if they vary along K.

        Raises:
            PassError: the weight is not quantised.
        """
        quantization, rank = self._scale, len(self.weight_shape)
        if quantization.scale.size == 1:
            return np.full(self.shape[0], quantization.scale.reshape(()), np.float32)
        return quantization.scale if quantization.axis == (rank - 1 if self.transposed else 0) else None

    def replace(self, weight: NDArray[Any], scratch: Scratch | None = None) -> None:
        """Store ``weight [N, K]`` in the layout and dtype of the constant; copies of the model keep theirs.

        A quantised constant keeps its scales; weights that ``numpy`` gave get their own integers back, and zeros
        are exact. With ``scratch`` a constant that was in a file is kept in one again, not in memory.

        Raises:
            PassError: the shape is another one.
            UsageError: there is no space for it in the file.
        """
        if weight.shape != self.shape:
            raise PassError(f"site {self.name!r}: new weight has shape {weight.shape}, expected {self.shape}")
        old = self._slot.get()
        stored = weight.T if self.transposed else weight.reshape(self.weight_shape)
        if self.quantization is not None:
            stored = self.quantization.quantize(stored, self.dtype)
        stored = np.array(stored, self.dtype, order="C")  # a copy: the caller's array must not be the model's
        held = array_of(old)
        if scratch is not None and held is not None and is_mapped(held):
            stored = scratch.keep(stored)
        self._slot.set(
            onnx_ir.Tensor(
                stored,
                dtype=old.dtype,
                name=old.name,
                doc_string=old.doc_string,
                metadata_props=dict(old.metadata_props),
            )
        )

    def release(self) -> None:
        """Let the constant leave memory if it is in a file; it is read again when it is next used."""
        held = array_of(self._slot.get())
        if held is not None:
            release(held)

    def _as_matrix(self, stored: NDArray[Any]) -> NDArray[Any]:
        if self.transposed:
            return np.ascontiguousarray(stored.T)
        return np.ascontiguousarray(stored).reshape(self.shape)

    @property
    def _scale(self) -> WeightScale:
        if self.quantization is None:
            raise PassError(f"site {self.name!r} is not quantised")
        return self.quantization

    @property
    def _slot(self) -> Slot:
        producer = self.weight.producer()
        return Slot(self.weight) if producer is None else Slot(producer, "value")


@dataclass(frozen=True)
class _View:
    """How one node sees a constant; uses of a tied weight must agree on all of it."""

    kind: Literal["linear", "conv", "recurrent"]
    shape: tuple[int, int]
    transposed: bool
    groups: int = 1
    scale_key: tuple[bytes, bytes, int] | None = None


@dataclass(frozen=True, eq=False)
class _Use:
    node: onnx_ir.Node
    index: int
    scope: Scope
    name: str


def find_sites(model: onnx_ir.Model) -> tuple[list[Site], list[tuple[str, str]]]:
    """Return the sites of all graphs in order, and (name, reason) for every linear operator that is none."""
    refused: list[tuple[str, str]] = []
    uses: dict[onnx_ir.Value, list[_Use]] = {}
    for use in _candidates(model):
        try:
            uses.setdefault(_constant_behind(use).constant, []).append(use)
        except RefusedError as error:
            refused.append((use.name, str(error)))
    sites: list[Site] = []
    taken: dict[str, int] = {}
    for weight, readers in uses.items():
        try:
            site = _site(weight, readers)
        except RefusedError as error:
            refused += [(use.name, str(error)) for use in readers]
            continue
        sites.append(_uniquely_named(site, taken))
    return sites, refused


def _uniquely_named(site: Site, taken: dict[str, int]) -> Site:
    count = taken[site.name] = taken.get(site.name, 0) + 1
    if count == 1:
        return site
    return Site(**{**site.__dict__, "name": f"{site.name}#{count}"})


def _candidates(model: onnx_ir.Model) -> Iterator[_Use]:
    """Yield each weight operand of each linear node (two for LSTM and GRU) in graph order.

    The bodies of our own operators are not looked into: they are what a packed site means, not more sites. Nor are
    nodes that unpack weights.
    """
    functions = [f for f in model.functions.values() if f.domain != DOMAIN]
    roots = [(model.graph, "")] + [(f.graph, f"{f.name}/") for f in functions]
    for root, prefix in roots:
        for node in onnx_ir.traversal.RecursiveGraphIterator(root):
            if UNPACKS_KEY in node.metadata_props:
                continue
            scope: Scope = "function" if prefix else "main" if node.graph is root else "subgraph"
            base = prefix + (node.name or (node.outputs[0].name if node.outputs else "") or node.op_type)
            key = (node.domain, node.op_type)
            if key in _WITHOUT_VIEW or key in _LINEAR:
                yield _Use(node, 1, scope, base)
            elif key in INTEGER_OPERATORS:
                yield _Use(node, INTEGER_OPERATORS[key].weight, scope, base)
            elif node.domain == "" and node.op_type in ("LSTM", "GRU"):
                yield _Use(node, 1, scope, base + ".W")
                yield _Use(node, 2, scope, base + ".R")


def _constant_behind(use: _Use) -> Traced:
    """Return the constant that a weight operand reads, with what stands in between."""
    node = use.node
    if reason := _WITHOUT_VIEW.get((node.domain, node.op_type)):
        raise RefusedError(reason)
    try:
        return trace_back(node.inputs[use.index] if len(node.inputs) > use.index else None)
    except RefusedError:
        if node.op_type == "MatMul":
            refuse_matmul(node)
        raise


def _scale_of(use: _Use, tensor: Tensor, traced: Traced) -> WeightScale | None:
    """How the integers become real numbers, or None for a floating-point weight."""
    if (use.node.domain, use.node.op_type) in INTEGER_OPERATORS:
        if traced.dequantize is not None or traced.flipped:
            raise RefusedError("integer weight goes through other nodes: fold constants first (pass tidy)")
        return operator_scale(use.node, tensor)
    return None if traced.dequantize is None else dequantized_scale(traced.dequantize, tensor)


def _operator(node: onnx_ir.Node) -> str:
    """The floating-point operator that ``node`` computes."""
    spec = INTEGER_OPERATORS.get((node.domain, node.op_type))
    return node.op_type if spec is None else spec.op


def _site(weight: onnx_ir.Value, readers: list[_Use]) -> Site:
    producer = weight.producer()
    tensor = (Slot(weight) if producer is None else Slot(producer, "value")).get()
    known = {(use.node, use.index) for use in readers}
    for node, index in all_readers(weight):
        if (node, index) not in known:
            named = f" {node.name!r}" if node.name else ""
            raise RefusedError(f"weight {weight.name!r} is also read by {node.op_type}{named}")
    traced = [_constant_behind(use) for use in readers]
    scales = [_scale_of(use, tensor, found) for use, found in zip(readers, traced, strict=True)]
    views = [
        _view(use, tensor, found.flipped, scale)
        for use, found, scale in zip(readers, traced, scales, strict=True)
    ]
    if len(set(views)) > 1:
        names = ", ".join(sorted({use.name for use in readers}))
        raise RefusedError(f"weight {weight.name!r} is shared by {names}, which see it differently")
    first, view = readers[0], views[0]
    return Site(
        name=first.name,
        op=_operator(first.node),  # type: ignore[arg-type]
        nodes=tuple(dict.fromkeys(use.node for use in readers)),
        weight=weight,
        shape=view.shape,
        transposed=view.transposed,
        groups=view.groups,
        input=None if view.kind == "recurrent" and first.index != 1 else data_input(first.node),
        conv=conv_geometry(first.node, tuple(tensor.shape.numpy())) if view.kind == "conv" else None,
        scope=first.scope,
        quantization=scales[0],
    )


def _view(use: _Use, tensor: Tensor, flipped: bool, scale: WeightScale | None) -> _View:
    view = _shape_view(use, tensor, flipped, scale is not None)
    return view if scale is None else replace(view, scale_key=scale.key)


def _shape_view(use: _Use, tensor: Tensor, flipped: bool, quantised: bool) -> _View:
    shape = tuple(tensor.shape.numpy())
    if not quantised and tensor.dtype not in _DTYPES:
        raise RefusedError(f"weight has type {tensor.dtype.name}: only floating-point weights are supported")
    if 0 in shape:
        raise RefusedError(f"weight of shape {list(shape)} is empty")
    if any(attr.is_ref() for attr in use.node.attributes.values()):
        raise RefusedError("attributes come from the caller of the function: inline the function")
    operator = _operator(use.node)
    if operator in ("MatMul", "Gemm"):
        return _linear_view(use.node, shape, flipped)
    if flipped:
        raise RefusedError(
            "weight is a constant that goes through Transpose: fold constants first (pass tidy)"
        )
    if operator == "Conv":
        return _conv_view(use.node, shape)
    if len(shape) != 3:
        raise RefusedError(f"weight of {use.node.op_type} must have rank 3, has {len(shape)}")
    return _View("recurrent", (shape[0] * shape[1], shape[2]), False)


def _linear_view(node: onnx_ir.Node, shape: tuple[int, ...], flipped: bool) -> _View:
    if len(shape) != 2:
        raise RefusedError(
            f"weight has rank {len(shape)}; only matrices are supported, not batches or vectors"
        )
    stored_kn = _operator(node) == "MatMul" or not _flag(node, "transB")
    if _operator(node) == "Gemm" and _flag(node, "transA"):
        raise RefusedError("Gemm with transA=1 reads its input transposed: not supported")
    transposed = stored_kn != flipped
    return _View("linear", (shape[1], shape[0]) if transposed else (shape[0], shape[1]), transposed)


def _conv_view(node: onnx_ir.Node, shape: tuple[int, ...]) -> _View:
    groups = node.attributes.get_int("group", 1) or 0
    if len(shape) < 3 or groups < 1 or shape[0] % groups:
        raise RefusedError(f"Conv weight of shape {list(shape)} does not fit group={groups}")
    for name, length in (("strides", 1), ("dilations", 1), ("pads", 2)):
        if name in node.attributes and len(node.attributes[name].as_ints()) != length * (len(shape) - 2):
            raise RefusedError(f"Conv has {name} of the wrong length for a weight of shape {list(shape)}")
    return _View("conv", (shape[0], math.prod(shape[1:])), False, groups)


def _flag(node: onnx_ir.Node, name: str) -> bool:
    attr = node.attributes.get(name)
    return attr is not None and attr.as_int() != 0
