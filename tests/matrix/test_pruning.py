"""Every method that prunes or merges, on every family: in memory, and from disk to disk, split and fused.

A method of another package joins by being registered: its `examples` are tried here without a line of test code.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.anatomy.identify import identify_gate
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.dropping import FewerMethod
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import plan_weights, redecide
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.engine.searching import plan_by_search
from moekit.errors import BadConfig
from moekit.trace import Trace
from moekit.trace.streamed import Streamed, record_streamed
from tests.checkpoints import plain, reopen
from tests.contracts import cases
from tests.families import EXPERTS, FAMILIES, TOP_K, build, logits, tokens

RECORDS = {record.name: record for kind in ("prune", "merge") for record in catalogue.methods(kind)}
METHODS = list(RECORDS)
TEXT: list[Any] = [tokens(4, 24, seed=21), tokens(2, 9, seed=22)]


def examples(name: str, model: PreTrainedModel) -> list[FewerMethod]:
    geometry = find_moe_layers(model)[0].geometry
    cls: type[FewerMethod] = RECORDS[name].cls
    return list(cls.examples(geometry))


@dataclass(frozen=True, eq=False)
class Recorded:
    """A family's tiny checkpoint, and a trace with all that any method needs."""

    checkpoint: Checkpoint
    trace: Trace


_RECORDED: dict[tuple[str, bool], Recorded] = {}


