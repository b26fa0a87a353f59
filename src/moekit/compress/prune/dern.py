"""DERN: drop experts, recombine their neurons (Findings of EMNLP 2025, arXiv:2509.10377).

Legend: E experts, D experts taken apart, M experts kept, I expert width, N segments that meet, F numbers of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch import Tensor

from moekit.anatomy.probe import Geometry
from moekit.catalogue import register
from moekit.compress.engine.dropping import PruneMethod, ratio
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.clustering.spherical_kmeans import spherical_kmeans
from moekit.compress.maths.neurons.segments import (
    Compare,
    Nearest,
    Precision,
    RouterShare,
    gather,
    nearest_targets,
    recombination_figures,
    share_router_rows,
    write_segments,
)
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault, UnsupportedModel

# Finding the nearest segments is most of the work, and `transform` and `figures` both need it.
_found: WeakKeyDictionary[LayerWeights, tuple[object, Nearest]] = WeakKeyDictionary()


@register(
    name="dern",
    kind="prune",
    paper="arXiv:2509.10377",
    needs=("gate_mass", "load"),
    changes="weights",
    traits=("stochastic",),
    limits=(
        "Recombines only where experts have similar neurons (upcycled models); elsewhere it equals pruning.",
        "Compares each dropped neuron with each kept one: minutes a layer on a CPU where there are 100,000 of them.",
    ),
)
class DERN(PruneMethod):
    """Keep the experts of the largest gate mass, and let useful neurons of the others live on inside them.

    Importance is C_e = (sum over tokens of the gate weight of e) / tokens. Each dropped expert is taken apart into
    segments (gate row, up row, down column); each segment u moves to the expert of the kept segment v with the largest
    sim(u, v) if that is above alpha, and is discarded otherwise. Each kept expert is then clustered anew, its own and
    the moved segments weighed by C of the expert they came from, into as many segments as it had (spherical weighted
    k-means at equal norms). Choose it where half the experts must go without training and experts have a common origin;
    look at the figure `moved_share` for whether it had anything to recombine.
    """

    rewrites = True

    alpha: float = Field(
        default=0.5, ge=-1, le=2, description="similarity above which a segment moves; above 1 nothing does (pruning)"
    )
    compare: Compare = Field(
        default="up_down",
        description="what similarity is: cosine of up and down joined, of all three parts, or mean of both cosines",
    )
    balance: bool = Field(
        default=False,
        description="first rescale up and down of segments to equal norms and one sign; gated experts, no biases",
    )
    # A copy of a kept expert must leave outputs as they were: the sum doubles its row, the mean blurs unlike rows.
    router: RouterShare = Field(
        default="none",
        description="router row of an expert that receives: none (stays), its sources' rows added by moved share (the "
        "paper's), or the mean of both",
    )
    init: Literal["own", "gate", "random"] = Field(
        default="own",
        description="first centroids: the expert's own segments, those of the largest absolute gate weight (paper's; "
        "loses neurons among duplicates), or random ones",
    )
    iterations: int = Field(default=30, ge=1, le=1000, description="most rounds of k-means")
    tolerance: float = Field(default=1e-4, ge=0, le=1, description="k-means stops when centroids move less than this")
    rescale: bool = Field(default=True, description="give a centroid the mean norm of its members; off is the paper's")
    importance: Literal["gate_mass", "reap"] = Field(
        default="gate_mass", description="C: gate mass a token (the paper's), or mean gated output norm (REAP)"
    )
    precision: Precision = Field(default="fp32", description="of the search for similar segments, fp32 or bf16")

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[PruneMethod]:
        """Every choice at least once; a low alpha, so that segments move between unlike experts."""
        may_balance = geometry.has_gate and not geometry.has_bias
        return [
            cls(),
            cls(alpha=0.0, compare="all", router="add", init="gate", rescale=False),
            cls(alpha=0.0, compare="mean", router="mean", init="random", importance="reap", balance=may_balance),
            cls(alpha=0.0, precision="bf16"),
        ]

    @property
    def required(self) -> tuple[str, ...]:
        """The load, and gate mass or the sum of gated output norms."""
        return ("gate_mass" if self.importance == "gate_mass" else "gated_output_norm", "load")

    def score(self, inputs: LayerInputs) -> Tensor:
        """Importance C of each expert, [E]."""
        total_E, load_E = (inputs.statistics[name] for name in self.required)
        tokens_E = torch.full_like(load_E, inputs.statistics.tokens)
        return ratio(total_E, tokens_E if self.importance == "gate_mass" else load_E)

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """The `keep` most important experts; refuses `balance` where it would change what experts compute."""
        self._check(inputs)
        return super().decide(inputs, scores_E, share)

    def _check(self, inputs: LayerInputs) -> None:
        # gpt-oss, the family with biases, adds 1 to the up projection, and an activation is not linear in it either.
        if self.balance and (inputs.geometry.has_bias or not inputs.geometry.has_gate):
            raise UnsupportedModel(
                "up and down of a neuron cannot be rescaled where experts have biases or no gates",
                layer=inputs.layer,
                hint="leave balance off",
            )

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """Kept experts with what moved into them; those that receive nothing are copied bit for bit.

        Nothing moves into protected experts, nor out of experts that no token chose. The down bias of a dropped expert
        belongs to no neuron and is dropped with it.

        Raises:
            NumericFault: weights hold NaN or infinity; names layer and expert.
            UnsupportedModel: experts have tensors of which it is not known how neurons lie in them.
        """
        nearest = self._nearest(weights, outcome, inputs)
        result = weights.select(outcome.keep)
        share_MD = nearest.shares(outcome.keep, self.alpha)
        score_E = self.score(inputs)
        for position, expert in enumerate(outcome.keep):
            if moved := nearest.moved(expert, self.alpha):
                write_segments(result, position, self._recombined(weights, expert, moved, score_E, inputs))
        router = share_router_rows(weights.router, outcome.keep, nearest.sources, share_MD, self.router)
        return result.with_router(router)

    def told(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> dict[str, float]:
        """What became of the dropped experts' segments; names as in `recombination_figures`."""
        dropped = [e for e in range(weights.experts) if e not in outcome.keep]
        return recombination_figures(self._nearest(weights, outcome, inputs), dropped, self.alpha)

    def _nearest(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> Nearest:
        """Nearest kept segments, remembered as long as the weights live."""
        self._check(inputs)
        score = self.score(inputs).tolist()
        targets = [e for e in outcome.keep if e not in inputs.protected]
        dropped = [e for e in range(weights.experts) if e not in outcome.keep and score[e] > 0]
        sources = dropped if targets and self.alpha < 1 else []
        if sources and weights.others:
            raise UnsupportedModel(
                f"neurons cannot move: it is not known where they lie in {', '.join(sorted(weights.others))}",
                layer=inputs.layer,
                hint="prune without recombining, with the method gate-mass",
            )
        key = (sources, targets, self.compare, self.balance, self.precision)
        known = _found.get(weights)
        if known is None or known[0] != key:
            try:
                found = nearest_targets(
                    weights, sources, targets, compare=self.compare, balance=self.balance, precision=self.precision
                )
            except NumericFault as fault:
                raise NumericFault(fault.message, layer=inputs.layer, expert=fault.expert, hint=fault.hint) from fault
            known = _found[weights] = (key, found)
        return known[1]

    def _recombined(
        self, weights: LayerWeights, expert: int, moved: dict[int, Tensor], score_E: Tensor, inputs: LayerInputs
    ) -> Tensor:
        """The segments of an expert after k-means over its own and those that moved into it, [I, F]."""
        members = [(expert, torch.arange(weights.width)), *moved.items()]
        points_NF = gather(weights, members, balance=self.balance)
        weight_N = torch.cat([torch.full((len(rows),), float(score_E[e])) for e, rows in members])
        start_I = torch.arange(weights.width)
        if self.init == "gate":
            # Without gates the first part is up, which the activation then sees.
            peak_N = points_NF[:, : weights.hidden].abs().amax(dim=1)
            start_I = peak_N.sort(descending=True, stable=True).indices[: weights.width]
        elif self.init == "random":
            start_I = torch.randperm(len(points_NF), generator=inputs.generator(f"dern {expert}"))[: weights.width]
        return spherical_kmeans(
            points_NF, weight_N, start_I, iterations=self.iterations, tolerance=self.tolerance, rescale=self.rescale
        ).centroids_IF
