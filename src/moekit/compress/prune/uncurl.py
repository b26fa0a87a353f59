"""UNCURL: cluster experts by their router logits, align each cluster's neurons, merge (arXiv:2409.01483).

The paper states the three steps and not their constants; those here are M-SMoE's (arXiv:2310.01334) where that has
them, and otherwise textbook spectral clustering (Ng, Jordan and Weiss, NIPS 2001).

Legend: E experts, P experts kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.clustering.spectral import Array, Similarity, join_nearest, similarity, spectral_clusters
from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import member_shares, merge_groups
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig


@register(
    name="uncurl",
    kind="prune",
    paper="arXiv:2409.01483",
    needs=("logit_gram", "logit_sum", "load"),
    changes="weights",
    traits=("stochastic",),
    limits=(
        "The router can no longer weigh merged experts apart: pruning by saliency often writes better answers at the "
        "same size, so compare with it.",
        "The paper gives no code and few constants: affinity, k-means and router rows are choices of this library.",
        "Experts without a common origin (no upcycling) have few neurons in common, and their mean is worth little.",
    ),
)
class UNCURL(PruneMethod):
    """Merge experts that the router treats alike, neuron beside neuron, weighted by use.

    Per layer: A_ij = max(sim(z_i, z_j), 0) of the experts' logit columns z over the task's tokens; normalised spectral
    clustering of A into P clusters; in each the most used expert is the reference, and each other member's neurons are
    put in the order that minimises the sum of squared distances of gate rows, up rows and down columns; the merged
    expert is sum_e nu_e W_e / sum_e nu_e, nu the tokens that chose e (the plain mean where no token chose any). Experts
    that no token chose take no cluster while any chosen expert wants one. Choose it for one task, with its own text as
    calibration, on models whose experts started from one dense network.
    """

    rewrites = True

    affinity: Similarity = Field(default="cosine", description="of logit columns: cosine, pearson or rbf")
    restarts: int = Field(default=10, ge=1, le=1000, description="runs of k-means++, the best of which counts")
    align: bool = Field(default=True, description="reorder neurons of a cluster's members before they are merged")
    router: Literal["merge", "representative"] = Field(
        default="merge", description="a cluster's router row: its members' merged by use, or the most used member's"
    )

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Each affinity, with and without alignment, both router rows."""
        return [cls(), cls(affinity="pearson", router="representative"), cls(affinity="rbf", align=False)]

    def score(self, inputs: LayerInputs) -> Tensor:
        """The load nu_e, by which members of a cluster count and representatives are chosen."""
        return inputs.statistics.load_E.double()

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """Cluster all experts into `share` groups, each kept under its most used member.

        Protected experts are groups of their own. Where they alone fill the budget, the others are dropped, since
        nothing may be merged into what must stay as it is.

        Raises:
            BadConfig: fewer experts are kept than are protected.
            NumericFault: the statistics hold NaN or infinity.
        """
        statistics = inputs.statistics
        alike_EE = similarity(inputs.finite("logit_gram"), statistics["logit_sum"], statistics.tokens, self.affinity)
        load_E = statistics.load_E
        groups = self._groups(alike_EE, load_E, share, inputs)
        # A stable maximum: of equally used members the lowest.
        named = sorted((max(group, key=lambda e: (int(load_E[e]), -e)), tuple(group)) for group in groups)
        pairs = [alike_EE[i, j] for _, group in named for i, j in combinations(group, 2)]
        figures: dict[str, float | list[float]] = {"largest_group": float(max(len(group) for _, group in named))}
        if pairs:
            figures["similarity_within_groups"] = float(np.mean(pairs))
        return LayerOutcome(
            keep=tuple(kept for kept, _ in named),
            sources=tuple(group for _, group in named),
            shares=member_shares(load_E, [group for _, group in named]),
            figures=figures,
        )

    def _groups(self, alike_EE: Array, load_E: Tensor, keep: int, inputs: LayerInputs) -> list[list[int]]:
        protected = sorted(inputs.protected)
        slots = keep - len(protected)
        if slots < 0:
            raise BadConfig(
                f"{len(protected)} experts are protected, but only {keep} may stay",
                layer=inputs.layer,
                hint=f"keep at least {len(protected)}, or protect fewer",
            )
        own = [[e] for e in protected]
        if slots == 0:
            return own
        free = [e for e in range(inputs.experts) if e not in inputs.protected]
        used, unused = ([e for e in free if bool(load_E[e] > 0) == wanted] for wanted in (True, False))
        if len(used) < slots:
            return own + [[e] for e in used] + self._cluster(alike_EE, load_E, unused, [], slots - len(used), inputs)
        return own + self._cluster(alike_EE, load_E, used, unused, slots, inputs)

    def _cluster(
        self,
        alike_EE: Array,
        load_E: Tensor,
        experts: list[int],
        joining: list[int],
        count: int,
        inputs: LayerInputs,
    ) -> list[list[int]]:
        """Clusters of some experts, to the nearest of which others are added."""
        seed = int(torch.randint(2**31 - 1, (1,), generator=inputs.generator("uncurl")))
        chosen, everyone = np.array(experts), np.array(experts + joining)
        found = spectral_clusters(
            alike_EE[np.ix_(chosen, chosen)],
            count,
            importance_E=load_E.double().cpu().numpy()[chosen],
            restarts=self.restarts,
            seed=seed,
        )
        labels = join_nearest(np.concatenate([found, np.full(len(joining), -1)]), alike_EE[np.ix_(everyone, everyone)])
        return [sorted(everyone[labels == cluster].tolist()) for cluster in range(count)]

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """Align each group's members to the one that is kept, and merge them by their shares."""
        if outcome.sources is None or outcome.shares is None:
            return weights.select(outcome.keep)
        return merge_groups(
            weights,
            outcome.keep,
            outcome.sources,
            outcome.shares,
            match=(lambda reference, member: align_experts(weights, reference, member).order_I) if self.align else None,
            router="mean" if self.router == "merge" else "representative",
        )
