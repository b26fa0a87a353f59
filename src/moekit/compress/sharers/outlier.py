"""More bits for experts with outliers among their weights (QuantMoE-Bench, arXiv:2406.08155).

Legend: E experts, R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, RankedSharer, Scope


def outlier_score(matrix_RC: Tensor) -> float:
    """The largest, over inputs j, of max_i |W_ij| / mean_i |W_ij|; 1 where each column has one magnitude.

    Columns of zeros have no ratio and count as 1.
    """
    size_RC = matrix_RC.float().abs()
    mean_C = size_RC.mean(0)
    ratio_C = torch.where(mean_C > 0, size_RC.amax(0) / mean_C.clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    return float(ratio_C.max())


@register(
    name="outlier",
    kind=KIND,
    paper="arXiv:2406.08155",
    changes="weights",
    limits=("The paper ranks single matrices; here an expert has one width, and counts by the worst of its matrices.",),
)
class Outlier(RankedSharer):
    """Experts whose weights hold the largest outliers get the largest width, the others the smallest; needs no text.

    An expert's score is the largest over its matrices W and their inputs j of max_i |W_ij| / mean_i |W_ij|. Choose it
    where there is no text.
    """

    reads_weights: ClassVar[bool] = True

    scope: Scope = Field(default="model", description="budget of each layer by itself, or of the whole model")

    @classmethod
    def examples(cls) -> Sequence[Outlier]:
        """Both budgets."""
        return [cls(), cls(scope="layer")]

    def worth(self, seen: LayerInputs) -> Tensor:
        """The worst matrix of each expert."""
        stacks = [t for t in (seen.weights.gate_EIH, seen.weights.up_EIH, seen.weights.down_EHI) if t is not None]
        scores = [max(outlier_score(stack[e]) for stack in stacks) for e in range(seen.experts)]
        return torch.tensor(scores, dtype=torch.float64)
