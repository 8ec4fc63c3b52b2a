"""How much residual blocks change the stream they stand in, measured on calibration inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.calib import tensor_shapes
from sparsecc.calib.collect import Tapped
from sparsecc.ir import Model
from sparsecc.passes.structure.blocks import Block
from sparsecc.pm import CalibrationSource

__all__ = ["Score", "block_scores", "channel_axis", "distance"]

Score = Literal["angular", "influence"]

#: Bytes of activations that one run may return.
_BYTE_BUDGET = 256 << 20


def block_scores(
    model: Model, blocks: Sequence[Block], score: Score, calibration: CalibrationSource, threads: int
) -> list[float | str]:
    """Return for each block how far its outputs are from its inputs, or why that cannot be said.

    ``influence`` is ``1 - cos`` (Men et al., "ShortGPT", 2024), ``angular`` is ``arccos(cos) / pi`` (Gromov et al.,
    "The Unreasonable Ineffectiveness of the Deeper Layers", 2024), both between vectors of channels, as a mean over
    all positions of all inputs.
    """
    first = next(iter(calibration), None)
    if first is None:
        return ["there are no calibration inputs"] * len(blocks)
    ends = [(str(block.start.name), str(block.end.name)) for block in blocks]
    names = list(dict.fromkeys(name for pair in ends for name in pair))
    shapes = tensor_shapes(model, names, first)
    found: list[float | str] = []
    for group in _groups(blocks, shapes):
        found += _scores(model, group, score, calibration, threads)
    return found


def distance(before: NDArray[Any], after: NDArray[Any], score: Score) -> NDArray[np.float64]:
    """Return the distance of each row of ``before [n, C]`` from that of ``after``; two zero rows are equal."""
    left, right = before.astype(np.float64), after.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    product = (left * right).sum(1)
    both_zero = ~left.any(1) & ~right.any(1)
    cosine = np.where(both_zero, 1.0, np.clip(product / np.where(norms > 0, norms, 1.0), -1.0, 1.0))
    return 1 - cosine if score == "influence" else np.arccos(cosine) / np.pi


def channel_axis(block: Block) -> int:
    """The axis of channels in the stream: 1 between convolutions, else the last."""
    return 1 if any(node.op_type == "Conv" for node in block.nodes) else -1


def _groups(blocks: Sequence[Block], shapes: dict[str, tuple[int, ...]]) -> list[list[Block]]:
    """Blocks in groups whose ends together keep to the budget, or of one."""
    groups: list[list[Block]] = []
    filled = _BYTE_BUDGET + 1
    for block in blocks:
        ends = (str(block.start.name), str(block.end.name))
        nbytes = sum(8 * int(np.prod(shapes.get(name, ()))) for name in ends)
        if filled + nbytes > _BYTE_BUDGET:
            groups.append([])
            filled = 0
        groups[-1].append(block)
        filled += nbytes
    return groups


def _scores(
    model: Model, blocks: Sequence[Block], score: Score, calibration: CalibrationSource, threads: int
) -> list[float | str]:
    names = dict.fromkeys(str(value.name) for block in blocks for value in (block.start, block.end))
    tapped = Tapped(model, list(names), threads)
    sums, counts = np.zeros(len(blocks)), np.zeros(len(blocks))
    reasons: dict[int, str] = {}
    for batch in calibration:
        arrays = tapped.run(dict(batch))
        for number, block in enumerate(blocks):
            before, after = arrays[str(block.start.name)], arrays[str(block.end.name)]
            reason = _unlike(before, after)
            if reason is not None:
                reasons[number] = reason
                continue
            rows = [
                np.moveaxis(item, channel_axis(block), -1).reshape(-1, item.shape[channel_axis(block)])
                for item in (before, after)
            ]
            found = distance(rows[0], rows[1], score)
            sums[number] += found.sum()
            counts[number] += len(found)
    return [
        reasons.get(number)
        or (float(sums[number] / count) if count else "nothing of it is computed on the calibration data")
        for number, count in enumerate(counts)
    ]


def _unlike(before: NDArray[Any], after: NDArray[Any]) -> str | None:
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"its input is {before.dtype} {before.shape}, its output {after.dtype} {after.shape}"
    if before.dtype.kind not in "fV" or before.ndim < 2 or not before.shape[-1]:
        return "its input is no matrix of numbers"
    if not (np.isfinite(before.astype(np.float64)).all() and np.isfinite(after.astype(np.float64)).all()):
        return "its input or output is NaN or infinite on the calibration data"
    return None
