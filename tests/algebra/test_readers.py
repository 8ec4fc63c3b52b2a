"""Matrix Market and FROSTT files, against scipy and by hand; wrong files are refused with the line."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from sparsecc.algebra import read_tensor, readers
from sparsecc.errors import UsageError

RNG = np.random.default_rng(2)


@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric"])
@pytest.mark.parametrize("field", ["real", "integer", "pattern"])
def test_matrices_are_those_of_scipy(tmp_path, symmetry, field, monkeypatch):
    if (field, symmetry) == ("pattern", "skew-symmetric"):
        pytest.skip("a pattern has no signs")
    dense = RNG.integers(-9, 9, (12, 12)) * (RNG.random((12, 12)) < 0.3)
    dense = (
        dense + dense.T if symmetry == "symmetric" else dense - dense.T if symmetry != "general" else dense
    )
    path = tmp_path / "a.mtx"
    matrix = scipy.sparse.coo_array(dense.astype(float if field == "real" else int))
    scipy.io.mmwrite(path, matrix, field=field, symmetry=symmetry, comment="two\nlines")
    expected = scipy.io.mmread(path).toarray()
    for piece in (7, 1 << 20):
        monkeypatch.setattr(readers, "_PIECE", piece)
        np.testing.assert_array_equal(read_tensor(path).to_dense(), expected)
    np.testing.assert_array_equal(read_tensor(path, "dcsr").to_dense(), expected)


def test_tensors_with_and_without_sizes(tmp_path):
    plain = tmp_path / "plain.tns"
    plain.write_text("# a comment\n\n1 2 3 1.5\n4 1 1 -2\n1 2 3 1e0\n")
    tensor = read_tensor(plain)
    assert tensor.shape == (4, 2, 3)
    expected = np.zeros((4, 2, 3))
    expected[0, 1, 2], expected[3, 0, 0] = 2.5, -2
    np.testing.assert_array_equal(tensor.to_dense(), expected)
    sized = tmp_path / "sized.tns"
    sized.write_text("3\n4 5 6\n1 2 3 1.5\n4 1 1 -2")
    assert read_tensor(sized).shape == (4, 5, 6)
    assert len(read_tensor(sized).values) == 2
    empty = tmp_path / "empty.tns"
    empty.write_text("2\n3 4\n")
    assert read_tensor(empty).shape == (3, 4)
    assert len(read_tensor(empty).values) == 0


def test_comments_between_entries(tmp_path, monkeypatch):
    matrix, tensor = tmp_path / "a.mtx", tmp_path / "a.tns"
    matrix.write_text(BANNER + "% one\n\n2 2 2\n% two\n1 1 5\n  % 3 x\n2 1 7 % four\n%")
    tensor.write_text("# one\n3 # modes\n2 2 2\n#\n1 1 1 5\n # 3 x\n2 1 1 7 # four\n")
    for piece in (5, 1 << 20):
        monkeypatch.setattr(readers, "_PIECE", piece)
        assert read_tensor(matrix).to_dense().tolist() == [[5, 0], [7, 0]]
        assert read_tensor(tensor).to_dense()[:, 0, 0].tolist() == [5, 7]
    matrix.write_text(BANNER + "2 2 2\n% two\n1 1 5\n% x\n2 1\n")
    with pytest.raises(UsageError, match="line 6: expected 3 numbers, got '2 1'"):
        read_tensor(matrix)


@pytest.mark.parametrize("name", ["a.mtx.gz", "a.TNS.GZ"])
def test_files_compressed_by_gzip(tmp_path, name, monkeypatch):
    text = (BANNER + "3 3 2\n1 1 5\n2 3 7\n" if "mtx" in name else "# c\n1 1 5\n2 3 7\n").encode()
    path, plain = tmp_path / name, tmp_path / name[:-3]
    path.write_bytes(gzip.compress(text))
    plain.write_bytes(text)
    seen = []
    for piece in (6, 1 << 20):
        monkeypatch.setattr(readers, "_PIECE", piece)
        found = read_tensor(path, progress=lambda *told: seen.append(told))
        np.testing.assert_array_equal(found.to_dense(), read_tensor(plain).to_dense())
    assert {total for *_, total in seen} == {path.stat().st_size}
    assert all(done <= total for _, done, total in seen)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:5], text, whole[:15] + b"xx" + whole[17:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="no whole gzip file") as caught:
            read_tensor(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.mtx", "a.tns", "b.mtx", "b.tns"])
def test_lines_without_an_end_are_refused_early(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 100)
    monkeypatch.setattr(readers, "_PIECE", 50)
    start = {"a.mtx": "", "b.mtx": BANNER + "2 2 1\n", "a.tns": "", "b.tns": "1 1\n1 1\n"}[name]
    path = tmp_path / name
    path.write_text(start + "1" * 300)
    with pytest.raises(UsageError, match="a line of more than 100 bytes"):
        read_tensor(path)


BANNER = "%%MatrixMarket matrix coordinate real general\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.mtx", "hello", "line 1 is no Matrix Market banner"),
        ("a.mtx", BANNER.replace("coordinate", "array") + "2 2\n", "array real general is not read"),
        ("a.mtx", BANNER.replace("real", "complex"), "complex general is not read"),
        ("a.mtx", BANNER + "% c\n2 2\n", "line 3: expected 3 sizes, got '2 2'"),
        ("a.mtx", BANNER + "2 2 2\n1 1 1\n", "1 entries, the header says 2"),
        ("a.mtx", BANNER + "2 2 1\n1 1 x\n", "line 3: expected 3 numbers, got '1 1 x'"),
        ("a.mtx", BANNER + "2 2 2\n1 1 1\n1 2\n", "line 4: expected 3 numbers, got '1 2'"),
        ("a.mtx", BANNER + "2 2 1\n3 1 1\n", "mode 0: coordinate 2 is outside of 0..1"),
        ("a.mtx", BANNER + "2 2 1\n0 1 1\n", "coordinates must be whole numbers from 1 to"),
        ("a.mtx", BANNER + "2 2 1\n1.5 1 1\n", "coordinates must be whole numbers from 1 to"),
        ("a.mtx", BANNER + "2 2 2\n1 1 1\n1 1 2\n", r"coordinate \(0, 0\) is there twice"),
        ("a.mtx", BANNER.replace("general", "symmetric") + "2 3 0\n", "a symmetric matrix of 2 x 3"),
        ("a.tns", "1 1 1\n1 2\n", "line 2: expected 3 numbers, got '1 2'"),
        ("a.tns", "3\n4 5\n1 1 1 1\n", "line 2: expected 3 sizes"),
        ("a.tns", "2\n4 5\n1 1 1 1\n", "line 3: expected 3 numbers, got '1 1 1 1'"),
        ("a.tns", "2\n4 5\n5 1 1\n", "mode 0: coordinate 4 is outside of 0..3"),
        ("a.csv", "1,2\n", "unknown kind of tensor file"),
        ("a.mtx", BANNER + "2 2 2\n1 1\n2 2 1 1\n", "line 3: expected 3 numbers, got '1 1'"),
        ("a.mtx", BANNER + "20 2 1\n1_0 1 1\n", "line 3: expected 3 numbers, got '1_0 1 1'"),
        ("a.mtx", BANNER + "2 " + "9" * 5000 + " 0\n", "line 2: sizes must be below"),
        ("a.mtx", BANNER + f"2 {1 << 53} 0\n", "line 2: sizes must be below"),
        ("a.mtx", BANNER + "2000000000 2 1\n1 1 1\n", "dense levels of 2000000000 nodes over 1 entries"),
        ("a.tns", "1 1 1\n2 2\n1 1 1 1\n", "line 2: expected 3 numbers, got '2 2'"),
        ("a.tns", f"{(1 << 53) + 1} 1 1\n", "coordinates must be whole numbers from 1 to"),
        ("a.tns", "9" * 5000 + "\n1 1 1\n", "line 1: sizes must be below"),
        ("a.tns", "", "no entries"),
        ("a.tns", "5\n", "no entries"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_tensor(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        read_tensor(tmp_path / "missing.tns")


def test_progress_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.tns"
    path.write_text("".join(f"{i} 1 1.0\n" for i in range(1, 200)))
    monkeypatch.setattr(readers, "_PIECE", 100)
    seen = []
    read_tensor(path, progress=lambda text, done, total: seen.append((text, done, total)))
    assert seen[-1] == ("reading a.tns", path.stat().st_size, path.stat().st_size)
    assert len(seen) > 10
