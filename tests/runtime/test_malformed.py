"""A model file is untrusted: whatever its weights say, session creation refuses and nothing crashes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sparsecc import emit, runtime
from sparsecc.errors import ModelError
from sparsecc.ir import ConvGeometry
from sparsecc.sparse import QuantizedTensor, pack_gaps

Mutation = Callable[[onnx.ModelProto], None]

GEOMETRY = ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2)


def _linear(packed, pattern: str = "unstructured", activation: str = "") -> onnx.ModelProto:
    parameters = {"Clip": {"lo": 0.0, "hi": 6.0}, "LeakyRelu": {"alpha": 0.1}}.get(activation)
    return emit.single_op_model(
        packed((32, 40), pattern), ["B", 40], activation=activation, parameters=parameters
    ).to_proto()


def _conv(packed, pattern: str = "unstructured") -> onnx.ModelProto:
    shape = (32, 4, 3, 3)
    return emit.single_op_model(
        packed(shape, pattern), ["B", 8, "H", "W"], weight_shape=shape, conv=GEOMETRY
    ).to_proto()


def _int8(packed, pattern: str = "16x1", activation: str = "") -> onnx.ModelProto:
    weight = packed((32, 40), pattern)
    weight = QuantizedTensor.encode(weight.decode(), weight.pattern)
    parameters = {"Clip": {"lo": 0.0, "hi": 6.0}, "LeakyRelu": {"alpha": 0.1}}.get(activation)
    return emit.single_op_model(weight, ["B", 40], activation=activation, parameters=parameters).to_proto()


def _get(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == f"op.{name}").copy()


def _put(name: str, change: Callable[[np.ndarray], object]) -> Mutation:
    """Replace initializer ``name`` by what ``change`` makes of it."""

    def mutate(proto: onnx.ModelProto) -> None:
        full = f"op.{name}"
        tensor = next(t for t in proto.graph.initializer if t.name == full)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(change(_get(proto, name))), full))

    return mutate


def _attribute(name: str, value: object) -> Mutation:
    """Set attribute ``name`` of the node; ``None`` removes it."""

    def mutate(proto: onnx.ModelProto) -> None:
        node = proto.graph.node[0]
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        if value is not None:
            kept.append(onnx.helper.make_attribute(name, value))
        del node.attribute[:]
        node.attribute.extend(kept)

    return mutate


def _both(*mutations: Mutation) -> Mutation:
    def mutate(proto: onnx.ModelProto) -> None:
        for each in mutations:
            each(proto)

    return mutate


def _as_graph_input(name: str) -> Mutation:
    """Make the constant overridable, so that its value is not known when the kernel is made."""

    def mutate(proto: onnx.ModelProto) -> None:
        value = _get(proto, name)
        info = onnx.helper.make_tensor_value_info(
            f"op.{name}", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        proto.graph.input.append(info)

    return mutate


def _computed(name: str) -> Mutation:
    """Feed the input from a node that onnxruntime cannot fold."""

    def mutate(proto: onnx.ModelProto) -> None:
        value = _get(proto, name)
        dtype = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        proto.graph.input.append(onnx.helper.make_tensor_value_info("late", dtype, value.shape))
        proto.graph.node.insert(0, onnx.helper.make_node("Identity", ["late"], ["computed"]))
        node = proto.graph.node[1]
        node.input[list(node.input).index(f"op.{name}")] = "computed"

    return mutate


def _gaps(*tokens: int) -> np.ndarray:
    stream = np.array([*tokens, *[15] * (len(tokens) % 2)], np.uint8)
    return stream[0::2] | stream[1::2] << 4


# Faults of any weight: what to do to the model, and what our message must say. An empty message: the type is
# wrong, and onnxruntime says so first.
COMMON: dict[str, tuple[Mutation, str]] = {
    "a value too few": (_put("values", lambda v: v[:-1]), "more than the [0-9]+ stored values"),
    "a value too many": (_put("values", lambda v: np.concatenate([v, v[:1]])), "stored values|cannot place"),
    "no values": (_put("values", lambda v: v[:0]), "more than the 0 stored values"),
    "values float64": (_put("values", lambda v: v.astype(np.float64)), ""),
    "values int32": (_put("values", lambda v: v.astype(np.int32)), ""),
    "values rank 2": (_put("values", lambda v: v.reshape(1, *v.shape)), "'values' has shape"),
    "values scalar": (_put("values", lambda v: v.ravel()[0]), "'values' has shape"),
    "indices truncated": (_put("indices", lambda i: i[:-3]), "index bytes cannot place"),
    "indices empty": (_put("indices", lambda i: i[:0]), "0 index bytes cannot place"),
    "indices too long": (
        _put("indices", lambda i: np.concatenate([i, i])),
        "the grid has|more than the [0-9]+ stored",
    ),
    "indices run out of the grid": (
        _put("indices", lambda i: np.full_like(i, 0xEE)),
        "reaches position [0-9]+, the grid has",
    ),
    "indices all skips": (_put("indices", lambda i: np.full_like(i, 0xFF)), "runs past the grid"),
    "indices two million skips": (
        _put("indices", lambda i: np.full(1 << 20, 0xFF, np.uint8)),
        "runs past the grid",
    ),
    "indices all zero gaps": (_put("indices", np.zeros_like), "repeats a position"),
    "indices int8": (_put("indices", lambda i: i.view(np.int8)), ""),
    "indices rank 2": (_put("indices", lambda i: i.reshape(1, -1)), "'indices' has shape"),
    "shape negative": (_put("shape", np.negative), "every entry must be in"),
    "shape zero": (_put("shape", lambda s: s * 0), "every entry must be in"),
    "shape int64 minimum": (
        _put("shape", lambda s: s * 0 + np.iinfo(np.int64).min),
        "every entry must be in",
    ),
    "shape int64 maximum": (
        _put("shape", lambda s: s * 0 + np.iinfo(np.int64).max),
        "every entry must be in",
    ),
    "shape product overflows": (_put("shape", lambda s: s * 0 + 2**31 - 1), "must have at most|'bias' has"),
    "shape more outputs": (
        _put("shape", lambda s: [s[0] + 1, *s[1:]]),
        "'bias' has 32 entries, the weight has 33",
    ),
    "shape fewer outputs": (
        _put("shape", lambda s: [s[0] - 1, *s[1:]]),
        "'bias' has 32 entries, the weight has 31",
    ),
    "shape fewer outputs, bias too": (
        _both(_put("shape", lambda s: [1, *s[1:]]), _put("bias", lambda b: b[:1])),
        "a grid of|the grid has|does not divide",
    ),
    "shape rank 0": (_put("shape", lambda s: s[0]), "'shape' has shape"),
    "shape rank 2": (_put("shape", lambda s: s.reshape(1, -1)), "'shape' has shape"),
    "shape empty": (_put("shape", lambda s: s[:0]), "'shape' has 0 entries"),
    "shape one entry": (_put("shape", lambda s: s[:1]), "'shape' has 1 entries"),
    "shape five entries": (_put("shape", lambda s: [*s, 1, 1, 1][:5]), "'shape' has 5 entries"),
    "shape int32": (_put("shape", lambda s: s.astype(np.int32)), ""),
    "bias too short": (_put("bias", lambda b: b[:-1]), "'bias' has 31 entries, the weight has 32 outputs"),
    "bias too long": (_put("bias", lambda b: np.append(b, b[:1])), "'bias' has 33 entries"),
    "bias scalar": (_put("bias", lambda b: b[0]), "'bias' has shape"),
    "bias empty": (_put("bias", lambda b: b[:0]), "'bias' has 0 entries"),
    "layout version 2": (_attribute("layout_version", 2), "layout_version 2 is not supported"),
    "layout version huge": (_attribute("layout_version", 2**32 + 1), "layout_version 4294967297"),
    "layout version missing": (_attribute("layout_version", None), "'layout_version' is missing"),
    "layout version text": (_attribute("layout_version", "1"), "'layout_version' .* is not an integer"),
    "layout missing": (_attribute("layout", None), "'layout' is missing"),
    "layout a number": (_attribute("layout", 5), "'layout' .* is not a text"),
    "layout empty": (_attribute("layout", ""), "layout"),
    "layout unknown": (_attribute("layout", "csr"), "layout"),
    "layout 0:4": (_attribute("layout", "0:4"), "layout"),
    "layout 4:4": (_attribute("layout", "4:4"), "layout"),
    "layout 2:99": (_attribute("layout", "2:99"), "layout"),
    "layout 2:4x": (_attribute("layout", "2:4x"), "layout"),
    "layout -2:4": (_attribute("layout", "-2:4"), "layout"),
    "layout 0x1": (_attribute("layout", "0x1"), "layout"),
    "layout -1x-1": (_attribute("layout", "-1x-1"), "layout"),
    "layout 99999x99999": (_attribute("layout", "99999x99999"), "layout"),
    "layout very long": (_attribute("layout", "x" * 100_000), "has 100000 characters"),
    "layout with a zero byte": (_attribute("layout", "unstructured\0"), "holds a zero byte"),
    "layout of several lines": (_attribute("layout", "un\nstruc\ntured"), "layout"),
    "values from a graph input": (_as_graph_input("values"), "'values' must be a constant initializer"),
    "indices from a graph input": (_as_graph_input("indices"), "'indices' must be a constant initializer"),
    "shape from a graph input": (_as_graph_input("shape"), "'shape' must be a constant initializer"),
    "bias from a graph input": (_as_graph_input("bias"), "'bias' must be a constant initializer"),
    "values computed": (_computed("values"), "'values' must be a constant initializer"),
    "bias computed": (_computed("bias"), "'bias' must be a constant initializer"),
}

CONV: dict[str, tuple[Mutation, str]] = {
    "group does not divide": (_attribute("group", 3), "'group' is 3, which does not divide"),
    "group zero": (_attribute("group", 0), "'group'"),
    "group negative": (_attribute("group", -2), "'group'"),
    "group huge": (_attribute("group", 2**62), "'group'"),
    "group missing": (_attribute("group", None), "'group' is missing"),
    "strides zero": (_attribute("strides", [0, 1]), "'strides'"),
    "strides negative": (_attribute("strides", [1, -1]), "'strides'"),
    "strides too few": (_attribute("strides", [1]), "'strides' has 1 entries, expected 2"),
    "strides missing": (_attribute("strides", None), "'strides' is missing"),
    "strides floats": (_attribute("strides", [1.5, 1.5]), "'strides'"),
    "dilations zero": (_attribute("dilations", [1, 0]), "'dilations'"),
    "dilations huge": (_attribute("dilations", [2**62, 2**62]), "'dilations'"),
    "dilations too many": (_attribute("dilations", [1, 1, 1]), "'dilations' has 3 entries, expected 2"),
    "pads negative": (_attribute("pads", [-1, 0, 0, 0]), "'pads'"),
    "pads two": (_attribute("pads", [1, 1]), "'pads' has 2 entries, expected 4"),
    "shape of a matrix": (_put("shape", lambda s: [32, 36]), "'shape' has 2 entries, expected 3 or 4"),
    "kernel overflows": (_put("shape", lambda s: [32, 2**16, 2**16, 2**16]), "at most 2147483647"),
}

BLOCK: dict[str, tuple[Mutation, str]] = {
    "layout of elements": (_attribute("layout", "unstructured"), "expected blocks"),
    "layout N:M": (_attribute("layout", "2:4"), "expected blocks"),
    "layout other block": (_attribute("layout", "8x2"), "which is not layout '8x2'"),
    "layout transposed": (_attribute("layout", "1x16"), "which is not layout '1x16'"),
    "layout with a tail": (_attribute("layout", "16x1x1"), "expected blocks"),
    "layout with a space": (_attribute("layout", " 16x1"), "expected blocks"),
    "layout hexadecimal": (_attribute("layout", "0x1"), "expected blocks"),
    "values flat": (_put("values", np.ravel), "'values' has shape"),
    "values wrong block": (_put("values", lambda v: v.reshape(-1, 8, 2)), "'values' has shape"),
    "a block too few": (_put("values", lambda v: v[:-1]), "more than the [0-9]+ stored values or blocks"),
}

INT8: dict[str, tuple[Mutation, str]] = {
    "values uint8": (_put("values", lambda v: v.view(np.uint8)), ""),
    "values float32": (_put("values", lambda v: v.astype(np.float32)), ""),
    "scales too short": (
        _put("scales", lambda s: s[:-1]),
        "'scales' has 31 entries, the weight has 32 outputs",
    ),
    "scales too long": (_put("scales", lambda s: np.append(s, s[:1])), "'scales' has 33 entries"),
    "scales empty": (_put("scales", lambda s: s[:0]), "'scales' has 0 entries"),
    "scales scalar": (_put("scales", lambda s: s[0]), "'scales' has shape"),
    "scales rank 2": (_put("scales", lambda s: s[None]), "'scales' has shape"),
    "scales float64": (_put("scales", lambda s: s.astype(np.float64)), ""),
    "scales NaN": (_put("scales", lambda s: [*s[:-1], np.float32(np.nan)]), "scale of output 31 is not"),
    "scales infinite": (_put("scales", lambda s: [np.float32(np.inf), *s[1:]]), "scale of output 0 is not"),
    "scales zero": (_put("scales", lambda s: s * 0), "scale of output 0 is not a finite positive"),
    "scales negative": (_put("scales", np.negative), "scale of output 0 is not a finite positive"),
    "shape fewer outputs, bias too": (
        _both(
            _put("shape", lambda s: [1, *s[1:]]),
            _put("bias", lambda b: b[:1]),
            _put("scales", lambda s: s[:1]),
        ),
        "a grid of|the grid has",
    ),
    "scales from a graph input": (_as_graph_input("scales"), "'scales' must be a constant initializer"),
    "scales computed": (_computed("scales"), "'scales' must be a constant initializer"),
}

ELEMENTS: dict[str, tuple[Mutation, str]] = {
    "layout of blocks": (_attribute("layout", "16x1"), "expected 'unstructured' or N:M"),
    "layout 2:4 of unstructured values": (
        _attribute("layout", "2:4"),
        "row 0 keeps [0-9]+ .* layout 2:4 needs 2",
    ),
    "starts with an idle zero gap": (
        _both(_put("indices", lambda i: _gaps(0, 1)), _put("values", lambda v: v[:2])),
        "repeats a position",
    ),
}

NM: dict[str, tuple[Mutation, str]] = {
    "other group length": (_attribute("layout", "2:8"), "layout 2:8 needs 2"),
    "denser than stored": (_attribute("layout", "3:4"), "layout 3:4 needs 3"),
    "one group over, one under": (
        _put("indices", lambda i: pack_gaps(np.sort(_move_one_column(i)))),
        "row 0 keeps 1 .* layout 2:4 needs 2",
    ),
}


def _move_one_column(indices: np.ndarray) -> np.ndarray:
    """Positions in which one entry of the first group went to the second."""
    from sparsecc.sparse import unpack_gaps

    positions = unpack_gaps(indices)
    free = np.setdiff1d(np.arange(4, 8), positions)
    positions[0] = free[0]
    return positions


def _cases(table: dict[str, tuple[Mutation, str]]) -> list:
    return [pytest.param(*case, id=name) for name, case in table.items()]


def _refused(session, proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (onnxruntime's classes are not public)
        session(proto, library=True)
    if not message:  # onnxruntime's own type check comes first
        return
    text = str(caught.value)
    assert "sparsecc: node 'op' (" in text
    ours = text[text.index("sparsecc:") :].strip()
    assert "\n" not in ours
    assert re.search(message, ours), ours


@pytest.mark.parametrize(("mutate", "message"), _cases(COMMON))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1"])
@pytest.mark.parametrize("make", [_linear, _conv])
def test_fault_of_any_weight(session, packed, make, pattern: str, mutate: Mutation, message: str) -> None:
    proto = make(packed, pattern)
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize(("mutate", "message"), _cases(CONV))
@pytest.mark.parametrize("pattern", ["unstructured", "16x1"])
def test_fault_of_a_convolution(session, packed, pattern: str, mutate: Mutation, message: str) -> None:
    proto = _conv(packed, pattern)
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize(("mutate", "message"), _cases(BLOCK))
@pytest.mark.parametrize("make", [_linear, _conv])
def test_fault_of_blocks(session, packed, make, mutate: Mutation, message: str) -> None:
    proto = make(packed, "16x1")
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize(("mutate", "message"), _cases(COMMON | BLOCK | INT8))
def test_fault_of_int8_weights(session, packed, mutate: Mutation, message: str) -> None:
    proto = _int8(packed)
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize(("mutate", "message"), _cases(ELEMENTS))
@pytest.mark.parametrize("make", [_linear, _conv, _int8])
def test_fault_of_elements(session, packed, make, mutate: Mutation, message: str) -> None:
    proto = make(packed, "unstructured")
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize(("mutate", "message"), _cases(NM))
@pytest.mark.parametrize("make", [_linear, _int8])
def test_fault_of_groups(session, packed, make, mutate: Mutation, message: str) -> None:
    proto = make(packed, "2:4")
    mutate(proto)
    _refused(session, proto, message)


@pytest.mark.parametrize("bound", ["lo", "hi"])
@pytest.mark.parametrize("change", [lambda b: np.stack([b, b]), lambda b: np.zeros(0, np.float32)])
@pytest.mark.parametrize("make", [_linear, _int8])
def test_bound_of_clip_must_be_one_number(session, packed, make, bound: str, change) -> None:
    proto = make(packed, activation="Clip")
    _put(bound, change)(proto)
    _refused(session, proto, f"'{bound}' has shape .* expected one number")


def test_slope_of_leaky_relu_is_needed(session, packed) -> None:
    proto = _linear(packed, activation="LeakyRelu")
    _attribute("alpha", None)(proto)
    _refused(session, proto, "'alpha' is missing")


def test_blocks_may_not_cross_groups(session, packed) -> None:
    shape = (24, 4, 3, 3)  # 12 outputs a group
    proto = emit.single_op_model(
        packed(shape, "16x1"), ["B", 8, "H", "W"], weight_shape=shape, conv=GEOMETRY
    ).to_proto()
    _refused(session, proto, "blocks of 16 outputs cross the convolution's groups of 12")


def test_name_of_the_node_cannot_break_the_line(session, packed) -> None:
    proto = _linear(packed)
    proto.graph.node[0].name = "two\nlines" + "x" * 10_000
    _put("bias", lambda b: b[:-1])(proto)
    with pytest.raises(Exception, match=r"node 'two\?linesx{191}\.\.\.' \(SparseMatMul\): input 'bias'"):
        session(proto, library=True)


# ---- random damage --------------------------------------------------------------------------------------


def _damaged(rng: np.random.Generator, stream: np.ndarray) -> np.ndarray:
    """``stream`` with a few bits flipped, cut, or with something inserted."""
    stream = stream.copy()
    kind = rng.integers(4)
    if kind == 0 and stream.size:
        return stream[: rng.integers(stream.size)]
    if kind == 1:
        return np.insert(stream, rng.integers(stream.size + 1), rng.integers(256, dtype=np.uint8))
    for _ in range(rng.integers(1, 4)):
        stream[rng.integers(stream.size)] ^= np.uint8(1 << rng.integers(8))
    return stream


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8", "16x1", "16x4"])
def test_damaged_index_streams_are_refused_exactly_when_python_refuses(packed, pattern: str) -> None:
    """What both accept, both decode to the same matrix."""
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        shape = tuple(int(side) for side in rng.integers(1, 40, 2))
        weight = packed(shape, pattern, float(rng.choice([0.3, 0.9])), int(rng.integers(1 << 30)))
        if not weight.indices.size:
            continue
        damaged = dataclasses.replace(weight, indices=_damaged(rng, weight.indices))
        try:
            dense = damaged.decode()
        except ModelError:
            with pytest.raises(ModelError):
                runtime.NativeMatMul(pattern, shape, damaged.values, damaged.indices)
            continue
        accepted += 1
        with runtime.NativeMatMul(pattern, shape, damaged.values, damaged.indices) as op:
            np.testing.assert_allclose(op(np.eye(shape[1], dtype=np.float32)), dense.T)
    assert accepted > 0


def test_models_with_flipped_bytes_never_crash(session, packed) -> None:
    """Every session is refused or runs; reaching the end is the test."""
    rng = np.random.default_rng(1)
    originals = [
        _linear(packed),
        _linear(packed, "2:4"),
        _linear(packed, "16x1"),
        _conv(packed),
        _int8(packed),
    ]
    originals = [proto.SerializeToString() for proto in originals]
    ran = 0
    for round_ in range(240):
        data = bytearray(originals[round_ % len(originals)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        proto = onnx.ModelProto()
        try:
            proto.ParseFromString(bytes(data))
            opened = session(proto, library=True)
            x = opened.get_inputs()[0]
            shape = (2, 8, 5, 5) if len(x.shape) == 4 else (2, 40)
            opened.run(None, {x.name: np.ones(shape, np.float32)})
            ran += 1
        except Exception:  # any will do: a crash would end the process
            continue
    assert ran > 10
