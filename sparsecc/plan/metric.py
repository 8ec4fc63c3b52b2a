"""What a model is judged by: a built-in metric, or a function of the user's."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc import emit, verify
from sparsecc.calib.source import LABELS, load_function, read_arrays
from sparsecc.errors import ScoreError, UsageError
from sparsecc.ir import Model

__all__ = ["METRICS", "Metric", "OutputError", "UserMetric", "open_metric", "read_labels"]

Batch = Mapping[str, NDArray[Any]]
Outputs = Sequence[Mapping[str, NDArray[Any]]]


@dataclass
class Metric(ABC):
    """A number for a model, on inputs that stay the same.

    Attributes:
        batches: the inputs.
        threads: of the sessions.
        library: whether sparse operators run by the operator library.
    """

    name: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    #: Whether a small change of the model surely shows: no counting of right answers.
    smooth: ClassVar[bool] = False

    batches: Sequence[Batch]
    threads: int = 1
    library: bool = False

    def score(self, model: Model) -> float:
        """Run ``model`` on all batches and judge what it gives.

        Raises:
            ScoreError: the score is no finite number.
            UsageError: its outputs do not suit the metric.
            ModelError: onnxruntime refuses it.
        """
        score = self.judge(self.outputs(model))
        if not np.isfinite(score):
            raise ScoreError(
                f"the metric {self.name} of this model is {score}: look at its outputs and the data"
            )
        return score

    def outputs(self, model: Model) -> list[dict[str, NDArray[Any]]]:
        """What ``model`` gives for each batch."""
        run = self.runner(model)
        return [run(batch) for batch in self.batches]

    def runner(self, model: Model) -> Callable[[Batch], dict[str, NDArray[Any]]]:
        """A session of ``model``, whichever operators it has."""
        ready = model.copy()
        emit.finalize(ready)
        return verify.session(ready, library=self.library, threads=self.threads).run

    def damage(self, reference: float, other: float) -> float:
        """How much worse ``other`` is than ``reference``; below 0 where it is better."""
        return reference - other if self.higher_is_better else other - reference

    @abstractmethod
    def judge(self, outputs: Outputs) -> float:
        """The number for what a model gave for each batch."""

    def digest(self) -> str:
        """Content hash of all that the score depends on beside the model."""
        digest = hashlib.sha256(self.name.encode())
        for batch in self.batches:
            for name, array in sorted(batch.items()):
                digest.update(
                    f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
                )
        return digest.hexdigest()


@dataclass
class _ComparedMetric(Metric):
    """Judged against what the input model gives."""

    smooth: ClassVar[bool] = True

    reference: Outputs = ()

    def compare_with(self, model: Model) -> None:
        """Judge by the outputs of this model from now on."""
        self.reference = self.outputs(model)

    def pairs(self, outputs: Outputs) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """By name each floating-point output of the reference and of the model, all batches as rows ``[n, C]``."""
        found = {}
        for name in self.reference[0]:
            if self.reference[0][name].dtype.kind in "fV":
                both = [_rows([item[name] for item in side]) for side in (self.reference, outputs)]
                found[name] = (both[0], both[1])
        if not found:
            raise UsageError(
                f"the metric {self.name} needs floating-point outputs; give --eval FILE.py:FUNCTION"
            )
        return found


@dataclass
class OutputError(_ComparedMetric):
    """Norm of what changed of the outputs over their norm, as a mean over outputs."""

    name: ClassVar[str] = "output-error"
    higher_is_better: ClassVar[bool] = False

    def judge(self, outputs: Outputs) -> float:
        """Mean over outputs; 0 for the input model."""
        errors = []
        for before, after in self.pairs(outputs).values():
            norm = np.linalg.norm(before)
            errors.append(
                float(np.linalg.norm(after - before) / norm) if norm else float((after != before).any())
            )
        return float(np.mean(errors))


@dataclass
class Cosine(_ComparedMetric):
    """Cosine between the outputs of both models along the last axis, as a mean over rows and outputs."""

    name: ClassVar[str] = "cosine"

    def judge(self, outputs: Outputs) -> float:
        """1 for the input model."""
        means = []
        for before, after in self.pairs(outputs).values():
            norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
            products = (before * after).sum(1)
            both_zero = ~before.any(1) & ~after.any(1)
            means.append(np.where(both_zero, 1.0, products / np.where(norms > 0, norms, 1.0)).mean())
        return float(np.mean(means))


@dataclass
class Spearman(_ComparedMetric):
    """Rank correlation of the outputs with those of the input model, or with given scores."""

    name: ClassVar[str] = "spearman"

    wanted: NDArray[Any] | None = None

    def judge(self, outputs: Outputs) -> float:
        """1 for the same order; with scores given the model has one number for each."""
        if self.wanted is None:
            return float(np.mean([_rank_correlation(*pair) for pair in self.pairs(outputs).values()]))
        given = np.concatenate([np.ravel(next(iter(item.values()))) for item in outputs])
        if given.size != self.wanted.size:
            raise UsageError(
                f"spearman: {self.wanted.size} scores for {given.size} numbers of the first output; "
                "give --eval FILE.py:FUNCTION"
            )
        return _rank_correlation(given, self.wanted)

    def digest(self) -> str:
        """Of the inputs and of the scores."""
        return super().digest() + ("" if self.wanted is None else _digest(self.wanted))


@dataclass
class Accuracy(Metric):
    """Share of samples whose largest output is that of their label."""

    name: ClassVar[str] = "accuracy"

    labels: Sequence[NDArray[Any]] = field(default_factory=list)

    def judge(self, outputs: Outputs) -> float:
        """Of the first floating-point output whose last axis are classes."""
        right, total = 0, 0
        for item, labels in zip(outputs, self.labels, strict=True):
            scores = next(
                (array for array in item.values() if array.dtype.kind == "f" and array.ndim > 1), None
            )
            if scores is None:
                raise UsageError("accuracy needs an output of scores by class; give --eval FILE.py:FUNCTION")
            rows = scores.reshape(-1, scores.shape[-1])
            if len(rows) != labels.size:
                raise UsageError(f"accuracy: {labels.size} labels for {len(rows)} rows of scores")
            right += int(np.count_nonzero(rows.argmax(1) == labels.ravel()))
            total += labels.size
        return right / total

    def digest(self) -> str:
        """Of the inputs and of the labels."""
        return super().digest() + "".join(_digest(item) for item in self.labels)


@dataclass
class Perplexity(Metric):
    """Perplexity of a language model: how unlikely it finds each next token of its input."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    smooth: ClassVar[bool] = True

    def judge(self, outputs: Outputs) -> float:
        """Of logits ``[batch, tokens, vocabulary]`` and the input of whole numbers that is as long.

        Positions where an input named ``attention_mask`` is 0 do not count.
        """
        lost, count = 0.0, 0
        for batch, item in zip(self.batches, outputs, strict=True):
            logits = next(
                (array for array in item.values() if array.dtype.kind == "f" and array.ndim == 3), None
            )
            tokens = None if logits is None else _tokens(batch, logits.shape[:2])
            if logits is None or tokens is None:
                raise UsageError(
                    "perplexity needs an output [batch, tokens, vocabulary] and an input of as many token numbers; "
                    "give --eval FILE.py:FUNCTION"
                )
            mask = np.asarray(batch.get("attention_mask", np.ones_like(tokens)))[:, 1:] != 0
            wide = logits[:, :-1].astype(np.float64)
            wide -= wide.max(-1, keepdims=True)
            own = np.take_along_axis(wide, tokens[:, 1:, None].astype(np.intp), -1)[..., 0]
            lost += float((np.log(np.exp(wide).sum(-1)) - own)[mask].sum())
            count += int(mask.sum())
        if not count:
            raise UsageError("perplexity: the inputs hold no token that follows another one")
        return float(np.exp(lost / count))


