"""Balancing without a loss: after each optimizer step, selection biases are moved by the load that was counted in it.

A family like DeepSeek-V3 chooses experts by score plus a bias that no gradient reaches and that transformers keeps, but
never updates. A balancer is the rule that moves it.

Legend: E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit import catalogue
from moekit.errors import BadConfig
from moekit.training.collector import Routed
from moekit.training.losses import expert_load

KIND = "balancer"
# What a rule remembers of one layer from step to step; saved with checkpoints.
State = dict[str, Tensor]


class Balancer(BaseModel, ABC):
    """A rule that moves selection biases.

    Attributes:
        rate: size of a step.
        center: subtract the mean of each step: choices are the same, but biases do not drift together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float = Field(default=0.001, gt=0, allow_inf_nan=False, description="size of a step, in units of the scores")
    center: bool = Field(default=False, description="subtract the mean of each step, so that biases do not drift")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Settings that the generic tests try: a load of scores between 0 and 1 must be even after a hundred steps."""
        return [cls()]

    def counts(self, routed: Routed) -> Tensor:
        """What the rule needs of a micro-batch: sums over tokens, so that micro-batches and ranks add up."""
        return expert_load(routed.indices_TK, routed.layer.experts, routed.mask_T)

    @abstractmethod
    def step(self, counted: Tensor, state: State) -> Tensor:
        """What to add to the biases of one layer: [E] fp32; 0 where the load is even.

        Args:
            counted: `counts` of the whole optimizer step, over micro-batches and ranks: by default the choices that
                fell on each expert [E].
            state: what the rule remembers of this layer; it may change it.
        """

    def delta(self, counted: Tensor, state: State) -> Tensor:
        """`step`, centred where asked."""
        moved_E = self.step(counted, state)
        return moved_E - moved_E.mean() if self.center else moved_E


def read_balancer(stated: str | Mapping[str, Any]) -> Balancer:
    """A balancer from a config: its name, or its settings with `use: NAME`.

    Raises:
        BadConfig: no such balancer, or a setting that it does not have.
    """
    knobs = {"use": stated} if isinstance(stated, str) else dict(stated)
    name = knobs.pop("use", None)
    if not isinstance(name, str):
        raise BadConfig("the balancer has no name", hint="balancer: sign, or balancer: {use: sign, rate: 0.001}")
    made: Balancer = catalogue.make(KIND, name, knobs)
    return made
