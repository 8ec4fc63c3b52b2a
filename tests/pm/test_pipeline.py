"""Pipelines: running, checking the promise of each pass, recipes, site selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import PassError, SpecError, UnsupportedModelError, UsageError
from sparsecc.ir import Model
from sparsecc.pm import Pass, PassContext, PassReport, Pipeline, SiteOverride, select_sites
from sparsecc.sparse import Pattern


def small_model() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,4] x) => (float[B,3] y) {
            [hidden_one] h = MatMul(x, w)
            r = Relu(h)
            [hidden_two] y = MatMul(r, v)
        }"""
    )
    for name, shape in (("w", (4, 4)), ("v", (4, 3))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    return Model.from_proto(proto)


@dataclass(frozen=True)
class Misbehave(Pass):
    """Does what a bad pass could do.

    Sample: ``misbehave{how=crash}``
    """

    name: ClassVar[str] = "misbehave"

    how: Literal[
        "nothing", "good", "crash", "refuse", "none", "rename", "rank", "dtype", "drop", "dangle", "type"
    ] = "nothing"

    def run(self, model, ctx):
        report = PassReport(self.name)
        graph = model.onnx.graph
        if self.how == "nothing":
            return report
        report.change("graph", "changed", count=np.int64(1))
        if self.how == "crash":
            raise IndexError("list index\nout of range")
        if self.how == "refuse":
            raise UnsupportedModelError("on purpose")
        if self.how == "none":
            return None
        if self.how == "rename":
            graph.outputs[0].name = "z"
        elif self.how == "rank":
            graph.outputs[0].shape = onnx_ir.Shape(["B", 3, 1])
        elif self.how == "dtype":
            graph.inputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT16)
        elif self.how == "drop":
            graph.inputs.pop()
        elif self.how == "dangle":
            del graph.initializers["w"]
        elif self.how == "type":
            graph.initializers["w"].const_value = onnx_ir.tensor(np.ones((4, 4), np.int64), name="w")
        return report


def run(*passes: Pass, **context):
    return Pipeline(passes).run(small_model(), PassContext(**context))


def test_reports_come_back_in_order_with_spec_and_time():
    reports = run(Misbehave(), Misbehave("good"))
    assert [report.spec for report in reports] == ["misbehave", "misbehave{how=good}"]
    assert all(report.seconds >= 0 for report in reports)
    document = reports[1].to_json()
    assert list(document) == ["pass", "spec", "changed", "skipped", "notes", "seconds"]
    assert document["changed"] == [{"site": "graph", "detail": "changed", "numbers": {"count": 1}}]
    assert type(document["changed"][0]["numbers"]["count"]) is int
    assert "seconds" not in reports[1].to_json(timings=False)


def test_numbers_json_cannot_hold_become_text():
    report = PassReport("x")
    report.change("s", "d", bad=float("nan"), huge=np.float32("inf"), fine=np.float32(0.5))
    assert report.to_json()["changed"][0]["numbers"] == {"bad": "nan", "huge": "inf", "fine": 0.5}


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("crash", "raised IndexError: list index out of range"),
        ("none", "returned NoneType instead of a PassReport"),
        ("rename", "graph outputs were ['y'] and are now ['z']"),
        ("rank", "graph output 'y' had rank 2 and has now rank 3"),
        ("dtype", "graph input 'x' was FLOAT and is now FLOAT16"),
        ("drop", "graph inputs were ['x'] and are now []"),
        ("dangle", "left an invalid model"),
        ("type", "left an invalid model"),
    ],
)
def test_a_broken_promise_names_the_pass_and_those_before(how, part):
    with pytest.raises(PassError) as caught:
        run(Misbehave(), Misbehave("good"), Misbehave(how))
    message = str(caught.value)
    assert message.startswith(f"pass 'misbehave{{how={how}}}' ")
    assert part in message
    assert "(ran before it: misbehave, misbehave)" in message
    assert "\n" not in message


