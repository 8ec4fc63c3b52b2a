"""``sparsecc ops``."""

from __future__ import annotations

import click

from sparsecc.cli.output import json_option, print_json, print_table

__all__ = ["command"]


@click.command("ops")
@click.argument("what", type=click.Choice(["info", "path"]), default="info")
@json_option
def command(what: str, as_json: bool) -> None:
    """Show the operator library: its operators and instruction sets, or with `path` only where it lies.

    Example: sparsecc ops path
    """
    from sparsecc import emit, runtime
    from sparsecc.ir.sparse_ops import ACTIVATIONS, DOMAIN, DOMAIN_VERSION, FAMILIES

    path = runtime.get_library_path()
    if what == "path":
        print_json({"path": path}) if as_json else click.echo(path)
        return
    rows = [(name, "RxC blocks" if name.startswith("Block") else "unstructured, N:M") for name in FAMILIES]
    recurrent = {op.family for op in emit.operators().values() if isinstance(op, emit.RecurrentOp)}
    rows += [(name, "unstructured, N:M, RxC blocks") for name in sorted(recurrent)]
    quads = [op.name for op in emit.operators().values() if isinstance(op, emit.QuadsOp)]
    rows += [(name, "RxC blocks of int8" if "Conv" in name else "quad planes") for name in quads]
    if as_json:
        print_json(
            {
                "path": path,
                "version": runtime.library_version(),
                "domain": DOMAIN,
                "opset": DOMAIN_VERSION,
                "isas": list(runtime.isas()),
                "int8_isas": list(runtime.int8_isas()),
                "operators": list(emit.operators()),
            }
        )
        return
    print_table(("operator", "layouts"), rows)
    click.echo(f"\nfused activations (suffix of the name): {', '.join(filter(None, ACTIVATIONS))}")
    click.echo(f"library {path}, version {runtime.library_version()}, domain {DOMAIN} {DOMAIN_VERSION}")
    click.echo(f"instruction sets usable here, best first: {' '.join(runtime.isas())}")
    click.echo(f"for int8 weights: {' '.join(runtime.int8_isas())}")
