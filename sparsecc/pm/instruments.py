"""Instruments: work around passes (time, dump, verify, stop), so that passes need no flags for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecc.errors import UsageError, VerificationError
from sparsecc.target.spec import suggestion

if TYPE_CHECKING:
    from sparsecc.ir import Model
    from sparsecc.pm.base import Pass
    from sparsecc.pm.context import PassContext
    from sparsecc.pm.report import PassReport

__all__ = ["DumpInstrument", "Instrument", "StopAfterInstrument", "TimingInstrument", "VerifyEachInstrument"]


class Instrument:
    """Called around every pass of a run; the base class does nothing."""

    def begin(self, passes: Sequence[Pass], model: Model, ctx: PassContext) -> None:
        """A run of ``passes`` starts; refuse here what cannot work."""

    def should_run(self, pass_: Pass, model: Model, ctx: PassContext) -> bool:
        """Whether the pass may run; one ``False`` among the instruments leaves it out."""
        return True

    def before(self, pass_: Pass, model: Model, ctx: PassContext) -> None:
        """``pass_`` is about to run."""

    def after(self, pass_: Pass, model: Model, report: PassReport, ctx: PassContext) -> None:
        """``pass_`` has run and its promise was checked."""


class TimingInstrument(Instrument):
    """Keeps the wall time of each pass, its checks included, in ``rows`` as (spec, seconds)."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float]] = []
        self._started = 0.0

    def before(self, pass_: Pass, model: Model, ctx: PassContext) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def after(self, pass_: Pass, model: Model, report: PassReport, ctx: PassContext) -> None:
        """Stop the clock."""
        self.rows.append((str(pass_), time.perf_counter() - self._started))


class DumpInstrument(Instrument):
    """Saves the model into ``directory`` before the first pass and after each pass that changed it.

    Files are ``00-input.onnx``, ``01-tidy.onnx`` and so on, numbered by the place in the pipeline.
    """

    def __init__(self, directory: str | Path, save: Callable[[Model, Path], None] | None = None) -> None:
        """Save into ``directory`` with ``save``; by default as the model is, no function bodies added."""
        self.directory = Path(directory)
        self._save = save or (lambda model, path: model.save(path))
        self._index = 0

    def begin(self, passes: Sequence[Pass], model: Model, ctx: PassContext) -> None:
        """Create the folder and save the input."""
        self._index = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot create the dump folder '{self.directory}': {error.strerror}") from error
        self._save(model, self.directory / "00-input.onnx")

    def before(self, pass_: Pass, model: Model, ctx: PassContext) -> None:
        """Count the pass."""
        self._index += 1

    def after(self, pass_: Pass, model: Model, report: PassReport, ctx: PassContext) -> None:
        """Save what changed."""
        if report.changed:
            self._save(model, self.directory / f"{self._index:02d}-{pass_.name}.onnx")


class VerifyEachInstrument(Instrument):
    """Compares the outputs before and after each pass that changed something.

    Args:
        compare: worst relative L2 difference over the outputs of two models on the same inputs.
        tolerance: largest difference a lossless pass may cause. fp32 rounding over a few thousand terms stays
            below the default.

    ``rows`` keeps (spec, difference) of every comparison, lossy passes included; only lossless ones can fail.
    """

    def __init__(self, compare: Callable[[Model, Model], float], tolerance: float = 1e-5) -> None:
        self.rows: list[tuple[str, float]] = []
        self._compare = compare
        self._tolerance = tolerance
        self._before: Model | None = None

    def before(self, pass_: Pass, model: Model, ctx: PassContext) -> None:
        """Keep a copy to compare with."""
        self._before = model.copy()

    def after(self, pass_: Pass, model: Model, report: PassReport, ctx: PassContext) -> None:
        """Compare, and refuse a lossless pass that changed the outputs.

        Raises:
            VerificationError: the difference is above the tolerance or not a number.
        """
        before, self._before = self._before, None
        if not report.changed or before is None:
            return
        difference = self._compare(before, model)
        self.rows.append((str(pass_), difference))
        if pass_.lossless and not difference <= self._tolerance:
            raise VerificationError(
                f"pass '{pass_}' promises equal outputs but they differ by relative L2 {difference:.3g} "
                f"(limit {self._tolerance:g}); leave the pass out and report this"
            )


class StopAfterInstrument(Instrument):
    """Leaves out everything after the first pass named ``pass_name``."""

    def __init__(self, pass_name: str) -> None:
        self.pass_name = pass_name
        self._stopped = False

    def begin(self, passes: Sequence[Pass], model: Model, ctx: PassContext) -> None:
        """Refuse a name that the pipeline does not hold."""
        self._stopped = False
        names = [item.name for item in passes]
        if self.pass_name not in names:
            raise UsageError(
                f"cannot stop after '{self.pass_name}'{suggestion(self.pass_name, names)}: "
                f"the pipeline holds {', '.join(names) or 'no pass'}"
            )

    def should_run(self, pass_: Pass, model: Model, ctx: PassContext) -> bool:
        """Whether the stop is still ahead."""
        return not self._stopped

    def after(self, pass_: Pass, model: Model, report: PassReport, ctx: PassContext) -> None:
        """Stop once the named pass has run."""
        self._stopped = self._stopped or pass_.name == self.pass_name
