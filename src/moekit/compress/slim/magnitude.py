"""Narrowing by the size of weights, the baseline of all others."""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.narrowing import SlimMethod, neuron_sizes
from moekit.compress.weights import LayerWeights


@register(
    name="magnitude",
    kind="slim",
    needs=("load",),
    changes="weights",
    limits=(
        "Blind to activations: a neuron that never fires may have large weights.",
        "Needs text for the repair alone; with repair=none it needs none.",
    ),
)
class Magnitude(SlimMethod):
    """Keep the neurons of each expert with the largest weights, as many in every expert and layer.

    S_k = |W_up[k, :]| * |W_down[:, k]|, which no factor moved from one to the other changes. Choose it where there is
    no text (repair=none), and as the baseline that others must beat.
    """

    def neuron_scores(self, weights: LayerWeights, inputs: LayerInputs) -> Tensor:
        """Products of norms."""
        return neuron_sizes(weights)
