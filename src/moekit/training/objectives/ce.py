"""Cross-entropy of the next token."""

from __future__ import annotations

from torch import Tensor

from moekit.catalogue import register
from moekit.training.head import OutputInputs
from moekit.training.objectives.base import KIND, OutputObjective


@register(name="ce", kind=KIND, changes="weights")
class CrossEntropy(OutputObjective):
    """Cross-entropy of the next token, which a language model is trained by; it is there unless `ce: 0` leaves it out.

    Computed from hidden states and output layer in slices of tokens, so that the logits of a batch are never there all
    at once.
    """

    def loss(self, inputs: OutputInputs) -> Tensor:
        """Nats a token."""
        return inputs.cross_entropy()
