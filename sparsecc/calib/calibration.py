"""Calibration: inputs of a model, and statistics of what its weights are multiplied with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.check import fit_batch
from sparsecc.calib.collect import Reading, Readings, UnavailableError, collect
from sparsecc.calib.ranges import Histogram, histograms
from sparsecc.calib.sequential import Moments, walk
from sparsecc.calib.source import Batch, Batches, open_source, synthetic
from sparsecc.calib.views import InBody, Statistic, Sums
from sparsecc.errors import UsageError
from sparsecc.ir import Model, Site
from sparsecc.pm import Progress, no_progress

__all__ = ["MEMORY", "Calibration"]

#: Default bytes of activations that one run may return.
BYTE_BUDGET = 256 << 20

#: Default bytes of the matrices that one step of a walk gives.
MOMENT_BUDGET = 512 << 20

#: Default of both together.
MEMORY = BYTE_BUDGET + MOMENT_BUDGET


class Calibration:
    """Inputs to measure a model on. Iterating yields batches, dictionaries of arrays by input name.

    It is the ``CalibrationSource`` of the pass manager. Statistics are of the matrix ``X`` of reduction
    vectors that a site sees, one row per multiplication: rows of the input of MatMul and Gemm; patches of the
    input of Conv, K over (cin, kernel...); rows of the input and of the hidden state for the W and R of LSTM
    and GRU (the padding of ``sequence_lens`` counts as zero rows for W; for a GRU with
    ``linear_before_reset`` 0, whose candidate gate reads the reset state, R sees the state before the reset).
    A weight shared by several nodes sees the rows of all. Everything is accumulated in float64 and no
    activation outlives its batch.

    Attributes:
        description: where the inputs come from, for reports.
        synthetic: the inputs are random; what is measured on them says little about real data.
        batches: number of batches.
        unavailable: name and reason of each site that the last statistics left out.
        progress: told how far measuring is; may be set.
    """

    def __init__(
        self,
        start: Callable[[], Iterator[Batch]],
        description: str,
        *,
        synthetic: bool = False,
        seed: int = 0,
        threads: int = 0,
        byte_budget: int = BYTE_BUDGET,
        moment_budget: int = MOMENT_BUDGET,
        progress: Progress = no_progress,
    ) -> None:
        """Take batches from ``start()``, which is called once to check them and once per run of the model.

        Args:
            start: starts a new run over the same batches.
            description: for reports.
            synthetic: whether the inputs are random.
            seed: of the positions that Gram matrices of convolutions are taken at.
            threads: threads of the sessions; 0 for all physical cores.
            byte_budget: bytes of activations that one run may return, about; those kept for later are in files
                beyond it.
            moment_budget: bytes of the matrices of one step of a walk; a single larger one is a step alone, in a
                file.
            progress: told how far measuring is.

        Raises:
            UsageError: there are no batches, or ``start`` finds one that does not fit.
        """
        self.description = description
        self.synthetic = synthetic
        self.progress = progress
        self.unavailable: dict[str, str] = {}
        self._start: Batches = start
        self._seed = seed
        self._threads = threads
        self._byte_budget = byte_budget
        self._moment_budget = moment_budget
        self.batches, self._digest = _read_all(start)  # a bad sample is found before the slow part
        if not self.batches:
            raise UsageError(f"{description}: no samples; give at least one")

    @classmethod
    def from_path(
        cls,
        spec: str,
        model: Model,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        threads: int = 0,
        memory: int = MEMORY,
        progress: Progress = no_progress,
    ) -> Calibration:
        """Open the inputs that ``spec`` names, each checked against the inputs of ``model``.

        - ``FILE.npz``: one array per input. With one axis more than the input, each entry of the first axis
          is a batch; with as many axes, the first is cut into batches of the model's fixed size, or of at
          most 32.
        - a folder of ``.npz``: each file is one sample, with or without the batch axis.
        - a folder of ``.npy``: one file per input, named as the input, cut as for ``FILE.npz``.
        - ``FILE.py:FUNCTION`` (or ``FILE.py``, function ``load_data``): called without arguments, as often as
          needed, it yields dictionaries of arrays. The file is executed.
        - ``synthetic``: random inputs, 8 batches by default.

        Args:
            spec: as above.
            model: the model to be fed.
            num_samples: at most so many samples (entries of the axis that is cut, files, or batches); of
                files and arrays a seeded choice, of functions the first. Default: all.
            seed: of that choice, of synthetic inputs and of the positions for Gram matrices.
            input_shapes: shapes of synthetic inputs whose dimensions are symbolic, by input name.
            threads: threads of the sessions; 0 for all physical cores.
            memory: bytes that activations (a third) and Gram matrices may take before they go to files.
            progress: told how far measuring is.

        Raises:
            UsageError: the source does not exist or has another form, or a name, type, rank or size does not
                fit, an array is empty or holds NaN, or an input is missing.
        """
        if num_samples is not None and num_samples < 1:
            raise UsageError(f"the number of calibration samples must be 1 or more, got {num_samples}")
        if spec == "synthetic":
            start = synthetic(model, num_samples, seed, input_shapes)
            description = f"synthetic inputs, seed {seed}"
        else:
            start, description = open_source(spec, model, num_samples, seed), spec
        return cls(
            start,
            description,
            synthetic=spec == "synthetic",
            seed=seed,
            threads=threads,
            byte_budget=memory // 3,
            moment_budget=memory - memory // 3,
            progress=progress,
        )

    @classmethod
    def from_batches(
        cls,
        batches: Sequence[Mapping[str, NDArray[Any]]],
        model: Model,
        *,
        seed: int = 0,
        threads: int = 0,
        byte_budget: int = BYTE_BUDGET,
        moment_budget: int = MOMENT_BUDGET,
    ) -> Calibration:
        """Use arrays in memory: a sequence of dictionaries by input name, each one set of inputs of
        ``model``.

        Raises:
            UsageError: an array does not fit its input, or there are none.
        """
        specs = {item.name: item for item in model.input_specs()}
        fitted = [fit_batch(batch, specs, f"batch {number}") for number, batch in enumerate(batches)]
        return cls(
            lambda: iter(fitted),
            f"{len(fitted)} batches in memory",
            seed=seed,
            threads=threads,
            byte_budget=byte_budget,
            moment_budget=moment_budget,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self._start()

    @property
    def notes(self) -> list[str]:
        """What a report must say about the inputs."""
        if not self.synthetic:
            return []
        return ["calibrated on synthetic inputs: the statistics say nothing about real data"]

    def fingerprint(self) -> str:
        """``sha256:`` and the digest of names, types, shapes and values of all batches, in order."""
        return f"sha256:{self._digest}"

    def to_json(self) -> dict[str, Any]:
        """What a report says about the inputs."""
        return {
            "source": self.description,
            "synthetic": self.synthetic,
            "batches": self.batches,
            "fingerprint": self.fingerprint(),
            "unavailable": dict(self.unavailable),
        }

    def mean_square(self, model: Model, sites: Sequence[Site]) -> dict[str, NDArray[np.float64]]:
        """Return by site name the mean of ``X**2`` per column: ``[K]``, or ``[groups, K]`` for a grouped
        Conv.

        Sites that cannot be measured are left out and explained in ``unavailable``.

        Raises:
            UsageError: the inputs do not fit ``model``.
            ModelError: onnxruntime refuses ``model``.
        """
        return self._statistics(model, sites, "mean_square")

    def mean(self, model: Model, sites: Sequence[Site]) -> dict[str, NDArray[np.float64]]:
        """Return by site name the mean of ``X`` per column; shapes and errors as :meth:`mean_square`."""
        return self._statistics(model, sites, "mean")

    def gram(self, model: Model, sites: Sequence[Site]) -> dict[str, NDArray[np.float64]]:
        """Return by site name the mean of ``X^T X``: ``[K, K]``, or ``[groups, K, K]`` for a grouped Conv.

        Takes K**2 * 8 bytes per distinct input of ``sites``: ask for a few at a time. Of each picture a Conv
        takes at most 128 seeded positions, so its diagonal estimates :meth:`mean_square`, which takes all.
        Errors as there.
        """
        return self._statistics(model, sites, "gram")

    def walk(
        self,
        model: Model,
        sites: Sequence[Site],
        reference: Model | None = None,
    ) -> Iterator[dict[str, Moments]]:
        """Measure ``sites`` front to back, in steps, on the model as it is when a step starts.

        Yields the moments of the sites of a step by name. Whoever takes them may change the weights of these
        sites, and biases that are initializers, before the next step: it then measures what the changed front
        gives. No site of a step reads what another one of it computes, unless weights are tied or in one body.
        Each part of the model runs once in all; tensors that later parts read are kept, in files beyond the
        byte budget. ``mean of X^T X`` takes 128 seeded positions of each picture, as for :meth:`gram`.

        Args:
            model: its nodes and names must stay as they are until the end.
            sites: of ``model``. Those that cannot be measured are left out and explained in ``unavailable``.
            reference: a model with the same nodes and names, such as a copy from before the changes; its inputs
                are compared row by row with those of ``model``. Default: none, ``cross`` being ``gram``.

        Raises:
            UsageError: the inputs do not fit.
            ModelError: onnxruntime refuses the model.
        """
        self.unavailable = {}
        return walk(
            model,
            reference,
            sites,
            self._start,
            count=self.batches,
            seed=self._seed,
            byte_budget=self._byte_budget,
            moment_budget=self._moment_budget,
            threads=self._threads,
            progress=self.progress,
            unavailable=self.unavailable,
        )

    def histograms(self, model: Model, names: Sequence[str]) -> dict[str, Histogram]:
        """Return by name how the values of tensors of the main graph of ``model`` are distributed.

        Raises:
            UsageError: the inputs do not fit ``model``, or a name is no tensor of it.
            ModelError: onnxruntime refuses ``model``.
        """
        return histograms(
            model,
            names,
            self._start,
            count=self.batches,
            byte_budget=self._byte_budget,
            threads=self._threads,
            progress=self.progress,
        )

    def _statistics(
        self, model: Model, sites: Sequence[Site], statistic: Statistic
    ) -> dict[str, NDArray[np.float64]]:
        copy = model.copy()
        wanted: dict[str, tuple[Reading, ...]] = {}
        self.unavailable = {}
        readings = Readings(model, copy)
        for site in sites:
            try:
                wanted[site.name] = readings.of(site)
            except UnavailableError as reason:
                self.unavailable[site.name] = str(reason)
        distinct = list(dict.fromkeys(reading for parts in wanted.values() for reading in parts))
        sums = self._collect(copy, distinct, statistic) if distinct else {}
        means = {}
        for name, parts in wanted.items():
            total = self._added(parts, sums)
            if total is None or not total.rows:
                self.unavailable[name] = "its input is a constant or is never computed"
            else:
                means[name] = total.total / total.rows
        return means

    def _collect(
        self, model: Model, distinct: Sequence[Reading], statistic: Statistic
    ) -> dict[Reading, Sums]:
        return collect(
            model,
            distinct,
            statistic,
            self._start,
            count=self.batches,
            seed=self._seed,
            byte_budget=self._byte_budget,
            threads=self._threads,
            progress=self.progress,
        )

    @staticmethod
    def _added(parts: Sequence[Reading], sums: Mapping[Reading, Sums]) -> Sums | None:
        found = [sums[part] for part in parts if part in sums]
        # Of several nodes with one weight those in a branch that is never taken read nothing.
        if not found or any(part not in sums and not isinstance(part[1], InBody) for part in parts):
            return None
        total = found[0]
        for part in found[1:]:
            total = total + part
        return total


def _read_all(start: Batches) -> tuple[int, str]:
    """Number of batches and the digest of what they hold."""
    digest = hashlib.sha256()
    count = 0
    for batch in start():
        count += 1
        for name, array in sorted(batch.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return count, digest.hexdigest()
