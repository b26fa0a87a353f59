"""MoE blocks with another number of experts, built by the family's own code from a config that says so.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.anatomy.permute import expert_axis
from moekit.anatomy.probe import MoELayer, holds_all_experts, iterate_moe_layers
from moekit.anatomy.stored import find_storage
from moekit.compress.engine.counting import Counted, counted_axes
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resized_config import Groups, resized_config, skeleton_of, stating_experts
from moekit.compress.engine.token_table import preferences, renumbered, rows_beside, token_tables
from moekit.compress.weights import LayerWeights, from_storage, to_storage
from moekit.errors import UnsupportedModel

__all__ = ["Groups", "empty_block", "empty_resized", "read_block", "resized_block", "resized_config", "stating_experts"]


def empty_resized(config: PreTrainedConfig, experts: int) -> PreTrainedModel:
    """The model of this config with another number of experts, without weights; shared, so only to be looked at."""
    return skeleton_of(resized_config(config, experts, dropped=True))


def _block_in(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The block of another model that stands where this layer's does; wrappers of a language model name it otherwise.

    Raises:
        UnsupportedModel: there is none.
    """
    found = {other.name: other.block for other in iterate_moe_layers(model)}
    if layer.name in found:
        return found[layer.name]
    ends = [name for name in found if layer.name.endswith(f".{name.split('.', 1)[-1]}")]
    if len(ends) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__}, which the config names, has no block {layer.name!r}",
            layer=layer.index,
            hint="change its experts in the checkpoint's folder (moekit prune)",
        )
    return found[ends[0]]


def empty_block(config: PreTrainedConfig, layer: MoELayer) -> nn.Module:
    """A MoE block of a model of this config, without weights.

    Args:
        config: of the model.
        layer: the same block of the model as it is.
    """
    # A copy of the module tree whose parameters stay on meta.
    return copy.deepcopy(_block_in(skeleton_of(config), layer))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    persistent = set(module.state_dict())
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _router_axes(layer: MoELayer, config: PreTrainedConfig | None) -> dict[str, Counted]:
    """Tensors of the block that count experts but belong to none, by name below the block: the router's, mostly.

    Args:
        layer: the block.
        config: of its model, with any number of experts; None where sizes alone must tell.
    """
    count = layer.geometry.experts
    held = {f"{_below(layer, layer.experts_name)}{name}" for name in layer.storage.names}
    if config is None:
        router = _below(layer, layer.router_name)
        tensors = {f"{router}{name}": t for name, t in _tensors(layer.require_router())}
        tensors |= {name: getattr(layer.block, name) for name in layer.passed}
        axes = {name: expert_axis(name, t.shape, count) for name, t in tensors.items()}
        return {name: Counted(axis, 1, 0) for name, axis in axes.items() if axis is not None}
    numbers = (count + 1, count + 2)
    blocks = [_block_in(empty_resized(config, n), layer) for n in numbers]
    fewer, more = ({name: tuple(t.shape) for name, t in _tensors(block)} for block in blocks)
    own = f"{_below(layer, layer.experts_name)}" if layer.storage.kind != "paired" else "-"
    counted = counted_axes(fewer, more, numbers)
    return {name: how for name, how in counted.items() if name not in held and not name.startswith(own)}


def _below(layer: MoELayer, name: str) -> str:
    """Path of a module below the block, with a dot behind it; empty for the block itself."""
    path = name.removeprefix(layer.name).lstrip(".")
    return f"{path}." if path else ""


def read_block(layer: MoELayer, config: PreTrainedConfig | None = None) -> LayerWeights:
    """The weights of a live layer in the common layout; views where that can be.

    Args:
        layer: the layer.
        config: of its model; without, the router must follow the contract.

    Raises:
        UnsupportedModel: what chooses experts does so in a way that cannot be cut, or the layer holds one rank's
            experts.
    """
    if not holds_all_experts(layer.experts):
        raise UnsupportedModel("this process does not hold all experts of the layer", layer=layer.index)
    own = {name: tensor.detach() for name, tensor in _tensors(layer.experts)}
    axes = _router_axes(layer, config)
    tensors = dict(_tensors(layer.block))
    router = {}
    for name, how in axes.items():
        if how.each != 1:
            raise UnsupportedModel(f"{name} holds {how.each} rows for every expert", layer=layer.index)
        router[name] = tensors[name].detach().movedim(how.axis, 0)[: layer.geometry.experts]
    inside = {name: t for name, t in own.items() if layer.storage.kind == "stacked" or name in layer.storage.names}
    return from_storage(inside, layer.storage, router)


