#!/usr/bin/env python3
"""Well-known architectures at their real size with random weights, for timing only.

Nothing is downloaded: speed depends on shapes and on the pattern of the zeros, not on the values. From the
command line::

    python models/zoo.py bert_base -o bert.onnx --pattern 16x1 --sparsity 0.9
    python models/zoo.py resnet50 -o resnet.onnx --batch 4 --set image=160

What is pruned, with a random mask of the wanted pattern: in the transformers every weight of a linear layer
(not the embeddings), in the convolutional networks every convolution except the stem and the depthwise ones
(not the classifier). The graphs are written so that onnxruntime's own fusions apply to the dense model: see
``models/README.md`` for what was seen to fuse. Needs sparsecc installed, for the masks.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from graph_builder import GraphBuilder, Prune
from numpy.typing import NDArray
from onnx import TensorProto

from sparsecc.errors import SparseccError
from sparsecc.sparse import Pattern, keep_mask

__all__ = ["ZOO", "Decoder", "Encoder", "MobileNet", "ResNet", "build"]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A BERT-style encoder: token ids and attention mask to the last hidden state (no pooler)."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512


@dataclasses.dataclass(frozen=True)
class Decoder:
    """LLaMA-style decoder blocks: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Hidden state to hidden state, without embeddings and head; with a ``vocabulary`` token ids to logits.
    With ``past`` > 0 the model takes that many cached keys and values per block, so that ``seq=1`` is one
    decoding step.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    past: int = 0
    vocabulary: int = 0


