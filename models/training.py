"""What the training scripts share: determinism, and pruning in blocks while a model trains.

Needs PyTorch. Nothing else in the repository does: the trained models are shipped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch

__all__ = ["GradualPruner", "block_mask", "make_deterministic"]


def make_deterministic(seed: int, threads: int) -> None:
    """Seed every generator and refuse operators whose result depends on the order of threads."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)


def block_mask(weight: torch.Tensor, rows: int, sparsity: float) -> torch.Tensor:
    """Keep the ``rows`` x 1 blocks of largest magnitude.

    Args:
        weight: Weight with the outputs first; the other axes count as one axis of inputs.
        rows: Consecutive outputs that are kept or dropped together; must divide the number of outputs.
        sparsity: Share of the blocks to drop.

    Returns:
        Mask of the shape of ``weight``, 1 where an entry is kept, of the same type.
    """
    blocks = weight.detach().reshape(weight.shape[0] // rows, rows, -1).abs().sum(1)
    drop = round(sparsity * blocks.numel())
    keep = torch.ones(blocks.numel(), dtype=weight.dtype)
    keep[torch.argsort(blocks.flatten(), stable=True)[:drop]] = 0
    return keep.reshape(blocks.shape[0], 1, -1).expand(-1, rows, -1).reshape(weight.shape)


class GradualPruner:
    """Gradual magnitude pruning (Zhu and Gupta, arXiv:1710.01878) to blocks of ``rows`` outputs x 1 input.

    The sparsity follows the cubic schedule from 0 to its target during the first ``ramp`` steps; masks are
    recomputed every ``every`` steps, then stay fixed while the survivors are fine-tuned. A dropped block is
    set to zero after every step, so it practically never returns.

    Args:
        weights: Parameters to prune, by name.
        rows: Height of the blocks.
        sparsity: Final share of zeros in each parameter.
        ramp: Steps until the final sparsity.
        every: Steps between two masks.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        *,
        rows: int = 16,
        sparsity: float,
        ramp: int,
        every: int = 20,
    ) -> None:
        self.weights = dict(weights)
        self.rows, self.sparsity, self.ramp, self.every = rows, sparsity, ramp, every
        self.masks: dict[str, torch.Tensor] = {}

    def after_step(self, step: int) -> None:
        """Update the masks when due and set the dropped weights to exactly zero. Call after the optimiser."""
        if step <= self.ramp and (step % self.every == 0 or step == self.ramp):
            wanted = self.sparsity * (1 - (1 - step / self.ramp) ** 3)
            self.masks = {name: block_mask(w, self.rows, wanted) for name, w in self.weights.items()}
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.weights[name].mul_(mask)

    def density(self) -> float:
        """Share of non-zero entries over all pruned parameters."""
        entries = sum(w.numel() for w in self.weights.values())
        return sum(int(w.count_nonzero()) for w in self.weights.values()) / entries
