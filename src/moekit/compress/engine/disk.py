"""Which tensors on disk hold routed experts, where their names alone do not tell: by transformers' conversion mapping.

Legend: E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moekit.anatomy.layout import find_expert_tensors
from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.expected import renamer
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
    model = empty_model(checkpoint)
    live = model.state_dict()
    rename = renamer(model, live)
    owner: dict[str, int] = {}
    found: dict[int, Renamed] = {}
    for layer in find_moe_layers(model):
        found[layer.index] = Renamed(layer.geometry.experts)
        owner |= {f"{layer.experts_name}.{name}": layer.index for name in layer.storage.names}
    for name in checkpoint.tensors:
        index = owner.get(name if name in live else rename(name)[0])
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
    layout = find_expert_tensors(checkpoint.tensors)
    if not layout.experts:
        return {layer: renamed.names for layer, renamed in renamed_experts(checkpoint).items()}
    names: dict[int, list[str]] = {}
    for tensors in layout.experts.values():
        names.setdefault(tensors[0].layer, []).extend(tensor.name for tensor in tensors)
    return names
