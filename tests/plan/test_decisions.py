"""What became of each site: a result that was thrown away is not told as if it were there."""

from __future__ import annotations

import numpy as np
import onnx

from sparsecc.ir import Model
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.plan.decisions import decisions
from sparsecc.plan.rounds import Outcome
from sparsecc.pm import PassContext, PassReport, Pipeline

PIPELINE = "factor-svd{param-ratio=0.5 min-elements=1},choose-layout"


def two_layers(units: int = 32) -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[4,32] x) => (float[4,9] y) { [first] h = MatMul(x, a) [second] y = MatMul(h, b) }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("a", (32, units)), ("b", (units, 9))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def test_forms_of_a_result_that_was_slower_are_not_told_as_used():
    model = two_layers()
    factorised = model.copy()
    outcome = Outcome(factorised, Pipeline.parse(PIPELINE).run(factorised, PassContext()), {})

    used = {item.site: item for item in decisions(factorised, factorised, outcome, kept=True)}
    left = {item.site: item for item in decisions(model, model, outcome, kept=False)}

    assert (used["first"].layout, used["first"].density) == ("rank 8", 0.5)
    assert left["first"].layout == "dense"
    assert left["first"].reason == f"not used, the model was slower with it: rank 8: {used['first'].reason}"
    assert left["second"].reason == used["second"].reason  # what was refused stays refused
    assert left["second"].reason.startswith("not factorised: ")


def test_what_became_of_a_module_is_told_beside_the_choice_of_layout():
    model = two_layers()
    smaller, layout = PassReport("factor-modegpt"), PassReport("choose-layout")
    smaller.change("first", "32 -> 24 neurons")
    layout.skip("first", "too few zeros")
    (first, _) = decisions(model, model, Outcome(model, [smaller, layout], {}), kept=True)
    assert first.reason == "32 -> 24 neurons; too few zeros"


def test_a_site_that_reads_fewer_units_says_so_although_its_own_were_kept():
    model, report = two_layers(24), PassReport("prune-structured")
    report.change("first", "32 -> 24 units")
    report.skip("second", "it is the output 'y'")
    outcome = Outcome(model, [report], {})
    first, second = decisions(model, model, outcome, kept=True, original=two_layers())
    assert (first.reason, second.reason) == (
        "32 -> 24 units",
        "32 -> 24 inputs; not pruned: it is the output 'y'",
    )


def test_zeros_of_a_sparse_part_that_is_stored_dense_count():
    model = two_layers()
    (first, _) = model.sites()
    weight = first.numpy().copy()
    weight[::2] = 0
    first.replace(weight)
    first.node.metadata_props[PART_KEY] = "whole"
    report = PassReport("factor-compot")
    report.change(
        "whole", "dictionary of 32: 0.5 of the numbers", form="dictionary of 32", op="MatMul", outputs=64,
        inputs=32, parameters=0.5,
    )  # fmt: skip
    (whole, _) = decisions(model, model, Outcome(model, [report], {}), kept=True)
    assert whole.density == 0.5 + 0.25  # half of 32 x 32 zeros, of 64 x 32 numbers
    assert whole.reason.endswith("its sparse part is faster dense in this model: 0.75 with the zeros")
