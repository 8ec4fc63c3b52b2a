"""What the sparse operators are, and the step that makes a rewritten model a file that runs anywhere."""

from __future__ import annotations

from sparsecc.emit.docs import operators_markdown
from sparsecc.emit.finalize import finalize
from sparsecc.emit.operator import OLDEST_OPSET, Attribute, Dim, Input, Operator, Output
from sparsecc.emit.ops_algebra import AlgebraOp
from sparsecc.emit.ops_planes import QuadsOp
from sparsecc.emit.ops_recurrent import RecurrentOp
from sparsecc.emit.ops_transformer import TransformerOp
from sparsecc.emit.schema import LinearOp, operators
from sparsecc.emit.self_test import self_test, single_op_model
from sparsecc.emit.sparse_graphs import csr_constants, csr_inputs, gnn_layer_model, sparse_attention_model
from sparsecc.ir.sparse_ops import DOMAIN

__all__ = [
    "DOMAIN",
    "OLDEST_OPSET",
    "AlgebraOp",
    "Attribute",
    "Dim",
    "Input",
    "LinearOp",
    "Operator",
    "Output",
    "QuadsOp",
    "RecurrentOp",
    "TransformerOp",
    "csr_constants",
    "csr_inputs",
    "finalize",
    "gnn_layer_model",
    "operators",
    "operators_markdown",
    "self_test",
    "single_op_model",
    "sparse_attention_model",
]
