"""The pipelines behind the command line's short flags."""

from __future__ import annotations

from sparsecc.errors import SpecError, UsageError
from sparsecc.pm import Pass, Pipeline, get_pass
from sparsecc.sparse import FLOATS, Pattern

__all__ = ["ACTIVATIONS", "FACTOR", "METHODS", "RECOVERY", "REMOVAL", "preset"]

#: Pruning methods by the name given to ``--method``.
METHODS = {
    name: f"prune-{name}" for name in ("magnitude", "wanda", "dass", "wanda-ols", "sparsegpt", "alps", "obc")
}

#: Methods that split or factorise weights, with the pattern of their sparse part where none is given.
_HYBRIDS = {"tiles": "2:4", "armor": "2:4", "sparse-lowrank": "unstructured"}
METHODS.update({"tiles": "prune-tiles", "armor": "prune-armor", "sparse-lowrank": "sparse-lowrank"})

#: Methods that factorise weights, by the name given to ``--method``: pass and options.
FACTOR: dict[str, tuple[str, dict[str, object]]] = {
    "svd": ("factor-svd", {}),
    "whitened-svd": ("factor-rrr", {"sequential": False}),
    "rrr": ("factor-rrr", {}),
    "rrr-shared": ("factor-rrr", {"share_inputs": True}),
    "asvd": ("factor-asvd", {"sequential": False}),
    "fwsvd": ("factor-fwsvd", {"sequential": False}),
    "tensor-train": ("factor-tensor-train", {}),
    "faust": ("factor-faust", {}),
    "cur": ("factor-cur", {}),
    "interpolative": ("factor-interpolative", {}),
    "compot": ("factor-compot", {}),
    "cospadi": ("factor-cospadi", {}),
    "rocket": ("factor-rocket", {}),
    "spatial-svd": ("factor-spatial-svd", {}),
    "tucker": ("factor-tucker", {}),
    "cp": ("factor-cp", {}),
    "separable": ("factor-separable", {}),
    "best": ("factor-best", {}),
    "monarch": ("factor-monarch", {}),
    "btt": ("factor-btt", {}),
    "slab": ("factor-slab", {}),
    "seedlm": ("factor-seedlm", {}),
    "bitstack": ("factor-bitstack", {}),
    "embedding": ("factor-embedding", {}),
    "blast": ("factor-blast", {}),
    "blockdiag-lowrank": ("factor-blockdiag-lowrank", {}),
    "kronecker": ("factor-kronecker", {}),
    "modegpt": ("factor-modegpt", {}),
    "mobe": ("factor-mobe", {}),
}

#: Methods that remove whole units or blocks, so that shapes shrink, by the name given to ``--method``.
REMOVAL = {"structured": "prune-structured", "depth": "prune-depth"}

#: Recovery passes by the name given to ``--recover``.
RECOVERY = {
    "ols": "recover-ols", "align": "recover-align", "bn": "recover-bn", "bias": "recover-bias", "heal": "heal",
}  # fmt: skip

#: How the range of quantised activations is found, by the name given to ``--activations``.
ACTIVATIONS = ("dynamic", "static")

#: Options that ``allocate-parameters`` takes over from the factor pass after it.
_DEALT = ("match", "param_ratio", "multiple", "min_elements")

#: Options that ``permute`` takes over from the prune pass after it.
_SHARED = ("pattern", "match", "scope", "min_elements", "min_reduction", "by_channel")


