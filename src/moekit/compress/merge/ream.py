"""REAM: a few of the most valuable experts take in those that pruning would drop (arXiv:2604.04356).

Legend: N tokens, K choices a token, E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import ranking, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.merging import Groups, MergeMethod
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.clustering.pseudo_pruning import pseudo_pruning
from moekit.compress.maths.clustering.spherical_kmeans import unit
from moekit.compress.maths.neurons.align import PairedActivations, add_distances, align_experts, assigned
from moekit.compress.maths.neurons.merging import Match
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault, UnsupportedModel
from moekit.trace.batch import TokenBatch, widest
from moekit.trace.vocabulary import statistic

# Kept beside a layer's statistics: [E, I], the order in which each expert's neurons lie beside those it joins.
_ORDER = "neuron_order"
# What stands in for a saliency of 0 where members are weighed, unless some positive one is smaller.
_LEAST = 0.5


@statistic(shape="E", sources=("weights", "outputs"))
def gate_square_output_norm(seen: TokenBatch) -> Tensor:
    """Sum of g^2 n over the expert's tokens (REAM's saliency as its code takes it, arXiv:2604.04356)."""
    return seen.per_expert(seen.weights_NK.square() * seen.output_norm_NK)


@statistic(shape="EH", sources=("logits", "all_outputs"))
def scored_output_sum(seen: TokenBatch) -> Tensor:
    """Sum of p f(x) over all tokens, chosen or not, by channel; p is the router's score before top-k."""
    wide = widest(seen.indices_NK.device)
    return torch.einsum("ne,neh->eh", seen.scores_NE.to(wide), seen.all_outputs_NEH.to(wide))


