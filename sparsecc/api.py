"""The one-call interface: an ONNX file in, a smaller and faster one out, with every claim measured."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sparsecc
from sparsecc import emit, ir, plan, planning, verify
from sparsecc.errors import BudgetError, UnsupportedModelError, UsageError
from sparsecc.ir.files import file_bytes, file_sha256, model_files
from sparsecc.ir.outputs import check_output
from sparsecc.pm import (
    DumpInstrument,
    Instrument,
    PassReport,
    Pipeline,
    Progress,
    SiteOverride,
    StopAfterInstrument,
    VerifyEachInstrument,
    no_progress,
)
from sparsecc.target import Target

__all__ = ["OptimizeResult", "ResizeResult", "load", "optimize", "resize", "save"]


@dataclass
class OptimizeResult:
    """What :func:`optimize` did.

    Attributes:
        output: the file written.
        pipeline: text of the pipeline that ran.
        sites: one decision per site, in graph order.
        reports: what each pass reported.
        bytes_before, bytes_after: size of the model files, external data included.
        latency: of the input and the output, measured at the end.
        max_rel_l2: largest relative L2 distance between the pruned dense model and the output, over its outputs,
            with and without the operator library.
        rel_l2_to_input: the same between the input model and the output: what pruning and quantisation changed.
        notes: what the user should know (synthetic inputs, a fallback to the input model, …).
        not_sites: linear operators that are no sites, each with the reason; none that the passes made.
        library: whether the operator library was there to time and verify with.
        planned: how the forms of sites were chosen, where a budget was given.
    """

    output: Path
    pipeline: str
    sites: list[plan.SiteDecision]
    reports: list[PassReport]
    bytes_before: int
    bytes_after: int
    latency: plan.Latency
    max_rel_l2: float
    rel_l2_to_input: float
    notes: list[str]
    not_sites: list[tuple[str, str]]
    library: bool
    planned: planning.Planned | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json`` and reports."""
        return {
            "output": str(self.output),
            "pipeline": self.pipeline,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "latency": asdict(self.latency),
            "max_rel_l2": self.max_rel_l2,
            "rel_l2_to_input": self.rel_l2_to_input,
            "sites": [decision.to_json() for decision in self.sites],
            "passes": [report.to_json() for report in self.reports],
            "notes": self.notes,
            "not_sites": [{"name": name, "reason": reason} for name, reason in self.not_sites],
            "operator_library": self.library,
            **({} if self.planned is None else self.planned.to_json()),
        }


@dataclass
class ResizeResult:
    """What :func:`resize` did.

    Attributes:
        model: the smaller model; ``model.to_proto()`` is what a session takes.
        output: the file written, or None.
        planes, planes_before: of the smaller model and of the one it was taken from.
        bytes_before, bytes_after: size of the model files, external data included; ``bytes_after`` is an upper bound
            where nothing was written.
    """

    model: ir.Model
    output: Path | None
    planes: int
    planes_before: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        numbers = ("planes", "planes_before", "bytes_before", "bytes_after")
        return {
            "output": None if self.output is None else str(self.output),
            **{name: getattr(self, name) for name in numbers},
        }


def resize(
    model: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, nbytes: int
) -> ResizeResult:
    """Take the best model of at most ``nbytes`` from one whose weights are stacks of planes (``factor-bitstack``).

    Of a model with a data file only what stays is read.

    Args:
        model: ONNX file.
        output: where to write it; nothing is written by default.
        nbytes: most bytes of the model file and its data file.

    Raises:
        UnsupportedModelError: it has no planes.
        BudgetError: the fewest planes take more.
        SparseccError: the model is unreadable, or the output cannot be written.
    """
    source = Path(model)
    destination = source if output is None else Path(output)
    if output is not None:
        check_output(destination, model_files(source))
    whole = ir.Model.load(source)
    planes = ir.Planes.of(whole)
    if planes is None:
        raise UnsupportedModelError(
            f"{source} has no planes to leave out: make it by 'sparsecc optimize --method bitstack'"
        )
    count = planes.largest(whole, nbytes, destination)
    if count is None:
        least = planes.first(whole, len(planes.sites)).written_nbytes(destination)
        raise BudgetError(f"{source} takes {least} bytes with one plane per site: ask for that or more")
    smaller = planes.first(whole, count)
    if output is not None:
        smaller.save(destination)
    return ResizeResult(
        model=smaller,
        output=None if output is None else destination,
        planes=count,
        planes_before=len(planes.order),
        bytes_before=file_bytes(source),
        bytes_after=smaller.written_nbytes(destination) if output is None else file_bytes(destination),
    )


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX file. Raises ``ModelError`` when it is unreadable, unsafe or unsupported."""
    return ir.Model.load(path)


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path`` atomically, with the functions its sparse operators need."""
    emit.finalize(model)
    model.save(path)


def default_output(model: Path) -> Path:
    """Where the result goes when no output is named: ``MODEL.sparse.onnx`` beside the input."""
    return model.with_name(f"{model.stem}.sparse.onnx")


def optimize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    target: str | Target = "cpu",
    pipeline: str | Pipeline | None = None,
    recipe: str | os.PathLike[str] | None = None,
    pattern: str | None = None,
    sparsity: float | None = None,
    method: str | None = None,
    match: str = "*",
    overrides: Sequence[SiteOverride] = (),
    calibration_data: str | os.PathLike[str] | None = None,
    num_samples: int | None = None,
    memory: float | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    quantize: str | None = None,
    activations: str | None = None,
    permute: bool = False,
    recover: str | None = None,
    reference: str | os.PathLike[str] | None = None,
    flops_ratio: float | None = None,
    blocks: int | None = None,
    param_ratio: float | None = None,
    fisher: str | None = None,
    allocate: bool = False,
    values: str = "fp32",
    keep_slower: bool = False,
    standard_ops_only: bool = False,
    costs: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int = 0,
    dump: str | os.PathLike[str] | None = None,
    stop_after: str | None = None,
    verify_each: bool = False,
    instruments: Sequence[Instrument] = (),
    level: int | None = None,
    asked: plan.Asked | None = None,
    progress: Progress = no_progress,
) -> OptimizeResult:
    """Optimise an ONNX file: prune if asked, lower zeros to sparse operators where that is measured faster.

    With none of ``pipeline``, ``recipe``, ``pattern``, ``sparsity``, ``method``, ``quantize`` and ``values`` only
    lossless rewrites are made and only zeros that the weights already have are used.

    Args:
        model: the input file; never written to.
        output: the file to write; default ``MODEL.sparse.onnx`` beside the input.
        target: ``cpu``, or another machine of which ``costs`` were profiled: nothing is measured then.
        pipeline: pipeline text or object to run instead of the preset.
        recipe: TOML file with a pipeline and per-site overrides.
        pattern: ``unstructured``, ``N:M`` (N kept of every M) or ``RxC`` blocks to prune to.
        sparsity: fraction of the weights to remove, in [0, 1).
        method: ``magnitude``, or with calibration data ``wanda``, ``dass``, ``wanda-ols``, ``sparsegpt``, ``alps``
            or ``obc``; ``tiles``, ``armor`` and ``sparse-lowrank`` split or factorise weights too; ``structured``
            removes channels, neurons and heads instead, ``depth`` whole residual blocks; ``rrr``, ``svd`` and the
            others of ``sparsecc.plan.presets.FACTOR`` put smaller operators in the place of weights.
        match: which sites: glob or ``re:`` expression.
        overrides: per-site settings, after those of the recipe.
        calibration_data: ``.npz``, folder, ``FILE.py:func`` or ``synthetic``; also decides the input shapes timed.
        num_samples: most calibration samples to use.
        memory: gigabytes that what is measured on calibration data may take before it goes to files; by default 0.8.
        input_shapes: shapes for symbolic dimensions of named inputs.
        quantize: ``int8``: quantise weights and activations wherever that is measured faster.
        activations: how the range of quantised activations is found: ``dynamic``, at run time, or ``static``, on
            the calibration data (convolutions need that).
        permute: reorder channels before pruning, so that the pattern costs less; outputs stay the same.
        recover: ``bias``, ``bn``, ``ols``, ``align``, ``heal``, several with commas: bring back what pruning took,
            by the calibration data alone.
        reference: file of the dense model that recovery aims at, where the input was pruned before; it has the same
            inputs and outputs.
        flops_ratio: with the methods ``structured`` and ``depth``: share of the multiplications of linear layers to
            keep.
        blocks: with the method ``depth``: how many residual blocks to remove; 1 if neither is given.
        param_ratio: with methods that factorise: share of the numbers of each weight that its factors may hold.
        fisher: with the method ``fwsvd``: ``.npz`` with squared gradients by the names of sites.
        allocate: with methods that factorise: deal the numbers to sites by their spectra instead of all alike.
        values: ``fp16`` or ``bf16``: round the weights of sparse sites to 16 bits and store them so wherever that is
            measured at least as fast as float32, which is the arithmetic all the same.
        keep_slower: lower every site with zeros, to ``pattern`` if given, even where dense is faster (for
            experiments).
        standard_ops_only: emit no custom operators.
        costs: cost table file to use and extend instead of this machine's cached one, or the one of ``target``.
        seed: of everything random.
        threads: threads the model will run on; 0: all cores of this machine.
        dump: folder in which the model is saved after every pass.
        stop_after: name of the last pass to run.
        verify_each: compare the outputs after every lossless pass, to blame the pass that breaks them.
        instruments: called around every pass.
        level: 0 to 3, as ``-O0`` to ``-O3``: 0 only tidies, 1 is the default without a budget, 2 and 3 plan with what
            ``asked`` leaves open filled in (``sparsecc.plan.asked_at``).
        asked: a budget and what goes with it: the form of each site is chosen by measured time, size and error, and the
            result keeps the budget. Contradicts everything that names a method.
        progress: told how far long work is.

    Returns:
        The decisions per site, the sizes, the measured latency and the verification.

    Raises:
        UsageError: contradicting or wrong arguments, an output that is the input.
        ModelError: the model is unreadable, unsafe or unsupported.
        VerificationError: the result does not compute what the pruned dense model computes, or no model loses as
            little as asked.
        BudgetError: the budget of time or size cannot be reached.
        RuntimeMissingError: the operator library is missing, or there is none for the target.
    """
    source = Path(model)
    destination = Path(output) if output is not None else default_output(source)
    check_output(destination)
    wanted = Target.parse(target) if isinstance(target, str) else target
    threads = plan.usable_threads(threads, wanted, costs)
    library = plan.library_found(needed=keep_slower and not standard_ops_only)
    flags = {
        "pattern": pattern, "sparsity": sparsity, "method": method, "quantize": quantize,
        "permute": permute or None, "flops_ratio": flops_ratio, "blocks": blocks, "recover": recover,
        "param_ratio": param_ratio, "fisher": fisher,
        "allocate": allocate or None, "values": None if values == "fp32" else values, "activations": activations,
    }  # fmt: skip
    named = {"recipe": recipe, "pipeline": pipeline, **flags}
    plan.refuse_at(level, [name for name, value in named.items() if value is not None])
    asked = plan.asked_at(level, asked)
    _refuse_contradiction(pipeline, recipe, asked, flags)
    pipeline = plan.TIDY if level == 0 else pipeline
    if recipe is not None:
        chosen = Pipeline.from_toml(Path(recipe))
    elif pipeline is not None:
        chosen = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    else:
        chosen = plan.preset(
            pattern=pattern,
            sparsity=sparsity,
            method=method,
            match=match,
            keep_slower=keep_slower,
            standard_ops_only=standard_ops_only or not library,
            calibrated=calibration_data is not None,
            quantize=quantize,
            activations=activations,
            permute=permute,
            recover=recover,
            pruned_before=reference is not None,
            flops_ratio=flops_ratio,
            blocks=blocks,
            param_ratio=param_ratio,
            fisher=fisher,
            allocate=allocate,
            values=values,
        )
    original = ir.Model.load(source)
    aim = None if reference is None else plan.load_reference(Path(reference), original, chosen)
    theirs = [] if reference is None else model_files(reference)
    check_output(
        destination,
        [
            *model_files(source),
            *theirs,
            calibration_data,
            recipe,
            costs,
            fisher,
            None if asked is None else asked.analysis,
            None if asked is None else asked.metric,
        ],
    )
    setting, notes = plan.open_setting(
        original,
        target=wanted,
        calibration_data=calibration_data,
        num_samples=num_samples,
        memory=memory,
        input_shapes=input_shapes,
        costs=costs,
        seed=seed,
        threads=threads,
        overrides=overrides,
        reference=aim,
        keep_slower=keep_slower,
        library=library,
        progress=progress,
    )
    if recipe is not None:
        notes += plan.read_plan(Path(recipe), sites=plan.site_names(original), model=file_sha256(source))[1]
    setting = setting.observed([*instruments, *_instruments(dump, stop_after, verify_each, setting.inputs)])
    planned = None
    try:
        if asked is None:
            made = plan.make(chosen, setting)
        else:
            planned = planning.plan_and_make(
                setting, asked, source, destination, calibration_data, standard_ops_only=standard_ops_only
            )
            made, chosen = planned.made, planned.pipeline
            notes.extend(planned.planner.notes)
        notes.extend(made.notes)
    finally:
        notes.extend(setting.table.keep())
    work = made.model
    parts = tuple(f"{item.site}." for report in made.outcome.reports for item in report.changed)
    _record_provenance(work, source, reference, chosen, setting, made.sites)
    work.save(destination)
    return OptimizeResult(
        output=destination,
        pipeline=str(chosen),
        sites=made.sites,
        reports=made.outcome.reports,
        bytes_before=file_bytes(source),
        bytes_after=file_bytes(destination),
        latency=made.latency,
        max_rel_l2=made.max_rel_l2,
        rel_l2_to_input=verify.worst_rel_l2(
            verify.compare(original, work, setting.inputs, library=(False, library))
        ),
        notes=list(dict.fromkeys(notes)),
        not_sites=[item for item in made.dense.unsupported_sites() if not item[0].startswith(parts)],
        library=library,
        planned=planned,
    )


