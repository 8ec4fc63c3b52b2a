"""``sparsecc inspect --partition``: how evenly sparse operators are dealt to threads, and how busy those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.output import print_json, print_table

if TYPE_CHECKING:
    import onnx_ir

    from sparsecc.ir.packed import PackedSite
    from sparsecc.runtime.balance import BusyNode

__all__ = ["inspect_partition"]

_RUNS = 20  # of the model, that are measured


def inspect_partition(
    path: str, parts: int | None, threads: int, shapes: Mapping[str, Sequence[int]], *, as_json: bool
) -> None:
    """Print, for each of our operators in the model, the work of its parts and how long each thread was busy.

    Raises:
        ModelError: the model cannot be read or run.
        RuntimeMissingError: the operator library is missing or too old.
        UsageError: a shape does not fit.
    """
    document = _document(path, parts, threads, shapes)
    if as_json:
        return print_json(document)
    sites = document["sites"]
    if not sites:
        return click.echo("no operators of sparsecc: optimize the model first")
    rows = [
        (
            site["name"],
            site["op"],
            site["work"] if site["parts"] else "-",
            f"{site['max']} / {site['mean']:.0f}" if site["parts"] else "-",
            f"{site['lambda']:.3f}" if site["parts"] else "-",
            f"{1e3 * site['seconds']:.3f}",
            " ".join(f"{1e3 * seconds:.3f}" for seconds in site["busy_seconds"]),
            f"{site['busy_lambda']:.2f}",
        )
        for site in sites
    ]
    print_table(
        (
            "node",
            "operator",
            ">work",
            ">largest / mean part",
            ">lambda",
            ">ms",
            ">busy ms of threads",
            ">lambda",
        ),
        rows,
    )
    total = " ".join(f"{1e3 * seconds:.3f}" for seconds in document["busy_seconds"])
    return click.echo(
        f"\nwork of one row of x in {document['parts']} parts; times of one run on {document['threads']} threads, "
        f"mean of {_RUNS}; threads are busy {total} ms in all, lambda {document['busy_lambda']:.2f}"
    )


def _document(
    path: str, parts: int | None, threads: int, shapes: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    from sparsecc import ir
    from sparsecc.ir.ops_algebra import EINSUMS
    from sparsecc.ir.packed import packed_sites
    from sparsecc.target import Target

    model = ir.Model.load(path)
    threads = threads or Target.host().cores or 1
    parts = parts or threads
    work = {site.name: _part_work(site, parts) for site in packed_sites(model)}
    for graph in model.graphs():
        work.update({str(node.name): _stored_work(node, parts) for node in graph if node.op_type in EINSUMS})
    nodes = _measured(model, threads, shapes)
    order = {
        str(node.name): number
        for number, node in enumerate(node for graph in model.graphs() for node in graph)
    }
    nodes.sort(key=lambda node: order.get(node.name, len(order)))
    total = [sum(node.threads[at] for node in nodes) for at in range(len(nodes[0].threads))] if nodes else []
    return {
        "path": path,
        "threads": threads,
        "parts": parts,
        "runs": _RUNS,
        "busy_seconds": [seconds / _RUNS for seconds in total],
        "busy_lambda": max(total) * len(total) / sum(total) if sum(total) else 1.0,
        "sites": [_site(node, work.get(node.name, ())) for node in nodes],
    }


def _site(node: BusyNode, work: Sequence[int]) -> dict[str, Any]:
    """The entry of one node; without parts where rows of x or pixels are dealt rather than weights."""
    whole = sum(work)
    return {
        "name": node.name,
        "op": node.op,
        "parts": len(work),
        "part_work": list(work),
        "work": whole,
        "max": max(work, default=0),
        "mean": whole / len(work) if work else 0.0,
        "lambda": max(work) * len(work) / whole if whole else 1.0,
        "seconds": node.seconds / _RUNS,
        "busy_seconds": [seconds / _RUNS for seconds in node.threads],
        "busy_lambda": node.balance,
    }


def _part_work(site: PackedSite, parts: int) -> tuple[int, ...]:
    """What the kernel's own table gives each part for one row of x; empty for what is no product."""
    from sparsecc.runtime import NativeInt8MatMul, NativeMatMul
    from sparsecc.runtime.balance import part_work
    from sparsecc.sparse import QuantizedTensor

    if "MatMul" not in site.op:
        return ()
    tensor, pattern = site.tensor, str(site.tensor.pattern)
    if isinstance(tensor, QuantizedTensor):
        with NativeInt8MatMul(pattern, tensor.shape, tensor.values, tensor.indices, tensor.scales) as bytes_:
            return part_work(bytes_, 1, parts)
    with NativeMatMul(pattern, tensor.shape, tensor.values, tensor.indices) as floats:
        return part_work(floats, 1, parts)


def _stored_work(node: onnx_ir.Node, parts: int) -> tuple[int, ...]:
    """What the cuts that the pass ``partition`` stored give each part, of as many as are in the table."""
    from sparsecc.ir.ops_algebra import CUTS

    attribute = node.attributes.get(CUTS)
    cuts = [] if attribute is None else list(attribute.as_ints())
    stored = len(cuts) // 2 - 1
    step = next((step for step in range(1, stored + 1) if stored % step == 0 and stored // step <= parts), 0)
    if not step:
        return ()
    before = [row + entry for row, entry in zip(cuts[: stored + 1], cuts[stored + 1 :], strict=False)]
    return tuple(high - low for low, high in pairwise(before[::step]))


def _measured(model: Any, threads: int, shapes: Mapping[str, Sequence[int]]) -> list[BusyNode]:
    from sparsecc import verify
    from sparsecc.runtime.balance import measure_busy

    inputs = verify.make_inputs(model, None, 0, shapes)
    session = verify.runner(model, library=True, threads=threads)
    for _ in range(2):
        session.run(inputs)
    with measure_busy() as nodes:
        for _ in range(_RUNS):
            session.run(inputs)
    return nodes
