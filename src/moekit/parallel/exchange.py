"""Dispatchers that exchange rows: everything but the plan is the same.

Legend: N tokens, K choices, H hidden size, Q rows received, S slots a row.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from moekit.parallel.dispatcher import Dispatcher, DispatchOptions, RunExperts, run_local
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.link import Link
from moekit.parallel.plan import DispatchPlan, once_per_rank
from moekit.parallel.ranks import Ranks
from moekit.parallel.rows import Journey, arrive, combine, depart
from moekit.parallel.traffic import Traffic


@dataclass(eq=False)
class Flight:
    """Tokens under way, and what autograd knows them by."""

    x_NH: Tensor
    weights_NK: Tensor
    journey: Journey


@dataclass(eq=False)
class ExchangeDispatcher(Dispatcher):
    """Plan, dispatch, local experts, combine over one process group.

    Attributes:
        link: the ranks; the layout's ranks are its members, in order.
    """

    link: Link = field(default_factory=Link)

    @abstractmethod
    def plan(self, indices_NK: Tensor) -> DispatchPlan:
        """What this rank sends for these choices; no communication."""

    @classmethod
    def over(cls, layout: ExpertLayout, ranks: Ranks, options: DispatchOptions) -> ExchangeDispatcher:
        """See the base class."""
        return cls(layout, options, Link(ranks.group))

    def dispatch(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Flight:
        """See the base class."""
        journey = depart(x_NH, weights_NK, self.plan(indices_NK), self.link, self.options.codec)
        return Flight(x_NH, weights_NK, journey)

    def combine(self, flight: Flight, run: RunExperts) -> Tensor:
        """See the base class."""
        experts = self.layout.counts[self.link.rank]
        return self.around(flight, partial(run_local, run, experts=experts))

    def around(self, flight: Flight, answer: RunExperts) -> Tensor:
        """Receive rows, have them answered, and bring the answers home.

        Args:
            flight: from `dispatch`.
            answer: gets all rows as they came, or none, with slots that may be empty.
        """
        rows_QH, weights_QS, local_QS = arrive(flight.x_NH, flight.weights_NK, flight.journey)
        return combine(answer(rows_QH, local_QS, weights_QS), flight.journey)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """See the base class."""
        return {"ranks": self.link.traffic}


class RankExchange(ExchangeDispatcher):
    """A row for every distinct rank among a token's choices, whatever a rank of the layout is: a device, or a node."""

    def plan(self, indices_NK: Tensor) -> DispatchPlan:
        """See the base class."""
        return once_per_rank(indices_NK, self.layout)
