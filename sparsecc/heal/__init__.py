"""Healing: a pruned model is trained, in PyTorch and without labels, to compute what the dense one computes.

Needs the extra ``sparsecc[heal]``; importing this package does not. ``sparsecc.heal.graph`` runs an ONNX graph on
tensors of PyTorch, ``sparsecc.heal.training`` trains it; both import PyTorch.
"""

from __future__ import annotations

from sparsecc.heal.extra import require_torch
from sparsecc.heal.parameters import Parameter, trainable
from sparsecc.heal.states import block_states

__all__ = ["Parameter", "block_states", "require_torch", "trainable"]
