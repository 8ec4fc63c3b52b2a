"""Where calibration inputs come from: files, folders, a Python function, or a random generator.

Every source is a function without arguments that starts a new run over the batches, so that statistics can be
taken in several runs without keeping anything.
"""

from __future__ import annotations

import importlib.util
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib.check import check_names, fit_array, fit_batch
from sparsecc.calib.synthetic import synthetic_inputs
from sparsecc.errors import UsageError
from sparsecc.ir import Model, TensorSpec

__all__ = [
    "LABELS",
    "Batch",
    "Batches",
    "from_arrays",
    "load_function",
    "open_source",
    "read_arrays",
    "synthetic",
]

#: One set of inputs by name.
Batch: TypeAlias = dict[str, NDArray[Any]]

#: Starts a new run over the batches.
Batches: TypeAlias = Callable[[], Iterator[Batch]]

#: Most samples put into one batch where the model leaves the size open.
_BATCH = 32

#: A first axis of this name counts steps, not samples.
_STEPS = re.compile(r"seq|len|time|tok|step|^[tls]$")

_FORMS = "a .npz file, a folder of .npz or .npy files, FILE.py:FUNCTION, or synthetic"

_SYNTHETIC_BATCHES = 8

#: Names of arrays beside the inputs that say what outputs should be; metrics read them.
LABELS = ("labels", "label", "targets", "target", "scores", "score")


def open_source(spec: str, model: Model, num_samples: int | None, seed: int) -> Batches:
    """Return the source that ``spec`` names: an ``.npz``, a folder, ``FILE.py:FUNCTION`` or a single
    ``.npy``.

    Raises:
        UsageError: it does not exist, has another form, is empty, or what can be told beforehand does not
            fit.
    """
    specs = {item.name: item for item in model.input_specs()}
    file, _, function = spec.rpartition(":") if ".py:" in spec else (spec, "", "")
    path = Path(file)
    if not path.exists():
        raise UsageError(f"calibration data '{spec}' does not exist; give {_FORMS}")
    if not path.is_dir():
        _require_file(path)
    if path.suffix == ".py":
        return limited(_from_function(path, function or "load_data", specs), specs, num_samples)
    if path.is_dir():
        return _from_folder(path, specs, num_samples, seed)
    if path.suffix == ".npz":
        return from_arrays(_read_npz(path, specs), specs, num_samples, seed, path.name)
    if path.suffix == ".npy" and len(specs) == 1:
        return from_arrays({next(iter(specs)): _read_npy(path)}, specs, num_samples, seed, path.name)
    raise UsageError(f"calibration data '{spec}' has no known form; give {_FORMS}")


def synthetic(
    model: Model, num_samples: int | None, seed: int, shapes: Mapping[str, Sequence[int]] | None
) -> Batches:
    """Return a source of ``num_samples`` (default 8) random batches, each of another seed."""
    count = _SYNTHETIC_BATCHES if num_samples is None else num_samples
    return lambda: (synthetic_inputs(model, seed + number, shapes) for number in range(count))


