"""Targets: text form and what the host is found to be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import SpecError
from sparsecc.target import TARGET_NAMES, Target, host_features, target

COUNTS = st.none() | st.integers(1, 1 << 40)
TARGETS = st.builds(
    Target,
    name=st.sampled_from(TARGET_NAMES),
    isa=st.none() | st.sampled_from(["generic", "avx2", "avx512", "neon"]),
    cores=COUNTS,
    threads=COUNTS,
    l1_bytes=COUNTS,
    l2_bytes=COUNTS,
    l3_bytes=COUNTS,
    sm=COUNTS,
)


@given(TARGETS)
def test_a_target_is_its_text(target):
    assert Target.parse(str(target)) == target


def test_text_form():
    assert str(Target.parse("cpu{threads=2 l1_bytes=32768}")) == "cpu{threads=2 l1-bytes=32768}"
    assert str(Target("cuda", sm=90)) == "cuda{sm=90}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gpu", "unknown target 'gpu'"),
        ("cdua", "did you mean 'cuda'?"),
        ("cpu{thread=2}", "no option 'thread' (did you mean 'threads'?)"),
        ("cpu{threads=two}", "must be a whole number"),
        ("cpu{threads=0}", "at least 1"),
        ("cpu,cuda", "expected one target"),
        ("", "expected one target"),
    ],
)
def test_bad_text(text, part):
    with pytest.raises(SpecError) as caught:
        Target.parse(text)
    assert part in str(caught.value)


def test_host_is_fully_known():
    host = Target.host()
    assert host.isa in ("generic", "avx2", "avx512", "neon")
    for count in (host.cores, host.threads, host.l1_bytes, host.l2_bytes, host.l3_bytes):
        assert count is not None
        assert count >= 1


def test_given_values_win_over_the_host():
    target = Target.parse("cpu{isa=avx2 cores=3}").resolved()
    assert (target.isa, target.cores, target.threads) == ("avx2", 3, 3)
    assert Target("arm64").resolved().isa == "neon"


def test_features_are_those_of_the_processor(monkeypatch):
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 avx512_bf16 amx_tile avx512_vnni amx_int8\n"
    monkeypatch.setattr(target, "_read", lambda path: cpuinfo if str(path) == "/proc/cpuinfo" else "")
    monkeypatch.setattr(target, "_host_facts", target._host_facts.__wrapped__)
    assert host_features() == ("avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