def _refuse_contradiction(
    pipeline: str | Pipeline | None, recipe: object, asked: plan.Asked | None, flags: Mapping[str, object]
) -> None:
    preset = [name for name, value in flags.items() if value is not None]
    named = (("recipe", recipe), ("pipeline", pipeline), ("a budget", asked))
    given = [name for name, value in named if value is not None]
    if len(given) > 1 or (given and preset):
        raise UsageError(
            f"{', '.join((given + preset)[:-1])} and {(given + preset)[-1]} contradict; give one of them"
        )


def _instruments(
    dump: str | os.PathLike[str] | None, stop_after: str | None, verify_each: bool, inputs: plan.Inputs
) -> list[Instrument]:
    chosen: list[Instrument] = []
    if dump is not None:
        chosen.append(DumpInstrument(Path(dump), save))
    if stop_after is not None:
        chosen.append(StopAfterInstrument(stop_after))
    if verify_each:
        chosen.append(
            VerifyEachInstrument(
                lambda a, b: verify.worst_rel_l2(_compare_ready(a, b, inputs)), plan.TOLERANCE
            )
        )
    return chosen


def _compare_ready(a: ir.Model, b: ir.Model, inputs: plan.Inputs) -> list[verify.OutputDiff]:
    """Compare models in the middle of a pipeline: their sparse operators have no function yet."""
    before, after = a.copy(), b.copy()
    emit.finalize(before)
    emit.finalize(after)
    return verify.compare(before, after, inputs)


def _record_provenance(
    model: ir.Model,
    source: Path,
    reference: str | os.PathLike[str] | None,
    pipeline: Pipeline,
    setting: plan.Setting,
    sites: Sequence[plan.SiteDecision],
) -> None:
    """Leave in the model's metadata how it was made; nothing that differs between equal runs."""
    layouts = {decision.site: decision.layout for decision in sites if decision.layout != "dense"}
    model.metadata.update(
        {
            "sparsecc.version": sparsecc.__version__,
            "sparsecc.pipeline": str(pipeline),
            "sparsecc.input_sha256": file_sha256(source),
            **({} if reference is None else {"sparsecc.reference_sha256": file_sha256(reference)}),
            "sparsecc.seed": str(setting.context.seed),
            "sparsecc.calibration": "none" if setting.data is None else setting.data.fingerprint(),
            "sparsecc.layouts": json.dumps(layouts, sort_keys=True),
        }
    )
