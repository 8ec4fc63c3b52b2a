"""Sites that read the same, as query, key and value of one attention do, with their first factor in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.ir.mapped import Scratch
from sparsecc.passes.factor.base import Fitted, Task
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.thin_factors import LowRank, LowRankPass, random_factors
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.prune.gram import Matrix, Quadratic, quadratic_error
from sparsecc.pm import PassContext, PassReport, RewriteCost

__all__ = ["SharedLowRank", "SharingPass", "joint_factors"]


@dataclass(frozen=True)
class SharedLowRank(LowRank):
    """``left @ right`` of one of several sites that have ``right`` in common.

    Attributes:
        sites: how many they are.
        outputs: of all of them.
    """

    sites: int = 1
    outputs: int = 0

    @property
    def numbers(self) -> int:
        """Values of ``left``, and the part of those in ``right`` that is in proportion to the outputs."""
        return self.left.size + round(self.right.size * len(self.left) / self.outputs)

    def describe(self) -> str:
        """The rank."""
        return f"rank {self.left.shape[1]} shared by {self.sites} sites"

    def emit(self, chain: Chain) -> None:
        """Add the second product, and the first if no other site has."""
        chain.finish(chain.matmul(chain.common(self.right, "right"), self.left, "left"))


class Joint:
    """Sites that are fitted at once, by whichever thread comes first.

    Args:
        together: tasks with the first factor in common.
        alone: the same sites, each with factors of its own; None where these do not pay.
    """

    def __init__(self, together: Sequence[Task], alone: Sequence[Task] | None) -> None:
        self.together = together
        self.alone = alone
        self._lock = Lock()
        self._found: Mapping[str, Fitted] | str | None = None

    def fitted(self, name: str, fit: Callable[[], Mapping[str, Fitted] | str]) -> Fitted | str:
        """Return what the site of that name becomes; ``fit`` finds it for all, once."""
        with self._lock:
            if self._found is None:
                self._found = fit()
        return self._found if isinstance(self._found, str) else self._found[name]


@dataclass(frozen=True)
class JointTask(Task):
    """One of several sites that are fitted at once."""

    joint: Joint | None = None

    @property
    def names(self) -> Sequence[str]:
        """Of all of them."""
        assert self.joint is not None, "made with one"
        return [task.site.name for task in self.joint.together]


def joint_factors(
    problems: Sequence[Quadratic], find: Callable[[Quadratic], Factors]
) -> tuple[list[Matrix], Matrix]:
    """Return the factors ``[N_i, r]`` of each target and the one ``[r, K]`` that they share.

    The targets are stacked, each scaled to outputs of energy 1: what falls is the sum of the relative errors. Else
    sites with small outputs, such as values beside queries and keys, would bear most of the error.

    Args:
        problems: with targets ``[N_i, K]``; those of one input have one ``gram``.
        find: gives the factors of the stack.
    """
    energies = [quadratic_error(problem.target, problem.gram) for problem in problems]
    scales = [1 / np.sqrt(energy) if energy else 1.0 for energy in energies]
    stack = np.concatenate([problem.target * scale for problem, scale in zip(problems, scales, strict=True)])
    found = find(replace(problems[0], target=stack, irreducible=None))
    rows = np.cumsum([len(problem.target) for problem in problems])[:-1]
    lefts = [left / scale for left, scale in zip(np.split(found.left, rows), scales, strict=True)]
    even = Factors(np.concatenate(lefts), found.right).balanced()
    return np.split(even.left, rows), even.right


@dataclass(frozen=True)
class SharingPass(LowRankPass):
    """Base of passes that find weights of low rank, with a first factor in common if wanted."""

    share_inputs: bool = False

    def together(
        self,
        model: Model,
        sites: Sequence[Site],
        shaped: Mapping[str, Site],
        scratch: Scratch,
        ctx: PassContext,
        report: PassReport,
    ) -> Mapping[str, Task]:
        """Return the sites that share a factor; why others that read the same do not is noted."""
        found: dict[str, Task] = {}
        for group in self._siblings(sites, ctx) if self.share_inputs else ():
            forms = self._outlines(group, ctx)
            cost = forms if isinstance(forms, str) else self.priced_together(model, group, forms, ctx)
            if isinstance(forms, str) or isinstance(cost, str):
                report.note(f"{', '.join(site.name for site in group)} share no factor: {cost}")
                continue
            alone = [self._task(model, site, shaped[site.name], scratch, ctx) for site in group]
            paying = [task for task in alone if isinstance(task, Task)]
            tasks = [
                Task(site, form, _part(cost, form), scratch) for site, form in zip(group, forms, strict=True)
            ]
            joint = Joint(tasks, paying if len(paying) == len(alone) else None)
            found.update({task.site.name: JointTask(**vars(task), joint=joint) for task in tasks})
        return found

    def solved(self, task: Task, problem_of: Callable[[Matrix], Quadratic], ctx: PassContext) -> Fitted | str:
        """Fit one site, or say why not; with those that share a factor with it."""
        if not isinstance(task, JointTask) or task.joint is None:
            return super().solved(task, problem_of, ctx)
        joint = task.joint
        return joint.fitted(task.site.name, lambda: self._fit_together(joint, problem_of, ctx))

    def _fit_together(
        self, joint: Joint, problem_of: Callable[[Matrix], Quadratic], ctx: PassContext
    ) -> Mapping[str, Fitted] | str:
        """Return what loses less, a common factor or factors of their own where these pay, or why nothing does."""
        names = [task.site.name for task in joint.together]
        problems = [problem_of(np.asarray(task.site.numpy(), np.float64)) for task in joint.together]
        first = joint.together[0].outline
        assert isinstance(first, SharedLowRank), "made by together"
        try:
            lefts, right = joint_factors(problems, lambda stack: self.factors(stack, len(first.right)))
        except np.linalg.LinAlgError as failure:
            return f"its factors cannot be found ({failure}): raise damping"
        shared = [
            self.judged(task, problem, replace(first, left=left, right=right))
            for task, problem, left in zip(joint.together, problems, lefts, strict=True)
        ]
        own = [
            self.fitted(task, problem, ctx)
            for task, problem in zip(joint.alone or (), problems, strict=False)
        ]
        best = min((_complete(own), _complete(shared)), key=lambda found: _loss(found, problems))
        if best is None:
            return next(item for item in shared if isinstance(item, str))
        return dict(zip(names, best, strict=True))

    def _siblings(self, sites: Sequence[Site], ctx: PassContext) -> Iterator[list[Site]]:
        """Yield the sites to factorise that read one value in one graph, where they are several."""
        groups: dict[object, list[Site]] = {}
        for site in sites:
            if site.op in ("MatMul", "Gemm") and self.left_alone(site, ctx) is None:
                groups.setdefault((site.node.inputs[0], site.node.graph, site.dtype), []).append(site)
            site.release()
        return (group for group in groups.values() if len(group) > 1)

    def _outlines(self, group: Sequence[Site], ctx: PassContext) -> list[SharedLowRank] | str:
        """Return random factors of the largest rank that the numbers of all sites together allow."""
        numbers, outputs, inputs = 0, sum(site.shape[0] for site in group), group[0].shape[1]
        for site in group:
            share = ctx.settings_for(site, self).param_ratio
            assert share is not None, "left_alone saw to that"
            numbers += int(share * site.shape[0] * inputs + 1e-9)
        rng = ctx.rng(self.name, "outline", group[0].name)
        found = random_factors((outputs, inputs), numbers, self.multiple, rng)
        if isinstance(found, str):
            return found
        found = found.astype(group[0].dtype)
        lefts = np.split(found.left, np.cumsum([site.shape[0] for site in group])[:-1])
        return [SharedLowRank(left, found.right, len(group), outputs) for left in lefts]


def _part(cost: RewriteCost | None, form: SharedLowRank) -> RewriteCost | None:
    """Return the part of the cost of all sites that is in proportion to the outputs of one."""
    if cost is None:
        return None
    share = len(form.left) / form.outputs
    return RewriteCost(
        cost.dense_ms * share, cost.ms * share, round(cost.dense_bytes * share), round(cost.bytes * share)
    )


def _complete(found: Sequence[Fitted | str]) -> list[Fitted] | None:
    """Return what was found if that is something for every site."""
    fitted = [item for item in found if isinstance(item, Fitted)]
    return fitted if fitted and len(fitted) == len(found) else None


def _loss(found: Sequence[Fitted] | None, problems: Sequence[Quadratic]) -> float:
    """Return the sum of the errors of what was found, relative to the outputs of each site."""
    if found is None:
        return float("inf")
    pairs = zip(found, problems, strict=True)
    return sum(
        quadratic_error(item.total - problem.target, problem.gram)
        / (quadratic_error(problem.target, problem.gram) or 1.0)
        for item, problem in pairs
    )
