"""Models whose routers give no logits train like all others; what needs logits is refused where it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from moekit.data import TokenBatches
from moekit.errors import MoekitError, UnsupportedModel
from moekit.training import LiveTeacher, LoraSettings, TrainConfig, collect, train, train_only
from moekit.training.chooser import find_chooser
from moekit.training.layers import moe_layers
from moekit.training.order import row_order
from tests.families import EXPERTS, HIDDEN, TOP_K, VOCAB
from tests.odd_families import build

ROWS, LENGTH = 6, 16
# family -> what chooses in each block, below it; None where nothing tells.
CHOOSERS: dict[str, str | None] = {
    "dbrx": "router",
    "deepseek_v4": "gate",
    "doge": None,
    "inkling_text": "gate",
    "jetmoe": "router",
    "llama4_text": "router",
    "longcat_flash": "router",
    "zaya": "gate",
}
# Each tells its routing in another way; the others are tried by `make test-all`.
QUICK = ("dbrx", "doge", "llama4_text")


def _tried(families: Iterable[str]) -> list[Any]:
    others = (pytest.mark.full, pytest.mark.slow)
    return [pytest.param(family, marks=() if family in QUICK else others) for family in sorted(families)]


NO_LOGITS = _tried(CHOOSERS)
KNOWN = _tried(family for family, chooser in CHOOSERS.items() if chooser is not None)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def text(seed: int = 0) -> TokenBatches:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
    document = torch.arange(ROWS, dtype=torch.int32).unsqueeze(1).repeat(1, LENGTH)
    return TokenBatches(ids, document, document.clamp(max=0).to(torch.int16), ("a",))


def settings(**changes: Any) -> TrainConfig:
    base = {
        **{"steps": 1, "batch": 2, "seq_len": LENGTH, "lr": 1e-3, "lr_schedule": "constant"},
        **{"warmup": 0, "clip": 0, "precision": "fp32", "save_every": None},
    }
    return TrainConfig(**base | changes)


def batch_of(rows: TokenBatches, step: int, config: TrainConfig) -> dict[str, Tensor]:
    order = row_order(len(rows), config.batch * (config.steps or 1), config.seed)
    picked = [rows[i] for i in order[config.batch * step : config.batch * (step + 1)]]
    return {key: torch.stack([row[key] for row in picked]) for key in picked[0]}


def stock_loss(model: PreTrainedModel, config: TrainConfig, **further: Any) -> float:
    """The loss of the first step, by the model alone."""
    with torch.no_grad():
        return float(copy.deepcopy(model).train()(**batch_of(text(), 0, config), use_cache=False, **further).loss)


def changed(model: PreTrainedModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# Where gradients are well above rounding: what one step gets wrong by it, the next one would hand on.
TWO_STEPS = ("jetmoe", "llama4_text", "longcat_flash", "zaya")


@pytest.mark.parametrize("family", NO_LOGITS)
def test_losses_and_weights_are_those_of_a_loop_written_out(family: str) -> None:
    steps = 2 if family in TWO_STEPS else 1
    config = settings(steps=steps)
    model = build(family)
    reference = copy.deepcopy(model).train()
    start = state(model)
    result = train(model, None, text(), config)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    losses, clear = [], {name: torch.ones_like(p, dtype=torch.bool) for name, p in reference.named_parameters()}
    for step in range(steps):
        loss = reference(**batch_of(text(), step, config), use_cache=False).loss
        loss.backward()
        for name, parameter in reference.named_parameters():
            if parameter.grad is not None:  # Adam makes a whole step of a gradient that is nothing but rounding
                size = parameter.grad.abs()
                clear[name] &= (size == 0) | (size > 1e-4 * size.max().clamp(min=1e-4))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-5)
    found = model.state_dict()
    far = {name: (found[name] - p.detach()).abs()[clear[name]].amax() for name, p in reference.named_parameters()}
    assert max(far.values()) < 1e-6, max(far, key=lambda name: far[name])
    told = sum(int(mask.sum()) for mask in clear.values()) / sum(mask.numel() for mask in clear.values())
    assert told > 0.9
    moved = [bool(((found[name] - start[name]).abs() > 5e-4).any()) for name, _ in reference.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)


@pytest.mark.parametrize("family", _tried(["dbrx", "jetmoe", "llama4_text"]))
def test_figures_are_told_from_choices(family: str) -> None:
    model, config = build(family), settings()
    chosen: list[Tensor] = []

    def see(module: Any, args: Any, answer: Any) -> None:
        logits = answer if isinstance(answer, Tensor) else answer[1] if family == "llama4_text" else answer[-1]
        chosen.append(torch.bincount(logits.reshape(-1, EXPERTS).topk(TOP_K).indices.flatten(), minlength=EXPERTS))

    reference = copy.deepcopy(model).train()
    blocks = moe_layers(reference)
    for layer in blocks:
        layer.block.get_submodule("router").register_forward_hook(see)
    with torch.no_grad():
        reference(**batch_of(text(), 0, config), use_cache=False)
    result = train(model, None, text(), config)
    assert result.routing is not None
    figures = result.routing.layers
    assert [figures[layer.index].load for layer in blocks] == [counts.tolist() for counts in chosen]
    assert all(f.balance_loss is None and f.z_loss is None for f in figures.values())
    assert not any(name.startswith("moe/balance") for name in result.history[-1])
    assert result.history[-1]["moe/load_cv"] > 0
    (note,) = result.notes
    assert "layers 0, 1: routers give no logits" in note


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_choice_of_a_step_is_counted_once(family: str, checkpointing: bool) -> None:
    if checkpointing and family == "jetmoe":
        pytest.skip("the family has no activation checkpointing")
    result = train(build(family), None, text(), settings(activation_checkpointing=checkpointing))
    assert result.routing is not None
    for layer in result.routing.layers.values():
        total = sum(layer.load)
        # Zaya may skip, LongCat may choose what copies its input.
        assert 0 < total <= 2 * LENGTH * TOP_K
        assert total == 2 * LENGTH * TOP_K or family in ("zaya", "longcat_flash")


def test_without_known_experts_there_are_no_figures_and_it_is_said() -> None:
    result = train(build("doge"), None, text(), settings())
    assert result.routing is None
    assert result.notes == ["the experts lie in a form that moekit does not know: there are no routing figures"]


ASKED: list[dict[str, Any]] = [
    *({"objectives": {name: 0.01}} for name in ("balance", "z", "importance", "mi", "entropy", "device-balance")),
    {"balancer": {"use": "sign"}},
    {"schedules": {"routing.top_k": {"use": "constant", "at": 1}}},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: str(next(iter(asked.values()))))
@pytest.mark.parametrize("family", ["dbrx", "doge"])
def test_what_reads_logits_is_refused_where_it_is_asked_for(family: str, asked: dict[str, Any]) -> None:
    model = build(family)
    ran: list[Any] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedModel, match="reads the logits of every router, and ") as told:
        train(model, None, text(), settings(**asked))
    assert not ran
    assert (told.value.layer == 0) == (family == "dbrx")
    assert "no router beside" in told.value.message or "form that moekit does not know" in told.value.message
    assert "cross-entropy and kd train this model" in str(told.value.hint)


def test_losses_of_ones_own_need_logits_too() -> None:
    with pytest.raises(UnsupportedModel, match="no router beside"), collect(build("dbrx")):
        pass


@pytest.mark.parametrize("family", _tried(["dbrx", "doge", "jetmoe"]))
def test_the_familys_own_auxiliary_loss_is_kept_where_its_config_asks_for_it(family: str) -> None:
    model, config = build(family), settings()
    plain = stock_loss(model, config)
    model.config.output_router_logits = True
    whole = stock_loss(model, config)
    assert abs(whole - plain) > 1e-4
    result = train(model, None, text(), config)
    assert result.losses == pytest.approx([whole], rel=1e-5)
    assert "auxiliary loss" in result.notes[-1]
    assert model.config.output_router_logits is True


def test_an_auxiliary_loss_that_the_family_cannot_compute_is_left_out() -> None:
    # All layers of it choose by a table, and transformers records logits of learnt routers alone.
    model, config = build("deepseek_v4"), settings()
    plain = stock_loss(model, config)
    model.config.output_router_logits = True
    with pytest.raises(IndexError):
        stock_loss(model, config)
    result = train(model, None, text(), config)
    assert result.losses == pytest.approx([plain], rel=1e-5)
    assert "left out" in result.notes[-1]
    assert model.config.output_router_logits is True


def test_a_model_without_a_loss_of_a_text_is_refused_before_any_work() -> None:
    class Blocks(torch.nn.Module):
        config = transformers.MixtralConfig()

        def forward(self, input_ids: Tensor) -> None:
            raise AssertionError

    with pytest.raises(UnsupportedModel, match="Blocks computes no loss of a text"):
        train(Blocks(), None, text(), settings())
    Blocks.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModel, match="Blocks reads one text and writes another"):
        train(Blocks(), None, text(), settings())


@pytest.mark.parametrize("family", KNOWN)
def test_a_router_is_trained_alone_by_its_name(family: str) -> None:
    model = build(family)
    before = state(model)
    wanted = {
        f"{layer.name}.{CHOOSERS[family]}.{name}"
        for layer in moe_layers(model)
        for name, _ in layer.block.get_submodule(str(CHOOSERS[family])).named_parameters()
    }
    result = train(model, None, text(), settings(parts=("router",), lr=0.1))
    found = changed(model, before)
    assert found
    assert found <= wanted
    assert set(result.trained) == {"router"}
    assert result.trained["router"] == sum(before[name].numel() for name in wanted)


def test_a_router_has_its_own_rate() -> None:
    model = build("dbrx")
    before = state(model)
    train(model, None, text(), settings(router_lr=0.5))
    change = {name: float((t - before[name]).abs().max()) for name, t in model.state_dict().items()}
    assert change["transformer.blocks.0.ffn.router.layer.weight"] == pytest.approx(0.5, rel=1e-2)
    assert change["transformer.blocks.0.ffn.experts.mlp.w1"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("asked", [{"parts": ("router",)}, {"parts": ("all", "-experts")}, {"router_lr": 0.1}])
def test_parts_of_unknown_experts_are_refused_and_others_train(asked: dict[str, Any]) -> None:
    with pytest.raises(MoekitError, match="form that moekit does not know"):
        train(build("doge"), None, text(), settings(**asked))
    model = build("doge")
    before = state(model)
    train(model, None, text(), settings(parts=("attention",)))
    found = changed(model, before)
    assert found
    assert all(".self_attn." in name for name in found)


def test_what_may_be_the_router_is_refused_where_two_may_be() -> None:
    model = build("dbrx")
    layer = moe_layers(model)[0]
    assert find_chooser(layer) is not None
    layer.block.another = torch.nn.Linear(HIDDEN, EXPERTS)
    with pytest.raises(UnsupportedModel, match="nothing tells which module of "):
        train_only(model, ["router"])
    assert train_only(model, ["experts"]).trained.keys() == {"experts"}


def test_single_experts_train_where_they_lie_in_stacks() -> None:
    model = build("llama4_text")
    before = state(model)
    train(model, None, text(), settings(parts=("experts:1[3]",), lr=0.1))
    found = changed(model, before)
    assert found
    assert all(name.startswith("model.layers.1.feed_forward.experts.") for name in found)
    for name in found:
        rows = [not torch.equal(a, b) for a, b in zip(model.state_dict()[name], before[name], strict=True)]
        assert rows == [expert == 3 for expert in range(EXPERTS)]
    with pytest.raises(UnsupportedModel, match="cannot train one by one"):
        train(build("dbrx"), None, text(), settings(parts=("experts:1[3]",)))


@pytest.mark.parametrize("family", _tried(["dbrx", "zaya", "doge"]))
def test_a_teacher_teaches(family: str) -> None:
    model = build(family)
    config = settings(objectives={"ce": 0, "kd": 1.0})
    result = train(model, None, text(), config, teacher=LiveTeacher(copy.deepcopy(model)))
    assert result.losses == pytest.approx([0.0], abs=1e-5)


def test_adapters_are_merged() -> None:
    model = build("inkling_text")
    before = state(model)
    train(model, None, text(), settings(lora=LoraSettings(rank=2, parts=("experts", "router")), lr=0.1))
    found = changed(model, before)
    assert model.state_dict().keys() == before.keys()
    assert found
    assert all(".mlp." in name for name in found)
