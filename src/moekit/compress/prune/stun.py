"""STUN's expert stage: experts that behave alike fall together, one of each cluster stays (arXiv:2409.06211).

Legend: E experts, H hidden, M clusters = experts kept.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ranking
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.clustering.agglomerative import Dendrogram, agglomerate
from moekit.compress.maths.clustering.distances import euclidean
from moekit.compress.maths.neurons.merging import merge_groups
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault


def normalised_coactivation(counts_EE: Tensor) -> Tensor:
    """Co-activation counts over their mean, the diagonal 0 and counted in the mean, [E, E] fp64."""
    counts_EE = counts_EE.double().clone().fill_diagonal_(0.0)
    mean = float(counts_EE.mean())
    return counts_EE / mean if mean > 0 else counts_EE


def nearest_to_mean(weights: LayerWeights, cluster: Sequence[int]) -> int:
    """Member whose weights, all flattened into one vector, lie nearest to the cluster's mean; ties go to the lower id.

    Args:
        weights: of the layer.
        cluster: experts, ascending.
    """
    squares = torch.zeros(len(cluster), dtype=torch.float64)
    for members in zip(*(weights.expert(expert) for expert in cluster), strict=True):
        # One tensor of the experts at a time; sums in fp32, so that half precision does not blur the mean.
        mean = sum((m.float() for m in members[1:]), members[0].float()) / len(members)
        squares += torch.stack([(m.float() - mean).square().sum(dtype=torch.float64).cpu() for m in members])
    return cluster[int(squares.argmin())]


@register(
    name="stun",
    kind="prune",
    paper="arXiv:2409.06211",
    needs=("load", "gated_output_norm"),
    changes="weights",
    limits=(
        "Routers without one matrix of a row for each expert are refused.",
        "Co-activation alone joins the two most popular experts: on small top-2 models worse than random.",
    ),
)
class Stun(PruneMethod):
    """Experts with similar router rows fall into clusters; one expert of each cluster stays, with its router row.

    Experts i and j are d_ij = lambda1 ||W_i - W_j|| - lambda2 a_ij apart: W are router rows, a_ij counts tokens that
    chose both, over its mean. Clusters grow under complete linkage; one threshold for all layers, or one number of
    clusters a layer. A cluster keeps its expert of the largest sum of g ||f(x)|| ("saliency"), or the one whose weights
    are nearest to the cluster's mean ("nearest": the paper's, no calibration needed). Choose it as the first of two
    stages: a tenth to a quarter of the experts, then single weights (`moekit methods sparsify`). Layers of fewer than
    kappa clusters may take means of weights and router rows (`reconstruct`: the paper's; experts are not aligned).
    """

    reads_weights: ClassVar[bool] = True
    rewrites: ClassVar[bool] = True

    router_distance: float = Field(default=1.0, ge=0, description="lambda1: weight of the distance of router rows")
    coactivation: float = Field(default=0.0, ge=0, description="lambda2: weight of the normalised co-activation")
    representative: Literal["saliency", "nearest"] = Field(
        default="saliency", description="who stays of a cluster: largest gated output, or nearest to the mean weights"
    )
    reconstruct: bool = Field(default=False, description="layers of fewer than kappa clusters take cluster means")
    kappa: int = Field(default=3, ge=1, description="fewest clusters of a layer that is not reconstructed")

    @model_validator(mode="after")
    def _some_distance(self) -> Stun:
        if self.router_distance == 0 and self.coactivation == 0:
            raise ValueError("router_distance and coactivation are both 0: nothing tells experts apart")
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Ours, the paper's, with co-activation, and with means."""
        means = cls(representative="nearest", reconstruct=True, kappa=geometry.experts)
        return [cls(), cls(representative="nearest"), cls(coactivation=0.5), means]

    @property
    def required(self) -> tuple[str, ...]:
        """What the knobs ask for: nothing with the paper's, (1, 0) and "nearest"."""
        counts = ("coactivation",) if self.coactivation else ()
        return (*counts, "load", "gated_output_norm") if self.representative == "saliency" else counts

    def distances(self, inputs: LayerInputs) -> Tensor:
        """d_ij between experts, [E, E] fp64, the diagonal 0.

        Raises:
            NumericFault: a router row holds NaN or infinity; names layer and expert.
        """
        total_EE = torch.zeros(inputs.experts, inputs.experts, dtype=torch.float64)
        if self.router_distance:
            rows_EH = inputs.weights.router_EH.detach().cpu()
            if bool((bad_E := ~rows_EH.isfinite().all(-1)).any()):
                bad, hint = int(bad_E.nonzero()[0]), "run moekit check on the model"
                raise NumericFault("the router's row is not finite", layer=inputs.layer, expert=bad, hint=hint)
            total_EE += self.router_distance * euclidean(rows_EH)
        if self.coactivation:
            total_EE -= self.coactivation * normalised_coactivation(inputs.statistics["coactivation"].cpu())
        return total_EE.fill_diagonal_(0.0)

    def dendrogram(self, inputs: LayerInputs) -> Dendrogram:
        """The clustering: exact copies meet first, protected experts never meet another."""
        gap_EE = self.distances(inputs)
        if self.coactivation:
            nearest = float(gap_EE.min()) - 1.0
            for i, j in _copies(inputs.weights):
                gap_EE[i, j] = gap_EE[j, i] = nearest
        if inputs.protected:
            index = sorted(inputs.protected)
            gap_EE[index] = gap_EE[:, index] = float("inf")
        return agglomerate(gap_EE, "complete")

    def score(self, inputs: LayerInputs) -> Tensor:
        """Sum of gated output norms ("saliency"), or the distance to the closest other expert ("nearest")."""
        if self.representative == "saliency":
            return inputs.statistics["gated_output_norm"].double()
        return self.distances(inputs).fill_diagonal_(float("inf")).amin(-1).nan_to_num(posinf=0.0)

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """Cut the clustering where `share` clusters are left and choose one expert of each."""
        ranked_E = ranking(scores_E, inputs)
        tree = self.dendrogram(inputs)
        clusters = tree.leaving(share)
        joins = inputs.experts - len(clusters)
        if len(clusters) > share:  # protected experts stand apart: what is too much goes whole, the least worth first
            clusters = tuple(sorted(clusters, key=lambda c: (-float(ranked_E[list(c)].max()), c))[:share])
        means = self.reconstruct and share < self.kappa
        chosen = {self._representative(inputs, ranked_E, cluster): cluster for cluster in clusters}
        keepers = tuple(sorted(chosen))
        return LayerOutcome(
            keep=keepers,
            sources=tuple(chosen[k] for k in keepers),
            shares=tuple(tuple(1 / len(chosen[k]) if means else float(e == k) for e in chosen[k]) for k in keepers),
            figures={
                "joined_at": tree.heights[joins - 1] if joins else 0.0,
                "largest_cluster": max(map(len, clusters)),
            },
        )

    def _representative(self, inputs: LayerInputs, ranked_E: Tensor, cluster: Sequence[int]) -> int:
        if len(cluster) == 1:
            return cluster[0]
        if self.representative == "nearest":
            return nearest_to_mean(inputs.weights, cluster)
        return max(cluster, key=lambda expert: (float(ranked_E[expert]), -expert))

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """The representatives, bit for bit; where the layer is reconstructed, means of clusters and router rows."""
        return merge_groups(weights, outcome.keep, outcome.sources or (), outcome.shares or ())

    def share(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], total: int, least: int, most: int
    ) -> dict[int, int]:
        """One threshold for all layers: the closest joins of any layer are made until `total` clusters are left."""
        counts = {layer: seen.experts for layer, seen in inputs.items()}
        offers: list[tuple[float, int]] = []
        for layer, seen in inputs.items():
            # Read anew, so that no more than one layer's weights are in memory. Joins that protection forbids come
            # last of all, so that the bounds can still be met.
            heights = [*self.dendrogram(dataclasses.replace(seen)).heights, *[float("inf")] * seen.experts][
                : seen.experts - 1
            ]
            must = max(0, seen.experts - most)
            counts[layer] -= must
            offers += [(height, layer) for height in heights[must : seen.experts - min(least, seen.experts)]]
        for _, layer in sorted(offers)[: max(0, sum(counts.values()) - total)]:
            counts[layer] -= 1
        return counts


def _copies(weights: LayerWeights) -> list[tuple[int, int]]:
    """Pairs of experts that are equal in all router rows and weights."""
    rows_E = [[*(t[e] for t in weights.router.values()), *weights.expert(e)] for e in range(weights.experts)]
    pairs = itertools.combinations(range(weights.experts), 2)
    return [(i, j) for i, j in pairs if all(map(torch.equal, rows_E[i], rows_E[j]))]
