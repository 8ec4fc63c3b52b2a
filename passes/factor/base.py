"""What passes share that put a smaller chain of operators in the place of a site."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import MeasurementError, SpecError
from sparsecc.ir import Model, Site
from sparsecc.ir.mapped import Scratch
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.hybrid.rewriting import Rewriter, refusal
from sparsecc.passes.prune.gram import (
    Matrix,
    Quadratic,
    Ridged,
    check_fit,
    correction_for,
    irreducible_error,
    quadratic_error,
    shifted_target,
)
from sparsecc.passes.prune.walk import fitted_bias, group_moments, settable_biases, solutions
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import MomentsLike, Pass, PassContext, PassReport, Range, RewriteCost, select_sites
from sparsecc.sparse import density

__all__ = ["CalibratedFactorPass", "FactorPass", "Fitted", "Task", "rewrite"]

#: How many times the dense one's the measured time of an equal product may be.
_NOISE = 1.15

#: Share by which the constants of a chain may be larger than what its outline says: shapes, places, tables.
_PADDING = 1.1


@dataclass(frozen=True)
class Task:
    """A site to factorise, and what it shall become.

    Attributes:
        site: where the weight is.
        outline: a form of the right shapes with random values.
        cost: what both cost alone, if that was measured.
        scratch: where a weight that is in a file goes meanwhile.
    """

    site: Site
    outline: Form
    cost: RewriteCost | None
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def names(self) -> Sequence[str]:
        """Of all sites that are fitted with this one, itself among them."""
        return (self.site.name,)


@dataclass(frozen=True)
class Fitted:
    """What a site becomes, rounded as the graph stores it, with its bias ``[N]`` if that is fitted too.

    Attributes:
        form: with the values that are stored.
        total: ``[N, K]``, the weight it stands for.
        bias: None leaves it as it is.
        numbers: for the report.
        cost: what it and the dense site cost, if that was measured.
    """

    form: Form
    total: NDArray[Any]
    bias: NDArray[np.float64] | None
    numbers: dict[str, float]
    cost: RewriteCost | None


def rewrite(model: Model, site: Site, form: Form) -> None:
    """Put the nodes of ``form`` in the place of the one node of ``site``. Other sites of ``model`` are stale then."""
    _rewrite_all(model, [(site, form)])


def _rewrite_all(model: Model, found: Sequence[tuple[Site, Form]]) -> None:
    """Put the nodes of all forms into the graph, front to back: later ones may read results of earlier ones."""
    rewriter = Rewriter(model)
    order = {node: at for at, node in enumerate(model.onnx.graph.all_nodes())}
    for site, form in sorted(found, key=lambda item: order[item[0].node]):
        form.emit(Chain(rewriter, site))
    remove_dead(model.onnx)
    model.infer_shapes()


@dataclass(frozen=True)
class FactorPass(Pass):
    """Base of passes that factorise the weights of sites: options, refusals, measured costs, rewriting, reports.

    A site is rewritten only if that takes fewer bytes and, where times are measured, less time.

    Class attributes:
        size_bound: what is written is the dense product with a weight that a session unpacks once: its time does not
            fall, and differs from the dense one by noise.
    """

    lossless: ClassVar[bool] = False
    size_bound: ClassVar[bool] = False
    search: ClassVar[tuple[Range, ...]] = (Range.of("param-ratio", (0.8, 0.6, 0.4)),)

    match: str = "*"
    param_ratio: float = 0.7
    multiple: int = 8
    min_elements: int = 4096
    keep_slower: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.param_ratio <= 1:
            raise SpecError(f"{self.name}: param-ratio must be in (0, 1], got {self.param_ratio:g}")
        self.require_at_least(multiple=1)

    @abstractmethod
    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Form | str:
        """Return what ``site`` would become with at most ``numbers`` numbers, its values random, or why it cannot.

        The shapes around ``site`` are inferred as far as that is possible.
        """

    @abstractmethod
    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Form:
        """Return a form with the shapes of ``outline`` that is close to the target.

        Raises:
            numpy.linalg.LinAlgError: it cannot be found.
        """

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Factorise every matching site in place; each one left alone is reported with the reason."""
        report = PassReport(self.name)
        tasks, scratch = [], Scratch()
        sites = select_sites(model, self.match, report)
        inferred = model.copy()  # nothing of the model may change where nothing is rewritten
        inferred.infer_shapes()
        shaped = {site.name: site for site in inferred.sites()}
        together = self.together(model, sites, shaped, scratch, ctx, report)
        for done, site in enumerate(sites):
            ctx.progress(f"{self.name}: timing", done, len(sites))
            task = together.get(site.name) or self._task(model, site, shaped[site.name], scratch, ctx)
            site.release()
            if isinstance(task, Task):
                tasks.append(task)
            else:
                report.skip(site.name, task)
        ctx.progress(f"{self.name}: timing", len(sites), len(sites))
        found = list(self.solve(model, tasks, ctx, report))
        if found:
            self.write(model, found, ctx, report)
            remove_dead(model.onnx)
            model.infer_shapes()
        return report

    def sketch(self, model: Model, ctx: PassContext) -> PassReport:
        """Give every matching site its outline, whose values are random."""
        report, scratch = PassReport(self.name), Scratch()
        untimed = replace(ctx, costs=None)
        inferred = model.copy()
        inferred.infer_shapes()
        shaped = {site.name: site for site in inferred.sites()}
        found = []
        for site in select_sites(model, self.match, report):
            task = self._task(model, site, shaped[site.name], scratch, untimed)
            if isinstance(task, str):
                report.skip(site.name, task)
                continue
            found.append((task, Fitted(task.outline, task.outline.dense(), None, {}, None)))
            report.change(site.name, task.outline.describe())
        if found:
            self.write(model, found, ctx, report)
            remove_dead(model.onnx)
            model.infer_shapes()
        return report

    def together(
        self,
        model: Model,
        sites: Sequence[Site],
        shaped: Mapping[str, Site],
        scratch: Scratch,
        ctx: PassContext,
        report: PassReport,
    ) -> Mapping[str, Task]:
        """Return by name the sites that are fitted with others, each as a task of its own; by default none are."""
        return {}

    def write(
        self, model: Model, found: Sequence[tuple[Task, Fitted]], ctx: PassContext, report: PassReport
    ) -> None:
        """Put the nodes of all forms into the graph; until then the sites hold the weights these stand for."""
        _rewrite_all(model, [(task.site, fitted.form) for task, fitted in found])

    def solve(
        self, model: Model, tasks: Sequence[Task], ctx: PassContext, report: PassReport
    ) -> Iterator[tuple[Task, Fitted]]:
        """Yield the forms of the sites, which hold the whole weight meanwhile; without data all inputs count alike.

        Errors of outputs are not known then: what is reported is ``relative_error``, that of the weight.
        """
        for done, task in enumerate(tasks):
            ctx.progress(self.name, done, len(tasks))
            fitted = self.solved(task, _without_data, ctx)
            if isinstance(fitted, str):
                report.skip(task.site.name, fitted)
            else:
                self.record(task, fitted, report)
                yield task, fitted
        ctx.progress(self.name, len(tasks), len(tasks))

    def solved(self, task: Task, problem_of: Callable[[Matrix], Quadratic], ctx: PassContext) -> Fitted | str:
        """Fit one site, or say why not.

        Args:
            task: the site.
            problem_of: gives the problem of a weight ``[N, K]`` that reads what the site reads.
            ctx: of the run.
        """
        return self.fitted(task, problem_of(np.asarray(task.site.numpy(), np.float64)), ctx)

    def fitted(self, task: Task, problem: Quadratic, ctx: PassContext) -> Fitted | str:
        """Fit one site, or say why not."""
        try:
            form = self.fit(problem, task.outline, ctx.rng(self.name, task.site.name))
        except np.linalg.LinAlgError as failure:
            return f"its factors cannot be found ({failure}): raise damping"
        return self.judged(task, problem, form)

    def judged(self, task: Task, problem: Quadratic, form: Form) -> Fitted | str:
        """Return what a form, rounded to the type of the site, makes of its outputs, or why it does not do."""
        form = form.astype(task.site.dtype)
        total = form.dense()
        if not np.isfinite(total).all():
            return f"its factors do not fit into {task.site.dtype.name}"
        energy = quadratic_error(problem.target, problem.gram)
        error = quadratic_error(total - problem.target, problem.gram)
        numbers = {"output_error": error / energy if energy else 0.0} if self.requires_calibration else {}
        if problem.irreducible is not None:
            numbers["irreducible_error"] = problem.irreducible
        return Fitted(form, total.astype(task.site.dtype), None, numbers, task.cost)

    def record(self, task: Task, fitted: Fitted, report: PassReport) -> None:
        """Store the whole weight and report what becomes of it."""
        site, form, cost = task.site, fitted.form, fitted.cost
        weight = np.asarray(site.numpy(), np.float64)
        distance = np.linalg.norm(weight - fitted.total) / (np.linalg.norm(weight) or 1.0)
        kept = form.numbers / weight.size
        detail = f"{form.describe()}: {kept:.3g} of the numbers"
        times = {}
        if cost is not None:
            times = {"dense_ms": cost.dense_ms, "ms": cost.ms, "gain": round(cost.dense_ms / cost.ms, 4)}
            detail += f", {cost.ms:.4g} ms, dense {cost.dense_ms:.4g} ms ({cost.dense_ms / cost.ms:.2f}x)"
        site.release()
        site.replace(fitted.total, task.scratch)
        report.change(
            site.name, detail, form=form.describe(), op=site.op, outputs=site.shape[0], inputs=site.shape[1],
            parameters=kept, macs=form.macs, relative_error=float(distance),
            density_before=density(weight), density_after=density(fitted.total),
            **fitted.numbers, **times,
        )  # fmt: skip

    def refusal(self, site: Site) -> str | None:
        """Return why ``site`` stays as it is, judged without its values."""
        if reason := refusal(site):
            return reason
        if site.shape[0] * site.shape[1] < self.min_elements:
            return f"only {site.shape[0] * site.shape[1]} weights (min-elements={self.min_elements})"
        return None

    def left_alone(self, site: Site, ctx: PassContext) -> str | None:
        """Return why ``site`` stays as it is whatever it would become: by settings, ``refusal`` or its values."""
        settings = ctx.settings_for(site, self)
        left_out = settings.pattern is not None and settings.pattern.kind == "dense"
        if settings.skip or left_out or settings.param_ratio in (None, 1):
            return "left alone: nothing of it is to be saved"
        if reason := self.refusal(site):
            return reason
        weight = site.numpy()
        if bad := weight.size - int(np.count_nonzero(np.isfinite(weight))):
            return f"{bad} of its {weight.size} weights are NaN or infinite"
        return None

    def outline_at(self, site: Site, share: float, ctx: PassContext) -> Form | str:
        """Return what ``site`` would become with that share of its numbers, in its type, or why it cannot."""
        found = self.outline(
            site, int(share * site.shape[0] * site.shape[1] + 1e-9), ctx.rng(self.name, "outline", site.name)
        )
        return found if isinstance(found, str) else found.astype(site.dtype)

    def priced(self, model: Model, site: Site, outline: Form, ctx: PassContext) -> RewriteCost | str | None:
        """Return what ``site`` and the outline cost if that is less, else why not; None if nothing is timed."""
        return self.priced_together(model, [site], [outline], ctx)

    def priced_together(
        self, model: Model, sites: Sequence[Site], outlines: Sequence[Form], ctx: PassContext
    ) -> RewriteCost | str | None:
        """As ``priced`` for sites that read the same."""
        custom_ops = bool(getattr(self, "custom_ops", False))
        itemsize, described = sites[0].dtype.itemsize, outlines[0].describe()
        size = sum(outline.bytes(itemsize, custom_ops=custom_ops) for outline in outlines)
        dense = sum(site.shape[0] * site.shape[1] for site in sites) * itemsize
        if size >= dense and not self.keep_slower:
            return f"{described} takes {size} bytes, dense {dense}"
        if ctx.costs is None or self.keep_slower:
            return None
        numbers = sum(outline.numbers for outline in outlines)
        key = f"{type(outlines[0]).__name__} {described} {numbers}"
        try:
            if len(sites) == 1:
                cost = ctx.costs.rewritten(
                    model,
                    sites[0],
                    lambda part, own: rewrite(part, own, outlines[0]),
                    key,
                    custom_ops=custom_ops,
                )
            else:
                cost = ctx.costs.rewritten_together(
                    model,
                    sites,
                    lambda part, own: _rewrite_all(part, list(zip(own, outlines, strict=True))),
                    key,
                    custom_ops=custom_ops,
                )
        except MeasurementError as error:
            return str(error)
        said = f"{described} takes {cost.ms:.4g} ms, dense {cost.dense_ms:.4g} ms"
        if cost.ms >= cost.dense_ms * (_NOISE if self.size_bound else 1):
            return f"not faster: {said}"
        if self.size_bound:
            return cost  # of its bytes some are tables that all sites share
        if cost.bytes >= cost.dense_bytes:
            return f"not smaller: {cost.bytes} bytes, dense {cost.dense_bytes}; {said}"
        written = dense + cost.bytes - cost.dense_bytes
        if written > size * _PADDING:
            return (
                f"its sparse part is faster dense here and would take its zeros along, {written} bytes instead of "
                f"{size}: low rank of that size loses less (factor-rrr); {said}"
            )
        return cost

    def _task(self, model: Model, site: Site, shaped: Site, scratch: Scratch, ctx: PassContext) -> Task | str:
        if reason := self.left_alone(site, ctx):
            return reason
        share = ctx.settings_for(site, self).param_ratio
        assert share is not None, "left_alone saw to that"
        outline = self.outline_at(shaped, share, ctx)
        if isinstance(outline, str):
            return outline
        cost = self.priced(model, site, outline, ctx)
        return cost if isinstance(cost, str) else Task(site, outline, cost, scratch)


