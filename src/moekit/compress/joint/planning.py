"""From costs to plans: the best one of a budget under an engine's rules, others near it, and the front over budgets.

What all layers must have in common (one width, for most engines one number of experts) is gone through value by value;
under each, every layer takes a recipe of its own by the knapsack.

Legend: L layers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from moekit.compress.joint.costs import CostRow, CostTable
from moekit.compress.joint.knapsack import STEPS, solve
from moekit.compress.joint.profiles import Profile
from moekit.compress.joint.recipe import LayerRecipe
from moekit.compress.joint.sizes import ModelSizes
from moekit.errors import BadConfig

# Steps of a budget for plans that need not be the very best of theirs.
_COARSE = 4_000
# Spread of the random factor, as a power of e, by which costs are multiplied for random plans.
_NOISE = 2.0


class LayerShare(BaseModel):
    """What a plan gives one layer.

    Attributes:
        recipe: what is done to it.
        stored: bytes of its experts and router in the folder.
        counted: bytes that the budget counts, packed where the engine's files hold its bits.
        cost: predicted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: LayerRecipe
    stored: int
    counted: int
    cost: float


class JointPlan(BaseModel):
    """A recipe for every layer.

    Attributes:
        name: what to call it.
        layers: decoder layer -> its share.
        stored: bytes of the folder's weight files.
        counted: bytes that the budget counts.
        cost: predicted, of all layers.
        bound: no plan under the same common width and number of experts costs less; None where none was solved for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    layers: dict[int, LayerShare]
    stored: int
    counted: int
    cost: float
    bound: float | None = None

    @property
    def recipes(self) -> dict[int, LayerRecipe]:
        """Decoder layer -> recipe."""
        return {layer: share.recipe for layer, share in self.layers.items()}

    @property
    def hash(self) -> str:
        """sha256 over the recipes."""
        told = {layer: recipe.model_dump(mode="json") for layer, recipe in self.recipes.items()}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def told(self) -> str:
        """What is done, in a line: every recipe with the number of its layers."""
        counts: dict[str, int] = {}
        for recipe in self.recipes.values():
            counts[str(recipe)] = counts.get(str(recipe), 0) + 1
        if len(counts) == 1:
            return next(iter(counts))
        return "; ".join(f"{n} layers {what}" for what, n in sorted(counts.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Planner:
    """Costs, bytes and rules.

    Attributes:
        table: costs of recipes.
        sizes: of the model.
        profile: of the engine.
        even: whether all layers keep equally many experts, by the engine's rule or the router's.
    """

    table: CostTable
    sizes: ModelSizes
    profile: Profile
    even: bool

    def plans(self, budget: int, steps: int = STEPS) -> list[JointPlan]:
        """The best plan under each common width and number of experts, cheapest first.

        Args:
            budget: bytes that the engine's files may take.
            steps: that it is cut into.

        Raises:
            BadConfig: no plan fits; names the least budget that does.
        """
        found: dict[str, JointPlan] = {}
        least: list[int] = []
        for rows in self._groups():
            least.append(self._least(rows))
            if least[-1] <= budget:
                plan = self._solved(rows, budget, None, steps)
                found.setdefault(plan.hash, plan)
        if not found:
            raise BadConfig(
                f"{budget:,} bytes do not hold the model however its experts are compressed "
                f"({self.sizes.constant:,} of them are no routed experts)",
                hint=f"allow at least {min(least):,} bytes, or give it smaller choices (--experts, --widths, --bits)",
            )
        ordered = sorted(found.values(), key=lambda plan: (plan.cost, plan.counted))
        return [plan.model_copy(update={"name": f"plan {n}"}) for n, plan in enumerate(ordered, 1)]

    def random(self, budget: int, count: int, seed: int) -> list[JointPlan]:
        """Plans of the same budget whose costs were multiplied by chance before they were solved for, all different."""
        found: dict[str, JointPlan] = {}
        draw = random.Random(seed)
        groups = [rows for rows in self._groups() if self._least(rows) <= budget]
        # A little on top of every cost, so that to keep a layer as it is is not always the cheapest.
        floor = max((self.table.cost(row) for row in self.table.rows), default=0.0) / 100
        for _ in range(4 * count):
            if len(found) == count:
                break
            factors = {(row.layer, row.recipe): draw.lognormvariate(0, _NOISE) for row in self.table.rows}

            def weigh(row: CostRow, factors: Mapping[Any, float] = factors) -> float:
                return (self.table.cost(row) + floor) * factors[row.layer, row.recipe]

            plan = self._solved(groups[draw.randrange(len(groups))], budget, weigh, _COARSE)
            found.setdefault(plan.hash, plan)
        return [plan.model_copy(update={"name": f"random {n}"}) for n, plan in enumerate(found.values())]

    def uniform(self, name: str, recipe: LayerRecipe) -> JointPlan:
        """One recipe in all layers."""
        known = self.table.by_recipe
        rows = {n: known[n, recipe.fitted(g.experts, g.width)] for n, g in self.sizes.geometries.items()}
        return self._plan(name, rows, None)

    def front(self, points: int) -> list[JointPlan]:
        """Plans over budgets from the least to the full size, each cheaper than all smaller ones."""
        least, full = min(self._least(rows) for rows in self._groups()), self.sizes.full()
        found: list[JointPlan] = []
        for number in range(points):
            budget = least + (full - least) * number // max(1, points - 1)
            plan = self.plans(budget, _COARSE)[0]
            if not found or plan.cost < found[-1].cost:
                found.append(plan)
        return found

    def _groups(self) -> Iterator[dict[int, list[CostRow]]]:
        """Layer -> rows that it may take, for each width and number of experts that all layers may have in common."""
        most, geometries = self.sizes.experts, self.sizes.geometries
        common = {row.recipe.width for row in self.table.rows}
        counts = {row.recipe.keep or most for row in self.table.rows} if self.even else {0}
        for width in sorted(common, key=lambda w: -(w or most << 20)):
            for count in sorted(counts, reverse=True):
                rows: dict[int, list[CostRow]] = {layer: [] for layer in geometries}
                for row in self.table.rows:
                    experts = geometries[row.layer].experts
                    fits = not self.even or row.recipe.experts(experts) == min(count, experts)
                    if row.recipe.width == width and fits and self._packs(row):
                        rows[row.layer].append(row)
                if all(rows.values()):
                    yield rows

    def _packs(self, row: CostRow) -> bool:
        """Whether the engine's files hold a row's bits; a table may hold rows of another engine."""
        return row.recipe.bits is None or row.recipe.bits in self.profile.bits

    def _counted(self, row: CostRow) -> int:
        return self.sizes.counted(self.sizes.of(row.recipe, row.layer), row.recipe.bits, self.profile)

    def _least(self, rows: Mapping[int, Sequence[CostRow]]) -> int:
        return self.sizes.constant + sum(min(map(self._counted, some)) for some in rows.values())

    def _solved(
        self, rows: Mapping[int, Sequence[CostRow]], budget: int, weigh: Callable[[CostRow], float] | None, steps: int
    ) -> JointPlan:
        """A plan by the table's costs, or by others; costs that are told are the table's."""
        priced = weigh or self.table.cost
        share = solve(
            {layer: [priced(row) for row in some] for layer, some in rows.items()},
            {layer: [self._counted(row) for row in some] for layer, some in rows.items()},
            budget - self.sizes.constant,
            steps=steps,
        )
        taken = {layer: some[share.chosen[layer]] for layer, some in rows.items()}
        return self._plan("", taken, share.bound if weigh is None else None)

    def _plan(self, name: str, rows: Mapping[int, CostRow], bound: float | None) -> JointPlan:
        layers = {
            layer: LayerShare(
                recipe=row.recipe,
                stored=self.sizes.of(row.recipe, layer).stored,
                counted=self._counted(row),
                cost=self.table.cost(row),
            )
            for layer, row in sorted(rows.items())
        }
        return JointPlan(
            name=name,
            layers=layers,
            stored=self.sizes.constant + sum(share.stored for share in layers.values()),
            counted=self.sizes.constant + sum(share.counted for share in layers.values()),
            cost=sum(share.cost for share in layers.values()),
            bound=bound,
        )
