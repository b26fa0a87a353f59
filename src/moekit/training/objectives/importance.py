"""Spread of the gate weights that experts receive.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moekit.catalogue import register
from moekit.training.collector import Routed
from moekit.training.layers import TrainedLayer
from moekit.training.losses import cv_squared, importance
from moekit.training.objectives.base import KIND, RouterObjective, Sums


@register(name="importance", kind=KIND, paper="arXiv:1701.06538", changes="weights", axis="gating")
class Importance(RouterObjective):
    """Squared coefficient of variation of the gate weights that each expert received, by layer (Shazeer, eq. 6-7).

    It evens out how much experts are trusted, where `balance` evens out how often they are chosen.
    """

    def sums(self, routed: Routed) -> Sums:
        """Gate weights received by each expert."""
        return {"received_E": importance(routed.weights_TK, routed.indices_TK, routed.layer.experts, routed.mask_T)}

    def value(self, sums: Mapping[str, Tensor], layer: TrainedLayer) -> Tensor:
        """Variance over squared mean: 0 when even, E - 1 when one expert receives all."""
        return cv_squared(sums["received_E"])
