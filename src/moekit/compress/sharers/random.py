"""Bits by lot: what a share that looks at anything must beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field

from moekit.catalogue import register
from moekit.compress.budget.widths import stepped_shares
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, BitSharer, Room, Scope, Shares, WidthErrors, by_layer, dealt_out


@register(name="random", kind=KIND, changes="weights", traits=("stochastic",))
class Random(BitSharer):
    """Experts are raised by one width at a time, drawn by lot, until the bits are given out.

    Other seeds give other shares. Choose it as the baseline of sharers that measure something.
    """

    scope: Scope = Field(default="layer", description="budget of each layer by itself, or of the whole model")

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """By lot, within each layer or over all of them."""
        steps, first = len(room.choices) - 1, next(iter(seen.values()))
        if room.unit == "layer":
            sizes = [room.sizes[n] * room.experts[n] for n in seen]
            return by_layer(room, stepped_shares(_lot(first, len(sizes), steps), sizes, room.choices, room.of_model))
        if self.scope == "model":
            sizes = [room.sizes[n] for n in seen for _ in range(room.experts[n])]
            return dealt_out(stepped_shares(_lot(first, len(sizes), steps), sizes, room.choices, room.of_model), room)
        return {
            n: tuple(stepped_shares(_lot(own, own.experts, steps), [1] * own.experts, room.choices, room.of_layer(n)))
            for n, own in seen.items()
        }


def _lot(seen: LayerInputs, units: int, steps: int) -> list[int]:
    """Units in the order in which they are raised, each as often as it can be."""
    order = torch.randperm(units * steps, generator=seen.generator("bits"))
    drawn: list[int] = (order % units).tolist()
    return drawn
