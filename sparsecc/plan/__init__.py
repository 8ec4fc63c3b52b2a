"""Decisions from measurements: cost tables, timing of sites and models, presets."""

from __future__ import annotations

from sparsecc.plan.acceptance import (
    TOLERANCE,
    Inputs,
    Latency,
    check_agreement,
    runnable_inputs,
    timing_inputs,
)
from sparsecc.plan.candidates import FAMILIES, find_items
from sparsecc.plan.choose import back_off, bound, choice_of, choose, front
from sparsecc.plan.costs import CostTable, cache_directory, machine_facts
from sparsecc.plan.decisions import SiteDecision, decisions
from sparsecc.plan.guard import Limits, Verdict
from sparsecc.plan.items import Candidate, Choice, Estimate, Item
from sparsecc.plan.levels import LEVELS, TIDY, asked_at, refuse_at
from sparsecc.plan.making import Made, Setting, make
from sparsecc.plan.metric import METRICS, Metric, open_metric, read_labels
from sparsecc.plan.opening import library_found, open_setting, usable_threads
from sparsecc.plan.plan_file import PlanFile, pipeline_of, plan_of, read_plan, site_names, write_plan
from sparsecc.plan.planner import ATTEMPTS, Budget, Planner
from sparsecc.plan.planning import DEFAULT_DROP, Asked, open_planner
from sparsecc.plan.presets import METHODS, preset
from sparsecc.plan.reference import load_reference
from sparsecc.plan.results import Results, begin
from sparsecc.plan.rounds import run_where_it_pays
from sparsecc.plan.timing import MeasuredCosts

__all__ = [
    "ATTEMPTS",
    "DEFAULT_DROP",
    "FAMILIES",
    "LEVELS",
    "METHODS",
    "METRICS",
    "TIDY",
    "TOLERANCE",
    "Asked",
    "Budget",
    "Candidate",
    "Choice",
    "CostTable",
    "Estimate",
    "Inputs",
    "Item",
    "Latency",
    "Limits",
    "Made",
    "MeasuredCosts",
    "Metric",
    "PlanFile",
    "Planner",
    "Results",
    "Setting",
    "SiteDecision",
    "Verdict",
    "asked_at",
    "back_off",
    "begin",
    "bound",
    "cache_directory",
    "check_agreement",
    "choice_of",
    "choose",
    "decisions",
    "find_items",
    "front",
    "library_found",
    "load_reference",
    "machine_facts",
    "make",
    "open_metric",
    "open_planner",
    "open_setting",
    "pipeline_of",
    "plan_of",
    "preset",
    "read_labels",
    "read_plan",
    "refuse_at",
    "run_where_it_pays",
    "runnable_inputs",
    "site_names",
    "timing_inputs",
    "usable_threads",
    "write_plan",
]
