"""Pipelines: passes in order, as text, as TOML and as something that runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecc.errors import PassError, SparseccError, SpecError, UsageError
from sparsecc.pm.base import Pass
from sparsecc.pm.checks import Signature, graph_fault, signature, signature_fault
from sparsecc.pm.context import PassContext, SiteOverride
from sparsecc.pm.recipe import format_recipe, parse_recipe
from sparsecc.pm.registry import get_pass
from sparsecc.pm.report import PassReport
from sparsecc.pm.sites import refuse_unmatched
from sparsecc.target.spec import parse_specs

if TYPE_CHECKING:
    from sparsecc.ir import Model

__all__ = ["Pipeline", "read_recipe"]


def read_recipe(path: str | Path) -> str:
    """Return the text of a recipe file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read the recipe '{path}': {reason}; give a TOML file") from error


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, and the per-site overrides of the recipe they came from.

    ``str`` gives the passes as text, which ``Pipeline.parse`` reads back; overrides need the TOML form.
    """

    passes: tuple[Pass, ...] = ()
    overrides: tuple[SiteOverride, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Return the pipeline of a text such as ``tidy,prune-magnitude{pattern=2:4 match=re:.*mlp.*}``.

        Raises:
            SpecError: bad grammar, unknown pass, unknown option, or an option value that does not fit.
        """
        return cls(tuple(get_pass(spec.name).from_options(spec.options) for spec in parse_specs(text)))

    @classmethod
    def from_toml(cls, path: str | Path) -> Pipeline:
        """Return the pipeline of a recipe file, or of a plan, which is one.

        Raises:
            UsageError: the file cannot be read.
            SpecError: it is not a recipe.
        """
        return cls.parse_toml(read_recipe(path), source=str(path))

    @classmethod
    def parse_toml(cls, text: str, *, source: str = "recipe") -> Pipeline:
        """Return the pipeline of a recipe's text; ``source`` names it in errors."""
        specs, overrides = parse_recipe(text, source)
        try:
            return cls.parse_all(specs, overrides)
        except SpecError as error:
            raise SpecError(f"{source}: {error}") from None

    @classmethod
    def parse_all(cls, specs: Iterable[str], overrides: Sequence[SiteOverride] = ()) -> Pipeline:
        """Return the pipeline of these texts, one after another.

        Raises:
            SpecError: as for ``parse``.
        """
        passes = [item for spec in specs for item in cls.parse(spec).passes]
        return cls(tuple(passes), tuple(overrides))

    def to_toml(self) -> str:
        """Return the recipe text that ``parse_toml`` reads back."""
        return format_recipe([str(item) for item in self.passes], self.overrides)

    def __str__(self) -> str:
        return ",".join(str(item) for item in self.passes)

    @property
    def requires_calibration(self) -> bool:
        """Whether some pass needs ``ctx.calibration``."""
        return any(item.requires_calibration for item in self.passes)

    def run(self, model: Model, ctx: PassContext | None = None) -> list[PassReport]:
        """Run the passes on ``model`` in place and return one report per pass that ran.

        Overrides of the context come after, so win over, those of the pipeline. After every pass that changed
        something the graph must be valid and have the inputs and outputs it had.

        Raises:
            UsageError: calibration is missing or an override matches no site; nothing has run then.
            PassError: a pass broke its promise or raised something unexpected. The model may be half changed.
            SparseccError: raised by a pass on purpose; it comes through as it is.
        """
        ctx = dataclasses.replace(ctx or PassContext())
        ctx.overrides = (*self.overrides, *ctx.overrides)
        self._refuse_early(model, ctx)
        for instrument in ctx.instruments:
            instrument.begin(self.passes, model, ctx)
        runner = _Runner(model, ctx)
        for index, pass_ in enumerate(self.passes):
            if all([item.should_run(pass_, model, ctx) for item in ctx.instruments]):
                ctx.progress(pass_.name, index, len(self.passes))
                runner.run(pass_)
        ctx.progress("pipeline", len(self.passes), len(self.passes))
        return runner.reports

    def _refuse_early(self, model: Model, ctx: PassContext) -> None:
        names = [item.name for item in self.passes if item.requires_calibration]
        if names:
            ctx.calibration_for(", ".join(names))
        if ctx.overrides:
            known = [*(site.name for site in model.sites()), *(name for name, _ in model.unsupported_sites())]
            for override in ctx.overrides:
                refuse_unmatched(override.match, known, "override")


class _Runner:
    """One run: what was true of the model at the start, and the reports so far."""

    def __init__(self, model: Model, ctx: PassContext) -> None:
        self.model = model
        self.ctx = ctx
        self.reports: list[PassReport] = []
        self._signature: Signature = signature(model)
        # A model that onnx.checker refuses may still run in onnxruntime: only blame a pass for what it broke.
        self._was_valid = graph_fault(model) is None

    def run(self, pass_: Pass) -> None:
        for instrument in self.ctx.instruments:
            instrument.before(pass_, self.model, self.ctx)
        if not pass_.lossless and self.ctx.before_lossy is None:
            self.ctx.before_lossy = self.model.copy()
        started = time.perf_counter()
        report = self._call(pass_)
        report.seconds = time.perf_counter() - started
        report.spec = str(pass_)
        if report.changed:
            self._check(pass_)
        self.reports.append(report)
        for instrument in reversed(self.ctx.instruments):
            instrument.after(pass_, self.model, report, self.ctx)

    def _call(self, pass_: Pass) -> PassReport:
        try:
            report: object = pass_.run(self.model, self.ctx)
        except SparseccError:
            raise
        except Exception as error:  # the boundary to code of third parties
            raise self._error(
                pass_, f"raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        if not isinstance(report, PassReport):
            raise self._error(pass_, f"returned {type(report).__name__} instead of a PassReport")
        return report

    def _check(self, pass_: Pass) -> None:
        fault = signature_fault(self._signature, signature(self.model))
        if fault is None and self._was_valid:
            fault = graph_fault(self.model)
        if fault is not None:
            raise self._error(pass_, f"left an invalid model: {fault}")

    def _error(self, pass_: Pass, what: str) -> PassError:
        done = ", ".join(report.pass_name for report in self.reports) or "none"
        return PassError(f"pass '{pass_}' {what} (ran before it: {done}); leave the pass out and report this")
