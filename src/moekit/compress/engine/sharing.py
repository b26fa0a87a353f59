"""What shares a mean number of bits among experts, whatever rounds their weights.

A sharer says which expert gets how many of the bits that a budget allows; what becomes of its weights at that width is
the business of a `QuantizeMethod`. `RankedSharer` gives most to those that are worth most; `CostSharer` weighs what
each width of each expert costs, and takes the share that costs least.

Legend: E experts, C widths, ascending.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit import catalogue
from moekit.compress.budget.allocate import allocate
from moekit.compress.budget.bits import Unit
from moekit.compress.budget.widths import LayerCurve, layer_shares, model_shares, ranked_shares
from moekit.compress.engine.block_pairs import Compared
from moekit.compress.engine.inputs import LayerInputs
from moekit.errors import BadConfig, NumericFault

KIND = "sharer"
Scope = Literal["layer", "model"]
# What must be measured of each expert at each width: nothing, its error in the block's output, or its part in the loss.
Measures = Literal["nothing", "errors", "loss"]
Shares = dict[int, tuple[int, ...]]


@dataclass(frozen=True)
class Room:
    """What is to be shared.

    Attributes:
        mean: bits a weight, at most.
        choices: widths, ascending.
        unit: what has one width.
        sizes: decoder layer -> weights of one expert.
        experts: decoder layer -> E.
    """

    mean: float
    choices: tuple[int, ...]
    unit: Unit
    sizes: Mapping[int, int]
    experts: Mapping[int, int]

    def of_layer(self, layer: int) -> int:
        """Bits of one weight of each expert of a layer together, where each layer has the mean."""
        return int(self.mean * self.experts[layer] + 1e-9)

    @property
    def of_model(self) -> int:
        """Bits of all weights together."""
        return int(self.mean * sum(self.sizes[n] * self.experts[n] for n in self.sizes) + 1e-6)


@dataclass(frozen=True, eq=False)
class WidthErrors:
    """What rounding one expert does, all others as they are, measured on the text.

    Attributes:
        squared_EC: sum over tokens of the squared change of the block's output, each channel weighed by the squared
            gradient of the loss there where the sharer measures that; fp64. It never rises with the width.
        energy: sum over experts and tokens of the squared output of the expert, as it is added to the block's.
    """

    squared_EC: Tensor
    energy: float


class BitSharer(BaseModel, ABC):
    """Base of all sharers; fields are the sharer's knobs.

    Attributes:
        units: what may have one width.
        measures: what must be measured of widths.
        reads_weights: it looks at `inputs.weights`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    units: ClassVar[tuple[Unit, ...]] = ("expert", "layer")
    measures: ClassVar[Measures] = "nothing"
    reads_weights: ClassVar[bool] = False

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Settings that the generic tests try."""
        return [cls()]

    @property
    def required(self) -> tuple[str, ...]:
        """Statistics that it needs with these knobs; those of its record by default."""
        return catalogue.of(type(self)).needs

    @property
    def needs_text(self) -> bool:
        """Whether it decides from a text."""
        return bool(self.required) or self.measures != "nothing"

    @property
    def looks_at(self) -> tuple[Compared, int] | None:
        """What `finds` is given, and of how many tokens at most; None where it is not asked."""
        return None

    def finds(self, given_NH: Tensor, cosine_N: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
        """What it finds of a layer whose block is given this, with these cosines of that and what it gives.

        It is kept beside the layer's statistics, under names that are none of theirs.
        """
        return {}

    def means(self, mean: float, choices: Sequence[int]) -> tuple[float, ...]:
        """The mean of each round; after the first, everything is measured again on the model that the last one gave.

        Args:
            mean: that is asked for; the last round's.
            choices: widths, ascending.

        Raises:
            BadConfig: a round would have a mean that no share has.
        """
        return (mean,)

    @abstractmethod
    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Bits of each expert of each layer.

        Args:
            seen: each layer with the statistics that the sharer needs.
            errors: of each layer, where the sharer measures them.
            room: what is to be shared.

        Raises:
            BadConfig: it cannot be shared so.
        """


