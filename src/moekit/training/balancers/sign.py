"""A step of one size towards the mean load.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moekit.catalogue import register
from moekit.training.balancers.base import KIND, Balancer, State


@register(name="sign", kind=KIND, paper="arXiv:2408.15664", changes="weights")
class Sign(Balancer):
    """A step of one size up for experts below the mean load, down for those above (DeepSeek-V3, arXiv:2412.19437).

    delta_e = rate * sign(mean load - load_e). DeepSeek-V3 trains with 0.001 and ends with 0.
    """

    @classmethod
    def examples(cls) -> Sequence[Sign]:
        """A rate for a hundred steps."""
        return [cls(rate=0.005)]

    def step(self, counted: Tensor, state: State) -> Tensor:
        """Rate * sign(mean - load): [E] fp32."""
        load_E = counted.float()
        return self.rate * (load_E.mean() - load_E).sign()
