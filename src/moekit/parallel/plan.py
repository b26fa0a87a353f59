"""What a rank sends for the choices its tokens made: pure functions on tensors, without any process group.

A *row* is one hidden state on its way to one rank. It carries *slots*: local ids of the experts it is for there, and
their router weights. Once per expert a row has one slot; once per rank it has as many as the token chose experts there,
so that the row travels once, and one partial sum comes back.

Legend: N tokens, K choices a token, E experts, R ranks, P rows sent, S slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.parallel.layout import ExpertLayout


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Rows of one rank, ordered by destination.

    Attributes:
        tokens: N.
        token_P: token of each row.
        counts_R: rows for each rank.
        local_PS: local id of each slot's expert; `none` where the slot is empty.
        choice_PS: place of the slot in the flattened [N * K] choices; N * K where it is empty.
        none: local id that stands for no expert: no rank has as many experts.
    """

    tokens: int
    token_P: Tensor
    counts_R: Tensor
    local_PS: Tensor
    choice_PS: Tensor
    none: int

    @property
    def slots(self) -> int:
        """S."""
        return self.local_PS.shape[1]


def once_per_expert(indices_NK: Tensor, layout: ExpertLayout) -> DispatchPlan:
    """A row for every valid choice, as MegaBlocks and transformers' all-to-all send them.

    Args:
        indices_NK: chosen experts, E for none.
        layout: who owns them.
    """
    tokens, choices = indices_NK.shape
    flat = indices_NK.reshape(-1)
    # By owner, then by expert: what arrives from one rank is sorted by expert already.
    key = layout.rank_E[flat] * (layout.most + 1) + layout.local_E[flat]
    order = torch.argsort(key, stable=True)
    counts_R = _count(layout.rank_E[flat], layout.ranks)
    if bool((flat == layout.experts).any()):
        order = order[: int(counts_R.sum())]
    return DispatchPlan(
        tokens=tokens,
        token_P=order // choices,
        counts_R=counts_R,
        local_PS=layout.local_E[flat[order]].unsqueeze(1),
        choice_PS=order.unsqueeze(1),
        none=layout.most,
    )


def once_per_rank(indices_NK: Tensor, layout: ExpertLayout) -> DispatchPlan:
    """A row for every distinct rank among a token's choices: the fewest that exact results allow.

    Args:
        indices_NK: chosen experts, E for none.
        layout: who owns them.
    """
    tokens, choices = indices_NK.shape
    ranks = layout.ranks
    rank_NK = layout.rank_E[indices_NK]
    touched_RN = torch.zeros(ranks + 1, tokens, dtype=torch.bool, device=indices_NK.device)
    touched_RN.scatter_(0, rank_NK.T, True)
    touched_RN = touched_RN[:ranks]
    rank_P, token_P = touched_RN.nonzero(as_tuple=True)
    rows = len(token_P)
    # Row of each (rank, token); choices of no expert point behind the last row.
    row_RN = torch.full((ranks + 1, tokens), rows, device=indices_NK.device)
    row_RN[rank_P, token_P] = torch.arange(rows, device=indices_NK.device)
    row_NK = row_RN.gather(0, rank_NK.T).T
    # A choice's slot: how many earlier choices of its token go to the same rank.
    same_NKK = rank_NK.unsqueeze(2) == rank_NK.unsqueeze(1)
    slot_NK = same_NKK.tril(-1).sum(-1)
    slots = max(1, min(choices, layout.most))
    target = (row_NK * slots + slot_NK.clamp(max=slots - 1)).reshape(-1)
    local_PS = torch.full(((rows + 1) * slots,), layout.most, dtype=torch.int64, device=indices_NK.device)
    choice_PS = torch.full_like(local_PS, tokens * choices)
    local_PS[target] = layout.local_E[indices_NK].reshape(-1)
    choice_PS[target] = torch.arange(tokens * choices, device=indices_NK.device)
    return DispatchPlan(
        tokens=tokens,
        token_P=token_P,
        counts_R=touched_RN.sum(1),
        local_PS=local_PS[: rows * slots].view(rows, slots),
        choice_PS=choice_PS[: rows * slots].view(rows, slots),
        none=layout.most,
    )


def _count(rank_P: Tensor, ranks: int) -> Tensor:
    # Not bincount: it waits for a GPU and has no deterministic kernel there.
    counts = torch.zeros(ranks + 1, dtype=torch.int64, device=rank_P.device)
    return counts.scatter_add_(0, rank_P, torch.ones_like(rank_P))[:ranks]
