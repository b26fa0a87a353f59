"""Carry a recipe out on a layer's weights, with the methods that the library has for each kind.

Legend: E experts, M experts that stay, I expert width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from moekit import catalogue
from moekit.compress.engine.dropping import FewerMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.engine.outcome import PARTS, LayerOutcome, Widths
from moekit.compress.engine.plan import make_method
from moekit.compress.engine.quantizing import QuantizeMethod
from moekit.compress.joint.neurons import NeuronStore
from moekit.compress.joint.recipe import LayerRecipe
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.trace.statistics import LayerStatistics


@dataclass(frozen=True)
class Composer:
    """The methods of each kind, and how they follow one another.

    Attributes:
        drop: decides which experts stay; its transform makes their weights.
        merge: decides which experts become one.
        narrow: decides which neurons of each expert stay, and repairs what is left of it.
        rounding: rounds weights; it must not measure the layer, which is another one by then.
        neurons: what was seen of them; None until the text has passed.
    """

    drop: FewerMethod
    merge: FewerMethod
    narrow: SlimMethod
    rounding: QuantizeMethod
    neurons: NeuronStore | None = None

    @property
    def required(self) -> tuple[str, ...]:
        """Statistics that the recipes need."""
        return tuple(dict.fromkeys(("load", *self.drop.required, *self.merge.required)))

    @property
    def told(self) -> dict[str, Any]:
        """Names and knobs of the methods, for tables and records."""
        named: dict[str, WeightMethod[Any, Any]] = {
            "drop": self.drop,
            "merge": self.merge,
            "narrow": self.narrow,
            "bits": self.rounding,
        }
        return {
            way: {"method": catalogue.of(type(method)).name, "settings": method.model_dump(mode="json")}
            for way, method in named.items()
        }

    def outcome(self, recipe: LayerRecipe, inputs: LayerInputs) -> LayerOutcome:
        """What becomes of a layer, decided by the methods.

        Args:
            recipe: for it.
            inputs: of the layer as it is, with `required`.

        """
        outcome = self._fewer(recipe, inputs)
        bits: Widths = {}
        if recipe.bits is not None:
            parts = PARTS if inputs.geometry.has_gate else tuple(p for p in PARTS if p != "gate")
            bits = {part: (recipe.bits,) * outcome.experts for part in parts}
        return outcome.model_copy(update={"width": recipe.width, "bits": bits})

    def _fewer(self, recipe: LayerRecipe, inputs: LayerInputs) -> LayerOutcome:
        method = self._method(recipe)
        if method is None or recipe.keep is None:
            return LayerOutcome(keep=tuple(range(inputs.experts)))
        return method.decide(inputs, method.worth(inputs), recipe.keep)

    def _method(self, recipe: LayerRecipe) -> FewerMethod | None:
        return {"": None, "drop": self.drop, "merge": self.merge}[recipe.way]

    @torch.no_grad()
    def weights(
        self, recipe: LayerRecipe, outcome: LayerOutcome, weights: LayerWeights, inputs: LayerInputs
    ) -> LayerWeights:
        """New weights of a layer.

        Args:
            recipe: for it.
            outcome: what `outcome` said of it.
            weights: of the layer as it is.
            inputs: likewise, with `required`.
        """
        return self.finished(recipe, outcome, self.fewer(recipe, outcome, weights, inputs), inputs)

    @torch.no_grad()
    def fewer(
        self, recipe: LayerRecipe, outcome: LayerOutcome, weights: LayerWeights, inputs: LayerInputs
    ) -> LayerWeights:
        """The first step of `weights`, the same for all recipes that keep as many experts in the same way."""
        method = self._method(recipe)
        if method is None:
            return weights
        return method.transform(weights, outcome.model_copy(update={"width": None, "bits": {}}), inputs)

    @torch.no_grad()
    def finished(
        self, recipe: LayerRecipe, outcome: LayerOutcome, made: LayerWeights, inputs: LayerInputs
    ) -> LayerWeights:
        """The other steps of `weights`: narrower, then rounded.

        Args:
            recipe: for the layer.
            outcome: what `outcome` said of it.
            made: what `fewer` gave.
            inputs: of the layer as it is.
        """
        if recipe.width is not None:
            if self.neurons is None:
                raise LookupError("nothing was seen of the neurons: see_neurons goes first")
            narrower = LayerOutcome(keep=tuple(range(made.experts)), width=recipe.width)
            made = self.narrow.transform(made, narrower, self.neurons.standing(inputs, outcome.keep))
        if recipe.bits is None:
            return made
        # The layer that is rounded is the new one; nothing was measured of it.
        geometry = dataclasses.replace(inputs.geometry, experts=made.experts, width=made.width)
        nothing = LayerStatistics(made.experts, made.hidden, width=made.width)
        return self.rounding.transform(made, outcome, LayerInputs(inputs.layer, geometry, nothing, seed=inputs.seed))


def composer(
    drop: str, merge: str, narrow: str, rounding: str, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Composer:
    """Methods by their names.

    Args:
        drop: pruning method.
        merge: merging method.
        narrow: slimming method.
        rounding: quantizing method.
        settings: "drop", "merge", "narrow" or "bits" -> knobs.

    Raises:
        BadConfig: unknown methods or knobs, one that statistics of the model as it is do not suffice for, or one that
            goes on routing among the experts as they were.
    """
    knobs = settings or {}
    unknown = sorted(set(knobs) - {"drop", "merge", "narrow", "bits"})
    if unknown:
        raise BadConfig(
            f"there are no methods of {unknown[0]!r} here", hint="give knobs of drop, merge, narrow or bits"
        )
    made = Composer(
        cast(FewerMethod, make_method("prune", drop, knobs.get("drop", {}))),
        cast(FewerMethod, make_method("merge", merge, knobs.get("merge", {}))),
        cast(SlimMethod, make_method("slim", narrow, knobs.get("narrow", {}))),
        cast(QuantizeMethod, make_method("quantize", rounding, knobs.get("bits", {}))),
    )
    for way, name, method in (("drop", drop, made.drop), ("merge", merge, made.merge)):
        if method.redirects:
            knob = "{router: representative}" if way == "merge" else "{operator: drop}"
            raise BadConfig(
                f"{name} leaves the router as it is, whose bytes are not planned for",
                hint=f"let the router choose among the experts that stay (--set {way}='{knob}')",
            )
        if method.passes in ("search", "sequential"):
            raise BadConfig(
                f"{name} runs the layers again for each thing it tries, and here every layer is tried in many ways",
                hint="choose a method that decides from statistics, such as reap (drop) or hc-smoe (merge)",
            )
    if made.narrow.asks_teacher or made.narrow.kept_parts:
        what = "by a teacher" if made.narrow.asks_teacher else "shared experts or attention"
        raise BadConfig(
            f"{narrow} is to narrow {what}, and here layers are measured by their own text, routed experts alone",
            hint="leave a teacher, shared experts and groups out, or narrow first (moekit slim)",
        )
    if made.rounding.required:
        raise BadConfig(
            f"{rounding} measures the very layer that it rounds, and here layers are only tried",
            hint="choose rtn; when the plan is known, moekit quantize rounds with any method",
        )
    return made
