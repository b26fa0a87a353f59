"""MoE blocks with another number of experts, built by the family's own code from a config that says so.

Legend: E experts, K choices a token.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moekit.anatomy.permute import expert_axis
from moekit.anatomy.probe import MoELayer, holds_all_experts, iterate_moe_layers
from moekit.anatomy.stored import find_storage
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, TOP_K_KEYS, config_top_k
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.spec import KEYS, stated
from moekit.compress.engine.counting import Counted, counted_axes
from moekit.compress.engine.weights import LayerWeights, from_storage, to_storage
from moekit.errors import BadConfig, UnsupportedModel

Groups = Literal["free", "equal"]


def resized_config(
    config: PreTrainedConfig,
    experts: int,
    *,
    top_k: int | None = None,
    groups: Groups = "free",
    dropped: bool | None = None,
    width: int | None = None,
) -> PreTrainedConfig:
    """A copy of a config with another number of experts.

    Args:
        config: of the model.
        experts: routed experts a layer from now on.
        top_k: choices a token from now on; None as before.
        groups: once experts are dropped, "free" lets tokens choose from all experts, "equal" keeps the router's limits
            to groups of neighbouring experts.
        dropped: whether any layer of the model loses experts; None where all layers get the same number.
        width: neurons of every routed expert from now on; None as before.

    Raises:
        BadConfig: fewer experts than choices, a number of choices that the family's router does not make, or groups
            that do not divide the experts or become too small for the router to score.
        UnsupportedModel: the config does not say how many experts there are.
    """
    made = copy.deepcopy(config)
    text: Any = stating_experts(made)
    own = text.to_dict()
    counts = [key for key in EXPERT_COUNT_KEYS if isinstance(own.get(key), int)]
    if not counts:
        raise UnsupportedModel(
            f"{type(config).__name__} names its number of experts by none of {', '.join(EXPERT_COUNT_KEYS)}"
        )
    before = own[counts[0]]
    if width is not None:
        _set_width(text, own, width)
    for key in counts:
        setattr(text, key, experts)
    choices = [key for key in TOP_K_KEYS if isinstance(own.get(key), int)]
    for key in choices:
        if top_k is not None:
            setattr(text, key, top_k)
    chosen = int(getattr(text, choices[0])) if choices else 1
    if chosen < 1:
        raise BadConfig(
            f"a token cannot choose {chosen} experts", hint=f"choose 1 to {experts} (--top-k, in Python top_k)"
        )
    if experts < chosen:
        raise BadConfig(
            f"{experts} experts would stay, but each token chooses {chosen}",
            hint=f"keep at least {chosen}, or let tokens choose fewer (--top-k {experts}, in Python top_k)",
        )
    if (experts != before) if dropped is None else dropped:
        _set_groups(made, text, experts, groups)
    if top_k is not None and top_k != (config_top_k(own) or 0):
        _check_choices(made, top_k)
    return made


def stating_experts(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that states the number of experts: of the language model, or one within (DBRX)."""
    text = config.get_text_config()
    inside = [value for value in vars(text).values() if isinstance(value, PreTrainedConfig)]
    stating = (c for c in (text, *inside) if any(isinstance(c.to_dict().get(key), int) for key in EXPERT_COUNT_KEYS))
    return next(stating, text)


def _set_width(text: Any, own: Mapping[str, Any], width: int) -> None:
    """Another width of routed experts; shared experts, whose width some families state in theirs, keep their own.

    Raises:
        BadConfig: wider than before, or the family cannot say both widths; names those that it can.
        UnsupportedModel: the config does not say how wide experts are.
    """
    known = stated(own, "width")
    if known is None:
        raise UnsupportedModel(
            f"{type(text).__name__} names the width of its experts by none of {', '.join(KEYS['width'])}"
        )
    key, before = known
    if width > before:
        raise BadConfig(f"experts of {before} neurons cannot become {width} wide", hint=f"ask for {before} or fewer")
    shared = stated(own, "shared")
    if shared is not None and shared[1] and stated(own, "shared_width") is None and width != before:
        whole = shared[1] * before
        if whole % width:
            fitting = [w for w in range(before, 0, -1) if whole % w == 0]
            near = min(fitting, key=lambda w: (abs(w - width), w))
            raise BadConfig(
                f"this family states the {whole} neurons of its shared experts as a multiple of the routed experts' "
                f"width, and {width} does not divide {whole}",
                hint=f"narrow to {near}, the nearest width that divides {whole}",
            )
        setattr(text, shared[0], whole // width)
    setattr(text, key, width)


def _check_choices(made: PreTrainedConfig, top_k: int) -> None:
    """Refuse a number of choices that the config can say, but the router does not make (PhiMoE's are always two)."""
    layer = next(iterate_moe_layers(_skeleton_of(made)), None)
    if layer is not None and layer.router is not None and layer.geometry.top_k != top_k:
        raise BadConfig(
            f"this family's router always chooses {layer.geometry.top_k} experts, not {top_k}",
            hint=f"keep at least {layer.geometry.top_k} experts, and leave top_k as it is",
        )


def _set_groups(made: PreTrainedConfig, text: Any, experts: int, groups: Groups) -> None:
    count = getattr(text, "n_group", None)
    if not isinstance(count, int) or count < 1:
        return
    if groups == "free" and count > 1:
        count = text.n_group = text.topk_group = 1
    if experts % count:
        raise BadConfig(
            f"{experts} experts are not equally many in {count} routing groups",
            hint=f"keep a multiple of {count}, or route without groups (--groups free)",
        )
    if experts == count and any(layer.router is None for layer in iterate_moe_layers(_skeleton_of(made))):
        # Some families score a group by its two best experts; asked on meta, their routers fail on smaller groups.
        raise BadConfig(
            "routing groups of a single expert would be left, too few for this family's router to score",
            hint=f"keep at least {2 * count}" + ("" if count == 1 else ", or route without groups (--groups free)"),
        )


@functools.lru_cache(maxsize=8)
def _skeleton(kind: Callable[..., PreTrainedConfig], text: str) -> PreTrainedModel:
    return empty_model(kind(json.loads(text)))


def _skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    values = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _skeleton(type(config).from_dict, values)


def empty_resized(config: PreTrainedConfig, experts: int) -> PreTrainedModel:
    """The model of this config with another number of experts, without weights; shared, so only to be looked at."""
    return _skeleton_of(resized_config(config, experts, dropped=True))


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
    return copy.deepcopy(_block_in(_skeleton_of(config), layer))


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
def resized_block(layer: MoELayer, config: PreTrainedConfig, weights: LayerWeights) -> nn.Module:
    """A new block of as many experts as there are weights; all else is shared with the old block, not copied.

    Args:
        layer: the old block.
        config: of a model whose layers hold so many experts; see `resized_config`.
        weights: of its experts and router.

    Raises:
        UnsupportedModel: the family's block of this size has other tensors than the old one.
    """
    made = empty_block(config, layer)
    below = _below(layer, layer.experts_name)
    old = dict(_tensors(layer.block))
    new = _new_tensors(layer, made, config, weights, old)
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
    known: Mapping[str, Tensor] = dict(old.named_buffers())
    for name, buffer in list(made.named_buffers()):
        if name in known and buffer.shape == known[name].shape:
            _put(made, name, known[name])
