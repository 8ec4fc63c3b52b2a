"""Pruning a decoder of more than a billion weights within a few gigabytes of memory, in steps that go on after a stop.

    python bench/scale.py FOLDER --json bench/results/scale.json

Writes a LLaMA-like decoder (the shape of TinyLlama-1.1B, random weights, one layer at a time) into FOLDER, prunes it in
processes of their own and watches their memory: ``VmHWM`` and ``ru_maxrss`` count every page that is in memory, those
of mapped files too, ``RssAnon`` only what no file backs. One run is killed midway and started again. FOLDER takes four
times the size of the model and is emptied of what was written; TMPDIR must be on a disk, too.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "models"))

from graph_builder import GraphBuilder  # noqa: E402
from zoo import build  # noqa: E402

#: Weights of at least so many bytes go to the data file.
_LARGE = 1 << 16
#: Calibration samples.
_SAMPLES = 8


class Streamed(GraphBuilder):
    """Writes large constants to a file at once instead of holding them."""

    def __init__(self, data: Path) -> None:
        super().__init__()
        self.data = data
        self.elements = 0
        data.write_bytes(b"")

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add an initializer (once per name) and return its name."""
        if value.nbytes < _LARGE or name in self.constants:
            return super().constant(name, value)
        with self.data.open("ab") as file:
            file.write(b"\0" * (-file.tell() % 4096))
            offset = file.tell()
            np.ascontiguousarray(value).tofile(file)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=value.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", self.data.name), ("offset", offset), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        self.constants[name] = tensor
        self.elements += value.size
        return name

    def check(self, model: onnx.ModelProto) -> None:
        """Leave it to the loader, which finds the data file."""


def write_decoder(path: Path, layers: int, vocabulary: int, seq: int) -> int:
    """Write the decoder and return the number of its weights."""
    graph = Streamed(path.with_name(f"{path.name}.data"))
    onnx.save(build("llama_block", seq=seq, layers=layers, vocabulary=vocabulary, graph=graph), path)
    return graph.elements


def prune(source: Path, pipeline: str, target: Path, threads: int) -> None:
    """What a child process does; the time of each part goes to stdout as JSON."""
    from sparsecc import api, ir
    from sparsecc.calib import Calibration
    from sparsecc.pm import PassContext, Pipeline

    started = time.perf_counter()
    model = ir.Model.load(source)
    (spec,) = model.input_specs()
    sites = {site.name: site for site in model.sites()}
    rng = np.random.default_rng(0)
    vocabulary = sites["/lm_head/MatMul"].shape[0]
    batches = [{spec.name: rng.integers(0, vocabulary, spec.shape)} for _ in range(_SAMPLES)]
    calibration = Calibration.from_batches(batches, model, threads=threads)
    loaded = time.perf_counter()
    (report,) = Pipeline.parse(pipeline).run(model, PassContext(calibration=calibration, threads=threads))
    pruned = time.perf_counter()
    api.save(model, target)
    densities = [change.numbers["density_after"] for change in report.changed]
    json.dump(
        {
            "load_seconds": round(loaded - started, 1),
            "prune_seconds": round(pruned - loaded, 1),
            "save_seconds": round(time.perf_counter() - pruned, 1),
            "sites_pruned": len(report.changed),
            "sites_left": len(report.skipped),
            "mean_density": round(float(np.mean(densities)), 4),
        },
        sys.stdout,
    )


def compare(source: Path, other: Path) -> None:
    """What a child process does to tell how far two models are apart."""
    from sparsecc import ir, verify

    model = ir.Model.load(source)
    (spec,) = model.input_specs()
    rng = np.random.default_rng(1)
    found = verify.compare(model, ir.Model.load(other), {spec.name: rng.integers(0, 1000, spec.shape)})
    json.dump({"relative_l2": round(verify.worst_rel_l2(found), 4)}, sys.stdout)


