"""Losses that gradients are taken of: sums over tokens, so that batches add up.

Legend: B rows, S positions, V vocabulary, n positions that count, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moekit.data.forcing import decoder_inputs
from moekit.errors import BadConfig

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


def divergence_of_likeliest(student_nV: Tensor, teacher_nV: Tensor, top: int) -> Tensor:
    """KL divergence of teacher from student among the teacher's likeliest tokens, summed over positions, in nats.

    Both sides are renormalised over these tokens: logits of all others count nowhere, and where the student is the
    teacher, loss and gradient are exactly zero (SlimMoE, arXiv:2506.18349).

    Args:
        student_nV: logits, through which the gradient goes.
        teacher_nV: logits.
        top: K; all where there are fewer.
    """
    wide = torch.promote_types(student_nV.dtype, torch.float32)
    listed = teacher_nV.to(wide).topk(min(top, teacher_nV.shape[-1]), dim=-1)
    wanted_nK = listed.values.log_softmax(dim=-1)
    got_nK = student_nV.to(wide).gather(-1, listed.indices).log_softmax(dim=-1)
    return (wanted_nK.exp() * (wanted_nK - got_nK)).sum()


class TeacherLoss:
    """How far a model is from a teacher on the same text, in what the teacher holds likeliest.

    Args:
        teacher: a model of the same vocabulary, on any device; it is put into eval mode.
        top: K; the paper's is 8.
    """

    def __init__(self, teacher: Any, top: int = 8) -> None:
        self.teacher = teacher.eval()
        self.top = top

    def __call__(self, logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Summed over all tokens but padding.

        Raises:
            BadConfig: the teacher knows more tokens.
        """
        ids, mask = ids_BS.to(self.teacher.device), mask_BS.to(self.teacher.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False, "attention_mask": mask.long()}
        inputs |= decoder_inputs(self.teacher, ids, inputs["attention_mask"])
        with torch.no_grad():
            said_BSV = self.teacher(**inputs).logits
        if said_BSV.shape[-1] > logits_BSV.shape[-1]:
            raise BadConfig(
                f"the teacher has {said_BSV.shape[-1]} tokens, the model {logits_BSV.shape[-1]}",
                hint="teacher and model must know the same token ids",
            )
        return divergence_of_likeliest(logits_BSV[mask_BS], said_BSV[mask].to(logits_BSV.device), self.top)
