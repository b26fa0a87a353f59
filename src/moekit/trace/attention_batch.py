"""Queries and keys of one forward pass at one layer, and how much attention each token is paid.

Legend: B rows, S positions, h query heads, g key heads, d width of a head, N tokens that are no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moekit.trace.expert_batch import wide


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """What a layer's attention was given: after rotary embedding, before the softmax.

    Attributes:
        query_BhSd: queries.
        key_BgSd: keys; a group of h / g query heads shares one.
        mask: as the layer was given it: bool (True attends), additive floats, [B or 1, h or 1, S, S]; None for causal.
        scaling: factor on the products.
        real_BS: False at padding, whose queries pay nothing.
        causal: whether a mask of None means that tokens see what is before them only.
        sinks_h: logits of attention that is paid to nothing (gpt-oss); None without.
        softcap: c of c tanh(score / c); None without.
    """

    query_BhSd: Tensor
    key_BgSd: Tensor
    mask: Tensor | None
    scaling: float
    real_BS: Tensor
    causal: bool = True
    sinks_h: Tensor | None = None
    softcap: float | None = None

    def probabilities_hSS(self, row: int) -> Tensor:
        """Attention of one row: what query i pays to key j, fp32 or wider; 0 where query i is padding."""
        query_hSd, key_gSd = wide(self.query_BhSd[row]), wide(self.key_BgSd[row])
        heads, length = query_hSd.shape[0], query_hSd.shape[1]
        key_hSd = key_gSd.repeat_interleave(heads // key_gSd.shape[0], dim=0)
        score_hSS = query_hSd @ key_hSd.transpose(1, 2) * self.scaling
        if self.softcap is not None:
            score_hSS = self.softcap * torch.tanh(score_hSS / self.softcap)
        score_hSS = self._masked(score_hSS, row)
        if self.sinks_h is not None:
            sink_hS1 = self.sinks_h.to(score_hSS).view(heads, 1, 1).expand(heads, length, 1)
            share_hSS = torch.cat([score_hSS, sink_hS1], dim=-1).softmax(-1)[..., :-1]
        else:
            share_hSS = score_hSS.softmax(-1)
        return share_hSS.masked_fill(~self.real_BS[row].to(share_hSS.device)[None, :, None], 0.0)

    def _masked(self, score_hSS: Tensor, row: int) -> Tensor:
        if self.mask is None:
            if not self.causal:
                return score_hSS
            ahead_SS = torch.ones(score_hSS.shape[1:], dtype=torch.bool, device=score_hSS.device).triu(1)
            return score_hSS.masked_fill(ahead_SS, float("-inf"))
        mask = self.mask[row if self.mask.shape[0] > 1 else 0]
        length = score_hSS.shape[-1]
        mask = mask[..., :length, :length]
        if mask.dtype == torch.bool:
            return score_hSS.masked_fill(~mask, float("-inf")).nan_to_num(neginf=torch.finfo(score_hSS.dtype).min)
        return score_hSS + mask.to(score_hSS.dtype)

    @cached_property
    def received_N(self) -> Tensor:
        """Attention that each token is paid by all tokens of its row, mean over heads, [N] (arXiv:2410.06270).

        A column sum, computed row by row when it is first asked for.
        """
        rows = []
        for row in range(len(self.query_BhSd)):
            received_S = self.probabilities_hSS(row).mean(0).sum(0)
            rows.append(received_S[self.real_BS[row].to(received_S.device)])
        return torch.cat(rows)
