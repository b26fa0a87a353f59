"""ODP: leave a token's second expert out where its weight is small and the token matters little (arXiv:2410.06270).

Legend: T tokens, B sequences, S positions of this pass, L positions so far, C columns at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.routing.second import median_ratio, refuse_other_than_two, skip_second
from moekit.runtime.attention import BlockAttention
from moekit.runtime.part import PlanInputs
from moekit.runtime.router import LimitPart, Routed, RouteInputs

_COLUMNS = 256


def importance(norm_BS: Tensor, received_BS: Tensor, readers_BS: Tensor) -> Tensor:
    """What a token matters: its L1 norm times the mean attention that it is paid by those that can look at it: [B, S].

    Args:
        norm_BS: L1 norms.
        received_BS: attention summed over the tokens that pay it.
        readers_BS: how many tokens can look at it: itself and those behind it.
    """
    return norm_BS * received_BS / readers_BS.clamp_min(1)


def largest_of_each(scores_BS: Tensor, tokens_BS: Tensor, share: float) -> Tensor:
    """The given share of each sequence's tokens, rounded up, by score: [B, S] bool.

    Args:
        scores_BS: by what.
        tokens_BS: False at padding, which is neither counted nor taken.
        share: 0 to 1.
    """
    scores_BS = scores_BS.masked_fill(~tokens_BS, float("-inf"))
    rank_BS = scores_BS.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    # Rounded before: 0.02 * 50 lies above 1 in floating point.
    wanted = [math.ceil(round(share * count, 6)) for count in tokens_BS.sum(dim=1).tolist()]
    return (rank_BS < torch.tensor(wanted, device=rank_BS.device).unsqueeze(1)) & tokens_BS


def largest_so_far(norm_BL: Tensor, visible_BSL: Tensor, share: float) -> Tensor:
    """Tokens among the given share with the largest norms of those up to and with themselves: [B, S] bool.

    Args:
        norm_BL: of all positions so far; those of this pass are the last.
        visible_BSL: which positions each one of this pass may look at.
        share: 0 to 1.
    """
    own_BS1 = norm_BL[:, -visible_BSL.shape[1] :].unsqueeze(2)
    larger_BS = (visible_BSL & (norm_BL.unsqueeze(1) > own_BS1)).sum(dim=2)
    return larger_BS < share * visible_BSL.sum(dim=2)


def received(attention: BlockAttention, payers_BS: Tensor) -> Tensor:
    """Attention paid to each position of a pass that began its sequences, summed over those that pay it: [B, S] fp32.

    Args:
        attention: of the block.
        payers_BS: False at padding, whose attention does not count.
    """
    batch, length = payers_BS.shape
    sums = []
    for start in range(0, length, _COLUMNS):
        width = min(_COLUMNS, length - start)
        # Mixing unit vectors by the attention map gives its columns.
        unit_SC = torch.zeros(length, width, device=payers_BS.device)
        unit_SC[start : start + width].fill_diagonal_(1.0)
        columns_BSC = attention.mix(unit_SC.expand(batch, -1, -1))
        sums.append((columns_BSC * payers_BS.unsqueeze(2)).sum(dim=1))
    return torch.cat(sums, dim=1)


@register(
    name="odp",
    kind="routing",
    paper="arXiv:2410.06270",
    needs=("gate_ratio",),
    changes="routing",
    stock=False,
    traits=("variable_k", "sequence", "attention"),
    limits=(
        "For models that choose two experts a token.",
        "Saves time only where the experts' kernels skip choices of no expert.",
        "With protect attention a prompt's tokens are protected by what comes behind them: perplexity of whole texts "
        "then looks ahead, and a text computed at once differs from the same text computed in pieces.",
        "protect attention needs eager or sdpa attention, and computes the attention map once more; passes that go on "
        "behind a key-value cache protect by the norm alone.",
    ),
)
class ODP(LimitPart):
    """A token's second expert is skipped where its weight is below mu times the first's, important tokens excepted.

    As with naee-skip mu is each layer's median of the two weights' ratio on the calibration text. The share of the most
    important tokens keeps both experts: by the L1 norm of what the router sees among the tokens so far (`norm`), or by
    that norm times the mean attention that the token is paid by itself and those behind it (`attention`, the paper's).
    Choose it beside rounding to few bits, to spend less time on a top-2 model where naee-skip loses too much.
    """

    axes: ClassVar[Mapping[str, str]] = {"mu": ""}

    mu: float | None = Field(
        default=None, ge=0, le=1, description="threshold for all layers; None takes each layer's median from the trace"
    )
    protect: Literal["none", "norm", "attention"] = Field(
        default="norm", description="by what a token is important: nothing, its norm, or norm and attention it is paid"
    )
    share: float = Field(default=0.02, ge=0, le=1, description="share of a sequence's tokens that keep both experts")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[ODP]:
        """Protection by the norm, by attention, and none."""
        return [cls(mu=0.5, share=0.2), cls(mu=0.9, protect="attention", share=0.2), cls(mu=1.0, protect="none")]

    def check(self, geometry: Geometry, layer: int) -> None:
        """Refuse models that do not choose two experts a token."""
        refuse_other_than_two(geometry.top_k, layer, "use the topk policy with a smaller top_k")

    def plan(self, inputs: PlanInputs) -> dict[str, Tensor]:
        """The layer's mu, a scalar in fp32; nothing where the knob gives it.

        Raises:
            BadData: the trace lacks the ratios, or no token chose two experts.
        """
        return {} if self.mu is not None else {"mu": median_ratio(inputs, "mu")}

    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        """Skip the second of two choices where the token is not protected."""
        mu = inputs.constants["mu"] if self.mu is None else self.mu
        return skip_second(inputs, routed, mu, self._protected(inputs))

    def _protected(self, inputs: RouteInputs) -> Tensor | None:
        """[T] bool; None where no token is."""
        if self.protect == "none" or not self.share:
            return None
        context = inputs.context  # asked for with a graph: without one it takes the call for a reentrant one
        by_attention = self.protect == "attention" and not context.past
        attention = context.attention(inputs.layer) if by_attention else None
        with torch.no_grad():
            norm_BS = context.sequences(inputs.hidden_TH.float().abs().sum(dim=1))
            norm_BL = context.extend(inputs.layer, "norms", norm_BS)
            visible_BSL = context.visible(norm_BS.device)
            if attention is None:
                return largest_so_far(norm_BL, visible_BSL, self.share).reshape(-1)
            tokens_BS = context.token_mask(norm_BS.device)
            readers_BS = (visible_BSL & tokens_BS.unsqueeze(2)).sum(dim=1)
            scores_BS = importance(norm_BS, received(attention, tokens_BS), readers_BS)
            return largest_of_each(scores_BS, tokens_BS, self.share).reshape(-1)