def preset(
    *,
    pattern: str | None = None,
    sparsity: float | None = None,
    method: str | None = None,
    match: str = "*",
    keep_slower: bool = False,
    standard_ops_only: bool = False,
    calibrated: bool = False,
    quantize: str | None = None,
    activations: str | None = None,
    permute: bool = False,
    flops_ratio: float | None = None,
    blocks: int | None = None,
    param_ratio: float | None = None,
    fisher: str | None = None,
    allocate: bool = False,
    values: str = "fp32",
    recover: str | None = None,
    pruned_before: bool = False,
) -> Pipeline:
    """The pipeline for these flags; with neither pattern, sparsity nor method it prunes nothing.

    Args:
        pattern: what to prune to; ``unstructured`` when only a sparsity or a method is given, ``2:4`` for ``tiles`` and
            ``armor``.
        sparsity: fraction of weights to remove; the method's default when not given. N:M has its own.
        method: one of ``METHODS``, ``FACTOR`` or ``REMOVAL``; ``wanda`` with calibration data, else ``magnitude``; with
            ``param_ratio`` or ``allocate`` alone ``rrr`` with calibration data, else ``svd``.
        match: which sites to prune and lower.
        keep_slower: lower every site that has zeros (to ``pattern``, if given), also where dense is faster.
        standard_ops_only: emit no custom operators.
        calibrated: calibration data is at hand.
        quantize: ``int8``, or None for float32.
        activations: one of ``ACTIVATIONS``; ``dynamic`` when not given.
        permute: reorder channels before pruning, so that the pattern costs less.
        flops_ratio: with the methods of ``REMOVAL``, which remove channels, neurons and heads, or whole residual
            blocks: share of the multiplications to keep.
        blocks: with the method ``depth``: how many residual blocks to remove, instead of ``flops_ratio``.
        param_ratio: with the methods of ``FACTOR``: share of the numbers of each weight that its factors may hold;
            1 - ``sparsity`` of ``sparse-lowrank``.
        fisher: with the method ``fwsvd``, which needs it: file of squared gradients.
        allocate: with the methods of ``FACTOR``: deal the numbers to sites by their spectra instead of all alike.
        values: type of the values of sparse float weights, one of ``FLOATS``.
        recover: names of ``RECOVERY`` with commas between them: what runs after pruning, in the order that suits
            them, whichever they are given in.
        pruned_before: the model was pruned before, and the dense one is known: ``recover`` needs no pruning here.

    Raises:
        UsageError: flags that contradict each other.
    """
    steps: list[Pass] = [_pass("tidy")]
    removes = method in REMOVAL
    if method is not None and removes:
        if pattern is not None or sparsity is not None or permute:
            raise UsageError(
                f"--method {method} removes whole units: give --flops-ratio, no --pattern, --sparsity or --permute"
            )
        steps.append(_removal_step(method, match, flops_ratio, blocks))
        method, match = None, "*"
    elif flops_ratio is not None or blocks is not None:
        flag, methods = ("blocks", "depth") if blocks is not None else ("flops-ratio", " or ".join(REMOVAL))
        raise UsageError(f"--{flag} is an option of --method {methods}")
    if (method, pattern, sparsity) == (None, None, None) and (param_ratio is not None or allocate):
        method = "rrr" if calibrated else "svd"
    factorises = method in FACTOR
    if method is not None and factorises:
        if pattern is not None or sparsity is not None or permute:
            raise UsageError(
                f"--method {method} factorises: give --param-ratio, no --pattern, --sparsity or --permute"
            )
        factors = _factor_step(method, match, param_ratio, fisher, keep_slower, standard_ops_only)
        steps += [*([_allocate_step(method, factors)] if allocate else []), factors]
        method, match = None, "*"
    elif allocate:
        raise UsageError("--allocate is an option of methods that factorise: give --method rrr or another")
    elif fisher is not None:
        raise UsageError("--fisher is an option of --method fwsvd")
    elif param_ratio is not None:
        if method != "sparse-lowrank" or sparsity is not None:
            raise UsageError(
                f"--param-ratio is an option of --method {', '.join(FACTOR)}, and in the place of --sparsity of "
                "sparse-lowrank"
            )
        sparsity = round(1 - param_ratio, 9)
    prunes = pattern is not None or sparsity is not None or method is not None
    if prunes:
        step = _prune_step(pattern, sparsity, method, match, calibrated, activations == "static")
        steps += [*([_permute_step(step)] if permute else []), step]
    elif permute:
        raise UsageError("--permute prepares pruning to a pattern: give --pattern N:M or RxC too")
    if recover is not None:
        steps += _recovery_steps(recover, prunes or removes or factorises or pruned_before, calibrated)
    if values != "fp32":
        steps.append(_round_step(values, match, standard_ops_only))
    if activations is not None and quantize is None:
        raise UsageError("--activations is an option of --quantize: give --quantize int8 too")
    if quantize is not None:
        if activations == "static" and not calibrated:
            raise UsageError(
                "--activations static needs ranges from real inputs: give --calibration-data PATH"
            )
        steps.append(_quantize_step(quantize, activations, match))
    if not standard_ops_only:
        forced = Pattern.parse(pattern) if keep_slower and pattern is not None else None
        steps.append(_pass("lower-conv-int8", match=match, keep_slower=keep_slower))
        steps.append(
            _pass("choose-layout", match=match, keep_slower=keep_slower, layout=forced, values=values)
        )
        if not keep_slower:
            steps.append(_pass("confirm-layout"))
            if prunes or quantize is not None or values != "fp32":
                steps.append(_pass("restore-dense"))
        steps.append(_pass("lower-sparse"))
        if not keep_slower:
            steps.append(_pass("fuse-transformer"))
    elif keep_slower and not factorises:
        raise UsageError("--keep-slower needs custom operators; leave out --standard-ops-only")
    elif quantize is not None:
        steps += [_pass("choose-layout", match=match, custom_ops=False), _pass("confirm-layout")]
        # What was pruned stays so: without sparse operators the zeros are all that was asked for.
        steps.append(_pass("restore-dense", pruned=False))
    return Pipeline(tuple(steps))


def _pass(name: str, **options: object) -> Pass:
    return get_pass(name)(**options)


def _removal_step(method: str, match: str, flops_ratio: float | None, blocks: int | None) -> Pass:
    if blocks is not None and method != "depth":
        raise UsageError("--blocks is an option of --method depth")
    amounts: dict[str, object] = {"flops_ratio": flops_ratio, "blocks": blocks}
    given = {name: value for name, value in amounts.items() if value is not None}
    return _pass(REMOVAL[method], match=match, **given)


