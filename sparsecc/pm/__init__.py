"""The pass manager: passes, pipelines, registry, context, instruments, reports."""

from __future__ import annotations

from sparsecc.pm.base import OptionInfo, Pass, summary_of
from sparsecc.pm.context import (
    CalibrationSource,
    CostSource,
    HistogramLike,
    MomentsLike,
    PassContext,
    Progress,
    Requantizer,
    RewriteCost,
    SiteOverride,
    SiteSettings,
    no_progress,
)
from sparsecc.pm.instruments import (
    DumpInstrument,
    Instrument,
    StopAfterInstrument,
    TimingInstrument,
    VerifyEachInstrument,
)
from sparsecc.pm.lineage import Kept, Lineage
from sparsecc.pm.pipeline import Pipeline
from sparsecc.pm.registry import PassInfo, get_pass, list_passes, pass_names
from sparsecc.pm.report import Change, Number, PassReport, Skip
from sparsecc.pm.search import Range, search_families, search_specs
from sparsecc.pm.sites import select_sites
from sparsecc.pm.trial import Trial

__all__ = [
    "CalibrationSource",
    "Change",
    "CostSource",
    "DumpInstrument",
    "HistogramLike",
    "Instrument",
    "Kept",
    "Lineage",
    "MomentsLike",
    "Number",
    "OptionInfo",
    "Pass",
    "PassContext",
    "PassInfo",
    "PassReport",
    "Pipeline",
    "Progress",
    "Range",
    "Requantizer",
    "RewriteCost",
    "SiteOverride",
    "SiteSettings",
    "Skip",
    "StopAfterInstrument",
    "TimingInstrument",
    "Trial",
    "VerifyEachInstrument",
    "get_pass",
    "list_passes",
    "no_progress",
    "pass_names",
    "search_families",
    "search_specs",
    "select_sites",
    "summary_of",
]
