"""``sparsecc diff``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.inspect import site_rows
from sparsecc.cli.output import format_bytes, json_option, print_json, print_table

if TYPE_CHECKING:
    import onnx_ir

    from sparsecc.ir import Model

__all__ = ["command"]

#: Most rows of one table, and letters of one value, that are printed; --json has all.
_MOST_ROWS = 40
_MOST_LETTERS = 60

_VERDICTS = {
    "different": "the models differ",
    "graphs": "the models differ only in nodes: their names, attributes, order or connections",
    "same": "the models are the same",
}


@click.command("diff")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@json_option
def command(a: str, b: str, as_json: bool) -> None:
    """Show what differs between the models A and B: inputs, operators, sites, weights, sizes, metadata.

    Nothing is run; `sparsecc verify` compares what they compute.

    Example: sparsecc diff model.onnx model.sparse.onnx
    """
    document = diff_models(a, b)
    if as_json:
        return print_json(document)
    _print_values(document)
    _print_sites(document["sites"])
    _print_initializers(document["initializers"])
    ours, theirs = document["a"], document["b"]
    click.echo(
        f"\n{format_bytes(ours['nbytes'])} -> {format_bytes(theirs['nbytes'])}, "
        f"constants {format_bytes(ours['weights_nbytes'])} -> {format_bytes(theirs['weights_nbytes'])}, "
        f"{ours['nodes']} -> {theirs['nodes']} nodes"
    )
    return click.echo(_VERDICTS[document["verdict"]])


def diff_models(a: str, b: str) -> dict[str, Any]:
    """The JSON document of ``diff``: facts of both models, and what differs by kind.

    Raises:
        ModelError: a model is unreadable, unsafe or unsupported, or one of its packed weights is malformed.
    """
    from sparsecc import ir

    first, second = ir.Model.load(a), ir.Model.load(b)
    document: dict[str, Any] = {"a": _facts(first, a), "b": _facts(second, b)}
    differences: dict[str, list[Any]] = {
        "inputs": _values(_specs(first.input_specs()), _specs(second.input_specs())),
        "outputs": _values(_specs(first.output_specs()), _specs(second.output_specs())),
        "opsets": _values(first.onnx.opset_imports, second.onnx.opset_imports),
        "operators": _values(_operators(first), _operators(second)),
        "functions": _values(_functions(first), _functions(second)),
        "sites": _sites(site_rows(first), site_rows(second)),
        "initializers": _initializers(first, second),
        "metadata": _values(first.metadata, second.metadata),
    }
    told = any(row.get("status") != "same" for rows in differences.values() for row in rows)
    verdict = "different" if told else "same" if first.fingerprint() == second.fingerprint() else "graphs"
    return {**document, "verdict": verdict, **differences}


def _facts(model: Model, path: str) -> dict[str, Any]:
    from sparsecc.ir.files import file_bytes

    return {
        "path": path,
        "nbytes": file_bytes(path),
        "weights_nbytes": model.nbytes,
        "nodes": sum(_operators(model).values()),
        "ir_version": model.onnx.ir_version,
        "producer": model.onnx.producer_name or "",
    }


def _specs(specs: Iterable[Any]) -> dict[str, str]:
    """Type and shape of inputs or outputs by name."""
    found = {}
    for spec in specs:
        shape = "any shape"
        if spec.shape is not None:
            shape = "x".join("?" if dim is None else str(dim) for dim in spec.shape) or "scalar"
        found[spec.name] = f"{spec.dtype} {shape}"
    return found


def _operators(model: Model) -> Counter[str]:
    """How often each operator is in the main graph and the graphs inside it; bodies of functions do not count."""
    graphs = (model.onnx.graph, *model.onnx.graph.subgraphs())
    return Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for graph in graphs for node in graph)


def _functions(model: Model) -> dict[str, int]:
    """Nodes of each function by its name."""
    return {
        f"{function.domain}.{function.name}": sum(1 for _ in function)
        for function in model.onnx.functions.values()
    }


def _values(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries that differ; None where one has none. In the order of ``a``, then of ``b``."""
    return [
        {"name": name, "a": a.get(name), "b": b.get(name)}
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]


