"""What an operator of domain ``ai.sparsecc`` declares about itself, whatever family it belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsecc.errors import UnsupportedModelError
from sparsecc.ir.sparse_ops import DOMAIN

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

__all__ = [
    "OLDEST_OPSET",
    "STORED_VALUES",
    "Attribute",
    "Attributes",
    "Constants",
    "Dim",
    "Input",
    "Operator",
    "Output",
    "Shapes",
    "window_sizes",
]

OLDEST_OPSET = 11
"""Lowest version of the default domain whose operators the function bodies need (CumSum, ScatterND)."""

STORED_VALUES = "float32/float16/bfloat16"
"""Type of an input that holds the values of a weight: any of these. The arithmetic is float32."""

Dim = int | str | None
"""One dimension: a number, a symbol, or unknown."""

Shapes = Sequence[Sequence[Dim] | None]
"""Shapes of several tensors, ``None`` where unknown."""

Constants = Mapping[str, "NDArray[Any]"]
"""Values of constant inputs by name."""

Attributes = Mapping[str, Any]
"""Values of attributes by name, as on a node."""


@dataclass(frozen=True)
class Input:
    """One input of an operator; always present on a node."""

    name: str
    dtype: str
    shape: str
    doc: str


@dataclass(frozen=True)
class Output:
    """One output of an operator; always present on a node."""

    name: str
    dtype: str
    shape: str
    doc: str


@dataclass(frozen=True)
class Attribute:
    """One attribute of an operator; always present on a node unless it is optional."""

    name: str
    type: str
    doc: str
    optional: bool = False


class Operator(ABC):
    """One operator: what a node of it holds, what comes out, and what it means in standard operators.

    The library's own list (``ort/op_table.h``) names the same operators with the same types; a test compares.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The operator's type, for instance ``BlockSparseConvRelu``."""

    @property
    def family(self) -> str:
        """The name without the fused activation; the documentation has one section a family."""
        return self.name

    @property
    @abstractmethod
    def inputs(self) -> tuple[Input, ...]:
        """All inputs, in order."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """All outputs, in order."""

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """All attributes; none, unless an operator has some."""
        return ()

    @abstractmethod
    def output_shapes(self, inputs: Shapes, constants: Constants, attributes: Attributes) -> Shapes:
        """Return the shape of every output, ``None`` where it cannot be told.

        Args:
            inputs: shapes of all inputs, ``None`` where unknown.
            constants: the values of those inputs that are constants, by input name.
            attributes: values by name, as on the node.

        Raises:
            IndexError, KeyError, TypeError, ValueError, ZeroDivisionError: the node's constants contradict
                each other.
        """

    @abstractmethod
    def function_text(self, opset: int) -> str:
        """Return the body in ONNX's text form, for a model at ``opset`` of the default domain."""

    @abstractmethod
    def reference(
        self, inputs: Sequence[NDArray[np.generic]], attributes: Mapping[str, object]
    ) -> tuple[NDArray[Any], ...]:
        """Return the outputs computed by NumPy, in double precision where the operator computes in float32.

        Args:
            inputs: arrays in the order of ``inputs``.
            attributes: values by name, as on the node.

        Raises:
            ModelError: the constants are malformed.
        """

    def by_name(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return arrays in the order of ``inputs`` by the names of the inputs."""
        return {item.name: array for item, array in zip(self.inputs, inputs, strict=True)}

    @property
    def oldest_opset(self) -> int:
        """Lowest version of the default domain that the body can be written in."""
        return OLDEST_OPSET

    def function(self, opset: int) -> ir.Function:
        """Return the body as a model-local function for a model at ``opset`` of the default domain.

        Raises:
            UnsupportedModelError: the opset is older than ``oldest_opset``.
        """
        import onnx.parser
        import onnx_ir as ir

        if opset < self.oldest_opset:
            raise UnsupportedModelError(
                f"sparse operators need opset {self.oldest_opset} or later and the model uses {opset}: "
                "convert it with onnx.version_converter first"
            )
        return ir.serde.deserialize_function(onnx.parser.parse_function(self.function_text(opset)))

    def function_in(self, opset: int, body: str) -> str:
        """Return ``body``, nodes in ONNX's text form, with the function's head around it."""
        attributes = ", ".join(item.name for item in self.attributes if not item.optional)
        inputs = ", ".join(item.name for item in self.inputs)
        outputs = ", ".join(item.name for item in self.outputs)
        head = f"{self.name} <{attributes}>" if attributes else self.name
        return f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{head} ({inputs}) => ({outputs})\n{{{body}}}\n'


def window_sizes(sizes: Sequence[Dim], kernel: Sequence[int], attributes: Attributes) -> Iterator[Dim]:
    """Yield how many windows fit along each axis of sizes ``sizes``: the rule of Conv and of pooling.

    Args:
        sizes: of the padded thing, without its padding.
        kernel: the window's own sizes.
        attributes: ``strides``, ``pads`` (all starts, then all ends) and ``dilations``.
    """
    axes = len(kernel)
    for axis, size in enumerate(sizes):
        span = attributes["dilations"][axis] * (kernel[axis] - 1)
        pad, stride = attributes["pads"][axis] + attributes["pads"][axes + axis], attributes["strides"][axis]
        if isinstance(size, int):
            yield (size + pad - span - 1) // stride + 1
        else:
            yield size if stride == 1 and pad == span else None
