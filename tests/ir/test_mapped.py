"""Arrays in files instead of memory."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.ir.mapped import Scratch, array_of, is_mapped, release

RNG = np.random.default_rng(5)


@pytest.fixture
def large(tmp_path: Path) -> Model:
    """A MatMul whose weight is in a data file."""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[B,64] x) => (float[B,48] y) { [m] y = MatMul(x, w) }'
    )
    weight = RNG.standard_normal((64, 48)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    Model.from_proto(proto).save(tmp_path / "m.onnx", external_data=True)
    return Model.load(tmp_path / "m.onnx")


def test_what_is_kept_is_the_same_and_can_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scratch = Scratch()
    array = RNG.standard_normal((33, 7))
    kept = [scratch.keep(array * number) for number in range(5)]
    assert os.listdir(tmp_path) == []  # nothing to clean up, however the process ends
    for number, item in enumerate(kept):
        assert is_mapped(item)
        assert not item.flags.writeable
        release(item)
        np.testing.assert_array_equal(item, array * number)
    sums = scratch.zeros((4, 4), np.float64)
    sums += 1
    release(sums)
    assert sums.sum() == 16
    assert scratch.keep(np.zeros((0, 3))).shape == (0, 3)
    del scratch
    np.testing.assert_array_equal(kept[-1], array * 4)


def test_arrays_larger_than_a_file_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsecc.ir.mapped._FILE", 4096)
    scratch = Scratch()
    arrays = [RNG.standard_normal(size) for size in (10, 5000, 300, 511)]
    for kept, array in [(scratch.keep(array), array) for array in arrays]:
        np.testing.assert_array_equal(kept, array)


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left on device; free space or set TMPDIR"):
        Scratch().keep(np.ones(3))


def test_only_our_own_mappings_are_released(tmp_path: Path) -> None:
    """Pages of a private mapping that were written to would be lost."""
    (tmp_path / "f").write_bytes(bytes(8192))
    private = np.memmap(tmp_path / "f", np.uint8, mode="c")
    private[:] = 1
    release(private)
    assert not is_mapped(private)
    assert private.sum() == 8192


def test_a_new_weight_goes_where_the_old_one_was(large: Model) -> None:
    (site,) = large.sites()
    copy = large.copy()
    before = site.numpy().copy()
    site.replace(before * 2, Scratch())
    site.release()
    np.testing.assert_array_equal(site.numpy(), before * 2)
    np.testing.assert_array_equal(copy.sites()[0].numpy(), before)
    held = large.onnx.graph.initializers["w"].const_value
    assert held is not None
    array = array_of(held)
    assert array is not None
    assert is_mapped(array)
    site.replace(before)
    held = large.onnx.graph.initializers["w"].const_value
    assert held is not None
    assert not is_mapped(held.numpy())
