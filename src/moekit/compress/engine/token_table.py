"""Routers that look up a token's experts by the token's number, once some of the experts go.

DeepSeek V4's first layers choose by a table [V, K] that training has fixed: K different experts for each entry of the
vocabulary. Where one of them goes, another takes its place in the table: the one that it was merged into, or else the
one whose row of the router is most like its own, because that row is what weighs the expert. A token's experts stay
different ones.

Legend: V entries of the vocabulary, E experts, M experts kept, K choices a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moekit.anatomy.probe import MoELayer
from moekit.compress.engine.outcome import LayerOutcome

_ROWS = 8192


def token_tables(layer: MoELayer) -> Iterator[tuple[str, Tensor]]:
    """A block's tables that name the experts of every token id, by name below the block."""
    held = {*(m for m in layer.experts.modules()), *(m for s in layer.shared for m in s.modules())}
    for path, module in layer.block.named_modules():
        if module in held and module is not layer.block:
            continue
        for name, buffer in module._buffers.items():
            saved = name not in module._non_persistent_buffers_set
            # A vector would count something of every expert, and is cut by its shape.
            if buffer is not None and saved and is_token_table(buffer.shape, buffer.dtype):
                yield f"{path}.{name}".lstrip("."), buffer


def is_token_table(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a buffer of a router holds experts' numbers for each token id: whole numbers [V, K]."""
    return len(shape) == 2 and not dtype.is_floating_point and dtype is not torch.bool


@torch.no_grad()
def preferences(outcome: LayerOutcome, experts: int, router_EH: Tensor | None = None) -> Tensor:
    """For each expert the new numbers in the order in which they may take its place, [E, M]; itself first.

    Args:
        outcome: which experts stay, and what goes into them.
        experts: E.
        router_EH: the router's rows; None takes the kept ones in turn, from the expert's own number on.
    """
    keep = torch.tensor(outcome.keep)
    if router_EH is None:
        behind_EM = (keep[None] - torch.arange(experts)[:, None]) % experts
        likeness_EM = -behind_EM.double()
    else:
        rows_EH = normalize(router_EH.double().cpu(), dim=1)
        likeness_EM = rows_EH @ rows_EH[keep].T
    for new, members in enumerate(outcome.sources or ()):
        likeness_EM[list(members), new] = 2.0
    likeness_EM[keep, torch.arange(len(keep))] = 3.0
    # Stable: of two alike the lower number, whatever the machine.
    return likeness_EM.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def renumbered(table_VK: Tensor, order_EM: Tensor, outcome: LayerOutcome) -> Tensor:
    """The table by new numbers, every token with K different experts.

    Args:
        table_VK: experts of each token id, by old number: K different ones.
        order_EM: see `preferences`.
        outcome: which experts stay; at least K.
    """
    stays_E = torch.zeros(len(order_EM), dtype=torch.bool)
    stays_E[list(outcome.keep)] = True
    parts = [_renumbered(part, order_EM, stays_E) for part in torch.split(table_VK.cpu().long(), _ROWS)]
    return torch.cat(parts).to(table_VK)


def _renumbered(table_VK: Tensor, order_EM: Tensor, stays_E: Tensor) -> Tensor:
    # Who stays keeps its place, whatever stands before it.
    made_VK = order_EM[:, 0][table_VK]
    stays_VK = stays_E[table_VK]
    taken_VM = torch.zeros(len(table_VK), order_EM.shape[1], dtype=torch.bool)
    for column in range(table_VK.shape[1]):
        taken_VM[torch.arange(len(table_VK)), made_VK[:, column]] |= stays_VK[:, column]
    for column in range(table_VK.shape[1]):
        (rows_N,) = stays_VK[:, column].logical_not().nonzero(as_tuple=True)
        order_NM = order_EM[table_VK[rows_N, column]]
        first_N1 = (~taken_VM[rows_N].gather(1, order_NM)).int().argmax(1, keepdim=True)
        chosen_N = order_NM.gather(1, first_N1).squeeze(1)
        taken_VM[rows_N, chosen_N] = True
        made_VK[rows_N, column] = chosen_N
    return made_VK


def rows_beside(module: nn.Module, experts: int) -> Tensor | None:
    """The router's rows [E, H] among a module's own tensors; None where no single matrix has so many rows."""
    found = [p for p in module._parameters.values() if p is not None and p.dim() == 2 and p.shape[0] == experts]
    return found[0].detach() if len(found) == 1 else None
