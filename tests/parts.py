"""Runtime parts that live in tests alone: one of each kind that a method to come will be, as small as it can be.

Legend: T tokens, B sequences, S positions, L positions so far, H hidden, E experts, m null experts, P recurrent width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from moekit.anatomy import Geometry
from moekit.catalogue import MethodRecord, Trait
from moekit.runtime.block import BlockInputs, BlockPart
from moekit.runtime.experts import ExpertsInputs, ExpertsPart
from moekit.runtime.part import LayerInit, RuntimePart
from moekit.runtime.router import ChoosePart, LimitPart, Routed, RouteInputs, Scored, ScorePart


def plain(module: Any, expert: int, hidden_NH: Tensor) -> Tensor:
    """One expert's output by the plain formula, in fp32: [N, H]."""

    def linear(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)[expert].float()
        bias = getattr(module, f"{name}_bias")[expert].float() if module.has_bias else 0.0
        return x @ (weight if module.is_transposed else weight.T) + bias

    inner = linear(hidden_NH, "gate_up_proj")
    return linear(module._apply_gate(inner), "down_proj")


class Nudge(ScorePart):
    """A learnable bias on the logits; each sequence may bring one of its own (`rows`: "nudge", [B, E])."""

    axes: ClassVar = {"delta": "E"}

    def parameters(self, init: LayerInit) -> nn.Module:
        return nn.ParameterDict({"delta": nn.Parameter(torch.zeros(init.geometry.experts))})

    def score(self, inputs: RouteInputs) -> Scored:
        logits = inputs.logits + inputs.learned["delta"].to(inputs.logits.dtype)
        tracker = inputs.tracker
        if tracker is not None and tracker.rows:
            own = inputs.context.of_rows("nudge")
            assert own is not None
            logits = logits + own.to(logits)
        return Scored(logits)


class Recurrence(ScorePart):
    """A GRU over layers, shared by all, whose state each layer projects onto logits (RMoE, arXiv:2408.06793)."""

    axes: ClassVar = {"into": "PH", "out": "EP"}
    width: int = 6

    def parameters(self, init: LayerInit) -> nn.Module:
        into = torch.randn(self.width, init.geometry.hidden, generator=init.generator) / init.geometry.hidden**0.5
        return nn.ParameterDict(
            {"into": nn.Parameter(into), "out": nn.Parameter(torch.zeros(init.geometry.experts, self.width))}
        )

    def shared(self, layers: Sequence[LayerInit]) -> nn.Module:
        cell = nn.GRUCell(self.width, self.width)
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=layers[0].generator) / self.width**0.5)
        return cell

    def score(self, inputs: RouteInputs) -> Scored:
        context = inputs.context
        before = context.before(inputs.layer)
        state = None if before is None else context.get(before, "state")
        state = inputs.shared(inputs.hidden_TH.to(inputs.learned["into"]) @ inputs.learned["into"].T, state)
        context.put(inputs.layer, "state", state)
        return Scored(inputs.logits + (state @ inputs.learned["out"].T).to(inputs.logits.dtype))


class Neighbours(ScorePart):
    """Logits mixed with those of similar earlier tokens of the sequence (after arXiv:2505.00792), with a cache."""

    axes: ClassVar = {"share": ""}

    def parameters(self, init: LayerInit) -> nn.Module:
        return nn.ParameterDict({"share": nn.Parameter(torch.zeros(()))})

    def score(self, inputs: RouteInputs) -> Scored:
        context, layer = inputs.context, inputs.layer
        hidden_BSH, logits_BSE = context.sequences(inputs.hidden_TH), context.sequences(inputs.logits)
        known_BLH = context.extend(layer, "hidden", hidden_BSH)
        known_BLE = context.extend(layer, "logits", logits_BSE)
        near_BSL = hidden_BSH @ known_BLH.mT / math.sqrt(hidden_BSH.shape[-1])
        near_BSL = near_BSL.masked_fill(~context.visible(near_BSL.device), -torch.inf).softmax(-1)
        return Scored((logits_BSE + inputs.learned["share"] * (near_BSL @ known_BLE)).flatten(0, 1))


