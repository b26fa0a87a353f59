"""Run routed tokens through their experts one expert at a time, and look at what each one sees and gives.

Each expert runs on the tokens routed to it only, once. What is large (inputs, outputs) is there for one expert at a
time; what is kept of every choice is one number each.

Legend: N tokens, n tokens of one expert, K choices a token, P (token, choice) pairs, E experts, H hidden, I width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import called_with_choices, holds_all_experts
from moekit.anatomy.storage import Storage, activation_of, expert_of
from moekit.anatomy.stored import find_storage
from moekit.runtime.slots import parts_on
from moekit.trace.batch import ExpertBatch

# One expert on some tokens: (expert, inputs [n, H]) -> (inputs of the down projection [n, I] or None, outputs [n, H])
OneExpert = Callable[[int, Tensor], tuple[Tensor | None, Tensor]]
_STOCK = ("eager", "grouped_mm", "batched_mm", None)


def plain_expert(module: Any, leaves: dict[str, Tensor] | None = None) -> OneExpert | None:
    """The plain formula of a family's experts, read off the flags of transformers' experts interface.

    Args:
        module: the experts.
        leaves: where given, one expert's weights are put here by name as leaves of the graph, to be differentiated by.

    Returns:
        None for a module that computes in another way: quantized, adapted, spread over ranks, with parts attached.
    """
    flags = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    up_name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    weights = [getattr(module, name, None) for name in (up_name, "down_proj")]
    wide = all(isinstance(w, nn.Parameter) and w.dim() == 3 and w.dtype.itemsize > 1 for w in weights)
    whole = wide and holds_all_experts(module)
    if not flags:
        return None if leaves is not None else _by_storage(module)
    if not whole or implementation not in _STOCK or parts_on(module):
        return None

    def leaf(name: str, expert: int) -> Tensor:
        tensor: Tensor = getattr(module, name)[expert]
        if leaves is not None:
            tensor = leaves[name] = tensor.detach().requires_grad_()
        return tensor

    def of(name: str, expert: int) -> tuple[Tensor, Tensor | None]:
        weight = leaf(name, expert)
        bias = leaf(f"{name}_bias", expert) if module.has_bias else None
        return (weight.T if module.is_transposed else weight), bias

    def run(expert: int, hidden_nH: Tensor) -> tuple[Tensor, Tensor]:
        first = nn.functional.linear(hidden_nH, *of(up_name, expert))
        inner_nI = module._apply_gate(first) if module.has_gate else module.act_fn(first)
        output_nH = nn.functional.linear(inner_nI, *of("down_proj", expert))
        if getattr(module, "has_post_expert_norm", False):
            output_nH = module.post_expert_norm(output_nH)
        return inner_nI, output_nH

    return run


def _by_storage(module: nn.Module) -> OneExpert | None:
    """The plain formula of experts that are kept otherwise than as stacks, or are called otherwise."""
    storage = find_storage(module)
    if storage is None or activation_of(module, storage) is None or parts_on(module):
        return None
    if called_with_choices(module) and not _follows_formula(module, storage):
        return None
    return lambda expert, hidden_nH: expert_of(module, storage, expert)(hidden_nH)


@torch.no_grad()
def _follows_formula(module: nn.Module, storage: Storage) -> bool:
    """Whether experts that can be called give what the plain formula gives; asked once for each module."""
    known = _asked.get(module)
    if known is None:
        like = next(module.parameters())
        generator = torch.Generator().manual_seed(0)
        given_TH = torch.randn(4, storage.hidden, generator=generator).to(like)
        index_TK = torch.zeros(4, 2, dtype=torch.int64, device=like.device)
        try:
            stock = getattr(type(module), "stock_class", type(module))  # whatever parts hang on it
            made = stock.forward(module, given_TH, index_TK, torch.tensor([[0.75, 0.25]] * 4).to(like))
            expected = expert_of(module, storage, 0)(given_TH)[1]
            known = torch.allclose(made.reshape(expected.shape).float(), expected.float(), rtol=2e-2, atol=1e-4)
        except (RuntimeError, TypeError, ValueError, IndexError):
            known = False
        _asked[module] = known
    return known


_asked: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def delegated(experts: Callable[[Tensor, Tensor, Tensor], Tensor]) -> OneExpert:
    """One expert of an experts forward that cannot be looked into: all tokens choose it alone, with weight 1."""

    def run(expert: int, hidden_nH: Tensor) -> tuple[None, Tensor]:
        index_n1 = torch.full((len(hidden_nH), 1), expert, dtype=torch.int64, device=hidden_nH.device)
        return None, experts(hidden_nH, index_n1, hidden_nH.new_ones(len(hidden_nH), 1))

    return run


@dataclass(frozen=True, eq=False)
class Figures:
    """What is kept of every choice.

    Attributes:
        norm_NK: norm of the chosen expert's output before gating; 0 where the choice is none.
        peaks: its largest absolute value and the channel of it, [N, K] each, where asked for.
        output_NH: all gated outputs summed, where asked for.
    """

    norm_NK: Tensor
    peaks: tuple[Tensor, Tensor] | None
    output_NH: Tensor | None


def each_expert(
    one: OneExpert | None,
    hidden_NH: Tensor,
    index_NK: Tensor,
    weights_NK: Tensor,
    experts: int,
    *,
    look: Callable[[ExpertBatch], None] | None = None,
    peaks: bool = False,
    add_up: bool = False,
    weighs_inputs: bool = False,
) -> Figures:
    """Run every token through the experts it chose.

    Args:
        one: runs one expert; None only looks at what each one sees.
        weighs_inputs: weights multiply what experts are given. What an expert gives is then divided by them again, so
            that weight times output is what it adds to a token here, too.
        hidden_NH: what the experts see.
        index_NK: chosen experts, int64; E means none.
        weights_NK: gate weights.
        experts: E.
        look: shown what each expert saw and gave.
        peaks: also find each output's largest absolute value.
        add_up: also give the gated sum.
    """
    tokens, top_k = index_NK.shape
    order_P = index_NK.flatten().argsort(stable=True)
    sizes = torch.bincount(index_NK.flatten(), minlength=experts + 1)[:experts].tolist()
    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    norm_P = torch.zeros(tokens * top_k, dtype=wide, device=hidden_NH.device)
    peak_P, channel_P = torch.zeros_like(norm_P), torch.zeros_like(order_P)
    output_NH = torch.zeros(hidden_NH.shape, dtype=wide, device=hidden_NH.device) if add_up else None
    start = 0
    for expert, size in enumerate(sizes):
        pair_n, start = order_P[start : start + size], start + size
        if not size:
            continue
        token_n = pair_n // top_k
        input_nH, weight_n = hidden_NH[token_n], weights_NK.flatten()[pair_n]
        if weighs_inputs:
            input_nH = input_nH * weight_n.to(input_nH.dtype)[:, None]
        if one is None:
            if look is not None:
                look(ExpertBatch(expert, weight_n, input_nH))
            continue
        inner_nI, output_nH = one(expert, input_nH)
        if weighs_inputs:
            output_nH = torch.where(weight_n[:, None] != 0, output_nH / weight_n.to(output_nH.dtype)[:, None], 0)
        norm_P[pair_n] = torch.linalg.vector_norm(output_nH, dim=-1, dtype=wide)
        if peaks:
            value_n, channel_P[pair_n] = output_nH.abs().max(dim=-1)
            peak_P[pair_n] = value_n.to(wide)
        if output_NH is not None:
            output_NH.index_add_(0, token_n, output_nH.to(wide) * weight_n.to(wide)[:, None])
        if look is not None:
            look(ExpertBatch(expert, weight_n, input_nH, inner_nI, output_nH))
    return Figures(
        norm_P.view(tokens, top_k),
        (peak_P.view(tokens, top_k), channel_P.view(tokens, top_k)) if peaks else None,
        None if output_NH is None else output_NH.to(hidden_NH.dtype),
    )
