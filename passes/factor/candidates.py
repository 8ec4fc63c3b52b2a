"""What a site may become at different shares of its numbers, as far as that pays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.passes.factor.base import FactorPass
from sparsecc.pm import PassContext

__all__ = ["Candidates", "Outlines", "find_candidates"]

#: Per number of values that a form may store: its bytes, and the share of a weight that it is made for.
Outlines = dict[int, tuple[int, float]]

#: Shares of the numbers of a site that are looked at.
_SHARES = np.arange(1, 48) / 48


@dataclass(frozen=True)
class Candidates:
    """Smaller forms of a site, none of which is slower where times are measured.

    Attributes:
        site: where the weight is.
        numbers: what each stores, rising.
        bytes: what each takes in a file.
        reason: why there is none; None if there is one.
    """

    site: Site
    numbers: tuple[int, ...]
    bytes: tuple[int, ...]
    reason: str | None

    @property
    def dense_bytes(self) -> int:
        """What the weight takes."""
        return self.site.shape[0] * self.site.shape[1] * self.site.dtype.itemsize

    @property
    def most(self) -> int:
        """Numbers of the largest, 0 if there is none."""
        return max(self.numbers, default=0)


def find_candidates(
    factors: FactorPass,
    model: Model,
    site: Site,
    shaped: Site,
    ctx: PassContext,
    known: dict[object, Outlines],
) -> Candidates:
    """Return what ``factors`` would make of a site.

    Args:
        factors: the pass that will do it.
        model: where the site is.
        site: not refused by the pass.
        shaped: the same site in a copy of the model with all shapes that can be inferred.
        ctx: with costs where times count; the time is taken to rise with the size.
        known: outlines of sites that are alike; those of this one are added.
    """
    alike = (site.op, site.weight_shape, site.transposed, str(site.conv), site.dtype)
    found, reason = known.get(alike, {}), "no share of its numbers makes it smaller"
    for share in [share for _, share in found.values()][:1] or _SHARES.tolist():
        outline = factors.outline_at(shaped, share, ctx)
        if isinstance(outline, str):
            found, reason = ({}, outline) if alike in known else (found, outline)
            continue
        size = outline.bytes(site.dtype.itemsize, custom_ops=bool(getattr(factors, "custom_ops", False)))
        if size < site.shape[0] * site.shape[1] * site.dtype.itemsize:
            found.setdefault(outline.numbers, (size, share))
    if found:
        known[alike] = found
    kept, slow = _fast(factors, model, site, shaped, ctx, sorted(found.items()))
    return Candidates(
        site,
        tuple(numbers for numbers, _ in kept),
        tuple(size for _, (size, _) in kept),
        None if kept else slow or reason,
    )


def _fast(
    factors: FactorPass,
    model: Model,
    site: Site,
    shaped: Site,
    ctx: PassContext,
    rising: list[tuple[int, tuple[int, float]]],
) -> tuple[list[tuple[int, tuple[int, float]]], str | None]:
    """The smallest of the forms, as many as are not slower, and why the next one is."""
    low, high, reason = 0, len(rising), None
    while low < high:
        middle = (low + high + 1) // 2
        outline = factors.outline_at(shaped, rising[middle - 1][1][1], ctx)
        assert not isinstance(outline, str), "made before"
        cost = factors.priced(model, site, outline, ctx)
        if isinstance(cost, str):
            reason, high = cost, middle - 1
        else:
            low = middle
    return rising[:low], reason
