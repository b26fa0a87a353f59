"""Recognise MoE blocks by their contract, never by class names.

transformers v5 gives every MoE block the same narrow waist::

    router.forward(hidden [T, H])                               -> (logits [T, E], weights [T, K], indices [T, K])
    experts.forward(hidden [T, H], indices [T, K], weights [T, K]) -> output [T, H]

*Experts* is a module that states `num_experts` and holds stacked weights with that leading dimension. Its *router* is
the sibling that, called on a few random rows, answers with the triple above. What is left of the block and maps
H -> H is the *shared* expert.

Shapes: T tokens, H hidden size, E routed experts, K choices a token, I expert width.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.checkpoint.decoder import besides_text
from moekit.checkpoint.names import PARTS
from moekit.errors import MoekitError, UnsupportedModel

_Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Rows of random hidden states that a router candidate is asked about.
PROBE_ROWS = 3


@dataclass(frozen=True)
class Geometry:
    """Sizes and layout of one MoE layer.

    Attributes:
        hidden: H, model width.
        experts: E, routed experts.
        top_k: K, choices a token (0 where no router follows the contract).
        width: I, inner width of one routed expert.
        shared_width: inner width of all shared experts together, 0 without.
        has_gate: gated expert (gate and up projection) or up projection only.
        has_bias: projections carry biases.
        transposed: weights stored [E, in, out] instead of [E, out, in].
        concatenated: gate rows first, then up rows; False when they alternate.
    """

    hidden: int
    experts: int
    top_k: int
    width: int
    shared_width: int
    has_gate: bool
    has_bias: bool
    transposed: bool
    concatenated: bool


@dataclass(eq=False)
class MoELayer:
    """One MoE block of a live model.

    Attributes:
        index: index of the decoder layer it belongs to.
        name: module path of the block.
        block: module that holds router, experts and shared experts.
        router: follows the router contract; None where the family's router does not.
        router_name: module path of the router, "" without.
        experts: follows the experts contract.
        experts_name: module path of the experts.
        shared: shared experts of the block.
        geometry: sizes and layout.
    """

    index: int
    name: str
    block: nn.Module
    router: nn.Module | None
    router_name: str
    experts: nn.Module
    experts_name: str
    shared: tuple[nn.Module, ...]
    geometry: Geometry

    def require_router(self) -> nn.Module:
        """The router, or an error that says why there is none.

        Raises:
            UnsupportedModel: the router does not follow the contract.
        """
        if self.router is None:
            raise UnsupportedModel(
                f"the router beside {self.experts_name!r} does not return (logits [T, E], weights [T, K], indices)",
                layer=self.index,
                hint="its routing can be traced (moekit profile), but not replaced",
            )
        return self.router


def flat_output(output: Any) -> torch.Tensor:
    """What a block or a decoder layer gave, as rows [T, H]; the first of a tuple, which some families answer with."""
    made = output[0] if isinstance(output, tuple) else output
    flat_TH: torch.Tensor = made.reshape(-1, made.shape[-1])
    return flat_TH


def decoder_index(name: str) -> int:
    """Decoder layer index in a module or tensor path: the number of its list of layers ("model.layers.12.mlp" -> 12).

    Where no list is called so, the first number of the path.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name) or re.search(r"\.(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else 0


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts: `num_experts`, and own 3-D weights with that leading dimension."""
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int):
        return False
    stacked = [p for p in module._parameters.values() if p is not None and p.dim() == 3 and p.shape[0] == count]
    return len(stacked) >= 2 and hasattr(module, "down_proj")


def experts_in_layer(experts: nn.Module) -> int:
    """E of the whole layer, also where this module holds one rank's share of it."""
    count = getattr(experts, "experts_in_layer", None)
    down = experts.down_proj
    assert isinstance(down, torch.Tensor)
    return count if isinstance(count, int) else down.shape[0]


def holds_all_experts(experts: nn.Module) -> bool:
    """Whether this module holds all experts of its layer, not one rank's share."""
    down = experts.down_proj
    assert isinstance(down, torch.Tensor)
    return down.shape[0] == experts_in_layer(experts)


def ask_router(
    router: nn.Module, hidden_TH: torch.Tensor, *, stock: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Call a router candidate without firing hooks or changing its mode; None unless it answers with the contract.

    `router.forward` rather than `router()`: recorders that hook the router must not see the question.

    Args:
        router: the candidate.
        hidden_TH: rows to ask about.
        stock: ask the family's own router, whatever parts are attached. Where parts need a forward pass around them,
            it is the family's own that answers in any case.
    """
    training = router.training
    router.eval()
    own = getattr(router, "stock_forward", router.forward)
    try:
        for forward in (own,) if stock or own == router.forward else (router.forward, own):
            answer = _called(forward, hidden_TH)
            if answer is not None:
                return answer
    finally:
        router.train(training)
    return None


def _called(forward: Callable[[torch.Tensor], object], hidden_TH: torch.Tensor) -> _Answer | None:
    try:
        with torch.no_grad():
            answer = forward(hidden_TH)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, MoekitError):
        return None
    if not isinstance(answer, tuple) or len(answer) != 3 or not all(isinstance(a, torch.Tensor) for a in answer):
        return None
    logits_TE, weights_TK, indices_TK = answer
    rows = hidden_TH.shape[0]
    fits = (
        logits_TE.dim() == weights_TK.dim() == indices_TK.dim() == 2
        and logits_TE.shape[0] == weights_TK.shape[0] == indices_TK.shape[0] == rows
        and weights_TK.shape == indices_TK.shape
        and not indices_TK.is_floating_point()
        and weights_TK.is_floating_point()
    )
    return (logits_TE, weights_TK, indices_TK) if fits else None


def _find_router(block: nn.Module, experts: nn.Module, count: int, hidden: int) -> tuple[str, nn.Module, int] | None:
    for name, child in block.named_children():
        tensors = [*child.parameters(), *child.buffers()]
        if child is experts or name == PARTS or not any(count in t.shape for t in tensors):
            continue
        like = next((p for p in child.parameters() if p.dim() == 2), tensors[0])
        # A generator of its own: looking at a model must not move the global random state.
        generator = torch.Generator().manual_seed(0)
        probe_TH = torch.randn(PROBE_ROWS, hidden, generator=generator).to(device=like.device, dtype=like.dtype)
        answer = ask_router(child, probe_TH)
        # Attached parts may route by more columns than there are experts.
        if answer is not None and (answer[0].shape[1] == count or hasattr(child, "stock_forward")):
            return name, child, answer[2].shape[1]
    return None


def _inner_width(module: nn.Module, hidden: int) -> int:
    """Inner width of a feed-forward module that maps H -> H; 0 if it does not."""
    widths = [p.shape[1] for p in module.parameters() if p.dim() == 2 and p.shape[0] == hidden and p.shape[1] > 1]
    into = [p for p in module.parameters() if p.dim() == 2 and p.shape[1] == hidden]
    return max(widths) if widths and into else 0


def _find_shared(block: nn.Module, known: set[nn.Module], hidden: int) -> tuple[tuple[nn.Module, ...], int]:
    # Where experts hang directly below the decoder layer, attention and dense MLP are siblings too: go by name there.
    is_decoder_layer = any("attn" in name or "attention" in name for name, _ in block.named_children())
    found: list[nn.Module] = []
    width = 0
    for name, child in block.named_children():
        if child in known or name == PARTS or (is_decoder_layer and "shared" not in name):
            continue
        inner = _inner_width(child, hidden)
        if inner:
            found.append(child)
            width += inner
    return tuple(found), width


def _geometry(experts: nn.Module, top_k: int, shared_width: int) -> Geometry:
    transposed = bool(getattr(experts, "is_transposed", False))
    down = experts.down_proj
    assert isinstance(down, torch.Tensor)
    width, hidden = (down.shape[1], down.shape[2]) if transposed else (down.shape[2], down.shape[1])
    return Geometry(
        hidden=hidden,
        experts=experts_in_layer(experts),
        top_k=top_k,
        width=width,
        shared_width=shared_width,
        has_gate=bool(getattr(experts, "has_gate", hasattr(experts, "gate_up_proj"))),
        has_bias=bool(getattr(experts, "has_bias", False)),
        transposed=transposed,
        concatenated=bool(getattr(experts, "is_concatenated", True)),
    )


def iterate_moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE blocks of any module tree, in module order; in a model of several parts, the language model's."""
    modules, aside = dict(model.named_modules()), besides_text(model)
    for experts_name, experts in modules.items():
        if not is_experts(experts) or experts_name.startswith(aside):
            continue
        block_name = experts_name.rpartition(".")[0]
        block = modules[block_name]
        bare = _geometry(experts, 0, 0)
        found = _find_router(block, experts, bare.experts, bare.hidden)
        router_name, router, top_k = found if found else ("", None, 0)
        shared, shared_width = _find_shared(block, {experts, router} if router else {experts}, bare.hidden)
        yield MoELayer(
            index=decoder_index(block_name),
            name=block_name,
            block=block,
            router=router,
            router_name=f"{block_name}.{router_name}".lstrip(".") if router_name else "",
            experts=experts,
            experts_name=experts_name,
            shared=shared,
            geometry=_geometry(experts, top_k, shared_width),
        )


def find_moe_layers(model: PreTrainedModel | nn.Module) -> list[MoELayer]:
    """All MoE layers of a model, in order of depth.

    Args:
        model: any transformers v5 causal LM, on any device (the meta device too).

    Returns:
        One `MoELayer` per MoE block; dense layers are left out.

    Raises:
        UnsupportedModel: the model holds no experts by the contract, or two blocks of them in one layer.
    """
    layers = sorted(iterate_moe_layers(model), key=lambda layer: layer.index)
    if not layers:
        raise UnsupportedModel(
            f"{type(model).__name__} is not a Mixture of Experts: no module has `num_experts` and stacked weights "
            "[E, ..] with a `down_proj`",
            hint="`moekit convert` turns a dense Llama-type model into a MoE",
        )
    for first, second in itertools.pairwise(layers):
        if first.index == second.index:
            raise UnsupportedModel(
                f"one decoder layer holds two MoE blocks, {first.name} and {second.name}",
                layer=first.index,
                hint="moekit works on models with one MoE block a layer",
            )
    return layers
