"""All that is known of a smaller checkpoint before a weight is read: tensors, shards, config, bytes, what is refused.

Legend: E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.config_file import edited_config, without_mtp
from moekit.checkpoint.experts import mtp_tensors, stacked_experts
from moekit.checkpoint.folder import CONFIG_FILE, Checkpoint
from moekit.checkpoint.meta import model_config
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, config_top_k
from moekit.checkpoint.record import TENSORS_FILE, Expectations, Record, TensorExpectation
from moekit.checkpoint.shards import DEFAULT_SHARD_BYTES
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.small_files import small_files
from moekit.checkpoint.uneven import without_common_loss
from moekit.compress.engine.config_file import renamed_experts
from moekit.compress.engine.dense_cuts import InputCut, set_cuts, with_cuts
from moekit.compress.engine.droppable import check_droppable
from moekit.compress.engine.kept import KeptTensor
from moekit.compress.engine.limits import (
    check_even,
    check_groups,
    check_layers,
    check_stock,
    check_top_k,
    common_width,
)
from moekit.compress.engine.mtp import Mtp, MtpKept, check_equal, check_kept, longer_config, mtp_blocks
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirecting import is_redirected
from moekit.compress.engine.resize import Groups, resized_config, stating_experts
from moekit.compress.engine.shard_writer import Shard, lay_out
from moekit.compress.engine.slicing import Axes, expert_counts, kept_tensors
from moekit.errors import BadConfig, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class OutputLayout:
    """All that is known of the output before a weight is read.

    Attributes:
        checkpoint: the source.
        outcomes: of every MoE layer.
        counts: decoder layer -> E of the source.
        kept: tensors of the output, in the order of the source.
        shards: where they will lie.
        index: text of the index; None without.
        config: transformers config of the output's blocks, in which nothing outside of routed experts is cut.
        config_text: its config.json; None where the source's is taken over.
        dropped_mtp: how many multi-token-prediction tensors go.
        kept_mtp: experts of multi-token-prediction layers that stay, where these are cut.
    """

    checkpoint: Checkpoint
    outcomes: Mapping[int, LayerOutcome]
    counts: Mapping[int, int]
    kept: tuple[KeptTensor, ...]
    shards: tuple[Shard, ...]
    index: str | None
    config: PreTrainedConfig
    config_text: str | None
    dropped_mtp: int
    kept_mtp: MtpKept

    @property
    def changed_layers(self) -> set[int]:
        """Decoder layers whose experts do not all stay as they are."""
        return {n for n, outcome in self.outcomes.items() if not outcome.unchanged(self.counts[n])}

    @property
    def nbytes(self) -> int:
        """Bytes of shards, index, config and small files; the record and the card come on top."""
        folder = self.checkpoint.path
        small = {file.name: file.stat().st_size for file in small_files(folder)}
        if self.config_text is not None:
            small[CONFIG_FILE] = len(self.config_text.encode())
        index = len(self.index.encode()) if self.index is not None else 0
        return sum(shard.nbytes for shard in self.shards) + index + sum(small.values())

    def record_bytes(self, record: Record) -> int:
        """Bytes of the record, told by one with digests of zeros."""
        zeros = "0" * 64
        tensors = {
            info.name: TensorExpectation(
                dtype=info.dtype,
                shape=list(info.shape),
                sha256=zeros,
                experts=[zeros] * count if (count := stacked_experts(info)) else None,
            )
            for shard in self.shards
            for info in shard.tensors
        }
        counts = {layer: len(outcome.keep) for layer, outcome in self.outcomes.items()}
        full = record.model_copy(update={"expectations": Expectations(experts=counts, tensors=tensors)})
        return len(full.model_dump_json(indent=1))


def prepare(
    checkpoint: Checkpoint,
    outcomes: Mapping[int, LayerOutcome],
    *,
    top_k: int | None = None,
    groups: Groups = "free",
    mtp: Mtp = "drop",
    mtp_kept: MtpKept | None = None,
    cuts: Mapping[str, InputCut] | None = None,
    stock_only: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> OutputLayout:
    """Find out what `apply` would write, and refuse what is impossible; no weight is read.

    Args, raises: see `apply`.
    """
    counts = expert_counts(checkpoint)
    config_path = checkpoint.path / CONFIG_FILE
    _refuse_policies(checkpoint)
    check_layers(outcomes, counts, checkpoint.path)
    before = model_config(checkpoint)
    layers = find_moe_layers(empty_model(before))
    chosen = config_top_k(checkpoint.config) or max(layer.geometry.top_k for layer in layers) or 1
    check_top_k(outcomes, chosen if top_k is None else top_k, config_path)
    if stock_only:
        check_even(outcomes, checkpoint.path)
        check_stock(is_redirected(outcomes), checkpoint.path)
    if groups == "equal":
        check_groups(outcomes, counts, checkpoint.config, top_k, config_path)
    most, width = max(outcome.experts for outcome in outcomes.values()), common_width(outcomes, checkpoint.path)
    extra = mtp_tensors(checkpoint)
    blocks = mtp_blocks(checkpoint) if mtp == "prune" else ()
    kept_mtp = {block.prefix: tuple((mtp_kept or {}).get(block.prefix, ())) for block in blocks}
    if mtp == "keep":
        check_equal(checkpoint, outcomes)
    check_kept(blocks, kept_mtp, outcomes, checkpoint)
    cut = {layer for layer, count in counts.items() if outcomes[layer].experts != count}
    dropped = bool(cut)
    check_droppable(before, layers, cut, checkpoint.path, top_k=top_k)
    after = resized_config(before, most, top_k=top_k, groups=groups, dropped=dropped, width=width)
    if len({len(outcome.keep) for outcome in outcomes.values()}) > 1:
        without_common_loss(after)
    axes = _axes(longer_config(before, blocks) if blocks else before, counts)
    kept = kept_tensors(checkpoint, outcomes, axes, mtp, kept_mtp)
    if width is not None:
        kept = _resized(kept, after)
    stated_after = after
    if cuts:
        stated_after = copy.deepcopy(after)
        set_cuts(stated_after, cuts, width)
        kept = with_cuts(kept, checkpoint, cuts, stated_after)
    shards, index = lay_out((tensor.spec for tensor in kept), max_shard_bytes)
    text = _config_text(checkpoint, before, stated_after, outcomes, kept_mtp, bool(extra) and mtp == "drop")
    gone = len(extra) if mtp == "drop" else 0
    return OutputLayout(checkpoint, outcomes, counts, tuple(kept), tuple(shards), index, after, text, gone, kept_mtp)


def _axes(before: PreTrainedConfig, counts: Mapping[int, int]) -> Axes:
    """Compare the model's shapes with those of one with another number of experts."""
    other = copy.deepcopy(before)
    inner = stating_experts(other)
    values = {key: getattr(inner, key, None) for key in EXPERT_COUNT_KEYS}
    stated = {key: n for key, n in values.items() if isinstance(n, int) and not isinstance(n, bool)}
    most = max(*stated.values(), *counts.values())
    for key in stated:
        setattr(inner, key, most + 1)
    return Axes(empty_model(before), empty_model(other), (next(iter(stated.values()), most), most + 1))


