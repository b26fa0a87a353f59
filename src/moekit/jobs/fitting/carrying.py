"""Carry a plan out: outcomes of all layers, and the function that makes their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moekit.compress.engine.inputs import InputsByLayer
from moekit.compress.engine.measuring import weights_reader
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.joint.composing import Composer
from moekit.compress.joint.planning import JointPlan
from moekit.compress.joint.recipe import LayerRecipe
from moekit.compress.weights import LayerWeights
from moekit.evaluation.changes import Rewrite, Variant
from moekit.jobs.shared.opened import OpenedModel
from moekit.trace.statistics import LayerStatistics


@dataclass
class Carrier:
    """Turns plans into outcomes and weights; what a recipe means for a layer is decided once.

    Attributes:
        source: the model.
        composer: the methods.
        statistics: decoder layer -> what they decide from.
        seed: of random methods.
    """

    source: OpenedModel
    composer: Composer
    statistics: Mapping[int, LayerStatistics]
    seed: int
    _known: dict[tuple[int, LayerRecipe], LayerOutcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reads = self.composer.drop.reads_weights or self.composer.merge.reads_weights
        reader = weights_reader(self.source.checkpoint) if reads else None
        self.inputs = InputsByLayer(self.source.geometries, self.statistics, reader, self.seed)

    def outcomes(self, plan: JointPlan) -> dict[int, LayerOutcome]:
        """Decoder layer -> what becomes of it."""
        return {layer: self._outcome(layer, recipe) for layer, recipe in plan.recipes.items()}

    def _outcome(self, layer: int, recipe: LayerRecipe) -> LayerOutcome:
        if (layer, recipe) not in self._known:
            self._known[layer, recipe] = self.composer.outcome(recipe, self.inputs[layer])
        return self._known[layer, recipe]

    def rewrite(self, plan: JointPlan) -> Rewrite | None:
        """What makes a layer's weights; None where experts are only left out, which copies bytes."""
        dropped = any(recipe.way == "drop" for recipe in plan.recipes.values()) and self.composer.drop.rewrites
        if not dropped and not any(outcome.rewrites for outcome in self.outcomes(plan).values()):
            return None
        recipes = plan.recipes

        def made(layer: int, weights: LayerWeights) -> LayerWeights:
            recipe, outcome = recipes[layer], self._outcome(layer, recipes[layer])
            if recipe.unchanged:
                return weights.select(outcome.keep)
            return self.composer.weights(recipe, outcome, weights, self.inputs[layer])

        return made

    def variant(self, plan: JointPlan) -> Variant:
        """The plan as a change that can be measured."""
        return Variant(plan.name, self.outcomes(plan), self.rewrite(plan))
