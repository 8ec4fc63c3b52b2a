"""Models of one sparse operator, sessions with and without the library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsecc import runtime
from sparsecc.sparse import Pattern, SparseTensor, keep_mask


def _packed(shape: tuple[int, ...], pattern: str, sparsity: float = 0.7, seed: int = 0) -> SparseTensor:
    """A random matrix [shape[0], product of the rest], pruned and packed."""
    parsed = Pattern.parse(pattern)
    dense = (
        np.random.default_rng(seed).standard_normal((shape[0], int(np.prod(shape[1:])))).astype(np.float32)
    )
    dense *= keep_mask(np.abs(dense), parsed, sparsity if parsed.needs_sparsity else None)
    return SparseTensor.encode(dense, parsed)


def _session(
    proto: onnx.ModelProto, *, library: bool, threads: int = 1, optimized: str | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # expected failures would be printed
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if library:
        runtime.register(options)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="session")
def packed() -> Callable[..., SparseTensor]:
    return _packed


@pytest.fixture(scope="session")
def session() -> Callable[..., onnxruntime.InferenceSession]:
    return _session
