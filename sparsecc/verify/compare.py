"""How far the outputs of two models are apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Arrays, ModelLike
from sparsecc.errors import UsageError, VerificationError
from sparsecc.verify.session import Runner, runner

__all__ = ["OutputDiff", "compare", "compare_arrays", "worst_rel_l2"]


@dataclass(frozen=True)
class OutputDiff:
    """Difference of one output ``b`` from its reference ``a``, over all inputs compared.

    Attributes:
        name: name of the output.
        elements: number of elements compared.
        max_abs: largest ``|a - b|``.
        rel_l2: ``||a - b|| / ||a||``; 0 when both are zero, infinite when only ``a`` is.
        cosine: ``<a, b> / (||a|| ||b||)``; 1 when both are zero.
        argmax_agreement: share of rows (last axis, 2 elements or more) with the same argmax; ``None`` where
            an output has no such rows or is not floating point.
        nonfinite_mismatch: elements that are NaN or an infinity in one and not the same in the other, and texts
            that differ; where there is one, ``max_abs`` and ``rel_l2`` are infinite.
    """

    name: str
    elements: int
    max_abs: float
    rel_l2: float
    cosine: float
    argmax_agreement: float | None
    nonfinite_mismatch: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


class _Accumulator:
    """Sums over batches for one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.elements = self.mismatch = self.rows = self.agree = 0
        self.max_abs = self.aa = self.bb = self.ab = self.dd = 0.0

    def add(self, a: Any, b: Any) -> None:
        """Add what onnxruntime returned: a tensor, a sequence or map of them, or None (an empty optional)."""
        if isinstance(a, list | dict) or isinstance(b, list | dict) or a is None or b is None:
            self._add_parts(a, b)
        else:
            self._add_array(np.asarray(a), np.asarray(b))

    def _add_parts(self, a: Any, b: Any) -> None:
        same_kind = type(a) is type(b)
        if not same_kind or (a is not None and len(a) != len(b)):
            self._refuse(_kind(a), _kind(b))
        if isinstance(a, dict):
            if a.keys() != b.keys():
                self._refuse(f"keys {_some(a)}", f"keys {_some(b)}")
            a, b = list(a.values()), [b[key] for key in a]
        for first, second in zip(a or (), b or (), strict=True):
            self.add(first, second)

    def _refuse(self, first: str, second: str) -> NoReturn:
        raise VerificationError(
            f"output '{self.name}' has {first} in the first model and {second} in the second; "
            "compare two versions of one model"
        )

    def _add_array(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        if a.shape != b.shape:
            self._refuse(f"shape {list(a.shape)}", f"shape {list(b.shape)}")
        self.elements += a.size
        if a.dtype.kind in "OUS":
            self._add_text(a, b)
        elif a.size:
            self._add_numbers(a, b)

    def _add_text(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        self.mismatch += int((a != b).sum())

    def _add_numbers(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        if a.dtype.kind == "f" and a.ndim and a.shape[-1] > 1:
            self.rows += a.size // a.shape[-1]
            self.agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        finite = np.isfinite(x) & np.isfinite(y)
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        self.mismatch += int((~finite & ~same).sum())
        x, y = x[finite], y[finite]
        difference = x - y
        self.max_abs = max(self.max_abs, float(np.abs(difference).max(initial=0)))
        self.aa += float(x @ x)
        self.bb += float(y @ y)
        self.ab += float(x @ y)
        self.dd += float(difference @ difference)

    def result(self) -> OutputDiff:
        infinite = self.mismatch > 0
        return OutputDiff(
            name=self.name,
            elements=self.elements,
            max_abs=np.inf if infinite else self.max_abs,
            rel_l2=np.inf if infinite else _ratio(self.dd, self.aa),
            cosine=self._cosine(),
            argmax_agreement=self.agree / self.rows if self.rows else None,
            nonfinite_mismatch=self.mismatch,
        )

    def _cosine(self) -> float:
        if self.aa == 0 or self.bb == 0:
            return 1.0 if self.aa == self.bb else 0.0
        return float(np.clip(self.ab / np.sqrt(self.aa) / np.sqrt(self.bb), -1, 1))


def _kind(value: Any) -> str:
    if value is None:
        return "no value"
    if isinstance(value, list | dict):
        return f"{len(value)} elements"
    return f"a tensor of shape {list(np.shape(value))}"


def _some(keys: Iterable[object], limit: int = 5) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")


def _ratio(squared: float, squared_reference: float) -> float:
    if squared == 0:
        return 0.0
    return float(np.sqrt(squared / squared_reference)) if squared_reference else np.inf


def compare(
    a: ModelLike,
    b: ModelLike,
    inputs: Arrays | Iterable[Arrays],
    *,
    library: tuple[bool, bool] = (True, True),
    threads: int | None = 1,
) -> list[OutputDiff]:
    """Run both models on the same inputs and return the difference of each output, in the order of ``a``.

    Models with more than 1.5 GB of weights run in parts.

    Args:
        a: the reference, in memory or as a path.
        b: the other one.
        inputs: one set of input arrays by name, or several (differences are then taken over all of them).
        library: for each model, whether the native operators are registered.
        threads: threads of each session.

    Raises:
        VerificationError: the models do not have the same outputs, or the shapes of an output differ.
        UsageError: there are no inputs, or they do not fit.
        ModelError: a model cannot be loaded or fails while it runs.
    """
    first = runner(a, library=library[0], threads=threads)
    second = runner(b, library=library[1], threads=threads)
    _check_outputs(first, second)
    batches: Iterable[Arrays] = [inputs] if isinstance(inputs, Mapping) else inputs
    sums = {name: _Accumulator(name) for name in first.output_names}
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007 - counted to see that there was one
        expected, got = first.run(batch), second.run(batch)
        for name, total in sums.items():
            total.add(expected[name], got[name])
    if not count:
        raise UsageError("there are no inputs to compare the models on; give at least one sample")
    return [total.result() for total in sums.values()]


def _check_outputs(first: Runner, second: Runner) -> None:
    missing = [name for name in first.output_names if name not in second.output_names]
    if missing:
        raise VerificationError(
            f"{second.name} has no output {', '.join(missing)}; it has {', '.join(second.output_names)}: "
            "compare two versions of one model"
        )


def compare_arrays(name: str, a: NDArray[Any], b: NDArray[Any]) -> OutputDiff:
    """Return the difference of array ``b`` from its reference ``a``, of equal shape.

    Raises:
        VerificationError: the shapes differ.
    """
    total = _Accumulator(name)
    total.add(a, b)
    return total.result()


def worst_rel_l2(differences: Sequence[OutputDiff]) -> float:
    """The largest ``rel_l2``; 0 when there is no output."""
    return max((difference.rel_l2 for difference in differences), default=0.0)
