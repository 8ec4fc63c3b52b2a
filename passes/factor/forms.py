"""What a factorised weight is: arrays that stand for a matrix, and the nodes that multiply with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix

if TYPE_CHECKING:
    from sparsecc.passes.factor.chain import Chain

__all__ = ["Form"]


@dataclass(frozen=True)
class Form(ABC):
    """A weight ``[N, K]`` as something smaller. Fields that are arrays are what the graph stores."""

    @abstractmethod
    def dense(self) -> Matrix:
        """Return the weight that it stands for, float64 ``[N, K]``."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiplications per row of x; of a convolution, per position of its output."""

    @abstractmethod
    def describe(self) -> str:
        """Return its name and sizes in a few words."""

    @abstractmethod
    def emit(self, chain: Chain) -> None:
        """Add the nodes that compute it to ``chain`` and finish that."""

    @property
    def numbers(self) -> int:
        """Values that it stores; zeros of sparse parts do not count."""
        return sum(array.size for array in self.arrays().values())

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Return what its constants take in a file.

        Args:
            itemsize: of one value.
            custom_ops: whether sparse operators may store sparse parts without their zeros.
        """
        return self.numbers * itemsize

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by the name of their field."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def astype(self, dtype: np.dtype[Any]) -> Self:
        """Return it with floating-point values rounded to ``dtype``."""
        floats = {name: array for name, array in self.arrays().items() if array.dtype.kind not in "iub"}
        return replace(self, **{name: array.astype(dtype) for name, array in floats.items()})
