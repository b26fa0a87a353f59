"""Recognise MoE blocks by their contract, never by class names.

transformers v5 gives every MoE block the same narrow waist::

    router.forward(hidden [T, H])                               -> (logits [T, E], weights [T, K], indices [T, K])
    experts.forward(hidden [T, H], indices [T, K], weights [T, K]) -> output [T, H]

*Experts* is a module that states `num_experts` and holds their weights in a way that `moekit.anatomy.storage` knows.
Its *router* is the sibling that, called on a few random rows, answers with the triple above. What is left of the block
and maps H -> H is the *shared* expert.

A router may also be given tensors of its block, such as a selection bias (`MoELayer.passed`). Blocks that choose in
another way have no `router`; where what their `chooser` answers tells who is chosen, they can be traced all the same
(`moekit.anatomy.choices`). Experts can be dropped without a router, as long as the family's own code, given a config
with fewer experts, holds nothing else than slices of its tensors.

Shapes: T tokens, H hidden size, E routed experts, K choices a token, I expert width.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.anatomy.asking import PROBE_ROWS, ask_router, on_cpu, passed_names, probe_rows, raw_answer
from moekit.anatomy.choices import Answered, Seam, read_answer
from moekit.anatomy.moe_layer import Geometry, MoELayer
from moekit.anatomy.reached import holder_of, reached_by_text
from moekit.anatomy.refusing import no_experts, refuse_second_text
from moekit.anatomy.running import runs_what_is_chosen
from moekit.anatomy.storage import Storage
from moekit.anatomy.stored import find_storage
from moekit.checkpoint.decoder import Stack, besides_text, has_stack, layer_number, stacks_of
from moekit.checkpoint.names import PARTS
from moekit.errors import UnsupportedModel

__all__ = ["PROBE_ROWS", "Geometry", "MoELayer", "ask_router", "find_moe_layers", "iterate_moe_layers"]


# Where experts are given weights of all of them: whether they run what is chosen -> the way.
_HONEST: dict[bool | None, Seam] = {True: "gates", False: "misread", None: "unknown"}


@dataclass(frozen=True, eq=False)
class _Router:
    """What chooses among a block's experts.

    Attributes:
        name: below the block.
        module: None where there is none.
        top_k: K, 0 where it is unknown.
        contract: whether it follows the router contract.
        passed: tensors of the block that it is given.
        seam: where choices are read.
        scored: what it scores: experts, and whatever else.
    """

    name: str = ""
    module: nn.Module | None = None
    top_k: int = 0
    contract: bool = False
    passed: tuple[str, ...] = ()
    seam: Seam = "unknown"
    scored: int = 0


def flat_output(output: Any, hidden: int | None = None) -> torch.Tensor:
    """What a block or a decoder layer gave, as rows [T, H]; the first of a tuple, which some families answer with.

    Args:
        output: of the module.
        hidden: H, where the module may answer with all rows in one (ERNIE 4.5 VL).
    """
    made = output[0] if isinstance(output, tuple) else output
    flat_TH: torch.Tensor = made.reshape(-1, hidden if made.dim() == 1 and hidden else made.shape[-1])
    return flat_TH


def decoder_index(name: str) -> int:
    """Decoder layer index in a module or tensor path: the number of its list of layers ("model.layers.12.mlp" -> 12).

    Where no list is called so, the first number of the path.
    """
    match = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name) or re.search(r"\.(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else 0


def _number(stacks: Sequence[Stack], name: str) -> int:
    """Number of the layer that a block belongs to, as its model numbers them; by its name alone outside of all."""
    number = layer_number(stacks, f"{name}.")
    return decoder_index(name) if number is None else number


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
    return count if isinstance(count, int) else _experts_here(experts)


def holds_all_experts(experts: nn.Module) -> bool:
    """Whether this module holds all experts of its layer, not one rank's share."""
    return _experts_here(experts) == experts_in_layer(experts)


def _experts_here(experts: nn.Module) -> int:
    down = getattr(experts, "down_proj", None)
    if isinstance(down, torch.Tensor):
        return down.shape[0]
    storage = find_storage(experts)
    return int(getattr(experts, "num_experts", 0)) if storage is None else storage.experts


