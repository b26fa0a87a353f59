"""What recording asks of a live model: which layers it has, what stands around them, and how their routers score.

Every family calls its experts with (hidden [T, H], indices [T, K], weights [T, K]), whatever its router is.

Legend: T positions of a forward pass, K choices a token, E experts, H hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.anatomy.choices import only_routed
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.errors import BadConfig, UnsupportedModel
from moekit.runtime.slots import parts_on
from moekit.runtime.watching import Shown, watch_choices
from moekit.trace.meta import STOCK_ROUTING

# Median deviation of log ratios; bf16 weights round by up to 0.004.
SIGMOID_TOLERANCE = 0.02
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def read_arguments(layer: MoELayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden [T, H], indices [T, K], weights [T, K]) among what an experts module was called with.

    Raises:
        UnsupportedModel: the call does not follow the contract.
    """
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    floats = [t for t in tensors if t.is_floating_point()]
    integers = [t for t in tensors if t.dtype in _INTEGERS]
    if len(floats) == 2 and len(integers) == 1 and integers[0].dim() == 2:
        (hidden, weights), index_TK = floats, integers[0]
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        if hidden_TH.shape[0] == index_TK.shape[0] == weights.shape[0]:
            if weights.shape == index_TK.shape:
                return hidden_TH, routed_choices(layer, index_TK, weights), weights
            if tuple(weights.shape[1:]) == (layer.geometry.experts,):
                return hidden_TH, index_TK, weights.gather(1, index_TK.long())
    shapes = ", ".join(f"{t.dtype} {list(t.shape)}" for t in tensors)
    raise UnsupportedModel(
        f"{layer.experts_name!r} is called with {shapes}, not with hidden [T, H], indices [T, K], weights [T, K]",
        layer=layer.index,
        hint="this family's routing cannot be traced",
    )


def routed_choices(layer: MoELayer, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Choices, with E for those of no routed expert, where a layer's router also scores such."""
    experts = layer.geometry.experts
    return only_routed(index_TK, weights_TK, experts) if layer.scored > experts else index_TK


def see_choices(
    layer: MoELayer, show: Shown, *, otherwise: Callable[[UnsupportedModel], None] | None = None
) -> RemovableHandle:
    """Show (hidden [T, H], indices [T, K], weights [T, K]) of every call of a layer's experts.

    Args:
        layer: whose.
        show: is shown them.
        otherwise: is told of a call that does not show them; without it, that call fails.

    Raises:
        UnsupportedModel: nothing tells them.
    """
    if layer.seam != "experts":
        return watch_choices(layer, show)

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        try:
            seen = read_arguments(layer, args, kwargs)
        except UnsupportedModel as error:
            if otherwise is None:
                raise
            otherwise(error)
        else:
            show(*seen)

    return layer.experts.register_forward_pre_hook(see, with_kwargs=True)


def uses_sigmoid(layer: MoELayer) -> bool:
    """Whether a router's scores are sigmoids rather than a softmax, told by the weights it gives.

    The ratio of two choices' weights is that of their scores, whatever normalises and scales them. A gate that is
    neither (PhiMoE's) counts as a softmax, since its scores come from one.
    """
    router = layer.require_router()
    like = next(router.parameters())
    if like.is_meta:
        return False
    probe_TH = torch.randn(64, layer.geometry.hidden, generator=torch.Generator().manual_seed(0))
    answer = layer.ask(probe_TH.to(device=like.device, dtype=like.dtype))
    logits_TE, weights_TK, indices_TK = (a.detach().cpu() for a in answer)
    logits_TE, weights_TK = logits_TE.float(), weights_TK.float()
    indices_TK = indices_TK.long().clamp_max(layer.geometry.experts - 1)
    far = []
    for scores_TE in (logits_TE.sigmoid(), logits_TE.softmax(-1)):
        chosen_TK = scores_TE.gather(1, indices_TK)
        if indices_TK.shape[1] == 1:  # no ratio to compare, only the weight itself
            far.append((weights_TK - chosen_TK).abs().nanmedian())
        else:
            ratio_T = (weights_TK[:, 0] / weights_TK[:, -1]).log() - (chosen_TK[:, 0] / chosen_TK[:, -1]).log()
            far.append(ratio_T.abs().nanmedian())
    return bool(far[0] < far[1]) and bool(far[0] < SIGMOID_TOLERANCE)


def refuse_compiled(model: nn.Module) -> None:
    """Refuse what runs without calling Python hooks.

    Raises:
        UnsupportedModel: the model, or a part of it, is compiled or replicated.
    """
    for name, module in model.named_modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled or isinstance(module, nn.DataParallel):
            what = "compiled" if compiled else "replicated by DataParallel"
            raise UnsupportedModel(
                f"{name or 'the model'} is {what}: its experts do not show what they are given",
                hint="record the model as loaded, before torch.compile, CUDA graphs or DataParallel",
            )


def routing_of(layers: Sequence[MoELayer]) -> str:
    """How a model routes: "stock", or the router parts that are attached, with their knobs."""
    told = {" + ".join(map(repr, parts_on(layer.router))) or STOCK_ROUTING for layer in layers}
    return " | ".join(sorted(told))


def recorded_layers(model: nn.Module, wanted: Sequence[int] | None) -> list[MoELayer]:
    """The MoE layers to record.

    Raises:
        BadConfig: a layer asked for is no MoE layer.
        UnsupportedModel: no MoE, or two MoE blocks in one decoder layer.
    """
    layers = find_moe_layers(model)
    numbers = [layer.index for layer in layers]
    if twice := {n for n in numbers if numbers.count(n) > 1}:
        raise UnsupportedModel("two MoE blocks stand in one decoder layer", layer=min(twice))
    if wanted is None:
        return layers
    if strange := sorted(set(wanted) - set(numbers)):
        raise BadConfig("this is no MoE layer", layer=strange[0], hint=f"the MoE layers are {numbers}")
    return [layer for layer in layers if layer.index in set(wanted)]


def decoder_layer(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The decoder layer around a block; the block itself where it stands in none."""
    match = re.match(r"^(.*?\.\d+)(\.|$)", layer.name)
    return model.get_submodule(match.group(1)) if match else layer.block


def norms_before(model: nn.Module, layer: MoELayer) -> list[nn.Module]:
    """Norms of the decoder layer around a block: one of them makes what the experts see out of the residual stream."""
    decoder = decoder_layer(model, layer)
    norms = []
    for child in decoder.children():
        own = list(child.parameters())
        if child is not layer.block and own and all(p.dim() == 1 and p.shape[0] == layer.geometry.hidden for p in own):
            norms.append(child)
    return norms


def residual_scale(model: nn.Module, layer: MoELayer) -> float:
    """Factor on the block's output before it is added to the residual stream (Granite has one)."""
    decoder = decoder_layer(model, layer)
    scale = getattr(decoder, "residual_multiplier", 1.0)
    return float(scale) if isinstance(scale, (int, float)) else 1.0
