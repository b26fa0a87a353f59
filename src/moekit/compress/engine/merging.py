"""What a method is that folds the experts of a layer into fewer.

A method says in `groups` which experts go together; what it shares with all others is here: what a group stands on, how
much of each member goes into it, the order of neurons, and the router's rows. See `WeightMethod` for what all kinds
share.

Legend: E experts, M groups.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from moekit.compress.engine.dropping import FewerMethod, ranking
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.method import Baseline
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.maths.neurons.align import align_experts
from moekit.compress.maths.neurons.merging import Match, RouterRows, member_shares, merge_groups
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig

Align = Literal["none", "weights"]
Groups = Sequence[Sequence[int]]


class MergeMethod(FewerMethod):
    """Base of all merging methods; fields are the method's knobs.

    `score` says how much an expert counts in its group: members are weighted by it, and the group stands on its most
    valuable member, whose router row it keeps unless rows are merged, too.

    Attributes:
        unseen_counts: how much experts that no token chose count where members are weighted by their scores, in words.
    """

    rewrites: ClassVar[bool] = True
    unseen_counts: ClassVar[str] = "they count for nothing beside members that were chosen"

    align: Align = Field(
        default="weights", description="put each member's neurons in the order nearest to those of the expert it joins"
    )
    router: RouterRows | Literal["redirect"] = Field(
        default="representative",
        description="a merged expert's router row: that of the member it stands on, or the mean of all by their "
        "shares; redirect: the router keeps all rows, and a merged expert takes the tokens of each (moekit.load only)",
    )
    weigh: Literal["score", "equal"] = Field(
        default="score", description="members count by the method's score, or all alike"
    )

    @property
    def baselines(self) -> tuple[Baseline, ...]:
        """Pruning by REAP and by frequency to the same size, and random groups."""
        return (Baseline("reap", kind="prune"), Baseline("frequency", kind="prune"), Baseline("random-groups"))

    def unseen(self, experts: Sequence[int], outcome: LayerOutcome) -> str:
        """How much they count in their groups, and how many of them stand for one."""
        alone = len(set(experts) & set(outcome.keep))
        counts = self.unseen_counts if self.weigh == "score" else "they count like the other members of their groups"
        return f"; {counts}, and {alone} of them stand for a group"

    @abstractmethod
    def groups(self, inputs: LayerInputs, scores_E: Tensor, count: int, experts: Sequence[int]) -> Groups:
        """Which experts go together.

        Args:
            inputs: of the layer.
            scores_E: how much each expert is worth.
            count: how many groups; at least 1, fewer than there are experts.
            experts: that may be merged, ascending; protected ones are left out.

        Returns:
            So many groups; an expert in none of them is dropped.
        """

    def decide(self, inputs: LayerInputs, scores_E: Tensor, share: int) -> LayerOutcome:
        """Groups of all experts, each standing on its most valuable member; protected experts stay alone.

        Where protected experts alone fill the budget the others are dropped, since nothing may be merged into what must
        stay as it is.

        Raises:
            BadConfig: fewer experts are kept than are protected.
            NumericFault: a score is NaN or infinite.
        """
        ranked = ranking(scores_E, inputs).tolist()
        protected = sorted(inputs.protected)
        free = [e for e in range(inputs.experts) if e not in inputs.protected]
        count = share - len(protected)
        if count < 0:
            raise BadConfig(
                f"{len(protected)} experts are protected, but only {share} may stay",
                layer=inputs.layer,
                hint=f"keep at least {len(protected)}, or protect fewer",
            )
        made: Groups = (
            ()
            if not count
            else [[e] for e in free]
            if count >= len(free)
            else self.groups(inputs, scores_E, count, free)
        )
        named = sorted((max(group, key=lambda e: (ranked[e], -e)), tuple(sorted(group))) for group in made)
        named = sorted([*named, *((e, (e,)) for e in protected)])
        sources = [group for _, group in named]
        shares = member_shares(self.weights_of(scores_E), sources)
        return LayerOutcome(
            keep=tuple(kept for kept, _ in named),
            sources=tuple(sources),
            shares=shares,
            redirect=_redirect(sources, inputs.experts) if self.redirects else None,
            figures=_figures(named, shares) | self.figures(inputs, sources),
        )

    def weights_of(self, scores_E: Tensor) -> Tensor:
        """How much each expert counts beside the other members of its group, [E], not negative."""
        return scores_E.clamp_min(0) if self.weigh == "score" else scores_E.new_ones(len(scores_E))

    def figures(self, inputs: LayerInputs, groups: Groups) -> dict[str, float | list[float]]:
        """What else is worth telling of a layer's groups, by name."""
        return {}

    def match(self, weights: LayerWeights, inputs: LayerInputs) -> Match | None:
        """What finds the order of a member's neurons; None merges them as they lie."""
        if self.align == "none":
            return None
        return lambda reference, member: align_experts(weights, reference, member).order_I

    def transform(self, weights: LayerWeights, outcome: LayerOutcome, inputs: LayerInputs) -> LayerWeights:
        """Each group's weights, aligned and summed by their shares; a group of one is copied bit for bit."""
        if outcome.sources is None or outcome.shares is None:
            return weights.select(outcome.keep)
        return merge_groups(
            weights,
            outcome.keep,
            outcome.sources,
            outcome.shares,
            match=self.match(weights, inputs),
            router=self.stored_rows,
        )

    @property
    def redirects(self) -> bool:
        """Whether the router keeps its old rows."""
        return self.router == "redirect"

    @property
    def stored_rows(self) -> RouterRows:
        """The rows that the checkpoint holds; behind old rows, those that stock transformers routes by."""
        return "representative" if self.router == "redirect" else self.router


def _redirect(sources: Groups, experts: int) -> tuple[int | None, ...]:
    """Where the tokens of each old expert go: to the group that it is a member of."""
    home = {old: new for new, members in enumerate(sources) for old in members}
    return tuple(home.get(old) for old in range(experts))


def _figures(
    named: Sequence[tuple[int, tuple[int, ...]]], shares: Sequence[Sequence[float]]
) -> dict[str, float | list[float]]:
    """Sizes of groups, and how much of the merged ones is the member that they stand on."""
    sizes = [len(group) for _, group in named]
    own = [share[group.index(kept)] for (kept, group), share in zip(named, shares, strict=True) if len(group) > 1]
    told: dict[str, float | list[float]] = {"largest_group": float(max(sizes)), "alone": float(sizes.count(1))}
    if own:
        told["own_share"] = sum(own) / len(own)
    return told
