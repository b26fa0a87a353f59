"""Runs repeat bit for bit, see the same batches, resume exactly, and leave the model as they should."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from moekit import _device
from moekit.anatomy import find_moe_layers
from moekit.data import Document, TokenBatches
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.routing import C2R
from moekit.runtime import attach
from moekit.training import LoraSettings, TrainConfig, train
from moekit.training.compute import resolve_precision
from moekit.training.identity import run_identity
from moekit.training.order import row_order
from moekit.training.texts import Texts
from tests.families import EXPERTS, VOCAB, build, logits
from tests.unit.training.helpers import word_tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def text(rows: int = 20, length: int = 16, seed: int = 0, padded: bool = False) -> TokenBatches:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    document = torch.arange(rows, dtype=torch.int32).unsqueeze(1).repeat(1, length)
    if padded:
        document[::3, length // 2 :] = -1
    return TokenBatches(ids, document, document.clamp(max=0).to(torch.int16), ("a",))


BOTH = {"balance": 0.02, "z": 1e-3}
SIGN = {"use": "sign", "rate": 0.01}


def settings(**changes: object) -> TrainConfig:
    base = {
        "steps": 5,
        "batch": 2,
        "seq_len": 16,
        "lr": 1e-2,
        "objectives": {"balance": 0.02},
        "save_every": 2,
        "precision": "fp32",
    }
    return TrainConfig(**base | changes)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_two_runs_are_equal_bit_for_bit() -> None:
    ends = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model = build("qwen2_moe")
        result = train(model, None, text(), settings(accumulation=2, objectives=BOTH))
        ends.append((result.losses, state(model)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
    other = train(build("qwen2_moe"), None, text(), settings(accumulation=2, objectives=BOTH, seed=1))
    assert other.losses != ends[0][0]


@pytest.mark.full
@pytest.mark.slow
def test_the_order_depends_on_the_seed_alone() -> None:
    order = row_order(7, 20, seed=3)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    assert row_order(7, 11, seed=3) == order[:11]
    seen: dict[str, list[torch.Tensor]] = {}
    for family in ("olmoe", "deepseek_v3"):
        model = build(family)
        seen[family] = []
        handle = model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args, into=seen[family]: into.append(args[0].clone()) if args[0].shape[1] > 8 else None
        )
        train(model, None, text(), settings(lr=0.1 if family == "olmoe" else 1e-3))
        handle.remove()
    assert len(seen["olmoe"]) == 5
    assert all(torch.equal(a, b) for a, b in zip(seen["olmoe"], seen["deepseek_v3"], strict=True))


def test_the_losses_are_those_of_a_loop_written_out() -> None:
    rows = text(padded=True)
    config = settings(lr_schedule="constant", warmup=0, clip=0, weight_decay=0.1, objectives={})
    model = build("qwen2_moe")
    reference = copy.deepcopy(model).train()
    result = train(model, None, rows, config)
    decayed = [p for n, p in reference.named_parameters() if "norm" not in n]
    plain = [p for n, p in reference.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )
    order = row_order(len(rows), 10, config.seed)
    losses = []
    for step in range(5):
        picked = [rows[i] for i in order[2 * step : 2 * step + 2]]
        batch = {key: torch.stack([row[key] for row in picked]) for key in picked[0]}
        loss = reference(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=2e-4)
    assert result.tokens == sum(int((rows.document_RS[i] >= 0).sum()) for i in order)


@pytest.mark.full
@pytest.mark.slow
def test_a_finished_run_is_read_not_repeated(tmp_path: Path) -> None:
    model = build("deepseek_v3")
    result = train(model, None, text(), settings(balancer=SIGN), output=tmp_path, heldout=text(4, seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "train.json", "training.safetensors"]
    again = build("deepseek_v3")
    assert train(again, None, text(), settings(balancer=SIGN), output=tmp_path) == result
    assert same(state(model), state(again))
    assert result.heldout_losses.keys() == {5}


@pytest.mark.full
@pytest.mark.slow
def test_a_run_never_continues_another(tmp_path: Path) -> None:
    train(build("olmoe"), None, text(), settings(), output=tmp_path)
    before = (tmp_path / "train.json").read_bytes()
    cases = {
        "settings": (build("olmoe"), text(), settings(lr=2e-2)),
        "text": (build("olmoe"), text(seed=9), settings()),
        "model": (build("olmoe", seed=5), text(), settings()),
    }
    routed = build("olmoe")
    lists = torch.stack([torch.tensor([*(j for j in range(EXPERTS) if j != i), i]) for i in range(EXPERTS)])
    attach(routed, C2R(top_t=2), {layer.index: {"partners": lists} for layer in find_moe_layers(routed)})
    cases["routing"] = (routed, text(), settings())
    for word, (model, rows, config) in cases.items():
        with pytest.raises(BadConfig, match=f"another run: {word}"):
            train(model, None, rows, config, output=tmp_path)
    assert (tmp_path / "train.json").read_bytes() == before
    afresh = train(build("olmoe"), None, text(), settings(lr=2e-2), output=tmp_path, resume=False)
    assert json.loads((tmp_path / "train.json").read_text())["losses"] == afresh.losses


def test_only_the_named_parts_change_and_flags_come_back() -> None:
    model = build("qwen2_moe")
    before = state(model)
    result = train(model, None, text(), settings(parts=("router", "experts:1")))
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }
    assert set(result.trained) == {"router", "experts"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_routers_have_their_own_rate() -> None:
    model = build("qwen2_moe")
    before = state(model)
    train(model, None, text(), settings(steps=1, lr=1e-3, router_lr=0.5, warmup=0, lr_schedule="constant", clip=0))
    change = {name: (tensor - before[name]).abs().max().item() for name, tensor in state(model).items()}
    # Adam's first step has the size of the rate.
    assert change["model.layers.0.mlp.gate.weight"] == pytest.approx(0.5, rel=1e-2)
    assert change["model.layers.0.mlp.experts.down_proj"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.full
@pytest.mark.slow
def test_adapters_train_and_are_merged(tmp_path: Path) -> None:
    config = settings(lora=LoraSettings(rank=2, parts=("experts", "router")), lr=0.1)
    model = build("mixtral")
    before = state(model)
    result = train(model, None, text(), config, output=tmp_path)
    after = state(model)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if ".experts." in name or ".gate.weight" in name}
    assert set(result.trained) == {"adapters"}
    again = build("mixtral")
    train(again, None, text(), config, output=tmp_path)
    assert same(state(again), after)


@pytest.mark.full
@pytest.mark.slow
def test_a_failure_takes_adapters_off_again() -> None:
    model = build("mixtral")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    names = set(state(model))
    with pytest.raises(NumericFault):
        train(model, None, text(), settings(lora=LoraSettings(rank=2)))
    assert set(state(model)) == names


@pytest.mark.full
@pytest.mark.slow
def test_bf16_keeps_fp32_weights_and_comes_near() -> None:
    plain, mixed = build("qwen2_moe"), build("qwen2_moe")
    one = train(plain, None, text(), settings(parts=("router", "experts")))
    two = train(mixed, None, text(), settings(parts=("router", "experts"), precision="bf16"))
    assert two.losses == pytest.approx(one.losses, rel=2e-2)
    assert two.losses != one.losses
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    stock = state(build("qwen2_moe"))
    frozen = [name for name in stock if "experts." not in name and "gate.weight" not in name]
    assert all(torch.equal(stock[name], mixed.state_dict()[name]) for name in frozen)


@pytest.mark.full
@pytest.mark.slow
def test_transformers_own_balance_loss_is_off_meanwhile() -> None:
    model, other = build("olmoe"), build("olmoe")
    model.config.output_router_logits = True
    assert train(model, None, text(), settings()).losses == train(other, None, text(), settings()).losses
    assert model.config.output_router_logits is True
    assert torch.equal(logits(model), logits(other))


def test_activation_checkpointing_changes_no_loss() -> None:
    plain = train(build("qwen3_moe"), None, text(), settings())
    model = build("qwen3_moe")
    saving = train(model, None, text(), settings(activation_checkpointing=True))
    assert saving.losses == pytest.approx(plain.losses, rel=1e-5)
    assert saving.routing == plain.routing or saving.routing.layers.keys() == plain.routing.layers.keys()


@pytest.mark.full
@pytest.mark.slow
def test_text_is_tokenized_and_documents_end() -> None:
    tokenizer = word_tokenizer()
    docs = [Document(" ".join(f"w{3 + (i * j) % 120}" for j in range(40)), "a", str(i)) for i in range(1, 6)]
    result = train(build("olmoe"), tokenizer, docs, settings(steps=None, epochs=2.0))
    # 5 documents of 40 words and an end each are 13 rows of 16: 26 row places, two a step.
    assert result.steps == 13
    with pytest.raises(BadConfig, match="tokenizer"):
        train(build("olmoe"), None, docs, settings())
    with pytest.raises(BadData):
        train(build("olmoe"), tokenizer, [], settings())
    with pytest.raises(BadConfig, match="embeds 64 tokens"):
        train(build("olmoe", vocab_size=64), tokenizer, docs, settings())


def test_weights_too_coarse_for_training_are_refused() -> None:
    with pytest.raises(BadConfig, match="bfloat16"):
        train(build("olmoe").to(torch.bfloat16), None, text(), settings())


def test_adapters_train_on_frozen_bf16_weights() -> None:
    model = build("mixtral").to(torch.bfloat16)
    before = state(model)
    config = settings(lora=LoraSettings(rank=2, parts=("attention",)), lr=0.1, precision="bf16")
    result = train(model, None, text(), config)
    assert result.losses[-1] < result.losses[0]
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("self_attn" in name for name in changed)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Bar:
    """Records what a progress bar was told."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def start(self, label: str, total: int | None) -> None:
        self.calls.append(("start", label, total))

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.calls.append(("advance", amount, note))

    def finish(self) -> None:
        self.calls.append(("finish",))


