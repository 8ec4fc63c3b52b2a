"""The planner against single methods at one ratio everywhere, and against onnxruntime's own int8, on real models.

    python bench/planner.py sweep --data FOLDER     the fastest ratio of every single method that keeps the metric
    python bench/planner.py plan --data FOLDER      what the planner makes, alone and within the best one's bytes
    python bench/planner.py compare --data FOLDER   dense, best single method, onnxruntime's int8 and planner in turns
    python bench/planner.py table                   what docs/planner.md shows

Samples are cut in three: some calibrate, without labels; of the rest every second one selects, for single methods and
planner alike, and the others are only reported on. Allowed is a drop of a point (0.01) of accuracy and correlation,
of 1 % of perplexity and bits per character. Speeds are ratios of medians of interleaved runs of one process, one
thread. What the file of results has already is not measured again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import click
import onnx
import onnx.version_converter
from accuracy import onnxruntime_quantized, save
from accuracy_tasks import ROOT, TASKS, Task, task
from planner_methods import METHODS, ORT, Found, Method, fastest_ratio, methods_for
from real_models import INPUT_SHAPES

import sparsecc
from sparsecc import ir, verify
from sparsecc.errors import SparseccError
from sparsecc.plan import Asked

OUTPUT = ROOT / "bench" / "results" / "planner.json"
WORK = ROOT / "build" / "planner"

#: Pairs of sentences that calibrate MiniLM.
_PAIRS = 128
#: Samples that are selected by, and those that are reported on, of those that do not calibrate.
_HALVES = {"selection": slice(0, None, 2), "report": slice(1, None, 2)}

#: What models of before opset 13 are converted to.
_OPSET, _IR_VERSION = 13, 8

#: What `optimize` runs to judge a model, and to calibrate it: files, as those of a user.
_EVALUATION = '''"""Made by bench/planner.py."""
import sys
from pathlib import Path

sys.path.insert(0, {bench!r})
from accuracy_tasks import task

own = task({name!r}, Path({data!r}), Path({folder!r}), {pairs}, slice(*{part!r}))


def evaluate(run):
    return own.measure(lambda feed: list(run(feed).values()))[0]


def load_data():
    return iter(own.calibration)


evaluate.lower_is_better = {lower!r}
'''


def modern(path: Path, folder: Path) -> Path:
    """The model as it is, or in a newer version of ONNX: neither tool quantises what is older than opset 11."""
    model = onnx.load(path, load_external_data=False)
    if max(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")) >= _OPSET:
        return path
    model = onnx.version_converter.convert_version(onnx.load(path), _OPSET)
    model.ir_version = _IR_VERSION
    constants = {item.name for item in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    onnx.save(model, folder / path.name)
    return folder / path.name


@dataclass(frozen=True)
class Subject:
    """A model that all is tried on.

    Attributes:
        name: of it.
        tasks: the model, its calibration data and its metric on each half of the other samples.
        folder: for files.
        evaluation: file whose functions judge on the half that selects, and calibrate.
        seed: of everything random.
    """

    name: str
    tasks: dict[str, Task]
    folder: Path
    evaluation: Path
    seed: int = 0

    @classmethod
    def open(cls, name: str, data: Path, work: Path) -> Subject:
        """One of ``TASKS``; ``work`` takes files."""
        folder = work / name
        tasks = {}
        for half, part in _HALVES.items():
            (folder / half).mkdir(parents=True, exist_ok=True)
            own = task(name, data, folder / half, _PAIRS, part)
            tasks[half] = replace(own, path=modern(own.path, folder / half))
        part = _HALVES["selection"]
        evaluation = folder / "evaluation.py"
        evaluation.write_text(
            _EVALUATION.format(
                bench=str(ROOT / "bench"), name=name, data=str(data), folder=str(folder / "selection"),
                pairs=_PAIRS, part=(part.start, part.stop, part.step),
                lower=not tasks["selection"].higher_is_better,
            ),
            encoding="utf-8",
        )  # fmt: skip
        return cls(name, tasks, folder, evaluation)

    @property
    def path(self) -> Path:
        """The model."""
        return self.tasks["selection"].path

    @property
    def drop(self) -> str:
        """What the metric may lose, as text."""
        return "0.01" if self.tasks["selection"].higher_is_better else "1%"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Shapes that it is timed on; None: one sample."""
        return INPUT_SHAPES.get(self.name)

    def score(self, model: ir.Model | Path, half: str) -> tuple[float, int]:
        """Its metric on one half of the samples, and how many these are."""
        run = verify.session(model, threads=1)
        return self.tasks[half].measure(lambda feed: list(run.run(feed).values()))

    def drop_from(self, dense: float, score: float) -> float:
        """How much worse ``score`` is."""
        return dense - score if self.tasks["selection"].higher_is_better else score - dense

    def allowed(self, dense: float) -> float:
        """The drop in the unit of the metric."""
        return float(self.drop) if not self.drop.endswith("%") else float(self.drop[:-1]) / 100 * abs(dense)

    def inputs(self) -> dict[str, Any]:
        """What models are timed on: one sample, or inputs of the shapes given."""
        if self.shapes is not None:
            return dict(verify.make_inputs(ir.Model.load(self.path), None, self.seed, self.shapes))
        return {name: array[:1] for name, array in self.tasks["selection"].calibration[0].items()}

    def optimize(self, output: Path, **options: Any) -> sparsecc.OptimizeResult:
        """What `optimize` makes of it with these options."""
        return sparsecc.optimize(
            self.path, output, threads=1, seed=self.seed, calibration_data=f"{self.evaluation}:load_data",
            input_shapes=self.shapes, **options,
        )  # fmt: skip


