"""Times of whole models predicted from a profile of their products, against measured ones.

    python bench/cost_model.py --data FOLDER --table cpu.json --json bench/results/cost_model.json

FOLDER holds `models/*.onnx` (see `real_models`). Missing products are profiled first, into the cost table; an
interrupted run goes on when it is started again (`--only general` fills in products of common sizes). Every model is
lowered in every form through `sparsecc.optimize`, whose final comparison (interleaved with the input) is the truth;
only the time of the input is given to the prediction. `fitted` may know the other forms' times of the same model
besides (T = a + b * sum), `unseen` has none of the products of the model in its table: all is interpolated.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from real_models import ROOT, input_shapes, load_evaluation, model_paths

import sparsecc
from sparsecc import ir, plan
from sparsecc.cli.output import print_table
from sparsecc.errors import SparseccError
from sparsecc.plan import profile as measuring
from sparsecc.plan.cost_model import CostModel
from sparsecc.plan.items import Candidate, Choice, Item
from sparsecc.plan.whole_model import ModelFit, predict_model, sum_of
from sparsecc.plan.workload import ProfileKey
from sparsecc.pm import PassContext, get_pass

MODELS = (
    "minilm_l6_v2", "resnet20_cifar10", "ad01_autoencoder", "stories260K", "squeezenet1.0_pruned",
)  # fmt: skip

#: What is done to a model, by the name of the form.
FORMS = {
    "16x1 0.8": "tidy,prune-magnitude{pattern=16x1 sparsity=0.8},choose-layout{layout=16x1},lower-sparse",
    "2:4": "tidy,prune-magnitude{pattern=2:4},choose-layout{layout=2:4},lower-sparse",
    "unstructured 0.9": (
        "tidy,prune-magnitude{sparsity=0.9},choose-layout{layout=unstructured},lower-sparse"
    ),
    "svd 0.6": "tidy,factor-svd{param-ratio=0.6 keep-slower=true}",
    "int8": "tidy,quantize",
    "int8 static": "tidy,quantize{activations=static}",
}  # fmt: skip

#: As `16x1 0.8`, but of every second site.
HALF = "16x1 0.8, half"

#: Series of the profile that the forms need.
SERIES = ("low-rank", "static dense", "pattern 16x1", "pattern 2:4", "pattern unstructured")


def form_of(layout: str, pipeline: str) -> str:
    """The name in the cost model of what a site became."""
    if layout.startswith("rank "):
        return "low-rank"
    return f"static {layout}" if "static" in pipeline and layout != "dense" else layout


def items_of(
    model: ir.Model, inputs: plan.Inputs, result: sparsecc.OptimizeResult, costs: CostModel, pipeline: str
) -> Iterator[Item]:
    """One item per site, dense and in the form it got."""
    shapes = plan.timing.input_shapes_of_sites(model, inputs)
    decisions = {decision.site: decision for decision in result.sites}
    for site in model.sites():
        decision = decisions.get(site.name)
        if decision is None or site.name not in shapes or decision.layout == "dense":
            continue
        work = measuring.workload_of_site(model, site, shapes[site.name])
        form = form_of(decision.layout, pipeline)
        times = costs.estimate(work), costs.estimate(work, form, min(1.0, decision.density))
        candidates = [
            Candidate(passes, 0.0, time, 0) for passes, time in zip(((), (form,)), times, strict=True)
        ]
        yield Item(site.name, (site.name,), tuple(candidates))


def pipelines(path: Path) -> dict[str, str]:
    """What is done to a model by the name of the form: convolutions need static activations."""
    sites = ir.Model.load(path).sites()
    other = "int8" if any(site.op == "Conv" for site in sites) else "int8 static"
    chosen = {form: text for form, text in FORMS.items() if form != other}
    names = "|".join(re.escape(site.name) for site in sites[::2]).replace("\\", "\\\\")
    chosen[HALF] = FORMS["16x1 0.8"].replace("16x1 sparsity", f'16x1 match="re:^(?:{names})$" sparsity')
    return chosen


def measure(
    name: str, path: Path, pipeline: str, table: Path, threads: int, scratch: Path
) -> tuple[sparsecc.OptimizeResult, ir.Model, plan.Inputs]:
    shapes = input_shapes(name, path)
    static = "static" in pipeline
    result = sparsecc.optimize(
        path, scratch / "out.onnx", pipeline=pipeline, keep_slower=True, threads=threads, input_shapes=shapes,
        costs=table, calibration_data="synthetic" if static else None,
    )  # fmt: skip
    model = ir.Model.load(path)
    inputs = plan.runnable_inputs(model, None, 0, shapes)
    get_pass("tidy")().run(model, PassContext())
    return result, model, inputs


def fill(name: str, path: Path, table: plan.CostTable, threads: int, seconds: float) -> None:
    """Profile what the products of a model lack."""
    model = ir.Model.load(path)
    inputs = plan.runnable_inputs(model, None, 0, input_shapes(name, path))
    products = measuring.products_of(model, inputs)
    keys = [key for key in measuring.planned(products, threads, 0, library=True) if key.series in SERIES]
    done, notes = measuring.profile(table, products, keys, seconds=seconds)
    click.echo(f"{name}: {done} of {len(keys)} products profiled {notes[:2]}", err=True)


def fill_general(table: plan.CostTable, threads: int, seconds: float) -> None:
    """Profile products of common sizes."""
    products = measuring.generic_products()
    keys = [key for key in measuring.planned(products, threads, 0, library=True) if key.series in SERIES]
    done, notes = measuring.profile(table, products, keys, seconds=seconds)
    click.echo(f"{done} of {len(keys)} general products profiled {notes[:2]}", err=True)


def unseen(table: plan.CostTable, model: ir.Model, inputs: plan.Inputs, threads: int) -> CostModel:
    """The cost model without the products of ``model``."""
    known = {str(product.work) for product in measuring.products_of(model, inputs)}
    rest = plan.CostTable(None, table.facts)
    for key, times in table:
        parsed = ProfileKey.parse(key)
        if parsed is None or str(parsed.work) not in known:
            rest.put(key, times)
    return CostModel.load(rest, threads)


def row_of(name: str, form: str, before: float, after: float, items: Sequence[Item]) -> dict[str, Any]:
    choice = Choice({item.name: 1 for item in items}, 0.0, 0, 0.0)
    estimate = predict_model(before, items, choice)
    return {
        "model": name,
        "form": form,
        "sites": len(items),
        "before_ms": before,
        "measured_ms": after,
        "predicted_ms": estimate.ms,
        "spread": estimate.spread,
        "error": estimate.ms / after - 1,
        "dense_sum_ms": sum_of(items),
        "form_sum_ms": sum_of(items, choice),
    }


def fitted(rows: list[dict[str, Any]]) -> None:
    """Add to each row of one model what is predicted when the times of its other forms are known too."""
    whole = max((row["dense_sum_ms"] for row in rows), default=0.0)
    for row in rows:
        points = [(whole, row["before_ms"])]
        points += [
            (
                whole - other["dense_sum_ms"] + other["form_sum_ms"],
                other["measured_ms"] * row["before_ms"] / other["before_ms"],
            )
            for other in rows
            if other is not row
        ]
        fit = ModelFit.of(points)
        ms = row["before_ms"] - fit.share * (row["dense_sum_ms"] - row["form_sum_ms"])
        row |= {"fitted_ms": ms, "fitted_error": ms / row["measured_ms"] - 1, "share": fit.share}


def mean_error(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [abs(row[key]) for row in rows if key in row]
    return round(statistics.fmean(known), 4) if known else None


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), help="Folder of real models and their data.")
@click.option("--table", required=True, type=click.Path(path_type=Path), help="Cost table: read, and filled.")
@click.option("--threads", default=1)
@click.option("--only", multiple=True, help="Names of models; default all.")
@click.option("--seconds", default=math.inf, help="Most spent on the profile of a model in this run.")
@click.option(
    "--json", "output", type=click.Path(path_type=Path), help="Where the figures go; rows there are kept."
)
def main(
    data: Path | None, table: Path, threads: int, only: tuple[str, ...], seconds: float, output: Path | None
) -> None:
    """Predict the times of whole models and measure them."""
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    evaluation = load_evaluation(data)
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"] if output and output.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        paths = model_paths(data, evaluation, scratch)
        for name in only or MODELS:
            costs = plan.CostTable.open(table)
            if name == "general":
                fill_general(costs, threads, seconds)
                continue
            fill(name, paths[name], costs, threads, seconds)
            own = measured_forms(name, paths[name], costs, threads, scratch)
            fitted(own)
            rows = [row for row in rows if row["model"] != name] + own
            if output is not None:
                document = {
                    "machine": plan.machine_facts(),
                    "threads": threads,
                    **summary(rows),
                    "rows": rows,
                }
                output.write_text(json.dumps(document, indent=1) + "\n")
    columns = [
        "model",
        "form",
        ">sites",
        ">before",
        ">measured",
        ">predicted",
        ">error",
        ">fitted",
        ">unseen",
        ">spread",
    ]
    print_table(columns, [cells(row) for row in rows])
    for name, value in summary(rows).items():
        click.echo(f"{name}: {value}")


def cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[key]:.4g} ms" for key in ("before_ms", "measured_ms", "predicted_ms")]
    shares = [f"{row.get(f'{key}error', math.nan):+.1%}" for key in ("", "fitted_", "unseen_")]
    return [row["model"], row["form"], str(row["sites"]), *times, *shares, f"{row['spread']:.1%}"]


def measured_forms(
    name: str, path: Path, table: plan.CostTable, threads: int, scratch: Path
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    costs = CostModel.load(table, threads)
    for form, pipeline in pipelines(path).items():
        try:
            result, model, inputs = measure(
                name, path, pipeline, scratch / f"{name}.costs.json", threads, scratch
            )
            items = list(items_of(model, inputs, result, costs, pipeline))
        except SparseccError as reason:
            click.echo(f"{name}, {form}: {reason}", err=True)
            continue
        if not items:
            continue
        latency = result.latency
        row = row_of(name, form, latency.before_ms, latency.after_ms, items)
        try:
            others = unseen(table, model, inputs, threads)
            items = list(items_of(model, inputs, result, others, pipeline))
            found = row_of(name, form, latency.before_ms, latency.after_ms, items)
            row |= {"unseen_ms": found["predicted_ms"], "unseen_error": found["error"]}
        except SparseccError as reason:
            click.echo(f"{name}, {form}, unseen: {reason}", err=True)
        rows.append(row)
        click.echo(
            f"{name}, {form}: {row['error']:+.1%}, unseen {row.get('unseen_error', math.nan):+.1%}", err=True
        )
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def by(key: str) -> dict[str, float | None]:
        names = sorted({row[key] for row in rows})
        return {name: mean_error([row for row in rows if row[key] == name], "error") for name in names}

    return {
        "mean_error": mean_error(rows, "error"),
        "mean_error_fitted": mean_error(rows, "fitted_error"),
        "mean_error_unseen": mean_error(rows, "unseen_error"),
        "mean_error_by_model": by("model"),
        "mean_error_by_form": by("form"),
    }


if __name__ == "__main__":
    main()
