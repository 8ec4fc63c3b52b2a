"""Parts of a run document that are read from models; all plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import RuntimeMissingError
from sparsecc.ir import Model
from sparsecc.ir.cuts import stored_cuts
from sparsecc.ir.ops_algebra import EINSUMS
from sparsecc.ir.packed import PackedSite, packed_sites
from sparsecc.sparse import Pattern, QuantizedTensor, detect

__all__ = ["measured_parts", "part_works", "partition_rows", "pattern_thumbnails", "spectra"]

_CELLS = 32  # of a thumbnail along its longer side
_CORNER = 32  # entries that are shown one by one
_PARTS = 8  # threads of a usual machine
_SAMPLES = 64  # of a spectrum
_FEW_ZEROS = 0.05  # of a dense weight: some numbers are zero by chance


def measured_parts(result: Model, dense: Model) -> dict[str, Any]:
    """The parts of a run document that are read from models: thumbnails, partition, spectra.

    Args:
        result: the model that is written.
        dense: the model it was made from, whose weights have the spectra.

    Raises:
        ModelError: a packed weight is malformed.
    """
    return {
        "thumbnails": pattern_thumbnails(result),
        "partition": partition_rows(result),
        "spectra": spectra(dense),
    }


def pattern_thumbnails(model: Model) -> list[dict[str, Any]]:
    """Where the weights of a model are not zero: every packed weight, and dense ones with zeros.

    Each is a row of the part ``thumbnails``: ``grid`` is the density by cell over the whole matrix ``[N, K]``, at
    most 32 by 32, ``corner`` its first entries. One weight is in memory at a time.

    Raises:
        ModelError: a packed weight is malformed.
    """
    return [
        {
            "site": name,
            "shape": list(kept.shape),
            "layout": layout,
            "density": float(kept.mean()),
            "grid": _densities(kept).round(4).tolist(),
            "corner": kept[:_CORNER, :_CORNER].astype(int).tolist(),
        }
        for name, layout, kept in _patterns(model)
    ]


def _patterns(model: Model) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """Name, layout and non-zeros of each weight that has zeros."""
    for site in model.sites():
        weight = site.numpy()
        zeros = weight.size - int(np.count_nonzero(weight))
        if weight.size and zeros > _FEW_ZEROS * weight.size:
            patterns = detect(weight)
            yield (
                site.name,
                f"dense, {patterns[0] if patterns else Pattern.parse('unstructured')} zeros",
                weight != 0,
            )
        site.release()
    for packed in packed_sites(model):
        if 0 not in packed.tensor.shape:
            yield packed.name, packed.layout, packed.tensor.decode() != 0


def _densities(kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of non-zeros of each cell, the cells as square as the sides allow but no fewer than 8 along one side."""
    longest = max(kept.shape)
    cells = [min(side, max(_CELLS // 4, round(_CELLS * side / longest))) for side in kept.shape]
    borders = [np.arange(count + 1) * side // count for side, count in zip(kept.shape, cells, strict=True)]
    counts = np.add.reduceat(kept.astype(np.int32), borders[0][:-1], axis=0)
    counts = np.add.reduceat(counts, borders[1][:-1], axis=1)
    return np.asarray(counts / np.outer(np.diff(borders[0]), np.diff(borders[1])), np.float64)


def spectra(model: Model, sites: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Singular values of weights, largest first and relative to the largest: rows of the part ``spectra``.

    From the eigenvalues of the smaller Gram matrix in float64: values below about 1e-8 of the largest are noise.

    Args:
        model: dense or emitted; packed weights count as the matrices they stand for.
        sites: names of those wanted; all by default. Names the model does not have are left out.

    Raises:
        ModelError: a packed weight is malformed.
    """
    wanted = None if sites is None else set(sites)
    return [
        {"site": name, "count": len(values), "values": _thinned(values)}
        for name, weight in _weights(model, wanted)
        if len(values := _singular_values(weight)) > 1 and np.isfinite(values).all() and values[0] > 0
    ]


def _weights(model: Model, wanted: set[str] | None) -> Iterator[tuple[str, NDArray[Any]]]:
    for site in model.sites():
        if wanted is None or site.name in wanted:
            yield site.name, site.numpy()
            site.release()
    for packed in packed_sites(model):
        if wanted is None or packed.name in wanted:
            yield packed.name, packed.tensor.decode()


def _singular_values(weight: NDArray[Any]) -> NDArray[np.float64]:
    if 0 in weight.shape or not np.isfinite(weight.astype(np.float64, copy=False)).all():
        return np.zeros(0)
    wide = weight.astype(np.float64)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)), np.float64)


def _thinned(values: NDArray[np.float64]) -> list[float]:
    """At most 64 of the values, evenly spaced, the first and the last among them, as shares of the first."""
    at = np.linspace(0, len(values) - 1, min(len(values), _SAMPLES))
    return [float(f"{value:.4g}") for value in np.interp(at, np.arange(len(values)), values / values[0])]


def partition_rows(model: Model, parts: int = _PARTS) -> list[dict[str, Any]]:
    """How evenly the work of each sparse operator is cut: rows of the part ``partition``.

    Operators whose weight is not cut (rows of the input or pixels are dealt instead) have no row. Without the
    operator library only cuts that the model holds are told.

    Raises:
        ModelError: a packed weight is malformed.
    """
    operators = {str(node.name): node.op_type for graph in model.graphs() for node in graph}
    rows = []
    for name, work in part_works(model, parts).items():
        whole = sum(work)
        if whole:
            balance = max(work) * len(work) / whole
            rows.append(
                {"name": name, "op": operators.get(name, ""), "part_work": list(work), "lambda": balance}
            )
    return rows


def part_works(model: Model, parts: int) -> dict[str, tuple[int, ...]]:
    """Work of each part of the nodes of ``model`` for one row of the input, by name; empty where nothing is cut.

    Raises:
        ModelError: a packed weight is malformed.
    """
    works = {site.name: _packed_work(site, parts) for site in packed_sites(model)}
    for graph in model.graphs():
        works |= {str(node.name): _stored_work(node, parts) for node in graph if node.op_type in EINSUMS}
    return works


def _packed_work(site: PackedSite, parts: int) -> tuple[int, ...]:
    """What the kernel's own table gives each part for one row of x; empty for what is no product."""
    from sparsecc.runtime import NativeInt8MatMul, NativeMatMul
    from sparsecc.runtime.balance import part_work

    if "MatMul" not in site.op:
        return ()
    tensor, pattern = site.tensor, str(site.tensor.pattern)
    try:
        if isinstance(tensor, QuantizedTensor):
            with NativeInt8MatMul(
                pattern, tensor.shape, tensor.values, tensor.indices, tensor.scales
            ) as bytes_:
                return part_work(bytes_, 1, parts)
        with NativeMatMul(pattern, tensor.shape, tensor.values, tensor.indices) as floats:
            return part_work(floats, 1, parts)
    except RuntimeMissingError:
        return ()


def _stored_work(node: onnx_ir.Node, parts: int) -> tuple[int, ...]:
    """What the cuts that the pass ``partition`` stored give each part, of as many as are in the table."""
    table = stored_cuts(node)
    if table is None:
        return ()
    work = np.diff(table.sum(0))
    count = next(count for count in range(min(parts, len(work)), 0, -1) if len(work) % count == 0)
    return tuple(work.reshape(count, -1).sum(1).tolist())
