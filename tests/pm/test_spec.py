"""The text grammar of passes, pipelines and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import SpecError
from sparsecc.pm import Pass, PassReport, Pipeline
from sparsecc.sparse import Pattern
from sparsecc.target.spec import format_spec, parse_specs


@dataclass(frozen=True)
class Everything(Pass):
    """Has one option of every type.

    Sample: ``everything{count=3}``
    """

    name: ClassVar[str] = "everything"

    flag: bool = False
    count: int = 1
    ratio: float = 0.5
    words: str = ""
    mode: Literal["fast", "slow"] = "fast"
    maybe_text: str | None = None
    maybe_count: int | None = 7
    counts: tuple[int, ...] = ()
    texts: tuple[str, ...] = ("a",)
    pattern: Pattern = Pattern("unstructured")  # noqa: RUF009

    def run(self, model, ctx):
        return PassReport(self.name)


@dataclass(frozen=True)
class Needy(Pass):
    """Has an option without a default."""

    name: ClassVar[str] = "needy"

    size_limit: int

    def run(self, model, ctx):
        return PassReport(self.name)


PATTERNS = st.sampled_from(["dense", "unstructured", "2:4", "1:16", "16x1", "4x64"]).map(Pattern.parse)
EVERYTHING = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    words=st.text(),
    mode=st.sampled_from(["fast", "slow"]),
    maybe_text=st.none() | st.text() | st.sampled_from(["none", "\\none", "\\\\none"]),
    maybe_count=st.none() | st.integers(),
    counts=st.lists(st.integers()).map(tuple),
    texts=st.lists(st.text() | st.sampled_from(["", ",", "\\", '"'])).map(tuple),
    pattern=PATTERNS,
)


@given(EVERYTHING)
def test_a_pass_is_its_text(pass_):
    (spec,) = parse_specs(str(pass_))
    assert spec.name == "everything"
    assert Everything.from_options(spec.options) == pass_


@given(st.lists(EVERYTHING, max_size=3))
def test_text_of_many_parses_back(passes):
    specs = parse_specs(",".join(map(str, passes)))
    assert [Everything.from_options(spec.options) for spec in specs] == passes


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True), st.text()))
def test_any_value_can_be_quoted(options):
    (spec,) = parse_specs(format_spec("x", options))
    assert spec.options == options


def test_only_options_that_differ_from_the_default_are_printed():
    assert str(Everything()) == "everything"
    assert str(Everything(maybe_count=None, ratio=2)) == "everything{ratio=2.0 maybe-count=none}"
    assert str(Needy(3)) == "needy{size-limit=3}"


def test_values_with_separators_are_quoted():
    text = str(Everything(words='a "b"{c,d}\\e', counts=(1, 2)))
    assert text == r'everything{words="a \"b\"{c,d}\\e" counts="1,2"}'


def test_spaces_and_snake_case_are_accepted():
    specs = parse_specs('a{ x_y=re:.*mlp.* z="" } , b ,c{}')
    assert [(spec.name, spec.options) for spec in specs] == [
        ("a", {"x-y": "re:.*mlp.*", "z": ""}),
        ("b", {}),
        ("c", {}),
    ]


def test_blank_text_is_the_empty_pipeline():
    assert parse_specs("  ") == []
    assert Pipeline.parse("") == Pipeline()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,", "a name after the comma"),
        ("a,,b", "a kebab-case name, found ',b'"),
        ("A", "a kebab-case name"),
        ("a b", "expected ',', found 'b'"),
        ("a{x=1", "found the end"),
        ("a{x}", "expected '=', found '}'"),
        ("a{x=}", "expected a value"),
        ("a{x=1,y=2}", "spaces separate options"),
        ('a{x="1}', "a closing"),
        (r'a{x="\n"}', "double each backslash"),
        ("a{x=1 x=2}", "'x' twice"),
        ("a{x-y=1 x_y=2}", "'x-y' twice"),
    ],
)
def test_bad_grammar_says_where(text, part):
    with pytest.raises(SpecError) as caught:
        parse_specs(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_option_lists_the_known_and_suggests():
    with pytest.raises(SpecError) as caught:
        Everything.from_options({"cuont": "1"})
    message = str(caught.value)
    assert "unknown option 'cuont' (did you mean 'count'?)" in message
    assert "flag, count, ratio, words, mode, maybe-text" in message


def test_missing_option_is_named():
    with pytest.raises(SpecError, match="needy: needs the option size-limit"):
        Needy.from_options({})


@pytest.mark.parametrize(
    ("option", "text", "wanted"),
    [
        ("flag", "yes", "true or false"),
        ("count", "1.5", "a whole number"),
        ("ratio", "half", "a number"),
        ("mode", "medium", "one of fast, slow"),
        ("maybe-count", "x", "a whole number"),
        ("counts", "1,x", "a whole number"),
        ("pattern", "2;4", "2;4"),
    ],
)
def test_wrong_values_name_pass_option_and_type(option, text, wanted):
    with pytest.raises(SpecError) as caught:
        Everything.from_options({option: text})
    assert str(caught.value).startswith(f"everything: option '{option}': ")
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"count": "3"}, {"count": True}, {"flag": 1}, {"ratio": "x"}, {"counts": 3}, {"mode": "x"}]
)
def test_python_values_are_checked_too(options):
    with pytest.raises(SpecError, match=r"everything: option '\w+': expected"):
        Everything(**options)


def test_python_values_are_brought_to_their_type():
    built = Everything(ratio=1, pattern="2:4", counts=[1, 2])
    assert built.ratio == 1.0
    assert isinstance(built.ratio, float)
    assert built.pattern == Pattern.parse("2:4")
    assert built.counts == (1, 2)


def test_option_infos_for_help():
    infos = {info.name: (info.type, info.default) for info in Everything.option_infos()}
    assert infos["flag"] == ("true or false", "false")
    assert infos["maybe-text"] == ("text or none", "none")
    assert infos["mode"] == ("one of fast, slow", "fast")
    assert infos["counts"] == ("comma-separated list of a whole number", "")
    assert Needy.option_infos()[0].default is None


def test_a_pass_name_must_be_kebab_case():
    with pytest.raises(TypeError, match="kebab-case"):

        class Bad(Pass):
            name: ClassVar[str] = "NotKebab"

            def run(self, model, ctx):
                return PassReport(self.name)
