#!/usr/bin/env python3
"""Held-out quality of a character language model: ``python models/text_lm/eval.py MODEL.onnx``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bits_per_character", "evaluate"]

BATCH = 64


def evaluate(session: Any) -> dict[str, Any]:
    """Return the share of characters of the held-out chapters that the model predicts.

    Args:
        session: An ``onnxruntime.InferenceSession`` of a model with input ``ids`` and output ``logits``.
    """
    hits = [logits.argmax(-1) == wanted for logits, wanted in _predictions(session)]
    value = float(np.concatenate(hits).mean())
    return {"metric": "next-character accuracy", "value": value, "higher_is_better": True}


def bits_per_character(session: Any) -> dict[str, Any]:
    """Return the mean cross-entropy of the held-out characters in bits; finer than the accuracy."""
    bits = [_surprise(logits, wanted) for logits, wanted in _predictions(session)]
    return {
        "metric": "bits per character",
        "value": float(np.concatenate(bits).mean()),
        "higher_is_better": False,
    }


def _predictions(session: Any) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield logits ``[B, 128, 64]`` and the characters that came next ``[B, 128]``."""
    windows = np.load(Path(__file__).with_name("test.npz"))["windows"].astype(np.int64)
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        (logits,) = session.run(["logits"], {"ids": batch[:, :-1]})
        yield logits, batch[:, 1:]


def _surprise(logits: NDArray[np.float32], wanted: NDArray[np.int64]) -> NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, wanted[..., None], -1)[..., 0]
    return (np.log(np.exp(shifted).sum(-1)) - chosen) / np.log(2)


if __name__ == "__main__":
    import onnxruntime

    for path in sys.argv[1:]:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        print(path, evaluate(session), bits_per_character(session))
