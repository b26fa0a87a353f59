"""bf16 matrix products over fp32 weights.

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

Precision = Literal["fp32", "bf16"]


def compute_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context a forward runs in."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


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
