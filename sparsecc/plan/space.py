"""The choices that a search goes through: all, or those that stay within int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from sparsecc.plan.choose import back_off, choice_of, front
from sparsecc.plan.items import Candidate, Choice, Item

__all__ = ["Space"]

#: How the spec of the pass begins whose results are slow beside float neighbours: both sides are converted.
_REGIONS = "quantize{activations=static"


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
        """Only candidates with int8 and fixed ranges, for items that have any; None if none has.

        Times of parts by themselves do not tell what it takes to change between int8 and float32 from one part to the
        next, so that the front of all choices may miss the model that is int8 throughout.
        """
        kept = {}
        for item in items:
            quantised = tuple(at for at, own in enumerate(item.candidates) if _is_quantised(own))
            kept[item.name] = quantised or tuple(range(len(item.candidates)))
        found = cls(tuple(items), kept)
        return found if any(_is_quantised(item.candidates[kept[item.name][0]]) for item in items) else None

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


def _is_quantised(candidate: Candidate) -> bool:
    return any(spec.startswith(_REGIONS) for spec in candidate.passes)
