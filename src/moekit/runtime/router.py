"""Router parts: how a token chooses experts, in three stages that compose.

*score* parts change the logits (nudge, temperature, smoothing, recurrence), at most one *choose* part chooses by them
(top-k, C2R, top-p, a tree; without one the family's own gate does), and *limit* parts take choices back (capacity,
skipping, devices). What leaves the router are the logits that were routed by, weights and indices; index E with weight
0 means "no expert".

Legend: T tokens, H hidden, E experts, m further columns of a part's own, K choices a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.anatomy.gate import Gate
from moekit.checkpoint.names import PARTS
from moekit.errors import UnsupportedModel
from moekit.runtime.inputs import PartInputs
from moekit.runtime.losses import attach_loss
from moekit.runtime.part import RuntimePart, Slot
from moekit.runtime.slots import SlotParts
from moekit.runtime.tracker import PassTracker

Stage = Literal["score", "choose", "limit"]
# Gates [T, P] of choices of what is no expert any more: what a router part calls them in the pass, for an experts part
# that answers in their place.
UNANSWERED = "unanswered"


@dataclass(frozen=True, eq=False, kw_only=True)
class RouteInputs(PartInputs):
    """What a router part sees.

    Attributes:
        gate: the family's own gate: `selection`, `choose`, `weigh`.
        logits: [T, E], as earlier parts left them.
        hidden_TH: what the router saw.
    """

    gate: Gate
    logits: Tensor
    hidden_TH: Tensor


@dataclass(frozen=True, eq=False)
class Scored:
    """What a score part gives.

    Attributes:
        logits: [T, E].
        losses: scalars to train on, with their factors.
    """

    logits: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router gives.

    Attributes:
        weights: [T, K].
        indices: [T, K] int64; E with weight 0 is "no expert".
        logits: [T, E + m], what was routed by; None where they are the logits that were given.
        losses: scalars to train on, with their factors.
    """

    weights: Tensor
    indices: Tensor
    logits: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)


class RouterPart(RuntimePart):
    """Base of router parts; derive from one of the three stages."""

    slot: ClassVar[Slot] = "router"
    stage: ClassVar[Stage]


class ScorePart(RouterPart):
    """A part that changes the logits before anything is chosen."""

    stage: ClassVar[Stage] = "score"

    @abstractmethod
    def score(self, inputs: RouteInputs) -> Scored:
        """The logits to route by: [T, E]."""


class ChoosePart(RouterPart):
    """A part that chooses, in the place of the family's gate.

    Attributes:
        own_rows: whether, with constants, it weighs choices by rows of its own: the router's then learn nothing.
    """

    stage: ClassVar[Stage] = "choose"
    own_rows: ClassVar[bool] = False

    @abstractmethod
    def choose(self, inputs: RouteInputs) -> Routed:
        """Experts and weights of every token."""


class LimitPart(RouterPart):
    """A part that takes choices back, or moves weights, after the choice."""

    stage: ClassVar[Stage] = "limit"

    @abstractmethod
    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        """What is left of the choice."""


class RouterWithParts(nn.Module):
    """Mixin that routes through parts; combined with the stock router class when parts are attached."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits that were routed by, weights and indices."""
        answer = self.stock_forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        slot = self._modules[PARTS]
        assert isinstance(slot, SlotParts)
        return route_through(slot, answer, hidden.reshape(-1, hidden.shape[-1]), self.training)

    def stock_forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The family's own answer."""
        answer: tuple[Tensor, Tensor, Tensor] = super().forward(*args, **kwargs)
        return answer


def route_through(
    slot: SlotParts, answer: tuple[Tensor, Tensor, Tensor], hidden_TH: Tensor, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, choose, limit."""
    logits, stock_TK, _ = answer
    assert slot.gate is not None
    on_layer = slot.of_layer()
    routed: Routed | None = None
    losses: dict[str, Tensor] = {}
    first = next((on for on in on_layer if not isinstance(on.part, ScorePart)), None)
    for on in on_layer:
        if on is first and not isinstance(on.part, ChoosePart):
            routed = _plain(slot.gate, logits, answer)
        inputs = RouteInputs(gate=slot.gate, logits=logits, hidden_TH=hidden_TH, **on.common(slot.tracker))
        given: Scored | Routed
        if isinstance(on.part, ScorePart):
            given = on.part.score(inputs)
            logits = given.logits
        elif isinstance(on.part, ChoosePart):
            given = routed = on.part.choose(inputs)
        else:
            assert isinstance(on.part, LimitPart)
            assert routed is not None
            given = routed = on.part.limit(inputs, routed)
        if isinstance(given, Routed) and given.logits is not None:
            logits = given.logits
        losses |= {f"{type(on.part).__name__}.{name}": value for name, value in given.losses.items()}
    if routed is None:
        routed = _plain(slot.gate, logits, answer)
    weights_TK = routed.weights.to(stock_TK.dtype)
    if losses and training and torch.is_grad_enabled():
        weights_TK = _with_losses(slot.tracker, on_layer[0].layer, weights_TK, losses)
    return logits, weights_TK, routed.indices


def _plain(gate: Gate, logits: Tensor, answer: tuple[Tensor, Tensor, Tensor]) -> Routed:
    """The family's own choice by these logits; the router's very answer where they are its own."""
    if logits is answer[0]:
        return Routed(answer[1], answer[2])
    return Routed(*gate(logits))


def _with_losses(tracker: PassTracker | None, layer: int, weights_TK: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
    assert tracker is not None  # it came with the parts that lose
    total = torch.stack([value.float() for value in losses.values()]).sum()
    if not tracker.repeating:
        tracker.losses |= {(layer, name): value.detach() for name, value in losses.items()}
    if not total.requires_grad:
        return weights_TK
    if not weights_TK.requires_grad:
        raise UnsupportedModel(
            "the router's weights carry no gradient, so the losses of its parts cannot enter the backward pass",
            layer=layer,
            hint="train the router, or set the factor of the loss to 0",
        )
    return attach_loss(weights_TK, total * tracker.share)


def with_top_k(gate: Gate, top_k: int | None) -> Gate:
    """The family's gate with another K; itself for None."""
    return gate if top_k is None else Gate(replace(gate.spec, top_k=top_k), gate.router)
