"""The run document: what ``optimize --json`` and ``plan --json`` print, part by part; any part may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "BalanceRow",
    "Budget",
    "CandidateRow",
    "Change",
    "Curve",
    "CurvePoint",
    "Effort",
    "FrontPoint",
    "GuardStep",
    "ItemRow",
    "Latency",
    "Metric",
    "NotSite",
    "PassRun",
    "Predicted",
    "Provenance",
    "RunDocument",
    "SiteRow",
    "Skip",
    "Spectrum",
    "Spread",
    "Thumbnail",
]


@dataclass(frozen=True)
class Spread:
    """Distribution of times of one run in ms; without quartiles only the range is drawn."""

    min: float
    max: float
    median: float | None = None
    q1: float | None = None
    q3: float | None = None


@dataclass(frozen=True)
class Latency:
    """Median times of the input and the output in ms, the ratio of both, threads; spreads where they are known.

    ``source`` is ``predicted`` where the target was another machine; ``uncertainty`` is that of the output's time then.
    """

    before_ms: float
    after_ms: float
    speedup: float | None = None
    threads: int | None = None
    before: Spread | None = None
    after: Spread | None = None
    source: str = "measured"
    uncertainty: float | None = None


@dataclass(frozen=True)
class SiteRow:
    """What became of one site (``sparsecc.plan.SiteDecision``)."""

    site: str
    op: str = ""
    shape: tuple[int, ...] = ()
    density: float | None = None
    layout: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """A site that a pass changed, with its figures by name."""

    site: str
    detail: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A site that a pass left alone."""

    site: str
    reason: str = ""


@dataclass(frozen=True)
class NotSite:
    """A linear operator that is no site."""

    name: str
    reason: str = ""


@dataclass(frozen=True)
class PassRun:
    """What one pass did (``sparsecc.pm.PassReport``)."""

    name: str = field(metadata={"key": "pass"})
    spec: str = ""
    changed: tuple[Change, ...] = ()
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class CandidateRow:
    """One form an item may take: time in ms with its source and relative spread, bytes, relative error of its
    outputs, predicted damage to the metric; ``note`` says why it was not tried or not taken.
    """

    name: str
    ms: float | None = None
    source: str = ""
    spread: float | None = None
    bytes: int | None = None
    error: float | None = None
    damage: float | None = None
    custom_ops: bool = False
    note: str = ""


@dataclass(frozen=True)
class ItemRow:
    """Sites that take one form together.

    The first candidate is the form they had; ``chosen`` is the number of the one that was taken, None where nothing was
    chosen yet. ``dropped`` are forms that were no candidates, with the reason as their ``note``.
    """

    name: str
    sites: tuple[str, ...] = ()
    candidates: tuple[CandidateRow, ...] = ()
    chosen: int | None = None
    reason: str = ""
    dropped: tuple[CandidateRow, ...] = ()


@dataclass(frozen=True)
class FrontPoint:
    """One choice on the Pareto front, predicted: ms, bytes, damage; which one was taken, which one is the input."""

    ms: float | None = None
    bytes: int | None = None
    damage: float | None = None
    chosen: bool = False
    input: bool = False


@dataclass(frozen=True)
class Predicted:
    """What the plan promised for the whole model."""

    ms: float | None = None
    bytes: int | None = None
    damage: float | None = None


@dataclass(frozen=True)
class Budget:
    """What was asked for: of ``ms``, ``bytes`` or ``drop``, the limit in that unit, as the user wrote it, if met."""

    kind: str
    limit: float | None = None
    asked: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class GuardStep:
    """One step of the accuracy guard: what it changed, and what was then measured."""

    change: str
    ms: float | None = None
    bytes: int | None = None
    value: float | None = None
    held: bool | None = None


@dataclass(frozen=True)
class Metric:
    """The model's metric before and after, the largest drop allowed (same unit), and the steps of the guard."""

    name: str
    before: float | None = None
    after: float | None = None
    max_drop: float | None = None
    higher_is_better: bool = True
    held: bool | None = None
    steps: tuple[GuardStep, ...] = ()


@dataclass(frozen=True)
class CurvePoint:
    """Relative error of an item's outputs and the drop of the metric that goes with it, measured or predicted."""

    error: float
    drop: float
    label: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Curve:
    """Sensitivity of one item; ``chosen_error`` is the error it has in the chosen plan."""

    name: str
    points: tuple[CurvePoint, ...] = ()
    chosen_error: float | None = None


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a weight, largest first, relative to the largest: ``count`` in all, evenly thinned.

    ``rank`` is how many a factorised form kept.
    """

    site: str
    values: tuple[float, ...]
    count: int | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Thumbnail:
    """Where a weight is not zero: density by cell over the whole matrix, and its first entries one by one."""

    site: str
    grid: tuple[tuple[float, ...], ...]
    corner: tuple[tuple[float, ...], ...] = ()
    shape: tuple[int, ...] = ()
    layout: str = ""
    density: float | None = None


@dataclass(frozen=True)
class BalanceRow:
    """How the work of one operator is cut (as in ``inspect --partition --json``); ``balance`` is largest / mean."""

    name: str
    op: str = ""
    part_work: tuple[float, ...] = ()
    balance: float | None = field(default=None, metadata={"key": "lambda"})


@dataclass(frozen=True)
class Effort:
    """What planning took in seconds and bytes of memory, and what was predicted (``sparsecc.plan.outlook``)."""

    planning_seconds: float | None = None
    planning_predicted: float | None = None
    making_seconds: float | None = None
    model_predicted: float | None = None
    models: int | None = None
    bytes: int | None = None
    bytes_predicted: int | None = None


@dataclass(frozen=True)
class Provenance:
    """How to get the same result again."""

    version: str = ""
    seed: int | None = None
    command: str = ""
    digests: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDocument:
    """Everything a report can show; every part may be missing."""

    model: str = ""
    output: str = ""
    target: str = ""
    pipeline: str = ""
    bytes_before: int | None = None
    bytes_after: int | None = None
    latency: Latency | None = None
    max_rel_l2: float | None = None
    rel_l2_to_input: float | None = None
    sites: tuple[SiteRow, ...] = ()
    passes: tuple[PassRun, ...] = ()
    notes: tuple[str, ...] = ()
    not_sites: tuple[NotSite, ...] = ()
    operator_library: bool | None = None
    items: tuple[ItemRow, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    front_bytes: tuple[FrontPoint, ...] = ()
    predicted: Predicted | None = None
    budgets: tuple[Budget, ...] = ()
    metric: Metric | None = None
    sensitivity: tuple[Curve, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    thumbnails: tuple[Thumbnail, ...] = ()
    partition: tuple[BalanceRow, ...] = ()
    effort: Effort | None = None
    provenance: Provenance | None = None