def watched(
    *arguments: str, threads: int, stop: Iterator[bool] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run this file with ``arguments`` and return what it printed and what it took.

    Args:
        arguments: of the child.
        threads: of the algebra in the child.
        stop: asked ten times a second; True kills the child, which then prints nothing.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    started, killed, anonymous, mapped = time.perf_counter(), False, 0, 0
    child = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    status, peak = Path(f"/proc/{child.pid}/status"), 0
    while (waited := os.wait4(child.pid, os.WNOHANG))[0] == 0:
        text = status.read_text()
        peak = max(peak, _kilobytes("VmHWM", text))
        anonymous = max(anonymous, _kilobytes("RssAnon", text))
        mapped = max(mapped, _kilobytes("RssFile", text))
        if stop is not None and not killed and next(stop):
            child.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.1)
    assert child.stdout is not None
    output = child.stdout.read()
    if not killed and os.waitstatus_to_exitcode(waited[1]):
        raise click.ClickException(f"{' '.join(arguments)} failed")
    return json.loads(output) if output else {}, {
        "wall_seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(waited[2].ru_utime + waited[2].ru_stime, 1),
        "ru_maxrss_gb": round(waited[2].ru_maxrss / 1e6, 3),
        "VmHWM_gb": round(peak / 1e6, 3),
        "RssAnon_peak_gb": round(anonymous / 1e6, 3),
        "RssFile_peak_gb": round(mapped / 1e6, 3),
    }


def _kilobytes(key: str, status: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


def _solved(folder: Path, count: int) -> Iterator[bool]:
    """Whether ``count`` sites are solved, each time it is asked."""
    while True:
        yield folder.exists() and len(list(folder.glob("*.npz"))) >= count


@click.group()
def main() -> None:
    """Measure, or be one of the measured processes."""


@main.command("prune")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("pipeline")
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("threads", type=int)
def _prune(source: Path, pipeline: str, target: Path, threads: int) -> None:
    prune(source, pipeline, target, threads)


@main.command("compare")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
def _compare(source: Path, other: Path) -> None:
    compare(source, other)


@main.command("measure")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=22, show_default=True, help="Layers of 44 million weights.")
@click.option("--vocabulary", default=32000, show_default=True, help="Tokens, each twice 2048 weights.")
@click.option("--seq", default=256, show_default=True, help="Tokens of each of the 8 samples.")
@click.option("--threads", default=2, show_default=True, help="Threads.")
@click.option("--method", multiple=True, default=("wanda", "sparsegpt"), help="What to prune with.")
@click.option(
    "--match", default="*", show_default=True, help="Glob of the sites that methods other than wanda prune."
)
@click.option("--kill-after", default=60, show_default=True, help="Sites after which such a run is killed.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="File to write.")
def _measure(
    folder: Path,
    layers: int,
    vocabulary: int,
    seq: int,
    threads: int,
    method: tuple[str, ...],
    match: str,
    kill_after: int,
    output: Path | None,
) -> None:
    """Build, prune, kill, resume, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target, solved = folder / "decoder.onnx", folder / "pruned.onnx", folder / "solved"
    weights = write_decoder(source, layers, vocabulary, seq)
    result: dict[str, Any] = {
        "command": "python bench/scale.py measure FOLDER",
        "machine": platform.processor() or platform.machine(),
        "threads": threads,
        "weights": weights,
        "model_gb": round(source.with_name("decoder.onnx.data").stat().st_size / 1e9, 3),
        "calibration": f"{_SAMPLES} samples of {seq} tokens",
        "runs": {},
    }

    def record(name: str, found: tuple[dict[str, Any], dict[str, Any]]) -> None:
        result["runs"][name] = {**found[0], **found[1]}
        click.echo(f"{name}: {json.dumps(result['runs'][name])}", err=True)
        if output is not None:
            output.write_text(json.dumps(result, indent=1) + "\n")

    def pruned(pipeline: str, stop: Iterator[bool] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        return watched("prune", str(source), pipeline, str(target), str(threads), threads=threads, stop=stop)

    try:
        for name in method:
            options = f"match={match} resume={solved}{' refit=false' if name == 'sparsegpt' else ''}"
            pipeline = "prune-wanda" if name == "wanda" else f"prune-{name}{{{options}}}"
            if name != "wanda":
                record(f"{name}, killed", pruned(pipeline, _solved(solved, kill_after)))
                result["runs"][f"{name}, killed"]["sites_solved"] = len(list(solved.glob("*.npz")))
            record(name if name == "wanda" else f"{name}, resumed", pruned(pipeline))
            record(f"{name}, compared", watched("compare", str(source), str(target), threads=threads))
            shutil.rmtree(solved, ignore_errors=True)
    finally:
        for path in (source, target):
            for part in (path, path.with_name(f"{path.name}.data")):
                part.unlink(missing_ok=True)
        shutil.rmtree(solved, ignore_errors=True)


if __name__ == "__main__":
    main()
