"""A router that cannot learn is named before a run begins."""

from __future__ import annotations

import logging

import pytest

from moekit.anatomy import find_moe_layers
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadConfig
from moekit.routing import TopK, plan_routing
from moekit.training import train
from moekit.training.config import TrainConfig
from moekit.training.freeze import train_only
from moekit.training.learning import check_routers_learn, learns_from_weights, why_stuck
from tests.families import EXPERTS, build
from tests.unit.training.test_run import text


@pytest.mark.parametrize(
    ("family", "changes", "learns"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 1}, False),  # p / p = 1
        ("mixtral", {"num_experts_per_tok": 1}, False),
        ("gpt_oss", {"num_experts_per_tok": 1}, False),  # a softmax over one logit
        ("qwen2_moe", {"num_experts_per_tok": 1}, True),  # the weight is p itself
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}, True),
        ("qwen3_moe", {}, True),
        ("deepseek_v3", {}, True),
    ],
)
def test_normalised_weights_of_one_expert_carry_nothing(family: str, changes: dict[str, object], learns: bool) -> None:
    layer = find_moe_layers(build(family, **changes))[-1]
    assert learns_from_weights(layer) is learns


def test_training_the_router_alone_is_refused() -> None:
    model = build("qwen3_moe", num_experts_per_tok=1)
    train_only(model, ("router",))
    with pytest.raises(BadConfig, match="nothing else is to train") as caught:
        check_routers_learn(model, TrainConfig(steps=1, parts=("router",)))
    assert caught.value.layer == 0
    check_routers_learn(model, TrainConfig(steps=1, parts=("router",), objectives={"balance": 0.01}))


def test_training_more_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = build("qwen3_moe", num_experts_per_tok=1)
    train_only(model, ("all",))
    with caplog.at_level(logging.WARNING):
        check_routers_learn(model, TrainConfig(steps=1))
    assert "layers 0, 1: no gradient" in caplog.text
    assert "objective on routers" in caplog.text


def test_a_policy_that_takes_one_expert_is_found_too() -> None:
    model = build("qwen3_moe")
    plan_routing(find_moe_layers(model), TopK(top_k=1), "topk").apply(model)
    train_only(model, ("router",))
    with pytest.raises(BadConfig, match="normalised to 1"):
        check_routers_learn(model, TrainConfig(steps=1, parts=("router",)))


def test_a_run_asks_before_it_begins() -> None:
    model = build("mixtral", num_experts_per_tok=1)
    with pytest.raises(BadConfig, match="nothing else is to train"):
        train(model, None, text(), TrainConfig(steps=1, batch=2, seq_len=16, parts=("router",)))


def test_rows_of_a_policy_leave_the_router_nothing_to_learn() -> None:
    model = build("mixtral")
    kept = (0, 2, 3)
    table = tuple(kept.index(old) if old in kept else None for old in range(EXPERTS))
    outcome = LayerOutcome(keep=kept, redirect=table)
    change_model(model, {layer.index: outcome for layer in find_moe_layers(model)})
    train_only(model, ("router",))
    assert (
        why_stuck(find_moe_layers(model)[0]) == "a routing policy weighs choices by rows of its own, which do not learn"
    )
    with pytest.raises(BadConfig, match="rows of its own, which do not learn, and nothing else is to train"):
        train(model, None, text(), TrainConfig(steps=1, parts=("router",), seq_len=16))
