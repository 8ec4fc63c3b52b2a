"""``sparsecc recipe``: make, check and show recipes and plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparsecc.cli.output import json_option, print_json, print_table
from sparsecc.errors import SpecError, UsageError

if TYPE_CHECKING:
    from sparsecc.ir import Model, Site
    from sparsecc.pm import Pass, PassContext, Pipeline

__all__ = ["command"]

file_argument = click.argument("file", type=click.Path())
optional_model = click.argument("model", type=click.Path(), required=False)


@click.group("recipe")
def command() -> None:
    """Make, check and show recipes: pipelines and settings per site in a file, for optimize --recipe.

    Example: sparsecc recipe init --method wanda --pattern 2:4 -o recipe.toml
    """


@command.command("init")
@optional_model
@click.option("-o", "--output", type=click.Path(), help="File to write; default: print it.")
@click.option("--method", help="As for optimize.")
@click.option("--pattern", help="As for optimize.")
@click.option("--sparsity", type=click.FloatRange(0, 1, max_open=True), help="As for optimize.")
@click.option("--param-ratio", type=click.FloatRange(0, 1, min_open=True), help="As for optimize.")
@click.option("--flops-ratio", type=float, help="As for optimize.")
@click.option("--blocks", type=click.IntRange(min=1), help="As for optimize.")
@click.option("--fisher", metavar="NPZ", type=click.Path(), help="As for optimize.")
@click.option("--allocate", is_flag=True, help="As for optimize.")
@click.option("--permute", is_flag=True, help="As for optimize.")
@click.option("--recover", metavar="NAMES", help="As for optimize.")
@click.option("--quantize", metavar="TYPE", help="As for optimize.")
@click.option("--activations", help="As for optimize.")
@click.option("--values", default="fp32", show_default=True, help="As for optimize.")
@click.option("--match", default="*", show_default=True, help="As for optimize.")
@click.option("--standard-ops-only", is_flag=True, help="As for optimize.")
@click.option("--keep-slower", is_flag=True, help="As for optimize.")
@click.option("--calibrated/--not-calibrated", default=True, show_default=True, help="For use with inputs.")
def init(model: str | None, output: str | None, **options: Any) -> None:
    """Write the recipe that these flags of optimize stand for; with MODEL its sites stand in it as comments.

    Example: sparsecc recipe init model.onnx --method rrr --quantize int8 -o recipe.toml
    """
    from sparsecc import plan

    text = plan.preset(**options).to_toml()
    if model is not None:
        text += _commented_sites(model)
    if output is None:
        click.echo(text, nl=False)
        return
    path = Path(output)
    if path.exists():
        raise UsageError(f"{path} exists and may have been edited; give another file with -o")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; create it first")
    path.write_text(text, encoding="utf-8")
    click.echo(f"{path}: edit it, then: sparsecc recipe check {path}", err=True)


def _commented_sites(model: str) -> str:
    from sparsecc import ir
    from sparsecc.pm.recipe import basic_string

    sites = ir.Model.load(Path(model)).sites()
    lines = [
        "",
        "# Settings for some sites; of several that match the last counts:",
        "# [[override]]",
        '# match = "..."  # a glob, or "re:EXPRESSION"',
        "# skip = true    # or pattern = ..., sparsity = ..., param_ratio = ...",
        "#",
        "# Sites of the model:",
    ]
    lines += [f"#   {basic_string(site.name)}  # {site.op} {_shape(site)}" for site in sites]
    return "\n".join(lines) + "\n"


def _shape(site: Site) -> str:
    return "x".join(map(str, site.weight_shape))


@command.command("check")
@file_argument
@optional_model
@json_option
def check(file: str, model: str | None, as_json: bool) -> int:
    """Say whether recipe or plan FILE can be read, and with MODEL whether every match finds a site. Else exit code 2.

    Example: sparsecc recipe check recipe.toml model.onnx
    """
    from sparsecc.pm import Pipeline

    pipeline = Pipeline.from_toml(file)
    problems, notes = _problems(file, pipeline, model) if model is not None else ([], [])
    needing = [item.name for item in pipeline.passes if item.requires_calibration]
    if needing:
        notes.append(f"needs --calibration-data: {', '.join(dict.fromkeys(needing))}")
    if as_json:
        print_json({"file": file, "ok": not problems, "problems": problems, "notes": notes})
    else:
        for line in problems:
            click.echo(f"problem: {line}")
        for line in notes:
            click.echo(f"note: {line}")
        overrides = f", {len(pipeline.overrides)} overrides" if pipeline.overrides else ""
        verdict = "cannot run on this model" if problems else "good"
        click.echo(f"{file}: {verdict}: {len(pipeline.passes)} passes{overrides}")
    return 2 if problems else 0


def _problems(file: str, pipeline: Pipeline, path: str) -> tuple[list[str], list[str]]:
    """What stops the recipe on the model, and what may."""
    from sparsecc import ir, plan
    from sparsecc.ir.files import file_sha256
    from sparsecc.pm.choices import changes_names
    from sparsecc.pm.sites import refuse_unmatched

    model = ir.Model.load(Path(path))
    names = plan.site_names(model)
    problems, notes = list[str](), list[str]()
    try:
        notes += plan.read_plan(file, sites=names, model=file_sha256(Path(path)))[1]
    except SpecError as error:
        problems.append(str(error))
    matches = [(f"override {n}", item.match) for n, item in enumerate(pipeline.overrides, 1)]
    renamed = False
    for step in pipeline.passes:
        match = vars(step).get("match")
        if match is not None and not renamed:
            matches.append((f"match of {step.name}", match))
        elif match not in (None, "*"):
            notes.append(f"match of {step.name} is not checked: passes before it make sites of other names")
        renamed = renamed or changes_names(step.name)
    for what, match in matches:
        try:
            refuse_unmatched(match, names, what)
        except UsageError as error:
            problems.append(str(error))
    return problems, notes


@command.command("show")
@file_argument
@optional_model
@json_option
def show(file: str, model: str | None, as_json: bool) -> None:
    """Show the passes of recipe or plan FILE with their matches; with MODEL what each site takes after overrides.

    Example: sparsecc recipe show plan.toml model.onnx
    """
    from sparsecc import ir
    from sparsecc.pm import PassContext, Pipeline

    pipeline = Pipeline.from_toml(file)
    overrides = [
        {key: value if isinstance(value, bool | float) else str(value)
         for key, value in vars(item).items() if value is not None and value is not False}
        for item in pipeline.overrides
    ]  # fmt: skip
    context = PassContext(overrides=pipeline.overrides)
    sites = None if model is None else _settings(ir.Model.load(Path(model)), pipeline.passes, context)
    if as_json:
        document = {"file": file, "pipeline": [str(item) for item in pipeline.passes], "overrides": overrides}
        print_json(document if sites is None else {**document, "sites": sites})
        return
    print_table((">#", "pass"), [(n, str(item)) for n, item in enumerate(pipeline.passes, 1)])
    for item in overrides:
        click.echo("override " + ", ".join(f"{key} = {value}" for key, value in item.items()))
    if sites is not None:
        click.echo("")
        rows = [(site["site"], site["op"], site["shape"], ", ".join(site["takes"]) or "-") for site in sites]
        print_table(("site", "op", "shape", "takes"), rows)


def _settings(model: Model, passes: Sequence[Pass], context: PassContext) -> list[dict[str, Any]]:
    """For each site the lossy passes that match it, with their settings there; not what undoes them."""
    from sparsecc.ir import name_matches

    lossy = [
        item
        for item in passes
        if not item.lossless and "match" in vars(item) and item.name != "restore-dense"
    ]
    return [
        {
            "site": site.name,
            "op": site.op,
            "shape": _shape(site),
            "takes": [
                _at(item, site, context) for item in lossy if name_matches(vars(item)["match"], site.name)
            ],
        }
        for site in model.sites()
    ]


def _at(item: Pass, site: Site, context: PassContext) -> str:
    settings = context.settings_for(site, item)
    if settings.skip:
        return f"left alone by an override ({item.name})"
    values = {key: getattr(settings, key) for key in ("pattern", "sparsity", "param_ratio")}
    own = {key: value for key, value in values.items() if key in vars(item)}
    everywhere: dict[str, Any] = {**own, "match": "*"}
    return str(dataclasses.replace(item, **everywhere))


@command.command("schema")
@click.option("-o", "--output", type=click.Path(), help="File to write; default: print it.")
def schema(output: str | None) -> None:
    """Print the JSON Schema of recipe and plan files, from the options of all passes.

    Example: sparsecc recipe schema -o recipe.schema.json
    """
    import json

    from sparsecc.pm.schema import recipe_schema

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        Path(output).write_text(text, encoding="utf-8")
