"""The callback changes gradients exactly as losses added by hand would, in Trainer and in trl's SFTTrainer."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from moekit.anatomy import find_moe_layers
from moekit.errors import BadConfig, NumericFault
from moekit.routing import C2R
from moekit.runtime import attach
from moekit.training import MoECallback, collect
from moekit.training.losses import balance_loss, cv_squared, importance, z_loss
from tests.families import EXPERTS, build
from tests.unit.training.helpers import Rows, trainer, word_tokenizer

WEIGHTS = {"balance": 0.7, "z": 0.02, "importance": 0.3}


def by_hand(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of loss plus router losses over one optimizer step of several micro-batches, written out."""
    model = copy.deepcopy(model).train()
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    for batch in batches:
        with collect(model) as routed:
            loss = model(**batch, use_cache=False, num_items_in_batch=items).loss
            for r in routed:
                loss = loss + WEIGHTS["balance"] / len(batches) * balance_loss(
                    r.logits_TE, r.indices_TK, r.mask_T, scores=r.layer.scores
                )
                loss = loss + WEIGHTS["z"] / len(batches) * z_loss(r.logits_TE, r.mask_T)
                received = importance(r.weights_TK, r.indices_TK, EXPERTS, r.mask_T)
                loss = loss + WEIGHTS["importance"] / len(batches) * cv_squared(received)
            loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batches_of(data: Rows, size: int) -> list[dict[str, torch.Tensor]]:
    rows = [data[i] for i in range(len(data))]
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def gradients_of_one_step(model: PreTrainedModel, data: Rows, folder: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What one step of plain SGD at rate one changes, negated: the gradient the optimizer saw."""
    model = copy.deepcopy(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, data, folder, max_steps=1, learning_rate=1.0, **kwargs)
    run.add_callback(MoECallback(WEIGHTS))
    run.train()
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_gradients_equal_those_of_losses_added_by_hand(family: str, tmp_path: Path) -> None:
    model, data = build(family), Rows(2)
    expected = by_hand(model, batches_of(data, 2))
    got = gradients_of_one_step(model, data, tmp_path)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rows", [6, 5])
def test_accumulated_micro_batches_count_once_and_alike(rows: int, tmp_path: Path) -> None:
    # Five rows: the last step of the epoch would have fewer micro-batches than the setting says.
    model, data = build("qwen2_moe"), Rows(rows)
    count = 3 if rows == 6 else 4
    expected = by_hand(model, batches_of(data, 2))
    got = gradients_of_one_step(model, data, tmp_path, gradient_accumulation_steps=count)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, tmp_path: Path) -> None:
    model, data = build("qwen3_moe"), Rows(2)
    expected = by_hand(model, batches_of(data, 2))
    got = gradients_of_one_step(
        model,
        data,
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=2e-6, rtol=1e-4, msg=name)


def test_a_routing_policy_is_balanced_by_what_it_chooses(tmp_path: Path) -> None:
    model, data = build("qwen2_moe"), Rows(2)
    lists = torch.stack([torch.tensor([*(j for j in range(EXPERTS) if j != i), i]) for i in range(EXPERTS)])
    attach(model, C2R(top_t=1), {layer.index: {"partners": lists} for layer in find_moe_layers(model)})
    expected = by_hand(model, batches_of(data, 2))
    got = gradients_of_one_step(model, data, tmp_path)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, atol=2e-6, rtol=1e-4, msg=name)
    plain = gradients_of_one_step(build("qwen2_moe"), data, tmp_path)
    assert not torch.allclose(got["model.layers.0.mlp.gate.weight"], plain["model.layers.0.mlp.gate.weight"], atol=1e-4)


def test_training_balances_a_collapsed_router_and_logs_it(tmp_path: Path) -> None:
    def train(coef: float) -> list[dict[str, float]]:
        model = build("qwen2_moe")
        with torch.no_grad():
            for layer in find_moe_layers(model):
                layer.require_router().weight[:2] += 0.5
        run = trainer(model, Rows(32, pad=False), tmp_path, max_steps=16, learning_rate=0.5)
        run.add_callback(MoECallback({"balance": coef}))
        run.train()
        return [entry for entry in run.state.log_history if "loss" in entry]

    without, balanced = train(0.0), train(0.5)
    assert without[0]["moe/load_cv"] == balanced[0]["moe/load_cv"] > 0.4
    assert balanced[-1]["moe/load_cv"] < 0.7 * without[-1]["moe/load_cv"]
    assert balanced[-1]["moe/balance_loss"] < without[-1]["moe/balance_loss"]


def test_figures_count_every_choice_once(tmp_path: Path) -> None:
    callback = MoECallback({"balance": 0.1}, every=2)
    run = trainer(build("qwen2_moe"), Rows(16), tmp_path, max_steps=2, gradient_accumulation_steps=2)
    run.add_callback(callback)
    run.train()
    assert callback.figures is not None
    # 8 rows of 12 tokens, every second of them with 4 positions of padding; two choices a token.
    assert {i: sum(layer.load) for i, layer in callback.figures.layers.items()} == {0: 160, 1: 160}
    first, second = (entry for entry in run.state.log_history if "loss" in entry)
    assert "moe/load_cv" not in first
    assert second["moe/load_cv"] == callback.figures.load_cv


def test_never_routed_experts_are_named(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    layer = find_moe_layers(model)[0]
    layer.require_router().e_score_correction_bias[3] = -1e6
    run = trainer(model, Rows(4), tmp_path, max_steps=1)
    run.add_callback(MoECallback())
    run.train()
    entry = run.state.log_history[0]
    assert entry[f"moe/never_routed/layer_{layer.index}"] >= 1
    assert entry["moe/never_routed"] >= 1


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_selection_biases_move_by_the_load_of_the_whole_step(family: str, tmp_path: Path) -> None:
    model, data = build(family), Rows(8)
    reference = copy.deepcopy(model).train()
    load = {}
    for batch in batches_of(data, 2):
        with collect(reference) as routed:
            reference(**batch, use_cache=False)
            for r in routed:
                chosen = r.indices_TK[r.mask_T].flatten()
                load[r.layer.index] = load.get(r.layer.index, 0) + torch.bincount(chosen, minlength=EXPERTS)
                expected_from = {x.layer.index: x.layer.bias.clone() for x in routed}
    run = trainer(model, data, tmp_path, max_steps=1, gradient_accumulation_steps=4)
    run.add_callback(MoECallback(balancer={"use": "sign", "rate": 0.01}))
    run.train()
    with collect(model) as routed:
        model.train()(**batches_of(data, 2)[0], use_cache=False)
        for r in routed:
            assert r.layer.bias is not None
            counts = load[r.layer.index].float()
            expected = expected_from[r.layer.index] + 0.01 * (counts.mean() - counts).sign()
            torch.testing.assert_close(r.layer.bias.detach(), expected)


def test_loss_free_balancing_balances(tmp_path: Path) -> None:
    run = trainer(build("deepseek_v3"), Rows(64, pad=False), tmp_path, max_steps=32, learning_rate=0.0)
    run.add_callback(MoECallback(balancer={"use": "sign", "rate": 0.02}, every=8))
    run.train()
    figures = [entry["moe/load_cv"] for entry in run.state.log_history if "moe/load_cv" in entry]
    assert figures[-1] < 0.6 * figures[0]


@pytest.mark.full
@pytest.mark.slow
def test_a_balancer_needs_a_bias_and_a_type_that_can_hold_it(tmp_path: Path) -> None:
    run = trainer(build("qwen2_moe"), Rows(2), tmp_path)
    run.add_callback(MoECallback(balancer={"use": "sign", "rate": 0.1}))
    with pytest.raises(BadConfig, match="no router of this model has a selection bias"):
        run.train()
    run = trainer(build("deepseek_v3").to(torch.bfloat16), Rows(2), tmp_path)
    run.add_callback(MoECallback(balancer={"use": "sign", "rate": 0.1}))
    with pytest.raises(BadConfig, match="bfloat16") as caught:
        run.train()
    assert caught.value.layer == 1


def test_transformers_own_balance_loss_beside_ours_is_refused(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    model.config.output_router_logits = True
    with pytest.raises(BadConfig, match="added to ours"):
        MoECallback({"balance": 0.1}).install(trainer(model, Rows(2), tmp_path))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_settings_are_refused(value: float) -> None:
    for name in ("balance", "z", "importance", "mi", "entropy"):
        with pytest.raises(BadConfig, match=f"objective {name}: weight"):
            MoECallback({name: value})
    with pytest.raises(BadConfig, match="balancer sign: rate"):
        MoECallback(balancer={"use": "sign", "rate": value})
    with pytest.raises(BadConfig, match="objective on outputs"):
        MoECallback({"ce": 1.0})
    with pytest.raises(BadConfig, match="did you mean 'balance'"):
        MoECallback({"balanse": 1.0})


def test_nan_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        layer.require_router().weight[2, 3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    run = trainer(model, Rows(2), tmp_path)
    run.add_callback(MoECallback())
    with pytest.raises(NumericFault) as caught:
        run.train()
    assert caught.value.layer == 1
    torch.testing.assert_close(dict(model.state_dict()), dict(before), equal_nan=True)


def test_hooks_are_gone_after_training(tmp_path: Path) -> None:
    model = build("qwen2_moe")
    run = trainer(model, Rows(4), tmp_path, max_steps=1)
    MoECallback({"balance": 0.1}).install(run)
    run.train()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def sft(words: PreTrainedTokenizerFast, folder: Path, **kwargs: Any) -> SFTTrainer:
    texts = [" ".join(f"w{3 + (i * j) % 120}" for j in range(1, 6 + i % 5)) for i in range(1, 17)]
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "router_aux_loss_coef": 0.0,
    }
    return SFTTrainer(
        build("qwen2_moe"),
        args=SFTConfig(**settings | kwargs),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=words,
    )


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_sft_trainer_takes_the_same_callback(
    words: PreTrainedTokenizerFast, checkpointing: bool, tmp_path: Path
) -> None:
    def router_change(coef: float) -> tuple[torch.Tensor, list[dict[str, float]]]:
        run = sft(words, tmp_path, max_steps=1, gradient_checkpointing=checkpointing)
        name = "model.layers.1.mlp.gate.weight"
        before = run.model.get_parameter(name).detach().clone()
        callback = MoECallback({"balance": coef}).install(run)
        run.train()
        assert callback.figures is not None
        return before - run.model.get_parameter(name).detach(), run.state.log_history

    plain, logs = router_change(0.0)
    once, _ = router_change(1.0)
    twice, _ = router_change(2.0)
    assert (once - plain).abs().max() > 1e-4
    # The part that the balance loss adds is linear in its coefficient, and the logged loss does not contain it.
    torch.testing.assert_close(twice - plain, 2 * (once - plain), atol=1e-6, rtol=1e-3)
    assert logs[0]["moe/load_cv"] > 0
    assert logs[0]["loss"] == router_change(1.0)[1][0]["loss"]


def test_trl_with_its_own_balance_loss_left_on_is_refused(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="router_aux_loss_coef=0"):
        MoECallback({"balance": 1.0}).install(sft(words, tmp_path, router_aux_loss_coef=0.001))


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_failed_adds_nothing_to_the_next(tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such luck")

    model, data = build("qwen2_moe"), Rows(2)
    expected = gradients_of_one_step(model, data, tmp_path)
    handle = model.lm_head.register_forward_hook(fail)
    failed = trainer(model, data, tmp_path, max_steps=1)
    failed.add_callback(MoECallback(WEIGHTS))
    with pytest.raises(RuntimeError, match="no such luck"):
        failed.train()
    handle.remove()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, data, tmp_path, max_steps=1, learning_rate=1.0)
    # Two callbacks of one run stay both.
    run.add_callback(MoECallback({"balance": WEIGHTS["balance"]}))
    run.add_callback(MoECallback({name: weight for name, weight in WEIGHTS.items() if name != "balance"}))
    run.train()
    for name, grad in expected.items():
        torch.testing.assert_close(before[name] - model.get_parameter(name).detach(), grad, atol=2e-6, rtol=1e-4)


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_model_alive(tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no such luck")

    model = build("qwen2_moe")
    run = trainer(model, Rows(2), tmp_path, max_steps=1)
    MoECallback({"balance": 0.1}).install(run)
    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        run.train()
    seen = weakref.ref(model)
    del run, model, handle
    gc.collect()
    assert seen() is None
