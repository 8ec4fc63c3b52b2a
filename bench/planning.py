"""What planning takes: seconds, CPU seconds and memory of ``sparsecc plan``, from cold and again from its cache.

    python bench/planning.py bert_base:12 minilm_l6:6 --json bench/results/planning.json
    python bench/planning.py model.onnx=inputs.npz

Architectures of ``models/zoo.py`` are built with so many layers; their weights are random, with a falling spectrum and
columns of unequal size as trained ones have, and so are the tokens they are calibrated on: 64 sequences of 128. Each
run is a process of its own, whose BLAS has all cores; memory is the most that it has had (``ru_maxrss``, where pages of
mapped files count), beside that of a process that only imports what planning needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "bench")]

from scale import Streamed  # noqa: E402
from zoo import ZOO, build  # noqa: E402

#: Sequences, and tokens of each.
_SEQUENCES, _TOKENS = 64, 128
#: Singular values fall by this factor over a matrix, columns vary by this standard deviation of their logarithm.
_FALL, _UNEVEN = 20.0, 0.5
#: Runs this file again, as the verb with a clock.
_CLOCK = "--clock"


class Trained(Streamed):
    """Draws weights that look like trained ones: with white ones nothing could be saved."""

    def weight(self, shape: Any, *, prunable: bool, gain: float = 1.0) -> NDArray[np.float32]:
        """Draw a matrix ``[outputs, inputs]``."""
        rows, columns = shape
        rank = min(shape)
        values = _FALL ** -(np.arange(rank, dtype=np.float32) / rank)
        left = self.rng.standard_normal((rows, rank), dtype=np.float32) * values
        found = left @ self.rng.standard_normal((rank, columns), dtype=np.float32)
        found *= np.exp(_UNEVEN * self.rng.standard_normal(columns, dtype=np.float32))
        return np.asarray(found * (gain / np.sqrt(columns) / found.std()), np.float32)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Mix the columns of tables of embeddings."""
        if name.startswith("embeddings.") and value.ndim == 2 and value.dtype == np.float32:
            value = value @ self.weight((value.shape[1], value.shape[1]), prunable=False)
        return super().constant(name, value)


def write_encoder(path: Path, name: str, layers: int, vocabulary: int) -> Path:
    """Write an encoder beside its inputs and return the path of these."""
    graph = Trained(path.with_name(f"{path.name}.data"))
    onnx.save(build(name, seq=_TOKENS, layers=layers, vocabulary=vocabulary, graph=graph), path)
    rng = np.random.default_rng(1)
    tokens = (vocabulary * rng.random((_SEQUENCES, _TOKENS)) ** 3).astype(np.int64)  # some are frequent
    inputs = path.with_suffix(".npz")
    np.savez(
        inputs, input_ids=tokens, attention_mask=np.ones_like(tokens), token_type_ids=np.zeros_like(tokens)
    )
    return inputs


def run_clocked(arguments: list[str]) -> None:
    """The verb ``plan``; at the end CPU seconds of its stages as the last line."""
    import sparsecc.cli.plan as verb

    marks: dict[str, float] = {}

    @contextlib.contextmanager
    def clock() -> Iterator[Any]:
        def told(stage: str, done: int, total: int) -> None:
            name = {"timing forms": "timing", "replacing parts": "sensitivities"}.get(stage)
            if stage == "timing forms" and done == total:
                name = "errors"
            if name is not None:
                marks.setdefault(name, time.process_time())

        yield told

    verb.progress_bar = clock
    verb.command.main(arguments, standalone_mode=False)
    ends = [*list(marks.values())[1:], time.process_time()]
    stages = {name: round(end - start, 1) for (name, start), end in zip(marks.items(), ends, strict=True)}
    print(json.dumps({"cpu_seconds": stages}))


def measured(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run Python with these arguments; seconds, CPU seconds, memory, and the last line of its output as JSON."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            raise click.ClickException(f"{' '.join(arguments)} ended with {process.returncode}")
        output.seek(0)
        lines = output.read().splitlines()
    found = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
    }
    if lines and lines[-1].startswith("{"):
        found["stages"] = json.loads(lines[-1])["cpu_seconds"]
    return found


def plan_twice(model: Path, inputs: Path, threads: int) -> dict[str, Any]:
    """Plan from cold and from the cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "SPARSECC_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        verb = [
            str(Path(__file__)),
            _CLOCK,
            str(model),
            "--max-drop",
            "1%",
            "--calibration-data",
            str(inputs),
        ]
        verb += ["--threads", str(threads)]
        imports = measured(
            ["-c", "import onnxruntime, sparsecc, sparsecc.plan, sparsecc.planning"], environment
        )
        return {
            "imports_mb": imports["peak_mb"],
            "cold": measured(verb, environment),
            "cached": measured(verb, environment),
        }


def sizes(model: Path) -> dict[str, float]:
    """Megabytes of a model, and of the largest Gram matrix of its sites."""
    from sparsecc.ir import Model

    loaded = Model.load(model)
    widest = max(site.shape[1] for site in loaded.sites())
    return {"model_mb": round(loaded.nbytes / 1e6), "gram_mb": round(8 * widest**2 / 1e6, 1)}


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True)
@click.option("--vocabulary", default=30522, show_default=True, help="Rows of the table of embeddings.")
@click.option("--threads", default=1, show_default=True, help="Threads that forms are timed with.")
@click.option("--json", "report", type=click.Path(dir_okay=False, path_type=Path))
def main(models: tuple[str, ...], vocabulary: int, threads: int, report: Path | None) -> None:
    """Plan for each model."""
    rows: dict[str, Any] = {}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            if "=" in name:
                model, inputs = (Path(part) for part in name.split("=", 1))
                label = model.stem
            else:
                kind, _, layers = name.partition(":")
                if kind not in ZOO:
                    raise click.UsageError(f"{name}: give NAME:LAYERS or MODEL.onnx=INPUTS.npz")
                label, model = f"{kind}, {layers} layers", Path(folder) / "model.onnx"
                inputs = write_encoder(model, kind, int(layers), vocabulary)
            rows[label] = {
                **sizes(model),
                "load": round(os.getloadavg()[0], 1),
                **plan_twice(model, inputs, threads),
            }
        click.echo(f"{label}: {json.dumps(rows[label])}")
        if report is not None:
            known = json.loads(report.read_text())["models"] if report.exists() else {}
            document = {"machine": platform.machine(), "cores": os.cpu_count(), "models": {**known, **rows}}
            report.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [_CLOCK]:
        run_clocked(sys.argv[2:])
    else:
        main()