def test_errors_on_purpose_come_through_as_they_are():
    with pytest.raises(UnsupportedModelError, match=r"^on purpose$"):
        run(Misbehave("refuse"))


def test_a_model_that_was_invalid_before_is_not_blamed_on_a_pass():
    model = small_model()
    model.onnx.graph.inputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    assert len(Pipeline((Misbehave("good"),)).run(model)) == 1


def test_the_context_of_the_caller_is_not_changed():
    ctx = PassContext(overrides=(SiteOverride("hidden_one", skip=True),))
    Pipeline((Misbehave(),), (SiteOverride("hidden_two", sparsity=0.9),)).run(small_model(), ctx)
    assert len(ctx.overrides) == 1


def test_missing_calibration_is_refused_before_anything_runs():
    pipeline = Pipeline((Misbehave("crash"), *Pipeline.parse("prune-wanda").passes))
    assert pipeline.requires_calibration
    with pytest.raises(UsageError, match="prune-wanda needs calibration inputs"):
        pipeline.run(small_model())


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match="matches none of the 2 sites; near: hidden_one"):
        run(Misbehave("crash"), overrides=(SiteOverride("hiden_one", skip=True),))


def test_progress_ends_at_the_number_of_passes():
    seen = []
    run(Misbehave(), Misbehave(), progress=lambda *step: seen.append(step))
    assert seen == [("misbehave", 0, 2), ("misbehave", 1, 2), ("pipeline", 2, 2)]


# -- text and TOML


def test_parse_and_str_are_inverse():
    text = 'tidy,prune-magnitude{pattern=2:4 match=re:.*mlp.*},prune-wanda{match="a b,{c}"}'
    assert str(Pipeline.parse(text)) == text
    assert str(Pipeline.parse(f" {text.replace(',prune', ' , prune')} ")) == text


def test_unknown_pass_lists_the_known():
    with pytest.raises(SpecError) as caught:
        Pipeline.parse("tidy,prune-magnitud")
    assert "unknown pass 'prune-magnitud' (did you mean 'prune-magnitude'?)" in str(caught.value)
    assert "known: allocate, allocate-parameters, choose-layout, " in str(caught.value)
    assert "prune-magnitude, " in str(caught.value)


OVERRIDES = st.builds(
    SiteOverride,
    match=st.text().filter(lambda text: not text.startswith("re:")),
    pattern=st.sampled_from([None, Pattern.parse("2:4"), Pattern.parse("16x1")]),
    sparsity=st.none() | st.floats(0, 1, exclude_max=True),
    skip=st.just(True),
)


@given(st.lists(OVERRIDES, max_size=3), st.lists(st.text(), max_size=3))
def test_recipes_are_inverse(overrides, matches):
    passes = tuple(Pipeline.parse("prune-magnitude").passes[0].__class__(match=match) for match in matches)
    pipeline = Pipeline(passes, tuple(overrides))
    assert Pipeline.parse_toml(pipeline.to_toml()) == pipeline