@dataclass
class UserMetric(Metric):
    """A function of the user's.

    It is called with a function that runs the model, from a dictionary of inputs to one of outputs, and with the
    batches of the calibration data if it takes a second argument, and returns one number; higher is better unless it
    has an attribute ``lower_is_better`` that is true.

    Attributes:
        function: as above.
        where: what errors call it.
    """

    name: ClassVar[str] = "eval"

    function: Callable[..., object] = field(default=lambda run: 0.0)
    where: str = "eval"

    def score(self, model: Model) -> float:
        """Call the function.

        Raises:
            ScoreError: it returns a number that is not finite.
            UsageError: it fails, or returns no number.
        """
        run = self.runner(model)
        try:
            found = self.function(run, list(self.batches)) if self._takes_data() else self.function(run)
        except (Exception, SystemExit) as error:  # code of the user
            text = " ".join(str(error).split())
            raise UsageError(
                f"{self.where} failed: {type(error).__name__}: {text}; run it by itself to see why"
            ) from error
        if isinstance(found, bool | np.complexfloating) or not isinstance(found, int | float | np.number):
            raise UsageError(f"{self.where} returned {_shown(found)}; return one finite number")
        try:
            score = float(found)
        except OverflowError:
            score = math.inf
        if not math.isfinite(score):
            raise ScoreError(f"{self.where} returned {_shown(found)}; return one finite number")
        return score

    def damage(self, reference: float, other: float) -> float:
        """How much worse, in the direction that the function says."""
        lower = bool(getattr(self.function, "lower_is_better", False))
        return other - reference if lower else reference - other

    def judge(self, outputs: Outputs) -> float:
        """Not of outputs alone."""
        raise UsageError(f"{self.where} runs the model itself")

    def digest(self) -> str:
        """Of the inputs and of the text of the function's file."""
        source = inspect.getsourcefile(self.function)
        text = Path(source).read_bytes() if source is not None else repr(self.function).encode()
        return super().digest() + hashlib.sha256(text).hexdigest()

    def _takes_data(self) -> bool:
        try:
            inspect.signature(self.function).bind(None, None)
        except TypeError:
            return False
        return True


