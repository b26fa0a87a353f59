"""Scores from the norms of experts' outputs: EAN (arXiv:2504.05586), its means, and EAN weighted by the gate.

n_j(x) = ||f_j(x)|| is the Euclidean norm of an expert's output before gating, X_j the tokens routed to it, c_j their
number, g_j the weight that multiplies the output.

Legend: E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs

_CONDITIONAL = "A conditional mean: on badly balanced models a rare expert with large outputs outranks busy ones."


@register(
    name="ean",
    kind="prune",
    paper="arXiv:2504.05586",
    needs=("load", "output_norm"),
    changes="weights",
    limits=("Ignores gates: an output that is scaled down to nothing counts in full.",),
)
class EAN(PruneMethod):
    """Keep the experts whose outputs are largest in sum (expert activation norm).

    S_j = sum over X_j of n_j = c_j x man. Choose it where both frequency and size of outputs should count and gates
    are nearly uniform.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Sum of output norms of each expert, [E]."""
        return inputs.statistics["output_norm"].double()


@register(
    name="man",
    kind="prune",
    paper="arXiv:2606.15716",
    needs=("load", "output_norm"),
    changes="weights",
    limits=(_CONDITIONAL,),
)
class MAN(PruneMethod):
    """Keep the experts whose outputs are largest on average (mean activation norm).

    S_j = mean over X_j of n_j, 0 where no token chose j. Choose it for pruning that should not depend on how often the
    calibration text uses an expert: task-agnostic, and on models whose load is balanced.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean output norm of each expert, [E]."""
        return ratio(inputs.statistics["output_norm"], inputs.statistics["load"])


@register(
    name="msan",
    kind="prune",
    paper="arXiv:2606.15716",
    needs=("load", "output_square"),
    changes="weights",
    limits=(_CONDITIONAL,),
)
class MSAN(PruneMethod):
    """Keep the experts whose squared outputs are largest on average (mean squared activation norm).

    S_j = mean over X_j of n_j^2, 0 where no token chose j. Choose it instead of man where a few tokens with very large
    outputs should decide: they count quadratically.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Mean squared output norm of each expert, [E]."""
        return ratio(inputs.statistics["output_square"], inputs.statistics["load"])


@register(
    name="weighted-ean",
    kind="prune",
    paper="arXiv:2504.06792",
    needs=("load", "gated_output_norm"),
    changes="weights",
    limits=("Frequency counts, so the result follows the calibration text's domain.",),
)
class WeightedEAN(PruneMethod):
    """Keep the experts that add most to the layer's output in sum: EASY-EP's score without its token weight.

    S_j = sum over X_j of g_j n_j, which is c_j times REAP's score on gates as they are. Choose it for one domain, on
    models whose load is not balanced: of scores that cost one pass it is among the strongest there.
    """

    def score(self, inputs: LayerInputs) -> Tensor:
        """Sum of gated output norms of each expert, [E]."""
        return inputs.statistics["gated_output_norm"].double()
