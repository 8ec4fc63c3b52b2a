"""``sparsecc inspect --partition``: how evenly sparse operators are dealt to threads, and how busy those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from sparsecc.cli.output import print_json, print_table

if TYPE_CHECKING:
    from sparsecc.ir import Model
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
            site["cut"],
            f"{site['stored_parts']}, {site['stored_lambda']:.3f}" if site["stored_parts"] else "-",
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
            "cut",
            ">stored parts, lambda",
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
    from sparsecc.target import Target

    model = ir.Model.load(path)
    threads = threads or Target.host().cores or 1
    parts = parts or threads
    cuts = _cuts(model, parts)
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
        "sites": [_site(node, cuts.get(node.name, _Cut())) for node in nodes],
    }


@dataclass(frozen=True)
class _Cut:
    """How the work of one operator is cut.

    Attributes:
        by: who decides, or when.
        work: of each part; empty where rows of x or pixels are dealt rather than weights.
        table: work of each part that the file stores; empty: it stores none.
    """

    by: str = "by rows of x"
    work: tuple[int, ...] = ()
    table: tuple[int, ...] = ()


def _cuts(model: Model, parts: int) -> dict[str, _Cut]:
    """Our operators by name."""
    from sparsecc.ir.cuts import stored_cuts
    from sparsecc.ir.ops_algebra import EINSUMS
    from sparsecc.ir.sparse_ops import DOMAIN
    from sparsecc.report.measured import part_works

    works = part_works(model, parts)
    found = {name: _Cut("when it is packed", work) if work else _Cut() for name, work in works.items()}
    for node in (node for graph in model.graphs() for node in graph if node.domain == DOMAIN):
        name, stored = str(node.name), stored_cuts(node)
        table = () if stored is None else tuple(map(int, np.diff(stored.sum(0))))
        if node.op_type in EINSUMS:
            found[name] = _Cut("in the file" if table else "at each run", works[name], table)
        elif table:
            found[name] = replace(found.get(name, _Cut()), table=table)
    return found


def _balance(work: Sequence[int]) -> float:
    return max(work) * len(work) / sum(work) if sum(work) else 1.0


def _site(node: BusyNode, cut: _Cut) -> dict[str, Any]:
    """The entry of one node."""
    whole = sum(cut.work)
    return {
        "name": node.name,
        "op": node.op,
        "parts": len(cut.work),
        "part_work": list(cut.work),
        "work": whole,
        "max": max(cut.work, default=0),
        "mean": whole / len(cut.work) if cut.work else 0.0,
        "lambda": _balance(cut.work),
        "cut": cut.by,
        "stored_parts": len(cut.table),
        "stored_lambda": _balance(cut.table),
        "seconds": node.seconds / _RUNS,
        "busy_seconds": [seconds / _RUNS for seconds in node.threads],
        "busy_lambda": node.balance,
    }


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