# ------------------------------------------------------------------------------------- arrays of samples


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    specs: Mapping[str, TensorSpec],
    num_samples: int | None,
    seed: int,
    where: str,
) -> Batches:
    """Return a source that cuts one array per input into batches.

    An array with one axis more than its input holds one batch per entry of that axis. One with as many axes
    is cut
    along its first axis: into the model's own batch size where that is fixed (a remainder is left out), else
    into at most 32. An input that cannot be cut (a scalar, its first axis counts steps, or is fixed and just
    so long) is repeated with every batch.

    Raises:
        UsageError: names, types or shapes do not fit, or inputs hold different numbers of samples.
    """
    check_names(arrays, specs.values(), where)
    cuts = {name: _Cut.of(np.asarray(arrays[name]), spec, where) for name, spec in specs.items()}
    cut = [item for item in cuts.values() if item.samples is not None]
    if not cut:
        whole = fit_batch({name: item.array for name, item in cuts.items()}, specs, where)
        return lambda: iter([whole])
    if len({item.samples for item in cut}) > 1:
        listed = ", ".join(f"{name} {item.samples}" for name, item in cuts.items())
        raise UsageError(f"{where}: inputs hold different numbers of samples ({listed}); make them equal")
    mixed = len({item.stacked for item in cut}) > 1  # one entry is a batch here and a sample there
    if mixed or len({item.size for item in cut if item.size}) > 1:
        raise UsageError(
            f"{where}: inputs would be cut into batches of different sizes; give every array one axis more "
            "than its input, one entry per batch"
        )
    fixed = max((item.size or 0 for item in cut), default=0)
    chosen = _choose(cut[0].samples or 0, num_samples, seed)
    if fixed:
        chosen = chosen[: len(chosen) // fixed * fixed]
    if not len(chosen):
        raise UsageError(
            f"{where}: fewer samples than the model's fixed batch size {fixed}; give at least {fixed}"
        )

    def batches() -> Iterator[Batch]:
        step = fixed or _BATCH
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            yield fit_batch({name: item.take(part) for name, item in cuts.items()}, specs, where)

    return batches


@dataclass(frozen=True)
class _Cut:
    """How one array is cut into batches.

    Attributes:
        array: the samples, or what every batch repeats.
        samples: how many there are to choose from; ``None`` when the array is repeated.
        size: samples per batch; ``None`` when that is open.
        stacked: each entry of the first axis is a whole batch.
    """

    array: NDArray[Any]
    samples: int | None = None
    size: int | None = None
    stacked: bool = False

    @classmethod
    def of(cls, array: NDArray[Any], spec: TensorSpec, where: str) -> _Cut:
        """Decide from the shapes, and check all but the first axis."""
        if spec.shape is not None and array.ndim == len(spec.shape) + 1:
            return cls(fit_array(array, spec, where, leading=1), len(array), 1, stacked=True)
        if not spec.shape or array.ndim != len(spec.shape) or not _is_cut(spec, len(array)):
            return cls(fit_array(array, spec, where))
        fixed = spec.shape[0] if isinstance(spec.shape[0], int) else None
        return cls(fit_array(array, _free(spec), where), len(array), fixed)

    def take(self, samples: NDArray[np.intp]) -> NDArray[Any]:
        """The batch that holds these samples."""
        if self.samples is None:
            return self.array
        return np.asarray(self.array[samples[0]] if self.stacked else self.array[samples])


def _free(spec: TensorSpec) -> TensorSpec:
    """The input with any size of its first axis."""
    return replace(spec, shape=(None, *(spec.shape or ())[1:]))


def _counts_samples(spec: TensorSpec) -> bool:
    """Whether the first axis of the input is open and not a number of steps."""
    if not spec.shape or isinstance(spec.shape[0], int):
        return False
    return spec.shape[0] is None or not _STEPS.search(spec.shape[0].lower())


def _is_cut(spec: TensorSpec, size: int) -> bool:
    first = (spec.shape or (0,))[0]
    return first != size if isinstance(first, int) else _counts_samples(spec)


def _choose(count: int, wanted: int | None, seed: int) -> NDArray[np.intp]:
    """Indices of the samples used, ascending: a seeded choice, since files are often sorted by class."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, wanted, replace=False))


# ------------------------------------------------------------------------------------- files and folders


def _require_file(path: Path) -> None:
    """Refuse a pipe or a device: opening one may wait for ever, and files are read more than once."""
    if not path.is_file():
        raise UsageError(
            f"calibration data {path}: it is no file but a pipe, a socket or a device; give {_FORMS}"
        )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` by name.

    Raises:
        UsageError: it cannot be read.
    """
    _require_file(path)
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path.name}: cannot be read: no .npz, or cut short; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UsageError(
            f"{path.name}: cannot be read as a .npz of plain arrays ({error}); write it with numpy.savez"
        ) from error
    return arrays


def _read_npz(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, NDArray[Any]]:
    """The inputs in the file; what outputs should be may stand beside them."""
    arrays = read_arrays(path)
    if list(arrays) == ["arr_0"] and len(specs) == 1:
        return {next(iter(specs)): arrays["arr_0"]}  # numpy.savez(file, x) without a name
    return {name: array for name, array in arrays.items() if name in specs or name not in LABELS}


def _read_npy(path: Path) -> NDArray[Any]:
    _require_file(path)
    try:
        return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{path.name}: cannot be read as a .npy of plain numbers ({error}); write it with numpy.save"
        ) from error


def _from_folder(
    folder: Path, specs: Mapping[str, TensorSpec], num_samples: int | None, seed: int
) -> Batches:
    samples, arrays = sorted(folder.glob("*.npz")), sorted(folder.glob("*.npy"))
    if samples and arrays:
        raise UsageError(
            f"{folder} holds .npz and .npy files; keep one sample per .npz, or one input per .npy"
        )
    if samples:
        chosen = [samples[index] for index in _choose(len(samples), num_samples, seed)]
        return lambda: _merge(((path.name, _read_npz(path, specs)) for path in chosen), specs)
    if arrays:
        found = {path.stem: _read_npy(path) for path in arrays}
        return from_arrays(found, specs, num_samples, seed, folder.name)
    raise UsageError(f"{folder} holds no .npz and no .npy file; give {_FORMS}")


