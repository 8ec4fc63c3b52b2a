"""Targets: what the machine that will run the model can do. Knows no ONNX."""

from __future__ import annotations

from sparsecc.target.target import TARGET_NAMES, Target, host_features, host_processors

__all__ = ["TARGET_NAMES", "Target", "host_features", "host_processors"]