class Results:
    """What is known of one model, kept after every step."""

    def __init__(self, output: Path, subject: Subject) -> None:
        self._output = output
        self._name = subject.name
        known = self._read().get(subject.name)
        if known is None:
            known = {"metric": subject.tasks["selection"].metric, "rows": {}, "said": {}, "dense": {}}
            for half in _HALVES:
                value, count = subject.score(subject.path, half)
                known["dense"][half] = value
                known[f"samples_{half}"] = count
            known["calibration_samples"] = subject.tasks["selection"].calibration_samples
            known["dense"]["bytes"] = sparsecc.ir.files.file_bytes(subject.path)
        self.known: dict[str, Any] = known

    def _read(self) -> dict[str, Any]:
        return dict(json.loads(self._output.read_text())["models"]) if self._output.exists() else {}

    def save(self) -> None:
        """Write it beside what the file has of other models."""
        save(self._output, self._read() | {self._name: self.known}, "python bench/planner.py", 1)


class Sweep:
    """Single methods on one model."""

    def __init__(self, subject: Subject, results: Results) -> None:
        self._subject = subject
        self._results = results
        self.known = results.known
        self.allowed = subject.allowed(self.known["dense"]["selection"])

    def best(self) -> float:
        """Speed of the fastest row that keeps the metric; 1 of the model as it is."""
        return max((row["speed"] for row in self.known["rows"].values() if self._holds(row)), default=1.0)

    def run(self, method: Method) -> None:
        """Find the strongest ratio of ``method`` that holds, unless it is known."""
        if method.name in self.known["said"]:
            return
        _, said = fastest_ratio(method, self.best(), self.allowed, self._timed, self._fitted)
        self.known["said"][method.name] = said
        self._results.save()
        click.echo(f"{self._subject.name}: {method.name}: {said}", err=True)

    def onnxruntime(self, name: str) -> None:
        """Quantise with onnxruntime's own tool, time it beside the dense model and judge it."""
        if name in self.known["rows"]:
            return
        row: dict[str, Any]
        try:
            with _quietly():
                model = onnxruntime_quantized(
                    self._subject.tasks["selection"], name.split()[2], unsigned=name.endswith("u8")
                )
            path = self._subject.folder / f"{name}.onnx"
            model.save(path)
            timed = verify.benchmark([self._subject.path, path], self._subject.inputs(), threads=1)
            row = {"speed": timed.ratio_to_first[1], "bytes": path.stat().st_size} | self._judged(path)
        except Exception as error:  # of a tool that is not ours
            row = {"refused": " ".join(str(error).split())[:200]}
        self.known["rows"][name] = row
        self._results.save()
        click.echo(f"{self._subject.name}: {name}: {row}", err=True)

    def _holds(self, row: dict[str, Any]) -> bool:
        return row.get("drop") is not None and row["drop"] <= self.allowed

    def _judged(self, model: Path) -> dict[str, Any]:
        value, _ = self._subject.score(model, "selection")
        return {"value": value, "drop": self._subject.drop_from(self.known["dense"]["selection"], value)}

    def _timed(self, method: Method, level: float | None) -> Found | None:
        options = dict(method.timed(level))
        key = "timed " + " ".join(f"{name}={value}" for name, value in options.items())
        return self._row(key, options, judge=False)

    def _fitted(self, method: Method, level: float | None) -> Found | None:
        return self._row(method.label(level), dict(method.fitted(level)), judge=True)

    def _row(self, key: str, options: dict[str, Any], *, judge: bool) -> Found | None:
        rows = self.known["rows"]
        if key not in rows:
            path = self._subject.folder / f"{key.replace('/', '_')}.onnx"
            try:
                result = self._subject.optimize(path, **options)
                rows[key] = {
                    "speed": result.latency.speedup, "bytes": result.bytes_after, "seed": self._subject.seed,
                }  # fmt: skip
                if judge:
                    rows[key] |= self._judged(path)
            except SparseccError as error:
                rows[key] = {"refused": str(error)[:200]}
            if not judge:
                _remove(path)
            self._results.save()
        row = rows[key]
        return None if "refused" in row else Found(row["speed"], row.get("drop"))


