"""What parts of a model read on the calibration data, collected once for all their candidates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import Calibration, Moments
from sparsecc.calib.collect import Reading, Readings, Tapped, UnavailableError, tensor_groups
from sparsecc.calib.views import InBody
from sparsecc.ir import Model, Site
from sparsecc.plan.parts import Part
from sparsecc.pm import CalibrationSource, HistogramLike, MomentsLike, Progress

__all__ = ["PartCalibration", "PartData", "batches_of", "collect_parts"]

#: Rows of a matrix, and bytes of pictures or sequences, that are kept of what a part reads.
_ROWS = 1024
_SAMPLE_BYTES = 2 << 20
#: Bytes of activations that one run may return.
_BYTE_BUDGET = 128 << 20


@dataclass(frozen=True)
class PartData:
    """What a part reads.

    Attributes:
        moments: by name of each of its sites.
        sample: some of what it reads: rows ``[..., n, K]`` with one in front, pictures ``[n, C, ...]``, or sequences
            ``[T, n, K]``.
    """

    moments: Mapping[str, MomentsLike]
    sample: NDArray[Any]

    def digest(self) -> str:
        """Content hash of all of it."""
        digest = hashlib.sha256(
            repr(self.sample.shape).encode() + np.ascontiguousarray(self.sample).tobytes()
        )
        for name, found in sorted(self.moments.items()):
            digest.update(name.encode())
            for array in (found.gram, found.mean):
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class PartCalibration:
    """A ``CalibrationSource`` for a part by itself, or for its sites in the whole model.

    Known moments are given to the sites of that name as long as they read as many values as they did; of all others,
    which passes have made, statistics are taken by running the model on the sample.

    Args:
        data: of the part.
        alone: the part by itself; None: its sites are looked for in the whole model.
        whole: inputs of the whole model, which stand for the sample there.
    """

    def __init__(
        self,
        data: PartData,
        alone: Model | None = None,
        whole: CalibrationSource | None = None,
    ) -> None:
        self._data = data
        self._whole = whole
        self._batches = [] if alone is None else batches_of(data.sample, alone)
        self.unavailable: dict[str, str] = {}

    @classmethod
    def of_noise(cls, model: Model) -> PartCalibration:
        """Inputs of a part that are noise, for passes that need some data to give it a form."""
        sites = model.sites()
        shape = [size for size in model.input_specs()[0].shape or () if isinstance(size, int)]
        sample = np.random.default_rng(0).standard_normal(shape).astype(sites[0].dtype)
        return cls(PartData(_Noise(sites), sample), model)

    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        """Start a run over the sample."""
        return iter(self._batches if self._whole is None else self._whole)

    def fingerprint(self) -> str:
        """Digest of moments and sample."""
        return f"sha256:{self._data.digest()}"

    def mean_square(self, model: Model, sites: Sequence[Site]) -> Mapping[str, NDArray[np.float64]]:
        """As ``CalibrationSource``."""
        return {
            name: np.diagonal(gram, axis1=-2, axis2=-1).copy()
            for name, gram in self.gram(model, sites).items()
        }

    def gram(self, model: Model, sites: Sequence[Site]) -> Mapping[str, NDArray[np.float64]]:
        """As ``CalibrationSource``."""
        return {name: found.gram for step in self.walk(model, sites) for name, found in step.items()}

    def histograms(self, model: Model, names: Sequence[str]) -> Mapping[str, HistogramLike]:
        """As ``CalibrationSource``, of the sample."""
        return self._measured(model).histograms(model, names)

    def walk(
        self, model: Model, sites: Sequence[Site], reference: Model | None = None
    ) -> Iterator[Mapping[str, MomentsLike]]:
        """Yield what is known of each site, as if nothing in front of it had changed; then measure the others."""
        self.unavailable = {}
        others = []
        for site in sites:
            known = self._data.moments.get(site.name)
            if known is not None and known.gram.shape[-1] == site.shape[1]:
                yield {site.name: known}
            else:
                others.append(site)
        if others:
            measured = self._measured(model)
            same = reference is not None and all(
                other.shape == site.shape
                for site in others
                for other in reference.sites()
                if other.name == site.name
            )
            yield from measured.walk(model, others, reference if same else None)
            self.unavailable.update(measured.unavailable)

    def _measured(self, model: Model) -> CalibrationSource:
        if self._whole is not None:
            return self._whole
        return Calibration.from_batches(self._batches, model, threads=1)


def batches_of(sample: NDArray[Any], alone: Model) -> list[dict[str, NDArray[Any]]]:
    """Cut a sample into inputs of a part by itself; rows that do not fill the last one are left out."""
    specs = alone.input_specs()
    shape = [size for size in specs[0].shape or () if isinstance(size, int)]
    pieces = [sample]
    if list(sample.shape) != shape:
        length = shape[-2]
        starts = range(0, sample.shape[-2] - length + 1, length)
        pieces = [sample[..., start : start + length, :] for start in starts]
    return [{spec.name: piece for spec in specs} for piece in pieces]


class _Noise(Mapping[str, MomentsLike]):
    """Moments of independent inputs, made when they are asked for."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._shapes = {site.name: (site.groups, site.shape[1]) for site in sites}

    def __getitem__(self, name: str) -> MomentsLike:
        groups, width = self._shapes[name]
        shape = (width,) if groups == 1 else (groups, width)
        gram, mean = np.broadcast_to(np.eye(width), (*shape, width)), np.zeros(shape)
        return Moments(gram, mean, gram, mean, gram, 4 * width)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def collect_parts(
    model: Model, parts: Sequence[Part], calibration: CalibrationSource, *, threads: int, progress: Progress
) -> Iterator[tuple[Part, PartData | str]]:
    """Yield what each part reads, or why that is not known, as soon as it is; moments are dropped then.

    Args:
        model: where they are.
        parts: those that can be taken out of it.
        calibration: inputs of ``model``.
        threads: of the sessions.
        progress: told how far it is.
    """
    samples = _samples(model, parts, calibration, threads, progress)
    waiting = {part.name: part for part in parts}
    needed = {name: part.name for part in parts for name in part.names}
    found: dict[str, MomentsLike] = {}
    for step in calibration.walk(model, [site for part in parts for site in part.sites]):
        found.update(step)
        for first in dict.fromkeys(needed[name] for name in step):
            part = waiting.get(first)
            if part is not None and all(name in found for name in part.names):
                del waiting[first]
                moments = {name: _plain(found.pop(name)) for name in part.names}
                yield (
                    part,
                    _checked(PartData(moments, samples.pop(first)) if first in samples else _UNREACHED),
                )
    for part in waiting.values():
        reasons = [calibration.unavailable[name] for name in part.names if name in calibration.unavailable]
        yield part, reasons[0] if reasons else _UNREACHED