def _find_router(block: nn.Module, experts: nn.Module, storage: Storage, count: int) -> _Router:
    """The child of a block that chooses among its experts; without a module where none was found."""
    inside = {name.partition(".")[0] for name in storage.names} if storage.kind == "paired" else set()
    others = []
    for name, child in block.named_children():
        sizes = {size for t in (*child.parameters(), *child.buffers()) for size in t.shape}
        if child is experts or name == PARTS or name in inside or not sizes:
            continue
        passed = passed_names(child, block) if count in sizes else None
        if passed is not None:
            given = tuple(getattr(block, n) for n in passed)
            answer = ask_router(child, probe_rows(child, storage.hidden), passed=given)
            # Attached parts may route by more columns than there are experts.
            if answer is not None and (answer[0].shape[1] == count or hasattr(child, "stock_forward")):
                return _Router(name, child, answer[2].shape[1], True, passed, "experts", count)
        others.append((name, child))
    for name, child in others:
        found = _asked_otherwise(child, storage.hidden, count)
        if found is not None:
            return _Router(name, child, found.top_k, False, (), found.seam, found.scored)
    return _Router(top_k=next(filter(None, map(_stated_top_k, (block, *block.children()))), 0))


def _stated_top_k(module: nn.Module) -> int:
    known = getattr(module, "top_k", None)
    return known if isinstance(known, int) else 0


def _asked_otherwise(child: nn.Module, hidden: int, experts: int) -> Answered | None:
    """How a module that is no router by the contract tells who is chosen."""
    if _inner_width(child, hidden) or not any(p.dim() == 2 and p.shape[1] == hidden for p in child.parameters()):
        return None
    twin = on_cpu(child)  # sorting needs numbers
    return read_answer(raw_answer(twin, twin.forward, probe_rows(twin, hidden)), PROBE_ROWS, experts)


def _inner_width(module: nn.Module, hidden: int) -> int:
    """Inner width of a feed-forward module that maps H -> H; 0 if it does not."""
    widths = [p.shape[1] for p in module.parameters() if p.dim() == 2 and p.shape[0] == hidden and p.shape[1] > 1]
    into = [p for p in module.parameters() if p.dim() == 2 and p.shape[1] == hidden]
    return max(widths) if widths and into else 0


def _find_shared(block: nn.Module, known: set[nn.Module], storage: Storage) -> tuple[tuple[nn.Module, ...], int]:
    # Where experts hang directly below the decoder layer, attention and dense MLP are siblings too: go by name there.
    is_decoder_layer = any("attn" in name or "attention" in name for name, _ in block.named_children())
    stacks = {name.partition(".")[0] for name in storage.names} if storage.kind == "paired" else set()
    found: list[nn.Module] = []
    width = 0
    for name, child in block.named_children():
        if child in known or name in {PARTS, *stacks} or (is_decoder_layer and "shared" not in name):
            continue
        inner = _inner_width(child, storage.hidden)
        if inner:
            found.append(child)
            width += inner
    return tuple(found), width


def _geometry(storage: Storage, count: int, router: _Router, shared_width: int) -> Geometry:
    return Geometry(
        hidden=storage.hidden,
        experts=count,
        top_k=router.top_k,
        width=storage.width,
        shared_width=shared_width,
        has_gate=storage.has_gate,
        has_bias=storage.has_bias,
        transposed=storage.transposed,
        concatenated=storage.concatenated,
        weighs_inputs=router.seam == "scores",
    )


def called_with_choices(experts: nn.Module) -> bool:
    """Whether experts are called with hidden states, indices and weights, as the contract says."""
    stock = getattr(type(experts), "stock_class", type(experts))
    return len(inspect.signature(stock.forward).parameters) > 3