#: Built-in metrics by name.
METRICS: dict[str, type[Metric]] = {
    item.name: item for item in (OutputError, Cosine, Spearman, Accuracy, Perplexity)
}


def open_metric(
    spec: str,
    model: Model,
    batches: Iterable[Batch],
    *,
    labels: NDArray[Any] | None = None,
    threads: int = 1,
    library: bool = False,
) -> Metric:
    """Return the metric that ``spec`` names.

    Args:
        spec: one of ``METRICS``, or ``FILE.py:FUNCTION`` (``FILE.py`` for its function ``evaluate``), which is run.
        model: the input model, which the result is compared with.
        batches: its inputs.
        labels: what the samples should give, one after the other, for ``accuracy`` and ``spearman``.
        threads: of the sessions.
        library: whether sparse operators run by the operator library.

    Raises:
        UsageError: no such metric, or what it needs is missing.
    """
    own = list(batches)
    if ".py" in spec:
        function, where = load_function(spec, "evaluate")
        return UserMetric(own, threads, library, function=function, where=where)
    if spec not in METRICS:
        raise UsageError(f"unknown metric '{spec}'; known: {', '.join(METRICS)}, or FILE.py:FUNCTION")
    if not own:
        raise UsageError(f"the metric {spec} needs inputs: give --calibration-data PATH")
    if spec == Accuracy.name:
        return Accuracy(own, threads, library, labels=_dealt(labels, own))
    metric = METRICS[spec](own, threads, library)
    if isinstance(metric, Spearman):
        metric.wanted = None if labels is None else np.asarray(labels)
    if isinstance(metric, _ComparedMetric):
        metric.compare_with(model)
    return metric


def read_labels(path: str | os.PathLike[str]) -> NDArray[Any] | None:
    """Return the array of an ``.npz`` that holds labels or scores, by its name; None if there is none."""
    if Path(path).suffix != ".npz":
        return None
    arrays = read_arrays(Path(path))
    return next((arrays[name] for name in LABELS if name in arrays), None)


def _shown(found: object) -> str:
    """What a function returned, in a few characters of one line."""
    try:
        text = " ".join(repr(found).split())
    except Exception:  # code of the user, and whole numbers of too many digits
        text = f"something of type {type(found).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dealt(labels: NDArray[Any] | None, batches: Sequence[Batch]) -> list[NDArray[Any]]:
    """The labels of each batch."""
    if labels is None:
        raise UsageError("accuracy needs labels: give an array 'labels' in the .npz of the calibration data")
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    if sum(sizes) != len(labels):
        raise UsageError(f"accuracy: {len(labels)} labels for {sum(sizes)} samples; leave out --num-samples")
    return np.split(np.asarray(labels), np.cumsum(sizes)[:-1])


def _tokens(batch: Batch, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """The input that holds token numbers: ``input_ids``, else the first of whole numbers that is as large."""
    named = [name for name in ("input_ids", *batch) if name in batch]
    return next(
        (batch[name] for name in named if batch[name].shape == shape and batch[name].dtype.kind in "iu"), None
    )


def _rows(arrays: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """All batches as rows along the last axis; a batch of single numbers is one column."""
    return np.concatenate(
        [
            np.asarray(array, np.float64).reshape(-1, array.shape[-1] if array.ndim > 1 else 1)
            for array in arrays
        ]
    )


def _rank_correlation(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Spearman's, ties getting the mean of their ranks."""
    ranks = [_ranks(np.ravel(item)) for item in (left, right)]
    centred = [item - item.mean() for item in ranks]
    norm = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / norm if norm else float(np.array_equal(ranks[0], ranks[1]))


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse.ravel()], np.float64)


def _digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(
        f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
    ).hexdigest()
