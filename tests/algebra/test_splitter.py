"""The bound of every split, against brute force and on inputs made to break simpler schemes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Compressed, Dense, Tensor, Walk, find_splits, read_tensor, split
from sparsecc.algebra.splitter import even_targets, search_windows, weighted_targets
from sparsecc.errors import SpecError

FORMATS = {1: ["dense", "compressed"], 2: ["csr", "dcsr", "coo", "dense,dense", "compressed,dense"]}
FORMATS[3] = [
    "csf",
    "coo",
    "dense,compressed,compressed",
    "compressed,dense,compressed",
    "dense,dense,compressed",
]


def random_tensor(rng, shape, density, form):
    dense = (rng.random(shape) < density) * 1.0
    return Tensor.from_coordinates(np.argwhere(dense), dense[dense != 0], shape, form)


def prefixes(walk: Walk):
    """Yield (prefix, level) of every node, parents first."""

    def below(level, node, prefix):
        if level == len(walk.levels):
            return
        found = walk.levels[level]
        if isinstance(found, Dense):
            children = [(node * found.size + c, c) for c in range(found.size)]
        else:
            children = [(p, int(found.crd[p])) for p in range(int(found.pos[node]), int(found.pos[node + 1]))]
        for position, coordinate in children:
            own = (*prefix, coordinate)
            yield own, level
            yield from below(level + 1, position, own)

    yield from below(0, 0, ())


def events(walks):
    """All events in the order of the walk: prefix, and per operand how many of its nodes it holds on its level."""
    groups: dict[tuple, list[int]] = {}
    for at, walk in enumerate(walks):
        for prefix, _ in prefixes(walk):
            groups.setdefault(prefix, [0] * len(walks))[at] += 1
    return sorted(groups.items())


def brute_force(walks, target):
    """Cursors of the shortest run of events that has at least this work."""
    cursors = [np.zeros(len(walk.levels), np.int64) for walk in walks]
    done = 0
    for prefix, members in events(walks):
        if done >= target:
            break
        level = len(prefix) - 1
        for at, count in enumerate(members):
            if count:
                cursors[at][level] += count
                done += walks[at].costs[level]
    return cursors, done


@st.composite
def many_walks(draw, least_cost=1):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loops = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 5)) for _ in range(loops))
    walks = []
    for _ in range(draw(st.integers(1, 4))):
        form = draw(st.sampled_from(FORMATS[loops]))
        tensor = random_tensor(rng, shape, draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), form)
        walks.append(Walk.of(tensor, [draw(st.integers(least_cost, 3)) for _ in range(loops)]))
    if draw(st.booleans()):  # an operand that inner loops do not index
        first = walks[0]
        depth = draw(st.integers(0, loops - 1))
        walks.append(Walk(first.levels[:depth], first.costs[:depth]))
    return walks


def check_table(table, walks):
    """The two-sided bound, cover, order; and that the work of the parts is all there is."""
    work = table.part_work()
    shares = np.diff(table.targets)
    assert work.sum() == table.work == sum(walk.work for walk in walks)
    assert (work <= shares + max(table.header - 1, 0)).all()
    assert (work >= shares - max(table.header - 1, 0)).all()
    assert work.max(initial=0) <= table.bound
    for walk, cursor in zip(walks, table.cursors, strict=True):
        assert (np.diff(cursor, axis=1) >= 0).all()
        assert (cursor[:, 0] == 0).all()
        assert tuple(cursor[:, -1]) == walk.nodes


@settings(max_examples=40, deadline=None)
@given(many_walks(), st.sampled_from([1, 2, 3, 7, 16, 64]))
def test_cuts_are_those_of_brute_force(walks, parts):
    table = split(walks, parts)
    check_table(table, walks)
    for tau in range(1, parts):
        expected, done = brute_force(walks, int(table.targets[tau]))
        for cursor, wanted in zip(table.cursors, expected, strict=True):
            np.testing.assert_array_equal(cursor[:, tau], wanted)
        assert done == sum(
            int(c @ cursor[:, tau]) for c, cursor in zip(table.costs, table.cursors, strict=True)
        )


@settings(max_examples=40, deadline=None)
@given(many_walks(least_cost=0), st.integers(1, 40))
def test_bounds_hold_with_coordinates_that_cost_nothing(walks, parts):
    check_table(split(walks, parts), walks)


@settings(max_examples=25, deadline=None)
@given(many_walks())
def test_no_event_is_in_two_parts_and_paths_name_the_last_one(walks):
    table = split(walks, 5)
    everything = events(walks)
    for tau in range(1, 5):
        before = {}
        for at, walk in enumerate(walks):
            seen = [0] * len(walk.levels)
            for prefix, level in prefixes(walk):
                before.setdefault(prefix, set()).add(seen[level] < table.cursors[at][level, tau])
                seen[level] += 1
        assert all(len(sides) == 1 for sides in before.values())
        taken = [prefix for prefix, _ in everything if before[prefix] == {True}]
        path = tuple(int(c) for c in table.paths[tau] if c >= 0)
        assert path == (taken[-1] if taken else ())


@settings(max_examples=25, deadline=None)
@given(many_walks(), st.sampled_from([(12, 4), (12, 6), (64, 16), (7, 1)]))
def test_tables_of_fewer_parts_are_part_of_those_of_more(walks, sizes):
    many, few = sizes
    large, small = split(walks, many), split(walks, few)
    for big, little in zip(large.cursors, small.cursors, strict=True):
        np.testing.assert_array_equal(big[:, :: many // few], little)


@settings(max_examples=25, deadline=None)
@given(many_walks(), st.randoms())
def test_order_of_operands_and_empty_ones_change_nothing(walks, random):
    order = list(range(len(walks)))
    random.shuffle(order)
    table, moved = split(walks, 9), split([walks[at] for at in order], 9)
    for position, at in enumerate(order):
        np.testing.assert_array_equal(moved.cursors[position], table.cursors[at])
    depth = max(len(walk.levels) for walk in walks)
    sizes = [next(w.levels[d].size for w in walks if d < len(w.levels)) for d in range(depth)]
    empty = [
        Compressed(size, np.zeros(1 + (at == 0), np.int64), np.zeros(0, np.int64))
        for at, size in enumerate(sizes)
    ]
    more = split([*walks, Walk(tuple(empty), (0,) * depth)], 9)
    for cursor, other in zip(table.cursors, more.cursors, strict=False):
        np.testing.assert_array_equal(cursor, other)


def csr(lengths, columns=1 << 20, dtype=np.int64):
    """A matrix by the lengths of its rows; only positions matter here."""
    pos = np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
    crd = np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else np.zeros(0, dtype)
    return (Dense(len(lengths)), Compressed(columns, pos, crd.astype(dtype)))


def power_law(rows, entries, exponent, rng):
    share = (np.arange(rows) + 1.0) ** -exponent
    return rng.permutation(np.minimum((share / share.sum() * entries).astype(np.int64), 1 << 20))


RNG = np.random.default_rng(7)
HYPERSPARSE = Tensor.from_coordinates(np.array([[0, 5], [10**9 - 1, 0]]), np.ones(2), (10**9, 10), "dcsr")
ADVERSARIAL = {
    "one giant row": [csr([1] * 500 + [99_000] + [1] * 499)],
    "empty rows, then full ones": [csr([0] * 100_000 + [1000] * 10)],
    "full rows, then empty ones": [csr([1000] * 10 + [0] * 100_000)],
    "all empty": [csr([0] * 50_000)],
    "power law 1.5": [csr(power_law(10_000, 200_000, 1.5, RNG))],
    "power law 2.5": [csr(power_law(10_000, 200_000, 2.5, RNG))],
    "heavy at the top, heavy at the bottom": [csr([2000] * 50 + [1] * 950), csr([1] * 950 + [2000] * 50)],
    "hypersparse": [HYPERSPARSE.levels],
    "thirty at one place": [
        Tensor.from_coordinates(np.array([[2, 3]]), np.ones(1), (5, 5), "dcsr").levels for _ in range(30)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("costs", [(1, 1), (0, 1), (3, 2)])
def test_the_bound_holds_where_simpler_schemes_break(name, costs):
    walks = [Walk(levels, costs) for levels in ADVERSARIAL[name]]
    work = sum(walk.work for walk in walks)
    for parts in sorted({1, 3, 16, 1000, 65_536 if costs == (1, 1) else 64, max(work, 1), work + 1}):
        if parts <= 70_000:
            table = split(walks, parts)
            check_table(table, walks)
            if work:
                assert table.balance <= (-(-work // parts) + table.header - 1) / (work / parts) + 1e-9


def test_row_split_breaks_where_ours_does_not():
    levels = ADVERSARIAL["one giant row"][0]
    table = split([Walk(levels, (1, 1))], 16)
    lengths = np.diff(levels[1].pos) + 1
    by_rows = np.array([part.sum() for part in np.array_split(lengths, 16)])
    assert by_rows.max() * 16 / by_rows.sum() > 15
    assert table.balance < 1.001


def test_unequal_workers_get_work_by_their_speed():
    walk = Walk(csr(power_law(5_000, 100_000, 2.0, RNG)), (1, 1))
    speeds = [3.0, 3.0, 1.0, 1.0]
    table = split([walk], speeds=speeds)
    check_table(table, [walk])
    for share, speed in zip(table.part_work() / table.work, speeds, strict=True):
        assert share == pytest.approx(speed / 8, abs=1e-4)
    equal = split([walk], speeds=[0.1] * 7)
    np.testing.assert_array_equal(equal.targets, split([walk], 7).targets)


def test_more_work_than_32_bits_can_count():
    rows = 1000
    pos = np.arange(rows + 1, dtype=np.int64) * (1 << 40)  # positions only: nothing is read behind them

    class Fake:
        """Coordinates 0, 1, 2, … of every row, never held."""

        def __len__(self):
            return int(pos[-1])

        def __getitem__(self, at):
            return np.asarray(at) % (1 << 40)

    walk = Walk((Dense(rows), Compressed(1 << 40, pos, Fake())), (1, 1))
    table = split([walk], 4096)
    check_table(table, [walk])
    assert table.work == rows + rows * (1 << 40)
    pos = np.array([0, 1 << 62], np.int64)
    with pytest.raises(SpecError, match="does not fit into 64 bits"):
        split([Walk((Dense(1), Compressed(1 << 62, pos, Fake())), (1, 1))], 2)


def test_wrong_input_is_refused():
    walk = Walk(csr([1, 2]), (1, 1))
    for call in (
        lambda: split([walk]),
        lambda: split([walk], 0),
        lambda: split([walk], 2, [1.0]),
        lambda: split([walk], speeds=[]),
        lambda: split([walk], speeds=[1.0, 0.0]),
        lambda: split([walk, Walk(csr([1, 2, 3]), (1, 1))], 2),
        lambda: Walk(csr([1]), (1,)),
        lambda: Walk(csr([1]), (1, -1)),
    ):
        with pytest.raises(SpecError):
            call()
    assert even_targets(10, 4).tolist() == [0, 2, 5, 7, 10]
    assert weighted_targets(10, [1, 1, 2]).tolist() == [0, 2, 5, 10]
    cursors, paths = find_splits([], np.zeros(1, np.int64))
    assert cursors == []
    assert paths.shape == (1, 0)


def test_search_in_windows_is_a_lower_bound():
    values = np.sort(RNG.integers(0, 50, 200))
    low = RNG.integers(0, 201, 300)
    high = np.minimum(low + RNG.integers(0, 60, 300), 200)
    wanted = RNG.integers(-3, 54, 300)
    expected = [
        lo + int(np.searchsorted(values[lo:hi], w)) for lo, hi, w in zip(low, high, wanted, strict=True)
    ]
    np.testing.assert_array_equal(search_windows(values, low, high, wanted), expected)


def test_all_pairs_of_formats_agree_on_the_cuts_of_leaves():
    """Storing an upper level dense instead of compressed leaves cuts where they are, if only leaves count."""
    rng = np.random.default_rng(1)
    dense = (rng.random((6, 7)) < 0.4) * 1.0
    tensors = [
        Tensor.from_coordinates(np.argwhere(dense), dense[dense != 0], dense.shape, form)
        for form in ("csr", "dcsr", "coo")
    ]
    cuts = [split([Walk.of(tensor, (0, 1))], 8).cursors[0][1] for tensor in tensors]
    for one, other in itertools.pairwise(cuts):
        np.testing.assert_array_equal(one, other)


FILES = (
    "bcsstk13.mtx",
    "cryg2500.mtx",
    "jagmesh7.mtx",
    "lp_afiro.mtx",
    "mbeacxc.mtx",
    "3D_12031.tns",
    "med.tns",
)


@pytest.mark.parametrize("name", FILES)
def test_real_matrices_and_tensors_are_cut_within_the_bound(data_dir, name):
    tensor = read_tensor(data_dir / "matrices" / name)
    walk = Walk.of(tensor)
    for parts in (2, 64, 65_536):
        table = split([walk], parts)
        check_table(table, [walk])
        assert table.balance <= (-(-table.work // parts) + table.header - 1) / (table.work / parts) + 1e-9
    shifted = [Walk(walk.levels, walk.costs), walk, walk]
    check_table(split(shifted, 64), shifted)


@pytest.mark.parametrize("parts", [2, 3, 256])
def test_sizes_up_to_the_largest_integer(parts):
    """The middle of two coordinates is found without their sum."""
    last = np.iinfo(np.int64).max - 1
    places = np.array([[0, 5], [1 << 40, 1], [last, last - 1], [last, last]])
    walk = Walk.of(Tensor.from_coordinates(places, np.ones(4), (last + 1, last + 1), "dcsr"))
    table = split([walk], parts)
    work = table.part_work()
    assert (work.sum(), work.max()) == (table.work, -(-table.work // parts))
