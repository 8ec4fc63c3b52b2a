"""``-O0`` to ``-O3``: how much is asked of a run, as values of its other options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsecc.errors import UsageError
from sparsecc.plan.planning import DEFAULT_DROP, Asked
from sparsecc.plan.pricing import FAMILIES

__all__ = ["LEVELS", "TIDY", "asked_at", "refuse_at"]

#: What each level does, in words.
LEVELS = (
    "tidies the graph; nothing is measured to decide",
    "loses nothing: layouts are chosen by measurement for the zeros that are there",
    "plans: loses at most 1 % by the metric",
    "plans with more families, finer steps and twice as many attempts",
)

#: The pipeline of level 0.
TIDY = "tidy"

#: Level from which on forms are planned.
_PLANS = 2

#: Families of level 3: those that make other forms than the default ones, or fit the same more slowly and better.
#: What is left out makes a form that one of these fits better.
_MORE = (
    *FAMILIES,
    "prune-alps", "prune-tiles", "sparse-lowrank", "factor-separable", "factor-cp", "factor-btt", "factor-monarch",
    "factor-blast",
)  # fmt: skip
_MORE_ATTEMPTS = 12


def asked_at(level: int | None, asked: Asked | None) -> Asked | None:
    """Return what is asked of a planner at a level: what ``asked`` leaves open is filled in.

    Args:
        level: 0 to 3; None changes nothing.
        asked: by the user beside it.

    Raises:
        UsageError: there is no such level, or it contradicts a budget.
    """
    if level is None:
        return asked
    if not 0 <= level < len(LEVELS):
        raise UsageError(f"there is no level -O{level}: give -O0, -O1, -O2 or -O3")
    if level < _PLANS:
        if asked is not None:
            raise UsageError(
                f"-O{level} loses nothing and takes no budget: give -O2 or -O3 with it, or leave -O{level} out"
            )
        return None
    own = asked or Asked()
    filled = replace(own, max_drop=own.max_drop or DEFAULT_DROP)
    if level == _PLANS:
        return filled
    return replace(
        filled,
        attempts=own.attempts or _MORE_ATTEMPTS,
        **({} if own.analysis is not None else _wider(own)),
    )


def _wider(own: Asked) -> dict[str, Any]:
    """The search ranges of level 3, as far as nothing else is asked for."""
    return {
        "families": ",".join(_MORE) if own.families is None else own.families,
        "fine": True if own.fine is None else own.fine,
    }


def refuse_at(level: int | None, given: Sequence[str]) -> None:
    """Refuse what contradicts a level.

    Args:
        level: that was asked for, if any.
        given: names of other options that say what becomes of weights.

    Raises:
        UsageError: some contradict it.
    """
    if level is None or level == 1 or not given:
        return
    what = "only tidies" if level == 0 else "chooses what becomes of each part itself"
    raise UsageError(f"-O{level} {what} and contradicts {' and '.join(given)}: give one of them")
