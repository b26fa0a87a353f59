"""A proportional-integral controller.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.training.balancers.base import KIND, Balancer, State


@register(name="pi", kind=KIND, changes="weights")
class ProportionalIntegral(Balancer):
    """A proportional-integral controller of each bias: it answers a change of load at once and leaves no offset.

    With the error r_n = 1 - load / mean, the bias is gain * r_n + rate * (r_1 + ... + r_n); in steps: gain * (r_n -
    r_(n-1)) + rate * r_n.
    """

    gain: float = Field(default=0.01, ge=0, allow_inf_nan=False, description="answer to the present error")

    @classmethod
    def examples(cls) -> Sequence[ProportionalIntegral]:
        """A rate for a hundred steps."""
        return [cls(rate=0.05)]

    def step(self, counted: Tensor, state: State) -> Tensor:
        """The step towards even load: [E] fp32."""
        load_E = counted.float()
        return self.steer(load_E / load_E.mean().clamp(min=1e-9), 1.0 if float(load_E.sum()) else 0.0, state)

    def steer(self, measured: Tensor, wanted: float, state: State) -> Tensor:
        """The step of any quantity that raises what is measured, of one scalar too.

        Args:
            measured: what was measured, of any shape.
            wanted: what it should be.
            state: holds the error of the step before.
        """
        error = wanted - measured.float()
        before = state.get("error", torch.zeros_like(error))
        state["error"] = error
        return self.gain * (error - before) + self.rate * error
