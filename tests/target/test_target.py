"""Targets: text form and what the host is found to be."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecc.errors import SpecError
from sparsecc.target import TARGET_NAMES, Target, cores, host_features, host_processors, target

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
    speeds=st.none(),
) | st.builds(
    Target, st.just("arm64"), speeds=st.lists(st.integers(1, 1 << 40), min_size=1, max_size=9).map(tuple)
)


@given(TARGETS)
def test_a_target_is_its_text(target):
    assert Target.parse(str(target)) == target


def test_text_form():
    assert str(Target.parse("cpu{threads=2 l1_bytes=32768}")) == "cpu{threads=2 l1-bytes=32768}"
    assert str(Target("cuda", sm=90)) == "cuda{sm=90}"
    assert str(Target("arm64", speeds=(446, 1024))) == 'arm64{speeds="446,1024"}'


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gpu", "unknown target 'gpu'"),
        ("cdua", "did you mean 'cuda'?"),
        ("cpu{thread=2}", "no option 'thread' (did you mean 'threads'?)"),
        ("cpu{threads=two}", "must be a whole number"),
        ("cpu{threads=0}", "at least 1"),
        ('cpu{speeds="4,two"}', "must be a whole number"),
        ('cpu{speeds=""}', "must be a whole number"),
        ('cpu{speeds="4,0"}', "at least 1"),
        ('cpu{cores=3 speeds="4,1"}', "2 numbers for 3 cores"),
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
    big_little = Target.parse('arm64{speeds="446,446,1024"}').resolved()
    assert (big_little.speeds, big_little.cores, big_little.threads) == ((446, 446, 1024), 3, 3)


HOST_FACTS = target._host_facts.__wrapped__
CPUINFO = "\n\n".join(
    f"processor\t: {number}\nphysical id\t: 0\ncore id\t: {number // 2}" for number in range(8)
)


def host_with(monkeypatch, allowed, cpuinfo, files):
    """The host as it is found on a machine with these files, which may use some of its processors."""
    files = {
        "/proc/cpuinfo": cpuinfo,
        **{f"/sys/devices/system/cpu/{name}": text for name, text in files.items()},
    }
    monkeypatch.setattr(target, "_read", lambda path: files.get(str(path), ""))
    monkeypatch.setattr(target, "_host_facts", functools.cache(HOST_FACTS))
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(allowed), raising=False)
    return Target.host()


def test_speeds_are_capacities_of_the_processors_it_may_use(monkeypatch):
    files = {f"cpu{at}/cpu_capacity": f"{1024 if at >= 4 else 446}\n" for at in range(8)}
    host = host_with(monkeypatch, range(2, 7), "processor\t: 0\nBogoMIPS\t: 50\n", files)
    assert (host.speeds, host.cores, host_processors()) == ((446, 446, 1024, 1024, 1024), 5, (2, 3, 4, 5, 6))
    assert Target.parse(str(host)) == host
    assert Target("arm64", cores=3).resolved().speeds is None  # another machine


def test_speeds_are_clocks_where_there_are_no_capacities(monkeypatch):
    clocks = {f"cpu{at}/cpufreq/cpuinfo_max_freq": "5000000" if at < 4 else "3600000" for at in range(8)}
    host = host_with(monkeypatch, range(8), CPUINFO, clocks)
    assert (host.speeds, host_processors()) == ((5000000, 5000000, 3600000, 3600000), (0, 2, 4, 6))
    half = {"cpu0/cpu_capacity": "1024", **clocks}  # not of all
    assert host_with(monkeypatch, range(8), CPUINFO, half).speeds == host.speeds


@pytest.mark.parametrize("other", ["1024", "1000", "", "0", "-7", "many", "446 "])
def test_cores_are_alike_where_the_system_says_so_or_nothing(monkeypatch, other):
    host = host_with(monkeypatch, (0, 2), CPUINFO, {"cpu0/cpu_capacity": "1024", "cpu2/cpu_capacity": other})
    assert host.speeds == ((1024, 446) if other == "446 " else None)
    assert host.cores == 2


def test_features_are_those_of_the_processor(monkeypatch):
    cpuinfo = "processor\t: 0\nflags\t\t: fpu avx512f amx_bf16 avx512_bf16 amx_tile avx512_vnni amx_int8\n"
    monkeypatch.setattr(target, "_read", lambda path: cpuinfo if str(path) == "/proc/cpuinfo" else "")
    monkeypatch.setattr(target, "_host_facts", target._host_facts.__wrapped__)
    assert host_features() == ("avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