@dataclasses.dataclass(frozen=True)
class ResNet:
    """ResNet v1.5 with bottleneck blocks; ``batch_norm=1`` keeps BatchNormalization as separate nodes."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    image: int = 224
    classes: int = 1000
    batch_norm: int = 0


@dataclasses.dataclass(frozen=True)
class MobileNet:
    """MobileNet V1 or V2 of width 1.0, batch normalisation folded.

    ``stages`` are (expansion, outputs, repeats, first stride); expansion 0 is a V1 block without bottleneck.
    """

    stages: tuple[tuple[int, int, int, int], ...]
    stem: int = 32
    head: int = 0
    image: int = 224
    classes: int = 1000


Spec = Encoder | Decoder | ResNet | MobileNet

ZOO: dict[str, Spec] = {
    "bert_base": Encoder(layers=12, hidden=768, heads=12, intermediate=3072),
    "minilm_l6": Encoder(layers=6, hidden=384, heads=12, intermediate=1536),
    "llama_block": Decoder(layers=1, hidden=2048, heads=32, kv_heads=4, intermediate=5632),
    "resnet50": ResNet(),
    "mobilenet_v1": MobileNet(
        ((0, 64, 1, 1), (0, 128, 2, 2), (0, 256, 2, 2), (0, 512, 6, 2), (0, 1024, 2, 2)),
    ),
    "mobilenet_v2": MobileNet(
        (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ),
        head=1280,
    ),
}


def build(
    name: str,
    *,
    batch: int = 1,
    seq: int = 128,
    opset: int = 17,
    seed: int = 0,
    sparsity: float = 0.0,
    pattern: str = "dense",
    graph: GraphBuilder | None = None,
    **overrides: Any,
) -> onnx.ModelProto:
    """Build one architecture of `ZOO`.

    Args:
        name: Key of `ZOO`.
        batch: Size of the first axis of the inputs.
        seq: Tokens per sequence (transformers only).
        opset: Default operator set, 13 to 22.
        seed: Seed of weights and masks; the same arguments give the same bytes.
        sparsity: Share of zeros in each pruned weight; ignored for N:M patterns, which imply it.
        pattern: ``dense``, ``unstructured``, ``N:M`` or ``RxC`` (R outputs x C consecutive inputs).
        graph: what takes nodes and weights, instead of one with the arguments above.
        overrides: Fields of the architecture to change, for instance ``layers=2``.

    Raises:
        KeyError: There is no architecture of that name.
        TypeError: An override is not a field of the architecture.
        sparsecc.errors.SpecError: The pattern or the sparsity is not valid.
    """
    if name not in ZOO:
        raise KeyError(f"unknown architecture {name!r}, known are: {', '.join(sorted(ZOO))}")
    spec = dataclasses.replace(ZOO[name], **overrides)
    if graph is None:
        graph = GraphBuilder(opset=opset, seed=seed, prune=random_mask(pattern, sparsity, seed))
    if isinstance(spec, Encoder):
        return _encoder(graph, name, spec, batch, seq)
    if isinstance(spec, Decoder):
        return _decoder(graph, name, spec, batch, seq)
    if isinstance(spec, ResNet):
        return _resnet(graph, name, spec, batch)
    return _mobilenet(graph, name, spec, batch)


def random_mask(pattern: str, sparsity: float, seed: int) -> Prune | None:
    """Return a chooser of random masks of a pattern, or None where nothing is to be pruned."""
    if pattern == "dense":
        return None
    parsed = Pattern.parse(pattern)
    rng = np.random.default_rng([seed, 1])

    def choose(weight: NDArray[np.float32]) -> NDArray[np.bool_]:
        return keep_mask(rng.random(weight.shape, dtype=np.float32), parsed, sparsity)

    return choose


def _attention_heads(graph: GraphBuilder, scope: str, x: str, heads: int, size: int, perm: list[int]) -> str:
    """Split the last axis into heads and transpose: ``[B, S, H]`` to ``[B, heads, ...]``."""
    return graph.op(
        "Transpose", scope, graph.op("Reshape", scope, x, graph.ints([0, 0, heads, size])), perm=perm
    )


def _attention_bias(graph: GraphBuilder, mask: str) -> str:
    """Turn the 0/1 attention mask ``[B, S]`` into the additive ``[B, 1, 1, S]``."""
    scope = "/attention_bias"
    mask = graph.op("Unsqueeze", f"{scope}/heads", mask, graph.ints([1]))
    mask = graph.op("Unsqueeze", f"{scope}/queries", mask, graph.ints([2]))
    mask = graph.op("Cast", scope, mask, to=TensorProto.FLOAT)
    return graph.op("Mul", scope, graph.op("Sub", scope, graph.scalar(1.0), mask), graph.scalar(-10000.0))


def _encoder_layer(graph: GraphBuilder, scope: str, x: str, bias: str, spec: Encoder) -> str:
    """One post-norm encoder layer; attention is written the way onnxruntime's fusion expects it."""
    width, size = spec.hidden, spec.hidden // spec.heads
    attention = f"{scope}/attention"
    q, k, v = (graph.linear(f"{attention}/{part}", x, width, width) for part in ("query", "key", "value"))
    q = _attention_heads(graph, f"{attention}/query/heads", q, spec.heads, size, [0, 2, 1, 3])
    k = _attention_heads(graph, f"{attention}/key/heads", k, spec.heads, size, [0, 2, 3, 1])
    v = _attention_heads(graph, f"{attention}/value/heads", v, spec.heads, size, [0, 2, 1, 3])
    scores = graph.op("MatMul", f"{attention}/scores", q, k)
    scores = graph.op("Div", f"{attention}/scores", scores, graph.scalar(math.sqrt(size)))
    scores = graph.op("Add", f"{attention}/scores", scores, bias)
    context = graph.op("MatMul", f"{attention}/context", graph.op("Softmax", attention, scores, axis=-1), v)
    context = graph.op("Transpose", f"{attention}/context", context, perm=[0, 2, 1, 3])
    context = graph.op("Reshape", f"{attention}/context", context, graph.ints([0, 0, width]))
    context = graph.linear(f"{attention}/output", context, width, width)
    x = graph.layer_norm(f"{attention}/norm", graph.op("Add", f"{attention}/residual", context, x), width)
    y = graph.gelu(f"{scope}/mlp/gelu", graph.linear(f"{scope}/mlp/fc1", x, width, spec.intermediate))
    y = graph.linear(f"{scope}/mlp/fc2", y, spec.intermediate, width)
    return graph.layer_norm(f"{scope}/mlp/norm", graph.op("Add", f"{scope}/mlp/residual", y, x), width)


def _embedding(graph: GraphBuilder, table: str, rows: int, width: int, ids: str) -> str:
    values = graph.rng.standard_normal((rows, width), dtype=np.float32)
    return graph.op(
        "Gather", f"/embeddings/{table}", graph.constant(f"embeddings.{table}.weight", values), ids
    )


