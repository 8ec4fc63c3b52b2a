"""Built-in passes: ``LOADERS`` maps a pass name to where its class lives; none is imported early."""

from __future__ import annotations

__all__ = ["LOADERS"]

LOADERS: dict[str, str] = {
    "tidy": "sparsecc.passes.tidy.tidy:Tidy",
    "permute": "sparsecc.passes.structure.permute:Permute",
    "prune-structured": "sparsecc.passes.structure.structured:PruneStructured",
    "prune-depth": "sparsecc.passes.structure.depth:PruneDepth",
    "share-weights": "sparsecc.passes.structure.sharing:ShareWeights",
    "prune-experts": "sparsecc.passes.structure.experts:PruneExperts",
    "prune-magnitude": "sparsecc.passes.prune.magnitude:PruneMagnitude",
    "prune-wanda": "sparsecc.passes.prune.wanda:PruneWanda",
    "recover-bias": "sparsecc.passes.recover.bias:RecoverBias",
    "recover-bn": "sparsecc.passes.recover.bn:RecoverBn",
    "recover-ols": "sparsecc.passes.recover.ols:RecoverOls",
    "recover-align": "sparsecc.passes.recover.align:RecoverAlign",
    "heal": "sparsecc.passes.recover.heal:Heal",
    "round-weights": "sparsecc.passes.quantize.round_weights:RoundWeights",
    "prune-dass": "sparsecc.passes.prune.dass:PruneDass",
    "prune-wanda-ols": "sparsecc.passes.prune.wanda_ols:PruneWandaOls",
    "prune-sparsegpt": "sparsecc.passes.prune.sparsegpt:PruneSparseGpt",
    "prune-alps": "sparsecc.passes.prune.alps:PruneAlps",
    "prune-tiles": "sparsecc.passes.hybrid.tiles:PruneTiles",
    "prune-obc": "sparsecc.passes.prune.obc:PruneObc",
    "prune-armor": "sparsecc.passes.hybrid.armor:PruneArmor",
    "sparse-lowrank": "sparsecc.passes.hybrid.sparse_lowrank:SparseLowRank",
    "factor-svd": "sparsecc.passes.factor.low_rank:FactorSvd",
    "factor-rrr": "sparsecc.passes.factor.low_rank:FactorRrr",
    "factor-tensor-train": "sparsecc.passes.factor.tensor_train:FactorTensorTrain",
    "factor-cur": "sparsecc.passes.factor.cur:FactorCur",
    "factor-interpolative": "sparsecc.passes.factor.interpolative:FactorInterpolative",
    "protect": "sparsecc.passes.prune.protect:Protect",
    "allocate": "sparsecc.passes.prune.allocate:Allocate",
    "quantize": "sparsecc.passes.quantize.quantize:Quantize",
    "lower-conv-int8": "sparsecc.passes.lower.lower_conv_int8:LowerConvInt8",
    "choose-layout": "sparsecc.passes.lower.choose_layout:ChooseLayout",
    "confirm-layout": "sparsecc.passes.lower.confirm_layout:ConfirmLayout",
    "restore-dense": "sparsecc.passes.lower.restore_dense:RestoreDense",
    "lower-sparse": "sparsecc.passes.lower.lower_sparse:LowerSparse",
    "fuse-transformer": "sparsecc.passes.lower.fuse_transformer:FuseTransformer",
}
