"""Plans on disk: what is written is read back, edits change the pipeline, faults are told in one line."""

from __future__ import annotations

import re
import tomllib

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc import optimize
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model, name_matches
from sparsecc.plan import Candidate, Estimate, Item, choice_of
from sparsecc.plan.plan_file import (
    PlanFile,
    format_plan,
    parse_plan,
    pipeline_of,
    plan_of,
    read_plan,
    write_plan,
)
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.pm.choices import SiteChoice, exact_match, expanded, split_specs
from sparsecc.sparse import Pattern

PRUNE, INT8, FACTOR = "prune-wanda{pattern=16x1 sparsity=0.5}", "quantize", "factor-rrr{param-ratio=0.5}"


def candidate(*passes, error=0.1, ms=1.0, nbytes=100, **rest):
    return Candidate(passes, error, Estimate(ms, "measured"), nbytes, **rest)


DENSE = candidate(error=0.0, ms=2.0, nbytes=400)
ITEMS = [
    Item("fc1", ("fc1",), (DENSE, candidate(PRUNE), candidate(PRUNE, INT8), candidate(FACTOR, INT8)), 0.25),
    Item("a/q", ("a/q", "a/k"), (DENSE, candidate(PRUNE, custom_ops=True, note='no "int8"\n')),
         groups={"region": "r 1"}),
    Item("fc1.b", ("fc1.b",), (DENSE, candidate("prune-structured{keep=0.5}"), candidate(INT8, ms=0.1 + 0.2))),
]  # fmt: skip


def plan(*numbers, **rest):
    chosen = {item.name: number for item, number in zip(ITEMS, numbers, strict=True)}
    return plan_of(ITEMS, choice_of(ITEMS, chosen), **rest)


def test_sites_that_take_the_same_passes_share_them():
    pipeline = plan(2, 1, 2).pipeline
    assert [item.name for item in pipeline.passes] == [
        "tidy", "prune-wanda", "quantize", "lower-conv-int8", "choose-layout", "confirm-layout",
        "restore-dense", "lower-sparse", "fuse-transformer",
    ]  # fmt: skip
    prune, narrow = pipeline.passes[1:3]
    assert prune.match == r"re:^(?:fc1|a/q|a/k)\Z"
    assert narrow.match == r"re:^(?:(?:fc1\.b)|(?:fc1)(?:\..*)?)\Z"
    (after,) = [item for item in plan(2, 1, 0).pipeline.passes if item.name == "quantize"]
    # what was made of fc1, but not the site whose name begins like it
    made = ["fc1", "fc1.0", "fc1.first.weight", "fc1.b", "fc1.b.0", "fc11", "a/q", "xfc1"]
    assert [name for name in made if name_matches(after.match, name)] == made[:3]
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_removal_goes_before_factors_before_zeros_before_narrow_types():
    names = [item.name for item in plan(3, 1, 1, recover="ols", calibrated=True).pipeline.passes]
    assert names[1:6] == ["prune-structured", "factor-rrr", "prune-wanda", "recover-ols", "quantize"]
    dense = plan(0, 0, 0).pipeline
    assert [item.name for item in dense.passes][:3] == ["tidy", "lower-conv-int8", "choose-layout"]
    rounds = [Item("a", ("a",), (DENSE, candidate("prune-magnitude", "round-weights{values=bf16}")))]
    made = pipeline_of(rounds, choice_of(rounds, {"a": 1}))
    (layout,) = [item for item in made.passes if item.name == "choose-layout"]
    assert layout.values == "bf16"
    backwards = [Item("a", ("a",), (DENSE, candidate("prune-magnitude", "factor-svd")))]
    made = pipeline_of(backwards, choice_of(backwards, {"a": 1}))
    assert [item.name for item in made.passes[1:3]] == ["prune-magnitude", "factor-svd"]


names = st.text(min_size=1, max_size=6)


@settings(max_examples=40)
@given(st.lists(names, min_size=2, max_size=6, unique=True), st.data())
def test_matches_are_exact(sites, data):
    own = data.draw(st.lists(st.sampled_from(sites), min_size=1, unique=True))
    others = [site for site in sites if site not in own]
    assert [site for site in sites if name_matches(exact_match(own), site)] == [s for s in sites if s in own]
    after = exact_match(own[1:], own[:1], others)
    assert all(name_matches(after, site) for site in own)
    assert name_matches(after, f"{own[0]}.0")
    assert not any(name_matches(after, site) for site in others)


def test_a_plan_is_read_back(tmp_path):
    about = {"model": "ab" * 32, "seed": 3, "max_drop": 0.01, "exact": True, "budget latency": "0.5x"}
    overrides = (SiteOverride("head", Pattern.parse("16x1"), 0.5), SiteOverride("fc2", skip=True))
    written = plan(1, 1, 2, about=about, overrides=overrides)
    write_plan(tmp_path / "plan.toml", written)
    found, warnings = read_plan(tmp_path / "plan.toml", sites=["fc1", "a/q", "a/k", "fc1.b"], model="ab" * 32)
    assert found == written
    assert warnings == []
    assert format_plan(found) == (tmp_path / "plan.toml").read_text() == format_plan(written)
    assert found.choice == choice_of(ITEMS, {"fc1": 1, "a/q": 1, "fc1.b": 2})
    assert Pipeline.from_toml(tmp_path / "plan.toml") == found.pipeline == written.pipeline
    _, warnings = read_plan(tmp_path / "plan.toml", model="cd" * 32)
    assert len(warnings) == 1
    assert "another model" in warnings[0]
    table = tomllib.loads(format_plan(found))["plan"]
    assert (table["ms"], table["bytes"]) == (found.choice.ms, found.choice.bytes)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@settings(max_examples=40)
