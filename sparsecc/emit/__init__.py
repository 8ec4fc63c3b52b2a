"""What the sparse operators are, and the step that makes a rewritten model a file that runs anywhere."""

from __future__ import annotations

from sparsecc.emit.docs import operators_markdown
from sparsecc.emit.finalize import finalize
from sparsecc.emit.schema import OLDEST_OPSET, OPERATORS, Attribute, CustomOp, Input, operators
from sparsecc.emit.self_test import self_test, single_op_model
from sparsecc.ir.sparse_ops import ACTIVATIONS, DOMAIN
from sparsecc.ir.sparse_ops import DOMAIN_VERSION as OPSET_VERSION

__all__ = [
    "ACTIVATIONS",
    "DOMAIN",
    "OLDEST_OPSET",
    "OPERATORS",
    "OPSET_VERSION",
    "Attribute",
    "CustomOp",
    "Input",
    "finalize",
    "operators",
    "operators_markdown",
    "self_test",
    "single_op_model",
]
