"""What a run needs besides the model: inputs, measured times, the operator library."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from sparsecc import calib, runtime
from sparsecc.errors import RuntimeMissingError, UsageError
from sparsecc.ir import Model
from sparsecc.plan.acceptance import runnable_inputs, timing_inputs
from sparsecc.plan.copies import copies_of, weight_bytes
from sparsecc.plan.cost_model import CostModel
from sparsecc.plan.costs import CostTable, machine_facts
from sparsecc.plan.making import Setting
from sparsecc.plan.predicted import PredictedCosts
from sparsecc.plan.timing import MeasuredCosts
from sparsecc.pm import PassContext, Progress, SiteOverride
from sparsecc.target import Target

__all__ = ["library_found", "open_setting", "usable_threads"]

#: More threads than this only stand in each other's way while models are timed.
_MOST_THREADS = 256


def open_setting(
    original: Model,
    *,
    target: Target,
    calibration_data: str | os.PathLike[str] | None,
    num_samples: int | None,
    memory: float | None,
    input_shapes: Mapping[str, Sequence[int]] | None,
    costs: str | os.PathLike[str] | None,
    seed: int,
    threads: int,
    overrides: Sequence[SiteOverride],
    reference: Model | None,
    keep_slower: bool,
    library: bool,
    progress: Progress,
) -> tuple[Setting, list[str]]:
    """Return the setting of a run on ``original`` and what the user should know before anything ran.

    Arguments are those of ``sparsecc.api.optimize``, checked as far as no model is needed; ``reference`` is the dense
    model that recovery aims at.

    Raises:
        UsageError: calibration data or a cost table that cannot be used.
        ModelError: onnxruntime cannot run the model.
    """
    data = None
    if calibration_data is not None:
        data = calib.Calibration.from_path(
            os.fspath(calibration_data),
            original,
            num_samples=num_samples,
            seed=seed,
            input_shapes=input_shapes,
            memory=_memory(memory),
            progress=progress,
        )
    inputs = runnable_inputs(original, data, seed, input_shapes)
    timed = inputs if data is None else timing_inputs(original, inputs, seed, input_shapes)
    elsewhere = _elsewhere(target, costs)
    predicted: PredictedCosts | None = None
    if elsewhere is None:
        table = CostTable.open(None if costs is None else Path(costs))
        whole = weight_bytes(original.sites())
        measured = MeasuredCosts(table, timed, threads, seed, partial(copies_of, whole=whole))
    else:
        table, predicted = elsewhere, PredictedCosts(CostModel(elsewhere, threads), timed, seed)
        predicted.open_model(original)
    used = measured if predicted is None else predicted
    context = PassContext(
        seed=seed,
        calibration=data,
        costs=used,
        target=target,
        threads=threads,
        overrides=tuple(overrides),
        progress=progress,
        reference=reference,
    )
    setting = Setting(original, data, inputs, timed, table, used, context, keep_slower, library, predicted)
    told = [] if predicted is None else [predicted.times.provenance]
    return setting, [*told, *_notes(original, data, library)]


def usable_threads(asked: int, target: Target, costs: str | os.PathLike[str] | None = None) -> int:
    """The number of threads to time with; for a machine that is elsewhere one that ``costs`` was profiled with.

    Raises:
        RuntimeMissingError: there is no operator library for the target, or nothing that says what it takes there.
        UsageError: more threads than can be timed, or a cost table that does not suit.
    """
    table = _elsewhere(target, costs)
    if table is not None:
        return CostModel(table, asked or target.threads).threads
    threads = asked or target.threads or Target.host().cores or 1
    if threads > _MOST_THREADS:
        raise UsageError(f"{threads} threads cannot be timed; give at most {_MOST_THREADS} with --threads")
    return threads


def _elsewhere(target: Target, costs: str | os.PathLike[str] | None) -> CostTable | None:
    """The cost table of ``target`` where that is another machine than this one; None where it is this one.

    An ARM machine is, anywhere else than on one; ``cpu`` is where the table is of another machine and ``target`` names
    its instruction set or cores, so that nobody plans for another machine by mistake.

    Raises:
        RuntimeMissingError: there is no operator library for it, or no table is given.
        UsageError: the table cannot be read, or is of another kind of machine.
    """
    if target.name == "cuda":
        raise RuntimeMissingError(
            "target cuda: this version has no operator library for it; the file made with --target cpu is "
            "target-neutral and runs there at dense speed"
        )
    named = target.isa is not None or target.cores is not None
    if target.name == Target.host().name or target.name == "cpu":
        known = named and costs is not None and Path(costs).exists()
        if not known or not CostTable.read(Path(str(costs))).differing(machine_facts()):
            return None
    if costs is None:
        raise RuntimeMissingError(
            f"target {target.name}: what it takes cannot be measured here; run 'sparsecc targets profile -o FILE "
            "--model MODEL' there and give FILE with --costs"
        )
    table = CostTable.read(Path(costs))
    facts = table.facts
    found = {
        "": "arm64" if facts.get("machine") in ("aarch64", "arm64") else "cpu",
        "isa": facts.get("isa"),
        "cores": facts.get("cores"),
    }
    wanted = {
        "": target.name,
        "isa": target.isa,
        "cores": None if target.cores is None else str(target.cores),
    }
    wrong = [
        f"{name} {found[name]}".strip() for name, text in wanted.items() if text not in (None, found[name])
    ]
    if wrong:
        raise UsageError(
            f"{costs} was profiled on another machine than {target}: {', '.join(wrong)}; profile there, or name the "
            f"machine of the table with --target '{table.target}'"
        )
    return table


def _memory(gigabytes: float | None) -> int:
    """Bytes for what is measured.

    Raises:
        UsageError: not a positive number.
    """
    if gigabytes is None:
        return calib.MEMORY
    if not 0 < gigabytes < math.inf:
        raise UsageError(f"memory must be a positive number of gigabytes, got {gigabytes:g}")
    return int(gigabytes * 1e9)


def library_found(needed: bool) -> bool:
    """Whether the operator library is there; one that is needed or that the environment names must be."""
    try:
        runtime.get_library_path()
    except RuntimeMissingError:
        if needed or os.environ.get("SPARSECC_OPS_LIBRARY"):
            raise
        return False
    return True


def _notes(model: Model, data: calib.Calibration | None, library: bool) -> list[str]:
    """What the user should know before anything ran."""
    if data is None:
        notes = ["timed and verified on synthetic inputs; --calibration-data gives it real ones"]
    else:
        notes = list(data.notes)
    if model.frozen_inputs:
        shown = ", ".join(model.frozen_inputs[:3]) + (", ..." if len(model.frozen_inputs) > 3 else "")
        notes.append(f"inputs with a default are constants now and cannot be overridden any more: {shown}")
    if not library:
        notes.append("the operator library is missing: zeros stay in dense tensors (see sparsecc doctor)")
    return notes
