"""What is around a run: target, calibration, costs, seed, overrides, instruments. Passed, never global."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError, UsageError
from sparsecc.pm.lineage import Lineage
from sparsecc.pm.trial import Trial
from sparsecc.sparse import Layout, Pattern
from sparsecc.target import Target

if TYPE_CHECKING:
    from sparsecc.ir import Model, Site
    from sparsecc.pm.base import Pass
    from sparsecc.pm.instruments import Instrument

__all__ = [
    "CalibrationSource",
    "CostSource",
    "HistogramLike",
    "MomentsLike",
    "PassContext",
    "Progress",
    "Requantizer",
    "RewriteCost",
    "SiteOverride",
    "SiteSettings",
    "no_progress",
]


Found = TypeVar("Found")


class Progress(Protocol):
    """Told how far long work is; a command line draws a bar, a library ignores it."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps are finished; ``done == total`` ends the bar."""


def no_progress(description: str, done: int, total: int) -> None:
    """Ignore progress."""


class CalibrationSource(Protocol):
    """Statistics of what each site reads, measured on calibration inputs.

    ``X`` is the matrix of reduction vectors a site sees: rows of its input for MatMul and Gemm, unfolded
    patches (order cin, kh, kw) for Conv, hidden states for the recurrent weight of LSTM and GRU.
    """

    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        """Start a run over the inputs: batches of arrays by input name."""

    def mean_square(self, model: Model, sites: Sequence[Site]) -> Mapping[str, NDArray[np.float64]]:
        """Return by site name the mean of ``X**2`` by column: ``[K]``, ``[groups, K]`` for a grouped Conv.

        A site that cannot be measured (inside a subgraph, never executed) is left out.
        """

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Name and reason of each site that the last statistics left out."""

    def histograms(self, model: Model, names: Sequence[str]) -> Mapping[str, HistogramLike]:
        """Return by name how the values of tensors of the main graph are distributed."""

    def gram(self, model: Model, sites: Sequence[Site]) -> Mapping[str, NDArray[np.float64]]:
        """Return by site name the mean of ``X^T X``: ``[K, K]``, or ``[groups, K, K]`` for a grouped Conv."""

    def fingerprint(self) -> str:
        """Return a digest of all inputs, the same for equal ones."""

    def walk(
        self, model: Model, sites: Sequence[Site], reference: Model | None = None
    ) -> Iterator[Mapping[str, MomentsLike]]:
        """Yield moments of ``sites`` in steps, front to back, measured on ``model`` as it is when a step starts.

        Weights of the sites of a step may be changed before the next one is taken.
        """


class MomentsLike(Protocol):
    """Means over the rows ``Xh`` that a site reads, and over the rows ``X`` that it reads in a reference."""

    @property
    def gram(self) -> NDArray[np.float64]:
        """``Xh^T Xh``: ``[K, K]``, or ``[groups, K, K]`` for a grouped Conv."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """``Xh``: ``[K]`` or ``[groups, K]``."""

    @property
    def cross(self) -> NDArray[np.float64]:
        """``X^T Xh``, of the shape of ``gram``; without a reference ``gram`` itself."""

    @property
    def reference_mean(self) -> NDArray[np.float64]:
        """``X``, of the shape of ``mean``."""

    @property
    def reference_gram(self) -> NDArray[np.float64] | None:
        """``X^T X``; without a reference ``gram`` itself; None for wide inputs, where it is not worth its memory."""

    @property
    def rows(self) -> int:
        """Number of rows."""


class HistogramLike(Protocol):
    """Counts of values in equal bins from ``low`` to ``high``, ``zeros`` of them exactly zero."""

    @property
    def low(self) -> float:
        """Smallest value."""

    @property
    def high(self) -> float:
        """Largest value."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Values per bin."""

    @property
    def zeros(self) -> int:
        """How many values are exactly zero."""


class Requantizer(Protocol):
    """What quantised the model, so that fewer sites of it can be quantised.

    Attributes:
        base: the model before it, not to be changed.
        fingerprint: of the model after it.
    """

    base: Model
    fingerprint: str

    def apply(self, model: Model, sites: Collection[str]) -> object:
        """Quantise the named sites of ``model``, a copy of ``base`` whose weights may differ, in place."""


class CostSource(Protocol):
    """Measured times on the target, for the passes that decide."""

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> Mapping[str, float]:
        """Return the median milliseconds of the site alone, under ``dense`` and the text of each layout.

        Args:
            model: where the site is.
            site: in the main graph or in a body in it.
            layouts: to time; those that are not int8 are taken of the site in ``base`` if that is given.
            base: the model before it was quantised, whose site of the same name is ``dense`` then.

        Raises:
            MeasurementError: the site cannot be timed; the message says why.
        """

    def recurrent_times_ms(
        self, model: Model, site: Site, layouts: Sequence[tuple[Layout, Layout]]
    ) -> Mapping[str, float]:
        """As ``site_times_ms`` for an LSTM or GRU whose W is ``site``: layouts of (W, R), ``W+R`` if they differ."""

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        """Return (time of the whole model with these marked sites lowered) / (time with none lowered).

        With ``quantization`` only the sites marked as int8 among ``sites`` are quantised at all.
        """

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        """Return (time of ``candidate``) / (time of ``model``), which takes the same inputs."""

    def rewritten(
        self, model: Model, site: Site, rewrite: Callable[[Model, Site], None], key: str, *, custom_ops: bool
    ) -> RewriteCost:
        """Return what one site costs alone, and what it costs once ``rewrite`` has put other nodes in its place.

        Products with many zeros count in the form that is fastest for them.

        Args:
            model: where the site is; not changed.
            site: in the main graph.
            rewrite: changes the model and site it is given.
            key: says all that the time after ``rewrite`` depends on beside the site.
            custom_ops: whether sparse operators may stand for products with many zeros.

        Raises:
            MeasurementError: the site cannot be timed; the message says why.
        """

    def rewritten_together(
        self,
        model: Model,
        sites: Sequence[Site],
        rewrite: Callable[[Model, Sequence[Site]], None],
        key: str,
        *,
        custom_ops: bool,
    ) -> RewriteCost:
        """As ``rewritten`` for several sites that read the same value, each with its activation."""


@dataclass(frozen=True)
class RewriteCost:
    """Median milliseconds of a site, or several, and bytes of its constants, dense and rewritten.

    ``source`` says whether times are ``measured`` or ``interpolated``; the ``spread`` of both, as a share, is that of
    an interval that holds nine of ten; 0 where it is not known.
    """

    dense_ms: float
    ms: float
    dense_bytes: int
    bytes: int
    source: str = "measured"
    spread: float = 0.0


@dataclass(frozen=True)
class SiteOverride:
    """Settings for the sites whose name matches; fields left ``None`` keep what the pass says.

    Attributes:
        match: glob on the site name, or ``re:`` and a regular expression searched in it.
        pattern: pattern to prune to.
        sparsity: fraction to remove, in [0, 1).
        skip: leave the site alone.
        param_ratio: share of its numbers that a factorised site may store, in (0, 1]; 1 leaves it dense.
    """

    match: str
    pattern: Pattern | None = None
    sparsity: float | None = None
    skip: bool = False
    param_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise SpecError(f"override '{self.match}': sparsity must be in [0, 1), got {self.sparsity}")
        if self.param_ratio is not None and not 0 < self.param_ratio <= 1:
            raise SpecError(f"override '{self.match}': param_ratio must be in (0, 1], got {self.param_ratio}")
        if not self.skip and (self.pattern, self.sparsity, self.param_ratio) == (None, None, None):
            raise SpecError(
                f"override '{self.match}' changes nothing; give pattern, sparsity, param_ratio or skip = true"
            )
        self.applies_to("")  # a bad regular expression is refused here, before the slow part

    def applies_to(self, name: str) -> bool:
        """Whether ``match`` selects the site of this name."""
        from sparsecc.ir import name_matches

        return name_matches(self.match, name)


def _implies_sparsity(pattern: Pattern | None) -> bool:
    return pattern is not None and pattern.kind in ("nm", "dense")


@dataclass(frozen=True)
class SiteSettings:
    """What a pass should do with one site, after overrides."""

    pattern: Pattern | None
    sparsity: float | None
    skip: bool = False
    param_ratio: float | None = None


