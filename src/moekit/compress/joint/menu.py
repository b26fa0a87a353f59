"""Which recipes are worth measuring for a budget: few, since each costs a run of the block on the whole text.

On it are what single kinds alone make of the budget, so that no plan is worse than they are; every pairing of width and
bits with the experts that it leaves room for; and a coarse grid beside, from which layers may take more or less than
their share.

Legend: E experts, I expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moekit.compress.joint.profiles import Profile
from moekit.compress.joint.recipe import AS_IT_IS, LayerRecipe, Way
from moekit.compress.joint.sizes import ModelSizes

# Bytes over the budget's share of a layer, or under it, beyond which a recipe of the grid is left out.
_FAR = 4.0
_WAYS: tuple[Way, ...] = ("drop", "merge")


@dataclass(frozen=True)
class MenuKnobs:
    """What a menu is made from.

    Attributes:
        experts: fractions of the experts that stay, below 1; none keeps all of them.
        widths: fractions of their neurons, below 1.
        bits: of a weight; None for all that the engine's files hold.
        ways: how experts go.
        most: recipes of a layer.
    """

    experts: tuple[float, ...] = (0.75, 0.5)
    widths: tuple[float, ...] = (0.75, 0.5)
    bits: tuple[int, ...] | None = None
    ways: tuple[Way, ...] = _WAYS
    most: int = 24


@dataclass(frozen=True)
class Menu:
    """Recipes for a budget.

    Attributes:
        recipes: for layers of the most experts; others take what fits them.
        singles: of each kind alone, what it makes of the budget with one recipe in all layers, by name.
    """

    recipes: tuple[LayerRecipe, ...]
    singles: dict[str, LayerRecipe]

    def of(self, experts: int, width: int) -> tuple[LayerRecipe, ...]:
        """For a layer of this size."""
        return tuple(dict.fromkeys(recipe.fitted(experts, width) for recipe in self.recipes))


def width_step(width: int) -> int:
    """Neurons by which widths go: an eighth at most where that leaves 8, whose rows grouped kernels still align."""
    return next((step for step in (128, 64, 32, 16) if step * 8 <= width and width % step == 0), 8)


def widths_of(width: int, fractions: Sequence[float]) -> list[int]:
    """Widths of a menu, descending, whole steps."""
    step = width_step(width)
    found = {max(step, round(width * fraction / step) * step) for fraction in fractions}
    return sorted((w for w in found if w < width), reverse=True)


def bits_of(sizes: ModelSizes, profile: Profile, knobs: MenuKnobs) -> list[int]:
    """Bits on a menu, descending."""
    hidden = min(geometry.hidden for geometry in sizes.geometries.values())
    widths = [sizes.width or min(g.width for g in sizes.geometries.values())]
    widths += widths_of(sizes.width, knobs.widths)
    held = set.intersection(*(set(profile.bits_of(hidden, width)) for width in widths))
    return sorted(held if knobs.bits is None else held & set(knobs.bits), reverse=True)


def make_menu(sizes: ModelSizes, profile: Profile, budget: int, knobs: MenuKnobs) -> Menu:
    """The recipes for a budget.

    Args:
        sizes: of the model.
        profile: of the engine.
        budget: bytes that the engine's files may take.
        knobs: what it is made from.
    """
    widths: list[int | None] = [None, *widths_of(sizes.width, knobs.widths)]
    bits: list[int | None] = [None, *bits_of(sizes, profile, knobs)]
    singles = _singles(sizes, profile, budget, knobs, [b for b in bits if b is not None])
    anchors = [
        recipe for width in widths for b in bits for recipe in _anchored(sizes, profile, budget, knobs, width, b)
    ]
    counts = [None, *sorted({max(sizes.top_k, round(sizes.experts * f)) for f in knobs.experts})]
    grid = [recipe for n in counts for width in widths for b in bits for recipe in _ways(sizes, knobs, n, width, b)]
    share = max(1, budget - sizes.constant)
    held = [recipe for recipe in dict.fromkeys([*anchors, *grid]) if sizes.holds(recipe)]
    distance = {r: abs(math.log(max(1, sizes.total(r, profile) - sizes.constant) / share)) for r in held}
    near = sorted((r for r in held if distance[r] <= math.log(_FAR)), key=lambda r: (distance[r], r.kinds, str(r)))
    first = [AS_IT_IS, *singles.values(), _smallest(sizes, profile, knobs, widths, bits)]
    return Menu(tuple(dict.fromkeys([*first, *near]))[: max(knobs.most, len(first))], singles)


def _smallest(
    sizes: ModelSizes, profile: Profile, knobs: MenuKnobs, widths: Sequence[int | None], bits: Sequence[int | None]
) -> LayerRecipe:
    """The recipe that takes least of all that the knobs allow: what no plan can go below, whatever the budget."""
    count = sizes.top_k if knobs.experts else None
    tried = [r for width in widths for b in bits for r in _ways(sizes, knobs, count, width, b)]
    held = [recipe for recipe in tried if sizes.holds(recipe)]
    return min(held, key=lambda r: sizes.total(r, profile), default=AS_IT_IS)


def _ways(
    sizes: ModelSizes, knobs: MenuKnobs, count: int | None, width: int | None, bits: int | None
) -> Iterator[LayerRecipe]:
    if count is None or count >= sizes.experts:
        yield LayerRecipe(width=width, bits=bits)
        return
    for way in knobs.ways:
        yield LayerRecipe(keep=count, way=way, width=width, bits=bits)


def _anchored(
    sizes: ModelSizes, profile: Profile, budget: int, knobs: MenuKnobs, width: int | None, bits: int | None
) -> list[LayerRecipe]:
    """With as many experts in all layers as the budget holds at this width and these bits."""
    if not knobs.experts:
        return [LayerRecipe(width=width, bits=bits)]
    count = most_experts(sizes, profile, budget, width, bits)
    return [] if count < sizes.top_k else list(_ways(sizes, knobs, count, width, bits))


def most_experts(sizes: ModelSizes, profile: Profile, budget: int, width: int | None, bits: int | None) -> int:
    """Experts that every layer may keep within a budget, at a width and bits; 0 where that is fewer than choices."""
    low, high = sizes.top_k - 1, sizes.experts
    while low < high:
        count = (low + high + 1) // 2
        recipe = LayerRecipe(
            keep=count if count < sizes.experts else None,
            way="drop" if count < sizes.experts else "",
            width=width,
            bits=bits,
        )
        if sizes.holds(recipe) and sizes.total(recipe, profile) <= budget:
            low = count
        else:
            high = count - 1
    return low if low >= sizes.top_k else 0


def _singles(
    sizes: ModelSizes, profile: Profile, budget: int, knobs: MenuKnobs, bits: Sequence[int]
) -> dict[str, LayerRecipe]:
    """What each kind alone makes of the budget; kinds that cannot meet it are left out."""
    found: dict[str, LayerRecipe] = {}
    count = most_experts(sizes, profile, budget, None, None)
    if knobs.experts and sizes.top_k <= count < sizes.experts:
        found |= {f"{way} alone": LayerRecipe(keep=count, way=way) for way in knobs.ways}
    step = width_step(sizes.width)
    whole = (sizes.width - 1) // step * step if knobs.widths else 0
    narrower = [LayerRecipe(width=w) for w in range(whole, 0, -step)]
    fewer = [LayerRecipe(bits=b) for b in bits]
    for name, recipes in (("width alone", narrower), ("bits alone", fewer)):
        fitting = (r for r in recipes if sizes.holds(r) and sizes.total(r, profile) <= budget)
        recipe = next(fitting, None)
        if recipe is not None:
            found[name] = recipe
    return found if sizes.full() > budget else {}
