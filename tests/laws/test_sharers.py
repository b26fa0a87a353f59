"""What holds for every registered sharer: it keeps to the budget, knows no expert by its number, and no seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit import catalogue
from moekit.anatomy import Geometry
from moekit.catalogue import MethodRecord
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import BitSharer, Room, Shares, WidthErrors, read_sharer
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics

LAYERS, EXPERTS, HIDDEN, WIDTH, TOKENS = 3, 6, 8, 4, 90
SIZES = {layer: 3 * HIDDEN * WIDTH for layer in range(LAYERS)}
CHOICES = (2, 3, 4)
EXAMPLES = [
    pytest.param(sharer, id=f"{record.name}-{number}")
    for record in catalogue.methods("sharer")
    for number, sharer in enumerate(record.cls.examples())
]


def drawn(layer: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(hash((layer, len(name))) % 1000 + sum(map(ord, name)))


def values(layer: int) -> dict[str, Tensor]:
    """Statistics without two equal numbers."""
    load_E = (torch.randperm(EXPERTS, generator=drawn(layer, "load")) + 1) * 4
    score_E = load_E * (0.2 + 0.6 * torch.rand(EXPERTS, generator=drawn(layer, "score")).double())
    cosine = torch.rand((), generator=drawn(layer, "cosine")).double() * TOKENS
    named = {"load": load_E, "chosen_score": score_E, "block_cosine": cosine, "block_residual_cosine": cosine / 2}
    return named | {"told_cosine": (cosine / TOKENS).reshape(1)}


def squared(layer: int) -> Tensor:
    falling = torch.rand(EXPERTS, len(CHOICES), generator=drawn(layer, "errors")).double().sort(1, descending=True)
    return falling.values * (1 + layer)


def seen(seed: int = 0, order: Sequence[int] = range(EXPERTS)) -> dict[int, LayerInputs]:
    """Each layer with its experts in this order."""
    found = {}
    for layer in range(LAYERS):
        named = {n: t[list(order)] if len(t.shape) and len(t) == EXPERTS else t for n, t in values(layer).items()}
        statistics = LayerStatistics(EXPERTS, HIDDEN, (), TOKENS, named, width=WIDTH)
        stacks = [torch.randn(EXPERTS, *size, generator=drawn(layer, str(size))) for size in ((WIDTH, HIDDEN),) * 2]
        down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=drawn(layer, "down"))
        weights = LayerWeights(stacks[0], down, stacks[1]).select(order)
        geometry = Geometry(HIDDEN, EXPERTS, 2, WIDTH, 0, True, False, False, True)
        found[layer] = LayerInputs(layer, geometry, statistics, lambda weights=weights: weights, seed)  # type: ignore[misc]
    return found


def room(mean: float, unit: Any = "expert") -> Room:
    return Room(mean, CHOICES, unit, SIZES, dict.fromkeys(SIZES, EXPERTS))


def share(sharer: BitSharer, mean: float, unit: Any = "expert", **how: Any) -> Shares:
    order = how.get("order", range(EXPERTS))
    errors = {n: WidthErrors(squared(n)[list(order)], 1.0 + n) for n in range(LAYERS)}
    return sharer.share(seen(**how), errors if sharer.measures != "nothing" else {}, room(mean, unit))


def spent(shares: Mapping[int, Sequence[int]]) -> float:
    return sum(sum(bits) for bits in shares.values()) / (LAYERS * EXPERTS)


def means(sharer: BitSharer) -> list[float]:
    return [2, 3, 4] if catalogue.of(type(sharer)).name == "uniform" else [2, 2.25, 2.5, 2.8, 3, 3.7, 4]


@pytest.mark.parametrize("sharer", EXAMPLES)
def test_the_budget_is_never_exceeded_and_nearly_spent(sharer: BitSharer) -> None:
    for unit in sharer.units:
        for mean in means(sharer):
            made = share(sharer, mean, unit)
            assert set(made) == set(range(LAYERS))
            assert all(len(bits) == EXPERTS and set(bits) <= set(CHOICES) for bits in made.values())
            # Within what one unit may take: an expert of each layer, or a whole layer.
            slack = 2 / EXPERTS if unit == "expert" else 2 / LAYERS
            assert mean - slack < spent(made) <= mean + 1e-9, (unit, mean)
            assert unit == "expert" or all(len(set(bits)) == 1 for bits in made.values())


@pytest.mark.parametrize("sharer", EXAMPLES)
def test_enough_for_all_gives_all_the_most(sharer: BitSharer) -> None:
    for unit in sharer.units:
        assert share(sharer, 4, unit) == dict.fromkeys(range(LAYERS), (4,) * EXPERTS)


@pytest.mark.parametrize("sharer", EXAMPLES)
def test_experts_are_not_known_by_their_numbers(sharer: BitSharer) -> None:
    if "stochastic" in catalogue.of(type(sharer)).traits:
        return
    order = (3, 0, 5, 1, 4, 2)
    for mean in (means(sharer)[1], means(sharer)[2]):
        plain, moved = share(sharer, mean), share(sharer, mean, order=order)
        assert moved == {n: tuple(bits[e] for e in order) for n, bits in plain.items()}, mean


@pytest.mark.parametrize("sharer", EXAMPLES)
def test_only_what_draws_lots_follows_the_seed(sharer: BitSharer) -> None:
    mean = means(sharer)[1]
    made = [share(sharer, mean, seed=seed) for seed in range(6)]
    assert made[3] == share(sharer, mean, seed=3)
    drawn = any(other != made[0] for other in made)
    assert drawn == ("stochastic" in catalogue.of(type(sharer)).traits)


@pytest.mark.parametrize("record", list(catalogue.methods("sharer")), ids=lambda r: r.name)
def test_it_is_read_from_its_name_and_settings(record: MethodRecord) -> None:
    assert read_sharer(record.name) == record.cls()
    assert read_sharer({"use": record.name, **record.cls().model_dump(mode="json")}) == record.cls()
    with pytest.raises(BadConfig, match="nonsense"):
        read_sharer({"use": record.name, "nonsense": 1})
