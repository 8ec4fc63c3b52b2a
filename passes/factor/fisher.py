"""Squared gradients of a model's loss, which its caller has computed, from a file of arrays."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import UsageError
from sparsecc.passes.factor.weighted import Importance
from sparsecc.passes.prune.gram import Matrix

__all__ = ["FisherFile"]

#: Share of the largest entry by which a matrix may differ from its transpose, or have negative eigenvalues: rounding.
_ROUNDING = 1e-4


class FisherFile:
    """An ``.npz`` with the importance of weights, by the names of sites.

    For a site ``S`` with a weight ``[N, K]`` it holds ``S`` ``[N, K]``, means of squared gradients, or ``S.rows``
    ``[N]``, their sums over each row, or both ``S.A`` ``[K, K]`` and ``S.B`` ``[N, N]``, whose Kronecker product stands
    for the Fisher information; these count before the others. Nothing in it is unpickled, and no array is read before
    its type and shape are known to be right.

    Args:
        path: the file.

    Raises:
        UsageError: it does not exist or is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise UsageError(f"fisher file '{path}' does not exist; make it with numpy.savez")
        try:
            with zipfile.ZipFile(self._path) as archive:
                self._names = {name.removesuffix(".npy") for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"{self._path.name}: cannot be read as an .npz ({error}); write it with numpy.savez"
            ) from error

    def refuse_unknown(self, sites: Iterable[str]) -> None:
        """Refuse a file that has nothing of any of ``sites``.

        Raises:
            UsageError: there is no array under the name of a site.
        """
        known = list(sites)
        if known and not any(self._keys(name) for name in known):
            raise UsageError(
                f"{self._path.name}: no array has the name of a site, such as '{known[0]}' or '{known[0]}.rows'; "
                f"it holds {', '.join(sorted(self._names)[:3]) or 'nothing'}"
            )

    def importance(self, site: str, shape: tuple[int, int]) -> Importance | str:
        """Return what the file says of a site with a weight of this shape, or why that is of no use.

        Raises:
            UsageError: an array has the wrong shape or type, holds NaN, infinities or negative squares, or a matrix is
                not symmetric and positive semi-definite.
        """
        rows, columns = shape
        keys = self._keys(site)
        if keys == [f"{site}.A", f"{site}.B"]:
            outputs = self._moments(f"{site}.B", rows)
            found = Importance(outputs, self._moments(f"{site}.A", columns))
            dead = not (np.diag(outputs).any() and found.inputs is not None and np.diag(found.inputs).any())
        elif keys:
            wanted = (rows, columns) if keys == [site] else (rows,)
            squares = self._read(keys[0], wanted)
            if (squares < 0).any():
                raise UsageError(f"{self._path.name}: '{keys[0]}' holds negative squares of gradients")
            found = Importance(squares.reshape(rows, -1).sum(1))
            dead = not found.outputs.any()
        else:
            return f"{self._path.name} holds neither '{site}.A' and '{site}.B' nor '{site}.rows' nor '{site}'"
        return f"all its gradients in {self._path.name} are 0" if dead else found

    def _keys(self, site: str) -> list[str]:
        """The arrays of a site that count; none if it has none."""
        for keys in ([f"{site}.A", f"{site}.B"], [f"{site}.rows"], [site]):
            if self._names.issuperset(keys):
                return keys
        return []

    def _moments(self, key: str, size: int) -> Matrix:
        """The matrix under ``key``, positive definite unless it is all zeros."""
        matrix = self._read(key, (size, size))
        largest = float(np.abs(matrix).max())
        if float(np.abs(matrix - matrix.T).max()) > _ROUNDING * largest:
            raise UsageError(f"{self._path.name}: '{key}' is not symmetric: give second moments")
        matrix = (matrix + matrix.T) / 2
        for ridge in (0.0, _ROUNDING * largest):  # the second for rounding, and where samples are few
            try:
                matrix.flat[:: size + 1] += ridge
                np.linalg.cholesky(matrix)
            except np.linalg.LinAlgError:
                continue
            return matrix
        if not largest:
            return matrix
        raise UsageError(f"{self._path.name}: '{key}' is not positive semi-definite: give second moments")

    def _read(self, key: str, wanted: tuple[int, ...]) -> NDArray[np.float64]:
        """The array under ``key``, finite numbers of shape ``wanted``."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                with archive.open(f"{key}.npy") as stream:
                    shape, dtype = _header(stream)
                if shape != wanted or dtype.kind != "f":
                    raise UsageError(
                        f"{self._path.name}: '{key}' is {dtype} {list(shape)}; give floating-point {list(wanted)}"
                    )
                with archive.open(f"{key}.npy") as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False).astype(np.float64)
        except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UsageError(
                f"{self._path.name}: '{key}' cannot be read as an array of plain numbers ({error}); write it with "
                "numpy.savez"
            ) from error
        if not np.isfinite(array).all():
            raise UsageError(f"{self._path.name}: '{key}' holds NaN or infinity: leave those samples out")
        return array


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array in a ``.npy`` file, without reading it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype
