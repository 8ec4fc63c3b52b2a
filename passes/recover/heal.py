"""The pass ``heal``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from sparsecc.errors import SpecError, UsageError
from sparsecc.heal import require_torch
from sparsecc.ir import Model
from sparsecc.passes.recover.base import change_numbers, reference_of
from sparsecc.passes.recover.lineage import counterpart
from sparsecc.pm import Pass, PassContext, PassReport

if TYPE_CHECKING:
    from sparsecc.heal.training import Healed, Settings

__all__ = ["Heal"]


@dataclass(frozen=True)
class Heal(Pass):
    """Train what pruning left so that the model computes what the dense one computes; no labels.

    Adam on the calibration inputs minimises the relative squared error of the internal states at the borders of
    blocks and of the outputs against the dense model (the model before the first lossy pass, or the reference that
    was given). Masks, shapes and factors stay: zeros of weights stay zeros. Each calibration batch is one step; part
    of them is held out, and what did best on it is kept, or the model as it was. Where one input is named ``mask`` or
    ``..._mask`` and holds zeros and ones per sample and position, positions of zeros do not count.

    Needs PyTorch (``pip install 'sparsecc[heal]'``, a CPU build is enough) and runs the graph with it, so it must
    come before ``quantize`` and ``lower-sparse``.

    Changes: values of weights, biases and gains of normalisations, never the graph.
    Refuses: operators that have no differentiable form here; the message names them.

    Sample: ``heal{steps=1500 learning-rate=0.0015 checkpoint=heal.ckpt}``

    Attributes:
        steps: batches to train on; the data are gone through as often as that takes.
        learning_rate: of Adam at its peak; it falls linearly to zero.
        gradual: share of the steps over which the pruned weights fade out instead of being gone at once; what is
            kept then starts from the dense weights.
        holdout: share of the calibration batches that is held out.
        kl: weight of the KL divergence of the outputs, if they are logits along their last axis.
        patience: stop after so many of the 25 evaluations without improvement.
        checkpoint: file to write every minute and to resume from; empty for none.
        device: ``auto`` takes CUDA if PyTorch has it; both models run there.
        precision: of products while training; ``bfloat16`` is twice as fast on processors that multiply it, and as
            slow as it gets on others.
    """

    name: ClassVar[str] = "heal"
    requires_calibration: ClassVar[bool] = True
    lossless: ClassVar[bool] = False
    recovers: ClassVar[bool] = True

    steps: int = 500
    learning_rate: float = 1e-3
    gradual: float = 0.0
    holdout: float = 0.1
    kl: float = 0.0
    patience: int = 5
    checkpoint: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value, low, high in (
            ("steps", self.steps, 1, np.inf),
            ("patience", self.patience, 1, np.inf),
            ("kl", self.kl, 0, np.inf),
            ("gradual", self.gradual, 0, 0.9),
            ("holdout", self.holdout, 0, 0.5),
        ):
            if not low <= value <= high:
                raise SpecError(f"{self.name}: {option} must be from {low} to {high}, got {value:g}")
        if not 0 < self.learning_rate < 1:
            raise SpecError(f"{self.name}: learning-rate must be between 0 and 1, got {self.learning_rate:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Train the model and keep the better of before and after.

        Raises:
            MissingExtraError: PyTorch is not installed.
            UnsupportedModelError: PyTorch cannot run an operator of the model; all such are named.
            UsageError: there is no calibration data, or the checkpoint is of another run.
        """
        report = PassReport(self.name)
        calibration = ctx.calibration_for(self.name)
        reference = reference_of(model, ctx, report)
        if reference is None:
            return report
        require_torch()
        from sparsecc.heal.training import heal

        beside = counterpart(model, reference, ctx.lineage)
        if isinstance(beside, Model):
            reference = beside  # where a block is gone, what stands for its output has another name
        healed = heal(model, reference, list(calibration), self._settings(ctx), ctx.progress)
        report.note(
            f"relative squared error of {healed.states} block states and the outputs, on held-out inputs: "
            f"{healed.before:.4g} -> {healed.after:.4g} after {healed.steps} steps"
        )
        if not healed.arrays:
            report.note("training did not improve the model on held-out inputs: it stays as it was")
        _write(healed, report)
        ctx.recovered = ctx.recovered or bool(report.changed)
        return report

    def _settings(self, ctx: PassContext) -> Settings:
        from sparsecc.heal.training import Settings

        checkpoint = Path(self.checkpoint) if self.checkpoint else None
        if checkpoint is not None and not checkpoint.parent.is_dir():
            raise UsageError(
                f"{checkpoint}: no such folder for the checkpoint; create it or give another path"
            )
        return Settings(
            steps=self.steps,
            learning_rate=self.learning_rate,
            gradual=self.gradual,
            holdout=self.holdout,
            kl=self.kl,
            patience=self.patience,
            seed=ctx.seed,
            device=self.device,
            threads=ctx.threads,
            checkpoint=checkpoint,
            precision=self.precision,
        )


def _write(healed: Healed, report: PassReport) -> None:
    for parameter, array in healed.arrays.items():
        before = parameter.numpy()
        parameter.replace(array)
        after = parameter.numpy()
        if parameter.is_weight or not np.array_equal(before, after):
            report.change(
                parameter.name,
                "trained towards the dense model",
                **change_numbers(before, after),
                error_before=healed.before,
                error_after=healed.after,
            )
