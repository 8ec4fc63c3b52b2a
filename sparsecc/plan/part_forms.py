"""Forms of one part by itself: what passes make of it, and by how much its outputs change then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from sparsecc.errors import SparseccError
from sparsecc.ir import Model
from sparsecc.plan.comparison import Comparison, error_of, estimate
from sparsecc.plan.part_data import PartCalibration, PartData
from sparsecc.plan.thinning import thinned
from sparsecc.pm import Pass, PassContext, Pipeline, Trial, get_pass

__all__ = ["Form", "FormError", "FormTask", "Passes", "explore", "form_errors", "sketched"]

#: How far what narrow values add to an error may be off, as a share of it, where it was measured for another form.
_NARROWED_SPREAD = 0.05
#: Why forms whose outputs are not numbers have no error.
_NOT_FINITE = "its outputs are NaN or infinite on the calibration data"

Passes = tuple[str, ...]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class FormError:
    """What fitting a form gave.

    Attributes:
        error: see ``error_of``; None where it is not known.
        note: why not.
        skipped: it was not fitted, because another form takes no more and loses less.
        spread: half the width of an interval that holds the error in nine of ten cases, as a share of it; 0 where it
            was not told from some of the outputs, or from other forms.
    """

    error: float | None
    note: str = ""
    skipped: bool = False
    spread: float = 0.0


@dataclass(frozen=True)
class Form:
    """A form that may be worth fitting.

    Attributes:
        passes: that make it.
        takes: what counts beside the error, such as time; less is better.
    """

    passes: Passes
    takes: tuple[float, ...]


@dataclass(frozen=True)
class FormTask:
    """All forms of one part that are to be fitted; holds all that this needs, so that it can be sent elsewhere.

    Attributes:
        key: content hash of part, data and seed.
        model: the part by itself, as a serialised protobuf; rows of the sample are cut to the length of its inputs.
        data: what it reads.
        nested: whether sites read what others compute.
        families: forms of one kind each, mildest first.
        known: errors from earlier runs.
        seed: of everything random.
    """

    key: str
    model: bytes
    data: PartData
    nested: bool
    families: tuple[tuple[Form, ...], ...]
    known: Mapping[Passes, FormError] = field(default_factory=dict)
    seed: int = 0


def explore(
    families: Sequence[Sequence[Form]], fit: Callable[[Passes], FormError]
) -> dict[Passes, FormError]:
    """Return the errors of all forms that no other one makes pointless, by passes, and the reasons of the others.

    A form loses at least what milder ones of its family lose: if another one is known to lose no more than that, and
    takes no more of anything, it is not fitted.
    """
    found: dict[Passes, FormError] = {}
    fitted: list[tuple[Form, float]] = []
    for family in families:
        least = 0.0
        for form in family:
            better = (
                other
                for other, error in fitted
                if error <= least and all(a <= b for a, b in zip(other.takes, form.takes, strict=True))
            )
            rival = next(better, None)
            if rival is not None:
                note = f"not fitted: {','.join(rival.passes)} takes no more and loses less"
                found[form.passes] = FormError(None, note, skipped=True)
                continue
            found[form.passes] = made = fit(form.passes)
            if made.error is not None:
                least = max(least, made.error)
                fitted.append((form, made.error))
    return found


def form_errors(task: FormTask) -> dict[Passes, FormError]:
    """Fit the forms of a task, as ``explore`` says, each beginning only once, and return their errors by passes."""
    try:
        return explore(task.families, _Fitting(task).error)
    except SparseccError as error:  # the part does not run by itself, for instance on inputs of this size
        return {form.passes: FormError(None, str(error)) for family in task.families for form in family}


class _Fitting:
    """Forms of one part while they are fitted.

    Where some outputs tell the error of all, the first form of a pass is fitted to all of them, others to some.
    """

    def __init__(self, task: FormTask) -> None:
        dense = Model.from_proto(onnx.ModelProto.FromString(task.model))
        groups = _groups(task.families)
        self._known = task.known
        trial = Trial()  # of both: what they have in common is of the inputs
        self._whole = _Side(task, dense, groups, trial)
        self._thinned = thinned(dense, task.seed)
        self._some = None if self._thinned is None else _Side(task, self._thinned.model, groups, trial)
        self._families = {
            form.passes: number for number, family in enumerate(task.families) for form in family
        }
        self._first: dict[type[Pass], Passes] = {}
        self._narrowing: dict[int, float] = {}

    def error(self, passes: Passes) -> FormError:
        """Fit a form, unless its error is known or follows from others."""
        if passes in self._known:
            return self._known[passes]
        if len(passes) > 1 and _pass_type(passes[-1]).narrows:
            return self._narrowed(passes)
        return self._fitted(passes)

    def _fitted(self, passes: Passes) -> FormError:
        """The error of a form that is fitted."""
        pass_type = _pass_type(passes[0])
        some, first = self._some, self._first.setdefault(pass_type, passes)
        by_outputs = all(_pass_type(spec).by_outputs for spec in passes)
        if some is None or self._thinned is None or not by_outputs or first == passes:
            return _error(self._whole.changes(passes))
        known, here, there = self._whole.changes(first), some.changes(first), some.changes(passes)
        if isinstance(known, str) or isinstance(here, str):
            return _error(self._whole.changes(passes))
        if isinstance(there, str):
            return FormError(None, there)
        found = estimate(known, here, there, self._thinned.share)
        if found is None:
            return _error(self._whole.changes(passes))
        return (
            FormError(found[0], spread=found[1]) if math.isfinite(found[0]) else FormError(None, _NOT_FINITE)
        )

    def _narrowed(self, passes: Passes) -> FormError:
        """The error of narrow values comes to that of the form, as squares; measured for one form of a family."""
        before, family = self._fitted(passes[:-1]), self._families[passes]
        if before.error is None:
            return before
        if family not in self._narrowing:
            by_outputs = all(_pass_type(spec).by_outputs for spec in passes)
            side = self._some if self._some is not None and by_outputs else self._whole
            found, plain = _error(side.changes(passes)), _error(side.changes(passes[:-1]))
            if found.error is None or plain.error is None:
                return found
            if side is self._whole or not plain.error > 0:
                self._narrowing[family] = math.sqrt(max(0.0, found.error**2 - plain.error**2))
                return found
            error = before.error * found.error / plain.error
            self._narrowing[family] = math.sqrt(max(0.0, error**2 - before.error**2))
            return FormError(error, spread=math.hypot(before.spread, _NARROWED_SPREAD))
        error = math.hypot(before.error, self._narrowing[family])
        return FormError(error, spread=math.hypot(before.spread, _NARROWED_SPREAD))


def _error(changes: list[Array] | str) -> FormError:
    if isinstance(changes, str):
        return FormError(None, changes)
    error = error_of(changes)
    return FormError(error) if math.isfinite(error) else FormError(None, _NOT_FINITE)


class _Side:
    """A part by itself, or what is looked at of it, and its forms."""

    def __init__(self, task: FormTask, dense: Model, groups: Mapping[str, int], trial: Trial) -> None:
        affine = not task.nested and all(site.op in ("MatMul", "Gemm") for site in dense.sites())
        calibration = PartCalibration(task.data, dense)
        self._start = dense, PassContext(seed=task.seed, calibration=calibration, threads=1)
        self._groups = groups
        self._group = -1
        self._trial = trial
        self._forms: dict[Passes, tuple[Model, PassContext] | str] = {}
        self._changes: dict[Passes, list[Array] | str] = {}
        self._compare = Comparison(dense, task.data, affine)

    def changes(self, passes: Passes) -> list[Array] | str:
        """What a form changes of the outputs, see ``Comparison``, or why there is none."""
        if passes not in self._changes:
            made = self._made(passes)
            self._changes[passes] = made if isinstance(made, str) else self._compare.changes(made[0])
        return self._changes[passes]

    def _made(self, passes: Passes) -> tuple[Model, PassContext] | str:
        if not passes:
            return self._start
        if passes not in self._forms:
            self._forget(passes[0])
            before = self._made(passes[:-1])
            trial = self._trial if len(passes) == 1 else None
            self._forms[passes] = _fitted(before, passes[-1], trial)
        return self._forms[passes]

    def _forget(self, spec: str) -> None:
        """Let go of forms that begin otherwise: those that begin alike come one after another."""
        if self._groups[spec] == self._group:
            return
        if not any(_pass_type(spec) is _pass_type(other[0]) for other in self._forms):
            self._trial.forget()
        self._forms.clear()
        self._group = self._groups[spec]


def _pass_type(spec: str) -> type[Pass]:
    return get_pass(spec.partition("{")[0])


def _groups(families: Sequence[Sequence[Form]]) -> dict[str, int]:
    """By spec that forms begin with a number, the same for families one after another that begin with the same."""
    found: dict[str, int] = {}
    last = -1
    for family in families:
        begin = {form.passes[0] for form in family}
        if not any(found.get(spec) == last for spec in begin):
            last += 1
        found.update(dict.fromkeys(begin, last))
    return found


def sketched(model: Model, spec: Sequence[str], ctx: PassContext) -> str | None:
    """Give ``model``, in place, the form of these passes without fitting it; return why there is none."""
    for text in spec:
        (pass_,) = Pipeline.parse(text).passes
        report = pass_.sketch(model, ctx)
        if not report.changed:
            return report.skipped[0].reason if report.skipped else "nothing of it changes"
    return None


def _fitted(
    before: tuple[Model, PassContext] | str, text: str, trial: Trial | None
) -> tuple[Model, PassContext] | str:
    """The next form, or why there is none."""
    if isinstance(before, str):
        return before
    model, ctx = before[0].copy(), before[1]
    own = PassContext(seed=ctx.seed, calibration=ctx.calibration, threads=ctx.threads, trial=trial)
    (pass_,) = Pipeline.parse(text).passes
    try:
        report = pass_.run(model, own)
    except (SparseccError, np.linalg.LinAlgError) as error:
        return str(error)
    if not report.changed:
        return report.skipped[0].reason if report.skipped else "nothing of it changes"
    return model, own
