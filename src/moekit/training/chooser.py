"""Which module of a MoE block chooses, also where it does not answer by the router contract.

Its weights train like all others; it must be known only where a run names it (`parts=("router",)`, `router_lr`).

Legend: E experts, H hidden.
"""

from __future__ import annotations

from torch import nn

from moekit.anatomy.probe import MoELayer
from moekit.checkpoint.names import PARTS
from moekit.errors import UnsupportedModel
from moekit.training.layers import moe_layers, without_wrappers


def find_chooser(layer: MoELayer) -> tuple[str, nn.Module] | None:
    """Path below the block and module of what chooses; None where nothing tells it.

    It is the router, or what was asked and told its choices, or else the one module beside the experts that has a
    matrix with a row for each expert.
    """
    with without_wrappers(layer.block):
        known = layer.router if layer.router is not None else layer.chooser
        if known is not None:
            return next((found for found in layer.block.named_modules() if found[1] is known), None)
        stacks = {name.partition(".")[0] for name in layer.storage.names} if layer.experts is layer.block else set()
        aside = {id(layer.experts), *map(id, layer.shared)}
        scoring = [
            (name, child)
            for name, child in layer.block.named_children()
            if id(child) not in aside
            and name not in {PARTS, *stacks}
            and any(p.dim() == 2 and p.shape[0] == layer.geometry.experts for p in child.parameters())
        ]
    return scoring[0] if len(scoring) == 1 else None


def require_chooser(layer: MoELayer) -> tuple[str, nn.Module]:
    """`find_chooser`, or an error.

    Raises:
        UnsupportedModel: nothing tells which module of the block chooses.
    """
    found = find_chooser(layer)
    if found is None:
        raise UnsupportedModel(
            f"nothing tells which module of {layer.name!r} is the router",
            layer=layer.index,
            hint="name other parts (experts, attention, all), and leave router_lr out",
        )
    return found


def check_routers_told(model: nn.Module, rate: float | None) -> None:
    """Refuse a learning rate of routers where nothing tells which modules they are.

    Raises:
        UnsupportedModel: naming the layer; or the experts lie in a form that moekit does not know.
    """
    if rate is None:
        return
    layers = moe_layers(model)
    if not layers:
        raise UnsupportedModel(
            "router_lr is given, and the experts of this model lie in a form that moekit does not know: nothing tells "
            "which modules are its routers",
            hint="leave router_lr out",
        )
    for layer in layers:
        require_chooser(layer)
