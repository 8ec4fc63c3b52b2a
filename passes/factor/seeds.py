"""Weights as seeds of a pseudo-random generator (SeedLM). Arrays in, arrays out; no ONNX.

A block of ``C`` neighbouring weights is ``U(seed) t``: ``U [C, P]`` holds states of a linear-feedback shift register
from the one that ``seed`` names on, ``t`` is ``P`` integers of 4 bits times a power of two of which 4 bits are stored.
Stored are ``K`` bits of seed, 4 of exponent and ``4 P`` of coefficients per block, all as nibbles, so that neither the
order of bytes nor the word size of a machine matters.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecc.passes.prune.gram import Matrix

__all__ = ["SeedCode", "SeedFormat", "decode", "encode", "orbit", "states", "table"]

#: Taps of registers with the longest period, by bits, counted from 1 (Ward and Molteno 2007).
_TAPS = {4: (4, 3), 8: (8, 6, 5, 4), 12: (12, 6, 4, 1), 16: (16, 15, 13, 4)}

#: Steps of the register between two entries of a block: more than 1 lets neighbours share fewer bits.
_STRIDE = 5

#: Seeds of which the best one is looked at with rounded coefficients.
_SEEDS_AT_ONCE = 512

#: Blocks that are compared with those seeds at a time.
_BLOCKS_AT_ONCE = 1024

#: How much of a share may be rounding.
_ROUNDING = 1e-5

#: Values of the shared exponent.
_EXPONENTS = 16


@dataclass(frozen=True)
class SeedFormat:
    """Sizes of the parts of a block.

    Attributes:
        block: weights in it, ``C``.
        rank: coefficients, ``P``.
        bits: of a seed, ``K``: 4, 8, 12 or 16.
    """

    block: int = 8
    rank: int = 3
    bits: int = 16

    @property
    def places(self) -> NDArray[np.int64]:
        """How far behind the state of the seed each entry of ``U`` is, ``[C * P]``."""
        return np.arange(self.block * self.rank) * _STRIDE

    @property
    def nibbles(self) -> int:
        """Stored per block."""
        return self.bits // 4 + 1 + self.rank

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight."""
        return 4 * self.nibbles / self.block


@dataclass(frozen=True)
class SeedCode:
    """What is stored for a number of weights.

    Attributes:
        nibbles: ``[blocks, format.nibbles]`` uint8 below 16: the seed, lowest nibble first, the exponent, then the
            coefficients plus 8.
        scale: what coefficients with the exponent 0 are multiplied with, a power of two.
    """

    nibbles: NDArray[np.uint8]
    scale: float


@functools.cache
def orbit(bits: int) -> NDArray[np.int64]:
    """Return the states of the register from 1 on, each but 0 once, ``[2**bits - 1]``; a seed is a place in it."""
    taps, state = _TAPS[bits], 1
    states = np.empty((1 << bits) - 1, np.int64)
    for at in range(len(states)):
        states[at] = state
        fed = functools.reduce(lambda bit, tap: bit ^ (state >> (bits - tap)), taps, 0) & 1
        state = (state >> 1) | (fed << (bits - 1))
    states.setflags(write=False)
    return states


def states(form: SeedFormat) -> NDArray[np.uint16]:
    """Return the states, the first ones once more at the end, so that every seed finds its own in a row."""
    once = orbit(form.bits)
    beyond = np.arange(int(form.places[-1])) % len(once)
    return np.concatenate([once, once[beyond]]).astype(np.uint16)


@functools.cache
def table(form: SeedFormat) -> NDArray[np.float32]:
    """Return ``U`` of every seed, ``[2**bits - 1, C * P]``: states, shifted and scaled to [-1, 1]."""
    middle = np.float32(1 << (form.bits - 1))
    values = (states(form).astype(np.float32) - middle) / (middle - 1)
    every: NDArray[np.float32] = values[np.arange((1 << form.bits) - 1)[:, None] + form.places]
    every.setflags(write=False)
    return every


def decode(code: SeedCode, form: SeedFormat) -> Matrix:
    """Return the weights of all blocks, ``[blocks, C]``."""
    parts = code.nibbles.astype(np.int64)
    places = form.bits // 4
    seeds = parts[:, :places] @ (16 ** np.arange(places))
    factors = (parts[:, places + 1 :] - 8) * (code.scale * np.exp2(-parts[:, places : places + 1]))
    basis = table(form)[seeds].reshape(-1, form.block, form.rank).astype(np.float64)
    return np.asarray((basis @ factors[:, :, None])[:, :, 0])


