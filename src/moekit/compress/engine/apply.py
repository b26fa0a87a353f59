"""Carry an outcome out on disk: a checkpoint with fewer experts, whatever its size, in little memory.

Layers whose experts are only dropped are copied byte by byte; those whose experts change pass through memory one at a
time. The output appears whole or not at all.

Legend: K choices a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_folder, check_apart
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import CONFIG_FILE, Checkpoint
from moekit.checkpoint.model import seal
from moekit.checkpoint.quantized.registry import kind, quantization
from moekit.checkpoint.record import Expectations, Record, TensorExpectation
from moekit.checkpoint.safety import FLOAT_DTYPES
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.checkpoint.small_files import copy_small_files
from moekit.compress.engine.carrying import carried_out
from moekit.compress.engine.dense_cuts import InputCut
from moekit.compress.engine.layer_writer import Rewrite, Rewriter
from moekit.compress.engine.layout import OutputLayout, prepare
from moekit.compress.engine.mtp import Mtp, MtpKept
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirecting import NovicesByLayer, Redirection, redirection_on_disk
from moekit.compress.engine.resize import Groups
from moekit.compress.engine.shard_writer import OutputShards
from moekit.compress.weights import LayerWeights
from moekit.errors import UnsupportedModel

# Room for the card, which is written last.
_CARD_BYTES = 64 << 10


def apply(
    checkpoint: Checkpoint,
    outcomes: Mapping[int, LayerOutcome],
    target: str | Path,
    *,
    rewrite: Rewrite | None = None,
    novices: NovicesByLayer | None = None,
    record: Record,
    top_k: int | None = None,
    groups: Groups = "free",
    mtp: Mtp = "drop",
    mtp_kept: MtpKept | None = None,
    cuts: Mapping[str, InputCut] | None = None,
    overwrite: bool = False,
    stock_only: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Record:
    """Write a checkpoint that holds the experts that outcomes keep, whole or not at all.

    Memory is a few buffers; with `rewrite`, one layer and what the rewriting takes.

    Args:
        checkpoint: the source, verified; quantized ones too, without `rewrite`.
        outcomes: of every MoE layer; position in `keep` is an expert's new number.
        target: folder to write.
        rewrite: makes new weights out of a layer's; None keeps those of `keep` as they are. Layers whose outcome
            changes nothing are not given to it: their bytes are copied.
        novices: decoder layer -> constants [E, H] that answer for experts whose tokens an outcome redirects to nobody.
        record: how it was made; parent, fingerprints and expectations are filled in where they are not.
        top_k: K from now on; None as it is.
        groups: "free" routes without expert groups once experts are dropped, "equal" keeps them.
        mtp: multi-token-prediction layers: "drop" leaves them out, "keep" copies them, "prune" cuts their experts to
            as many as the decoder's layers keep.
        mtp_kept: which of their experts stay then, by the beginning of their names ("model.layers.61.").
        cuts: name of a matrix outside of routed experts -> which of its inputs stay, with all that makes them.
        overwrite: replace an existing folder, at the very end.
        stock_only: refuse what stock transformers does not load (layers with different numbers of experts), or loads
            without what belongs to it (redirected tokens).
        max_shard_bytes: of one shard.
        progress: told bytes written.

    Returns:
        The record as written; `scores["kept"]` holds which expert became which (and "kept_mtp", of
        multi-token-prediction layers).

    Raises:
        BadConfig: fewer experts than K, experts or layers that are not there, torn groups, uneven counts with
            `stock_only`, a routing policy in the source, or the folder exists.
        BadCheckpoint: the source is damaged.
        UnsupportedModel: experts that cannot be told apart in the source's bytes; rewriting of quantized weights.
        NumericFault: the rewriting gave NaN or infinity.
        OutOfBudget: not enough disk; said before the work.
    """
    check_apart(Path(target), checkpoint.path)
    if checkpoint.remote_code:
        raise UnsupportedModel(
            "a model whose code comes with its repository cannot be written again",
            file=checkpoint.path,
            hint="use a family that transformers knows",
        )
    work = prepare(
        checkpoint,
        outcomes,
        top_k=top_k,
        groups=groups,
        mtp=mtp,
        mtp_kept=mtp_kept,
        cuts=cuts,
        stock_only=stock_only,
        max_shard_bytes=max_shard_bytes,
    )
    redirected = redirection_on_disk(checkpoint, outcomes, novices)
    if rewrite is None and any(outcome.rewrites for outcome in outcomes.values()):

        def rewrite(layer: int, weights: LayerWeights) -> LayerWeights:
            return carried_out(weights, outcomes[layer], layer)

    rewriter = None if rewrite is None else _rewriter(work, rewrite)
    full = _described(work, record, redirected)
    need = work.nbytes + work.record_bytes(full) + _CARD_BYTES + (0 if redirected is None else redirected.nbytes)
    with atomic_folder(target, overwrite=overwrite, need_bytes=need) as temporary:
        copy_small_files(checkpoint.path, temporary)
        if work.config_text is not None:
            (temporary / CONFIG_FILE).write_text(work.config_text)
        digests = _write(work, temporary, rewriter, work.changed_layers if rewriter else set(), progress)
        extra = None if redirected is None else redirected.tensors
        return seal(temporary, full, extra_tensors=extra, digests=digests, progress=progress)


def refuse_rewriting(checkpoint: Checkpoint) -> None:
    """Refuse to change weights that would have to be quantized again.

    Raises:
        UnsupportedModel: the weights are quantized.
    """
    settings = quantization(checkpoint.config)
    if settings is not None:
        raise UnsupportedModel(
            f"the weights are quantized ({kind(settings)}): they can be dropped, but not changed and quantized again",
            file=checkpoint.path,
            hint="choose a method that only drops experts, or give the unquantized checkpoint",
        )


def _rewriter(work: OutputLayout, rewrite: Rewrite) -> Rewriter:
    refuse_rewriting(work.checkpoint)
    # That of the experts: beside them may lie counters, and biases in a wider type.
    floats = [t.source for t in work.kept if t.layer is not None and t.source.dtype in FLOAT_DTYPES]
    short = max(floats, key=lambda info: info.numel).dtype
    name = next(name for name, known in TORCH_NAMES.items() if known == short)
    return Rewriter(work.checkpoint, work.config, rewrite, getattr(torch, name.removeprefix("torch.")))


def _described(work: OutputLayout, record: Record, redirected: Redirection | None) -> Record:
    """The record with what is known before the work."""
    kept = {str(layer): list(outcome.keep) for layer, outcome in work.outcomes.items()}
    before = {"bytes": work.checkpoint.nbytes, "experts": {str(layer): n for layer, n in work.counts.items()}}
    scores: dict[str, object] = {"kept": kept, "before": before}
    if work.kept_mtp:
        scores["kept_mtp"] = {prefix: list(keep) for prefix, keep in work.kept_mtp.items()}
    update: dict[str, object] = {"scores": {**scores, **record.scores}}
    if redirected is not None:
        update["parts"] = redirected.entries
    if work.dropped_mtp:
        note = f"{work.dropped_mtp} tensors of multi-token-prediction layers were left out"
        update["config"] = {**record.config, "mtp": note}
    if record.parent is None:
        update |= {"parent": str(work.checkpoint.path), "parent_fingerprint": work.checkpoint.fingerprint}
    counts = {layer: len(outcome.keep) for layer, outcome in work.outcomes.items()}
    return record.model_copy(update={**update, "expectations": Expectations(experts=counts)})


def _write(
    work: OutputLayout, folder: Path, rewriter: Rewriter | None, changed: set[int], progress: Progress | None
) -> dict[str, TensorExpectation]:
    source = work.checkpoint.path
    if progress is not None:
        progress.start("writing", sum(tensor.spec.nbytes for tensor in work.kept))
    try:
        with OutputShards(folder, work.shards, work.index, progress.advance if progress else None) as output:
            copied = [tensor for tensor in work.kept if tensor.layer not in changed]
            for tensor, following in itertools.zip_longest(copied, copied[1:]):
                if following is not None and not following.scattered:
                    output.announce(source / following.source.shard, following.ranges())
                if tensor.scattered:
                    output.put(tensor.name, tensor.gather(work.checkpoint))
                else:
                    output.copy(tensor.name, source / tensor.source.shard, tensor.ranges())
            for layer in sorted(changed):
                assert rewriter is not None
                kept = [tensor for tensor in work.kept if tensor.layer == layer]
                for tensor, new in rewriter.tensors(layer, work.outcomes[layer], kept):
                    output.put(tensor.name, _bytes(new))
            return output.digests()
    finally:
        if rewriter is not None:
            rewriter.close()
        if progress is not None:
            progress.finish()


def _bytes(tensor: torch.Tensor) -> memoryview:
    view: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view
