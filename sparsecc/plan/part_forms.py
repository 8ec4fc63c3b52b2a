"""Forms of one part by itself: what passes make of it, and by how much its outputs change then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sparsecc.calib import Session, open_session
from sparsecc.errors import SparseccError
from sparsecc.ir import Model
from sparsecc.plan.part_data import PartCalibration, PartData, batches_of
from sparsecc.pm import PassContext, Pipeline

__all__ = ["Form", "FormError", "FormTask", "Passes", "explore", "form_errors", "relative_error", "sketched"]

#: Operators after which outputs are no affine function of the inputs, or not to rounding.
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger")


Passes = tuple[str, ...]


@dataclass(frozen=True)
class FormError:
    """What fitting a form gave.

    Attributes:
        error: see ``relative_error``; None where it is not known.
        note: why not.
        skipped: it was not fitted, because another form takes no more and loses less.
    """

    error: float | None
    note: str = ""
    skipped: bool = False


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
    """Forms of one part while they are fitted."""

    def __init__(self, task: FormTask) -> None:
        dense = Model.from_proto(onnx.ModelProto.FromString(task.model))
        affine = not task.nested and all(site.op in ("MatMul", "Gemm") for site in dense.sites())
        calibration = PartCalibration(task.data, dense)
        self._known = task.known
        self._start = dense, PassContext(seed=task.seed, calibration=calibration, threads=1)
        self._forms: dict[Passes, tuple[Model, PassContext] | str] = {}
        self._compare = _Comparison(dense, task.data, affine)

    def error(self, passes: Passes) -> FormError:
        """Fit a form, unless its error is known."""
        if passes in self._known:
            return self._known[passes]
        made = self._made(passes)
        return FormError(None, made) if isinstance(made, str) else self._compare.error(made[0])

    def _made(self, passes: Passes) -> tuple[Model, PassContext] | str:
        if not passes:
            return self._start
        if passes not in self._forms:
            name = passes[0].partition("{")[0]
            for other in [item for item in self._forms if item[0].partition("{")[0] != name]:
                del self._forms[other]  # families of one pass come one after another: it does not come again
            self._forms[passes] = _fitted(self._made(passes[:-1]), passes[-1])
        return self._forms[passes]


def sketched(model: Model, spec: Sequence[str], ctx: PassContext) -> str | None:
    """Give ``model``, in place, the form of these passes without fitting it; return why there is none."""
    for text in spec:
        (pass_,) = Pipeline.parse(text).passes
        report = pass_.sketch(model, ctx)
        if not report.changed:
            return report.skipped[0].reason if report.skipped else "nothing of it changes"
    return None


def _fitted(before: tuple[Model, PassContext] | str, text: str) -> tuple[Model, PassContext] | str:
    """The next form, or why there is none."""
    if isinstance(before, str):
        return before
    model, ctx = before[0].copy(), before[1]
    own = PassContext(seed=ctx.seed, calibration=ctx.calibration, threads=ctx.threads)
    (pass_,) = Pipeline.parse(text).passes
    try:
        report = pass_.run(model, own)
    except (SparseccError, np.linalg.LinAlgError) as error:
        return str(error)
    if not report.changed:
        return report.skipped[0].reason if report.skipped else "nothing of it changes"
    return model, own


def relative_error(before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]) -> float:
    """Return the norm of what changed over the norm, root of the mean of squares over the arrays.

    An array of zeros that stays so has error 0, one that does not has error 1.
    """
    squares = []
    for old, new in zip(before, after, strict=True):
        wide = old.astype(np.float64)
        changed, energy = float(np.square(new - wide).sum()), float(np.square(wide).sum())
        squares.append(changed / energy if energy else float(changed > 0))
    return float(np.sqrt(np.mean(squares))) if squares else 0.0


class _Comparison:
    """Errors of forms against the dense part: exact on the moments where all is affine, else on the sample."""

    def __init__(self, dense: Model, data: PartData, affine: bool) -> None:
        self._data = data
        self._affine = affine
        self._batches = batches_of(data.sample, dense)
        self._outputs = self._run(open_session(dense))
        self._maps = self._map(dense) if affine else []

    def error(self, form: Model) -> FormError:
        """By how much the outputs of ``form`` differ."""
        operators = {node.op_type for node in form.onnx.graph}
        if self._affine and operators.isdisjoint(_ROUNDING):
            error = self._by_moments(form)
        else:
            error = relative_error(self._outputs, self._run(open_session(form)))
        if not np.isfinite(error):
            return FormError(None, "its outputs are NaN or infinite on the calibration data")
        return FormError(error)

    def _run(self, session: Session) -> list[NDArray[Any]]:
        """Outputs for the sample."""
        return [
            np.stack(found)
            for found in zip(*(session.run(item).values() for item in self._batches), strict=True)
        ]

    def _map(self, model: Model) -> list[NDArray[np.float64]]:
        """Weights and bias of each output, ``[K + 1, N]``: what the rows of the identity give, and one of zeros."""
        names, first = list(self._batches[0]), next(iter(self._batches[0].values()))
        width, length = first.shape[-1], first.shape[-2]  # sessions are made for as many rows
        probes = np.zeros((-(-(width + 1) // length) * length, width), first.dtype)
        probes[np.arange(width), np.arange(width)] = 1
        session = open_session(model)
        pieces = [
            list(session.run(dict.fromkeys(names, probes[at : at + length].reshape(first.shape))).values())
            for at in range(0, len(probes), length)
        ]
        whole = [
            np.concatenate([piece[number].reshape(length, -1) for piece in pieces]).astype(np.float64)[
                : width + 1
            ]
            for number in range(len(pieces[0]))
        ]
        return [np.concatenate([item[:width] - item[width], item[width:]]) for item in whole]

    def _by_moments(self, form: Model) -> float:
        moments = next(iter(self._data.moments.values()))
        last = np.append(moments.mean, 1.0)
        gram = np.concatenate([np.concatenate([moments.gram, moments.mean[None]]), last[:, None]], axis=1)
        squares = []
        for old, new in zip(self._maps, self._map(form), strict=True):
            energy = float(np.einsum("in,ij,jn->", old, gram, old, optimize=True))
            changed = float(np.einsum("in,ij,jn->", new - old, gram, new - old, optimize=True))
            squares.append(max(changed, 0.0) / energy if energy > 0 else float(changed > 0))
        return float(np.sqrt(np.mean(squares)))
