"""Trained networks and inputs of theirs, for what is proven or measured on real layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecc.ir import Model
from sparsecc.pm import Pipeline

Trained = tuple[Model, list[dict[str, NDArray]]]


def resnet(data: Path, folder: Path) -> Trained:
    model = Model.load(data / "models" / "resnet20_cifar10.onnx")
    Pipeline.parse("tidy").run(model)
    pictures = np.load(data / "images" / "cifar10_test_2500.npz")["images"][::50]
    x = (pictures.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.45) / 0.225
    return model, [{"input": x}]


def minilm(data: Path, folder: Path) -> Trained:
    spec = importlib.util.spec_from_file_location("eval_dense", data / "eval_dense.py")
    assert spec is not None
    assert spec.loader is not None
    evaluation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluation)
    model = Model.load(evaluation.expand_minilm(str(data / "models" / "minilm_l6_v2"), str(folder)))
    tokens = np.load(data / "text" / "stsb_dev_minilm_tokens.npz")
    batches = []
    for length in (8, 11, 14, 17):
        ids = tokens["ids_a"][tokens["len_a"] == length][:12, :length].astype(np.int64)
        batches.append(
            {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        )
    return model, batches


def stories(data: Path, folder: Path) -> Trained:
    tokens = np.load(data / "text" / "tinystories_part1_tok512.npz")["tokens"][:6].astype(np.int64)
    return Model.load(data / "models" / "stories260K.onnx"), [{"tokens": tokens}]


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Gives a model and batches for it by its name here."""
    loaders = {"resnet": resnet, "minilm": minilm, "stories": stories}
    return lambda name: loaders[name](data_dir, tmp_path_factory.mktemp("model"))
