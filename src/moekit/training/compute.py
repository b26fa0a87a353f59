"""How a training step computes: precision of matrix products, and attention for short rows on a CPU.

Autocast casts each weight to bf16 at every use. Weights that do not train come out the same every time, so they are
cast once and swapped in for the length of a run; the fp32 originals come back at the end. Weights that train stay fp32,
as do norms, the router's softmax and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from moekit._device import multiplies
from moekit.anatomy.probe import is_experts

Precision = Literal["fp32", "bf16"]

# Up to here plain attention trains faster on a CPU than the fused kernel, whose backward is slow (measured).
SHORT_ROW = 512


def resolve_precision(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """bf16 where the device has instructions for it, else fp32, if "auto"."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies(torch.bfloat16, device) else "fp32"


def compute_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context a forward runs in."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def attention_for(model: PreTrainedModel, seq_len: int) -> Iterator[None]:
    """Plain instead of fused attention for short rows on a CPU; the same function to rounding."""
    # Of the language model alone: towers see no text, and some of them know one implementation only.
    config = model.config.get_text_config()
    stock = config._attn_implementation
    if model.device.type != "cpu" or seq_len > SHORT_ROW or stock != "sdpa":
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = stock


def _frozen(module: nn.Linear) -> bool:
    return not any(p.requires_grad for p in module.parameters(recurse=False))


@contextmanager
def frozen_weights_in(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Hold frozen linear weights in bf16 while training in bf16; what autocast computes stays the same.

    Selecting routers are left alone: some families compute them in fp32 on purpose.
    """
    if precision == "fp32":
        yield
        return
    kept: list[tuple[nn.Linear, dict[str, nn.Parameter | None]]] = []
    for module in model.modules():
        if type(module) is nn.Linear and _frozen(module) and module.weight.dtype == torch.float32:
            kept.append((module, dict(module._parameters)))
            for name, parameter in kept[-1][1].items():
                if parameter is not None:
                    cast = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                    module._parameters[name] = cast
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters.update(parameters)


@contextmanager
def checkpointed_activations(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Activation checkpointing, under whichever name this transformers has for it."""
    if not wanted:
        yield
        return
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{word}_checkpointing_enable")(**{f"{word}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def experts_for(model: PreTrainedModel, precision: Precision) -> Iterator[None]:
    """Another experts implementation where widths are not what the grouped bf16 kernel wants; the same function.

    That kernel wants rows of a multiple of 16 bytes: eight numbers in bf16.
    """
    odd = [
        parameter
        for module in model.modules()
        if is_experts(module)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dim() == 3 and any(size % 8 for size in parameter.shape[1:])
    ]
    stock = model.get_experts_implementation() if odd and precision == "bf16" else None
    if stock is None or stock == "eager":
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(stock)
