"""For every site the form that loses least of those that pay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.ir.mapped import Scratch
from sparsecc.passes.factor.base import CalibratedFactorPass, FactorPass, Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.prune.gram import Matrix, Quadratic, quadratic_error
from sparsecc.pm import PassContext, PassReport, Range, RewriteCost, get_pass

__all__ = ["Choice", "FactorBest", "Option"]


@dataclass(frozen=True)
class Option:
    """One form that a site could take.

    Attributes:
        factorise: the pass that fits it.
        outline: its shapes.
        cost: what it and the dense site cost alone, if that was measured.
    """

    factorise: FactorPass
    outline: Form
    cost: RewriteCost | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from the other forms of a site."""
        return key_of(self.outline)


def key_of(form: Form) -> tuple[str, str, int]:
    """Kind and sizes of a form."""
    return type(form).__name__, form.describe(), form.numbers


@dataclass(frozen=True)
class Choice(Form):
    """The outlines of several forms. Until one is chosen it stands for the first.

    Attributes:
        options: at least one.
    """

    options: tuple[Option, ...]

    def dense(self) -> Matrix:
        """Return what the first stands for."""
        return self.options[0].outline.dense()

    @property
    def macs(self) -> int:
        """Of the first."""
        return self.options[0].outline.macs

    @property
    def numbers(self) -> int:
        """Of the first."""
        return self.options[0].outline.numbers

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Of the first."""
        return self.options[0].outline.bytes(itemsize, custom_ops=custom_ops)

    def astype(self, dtype: np.dtype[Any]) -> Choice:
        """Return the same forms, rounded."""
        return Choice(tuple(replace(item, outline=item.outline.astype(dtype)) for item in self.options))

    def describe(self) -> str:
        """All of them."""
        return " or ".join(item.outline.describe() for item in self.options)

    def emit(self, chain: Chain) -> None:
        """Add the nodes of the first."""
        self.options[0].outline.emit(chain)


@dataclass(frozen=True)
class FactorBest(CalibratedFactorPass):
    """Replace each weight by the form that loses least of those that are smaller and faster.

    All forms get the same budget. Those that would not take fewer bytes and less measured time drop out, the others
    are fitted to what the site reads now, and the one with the smallest error on its outputs is written. Without
    measured times all forms that are smaller count.

    Changes: as the pass of each form does. Standard operators only, unless a form of ``forms`` has others.
    Skips with the reason: sites that no form suits or pays for, weights shared by nodes, quantised, grouped or tiny
    ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-best{param-ratio=0.6 forms="rrr,cp"}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its factors may hold, in (0, 1].
        multiple: ranks are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall; then the least error decides alone.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        forms: what to choose from: names of passes without ``factor-``, with commas between them.
        custom_ops: whether forms with sparse parts may count on sparse operators.
    """

    name: ClassVar[str] = "factor-best"
    search: ClassVar[tuple[Range, ...]] = ()

    forms: tuple[str, ...] = ("rrr", "spatial-svd", "tucker", "cp", "separable")
    custom_ops: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forms:
            raise SpecError(f"{self.name}: forms must name at least one pass, such as rrr")
        for form in self.forms:
            self._pass_of(form)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Choice | str:
        """Return the outlines of all forms that suit, or why none does."""
        options, reasons = [], {}
        for form in self.forms:
            factorise = self._pass_of(form)
            found = factorise.refusal(site) or factorise.outline(site, numbers, rng)
            if isinstance(found, str):
                reasons[form] = found
            else:
                options.append(Option(factorise, found))
        return Choice(tuple(options)) if options else _none("suits", reasons)

    def priced(self, model: Model, site: Site, outline: Form, ctx: PassContext) -> RewriteCost | str | None:
        """Return what ``site`` and the fastest form cost if one pays, else why none does; None if nothing is timed."""
        found = self._paying(model, site, outline, ctx)
        if isinstance(found, str):
            return found
        costs = [item.cost for item in found.options if item.cost is not None]
        return min(costs, key=lambda cost: cost.ms, default=None)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Form:
        """Return the form with the least error."""
        assert isinstance(outline, Choice), "made by outline"
        found = [option.factorise.fit(problem, option.outline, rng) for option in outline.options]
        return min(found, key=lambda form: quadratic_error(form.dense() - problem.target, problem.gram))

    def record(self, task: Task, fitted: Fitted, report: PassReport) -> None:
        """Report what was chosen, with its own times."""
        assert isinstance(task.outline, Choice), "made by outline"
        costs = {item.key: item.cost for item in task.outline.options}
        super().record(task, replace(fitted, cost=costs[key_of(fitted.form)]), report)

    def _task(self, model: Model, site: Site, shaped: Site, scratch: Scratch, ctx: PassContext) -> Task | str:
        task = super()._task(model, site, shaped, scratch, ctx)
        if isinstance(task, str):
            return task
        paying = self._paying(model, site, task.outline, ctx)  # its times are known by now
        return paying if isinstance(paying, str) else replace(task, outline=paying)

    def _paying(self, model: Model, site: Site, outline: Form, ctx: PassContext) -> Choice | str:
        """Return the forms that pay, with what they cost, or why none does."""
        assert isinstance(outline, Choice), "made by outline"
        options, reasons = [], {}
        for item in outline.options:
            cost = item.factorise.priced(model, site, item.outline, ctx)
            if isinstance(cost, str):
                reasons[item.factorise.name.removeprefix("factor-")] = cost
            else:
                options.append(replace(item, cost=cost))
        return Choice(tuple(options)) if options else _none("pays", reasons)

    def _pass_of(self, form: str) -> FactorPass:
        """Return the pass of a form with the options that all share.

        Raises:
            SpecError: there is none, or it needs more than a target and the inputs' moments.
        """
        found = get_pass(f"factor-{form}")
        known = {info.name.replace("-", "_") for info in found.option_infos()}
        shared = {"param_ratio", "multiple", "min_elements", "keep_slower", "custom_ops"} & known
        if (
            not issubclass(found, FactorPass)
            or found.size_bound
            or any(
                getattr(found, name) is not getattr(FactorPass, name)
                for name in ("run", "write", "fitted", "record")
            )
        ):
            raise SpecError(
                f"{self.name}: forms cannot hold {form}: it is not fitted by the moments of inputs alone"
            )
        return found(**{name: getattr(self, name) for name in shared})


def _none(verb: str, reasons: dict[str, str]) -> str:
    """The reasons of all forms, in one line."""
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return f"no form {verb}: " + "; ".join(f"{form}: {reason}" for form, reason in reasons.items())
