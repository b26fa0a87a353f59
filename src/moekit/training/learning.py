"""Can the routers that are to train learn from the language-modelling loss at all?

A router learns through the weights that it gives to the chosen experts. With one expert a token and weights normalised
over the chosen, that weight is 1 whatever the router computes: nothing reaches it, and what moves is rounding.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from moekit.anatomy.asking import contract, raw_answer
from moekit.anatomy.probe import MoELayer
from moekit.errors import BadConfig
from moekit.runtime.router import ChoosePart
from moekit.runtime.slots import slot_of
from moekit.training.config import TrainConfig
from moekit.training.layers import moe_layers

logger = logging.getLogger(__name__)

PROBE_ROWS = 64
# Gradients of weights, as a share of those of logits, below which only rounding is left; fp32 rounds at 1e-7.
NOTHING = 1e-5


def why_stuck(layer: MoELayer) -> str:
    """Why no gradient of an output reaches a layer's router, in words; "" where one does."""
    if learns_from_weights(layer):
        return ""
    if _weighs_by_own_rows(layer):
        return "a routing policy weighs choices by rows of its own, which do not learn"
    if layer.geometry.top_k == 1:
        return "a token takes one expert, and its weight is normalised to 1"
    return "the weights that it gives do not depend on it"


def _weighs_by_own_rows(layer: MoELayer) -> bool:
    slot = slot_of(layer.require_router())
    parts = [] if slot is None else slot.of_layer()
    return any(isinstance(on.part, ChoosePart) and on.part.own_rows and bool(on.stored) for on in parts)


def learns_from_weights(layer: MoELayer) -> bool:
    """Whether the weights that a layer's router gives carry a gradient to its trainable parameters.

    Asked with random hidden states. A router that cannot be asked alone (it reads the forward pass around it) counts
    as one that learns, unless a policy says that it chooses without it.
    """
    router = layer.require_router()
    if _weighs_by_own_rows(layer):
        return False
    parameters = [p for p in router.parameters() if p.requires_grad]
    if not parameters or any(p.is_meta for p in parameters):
        return True
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(PROBE_ROWS, layer.geometry.hidden, generator=generator).to(parameters[0])
    given = tuple(getattr(layer.block, name) for name in layer.passed)
    answer = contract(raw_answer(router, router.forward, hidden_TH, given, gradients=True), PROBE_ROWS)
    if answer is None:
        return True
    logits, weights_TK, _ = answer
    try:
        reached = [_reached(one, parameters, generator) for one in (weights_TK, logits)]
    except RuntimeError:
        return True
    return reached[0] > NOTHING * reached[1]


def _reached(answer: torch.Tensor, parameters: list[nn.Parameter], generator: torch.Generator) -> float:
    """Norm of the gradient that a random direction of an answer sends to parameters."""
    if not answer.requires_grad:
        return 0.0
    direction = torch.randn(answer.shape, generator=generator).to(answer)
    found = torch.autograd.grad((answer * direction).sum(), parameters, retain_graph=True, allow_unused=True)
    return float(sum(g.float().square().sum() for g in found if g is not None) ** 0.5)


def check_routers_learn(model: nn.Module, config: TrainConfig) -> None:
    """Say, before a run begins, which routers the language-modelling loss cannot reach.

    Args:
        model: with `requires_grad` set as the run wants it.
        config: the run's knobs; an objective on routers reaches every router.

    Raises:
        BadConfig: nothing but such routers trains, so that the run would change nothing.
    """
    if config.terms().on_routers():
        return
    stuck = [layer for layer in moe_layers(model) if layer.router is not None and not learns_from_weights(layer)]
    if not stuck:
        return
    numbers = [layer.index for layer in stuck]
    message = f"no gradient of the language-modelling loss reaches the router: {why_stuck(stuck[0])}"
    hint = (
        "train other parts, or merge again so that the router chooses (--set router=representative)"
        if _weighs_by_own_rows(stuck[0])
        else "add an objective on routers (balance: 0.01), let the weights be (norm_topk_prob=False where the family "
        "has it), or take 2 experts"
    )
    theirs = {id(p) for layer in stuck for p in layer.require_router().parameters()}
    if all(id(p) in theirs for p in model.parameters() if p.requires_grad):
        raise BadConfig(f"{message}, and nothing else is to train", layer=numbers[0], hint=hint)
    logger.warning("layers %s: %s; %s", ", ".join(map(str, numbers)), message, hint)
