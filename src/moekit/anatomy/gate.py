"""The plain gate of every family, as pure functions: logits in, choice and weights out.

A router is a linear map followed by a *gate*. Families differ in the gate only: how logits become scores (softmax,
sigmoid, or logits as they are), whether a selection bias or expert groups change *which* experts are chosen, and how
the weights of the chosen are normalised and scaled. `moekit.anatomy.identify` finds out which gate a router has.

Legend: T tokens, H hidden, E experts, K choices a token, G expert groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Scoring = Literal["softmax", "softmax_native", "sigmoid", "selected_softmax", "selected_softmax_native", "sparsemixer"]


@dataclass(frozen=True)
class GateSpec:
    """How one family turns logits into weights and indices.

    Attributes:
        top_k: K.
        scoring: "softmax" over all E in fp32, "softmax_native" in the logits' dtype, "sigmoid", "selected_softmax"
            (over the K chosen logits only), its native-dtype twin, or "sparsemixer" (PhiMoE, arXiv:2409.12136).
        normalise: divide the chosen weights by their sum.
        epsilon: added to that sum.
        floor: lower bound of that sum.
        scale: factor on the weights.
        bias: name of the router's selection bias (added to scores for the choice only), "" without.
        groups: number of expert groups G, 1 without.
        top_groups: groups a token may use.
        group_score: a group's score is its "max" (DeepSeek-V2) or the sum of its "top2" (DeepSeek-V3).
        outside: score of experts outside the token's groups: -inf, or 0 (DeepSeek-V2), which ties with what underflows.
        jitter: PhiMoE's threshold.
        sorted: whether chosen experts come in falling order.
    """

    top_k: int
    scoring: Scoring = "softmax"
    normalise: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    bias: str = ""
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    outside: float = float("-inf")
    jitter: float = 0.0
    sorted: bool = True

    @property
    def shares_out(self) -> bool:
        """Whether a token's weights add up to the same however few it chooses: those that stay then get more."""
        return self.normalise or self.scoring.startswith("selected_softmax")


def group_mask(scores_TE: Tensor, spec: GateSpec) -> Tensor:
    """Experts in the token's best groups: [T, E] bool (DeepSeek-V2 arXiv:2405.04434, DeepSeek-V3 arXiv:2412.19437)."""
    rows, experts = scores_TE.shape
    grouped_TGM = scores_TE.view(rows, spec.groups, experts // spec.groups)
    if spec.group_score == "max":
        group_TG = grouped_TGM.max(dim=-1).values
    else:
        group_TG = grouped_TGM.topk(2, dim=-1).values.sum(dim=-1)
    best = group_TG.topk(spec.top_groups, dim=-1, sorted=False).indices
    mask_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best, True)
    return mask_TG.unsqueeze(-1).expand_as(grouped_TGM).reshape(rows, experts)


def sparsemixer_weights(logits_TE: Tensor, indices_TK: Tensor, jitter: float) -> Tensor:
    """PhiMoE's weights of given choices, without its training noise: [T, K].

    The j-th choice is weighed by a softmax over the experts not chosen before it, leaving out those whose logit lies
    further than 2 * jitter (relative) below the choice's own.
    """
    remaining_TE = logits_TE
    weights = []
    for choice_T1 in indices_TK.unsqueeze(-1).unbind(dim=1):
        with torch.no_grad():
            chosen_T1 = logits_TE.gather(1, choice_T1)
            factor_TE = torch.maximum(logits_TE.abs(), chosen_T1)
            far_TE = ((chosen_T1 - logits_TE) / factor_TE) > (2 * jitter)
        weights.append(remaining_TE.masked_fill(far_TE, float("-inf")).softmax(dim=-1).gather(1, choice_T1))
        remaining_TE = remaining_TE.scatter(1, choice_T1, float("-inf"))
    return torch.cat(weights, dim=1)


def repeated_argmax(scores_TE: Tensor, top_k: int) -> Tensor:
    """The K best by taking the best K times, as PhiMoE does; differs from `topk` in which of two equals comes first."""
    indices = []
    for _ in range(top_k):
        best_T1 = scores_TE.max(dim=-1, keepdim=True).indices
        indices.append(best_T1)
        scores_TE = scores_TE.scatter(1, best_T1, float("-inf"))
    return torch.cat(indices, dim=1)


def _inside_first(scores_TE: Tensor, inside_TE: Tensor, top_k: int) -> Tensor:
    """The K best by score, all experts inside the token's groups before any outside; -inf is never chosen."""
    experts = scores_TE.shape[-1]
    rank_TE = scores_TE.argsort(dim=-1, stable=True).argsort(dim=-1)
    rank_TE = torch.where(inside_TE, rank_TE + experts, rank_TE).masked_fill(scores_TE.isneginf(), -1)
    return rank_TE.topk(top_k, dim=-1).indices


