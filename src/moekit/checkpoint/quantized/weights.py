"""All weights of a quantized checkpoint: which tensors make each, what they would be unquantized, and their numbers.

Legend: E experts stacked in one tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.header import TensorInfo
from moekit.checkpoint.names import where
from moekit.checkpoint.quantized.announced import refuse_bare
from moekit.checkpoint.quantized.base import WEIGHT, Format, Packed, broken
from moekit.checkpoint.quantized.registry import formats_of, kind, known, quantization
from moekit.checkpoint.reading import TensorReader
from moekit.errors import BadCheckpoint, UnsupportedModel

# Attribute of an opened checkpoint that holds what was worked out of it: large ones have a hundred thousand tensors.
_KEPT = "moekit_quantized"
# Scales that are looked at as a folder is verified; those beyond are, as their layers are read.
_LOOKED_AT_BYTES = 256 << 20


class QuantizedWeights:
    """The packed weights of a checkpoint.

    Attributes:
        weights: by the name that each has where nothing is quantized.
        owners: name on disk -> the weight that it is a part of.
        kind: how they are quantized, for messages.
    """

    def __init__(self, checkpoint: Checkpoint, formats: tuple[Format, ...], kind: str) -> None:
        self.kind = kind
        self.weights: dict[str, Packed] = {}
        self.owners: dict[str, Packed] = {}
        self._formats: dict[str, Format] = {}
        self._checkpoint = checkpoint
        for info in checkpoint.tensors.values():
            taken = next((entry for entry in formats if entry.holds(info)), None)
            if taken is None:
                continue
            packed = taken.find(info, checkpoint.tensors)
            self.weights[packed.name] = packed
            self.owners |= {part.name: packed for part in packed.parts.values()}
            self._formats[packed.name] = taken
        self._plain = {name: info for name, info in checkpoint.tensors.items() if name not in self.owners}

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """What the checkpoint would hold were it not quantized; dtypes of packed weights are F32, offsets theirs."""
        unpacked = {
            name: TensorInfo(name, packed.parts[WEIGHT].shard, "F32", packed.shape, packed.parts[WEIGHT].offsets)
            for name, packed in self.weights.items()
        }
        return self._plain | unpacked

    def read(self, reader: TensorReader, name: str, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        """Numbers of a weight.

        Args:
            reader: of the checkpoint.
            name: of a packed weight, as it is where nothing is quantized.
            dtype: of the result.
            expert: the one to read of a weight that stacks them; None for the whole.

        Raises:
            BadCheckpoint: a scale is NaN, infinite, zero or negative: names it, with layer and expert.
        """
        packed = self.weights[name]
        if not packed.stacked:
            return self._unpacked(packed, self._parts(reader, packed, None), None).to(dtype)
        if expert is not None:
            return self._unpacked(packed, self._parts(reader, packed, expert), expert)[0].to(dtype)
        whole = torch.empty(packed.shape, dtype=dtype)
        for number in range(packed.shape[0]):  # one at a time is in memory twice
            whole[number] = self._unpacked(packed, self._parts(reader, packed, number), number)[0]
        return whole

    def check_values(self, reader: TensorReader, limit: int = _LOOKED_AT_BYTES) -> None:
        """Look at scales, in file order, until so many bytes are read.

        Raises:
            BadCheckpoint: see `read`.
        """
        left = limit
        for packed in self.weights.values():
            entry = self._formats[packed.name]
            scales = {role: info for role, info in packed.parts.items() if entry.positive(role)}
            left -= sum(info.nbytes for info in scales.values())
            if left < 0:
                return
            self._check(packed, {role: reader.read(info.name) for role, info in scales.items()}, None)

    @staticmethod
    def _parts(reader: TensorReader, packed: Packed, expert: int | None) -> dict[str, torch.Tensor]:
        rows = None if expert is None else (expert, expert + 1)
        return {role: reader.read(info.name, rows) for role, info in packed.parts.items()}

    def _unpacked(self, packed: Packed, parts: Mapping[str, torch.Tensor], expert: int | None) -> torch.Tensor:
        self._check(packed, parts, expert)
        try:
            return self._formats[packed.name].unpack(packed, parts)
        except BadCheckpoint as error:
            raise located(error, self._checkpoint) from None

    def _check(self, packed: Packed, parts: Mapping[str, torch.Tensor], expert: int | None) -> None:
        entry = self._formats[packed.name]
        for role, info in packed.parts.items():
            if not entry.positive(role) or role not in parts:
                continue
            numbers = parts[role]
            wrong = _first_wrong(numbers)
            if wrong is None:
                continue
            place, what = wrong
            layer, named = where(info.name)
            stacked = (expert or 0) + place // max(1, numbers[0].numel()) if packed.stacked and numbers.dim() else None
            raise BadCheckpoint(
                f"the scale {info.name} holds {what}: what it scales is no number, or nothing",
                file=self._checkpoint.path / info.shard,
                layer=layer,
                expert=named if named is not None else stacked,
                hint="quantize this weight again, or fetch the folder again (see `moekit check`)",
            )


def _first_wrong(scale: torch.Tensor) -> tuple[int, str] | None:
    """Place of the first number that scales nothing, and what it is; bytes are exponents, where 255 is NaN."""
    if scale.dtype == torch.uint8:
        flat = scale.flatten()
        return (int((flat == 255).nonzero()[0]), "NaN") if bool((flat == 255).any()) else None
    flat = scale.float().flatten()
    wrong = ~(flat.isfinite() & (flat > 0))
    if not bool(wrong.any()):
        return None
    place = int(wrong.nonzero()[0])
    value = float(flat[place])
    if math.isnan(value):
        return place, "NaN"
    return place, "infinity" if math.isinf(value) else "zero" if value == 0 else "negatives"


def located(error: BadCheckpoint, checkpoint: Checkpoint) -> BadCheckpoint:
    """The same error, its shard named with the folder."""
    if error.file in checkpoint.shards:
        error.file = str(checkpoint.path / error.file)
    return error


def quantized_weights(checkpoint: Checkpoint) -> QuantizedWeights | None:
    """The packed weights of a checkpoint, worked out once; None where nothing is quantized. No weight is read.

    Raises:
        BadCheckpoint: parts of weights are missing or do not fit each other, or weights that the config announces as
            quantized are not: names tensor, layer and expert.
        UnsupportedModel: quantized in a way that nothing here reads.
    """
    settings = quantization(checkpoint.config)
    if settings is None:
        return None
    kept = vars(checkpoint).get(_KEPT)
    if isinstance(kept, QuantizedWeights):
        return kept
    try:
        found = _found(checkpoint, settings)
        setattr(checkpoint, _KEPT, found)
        return found
    except BadCheckpoint as error:
        raise located(error, checkpoint) from None
    except UnsupportedModel as error:
        error.file = str(checkpoint.path)
        raise


def unquantized_tensors(checkpoint: Checkpoint) -> Mapping[str, TensorInfo] | None:
    """What a quantized checkpoint would hold were it not quantized; its first scales are looked at.

    Returns:
        None where the weights are quantized in a way that nothing here reads: their bytes can be cut all the same.

    Raises:
        BadCheckpoint: see `quantized_weights` and `QuantizedWeights.check_values`.
    """
    try:
        found = quantized_weights(checkpoint)
    except UnsupportedModel:
        return None
    if found is None:
        return checkpoint.tensors
    with TensorReader(checkpoint) as reader:
        found.check_values(reader)
    return found.tensors


def _found(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> QuantizedWeights:
    formats = formats_of(settings)
    if not formats:
        raise UnsupportedModel(
            f"the weights are quantized ({kind(settings)}), which nothing here reads",
            hint=f"give the unquantized checkpoint, or one that is quantized as {known()}; a plan made on the former "
            "cuts this one too (moekit apply --other-weights --no-proof)",
        )
    found = QuantizedWeights(checkpoint, formats, kind(settings))
    _refuse_orphans(checkpoint, found, formats)
    refuse_bare(found.kind, found.weights, found.tensors, settings, checkpoint.path)
    return found


def _refuse_orphans(checkpoint: Checkpoint, found: QuantizedWeights, formats: tuple[Format, ...]) -> None:
    """Refuse scales that belong to no packed weight."""
    endings = tuple(part.suffixes[0] for entry in formats for part in entry.beside if part.needed)
    for name in checkpoint.tensors:
        if name not in found.owners and name.endswith(endings):
            info = checkpoint.tensors[name]
            raise broken(info, f"{name} scales a weight that is missing or not quantized")


class WeightReader(TensorReader):
    """Reads tensors of a checkpoint as they are where nothing is quantized.

    Args:
        checkpoint: opened, its headers checked.
        dtype: of what is read from packed weights; other tensors are read as they are stored.

    Raises:
        BadCheckpoint, UnsupportedModel: see `quantized_weights`.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(checkpoint)
        self.dtype = dtype
        self.quantized = quantized_weights(checkpoint)

    def __enter__(self) -> WeightReader:
        return self

    def weight(self, name: str) -> torch.Tensor:
        """A tensor by the name that it has where nothing is quantized."""
        if self.quantized is not None and name in self.quantized.weights:
            return self.quantized.read(self, name, self.dtype)
        return self.read(name)

    def plain_names(self, names: Iterable[str]) -> Iterator[str]:
        """Names that tensors on disk have where nothing is quantized, each weight once."""
        for name in names:
            packed = None if self.quantized is None else self.quantized.owners.get(name)
            if packed is None:
                yield name
            elif packed.parts[WEIGHT].name == name:
                yield packed.name
