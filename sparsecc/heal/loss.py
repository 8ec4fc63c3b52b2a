"""How far a model is from the dense one on a batch: relative squared errors of states and outputs.

Jiao et al., "TinyBERT", 2020, match hidden states so; Kurtic et al., "Sparse fine-tuning for inference acceleration",
2023, normalise the error by the teacher's energy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sparsecc.calib import Arrays
from sparsecc.heal.operators import Tensor

__all__ = ["attended", "kl_divergence", "relative_error"]


def attended(batch: Arrays) -> NDArray[np.bool_] | None:
    """Which positions of the samples are no padding, ``[B, T]``; None where all count, or it is not known.

    Told by the one input named ``..._mask`` or ``mask`` that has two axes and holds zeros and ones only, in each
    sample a one.
    """
    found = [
        array
        for name, array in batch.items()
        if (name == "mask" or name.endswith("_mask")) and array.ndim == 2 and np.isin(array, (0, 1)).all()
    ]
    if len(found) != 1:
        return None
    mask: NDArray[np.bool_] = found[0].astype(bool)
    return None if mask.all() or not mask.any(1).all() else mask


def relative_error(found: Tensor, wanted: Tensor, counted: Tensor | None = None) -> Tensor:
    """``||found - wanted||**2 / ||wanted||**2``, float32, over the positions that count.

    Args:
        found: of any shape.
        wanted: as ``found``.
        counted: ``[B, T]`` bool; only for tensors that begin with these axes, others count whole.
    """
    found, wanted = found.float(), wanted.float()
    if counted is not None and found.shape[:2] == counted.shape:
        found, wanted = found[counted], wanted[counted]
    energy = wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return functional.mse_loss(found, wanted, reduction="sum") / energy


def kl_divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence of the distributions along the last axis, float32."""
    p, q = torch.log_softmax(wanted.float(), -1), torch.log_softmax(found.float(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()
