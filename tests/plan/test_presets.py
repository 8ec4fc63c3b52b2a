"""The pipelines behind the short flags."""

from __future__ import annotations

from typing import Any

import pytest

from sparsecc.errors import SparseccError
from sparsecc.plan import preset
from sparsecc.pm import Pipeline

LOWER = "lower-conv-int8,choose-layout,confirm-layout,lower-sparse,fuse-transformer"
PRUNED = "lower-conv-int8,choose-layout,confirm-layout,restore-dense,lower-sparse,fuse-transformer"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, f"tidy,{LOWER}"),
        ({"pattern": "2:4"}, f"tidy,prune-magnitude{{pattern=2:4}},{PRUNED}"),
        ({"pattern": "2:4", "sparsity": 0.5}, f"tidy,prune-magnitude{{pattern=2:4}},{PRUNED}"),
        ({"sparsity": 0.9, "calibrated": True}, f"tidy,prune-wanda{{sparsity=0.9}},{PRUNED}"),
        ({"method": "magnitude", "calibrated": True}, f"tidy,prune-magnitude,{PRUNED}"),
        ({"pattern": "8x1", "standard_ops_only": True}, "tidy,prune-magnitude{pattern=8x1}"),
        ({"pattern": "2:4", "keep_slower": True}, "tidy,prune-magnitude{pattern=2:4},"
         "lower-conv-int8{keep-slower=true},choose-layout{keep-slower=true layout=2:4},lower-sparse"),
        ({"pattern": "8x4", "quantize": "int8", "activations": "static", "calibrated": True},
         "tidy,prune-wanda{pattern=8x4 by-channel=true},quantize{activations=static},"
         f"{PRUNED}"),
        ({"pattern": "8x1", "quantize": "int8", "activations": "static", "calibrated": True},
         f"tidy,prune-wanda{{pattern=8x1}},quantize{{activations=static}},{PRUNED}"),
        ({"pattern": "2:4", "calibrated": True, "recover": "heal,bias, bn,align,ols", "standard_ops_only": True},
         "tidy,prune-wanda{pattern=2:4},recover-ols,recover-align,recover-bn,recover-bias,heal"),
        ({"method": "tiles", "sparsity": 0.3, "calibrated": True}, f"tidy,prune-tiles{{sparsity=0.3}},{PRUNED}"),
        ({"method": "armor", "match": "*mlp*", "calibrated": True, "standard_ops_only": True},
         "tidy,prune-armor{match=*mlp*}"),
        ({"method": "sparse-lowrank", "pattern": "16x1", "sparsity": 0.6, "calibrated": True,
          "standard_ops_only": True},
         "tidy,sparse-lowrank{pattern=16x1 sparsity=0.6}"),
        ({"method": "sparse-lowrank", "param_ratio": 0.7, "calibrated": True, "standard_ops_only": True},
         "tidy,sparse-lowrank{sparsity=0.3}"),
        ({"method": "structured", "flops_ratio": 0.6, "standard_ops_only": True},
         "tidy,prune-structured{flops-ratio=0.6}"),
        ({"method": "depth", "flops_ratio": 0.6, "match": "*mlp*", "standard_ops_only": True},
         "tidy,prune-depth{flops-ratio=0.6 match=*mlp*}"),
        ({"method": "depth", "blocks": 3, "recover": "ols,bias", "calibrated": True, "standard_ops_only": True},
         "tidy,prune-depth{blocks=3},recover-ols,recover-bias"),
        ({"recover": "ols", "pruned_before": True, "calibrated": True, "standard_ops_only": True},
         "tidy,recover-ols"),
        ({"method": "structured", "recover": "bn", "calibrated": True},
         f"tidy,prune-structured,recover-bn,{LOWER}"),
        ({"pattern": "2:4", "permute": True, "standard_ops_only": True},
         "tidy,permute{scope=layer},prune-magnitude{pattern=2:4}"),
        ({"pattern": "16x4", "sparsity": 0.7, "permute": True, "calibrated": True, "standard_ops_only": True},
         "tidy,permute{pattern=16x4 sparsity=0.7},prune-wanda{pattern=16x4 sparsity=0.7}"),
        ({"keep_slower": True},
         "tidy,lower-conv-int8{keep-slower=true},choose-layout{keep-slower=true},lower-sparse"),
        ({"match": "re:.*mlp.*"},
         "tidy,lower-conv-int8{match=re:.*mlp.*},choose-layout{match=re:.*mlp.*},confirm-layout,"
         "lower-sparse,fuse-transformer"),
    ],
)  # fmt: skip
def test_preset(flags: dict[str, Any], text: str) -> None:
    made = preset(**flags)
    assert made == Pipeline.parse(text)
    assert Pipeline.parse(str(made)) == made


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.7}, "keeps 2 of 4"),
        ({"pattern": "dense"}, "prunes nothing"),
        ({"pattern": "3"}, "3"),
        ({"pattern": "4:2"}, "4:2"),
        ({"method": "sparsgpt"}, "magnitude, wanda, dass, wanda-ols, sparsegpt, alps"),
        ({"keep_slower": True, "standard_ops_only": True}, "standard-ops-only"),
        ({"sparsity": 1.5}, "1.5"),
        ({"sparsity": 0.5, "recover": "bias"}, "calibration-data"),
        ({"method": "depth", "pattern": "2:4"}, "--method depth removes whole units"),
        ({"method": "depth", "blocks": 2, "flops_ratio": 0.5}, "blocks or flops-ratio, not both"),
        ({"method": "structured", "blocks": 2}, "--blocks is an option of --method depth"),
        ({"blocks": 2}, "--blocks is an option of --method depth"),
        ({"flops_ratio": 0.7}, "--flops-ratio is an option of --method structured or depth"),
        ({"method": "depth", "recover": "ols"}, "calibration-data"),
        ({"recover": "bias", "calibrated": True}, "follows pruning"),
        ({"sparsity": 0.5, "recover": "bias,magic", "calibrated": True}, "known: ols, align, bn, bias"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(SparseccError, match=message):
        preset(**flags)
