"""Random scores: the control that says how much any other score is worth.

Legend: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs


@register(
    name="random",
    kind="prune",
    changes="weights",
    traits=("stochastic",),
    limits=("Looks at nothing: one seed says little, compare with the mean and spread of at least five.",),
)
class Random(PruneMethod):
    """Drop experts at random, independently in every layer, repeatable by the run's seed.

    S_j is uniform on [0, 1). Choose it as the control of a comparison, with several seeds: a method that does not beat
    it on the same budget has learnt nothing from its data.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Uniform numbers, [E]."""
        return torch.rand(inputs.experts, generator=inputs.generator("random"), dtype=torch.float64)
