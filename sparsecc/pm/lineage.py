"""Where what is left of a model comes from in the dense one, once units or blocks of it were removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kept", "Lineage"]

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of the weight ``[N, K]`` of a site: rows and columns as positions in the dense one."""

    rows: Index
    columns: Index


@dataclass(frozen=True, eq=False)
class Lineage:
    """What passes that remove parts of a model leave behind, so that recovery can compare the rest tensor by tensor.

    Attributes:
        kept: by site name what is left of its weight, for sites that lost something.
        tensors: tensors that stand for one of another name in the dense model now.
        added: tensors that have none there: products that got an Add for their bias.
        stand_ins: sites fitted to do what a removed block did, so that their outputs are not the dense ones.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    added: frozenset[str] = frozenset()
    stand_ins: frozenset[str] = frozenset()

    def cut(self, site: str, rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> Lineage:
        """Return the lineage once only these rows and columns of what there is of a weight stay."""
        old = self.kept.get(site) or Kept(np.arange(len(rows)), np.arange(len(columns)))
        left = Kept(old.rows[rows], old.columns[columns])
        return dataclasses.replace(self, kept={**self.kept, site: left})

    def bridged(self, start: str, end: str) -> Lineage:
        """Return the lineage once tensor ``start`` stands where ``end`` stood."""
        return dataclasses.replace(self, tensors={**self.tensors, start: self.tensors.get(end, end)})

    def biased(self, product: str, total: str, known: Collection[str]) -> Lineage:
        """Return the lineage once ``total`` is ``product`` and a bias; ``known`` are the names from before.

        One of the two has the name that the product had.
        """
        before = total if total in known else product
        tensors = {**self.tensors, total: self.tensors.get(before, before)}
        return dataclasses.replace(self, tensors=tensors, added=self.added | {product})

    def standing_in(self, site: str) -> Lineage:
        """Return the lineage once ``site`` does what a removed block did."""
        return dataclasses.replace(self, stand_ins=self.stand_ins | {site})

    def with_added(self, names: Collection[str]) -> Lineage:
        """Return the lineage once there are tensors of these names that the dense model has not."""
        return dataclasses.replace(self, added=self.added | {*names})
