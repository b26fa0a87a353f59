"""The step that would have made this batch's load even.

Legend: T tokens, E experts, K choices a token, B bins.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.training.balancers.base import KIND, Balancer, State
from moekit.training.collector import Routed
from moekit.training.losses import gate_scores

BINS = 4096


@register(
    name="quantile",
    kind=KIND,
    changes="weights",
    limits=(
        "Each expert's step is computed as if the others stood still, hence the damping.",
        "Where experts are chosen within groups, thresholds are those of the choice that was made.",
    ),
)
class Quantile(Balancer):
    """The bias is moved by a quantile of the scores: so far that in this batch the expert would have had its share.

    For each token and expert there is a smallest step that changes the choice: up to the lowest chosen score, or down
    to the highest that was not chosen. The step whose quantile is K / E would have given the expert T K / E tokens;
    `rate` of it is made. Steps are counted in 4,096 bins, so that micro-batches and ranks add up.
    """

    rate: float = Field(default=0.5, gt=0, le=1, description="share of the whole way that is made in a step")
    span: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="longest step, in units of the scores")

    def counts(self, routed: Routed) -> Tensor:
        """How many tokens would change their choice of each expert within each step: [E, B] int64."""
        scores_TE = gate_scores(routed.logits_TE.detach(), routed.layer.scores)
        bias = routed.layer.bias
        biased_TE = scores_TE if bias is None else scores_TE + bias.detach().reshape(-1).float()
        tokens, experts = biased_TE.shape
        chosen_TE = torch.zeros(tokens, experts + 1, dtype=torch.bool, device=biased_TE.device)
        chosen_TE = chosen_TE.scatter_(1, routed.indices_TK, True)[:, :experts]
        lowest_T1 = biased_TE.masked_fill(~chosen_TE, float("inf")).amin(dim=1, keepdim=True)
        highest_T1 = biased_TE.masked_fill(chosen_TE, float("-inf")).amax(dim=1, keepdim=True)
        needed_TE = torch.where(chosen_TE, highest_T1, lowest_T1) - biased_TE
        places_TE = ((needed_TE.clamp(-self.span, self.span) + self.span) * (BINS / (2 * self.span))).long()
        # A step down for what was chosen, up for what was not: ties and groups must not turn that round.
        half = BINS // 2
        places_TE = torch.where(chosen_TE, places_TE.clamp(0, half - 1), places_TE.clamp(half, BINS - 1))
        count_EB = torch.zeros(experts, BINS, dtype=torch.int64, device=biased_TE.device)
        ones_TE = torch.ones_like(places_TE)
        if routed.mask_T is not None:
            ones_TE = ones_TE * routed.mask_T.unsqueeze(1)
        return count_EB.scatter_add_(1, places_TE.T.contiguous(), ones_TE.T.contiguous())

    def step(self, counted: Tensor, state: State) -> Tensor:
        """Rate times the step to an even share: [E] fp32; 0 where less than one token is missing."""
        half = BINS // 2
        below_EB = torch.nn.functional.pad(counted.cumsum(dim=1), (1, 0)).double()
        load_E = below_EB[:, half]
        share = load_E.mean()
        edges_B = (torch.arange(BINS + 1, device=counted.device, dtype=torch.float64) - half) * (2 * self.span / BINS)
        fewer_EB = (below_EB <= share) & (edges_B <= 0)
        more_EB = (below_EB >= share) & (edges_B >= 0)
        down_E = edges_B.masked_fill(~fewer_EB, -self.span).amax(dim=1)
        up_E = edges_B.masked_fill(~more_EB, self.span).amin(dim=1)
        moved_E = torch.where(load_E > share, down_E, up_E)
        return (self.rate * moved_E.masked_fill((load_E - share).abs() < 1, 0.0)).float()
