"""Narrowing at random: the control that says how much any score is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import SlimMethod
from moekit.compress.weights import LayerWeights


@register(
    name="random",
    kind="slim",
    needs=("load",),
    changes="weights",
    traits=("stochastic",),
    limits=(
        "Looks at nothing when it chooses; one seed says little.",
        "Needs text for the repair alone; with repair=none it needs none.",
    ),
)
class Random(SlimMethod):
    """Keep neurons drawn at random in every expert, repeatable by the run's seed.

    S_k is uniform on [0, 1). Choose it as the control of a comparison: with the same repair behind it, it says how much
    the score is worth beside the repair.
    """

    def neuron_scores(self, weights: LayerWeights, inputs: LayerInputs) -> Tensor:
        """Uniform numbers."""
        shape = (weights.experts, weights.width)
        return torch.rand(shape, generator=inputs.generator("random neurons"), dtype=torch.float64)