class Fading(ScorePart):
    """Logits and a fading sum of the sequence's earlier ones, kept as one state: m_s = fade m_(s-1) + z_s."""

    axes: ClassVar = {"share": ""}
    fade: float = 0.5

    def parameters(self, init: LayerInit) -> nn.Module:
        return nn.ParameterDict({"share": nn.Parameter(torch.zeros(()))})

    def score(self, inputs: RouteInputs) -> Scored:
        context, layer = inputs.context, inputs.layer
        logits_BSE = context.sequences(inputs.logits)
        real_BS = context.token_mask(logits_BSE.device)
        kept_BE = context.kept(layer, "memory")
        memory_BE = torch.zeros_like(logits_BSE[:, 0]) if kept_BE is None else kept_BE
        scored = []
        for logits_BE, real_B in zip(logits_BSE.unbind(1), real_BS.unbind(1), strict=True):
            scored.append(logits_BE + inputs.learned["share"] * memory_BE)
            memory_BE = torch.where(real_B[:, None], self.fade * memory_BE + logits_BE, memory_BE)
        context.keep(layer, "memory", memory_BE)
        return Scored(torch.stack(scored, dim=1).flatten(0, 1))


class Attended(ScorePart):
    """Logits mixed with those of the tokens that the block's attention looks at, by a second attention call."""

    axes: ClassVar = {"share": ""}

    def parameters(self, init: LayerInit) -> nn.Module:
        return nn.ParameterDict({"share": nn.Parameter(torch.zeros(()))})

    def score(self, inputs: RouteInputs) -> Scored:
        context, layer = inputs.context, inputs.layer
        known_BLE = context.extend(layer, "logits", context.sequences(inputs.logits))
        mixed_BSE = context.attention(layer).mix(known_BLE)
        return Scored(inputs.logits + inputs.learned["share"] * mixed_BSE.flatten(0, 1))


class NullExperts(ChoosePart):
    """m rows beside the router's, which stand for no expert, and a balance loss over all (AdaMoE, arXiv:2406.13233)."""

    axes: ClassVar = {"rows": "MH"}
    count: int = 4
    choices: int = 3
    coefficient: float = 0.01
    start: float = 0.3

    def parameters(self, init: LayerInit) -> nn.Module:
        rows = torch.randn(self.count, init.geometry.hidden, generator=init.generator) * self.start
        return nn.ParameterDict({"rows": nn.Parameter(rows)})

    def choose(self, inputs: RouteInputs) -> Routed:
        experts = inputs.geometry.experts
        null_TM = inputs.hidden_TH @ inputs.learned["rows"].to(inputs.hidden_TH.dtype).T
        logits = torch.cat([inputs.logits, null_TM.to(inputs.logits.dtype)], dim=1)
        share_TN = logits.float().softmax(-1)
        best_TK, index_TK = share_TN.topk(self.choices, dim=-1)
        real_TK = index_TK < experts
        weight_TK = best_TK * real_TK
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp_min(1e-9)
        load_N = torch.bincount(index_TK.flatten(), minlength=logits.shape[1]).float() / index_TK.numel()
        balance = logits.shape[1] * (load_N * share_TN.mean(0)).sum()
        return Routed(
            weight_TK, index_TK.masked_fill(~real_TK, experts), logits, {"balance": self.coefficient * balance}
        )


class FirstOnly(LimitPart):
    """Take all but the best choice back from tokens whose best weight is at least `above`."""

    above: float = 2.0

    @classmethod
    def examples(cls, geometry: Geometry) -> Sequence[FirstOnly]:
        """Takes nothing back, and some: where weights add up to one, and where the family scales them up."""
        return [cls(), cls(above=0.6), cls(above=1.4)]

    def limit(self, inputs: RouteInputs, routed: Routed) -> Routed:
        best_T1 = routed.weights.max(dim=1, keepdim=True).values
        gone_TK = (best_T1 >= self.above) & (routed.weights < best_T1)
        return Routed(
            routed.weights.masked_fill(gone_TK, 0), routed.indices.masked_fill(gone_TK, inputs.geometry.experts)
        )


