"""How much the metric of a model suffers from errors of its parts, measured by replacing one part at a time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

import sparsecc
from sparsecc.errors import MeasurementError, ScoreError, SparseccError
from sparsecc.ir import Model
from sparsecc.plan.items import Candidate, Item
from sparsecc.plan.metric import Batch, Metric, OutputError
from sparsecc.plan.part_data import PartCalibration, collect_parts
from sparsecc.plan.parts import Part, find_parts
from sparsecc.plan.results import Results
from sparsecc.pm import CalibrationSource, PassContext, Pipeline, Progress, Trial, no_progress
from sparsecc.pm.choices import ITEMS, SiteChoice, expanded

__all__ = ["Sensitivity", "measure_sensitivity", "replaced"]

#: Version of what is kept of earlier runs.
_FORMAT = 2
#: Samples that outputs are compared on: so many, or fewer once they hold enough numbers (tokens of a text).
_SAMPLES = 32
_FEWEST_SAMPLES = 16
_NUMBERS = 2048
#: Error that a replacement should have: large enough to show, small enough for its square to tell.
_ERROR = 0.15
#: The same where all parts are replaced at once.
_JOINT_ERROR = 0.07
#: Share of the median of all items that an item's sensitivity is at least: what is measured as nothing is noise.
_FLOOR = 0.05


@dataclass(frozen=True)
class Sensitivity:
    """What replacements showed.

    Attributes:
        items: with their sensitivities, in the unit of the metric per squared error.
        replacements: by name of an item what it was replaced by, and what the outputs and the metric lost then.
        joint: predicted and measured damage of all replacements at once; None where none was made.
        scale: damage to the metric per squared error of the outputs; 1 without a metric.
        notes: what the user should know.
    """

    items: tuple[Item, ...]
    replacements: Mapping[str, tuple[str, float]]
    joint: tuple[float, float] | None
    scale: float
    notes: tuple[str, ...] = ()

    @property
    def additivity(self) -> float | None:
        """Measured over predicted damage of all replacements at once; near 1 where damages add up."""
        return None if self.joint is None or not self.joint[0] > 0 else self.joint[1] / self.joint[0]


def replaced(model: Model, sites: Sequence[str], passes: Sequence[str], context: PassContext) -> Model:
    """Return a copy of ``model`` in which these sites have the form that ``passes`` make of them."""
    copy = model.copy()
    specs = expanded((ITEMS,), [SiteChoice(tuple(sites), tuple(passes))], "replacement")
    Pipeline.parse_all(specs).run(copy, context)
    return copy


def measure_sensitivity(
    model: Model,
    items: Sequence[Item],
    calibration: CalibrationSource,
    metric: Metric | None = None,
    *,
    results: Results | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = no_progress,
) -> Sensitivity:
    """Return ``items`` with sensitivities: damage to the metric per squared error of an item.

    Each item by itself takes one candidate of a middle error, and the squared relative error of the model's outputs on
    a few samples over that of the item says how much the item matters. What the outputs' error means for the metric is
    measured once, with all replacements that together do moderate damage: counting metrics are too coarse for one
    replacement. Without a metric the damage is the squared error of the outputs itself.

    Args:
        model: that the items were found in.
        items: see ``find_items``.
        calibration: inputs of ``model``.
        metric: on inputs of its own; None: the error of the outputs.
        results: where measurements are kept; None: in memory.
        seed: of everything random.
        threads: of the sessions.
        progress: told how far it is.
    """
    outputs = OutputError(_few(calibration), threads)
    base = f"{_FORMAT} {sparsecc.__version__} {model.fingerprint()} {outputs.digest()} {calibration.fingerprint()}"
    work = _Replacing(
        model, items, calibration, outputs, metric, results or Results(None), base, seed, threads
    )
    lost, joint = work.measure(progress)
    per_error = _floored({name: loss**2 / work.alone[name].error ** 2 for name, loss in lost.items()})
    middle = float(np.median(list(per_error.values()))) if per_error else 1.0
    scale = joint.get("damage", 0.0) / joint["lost"] ** 2 if joint.get("lost") else 0.0
    notes = list(work.notes)
    if metric is not None and not scale > 0:
        said = "has no number for" if joint and "damage" not in joint else "did not suffer from"
        notes.append(f"the metric {metric.name} {said} all replacements at once: errors of outputs count")
    scale = scale if scale > 0 else 1.0
    predicted = sum(value * work.mild[name].error ** 2 for name, value in per_error.items())
    return Sensitivity(
        tuple(replace(item, sensitivity=scale * per_error.get(item.name, middle)) for item in items),
        {name: (work.alone[name].name, value) for name, value in lost.items()},
        (predicted, joint["lost"] ** 2) if joint else None,
        scale,
        tuple(notes),
    )


def _nearest(item: Item, error: float) -> Candidate | None:
    """The candidate with about this error; None where the item has no other form."""
    others = [candidate for candidate in item.candidates if candidate.error > 0]
    return min(others, key=lambda candidate: abs(np.log(candidate.error / error)), default=None)


def _floored(per_error: Mapping[str, float]) -> dict[str, float]:
    """The same, none much smaller than the others."""
    middle = float(np.median(list(per_error.values()))) if per_error else 0.0
    return {name: max(value, _FLOOR * middle) for name, value in per_error.items()}


def _few(calibration: CalibrationSource) -> list[Batch]:
    """The first batches, as many as hold enough samples; the last is cut."""
    found: list[Batch] = []
    left = 0
    for number, batch in enumerate(calibration):
        left = left if number else _wanted(batch)
        sizes = {array.shape[0] if array.ndim else 0 for array in batch.values()}
        size = sizes.pop() if len(sizes) == 1 else 0
        cut = size > left
        found.append({name: array[:left] if cut else array for name, array in batch.items()})
        left -= max(1, min(size, left))
        if left <= 0:
            break
    return found


def _wanted(batch: Batch) -> int:
    """How many samples are enough, where others are as large as those of this batch."""
    numbers = max((array[:1].size for array in batch.values() if array.ndim), default=1)
    return min(_SAMPLES, max(_FEWEST_SAMPLES, -(-_NUMBERS // max(1, numbers))))


class _Replacing:
    """Replacements in one model.

    Attributes:
        alone: by name of an item the candidate that it is replaced by alone.
        mild: the same for all at once.
        notes: what could not be measured.
    """

    def __init__(
        self,
        model: Model,
        items: Sequence[Item],
        calibration: CalibrationSource,
        outputs: OutputError,
        metric: Metric | None,
        results: Results,
        base: str,
        seed: int,
        threads: int,
    ) -> None:
        self.alone = {item.name: found for item in items if (found := _nearest(item, _ERROR)) is not None}
        self.mild = {
            item.name: found for item in items if (found := _nearest(item, _JOINT_ERROR)) is not None
        }
        self.notes: list[str] = []
        self._model = model
        self._sites = {item.name: item.sites for item in items}
        self._calibration = calibration
        self._outputs = outputs
        self._metric = metric
        self._results = results
        self._base = f"{base} {seed}"
        self._seed = seed
        self._threads = threads

    def measure(self, progress: Progress) -> tuple[dict[str, float], dict[str, float]]:
        """Relative error of the outputs with each item replaced alone; the same, and the metric's damage, with all."""
        keys = {
            name: f"{self._base} {' '.join(self._sites[name])} {candidate.name}"
            for name, candidate in self.alone.items()
        }
        all_at_once = self._joint_key()
        joint = self._results.get("joint", all_at_once)
        known = {name: self._results.get("damage", key) for name, key in keys.items()}
        lost = {name: float(found["lost"]) for name, found in known.items() if found is not None}
        names = [name for name in self.alone if joint is None or name not in lost]
        if not names:
            return lost, joint or {}
        self._outputs.compare_with(self._model)
        both = self._model
        for done, (name, data) in enumerate(self._calibrations(names, progress)):
            progress("replacing parts", done, len(names))
            trial = Trial()  # of both replacements, which begin with the same weights
            try:
                if name not in lost:
                    lost[name] = self._outputs.score(self._with(self._model, name, data, self.alone, trial))
                    self._results.put("damage", keys[name], {"lost": lost[name]})
                both = self._with(both, name, data, self.mild, trial) if joint is None else both
            except SparseccError as error:
                self.notes.append(f"{name}: its sensitivity is not known: {error}")
        progress("replacing parts", len(names), len(names))
        if joint is None:
            joint = self._judged(both)
            self._results.put("joint", all_at_once, joint)
        return lost, joint

    def _calibrations(
        self, names: Sequence[str], progress: Progress
    ) -> Iterator[tuple[str, CalibrationSource | str]]:
        """What passes of each item are fitted to, or why it is not known; tables of embeddings are no parts."""
        parts = {part.name: part for part in self._parts() if part.name in names}
        yield from ((name, self._calibration) for name in names if name not in parts)
        found = collect_parts(
            self._model, list(parts.values()), self._calibration, threads=self._threads, progress=progress
        )
        for part, data in found:
            yield part.name, data if isinstance(data, str) else PartCalibration(data, whole=self._calibration)

    def _with(
        self,
        model: Model,
        name: str,
        calibration: CalibrationSource | str,
        chosen: Mapping[str, Candidate],
        trial: Trial,
    ) -> Model:
        if isinstance(calibration, str):
            raise MeasurementError(calibration)
        context = PassContext(seed=self._seed, calibration=calibration, threads=self._threads, trial=trial)
        return replaced(model, self._sites[name], chosen[name].passes, context)

    def _judged(self, other: Model) -> dict[str, float]:
        found = {"lost": self._outputs.score(other)}
        if self._metric is not None:
            before = self._metric.score(self._model)
            with contextlib.suppress(ScoreError):  # the caller says so
                found["damage"] = self._metric.damage(before, self._metric.score(other))
        return found

    def _joint_key(self) -> str:
        forms = sorted((name, candidate.name) for name, candidate in self.mild.items())
        digest = hashlib.sha256(repr(forms).encode()).hexdigest()
        return f"{self._base} {digest} {'' if self._metric is None else self._metric.digest()}"

    def _parts(self) -> list[Part]:
        """The parts that the items with a choice were made of."""
        wanted = {self._sites[name] for name in self.alone}
        found = {
            part.names: part for coupled in (True, False) for part in find_parts(self._model, coupled=coupled)
        }
        return [part for names, part in found.items() if names in wanted]