def _remove(path: Path) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What the other tool prints is not shown."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def planned(subject: Subject, results: Results, name: str, **budget: str) -> None:
    """What the planner makes within the drop and ``budget``."""
    known = results.known
    path = subject.folder / f"{name}.onnx"
    asked = Asked(max_drop=subject.drop, metric=f"{subject.evaluation}:evaluate", **budget)
    try:
        result = subject.optimize(path, asked=asked)
    except SparseccError as error:
        known[name] = {"refused": str(error)[:300]}
    else:
        assert result.planned is not None, "a budget was asked for"
        value, _ = subject.score(path, "selection")
        known[name] = {
            "speed": result.latency.speedup, "bytes": result.bytes_after, "value": value,
            "drop": subject.drop_from(known["dense"]["selection"], value), "seed": subject.seed,
            "attempts": [
                {"ms": attempt.ms, "drop": attempt.drop, "bytes": attempt.bytes}
                for attempt in result.planned.verdict.attempts
            ],
        }  # fmt: skip
    results.save()
    click.echo(f"{subject.name}: {name}: {known[name]}", err=True)


def best_single(known: dict[str, Any], allowed: float, among: tuple[str, ...] = ()) -> str | None:
    """Name of the fastest row that keeps the metric; None where none is faster than the model as it is."""
    held = {
        name: row for name, row in known["rows"].items()
        if row.get("drop") is not None and row["drop"] <= allowed and row["speed"] > 1
        and (not among or name in among)
    }  # fmt: skip
    return max(held, key=lambda name: held[name]["speed"], default=None)


def compared(subject: Subject, results: Results, seconds: float) -> None:
    """Time what was found in turns, and judge it on the samples that nothing was chosen by."""
    known = results.known
    allowed = subject.allowed(known["dense"]["selection"])
    names = {"single": best_single(known, allowed), "onnxruntime": best_single(known, allowed, ORT)}
    names |= {key: key for key in ("planner", "planner within bytes") if "speed" in known.get(key, {})}
    files = {key: subject.folder / f"{name}.onnx" for key, name in names.items() if name is not None}
    timed = verify.benchmark(
        [subject.path, *files.values()], subject.inputs(), threads=1, rounds=101,
        max_seconds=seconds * (1 + len(files)),
    )  # fmt: skip
    found: dict[str, Any] = {"dense_ms": timed.models[0].median_ms}
    for key, speed, file in zip(files, timed.ratio_to_first[1:], files.values(), strict=True):
        value, _ = subject.score(file, "report")
        row = known["rows"].get(names[key]) or known[key]
        found[key] = {
            "name": names[key], "speed": speed, "bytes": row["bytes"], "selection_drop": row["drop"],
            "report": value, "report_drop": subject.drop_from(known["dense"]["report"], value),
        }  # fmt: skip
    known["compared"] = found
    results.save()
    click.echo(f"{subject.name}: {json.dumps(found)}", err=True)


