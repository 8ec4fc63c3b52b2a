"""``sparsecc bundle``."""

from __future__ import annotations

import click

from sparsecc.cli.arguments import model_argument
from sparsecc.cli.depfile import depfile_option, write_depfile
from sparsecc.cli.output import format_bytes, json_option, print_json

__all__ = ["command"]


@click.command("bundle")
@model_argument
@click.option("--target", required=True, metavar="MACHINE", help="aarch64-linux or x86_64-linux.")
@click.option("-o", "--output", type=click.Path(), required=True, help="Folder to make.")
@click.option("--library", type=click.Path(), help="Operator library to take instead of the one built here.")
@click.option("--report", type=click.Path(), metavar="FILE", help="Report of the run to put in.")
@click.option(
    "--license",
    "licenses",
    type=click.Path(),
    multiple=True,
    metavar="FILE",
    help="Licence text of the model or its data to put in; repeat for more.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is a bundle.")
@depfile_option
@json_option
def command(
    model: str,
    target: str,
    output: str,
    library: str | None,
    report: str | None,
    licenses: tuple[str, ...],
    force: bool,
    depfile: str | None,
    as_json: bool,
) -> None:
    """Put MODEL and all that a device needs to run it into one folder: library, runner, examples, manifest.

    The device needs onnxruntime and nothing else; manifest.json says which versions, and has the SHA-256 of every
    file. Equal inputs give equal bytes.

    Example: sparsecc bundle small.onnx --target aarch64-linux -o device/
    """
    from sparsecc.bundle import make_bundle
    from sparsecc.ir.files import model_files

    made = make_bundle(
        model, output, triple=target, library=library, report=report, licenses=licenses, force=force
    )
    if depfile is not None:
        sources = (*model_files(model), library, report, *licenses, *made.native)
        write_depfile(depfile, str(made.folder / "manifest.json"), sources)
    if as_json:
        print_json({"output": output, "nbytes": made.nbytes, "manifest": made.manifest})
        return
    needs = ", ".join(f"{name} {version}" for name, version in made.manifest["requires"].items())
    click.echo(f"{output}: {len(made.manifest['files'])} files, {format_bytes(made.nbytes)}, for {target}")
    click.echo(f"needs at least {needs}")
    if len(made.native) == 1:
        click.echo(f"note: without sparsecc-run, which was not built for {target}")
