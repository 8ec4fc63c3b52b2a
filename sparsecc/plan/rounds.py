"""Pruning only what it makes faster, also where passes fit the model around its zeros."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsecc.ir import Model
from sparsecc.pm import PassContext, PassReport, Pipeline, SiteOverride
from sparsecc.sparse import Pattern

__all__ = ["Outcome", "run_where_it_pays"]

#: Runs in which measured times may still change their mind about a site.
_MOST_RUNS = 3


@dataclass(frozen=True)
class Outcome:
    """What a pipeline made of a model.

    Attributes:
        model: the result.
        reports: of the passes of the run that made it.
        left_out: by name, the sites left out of pruning then and the reports of the run that showed why.
    """

    model: Model
    reports: list[PassReport]
    left_out: Mapping[str, Sequence[PassReport]]


def run_where_it_pays(pipeline: Pipeline, original: Model, context: PassContext) -> Outcome:
    """Run ``pipeline`` on copies of ``original`` until no site is pruned in vain, three times at most.

    ``restore-dense`` cannot give a site that gains nothing its weights back once it, or what is around it, was
    fitted to the zeros: then all starts again without pruning that site. Passes that recover run once, last: what
    pays is found out without them.
    """
    names = {site.name for site in original.sites()}
    left_out: dict[str, Sequence[PassReport]] = {}

    def run(chosen: Pipeline) -> tuple[Model, list[PassReport], PassContext]:
        keep_dense = tuple(
            SiteOverride(f"re:^{re.escape(name)}$", pattern=Pattern("dense")) for name in left_out
        )
        own = dataclasses.replace(
            context, overrides=(*context.overrides, *keep_dense), protected={}, unpaid={}
        )
        model = original.copy()
        return model, chosen.run(model, own), own

    plain = dataclasses.replace(pipeline, passes=tuple(item for item in pipeline.passes if not item.recovers))
    if plain != pipeline and any(item.name == "restore-dense" for item in pipeline.passes):
        _, reports, own = run(plain)
        left_out.update({name: reports for name in own.unpaid if name in names})
    for rest in reversed(range(_MOST_RUNS if plain == pipeline else 1)):
        model, reports, own = run(pipeline)
        found = {name: reports for name in own.unpaid if name in names - left_out.keys()}
        if not rest or not found or all(own.unpaid.values()):
            break
        left_out.update(found)
    return Outcome(model, reports, left_out)
