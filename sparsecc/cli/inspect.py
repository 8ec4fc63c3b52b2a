"""``sparsecc inspect``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.arguments import input_shapes_option, model_argument, parse_input_shapes, threads_option
from sparsecc.cli.inspect_partition import inspect_partition
from sparsecc.cli.inspect_tensor import TENSOR_SUFFIXES, inspect_tensor
from sparsecc.cli.output import format_bytes, json_option, print_json, print_table
from sparsecc.errors import UsageError

if TYPE_CHECKING:
    from sparsecc.ir import Model

__all__ = ["command", "site_rows"]


@click.command("inspect")
@model_argument
@click.option("--expr", help="For a tensor file: spmv, spmm, add, mttkrp, … or 'y(i) = A(i,j) * x(j)'.")
@click.option(
    "--parts",
    type=click.IntRange(min=1),
    show_default="64; with --partition the threads",
    help="Parts to cut the work into.",
)
@click.option(
    "--operand",
    "operands",
    multiple=True,
    metavar="NAME=SOURCE",
    help="Another sparse operand: a file, or same, shifted or transposed, of MODEL. Others are dense.",
)
@click.option(
    "--columns", type=click.IntRange(min=1), default=64, show_default=True, help="Of dense operands."
)
@click.option(
    "--format", "form", metavar="NAME", help="How the tensor is stored: csr, csc, dcsr, csf or coo."
)
@click.option("--picture", metavar="FILE.svg", help="Draw the parts over the matrix.")
@click.option("--partition", is_flag=True, help="Run MODEL: work of each part, and how busy each thread is.")
@threads_option
@input_shapes_option
@json_option
def command(
    model: str,
    expr: str | None,
    parts: int | None,
    operands: tuple[str, ...],
    columns: int,
    form: str | None,
    picture: str | None,
    partition: bool,
    threads: int,
    input_shapes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show the linear sites of MODEL: shape, layout, pattern of the zeros, density and bytes.

    With --partition, show how evenly its sparse operators are dealt to threads, by weights and by the clock. Of a
    sparse matrix (.mtx) or tensor (.tns), also compressed (.gz), show how evenly the work of an expression is cut into
    parts.

    Example: sparsecc inspect model.onnx --json, sparsecc inspect a.mtx --expr spmv --parts 64
    """
    if model.lower().endswith(TENSOR_SUFFIXES):
        if partition or input_shapes:
            raise UsageError(f"{model}: --partition and --input-shapes are for models")
        return inspect_tensor(
            model,
            expr,
            parts or 64,
            operands=operands,
            columns=columns,
            form=form,
            picture=picture,
            as_json=as_json,
        )
    if expr or operands or form or picture:
        raise UsageError(f"{model}: --expr, --operand, --format and --picture are for .mtx and .tns files")
    if partition:
        return inspect_partition(model, parts, threads, parse_input_shapes(input_shapes), as_json=as_json)
    if input_shapes:
        raise UsageError("--input-shapes: nothing is run without --partition")
    document = inspect_model(model)
    if as_json:
        return print_json(document)
    rows = [
        (s["name"], s["op"], "x".join(map(str, s["shape"])), s["layout"], s["pattern"], f"{s['density']:.4f}",
         format_bytes(s["nbytes"]))
        for s in document["sites"]
    ]  # fmt: skip
    print_table(("site", "op", "NxK", "layout", "pattern", ">density", ">bytes"), rows)
    for entry in document["unsupported"]:
        click.echo(f"not a site: {entry['name']}: {entry['reason']}")
    if document["resizable"] is not None:
        sizes = document["resizable"]
        click.echo(
            f"\nresizable: {sizes['planes']} planes of {sizes['sites']} sites; sparsecc resize --bytes takes "
            f"{sizes['smallest_nbytes']} to {sizes['nbytes']}"
        )
    totals = document["totals"]
    click.echo(
        f"\n{totals['sites']} sites, {totals['weights']} weights at density {totals['density']:.4f}, "
        f"{format_bytes(totals['nbytes'])} of {format_bytes(totals['file_nbytes'])} in the file; "
        f"opset {document['opset']}"
    )


def inspect_model(path: str) -> dict[str, Any]:
    """The JSON document of ``inspect``: one entry per dense site and per sparse operator, and totals."""
    from sparsecc import ir
    from sparsecc.ir.files import file_bytes

    model = ir.Model.load(path)
    sites = site_rows(model)
    weights = sum(math.prod(site["shape"]) for site in sites)
    kept = sum(round(site["density"] * math.prod(site["shape"])) for site in sites)
    planes = ir.Planes.of(model)
    return {
        "path": path,
        "opset": model.opset,
        "inputs": [
            {"name": s.name, "dtype": str(s.dtype), "shape": None if s.shape is None else list(s.shape)}
            for s in model.input_specs()
        ],
        "metadata": {
            key: value for key, value in sorted(model.metadata.items()) if key.startswith("sparsecc.")
        },
        "sites": sites,
        "resizable": None
        if planes is None
        else {
            "sites": len(planes.sites),
            "planes": len(planes.order),
            "smallest_nbytes": planes.first(model, len(planes.sites)).written_nbytes(path),
            "nbytes": file_bytes(path),
        },
        "unsupported": [{"name": name, "reason": reason} for name, reason in model.unsupported_sites()],
        "totals": {
            "sites": len(sites),
            "weights": weights,
            "density": kept / weights if weights else 1.0,
            "nbytes": sum(site["nbytes"] for site in sites),
            "file_nbytes": file_bytes(path),
        },
    }


def site_rows(model: Model) -> list[dict[str, Any]]:
    """Plain values on each dense site of a model, then on each packed weight of its sparse operators.

    Raises:
        ModelError: a packed weight is malformed.
    """
    from sparsecc.ir.packed import packed_sites
    from sparsecc.sparse import INT8_DENSE, density, detect

    rows = []
    for site in model.sites():
        weight = site.numpy()
        patterns = detect(weight)
        rows.append(
            {
                "name": site.name,
                "op": site.op,
                "shape": list(site.shape),
                "dtype": str(site.dtype),
                "layout": "dense" if site.quantization is None else str(INT8_DENSE),
                "pattern": str(patterns[0]) if patterns else "dense",
                "density": density(weight),
                "nbytes": int(weight.nbytes),
            }
        )
    for packed in packed_sites(model):
        size = math.prod(packed.tensor.shape)
        rows.append(
            {
                "name": packed.name,
                "op": packed.op,
                "shape": list(packed.tensor.shape),
                "dtype": str(packed.tensor.values.dtype),
                "layout": packed.layout,
                "pattern": str(packed.tensor.pattern),
                "density": packed.tensor.nnz / size if size else 0.0,
                "nbytes": packed.tensor.nbytes,
            }
        )
    return rows
