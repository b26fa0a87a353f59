"""A layer's experts as packed integers: the tensors that the part `packed` holds, made and taken apart.

Each expert's matrices have widths of their own, so a layer's words lie behind each other in one row, expert after
expert, and `slot` says which of the stored experts answers for each number: reordering experts moves numbers, no words.

Legend: E experts, S stored experts, R rows (outputs) and C columns (inputs) of a matrix, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import Geometry
from moekit.anatomy.storage import Storage, activation_of
from moekit.anatomy.stored import find_storage
from moekit.checkpoint.packed_loading import PackedMatrix
from moekit.checkpoint.quantized.packed_experts import numbers_of, weights_of
from moekit.checkpoint.quantized.running import word_count
from moekit.errors import BadCheckpoint, UnsupportedModel

PackedPart = Literal["gate", "up", "down"]
PACKED_PARTS: tuple[PackedPart, ...] = ("gate", "up", "down")


@dataclass(frozen=True, eq=False)
class Stored:
    """One matrix.

    Attributes:
        bits: of a number.
        words_RW: int32.
        scale_RG: of the groups.
        columns: C.
    """

    bits: int
    words_RW: Tensor
    scale_RG: Tensor
    columns: int

    def numbers(self) -> Tensor:
        """Whole numbers [R, C], int8."""
        return numbers_of(self.words_RW, self.bits, self.columns)

    def weights(self) -> Tensor:
        """What they stand for, [R, C] fp32."""
        return weights_of(self.numbers(), self.scale_RG)


def tensors_of_layer(matrices: Iterable[PackedMatrix], layer: int) -> dict[str, Tensor]:
    """The part's constants of one layer.

    Args:
        matrices: of the layer, in any order.
        layer: for messages.

    Raises:
        BadCheckpoint: an expert lacks a matrix, or matrices differ in shape.
    """
    found = {(matrix.expert, matrix.part): matrix for matrix in matrices}
    experts = sorted({expert for expert, _ in found})
    tensors: dict[str, Tensor] = {"slot": torch.arange(len(experts))}
    for part in PACKED_PARTS:
        some = [found[key] for expert in experts if (key := (expert, part)) in found]
        if not some and part == "gate":
            continue
        if len(some) != len(experts) or experts != list(range(len(experts))):
            raise BadCheckpoint(f"not every expert has a packed {part} projection", layer=layer)
        if len({matrix.scale_RG.shape for matrix in some}) != 1:
            raise BadCheckpoint(f"packed {part} projections differ in shape", layer=layer)
        tensors[f"{part}_bits"] = torch.tensor([matrix.bits for matrix in some], dtype=torch.uint8)
        tensors[f"{part}_words"] = torch.cat([matrix.words_RW.flatten() for matrix in some])
        tensors[f"{part}_scales"] = torch.stack([matrix.scale_RG for matrix in some])
    return tensors


def stored_parts(tensors: Mapping[str, Tensor]) -> tuple[PackedPart, ...]:
    """Which projections the experts have."""
    return tuple(part for part in PACKED_PARTS if f"{part}_words" in tensors)


def stored(tensors: Mapping[str, Tensor], part: PackedPart, slot: int, columns: int) -> Stored:
    """A stored matrix; views.

    Args:
        tensors: the part's constants of a layer.
        part: which projection.
        slot: of the stored experts.
        columns: C.
    """
    scales_SRG, bits_S = tensors[f"{part}_scales"], tensors[f"{part}_bits"].tolist()
    rows = scales_SRG.shape[1]
    sizes = [rows * word_count(columns, bits) for bits in bits_S]
    words_N = tensors[f"{part}_words"]
    first = sum(sizes[:slot])
    words_RW = words_N[first : first + sizes[slot]].view(rows, -1)
    return Stored(bits_S[slot], words_RW, scales_SRG[slot], columns)


def matrices_of_layer(tensors: Mapping[str, Tensor], layer: int, columns: Mapping[str, int]) -> Iterator[PackedMatrix]:
    """Inverse of `tensors_of_layer`, experts by the numbers that they have now.

    Args:
        tensors: the part's constants.
        layer: decoder layer.
        columns: C of each projection.
    """
    for expert, slot in enumerate(tensors["slot"].tolist()):
        for part in stored_parts(tensors):
            one = stored(tensors, part, slot, columns[part])
            yield PackedMatrix(layer, expert, part, one.bits, one.words_RW, one.scale_RG)


def computable(module: nn.Module, layer: int) -> Storage:
    """How experts lie whose output follows from their matrices; only shapes count here.

    Raises:
        UnsupportedModel: the function between their projections is not known, or they have biases.
    """
    storage = find_storage(module)
    known = storage is not None and (hasattr(module, "_apply_gate") or activation_of(module, storage) is not None)
    if storage is None or not known or storage.beyond or storage.has_bias:
        raise UnsupportedModel(
            f"{type(module).__name__} cannot be computed from packed matrices",
            layer=layer,
            hint="load the folder with parts=False, which unpacks it",
        )
    return storage


def columns_of(geometry: Geometry) -> dict[str, int]:
    """C of each projection."""
    return {"gate": geometry.hidden, "up": geometry.hidden, "down": geometry.width}
