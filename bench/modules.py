"""What modules that become smaller inside cost in accuracy and gain in time, beside low rank and plain removal.

    python bench/modules.py --data FOLDER [--model stories260K] [--ratio 0.7]

The same models, calibration and held-out samples as ``bench/factorisation.py``, whatever gains no time kept too. Shares
are of the weights of attention and MLP, times those of the whole model on plain onnxruntime, in turns in one process.
What is in the file already is not measured again.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from accuracy import save
from accuracy_tasks import ROOT, Task
from factorisation import RATIOS, tasks

from sparsecc import ir, verify
from sparsecc.calib import Calibration
from sparsecc.ir import name_matches
from sparsecc.pm import PassContext, Pipeline

OUTPUT = ROOT / "bench" / "results" / "modules.json"

#: Pipelines by the name that the page uses, and the layers they are about.
METHODS = {
    "MoDeGPT, sizes by errors": "factor-modegpt{param-ratio=RATIO SMALL}",
    "MoDeGPT, equal shares": "factor-modegpt{param-ratio=RATIO allocation=uniform SMALL}",
    "MoDeGPT, block influence": "factor-modegpt{param-ratio=RATIO allocation=influence SMALL}",
    "neurons and heads": "prune-structured{flops-ratio=RATIO SMALL}",
    "RRR": "factor-rrr{param-ratio=RATIO match=LAYERS keep-slower=true SMALL}",
}
LAYERS = {"minilm_l6_v2": "encoder*", "stories260K": "layers*"}

#: Tokens of one sentence that models are timed on.
LENGTHS = (16, 128)


def weights(model: ir.Model, match: str) -> int:
    """Numbers of the linear layers of attention and MLP, factors included."""
    return sum(site.shape[0] * site.shape[1] for site in model.sites() if name_matches(match, site.name))


def batch(model: ir.Model, length: int) -> dict[str, np.ndarray]:
    """One sentence without padding."""
    return {spec.name: np.ones((1, length), np.int64) for spec in model.input_specs()}


def measured(task: Task, name: str, method: str, ratio: float) -> dict[str, Any]:
    """Reduce, measure, time; ``cpu_seconds`` is processor time with calibration."""
    small = "multiple=2" + (" min-elements=1024" if "rrr" in METHODS.get(method, "") else "")
    spec = METHODS.get(method, "").replace("RATIO", f"{ratio:g}").replace("LAYERS", LAYERS[name])
    spec = spec.replace(" SMALL", f" {small}" if name == "stories260K" else "")
    model = ir.Model.load(task.path)
    Pipeline.parse("tidy").run(model, PassContext())
    dense, row = model.copy(), dict[str, Any](pipeline=spec)
    if spec:
        started = time.process_time()
        calibration = Calibration.from_batches(task.calibration, model, threads=1)
        Pipeline.parse(spec).run(model, PassContext(calibration=calibration, threads=1))
        row["cpu_seconds"] = round(time.process_time() - started, 1)
        row["weights"] = round(weights(model, LAYERS[name]) / weights(dense, LAYERS[name]), 4)
        row["speed"] = {
            str(length): round(
                verify.benchmark(
                    [dense, model], batch(dense, length), threads=1, library=False, max_seconds=8
                ).ratio_to_first[1],
                3,
            )
            for length in LENGTHS
        }
    session = verify.session(model, threads=1)
    value, count = task.measure(lambda feed: list(session.run(feed).values()))
    return {**row, "value": round(value, 5), "samples": count}


@click.command()
@click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--model", "only", multiple=True, help="Only this model.")
@click.option("--ratio", "ratios", type=float, multiple=True, default=RATIOS, help="Shares of the weights.")
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="Only this method.")
def main(data: Path, only: tuple[str, ...], ratios: tuple[float, ...], methods: tuple[str, ...]) -> None:
    results = json.loads(OUTPUT.read_text())["models"] if OUTPUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, task in tasks(data, Path(folder)).items():
            if only and name not in only:
                continue
            rows = results.setdefault(name, {})
            for key, method, ratio in [
                ("dense", "", 1.0),
                *((f"{m} {r:g}", m, r) for m in methods for r in ratios),
            ]:
                if key not in rows:
                    rows[key] = measured(task, name, method, ratio)
                    click.echo(f"{name:14} {key:34} {rows[key]}")
                    save(OUTPUT, results, "python bench/modules.py --data FOLDER", threads=1)


if __name__ == "__main__":
    main()