def _sites(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Sites of both by name, with what became of each."""
    ours, theirs = _by_name(a), _by_name(b)
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(name), theirs.get(name)
        status = (
            "added" if pair[0] is None
            else "removed" if pair[1] is None
            else "same" if pair[0] == pair[1]
            else "changed"
        )  # fmt: skip
        rows.append({"name": name, "status": status, "a": pair[0], "b": pair[1]})
    return rows


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows without their name, by it; a name that is there again gets a number."""
    found: dict[str, dict[str, Any]] = {}
    taken: Counter[str] = Counter()
    for row in rows:
        name = str(row["name"])
        taken[name] += 1
        key = name if taken[name] == 1 else f"{name}#{taken[name]}"
        found[key] = {field: value for field, value in row.items() if field != "name"}
    return found


def _initializers(a: Model, b: Model) -> list[dict[str, Any]]:
    """Initialisers that are in one model only, or whose type, shape or values differ."""
    ours, theirs = _constants(a), _constants(b)
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(name), theirs.get(name)
        if pair[0] is not None and pair[1] is not None and _equal(pair[0], pair[1]):
            continue
        status = "added" if pair[0] is None else "removed" if pair[1] is None else "changed"
        rows.append({"name": name, "status": status, "a": _described(pair[0]), "b": _described(pair[1])})
    return rows


def _constants(model: Model) -> dict[str, onnx_ir.TensorProtocol]:
    """Initialisers by name; those of inner graphs and functions with the name of their graph before it."""
    return {
        str(value.name)
        if graph is model.onnx.graph
        else f"{graph.name or ''}/{value.name}": value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }


def _equal(a: onnx_ir.TensorProtocol, b: onnx_ir.TensorProtocol) -> bool:
    import numpy as np

    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    ours, theirs = a.numpy(), b.numpy()
    if ours.dtype == object:  # texts
        return bool(np.array_equal(ours, theirs))
    return ours.tobytes() == theirs.tobytes()


def _described(tensor: onnx_ir.TensorProtocol | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    shape = [int(dim) for dim in tensor.shape.numpy()]
    return {"dtype": str(tensor.dtype), "shape": shape, "nbytes": int(tensor.nbytes)}


def _print_values(document: Mapping[str, Any]) -> None:
    """One table of all that is a name and a value on both sides."""
    kinds = {
        "inputs": "input", "outputs": "output", "opsets": "opset", "operators": "operator",
        "functions": "function (nodes)", "metadata": "metadata",
    }  # fmt: skip
    rows = [
        (kind, row["name"] or "ai.onnx", _cell(row["a"]), _cell(row["b"]))
        for key, kind in kinds.items()
        for row in document[key]
    ]
    if rows:
        print_table(("what", "name", "A", "B"), rows)
        click.echo("")


def _cell(value: object) -> str:
    text = "-" if value is None else " ".join(str(value).split())
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 3]}..."


def _print_sites(sites: Sequence[Mapping[str, Any]]) -> None:
    changed = [row for row in sites if row["status"] != "same"]
    if changed:
        rows = [
            (
                row["name"],
                row["status"],
                *(_both(row, field) for field in ("op", "shape", "dtype", "layout", "density", "nbytes")),
            )
            for row in changed[:_MOST_ROWS]
        ]
        print_table(("site", "", "op", "NxK", "dtype", "layout", ">density", ">bytes"), rows)
        _print_rest(len(changed))
    if sites:
        click.echo(f"{len(sites) - len(changed)} of {len(sites)} sites are the same")


def _both(row: Mapping[str, Any], field: str) -> str:
    """The value on both sides, once where it is the same or only one has it."""
    texts = [_shown(field, side[field]) for side in (row["a"], row["b"]) if side is not None]
    return " -> ".join(dict.fromkeys(texts))


def _shown(field: str, value: Any) -> str:
    if field == "shape":
        return "x".join(map(str, value))
    if field == "density":
        return f"{value:.4f}"
    return format_bytes(value) if field == "nbytes" else str(value)


def _print_initializers(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    click.echo("")
    print_table(
        ("initializer", "", "dtype", "shape", ">bytes"),
        [
            (row["name"], row["status"], *(_both(row, field) for field in ("dtype", "shape", "nbytes")))
            for row in rows[:_MOST_ROWS]
        ],
    )
    _print_rest(len(rows))


def _print_rest(count: int) -> None:
    if count > _MOST_ROWS:
        click.echo(f"... and {count - _MOST_ROWS} more (--json lists all)")