def gate_similarity(gram_EE: Tensor) -> Tensor:
    """1 - D / max D, D the distances of the experts' logits over all tokens, each scaled to norm 1 (eq. 5), [E, E].

    Args:
        gram_EE: Gram matrix of the logits Z, Z^T Z; symmetric.
    """
    gram_EE = gram_EE.double()
    norm_E = gram_EE.diagonal().clamp_min(0).sqrt()
    scale_E = torch.where(norm_E > 0, 1 / norm_E.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    cosine_EE = gram_EE * scale_E[:, None] * scale_E
    square_E = cosine_EE.diagonal()
    distance_EE = (square_E[:, None] + square_E - 2 * cosine_EE).clamp_min(0).sqrt().fill_diagonal_(0)
    farthest = float(distance_EE.max())
    return 1 - distance_EE / farthest if farthest > 0 else torch.ones_like(distance_EE)


def token_similarity(cosine_EE: Tensor, tokens: int) -> Tensor:
    """Mean over tokens of (cos + 1) / 2 of two experts' outputs (eq. 8), [E, E]; gates, being positive, cancel.

    Args:
        cosine_EE: sums of the cosines over all tokens.
        tokens: N.
    """
    return (cosine_EE.double() / max(tokens, 1) + 1) / 2


def mean_similarity(sum_EH: Tensor) -> Tensor:
    """(cos + 1) / 2 of two experts' mean outputs, [E, E]; the authors' code, in which the gates count.

    Args:
        sum_EH: sums of outputs, each times its gate, over all tokens.
    """
    mean_EH = unit(sum_EH.double())
    return (mean_EH @ mean_EH.T + 1) / 2


@register(
    name="ream",
    kind="merge",
    paper="arXiv:2604.04356",
    needs=("load", "gated_output_norm", "logit_gram", "all_output_cosine"),
    changes="weights",
    limits=(
        "Neurons' activations are compared where the text stands at the layer: with mode=layerwise, and where a "
        "family's experts do not show them, neurons are aligned by their weights alone.",
        "Runs all experts on all tokens; progressive, every layer runs once more behind the merged ones.",
        "Gains over pruning by REAP are small and not certain: the proof shows both at the same size.",
        "Tokens of a merged expert go where the router's remaining rows send them, not to the expert that took it in, "
        "unless --set router=redirect keeps all rows (for moekit.load).",
    ),
)
class REAM(MergeMethod):
    """Fold the experts that pruning would drop into a few of the most valuable ones; nearly all others stay as is.

    S_j = mean over X_j, the tokens routed to j, of g_j^p ||f_j(x)||, with the gate weight g as it multiplies outputs.
    The M most salient experts are centroids. Experts are alike by s = s_gate + s_out: s_gate = 1 - D / max D, D the
    distances of their router logits over all tokens, scaled to norm 1; s_out the mean over all tokens, chosen or not,
    of (cos(f_i(x), f_j(x)) + 1) / 2. From the most salient centroid down, each takes its C - 1 nearest experts that are
    free, until none is (pseudo-pruning). Their neurons are put in the order in which the sum of distances is least: of
    unit-norm neurons [gate | up | down], plus of what neurons give on the same tokens, scaled to norm 1, too. Then
    W = sum_j S_j W_j / sum_j S_j. The centroids' router rows stay. Layers are decided one after the other, each on what
    the merged ones before it give. Choose it to drop a quarter of the experts, at most half, where pruning alone
    forgets; read the proof against `reap`.
    """

    unseen_counts: ClassVar[str] = "they count as little as the least of those that were chosen"

    gate_power: Literal[1, 2] = Field(
        default=1, description="p of the saliency: 1 as in the paper, 2 as in the authors' code"
    )
    similarity: Literal["token", "mean"] = Field(
        default="token",
        description="of outputs: mean of the tokens' cosines (paper), or cosine of the means of gate times output, "
        "with the router's scores of all experts as gates (code)",
    )
    group_size: int = Field(
        default=16, ge=0, description="experts of a group at most; 0: each goes to its nearest centroid, as in MC-SMoE"
    )
    merge: bool = Field(
        default=True, description="fold the others into the centroids; off drops them: pruning by the same saliency"
    )
    mode: Literal["progressive", "layerwise"] = Field(
        default="progressive", description="decide each layer behind the merged layers before it, or on the model as is"
    )
    align: Literal["auto", "both", "weights", "activations", "none"] = Field(  # type: ignore[assignment]
        default="auto",
        description="what must be near of a member's neurons and those of the expert it joins: their weights, what "
        "they give on the text, or both (the paper's); auto: both, or weights where activations cannot be seen",
    )

    @model_validator(mode="after")
    def _sees_activations(self) -> REAM:
        if self.mode == "layerwise" and self.align in ("both", "activations"):
            raise ValueError(
                f"align {self.align} compares activations where the text stands at the layer: say mode progressive, or "
                "align weights"
            )
        return self

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[MergeMethod]:
        """Both modes, both similarities and saliencies, limited groups or not, and pruning alone."""
        return [
            cls(),
            cls(mode="layerwise"),
            cls(mode="layerwise", gate_power=2, similarity="mean", group_size=0),
            cls(mode="layerwise", merge=False),
            cls(align="activations"),
        ]

    @property
    def sequential(self) -> bool:
        """Progressive mode goes layer after layer."""
        return self.mode == "progressive"

    @property
    def decides_behind(self) -> bool:
        """Progressive mode decides there, too."""
        return self.sequential

    @property
    def reads_inner(self) -> bool:
        """Where activations are compared."""
        return self.sequential and self.merge and self.align in ("auto", "both", "activations")

    @property
    def required(self) -> tuple[str, ...]:
        """Load, gated norms and, to group, logits and outputs of all experts."""
        norm = "gated_output_norm" if self.gate_power == 1 else "gate_square_output_norm"
        alike = "all_output_cosine" if self.similarity == "token" else "scored_output_sum"
        return ("load", norm, *(("logit_gram", alike) if self.merge else ()))

    def score(self, inputs: LayerInputs) -> Tensor:
        """Saliency of each expert, [E]; 0 where no token chose it."""
        return ratio(inputs.statistics[self.required[1]], inputs.statistics.load_E)

    def distances(self, inputs: LayerInputs) -> Tensor:
        """1 - (s_gate + s_out) / 2 of all experts, [E, E].

        Raises:
            NumericFault: logits or outputs are not finite; names layer and expert.
        """
        if self.similarity == "token":
            made_EE = token_similarity(inputs.finite("all_output_cosine"), inputs.statistics.tokens)
        else:
            made_EE = mean_similarity(inputs.finite("scored_output_sum"))
        return 1 - (gate_similarity(inputs.finite("logit_gram")) + made_EE) / 2

    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """Pseudo-pruning groups, or the most salient experts alone.

        Raises:
            BadConfig: groups of this size do not hold all experts.
        """
        index, ranked_E = torch.tensor(experts), ranking(scores_E, inputs)
        if not self.merge:
            order = ranked_E[index].sort(descending=True, stable=True).indices
            return [[experts[i]] for i in order[:count].tolist()]
        distance_EE = self.distances(inputs).cpu()[index][:, index]
        made = pseudo_pruning(ranked_E[index], distance_EE, count, self.group_size)
        return [[experts[i] for i in group] for group in made]

    def weights_of(self, scores_E: Tensor) -> Tensor:
        """The saliency; one of 0 counts as the smallest above it, at most one half."""
        worth_E = super().weights_of(scores_E)
        positive = worth_E[worth_E > 0]
        least = min(_LEAST, float(positive.min())) if len(positive) else _LEAST
        return worth_E.masked_fill(worth_E <= 0, least)

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """What becomes of them."""
        if self.merge:
            return super().unseen(experts, outcome)
        return f"; they rank below all others, and {len(set(experts) & set(outcome.keep))} of them stay"

    def finds(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> dict[str, Tensor]:
        """The order of each member's neurons, where activations are compared: that of the others is their own.

        Raises:
            UnsupportedModel: the experts do not show their activations, which were asked for by name.
            NumericFault: activations or weights are not finite; names layer and expert.
        """
        if not self.reads_inner or not outcome.merges:
            return {}
        order_EI = torch.arange(weights.width, dtype=torch.int32).repeat(inputs.experts, 1)
        try:
            for kept, group in zip(outcome.keep, outcome.sources or (), strict=True):
                for member in group:
                    if member != kept:
                        order_EI[member] = self._order(weights, kept, member, inputs).to(torch.int32)
        except UnsupportedModel as error:
            if self.align == "auto":
                return {}
            error.hint = "align by weights (--set align=weights)"
            raise
        return {_ORDER: order_EI}

    def _order(self, weights: LayerWeights, reference: int, member: int, inputs: LayerInputs) -> Tensor:
        """One member's order, by activations over all tokens of the text, with or without the weights."""
        seen: PairedActivations | None = None
        for first_NI, second_NI in zip(inputs.inner(reference), inputs.inner(member), strict=True):
            if seen is None:
                like = torch.empty(0, dtype=widest(first_NI.device), device=first_NI.device)
                seen = PairedActivations.empty(first_NI.shape[1], like)
            seen.add(first_NI, second_NI)
        assert seen is not None  # no text is without tokens
        for expert, square_I in ((reference, seen.first_I), (member, seen.second_I)):
            if not bool(square_I.isfinite().all()):
                raise NumericFault(
                    "what the expert's neurons give on the text is NaN or infinite",
                    layer=inputs.layer,
                    expert=expert,
                    hint="look at the weights: `moekit check`",
                )
        distance_II = seen.distance_II
        if self.align != "activations":
            distance_II = add_distances(weights, reference, member, distance_II)
        return assigned(distance_II).order_I

    def match(self, weights: LayerWeights, inputs: LayerInputs) -> Match | None:
        """The order that was found behind the merged layers, else that in which neurons' directions are nearest.

        Raises:
            LookupError: activations were asked for by name, and none were seen.
        """
        if self.align == "none":
            return None
        order_EI = inputs.statistics.kept(_ORDER)
        if order_EI is not None:
            return lambda reference, member: order_EI[member].long()
        if self.align in ("both", "activations"):
            raise LookupError("the order of neurons is found while the text stands at the layer")
        return lambda reference, member: align_experts(weights, reference, member, distance="directions").order_I