def _resized(kept: list[KeptTensor], after: PreTrainedConfig) -> list[KeptTensor]:
    """The tensors with the sizes that they have in a model of another expert width, split and fused ones.

    Raises:
        UnsupportedModel: the config gives the same width to more than routed experts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = empty_model(after)
    live = dict(model.state_dict())
    known = {name: tuple(tensor.shape) for name, tensor in (revert_weight_conversion(model, dict(live)) | live).items()}
    made = []
    for tensor in kept:
        shape = known.get(tensor.name)
        if tensor.cut is not None and shape is not None:
            # The config names the largest number of experts, this layer may have fewer.
            shape = (*shape[: tensor.cut.axis], tensor.shape[tensor.cut.axis], *shape[tensor.cut.axis + 1 :])
        if shape is None or shape == tensor.shape:
            made.append(tensor)
            continue
        if tensor.layer is None:
            raise UnsupportedModel(
                f"{tensor.name} of {list(tensor.shape)} would have to become {list(shape)}: in this family the "
                "width of routed experts is that of other parts, too",
                hint="drop experts instead (moekit prune)",
            )
        made.append(dataclasses.replace(tensor, resized=shape))
    return made


def _config_text(
    checkpoint: Checkpoint,
    before: PreTrainedConfig,
    after: PreTrainedConfig,
    outcomes: Mapping[int, LayerOutcome],
    kept_mtp: MtpKept,
    mtp_dropped: bool,
) -> str | None:
    """The new config.json; None where nothing changes."""
    edited = edited_config(checkpoint.config, before, after)
    if mtp_dropped:
        edited = without_mtp(edited)
    if "quantization_config" in edited:

        def rename(prefix: str, expert: int) -> int | None:
            layer = checkpoint.where(prefix)[0]
            outcome = None if layer is None else outcomes.get(layer)
            keep = kept_mtp.get(prefix) if outcome is None else outcome.keep
            if keep is None:
                return expert
            return keep.index(expert) if expert in keep else None

        edited["quantization_config"] = renamed_experts(edited["quantization_config"], rename)
    return None if edited == checkpoint.config else json.dumps(edited, indent=2) + "\n"


def _refuse_policies(checkpoint: Checkpoint) -> None:
    """A routing policy's lists name experts by number, and would name others."""
    parts = checkpoint.record.parts if checkpoint.record is not None else []
    if parts or (checkpoint.path / TENSORS_FILE).exists():
        what = f"{parts[0].kind} {parts[0].name!r}" if parts else "extra tensors"
        raise BadConfig(
            f"the checkpoint carries {what}, made for all of its experts",
            file=checkpoint.path / TENSORS_FILE,
            hint="prune its parent (moekit undo), then attach it again",
        )
