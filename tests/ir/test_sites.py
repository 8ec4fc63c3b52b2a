from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir
import pytest

from sparsecc.errors import PassError, SpecError
from sparsecc.ir import Model, conv_geometry

RNG = np.random.default_rng(0)
LOCAL = '<ir_version: 10, opset_import: ["": 17, "local": 1]>'


def weight(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def only(model):
    (site,) = model.sites()
    assert model.unsupported_sites() == []
    return site


def reasons(model):
    assert model.sites() == []
    return [reason for _, reason in model.unsupported_sites()]


# ---------------------------------------------------------------------------------- the matrix view


@pytest.mark.parametrize(
    ("node", "stored"),
    [
        ("MatMul(x, w)", (6, 5)),
        ("Gemm(x, w, b)", (6, 5)),
        ("Gemm <transB: int = 1> (x, w, b)", (5, 6)),
        ("Gemm <transB: int = 1, alpha: float = 2.0> (x, w)", (5, 6)),
    ],
)
def test_linear(model, run, node, stored):
    m = model(f"g (float[3,6] x) => (float[3,5] y) {{ [lin] y = {node} }}", w=weight(*stored), b=weight(5))
    site = only(m)
    assert (site.name, site.op, site.shape, site.weight_shape) == (
        "lin",
        node.split()[0].split("(")[0],
        (5, 6),
        stored,
    )
    assert (site.weight_name, site.input_name, site.groups, site.conv) == ("w", "x", 1, None)
    assert site.numpy().flags.c_contiguous
    assert site.in_main_graph
    x = weight(3, 6)
    plain = run(m, {"x": x})[0]
    changed = m.copy()
    new = weight(5, 6)
    before = only(changed).numpy()
    only(changed).replace(new)
    scale = 2 if "alpha" in node else 1
    expected = plain + scale * x @ (new - before).T
    assert np.allclose(run(changed, {"x": x})[0], expected, atol=1e-5)
    assert np.array_equal(run(m, {"x": x})[0], plain)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("spatial", [(7,), (7, 7), (4, 4, 4)])
def test_conv(model, groups, spatial):
    kernel = (3,) * len(spatial)
    w = weight(8, 4 // groups, *kernel)
    shape = ",".join(map(str, spatial))
    text = f"g (float[1,4,{shape}] x) => (float[1,8,{','.join('?' * len(spatial))}] y) {{"
    m = model(f"{text} y = Conv <group: int = {groups}> (x, w) }}", w=w)
    site = only(m)
    assert (site.name, site.op, site.groups, site.depthwise) == ("y", "Conv", groups, groups == 4)
    assert site.shape == (8, 4 // groups * 3 ** len(spatial))
    assert np.array_equal(site.numpy(), w.reshape(8, -1))
    assert (site.conv.ndim, site.conv.kernel_shape, site.conv.group) == (len(spatial), kernel, groups)
    site.replace(site.numpy() * 2)
    assert np.array_equal(m.onnx.graph.initializers["w"].const_value.numpy(), w * 2)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_recurrent(model, op, gates):
    text = f"g (float[T,B,5] x) => (float[T,2,B,3] y) {{ [r] y = {op} <hidden_size: int = 3,"
    weights = {"w": weight(2, gates * 3, 5), "r": weight(2, gates * 3, 3)}
    m = model(f'{text} direction: string = "bidirectional"> (x, w, r) }}', **weights)
    first, second = m.sites()
    assert (first.name, first.shape, first.input_name) == ("r.W", (2 * gates * 3, 5), "x")
    assert (second.name, second.shape, second.input_name) == ("r.R", (2 * gates * 3, 3), "")
    assert np.array_equal(second.numpy(), weights["r"].reshape(-1, 3))
    second.replace(np.zeros(second.shape))
    assert m.onnx.graph.initializers["r"].const_value.numpy().shape == (2, gates * 3, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types(proto, dtype):
    name = onnx_ir.DataType.from_numpy(np.dtype(dtype)).name.lower()
    m = Model.from_proto(
        proto(f"g ({name}[B,4] x) => ({name}[B,2] y) {{ y = MatMul(x, w) }}", w=weight(4, 2, dtype=dtype))
    )
    site = only(m)
    assert site.dtype == site.numpy().dtype == dtype
    site.replace(np.ones((2, 4), np.float32))
    assert site.numpy().dtype == dtype
    assert (site.numpy() == 1).all()


def test_replace_checks_the_shape_and_takes_a_copy(model):
    site = only(model("g (float[B,4] x) => (float[B,2] y) { y = MatMul(x, w) }", w=weight(4, 2)))
    with pytest.raises(PassError, match="expected"):
        site.replace(np.ones((4, 2)))
    array = np.ones((2, 4), np.float32)
    site.replace(array)
    array[:] = 0
    assert site.numpy().all()


# ------------------------------------------------------------------- between the constant and the node


@pytest.mark.parametrize("op", ["MatMul(x, v)", "Gemm <transB: int = 1> (x, v)"])
@pytest.mark.parametrize("way", ["Identity(w)", "Transpose(w)", "Transpose <perm: ints = [1, 0]> (w)"])
def test_through_identity_and_transpose(model, run, op, way):
    turned = ("Transpose" in way) != ("Gemm" in op)
    m = model(
        f"g (float[3,6] x) => (float[3,5] y) {{ v = {way} y = {op} }}",
        w=weight(*((5, 6) if turned else (6, 5))),
    )
    site = only(m)
    x = weight(3, 6)
    assert np.allclose(run(m, {"x": x})[0], x @ site.numpy().T, atol=1e-5)
    site.replace(np.eye(5, 6))
    assert np.allclose(run(m, {"x": x})[0], x[:, :5], atol=1e-6)


def test_constant_nodes(model, run):
    numbers = ", ".join(["1.5"] * 12)
    m = model(
        f"g (float[3,4] x) => (float[3,3] y) {{ w = Constant <value = float[4,3] {{{numbers}}}> ()"
        " y = MatMul(x, w) }"
    )
    site = only(m)
    assert (site.weight_name, site.shape) == ("w", (3, 4))
    copied = m.copy()
    only(copied).replace(np.ones((3, 4)))
    x = weight(3, 4)
    assert np.allclose(run(copied, {"x": x})[0], x.sum(1, keepdims=True).repeat(3, 1), atol=1e-6)
    assert (site.numpy() == 1.5).all()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, x)", "input of the graph"),
        ("t = Transpose(x) y = MatMul(x, t)", "both operands"),
        ("y = MatMul(w, x)", "left operand"),
        ("y = Gemm <transA: int = 1> (x, w)", "transA"),
        ("v = Abs(w) y = MatMul(x, v)", "goes through Abs: fold"),
        ("h = CastLike(w, x) y = Gemm(x, h)", "run time by CastLike"),
        ("v = Unsqueeze(w, a) y = MatMul(x, v)", "goes through Unsqueeze"),
        ("y = MatMul(x, vector)", "rank 1"),
        ("y = MatMul(x, batch)", "rank 3"),
        ("y = MatMul(x, none)", "empty"),
        ("y = ConvTranspose(x, image)", "ConvTranspose"),
        ("y = Conv <group: int = 3> (x, image)", "group=3"),
        ("v = Transpose <perm: ints = [1, 0, 2, 3]> (image) y = Conv(x, v)", "goes through Transpose"),
        ("y = Conv <strides: ints = [1]> (x, image)", "strides of the wrong length"),
        ('y = Einsum <equation: string = "ij,jk"> (x, w)', "Einsum"),
        (
            "i = Cast <to: int = 3> (x) j = MatMulInteger(i, bytes) y = Cast <to: int = 1> (j)",
            "no QuantizeLinear in front",
        ),
        ("v = Constant <value_floats: floats = [1.0, 2.0]> () y = MatMul(x, v)", "without a fixed tensor"),
    ],
)
def test_what_is_no_site_has_a_reason(model, body, reason):
    weights = {
        "w": weight(4, 4), "a": np.array([0]), "vector": weight(4), "batch": weight(2, 4, 4),
        "none": weight(4, 0), "image": weight(4, 4, 1, 1), "bytes": np.ones((4, 4), np.int8), "s": np.float32(1),
    }  # fmt: skip
    used = {name: array for name, array in weights.items() if re.search(rf"\b{name}\b", body)}
    m = model(f"g (float[?,?] x) => (float[?,?] y) {{ {body} }}", **used)
    found = reasons(m)
    assert any(reason in text for text in found), found
    assert all("\n" not in text for text in found)


def test_a_weight_that_is_an_output_or_an_input_of_the_graph(model):
    text = "g (float[B,4] x) => (float[B,4] y, float[4,4] w) { y = MatMul(x, w) }"
    assert "output of the graph" in reasons(model(text, w=weight(4, 4)))[0]
    text = "g (float[B,4] x, float[4,4] w) => (float[B,4] y) { y = MatMul(x, w) }"
    assert "input of the graph" in reasons(model(text))[0]
    m = model(text, w=weight(4, 4))  # taken off the inputs at loading; put back, it is refused
    m.onnx.graph.inputs.append(m.onnx.graph.initializers["w"])
    assert "override" in reasons(m)[0]


# ------------------------------------------------------------------------------------- tied weights


def test_tied_weights_are_one_site(model):
    text = """g (float[B,4] x) => (float[B,4] y) {
      [one] h = MatMul(x, w) t = Transpose(w)
      [two] i = Gemm <transB: int = 1> (h, t) [three] y = MatMul(i, w) }"""
    site = only(model(text, w=weight(4, 4)))
    assert [node.name for node in site.nodes] == ["one", "two", "three"]
    assert site.name == "one"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul(x, w) y = Gemm <transB: int = 1> (h, w)", "differently"),
        ("h = MatMul(x, w) t = Transpose(w) y = MatMul(h, t)", "differently"),
        ("e = Gather(w, i) y = MatMul(e, w)", "also read by Gather"),
        ("h = Identity(w) e = Gather(h, i) y = MatMul(e, w)", "also read by Gather"),
        ("h = MatMul(x, w) y = Add(h, w)", "also read by Add"),
        ("h = MatMul(x, w) y = MatMul(w, h)", "also read by MatMul"),
    ],
)
def test_tied_weights_that_disagree_are_refused(model, body, reason):
    m = model(f"g (float[4,4] x, int64[4] i) => (float[?,?] y) {{ {body} }}", w=weight(4, 4))
    assert any(reason in text for text in reasons(m))