def iterate_moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Yield the MoE blocks of any module tree, in module order; in a model of several parts, the language model's.

    Of several blocks in one decoder layer, the one that a text runs through, where that is told by asking.
    """
    for _, group in itertools.groupby(_every_moe_layer(model), key=lambda layer: layer.index):
        blocks = list(group)
        yield from blocks if len(blocks) == 1 else _reached(model, blocks)


def experts_beside(model: nn.Module) -> list[str]:
    """Paths of stacks of routed experts that stand beside the language model, such as a second decoder's."""
    aside = besides_text(model)
    return [name for name, module in model.named_modules() if name.startswith(aside) and find_storage(module)]


def _reached(model: nn.Module, blocks: list[MoELayer]) -> list[MoELayer]:
    """Of several blocks in one decoder layer, the one that text alone runs through; all where nothing tells it."""
    holder = holder_of([block.name for block in blocks])
    hidden = {block.experts_name: block.geometry.hidden for block in blocks}
    if holder is None or len(set(hidden.values())) > 1:
        return blocks
    below = {name.removeprefix(f"{holder}."): width for name, width in hidden.items()}
    called = reached_by_text(model.get_submodule(holder), below)
    found = [block for block in blocks if block.experts_name.removeprefix(f"{holder}.") in (called or ())]
    if len(found) != 1:
        return blocks
    return [replace(found[0], siblings=tuple(block.name for block in blocks if block is not found[0]))]


def _every_moe_layer(model: nn.Module) -> Iterator[MoELayer]:
    modules, aside = dict(model.named_modules()), besides_text(model)
    stacks = stacks_of(model) if has_stack(model) else ()
    for experts_name, experts in modules.items():
        storage = None if experts_name.startswith(aside) else find_storage(experts)
        if storage is None:
            continue
        # Two stacks that hang in a block itself are called by it: it is the experts, too.
        block_name = experts_name if storage.kind == "paired" else experts_name.rpartition(".")[0]
        block = modules[block_name]
        count = experts_in_layer(experts)
        router = _find_router(block, experts, storage, count)
        called = block is not experts and called_with_choices(experts) and router.seam not in ("masks", "gates")
        seam: Seam = "experts" if called else router.seam if not router.contract else "unknown"
        if seam == "gates" and router.module is not None:
            seam = _HONEST[runs_what_is_chosen(router.module, experts, storage)]
        shared, shared_width = _find_shared(block, {experts, *filter(None, [router.module])}, storage)
        yield MoELayer(
            index=_number(stacks, block_name),
            name=block_name,
            block=block,
            router=router.module if router.contract else None,
            router_name=f"{block_name}.{router.name}".lstrip(".") if router.contract else "",
            experts=experts,
            experts_name=experts_name,
            shared=shared,
            geometry=_geometry(storage, count, router, shared_width),
            storage=storage,
            passed=router.passed,
            seam=seam,
            chooser=router.module,
            scored=router.scored,
        )


def find_moe_layers(model: PreTrainedModel | nn.Module) -> list[MoELayer]:
    """All MoE layers of a model, in order of depth.

    Args:
        model: any transformers v5 causal LM, on any device (the meta device too).

    Returns:
        One `MoELayer` per MoE block of the language model; dense layers are left out.

    Raises:
        UnsupportedModel: the model holds no experts by the contract, or two blocks of them in one layer.
    """
    refuse_second_text(model)
    layers = sorted(iterate_moe_layers(model), key=lambda layer: layer.index)
    if not layers:
        raise no_experts(model)
    layers = _of_language(model, layers)
    for first, second in itertools.pairwise(layers):
        if first.index == second.index:
            raise UnsupportedModel(
                f"one decoder layer holds two MoE blocks, {first.name} and {second.name}, and a text does not run "
                "through one of them alone",
                layer=first.index,
                hint="moekit check, estimate, reshard and undo work on it; what looks at single experts needs one "
                "block a layer that all of a text runs through",
            )
    return layers


def _of_language(model: nn.Module, layers: list[MoELayer]) -> list[MoELayer]:
    """Those of the language model, where another stack (a vision tower) numbers MoE blocks of its own."""
    numbers = [layer.index for layer in layers]
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    if len(set(numbers)) == len(numbers) or not isinstance(decoder, nn.Module):
        return layers
    inside = set(decoder.modules())
    return [layer for layer in layers if layer.block in inside] or layers
