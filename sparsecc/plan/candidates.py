"""What each part of a model may become: forms worth their time, with the errors they make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import sparsecc
from sparsecc.exec import Executor, Threads
from sparsecc.ir import Model
from sparsecc.plan.items import Candidate, Estimate, Item
from sparsecc.plan.outlook import Outlook, outlook_of
from sparsecc.plan.part_data import PartData, collect_parts
from sparsecc.plan.part_forms import Form, FormError, FormTask, Passes, explore, form_errors
from sparsecc.plan.parts import Part, find_parts
from sparsecc.plan.pricing import FAMILIES, PartCosts, Priced, Pricing, Resource, form_families
from sparsecc.plan.results import Results
from sparsecc.plan.tables import table_items
from sparsecc.plan.timing import Inputs, input_shapes_of_sites, runs_of_sites
from sparsecc.pm import CalibrationSource, Progress, no_progress
from sparsecc.target import Target

__all__ = ["FAMILIES", "find_items"]

#: Version of what is kept of earlier runs.
_FORMAT = 2
#: Rows of what is compared at a time: ranges that are found at run time are those of so many.
_ROWS = 128


def find_items(
    model: Model,
    calibration: CalibrationSource,
    costs: PartCosts,
    *,
    inputs: Inputs,
    target: Target | None = None,
    custom_ops: bool = True,
    families: Collection[str] = FAMILIES,
    fine: bool = False,
    resources: Sequence[Resource] = ("ms",),
    executor: Executor | None = None,
    results: Results | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = no_progress,
    told: Callable[[Outlook], None] | None = None,
) -> list[Item]:
    """Return what is to be chosen for each site of ``model``, or for sites that take one form together.

    Times come first, of forms whose values need no fit: a form that is not faster than what loses less is never
    fitted. Then each part of the model is taken out of it and all its forms are fitted to what it reads, which is
    measured once. What was found is kept on disk by content.

    Args:
        model: tidied.
        calibration: inputs of ``model``.
        costs: times of parts.
        inputs: those that ``costs`` times for; their shapes decide the shapes of parts.
        target: what the model is for; on CUDA no sparse operators count.
        custom_ops: whether sparse operators may be used.
        families: names of the passes whose search ranges are tried.
        fine: whether amounts between those of the ranges are tried too.
        resources: what counts beside the error: a form must take less of one of them to be worth fitting.
        executor: where forms are fitted; None: in this thread.
        results: where errors are kept; None: in memory.
        seed: of everything random.
        threads: of sessions that measure activations.
        progress: told how far it is.
        told: what it will take, before it begins.

    Returns:
        Tables of embeddings, then parts, in the order of the graph. The first candidate of each item is the form it
        has. Those that another one beats in all resources and the error are in ``dropped``, as are those that were not
        fitted, whose error is NaN.
    """
    allowed = custom_ops and (target is None or target.name != "cuda")
    kept = results or Results(None)
    pricing = Pricing(costs, resources, allowed, kept, seed)
    work = _Fits(model, calibration, resources, kept, seed)
    parts = find_parts(model, coupled="prune-structured" in families)
    convolutions = any(site.op == "Conv" for part in parts for site in part.sites)
    forms = form_families(families, convolutions=convolutions, fine=fine)
    shapes, runs = input_shapes_of_sites(model, inputs), runs_of_sites(model, inputs)
    if told is not None:
        told(outlook_of(parts, forms, shapes, work.known(parts)))
    priced: dict[str, Priced] = {}
    for done, part in enumerate(parts):
        progress("timing forms", done, len(parts))
        priced[part.name] = pricing.priced(part, shapes.get(part.name), forms)
    progress("timing forms", len(parts), len(parts))
    errors = work.errors(parts, priced, executor or Threads(1), threads, progress)
    items = [
        _item(part, priced[part.name], errors.get(part.name, {}), resources, runs.get(part.name, 1))
        for part in parts
    ]
    return [*table_items(model, families, resources), *items]


class _Fits:
    """The fits of one search."""

    def __init__(
        self,
        model: Model,
        calibration: CalibrationSource,
        resources: Sequence[Resource],
        results: Results,
        seed: int,
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._resources = resources
        self._results = results
        self._seed = seed
        self._base = (
            f"{_FORMAT} {sparsecc.__version__} {model.fingerprint()} {calibration.fingerprint()} {seed}"
        )

    def known(self, parts: Sequence[Part]) -> set[str]:
        """Names of the parts that an earlier run has worked on."""
        return {part.name for part in parts if self._known(part)}

    def errors(
        self,
        parts: Sequence[Part],
        priced: Mapping[str, Priced],
        executor: Executor,
        threads: int,
        progress: Progress,
    ) -> dict[str, dict[Passes, FormError]]:
        """Errors of all forms that are worth it, by part and passes; known ones are not fitted again."""
        found: dict[str, dict[Passes, FormError]] = {}
        known: dict[str, dict[Passes, FormError]] = {}
        open_parts = []
        for part in parts:
            known[part.name] = own = self._known(part)
            try:
                found[part.name] = explore(self._families(priced[part.name]), own.__getitem__)
            except KeyError:
                open_parts.append(part)
        owners: dict[int, Part] = {}

        def tasks() -> Iterator[FormTask]:
            for part, data in collect_parts(
                self._model, open_parts, self._calibration, threads=threads, progress=progress
            ):
                if isinstance(data, str):
                    found[part.name] = {
                        form.passes: FormError(None, data) for form in priced[part.name].forms
                    }
                else:
                    families = self._families(priced[part.name])
                    task = self._task(part, data, families, known[part.name])
                    owners[id(task)] = part  # while it runs the executor holds it
                    yield task

        for done, (task, errors) in enumerate(executor.map(form_errors, tasks())):
            part = owners.pop(id(task))
            progress("fitting forms", done, len(open_parts))
            found[part.name] = errors
            self._keep(part, task, errors)
        progress("fitting forms", len(open_parts), len(open_parts))
        return found

    def _families(self, priced: Priced) -> tuple[tuple[Form, ...], ...]:
        """The forms to be fitted, with what they take of what counts."""
        forms = {
            form.passes: Form(
                form.passes, (*(form.share(item) for item in self._resources), float(form.sparse))
            )
            for form in priced.forms
        }
        families = (
            tuple(forms[passes] for passes in family if passes in forms) for family in priced.families
        )
        return tuple(family for family in families if family)

    def _task(
        self,
        part: Part,
        data: PartData,
        families: tuple[tuple[Form, ...], ...],
        known: Mapping[Passes, FormError],
    ) -> FormTask:
        shape = data.sample.shape
        if part.samples_axis is None:
            shape = (*shape[:-2], min(shape[-2], _ROWS), shape[-1])
        alone = part.compared(shape)
        digest = f"{_FORMAT} {sparsecc.__version__} {alone.fingerprint()} {data.digest()} {self._seed}"
        key = hashlib.sha256(digest.encode()).hexdigest()
        model = alone.to_proto().SerializeToString()
        return FormTask(key, model, data, part.nested, families, known, self._seed)

    def _known(self, part: Part) -> dict[Passes, FormError]:
        """Errors from earlier runs: by the content of the part, which a run on this model and data has left."""
        content = self._results.get("part", self._key(part))
        known = None if content is None else self._results.get("errors", str(content["content"]))
        return {
            tuple(passes): FormError(error, note, spread=spread)
            for passes, error, note, spread in (known or {}).get("forms", [])
        }

    def _keep(self, part: Part, task: FormTask, errors: Mapping[Passes, FormError]) -> None:
        made = {passes: found for passes, found in errors.items() if not found.skipped}
        forms = [
            [list(passes), found.error, found.note, found.spread]
            for passes, found in {**task.known, **made}.items()
        ]
        self._results.put("part", self._key(part), {"content": task.key})
        self._results.put("errors", task.key, {"forms": forms})

    def _key(self, part: Part) -> str:
        return f"{self._base} {' '.join(part.names)}"


def _item(
    part: Part,
    priced: Priced,
    errors: Mapping[Passes, FormError],
    resources: Sequence[Resource],
    runs: int,
) -> Item:
    """Candidates of a part that computes so many times in a run of the model, without those that others beat."""
    dense_ms, dense_bytes, spread = priced.dense
    dense_ms *= runs
    dense = Candidate((), 0.0, Estimate(dense_ms, priced.source, spread), dense_bytes, note=priced.reason)
    if priced.before is not None:
        ms = dense_ms * priced.before.share("ms")
        dense = replace(
            dense, time=Estimate(ms, priced.source, spread), bytes=priced.before.cost.bytes, custom_ops=True
        )
    found: list[Candidate] = []
    dropped = list(priced.dropped)
    for form in priced.forms:
        error = errors.get(form.passes, FormError(None, "not fitted"))
        ms = dense_ms * form.cost.ms / form.cost.dense_ms if form.cost.dense_ms else form.cost.ms
        time = Estimate(ms, form.cost.source, max(spread, form.cost.spread))
        made = Candidate(
            form.passes, math.nan if error.error is None else error.error, time,
            form.cost.bytes, form.sparse, error.note, error.spread,
        )  # fmt: skip
        (dropped if error.error is None else found).append(made)
    found = _monotone(found, priced.families)
    names = " and ".join("time" if item == "ms" else "bytes" for item in resources)
    kept = []
    for candidate in found:
        better = next((other for other in [dense, *found] if _beats(other, candidate, resources)), None)
        if better is None:
            kept.append(candidate)
        else:
            dropped.append(replace(candidate, note=f"{better.name} is no worse in {names} and error"))
    return Item(part.name, part.names, (dense, *kept), dropped=tuple(dropped))


def _monotone(found: Sequence[Candidate], families: Sequence[Sequence[Passes]]) -> list[Candidate]:
    """The same, a stronger form of a family never having a smaller error than a milder one."""
    errors = {candidate.passes: candidate.error for candidate in found}
    for family in families:
        least = 0.0
        for passes in family:
            if passes in errors:
                least = errors[passes] = max(least, errors[passes])
    return [replace(candidate, error=errors[candidate.passes]) for candidate in found]


def _beats(one: Candidate, other: Candidate, resources: Sequence[Resource]) -> bool:
    """Whether ``one`` is no worse than ``other`` in anything and better in something; the first of equals beats."""
    mine, theirs = (
        (
            *(candidate.time.ms if item == "ms" else candidate.bytes for item in resources),
            candidate.error,
            candidate.custom_ops,
        )
        for candidate in (one, other)
    )
    no_worse = all(a <= b for a, b in zip(mine, theirs, strict=True))
    return one is not other and no_worse and (mine != theirs or one.passes < other.passes)
