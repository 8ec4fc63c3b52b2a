"""Convolutions as several smaller ones: accuracy, error and time of whole models.

    python bench/factor_conv.py models --data FOLDER    accuracy and output error, 20, 30 and 40 % fewer numbers
    python bench/factor_conv.py times --data FOLDER     time of the dense model / time of those
    python bench/factor_conv.py layers                  time of dense layers / time of each form

Every convolution with a kernel of more than one entry (of MobileNets, which have none worth it: the 1x1 ones) is
factorised alike, without labels, training or allocation, whether or not it gains time; with ``--paying`` layers that
do not gain any stay dense. Calibration samples are never among those measured on. What is in the file already is not
measured again.
Speeds are ratios of medians of interleaved runs of one process, one thread, on plain onnxruntime without our library.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from accuracy import save
from accuracy_tasks import ROOT, Batch, Task, tasks
from factorisation import output_errors

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.passes.factor.base import rewrite
from sparsecc.plan.costs import CostTable
from sparsecc.plan.timing import MeasuredCosts
from sparsecc.pm import PassContext, Pipeline, get_pass

OUTPUT = ROOT / "bench" / "results" / "factor_conv.json"
MODELS_FOLDER = ROOT / "build" / "factor_conv"
COMMAND = "python bench/factor_conv.py"

#: Passes by the name of the form; the first two give kernels of all entries into fewer channels.
METHODS = {
    "channel, SVD": "factor-svd",
    "channel, RRR": "factor-rrr",
    "spatial": "factor-spatial-svd",
    "Tucker": "factor-tucker",
    "CP": "factor-cp",
    "separable": "factor-separable",
    "best": "factor-best",
}

#: Share of the numbers that stay.
RATIOS = (0.8, 0.7, 0.6)

#: Models with the methods that suit them and the step of ranks: small layers hold no ranks in steps of eight.
MODELS = {
    "resnet20_cifar10": (tuple(METHODS), 4),
    "squeezenet1.0_pruned": (tuple(METHODS), 8),
    "mnist_cntk": (tuple(METHODS), 2),
    "mobilenet_v1_0.25_128": (tuple(METHODS)[:2], 8),
    "mobilenet_v2_1.0_224": (tuple(METHODS)[:2], 8),
}

#: Outputs, inputs and side of the picture of 3x3 layers that are timed alone.
LAYERS = ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7), (256, 64, 13))


def layers_of(model: ir.Model) -> list[str]:
    """The sites that are factorised."""
    convolutions = [site for site in model.sites() if site.conv is not None and site.groups == 1]
    kernels = [site.name for site in convolutions if site.conv is not None and not site.conv.is_pointwise]
    return kernels if len(kernels) > 1 else [site.name for site in convolutions]


def pipeline_of(method: str, ratio: float, multiple: int, names: list[str], *, paying: bool) -> Pipeline:
    match = "|".join(re.escape(name) for name in names)
    factorise = get_pass(METHODS[method])(
        match=f"re:^({match})$",
        param_ratio=ratio,
        multiple=multiple,
        min_elements=200,
        keep_slower=not paying,
    )
    return Pipeline((get_pass("tidy")(), factorise))


def factorised(
    task: Task, dense: ir.Model, pipeline: Pipeline, costs: MeasuredCosts
) -> tuple[ir.Model, dict[str, Any]]:
    """The model and what the pass says of it; parameters are those of the layers it was to change."""
    model = dense.copy()
    started = time.process_time()
    calibration = Calibration.from_batches(task.calibration, model, threads=1)
    context = PassContext(calibration=calibration, costs=costs, threads=1)
    report = pipeline.run(model, context)[-1]
    sizes = {site.name: site.shape[0] * site.shape[1] for site in dense.sites()}
    left = [skip.site for skip in report.skipped if skip.site in sizes]
    changed = {change.site: change.numbers for change in report.changed}
    whole = sum(sizes[name] for name in (*changed, *left))
    kept = sum(sizes[name] * float(numbers["parameters"] or 0) for name, numbers in changed.items())
    row = {
        "sites": len(changed),
        "sites_left": len(left),
        "parameters": round((kept + sum(sizes[name] for name in left)) / whole, 4),
        "numbers_of_model": round(sum(s.numpy().size for s in model.sites()) / sum(sizes.values()), 4),
        "output_error": round(float(np.mean(output_errors(report, dense, model, calibration) or [0.0])), 5),
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    return model, row


def accuracy_of(task: Task, model: ir.Model) -> dict[str, Any]:
    session = verify.session(model, threads=1)
    value, count = task.measure(lambda feed: list(session.run(feed).values()))
    return {"value": round(value, 5), "samples": count}


def read(output: Path) -> dict[str, Any]:
    return dict(json.loads(output.read_text())["models"]) if output.exists() else {}


def dense_model(task: Task) -> tuple[ir.Model, Batch]:
    """The model with batch norms folded, and one sample."""
    dense = ir.Model.load(task.path)
    Pipeline((get_pass("tidy")(),)).run(dense, PassContext())
    return dense, {key: array[:1] for key, array in task.calibration[0].items()}


@click.group()
def main() -> None:
    """Measure what the file of results does not have yet."""


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file."),
        click.option(
            "--models", type=click.Path(path_type=Path), default=MODELS_FOLDER, help="Factorised models."
        ),
        click.option(
            "--only", multiple=True, type=click.Choice(list(MODELS)), help="This model; may be repeated."
        ),
        click.option(
            "--data",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
            help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
        ),
    ):
        command = option(command)
    return command


@main.command("models")
@options
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="Only this form.")
@click.option(
    "--ratio", "ratios", multiple=True, type=float, default=RATIOS, help="Share of numbers that stay."
)
@click.option("--paying", is_flag=True, help="Leave layers dense that gain no time.")
@click.option("--again", is_flag=True, help="Repeat runs that are in the file.")
def models_command(
    data: Path,
    only: tuple[str, ...],
    models: Path,
    output: Path,
    methods: tuple[str, ...],
    ratios: tuple[float, ...],
    paying: bool,
    again: bool,
) -> None:
    """Factorise and measure accuracy; the models are kept for ``times``."""
    with tempfile.TemporaryDirectory() as folder:
        known = tasks(data, Path(folder))
        for name, (suited, multiple) in MODELS.items():
            if only and name not in only:
                continue
            dense, batch = dense_model(known[name])
            costs = MeasuredCosts(CostTable.open(), batch, 1)
            for method in suited if not methods else [item for item in suited if item in methods]:
                for ratio in ratios:
                    results = read(output)
                    held = results.setdefault(name, {"metric": known[name].metric, "variants": {}})
                    if "dense" not in held:
                        held["dense"] = accuracy_of(known[name], dense)
                    key = f"{method} {ratio:g}" + (" where it pays" if paying else "")
                    if key in held["variants"] and not again:
                        continue
                    pipeline = pipeline_of(method, ratio, multiple, layers_of(dense), paying=paying)
                    model, row = factorised(known[name], dense, pipeline, costs)
                    held["variants"][key] = row | accuracy_of(known[name], model)
                    models.mkdir(parents=True, exist_ok=True)
                    model.save(models / f"{name}, {key}.onnx")
                    click.echo(f"{name}: {key} {held['variants'][key]}", err=True)
                    save(output, results, COMMAND, 1)


@main.command("times")
@options
@click.option("--seconds", default=1.0, show_default=True, help="Time spent on each model.")
def times_command(data: Path, only: tuple[str, ...], models: Path, output: Path, seconds: float) -> None:
    """Time of the dense model / time of each factorised one that ``models`` left."""
    with tempfile.TemporaryDirectory() as folder:
        known = tasks(data, Path(folder))
        for name in [item for item in MODELS if not only or item in only]:
            known_rows = read(output).get(name, {"variants": {}})["variants"]
            found = {key: models / f"{name}, {key}.onnx" for key in known_rows}
            found = {key: path for key, path in found.items() if path.exists()}
            if not found:
                continue
            dense, batch = dense_model(known[name])
            timed = verify.benchmark(
                [dense, *found.values()],
                batch,
                threads=1,
                library=False,
                rounds=101,
                max_seconds=seconds * (1 + len(found)),
            )
            results = read(output)  # another run may have added rows meanwhile
            rows = results[name]["variants"]
            for key, speed in zip(found, timed.ratio_to_first[1:], strict=True):
                rows[key]["speed"] = round(float(speed), 3)
                click.echo(f"{name}: {key} {speed:.3f}", err=True)
            results[name]["dense_ms"] = round(timed.models[0].median_ms, 4)
            save(output, results, COMMAND, 1)


@main.command("layers")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file.")
@click.option("--seconds", default=0.3, show_default=True, help="Time spent on each form.")
def layers_command(output: Path, seconds: float) -> None:
    """Times of 3x3 layers with random weights: values do not matter to them."""
    found: dict[str, Any] = {}
    for outputs, channels, side in LAYERS:
        rng = np.random.default_rng(0)
        dense = layer(outputs, channels, side)
        forms, models = [], []
        for method, name in METHODS.items():
            for ratio in RATIOS if method != "channel, SVD" and method != "best" else ():
                chain = dense.copy()
                (site,) = chain.sites()
                outline = get_pass(name)().outline(site, int(ratio * site.shape[0] * site.shape[1]), rng)  # type: ignore[attr-defined]
                rewrite(chain, site, outline.astype(site.dtype))
                forms.append(f"{method} {ratio:g}")
                models.append(chain)
        batch = {"x": rng.standard_normal((1, channels, side, side)).astype(np.float32)}
        timed = verify.benchmark(
            [dense, *models], batch, threads=1, library=False, max_seconds=seconds * (1 + len(models))
        )
        speeds = [round(float(item), 3) for item in timed.ratio_to_first[1:]]
        key = f"{outputs}x{channels}x3x3 on {side}x{side}"
        found[key] = {
            "dense_ms": round(timed.models[0].median_ms, 4),
            **dict(zip(forms, speeds, strict=True)),
        }
        click.echo(f"{key}: {found[key]}", err=True)
    save(output, read(output) | {"layers": found}, COMMAND, 1)


def layer(outputs: int, channels: int, side: int) -> ir.Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,{channels},{side},{side}] x) => (float[N,{outputs},{side},{side}] y) {{
            [layer] h = Conv<pads = [1, 1, 1, 1]>(x, w, b)
            y = Relu(h)
        }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (outputs, channels, 3, 3)), ("b", (outputs,))):
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    return ir.Model.from_proto(proto)


if __name__ == "__main__":
    main()
