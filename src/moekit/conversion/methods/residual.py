"""Residual conversion: the dense network stays whole as the shared expert; new experts learn what it lacks.

Shapes: N tokens, H hidden, F dense width, E experts, I expert width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from moekit.catalogue import register
from moekit.conversion.base import WIDTH_STEP, Conversion, random_router
from moekit.conversion.kmeans import balanced_assignment, balanced_kmeans
from moekit.conversion.maths import SHARED_FACTOR, DenseFFN, MoEWeights, neuron_strengths
from moekit.conversion.targets import MoEGeometry
from moekit.errors import BadConfig


@register(
    name="residual",
    kind="convert",
    changes="weights",
    traits=("stochastic", "grows"),
    limits=(
        "adds parameters: until it is trained the result costs more and does the same",
        "Qwen2-MoE layout only, which has the shared expert it needs",
    ),
)
class Residual(Conversion):
    """Keep the whole dense network as shared expert and add routed experts that start with zero output.

    The block computes sigmoid(0) * 2 FFN(x) + sum_e w_e E_e(x) with E_e = 0, so the logits equal the dense model's
    exactly, for any router and any k. Gate and up rows of the experts are neurons of the dense network, down_proj is
    zero and learns first. With calibration text the router starts as centroids of a balanced clustering of the layer's
    inputs and each expert takes the neurons that are unusually strong on its cluster; routing is then balanced and
    tells kinds of text apart before any training. Choose it for fine-grained experts (E >= 32, k <= E / 8) on a
    small budget of training tokens.
    """

    experts: int = Field(default=32, ge=2, description="routed experts of each converted layer")
    top_k: int = Field(default=4, ge=1, description="experts that each token chooses")
    width: int | None = Field(
        default=None, ge=1, description="neurons of each routed expert; about dense width / experts"
    )
    router: Literal["auto", "random", "clusters"] = Field(
        default="auto", description="how the router starts: clusters of the inputs, or random; auto: clusters if it can"
    )
    router_scale: float = Field(default=2.0, gt=0, description="standard deviation of the logits of a clustered router")

    @property
    def needs_calibration(self) -> bool:
        """Only for a clustered router."""
        return self.router == "clusters"

    @property
    def layout(self) -> str:
        """Always Qwen2-MoE."""
        return "qwen2_moe"

    def _width(self, dense_width: int) -> int:
        return self.width or max(1, dense_width // self.experts // WIDTH_STEP) * WIDTH_STEP

    def geometry(self, dense_width: int, dense_layers: tuple[int, ...]) -> MoEGeometry:
        """The shared expert is as wide as the dense network; weights of the chosen experts sum to 1."""
        width = self._width(dense_width)
        if not 1 <= width <= dense_width:
            raise BadConfig(
                f"experts of {width} neurons cannot be taken from {dense_width}",
                hint=f"give a width from 1 to {dense_width}, or at most {dense_width} experts",
            )
        return MoEGeometry(self.experts, self.top_k, width, dense_width, True, dense_layers)

    def convert_layer(self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator) -> MoEWeights:
        """Shared expert: the dense network; routed experts: gate and up of chosen neurons, down zero."""
        width = self._width(ffn.gate_FH.shape[0])
        if inputs_NH is not None and self.router != "random":
            router_EH, cluster_N = cluster_router(inputs_NH, self.experts, self.router_scale, generator)
            neurons_EI = strong_neurons(neuron_strengths(ffn, inputs_NH), cluster_N, self.experts, width)
        else:
            router_EH = random_router(self.experts, ffn.gate_FH.shape[1], generator)
            neurons_EI = dealt_neurons(ffn.gate_FH.shape[0], self.experts, width, generator)
        gate_up_EJH = torch.cat([ffn.gate_FH[neurons_EI], ffn.up_FH[neurons_EI]], dim=1)
        down_EHI = ffn.gate_FH.new_zeros(self.experts, ffn.gate_FH.shape[1], width)
        shared = ffn._replace(down_HF=ffn.down_HF * SHARED_FACTOR)
        return MoEWeights(router_EH, gate_up_EJH, down_EHI, shared)


def dealt_neurons(count: int, experts: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Deal neurons to experts at random, distinct within an expert and spread evenly over all, [E, I]."""
    rounds = -(-experts * width // count)
    deck = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    hands = deck[: experts * width].view(experts, width).clone()
    for hand in hands:  # a hand across two shuffles of the deck may hold a neuron twice
        while len(unique := torch.unique(hand)) < width:
            free = torch.ones(count, dtype=torch.bool)
            free[unique] = False
            spare = free.nonzero().flatten()
            spare = spare[torch.randperm(len(spare), generator=generator)[: width - len(unique)]]
            hand.copy_(torch.cat([unique, spare]))
    return hands


def cluster_router(
    x_NH: torch.Tensor, experts: int, logit_std: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router rows from a balanced clustering of the inputs.

    The mean input is projected out of every row: no expert is then favoured by what all tokens have in common, which
    a router without bias could not undo.

    Args:
        x_NH: inputs of the layer.
        experts: clusters.
        logit_std: standard deviation of the resulting logits.
        generator: random source.

    Returns:
        Rows [E, H] and the cluster of each token [N].
    """
    mean_H = x_NH.mean(0)
    direction_H = mean_H / mean_H.norm().clamp_min(1e-12)
    centred_NH = x_NH - (x_NH @ direction_H)[:, None] * direction_H
    unit_NH = torch.nn.functional.normalize(centred_NH, dim=-1)
    cluster_N, centroid_EH = balanced_kmeans(unit_NH, experts, generator)
    rows_EH = torch.nn.functional.normalize(centroid_EH - centroid_EH.mean(0), dim=-1)
    rows_EH = rows_EH - (rows_EH @ direction_H)[:, None] * direction_H
    return rows_EH * (logit_std / (x_NH @ rows_EH.T).std().clamp_min(1e-12)), cluster_N


def strong_neurons(strength_NF: torch.Tensor, cluster_N: torch.Tensor, experts: int, width: int) -> torch.Tensor:
    """Neurons that are stronger on an expert's tokens than elsewhere, dealt so that none is in two experts.

    Falls back to overlapping choices where there are fewer neurons than E * I.

    Args:
        strength_NF: contribution of each neuron to each token, >= 0.
        cluster_N: expert of each token.
        experts: E.
        width: I.

    Returns:
        Neuron indices [E, I].
    """
    mean_F = strength_NF.mean(0).clamp_min(1e-12)
    ratio_EF = torch.stack([strength_NF[cluster_N == e].mean(0) / mean_F for e in range(experts)])
    if experts * width == ratio_EF.shape[1]:
        owner_F = balanced_assignment(-ratio_EF.T)
        return torch.stack([(owner_F == e).nonzero().flatten() for e in range(experts)])
    return ratio_EF.topk(width, dim=1).indices