@pytest.fixture
def recorded(family: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Recorded once for all methods; read-only."""
    fused = bool(request.node.callspec.params.get("fused", False))
    if (family, fused) not in _RECORDED:
        _RECORDED[family, fused] = record(family, tmp_path_factory.mktemp(family) / "m", METHODS, fused=fused)
    return _RECORDED[family, fused]


def record(family: str, folder: Path, names: Sequence[str], *, fused: bool = False) -> Recorded:
    """A checkpoint, and what these methods need."""
    checkpoint, model = Checkpoint.open(plain(folder, family, fused=fused)), build(family)
    needs = {need for name in names for method in examples(name, model) for need in method.required}
    return Recorded(checkpoint, record_streamed(checkpoint, TEXT, statistics=("load", *sorted(needs))))


def plan_of(recorded: Recorded, method: FewerMethod, budget: Budget) -> WeightPlan:
    request = PlanRequest(method, budget, seed=3)
    if not method.searches:
        source = CalibrationText(TEXT) if method.sequential else recorded.trace
        return plan_weights(recorded.checkpoint, source, request)
    with Streamed(recorded.checkpoint, TEXT, statistics=("load",)) as streamed:
        return plan_by_search(recorded.checkpoint, recorded.trace, streamed, request)


@pytest.mark.parametrize(("name", "family"), cases(METHODS, once=True))
def test_keeping_all_changes_no_bit(name: str, family: str, recorded: Recorded) -> None:
    model = build(family)
    stock = logits(model)
    for method in examples(name, model):
        plan = plan_of(recorded, method, Budget(keep=1.0))
        assert all(len(d.keep) == EXPERTS for d in plan.outcomes.values())
        changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, recorded.checkpoint))
        assert torch.equal(logits(changed), stock), repr(method)


@pytest.mark.parametrize(("name", "family", "fused"), cases(METHODS, [False, True]))
def test_a_pruned_folder_is_the_pruned_model(
    name: str, family: str, fused: bool, recorded: Recorded, tmp_path: Path
) -> None:
    model = build(family)
    checkpoint, method = recorded.checkpoint, examples(name, model)[0]
    plan = plan_of(recorded, method, Budget(keep=5))
    assert all(len(d.keep) == 5 for d in plan.outcomes.values())
    changed = change_model(copy.deepcopy(model), plan.outcomes, rewriter(plan, checkpoint))
    apply(
        checkpoint,
        plan.outcomes,
        tmp_path / "out",
        rewrite=rewriter(plan, checkpoint),
        record=Record(command="a test"),
    )
    opened = reopen(tmp_path / "out", RECORDS[name])
    torch.testing.assert_close(logits(opened), logits(changed), rtol=1e-4, atol=1e-5)
    for layer in find_moe_layers(opened):
        assert layer.geometry.experts == 5
    generated = opened.generate(tokens(1), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > tokens(1).shape[1]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3"])
@pytest.mark.parametrize("name", METHODS)
def test_a_saved_plan_decides_again_as_it_would_have_decided(
    name: str, family: str, recorded: Recorded, tmp_path: Path
) -> None:
    method = examples(name, build(family))[0]
    if method.searches or method.sequential:
        with pytest.raises(BadConfig, match="search"):
            redecide(plan_of(recorded, method, Budget(keep=6)), recorded.checkpoint, Budget(keep=4))
        return
    plan_of(recorded, method, Budget(keep=6)).save(tmp_path / "plan.json")
    again = redecide(WeightPlan.load(tmp_path / "plan.json"), recorded.checkpoint, Budget(keep=4))
    straight = plan_of(recorded, method, Budget(keep=4))
    assert again.outcomes == straight.outcomes
    assert again.hash == straight.hash
    assert again.file.warnings == straight.file.warnings


def masked_reference(model: PreTrainedModel, keep: Mapping[int, set[int]]) -> Tensor:
    """Logits when dropped experts can never be chosen: selection scores of -inf, group limits off."""
    model = copy.deepcopy(model)
    for layer in find_moe_layers(model):
        router, spec = layer.require_router(), identify_gate(layer)
        gone = torch.tensor([e not in keep[layer.index] for e in range(EXPERTS)])
        stock = router.forward

        def forward(
            *args: Any, stock: Any = stock, spec: Any = spec, gone: Tensor = gone, router: Any = router, **kwargs: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE = stock(*args, **kwargs)[0]
            allowed_TE = logits_TE.float().masked_fill(gone, float("-inf"))
            if spec.scoring == "sparsemixer":
                return _sparsemixer(logits_TE, allowed_TE, spec)
            scores_TE = allowed_TE.sigmoid() if spec.scoring == "sigmoid" else allowed_TE.softmax(-1)
            bias_E = dict(router.named_buffers()) | dict(router.named_parameters())
            chosen_by_TE = scores_TE + bias_E[spec.bias].reshape(-1) if spec.bias else scores_TE
            index_TK = chosen_by_TE.masked_fill(gone, float("-inf")).topk(spec.top_k, dim=-1).indices
            if spec.scoring.startswith("selected_softmax"):
                weights_TK = allowed_TE.gather(1, index_TK).softmax(-1)
            else:
                weights_TK = scores_TE.gather(1, index_TK)
            if spec.normalise:
                weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + spec.epsilon).clamp_min(spec.floor)
            return logits_TE, (weights_TK * spec.scale).to(logits_TE.dtype), index_TK

        router.forward = forward  # type: ignore[method-assign]
    return logits(model)


def _sparsemixer(logits_TE: Tensor, allowed_TE: Tensor, spec: Any) -> tuple[Tensor, Tensor, Tensor]:
    """PhiMoE's gate at evaluation: two choices, each the softmax over the logits near the one chosen."""
    index, weights = [], []
    left_TE = allowed_TE
    for _ in range(2):
        top_T1, chosen_T1 = left_TE.max(dim=-1, keepdim=True)
        factor_TE = allowed_TE.abs().clamp(min=top_T1)
        far_TE = (top_T1 - allowed_TE) / factor_TE > 2 * spec.jitter
        near_TE = left_TE.masked_fill(far_TE | left_TE.isinf(), float("-inf"))
        weights.append(near_TE.softmax(-1).gather(1, chosen_T1))
        index.append(chosen_T1)
        left_TE = left_TE.scatter(1, chosen_T1, float("-inf"))
    return logits_TE, torch.cat(weights, 1).to(logits_TE.dtype), torch.cat(index, 1)


def test_no_two_methods_share_a_name() -> None:
    assert len(RECORDS) == sum(len(list(catalogue.methods(kind))) for kind in ("prune", "merge"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_masking_equals_slicing(family: str) -> None:
    model = build(family)
    stock = logits(model)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        keep = {
            layer.index: set(torch.randperm(EXPERTS, generator=g)[: TOP_K + 2 + seed].tolist())
            for layer in find_moe_layers(model)
        }
        outcomes = {index: LayerOutcome(keep=tuple(sorted(kept))) for index, kept in keep.items()}
        sliced = logits(change_model(copy.deepcopy(model), outcomes))
        assert not torch.allclose(sliced, stock, atol=1e-3), "removing experts must change something"
        torch.testing.assert_close(sliced, masked_reference(model, keep), rtol=1e-4, atol=1e-5)