def _factor_step(
    method: str,
    match: str,
    param_ratio: float | None,
    fisher: str | None,
    keep_slower: bool,
    standard_ops_only: bool,
) -> Pass:
    name, options = FACTOR[method]
    known = {info.name for info in get_pass(name).option_infos()}
    amount: dict[str, object] = {} if param_ratio is None else {"param_ratio": param_ratio}
    if (fisher is not None) != ("fisher" in known):
        raise UsageError(
            f"--method {method} needs gradients: give --fisher PATH (bench/fisher.py writes one)"
            if fisher is None
            else "--fisher is an option of --method fwsvd"
        )
    if fisher is not None:
        amount["fisher"] = fisher
    if "custom-ops" in known:
        amount["custom_ops"] = not standard_ops_only
    return _pass(name, match=match, keep_slower=keep_slower, **amount, **options)


def _allocate_step(method: str, factors: Pass) -> Pass:
    """What deals the numbers to the sites before ``factors``, with the options that both have."""
    shared = {key: vars(factors)[key] for key in _DEALT if key in vars(factors)}
    if len(shared) < len(_DEALT):
        raise UsageError(f"--method {method} works on several weights together: leave out --allocate")
    rest = {key: value for key, value in vars(factors).items() if key not in _DEALT}
    return _pass("allocate-parameters", form=str(_pass(factors.name, **rest)), **shared)


def _round_step(values: str, match: str, standard_ops_only: bool) -> Pass:
    if values not in FLOATS:
        raise UsageError(f"unknown type of values '{values}'; known: {', '.join(FLOATS)}")
    if standard_ops_only:
        raise UsageError(
            f"--values {values} needs sparse operators and their library: leave it out, or --standard-ops-only"
        )
    return _pass("round-weights", values=values, match=match)


def _quantize_step(weights: str, activations: str | None, match: str) -> Pass:
    if weights != "int8":
        raise UsageError(f"unknown type '{weights}' to quantise to; known: int8")
    if activations is not None and activations not in ACTIVATIONS:
        raise UsageError(f"unknown activations '{activations}'; known: {', '.join(ACTIVATIONS)}")
    return _pass("quantize", activations=activations or ACTIVATIONS[0], match=match)


def _permute_step(prune: Pass) -> Pass:
    """The order that suits a prune pass: the same options."""
    pattern: Pattern = vars(prune)["pattern"]
    if pattern.kind not in ("nm", "block"):
        raise UsageError(
            f"--permute does nothing for pattern {pattern}: give --pattern N:M or RxC, or leave it out"
        )
    shared = {name: vars(prune)[name] for name in _SHARED}
    amount = vars(prune)["sparsity"]
    return _pass("permute", **shared, **({} if amount is None else {"sparsity": amount}))


def _recovery_steps(names: str, prunes: bool, calibrated: bool) -> list[Pass]:
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in RECOVERY:
            raise UsageError(f"unknown recovery '{name}'; known: {', '.join(RECOVERY)}")
    if not prunes:
        raise UsageError(
            "--recover follows pruning: give --pattern, --sparsity or --method too, or with --reference the dense "
            "model that this one was made from"
        )
    if not calibrated:
        raise UsageError(
            "--recover needs inputs to compare with the dense model on: give --calibration-data PATH"
        )
    # bias may add nodes, and those before it compare with the dense model node by node
    return [_pass(step) for name, step in RECOVERY.items() if name in chosen]


def _prune_step(
    pattern: str | None,
    sparsity: float | None,
    method: str | None,
    match: str,
    calibrated: bool,
    bytes_of_channels: bool,
) -> Pass:
    chosen = method or ("wanda" if calibrated else "magnitude")
    if chosen not in METHODS:
        raise UsageError(f"unknown method '{chosen}'; known: {', '.join([*METHODS, *FACTOR, *REMOVAL])}")
    wanted = Pattern.parse(pattern or _HYBRIDS.get(chosen, "unstructured"))
    if wanted.kind == "dense":
        raise SpecError("--pattern dense prunes nothing; leave it out")
    amount: dict[str, object] = {}
    if wanted.kind != "nm" or chosen == "tiles":  # of which only some are N:M
        amount = {} if sparsity is None else {"sparsity": sparsity}
    elif sparsity is not None and abs(1 - sparsity - wanted.n / wanted.m) > 1e-9:
        raise UsageError(
            f"--pattern {wanted} keeps {wanted.n} of {wanted.m}, which is sparsity {1 - wanted.n / wanted.m:g}; "
            f"leave out --sparsity {sparsity:g}"
        )
    if bytes_of_channels and wanted.kind == "block" and wanted.cols > 1:
        amount["by_channel"] = True  # what the kernels of quantised convolutions multiply at a time
    return _pass(METHODS[chosen], pattern=wanted, match=match, **amount)
