"""Loss-free balancing in a run: counts over micro-batches and ranks, then one step of every selection bias.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.errors import BadConfig
from moekit.training.balancers.base import Balancer, State
from moekit.training.collector import Routed
from moekit.training.figures import sum_over_ranks
from moekit.training.layers import TrainedLayer


class SelectionBiases:
    """The selection biases of a model, moved by a balancer after each optimizer step.

    Args:
        layers: MoE layers of the model.
        balancer: the rule.

    Attributes:
        balancer: the rule; a schedule may put another one in its place.

    Raises:
        BadConfig: no layer has a selection bias, or one is kept in a type too coarse for such steps.
    """

    def __init__(self, layers: Sequence[TrainedLayer], balancer: Balancer) -> None:
        self.balancer = balancer
        self._bias: dict[int, Tensor] = {}
        for layer in layers:
            if layer.bias is None:
                continue
            if layer.bias.dtype not in (torch.float32, torch.float64):
                raise BadConfig(
                    f"the selection bias is kept in {layer.bias.dtype}, in which steps of {balancer.rate} vanish",
                    layer=layer.index,
                    hint="load the model by from_pretrained, which keeps it in fp32, instead of casting it afterwards",
                )
            self._bias[layer.index] = layer.bias
        if not self._bias:
            raise BadConfig(
                "a balancer is set, but no router of this model has a selection bias that it could move",
                hint="balance it by the objective balance instead; DeepSeek-V3, GLM-4 and ERNIE-4.5 types have biases",
            )
        self._counted: dict[int, Tensor] = {}
        self._state: dict[int, State] = {index: {} for index in self._bias}

    @torch.no_grad()
    def add(self, routed: Routed) -> None:
        """Count one layer's answer for one micro-batch."""
        index = routed.layer.index
        if index not in self._bias:
            return
        counts = self.balancer.counts(routed).to(self._bias[index].device)
        self._counted[index] = self._counted[index] + counts if index in self._counted else counts

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias by what was counted since the last step."""
        sum_over_ranks([self._counted[index] for index in sorted(self._counted)])
        for index, counted in self._counted.items():
            bias = self._bias[index]
            bias.add_(self.balancer.delta(counted, self._state[index]).view_as(bias).to(bias.dtype))
        self._counted.clear()

    def state(self) -> dict[str, Tensor]:
        """What the rule remembers, to be saved with a checkpoint."""
        return {f"{index}.{name}": t for index, kept in self._state.items() for name, t in kept.items()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for key, tensor in saved.items():
            index, _, name = key.partition(".")
            self._state[int(index)][name] = tensor.to(self._bias[int(index)].device)