class Momentum(BlockPart):
    """Outputs of MoE blocks gather momentum over layers (MomentumSMoE, arXiv:2410.14574)."""

    def shared(self, layers: Sequence[LayerInit]) -> nn.Module:
        return nn.ParameterDict({"rate": nn.Parameter(torch.zeros(()))})

    def after(self, inputs: BlockInputs) -> Tensor:
        context = inputs.context
        before = context.before(inputs.layer)
        output = inputs.output
        if before is not None:
            output = output + inputs.shared["rate"] * context.get(before, "output").view_as(output)
        context.put(inputs.layer, "output", output)
        return output


class Gain(ExpertsPart):
    """Each expert's output is scaled by one learnable number per channel."""

    axes: ClassVar = {"gain": "EH"}
    reads_weights: ClassVar = False

    def parameters(self, init: LayerInit) -> nn.Module:
        return nn.ParameterDict({"gain": nn.Parameter(torch.zeros(init.geometry.experts, init.geometry.hidden))})

    def compute(self, inputs: ExpertsInputs) -> Tensor:
        total = inputs.run(inputs.hidden_TH, inputs.index_TK, inputs.weights_TK)
        gain_EH = inputs.learned["gain"]
        padded_EH = torch.cat([gain_EH, gain_EH.new_zeros(1, gain_EH.shape[1])])
        for k in range(inputs.index_TK.shape[1]):
            one = inputs.run(inputs.hidden_TH, inputs.index_TK[:, k : k + 1], inputs.weights_TK[:, k : k + 1])
            total = total + padded_EH[inputs.index_TK[:, k]].to(one.dtype) * one
        return total

    def reference(self, inputs: ExpertsInputs) -> Tensor:
        total_TH = torch.zeros_like(inputs.hidden_TH, dtype=torch.float32)
        for expert in range(inputs.geometry.experts):
            rows_T, place_T = (inputs.index_TK == expert).nonzero(as_tuple=True)
            if len(rows_T):
                output_NH = plain(inputs.module, expert, inputs.hidden_TH[rows_T].float())
                output_NH = output_NH * (1 + inputs.learned["gain"][expert].float())
                total_TH.index_add_(0, rows_T, output_NH * inputs.weights_TK[rows_T, place_T, None].float())
        return total_TH


# Parts that leave the model as it is until they have learned something.
NEUTRAL = (Nudge(), Recurrence(), Neighbours(), Fading(), Attended(), FirstOnly(), Momentum(), Gain())
ALL = (*NEUTRAL, NullExperts())
DECLARED: dict[type[RuntimePart], frozenset[Trait]] = {
    Recurrence: frozenset({"stateful"}),
    Neighbours: frozenset({"sequence"}),
    Fading: frozenset({"sequence"}),
    Attended: frozenset({"sequence", "attention"}),
    NullExperts: frozenset({"variable_k"}),
    FirstOnly: frozenset({"variable_k"}),
    Momentum: frozenset({"stateful"}),
}
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")


def pairs(parts: Sequence[RuntimePart]) -> list[Any]:
    """Each part with two of the families, so that a law sees every part and every family; the product is not needed."""
    turns = [(part, FAMILIES[(ALL.index(part) + turn) % 4]) for part in parts for turn in (0, 2)]
    return [pytest.param(part, family, id=f"{type(part).__name__}-{family}") for part, family in turns]


def records() -> dict[tuple[str, str], MethodRecord]:
    """Entries of the catalogue for all of them, for as long as a test runs."""
    found = {}
    for part in ALL:
        name = f"test-{type(part).__name__.lower()}"
        kind = {"router": "routing"}.get(part.slot, part.slot)
        found[kind, name] = MethodRecord(
            name=name,
            kind=kind,
            paper="",
            needs=(),
            changes="runtime",
            stock=False,
            limits=(),
            cls=type(part),
            origin="tests",
            declared=DECLARED.get(type(part), frozenset()),
            own_axis="gating",
        )
    return found


@torch.no_grad()
def stir(model: nn.Module, seed: int = 0) -> None:
    """Give everything that parts learn values of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "moekit_parts" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def leftovers(model: nn.Module) -> list[str]:
    """What parts, recording or expert parallelism left behind: private attributes, children, forwards, classes."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{key}" for key in vars(module) if key.startswith("_moekit") or key == "forward"]
        if "moekit_parts" in module._modules or hasattr(type(module), "stock_class"):
            found.append(name)
    return found


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    """What parts learn: name -> parameter."""
    return {name: p for name, p in model.named_parameters() if "moekit_parts" in name}
