"""What parts learn is seen by optimizers and by training's parts, saved from the live state, and kept out of shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.catalogue import MethodRecord
from moekit.checkpoint import fingerprint_model
from moekit.checkpoint.record import Record
from moekit.errors import BadCheckpoint, BadConfig
from moekit.runtime import attach, attached
from moekit.runtime.part import RuntimePart
from moekit.runtime.router import RouteInputs, Scored, ScorePart
from moekit.training.freeze import parts_of, train_only
from tests.families import build, logits, tokens
from tests.parts import FAMILIES, NEUTRAL, Gain, Momentum, Nudge, Recurrence, learned, stir
from tests.runtime_cases import cases, hang

KINDS = ("routing", "block", "experts")


@pytest.mark.parametrize(("record", "family"), cases(KINDS, without=["learnable"], families=1))
def test_what_learns_nothing_adds_no_parameters(record: MethodRecord, family: str) -> None:
    model = build(family)
    before = {name for name, _ in model.named_parameters()}
    hang(model, family, record)
    assert {name for name, _ in model.named_parameters()} == before


def step(model: PreTrainedModel, rate: float = 0.1) -> dict[str, torch.Tensor]:
    """One step of plain gradient descent on all trainable parameters; their gradients."""
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate).step()
    model.zero_grad()
    model.eval()
    return gradients


@pytest.mark.parametrize(("record", "family"), cases(KINDS, "learnable"))
def test_an_optimizer_moves_it_and_the_moved_value_is_saved(record: MethodRecord, family: str, tmp_path: Path) -> None:
    model = build(family)
    part = hang(model, family, record).part
    stir(model)
    before = {name: p.detach().clone() for name, p in learned(model).items()}
    gradients = step(model)
    assert before.keys() <= gradients.keys()
    assert all(bool(g.isfinite().all()) for g in gradients.values())
    assert any(bool((gradients[name] != 0).any()) for name in before)
    moved = learned(model)
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    moekit.save(model, tmp_path / "m")
    back = moekit.load(tmp_path / "m", dtype=torch.float32, device="cpu")
    assert [a.part for a in attached(back)] == [part]
    again = learned(back)
    assert again.keys() == moved.keys()
    assert all(torch.equal(again[name], moved[name]) for name in moved)
    torch.testing.assert_close(logits(back), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_shards_are_what_they_were(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "stock")
    name = fingerprint_model(model)
    for part in NEUTRAL:
        attach(model, part)
    assert fingerprint_model(model) == name
    model.save_pretrained(tmp_path / "parts")
    for file in ("model.safetensors", "config.json"):
        digests = {hashlib.sha256((tmp_path / f / file).read_bytes()).hexdigest() for f in ("stock", "parts")}
        assert len(digests) == 1, file
    moekit.save(model, tmp_path / "saved")
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    stock = build(family)
    again = opened.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stock.state_dict().items())
    # Tensors mapped from a file are aligned otherwise: kernels may round the last bit another way.
    torch.testing.assert_close(logits(opened.eval()), logits(stock), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("part", "where"), [(Nudge(), "router"), (Recurrence(), "router"), (Gain(), "experts")])
def test_training_parts_name_it(part: RuntimePart, where: str) -> None:
    model = build("qwen3_moe")
    attach(model, part)
    assert {parts_of(model)[name] for name in learned(model)} == {where}
    train_only(model, (where,))
    assert all(p.requires_grad for p in learned(model).values())
    train_only(model, ("attention",))
    assert not any(p.requires_grad for p in learned(model).values())


def test_a_block_part_trains_with_all() -> None:
    model = build("qwen3_moe")
    attach(model, Momentum())
    train_only(model, ("all",))
    assert all(p.requires_grad for p in learned(model).values())


def test_a_part_that_no_catalogue_knows_cannot_be_saved(tmp_path: Path) -> None:
    class Unknown(ScorePart):
        def score(self, inputs: RouteInputs) -> Scored:
            return Scored(inputs.logits)

    model = build("qwen3_moe")
    attach(model, Unknown())
    with pytest.raises(BadConfig, match="Unknown is not in the catalogue"):
        moekit.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_other_extra_tensors_lie_beside_those_of_parts(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    attach(model, Nudge())
    moekit.save(model, tmp_path / "m", extra_tensors={"layers.0.scale": torch.ones(3)})
    with safe_open(tmp_path / "m" / "moekit.safetensors", "pt") as file:
        assert set(file.keys()) == {"learned.0.0.delta", "learned.0.1.delta", "layers.0.scale"}
    assert len(attached(moekit.load(tmp_path / "m", device="cpu"))) == 1
    assert attached(moekit.load(tmp_path / "m", device="cpu", parts=False)) == []


def test_damage_to_what_was_learned_is_named(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    attach(model, Recurrence())
    moekit.save(model, tmp_path / "m")
    record = Record.read(tmp_path / "m")
    assert record is not None
    few = record.model_copy(update={"parts": [record.parts[0].model_copy(update={"layers": [0]})]})
    few.write(tmp_path / "m")
    with pytest.raises(BadCheckpoint, match="belongs to no layer"):
        moekit.load(tmp_path / "m", device="cpu")
    gone = record.model_copy(update={"parts": [record.parts[0].model_copy(update={"layers": [0, 1, 9]})]})
    gone.write(tmp_path / "m")
    with pytest.raises(BadCheckpoint, match=r"layers \[9\]"):
        moekit.load(tmp_path / "m", device="cpu")
