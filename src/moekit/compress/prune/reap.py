"""REAP: router-weighted expert activation pruning (ICLR 2026, arXiv:2510.13999).

Legend: N tokens, K choices a token, E experts.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.trace.batch import TokenBatch
from moekit.trace.vocabulary import statistic


def share_NK(seen: TokenBatch) -> Tensor:
    """Each choice's part in the sum of its token's gate weights, fp32; 0 where that sum is 0."""
    total_N1 = seen.weights_NK.sum(dim=1, keepdim=True)
    return torch.where(total_N1 > 0, seen.weights_NK / total_N1.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


@statistic(shape="E", sources=("weights", "outputs"))
def renormalised_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of (g / sum of the token's g) n over the expert's tokens (REAP's gate since 2026, arXiv:2510.13999)."""
    return seen.per_expert(share_NK(seen) * seen.output_norm_NK)


@register(
    name="reap",
    kind="prune",
    paper="arXiv:2510.13999",
    needs=("load", "renormalised_output_norm"),
    changes="weights",
    limits=(
        "A conditional mean: on badly balanced models it may fall behind weighted-ean, in which frequency counts.",
        "Follows its calibration text: calibrate on the domain, chat template applied, or generated answers suffer.",
    ),
)
class REAP(PruneMethod):
    """Keep the experts that add most to the layer's output when they are chosen.

    S_j = mean over X_j, the tokens routed to expert j, of g_j ||f_j(x)||: the gate weight times the norm of the output
    it multiplies; 0 where no token chose j. With `renormalise` the gate is first divided by the sum of the token's
    chosen gates, which only changes models that do not renormalise themselves (OLMoE, Qwen2-MoE): of the authors' two
    entries the layer-wise one does so for these, too, the other does not (March 2026). Choose it as the first of the
    one-pass methods on models with many small, balanced experts.
    """

    renormalise: bool = Field(
        default=True, description="divide gate weights by their token's sum; off takes them as they multiply outputs"
    )

    @property
    def required(self) -> tuple[str, ...]:
        """Load and the sum of gated output norms, with gates of either kind."""
        return ("load", "renormalised_output_norm" if self.renormalise else "gated_output_norm")

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean gated output norm of each expert, [E]."""
        load, total = (inputs.statistics[name] for name in self.required)
        return ratio(total, load)
