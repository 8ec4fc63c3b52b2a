"""Coupled axes: which positions of which constants can be reordered or removed only together."""

from __future__ import annotations

from sparsecc.ir.axes.builder import Part
from sparsecc.ir.axes.graph import AxisGraph, Orbit, known_shapes
from sparsecc.ir.axes.rewrite import permute, remove

__all__ = ["AxisGraph", "Orbit", "Part", "known_shapes", "permute", "remove"]
