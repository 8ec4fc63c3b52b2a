"""Weights that are packed in the file and become dense when a session starts.

Standard operators make the dense weight of packed constants and give it to the product that was there. onnxruntime
computes what depends on constants only once, as it loads the model, so the file is small and the product as fast as
before. Without its optimisations (``ORT_DISABLE_ALL``) the weight is made anew in every run.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.ir.trace import UNPACKS_KEY
from sparsecc.passes.factor.base import FactorPass, Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.prune.gram import Matrix
from sparsecc.pm import PassContext, PassReport, select_sites

__all__ = ["OPSET", "PackedForm", "PackedPass", "Unpacking", "packed_rows"]

#: Oldest operator set with Einsum, CumSum on integers and Slice by inputs.
OPSET = 12

#: Factors and values are stored in it.
HALF = np.dtype(np.float16)

_BITS = (np.arange(256)[:, None] >> np.arange(8)) & 1


def packed_rows(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return the rows of ``bits [..., columns]`` packed, lowest bit first, each row filled up to whole bytes."""
    return np.packbits(bits, axis=-1, bitorder="little")


class Unpacking:
    """Adds the nodes that make a weight to a chain, as float32, and the product with it.

    Matrices are in the order that the product reads: ``[K, N]``, for a convolution ``[N, K]``.

    Args:
        chain: of the site.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.rows, self.columns = chain.site.shape if chain.site.op == "Conv" else chain.site.shape[::-1]

    def stored(self, matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return ``matrix [N, K]`` in the order of rows and columns of the constant."""
        return matrix if self.chain.site.op == "Conv" else matrix.T

    def node(
        self,
        op: str,
        inputs: Sequence[onnx_ir.Value],
        name: str,
        dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT,
        **attributes: int | str,
    ) -> onnx_ir.Value:
        """Add a node that depends on constants only."""
        value = self.chain.node(op, inputs, name, attributes, dtype)
        made = value.producer()
        assert made is not None, "just made"
        made.metadata_props.clear()  # it is no part of what computes the site
        made.metadata_props[UNPACKS_KEY] = ""
        self.chain.shorten(value)
        return value

    def small(self, array: NDArray[Any]) -> onnx_ir.Value:
        """Return a constant that all layers share which need the same."""
        digest = hashlib.sha256(array.tobytes() + f"{array.dtype}{array.shape}".encode()).hexdigest()
        return self.chain.shared(array, f"sparsecc.{digest[:8]}")

    def floats(self, value: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """Return ``value`` as float32."""
        return self.node("Cast", [value], name, to=onnx_ir.DataType.FLOAT.value)

    def integers(self, value: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """Return ``value`` as int32."""
        return self.node("Cast", [value], name, onnx_ir.DataType.INT32, to=onnx_ir.DataType.INT32.value)

    def signs(self, packed: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """Return +1 and -1 for the bits of bytes ``[...]``, ``[..., 8]``."""
        table = self.chain.shared((2 * _BITS - 1).astype(np.float32), "sparsecc.signs")
        return self.node("Gather", [table, self.integers(packed, f"{name}.bytes")], name, axis=0)

    def ones(self, packed: onnx_ir.Value, name: str) -> onnx_ir.Value:
        """Return int32 1 and 0 for the bits of bytes ``[...]``, ``[..., 8]``."""
        table = self.chain.shared(_BITS.astype(np.int32), "sparsecc.bits")
        inputs = [table, self.integers(packed, f"{name}.bytes")]
        return self.node("Gather", inputs, name, onnx_ir.DataType.INT32, axis=0)

    def reshape(
        self,
        value: onnx_ir.Value,
        shape: Sequence[int],
        name: str,
        dtype: onnx_ir.DataType = onnx_ir.DataType.FLOAT,
    ) -> onnx_ir.Value:
        """Return ``value`` in another shape."""
        wanted = self.small(np.array(shape, np.int64))
        return self.node("Reshape", [value, wanted], name, dtype)

    def head(self, value: onnx_ir.Value, length: int, axis: int, name: str) -> onnx_ir.Value:
        """Return the first entries along an axis."""
        ends = [self.small(np.array([item], np.int64)) for item in (0, length, axis)]
        return self.node("Slice", [value, *ends], name)

    def by_bytes(self, right: Matrix) -> NDArray[np.float16]:
        """Return a factor ``[r, columns]`` as ``[r, bytes, 8]``, filled up with zeros, in half precision."""
        whole = -(-self.columns // 8)
        filled = np.pad(right, ((0, 0), (0, 8 * whole - self.columns)))
        return filled.reshape(len(right), whole, 8).astype(HALF)

    def finish(self, weight: onnx_ir.Value) -> None:
        """Multiply with ``weight``, ``[rows, bytes, 8]``, whose last bytes may not be full, instead of the site."""
        site = self.chain.site
        if self.columns % 8:
            weight = self.reshape(weight, [self.rows, -1], "whole")
            weight = self.head(weight, self.columns, 1, "cut")
        shape = site.weight_shape if site.op == "Conv" else (self.rows, self.columns)
        self.multiply(self.reshape(weight, shape, "weight"))

    def multiply(self, weight: onnx_ir.Value) -> None:
        """Multiply with ``weight`` instead of the site."""
        chain = self.chain
        if chain.dtype != np.float32:
            stored = onnx_ir.DataType.from_numpy(chain.dtype)
            weight = self.node("Cast", [weight], "typed", stored, to=stored.value)
        op, attributes = ("Conv", chain.geometry) if chain.site.op == "Conv" else ("MatMul", ())
        chain.finish(chain.node(op, [chain.source, weight], "product", attributes))


@dataclass(frozen=True)
class PackedForm(Form):
    """A weight of few bits; its values are rounded to what the file stores as they are fitted.

    Attributes:
        itemsize: bytes of a value of the site.
    """

    itemsize: int

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits that it stores, what all layers share left out."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """N and K."""

    @property
    def numbers(self) -> int:
        """How many values of the site's type take as many bits."""
        return -(-self.bits // (8 * self.itemsize))

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Return what its constants take in a file, without what all layers share."""
        return -(-self.bits // 8)

    @property
    def macs(self) -> int:
        """Multiplications per row: those of the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Bits that it stores for each weight."""
        return self.bits / (self.shape[0] * self.shape[1])

    def astype(self, dtype: np.dtype[np.generic]) -> Self:
        """Return itself: its values have the type they are stored in."""
        return self


@dataclass(frozen=True)
class PackedPass(FactorPass):
    """Base of passes that pack weights for the file only."""

    size_bound: ClassVar[bool] = True
    multiple: ClassVar[int] = 1  # type: ignore[misc]  # no option here: nothing is aligned to a kernel

    param_ratio: float = 0.25

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Pack every matching site in place; each one left alone is reported with the reason."""
        if model.opset >= OPSET:
            return super().run(model, ctx)
        report = PassReport(self.name)
        for site in select_sites(model, self.match, report):
            report.skip(site.name, f"the model has opset {model.opset}: convert it to {OPSET} or later first")
        return report

    def solve(
        self, model: Model, tasks: Sequence[Task], ctx: PassContext, report: PassReport
    ) -> Iterator[tuple[Task, Fitted]]:
        """Yield the forms of the sites, or none where all of them save less than the tables that they share take."""
        saved = shared = 0
        for task in tasks:
            if task.cost is None:  # nothing is measured: all are to be packed
                break
            dense = task.site.shape[0] * task.site.shape[1] * task.site.dtype.itemsize
            packed = task.outline.bytes(task.site.dtype.itemsize, custom_ops=False)
            saved += dense - packed
            shared = max(shared, task.cost.bytes - (task.cost.dense_bytes - dense) - packed)
        if saved < shared:
            for task in tasks:
                report.skip(
                    task.site.name,
                    f"not smaller: all sites together save {saved} bytes, the tables they share take {shared}",
                )
            return
        yield from super().solve(model, tasks, ctx, report)
