"""A step as large as the load is off.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moekit.catalogue import register
from moekit.training.balancers.base import KIND, Balancer, State


@register(name="proportional", kind=KIND, paper="arXiv:2408.15664", changes="weights")
class Proportional(Balancer):
    """A step in proportion to how far an expert's load is from the mean, so that it comes to rest instead of cycling.

    delta_e = rate * (mean load - load_e) / mean load (section 4.3, scaled by the mean so that the rate does not depend
    on the batch).
    """

    @classmethod
    def examples(cls) -> Sequence[Proportional]:
        """A rate for a hundred steps."""
        return [cls(rate=0.05)]

    def step(self, counted: Tensor, state: State) -> Tensor:
        """Rate * (1 - load / mean): [E] fp32, 0 where nothing was chosen."""
        load_E = counted.float()
        return self.rate * (load_E.mean() - load_E) / load_E.mean().clamp(min=1e-9)
