"""The Switch / GShard balance loss, on what was really chosen.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.catalogue import register
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.losses import balance_of
from moekit.training.objectives.base import KIND, RouterObjective, Sums, choices_and_mass


@register(
    name="balance",
    kind=KIND,
    paper="arXiv:2101.03961",
    changes="weights",
    axis="gating",
    limits=("Micro-batches of one step are averaged, not pooled: small ones ask for balance in each.",),
)
class Balance(RouterObjective):
    """Switch / GShard balance loss of each layer: E sum_e f_e P_e, which is 1 when choices or probabilities are even.

    f_e is the share of the layer's real choices that fell on expert e, P_e the mean gate probability of e; gradient
    through P alone (eq. 4-6; GShard, arXiv:2006.16668). `pool: sequence` takes it in each sequence (DeepSeek-V2,
    arXiv:2405.04434, and V3, arXiv:2412.19437, eq. 17-20), `pool: ranks` over the micro-batches of all ranks
    (arXiv:2501.11873), which leaves experts free to serve a domain.
    """

    def sums(self, routed: Routed) -> Sums:
        """Choices of each expert, gate probability of each, and tokens."""
        return choices_and_mass(routed)

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """1 when even, E at worst; 0 if no token chose any expert."""
        return balance_of(sums["load_E"], sums["mass_E"], sums["tokens"])
