"""Gate mass: an expert is worth the gate weights it was given.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs


@register(
    name="gate-mass",
    kind="prune",
    paper="arXiv:2509.10377",
    needs=("load", "gate_mass"),
    changes="weights",
    limits=("Blind to the size of outputs: a large weight on a small output counts in full.",),
)
class GateMass(PruneMethod):
    """Keep the experts with the largest sum of gate weights over the tokens routed to them.

    S_j = sum over tokens that chose j of g_j, the weight that multiplies its output (tokens times DERN's mean
    importance); where the family renormalises, they sum to the number of tokens. Choose it where experts' outputs are
    not at hand: it costs router outputs only and weighs a first choice more than a last one.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Sum of gate weights of each expert, [E]."""
        return inputs.statistics["gate_mass"].double()
