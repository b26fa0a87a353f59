"""What training minimises: a weighted sum of objectives, each in a file of its own.

An objective on routers is computed in each MoE layer from what its router answered; one on outputs is computed once a
micro-batch, from the hidden states that the output layer reads. What an objective on routers counts over tokens
(`sums`) is kept apart from what it makes of the counts (`value`): so sequences and ranks are handled here, once.

Legend: B rows, S positions, T tokens of the micro-batch (B times S), N tokens, E experts, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit import catalogue
from moekit.training.collector import Routed
from moekit.training.figures import world_size
from moekit.training.head import OutputInputs
from moekit.training.layers import TrainedLayer
from moekit.training.losses import expert_load, token_sum

KIND = "objective"
Sums = dict[str, Tensor]
Pool = Literal["micro-batch", "sequence", "ranks"]


class Objective(BaseModel, ABC):
    """One term of what training minimises.

    Attributes:
        weight: factor of the term.
        text: name of the text whose micro-batches it reads.
        needs_teacher: whether it reads a teacher's output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="factor of the term")
    text: str = Field(default="train", min_length=1, description="name of the text that it reads")

    needs_teacher: ClassVar[bool] = False

    @classmethod
    def examples(cls, experts: int) -> Sequence[Self]:
        """Settings that the generic tests try on layers of this many experts; the defaults, if they are enough."""
        return [cls()]

    def check(self, layers: Iterable[TrainedLayer]) -> None:
        """Refuse a model that it cannot work on, before training.

        Raises:
            BadConfig: naming the layer and what does not fit.
        """

    def check_partial(self, name: str) -> None:
        """Refuse a teacher of whose distribution only the likeliest tokens are known.

        Raises:
            BadConfig: naming the objective and the setting.
        """


class RouterObjective(Objective):
    """A term of every MoE layer: the layers' values are added up, those of micro-batches and ranks are averaged.

    Attributes:
        pool: over which tokens it is computed: each micro-batch, each sequence (then averaged), or the micro-batches
            of all ranks together.
    """

    pool: Pool = Field(default="micro-batch", description="tokens that are counted together")

    @abstractmethod
    def sums(self, routed: Routed) -> Sums:
        """What is counted: sums over tokens that are no padding, so that those of two halves add up.

        Index E ("no expert") counts on no expert.
        """

    @abstractmethod
    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """The term, made of the sums: a scalar in fp32, finite also where nothing was counted."""

    def loss(self, routed: Routed) -> Tensor:
        """The term of one layer for one micro-batch: a scalar, without the weight."""
        if self.pool == "sequence":
            return self._of_sequences(routed)
        sums = self.sums(routed)
        if self.pool == "ranks" and (world := world_size()) > 1:
            pooled = {name: _over_ranks(part) for name, part in sums.items()}
            value = self.value(pooled, routed.layer)
            # Each rank's gradient is that through its own tokens: they would have to be added, but are averaged.
            return world * value - (world - 1) * value.detach()
        return self.value(sums, routed.layer)

    def _of_sequences(self, routed: Routed) -> Tensor:
        values, present = [], []
        for part in routed.sequences():
            values.append(self.value(self.sums(part), routed.layer))
            present.append(
                torch.ones((), device=values[-1].device) if part.mask_T is None else part.mask_T.any().float()
            )
        there_B = torch.stack(present)
        return (torch.stack(values) * there_B).sum() / there_B.sum().clamp(min=1)


class OutputObjective(Objective):
    """A term of the model's output, in the same units as the cross-entropy: a sum over tokens by the step's tokens."""

    @abstractmethod
    def loss(self, inputs: OutputInputs) -> Tensor:
        """The term of one micro-batch: its sum over counted tokens, divided by `inputs.count`; without the weight."""


def _over_ranks(part: Tensor) -> Tensor:
    """The sum over ranks, whose gradient goes to this rank's part alone."""
    whole = part.detach().clone()
    dist.all_reduce(whole)
    return part + (whole - part.detach())


def choices_and_mass(routed: Routed) -> Sums:
    """Choices of each expert [E], gate probability of each summed over tokens [E], and tokens.

    A router part that adds choices to the experts has as many columns more.
    """
    return {
        "load_E": expert_load(routed.indices_TK, routed.logits_TE.shape[1], routed.mask_T).float(),
        "mass_E": token_sum(routed.probabilities_TE, routed.mask_T),
        "tokens": routed.tokens,
    }


def read_objectives(stated: Mapping[str, Any]) -> dict[str, Objective]:
    """Objectives from a config: name -> weight, or name -> settings.

    A name is that of an objective in the catalogue, or any other with `use: NAME` among its settings, so that one
    objective can be there twice.

    Raises:
        BadConfig: no such objective, or a setting that it does not have.
    """
    found: dict[str, Objective] = {}
    for key, value in stated.items():
        knobs = dict(value) if isinstance(value, Mapping) else {"weight": value}
        found[key] = catalogue.make(KIND, str(knobs.pop("use", key)), knobs)
    return found


def stated(terms: Mapping[str, Objective]) -> dict[str, dict[str, Any]]:
    """Objectives as a config holds them, every setting written out."""
    return {name: {"use": catalogue.of(type(t)).name, **t.model_dump(mode="json")} for name, t in terms.items()}
