"""Products that read the same shall be stored alike: only then can one call compute them, with x packed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsecc.ir import Site

__all__ = ["Timed", "agreed"]

#: What all of them together may lose by being stored alike: a measurement on a busy machine is off by that, and one
#: call instead of three saves about as much.
_LOSS = 0.1


@dataclass(frozen=True)
class Timed:
    """A site with its times in ms by layout, ``dense`` among them, and the layout chosen for it alone."""

    site: Site
    times: Mapping[str, float]
    choice: str


def agreed(timed: Sequence[Timed], layouts: frozenset[str]) -> Iterator[tuple[Timed, str]]:
    """Yield what should change its layout so that products of one value agree, and to which of ``layouts``."""
    groups: dict[tuple[int, int], list[Timed]] = defaultdict(list)
    for item in timed:
        if item.site.input is not None and item.site.conv is None and item.choice in layouts:
            groups[id(item.site.input), item.site.shape[1]].append(item)
    for group in groups.values():
        choices = sorted({item.choice for item in group})
        known = [name for name in choices if all(name in item.times for item in group)]
        if len(choices) < 2 or not known:
            continue
        best = min(known, key=lambda name: sum(item.times[name] for item in group))
        alone = sum(item.times[item.choice] for item in group)
        together = sum(item.times[best] for item in group)
        if together > alone * (1 + _LOSS) or any(item.times[best] >= item.times["dense"] for item in group):
            continue
        yield from ((item, best) for item in group if item.choice != best)