def _without_data(weight: Matrix) -> Quadratic:
    inputs = weight.shape[1]
    return Quadratic(weight, np.eye(inputs), np.ones(inputs), None)


@dataclass(frozen=True)
class CalibratedFactorPass(FactorPass):
    """Base of passes that factorise by the second moments of what sites read, front to back."""

    requires_calibration: ClassVar[bool] = True

    damping: float = 0.01
    sequential: bool = True
    correction: float | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, correction=self.correction)

    def solve(
        self, model: Model, tasks: Sequence[Task], ctx: PassContext, report: PassReport
    ) -> Iterator[tuple[Task, Fitted]]:
        """Yield the forms of the sites, measured and solved front to back; they hold the whole weight meanwhile.

        Raises:
            UsageError: there is no calibration source.
        """
        biases = settable_biases(model, [task.site for task in tasks]) if self.bias else {}

        def solve(task: Task, moments: MomentsLike) -> Fitted | str:
            weight = np.asarray(task.site.numpy(), np.float64)
            bias = biases.get(task.site.name)
            affine = all(name in biases for name in task.names)
            problem_of = partial(self._problem, task.site, moments=moments, affine=affine, ctx=ctx)
            fitted = self.solved(task, problem_of, ctx)
            if isinstance(fitted, str) or bias is None:
                return fitted
            total = np.asarray(fitted.total, np.float64)
            return replace(fitted, bias=fitted_bias(task.site, bias, weight, total, moments))

        for task, fitted in solutions(
            self.name, model, model.copy(), tasks, solve, ctx, report, sequential=self.sequential
        ):
            self.record(task, fitted, report)
            if fitted.bias is not None:
                biases[task.site.name].replace(fitted.bias)
            yield task, fitted

    def _problem(
        self, site: Site, weight: Matrix, *, moments: MomentsLike, affine: bool, ctx: PassContext
    ) -> Quadratic:
        gram, cross, reference = group_moments(moments, 0, 1, None, affine)
        lost, target = None, weight
        if self.sequential and reference is not None:
            lost = irreducible_error(weight, reference, cross, gram, self.damping)
        if self.sequential and (share := correction_for(site.op, self.correction)):
            target = shifted_target(weight, gram, cross, self.damping, share)
        ridged = Ridged(gram, self.damping)
        return Quadratic(target, ridged.matrix, ridged.energy, lost, trial=ctx.trial)
