"""Frequency: an expert is worth the tokens that chose it.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs


@register(
    name="frequency",
    kind="prune",
    paper="arXiv:2404.05089",
    needs=("load",),
    changes="weights",
    limits=("An expert that is chosen often with small weights or outputs counts as much as one that matters.",),
)
class Frequency(PruneMethod):
    """Keep the experts that most tokens chose.

    S_j = c_j, the number of tokens whose top-k holds expert j; over all experts they sum to tokens x k. Choose it as
    the baseline that costs nothing but router outputs. On models with well balanced load it is close to random.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Tokens that chose each expert, [E]."""
        return inputs.statistics["load"].double()
