"""Sparse upcycling: every expert is a copy of the dense network.

Shapes: N tokens, H hidden, F dense width, E experts.
"""

from __future__ import annotations

import torch
from pydantic import Field

from moekit.catalogue import register
from moekit.conversion.base import Conversion, random_router
from moekit.conversion.maths import DenseFFN, MoEWeights, gather_experts
from moekit.conversion.targets import MoEGeometry, Target


@register(
    name="copy",
    kind="convert",
    paper="arXiv:2212.05055",
    changes="weights",
    traits=("stochastic", "grows"),
    limits=(
        "E times the parameters of the dense network",
        "copies differ through the router alone; without redrawn neurons they need long training to specialise",
    ),
)
class CopyUpcycling(Conversion):
    """Make E copies of the dense network, with a random router whose chosen weights sum to 1.

    sum_e w_e FFN(x) = FFN(x) for any router and any k, so the logits equal the dense model's (up to rounding). With a
    shared expert, that and the routed ones each give half. `redraw` re-initialises a share of each copy's neurons from
    a normal distribution of the same mean and spread (Drop-Upcycling, arXiv:2502.19261), which ends exactness and helps
    experts to become different. Choose it to grow a model for long continued training.
    """

    target: Target = Field(default="qwen2_moe", description="stock layout of the result")
    shared: bool = Field(default=False, description="add a shared expert, another copy")
    redraw: float = Field(default=0.0, ge=0, le=1, description="share of each expert's neurons to draw anew")

    @property
    def layout(self) -> str:
        """Qwen2-MoE or Mixtral."""
        return self.target

    def geometry(self, dense_width: int, dense_layers: tuple[int, ...]) -> MoEGeometry:
        """Every expert is as wide as the dense network."""
        shared_width = dense_width if self.shared else 0
        return MoEGeometry(self.experts, self.top_k, dense_width, shared_width, True, dense_layers)

    def convert_layer(self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator) -> MoEWeights:
        """All experts alike, but for redrawn neurons."""
        width, hidden = ffn.gate_FH.shape
        neurons_EI = torch.arange(width).expand(self.experts, width)
        # Half of the output comes from each side; the shared side is halved by its sigmoid gate.
        gate_up_EJH, down_EHI = gather_experts(ffn, neurons_EI, scale=0.5 if self.shared else 1.0)
        for expert in range(self.experts):
            picked_P = torch.randperm(width, generator=generator)[: round(self.redraw * width)]
            gate_JH, down_HI = gate_up_EJH[expert], down_EHI[expert]
            for part, axis in ((gate_JH[:width], 0), (gate_JH[width:], 0), (down_HI, 1)):
                _redraw(part, axis, picked_P, generator)
        router_EH = random_router(self.experts, hidden, generator)
        return MoEWeights(router_EH, gate_up_EJH, down_EHI, ffn if self.shared else None)


def _redraw(weight: torch.Tensor, axis: int, picked_P: torch.Tensor, generator: torch.Generator) -> None:
    """Draw the picked rows or columns anew with the mean and spread of those they replace, in place."""
    if not len(picked_P):
        return
    old = weight.index_select(axis, picked_P)
    drawn = torch.randn(old.shape, generator=generator) * old.std().cpu() + old.mean().cpu()
    weight.index_copy_(axis, picked_P.to(weight.device), drawn.to(weight))