def test_tied_convs_may_differ_in_stride_but_not_in_groups(model):
    text = "g (float[1,4,8,8] x) => (float[?,?,?,?] y) {{ h = Conv(x, w) y = Conv <{}> ({}, w) }}"
    m = model(text.format("strides: ints = [2, 2]", "h"), w=weight(4, 4, 1, 1))
    first, second = only(m).nodes
    assert conv_geometry(first, (4, 4, 1, 1)).strides == (1, 1)
    assert conv_geometry(second, (4, 4, 1, 1)).strides == (2, 2)
    wide = """g (float[1,4,8,8] x, float[1,8,8,8] z) => (float[?,?,?,?] y)
      { h = Conv(x, w) y = Conv <group: int = 2> (z, w) }"""
    assert "differently" in reasons(model(wide, w=weight(4, 4, 1, 1)))[0]


def test_a_node_removed_without_detaching_is_no_reader(model):
    m = model("g (float[B,4] x) => (float[B,4] y) { h = Add(x, w) y = MatMul(x, w) }", w=weight(4, 4))
    assert m.sites() == []
    m.onnx.graph.remove(m.onnx.graph[0])
    assert only(m).name == "y"


# ------------------------------------------------------------------------- bodies, functions, names

NESTED = """g (bool c, float[B,4] x) => (float[B,4] y) {
  [cond] y = If (c) <
    then_branch = t () => (float[B,4] a) <float[4,4] inner> { [in] a = MatMul(x, inner) },
    else_branch = e () => (float[B,4] b) { [out] b = MatMul(x, outer) }> }"""


