"""Sparse tensor algebra and its partitioning into balanced parts. NumPy only, no ONNX."""

from __future__ import annotations

from sparsecc.algebra.calls import einsum
from sparsecc.algebra.joins import evaluate
from sparsecc.algebra.levels import Compressed, Dense, Level, Singleton, Tensor, format_levels
from sparsecc.algebra.nest import Nest, nests
from sparsecc.algebra.notation import Assignment, parse
from sparsecc.algebra.ordering import Storage
from sparsecc.algebra.readers import read_matrix_market, read_tensor, read_tns
from sparsecc.algebra.splitter import SplitTable, Walk, even_targets, find_splits, split, weighted_targets
from sparsecc.algebra.work import Plan, plan

__all__ = [
    "Assignment",
    "Compressed",
    "Dense",
    "Level",
    "Nest",
    "Plan",
    "Singleton",
    "SplitTable",
    "Storage",
    "Tensor",
    "Walk",
    "einsum",
    "evaluate",
    "even_targets",
    "find_splits",
    "format_levels",
    "nests",
    "parse",
    "plan",
    "read_matrix_market",
    "read_tensor",
    "read_tns",
    "split",
    "weighted_targets",
]
