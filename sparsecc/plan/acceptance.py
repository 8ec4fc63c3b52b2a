"""Accepting a result: inputs to judge it on, agreement with the reference, and no slower than the input."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc import calib, emit, verify
from sparsecc.errors import ModelError, SparseccError, VerificationError
from sparsecc.ir import Model
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.passes.lower.linear_form import LinearForm, Refusal, linear_form
from sparsecc.plan.alone import site_model
from sparsecc.plan.costs import CostTable

__all__ = ["TOLERANCE", "Inputs", "Judge", "Latency", "check_agreement", "runnable_inputs", "timing_inputs"]

Inputs = Mapping[str, npt.NDArray[np.generic]]

#: Relative L2 distance allowed between the pruned dense model and the emitted one: fp32 rounding.
TOLERANCE = 1e-5
#: The same where weights or activations are narrower: a few hundred roundings to 11 and to 8 bits.
_NARROW_TOLERANCE = {onnx_ir.DataType.FLOAT16: 2e-3, onnx_ir.DataType.BFLOAT16: 2e-2}
#: The same where activations are quantised: what differs by 1e-7 after one layer can be another integer in the
#: next, a step of 1/255 of the range, so only gross mistakes show. Its operators are checked one by one instead.
_QUANTIZED_TOLERANCE = 0.25
#: An output slower than the input by more than this factor is thrown away.
SLOWEST_ALLOWED = 1.02
#: Seconds spent on the final comparison with the input model.
_FINAL_SECONDS = 10.0

#: Names under which a final comparison is kept in the table.
_SIDES = ("before", "after")
_QUANTILES = tuple(field.name for field in fields(verify.Spread))

#: Sizes tried for symbolic dimensions when a model cannot run on the usual small one.
_LARGER_SIZES = (128, 512)


def runnable_inputs(
    model: Model, data: calib.Calibration | None, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> Inputs:
    """Inputs of ``data``, else synthetic ones; some models need longer sequences than the default size.

    Raises:
        ModelError: onnxruntime cannot run the model on any of them.
    """
    inputs = verify.make_inputs(model, data, seed, shapes)
    session = verify.runner(model, library=False)
    if data is not None or shapes:
        session.run(inputs)
        return inputs
    specs = {spec.name: spec.shape or () for spec in model.input_specs()}
    trials: list[Inputs] = [inputs]
    for size in _LARGER_SIZES:
        larger = {
            name: tuple(
                size if not isinstance(dim, int) and now not in (0, 1) else now
                for dim, now in zip(specs[name], array.shape, strict=True)
            )
            for name, array in inputs.items()
        }
        trials.append(verify.make_inputs(model, None, seed, larger))
    failure: SparseccError | None = None
    for trial in trials:
        try:
            session.run(trial)
            return trial
        except SparseccError as error:
            failure = failure or error
    raise ModelError(f"{failure}; give inputs with --calibration-data or their shapes with --input-shapes")


def timing_inputs(
    model: Model, batch: Inputs, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> Inputs:
    """Inputs to time on: of the asked shapes, else one sample of ``batch`` where the batch size is open."""
    if shapes:
        return verify.make_inputs(model, None, seed, shapes)
    default = verify.make_inputs(model, None, seed)
    first = next(iter(default), None)
    samples = default[first].shape[:1] if first is not None else ()
    return {
        name: array[:1] if samples == (1,) and default[name].shape[:1] == (1,) else array
        for name, array in batch.items()
    }


@dataclass(frozen=True)
class Latency:
    """Median time of the input and of the output model, interleaved in one process, in ms, and how times spread.

    For a machine that is elsewhere ``source`` is ``predicted``, and ``uncertainty`` half the width of an interval that
    holds the output's time in nine of ten cases, as a share.
    """

    before_ms: float
    after_ms: float
    speedup: float
    threads: int
    before: verify.Spread | None = None
    after: verify.Spread | None = None
    source: str = "measured"
    uncertainty: float | None = None


class Judge:
    """Measures candidates against the input model and throws away what is slower.

    Args:
        original: the input model.
        inputs: to time on.
        table: where times are kept.
        threads: of the sessions.
        keep_slower: what is slower stands.
        library: whether the operator library is there.
        predict: time of a model that was made, on a machine that is elsewhere: nothing is measured then.
    """

    def __init__(
        self,
        original: Model,
        inputs: Inputs,
        table: CostTable,
        threads: int,
        keep_slower: bool,
        library: bool,
        predict: Callable[[Model], Latency] | None = None,
    ) -> None:
        self._original = original
        self._inputs = inputs
        self._table = table
        self._threads = threads
        self._keep_slower = keep_slower
        self._library = library
        self._predict = predict

    def not_slower(self, candidate: Model, dense: Model | None, notes: list[str]) -> tuple[Model, Latency]:
        """The first of: the candidate, its dense form, the input itself, that is not slower than the input."""
        latency = self._measure(candidate)
        if self._keep_slower or latency.speedup * SLOWEST_ALLOWED >= 1:
            return candidate, latency
        for name, fallback in (("its dense form", dense), ("the input unchanged", self._original.copy())):
            if fallback is None:
                continue
            was = "was" if latency.source == "measured" else "is predicted to be"
            notes.append(
                f"the result {was} slower than the input ({latency.speedup:.2f}x): {name} is written"
            )
            latency = self._measure(fallback)
            candidate = fallback
            if latency.speedup * SLOWEST_ALLOWED >= 1:
                break
        return candidate, latency

    def _measure(self, model: Model) -> Latency:
        if self._predict is not None:
            return self._predict(model)
        shapes = json.dumps({name: list(array.shape) for name, array in sorted(self._inputs.items())})
        pair = f"{self._original.fingerprint()} {model.fingerprint()} {shapes}"
        digest = hashlib.sha256(pair.encode()).hexdigest()[:16]
        times = self._table.get_or_measure(
            f"final {digest} threads={self._threads}",
            ["speedup", *(f"{side}_{name}" for side in _SIDES for name in _QUANTILES)],
            lambda: self._time(model),
        )
        before, after = (
            verify.Spread(**{name: times[f"{side}_{name}"] for name in _QUANTILES}) for side in _SIDES
        )
        return Latency(before.median, after.median, times["speedup"], self._threads, before, after)

    def _time(self, model: Model) -> dict[str, float]:
        """Times of the input and of ``model``; once more, and longer, where noise may have spoken against it."""
        same = model.fingerprint() == self._original.fingerprint()
        for seconds in (_FINAL_SECONDS, 2 * _FINAL_SECONDS):
            result = verify.benchmark(
                [self._original] if same else [self._original, model],
                self._inputs,
                threads=self._threads,
                library=self._library,
                max_seconds=seconds,
            )
            if result.ratio_to_first[-1] * SLOWEST_ALLOWED >= 1:
                break
        spreads = {
            f"{side}_{name}": value
            for side, timing in zip(_SIDES, (result.models[0], result.models[-1]), strict=True)
            for name, value in asdict(timing.spread).items()
        }
        return {**spreads, "speedup": result.ratio_to_first[-1]}


def _tolerance(model: Model) -> float:
    if any(
        "QuantizeLinear" in node.op_type or "Int8" in node.op_type
        for graph in model.graphs()
        for node in graph
    ):
        return _QUANTIZED_TOLERANCE
    values = [value for graph in model.graphs() for value in (*graph.initializers.values(), *graph.outputs)]
    return max(
        (_NARROW_TOLERANCE.get(value.dtype, TOLERANCE) for value in values if value.dtype), default=TOLERANCE
    )


def check_agreement(reference: Model, result: Model, inputs: Inputs, has_library: bool) -> float:
    """Largest relative L2 distance of any output, with and without the operator library.

    Sites that were quantised in ``reference`` are compared by themselves too.

    Raises:
        VerificationError: it is larger than ``TOLERANCE``, or what the model's own narrower type rounds to.
    """
    worst = 0.0
    reference, result = reference.copy(), result.copy()
    for model in (reference, result):  # in the middle of a pipeline sparse operators have no function yet
        emit.finalize(model)
    _check_quantized_sites(reference, result, inputs, has_library)
    tolerance = max(_tolerance(reference), _tolerance(result))
    for library in (True, False) if has_library else (False,):
        for diff in verify.compare(reference, result, inputs, library=(False, library)):
            if not diff.rel_l2 <= tolerance:
                raise VerificationError(
                    f"output {diff.name} differs by {diff.rel_l2:.2e} (relative L2, allowed {tolerance:.0e}) "
                    f"{'with' if library else 'without'} the operator library; nothing was written: please report it"
                )
            worst = max(worst, diff.rel_l2)
    return worst


def _check_quantized_sites(reference: Model, result: Model, inputs: Inputs, library: bool) -> None:
    """Compare each quantised site of ``reference`` that ``result`` has lowered, on what it reads in ``result``."""
    lowered = {node.name for node in result.onnx.graph if node.domain == DOMAIN}
    forms: dict[str, LinearForm] = {}
    for site in reference.sites():
        if site.quantization is not None and site.in_main_graph and site.name in lowered:
            with contextlib.suppress(Refusal):  # lowered together with its neighbours
                forms[site.name] = linear_form(reference, site, site.node)
    names = {str(value.name) for form in forms.values() for value in (form.source, form.output)}
    given = {spec.name for spec in result.input_specs()}
    if not forms:
        return
    arrays = {
        **inputs,
        **verify.session(calib.tap(result, sorted(names - given)), library=library).run(inputs),
    }
    for name, form in forms.items():
        x, y = arrays[str(form.source.name)], arrays[str(form.output.name)]
        alone = site_model(form, x.shape, reference)
        (expected,) = verify.session(alone).run({str(form.source.name): x}).values()
        distance = verify.compare_arrays(name, expected, y).rel_l2
        if not distance <= TOLERANCE:
            raise VerificationError(
                f"site {name} differs by {distance:.2e} (relative L2, allowed {TOLERANCE:.0e}) from its dense int8 "
                "form; nothing was written: please report it"
            )
