"""Unlabelled inputs that healing trains on: sentences and pictures that measure nothing, and what is made of them."""

from __future__ import annotations

import csv
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_tasks import Batch, normalized
from numpy.typing import NDArray

#: Ids of the tokens that begin and end a sentence, and the first id of a whole word that is no name of a symbol.
FIRST, LAST, WORDS = 101, 102, 1996
#: Past this the vocabulary holds rare pieces.
RARE = 29000
#: Mean, deviation, least and most of the lengths that sentences are cut to, in tokens.
LENGTHS = (12.0, 5.0, 4.0, 32.0)


def sentences(
    rows: list[list[int]], others: list[list[int]], count: int, size: int, seed: int = 0
) -> list[Batch]:
    """Batches of sentences of one length each, so that there is no padding.

    Args:
        rows: sentences as token ids, all of which are taken whole once.
        others: further text; four in ten of the parts cut out are from there, if there is any.
        count: batches of ``size`` sentences to make in all, about.
        size: sentences per batch.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    by_length: dict[int, list[list[int]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    mean, deviation, least, most = LENGTHS
    for _ in range(count * size - len(rows)):
        source = others if others and rng.random() < 0.4 else rows
        row = source[rng.integers(len(source))]
        length = int(np.clip(rng.normal(mean, deviation), least, most))
        start = int(rng.integers(max(len(row) - length, 0) + 1))
        part = row[start : start + length]
        by_length.setdefault(len(part), []).append(part)
    batches = []
    for _, found in sorted(by_length.items()):
        order = rng.permutation(len(found))
        for start in range(0, len(found), size):
            batches.append(_tokens([found[at] for at in order[start : start + size]]))
    return batches


def _tokens(rows: list[list[int]]) -> Batch:
    ids = np.array([[FIRST, *row, LAST] for row in rows], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def pair_sentences(data: Path, skipped: int) -> tuple[list[list[int]], dict[str, int]]:
    """Sentences of all pairs but the first ``skipped`` as token ids, and the words they are whole tokens for."""
    tokens = np.load(data / "text" / "stsb_dev_minilm_tokens.npz")
    with (data / "text" / "stsb_dev.csv").open(newline="", encoding="utf-8") as stream:
        texts = list(csv.DictReader(stream))[skipped:]
    rows, vocabulary = [], {}
    for side, column in (("a", "sentence1"), ("b", "sentence2")):
        ids, lengths = tokens[f"ids_{side}"][skipped:], tokens[f"len_{side}"][skipped:]
        for row, length, text in zip(ids, lengths, texts, strict=True):
            rows.append(row[1 : length - 1].tolist())
            words = _words(text[column])
            if len(words) == len(rows[-1]):
                vocabulary.update(zip(words, rows[-1], strict=True))
    return rows, vocabulary


def text_sentences(path: Path, vocabulary: dict[str, int], seed: int = 0) -> list[list[int]]:
    """Sentences of a text as token ids; a word that the vocabulary lacks becomes some word of the model's."""
    rng = np.random.default_rng(seed)
    text = path.read_text(encoding="utf-8").replace("<unk>", "").replace("@", "")
    rows = []
    for line in text.splitlines():
        for part in re.split(r"(?<=[.?!]) ", line.strip()):
            words = _words(part)
            if len(words) >= LENGTHS[2]:
                rows.append([vocabulary.get(word) or int(rng.integers(WORDS, RARE)) for word in words])
    return rows


def _words(text: str) -> list[str]:
    """Words and signs in lower case, without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    return re.findall(r"\w+|[^\w\s]", plain)


def pictures(
    x: NDArray[Any], others: list[NDArray[Any]], count: int, size: int, seed: int = 0
) -> list[Batch]:
    """Batches of pictures, shifted by up to four pixels, and of parts of others; two in three are mixed with another.

    A third has a rectangle of the other (Yun et al., "CutMix", 2019), a third is a weighted mean of both (Zhang et
    al., "mixup", 2018); the dense model says what to answer.

    Args:
        x: ``[n, C, H, W]``, as the model reads them.
        others: ``[H', W', C]`` each, bytes, of any size not below; half of a batch is parts of them.
        count: batches.
        size: pictures per batch.
        seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    padded = np.pad(x, [(0, 0), (0, 0), (4, 4), (4, 4)])
    batches = []
    for _ in range(count):
        parts = [_shifted(padded[at], rng) for at in rng.choice(len(x), size - size // 2, replace=False)]
        parts += [
            normalized(_part(others[at], x.shape[2], rng))
            for at in rng.choice(len(others), size // 2, replace=False)
        ]
        chosen = np.stack([part[:, :, ::-1] if rng.random() < 0.5 else part for part in parts])
        batches.append({"input": _mixed(chosen, rng)})
    return batches


def _shifted(padded: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    top, left = rng.integers(0, 9, 2)
    return padded[:, top : padded.shape[1] - 8 + top, left : padded.shape[2] - 8 + left]


def _part(picture: NDArray[Any], side: int, rng: np.random.Generator) -> NDArray[Any]:
    """A square of 3/8 to all of the picture, ``[side, side, C]``."""
    from PIL import Image

    most = min(picture.shape[:2])
    width = int(rng.integers(3 * most // 8, most + 1))
    top, left = (int(rng.integers(length - width + 1)) for length in picture.shape[:2])
    part = Image.fromarray(picture[top : top + width, left : left + width])
    return np.asarray(part.resize((side, side), Image.Resampling.BILINEAR))


def _mixed(x: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    mixed = x.copy()
    for picture, other in zip(mixed, x[rng.permutation(len(x))], strict=True):
        kind = rng.integers(3)
        if kind == 1:
            height, width = rng.integers(x.shape[2] // 4, 3 * x.shape[2] // 4 + 1, 2)
            top, left = rng.integers(x.shape[2] - height + 1), rng.integers(x.shape[3] - width + 1)
            area = (slice(None), slice(top, top + height), slice(left, left + width))
            picture[area] = other[area]
        elif kind == 2:
            share = np.float32(rng.uniform(0.5, 1))
            picture[:] = share * picture + (1 - share) * other
    return mixed
