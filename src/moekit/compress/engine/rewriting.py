"""From a plan to the function that makes the new weights of each layer.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sparsity import Count, count_zeros
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.made_layers import read_layer, write_layer
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.weights import LayerWeights
from moekit.errors import UnsupportedModel


class PlannedRewrite:
    """Makes a layer's new weights as a plan says, and keeps the figures that the method tells of them.

    Called with a decoder layer and the weights of all its experts, it gives those of what stays, in the order of the
    outcome. Layers that stay as they are come back as they are; those that were made as the text stood at them are read
    from where they are kept.

    Args:
        plan: whose method rewrites.
        geometries: decoder layer -> sizes.
        folder: where finished layers are kept, so that work done once is not done again, also after an interruption;
            None keeps nothing.

    Attributes:
        figures: decoder layer -> what the method tells of its rewriting, by name; empty where it tells nothing.
        counts: decoder layer -> zeros counted in what was made of it last, where zeros were asked for.
    """

    def __init__(self, plan: WeightPlan, geometries: dict[int, Geometry], folder: Path | None = None) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.counts: dict[int, Count] = {}
        self._plan = plan
        self._method = plan.method
        self._outcomes = plan.outcomes
        self._geometries = geometries
        self._folder = folder

    def __call__(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """New weights of one layer."""
        outcome = self._outcomes[layer]
        made = self._made(layer, outcome, weights)
        if outcome.sparsity is not None:
            self.counts[layer] = count_zeros(made)
        return made

    @property
    def outcomes(self) -> dict[int, LayerOutcome]:
        """Decoder layer -> what becomes of it."""
        return self._outcomes

    @property
    def hash(self) -> str:
        """Of the plan that is carried out."""
        return self._plan.hash

    @property
    def count(self) -> Count:
        """Zeros and weights of all layers."""
        return sum(self.counts.values(), Count())

    def _made(self, layer: int, outcome: LayerOutcome, weights: LayerWeights) -> LayerWeights:
        if outcome.unchanged(weights.experts):
            return weights.select(outcome.keep)
        if self._plan.made_on_text:
            like = weights.up_EIH
            kept, self.figures[layer] = self._plan.made_layers().get(layer)
            return kept.map(lambda t: t.to(like.device, like.dtype), router=False)
        file = self._file(layer, weights)
        if file is not None and file.is_file():
            known, self.figures[layer] = read_layer(file)
            return known
        inputs = LayerInputs(
            layer,
            self._geometries[layer],
            self._plan.statistics[layer],
            lambda: weights,
            self._plan.file.seed,
            frozenset(self._plan.file.protected.get(layer, ())),
        )
        made = self._method.transform(weights, outcome, inputs)
        self.figures[layer] = dict(self._method.told(weights, outcome, inputs))
        if file is not None:
            write_layer(file, made, self.figures[layer])
        return made

    def _file(self, layer: int, weights: LayerWeights) -> Path | None:
        if self._folder is None:
            return None
        kind = str(weights.up_EIH.dtype).removeprefix("torch.")
        return self._folder / f"rewritten-{self._plan.hash[:16]}-{layer}-{kind}.safetensors"


def rewriter(plan: WeightPlan, checkpoint: Checkpoint, *, folder: Path | None = None) -> PlannedRewrite | None:
    """What turns a layer's weights into those that a plan keeps; None where its method only drops experts.

    Args:
        plan: the plan.
        checkpoint: what is to be pruned.
        folder: see `PlannedRewrite`; it is made.

    Raises:
        BadConfig: the plan was made for another model.
        UnsupportedModel: it asks for what is not carried out yet.
    """
    plan.check_model(checkpoint.fingerprint, checkpoint.path)
    if plan.file.rules:
        raise UnsupportedModel(
            f"the plan holds {len(plan.file.rules)} rules for tensors that belong to no expert, which are only counted",
            file=checkpoint.path,
            hint="leave the rules out",
        )
    if not plan.method.rewrites and plan.file.repair is None:
        return None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return PlannedRewrite(plan, geometries_of(checkpoint), folder)


def novices_of(plan: WeightPlan, checkpoint: Checkpoint) -> dict[int, Tensor]:
    """Decoder layer -> constants that answer for experts whose tokens go to nobody; layers without any are left out.

    Args:
        plan: the plan.
        checkpoint: what is to be pruned.
    """
    geometries = geometries_of(checkpoint)
    return novices_by_layer(
        plan.method,
        plan.outcomes,
        lambda layer: LayerInputs(layer, geometries[layer], plan.statistics[layer], None, plan.file.seed),
    )


def novices_by_layer(
    method: WeightMethod[Any, Any], outcomes: Mapping[int, LayerOutcome], inputs: Callable[[int], LayerInputs]
) -> dict[int, Tensor]:
    """The same for what a method decided outside of a plan.

    Args:
        method: the method.
        outcomes: by decoder layer.
        inputs: what the method saw of a layer.
    """
    nobody = [layer for layer, outcome in outcomes.items() if None in (outcome.redirect or ())]
    made = {layer: method.novices(inputs(layer), outcomes[layer]) for layer in nobody}
    return {layer: constants for layer, constants in made.items() if constants is not None}
