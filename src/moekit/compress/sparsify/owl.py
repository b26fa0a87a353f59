"""OWL: layers with more outliers keep more weights (ICML 2024, arXiv:2310.05175).

Legend: L layers, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.input_norms import input_norms, smallest_products, statistics_of, unseen_experts
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import Part
from moekit.compress.engine.zeroing import FIELDS, SparsifyMethod, check_sparsity
from moekit.compress.maths.masks import UNSTRUCTURED, smallest
from moekit.compress.weights import LayerWeights
from moekit.errors import BadData


def outlier_share(weights: LayerWeights, inputs: LayerInputs, multiple: float, *, gated: bool = False) -> float:
    """D = 100 x share of the layer's Wanda scores that exceed `multiple` times their mean.

    The scores of all matrices of all experts count together. Experts that no token chose have no scores.

    Args:
        weights: of the layer.
        inputs: of the layer.
        multiple: M.
        gated: as in Wanda.

    Raises:
        BadData: no token reached the layer.
    """

    def scores(part: Part, expert: int) -> Tensor | None:
        stacked: Tensor | None = getattr(weights, FIELDS[part])
        norms_C = input_norms(inputs, part, expert, gated=gated)
        if stacked is None or norms_C is None:
            return None
        return stacked[expert].float().abs().mul_(norms_C.to(stacked.device))

    # Computed twice rather than kept: a layer's scores take more memory than the layer.
    places = [(part, expert) for part in FIELDS for expert in range(weights.experts)]
    total, count, outliers = 0.0, 0, 0
    for place in places:
        if (found := scores(*place)) is not None:
            total, count = total + float(found.double().sum()), count + found.numel()
    if not count:
        raise BadData("no token reached the layer's experts", layer=inputs.layer, hint="calibrate on more text")
    for place in places:
        if (found := scores(*place)) is not None:
            outliers += int((found > multiple * total / count).sum())
    return 100.0 * outliers / count


def owl_sparsities(
    shares_L: Sequence[float], sparsity: float, strength: float, sizes_L: Sequence[int] | None = None
) -> list[float]:
    """Sparsity of each layer: 1 - keep_l, keep_l = 2 lambda (D_l - min D) / (max D - min D) - mean + 1 - S.

    The mean over all weights is S exactly: layers count by their size, which is the paper's plain mean where they are
    alike. Where a layer's sparsity would fall below 0, or a layer would keep less than a tenth of 1 - S, the deviations
    of all layers shrink by the same factor. Equal D give S everywhere.

    Args:
        shares_L: D of each layer.
        sparsity: S.
        strength: lambda.
        sizes_L: weights of each layer; all alike by default.
    """
    low, high = min(shares_L), max(shares_L)
    if high == low:
        return [sparsity] * len(shares_L)
    sizes_L = sizes_L or [1] * len(shares_L)
    raised_L = [2 * strength * (share - low) / (high - low) for share in shares_L]
    mean = sum(r * n for r, n in zip(raised_L, sizes_L, strict=True)) / sum(sizes_L)
    most, least = max(raised_L) - mean, mean - min(raised_L)
    shrink = min([1.0, *(room / d for room, d in ((sparsity, most), (0.9 * (1 - sparsity), least)) if d > 0)])
    return [max(sparsity - shrink * (raised - mean), 0.0) for raised in raised_L]


@register(
    name="owl",
    kind="sparsify",
    paper="arXiv:2310.05175",
    needs=("load", "input_square", "inner_square"),
    changes="weights",
    limits=(
        "Unstructured only: a pattern n:m fixes every layer's sparsity.",
        "Zeros are stored: neither the file nor the computation shrinks.",
        "Reads all weights once more than Wanda, to count outliers.",
        "On models of a few layers one sparsity for all may be better.",
    ),
)
class OWL(SparsifyMethod):
    """Wanda or magnitude pruning with a sparsity for each layer: the more outliers, the more weights stay.

    D_l is the share (in %) of the layer's scores |W_ij| ||X_j|| above M times their mean; keep_l = (D_l - min D) /
    (max D - min D) 2 lambda, shifted so that the mean sparsity over the layers is S. Choose it for deep models from
    about 60 % zeros on, where one sparsity for all layers breaks the few that carry outliers.
    """

    reads_weights: ClassVar[bool] = True

    score: Literal["wanda", "magnitude"] = Field(default="wanda", description="what is zeroed within a layer")
    multiple: float = Field(default=3.0, gt=0, description="M: an outlier exceeds M times the mean (3 or 5)")
    strength: float = Field(default=0.08, ge=0, lt=0.5, description="lambda: sparsities span 2 lambda at most")
    gated: bool = Field(default=False, description="weigh tokens with their gate weights (MoE-Pruner)")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[SparsifyMethod]:
        """Both scores."""
        return [cls(), cls(score="magnitude", multiple=5.0)]

    @property
    def required(self) -> tuple[str, ...]:
        """Wanda's, whatever is zeroed: outliers are counted by its score."""
        return statistics_of(self.gated)

    @property
    def sequential(self) -> bool:
        """Wanda's scores follow the sparse layers before; magnitudes do not, and outliers are the dense model's."""
        return self.score == "wanda"

    def zeroed(self, matrix_RC: Tensor, part: Part, expert: int, inputs: LayerInputs, sparsity: float) -> Tensor:
        """Where the chosen score is smallest."""
        if self.score == "magnitude":
            return smallest(matrix_RC.float().abs(), sparsity, UNSTRUCTURED, "matrix")
        return smallest_products(matrix_RC, part, expert, inputs, sparsity, gated=self.gated)

    def figures(self, inputs: LayerInputs) -> dict[str, float | list[float]]:
        """Experts that were sparsified by magnitude, since no token chose them."""
        return unseen_experts(inputs) if self.score == "wanda" else {}

    def share(self, inputs: Mapping[int, LayerInputs], sparsity: float) -> dict[int, float]:
        """Sparsity of each layer by its outliers, in the dense model."""
        check_sparsity(sparsity)
        shares, sizes = [], []
        for seen in inputs.values():
            # Read anew, so that no more than one layer's weights are in memory.
            weights = dataclasses.replace(seen).weights
            shares.append(outlier_share(weights, seen, self.multiple, gated=self.gated))
            sizes.append(sum(t.numel() for name in FIELDS.values() if (t := getattr(weights, name)) is not None))
        return dict(zip(inputs, owl_sparsities(shares, sparsity, self.strength, sizes), strict=True))
