"""Loss-free balancing: nudge the selection biases that transformers keeps, but never updates.

DeepSeek-V3 and its kin choose experts by score plus a per-expert bias that no gradient reaches. After each optimizer
step the bias of an expert with less than the mean load rises by a fixed rate, that of one with more falls
(arXiv:2408.15664, arXiv:2412.19437 section 2.1.2).

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moekit.errors import BadConfig
from moekit.training.figures import _sum_over_ranks
from moekit.training.layers import TrainedLayer


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """What to add to each selection bias: rate * sign(mean load - load): [E] fp32."""
    load_E = load_E.float()
    return rate * (load_E.mean() - load_E).sign()


class BiasBalancer:
    """Counts the load of an optimizer step, over micro-batches and ranks, and moves the biases by it.

    Args:
        layers: MoE layers of the model.
        rate: step of a bias, 0.001 in DeepSeek-V3.

    Raises:
        BadConfig: no layer has a selection bias, or one is kept in a type too coarse for such steps.
    """

    def __init__(self, layers: Sequence[TrainedLayer], rate: float) -> None:
        self._rate = rate
        self._bias: dict[int, Tensor] = {}
        for layer in layers:
            if layer.bias is None:
                continue
            if layer.bias.dtype not in (torch.float32, torch.float64):
                raise BadConfig(
                    f"the selection bias is kept in {layer.bias.dtype}, in which steps of {rate} vanish",
                    layer=layer.index,
                    hint="load the model by from_pretrained, which keeps it in fp32, instead of casting it afterwards",
                )
            self._bias[layer.index] = layer.bias
        if not self._bias:
            raise BadConfig(
                "bias_rate is set, but no router of this model has a selection bias",
                hint="balance it by balance_coef instead; DeepSeek-V3, GLM-4 and ERNIE-4.5 types have biases",
            )
        self._load = {
            layer.index: torch.zeros(layer.experts, dtype=torch.int64, device=self._bias[layer.index].device)
            for layer in layers
            if layer.index in self._bias
        }

    def add(self, layer: int, load_E: Tensor) -> None:
        """Count one layer's answer for one micro-batch."""
        if layer in self._load:
            self._load[layer] += load_E.to(self._load[layer].device)

    @torch.no_grad()
    def step(self) -> None:
        """Move every bias by the load counted since the last step."""
        _sum_over_ranks(list(self._load.values()))
        for index, bias in self._bias.items():
            bias.add_(bias_step(self._load[index], self._rate).view_as(bias).to(bias.dtype))
            self._load[index].zero_()