@given(
    st.lists(texts, min_size=1, max_size=4, unique=True), texts, st.floats(), st.dictionaries(texts, texts)
)
def test_any_names_are_read_back(sites, note, number, groups):
    item = Item(sites[0], tuple(sites), (DENSE, candidate(PRUNE, ms=abs(number), note=note)), 1.5, groups)
    found = parse_plan(format_plan(plan_of([item], choice_of([item], {sites[0]: 1}))))
    assert repr(found.items) == repr(
        (Item(item.name, item.sites, item.candidates, 1.5, dict(sorted(groups.items()))),)
    )
    assert found.chosen == {sites[0]: PRUNE}


def test_an_edited_choice_is_what_runs():
    text = format_plan(plan(1, 0, 0))
    other = text.replace(f'choice = "{PRUNE}"', f'choice = "{PRUNE},{INT8}"')
    assert parse_plan(other).pipeline == plan(2, 0, 0).pipeline
    assert parse_plan(other).choice.chosen["fc1"] == 2
    own = text.replace(f'choice = "{PRUNE}"', 'choice = "prune-magnitude{pattern=2:4}"')
    found = parse_plan(own)
    assert found.choice is None
    assert str(found.pipeline.passes[1]) == r'prune-magnitude{pattern=2:4 match="re:^(?:fc1)\\Z"}'
    assert parse_plan(format_plan(found)) == found
    around = text.replace('"@items",', '"@items",\n  "recover-ols",')
    assert "recover-ols" in str(parse_plan(around).pipeline)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (f'choice = "{PRUNE}"', 'choice = "prune-wandaa"', "item 1 'fc1': choice 'prune-wandaa' must be specs"),
        (f'choice = "{PRUNE}"', 'choice = "prune-wandaa"', f"one of its candidates (dense; {PRUNE};"),
        (f'choice = "{PRUNE}"', 'choice = "densee"', "(did you mean 'dense'?)"),
        (f'choice = "{PRUNE}"', 'choice = "prune-wanda{match=fc2}"', "leave match out"),
        (f'choice = "{PRUNE}"', 'choice = "prune-wanda{sparsity=3}"', "sparsity"),
        (f'choice = "{PRUNE}"', 'choice = "tidy"', "tidy is for whole models"),
        (f'choice = "{PRUNE}"', "choice = 1", 'needs name = "..." and choice = "..."'),
        ('sites = ["fc1"]', "sites = []", "needs sites"),
        ('sites = ["fc1"]', 'sites = ["a/q"]', "the site 'a/q' is in the items 1 and 2"),
        ('name = "fc1"\n', 'name = "a/q"\n', "there is another 'a/q'"),
        ("sensitivity = 0.25", 'sensitivity = "a"', "sensitivity must be a number"),
        ("sensitivity = 0.25", "sensitivty = 0.25", "unknown key 'sensitivty' (did you mean 'sensitivity'?)"),
        ('groups = {region = "r 1"}', "groups = 3", "groups must be a table of texts"),
        ("bytes = 400", "bytes = 4.5", "bytes must be a whole number, got 4.5"),
        ("bytes = 400", f"bytes = {'9' * 400}", "bytes is a number of too many digits"),
        ("sensitivity = 0.25", f"sensitivity = {'9' * 400}", "too many digits"),
        ("sensitivity = 0.25", f"sensitivity = {'9' * 5000}", "not a TOML recipe"),
        ("bytes = 400", "byte = 400", "unknown key 'byte' (did you mean 'bytes'?)"),
        (", error = 0.0}", "}", "candidate 1: needs error"),
        ('"@items"', '"@item"', "unknown '@item' in the pipeline (did you mean '@items'?)"),
        ('  "@items",\n', "", "needs '@items' in its pipeline"),
        ('"@items"', '"@items", "@items"', "'@items' is in the pipeline twice"),
        ('  "@narrow",\n', '  "@narrow",\n  "@narrow",\n', "twice"),
        ("format = 1", "format = 2", "plan format 2, expected 1"),
        ("[plan]", "[plan.x]", "[plan] must be a table"),
        ("[[item]]", "[item]", "Cannot"),
    ],
)  # fmt: skip
def test_faults_are_told_in_one_line(tmp_path, old, new, part):
    text = format_plan(plan(1, 0, 0))
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError) as caught:
        read_plan(tmp_path / "bad.toml")
    message = str(caught.value)
    assert part in message
    assert "bad.toml" in message
    assert "\n" not in message


