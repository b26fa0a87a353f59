"""Which tensors on disk hold routed experts, where their names alone do not tell: by transformers' conversion mapping.

Legend: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.errors import UnsupportedModel


@dataclass
class Renamed:
    """The experts of one layer on disk.

    Attributes:
        experts: E.
        names: of their tensors.
    """

    experts: int
    names: list[str] = field(default_factory=list)


def renamed_experts(checkpoint: Checkpoint) -> dict[int, Renamed]:
    """Decoder layer -> its experts, told by which of the model's own tensors each tensor on disk becomes.

    Raises:
        UnsupportedModel: the model holds no experts by the contract, or none of the tensors becomes a part of one.
    """
    owner: dict[str, int] = {}
    found: dict[int, Renamed] = {}
    for layer in find_moe_layers(empty_model(checkpoint)):
        found[layer.index] = Renamed(layer.geometry.experts)
        owner |= {f"{layer.experts_name}.{name}": layer.index for name in layer.storage.names}
    for name in checkpoint.tensors:
        index = owner.get(checkpoint.layout.live_name(name))
        if index is not None:
            found[index].names.append(name)
    if not any(renamed.names for renamed in found.values()):
        raise UnsupportedModel(
            "no tensor becomes a part of the routed experts that the config states",
            file=checkpoint.path,
            hint="see `moekit check` for what is missing",
        )
    return found


def expert_names(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """Decoder layer -> names of the tensors that hold its routed experts."""
    names: dict[int, list[str]] = {}
    for name in checkpoint.tensors:
        layer = checkpoint.where(name)[0]
        if layer is not None and checkpoint.layout.is_expert(name):
            names.setdefault(layer, []).append(name)
    return names or {layer: renamed.names for layer, renamed in renamed_experts(checkpoint).items()}
