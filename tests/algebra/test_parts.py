"""Parts of expressions: work within the bound, results that do not depend on the parts, each step in one part only."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.algebra import Compressed, Dense, Tensor, Walk, evaluate, parse, plan, split
from sparsecc.algebra.baselines import one_split
from sparsecc.algebra.execute import execute
from sparsecc.algebra.gather import Gathered
from sparsecc.algebra.tvm_codegen import TvmBackend
from sparsecc.algebra.visit import survivors, visit
from sparsecc.errors import SpecError

RNG = np.random.default_rng(5)


def packed(array, form="csr", order=None):
    found = np.argwhere(array)
    return Tensor.from_coordinates(found, array[tuple(found.T)], array.shape, form, order)


def random_array(rng, shape, density):
    return np.where(rng.random(shape) < density, rng.integers(-4, 5, shape), 0).astype(float)


@st.composite
def expressions(draw):
    """A sum of products over up to four indices, all of which have those of the result."""
    names = "ijkl"[: draw(st.integers(1, 4))]
    result = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    count, used = 0, []
    for _ in range(draw(st.integers(1, 3))):
        factors, seen = [], set()
        for last in draw(st.sampled_from([(True,), (False, True), (False, False, True)])):
            indices = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
            if last:
                indices = [*dict.fromkeys([*(i for i in result if i not in seen), *indices])]
            factors.append(f"T{count}({','.join(indices)})")
            seen |= set(indices)
            count += 1
        used.append(" * ".join(factors))
    text = f"out({','.join(result)}) = {draw(st.sampled_from([' + ', ' - ']).map(lambda s: s.join(used)))}"
    if result and draw(st.booleans()):
        text = f"{text.split(' = ')[0]} = ({text.split(' = ')[1]}) * M({','.join(result)})"
    return parse(text)


@st.composite
def problems(draw):
    assignment = draw(expressions())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = {index: draw(st.sampled_from([1, 2, 3, 4, 4, 4, 0])) for index in "ijkl"}
    operands = {}
    for access in assignment.inputs:
        shape = tuple(sizes[index] for index in access.indices)
        array = random_array(rng, shape, draw(st.sampled_from([0.0, 0.3, 0.6, 1.0])))
        operands[access.name] = array
        if shape and draw(st.integers(0, 3)):
            form = ",".join(draw(st.sampled_from(["dense", "compressed"])) for _ in shape)
            if draw(st.integers(0, 4)) == 0:
                form = "coo"
            operands[access.name] = packed(array, form, draw(st.permutations(range(len(shape)))))
    return assignment, operands


def check_parts(cut):
    """Each phase: the bound, and what parts really visit is what the table says, nothing twice."""
    for phase in cut.every_phase:
        table, work = phase.table, phase.table.part_work()
        shares = np.diff(table.targets)
        assert (work <= shares + max(table.header - 1, 0)).all()
        assert (work >= shares - max(table.header - 1, 0)).all()
        visited = [visit(phase, part) for part in range(table.parts)]
        seen = {operand: [[] for _ in walk.levels] for operand, walk in phase.walks.items()}
        for part, frontiers in enumerate(visited):
            done = 0
            for level, frontier in enumerate(frontiers):
                for operand, count in frontier.steps.items():
                    done += phase.walks[operand].costs[level] * count
                    own = frontier.walked[operand][frontier.opened :]
                    seen[operand][level].extend(own[own >= 0].tolist())
            assert done == work[part]
        for operand, levels in seen.items():
            for level, positions in enumerate(levels):
                assert positions == sorted(set(positions))
                if phase.survivors is None or level:
                    assert len(positions) == phase.walks[operand].nodes[level]


@settings(max_examples=80, deadline=None)
@given(problems(), st.sampled_from([1, 2, 3, 7, 40, None]), st.sampled_from([(1, 1), (0, 1), (1, 3), (2, 0)]))
def test_every_expression_is_cut_within_the_bound_and_computed(problem, parts, weights):
    assignment, operands = problem
    expected = evaluate(assignment, operands)
    form = "coo" if assignment.output.indices and parts != 2 else None
    cut = plan(assignment, operands, parts, output=form, weights=weights, convert=True)
    check_parts(cut)
    assert cut.largest <= cut.bound
    found = execute(cut, form)
    np.testing.assert_array_equal(found if form is None else found.validated().to_dense(), expected)


@settings(max_examples=20, deadline=None)
@given(problems(), st.sampled_from([1, 3, 40]), st.sampled_from([None, "coo"]))
def test_compiled_loops_compute_every_expression(problem, parts, form):
    pytest.importorskip("tvm", reason="compiled loops need TVM: pip install 'sparsecc[tvm]'")
    assignment, operands = problem
    form = form if assignment.output.indices else None
    cut = plan(assignment, operands, parts, output=form, convert=True)
    found = TvmBackend(strict=True).execute(cut, form, threads=2)
    expected = evaluate(assignment, operands)
    np.testing.assert_array_equal(found if form is None else found.validated().to_dense(), expected)


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(2, 9))
def test_bits_do_not_depend_on_threads_and_integers_not_on_parts(problem, parts):
    assignment, operands = problem
    rough = {
        name: (np.asarray(item * 0.1) if isinstance(item, np.ndarray) else item.astype(np.float64))
        for name, item in operands.items()
    }
    cut = plan(assignment, rough, parts, convert=True)
    once, again = execute(cut), execute(cut, threads=3)
    assert once.tobytes() == again.tobytes()
    exact = [execute(plan(assignment, operands, count, convert=True)) for count in (1, parts)]
    np.testing.assert_array_equal(*exact)


@pytest.mark.parametrize(
    "text", ["y(i) = A(i,j) * x(j)", "y(i) = b(i) + A(i,j) * x(j)", "Y(n,i) = A(i,j) * N(j,n)"]
)
def test_parts_share_no_place_but_the_carry(text, monkeypatch):
    """On threads a place is written by one part only; one place per part is handed back and added by the caller."""
    a = random_array(RNG, (30, 30), 0.3)
    a[4] = 1
    operands = {
        "A": packed(a),
        "x": np.arange(30.0),
        "b": np.arange(30.0),
        "N": random_array(RNG, (30, 2), 1),
    }
    written, carried = [], []

    def add(view, places, values):
        mine = carried if threading.current_thread() is threading.main_thread() else written
        mine.append([tuple(place) for place in places])
        view[tuple(places.T)] += values

    monkeypatch.setattr("sparsecc.algebra.execute._add", add)
    cut = plan(text, operands, 40)
    np.testing.assert_array_equal(execute(cut, threads=3), evaluate(text, operands))
    places = [place for some in written for place in some]
    assert len(places) == len(set(places))
    assert len(carried) == 40
    assert max(map(len, carried)) == 1


def lengths_to_csr(lengths, columns, rng):
    pos = np.concatenate([[0], np.cumsum(lengths)])
    crd = np.concatenate([np.sort(rng.choice(columns, n, replace=False)) for n in lengths if n] or [[]])
    values = rng.integers(1, 5, len(crd)).astype(float)
    levels = (Dense(len(lengths)), Compressed(columns, pos, crd.astype(np.int64)))
    return Tensor((len(lengths), columns), (0, 1), levels, values).validated()


def power_law(rows, entries, exponent):
    share = (np.arange(rows) + 1.0) ** -exponent
    return RNG.permutation((share / share.sum() * entries).astype(np.int64).clip(max=115))


ROWS = 120
ADVERSARIAL = {
    "one giant row": [1] * 60 + [115] + [0] * 59,
    "empty rows, then full ones": [0] * 115 + [100] * 5,
    "full rows, then empty ones": [100] * 5 + [0] * 115,
    "all empty": [0] * ROWS,
    "power law 1.5": power_law(ROWS, 800, 1.5),
    "power law 2.5": power_law(ROWS, 800, 2.5),
    "heavy at the bottom": [1] * 110 + [60] * 10,
    "one element": [0] * 119 + [1],
}
NAMED = [
    ("y(i) = A(i,j) * x(j)", None),
    ("y(j) = A(i,j) * x(i)", None),
    ("Y(i,n) = A(i,j) * N(j,n)", None),
    ("S(i,j) = A(i,j) * U(i,n) * V(n,j)", "csr"),
    ("S(i,j) = A(i,j) + B(i,j) + C(i,j)", "csr"),
    ("S(i,j) = A(i,j) * B(i,j)", "dcsr"),
    ("S(i,j) = (A(i,j) + B(i,j)) * C(i,j)", "csr"),
    ("Y(i,k) = A(i,j) * D(j,k)", "csr"),
    ("S(i,k) = C(i,k) * A(i,j) * D(j,k)", "csr"),
    ("a = A(i,j) * B(i,j)", None),
]


@pytest.mark.parametrize("form", ["csr", "dcsr"])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_inputs_that_break_simpler_schemes(name, form):
    rng = np.random.default_rng(2)
    a = lengths_to_csr(ADVERSARIAL[name], ROWS, rng).converted(form)
    b = lengths_to_csr(ADVERSARIAL["heavy at the bottom"][::-1], ROWS, rng).converted(form)
    c = lengths_to_csr(ADVERSARIAL["power law 1.5"], ROWS, rng).converted(form)
    d = lengths_to_csr([2] * ROWS, ROWS, rng).converted(form)
    operands = {"A": a, "B": b, "C": c, "D": d, "x": np.arange(ROWS) % 7.0}
    operands |= {"N": np.ones((ROWS, 2)), "U": np.ones((ROWS, 2)), "V": np.ones((2, ROWS))}
    for text, output in NAMED:
        cut = plan(text, operands, 7, output=output)
        for phase in (*cut.every_phase, plan(text, operands, 1000, output=output).every_phase[0]):
            table = phase.table
            assert table.part_work().max() <= -(-table.work // table.parts) + max(table.header - 1, 0)
        found = execute(cut, output)
        np.testing.assert_array_equal(found if output is None else found.to_dense(), evaluate(text, operands))


def test_simpler_schemes_are_unbalanced_where_ours_is_not():
    operands = {
        "A": lengths_to_csr(ADVERSARIAL["one giant row"], ROWS, RNG),
        "B": lengths_to_csr(ADVERSARIAL["heavy at the bottom"][::-1], ROWS, RNG),
        "x": np.ones(ROWS),
    }
    cut = plan("y(i) = A(i,j) * x(j)", operands, 16)
    assert cut.balance < 1.1
    assert cut.row_balance > 4
    cut = plan("S(i,j) = A(i,j) + B(i,j)", operands, 16)
    assert cut.balance < 1.1
    assert cut.row_balance > 2
    assert cut.entry_balance > 1.3
    assert plan("y(i) = A(i,j) * x(j)", {**operands, "A": lengths_to_csr([0] * ROWS, ROWS, RNG)}).balance == 1


def row_work(phase, parts):
    """Work of even cuts of the rows, by counting events of the walks one by one."""
    size = phase.trees[phase.nest.loops[0].walked[0]][0].size
    found = np.zeros(parts, np.int64)
    for part in range(phase.table.parts):
        frontiers = visit(phase, part)
        for level, frontier in enumerate(frontiers):
            for operand in frontier.steps:
                for at in range(frontier.opened, len(frontier.above)):
                    # the first operand counts all survivors, also those in which it has nothing
                    first_of_list = level == 0 and phase.survivors is not None
                    if not first_of_list and frontier.walked[operand][at] < 0:
                        continue
                    row, up = at, level
                    while up:
                        row, up = frontiers[up].above[row], up - 1
                    row = frontiers[0].coordinates[row]
                    if phase.survivors is not None:
                        row = phase.survivors.places[row, 0]
                    share = next(p for p in range(parts) if row < size * (p + 1) // parts)
                    found[share] += phase.walks[operand].costs[level]
    return found


@pytest.mark.parametrize(
    "text", ["S(i,j) = A(i,j) + B(i,j)", "S(i,j) = A(i,j) * B(i,j)", "S(i,k) = A(i,j) * B(j,k)"]
)
@pytest.mark.parametrize("form", ["csr", "dcsr"])
def test_work_of_rows_is_what_counting_finds(text, form):
    rng = np.random.default_rng(3)
    operands = {name: packed(random_array(rng, (12, 12), 0.4), form) for name in "AB"}
    cut = plan(text, operands, 5)
    expected = sum(row_work(phase, 5) for phase in cut.every_phase).max() / cut.mean
    assert cut.row_balance == pytest.approx(expected)


def products(a, b):
    return int((np.asarray(a != 0, int).sum(0) * np.asarray(b != 0, int).sum(1)).sum())


def test_work_is_that_of_the_models():
    rng = np.random.default_rng(4)
    a, b, c = (random_array(rng, (9, 9), 0.4) for _ in range(3))
    t = random_array(rng, (5, 6, 7), 0.3)
    dense = np.ones((9, 4))
    operands = {"A": packed(a), "B": packed(b), "C": packed(c), "T": packed(t, "csf"), "x": np.ones(9)}
    operands |= {"N": dense, "V": dense.T, "P": np.ones((6, 3)), "Q": np.ones((7, 3)), "R": packed(t, "csf")}

    def leaves(text):
        return [phase.table.work for phase in plan(text, operands, 3, weights=(0, 1)).every_phase]

    nnz = {name: int(np.count_nonzero(array)) for name, array in {"A": a, "B": b, "C": c, "T": t}.items()}
    assert leaves("y(i) = A(i,j) * x(j)") == [nnz["A"]]
    assert leaves("Y(i,n) = A(i,j) * N(j,n)") == [4 * nnz["A"]]
    assert leaves("S(i,j) = A(i,j) * N(i,n) * V(n,j)") == [4 * nnz["A"]]
    assert leaves("S(i,j) = A(i,j) * (N(i,n) * V(n,j) - A(i,j))") == [5 * nnz["A"]]
    assert leaves("S(i,j) = A(i,j) + B(i,j) + C(i,j)") == [nnz["A"] + nnz["B"] + nnz["C"]]
    assert leaves("S(i,j) = A(i,j) * B(i,j)") == [nnz["A"] + nnz["B"]]
    assert leaves("Y(i,k) = A(i,j) * B(j,k)") == [nnz["A"], products(a, b)]
    assert leaves("S(i,k) = C(i,k) * A(i,j) * B(j,k)") == [nnz["A"], products(a, b)]
    assert leaves("M(i,n) = T(i,k,l) * P(k,n) * Q(l,n)") == [3 * nnz["T"]]
    rows, fibres = int((t != 0).any((1, 2)).sum()), int((t != 0).any(2).sum())
    assert leaves("a = T(i,j,k) * R(i,j,k)") == [2 * rows, 2 * fibres, 2 * nnz["T"]]
    blocks = packed(np.ones((3, 4, 2, 3)), "dense,compressed,dense,dense")
    vector = {"A": blocks, "x": np.ones((4, 3)), "X": np.ones((4, 3, 5))}
    assert plan("y(a,c) = A(a,b,c,d) * x(b,d)", vector, 3, weights=(0, 1)).work == 3 * 4 * 6
    assert plan("y(a,c,n) = A(a,b,c,d) * X(b,d,n)", vector, 3, weights=(0, 1)).work == 3 * 4 * 6 * 5
    cut = plan("y(i) = A(i,j) * x(j)", operands, 3)
    assert cut.work == nnz["A"] + 9
    assert plan("S(i,j) = A(i,j) + B(i,j)", operands, 3).work == nnz["A"] + nnz["B"] + 9


def test_cutting_anew_after_an_intersection_keeps_parts_equal():
    """Rows that both have are all at one end: cuts of everything that is stored leave most parts nothing to do."""
    rng = np.random.default_rng(6)
    a, b = (random_array(rng, (400, 60), 0.7) for _ in range(2))
    a[1:300:2], b[0:300:2] = 0, 0
    operands = {"A": packed(a, "dcsr"), "B": packed(b, "dcsr")}
    cut = plan("S(i,j) = A(i,j) * B(i,j)", operands, 16, output="dcsr")
    assert len(cut.every_phase) == 2
    assert cut.balance < 1.05
    assert cut.single_balance > 2
    walks = [Walk.of(operands[name]) for name in "AB"]
    table = split(walks, 16)
    useful = np.zeros(16, np.int64)
    common = np.flatnonzero((a != 0).any(1) & (b != 0).any(1))
    for walk, cursor in zip(walks, table.cursors, strict=True):
        rows = walk.levels[0].crd[np.repeat(np.arange(walk.nodes[0]), np.diff(walk.levels[1].pos))]
        before = np.concatenate([[0], np.cumsum(np.isin(rows, common))])
        useful += np.diff(before[cursor[1]])
    assert useful.max() * 16 / useful.sum() > 2
    leaves = plan("S(i,j) = A(i,j) * B(i,j)", operands, 16, weights=(0, 1)).every_phase[1].table.work
    assert useful.sum() == leaves


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 9))
def test_one_cut_of_everything_covers_the_work_of_all_phases(problem, parts):
    assignment, operands = problem
    cut = plan(assignment, operands, parts, convert=True)
    for phases in cut.phases:
        if not phases:
            continue
        shares = one_split(phases)
        assert [int(work.sum()) for work in shares] == [phase.table.work for phase in phases]
        assert all((work >= 0).all() for work in shares)
        if len(phases) == 1 and len(phases[0].nest.loops) == len(phases[0].loops):
            np.testing.assert_array_equal(shares[0], phases[0].table.part_work())


def test_one_cut_of_a_product_knows_the_left_operand_only():
    a = random_array(RNG, (30, 30), 0.3)
    b = random_array(RNG, (30, 30), 0.1)
    b[7] = 1
    cut = plan("Y(i,k) = A(i,j) * B(j,k)", {"A": packed(a), "B": packed(b)}, 4, weights=(0, 1))
    shares = one_split(cut.every_phase)
    rows, columns = np.nonzero(a)
    ends = np.arange(5) * len(rows) // 4
    counts = (b != 0).sum(1)[columns]
    np.testing.assert_array_equal(shares[0], np.diff(ends))
    chain = plan("Y(i,l) = A(i,j) * B(j,k) * C(k,l)", {"A": packed(a), "B": packed(b), "C": packed(b)}, 4)
    assert [int(work.sum()) for work in one_split(chain.every_phase)] == [
        p.table.work for p in chain.every_phase
    ]
    np.testing.assert_array_equal(shares[1], [counts[s:e].sum() for s, e in itertools.pairwise(ends)])


def test_parts_of_unequal_workers():
    operands = {"A": lengths_to_csr(ADVERSARIAL["one giant row"], ROWS, RNG), "x": np.ones(ROWS)}
    (phase,) = plan("y(i) = A(i,j) * x(j)", operands, speeds=[3, 1]).every_phase
    assert phase.table.part_work()[0] == pytest.approx(phase.table.work * 0.75, abs=1)
    with pytest.raises(SpecError, match="either parts or speeds"):
        plan("y(i) = A(i,j) * x(j)", operands, 2, speeds=[3, 1])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gathered_subtrees_are_a_copy_of_them(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    form = data.draw(st.sampled_from(["csf", "compressed,dense,compressed", "dense,compressed,dense"]))
    tensor = packed(random_array(rng, (5, 4, 3), data.draw(st.sampled_from([0.0, 0.3, 0.8]))), form)
    depth = data.draw(st.integers(0, 2))
    above = tensor.nodes[depth - 1] if depth else 1
    nodes = np.array(data.draw(st.lists(st.integers(-1, above - 1), max_size=6)), np.int64)
    gathered = Gathered(tensor.levels[depth:], nodes)

    def below(levels, node, at):
        """Nodes of level ``at`` below a node, with their coordinates."""
        level = levels[0]
        start, stop = (
            (node * level.size, (node + 1) * level.size)
            if isinstance(level, Dense)
            else (int(level.pos[np.array([node])][0]), int(level.pos[np.array([node + 1])][0]))
        )
        found = []
        for position in range(start, stop):
            coordinate = (
                position - start if isinstance(level, Dense) else int(level.crd[np.array([position])][0])
            )
            found += [(coordinate, position)] if not at else below(levels[1:], position, at - 1)
        return found

    for at in range(3 - depth):
        expected = [
            pair for node in nodes if node >= 0 for pair in below(tensor.levels[depth:], int(node), at)
        ]
        found = [pair for node in range(len(nodes)) for pair in below(gathered.levels, node, at)]
        assert [coordinate for coordinate, _ in found] == [coordinate for coordinate, _ in expected]
        assert [position for _, position in found] == list(range(len(expected)))
        if expected:
            real = gathered.real(at, np.arange(len(expected)))
            assert real.tolist() == [position for _, position in expected]


def test_survivors_are_the_common_coordinates():
    a, b = random_array(RNG, (9, 9), 0.2), random_array(RNG, (9, 9), 0.2)
    cut = plan("a = A(i,j) * B(i,j)", {"A": packed(a, "dcsr"), "B": packed(b, "dcsr")}, 4)
    first = cut.every_phase[0]
    rows = np.concatenate([survivors(first, visit(first, part)).places[:, 0] for part in range(4)])
    np.testing.assert_array_equal(rows, np.flatnonzero((a != 0).any(1) & (b != 0).any(1)))


def test_coordinates_too_large_for_one_key():
    size = 1 << 61
    places = np.array([[1, 5], [1, size - 1], [2, 7]])
    a = Tensor.from_coordinates(places, np.ones(3), (1 << 60, size), "dcsr")
    b = Tensor.from_coordinates(places[1:] - [0, 1], np.ones(2), (1 << 60, size), "dcsr")
    cut = plan("S(i,j) = A(i,j) + B(i,j)", {"A": a, "B": b}, 3, output="dcsr")
    found = execute(cut, "dcsr").coordinates()
    np.testing.assert_array_equal(found, [[1, 5], [1, size - 2], [1, size - 1], [2, 6], [2, 7]])


def test_types_of_results():
    a = packed(random_array(RNG, (4, 4), 0.5)).astype(np.float32)
    x = np.ones(4, np.float32)
    assert execute(plan("y(i) = A(i,j) * x(j)", {"A": a, "x": x})).dtype == np.float32
    assert execute(plan("y(i) = 2 * A(i,j) * x(j)", {"A": a, "x": x})).dtype == np.float32
    assert execute(plan("y(i) = A(i,j) * x(j)", {"A": a, "x": x * np.float64(1)})).dtype == np.float64
    whole = a.astype(np.int64)
    assert execute(plan("S(i,j) = A(i,j)", {"A": whole}), "csr").values.dtype == np.int64
    assert execute(plan("S(i,j) = A(i,j) * A(i,j)", {"A": packed(np.zeros((4, 4)))}), "csr").nodes[-1] == 0
    for kind in (np.int32, np.int64):
        numbers = {"A": a.astype(kind), "B": a.astype(kind)}
        assert execute(plan("y() = A(i,j) * B(i,j)", numbers, 64)).dtype == kind  # parts without entries, too
    big = packed(np.full((2, 2), 1 << 20)).astype(np.int32)  # whose product is more than they hold
    found = execute(plan("y(i) = A(i,j) * B(i,j) * x(j)", {"A": big, "B": big, "x": np.ones(2)}))
    np.testing.assert_array_equal(found, np.full(2, 2.0**41))