def encode(blocks: Matrix, form: SeedFormat, seeds: int | None = None) -> SeedCode:
    """Return the codes that come closest to ``blocks [blocks, C]`` in squared distance.

    For every ``512`` seeds the one whose span is nearest is found by one product of matrices: the share of a block in
    a span is the inner product of ``w w^T`` with the projector on it. Of these seeds the one is taken whose rounded
    coefficients are nearest. More seeds therefore never raise the distance.

    Args:
        blocks: finite.
        form: sizes.
        seeds: how many of the seeds to look at; all by default.
    """
    bases, inverses, projectors = _spans(form)
    candidates, shares = _nearest_spans(blocks, projectors[:seeds])
    scale = _scale(blocks, inverses, candidates)
    best = np.full(len(blocks), np.inf)
    nibbles = np.zeros((len(blocks), form.nibbles), np.uint8)
    order = np.argsort(-shares, axis=1, kind="stable")
    lengths = np.square(blocks).sum(1)
    left = np.arange(len(blocks))
    for place in order.T:
        part = place[left]
        floor = lengths[left] * (
            1 - shares[left, part] - _ROUNDING
        )  # no coefficients come nearer than the span
        kept = floor < best[left]
        left, part = left[kept], part[kept]
        if not len(left):
            break
        chosen = candidates[left, part]
        exponents, factors = _rounded(blocks[left], inverses[chosen], scale)
        errors = _settled(blocks[left], bases[chosen], scale * np.exp2(-exponents), factors)
        better = errors < best[left]
        best[left[better]] = errors[better]
        places = (chosen[:, None] >> (4 * np.arange(form.bits // 4))) & 15
        packed = np.concatenate([places, exponents[:, None], factors + 8], axis=1).astype(np.uint8)
        nibbles[left[better]] = packed[better]
    return SeedCode(nibbles, scale)


@functools.cache
def _spans(form: SeedFormat) -> tuple[Matrix, Matrix, NDArray[np.float32]]:
    """Return of every seed ``U``, its inverse, and the upper triangle of the projector on its span, others twice."""
    bases = table(form).reshape(-1, form.block, form.rank).astype(np.float64)
    inverses = np.asarray(np.linalg.pinv(bases), np.float64)
    rows, columns = np.triu_indices(form.block)
    projectors = (bases @ inverses)[:, rows, columns] * np.where(rows == columns, 1, 2)
    return bases, inverses, projectors.astype(np.float32)


def _nearest_spans(
    blocks: Matrix, spans: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return for each block the seed of every so many whose span holds most of it, and the share that it holds.

    Both are ``[blocks, parts]``.
    """
    rows, columns = np.triu_indices(blocks.shape[1])
    lengths = np.linalg.norm(blocks, axis=1, keepdims=True)
    units = (blocks / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    starts = range(0, len(spans), _SEEDS_AT_ONCE)
    found = np.empty((len(blocks), len(starts)), np.int64)
    held = np.empty(found.shape, np.float32)
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some = slice(first, first + _BLOCKS_AT_ONCE)
        pairs = units[some, rows] * units[some, columns]
        for part, start in enumerate(starts):
            shares = pairs @ spans[start : start + _SEEDS_AT_ONCE].T
            nearest = np.argmax(shares, axis=1)
            found[some, part] = start + nearest
            held[some, part] = np.take_along_axis(shares, nearest[:, None], axis=1)[:, 0]
    return found, held


def _scale(blocks: Matrix, inverses: Matrix, candidates: NDArray[np.int64]) -> float:
    """Return the step of the coarsest block: what its largest coefficient needs."""
    first = np.einsum("bpc,bc->bp", inverses[candidates[:, 0]], blocks)
    largest = float(np.abs(first).max(initial=0.0))
    return float(np.exp2(np.ceil(np.log2(largest / 7)))) if largest else 1.0


def _rounded(blocks: Matrix, inverses: Matrix, scale: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return exponents ``[blocks]`` and coefficients ``[blocks, P]`` of 4 bits."""
    exact = np.einsum("bpc,bc->bp", inverses, blocks)
    largest = np.abs(exact).max(1)
    with np.errstate(divide="ignore"):
        wanted = np.floor(np.log2(7.5 * scale / largest))
    exponents = np.clip(wanted, 0, _EXPONENTS - 1).astype(np.int64)
    steps = scale * np.exp2(-exponents.astype(np.float64))
    return exponents, np.clip(np.rint(exact / steps[:, None]), -8, 7).astype(np.int64)


def _settled(
    blocks: Matrix, bases: Matrix, steps: NDArray[np.float64], factors: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Round coefficients anew, one after the other and each beside the others; return the squared distances.

    Args:
        blocks: ``[blocks, C]``.
        bases: ``[blocks, C, P]``.
        steps: ``[blocks]``, what a coefficient counts.
        factors: ``[blocks, P]``, changed in place.
    """
    scaled = bases * steps[:, None, None]
    rest = blocks - (scaled @ factors[:, :, None])[:, :, 0]
    lengths = np.square(scaled).sum(1)
    for at in range(factors.shape[1]):
        own = scaled[:, :, at]
        shift = np.rint((own * rest).sum(1) / lengths[:, at]).astype(np.int64)
        moved = np.clip(factors[:, at] + shift, -8, 7) - factors[:, at]
        factors[:, at] += moved
        rest -= own * moved[:, None]
    return np.asarray(np.square(rest).sum(1))