def _merge(
    items: Iterable[tuple[str, Mapping[str, Any]]], specs: Mapping[str, TensorSpec]
) -> Iterator[Batch]:
    """Yield batches of consecutive samples of equal shape; what does not fill a fixed batch is left out."""
    limit, fixed = _merge_limit(specs)
    pending: list[Batch] = []
    for where, arrays in items:
        sample = _with_batch_axis(arrays, specs, where, free=limit > 1)
        if pending and _row_shapes(sample) != _row_shapes(pending[0]):
            if not fixed:
                yield fit_batch(_joined(pending), specs, where)
            pending = []
        pending.append(sample)
        if limit == 1 or sum(len(next(iter(item.values()))) for item in pending) >= limit:
            yield fit_batch(_joined(pending), specs, where)
            pending = []
    if pending and not fixed:
        yield fit_batch(_joined(pending), specs, "the last samples")


def _row_shapes(sample: Batch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in sample.values()]


def _merge_limit(specs: Mapping[str, TensorSpec]) -> tuple[int, bool]:
    """Rows per batch, and whether the model insists on them; 1 where samples cannot be put together."""
    if all(_counts_samples(spec) for spec in specs.values()):
        return _BATCH, False
    firsts = {spec.shape[0] if spec.shape else 0 for spec in specs.values()}
    only = firsts.pop() if len(firsts) == 1 else 0
    return (only, True) if isinstance(only, int) and only > 1 else (1, False)


def _joined(samples: Sequence[Batch]) -> Batch:
    if len(samples) == 1:
        return samples[0]
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def _with_batch_axis(
    arrays: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: str, *, free: bool
) -> Batch:
    """The arrays of one sample, checked, with the batch axis put in front of those that lack it."""
    check_names(arrays, specs.values(), where)
    sample = {}
    for name, spec in specs.items():
        array = np.asarray(arrays[name])
        if spec.shape is not None and array.ndim == len(spec.shape) - 1:
            array = array[None]
        sample[name] = fit_array(array, _free(spec) if free else spec, where)
    return sample


# -------------------------------------------------------------------------------------- Python functions


def load_function(spec: str, default: str) -> tuple[Callable[..., Any], str]:
    """Return the function that ``FILE.py:FUNCTION`` names, and what errors call it. The file is executed.

    Args:
        spec: as above; ``FILE.py`` alone means its function ``default``.
        default: see there.

    Raises:
        UsageError: there is no such file or function, or the file fails.
    """
    file, _, name = spec.rpartition(":") if ".py:" in spec else (spec, "", default)
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file} does not exist; give FILE.py:FUNCTION")
    function = getattr(_load_module(path), name or default, None)
    where = f"{path.name}:{name or default}"
    if not callable(function):
        raise UsageError(f"{where}: no such function; define {name or default}() in {path.name}")
    return function, where


def _from_function(path: Path, name: str, specs: Mapping[str, TensorSpec]) -> Batches:
    function, where = load_function(f"{path}:{name}", name)

    def batches() -> Iterator[Batch]:
        for number, item in enumerate(_items(function, where)):
            place = f"{where}, item {number}"
            if not isinstance(item, Mapping):
                raise UsageError(
                    f"{place}: got {type(item).__name__}; yield a dictionary of arrays by input name"
                )
            yield fit_batch(_with_batch_axis(item, specs, place, free=False), specs, place)

    return batches


def _items(function: Callable[[], Iterable[object]], where: str) -> Iterator[object]:
    try:
        yield from function()
    except (
        Exception,
        SystemExit,
    ) as error:  # a script that calls sys.exit must not end us, and without a word
        text = " ".join(str(error).split())
        raise UsageError(
            f"{where} failed: {type(error).__name__}: {text}; run it by itself to see why"
        ) from error


def _load_module(path: Path) -> ModuleType:
    module_spec = importlib.util.spec_from_file_location(f"sparsecc_user_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"{path.name} cannot be imported: {type(error).__name__}: {text}; run it by itself to see why"
        ) from error
    return module


def limited(batches: Batches, specs: Mapping[str, TensorSpec], num_samples: int | None) -> Batches:
    """The batches up to the one in which the number of samples reaches ``num_samples``."""
    if num_samples is None:
        return batches
    counted = next((name for name, spec in specs.items() if _counts_samples(spec)), None)

    def first() -> Iterator[Batch]:
        seen = 0
        for batch in batches():
            yield batch
            seen += 1 if counted is None else len(batch[counted])
            if seen >= num_samples:
                return

    return first