class RankedSharer(BitSharer):
    """Those that are worth most get the largest width, the others the smallest; one in between takes what is left."""

    scope: Scope = Field(default="layer", description="budget of each layer by itself, or of the whole model")

    @abstractmethod
    def worth(self, seen: LayerInputs) -> Tensor:
        """What each expert of a layer is worth, [E], more is better; ties go to the lower layer and expert."""

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Down the ranks, of each layer or of all of them, until the bits are given out."""
        worth = {layer: _finite(self.worth(seen[layer]).double(), layer) for layer in seen}
        if room.unit == "layer":
            return by_layer(room, ranked_layers(room, [float(worth[layer].mean()) for layer in seen], list(seen)))
        if self.scope == "layer":
            return {
                n: tuple(ranked_shares(_order(worth[n]), [1] * len(worth[n]), room.choices, room.of_layer(n)))
                for n in seen
            }
        sizes = [room.sizes[n] for n in seen for _ in range(room.experts[n])]
        order = _order(torch.cat([worth[n] for n in seen]))
        return dealt_out(ranked_shares(order, sizes, room.choices, room.of_model), room)


class CostSharer(BitSharer):
    """The share that costs least."""

    scope: Scope = Field(default="model", description="budget of each layer by itself, or of the whole model")
    spread: bool = Field(default=False, description="at least one expert of a layer at each of the two largest widths")
    rounding: Literal["method", "nearest"] = Field(
        default="method",
        description="errors are those of the method that rounds, or of plain rounding, which is quicker",
    )

    @abstractmethod
    def costs(self, seen: LayerInputs, errors: WidthErrors, room: Room) -> Tensor:
        """Cost of each expert at each width, [E, C], not negative."""

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """Exactly within a layer; over the model exactly where a table of it can be filled, else nearly so."""
        costs = {n: _finite(self.costs(seen[n], errors[n], room).double().cpu(), n).numpy() for n in seen}
        if room.unit == "layer":
            sizes = [room.sizes[n] * room.experts[n] for n in seen]
            whole = np.stack([costs[n].sum(0) for n in seen])
            return by_layer(room, model_shares(whole, sizes, room.choices, room.of_model))
        if self.scope == "layer":
            return {n: layer_shares(costs[n], room.choices, room.of_layer(n), spread=self.spread) for n in seen}
        if self.spread and (ruled := _spread_over_model(costs, room)) is not None:
            return ruled
        sizes = [room.sizes[n] for n in seen for _ in range(room.experts[n])]
        return dealt_out(model_shares(np.concatenate(list(costs.values())), sizes, room.choices, room.of_model), room)


def _spread_over_model(costs: Mapping[int, Any], room: Room) -> Shares | None:
    """Each layer's least cost for every number of bits, and over all layers the numbers that cost least together.

    Returns:
        None where the rule cannot be followed in every layer, or there is enough for all to have the largest width.
    """
    if room.mean >= room.choices[-1]:
        return None
    curves = {n: LayerCurve(costs[n], room.choices, spread=True) for n in costs}
    fewest = {n: room.experts[n] * room.choices[0] for n in costs}
    cost = {n: curves[n].costs(strict=True).tolist() for n in costs}
    sizes = {n: [room.sizes[n] * (fewest[n] + s) for s in range(len(cost[n]))] for n in costs}
    try:
        taken = allocate(cost, sizes, room.of_model)
    except BadConfig:
        return None
    return {n: curves[n].shares(fewest[n] + taken[n], strict=True) for n in costs}


def ranked_layers(room: Room, worth: Sequence[float], layers: Sequence[int]) -> list[int]:
    """Bits of each layer, those worth most first; ties go to the lower layer."""
    sizes = [room.sizes[n] * room.experts[n] for n in layers]
    for layer, value in zip(layers, worth, strict=True):
        _finite(torch.tensor(value), layer)
    return ranked_shares(_order(torch.tensor(worth)), sizes, room.choices, room.of_model)


def by_layer(room: Room, bits: Sequence[int]) -> Shares:
    """The same bits for all experts of a layer."""
    return {layer: (n,) * room.experts[layer] for layer, n in zip(room.sizes, bits, strict=True)}


def dealt_out(bits: Sequence[int], room: Room) -> Shares:
    """Bits of all experts of all layers, one after the other, by layer."""
    found, start = Shares(), 0
    for layer in room.sizes:
        found[layer] = tuple(bits[start : start + room.experts[layer]])
        start += room.experts[layer]
    return found


def _order(worth: Tensor) -> list[int]:
    order: list[int] = worth.argsort(descending=True, stable=True).tolist()
    return order


def _finite(values: Tensor, layer: int) -> Tensor:
    if not bool(values.isfinite().all()):
        raise NumericFault(
            "what bits are shared by is not finite", layer=layer, hint="look at the weights: `moekit check`"
        )
    return values


def read_sharer(stated: str | Mapping[str, Any]) -> BitSharer:
    """A sharer from a config: its name, or its settings with `use: NAME`.

    Raises:
        BadConfig: no such sharer, or a setting that it does not have.
    """
    knobs = {"use": stated} if isinstance(stated, str) else dict(stated)
    name = knobs.pop("use", None)
    if not isinstance(name, str):
        raise BadConfig("what shares the bits has no name", hint="share: pmq, or share: {use: pmq, gamma: 1.5}")
    made: BitSharer = catalogue.make(KIND, name, knobs)
    return made