def test_markers_in_the_wrong_order_and_plans_without_items():
    with pytest.raises(SpecError, match="'@narrow' must come behind '@items'"):
        Pipeline.parse_toml('pipeline = ["@narrow", "@items"]')
    assert Pipeline.parse_toml('pipeline = ["tidy", "@items"]') == Pipeline.parse("tidy")
    assert parse_plan('pipeline = ["tidy"]') == PlanFile((), {}, ("tidy",))
    together = 'pipeline=["@items"]\n[[item]]\nname="a"\nsites=["a"]\nchoice="prune-magnitude,quantize"'
    assert [item.name for item in Pipeline.parse_toml(together).passes] == ["prune-magnitude", "quantize"]
    with pytest.raises(UsageError, match="No such file"):
        read_plan("absent.toml")
    with pytest.raises(SpecError, match="write \\[\\[item\\]\\] with two brackets"):
        Pipeline.parse_toml("pipeline = []\n[item]\nname = 'a'")


def test_unknown_sites_of_a_model_are_told(tmp_path):
    write_plan(tmp_path / "plan.toml", plan(1, 0, 0))
    with pytest.raises(SpecError, match=re.escape("no site 'a/k' (did you mean 'a/x'?)")):
        read_plan(tmp_path / "plan.toml", sites=["fc1", "a/q", "a/x", "fc1.b"])


def test_a_plan_makes_the_same_model_again(tmp_path, root):
    source = root / "models" / "digits_cnn" / "digits_cnn.onnx"
    sites = [site.name for site in Model.load(source).sites()]
    specs = ["prune-magnitude{pattern=16x1 sparsity=0.8}", "prune-magnitude{pattern=2:4}"]
    items = [Item(site, (site,), (DENSE, *(candidate(spec) for spec in specs))) for site in sites]
    choice = choice_of(items, {item.name: number % 3 for number, item in enumerate(items)})
    written = plan_of(items, choice, about={"seed": 0}, keep_slower=True)
    write_plan(tmp_path / "plan.toml", written)
    made = [
        optimize(source, tmp_path / f"{run}.onnx", recipe=tmp_path / "plan.toml", threads=1, keep_slower=True)
        for run in range(2)
    ]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    assert made[0].pipeline == str(written.pipeline)
    found = {decision.site: decision.density for decision in made[0].sites}
    assert found[sites[0]] == 1
    assert found[sites[1]] == pytest.approx(0.2, abs=0.05)


MLP = """<ir_version: 8, opset_import: ["" : 17]>
mlp (float[4, 64] x) => (float[4, 96] y) <float[64, 128] w1, float[128, 96] w2> {
    [fc1] h = MatMul(x, w1)
    [fc2] y = MatMul(h, w2)
}"""


def test_passes_that_follow_others_find_what_those_made():
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP)
    proto.graph.node[1].name = "fc1.b"
    for name, shape in (("w1", (64, 128)), ("w2", (128, 96))):
        array = rng.standard_normal(shape, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    items = [
        Item("fc1", ("fc1",), (DENSE, candidate("factor-svd{param-ratio=0.5 keep-slower=true}", "quantize"))),
        Item("fc1.b", ("fc1.b",), (DENSE,)),
    ]
    model = Model.from_proto(proto)
    made = PlanFile(
        tuple(items), {"fc1": items[0].candidates[1].name, "fc1.b": "dense"}, ("@items", "@narrow")
    )
    made.pipeline.run(model, PassContext())
    found = {site.name: site.quantization is not None for site in model.sites()}
    assert len(found) == 3
    assert not found.pop("fc1.b")
    assert all(found.values())


def two(first: str, second: str, layout: str = "choose-layout") -> list[str]:
    choices = [SiteChoice((site,), split_specs(text)) for site, text in (("a", first), ("b", second))]
    return expanded(["tidy", "@items", "@narrow", layout], choices, "plan.toml")


def test_values_of_an_edited_choice_are_stored():
    specs = two("prune-magnitude,round-weights{values=bf16}", "quantize")
    assert specs[-1] == "choose-layout{values=bf16}"
    assert [spec.partition("{")[0] for spec in specs[2:4]] == ["round-weights", "quantize"]
    assert two("quantize", "dense")[-1] == "choose-layout"
    assert two("round-weights", "dense", "choose-layout{values=fp16}")[-1] == "choose-layout{values=fp16}"
    assert len(two("quantize", "quantize{activations=dynamic}")) == 4


@pytest.mark.parametrize(
    ("first", "second", "layout", "text"),
    [
        ("quantize", "quantize{activations=static}", "choose-layout", "quantised in one way"),
        ("round-weights", "round-weights{values=bf16}", "choose-layout", "fp16 and bf16: a model has one"),
        ("quantize,quantize", "dense", "choose-layout", "'a' has quantize twice"),
        (
            "prune-magnitude,round-weights,quantize,round-weights",
            "dense",
            "choose-layout",
            "round-weights twice",
        ),
        ("round-weights{values=bf16}", "dense", "choose-layout{values=fp16}", "write values=bf16"),
    ],
)
def test_a_model_has_one_type_of_each_kind(first, second, layout, text):
    with pytest.raises(SpecError, match=text):
        two(first, second, layout)
