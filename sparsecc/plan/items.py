"""What the planner chooses between: items, their candidates, and a choice of one candidate for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Candidate", "Choice", "Estimate", "Item"]


@dataclass(frozen=True)
class Estimate:
    """A time on the target.

    Attributes:
        ms: milliseconds of one run.
        source: ``measured``, or ``interpolated`` between measured shapes.
        spread: half the width of an interval that holds the time in nine of ten cases, as a share of ``ms``.
    """

    ms: float
    source: str
    spread: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """One form that the sites of an item may take.

    Attributes:
        passes: specs of the passes that make it, in order, each without its option ``match``; none for the form that
            the sites have already.
        error: norm of the change of the sites' outputs over the norm of the outputs, on calibration data; 0 for none.
        time: of the sites in this form, all together.
        bytes: of their constants in this form.
        custom_ops: whether it is fast only where the operator library is loaded.
        note: what else the report says of it, for instance why it was not tried.
        error_spread: half the width of an interval that holds the error in nine of ten cases, as a share of it; 0 where
            it was not told from some of the outputs, or from other forms.
    """

    passes: tuple[str, ...]
    error: float
    time: Estimate
    bytes: int
    custom_ops: bool = False
    note: str = ""
    error_spread: float = 0.0

    @property
    def name(self) -> str:
        """The specs as one text; ``dense`` for the form that the sites have already."""
        return ",".join(self.passes) or "dense"


@dataclass(frozen=True)
class Item:
    """Sites that must take the same form: one alone, tied ones, siblings, or those coupled through an axis.

    Attributes:
        name: of its first site.
        sites: their names.
        candidates: the first is the form that the sites have already, with error 0.
        sensitivity: damage to the metric of the model per squared error of the item; from measured replacements.
        groups: by label what the item belongs to that must not be split, for instance ``region`` of a device.
        dropped: what is not chosen from, each with the reason as its note; what was not measured is NaN.
    """

    name: str
    sites: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    sensitivity: float = 1.0
    groups: Mapping[str, str] | None = None
    dropped: tuple[Candidate, ...] = ()

    def damage(self, candidate: Candidate) -> float:
        """Predicted damage to the metric of the model if the item takes ``candidate``."""
        return self.sensitivity * candidate.error**2


@dataclass(frozen=True)
class Choice:
    """One candidate for each item.

    Attributes:
        chosen: by name of the item the number of its candidate.
        ms: predicted time of all items together.
        bytes: of their constants.
        damage: predicted, summed up over items.
    """

    chosen: Mapping[str, int]
    ms: float
    bytes: int
    damage: float
