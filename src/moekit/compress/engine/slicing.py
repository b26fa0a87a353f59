"""Which bytes of a checkpoint stay when experts go: names, shapes and byte ranges, no number is looked at.

Experts that lie in tensors of their own are left out or renamed. Tensors that stack experts, and router tensors, are
cut along the axis that counts experts; which axis that is, is told by the shapes of the same model with another number
of experts. So quantized weights are cut as well as any other, as long as an expert's bytes lie together.

Legend: E experts, M experts kept.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod

from transformers import PreTrainedModel

from moekit.anatomy.layout import parse_expert_tensor
from moekit.anatomy.probe import decoder_index
from moekit.checkpoint.decoder import has_stack, layer_number, stacks_of
from moekit.checkpoint.experts import mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import renamer
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.compress.engine.counting import Counted, counted_axes
from moekit.compress.engine.disk import renamed_experts
from moekit.compress.engine.kept import Cut, KeptTensor, TokenTable
from moekit.compress.engine.mtp import Mtp, MtpKept, mtp_blocks, refuse_gap
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import UnsupportedModel

_SPLIT = re.compile(r"^(?P<block>.+?\.experts\.(?:expert_)?)(?P<expert>\d+)\.(?P<rest>.+)$")
# Types that a weight has as it was trained; anything else packs several numbers, or is scaled.
_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})


def expert_counts(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> E, as the tensors say; multi-token-prediction layers left out.

    Raises:
        BadCheckpoint: experts are missing between others.
        UnsupportedModel: no experts at all.
    """
    beyond = mtp_tensors(checkpoint)
    split: dict[int, set[int]] = defaultdict(set)
    down: dict[int, set[int]] = defaultdict(set)
    counts: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = checkpoint.where(name)[0]
        if name in beyond or layer is None or not checkpoint.layout.is_expert(name):
            continue
        if match := _split(name):
            expert = int(match["expert"])
            split[layer].add(expert)
            if (known := parse_expert_tensor(name)) is not None and known.part == "down":
                down[layer].add(expert)
        elif len(info.shape) >= 3:
            counts[layer] = info.shape[0]
    for layer, experts in split.items():
        refuse_gap(experts, checkpoint, layer)
        # Only what has a way out is an expert: behind the others may lie numbers without (LongCat's zero experts).
        whole = down[layer] if down[layer] and down[layer] == set(range(len(down[layer]))) else experts
        counts[layer] = len(whole)
    if not counts:
        counts = {layer: found.experts for layer, found in renamed_experts(checkpoint).items()}
    return dict(sorted(counts.items()))


def _split(name: str) -> re.Match[str] | None:
    return None if ".shared" in name else _SPLIT.match(name)


def _hint(info: TensorInfo) -> str:
    if info.dtype in _PLAIN:
        return "the config states another number of experts than the tensors hold: see `moekit check`"
    return "the router or the stacked experts are packed across experts: give the unquantized checkpoint"