@torch.no_grad()
def resized_block(layer: MoELayer, config: PreTrainedConfig, weights: LayerWeights, outcome: LayerOutcome) -> nn.Module:
    """A new block of as many experts as there are weights; all else is shared with the old block, not copied.

    Args:
        layer: the old block.
        config: of a model whose layers hold so many experts; see `resized_config`.
        weights: of its experts and router.
        outcome: which of the old experts these are, for tables that name them.

    Raises:
        UnsupportedModel: the family's block of this size has other tensors than the old one.
    """
    made = empty_block(config, layer)
    below = _below(layer, layer.experts_name)
    old = dict(_tensors(layer.block))
    new = _new_tensors(layer, made, config, weights, old) | _new_tables(layer, outcome)
    for name, empty in list(_tensors(made)):
        value = new.get(name, old.get(name))
        if value is None or tuple(value.shape) != tuple(empty.shape):
            raise UnsupportedModel(
                f"a block of {weights.experts} experts holds {name} of shape {tuple(empty.shape)}, which the old one "
                "does not give",
                layer=layer.index,
                hint="the family sizes more by its experts than moekit knows: this cannot be resized",
            )
        like = old[name] if name in old else next(t for n, t in old.items() if n.startswith(below))
        _put(made, name, value.to(like) if name in new else value, like.requires_grad)
    _share_rest(made, layer.block)
    for module in made.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            # One object for the whole model: which experts implementation runs is chosen there.
            module.config = config.get_text_config()
    made.train(layer.block.training)
    return made


def _new_tensors(
    layer: MoELayer, made: nn.Module, config: PreTrainedConfig, weights: LayerWeights, old: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a new block that hold or count experts, by name below it."""
    below = _below(layer, layer.experts_name)
    storage = find_storage(made.get_submodule(below.rstrip(".")))
    assert storage is not None  # the same class as before, of another size
    new = {f"{below}{name}": tensor for name, tensor in to_storage(weights, storage).items()}
    if storage.beyond:
        for name in storage.names:
            behind = old[f"{below}{name}"][layer.geometry.experts :]
            new[f"{below}{name}"] = torch.cat([new[f"{below}{name}"], behind.to(new[f"{below}{name}"])])
    for name, how in _router_axes(layer, config).items():
        tensor = weights.router[name]
        if how.tail:
            behind = old[name].movedim(how.axis, 0)[layer.geometry.experts :]
            tensor = torch.cat([tensor, behind.to(tensor)])
        new[name] = tensor.movedim(0, how.axis).contiguous()
    return new


def _new_tables(layer: MoELayer, outcome: LayerOutcome) -> dict[str, Tensor]:
    """The tables of a new block that name the experts of every token id, by name below it."""
    made, experts = {}, layer.geometry.experts
    for name, table_VK in token_tables(layer):
        rows_EH = rows_beside(layer.block.get_submodule(name.rpartition(".")[0]), experts)
        made[name] = renumbered(table_VK, preferences(outcome, experts, rows_EH), outcome)
    return made


def _put(root: nn.Module, name: str, value: Tensor, trained: bool = False) -> None:
    path, _, last = name.rpartition(".")
    module = root.get_submodule(path) if path else root
    if last in module._parameters:
        kept = isinstance(value, nn.Parameter)
        module._parameters[last] = value if kept else nn.Parameter(value, requires_grad=trained)  # type: ignore[assignment]
    else:
        module._buffers[last] = value


def _share_rest(made: nn.Module, old: nn.Module) -> None:
    """Buffers that are computed, not saved, lie where the old ones lie."""
    saved = set(made.state_dict())
    known: Mapping[str, Tensor] = {name: buffer for name, buffer in old.named_buffers() if name not in saved}
    for name, buffer in list(made.named_buffers()):
        if name in known and buffer.shape == known[name].shape:
            _put(made, name, known[name])
