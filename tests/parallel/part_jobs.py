"""What ranks are asked to do with parts on experts that lie on several ranks."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor

from moekit.anatomy import find_moe_layers
from moekit.errors import BadConfig, UnsupportedModel
from moekit.parallel import expert_parallel, gather_experts
from moekit.parallel.ranks import Ranks
from moekit.runtime import attach, attached, detach, without_parts
from moekit.runtime.router import RouteInputs, Scored, ScorePart
from moekit.runtime.tracker import tracker_of
from moekit.trace import Recorder, record
from moekit.training.collector import collect
from moekit.training.losses import balance_loss
from tests.families import logits
from tests.parallel.jobs import step, tiny
from tests.parts import Gain, leftovers, stir


class Reading(Gain):
    """A part that says it reads the experts' weights."""

    reads_weights = True


def composed(ranks: Ranks, family: str, dispatch: str, tokens: Tensor, gain_first: bool) -> dict[str, Any]:
    """A step with a part that has parameters, recorded, over experts dealt out; and what is left when all have gone."""
    model = tiny(family)
    if gain_first:
        attach(model, Gain())
        expert_parallel(model, ranks, dispatch=dispatch)
    else:
        expert_parallel(model, ranks, dispatch=dispatch)
        attach(model, Gain())
    stir(model)
    with Recorder(model, statistics=("load", "gate_mass"), fingerprint="") as recorder:
        answer = step(model, tokens[ranks.rank :: ranks.size])
    trace = recorder.trace()
    if gain_first:
        detach(model)
        gather_experts(model)
    else:
        gather_experts(model)
        detach(model)
    answer["grads"] = {name: grad for name, grad in answer["grads"].items() if "Gain" in name}
    return answer | {"choices": {layer: trace.indices(layer) for layer in trace.meta.layers}, "left": leftovers(model)}


def refused(ranks: Ranks) -> list[str]:
    """What cannot be done with experts that lie on several ranks."""
    model = tiny("olmoe")
    attach(model, Reading())
    said = []
    try:
        expert_parallel(model, ranks)
    except BadConfig as error:
        said.append(str(error))
    detach(model)
    expert_parallel(model, ranks)
    for attempt in (lambda: attach(model, Reading()), Recorder(model, statistics=("outputs",)).__enter__):
        try:
            attempt()
        except (BadConfig, UnsupportedModel) as error:
            said.append(str(error))
    return said


def put_back(ranks: Ranks) -> tuple[str, list[str]]:
    """What is said where experts are dealt out while parts that read their weights are off; and what is attached."""
    model = tiny("olmoe")
    attach(model, Reading())
    attach(model, Counting())
    said = ""
    try:
        with without_parts(model):
            expert_parallel(model, ranks)
    except BadConfig as error:
        said = str(error)
    return said, [type(each.part).__name__ for each in attached(model)]


def refused_half_way(ranks: Ranks, what: str) -> tuple[str, list[str]]:
    """Why a model's experts are not dealt out for a reason that its second layer gives; and what has changed."""
    model = tiny("qwen3_moe")
    layer = find_moe_layers(model)[1]
    stock, state, before = type(layer.experts), copy.deepcopy(model.state_dict()), logits(model)
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    if what == "another call":
        layer.experts.__class__ = type("Called", (stock,), {"forward": lambda self, hidden: hidden})
    elif what == "too few experts":
        for name, tensor in list(layer.experts.named_parameters()):
            layer.experts.register_parameter(name, torch.nn.Parameter(tensor[:1]))
        layer.experts.num_experts = 1
        state = copy.deepcopy(model.state_dict())
    said = ""
    try:
        expert_parallel(model, ranks, dispatch="all-reduce" if what == "another batch" else "once-per-rank")
    except (BadConfig, UnsupportedModel) as error:
        said = str(error)
    changed = leftovers(model)
    layer.experts.__class__ = stock
    after = model.state_dict()
    changed += [name for name, tensor in state.items() if not torch.equal(tensor, after[name])]
    if hooks != [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]:
        changed.append("hooks")
    if what != "too few experts" and not torch.equal(before, logits(model)):
        changed.append("logits")
    return said, changed


class Counting(ScorePart):
    """A part with a loss: the mean over the batch's tokens of its logits' squares."""

    def score(self, inputs: RouteInputs) -> Scored:
        """Leave the logits alone, and lose by them."""
        real_T = inputs.context.token_mask(inputs.logits.device).flatten()
        squares_T = inputs.logits.square().sum(-1) * real_T
        return Scored(inputs.logits, {"squares": squares_T.sum() / real_T.sum().clamp(min=1)})


def recorded_without_tokens(
    ranks: Ranks, family: str, passes: list[Tensor], recorder_first: bool, expected: bool
) -> dict[str, Any]:
    """What is recorded, collected and lost where a rank has no row of some batches."""
    model = tiny(family).train()
    attach(model, Counting())
    recorder = Recorder(model, fingerprint="")
    with contextlib.ExitStack() as stack:
        if recorder_first:
            stack.enter_context(recorder)
            collected = stack.enter_context(collect(model))
        expert_parallel(model, ranks)
        if not recorder_first:
            stack.enter_context(recorder)
            collected = stack.enter_context(collect(model))
        losses = []
        for tokens in passes:
            mine = tokens[ranks.rank :: ranks.size]
            if expected:
                recorder.expect(mine)
            loss = model(input_ids=mine, use_cache=False).logits.float().square().sum()
            balance = sum(balance_loss(r.logits_TE, r.indices_TK, r.mask_T) for r in collected)
            (loss + balance).backward()
            counted = sum(int(r.tokens) for r in collected)
            losses.append((counted, float(balance), sum(float(v) for v in tracker_of(model).losses.values())))
            collected.clear()
    trace = recorder.trace()
    return {
        "tokens": trace.meta.tokens,
        "documents": trace.document_N.tolist(),
        "choices": {layer: trace.indices(layer) for layer in trace.meta.layers},
        "losses": losses,
        "finite": all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()),
    }


def recorded_padding(ranks: Ranks, tokens: Tensor) -> int:
    """Tokens recorded where a rank's batch holds nothing but padding."""
    model = tiny("qwen2_moe")
    expert_parallel(model, ranks)
    mask = torch.full_like(tokens, int(ranks.rank == 0))
    trace = record(
        model, [{"input_ids": tokens, "attention_mask": mask}, tokens[:, :0] if ranks.rank else tokens, tokens]
    )
    return trace.meta.tokens
