"""Multi-token-prediction layers that hold experts of their own, and how many of them stay.

Such a layer follows the decoder's last one (DeepSeek-V3, GLM-4.5) or stands in a stack beside it (Qwen3-Next). The
causal language model of transformers does not load it, so it is known by its tensors alone. Its MoE block is the one of
a decoder layer: it is looked at as the decoder layer that it would be if the model were longer.

Legend: E experts, M experts kept.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moekit.checkpoint.experts import expert_counts, is_expert_tensor, mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import in_mtp_stack, text_config
from moekit.checkpoint.safety import TensorInfo
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadCheckpoint, BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Mtp = Literal["drop", "keep", "prune"]
# Beginning of a block's names -> its experts that stay, ascending.
MtpKept = Mapping[str, Sequence[int]]

_LAYER = re.compile(r"^(?P<stack>(?:.*?\.)?layers\.)(?P<layer>\d+)\.")
_DROP = "leave it out (--mtp drop, in Python mtp='drop'): it only speeds up decoding, and answers stay the same"


@dataclass(frozen=True)
class MtpBlock:
    """A multi-token-prediction layer with routed experts.

    Attributes:
        prefix: with which its tensors' names begin, such as "model.layers.61." or "mtp.layers.0.".
        longer: with which they would begin in a longer decoder, such as "model.layers.61.".
        layer: its number there.
        experts: E.
    """

    prefix: str
    longer: str
    layer: int
    experts: int

    def as_decoder(self, info: TensorInfo) -> TensorInfo:
        """A tensor of it under the name that it would have in a longer decoder."""
        return dataclasses.replace(info, name=self.longer + info.name.removeprefix(self.prefix))


def mtp_blocks(checkpoint: Checkpoint) -> tuple[MtpBlock, ...]:
    """The multi-token-prediction layers of a checkpoint that hold experts, in order.

    Raises:
        BadCheckpoint: experts are missing between others.
    """
    names, layers = mtp_tensors(checkpoint), _layers(checkpoint)
    own: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name in names:
        if (match := _LAYER.match(name)) and is_expert_tensor(name):
            own[match.group(0)][name] = checkpoint.tensors[name]
    stack = _decoder_stack(checkpoint, names)
    found = []
    for prefix, tensors in own.items():
        counts = expert_counts(tensors, stacks=True)
        if not counts:
            continue
        number, count = next(iter(counts.items()))
        layer = number + layers if in_mtp_stack(prefix) else number
        _check_whole(tensors, checkpoint, layer)
        found.append(MtpBlock(prefix, f"{stack}{layer}.", layer, count))
    return tuple(sorted(found, key=lambda block: block.layer))


def _layers(checkpoint: Checkpoint) -> int:
    stated = text_config(checkpoint.config).get("num_hidden_layers")
    return stated if isinstance(stated, int) else 0


def _decoder_stack(checkpoint: Checkpoint, mtp: Iterable[str]) -> str:
    """With which names of the decoder's layers begin, up to the layer's number."""
    skipped = set(mtp)
    found = (_LAYER.match(name) for name in checkpoint.tensors if name not in skipped and is_expert_tensor(name))
    return next((match["stack"] for match in found if match), "model.layers.")


def _check_whole(tensors: Mapping[str, TensorInfo], checkpoint: Checkpoint, layer: int) -> None:
    there = {int(match[1]) for name in tensors if (match := re.search(r"\.experts\.(\d+)\.", name))}
    refuse_gap(there, checkpoint, layer, "expert of a multi-token-prediction layer")


def refuse_gap(experts: Collection[int], checkpoint: Checkpoint, layer: int, what: str = "expert") -> None:
    """Refuse a layer of which an expert is missing though later ones are there.

    Args:
        experts: that are there.
        checkpoint: for messages.
        layer: decoder layer.
        what: the experts are called.

    Raises:
        BadCheckpoint: naming the first that is missing.
    """
    gap = next((expert for expert in range(len(experts)) if expert not in experts), None)
    if gap is not None:
        raise BadCheckpoint(
            f"the tensors of this {what} are missing, those of later ones are there",
            file=checkpoint.path,
            layer=layer,
            expert=gap,
            hint="fetch the shards again; see `moekit check`",
        )


def longer_config(config: PreTrainedConfig, blocks: Sequence[MtpBlock]) -> PreTrainedConfig:
    """The config of a model whose decoder goes on through its multi-token-prediction layers.

    What a config lists layer by layer goes on as its last entry.
    """
    made = copy.deepcopy(config)
    text = made.get_text_config()
    layers = int(text.num_hidden_layers)
    further = max(block.layer for block in blocks) + 1 - layers
    for key, value in list(vars(text).items()):
        by_layer = "layer" in key or key.endswith(("_types", "_pattern"))
        if by_layer and isinstance(value, list) and len(value) == layers:
            setattr(text, key, [*value, *value[-1:] * further])
    text.num_hidden_layers = layers + further
    return made


def check_kept(
    blocks: Sequence[MtpBlock], kept: MtpKept, outcomes: Mapping[int, LayerOutcome], checkpoint: Checkpoint
) -> None:
    """Refuse what makes no head that an engine could run beside the smaller decoder.

    Args:
        blocks: that are to be cut.
        kept: which of their experts stay.
        outcomes: of the decoder's layers.
        checkpoint: the source.

    Raises:
        BadConfig: the decoder's layers differ in their experts, or these become wider or narrower; a block that nothing
            was decided of, or another number of experts than the config will announce.
    """
    counts = {outcome.experts for outcome in outcomes.values()}
    if blocks and (len(counts) > 1 or any(outcome.width is not None for outcome in outcomes.values())):
        what = "keep different numbers of experts" if len(counts) > 1 else "change the width of their experts"
        raise BadConfig(
            f"the decoder's layers {what}, which multi-token-prediction layers cannot follow",
            file=checkpoint.path,
            layer=blocks[0].layer,
            hint=_DROP,
        )
    for block in blocks:
        chosen = tuple(kept.get(block.prefix, ()))
        if len(chosen) != max(counts) or list(chosen) != sorted({*chosen} & {*range(block.experts)}):
            raise BadConfig(
                f"{len(chosen)} of the {block.experts} experts of {block.prefix}* are named to stay, "
                f"the config will announce {max(counts)}",
                file=checkpoint.path,
                layer=block.layer,
                hint="decide again on text (moekit prune --mtp prune), or " + _DROP,
            )


def check_equal(checkpoint: Checkpoint, outcomes: Mapping[int, LayerOutcome]) -> None:
    """Refuse to copy multi-token-prediction layers with other experts than the config will announce.

    Raises:
        BadConfig: they have another number.
    """
    experts = max(outcome.experts for outcome in outcomes.values())
    for block in mtp_blocks(checkpoint):
        if block.experts != experts:
            raise BadConfig(
                f"the multi-token-prediction layer has {block.experts} experts, the config would say {experts}",
                file=checkpoint.path,
                layer=block.layer,
                hint=f"cut it to as many (--mtp prune, in Python mtp='prune'), or {_DROP}",
            )


def highest(scores: Sequence[float], keep: int, groups: int = 1) -> tuple[int, ...]:
    """The experts with the largest scores, ascending; of equal scores the lower number stays.

    Args:
        scores: of each expert, [E].
        keep: M.
        groups: of neighbouring experts, of each of which equally many stay.
    """
    size, share = len(scores) // groups, keep // groups
    chosen: list[int] = []
    for first in range(0, size * groups, size):
        ranked = sorted(range(first, first + size), key=lambda expert: (-scores[expert], expert))
        chosen += ranked[:share]
    return tuple(sorted(chosen))
