"""HC-SMoE: a tree of experts by what they put out, cut where as many branches are left as experts may stay.

arXiv:2410.08589. Legend: E experts, T tokens, H hidden, M groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Groups, MergeMethod
from moekit.compress.maths.clustering.agglomerative import Linkage, agglomerate
from moekit.compress.maths.clustering.distances import euclidean, root_mean_square

_STATISTIC = {"mean": "all_output_sum", "rms": "all_output_gram"}


@register(
    name="hc-smoe",
    kind="merge",
    paper="arXiv:2410.08589",
    needs=("load", "all_output_sum"),
    changes="weights",
    limits=(
        "The router can no longer weigh merged experts apart: pruning by saliency often writes better answers at the "
        "same size, however good multiple choice looks, so compare with it.",
        "Every expert reads every token of the text, E / K times the experts' work of a plain pass.",
        "Mean outputs forget all but the mean: experts of equal means and opposite outputs look alike (feature=rms "
        "tells them apart).",
        "The paper keeps all rows of the router and sends each to its cluster's expert; a stock checkpoint has one row "
        "a cluster (--set router=redirect keeps all, for moekit.load).",
        "The official scripts misspell the clustering's name and run k-means instead; here runs what the paper says.",
    ),
)
class HCSMoE(MergeMethod):
    """Experts with similar outputs fall into clusters, two at a time, and each cluster becomes one expert.

    Per layer: o_i = (1/T) sum_t f_i(x_t) over all tokens, whether they chose the expert or not, without gates; the
    distance of two experts is ||o_i - o_j||, that of two clusters its mean over all pairs of members; the nearest two
    clusters are joined until M are left; a cluster becomes sum_i n_i W_i / sum_i n_i, n the tokens that chose i (the
    plain mean where none chose any). Clusters for fewer experts are unions of those for more, and nothing is random.
    Choose it, with feature=rms and align=weights, where experts shall be merged and no training follows.
    """

    feature: Literal["mean", "rms"] = Field(
        default="mean",
        description="what experts are compared by: their mean outputs, as in the paper, or their outputs token by "
        "token (the root of the mean squared distance), which also sees what cancels out in a mean",
    )
    linkage: Linkage = Field(
        default="average",
        description="distance of clusters: mean over pairs (the paper's), nearest pair, farthest pair, or growth of "
        "the spread; the official code's complete and ward are other rules than these",
    )
    align: Literal["none", "weights"] = Field(
        default="none",
        description="order of neurons: as they lie, as in the paper, or each member's put in the order nearest to "
        "those of the expert it joins, so that neurons that do the same are averaged",
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[HCSMoE]:
        """The paper's, the better one, and the other linkages."""
        return [
            cls(),
            cls(feature="rms", align="weights"),
            cls(linkage="single", router="mean"),
            cls(linkage="complete", weigh="equal"),
            cls(feature="rms", linkage="ward"),
        ]

    @property
    def required(self) -> tuple[str, ...]:
        """The load, and what distances are taken from."""
        return ("load", _STATISTIC[self.feature])

    def score(self, inputs: LayerInputs) -> Tensor:
        """The load, by which members of a cluster count."""
        return inputs.statistics.load_E.double()

    def distances(self, inputs: LayerInputs) -> Tensor:
        """How far apart experts are, [E, E] fp64.

        Raises:
            NumericFault: outputs were NaN or infinite; names layer and expert.
        """
        seen, tokens = inputs.finite(_STATISTIC[self.feature]), inputs.statistics.tokens
        return root_mean_square(seen, tokens) if self.feature == "rms" else euclidean(seen.double() / max(tokens, 1))

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """The tree of these experts, cut at M clusters."""
        gap_EE = self.distances(inputs)[list(experts)][:, list(experts)]
        return [[experts[i] for i in cluster] for cluster in agglomerate(gap_EE, self.linkage).leaving(count)]

    def figures(self, inputs: LayerInputs, groups: Groups) -> dict[str, float | list[float]]:
        """Mean distance of pairs that were merged, over the mean of all pairs."""
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        if not pairs:
            return {}
        gap_EE = self.distances(inputs)
        mean = float(gap_EE.sum()) / (inputs.experts * (inputs.experts - 1))
        within = sum(float(gap_EE[i, j]) for i, j in pairs) / len(pairs)
        return {"distance_within_groups": within / mean if mean > 0 else 0.0}
