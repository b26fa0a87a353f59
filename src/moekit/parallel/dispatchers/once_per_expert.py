"""A row for every choice: what MegaBlocks and transformers' all-to-all send; the baseline."""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.parallel.exchange import ExchangeDispatcher
from moekit.parallel.plan import DispatchPlan, once_per_expert


@register(
    name="once-per-expert",
    kind="dispatch",
    paper="arXiv:2211.15841",
    changes="runtime",
    limits=("sends a token as often as it has experts, also to one rank",),
)
class OncePerExpert(ExchangeDispatcher):
    """Send a token's hidden state once for each of its experts (MegaBlocks, arXiv:2211.15841).

    Exact splits, no capacity, nothing dropped; the baseline that all savings are told against.
    """

    def plan(self, indices_NK: Tensor) -> DispatchPlan:
        """A row for every valid choice."""
        return once_per_expert(indices_NK, self.layout)
