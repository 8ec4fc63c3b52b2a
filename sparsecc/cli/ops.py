"""``sparsecc ops``."""

from __future__ import annotations

from pathlib import Path

import click

from sparsecc.cli.output import json_option, print_json, print_table
from sparsecc.errors import UsageError

__all__ = ["command"]


@click.command("ops")
@click.argument("what", type=click.Choice(["info", "path", "size"]), default="info")
@click.option("--target", default="cpu", show_default=True, help="With path: cpu, arm64 or cuda.")
@click.option("--runner", is_flag=True, help="With path: the program sparsecc-run instead of the library.")
@click.option(
    "--cmake", is_flag=True, help="With path: the folder that find_package(sparsecc) wants as sparsecc_DIR."
)
@json_option
def command(what: str, target: str, runner: bool, cmake: bool, as_json: bool) -> None:
    """Show the operator library: its operators and instruction sets; with `path` only where it lies, with `size` the
    bytes of every library that was built here.

    Exit code 6 if what was asked for is not built; the message says how to build it.

    Example: sparsecc ops path --target arm64
    """
    if what != "path" and (target != "cpu" or runner or cmake):
        raise UsageError("--target, --runner and --cmake go with path: sparsecc ops path ...")
    if runner and cmake:
        raise UsageError("--runner and --cmake exclude each other")
    if what == "path":
        path = _path(target, runner, cmake)
        print_json({"path": path}) if as_json else click.echo(path)
    elif what == "size":
        _print_sizes(as_json)
    else:
        _print_info(as_json)


def _path(target: str, runner: bool, cmake: bool) -> str:
    from sparsecc import runtime

    if cmake:
        return str(Path(runtime.__file__).parent / "cmake")
    return runtime.get_runner_path(target) if runner else runtime.get_library_path(target)


def _print_sizes(as_json: bool) -> None:
    """Bytes of the libraries and runners for all machines that they were built for."""
    from sparsecc import runtime
    from sparsecc.errors import RuntimeMissingError
    from sparsecc.runtime.elf import NativeFile, read_native

    found: dict[str, NativeFile] = {}
    for target in ("cpu", "arm64"):
        for get in (runtime.get_library_path, runtime.get_runner_path):
            try:
                file = read_native(get(target))
            except RuntimeMissingError as error:
                click.echo(f"note: {error}", err=True)
            else:
                found[str(file.path)] = file
    if as_json:
        keys = ("triple", "nbytes", "stripped_nbytes")
        print_json(
            {
                "files": [
                    {"path": path, **{key: getattr(file, key) for key in keys}}
                    for path, file in found.items()
                ]
            }
        )
        return
    rows = [(file.triple, file.nbytes, file.stripped_nbytes, path) for path, file in found.items()]
    print_table(("machine", ">bytes", ">stripped", "file"), rows)


def _print_info(as_json: bool) -> None:
    from sparsecc import emit, runtime
    from sparsecc.ir.sparse_ops import ACTIVATIONS, DOMAIN, DOMAIN_VERSION, FAMILIES

    path = runtime.get_library_path()
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
