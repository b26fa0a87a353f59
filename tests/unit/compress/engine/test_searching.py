"""The losses of a search on a model's own blocks, against sums written out, with padding and several batches."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.checkpoint import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.searching import plan_by_search
from moekit.compress.prune.naee import NAEE
from moekit.trace.streamed import Streamed
from tests.families import build

EXPERTS, KEPT = 4, 3


def batches() -> list[dict[str, Tensor]]:
    made = []
    for seed, lengths in enumerate(((9, 5), (7, 7))):
        ids = torch.randint(3, 128, (2, max(lengths)), generator=torch.Generator().manual_seed(seed))
        mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
        made.append({"input_ids": ids * mask, "attention_mask": mask})
    return made


def seen(model: PreTrainedModel, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of a layer's block on each batch, [N, H], padding left out."""
    found: list[tuple[Tensor, Tensor]] = []
    block: Any = model.model.layers[layer].mlp
    with torch.no_grad():
        for batch in batches():
            at = batch["attention_mask"].bool()

            def see(module: Any, args: Any, output: Any, at: Tensor = at) -> None:
                output = output[0] if isinstance(output, tuple) else output
                found.append((args[0][at], output.reshape(*args[0].shape)[at]))

            handle = block.register_forward_hook(see)
            model(**batch)
            handle.remove()
    return found


def by_hand(model: PreTrainedModel, layer: int, kept: tuple[int, ...], x_NH: Tensor) -> Tensor:
    """Mixtral's block with the logits of all other experts at minus infinity."""
    block: Any = model.model.layers[layer].mlp
    logits_NE = x_NH @ block.gate.weight.T
    logits_NE[:, [e for e in range(EXPERTS) if e not in kept]] = float("-inf")
    gate_NK, chosen_NK = logits_NE.softmax(-1).topk(2)
    gate_NK = gate_NK / gate_NK.sum(-1, keepdim=True)
    out_NH = torch.zeros_like(x_NH)
    for token, (gates, experts) in enumerate(zip(gate_NK, chosen_NK, strict=True)):
        for gate, expert in zip(gates, experts, strict=True):
            gate_proj, up_proj = block.experts.gate_up_proj[expert].chunk(2)
            inner = torch.nn.functional.silu(x_NH[token] @ gate_proj.T) * (x_NH[token] @ up_proj.T)
            out_NH[token] += gate * (inner @ block.experts.down_proj[expert].T)
    return out_NH


@pytest.mark.parametrize("mode", ["layerwise", "progressive"])
@torch.no_grad()
def test_the_least_loss_is_kept(mode: str, tmp_path: Path) -> None:
    model = build("mixtral", num_local_experts=EXPERTS)
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    with Streamed(checkpoint, batches(), statistics=("load",)) as streamed:
        streamed.run()
        request = PlanRequest(NAEE(mode=mode, strategy="exhaustive"), Budget(keep=KEPT))
        plan = plan_by_search(checkpoint, streamed.trace(), streamed, request)
    before = model
    for layer in range(2):
        targets = [output for _, output in seen(model, layer)]
        inputs = [given for given, _ in seen(before, layer)]
        losses = {}
        for kept in itertools.combinations(range(EXPERTS), KEPT):
            made = [by_hand(model, layer, kept, x_NH) for x_NH in inputs]
            pairs = zip(targets, made, strict=True)
            losses[kept] = sum(float((z.double() - z_kept.double()).norm()) for z, z_kept in pairs)
        outcome = plan.file.layers[layer].outcome
        assert outcome.keep == min(losses, key=lambda kept: losses[kept])
        assert outcome.figures["loss"] == pytest.approx(losses[outcome.keep], rel=1e-4)
        if mode == "progressive":
            before = masked(model, {n: plan.file.layers[n].outcome for n in range(layer + 1)})


def masked(model: PreTrainedModel, outcomes: dict[int, LayerOutcome]) -> PreTrainedModel:
    """A copy whose routers never choose what is dropped: blocks of one size, whatever each layer keeps."""
    made = copy.deepcopy(model)
    for layer, outcome in outcomes.items():
        block: Any = made.model.layers[layer].mlp
        block.forward = _forward(model, layer, outcome.keep)
    return made


def _forward(model: PreTrainedModel, layer: int, kept: tuple[int, ...]) -> Any:
    def forward(x_BSH: Tensor, *_: Any) -> Tensor:
        return by_hand(model, layer, kept, x_BSH.reshape(-1, x_BSH.shape[-1])).reshape(x_BSH.shape)

    return forward
