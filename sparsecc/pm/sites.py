"""Which sites a pass works on, with every one left out accounted for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsecc.errors import UsageError

if TYPE_CHECKING:
    from sparsecc.ir import Model, Site
    from sparsecc.pm.report import PassReport

__all__ = ["refuse_unmatched", "select_sites"]


_SHOWN = 5


def select_sites(model: Model, match: str, report: PassReport) -> list[Site]:
    """Return the sites whose name matches; matching operators that are no sites become skips with reasons.

    Raises:
        UsageError: ``match`` is not ``*`` and matches nothing; the message lists near names.
    """
    from sparsecc.ir import name_matches

    unsupported = model.unsupported_sites()
    sites = model.sites()
    refuse_unmatched(match, [*(site.name for site in sites), *(name for name, _ in unsupported)], "match")
    for name, reason in unsupported:
        if name_matches(match, name):
            report.skip(name, reason)
    if not sites:
        report.note("no MatMul, Gemm, Conv, LSTM or GRU of the model has a constant weight")
    return [site for site in sites if name_matches(match, site.name)]


def refuse_unmatched(match: str, names: Iterable[str], what: str) -> None:
    """Raise ``UsageError`` when ``match`` is not ``*`` and no name matches it."""
    from sparsecc.ir import name_matches

    known = list(names)
    if match == "*" or any(name_matches(match, name) for name in known):
        return
    if not known:
        raise UsageError(f"{what} '{match}' matches no site: the model has none")
    near = difflib.get_close_matches(match.removeprefix("re:").strip("*."), known, n=_SHOWN, cutoff=0.3)
    shown = near or known[:_SHOWN]
    raise UsageError(
        f"{what} '{match}' matches none of the {len(known)} sites; "
        f"{'near' if near else 'for instance'}: {', '.join(shown)} "
        "(write a glob for the whole name, or re:EXPRESSION)"
    )
