"""Sub-MoE: experts that give alike outputs become one, in the subspace that they share (arXiv:2506.23266).

Legend: N tokens, E experts, H hidden, I expert width, P clusters, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from pydantic import Field, model_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.budget.spending import spend
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Align, Groups, MergeMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.clustering.kernel_kmeans import KernelClusters, kernel_kmeans, spread
from moekit.compress.maths.neurons.align import permute_neurons, single
from moekit.compress.maths.neurons.merging import Match, merge_groups
from moekit.compress.maths.neurons.subspace import project, union_gram
from moekit.compress.weights import LayerWeights

# Matrices of an expert, with the second moments of what reaches them.
_MATRICES = (("gate_EIH", "input_moment"), ("up_EIH", "input_moment"), ("down_EHI", "inner_moment"))


def output_similarity(inputs: LayerInputs) -> Tensor:
    """Mean over all tokens, chosen or not, of the cosine of two experts' outputs, [E, E].

    Raises:
        NumericFault: outputs are not finite; names layer and expert.
    """
    return inputs.finite("all_output_cosine").double().cpu() / max(inputs.statistics.tokens, 1)


@register(
    name="sub-moe",
    kind="merge",
    paper="arXiv:2506.23266",
    needs=("load", "all_output_cosine"),
    changes="weights",
    traits=("stochastic",),
    limits=(
        "Rank saves no bytes here: merged matrices are written whole, not as factors, and experts that stay alone are "
        "not touched.",
        "With `whiten` the trace and the plan hold E (H^2 + I^2) numbers a layer.",
        "Runs all experts on all tokens of the calibration text.",
        "Tokens of a merged expert go where the router's remaining rows send them, not to the expert that took it in, "
        "unless --set router=redirect keeps all rows (for moekit.load).",
    ),
)
class SubMoE(MergeMethod):
    """Cluster experts by k-means on what they give, and average each cluster by use.

    Sim(i, j) = mean over all tokens, chosen or not, of cos(f_i(x), f_j(x)). K-means (k-means++ starts, the best of
    several) on outputs scaled to norm 1 token by token, for which ||a - b||^2 = 2 (1 - Sim) on the mean. Each cluster
    becomes W = sum_i f_i W_i / sum_i f_i, f the load; that is what the paper's union decomposition [W_1 ... W_n] = U S
    [V_1^T ... V_n^T] with averaged V gives as long as nothing is cut off. With `rank` R it is U_R U_R^T W, U_R the
    first eigenvectors of sum_i W_i C_i W_i^T (C_i = 1, or with `whiten` the second moment of what reaches W_i, where
    any token does). The row of the cluster's most used expert stays in the router. With the scope "global" layers that
    stand together share their budget: merges are spent, one by one, where the cost of k-means rises least. Choose it
    where experts do alike things under alike names; read the proof against pruning.
    """

    align: Align = Field(
        default="none",
        description="weights: put each member's neurons in the order nearest to those of the expert it joins; none: "
        "merge them as they lie, as in the paper",
    )
    rank: int | None = Field(
        default=None, ge=1, description="project merged matrices on so many shared directions; none leaves the mean"
    )
    whiten: bool = Field(default=False, description="weigh these directions by what reaches each expert; with rank")
    starts: int = Field(default=10, ge=1, description="starts of k-means, of which the best counts")
    span: int = Field(
        default=2, ge=0, description="with scope global: MoE layers in a row that share one budget; 0: all of them"
    )

    @model_validator(mode="after")
    def _whitens_something(self) -> SubMoE:
        if self.whiten and self.rank is None:
            raise ValueError("whiten changes nothing without rank: give a rank, or leave whiten out")
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[MergeMethod]:
        """The mean as in the paper, aligned, and low ranks of both kinds."""
        rank = max(1, min(geometry.width, geometry.hidden) // 2)
        return [cls(), cls(align="weights", rank=rank), cls(rank=rank, whiten=True)]

    @property
    def required(self) -> tuple[str, ...]:
        """Load and cosines; to whiten, second moments of inputs, too."""
        return ("load", "all_output_cosine", *(("input_moment", "inner_moment") if self.whiten else ()))

    def score(self, inputs: LayerInputs) -> Tensor:
        """The load."""
        return inputs.statistics.load_E.double()

    def clusters(self, inputs: LayerInputs, experts: Sequence[int], count: int) -> KernelClusters:
        """K-means of some experts; groups by position in `experts`."""
        similarity_EE = output_similarity(inputs)[list(experts)][:, list(experts)]
        return kernel_kmeans(similarity_EE, count, inputs.generator(f"sub-moe {count}"), starts=self.starts)

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """The clusters."""
        return [[experts[i] for i in group] for group in self.clusters(inputs, experts, count).groups]

    def share(
        self, inputs: Mapping[int, LayerInputs], scores: Mapping[int, Tensor], total: int, least: int, most: int
    ) -> dict[int, int]:
        """Experts of each layer: merges go, one by one, where the cost of k-means rises least.

        Raises:
            BadConfig: protected experts leave too little to merge.
        """
        seen = {layer: inputs[layer] for layer in inputs}
        free = {layer: [e for e in range(own.experts) if e not in own.protected] for layer, own in seen.items()}

        @functools.cache
        def cost(layer: int, count: int) -> float:
            return self.clusters(seen[layer], free[layer], count - len(seen[layer].protected)).cost

        lowest = {n: max(least, len(own.protected) + bool(free[n])) for n, own in seen.items()}
        return spend(
            cost,
            start={layer: min(most, own.experts) for layer, own in seen.items()},
            lowest={layer: min(count, seen[layer].experts) for layer, count in lowest.items()},
            total=total,
            span=self.span,
        )

    def figures(self, inputs: LayerInputs, groups: Groups) -> dict[str, float | list[float]]:
        """What k-means makes small: the squared distances to the clusters' means, all experts together."""
        return {"cost": spread(output_similarity(inputs), tuple(tuple(group) for group in groups))}

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """Each cluster's mean by use, with a rank projected on the directions that its members share."""
        if self.rank is None or outcome.sources is None or outcome.shares is None:
            return super().transform(weights, outcome, inputs)
        found = self.match(weights, inputs)
        match = None if found is None else functools.cache(found)
        made = merge_groups(
            weights, outcome.keep, outcome.sources, outcome.shares, match=match, router=self.stored_rows
        )
        for position, (reference, group) in enumerate(zip(outcome.keep, outcome.sources, strict=True)):
            if len(group) > 1:
                self._project(made, position, _aligned(weights, reference, group, match), group, inputs)
        return made

    def _project(
        self,
        made: LayerWeights,
        position: int,
        members: Sequence[LayerWeights],
        group: Sequence[int],
        inputs: LayerInputs,
    ) -> None:
        """Project the matrices of one merged expert, in place; `members` lie in the order in which they were merged."""
        assert self.rank is not None
        for name, moment in _MATRICES:
            target: Tensor | None = getattr(made, name)
            if target is None:
                continue
            pairs = []
            for expert, member in zip(group, members, strict=True):
                # In the order of the member's own neurons, in which its inputs were counted.
                matrix: Tensor = getattr(member, name)[0]
                pairs.append((matrix, inputs.statistics[moment][expert] if self.whiten else None))
            gram_OO = union_gram(pairs)
            if not bool(gram_OO.any()):  # no token reached any of them: nothing says which inputs matter
                gram_OO = union_gram((matrix, None) for matrix, _ in pairs)
            target[position] = project(target[position], gram_OO.to(target.device), self.rank)


def _aligned(weights: LayerWeights, reference: int, group: Sequence[int], match: Match | None) -> list[LayerWeights]:
    """Members of a group in the order in which they were merged; columns of the down projections where they were.

    Columns are summed over in W C W^T, whose C is known in the order of the member's own neurons.
    """
    made = []
    for expert in group:
        one = single(weights, expert)
        if match is not None and expert != reference:
            moved = permute_neurons(weights, expert, match(reference, expert))
            one = LayerWeights(up_EIH=moved.up_EIH, down_EHI=one.down_EHI, gate_EIH=moved.gate_EIH)
        made.append(one)
    return made