class Axes:
    """Knows along which axis a tensor on disk counts experts.

    Args:
        before: the model, which may lie on the meta device.
        after: the same model with another number of experts.
        experts: E of both.
    """

    def __init__(self, before: PreTrainedModel, after: PreTrainedModel, experts: tuple[int, int]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
        others = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
        self._rename = renamer(before, self._shapes)
        self._axes = counted_axes(self._shapes, others, experts)
        self._stems = {name.rpartition(".")[0] for name in self._axes}
        self._stacks = stacks_of(before) if has_stack(before) else ()

    def _live(self, name: str) -> str | None:
        """The live tensor that one on disk becomes; None if it is unknown, or only a part of one."""
        if name in self._shapes:
            return name
        target, gathered = self._rename(name)
        return target if target in self._shapes and not gathered else None

    def of(self, info: TensorInfo, experts: int) -> Counted | None:
        """How a tensor counts experts; None if it does not.

        Args:
            info: of a tensor that holds more than one expert, or none.
            experts: E of its layer.

        Raises:
            UnsupportedModel: it must count them, but its shape does not say how (packed routers).
        """
        live = self._live(info.name) or ""
        how = self._axes.get(live)
        if how is not None and self._fits(info, self._shapes[live], how, experts):
            return how
        parsed = parse_expert_tensor(info.name)
        counts = parsed is not None or how is not None or self._belongs(info.name)
        if not counts or (parsed is not None and info.numel == 1):
            return None
        first = Counted(0, 1, 0)
        if how is None and info.shape[:1] == (experts,) and self._fits(info, info.shape, first, experts):
            return first
        raise UnsupportedModel(
            f"{info.name} of shape {list(info.shape)} and dtype {info.dtype} has no axis of {experts} experts to cut",
            layer=self._layer(info.name),
            hint=_hint(info),
        )

    def _layer(self, name: str) -> int:
        number = layer_number(self._stacks, self._rename(name)[0])
        return decoder_index(name) if number is None else number

    def _belongs(self, name: str) -> bool:
        """Whether an unknown tensor (a scale, packed numbers) is part of a tensor that counts experts."""
        path = self._rename(name)[0].split(".")
        above = {".".join(path[:length]) for length in range(1, len(path))}
        return self._live(name) is None and bool(above & self._stems)

    @staticmethod
    def _fits(info: TensorInfo, shape: tuple[int, ...], how: Counted, experts: int) -> bool:
        """Whether a tensor has the shape that is cut along an axis, and parts that begin at whole bytes."""
        axis = how.axis
        same = len(info.shape) == len(shape) and all(
            n == axis or a == b for n, (a, b) in enumerate(zip(info.shape, shape, strict=True))
        )
        whole = prod(info.shape[axis + 1 :]) * DTYPE_BITS[info.dtype] % 8 == 0
        return same and whole and (info.shape[axis] - how.tail) % experts == 0


def kept_tensors(
    checkpoint: Checkpoint,
    outcomes: Mapping[int, LayerOutcome],
    axes: Axes,
    mtp: Mtp,
    mtp_kept: MtpKept | None = None,
) -> list[KeptTensor]:
    """All tensors of the output, in the order in which they lie in the source.

    Args:
        checkpoint: the source.
        outcomes: of every MoE layer; must fit it.
        axes: of the model; to cut multi-token-prediction layers, of one whose decoder goes on through them.
        mtp: whether multi-token-prediction tensors go, stay as they are, or are cut.
        mtp_kept: the experts that stay where they are cut.

    Raises:
        UnsupportedModel: see `Axes.of`.
    """
    beyond, counts = mtp_tensors(checkpoint), expert_counts(checkpoint)
    blocks = mtp_blocks(checkpoint) if mtp == "prune" else ()
    cut = {block.layer: LayerOutcome(keep=tuple((mtp_kept or {})[block.prefix])) for block in blocks}
    before = {block.layer: block.experts for block in blocks}
    found: list[KeptTensor] = []
    for name, info in checkpoint.tensors.items():
        block = next((block for block in blocks if name.startswith(block.prefix)), None)
        if name not in beyond:
            layer = checkpoint.where(name)[0]
            table = None
            if layer is not None and layer in outcomes:
                table = _table(checkpoint, info, outcomes[layer], counts[layer])
            kept = _kept(info, layer, outcomes, counts, axes)
            found += kept if table is None else [KeptTensor(name, info, layer, table=table)]
        elif block is not None:
            made = _kept(block.as_decoder(info), block.layer, cut, before, axes)
            # They belong to no decoder layer: nothing rewrites them.
            found += [
                KeptTensor(block.prefix + tensor.name.removeprefix(block.longer), info, cut=tensor.cut)
                for tensor in made
            ]
        elif mtp != "drop":
            found.append(KeptTensor(name, info))
    return found


def _table(checkpoint: Checkpoint, info: TensorInfo, outcome: LayerOutcome, experts: int) -> TokenTable | None:
    """How a tensor's numbers change that names experts of every token id; None for any other tensor."""
    layout, live = checkpoint.layout, checkpoint.layout.live_name(info.name)
    if live not in layout.counters or len(info.shape) != 2 or outcome.keeps_all(experts):
        return None
    beside = [
        other
        for other in checkpoint.tensors.values()
        if layout.live_name(other.name).rpartition(".")[0] == live.rpartition(".")[0]
        and len(other.shape) == 2
        and other.shape[0] == experts
        and other.dtype in _PLAIN
    ]
    return TokenTable(outcome, experts, beside[0].name if len(beside) == 1 else None)


def _kept(
    info: TensorInfo, layer: int | None, outcomes: Mapping[int, LayerOutcome], counts: Mapping[int, int], axes: Axes
) -> Iterator[KeptTensor]:
    """What becomes of one tensor of a decoder layer: one, none, or, where experts stay more than once, several."""
    match = _split(info.name)
    if layer is None or layer not in outcomes:
        yield KeptTensor(info.name, info)
        return
    keep = outcomes[layer].keep
    if match:
        expert = int(match["expert"])
        numbers = [n for n, kept in enumerate(keep) if kept == expert]
        if expert >= counts[layer]:  # no expert of its own: it stays behind the others
            numbers = [expert - counts[layer] + len(keep)]
        for number in numbers:
            yield KeptTensor(f"{match['block']}{number}.{match['rest']}", info, layer)
        return
    how = axes.of(info, counts[layer])
    cut = None
    if how is not None and not outcomes[layer].keeps_all(counts[layer]):
        cut = Cut(how.axis, counts[layer], keep, how.tail)
    yield KeptTensor(info.name, info, None if how is None else layer, cut)
