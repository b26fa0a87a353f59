"""The plain gate of every family, as pure functions: logits in, choice and weights out.

A router is a linear map followed by a *gate*. Families differ in the gate only: how logits become scores (softmax,
sigmoid, or logits as they are), whether a selection bias or expert groups change *which* experts are chosen, and how
the weights of the chosen are normalised and scaled. `identify_gate` finds a router's gate by asking it: the
candidates that its attributes allow are compared, bit for bit, with what the router itself answers. No class names.

Legend: T tokens, H hidden, E experts, K choices a token, G expert groups.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, ask_router
from moekit.errors import UnsupportedModel

Scoring = Literal["softmax", "softmax_native", "sigmoid", "selected_softmax", "selected_softmax_native", "sparsemixer"]
PROBE_ROWS = 64


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
    jitter: float = 0.0
    sorted: bool = True


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


class Gate:
    """A router's gate, bound to that router for its selection bias.

    Args:
        spec: what the gate computes.
        router: the live router; only its selection bias is read, at every call (it may be trained).
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

    def selection(self, logits_TE: Tensor) -> Tensor:
        """The scores experts are chosen by, bias added, experts outside the token's groups at -inf: [T, E]."""
        choice_TE = self.scores(logits_TE)
        bias_E = self.bias()
        if bias_E is not None:
            choice_TE = choice_TE + bias_E
        if self.spec.groups > 1:
            choice_TE = choice_TE.masked_fill(~group_mask(choice_TE, self.spec), float("-inf"))
        return choice_TE

    def choose(self, selection_TE: Tensor, allowed_TE: Tensor | None = None) -> Tensor:
        """The K best experts: [T, K] int64.

        Args:
            selection_TE: from `selection`.
            allowed_TE: bool; experts outside are never chosen. Each row must allow K experts. A constraint is
                stronger than expert groups: where fewer than K allowed experts lie in the token's groups, allowed ones
                outside fill up.
        """
        if allowed_TE is not None:
            floor_TE = torch.finfo(selection_TE.dtype).min
            # -inf marks "outside the groups"; lift it above what is forbidden, below every real score.
            if self.spec.groups > 1:
                selection_TE = selection_TE.clamp(min=floor_TE)
            selection_TE = selection_TE.masked_fill(~allowed_TE, float("-inf"))
        if self.spec.scoring == "sparsemixer":
            return repeated_argmax(selection_TE, self.spec.top_k)
        return selection_TE.topk(self.spec.top_k, dim=-1, sorted=self.spec.sorted).indices

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


def _attribute(router: nn.Module, *names: str) -> object | None:
    return next((getattr(router, name) for name in names if getattr(router, name, None) is not None), None)


def _bias_names(router: nn.Module, experts: int) -> list[str]:
    """Candidates for a selection bias: [E]-sized tensors below the router that are not the linear map's own bias."""
    names = [n for n, t in (*router.named_parameters(), *router.named_buffers()) if t.numel() == experts]
    return [n for n in names if n not in {"bias", "layer.bias"}]


def _candidates(router: nn.Module, experts: int, top_k: int) -> Iterator[GateSpec]:
    jitter = _attribute(router, "router_jitter_noise")
    if isinstance(jitter, float) and top_k == 2:
        yield GateSpec(top_k, scoring="sparsemixer", jitter=jitter)
    scaling = _attribute(router, "routed_scaling_factor", "route_scale", "scaling_factor")
    scales = [float(scaling), 1.0] if isinstance(scaling, int | float) and scaling != 1 else [1.0]
    groups, top_groups = _attribute(router, "num_group", "n_group"), _attribute(router, "topk_group")
    grouped: list[tuple[int, int]] = [(1, 1)]
    if isinstance(groups, int) and isinstance(top_groups, int) and groups > 1:
        grouped.insert(0, (groups, top_groups))
    floor = _attribute(router, "norm_min")
    normals: list[tuple[bool, float, float]] = [(False, 0.0, 0.0), (True, 0.0, 0.0), (True, 1e-20, 0.0)]
    normals += [(True, 1e-6, 0.0), (True, 1e-9, 0.0), (True, 1e-12, 0.0)]
    if isinstance(floor, float):
        normals.insert(0, (True, 0.0, floor))
    scorings: list[Scoring] = ["softmax", "softmax_native", "sigmoid", "selected_softmax", "selected_softmax_native"]
    biases = [*_bias_names(router, experts), ""]
    for scoring, bias, (count, top), (normal, epsilon, least), scale in itertools.product(
        scorings, biases, grouped, normals, scales
    ):
        spec = GateSpec(top_k, scoring, normal, epsilon, least, scale, bias, count, top)
        yield spec
        if count > 1:
            yield replace(spec, group_score="max")


def _stirred(router: nn.Module) -> nn.Module:
    """A copy with random tensors: fresh checkpoints have zero routers and biases, where every gate looks alike."""
    twin = copy.deepcopy(router).to("cpu") if not _on_meta(router) else copy.deepcopy(router).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                spread = 1.0 if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.shape[1] > 1 else 0.3
                scale = spread / max(tensor.shape[-1], 1) ** 0.5 if tensor.dim() == 2 else spread
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return twin


def _on_meta(module: nn.Module) -> bool:
    return any(p.is_meta for p in module.parameters())


def identify_gate(layer: MoELayer) -> GateSpec:
    """Find the gate of a layer's router by asking it.

    A copy of the router with random weights and biases answers for 64 random rows; the first candidate whose indices
    and weights equal the answer bit for bit is the gate.

    Raises:
        UnsupportedModel: no candidate reproduces the router; its routing can be traced but not replaced.
    """
    router = layer.require_router()
    twin = _stirred(router)
    generator = torch.Generator().manual_seed(1)
    like = next(twin.parameters())
    hidden_TH = torch.randn(PROBE_ROWS, layer.geometry.hidden, generator=generator).to(like.dtype)
    answer = ask_router(twin, hidden_TH)
    assert answer is not None  # require_router has asked already
    logits_TE, weights_TK, indices_TK = answer
    for spec in _candidates(twin, layer.geometry.experts, layer.geometry.top_k):
        for choice in (spec, replace(spec, sorted=False)):
            try:
                guess_weights_TK, guess_indices_TK = Gate(choice, twin)(logits_TE)
            except RuntimeError:  # a bias or grouping that does not fit these shapes
                break
            if torch.equal(guess_indices_TK, indices_TK) and torch.equal(
                guess_weights_TK.to(weights_TK.dtype), weights_TK
            ):
                return choice
    raise UnsupportedModel(
        f"{type(router).__name__} follows none of the known gates (softmax, sigmoid, softmax over the chosen, "
        "sparsemixer; with selection bias, groups, normalisation, scale)",
        layer=layer.index,
        hint="trace and place it without a routing policy, or add its gate to moekit/routing/gate.py",
    )