@click.group()
def main() -> None:
    """Measure what the file of results does not have yet."""


def _options(command: Any) -> Any:
    for option in (
        click.option("--data", type=click.Path(path_type=Path, exists=True, file_okay=False),
                     default=lambda: os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"),
                     help="Folder of models and data (default: SPARSECC_TEST_DATA)."),
        click.option("--models", multiple=True, type=click.Choice(TASKS), help="Only these models."),
        click.option("--work", type=click.Path(path_type=Path), default=WORK, help="Folder for models."),
        click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file."),
    ):  # fmt: skip
        command = option(command)
    return command


def _subjects(
    data: Path, models: tuple[str, ...], work: Path, output: Path
) -> Iterator[tuple[Subject, Results]]:
    for name in models or TASKS:
        subject = Subject.open(name, Path(data).resolve(), work.resolve())
        yield subject, Results(output, subject)


@main.command("sweep")
@_options
@click.option("--methods", multiple=True, type=click.Choice([*ORT, *METHODS]), help="Only these methods.")
def sweep_command(
    data: Path, models: tuple[str, ...], work: Path, output: Path, methods: tuple[str, ...]
) -> None:
    """Find the fastest ratio of every single method that keeps the metric.

    A method whose strongest ratio is slower than the best that is known is not fitted.
    """
    for subject, results in _subjects(data, models, work, output):
        sweep = Sweep(subject, results)
        for name in ORT:
            if not methods or name in methods:
                sweep.onnxruntime(name)
        for method in methods_for({site.op for site in ir.Model.load(subject.path).sites()}):
            if not methods or method.name in methods:
                sweep.run(method)


@main.command("plan")
@_options
@click.option("--again", is_flag=True, help="Also where the file has a result.")
def plan_command(data: Path, models: tuple[str, ...], work: Path, output: Path, again: bool) -> None:
    """Let the planner make the fastest model that keeps the metric; once more within the bytes of the best method."""
    for subject, results in _subjects(data, models, work, output):
        known = results.known
        if again or "planner" not in known:
            planned(subject, results, "planner")
        single = best_single(known, subject.allowed(known["dense"]["selection"]))
        most = None if single is None else known["rows"][single]["bytes"]
        if most is not None and known["planner"].get("bytes", 0) > most:
            if again or "planner within bytes" not in known:
                planned(subject, results, "planner within bytes", budget_size=f"{most}B")
        else:
            known.pop("planner within bytes", None)
            results.save()


@main.command("compare")
@_options
@click.option("--seconds", default=2.0, show_default=True, help="Time spent on each model.")
def compare_command(data: Path, models: tuple[str, ...], work: Path, output: Path, seconds: float) -> None:
    """Time what was found in turns, and judge it on the samples that nothing was chosen by."""
    for subject, results in _subjects(data, models, work, output):
        compared(subject, results, seconds)


@main.command("table")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="JSON file.")
def table_command(output: Path) -> None:
    """Print what was compared as a table."""
    click.echo("| model | dense | best single method | onnxruntime int8 | planner | file | metric lost |")
    click.echo("|---" * 7 + "|")
    gains: dict[str, list[float]] = {"single": [], "onnxruntime": []}
    for name, known in json.loads(output.read_text())["models"].items():
        found = known.get("compared", {})
        if "planner" not in found:
            continue
        planner = found["planner"]
        for key, values in gains.items():
            values.append(planner["speed"] / max(1.0, found.get(key, {}).get("speed", 1.0)))
        single, other = (
            f"{found[key]['name']} {found[key]['speed']:.2f}x" if key in found else "none" for key in gains
        )
        click.echo(
            f"| {name} | {found['dense_ms']:.3g} ms | {single} | {other} | {planner['speed']:.2f}x | "
            f"{planner['bytes'] / known['dense']['bytes']:.0%} | {planner['selection_drop']:.4f}, "
            f"{planner['report_drop']:.4f} |"
        )
    for key, values in gains.items():
        if values:
            click.echo(f"{geometric_mean(values):.2f}x the speed of {key} ({len(values)} models)")


if __name__ == "__main__":
    main()