class Gate:
    """A router's gate, bound to that router for its selection bias.

    Args:
        spec: what the gate computes.
        router: the live module that holds the selection bias, which is read at every call as it may be trained: the
            router, or the block that gives it one (`MoELayer.gate_home`).
    """

    def __init__(self, spec: GateSpec, router: nn.Module) -> None:
        self.spec = spec
        self.router = router

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Scores before bias and groups: [T, E]."""
        match self.spec.scoring:
            case "softmax":
                return logits_TE.softmax(dim=-1, dtype=torch.float32)
            case "softmax_native":
                return logits_TE.softmax(dim=-1)
            case "sigmoid":
                return logits_TE.sigmoid()
            case _:
                return logits_TE

    def bias(self) -> Tensor | None:
        """The selection bias, flattened to [E]; None without."""
        if not self.spec.bias:
            return None
        value: object = self.router
        for part in self.spec.bias.split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value.reshape(-1)

    def preference(self, logits_TE: Tensor) -> Tensor:
        """Scores with the selection bias added, expert groups not considered: [T, E]."""
        scores_TE = self.scores(logits_TE)
        bias_E = self.bias()
        return scores_TE if bias_E is None else scores_TE + bias_E

    def selection(self, logits_TE: Tensor) -> Tensor:
        """The scores experts are chosen by: `preference`, with experts outside the token's groups put back: [T, E]."""
        preference_TE = self.preference(logits_TE)
        if self.spec.groups == 1:
            return preference_TE
        return preference_TE.masked_fill(~group_mask(preference_TE, self.spec), self.spec.outside)

    def choose(self, selection_TE: Tensor) -> Tensor:
        """The K best experts by `selection`: [T, K] int64."""
        if self.spec.scoring == "sparsemixer":
            return repeated_argmax(selection_TE, self.spec.top_k)
        return selection_TE.topk(self.spec.top_k, dim=-1, sorted=self.spec.sorted).indices

    def first(self, selection_TE: Tensor) -> Tensor:
        """The best expert of `choose`: [T] int64. Where scores tie, argmax might name one that is not chosen."""
        chosen_TK = self.choose(selection_TE)
        best_T1 = selection_TE.gather(1, chosen_TK).argmax(dim=-1, keepdim=True)
        return chosen_TK.gather(1, best_T1).squeeze(1)

    def choose_allowed(self, logits_TE: Tensor, first_T: Tensor, allowed_TE: Tensor) -> Tensor:
        """The first choice and the K-1 best experts that are allowed beside it: [T, K] int64.

        A constraint is stronger than expert groups: where fewer than K allowed experts lie in a token's groups, the
        best allowed ones outside fill up. Where every choice of the family is allowed, it stands as it is.

        Args:
            logits_TE: router logits.
            first_T: from `first`; always chosen.
            allowed_TE: bool; experts outside are never chosen. Each row must allow K experts.
        """
        free_TK = self.choose(self.selection(logits_TE))
        preference_TE = self.preference(logits_TE).masked_fill(~allowed_TE, float("-inf"))
        preference_TE = preference_TE.scatter(1, first_T.unsqueeze(1), float("inf"))
        if self.spec.groups > 1:
            inside_TE = group_mask(self.preference(logits_TE), self.spec)
            bound_TK = _inside_first(preference_TE, inside_TE, self.spec.top_k)
        else:
            bound_TK = self.choose(preference_TE)
        stands_T1 = allowed_TE.gather(1, free_TK).all(dim=-1, keepdim=True)
        return torch.where(stands_T1, free_TK, bound_TK)

    def weigh(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """The weights the family gives to chosen experts: [T, K], in the scores' dtype."""
        spec = self.spec
        if spec.scoring == "sparsemixer":
            return sparsemixer_weights(logits_TE, indices_TK, spec.jitter)
        if spec.scoring.startswith("selected_softmax"):
            chosen_TK = logits_TE.gather(1, indices_TK)
            dtype = chosen_TK.dtype if spec.scoring.endswith("native") else torch.float32
            weights_TK = chosen_TK.softmax(dim=-1, dtype=dtype)
        else:
            weights_TK = self.scores(logits_TE).gather(1, indices_TK)
        if spec.normalise:
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            total_T1 = total_T1 + spec.epsilon if spec.epsilon else total_T1
            weights_TK = weights_TK / (total_T1.clamp(min=spec.floor) if spec.floor else total_T1)
        return weights_TK * spec.scale if spec.scale != 1.0 else weights_TK

    def __call__(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Plain routing: (weights [T, K], indices [T, K])."""
        indices_TK = self.choose(self.selection(logits_TE))
        return self.weigh(logits_TE, indices_TK), indices_TK