@dataclass
class PassContext:
    """Everything a pass may use beside the model and its own options.

    Attributes:
        seed: root of all randomness; use ``rng``.
        calibration: statistics source, or ``None`` when the caller gave no data.
        costs: measured times, or ``None``.
        target: the machine the model is for.
        threads: threads the model will run on, 0 for all cores of the target.
        overrides: per-site settings; where two match, the later wins field by field.
        instruments: called around every pass.
        progress: told how far long work is.
        before_lossy: the model as it was before the first lossy pass of the run; the pipeline keeps it.
        quantization: what the last ``quantize`` of the run did; the pass keeps it.
        reference: the dense model that recovery passes aim at, where the model was pruned before the run.
        protected: by site name the weights ``[N, K]`` that must stay and stay exact; ``protect`` finds them.
        lineage: what is left of the model of which parts were removed in this run; those who remove keep it.
        recovered: a recovery pass has fitted the model around what was pruned; the pass says so.
        unpaid: sites that their zeros do not make faster, and whether ``restore-dense`` gave them their weights back.
        trial: what this run has in common with others that it is compared with; None: its result is to be kept.
    """

    seed: int = 0
    calibration: CalibrationSource | None = None
    costs: CostSource | None = None
    target: Target = field(default_factory=Target)
    threads: int = 0
    overrides: tuple[SiteOverride, ...] = ()
    instruments: list[Instrument] = field(default_factory=list)
    progress: Progress = no_progress
    before_lossy: Model | None = None
    quantization: Requantizer | None = None
    reference: Model | None = None
    protected: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    lineage: Lineage | None = None
    recovered: bool = False
    unpaid: dict[str, bool] = field(default_factory=dict)
    trial: Trial | None = None

    def once(self, key: Hashable, make: Callable[[], Found]) -> Found:
        """Return what ``make`` gives; in a trial it is called once for all runs, see ``Trial.once``."""
        return make() if self.trial is None else self.trial.once(key, make)

    @property
    def dense(self) -> Model | None:
        """The model that recovery passes aim at: ``reference``, else the one before the first lossy pass."""
        return self.reference if self.reference is not None else self.before_lossy

    def refuse_protected(self, name: str) -> None:
        """Refuse the pass ``name``, which moves or removes channels, where weights are protected by their places.

        Raises:
            UsageError: ``protect`` has run.
        """
        if self.protected:
            raise UsageError(f"{name} moves the weights that protect has found: put protect behind it")

    def calibration_for(self, name: str) -> CalibrationSource:
        """Return the calibration source, which the pass ``name`` cannot do without.

        Raises:
            UsageError: there is none.
        """
        if self.calibration is None:
            raise UsageError(
                f"{name} needs calibration inputs; give --calibration-data PATH "
                "(or --calibration-data synthetic for random ones)"
            )
        return self.calibration

    def settings_for(self, site: Site | str, pass_: Pass) -> SiteSettings:
        """Return pattern, sparsity and parameter ratio of ``pass_`` for this site after all matching overrides.

        An override to a pattern that implies its own sparsity (N:M, dense) drops the sparsity of the pass.

        Raises:
            SpecError: an override asks a sparsity of a site whose pattern implies another.
        """
        name = site if isinstance(site, str) else site.name
        pattern: Pattern | None = getattr(pass_, "pattern", None)
        sparsity: float | None = getattr(pass_, "sparsity", None)
        param_ratio: float | None = getattr(pass_, "param_ratio", None)
        skip = False
        for override in self.overrides:
            if not override.applies_to(name):
                continue
            if override.pattern is not None:
                pattern = override.pattern
                sparsity = None if _implies_sparsity(pattern) else sparsity
            if override.sparsity is not None:
                sparsity = override.sparsity
                if _implies_sparsity(pattern):
                    raise SpecError(
                        f"override '{override.match}' asks sparsity {sparsity} of '{name}', whose pattern "
                        f"{pattern} implies its own; give the override another pattern or no sparsity"
                    )
            if override.param_ratio is not None:
                param_ratio = override.param_ratio
            skip = override.skip
        return SiteSettings(pattern, sparsity, skip, param_ratio)

    def rng(self, *key: str) -> np.random.Generator:
        """Return the generator of this seed for this key, the same whatever ran before."""
        digest = hashlib.sha256("\x00".join(key).encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])
