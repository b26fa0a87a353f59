"""How much attention tokens are paid.

Legend: N tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moekit.trace.batch import TokenBatch, accumulate
from moekit.trace.vocabulary import statistic


@statistic(shape="E", sources=("choices", "attention"))
def attention_mass(seen: TokenBatch) -> Tensor:
    """Sum over the expert's tokens of the attention that each is paid by its row, mean over heads."""
    return accumulate(seen.chosen_NE.to(seen.received_N.dtype) * seen.received_N[:, None], 0)


@statistic(shape="", sources=("attention",), rule="max")
def attention_peak(seen: TokenBatch) -> Tensor:
    """Most attention that one token is paid by its row, mean over heads: an attention sink stands out."""
    return seen.received_N.amax()