def _encoder(graph: GraphBuilder, name: str, spec: Encoder, batch: int, seq: int) -> onnx.ModelProto:
    x = graph.op(
        "Add",
        "/embeddings/types",
        _embedding(graph, "token", spec.vocabulary, spec.hidden, "input_ids"),
        _embedding(graph, "type", 2, spec.hidden, "token_type_ids"),
    )
    positions = graph.constant("embeddings.position_ids", np.arange(seq, dtype=np.int64)[None])
    x = graph.op(
        "Add", "/embeddings", x, _embedding(graph, "position", spec.positions, spec.hidden, positions)
    )
    x = graph.layer_norm("/embeddings/norm", x, spec.hidden)
    bias = _attention_bias(graph, "attention_mask")
    for i in range(spec.layers):
        x = _encoder_layer(graph, f"/layers.{i}", x, bias, spec)
    inputs = [(i, TensorProto.INT64, (batch, seq)) for i in ("input_ids", "attention_mask", "token_type_ids")]
    return graph.finish(name, inputs, [("last_hidden_state", x, (batch, seq, spec.hidden))])


def _rotate(graph: GraphBuilder, scope: str, x: str, size: int, cos: str, sin: str) -> str:
    """Rotary positions on the last axis (``size`` wide): ``x * cos + rotate_half(x) * sin``."""
    low, high = graph.split(scope, x, [size // 2, size // 2], axis=-1)
    turned = graph.op("Concat", scope, graph.op("Neg", scope, high), low, axis=-1)
    return graph.op(
        "Add", scope, graph.op("Mul", f"{scope}/cos", x, cos), graph.op("Mul", f"{scope}/sin", turned, sin)
    )


def _rotary_tables(graph: GraphBuilder, spec: Decoder, seq: int) -> tuple[str, str]:
    """Cosines and sines ``[seq, head size]`` of the positions after the cached ones."""
    size = spec.hidden // spec.heads
    frequency = 10000.0 ** (-np.arange(0, size, 2) / size)
    angle = np.outer(np.arange(spec.past, spec.past + seq), np.concatenate([frequency, frequency]))
    return (
        graph.constant("rotary.cos", np.cos(angle).astype(np.float32)),
        graph.constant("rotary.sin", np.sin(angle).astype(np.float32)),
    )


def _decoder_attention(
    graph: GraphBuilder, scope: str, x: str, spec: Decoder, seq: int, past: tuple[str, str] | None
) -> str:
    """Causal grouped-query attention; the queries of a group share keys by broadcasting, without copies."""
    size, group = spec.hidden // spec.heads, spec.heads // spec.kv_heads
    cos, sin = _rotary_tables(graph, spec, seq)
    q = graph.linear(f"{scope}/q_proj", x, spec.hidden, spec.hidden, bias=False)
    k = graph.linear(f"{scope}/k_proj", x, spec.hidden, spec.kv_heads * size, bias=False)
    v = graph.linear(f"{scope}/v_proj", x, spec.hidden, spec.kv_heads * size, bias=False)
    q = _rotate(
        graph,
        f"{scope}/q_rotary",
        _attention_heads(graph, f"{scope}/q", q, spec.heads, size, [0, 2, 1, 3]),
        size,
        cos,
        sin,
    )
    k = _rotate(
        graph,
        f"{scope}/k_rotary",
        _attention_heads(graph, f"{scope}/k", k, spec.kv_heads, size, [0, 2, 1, 3]),
        size,
        cos,
        sin,
    )
    v = _attention_heads(graph, f"{scope}/v", v, spec.kv_heads, size, [0, 2, 1, 3])
    if past is not None:
        k = graph.op("Concat", f"{scope}/k_cache", past[0], k, axis=2)
        v = graph.op("Concat", f"{scope}/v_cache", past[1], v, axis=2)
    q = graph.op("Reshape", f"{scope}/groups", q, graph.ints([0, spec.kv_heads, group, seq, size]))
    k = graph.op("Unsqueeze", f"{scope}/k_group", k, graph.ints([2]))
    v = graph.op("Unsqueeze", f"{scope}/v_group", v, graph.ints([2]))
    scores = graph.op(
        "MatMul", f"{scope}/scores", q, graph.op("Transpose", f"{scope}/k_group", k, perm=[0, 1, 2, 4, 3])
    )
    scores = graph.op("Mul", f"{scope}/scores", scores, graph.scalar(1 / math.sqrt(size)))
    if seq > 1:
        lowest = np.finfo(np.float32).min
        mask = np.triu(np.full((seq, spec.past + seq), lowest, np.float32), k=spec.past + 1)
        scores = graph.op("Add", f"{scope}/scores", scores, graph.constant("causal_mask", mask))
    y = graph.op("MatMul", f"{scope}/context", graph.op("Softmax", scope, scores, axis=-1), v)
    y = graph.op("Reshape", f"{scope}/ungroup", y, graph.ints([0, spec.heads, seq, size]))
    y = graph.op("Transpose", f"{scope}/context", y, perm=[0, 2, 1, 3])
    y = graph.op("Reshape", f"{scope}/context", y, graph.ints([0, 0, spec.hidden]))
    return graph.linear(f"{scope}/o_proj", y, spec.hidden, spec.hidden, bias=False)


def _swiglu(graph: GraphBuilder, scope: str, x: str, spec: Decoder) -> str:
    gate = graph.linear(f"{scope}/gate_proj", x, spec.hidden, spec.intermediate, bias=False)
    up = graph.linear(f"{scope}/up_proj", x, spec.hidden, spec.intermediate, bias=False)
    gate = graph.op("Mul", f"{scope}/silu", gate, graph.op("Sigmoid", f"{scope}/silu", gate))
    gated = graph.op("Mul", f"{scope}/gate", gate, up)
    return graph.linear(f"{scope}/down_proj", gated, spec.intermediate, spec.hidden, bias=False)


def _decoder(graph: GraphBuilder, name: str, spec: Decoder, batch: int, seq: int) -> onnx.ModelProto:
    x = "hidden_states"
    inputs: list[tuple[str, int, tuple[int, ...]]] = [(x, TensorProto.FLOAT, (batch, seq, spec.hidden))]
    if spec.vocabulary:
        inputs = [("input_ids", TensorProto.INT64, (batch, seq))]
        x = _embedding(graph, "token", spec.vocabulary, spec.hidden, "input_ids")
    cache_shape = (batch, spec.kv_heads, spec.past, spec.hidden // spec.heads)
    for i in range(spec.layers):
        past = (f"past.{i}.key", f"past.{i}.value") if spec.past else None
        inputs += [(cached, TensorProto.FLOAT, cache_shape) for cached in past or ()]
        scope = f"/layers.{i}"
        y = graph.rms_norm(f"{scope}/attention/norm", x, spec.hidden)
        y = _decoder_attention(graph, f"{scope}/attention", y, spec, seq, past)
        x = graph.op("Add", f"{scope}/attention/residual", x, y)
        y = _swiglu(graph, f"{scope}/mlp", graph.rms_norm(f"{scope}/mlp/norm", x, spec.hidden), spec)
        x = graph.op("Add", f"{scope}/mlp/residual", x, y)
    if not spec.vocabulary:
        return graph.finish(name, inputs, [("output_states", x, (batch, seq, spec.hidden))])
    x = graph.rms_norm("/norm", x, spec.hidden)
    x = graph.linear("/lm_head", x, spec.hidden, spec.vocabulary, bias=False)
    return graph.finish(name, inputs, [("logits", x, (batch, seq, spec.vocabulary))])


def _classifier(graph: GraphBuilder, x: str, width: int, classes: int) -> str:
    x = graph.op("Flatten", "/classifier", graph.op("GlobalAveragePool", "/classifier", x), axis=1)
    weight = graph.constant("classifier.weight", graph.weight((classes, width), prunable=False))
    bias = graph.constant("classifier.bias", np.zeros(classes, np.float32))
    return graph.op("Gemm", "/classifier", x, weight, bias, transB=1)


def _bottleneck(
    graph: GraphBuilder, scope: str, x: str, inputs: int, middle: int, stride: int, batch_norm: bool
) -> str:
    """1x1, 3x3 (with the stride), 1x1 and a residual, four times as wide at the end."""
    y = graph.op(
        "Relu", f"{scope}/conv1", graph.conv(f"{scope}/conv1", x, inputs, middle, batch_norm=batch_norm)
    )
    y = graph.conv(f"{scope}/conv2", y, middle, middle, 3, stride=stride, batch_norm=batch_norm)
    y = graph.op("Relu", f"{scope}/conv2", y)
    y = graph.conv(f"{scope}/conv3", y, middle, 4 * middle, batch_norm=batch_norm, gain=0.5)
    if stride != 1 or inputs != 4 * middle:
        x = graph.conv(f"{scope}/shortcut", x, inputs, 4 * middle, stride=stride, batch_norm=batch_norm)
    return graph.op("Relu", scope, graph.op("Add", scope, y, x))


def _resnet(graph: GraphBuilder, name: str, spec: ResNet, batch: int) -> onnx.ModelProto:
    norm = bool(spec.batch_norm)
    x = graph.conv("/stem", "image", 3, spec.width, 7, stride=2, prunable=False, batch_norm=norm)
    x = graph.op("Relu", "/stem", x)
    x = graph.op("MaxPool", "/stem", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = spec.width
    for stage, depth in enumerate(spec.depths):
        middle = spec.width * 2**stage
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            x = _bottleneck(graph, f"/stages.{stage}/blocks.{block}", x, channels, middle, stride, norm)
            channels = 4 * middle
    logits = _classifier(graph, x, channels, spec.classes)
    inputs = [("image", TensorProto.FLOAT, (batch, 3, spec.image, spec.image))]
    return graph.finish(name, inputs, [("logits", logits, (batch, spec.classes))])


def _relu6(graph: GraphBuilder, scope: str, x: str) -> str:
    return graph.op("Clip", scope, x, graph.scalar(0.0), graph.scalar(6.0))


def _mobile_block(
    graph: GraphBuilder, scope: str, x: str, inputs: int, outputs: int, expansion: int, stride: int
) -> str:
    """A depthwise-separable block (expansion 0: MobileNet V1) or an inverted residual (V2)."""
    y, middle = x, inputs * max(1, expansion)
    if expansion > 1:
        y = _relu6(graph, f"{scope}/expand", graph.conv(f"{scope}/expand", y, inputs, middle))
    y = graph.conv(f"{scope}/depthwise", y, middle, middle, 3, stride=stride, groups=middle, prunable=False)
    y = _relu6(graph, f"{scope}/depthwise", y)
    y = graph.conv(f"{scope}/project", y, middle, outputs)
    if expansion == 0:
        return _relu6(graph, f"{scope}/project", y)
    return graph.op("Add", scope, y, x) if stride == 1 and inputs == outputs else y


def _mobilenet(graph: GraphBuilder, name: str, spec: MobileNet, batch: int) -> onnx.ModelProto:
    x = _relu6(graph, "/stem", graph.conv("/stem", "image", 3, spec.stem, 3, stride=2, prunable=False))
    channels = spec.stem
    for stage, (expansion, outputs, repeats, stride) in enumerate(spec.stages):
        for block in range(repeats):
            scope = f"/stages.{stage}/blocks.{block}"
            x = _mobile_block(graph, scope, x, channels, outputs, expansion, stride if block == 0 else 1)
            channels = outputs
    if spec.head:
        x = _relu6(graph, "/head", graph.conv("/head", x, channels, spec.head))
        channels = spec.head
    logits = _classifier(graph, x, channels, spec.classes)
    inputs = [("image", TensorProto.FLOAT, (batch, 3, spec.image, spec.image))]
    return graph.finish(name, inputs, [("logits", logits, (batch, spec.classes))])


def _parse_overrides(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, int]:
    try:
        return {key: int(number) for key, number in (value.split("=") for value in values)}
    except ValueError as error:
        raise click.BadParameter("must be FIELD=INTEGER, for instance layers=2") from error


@click.command(help=__doc__.split("\n")[0])
@click.argument("name", type=click.Choice(sorted(ZOO)))
@click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write."
)
@click.option("--batch", default=1, show_default=True, help="Inputs per run.")
@click.option("--seq", default=128, show_default=True, help="Tokens per sequence.")
@click.option("--opset", default=17, show_default=True, help="Default operator set.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights and masks.")
@click.option("--pattern", default="dense", show_default=True, help="dense, unstructured, N:M or RxC.")
@click.option("--sparsity", default=0.0, show_default=True, help="Share of zeros.")
@click.option(
    "--set", "overrides", multiple=True, callback=_parse_overrides, help="FIELD=INTEGER of the size."
)
def main(name: str, output: Path, overrides: dict[str, Any], **options: Any) -> None:
    """Build one architecture and write it."""
    try:
        model = build(name, **options, **overrides)
    except SparseccError as error:
        raise click.UsageError(str(error)) from error
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(ZOO[name]))
        raise click.UsageError(f"{name} has no such size; its fields are: {fields}") from error
    onnx.save(model, output)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(model.graph.node)} nodes")


if __name__ == "__main__":
    main()
