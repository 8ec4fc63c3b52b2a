"""Where blocks end and what may be trained, told from the graph alone; PyTorch is not needed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.heal import block_states, trainable
from sparsecc.ir import Model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

import zoo


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def residual(**weights: np.ndarray) -> Model:
    """Two residual blocks, the first on the embedding; a mask comes in from the side."""
    return build(
        """g (int64[B,T] ids, float[B,T,8] mask) => (float[B,T,8] y) {
            x = Gather(table, ids)
            a = MatMul(x, w1)
            n = Sub(one, mask)
            b = Mul(a, n)
            block1 = Add(b, x)
            c = MatMul(block1, w2)
            d = Mul(c, gain)
            e = Mul(d, n)
            s = Add(e, block1)
            block2 = Relu(s)
            f = MatMul(block2, w3)
            y = Add(f, bias)
        }""",
        table=normal(5, 8), w1=normal(8, 8), w2=normal(8, 8), w3=normal(8, 8), gain=normal(8), bias=normal(1, 1, 8),
        one=np.float32(1), **weights,
    )  # fmt: skip


def test_blocks_end_where_one_tensor_carries_everything():
    assert block_states(residual()) == ["block1", "block2"]


def test_a_chain_ends_a_block_behind_every_activation():
    model = build(
        """g (float[B,4] x) => (float[B,4] y) {
            h = Gemm(x, w1, b1)
            r = Relu(h)
            t = Gemm(r, w1, b1)
            shape = Shape(t)
            u = Tanh(t)
            y = Gemm(u, w2, b1)
            z = Reshape(y, shape)
        }""",
        w1=normal(4, 4), w2=normal(4, 4), b1=normal(4),
    )  # fmt: skip
    assert block_states(model) == ["r", "u"]


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        (
            "bert_base",
            {"layers": 3, "hidden": 32, "heads": 2, "intermediate": 64, "vocabulary": 20, "positions": 8},
            5,
        ),
        ("llama_block", {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 48}, 3),
        ("resnet50", {"depths": (1, 2, 1, 1), "width": 8, "image": 32, "classes": 10}, 6),
    ],
)
def test_architectures_have_a_state_per_block(name, options, count):
    model = Model.from_proto(zoo.build(name, seq=8, **options))
    states = block_states(model)
    assert len(states) == len(set(states)) == count


def test_weights_biases_and_gains_are_trained_and_nothing_else():
    found = {parameter.name: parameter for parameter in trainable(residual())}
    assert {name for name, item in found.items() if not item.is_weight} == {"gain", "bias"}
    assert sum(item.is_weight for item in found.values()) == 3


def test_zeros_of_a_weight_are_its_mask():
    model = residual()
    site = model.sites()[0]
    weight = site.numpy().copy()
    weight[1] = 0
    site.replace(weight)
    parameter = next(item for item in trainable(model) if item.name == site.name)
    np.testing.assert_array_equal(parameter.mask(), weight.T != 0)
    parameter.replace(2 * parameter.numpy())
    np.testing.assert_array_equal(model.sites()[0].numpy(), 2 * weight)


def test_quantised_weights_are_left_alone():
    model = build(
        """g (float[B,4] x) => (float[B,4] y) {
            w = DequantizeLinear(codes, scale)
            y = MatMul(x, w)
        }""",
        codes=np.ones((4, 4), np.int8), scale=np.float32(0.5),
    )  # fmt: skip
    assert trainable(model) == []