def test_progress_is_told_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    result = train(build("olmoe"), None, text(), settings(), progress=bar)
    assert bar.calls[0] == ("start", "training", 5)
    assert bar.calls[-1] == ("finish",)
    assert [call[2] for call in bar.calls[1:-1]] == [f"loss {loss:.3f}" for loss in result.losses]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"steps": 7}, 7), ({"epochs": 1.5}, 8), ({"tokens": 1000}, 16), ({}, 5)],
)
def test_lengths(changes: dict[str, float], steps: int) -> None:
    config = TrainConfig(batch=2, accumulation=2, seq_len=16, **changes)
    assert config.planned_steps(20) == steps
    assert config.planned_steps(20, world=100) in (1, 7)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1, "epochs": 1.0},
        {"steps": 0},
        {"lr": 0.0},
        {"learning_rate": 1e-3},
        {"objectives": {"balance": -1.0}},
        {"lora": LoraSettings(), "parts": ("router",)},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises((ValidationError, BadConfig)):
        TrainConfig(**changes)


def test_warmup_as_share_or_steps() -> None:
    assert TrainConfig(warmup=0.1).warmup_steps(50) == 5
    assert TrainConfig(warmup=3).warmup_steps(50) == 3
    assert TrainConfig(warmup=0.03).warmup_steps(1) == 0


