"""The experts of a checkpoint as single matrices, whichever way they lie on disk.

A *unit* is one matrix of one expert: a tensor of its own in the split layout, a slice of a stacked tensor otherwise.

Legend: I expert width, H hidden.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.anatomy.layout import parse_expert_tensor
from moekit.anatomy.probe import Geometry
from moekit.checking.scan import TORCH_DTYPES, MatrixScan, TensorScan, as_tensor
from moekit.checkpoint.digest import read_range, slice_offsets
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.safety import TensorInfo


@dataclass(frozen=True)
class Unit:
    """One matrix of one expert, or one tensor that belongs to none.

    Attributes:
        name: tensor name on disk.
        block: path of the MoE block, "" for other tensors.
        layer: decoder layer by the name alone, None if there is none; see `place_of`.
        expert: expert index, None for other tensors.
        part: "gate", "up", "gate_up", "down", with the suffix where it is no plain weight; the name for other tensors.
        slice: index within a stacked tensor, None for a tensor of its own.
    """

    name: str
    block: str
    layer: int | None
    expert: int | None
    part: str
    slice: int | None = None


@functools.lru_cache(maxsize=200_000)
def units_of(info: TensorInfo) -> tuple[Unit, ...]:
    """The units of one tensor."""
    found = parse_expert_tensor(info.name)
    if found is None:
        return (Unit(info.name, "", None, None, info.name),)
    part = found.part if found.suffix in {"", "weight"} else f"{found.part}.{found.suffix}"
    if found.expert is not None:
        return (Unit(info.name, found.block, found.layer, found.expert, part),)
    count = len(slice_offsets(info))
    return tuple(Unit(info.name, found.block, found.layer, e, part, e) for e in range(count))


def place_of(checkpoint: Checkpoint, unit: Unit) -> tuple[int | None, int | None]:
    """Decoder layer and expert of a unit: as the model numbers its layers, and by the name where it has no number."""
    layer, expert = checkpoint.where(unit.name)
    return (unit.layer if layer is None else layer, unit.expert) if unit.block else (layer, expert)


def unit_digests(scan: TensorScan) -> dict[Unit, str]:
    """SHA-256 of every unit of a scanned tensor."""
    units = units_of(scan.info)
    digests = scan.slices if units[0].slice is not None else (scan.sha256,)
    return dict(zip(units, digests, strict=True)) if len(units) == len(digests) else {}


def unit_matrices(scan: TensorScan) -> dict[Unit, MatrixScan]:
    """Figures of every unit of a scanned tensor, or of the whole where its slices were too large to look at singly."""
    units = units_of(scan.info)
    if len(units) > 1 == len(scan.matrices):
        units = (Unit(scan.info.name, "", None, None, scan.info.name),)
    return dict(zip(units, scan.matrices, strict=True)) if len(units) == len(scan.matrices) else {}


def read_unit(checkpoint: Checkpoint, unit: Unit) -> Tensor | None:
    """Read a unit's matrix; None for dtypes that torch does not hold."""
    info = checkpoint.tensors[unit.name]
    if info.dtype not in TORCH_DTYPES:
        return None
    offsets, shape = info.offsets, info.shape
    if unit.slice is not None:
        offsets, shape = slice_offsets(info)[unit.slice], info.shape[1:]
    flat = as_tensor(read_range(checkpoint.path / info.shard, offsets), info.dtype)
    return None if flat is None else flat.view(shape)


def swap_halves(matrix: Tensor, geometry: Geometry | None) -> Tensor | None:
    """A fused gate-and-up matrix with its halves exchanged, in the family's own arrangement; None if it has none."""
    axis = 1 if geometry is not None and geometry.transposed else 0
    if matrix.dim() == 1:
        axis = 0
    if matrix.dim() > 2 or matrix.shape[axis] % 2:
        return None
    count = matrix.shape[axis]
    if geometry is None or geometry.concatenated:
        order = torch.arange(count).roll(count // 2)
    else:
        order = torch.arange(count).view(-1, 2).flip(1).reshape(-1)  # gate and up alternate
    return matrix.index_select(axis, order)
