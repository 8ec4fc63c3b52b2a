"""Training of a pruned model towards the states of the dense one, with PyTorch.

The loss is the relative squared error of the internal states at the borders of blocks and of the outputs, by the
inputs alone: no labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecc.calib import Arrays
from sparsecc.errors import ModelError, UsageError
from sparsecc.heal.graph import TorchGraph
from sparsecc.heal.loss import attended, kl_divergence, relative_error
from sparsecc.heal.operators import Tensor
from sparsecc.heal.parameters import Parameter, trainable
from sparsecc.heal.targets import Targets
from sparsecc.ir import Model
from sparsecc.ir.replacing import replacing
from sparsecc.pm import Progress

__all__ = ["Healed", "Settings", "heal"]

#: Seconds between two writes of the checkpoint.
_CHECKPOINT_SECONDS = 60.0

#: Evaluations on the held-out batches over the whole run.
_EVALUATIONS = 25

#: Share of the steps over which the learning rate rises to its full value.
_WARM_UP = 0.02

#: Bytes of the dense model's states that are kept.
_TARGET_BYTES = 2 << 30


@dataclass(frozen=True)
class Settings:
    """How to train; the pass ``heal`` documents the fields it shares with it.

    Attributes:
        steps: batches to train on.
        learning_rate: of Adam at its peak; it falls linearly to zero.
        gradual: share of the steps over which the removed weights fade, 0 for at once.
        holdout: share of the batches that is only evaluated on.
        kl: weight of the KL divergence of the outputs, taken as logits along their last axis.
        patience: evaluations without improvement before training stops.
        seed: of the order of the batches.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: of PyTorch, 0 for all cores.
        checkpoint: file to resume from and to write now and then, or None.
        precision: ``float32`` or ``bfloat16``, of products while training; weights and judgement are float32.
    """

    steps: int
    learning_rate: float
    gradual: float
    holdout: float
    kl: float
    patience: int
    seed: int
    device: str
    threads: int
    checkpoint: Path | None
    precision: str


@dataclass(frozen=True)
class Healed:
    """What training did.

    Attributes:
        before: loss on the held-out batches before training.
        after: the smallest since; not below ``before`` if nothing was gained.
        arrays: new constants of that moment by parameter; empty if nothing was gained.
        steps: steps made.
        states: number of internal states matched.
    """

    before: float
    after: float
    arrays: Mapping[Parameter, NDArray[Any]]
    steps: int
    states: int


def heal(
    model: Model, reference: Model, batches: Sequence[Arrays], settings: Settings, progress: Progress
) -> Healed:
    """Train the constants of ``model`` towards ``reference`` and return the best found; ``model`` stays.

    The result is the same for the same arguments, also when it was interrupted and resumed from its checkpoint.

    Raises:
        UsageError: there are fewer than two batches, the checkpoint is of another run, or the device is missing.
        UnsupportedModelError: PyTorch cannot run an operator of the model; all such are named.
    """
    if len(batches) < 2:
        raise UsageError(
            f"heal needs 2 calibration batches or more, one of them to judge on, got {len(batches)}; give more samples"
        )
    before = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return _Training(model, reference, batches, settings).run(progress)
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> str:
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UsageError(
            "PyTorch finds no CUDA device: use device=cpu, or install a build of PyTorch with CUDA"
        )
    return name


class _Weight:
    """One parameter: the tensor that is trained, its mask, and what fades of it."""

    def __init__(
        self, parameter: Parameter, tensor: Tensor, mask: Tensor | None, faded: Tensor | None
    ) -> None:
        self.parameter = parameter
        self.tensor = tensor.requires_grad_(True)
        self.mask = mask
        self.faded = faded

    def effective(self, fade: float) -> Tensor:
        """The constant while ``fade`` of the removed weights is still there."""
        return self.tensor if self.faded is None or not fade else self.tensor + fade * self.faded


class _Training:
    def __init__(self, model: Model, reference: Model, batches: Sequence[Arrays], settings: Settings) -> None:
        self.settings = settings
        self.batches = batches
        self.graph = TorchGraph(model, _device(settings.device))
        self.targets = Targets(
            model,
            reference,
            self.graph,
            batches,
            byte_budget=_TARGET_BYTES,
            narrow=settings.precision == "bfloat16",
        )
        self.weights = self._weights(model, reference)
        self.optimizer = torch.optim.Adam(
            [weight.tensor for weight in self.weights], lr=settings.learning_rate, fused=True
        )
        order = np.random.default_rng([settings.seed, 0]).permutation(len(batches))
        held = min(max(1, round(settings.holdout * len(batches))), len(batches) - 1)
        self.held, self.train = sorted(order[:held].tolist()), order[held:]
        self.step = 0
        self.stale = 0
        self.before = math.inf
        self.best = math.inf
        self.kept: list[Tensor] = []
        self.digest = self._digest(model, reference)

    def _weights(self, model: Model, reference: Model) -> list[_Weight]:
        own = {parameter.name: parameter.numpy() for parameter in trainable(reference)}
        weights = []
        for parameter in trainable(model):
            array, kept = parameter.numpy(), parameter.mask()
            dense = own.get(parameter.name)
            faded = None
            if (
                self.settings.gradual
                and kept is not None
                and dense is not None
                and dense.shape == array.shape
            ):
                # What is pruned fades out of the dense weights: those kept start as they were there.
                faded = self.graph.tensor(np.where(kept, 0, dense).astype(dense.dtype))
                array = np.where(kept, dense, 0).astype(array.dtype)
            mask = None if kept is None else self.graph.tensor(kept)
            weights.append(_Weight(parameter, self.graph.tensor(array), mask, faded))
        return weights

    def run(self, progress: Progress) -> Healed:
        settings = self.settings
        self._start()
        every = max(1, settings.steps // _EVALUATIONS)
        written = time.monotonic()
        while self.step < settings.steps and self.stale < settings.patience:
            progress("healing", self.step, settings.steps)
            self._train_step()
            self.step += 1
            if self.step % every == 0 or self.step == settings.steps:
                self._evaluate()
            if time.monotonic() - written > _CHECKPOINT_SECONDS:
                self._save()
                written = time.monotonic()
        self._save()
        progress("healing", settings.steps, settings.steps)
        return self._result()

    def _start(self) -> None:
        path = self.settings.checkpoint
        if path is not None and path.exists():
            self._resume(path)
            return
        if not self.settings.gradual:
            self.before = self.best = self._held_out()
            return
        trained = [weight.tensor.detach().clone() for weight in self.weights]
        self._put([self.graph.tensor(weight.parameter.numpy()) for weight in self.weights])
        self.before = self.best = self._held_out()
        self._put(trained)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, tensor in zip(self.weights, tensors, strict=True):
                weight.tensor.copy_(tensor)

    def _fade(self) -> float:
        """Share of the removed weights that is still there: it falls fast at first, slowly at last."""
        over = self.settings.gradual * self.settings.steps
        return max(0.0, 1 - self.step / over) ** 3 if over else 0.0

    def _rate(self) -> float:
        share = self.step / self.settings.steps
        return (
            self.settings.learning_rate * min(1.0, (share + 1 / self.settings.steps) / _WARM_UP) * (1 - share)
        )

    def _train_step(self) -> None:
        epoch, place = divmod(self.step, len(self.train))
        order = np.random.default_rng([self.settings.seed, 1, epoch]).permutation(self.train)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        self.optimizer.zero_grad(set_to_none=True)
        narrow = self.settings.precision == "bfloat16"
        with torch.autocast(self.graph.device, torch.bfloat16, enabled=narrow):
            loss = self._loss(int(order[place]), self._fade())
        if not torch.isfinite(loss):
            raise ModelError(
                f"healing diverged at step {self.step}: the loss is not finite; use a smaller learning-rate"
            )
        if not loss.requires_grad:
            raise UsageError("no weight reaches the states and outputs to be matched: leave heal out")
        loss.backward()
        for weight in self.weights:
            if weight.mask is not None and weight.tensor.grad is not None:
                weight.tensor.grad.mul_(weight.mask)
        self.optimizer.step()

    def _loss(self, number: int, fade: float, *, exact: bool = False) -> Tensor:
        for weight in self.weights:
            self.graph.constants[weight.parameter.value] = weight.effective(fade)
        found = self.graph.run(self.batches[number], self.targets.names)
        wanted = self.targets.of(number, exact=exact)
        mask = attended(self.batches[number])
        counted = None if mask is None else self.graph.tensor(mask)
        loss = torch.stack([relative_error(found[name], wanted[name], counted) for name in wanted]).mean()
        if self.settings.kl:
            pairs = [(found[name], wanted[name]) for name in self.targets.outputs]
            loss = loss + self.settings.kl * torch.stack([kl_divergence(*pair) for pair in pairs]).mean()
        return loss

    def _held_out(self) -> float:
        with torch.no_grad():
            return float(np.mean([float(self._loss(number, 0.0, exact=True)) for number in self.held]))

    def _evaluate(self) -> None:
        if self._fade():
            return  # not yet the model that will be written
        loss = self._held_out()
        if loss < self.best:
            self.best, self.stale = loss, 0
            self.kept = [weight.tensor.detach().clone() for weight in self.weights]
        else:
            self.stale += 1

    def _result(self) -> Healed:
        arrays = {
            weight.parameter: tensor.cpu().numpy()
            for weight, tensor in zip(self.weights, self.kept, strict=False)
        }
        return Healed(self.before, self.best, arrays, self.step, len(self.targets.states))

    # checkpoints

    def _digest(self, model: Model, reference: Model) -> str:
        """Of everything the result depends on."""
        digest = hashlib.sha256(f"{model.fingerprint()} {reference.fingerprint()}".encode())
        options = dataclasses.replace(self.settings, checkpoint=None, threads=0)
        digest.update(repr(options).encode())
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
                digest.update(np.ascontiguousarray(batch[name]).tobytes())
        return digest.hexdigest()

    def _save(self) -> None:
        path = self.settings.checkpoint
        if path is None:
            return
        document = {
            "digest": self.digest,
            "numbers": [self.step, self.stale, self.before, self.best],
            "weights": [weight.tensor.detach() for weight in self.weights],
            "kept": self.kept,
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            with replacing(path) as stream:
                torch.save(document, stream)
        except OSError as error:
            raise UsageError(
                f"{path}: the checkpoint cannot be written ({error.strerror}); give another path"
            ) from error

    def _resume(self, path: Path) -> None:
        try:
            document = torch.load(path, map_location=self.graph.device, weights_only=True)
            digest = document["digest"]
        except Exception as error:  # torch raises many kinds on a file that is not its own
            raise UsageError(f"{path}: not a checkpoint of heal; delete it or give another path") from error
        if digest != self.digest:
            raise UsageError(
                f"{path}: a checkpoint of another model, other data or other options; delete it or give another path"
            )
        step, stale, self.before, self.best = document["numbers"]
        self.step, self.stale, self.kept = int(step), int(stale), document["kept"]
        self._put(document["weights"])
        self.optimizer.load_state_dict(document["optimizer"])
