"""Instruments: timing, dumping, verifying, stopping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest

from sparsecc.errors import UsageError, VerificationError
from sparsecc.ir import Model
from sparsecc.pm import (
    DumpInstrument,
    Instrument,
    Pass,
    PassContext,
    PassReport,
    Pipeline,
    StopAfterInstrument,
    TimingInstrument,
    VerifyEachInstrument,
)


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the weight, while it says that it is lossless."""

    name: ClassVar[str] = "scale"
    lossless: ClassVar[bool] = True

    factor: float = 1.0

    def run(self, model, ctx):
        report = PassReport(self.name)
        if self.factor != 1:
            site = model.sites()[0]
            site.replace(site.numpy() * self.factor)
            report.change(site.name, "scaled")
        return report


@dataclass(frozen=True)
class LossyScale(Scale):
    """Multiplies the weight and admits it."""

    name: ClassVar[str] = "lossy-scale"
    lossless: ClassVar[bool] = False


def model() -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[B,4] x) => (float[B,4] y) { y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    return Model.from_proto(proto)


def run(*passes: Pass, instruments: list[Instrument]):
    return Pipeline(passes).run(model(), PassContext(instruments=instruments))


def difference(before: Model, after: Model) -> float:
    return float(np.abs(before.sites()[0].numpy() - after.sites()[0].numpy()).max())


def test_timing_has_a_row_per_pass():
    timing = TimingInstrument()
    run(Scale(), Scale(2.0), instruments=[timing])
    assert [spec for spec, _ in timing.rows] == ["scale", "scale{factor=2.0}"]
    assert all(seconds >= 0 for _, seconds in timing.rows)


def test_dump_saves_the_input_and_every_change(tmp_path):
    folder = tmp_path / "new" / "dump"
    run(Scale(2.0), Scale(), Scale(3.0), instruments=[DumpInstrument(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-input.onnx",
        "01-scale.onnx",
        "03-scale.onnx",
    ]
    assert Model.load(folder / "03-scale.onnx").sites()[0].numpy()[0, 0] == 6


def test_dump_into_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot create the dump folder"):
        run(Scale(), instruments=[DumpInstrument(tmp_path / "file")])


def test_verify_each_refuses_a_lossless_pass_that_changed_outputs():
    verify = VerifyEachInstrument(difference)
    with pytest.raises(VerificationError, match=r"'scale\{factor=2.0\}' promises equal outputs"):
        run(LossyScale(3.0), Scale(), Scale(2.0), instruments=[verify])
    assert verify.rows == [("lossy-scale{factor=3.0}", 2.0), ("scale{factor=2.0}", 3.0)]


def test_verify_each_counts_nan_as_a_failure():
    with pytest.raises(VerificationError):
        run(Scale(2.0), instruments=[VerifyEachInstrument(lambda before, after: float("nan"))])


def test_verify_each_tolerance():
    run(Scale(2.0), instruments=[VerifyEachInstrument(difference, tolerance=1.0)])


def test_stop_after():
    reports = run(Scale(2.0), LossyScale(3.0), Scale(5.0), instruments=[StopAfterInstrument("scale")])
    assert [report.spec for report in reports] == ["scale{factor=2.0}"]


def test_stop_after_an_absent_pass_is_a_usage_error():
    with pytest.raises(UsageError, match=r"cannot stop after 'scal' \(did you mean 'scale'\?\)"):
        run(Scale(), instruments=[StopAfterInstrument("scal")])


def test_instruments_nest_and_can_leave_passes_out():
    log: list[str] = []

    class Logger(Instrument):
        def __init__(self, mark: str) -> None:
            self.mark = mark

        def should_run(self, pass_, model, ctx):
            return pass_.name != "lossy-scale"

        def before(self, pass_, model, ctx):
            log.append(f"{self.mark}(")

        def after(self, pass_, model, report, ctx):
            log.append(f"){self.mark}")

    reports = run(LossyScale(2.0), Scale(), instruments=[Logger("a"), Logger("b")])
    assert [report.pass_name for report in reports] == ["scale"]
    assert log == ["a(", "b(", ")b", ")a"]
