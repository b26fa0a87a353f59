"""Once per node over the slow links, then once per rank inside the node."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.parallel.dispatcher import Dispatcher, DispatchOptions, RunExperts
from moekit.parallel.exchange import Flight, RankExchange
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.ranks import Ranks
from moekit.parallel.traffic import Traffic


@register(
    name="hierarchical",
    kind="dispatch",
    paper="arXiv:2205.10034",
    changes="runtime",
    limits=("needs nodes of equal size", "two exchanges each way: not faster where all links are alike"),
)
@dataclass(eq=False)
class Hierarchical(Dispatcher):
    """Send a token once to each node that holds any of its experts, to the rank with the sender's place there.

    That rank hands it on inside its node, once for each rank concerned, and partial sums take the same way back. It is
    `once-per-rank` over nodes, whose experts are the whole node: `once-per-rank` again (resource-aware all-to-all,
    SE-MoE, arXiv:2205.10034 section 3.5; with each row across a node once, as in DeepEP).

    Attributes:
        across: ranks with the same place in every node.
        inside: ranks of one's own node.
    """

    across: Link = field(default_factory=Link)
    inside: Link = field(default_factory=Link)

    def __post_init__(self) -> None:
        if self.across.size * self.inside.size != self.layout.ranks:
            raise BadConfig(
                f"{self.layout.ranks} ranks do not stand in {self.across.size} nodes of {self.inside.size}",
                hint="hierarchical needs nodes of equal size",
            )
        outer, inner = self.layout.nodes(self.inside.size)
        self._outer = RankExchange(outer, self.options, self.across)
        self._inner = RankExchange(inner[self.across.rank], self.options, self.inside)

    @classmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> Hierarchical:
        """See the base class."""
        if ranks.across is None or ranks.inside is None:
            raise BadConfig(
                "hierarchical dispatch needs to know which ranks share a node",
                hint="give the number of nodes (--nodes), or a mesh with a dimension for nodes",
            )
        return cls(layout, options, Link(ranks.across), Link(ranks.inside))

    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Flight:
        """See the base class."""
        return self._outer.dispatch(x_NH, indices_NK, weights_NK)

    def combine(self, flight: Flight, run: RunExperts) -> Tensor:
        """See the base class."""

        def node(rows_QH: Tensor, local_QS: Tensor, weights_QS: Tensor) -> Tensor:
            none = self._inner.layout.experts
            return self._inner(rows_QH, local_QS.clamp(max=none), weights_QS, run)

        return self._outer.around(flight, node)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return {"nodes": self.across.traffic, "ranks": self.inside.traffic}
