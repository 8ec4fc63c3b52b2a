"""Decisions from measurements: cost tables, timing of sites and models, presets."""

from __future__ import annotations

from sparsecc.plan.costs import CostTable, cache_directory, machine_facts
from sparsecc.plan.presets import METHODS, preset
from sparsecc.plan.timing import MeasuredCosts

__all__ = ["METHODS", "CostTable", "MeasuredCosts", "cache_directory", "machine_facts", "preset"]
