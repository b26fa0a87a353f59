"""Carry an outcome out on a model in memory.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.anatomy.swap import replace
from moekit.checkpoint.architecture import class_name
from moekit.checkpoint.names import config_top_k, stated_experts
from moekit.checkpoint.uneven import without_common_loss
from moekit.compress.engine.carrying import carried_out
from moekit.compress.engine.droppable import check_droppable
from moekit.compress.engine.layer_writer import Rewrite
from moekit.compress.engine.limits import check_groups, check_layers, check_made, check_top_k, common_width
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirecting import NovicesByLayer, Redirection, is_redirected, redirection
from moekit.compress.engine.resize import Groups, read_block, resized_block, resized_config
from moekit.errors import BadConfig, UnsupportedModel
from moekit.runtime.slots import parts_on


@torch.no_grad()
def change_model(
    model: PreTrainedModel,
    outcomes: Mapping[int, LayerOutcome],
    rewrite: Rewrite | None = None,
    *,
    novices: NovicesByLayer | None = None,
    top_k: int | None = None,
    groups: Groups = "free",
) -> PreTrainedModel:
    """Drop or rewrite experts of a live model, in place.

    Where outcomes redirect tokens, the runtime parts that do so are attached, and `moekit.save` keeps them. Layers that
    keep different numbers of experts work too; what such a model is saved as, `moekit.load` opens. The
    stock balance loss, which wants one number for all layers, is switched off for it (`output_router_logits`).

    Args:
        model: the model, with its stock routing.
        outcomes: of every MoE layer; position in `keep` is an expert's new number.
        rewrite: makes new weights out of a layer's; None keeps those of `keep` as they are.
        novices: decoder layer -> constants [E, H] that answer for experts whose tokens an outcome redirects to nobody.
        top_k: choices a token from now on; None as before.
        groups: "free" routes without expert groups once experts are dropped, "equal" keeps them.

    Returns:
        The same model.

    Raises:
        BadConfig: layers or experts that are not there, fewer experts than choices, torn groups, or a routing policy
            is attached. The model is as before.
        UnsupportedModel: a layer that cannot be resized. The model is as before.
    """
    found = find_moe_layers(model)
    layers = {layer.index: layer for layer in found}
    if len(layers) < len(found):
        numbers = [layer.index for layer in found]
        raise UnsupportedModel(
            "two MoE blocks stand in one decoder layer, and an outcome says of one which experts stay",
            layer=next(n for n in numbers if numbers.count(n) > 1),
        )
    counts = {index: layer.geometry.experts for index, layer in layers.items()}
    _refuse_policy(layers)
    check_layers(outcomes, counts)
    known = max(layer.geometry.top_k for layer in layers.values())
    check_top_k(outcomes, (config_top_k(model.config.to_dict()) or known or 1) if top_k is None else top_k)
    if groups == "equal":
        check_groups(outcomes, counts, model.config.to_dict(), top_k)
    cut = {index for index, count in counts.items() if outcomes[index].experts != count}
    dropped = bool(cut)
    check_droppable(model.config, list(layers.values()), cut, top_k=top_k)
    most = max(outcome.experts for outcome in outcomes.values())
    width = common_width(outcomes)
    config = resized_config(model.config, most, top_k=top_k, groups=groups, dropped=dropped, width=width)
    redirected = _redirection(layers, outcomes, novices, model.config)
    named, config.architectures = config.architectures, [class_name(model)]  # new blocks are those of this class
    blocks = _new_blocks(layers, outcomes, rewrite, config)
    config.architectures = named
    if len({len(outcome.keep) for outcome in outcomes.values()}) > 1:
        without_common_loss(config)
    for index, layer in layers.items():
        replace(model, layer.name, blocks[index])
        _follow(blocks[index], model)
    _adopt(model, config)
    if redirected is not None:
        redirected.attach(model)
    return model


def _redirection(
    layers: Mapping[int, MoELayer],
    outcomes: Mapping[int, LayerOutcome],
    novices: NovicesByLayer | None,
    config: PreTrainedConfig,
) -> Redirection | None:
    """The parts that send tokens elsewhere, made while the routers still have all of their rows."""
    if not is_redirected(outcomes):
        return None
    # Copies: rows of a router that goes on being trained would change with it.
    routers = {
        index: {name: t.clone() for name, t in read_block(layer, config).router.items()}
        for index, layer in layers.items()
    }
    return redirection(list(layers.values()), routers, outcomes, novices)


def _new_blocks(
    layers: Mapping[int, MoELayer],
    outcomes: Mapping[int, LayerOutcome],
    rewrite: Rewrite | None,
    config: PreTrainedConfig,
) -> dict[int, nn.Module]:
    blocks: dict[int, nn.Module] = {}
    for index, layer in layers.items():
        outcome, weights = outcomes[index], read_block(layer, config)
        made = carried_out(weights, outcome, index) if rewrite is None else rewrite(index, weights)
        check_made(made, outcome, weights.width, index)
        # The new config says already how tokens choose: only the number of experts is the layer's own.
        own = resized_config(config, made.experts, groups="equal")
        blocks[index] = resized_block(layer, own, made, outcome)
    return blocks


def _refuse_policy(layers: Mapping[int, MoELayer]) -> None:
    for index, layer in layers.items():
        parts = [*parts_on(layer.router), *parts_on(layer.experts), *parts_on(layer.block)]
        if parts:
            raise BadConfig(
                f"{type(parts[0]).__name__} is attached, whose tensors were made for these experts",
                layer=index,
                hint="detach it (moekit.runtime.detach), change the experts, then make it anew",
            )


def _follow(block: nn.Module, model: PreTrainedModel) -> None:
    """Which experts implementation runs is chosen in the config that all modules share."""
    for module in block.modules():
        if hasattr(module, "config"):
            module.config = model.config.get_text_config()


def _adopt(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Set the model's config to another one's values, in place: many modules hold it."""
    for own, new in ((model.config, config), (model.config.get_text_config(), config.get_text_config())):
        for key, value in vars(new).items():
            if vars(own).get(key) != value and not isinstance(value, type(model.config)):
                setattr(own, key, value)
    # Balance losses divide by the number of experts, which families keep on the model too.
    values = config.to_dict()
    for name, value in (("num_experts", stated_experts(values)), ("num_experts_per_tok", config_top_k(values))):
        if isinstance(getattr(model, name, None), int) and value is not None:
            setattr(model, name, value)
