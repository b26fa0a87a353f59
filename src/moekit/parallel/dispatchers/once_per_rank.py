"""A row for every rank that a token's experts live on, and one partial sum back."""

from __future__ import annotations

from moekit.catalogue import register
from moekit.parallel.exchange import RankExchange


@register(name="once-per-rank", kind="dispatch", paper="arXiv:2504.01337", changes="runtime")
class OncePerRank(RankExchange):
    """Send a token's hidden state once to each rank that holds any of its experts (C2R, arXiv:2504.01337; DeepEP).

    Ids and weights travel inside the row. The expert's rank adds up what its experts say of a token, so one row comes
    back: the fewest rows, both ways, that exact results allow. Backward mirrors forward.
    """
