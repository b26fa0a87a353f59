"""Looking at the routing of a run: each layer in the way in which it tells, and what is left out.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moekit.errors import MoekitError
from moekit.training.batch import MakeBatch
from moekit.training.choices import ChoiceWatch
from moekit.training.collector import Consumer, RouterCollector
from moekit.training.figures import RoutingMeter
from moekit.training.layers import TrainedLayer
from moekit.training.losses import expert_load
from moekit.training.observed import Observed
from moekit.training.window import Window


class RoutingWatch:
    """Hands what routers answer to a consumer, and counts choices where they give no logits.

    Args:
        model: the model whose forward is called with the batch.
        layers: its MoE layers.
        consumer: of what routers answer; it counts into `meter`.
        make_batch: says more of a micro-batch than its ids and its mask.
        strict: answers that are not about the positions of a micro-batch are an error; otherwise their layers are left
            out of the figures.

    Attributes:
        routed: the layers whose routers answer with logits.
        meter: of routing figures; None where no layer tells what tokens choose.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[TrainedLayer], consumer: Consumer, make_batch: MakeBatch, strict: bool
    ) -> None:
        seen = Observed.of(layers)
        told = {layer.index: layer.experts for layer in (*seen.routed, *seen.chosen)}
        self.routed = seen.routed
        self.meter = RoutingMeter(told, next(model.parameters()).device) if told else None
        self._told = seen.notes()
        self._fallen: dict[str, set[int]] = {}
        self._window = Window(model, make_batch)
        misfit = None if strict else self._fall_out
        self._collector = RouterCollector(model, consumer, seen.routed, self._window, misfit)
        self._choices = ChoiceWatch(self._window, seen.chosen, self._count, self._fall_out)

    def close(self) -> None:
        """Remove all hooks."""
        for part in (self._choices, self._collector, self._window):
            part.close()

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know: layers whose figures are not whole, and why."""
        fallen = [
            f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}: {message}; left out of the "
            "routing figures"
            for message, layers in self._fallen.items()
        ]
        return [*self._told, *fallen]

    def _fall_out(self, layer: int, error: MoekitError) -> None:
        """Remember a layer that does not show its routing after all."""
        self._fallen.setdefault(error.message, set()).add(layer)

    def _count(self, layer: TrainedLayer, index_TK: Tensor, mask_T: Tensor | None) -> None:
        if self.meter is not None:
            self.meter.add(layer.index, expert_load(index_TK.long(), layer.experts, mask_T))