def nested(proto):
    changed = proto(NESTED, outer=weight(4, 4))
    body = changed.graph.node[0].attribute[0].g
    body.initializer.add().CopyFrom(proto("g () => () {}", inner=weight(4, 4)).graph.initializer[0])
    return Model.from_proto(changed)


def test_subgraphs(proto, run):
    m = nested(proto)
    sites = m.sites()
    assert {site.name: (site.scope, site.in_main_graph, site.weight_name) for site in sites} == {
        "in": ("subgraph", False, "inner"),
        "out": ("subgraph", False, "outer"),
    }
    copied = m.copy()
    for site in copied.sites():
        site.replace(np.eye(4) * (2 if site.name == "in" else 3))
    x = weight(2, 4)
    assert np.allclose(run(copied, {"c": np.array(True), "x": x})[0], 2 * x)
    assert np.allclose(run(copied, {"c": np.array(False), "x": x})[0], 3 * x)
    assert m.fingerprint() != copied.fingerprint()
    assert np.array_equal(m.sites()[0].numpy(), sites[0].numpy())


def test_subgraph_weights_go_to_the_external_file(proto, run, tmp_path):
    m = nested(proto)
    m.sites()[0].replace(np.eye(4))
    big = weight(4, 400)
    m.onnx.graph.initializers["outer"].const_value = onnx_ir.tensor(big, name="outer")
    m.save(tmp_path / "m.onnx", external_data=True)
    assert (tmp_path / "m.onnx.data").stat().st_size == big.nbytes
    assert Model.load(tmp_path / "m.onnx").fingerprint() == m.fingerprint()


def test_loop_and_scan_bodies(model):
    text = """g (int64 n, bool c, float[2,4] x, float[3,2,4] s) => (float[2,4] y, float[3,2,4] z) {
      y = Loop (n, c, x) <body = l (int64 i, bool d, float[2,4] h) => (bool e, float[2,4] k)
        { e = Identity(d) [loop] k = MatMul(h, w) }>
      z = Scan (s) <num_scan_inputs: int = 1, body = b (float[2,4] p) => (float[2,4] q)
        { [scan] q = MatMul(p, v) }> }"""
    m = model(text, w=weight(4, 4), v=weight(4, 4))
    assert {site.name: site.scope for site in m.sites()} == {"loop": "subgraph", "scan": "subgraph"}


