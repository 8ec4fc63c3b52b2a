"""The choices that a search goes through: all, or those that stay within int8."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sparsecc.plan.choose import Quantity, back_off, choice_of, choose, front
from sparsecc.plan.items import Candidate, Choice, Estimate, Item

__all__ = ["Space", "with_regions"]

#: The pass whose results are slow beside float neighbours: both sides are converted.
_REGION = "quantize{activations=static}"
#: Error that int8 is taken to have where none was measured.
_ERROR = 0.02


@dataclass(frozen=True)
class Space:
    """Some of the candidates of each item; choices count candidates as the items themselves do.

    Attributes:
        items: with all of their candidates.
        kept: by name of an item the numbers of those that may be chosen, the safest first.
    """

    items: tuple[Item, ...]
    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def whole(cls, items: Sequence[Item]) -> Space:
        """All candidates."""
        return cls(tuple(items), {item.name: tuple(range(len(item.candidates))) for item in items})

    @classmethod
    def regions(cls, items: Sequence[Item]) -> Space | None:
        """Only candidates with int8 and fixed ranges; None where there is an item without one.

        Times of parts by themselves do not tell what it takes to change between int8 and float32 from one part to the
        next, so that the front of all choices may miss the model that is int8 throughout.
        """
        kept = {}
        for item in items:
            quantised = tuple(at for at, own in enumerate(item.candidates) if _REGION in own.passes)
            if not quantised:
                return None
            kept[item.name] = quantised
        return cls(tuple(items), kept) if kept else None

    @cached_property
    def points(self) -> list[Choice]:
        """The Pareto front of predicted time and damage, from the safest choice to the fastest."""
        safest = self._whole(choice_of(self._items, {item.name: _safest(item) for item in self._items}))
        found = [self._whole(point) for point in reversed(front(self._items, "ms"))]
        return [safest, *(point for point in found if point.ms < safest.ms)]

    def safer(self, choice: Choice) -> Choice | None:
        """The next safer choice; see ``back_off``."""
        own = {name: self.kept[name].index(number) for name, number in choice.chosen.items()}
        found = back_off(self._items, choice_of(self._items, own))
        return None if found is None else self._whole(found)

    def cheapest(
        self, limit: Quantity, budget: float, also: tuple[Quantity, float] | None = None
    ) -> Choice | None:
        """The choice of least damage within a budget; see ``sparsecc.plan.choose``."""
        found = choose(self._items, limit=limit, budget=budget, minimise="damage", also=also)
        return None if found is None else self._whole(found)

    @cached_property
    def _items(self) -> tuple[Item, ...]:
        return tuple(
            replace(item, candidates=tuple(item.candidates[at] for at in self.kept[item.name]))
            for item in self.items
        )

    def _whole(self, choice: Choice) -> Choice:
        """The same choice, with candidates counted as the items do."""
        return choice_of(self.items, {name: self.kept[name][at] for name, at in choice.chosen.items()})


def _safest(item: Item) -> int:
    return min(range(len(item.candidates)), key=lambda at: item.candidates[at].error)


def with_regions(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return ``items``, each with int8 and fixed ranges as a candidate if that was tried for any of them.

    A part that gains nothing by it alone, such as a depthwise convolution, may still cost less than changing to
    float32 and back between neighbours that do gain. Its error and its share of the time are taken to be those of the
    others.
    """
    tried = [own for item in items for own in (*item.candidates, *item.dropped) if own.passes == (_REGION,)]
    if not tried:
        return tuple(items)
    errors = [own.error for own in tried if math.isfinite(own.error)]
    error = statistics.median(errors) if errors else _ERROR
    shares = [
        own.time.ms / item.candidates[0].time.ms
        for item in items
        for own in item.candidates
        if own.passes == (_REGION,) and item.candidates[0].time.ms
    ]
    share = statistics.median(shares) if shares else 1.0
    return tuple(_with_region(item, error, share) for item in items)


def _with_region(item: Item, error: float, share: float) -> Item:
    if any(own.passes == (_REGION,) for own in item.candidates):
        return item
    dense = item.candidates[0]
    known = next((own for own in item.dropped if own.passes == (_REGION,)), None)
    nbytes = dense.bytes if known is None else known.bytes
    time = Estimate(share * dense.time.ms, "interpolated", 1 - share)
    own = Candidate((_REGION,), error, time, nbytes, note="beside others that are int8")
    dropped = tuple(other for other in item.dropped if other is not known)
    return replace(item, candidates=(*item.candidates, own), dropped=dropped)
