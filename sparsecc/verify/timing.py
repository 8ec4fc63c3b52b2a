"""Interleaved timing of models: what a busy or drifting machine does to one, it does to all."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from sparsecc.calib import Arrays, ModelLike, Session, run_error
from sparsecc.errors import UsageError
from sparsecc.runtime.tvm_module import TvmModule, is_tvm_module
from sparsecc.verify.session import session

__all__ = ["Benchmark", "Spread", "Timing", "benchmark", "time_interleaved"]

#: A call longer than this many seconds outlasts its cold start; a shorter one gets an untimed call per slice.
_COLD_LIMIT = 0.05


#: Shortest sample in seconds: reading a clock takes a microsecond on some virtual machines.
_SAMPLE_SECONDS = 0.00025

Clock: TypeAlias = Literal["wall", "cpu", "process"]

_CLOCKS: dict[Clock, Callable[[], float]] = {
    "wall": time.perf_counter,
    "cpu": time.thread_time,
    "process": time.process_time,
}


@dataclass(frozen=True)
class Spread:
    """Times of one run over the rounds of a benchmark, in ms: least, quartiles, largest."""

    min: float
    q1: float
    median: float
    q3: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """The spread of times in seconds, at least one; quartiles between two of them are interpolated."""
        column = sorted(seconds)
        q1, _, q3 = statistics.quantiles(column * 2 if len(column) == 1 else column, method="inclusive")
        five = (column[0], q1, statistics.median(column), q3, column[-1])
        return cls(*(1e3 * value for value in five))


@dataclass(frozen=True)
class Timing:
    """Times of one model.

    Attributes:
        path: where the model was read from, or ``None`` for a model in memory.
        median_ms: median over the rounds of the time of one run in a slice.
        min_ms: smallest of those times.
        iterations: timed runs in all.
        spread: least, quartiles and largest of those times.
    """

    path: str | None
    median_ms: float
    min_ms: float
    iterations: int
    spread: Spread


@dataclass(frozen=True)
class Benchmark:
    """Result of an interleaved benchmark.

    Attributes:
        models: times, in the order the models were given.
        ratio_to_first: speed-up over the first model: the median over the rounds of
            (time of the first in the round) / (time of this one in the round). 2.0 means twice as fast as the
            first, 0.5 half as fast; the first entry is 1. The ratio is taken inside each round, so it is
            steadier than the ratio of the medians and need not equal it.
        threads: threads of every session; 0 is onnxruntime's choice.
        rounds: rounds run.
        clock: ``cpu`` (one thread: CPU time of the thread that runs the model, which is the wall time of an
            idle machine but does not grow when other programs take the core) or ``wall``.
    """

    models: tuple[Timing, ...]
    ratio_to_first: tuple[float, ...]
    threads: int
    rounds: int
    clock: Clock = "wall"

    def to_json(self) -> dict[str, Any]:
        """The document that ``sparsecc benchmark --json`` prints."""
        return {
            "models": [asdict(timing) for timing in self.models],
            "ratio_to_first": list(self.ratio_to_first),
            "threads": self.threads,
            "rounds": self.rounds,
            "clock": self.clock,
        }


def benchmark(
    models: Sequence[ModelLike],
    inputs: Arrays,
    *,
    threads: int | None = 1,
    library: bool | Sequence[bool] = True,
    copies: int = 1,
    warmup: int = 2,
    rounds: int = 21,
    min_rounds: int = 3,
    max_seconds: float = 20.0,
    slice_seconds: float = 0.005,
) -> Benchmark:
    """Time the models in turns on the same inputs, in one process.

    Every session exists before timing starts, reads and writes bound buffers (no copies by Python), and no
    pool spins while another model runs. See :func:`time_interleaved` for the turns, and :class:`Benchmark`
    for the clock.

    Args:
        models: models in memory or paths, also of modules of TVM; the first is what the others are compared with.
        inputs: arrays by input name; the entries a model does not read are ignored.
        threads: threads of each session; ``None`` or 0 for all physical cores.
        library: register the native operators: one answer for all models, or one for each.
        copies: sessions of each model, run one after the other: a part of a model has its weights as far from the
            processor then as where the other weights of the model lie between two of its runs.
        warmup: untimed runs of each model before anything is measured.
        rounds: rounds wanted.
        min_rounds: rounds run even when ``max_seconds`` has passed.
        max_seconds: seconds after which no new round starts; loading and warming up not included.
        slice_seconds: shortest turn of a model; a faster model is run several times in its turn.

    Raises:
        UsageError: no model is given or the inputs do not fit.
        ModelError: a model cannot be loaded or fails while it runs.
        MissingExtraError: one is a module of TVM, which is not installed.
    """
    if not models:
        raise UsageError("there is no model to time; give at least one")
    flags = [library] * len(models) if isinstance(library, bool) else list(library)
    calls = [
        _in_turns([_call(m, inputs, library=flag, threads=threads) for _ in range(copies)])
        for m, flag in zip(models, flags, strict=True)
    ]
    clock: Clock = "cpu" if threads == 1 else "wall"  # one thread: all work is done by the calling one
    times, repeats = time_interleaved(
        calls,
        clock=clock,
        warmup=warmup * copies,
        rounds=rounds,
        min_rounds=min_rounds,
        max_seconds=max_seconds,
        slice_seconds=slice_seconds,
    )
    timings = tuple(
        Timing(
            path=_path(model),
            median_ms=statistics.median(column) * 1e3,
            min_ms=min(column) * 1e3,
            iterations=repeat * len(column),
            spread=Spread.of(column),
        )
        for model, column, repeat in zip(models, times, repeats, strict=True)
    )
    ratios = tuple(
        statistics.median(first / own for first, own in zip(times[0], column, strict=True))
        for column in times
    )
    return Benchmark(timings, ratios, threads or 0, len(times[0]), clock)


def _path(model: ModelLike) -> str | None:
    path = getattr(model, "path", model)
    return None if path is None else str(path)


def _in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of ``calls``, from the beginning after the last."""
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def _call(model: ModelLike, inputs: Arrays, *, library: bool, threads: int | None) -> Callable[[], object]:
    """A call that runs the model, or the module of TVM, once."""
    if is_tvm_module(model):
        return TvmModule(str(model), threads=threads).bound(inputs)
    return _bound_call(session(model, library=library, threads=threads), inputs)