def test_functions(model, run):
    numbers = ", ".join(["1.0"] * 16)
    text = f"""g (float[B,4] x) => (float[B,4] y) {{ h = local.f(x, p) y = local.f(h, p) }}
      <domain: "local", opset_import: ["": 17]> f (a, given) => (b) {{
        k = Constant <value = float[4,4] {{{numbers}}}> ()
        [body] c = MatMul(a, k) [given] b = MatMul(c, given) }}"""
    m = model(text, LOCAL, p=np.eye(4, dtype=np.float32))
    (site,) = m.sites()
    assert (site.name, site.scope, site.in_main_graph) == ("f/body", "function", False)
    assert m.unsupported_sites()[0][0] == "f/given"
    assert "inline the function" in m.unsupported_sites()[0][1]
    copied = m.copy()
    copied.sites()[0].replace(np.eye(4) * 3)
    x = weight(2, 4)
    assert np.allclose(run(copied, {"x": x})[0], 9 * x)
    assert (site.numpy() == 1).all()
    assert len(list(m.graphs())) == 2


def test_attributes_given_by_the_caller(model):
    text = """g (float[B,4] x) => (float[B,4] y) { y = local.f <t: int = 1> (x) }
      <domain: "local", opset_import: ["": 17]> f <t> (a) => (b) {
        k = Constant <value = float[1,1] {1}> () b = Gemm <transB: int = @t> (a, k) }"""
    assert "caller of the function" in reasons(model(text, LOCAL))[0]


def test_names_are_unique_and_stable(model):
    text = """g (float[B,4] x) => (float[B,4] y) {
      [same] a = MatMul(x, w1) [same] b = MatMul(a, w2) c = MatMul(b, w3) [same] y = MatMul(c, w4) }"""
    m = model(text, **{f"w{i}": weight(4, 4) for i in range(1, 5)})
    assert [site.name for site in m.sites()] == ["same", "same#2", "c", "same#3"]
    assert [site.name for site in m.sites("same#*")] == ["same#2", "same#3"]
    assert [site.name for site in m.sites("re:^(c|same)$")] == ["same", "c"]
    assert m.sites("nothing") == []
    with pytest.raises(SpecError, match="regular expression"):
        m.sites("re:(")


# --------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("auto_pad", "size", "stride", "kernel", "dilation"),
    [("VALID", 10, 3, 4, 2)]  # onnxruntime has no dilation with SAME
    + [
        (auto_pad, *numbers)
        for auto_pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
        for numbers in ((9, 1, 4, 1), (9, 2, 3, 1), (10, 3, 4, 1), (8, 4, 2, 1))
    ],
)
def test_auto_pad_becomes_the_same_numbers(model, run, auto_pad, size, stride, kernel, dilation):
    attrs = f"strides: ints = [{stride}, {stride}], dilations: ints = [{dilation}, {dilation}]"
    text = f"g (float[1,2,{size},{size}] x) => (float[?,?,?,?] y) {{ y = Conv <PADS, {attrs}> (x, w) }}"
    w, x = weight(3, 2, kernel, kernel), weight(1, 2, size, size)
    m = model(text.replace("PADS", f'auto_pad: string = "{auto_pad}"'), w=w)
    pads = only(m).conv.pads
    explicit = model(text.replace("PADS", f"pads: ints = {list(pads)}"), w=w)
    assert np.allclose(run(m, {"x": x})[0], run(explicit, {"x": x})[0], atol=1e-5)


def test_auto_pad_of_unknown_size(model):
    text = """g (float[1,2,H,9] x) => (float[?,?,?,?] y)
      {{ y = Conv <auto_pad: string = "SAME_UPPER", {}> (x, w) }}"""
    w = weight(3, 2, 3, 3)
    assert only(model(text.format("strides: ints = [1, 2]"), w=w)).conv.pads == (1, 1, 1, 1)
    assert only(model(text.format("strides: ints = [2, 2]"), w=w)).conv.pads is None


def test_geometry_defaults(model):
    m = model("g (float[1,2,9] x) => (float[?,?,?] y) { y = Conv(x, w) }", w=weight(3, 2, 3))
    conv = only(m).conv
    assert (conv.kernel_shape, conv.strides, conv.pads, conv.dilations, conv.group) == (
        (3,),
        (1,),
        (0, 0),
        (1,),
        1,
    )
    assert not conv.is_pointwise