@pytest.mark.full
@pytest.mark.slow
def test_precision_is_decided_by_the_device_and_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(_device, "cpu_features", lambda: frozenset({"avx2"}))
    assert resolve_precision("auto", cpu) == "fp32"
    assert train(build("olmoe"), None, text(), settings(steps=1, precision="auto")).precision == "fp32"
    monkeypatch.setattr(_device, "cpu_features", lambda: frozenset({"avx2", "avx512_bf16"}))
    assert resolve_precision("auto", cpu) == "bf16"
    assert resolve_precision("fp32", cpu) == "fp32"
    assert train(build("olmoe"), None, text(), settings(steps=1, precision="auto")).precision == "bf16"
    rows, model = text(), build("olmoe")
    configs = [settings(precision=precision) for precision in ("auto", "bf16", "fp32")]
    same = [run_identity(model, Texts({"train": rows}, {"train"}, config, 1), config) for config in configs]
    assert same[0] == same[1] != same[2]


@pytest.mark.full
@pytest.mark.slow
def test_attention_comes_back() -> None:
    model = build("qwen2_moe")
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    train(model, None, text(), settings(steps=1))
    train(model, None, text(2, 600), settings(steps=1, seq_len=600))
    handle.remove()
    assert (set(seen[:3]), set(seen[3:])) == ({"eager"}, {"sdpa"})
    assert model.config._attn_implementation == "sdpa"
