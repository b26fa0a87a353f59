"""SlimMoE: experts made narrow by how much the loss depends on each neuron (arXiv:2506.18349).

Legend: E experts, I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dense_cuts import Kind
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.weights import LayerWeights

_MEASURED = {
    "taylor": "neuron_taylor_size",
    "kd": "neuron_taylor_size",
    "fisher": "neuron_fisher",
    "output-norm": "inner_size",
}


@register(
    name="slimmoe",
    kind="slim",
    paper="arXiv:2506.18349",
    needs=("load", "neuron_taylor_size"),
    changes="weights",
    limits=(
        "taylor and fisher hold the whole model in memory for a backward pass, kd a teacher, too.",
        "output-norm goes layer by layer.",
        "A stored plan with a repair is carried out again on the text that it was made on.",
        "Neurons of experts that no calibration token chose are ranked by their weights, and the experts are named.",
        "Shared experts and groups of attention heads go by gradients alone, and nothing is refitted for them.",
        "The paper's long distillation after each cut is a step of its own: moekit train.",
    ),
)
class SlimMoE(SlimMethod):
    """Keep the neurons of each expert on which the loss depends most, as many in every expert and layer.

    With h_k the input of the down projection at neuron k, summed over the expert's tokens: taylor S_k = sum |h_k
    dL/dh_k|, what zeroing the neuron takes away to first order (the same as of its up row or its down column w dL/dw),
    L next-token cross-entropy; kd the same where L is the divergence from a teacher among its 8 likeliest tokens, from
    the second stage on; fisher sum (h_k dL/dh_k)^2; output-norm mean |h_k| * |W_down[:, k]|, without a backward pass.
    The down projections are then refitted to what the experts gave before. Choose it where every expert is of use and a
    model of the same class must be smaller and faster, and train behind it for deep cuts.
    """

    score: Literal["taylor", "kd", "fisher", "output-norm"] = Field(
        default="taylor",
        description="what a neuron counts: see above; kd needs a teacher, output-norm no backward pass",
    )

    shared: int | float | str | None = Field(
        default=None,
        description="neurons that shared experts keep, or a share of them; by the same score; all by default",
    )
    groups: int | None = Field(
        default=None,
        ge=1,
        description="heads of keys and values that attention keeps, each with the query heads that share it; all by "
        "default",
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[SlimMoE]:
        """Each score, repaired and not."""
        return [cls(), cls(score="output-norm", repair="none"), cls(score="fisher", repair="none")]

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss is a teacher's."""
        return self.score == "kd"

    @property
    def kept_parts(self) -> Mapping[Kind, int | float | str]:
        """What is kept of shared experts and of attention."""
        asked: dict[Kind, int | float | str | None] = {"groups": self.groups, "shared": self.shared}
        return {kind: keep for kind, keep in asked.items() if keep is not None}

    @property
    def scored_by(self) -> tuple[str, ...]:
        """One statistic of each neuron."""
        return (_MEASURED[self.score],)

    def neuron_scores(self, weights: LayerWeights, inputs: LayerInputs) -> Tensor:
        """What was measured; for output-norm the mean, times the norm of the down column."""
        measured_EI = inputs.finite(_MEASURED[self.score]).double()
        if self.score != "output-norm":
            return measured_EI
        norm_EI: Tensor = torch.linalg.vector_norm(weights.down_EHI.float(), dim=1)
        mean_EI = measured_EI / inputs.statistics["load"].clamp_min(1)[:, None]
        return mean_EI * norm_EI.to(mean_EI)
