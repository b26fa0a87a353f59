"""How alike experts are on the same tokens, chosen or not: every expert runs on every token.

Legend: N tokens, E experts, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import TokenBatch, widest
from moekit.trace.vocabulary import statistic


@statistic(shape="EH", sources=("all_outputs",))
def all_output_sum(seen: TokenBatch) -> Tensor:
    """Sum of each expert's outputs before gating over all tokens, chosen or not, by channel."""
    made_NEH = seen.all_outputs_NEH
    return made_NEH.sum(0, dtype=widest(made_NEH.device))


@statistic(shape="EE", sources=("all_outputs",))
def all_output_gram(seen: TokenBatch) -> Tensor:
    """Sum over all tokens of the inner products of two experts' outputs; distances and cosines follow."""
    return torch.einsum("neh,nfh->ef", seen.all_outputs_NEH, seen.all_outputs_NEH)


@statistic(shape="EE", sources=("all_outputs",))
def all_output_cosine(seen: TokenBatch) -> Tensor:
    """Sum over all tokens of the cosine of two experts' outputs; an output of zeros is like none, nor itself."""
    made_NEH = seen.all_outputs_NEH
    norm_NE1 = torch.linalg.vector_norm(made_NEH, dim=-1, keepdim=True)
    unit_NEH = made_NEH / norm_NE1.clamp_min(torch.finfo(made_NEH.dtype).tiny)
    return torch.bmm(unit_NEH, unit_NEH.transpose(1, 2)).sum(0, dtype=widest(made_NEH.device))
