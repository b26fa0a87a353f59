"""Expert weights on disk: which tensor belongs to which layer, expert and part.

Checkpoints keep experts *split*, one tensor per expert and projection (v4 style, what `save_pretrained` writes for
most families), or *fused*, one stacked tensor per projection (v5 style; GPT-OSS and Granite on disk). Names differ by
family, the pattern does not: a path with `.experts.<e>.` is split, a stacked tensor named like a projection is fused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from moekit.anatomy.probe import decoder_index
from moekit.errors import BadCheckpoint

_SPLIT = re.compile(r"^(?P<block>.+?)\.experts\.(?:expert_)?(?P<expert>\d+)\.(?P<rest>.+)$")
_FUSED = re.compile(r"^(?P<block>.+?)\.experts\.(?P<rest>(?:gate_up_proj|gate_proj|up_proj|down_proj)\S*)$")
# Granite keeps its stacked experts directly in the block.
_FUSED_BARE = re.compile(r"^(?P<block>.+?)\.(?P<rest>(?:input_linear|output_linear)\.weight)$")

_PARTS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "down_proj": "down",
    "w2": "down",
    "gate_up_proj": "gate_up",
    "input_linear": "gate_up",
    "output_linear": "down",
    "wi": "up",
    "wo": "down",
    "fc1": "up",
    "fc2": "down",
}


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor on disk that belongs to routed experts.

    Attributes:
        name: its key.
        block: path of the MoE block.
        layer: decoder layer index.
        expert: expert index, None where all experts are stacked along dimension 0.
        part: "gate", "up", "gate_up", "down".
        suffix: what follows the projection's name: "weight", "bias", "weight_scale_inv", "" ...
    """

    name: str
    block: str
    layer: int
    expert: int | None
    part: str
    suffix: str


@dataclass
class DiskLayout:
    """Where a checkpoint keeps its MoE layers.

    Attributes:
        experts: by block path, the tensors of its routed experts.
        others: by block path, the remaining tensors below the block (router, selection bias, shared experts).
    """

    experts: dict[str, list[ExpertTensor]] = field(default_factory=dict)
    others: dict[str, list[str]] = field(default_factory=dict)

    @property
    def layers(self) -> dict[int, str]:
        """Decoder layer index -> block path."""
        return {tensors[0].layer: block for block, tensors in self.experts.items()}

    def count(self, block: str) -> int | None:
        """Number of experts of a split block; None if fused (its shapes tell)."""
        seen = {t.expert for t in self.experts[block] if t.expert is not None}
        return max(seen) + 1 if seen else None


def parse_expert_tensor(name: str) -> ExpertTensor | None:
    """What a tensor name says of experts; None if it is not a routed expert's."""
    match = _SPLIT.match(name) or _FUSED.match(name) or _FUSED_BARE.match(name)
    if match is None or ".shared" in name:
        return None
    rest = match["rest"]
    head, _, suffix = rest.partition(".")
    part = _PARTS.get(head)
    if part is None:
        # "gate_up_proj_bias", "down_proj_blocks": projection and suffix joined by an underscore.
        for stem in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            if head.startswith(f"{stem}_"):
                part, suffix = _PARTS[stem], head[len(stem) + 1 :]
                break
        else:
            return None
    expert = match.groupdict().get("expert")
    return ExpertTensor(
        name=name,
        block=match["block"],
        layer=decoder_index(match["block"]),
        expert=None if expert is None else int(expert),
        part=part,
        suffix=suffix,
    )


def find_expert_tensors(names: Iterable[str], number: Callable[[str], int | None] | None = None) -> DiskLayout:
    """Sort the tensor names of a checkpoint by MoE block.

    Args:
        names: all keys of the checkpoint.
        number: of the layer that a tensor belongs to, as its model numbers layers; where it is None, and without, as
            the name says it.

    Returns:
        The layout; empty if there is no MoE block.

    Raises:
        BadCheckpoint: a block mixes split and fused experts.
    """
    names = list(names)
    experts: dict[str, list[ExpertTensor]] = defaultdict(list)
    for name in names:
        tensor = parse_expert_tensor(name)
        if tensor is not None:
            known = None if number is None else number(name)
            tensor = tensor if known is None else replace(tensor, layer=known)
            experts[tensor.block].append(tensor)
    for block, tensors in experts.items():
        if len({t.expert is None for t in tensors}) > 1:
            raise BadCheckpoint(
                f"{block!r} holds both split and stacked expert tensors",
                layer=tensors[0].layer,
                hint="the folder mixes two checkpoints: save it again from one source",
            )
    owned = {t.name for tensors in experts.values() for t in tensors}
    others: dict[str, list[str]] = {block: [] for block in experts}
    for name in names:
        if name not in owned:
            for block in others:
                if name.startswith(f"{block}."):
                    others[block].append(name)
    return DiskLayout(dict(experts), others)
