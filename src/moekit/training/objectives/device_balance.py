"""Balance of groups of experts, such as those of one device.

Legend: E experts, D groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.objectives.base import KIND, RouterObjective, Sums, choices_and_mass


@register(
    name="device-balance",
    kind=KIND,
    paper="arXiv:2401.06066",
    changes="weights",
    axis="gating",
    limits=("Experts that a group holds need not be neighbours, but every expert must be in one group.",),
)
class DeviceBalance(RouterObjective):
    """Balance of groups of experts, so that devices get equally much to do while experts in a group may differ.

    sum_d f'_d P'_d, f'_d the mean over the group of f_e (E / K times the share of tokens that chose e), P'_d the sum
    over the group of the mean gate probabilities (DeepSeekMoE, eq. 15-17): 1 when groups are used alike. Groups are
    those of a placement, or `groups` of equally many neighbours.
    """

    groups: int | None = Field(default=None, ge=1, description="groups of equally many neighbouring experts")
    assignment: dict[int, tuple[int, ...]] | None = Field(
        default=None, description="layer -> group of each expert, as a placement holds it"
    )

    @classmethod
    def examples(cls, experts: int) -> Sequence[DeviceBalance]:
        """Pairs of experts."""
        return [cls(groups=experts // 2)]

    def check(self, layers: Iterable[TrainedLayer]) -> None:
        """Refuse groups that do not fit a layer's experts."""
        if (self.groups is None) == (self.assignment is None):
            raise BadConfig("give either groups or an assignment", hint="groups: 4")
        for layer in layers:
            if self.groups is not None and layer.experts % self.groups:
                raise BadConfig(
                    f"{layer.experts} experts cannot be parted into {self.groups} equal groups",
                    layer=layer.index,
                    hint=f"choose a divisor of {layer.experts}, or give an assignment",
                )
            if self.assignment is not None and len(self.assignment.get(layer.index, ())) != layer.experts:
                raise BadConfig(
                    f"the assignment names groups for {len(self.assignment.get(layer.index, ()))} of "
                    f"{layer.experts} experts",
                    layer=layer.index,
                )

    def sums(self, routed: Routed) -> Sums:
        """Choices of each expert, gate probability of each, and tokens."""
        return choices_and_mass(routed)

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """1 when groups are even."""
        load_E, mass_E = sums["load_E"][: layer.experts], sums["mass_E"][: layer.experts]
        group_E = self._groups(layer).to(load_E.device)
        count = int(group_E.max()) + 1
        often_E = load_E * (layer.experts / load_E.sum().clamp(min=1))
        zeros_D = torch.zeros(count, dtype=torch.float32, device=load_E.device)
        sizes_D = zeros_D.scatter_add(0, group_E, torch.ones_like(often_E)).clamp(min=1)
        mean_D = zeros_D.scatter_add(0, group_E, often_E) / sizes_D
        return (mean_D * zeros_D.scatter_add(0, group_E, mass_E / sums["tokens"].clamp(min=1))).sum()

    def _groups(self, layer: TrainedLayer) -> Tensor:
        if self.groups is not None:
            return torch.arange(layer.experts) // (layer.experts // self.groups)
        assert self.assignment is not None
        return torch.tensor(self.assignment[layer.index])
