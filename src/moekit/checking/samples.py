"""The experts of a checkpoint as samples of their elements, and which expert of another checkpoint each is.

Legend: E experts, P parent's experts, N sampled elements, H hidden.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.anatomy.probe import MoELayer
from moekit.checking.units import Unit, read_unit, units_of
from moekit.checkpoint.expected import disk_names
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.names import in_mtp_stack

_SAMPLES = 4096
# Cosines below this are unrelated; a better match elsewhere must win by the margin.
RELATED, _MARGIN = 0.25, 0.15
# Layers of a multi-token-prediction stack count from 0 again; here they lie behind all others.
_STACKED_MTP = 1 << 20


@dataclass(frozen=True)
class Side:
    """One checkpoint seen expert by expert.

    Attributes:
        checkpoint: opened.
        units: (layer, part) -> expert -> unit.
    """

    checkpoint: Checkpoint
    units: Mapping[tuple[int, str], Mapping[int, Unit]]

    @property
    def layers(self) -> set[int]:
        """Layers that hold experts."""
        return {layer for layer, _ in self.units}

    def parts(self, layer: int) -> list[str]:
        """Projections of a layer's experts."""
        return sorted(part for other, part in self.units if other == layer)


def side_of(checkpoint: Checkpoint) -> Side:
    """See a checkpoint expert by expert."""
    units: dict[tuple[int, str], dict[int, Unit]] = defaultdict(dict)
    for info in checkpoint.tensors.values():
        for unit in units_of(info):
            layer = layer_key(checkpoint, unit.name)
            if layer is not None and unit.expert is not None and "." not in unit.part:
                units[layer, unit.part][unit.expert] = unit
    return Side(checkpoint, units)


def sample(matrix: Tensor) -> Tensor:
    """Evenly spaced elements of a matrix as a unit vector [N]; zeros stay zeros."""
    flat = matrix.reshape(-1)
    if flat.numel() > _SAMPLES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).long()]
    return torch.nn.functional.normalize(flat.float(), dim=0)


def samples(side: Side, key: tuple[int, str]) -> Tensor | None:
    """Samples of all experts of a layer and part [E, N]; None for dtypes that torch does not hold."""
    rows = []
    for expert in sorted(side.units[key]):
        matrix = read_unit(side.checkpoint, side.units[key][expert])
        if matrix is None:
            return None
        rows.append(sample(matrix))
    return torch.stack(rows) if rows else None


def layer_key(checkpoint: Checkpoint, name: str) -> int | None:
    """The layer that a tensor belongs to; those of a multi-token-prediction stack lie behind all others.

    Args:
        checkpoint: that numbers its layers.
        name: of a tensor, or the beginning of one.
    """
    if not in_mtp_stack(name):
        return checkpoint.where(name)[0]
    number = re.search(r"\.layers\.(\d+)\.|^layers\.(\d+)\.", name)
    return None if number is None else _STACKED_MTP + int(number.group(1) or number.group(2))


def shown(layer: int) -> int:
    """The number that a layer's tensors have in their names."""
    return layer % _STACKED_MTP


def matches(ours_EN: Tensor, theirs_PN: Tensor, expected: Sequence[int]) -> tuple[list[int], list[float]]:
    """For each expert: the parent's expert it is, and its cosine with that one."""
    cosine_EP = ours_EN @ theirs_PN.T
    expected_E = torch.tensor(expected)
    own_E = cosine_EP.gather(1, expected_E[:, None]).squeeze(1)
    best_E, index_E = cosine_EP.max(dim=1)
    index_E = torch.where(best_E - own_E < _MARGIN, expected_E, index_E)
    return index_E.tolist(), best_E.tolist()


def router_moves(
    child: Checkpoint, parent: Checkpoint, layout: Layout | None, layers: list[MoELayer]
) -> dict[int, list[int]]:
    """Layer -> for each router row the parent's row it is; layers whose routers cannot be compared are left out."""
    if layout is None:
        return {}
    ours, theirs = disk_names(child.tensors, layout), disk_names(parent.tensors, layout)
    moves: dict[int, list[int]] = {}
    for layer in layers:
        shape = (layer.geometry.experts, layer.geometry.hidden)
        for live, name in ours.items():
            if live.startswith(f"{layer.router_name}.") and child.tensors[name].shape == shape and live in theirs:
                mine, other = child.read(name).float(), parent.read(theirs[live]).float()
                if mine.shape[1:] != other.shape[1:]:
                    continue
                normal = torch.nn.functional.normalize
                mine, other = normal(mine, dim=1), normal(other, dim=1)
                same = len(mine) == len(other)
                expected = range(len(mine)) if same else (mine @ other.T).argmax(dim=1).tolist()
                index_E, best_E = matches(mine, other, expected)
                if min(best_E) >= RELATED:
                    moves[layer.index] = index_E
    return moves