_UNREACHED = "calibration does not reach it"


def _plain(found: MomentsLike) -> Moments:
    """The same, once: there is no reference that differs."""
    return Moments(found.gram, found.mean, found.gram, found.mean, found.gram, found.rows)


def _checked(data: PartData | str) -> PartData | str:
    if isinstance(data, str):
        return data
    finite = np.isfinite(data.sample).all() and all(
        np.isfinite(item.gram).all() for item in data.moments.values()
    )
    return data if finite else "its input is NaN or infinite on the calibration data"


def _samples(
    model: Model, parts: Sequence[Part], calibration: CalibrationSource, threads: int, progress: Progress
) -> dict[str, NDArray[Any]]:
    """Some of what each part reads, evenly over batches and rows, by name of the part."""
    batches = [dict(batch) for batch in calibration]
    if not batches or not parts:
        return {}
    taken: dict[str, list[NDArray[Any]]] = {part.name: [] for part in parts}
    opened = model.copy()  # bodies give what is read inside them to the main graph
    found = Readings(model, opened)
    read: dict[str, tuple[Reading, ...]] = {}
    for part in parts:
        with suppress(UnavailableError):  # the walk says why
            read[part.name] = found.of(part.sites[0])
    names = dict.fromkeys(name for readings in read.values() for name, _ in readings)
    groups = tensor_groups(opened, list(names), batches[0], _BYTE_BUDGET)
    for number, group in enumerate(groups):
        progress("sampling activations", number, len(groups))
        tapped = Tapped(opened, group, threads)
        for batch in batches:
            arrays = tapped.run(batch)
            for part in parts:
                inside = _inside(arrays, read.get(part.name, ()), part)
                if inside is not None:
                    taken[part.name].append(_some(inside, part.samples_axis, len(batches)))
    progress("sampling activations", len(groups), len(groups))
    return {part.name: _joined(taken[part.name], part.joined_axis) for part in parts if taken[part.name]}


def _inside(
    arrays: Mapping[str, NDArray[Any]], readings: Sequence[Reading], part: Part
) -> NDArray[Any] | None:
    """What a part reads, in all rounds of a loop one after another; None if it does not run.

    Of nodes with one weight the first that runs counts.
    """
    for name, view in readings:
        array = arrays.get(name, np.zeros(0))
        if not array.size:  # a branch that is not taken
            continue
        if not isinstance(view, InBody):
            return array
        rounds = array.reshape(-1, *array.shape[view.stacked :])
        return np.concatenate([np.atleast_2d(inside) for inside in rounds], part.joined_axis)
    return None


def _some(array: NDArray[Any], axis: int | None, batches: int) -> NDArray[Any]:
    """Rows ``[n, K]``, or samples along an axis, of one batch, evenly spaced."""
    if axis is None:
        rows, most = array.reshape(-1, array.shape[-1]), _ROWS
    else:
        rows = np.moveaxis(array, axis, 0)
        most = _SAMPLE_BYTES // max(1, rows[:1].nbytes)
    wanted = min(len(rows), max(1, -(-most // batches)))
    some = rows[np.unique(np.linspace(0, len(rows) - 1, wanted).astype(np.intp))].copy()
    return some.reshape(*[1] * (array.ndim - 2), *some.shape) if axis is None else np.moveaxis(some, 0, axis)


def _joined(pieces: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """All of one size; those of other sizes than the first are left out."""
    sizes = [np.delete(piece.shape, axis).tolist() for piece in pieces]
    same = [piece for piece, size in zip(pieces, sizes, strict=True) if size == sizes[0]]
    return np.concatenate(same, axis)
