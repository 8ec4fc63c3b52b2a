"""Products with small tensors one axis after another in the place of one product: tensor trains of matrices (MPO)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.tensor_train_fit import Modes, affordable_ranks, fit_train, near_factors
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["FactorTensorTrain", "TensorTrain"]

#: Conjugate gradient steps for one core, each time a sweep comes to it.
_STEPS = 6


@dataclass(frozen=True)
class TensorTrain(Form):
    """A product of cores, one for each pair of axes of outputs and inputs.

    Attributes:
        cores: ``[r, n, k, s]`` each; the first has ``r = 1``, the last ``s = 1``.
    """

    cores: tuple[NDArray[Any], ...]

    @property
    def modes(self) -> Modes:
        """The axes."""
        return Modes(tuple(core.shape[1] for core in self.cores), tuple(core.shape[2] for core in self.cores))

    def dense(self) -> Matrix:
        """Return the product."""
        return self.modes.product([core.astype(np.float64) for core in self.cores])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The cores."""
        return {f"core{at}": core for at, core in enumerate(self.cores, 1)}

    def astype(self, dtype: np.dtype[Any]) -> Self:
        """Return it with its cores rounded to ``dtype``."""
        return replace(self, cores=tuple(core.astype(dtype) for core in self.cores))

    @property
    def macs(self) -> int:
        """Multiplications per row: each core meets all axes of outputs before it and of inputs still to come."""
        return sum(done * left * core.size for core, done, left in self._steps())

    def describe(self) -> str:
        """Axes and ranks."""
        rows, columns = (" x ".join(map(str, axes)) for axes in (self.modes.rows, self.modes.columns))
        ranks = ", ".join(str(core.shape[3]) for core in self.cores[:-1])
        return f"tensor train {rows} by {columns}, rank {ranks}"

    def emit(self, chain: Chain) -> None:
        """Add the products with the cores, last first, and what moves the next axis of inputs to the end."""
        value = chain.source
        for at, (core, done, left) in enumerate(self._steps()):
            before, outputs, inputs, behind = core.shape
            matrix = core.transpose(1, 0, 2, 3).reshape(outputs * before, inputs * behind)
            value = chain.reshape(value, [done * left, inputs * behind], f"cut{at}")
            value = chain.matmul(value, matrix, f"core{at}")
            if left > 1:
                value = chain.reshape(value, [done, left, outputs, before], f"split{at}")
                value = chain.transpose(value, [0, 2, 1, 3], f"turn{at}")
        chain.finish(chain.reshape(value, [math.prod(self.modes.rows)], "joined"))

    def _steps(self) -> Iterator[tuple[NDArray[Any], int, int]]:
        """Yield the cores, last first, with how many outputs are done before each and how many inputs are left."""
        for at in reversed(range(len(self.cores))):
            yield self.cores[at], math.prod(self.modes.rows[at + 1 :]), math.prod(self.modes.columns[:at])


@dataclass(frozen=True)
class FactorTensorTrain(CalibratedFactorPass):
    """Replace weights by tensor trains of matrices (matrix product operators), fitted to the outputs.

    A weight of ``n1 .. nd`` outputs and ``k1 .. kd`` inputs becomes d cores (Oseledets 2011, Novikov et al. 2015). They
    start as the TT-SVD of the weight whitened with a Kronecker product near the second moments of the inputs, and are
    improved one after another with the second moments as they are. It is a form for few numbers, not for speed: a
    rank of more than about half of n1 takes more multiplications than the weight, so most sites are left alone unless
    ``keep-slower`` says that only size counts.

    Changes: one MatMul per core, with Reshape and Transpose between; standard operators only.
    Skips with the reason: convolutions, sizes without ``cores`` factors of 2 or more, inputs of unknown rank, sites
    whose bytes or measured time would not fall, weights shared by nodes, quantised, recurrent or tiny ones, NaN or
    infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-tensor-train{param-ratio=0.3 keep-slower=true cores=3}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that its cores may hold, in (0, 1].
        multiple: ranks are multiples of it, or full.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        cores: how many, 2 or 3.
        sweeps: over the cores, at most; 0 leaves the whitened TT-SVD.
    """

    name: ClassVar[str] = "factor-tensor-train"

    cores: int = 2
    sweeps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cores not in (2, 3):
            raise SpecError(f"{self.name}: cores must be 2 or 3, got {self.cores}")
        self.require_at_least(sweeps=0)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> TensorTrain | str:
        """Return random cores of the largest ranks that ``numbers`` allow."""
        if site.op == "Conv":
            return "it is a convolution: tensor trains are for products"
        if site.op == "MatMul" and (site.input is None or site.input.shape is None):
            return "the rank of its input is not known"
        rows, columns = (near_factors(size, self.cores) for size in site.shape)
        if rows is None or columns is None:
            size = site.shape[0 if rows is None else 1]
            return f"{size} has no {self.cores} factors of 2 or more"
        modes = Modes(rows[::-1], columns)
        ranks = affordable_ranks(modes, numbers, self.multiple)
        if ranks is None:
            whole = " x ".join(map(str, site.shape))
            return f"{numbers} numbers do not hold cores of rank {self.multiple} of {whole} weights"
        ends = (1, *ranks, 1)
        shapes = zip(ends, modes.rows, modes.columns, ends[1:], strict=False)
        return TensorTrain(tuple(rng.standard_normal(shape) for shape in shapes))

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> TensorTrain:
        """Return the cores with the ranks that ``outline`` has."""
        assert isinstance(outline, TensorTrain), "made by outline"
        ranks = [core.shape[3] for core in outline.cores[:-1]]
        cores, _ = fit_train(problem.target, problem.gram, outline.modes, ranks, self.sweeps, _STEPS)
        return TensorTrain(tuple(cores))
