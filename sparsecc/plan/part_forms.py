"""Forms of one part by itself: what passes make of it, and by how much its outputs change then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from sparsecc.calib import Session, open_session
from sparsecc.errors import SparseccError
from sparsecc.ir import Model
from sparsecc.plan.part_data import PartCalibration, PartData
from sparsecc.pm import PassContext, Pipeline

__all__ = ["FormError", "FormTask", "form_errors", "relative_error", "sketched"]

#: Operators after which outputs are no affine function of the inputs, or not to rounding.
_ROUNDING = ("DynamicQuantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class FormError:
    """What fitting a form gave.

    Attributes:
        error: see ``relative_error``; None where there is no such form.
        note: why not.
    """

    error: float | None
    note: str = ""


@dataclass(frozen=True)
class FormTask:
    """All forms of one part that are to be fitted; holds all that this needs, so that it can be sent elsewhere.

    Attributes:
        key: content hash of all but ``specs``.
        model: the part by itself, as a serialised protobuf, with inputs of the shape of the sample.
        data: what it reads.
        nested: whether sites read what others compute.
        specs: passes of each form.
        seed: of everything random.
    """

    key: str
    model: bytes
    data: PartData
    nested: bool
    specs: tuple[tuple[str, ...], ...]
    seed: int = 0


def form_errors(task: FormTask) -> dict[tuple[str, ...], FormError]:
    """Fit all forms of a task, each beginning only once, and return their errors by passes."""
    proto = onnx.ModelProto.FromString(task.model)
    dense = Model.from_proto(proto)
    affine = not task.nested and all(site.op != "Conv" for site in dense.sites())
    forms: dict[tuple[str, ...], tuple[Model, PassContext] | str] = {
        (): (
            dense,
            PassContext(seed=task.seed, calibration=PartCalibration(task.data, dense), threads=1),
        )
    }
    found: dict[tuple[str, ...], FormError] = {}
    compare = _Comparison(dense, task.data, affine)
    for spec in sorted(task.specs):
        for length in range(1, len(spec) + 1):
            if spec[:length] not in forms:
                forms[spec[:length]] = _fitted(forms[spec[: length - 1]], spec[length - 1])
        made = forms[spec]
        found[spec] = FormError(None, made) if isinstance(made, str) else compare.error(made[0])
        for known in [item for item in forms if item and item[0] != spec[0]]:
            del forms[known]  # in this order none of them comes again
    return found


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
        self._inputs = [spec.name for spec in dense.input_specs()]
        self._outputs = self._run(open_session(dense), data.sample)
        self._maps = self._map(dense) if affine else []

    def error(self, form: Model) -> FormError:
        """By how much the outputs of ``form`` differ."""
        operators = {node.op_type for node in form.onnx.graph}
        if self._affine and operators.isdisjoint(_ROUNDING):
            error = self._by_moments(form)
        else:
            error = relative_error(self._outputs, self._run(open_session(form), self._data.sample))
        if not np.isfinite(error):
            return FormError(None, "its outputs are NaN or infinite on the calibration data")
        return FormError(error)

    def _run(self, session: Session, x: NDArray[Any]) -> list[NDArray[Any]]:
        return list(session.run(dict.fromkeys(self._inputs, x)).values())

    def _map(self, model: Model) -> list[NDArray[np.float64]]:
        """Weights and bias of each output, ``[K + 1, N]``: what the rows of the identity give, and one of zeros."""
        sample = self._data.sample
        width, length = sample.shape[-1], sample.shape[-2]  # sessions are made for as many rows
        probes = np.zeros((-(-(width + 1) // length) * length, width), sample.dtype)
        probes[np.arange(width), np.arange(width)] = 1
        session = open_session(model)
        pieces = [
            self._run(session, probes[at : at + length].reshape(sample.shape))
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