def _bound_call(item: Session, inputs: Arrays) -> Callable[[], object]:
    """A call that runs the model once on ``inputs``, with buffers bound beforehand where all are tensors."""
    feeds = item.feeds(inputs)
    raw = item.raw
    try:
        raw.run(None, feeds)  # checks the inputs, with the better message
        binding = raw.io_binding()
        if all(
            value.type.startswith("tensor(") and "string" not in value.type for value in raw.get_outputs()
        ):
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name in item.output_names:
                binding.bind_output(name)
            return lambda: raw.run_with_iobinding(binding)
    except Exception as error:
        raise run_error(error, item.name) from error
    return lambda: raw.run(None, feeds)


def time_interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    clock: Clock = "wall",
    warmup: int = 2,
    rounds: int = 21,
    min_rounds: int = 3,
    max_seconds: float = 20.0,
    slice_seconds: float = 0.005,
    pauses: Sequence[float] | None = None,
) -> tuple[list[list[float]], list[int]]:
    """Time ``calls`` in rounds; in each round each call gets one slice, in an order that turns and flips.

    A slice takes samples until ``slice_seconds`` pass, by a number fixed beforehand, and counts as the lower
    quartile of its samples: an interruption only ever adds time. A sample is one call, or as many as make the
    cost of reading the clock negligible. The garbage collector is off during timing.

    Args:
        calls: what to time.
        clock: ``wall``; ``cpu`` for the CPU time of the calling thread; ``process`` for that of all threads of
            the process, which also counts a call that hands its work to one thread of its own.
        warmup: untimed runs of each call before anything is measured.
        rounds: rounds wanted.
        min_rounds: rounds run even when ``max_seconds`` has passed.
        max_seconds: seconds of wall time after which no new round starts.
        slice_seconds: least time of a slice.
        pauses: for each call the seconds to sleep after its slice, for engines whose idle threads go on spinning.

    Returns:
        Seconds per call, ``[call][round]``, and how often a slice runs each call.
    """
    turns = [_prepare(call, _CLOCKS[clock], warmup, slice_seconds) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    with _no_garbage_collection():
        deadline = time.perf_counter() + max_seconds
        for number in range(max(rounds, min_rounds)):
            if number >= min_rounds and time.perf_counter() >= deadline:
                break
            for index in _order(len(calls), number):
                times[index].append(turns[index].take())
                if pauses is not None and pauses[index] > 0:
                    time.sleep(pauses[index])
    return times, [turn.samples * turn.repeats for turn in turns]


@dataclass(frozen=True)
class _Turn:
    """One call, the samples of a slice, the calls in a sample, and whether a slice starts with an untimed call."""

    call: Callable[[], object]
    clock: Callable[[], float]
    samples: int
    repeats: int
    settle: bool

    def take(self) -> float:
        """Seconds per call in one slice."""
        if self.settle:  # brings back into the caches what the other models have driven out
            self.call()
        return _lower_quartile([self._sample() for _ in range(self.samples)])

    def _sample(self) -> float:
        start = self.clock()
        for _ in range(self.repeats):
            self.call()
        return (self.clock() - start) / self.repeats


def _lower_quartile(values: list[float]) -> float:
    return sorted(values)[len(values) // 4]


def _prepare(
    call: Callable[[], object], clock: Callable[[], float], warmup: int, slice_seconds: float
) -> _Turn:
    for _ in range(warmup):
        call()
    best = math.inf
    stop = time.perf_counter() + slice_seconds
    while best == math.inf or time.perf_counter() < stop:
        start = clock()
        call()
        best = min(best, max(clock() - start, 1e-7))
    repeats = max(1, math.ceil(_SAMPLE_SECONDS / best))
    samples = max(1, math.ceil(slice_seconds / (best * repeats)))
    return _Turn(call, clock, samples, repeats, settle=best < _COLD_LIMIT)


def _order(count: int, number: int) -> list[int]:
    """Order of round ``number``: rotated every second round and reversed every other one."""
    shift = number // 2 % count
    order = [*range(shift, count), *range(shift)]
    return order if number % 2 == 0 else order[::-1]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
