#!/usr/bin/env python3
"""Held-out accuracy of a digit classifier: ``python models/digits_cnn/eval.py MODEL.onnx``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["evaluate"]


def evaluate(session: Any) -> dict[str, Any]:
    """Return the share of the 540 held-out digits that are recognised.

    Args:
        session: An ``onnxruntime.InferenceSession`` of a model with input ``image`` and output ``logits``.
    """
    data = np.load(Path(__file__).with_name("test.npz"))
    (logits,) = session.run(["logits"], {"image": data["images"][:, None].astype(np.float32) / 16})
    value = float(np.mean(logits.argmax(1) == data["labels"]))
    return {"metric": "accuracy", "value": value, "higher_is_better": True}


if __name__ == "__main__":
    import onnxruntime

    for path in sys.argv[1:]:
        print(path, evaluate(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])))