def test_a_recipe_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        pipeline = ["tidy", "prune-magnitude{pattern=2:4}"]
        [[override]]
        match = "re:.*classifier.*"
        skip = true
        [[override]]
        match = "head"
        pattern = "16x1"
        sparsity = 0.9
        """
    )
    pipeline = Pipeline.from_toml(path)
    assert str(pipeline) == "tidy,prune-magnitude{pattern=2:4}"
    assert pipeline.overrides == (
        SiteOverride("re:.*classifier.*", skip=True),
        SiteOverride("head", Pattern.parse("16x1"), 0.9),
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("pipeline = [", "not a TOML recipe"),
        ("", 'needs pipeline = ["tidy", ...]'),
        ('pipeline = "tidy"', 'needs pipeline = ["tidy", ...]'),
        ('pipeline = ["tidi"]', "unknown pass 'tidi' (did you mean 'tidy'?)"),
        ('pipelin = ["tidy"]', "unknown key 'pipelin' (did you mean 'pipeline'?); known: pipeline, override"),
        ('pipeline = []\n[override]\nmatch = "a"', "write [[override]] with two brackets"),
        ("pipeline = []\noverride = [1]", "override 1: must be a table"),
        ('pipeline = []\n[[override]]\nmach = "a"', "unknown key 'mach' (did you mean 'match'?)"),
        ("pipeline = []\n[[override]]\nskip = true", "needs match"),
        ('pipeline = []\n[[override]]\nmatch = "a"', "changes nothing"),
        ('pipeline = []\n[[override]]\nmatch = "a"\nsparsity = 1.5', "sparsity must be in [0, 1)"),
        ('pipeline = []\n[[override]]\nmatch = "a"\nsparsity = true', "sparsity must be a number"),
        (f'pipeline = []\n[[override]]\nmatch = "a"\nsparsity = {"9" * 400}', "too many digits"),
        ('pipeline = []\n[[override]]\nmatch = "a"\npattern = 124', "pattern must be text in quotes"),
        ('pipeline = []\n[[override]]\nmatch = "a"\npattern = "2;4"', "2;4"),
        ('pipeline = []\n[[override]]\nmatch = "re:("\nskip = true', "re:("),
    ],
)
def test_bad_recipes_name_the_file_and_the_fault(tmp_path, text, part):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        Pipeline.from_toml(path)
    message = str(caught.value)
    assert part in message
    assert "bad.toml" in message
    assert "\n" not in message


def test_unreadable_recipes(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        Pipeline.from_toml(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        Pipeline.from_toml(tmp_path / "binary.toml")


# -- sites and context


def test_select_sites_accounts_for_everything():
    model = small_model()
    report = PassReport("x")
    assert [site.name for site in select_sites(model, "*", report)] == ["hidden_one", "hidden_two"]
    assert [site.name for site in select_sites(model, "re:one", report)] == ["hidden_one"]
    with pytest.raises(UsageError, match=r"match 'nothing\*' matches none of the 2 sites; .*hidden_one"):
        select_sites(model, "nothing*", report)


def test_operators_that_are_no_sites_become_skips():
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[2,4] x, float[4,4] w) => (float[2,4] y) { [run_time] y = MatMul(x, w) }"""
    )
    model = Model.from_proto(proto)
    report = PassReport("x")
    assert select_sites(model, "*", report) == []
    assert report.skipped[0].site == "run_time"
    assert report.notes
    assert select_sites(model, "run_time", PassReport("x")) == []
    with pytest.raises(UsageError, match="matches none of the 1 sites"):
        select_sites(model, "other", PassReport("x"))


def test_later_overrides_win_field_by_field():
    magnitude = Pipeline.parse("prune-magnitude{sparsity=0.4}").passes[0]
    ctx = PassContext(
        overrides=(
            SiteOverride("a*", Pattern.parse("16x1"), 0.9),
            SiteOverride("ab", sparsity=0.8),
            SiteOverride("ac", skip=True),
            SiteOverride("ad", pattern=Pattern.parse("2:4")),
        )
    )
    assert ctx.settings_for("b", magnitude).sparsity == 0.4
    assert ctx.settings_for("aa", magnitude).sparsity == 0.9
    settings = ctx.settings_for("ab", magnitude)
    assert (str(settings.pattern), settings.sparsity) == ("16x1", 0.8)
    assert ctx.settings_for("ac", magnitude).skip
    fixed = ctx.settings_for("ad", magnitude)
    assert (str(fixed.pattern), fixed.sparsity) == ("2:4", None)


def test_randomness_depends_on_seed_and_key_only():
    ctx = PassContext(seed=5)
    first = ctx.rng("a", "b").random(3)
    np.testing.assert_array_equal(first, ctx.rng("a", "b").random(3))
    assert (first != ctx.rng("a", "c").random(3)).all()
    assert (first != PassContext(seed=6).rng("a", "b").random(3)).all()
