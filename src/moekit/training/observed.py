"""What a run can see of a model's routing, and what it therefore cannot be asked for.

Most routers answer with logits, weights and indices: all objectives, balancers and figures work. Others tell only what
is chosen (`moekit.anatomy.choices`), some nothing at all: such models train by cross-entropy like all others, but what
needs logits is refused where it is asked for, and figures are told as far as choices go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.errors import UnsupportedModel
from moekit.training.layers import TrainedLayer, trained_layers, without_wrappers
from moekit.training.terms import Terms

# What a schedule of this kind moves stands in routers.
_ROUTING = "routing."


@dataclass(frozen=True, eq=False)
class Observed:
    """The MoE blocks of a model, by what is told of them.

    Attributes:
        routed: their routers answer with logits, weights and indices.
        chosen: what tokens choose is told, without logits.
        unseen: nothing is.
        crowded: several stand in one decoder layer, and figures go by layer.
    """

    routed: list[TrainedLayer]
    chosen: list[TrainedLayer]
    unseen: list[TrainedLayer]
    crowded: list[TrainedLayer]

    @classmethod
    def of(cls, layers: Sequence[TrainedLayer]) -> Observed:
        """Sort a model's blocks."""
        times = Counter(layer.index for layer in layers)
        found = cls([], [], [], [])
        for layer in layers:
            if times[layer.index] > 1:
                found.crowded.append(layer)
            elif layer.layer.router is not None:
                found.routed.append(layer)
            elif _tells_choices(layer.layer):
                found.chosen.append(layer)
            else:
                found.unseen.append(layer)
        return found

    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        told = []
        if self.chosen:
            told.append(
                f"{_layers(self.chosen)}: routers give no logits by the contract; their routing figures are those of "
                "choices alone, without balance_loss and z_loss"
            )
        if self.unseen:
            told.append(f"{_layers(self.unseen)}: nothing tells which experts run; left out of the routing figures")
        if self.crowded:
            told.append(f"{_layers(self.crowded)}: hold several MoE blocks each; left out of the routing figures")
        if not (self.routed or self.chosen or self.unseen or self.crowded):
            told.append("the experts lie in a form that moekit does not know: there are no routing figures")
        return told


def _tells_choices(layer: MoELayer) -> bool:
    return layer.seam == "experts" or (layer.seam not in ("unknown", "misread") and layer.chooser is not None)


def _layers(layers: Sequence[TrainedLayer]) -> str:
    numbers = sorted({layer.index for layer in layers})
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def answers_all(model: nn.Module) -> bool:
    """Whether every router of a model answers with logits, weights and indices."""
    return _why_not(model) is None


def _why_not(model: nn.Module) -> UnsupportedModel | None:
    """Why not every router answers with logits; None where all do."""
    layers = trained_layers(model)
    try:
        if not layers or len({layer.index for layer in layers}) < len(layers):
            with without_wrappers(model):
                find_moe_layers(model)
        for layer in layers:
            layer.layer.require_router()
    except UnsupportedModel as error:
        return error
    return None


def refuse_without_logits(model: nn.Module, asked: Iterable[str]) -> None:
    """Refuse what needs the logits of every router, for a model that does not give them.

    Args:
        model: the model.
        asked: what a run was asked for that needs them, in words.

    Raises:
        UnsupportedModel: naming the first of it, the layer, and what works instead.
    """
    first = next(iter(asked), None)
    why = None if first is None else _why_not(model)
    if why is not None:
        raise UnsupportedModel(
            f"{first} reads the logits of every router, and {why.message}",
            layer=why.layer,
            hint="leave it out: the cross-entropy and kd train this model, and the family's own auxiliary loss where "
            "its config says output_router_logits",
        )


def needs_logits(terms: Terms, balancer: bool, schedules: Iterable[str] = ()) -> list[str]:
    """What of a run needs the logits of every router, in words.

    Args:
        terms: its objectives.
        balancer: whether there is one.
        schedules: what its schedules move.
    """
    return [
        *(f"the objective {name}" for name in terms.on_routers()),
        *(["the balancer"] if balancer else []),
        *(f"the schedule of {target}" for target in schedules if target.startswith(_ROUTING)),
    ]
