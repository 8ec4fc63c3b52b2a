"""Tables of embeddings as items: what they may become where the size of the file counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from sparsecc.ir import Model
from sparsecc.passes.factor.tables import find_tables
from sparsecc.passes.quantize.embedding import QuantizeEmbedding, row_codes
from sparsecc.plan.items import Candidate, Estimate, Item
from sparsecc.plan.pricing import Resource

__all__ = ["table_items", "table_shapes"]


def table_items(model: Model, families: Collection[str], resources: Sequence[Resource]) -> list[Item]:
    """Return an item for each table that can be int8; none where bytes do not count, or it is no family.

    A look-up takes no time beside the products of a model, and none is counted. The error is that of all rows: each has
    a scale of its own, so that all lose about the same.
    """
    own = QuantizeEmbedding()
    if own.name not in families or "bytes" not in resources:
        return []
    items = []
    for table in find_tables(model)[0]:
        if own.refusal(table) is not None:
            continue
        weight = table.numpy()
        codes, scales = row_codes(weight)
        error = float(np.linalg.norm(codes * scales - weight) / np.linalg.norm(weight))
        none = Estimate(0.0, "assumed")
        dense = Candidate((), 0.0, none, weight.nbytes)
        narrow = Candidate((str(own),), error, none, codes.nbytes + scales.nbytes)
        items.append(Item(table.name, (table.name,), (dense, narrow)))
    return items


def table_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of all tables, by name."""
    return {table.name: table.shape for table in find_tables(model)[0]}
