"""What each factorisation costs in accuracy and gains in time: the figures of docs/factorisation.md.

    python bench/factorisation.py models --data FOLDER    accuracy and output error at 20, 30, 40 % fewer numbers
    python bench/factorisation.py layers                  time of dense layers / time of their factors, and of the fit
    python bench/factorisation.py whole --data FOLDER     time of MiniLM with layers of low rank
    python bench/factorisation.py spectra --data FOLDER   singular values of layers, plain and whitened

Models are factorised layer by layer alike, without labels, training or allocation, whether or not a layer gains time.
Calibration samples are never among those measured on. What is in the file already is not measured again.
Speeds are ratios of medians of interleaved runs of one process, one thread, on plain onnxruntime without our library.
Seconds of the fit are processor time; set OMP_NUM_THREADS=1 for those of one thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnx
from accuracy import save
from accuracy_tasks import ROOT, Run, Task, load_evaluation, minilm, stories

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.pm import PassContext, PassReport, Pipeline

OUTPUT = ROOT / "bench" / "results" / "factorisation.json"

#: Passes by the name that the page uses; OPTIONS gives the budget.
METHODS = {
    "SVD": "factor-svd{OPTIONS}",
    "ASVD": "factor-asvd{OPTIONS sequential=false}",
    "whitened SVD": "factor-rrr{OPTIONS sequential=false}",
    "RRR": "factor-rrr{OPTIONS}",
    "CUR": "factor-cur{OPTIONS}",
    "CoSpaDi": "factor-cospadi{OPTIONS pattern=unstructured}",
    "COMPOT": "factor-compot{OPTIONS pattern=unstructured}",
    "COMPOT 4x1": "factor-compot{OPTIONS}",
    "ROCKET": "factor-rocket{OPTIONS pattern=unstructured}",
    "Monarch": "factor-monarch{OPTIONS}",
    "BTT": "factor-btt{OPTIONS}",
    "BLAST": "factor-blast{OPTIONS}",
    "block-diagonal + low rank": "factor-blockdiag-lowrank{OPTIONS}",
    "Kronecker sum": "factor-kronecker{OPTIONS}",
    "tensor train": "factor-tensor-train{OPTIONS}",
    "sparse + low rank": "sparse-lowrank{sparsity=SPARSITY}",
}

#: Share of the numbers that stay.
RATIOS = (0.8, 0.7, 0.6)

#: Pairs of sentences that MiniLM is measured on, and that calibrate it.
PAIRS, HELD_PAIRS = 600, 256

#: (outputs, inputs) of the layers of a BERT-base, and rows of x.
LAYERS = ((768, 768), (3072, 768), (768, 3072))
ROWS = (16, 128, 512)

#: Forms whose layers are timed: those of standard operators.
TIMED = ("RRR", "CUR", "Monarch", "BTT", "BLAST")

#: Layers of MiniLM whose spectra are drawn.
DRAWN = {
    "query": "query",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "3.output.dense",
}


def tasks(data: Path, folder: Path) -> dict[str, Task]:
    evaluation = load_evaluation(data)

    def similarity(run: Run) -> tuple[float, int]:
        found = evaluation.sts("stsb_dev_minilm_tokens.npz", limit=PAIRS)(run)
        return found["spearman"], found["n"]

    sentences = minilm(data, evaluation, folder, HELD_PAIRS)
    return {
        "minilm_l6_v2": dataclasses.replace(sentences, measure=similarity),
        "stories260K": stories(data, evaluation, folder),
        "text_lm": _text_lm(),
    }


def _text_lm() -> Task:
    """The language model of this repository, which has layers of 256 and 1024 inputs."""
    folder = ROOT / "models" / "text_lm"
    bits_per_character = runpy.run_path(str(folder / "eval.py"))["bits_per_character"]
    windows = np.load(folder / "calibration.npz")["ids"]

    def measure(run: Run) -> tuple[float, int]:
        found = bits_per_character(SimpleNamespace(run=lambda _, feed: run(feed)))
        return found["value"], int(np.load(folder / "test.npz")["windows"][:, 1:].size)

    return Task(
        folder / "text_lm.onnx", "bits per character", measure,
        [{"ids": np.concatenate(windows[at : at + 16])} for at in range(0, len(windows), 16)],
        len(windows), higher_is_better=False,
    )  # fmt: skip


def pipeline_of(method: str, ratio: float, model: str) -> str:
    """The passes of a method at a budget; the layers of the small model hold no ranks in steps of eight."""
    smaller = " multiple=2 min-elements=1024" if model == "stories260K" else ""
    options = f"param-ratio={ratio:g} keep-slower=true{smaller}"
    sparsity = f"{1 - ratio:.4g}" + (" multiple=2" if smaller else "")
    return f"tidy,{METHODS[method]}".replace("OPTIONS", options).replace("SPARSITY", sparsity)


def measured(task: Task, pipeline: str) -> dict[str, Any]:
    """Factorise and measure; ``cpu_seconds`` is processor time, calibration included."""
    model = ir.Model.load(task.path)
    row: dict[str, Any] = {"pipeline": pipeline}
    if pipeline:
        started, wall = time.process_time(), time.perf_counter()
        dense = {site.name: site.shape[0] * site.shape[1] for site in model.sites()}
        calibration = Calibration.from_batches(task.calibration, model, threads=1)
        report = Pipeline.parse(pipeline).run(model, PassContext(calibration=calibration, threads=1))[-1]
        row |= {
            "cpu_seconds": round(time.process_time() - started, 1),
            "seconds": round(time.perf_counter() - wall, 1),
        }
        sizes = [dense[change.site] for change in report.changed]
        kept = [float(change.numbers["parameters"] or 0) for change in report.changed]
        errors = output_errors(report, ir.Model.load(task.path), model, calibration)
        row |= {
            "sites": len(sizes),
            "sites_left": len(report.skipped),
            "parameters": round(float(np.average(kept, weights=sizes)), 4) if sizes else 1.0,
            "output_error": round(float(np.mean(errors)), 5) if sizes else 0.0,
        }
    session = verify.session(model, threads=1)
    value, count = task.measure(lambda feed: list(session.run(feed).values()))
    return {**row, "value": round(value, 5), "samples": count}


def output_errors(
    report: PassReport, dense: ir.Model, model: ir.Model, calibration: Calibration
) -> list[float]:
    """Share of the energy of outputs that each changed site loses.

    A pass without data does not know: then that of the product of two factors, on what ``dense`` gives.
    """
    unknown = {change.site for change in report.changed if "output_error" not in change.numbers}
    sites = {site.name: site for site in dense.sites() if site.name in unknown}
    grams = calibration.gram(dense, list(sites.values()))
    errors = []
    for change in report.changed:
        if change.site not in unknown:
            errors.append(float(change.numbers["output_error"] or 0))
            continue
        parts = (site for site in model.sites() if site.node.metadata_props.get(PART_KEY) == change.site)
        first, second = (part.numpy().astype(np.float64) for part in parts)
        weight, gram = sites[change.site].numpy().astype(np.float64), grams[change.site]
        errors.append(quadratic_error(second @ first - weight, gram) / quadratic_error(weight, gram))
    return errors


def layer(outputs: int, inputs: int) -> ir.Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B,M,{inputs}] x) => (float[B,M,{outputs}] y) {{ [layer] h = MatMul(x, w) y = Add(h, b) }}"""
    )
    weight = rng.standard_normal((inputs, outputs)).astype(np.float32) / np.float32(np.sqrt(inputs))
    for name, array in (("w", weight), ("b", rng.standard_normal(outputs).astype(np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.Model.from_proto(proto)


def speed(outputs: int, inputs: int, seconds: float) -> dict[str, Any]:
    """Time of the dense layer / time of its factors, by rows, method and share of the numbers that stay."""
    dense = layer(outputs, inputs)
    x = np.random.default_rng(1).standard_normal((1, 64, inputs)).astype(np.float32)
    calibration = Calibration.from_batches([{"x": x}], dense, threads=1)
    models = {}
    for method in TIMED:
        for ratio in RATIOS:
            model = dense.copy()
            spec = pipeline_of(method, ratio, "").replace(
                "factor-rrr", "factor-svd"
            )  # the same shapes, sooner
            reports = Pipeline.parse(spec).run(model, PassContext(calibration=calibration, threads=1))
            if reports[-1].changed:
                models[f"{method} {ratio:g}"] = model
    found: dict[str, Any] = {}
    for rows in ROWS:
        batch = {"x": np.random.default_rng(2).standard_normal((1, rows, inputs)).astype(np.float32)}
        timed = verify.benchmark(
            [dense, *models.values()], batch, threads=1, max_seconds=seconds * len(models), library=False
        )
        ratios = [round(float(item), 3) for item in timed.ratio_to_first[1:]]
        found[str(rows)] = {
            "dense_ms": round(timed.models[0].median_ms, 4), **dict(zip(models, ratios, strict=True)),
        }  # fmt: skip
    return found


def fit_seconds(outputs: int, inputs: int) -> dict[str, float]:
    """Processor seconds to factorise one layer at 30 % fewer numbers, its inputs measured before."""
    rng = np.random.default_rng(3)
    dense = layer(outputs, inputs)
    x = rng.standard_normal((4, 1024, inputs)) * np.exp(rng.standard_normal(inputs))
    calibration = Calibration.from_batches(
        [{"x": part[None].astype(np.float32)} for part in x], dense, threads=1
    )
    known = _Measured(calibration)
    times = {}
    for method in ("RRR", *METHODS):  # the first run measures the inputs
        started = time.process_time()
        context = PassContext(calibration=known, threads=1)  # type: ignore[arg-type]
        Pipeline.parse(pipeline_of(method, 0.7, "")).run(dense.copy(), context)
        times[method] = round(time.process_time() - started, 2)
        click.echo(f"{outputs}x{inputs}: {method} {times[method]} s", err=True)
    return times


class _Measured:
    """A calibration whose moments are measured once, so that fits are timed without that."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._steps: list[Any] | None = None

    def walk(self, *args: Any) -> Any:
        self._steps = self._steps or list(self._calibration.walk(*args))
        return iter(self._steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calibration, name)


def spectrum(matrix: Any, points: int = 65) -> list[float]:
    """Share of the squares of a matrix that the best of each rank misses, at equal shares of the full rank."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    left = 1 - np.concatenate([[0.0], np.cumsum(squares) / squares.sum()])
    at = np.linspace(0, len(squares), points).round().astype(int)
    return [round(float(max(value, 0.0)), 6) for value in left[at]]


def spectra(task: Task) -> dict[str, Any]:
    """Spectra of the four kinds of layers of the middle block, plain and whitened."""
    model = ir.Model.load(task.path)
    calibration = Calibration.from_batches(task.calibration, model, threads=1)
    sites = {site.name: site for site in model.sites()}
    found = {}
    for kind, ending in DRAWN.items():
        site = next(
            site
            for name, site in sites.items()
            if "layer.3" in name and name.replace("/", ".").endswith(ending)
        )
        weight = site.numpy().astype(np.float64)
        gram = damped(calibration.gram(model, [site])[site.name], 1e-6)[0]
        root = np.linalg.cholesky(gram)
        found[kind] = {
            "site": site.name,
            "shape": list(site.shape),
            "plain": spectrum(weight),
            "whitened": spectrum(weight @ root),
        }
    return found


def _read(output: Path) -> dict[str, Any]:
    return dict(json.loads(output.read_text())["models"]) if output.exists() else {}


@click.group()
def main() -> None:
    """Measure what the file of results does not have yet."""


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file."),
        click.option(
            "--data",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
            help="Folder of models and labelled data (default: SPARSECC_TEST_DATA).",
        ),
    ):
        command = option(command)
    return command


def _save(output: Path, key: str, value: Any) -> None:
    """Add one result; the file is read again, so that runs side by side keep one another's."""
    results = _read(output)
    results[key] = value
    save(output, results, "python bench/factorisation.py", 1)


@main.command("models")
@_options
@click.option("--only", multiple=True, help="Measure only this model; may be repeated.")
@click.option("--method", "methods", multiple=True, help="Measure only this method; may be repeated.")
@click.option("--again", is_flag=True, help="Repeat runs that are in the file.")
def models_command(
    data: Path, output: Path, only: tuple[str, ...], methods: tuple[str, ...], again: bool
) -> None:
    """Accuracy of whole models."""
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks(data, Path(folder)).items():
            if only and name not in only:
                continue
            cells = [("dense", "", "")] + [
                (method, f"{ratio:g}", pipeline_of(method, ratio, name))
                for method in METHODS
                for ratio in RATIOS
            ]
            for method, ratio, pipeline in cells:
                wanted = method in methods or not methods
                known = _read(output).get(name, {}).get("variants", {}).get(method, {}).get(ratio, {})
                if not wanted or (known.get("pipeline") == pipeline and not again):
                    continue
                found = measured(task, pipeline)
                click.echo(f"{name}: {method} {ratio} {found}", err=True)
                held = _read(output).get(name, {"variants": {}})
                held |= {"metric": task.metric, "calibration_samples": task.calibration_samples}
                held["variants"].setdefault(method, {})[ratio] = found
                in_order = (key for key in ("dense", *METHODS) if key in held["variants"])
                held["variants"] = {key: held["variants"][key] for key in in_order}
                _save(output, name, held)


@main.command("layers")
@_options
@click.option("--seconds", default=1.0, show_default=True, help="Time spent on each form.")
def layers_command(data: Path, output: Path, seconds: float) -> None:
    """Time of layers of BERT-base, and of fitting one."""
    if "speed" not in _read(output):
        _save(output, "speed", {f"{n}x{k}": speed(n, k, seconds) for n, k in LAYERS})
    _save(output, "fit_seconds_768x3072", fit_seconds(768, 3072))


@main.command("whole")
@_options
@click.option("--tokens", default=128, show_default=True, help="Tokens of the one sentence.")
def whole_command(data: Path, output: Path, tokens: int) -> None:
    """Time and size of MiniLM with all its layers of low rank, by singular values, which have the shapes of RRR."""
    with tempfile.TemporaryDirectory() as folder:
        dense = ir.Model.load(tasks(data, Path(folder))["minilm_l6_v2"].path)
        models = {"1": dense}
        for ratio in RATIOS:
            models[f"{ratio:g}"] = dense.copy()
            spec = pipeline_of("SVD", ratio, "minilm_l6_v2")
            Pipeline.parse(spec).run(models[f"{ratio:g}"], PassContext(threads=1))
        ids = np.random.default_rng(0).integers(1000, 20000, (1, tokens))
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        timed = verify.benchmark(list(models.values()), batch, threads=1, max_seconds=60, library=False)
    found: dict[str, Any] = {"tokens": tokens, "dense_ms": round(timed.models[0].median_ms, 3)}
    for (ratio, model), speed_up in zip(models.items(), timed.ratio_to_first, strict=True):
        size = model.to_proto().ByteSize()
        found[ratio] = {"bytes": size, "speed": round(float(speed_up), 3)}
    _save(output, "minilm_l6_v2_speed", found)


@main.command("spectra")
@_options
def spectra_command(data: Path, output: Path) -> None:
    """Singular values of layers of MiniLM."""
    with tempfile.TemporaryDirectory() as folder:
        _save(output, "spectra", spectra(tasks(data, Path(folder))["minilm_l6_v2"]))


if __name__ == "__main__":
    main()
