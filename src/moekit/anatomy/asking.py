"""Ask a router what it answers, without a trace in the model: hooks do not fire, its mode and random state stay.

A router's `forward` may ask for more than hidden states: tensors that its block keeps for it, such as a selection bias.
These are told by the names of its arguments and passed as the block passes them.

Legend: T tokens, H hidden, E experts, K choices a token.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.checkpoint.names import PARTS
from moekit.errors import MoekitError

Answer = tuple[Tensor, Tensor, Tensor]

# Rows of random hidden states that a router candidate is asked about.
PROBE_ROWS = 3


def passed_names(router: nn.Module, block: nn.Module) -> tuple[str, ...] | None:
    """Tensors of the block that its router is given behind the hidden states; None where it wants something else."""
    own: Any = getattr(router, "stock_forward", router.forward)
    parameters = list(inspect.signature(own).parameters.values())[1:]
    held = {name for name, t in (*block._parameters.items(), *block._buffers.items()) if t is not None}
    named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    wanted = [p.name for p in named if p.name in held]
    if any(p.default is p.empty and p.name not in held for p in named):
        return None
    # Passed by position: nothing may stand between.
    return tuple(wanted) if [p.name for p in named[: len(wanted)]] == wanted else None


def ask_router(
    router: nn.Module, hidden_TH: Tensor, *, stock: bool = False, passed: Sequence[Tensor] = ()
) -> Answer | None:
    """Call a router candidate without firing hooks or changing its mode; None unless it answers with the contract.

    `router.forward` rather than `router()`: recorders that hook the router must not see the question.

    Args:
        router: the candidate.
        hidden_TH: rows to ask about.
        stock: ask the family's own router, whatever parts are attached. Where parts need a forward pass around them,
            it is the family's own that answers in any case.
        passed: what its block gives it behind the hidden states; see `passed_names`.
    """
    own = getattr(router, "stock_forward", router.forward)
    for forward in (own,) if stock or own == router.forward else (router.forward, own):
        answer = contract(raw_answer(router, forward, hidden_TH, passed), hidden_TH.shape[0])
        if answer is not None:
            return answer
    return None


def raw_answer(
    router: nn.Module,
    forward: Callable[..., object],
    hidden_TH: Tensor,
    passed: Sequence[Tensor] = (),
    *,
    gradients: bool = False,
) -> object:
    """What a router answers to rows, or to a batch of one where it takes no rows; None where it fails."""
    training = router.training
    router.eval()
    try:
        for given in (hidden_TH, hidden_TH.unsqueeze(0)):
            try:
                with torch.set_grad_enabled(gradients):
                    return forward(given, *passed)
            except (TypeError, RuntimeError, ValueError, AttributeError, IndexError, MoekitError):
                continue
    finally:
        router.train(training)
    return None


def contract(answer: object, rows: int) -> Answer | None:
    """An answer as (logits [T, E], weights [T, K], indices [T, K]); None where it is none."""
    if not isinstance(answer, tuple) or len(answer) != 3 or not all(isinstance(a, Tensor) for a in answer):
        return None
    logits_TE, weights_TK, indices_TK = answer
    fits = (
        logits_TE.dim() == weights_TK.dim() == indices_TK.dim() == 2
        and logits_TE.shape[0] == weights_TK.shape[0] == indices_TK.shape[0] == rows
        and weights_TK.shape == indices_TK.shape
        and not indices_TK.is_floating_point()
        and weights_TK.is_floating_point()
    )
    return (logits_TE, weights_TK, indices_TK) if fits else None


def probe_rows(router: nn.Module, hidden: int, rows: int = PROBE_ROWS) -> Tensor:
    """Random hidden states in a router's type and place."""
    tensors: Mapping[str, Tensor] = dict(router.named_parameters()) | dict(router.named_buffers())
    like = next((t for t in router.parameters() if t.dim() == 2), next(iter(tensors.values())))
    # A generator of its own: looking at a model must not move the global random state.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, hidden, generator=generator).to(device=like.device, dtype=like.dtype)


def on_cpu(module: nn.Module) -> nn.Module:
    """The module; where it lies on the meta device, a copy with random weights on the CPU."""
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return module
    return stirred(module)


def stirred(module: nn.Module) -> nn.Module:
    """A copy on the CPU with random tensors: fresh checkpoints have zero routers and biases, where all look alike."""
    meta = any(p.is_meta for p in module.parameters())
    twin = _alone(module)
    twin = twin.to_empty(device="cpu") if meta else twin.to("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                spread = 1.0 if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.shape[1] > 1 else 0.3
                scale = spread / max(tensor.shape[-1], 1) ** 0.5 if tensor.dim() == 2 else spread
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return twin


def _alone(module: nn.Module) -> nn.Module:
    """A copy without its parts and without hooks: both hold on to modules of the whole model."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    instead: dict[int, object] = {id(known): OrderedDict() for known in hooks}
    parts = module._modules.get(PARTS)
    if parts is not None:
        instead[id(parts)] = nn.Module()
    return copy.deepcopy(module, instead)
