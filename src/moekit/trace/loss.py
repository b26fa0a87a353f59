"""Losses that gradients are taken of: sums over tokens, so that batches add up.

Legend: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (logits [B, S, V], token ids [B, S], True where a token is [B, S]) -> one number
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def next_token_loss(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it in its row, summed, in nats; padding does not count.

    Args:
        logits_BSV: of the model.
        ids_BS: token ids.
        mask_BS: True where a token is, False at padding.
    """
    counts_BS = mask_BS[:, :-1] & mask_BS[:, 1:]
    logits_nV = logits_BSV[:, :-1][counts_BS]
    wide = torch.promote_types(logits_nV.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits_nV.to(wide), ids_BS[:, 1:][counts_BS], reduction="sum")
