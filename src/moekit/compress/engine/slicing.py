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
from dataclasses import dataclass
from math import prod

import numpy as np
from transformers import PreTrainedModel

from moekit.anatomy.layout import parse_expert_tensor
from moekit.anatomy.probe import decoder_index
from moekit.checkpoint.digest import read_range
from moekit.checkpoint.experts import mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import renamer
from moekit.checkpoint.safety import DTYPE_BITS, TensorInfo
from moekit.compress.engine.mtp import Mtp, MtpKept, mtp_blocks, refuse_gap
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.shard_writer import Spec
from moekit.errors import UnsupportedModel

_SPLIT = re.compile(r"^(?P<block>.+?)\.experts\.(?P<expert>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True)
class Cut:
    """What is left of an axis: `keep` of `experts` equal parts."""

    axis: int
    experts: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of the output and where its bytes lie in the source.

    Attributes:
        name: in the output.
        source: the tensor it comes from.
        layer: decoder layer, of tensors that belong to routed experts or count them; else None.
        cut: what is left of it; None for all.
        resized: sizes in the output where experts change their width; None where the cut says all.
    """

    name: str
    source: TensorInfo
    layer: int | None = None
    cut: Cut | None = None
    resized: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the output."""
        if self.resized is not None:
            return self.resized
        if self.cut is None:
            return self.source.shape
        size = self.source.shape[self.cut.axis] // self.cut.experts * len(self.cut.keep)
        return (*self.source.shape[: self.cut.axis], size, *self.source.shape[self.cut.axis + 1 :])

    @property
    def spec(self) -> Spec:
        """What the output's header says of it."""
        return Spec(self.name, self.source.dtype, self.shape)

    @property
    def scattered(self) -> bool:
        """Whether an expert's bytes lie in many small pieces; then `gather` it."""
        return self.cut is not None and prod(self.source.shape[: self.cut.axis]) != 1

    def ranges(self) -> list[tuple[int, int]]:
        """Byte ranges in the source's shard, in the order of the output."""
        start, end = self.source.offsets
        if self.cut is None:
            return [(start, end)]
        size = (end - start) // self.cut.experts
        return [(start + expert * size, start + (expert + 1) * size) for expert in self.cut.keep]

    def gather(self, checkpoint: Checkpoint) -> memoryview:
        """The bytes of a tensor whose experts do not lie together; the whole source tensor is read."""
        assert self.cut is not None
        data = read_range(checkpoint.path / self.source.shard, self.source.offsets)
        parts = data.reshape(prod(self.source.shape[: self.cut.axis]), self.cut.experts, -1)
        view: memoryview = np.ascontiguousarray(parts[:, list(self.cut.keep)]).reshape(-1).data
        return view


def expert_counts(checkpoint: Checkpoint) -> dict[int, int]:
    """Decoder layer -> E, as the tensors say; multi-token-prediction layers left out.

    Raises:
        BadCheckpoint: experts are missing between others.
        UnsupportedModel: no experts at all.
    """
    beyond = mtp_tensors(checkpoint)
    split: dict[int, set[int]] = defaultdict(set)
    counts: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = checkpoint.where(name)[0]
        if name in beyond or layer is None or not checkpoint.layout.is_expert(name):
            continue
        if match := _split(name):
            split[layer].add(int(match["expert"]))
        elif len(info.shape) >= 3:
            counts[layer] = info.shape[0]
    for layer, experts in split.items():
        refuse_gap(experts, checkpoint, layer)
        counts[layer] = len(experts)
    if not counts:
        raise UnsupportedModel(
            "no tensor belongs to routed experts", file=checkpoint.path, hint="see `moekit estimate` for what it is"
        )
    return dict(sorted(counts.items()))


def _split(name: str) -> re.Match[str] | None:
    return None if ".shared" in name else _SPLIT.match(name)


class Axes:
    """Knows along which axis a tensor on disk counts experts.

    Args:
        before: the model, which may lie on the meta device.
        after: the same model with another number of experts.
    """

    def __init__(self, before: PreTrainedModel, after: PreTrainedModel) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
        others = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
        self._rename = renamer(before, self._shapes)
        self._axes = {
            name: axis
            for name, shape in self._shapes.items()
            for axis, (size, other) in enumerate(zip(shape, others.get(name, shape), strict=True))
            if size != other
        }
        self._stems = {name.rpartition(".")[0] for name in self._axes}

    def _live(self, name: str) -> str | None:
        """The live tensor that one on disk becomes; None if it is unknown, or only a part of one."""
        if name in self._shapes:
            return name
        target, gathered = self._rename(name)
        return target if target in self._shapes and not gathered else None

    def of(self, info: TensorInfo, experts: int) -> int | None:
        """The axis of a tensor that counts experts; None if there is none.

        Args:
            info: of a tensor that holds more than one expert, or none.
            experts: E of its layer.

        Raises:
            UnsupportedModel: it must count them, but its shape does not say how (packed routers).
        """
        live = self._live(info.name) or ""
        axis = self._axes.get(live)
        if axis is not None and self._fits(info, self._shapes[live], axis, experts):
            return axis
        parsed = parse_expert_tensor(info.name)
        counts = parsed is not None or axis is not None or self._belongs(info.name)
        if not counts or (parsed is not None and info.numel == 1):
            return None
        if axis is None and info.shape[:1] == (experts,) and self._fits(info, info.shape, 0, experts):
            return 0
        raise UnsupportedModel(
            f"{info.name} of shape {list(info.shape)} and dtype {info.dtype} has no axis of {experts} experts to cut",
            layer=decoder_index(info.name),
            hint="the router or the stacked experts are packed across experts: give the unquantized checkpoint",
        )

    def _belongs(self, name: str) -> bool:
        """Whether an unknown tensor (a scale, packed numbers) is part of a tensor that counts experts."""
        path = self._rename(name)[0].split(".")
        above = {".".join(path[:length]) for length in range(1, len(path))}
        return self._live(name) is None and bool(above & self._stems)

    @staticmethod
    def _fits(info: TensorInfo, shape: tuple[int, ...], axis: int, experts: int) -> bool:
        """Whether a tensor has the shape that is cut along an axis, and parts that begin at whole bytes."""
        same = len(info.shape) == len(shape) and all(
            n == axis or a == b for n, (a, b) in enumerate(zip(info.shape, shape, strict=True))
        )
        whole = prod(info.shape[axis + 1 :]) * DTYPE_BITS[info.dtype] % 8 == 0
        return same and whole and info.shape[axis] % experts == 0


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
            _refuse_table(checkpoint, info, outcomes, counts)
            found += _kept(info, checkpoint.where(name)[0], outcomes, counts, axes)
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


def _refuse_table(
    checkpoint: Checkpoint, info: TensorInfo, outcomes: Mapping[int, LayerOutcome], counts: Mapping[int, int]
) -> None:
    """Refuse to drop experts that a table of the layer names by number, such as one of each token's experts."""
    layer, layout = checkpoint.where(info.name)[0], checkpoint.layout
    named = layer in outcomes and layout.live_name(info.name) in layout.counters and info.numel > 1
    if named and layer is not None and list(outcomes[layer].keep) != list(range(counts[layer])):
        raise UnsupportedModel(
            f"{info.name} ({info.dtype}) names experts by number: without some of them it would name others",
            file=checkpoint.path,
            layer=layer,
            hint="keep all experts of this layer",
        )


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
        for number, expert in enumerate(keep):
            if expert == int(match["expert"]):
                yield KeptTensor(f"{match['block']}.experts.{number}.{match['rest']}", info, layer)
        return
    axis = axes.of(info, counts[layer])
    cut = None if axis is None or outcomes[layer].keeps_all(counts[layer]) else Cut(axis, counts[layer], keep)
    yield KeptTensor(info.name, info, None if axis is None else layer, cut)
