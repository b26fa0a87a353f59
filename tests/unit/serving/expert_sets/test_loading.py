"""Loading a task's experts: budgets, what stays whatever its rank, quantized copies, and what is refused."""

from __future__ import annotations

import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadCheckpoint, BadConfig, MoekitError
from moekit.serving.expert_sets.expert_set import ExpertSet, keep_sets, make_expert_set
from moekit.serving.expert_sets.kept_bytes import KeptBytes
from moekit.serving.expert_sets.loading import load_task, plan_task
from tests.checkpoints import edit_json, edit_shard, plain, saved
from tests.families import logits

SCORES = {0: torch.tensor([3.0, 9, 1, 8, 2, 7, 0, 6]), 1: torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(plain(tmp_path / "m", "qwen3_moe"))


def expert_set(checkpoint: Checkpoint, **changes: Any) -> ExpertSet:
    return make_expert_set("maths", SCORES, tokens=1, **({"fingerprint": checkpoint.fingerprint} | changes))


def experts(model: Any) -> list[int]:
    return [layer.geometry.experts for layer in find_moe_layers(model)]


@pytest.mark.parametrize(
    ("keep", "count"), [(3, 3), ("3", 3), (0.5, 4), ("0.75", 6), (1.0, 8), (Budget(keep=2), 2), ("1GB", 8)]
)
def test_budgets_are_counts_fractions_or_bytes(checkpoint: Checkpoint, keep: Any, count: int) -> None:
    model = load_task(checkpoint, expert_set(checkpoint), keep, device="cpu")
    assert experts(model) == [count, count]
    assert model.config.num_experts == count


def test_keeping_all_gives_the_model_itself(checkpoint: Checkpoint) -> None:
    stock = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    model = load_task(checkpoint, expert_set(checkpoint), 1.0, device="cpu")
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-5, atol=1e-6)


def test_protected_experts_stay_and_count(checkpoint: Checkpoint) -> None:
    work = plan_task(checkpoint, expert_set(checkpoint), 3, protected={0: [6]})
    # Of layer 0 the best are 1, 3, 5; of layer 1 they are 7, 6, 5.
    assert {layer: d.keep for layer, d in work.outcomes.items()} == {0: (1, 3, 6), 1: (5, 6, 7)}
    model = load_task(checkpoint, expert_set(checkpoint), 3, protected={0: [6]}, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint.path).model.layers[0].mlp
    mine = model.model.layers[0].mlp
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(getattr(mine.experts, name), getattr(stock.experts, name)[[1, 3, 6]])
    assert torch.equal(mine.gate.weight, stock.gate.weight[[1, 3, 6]])


def test_dtype_and_fewer_choices(checkpoint: Checkpoint) -> None:
    model = load_task(checkpoint, expert_set(checkpoint), 1, top_k=1, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config.num_experts_per_tok == 1
    assert torch.isfinite(logits(model)).all()


def test_what_is_read_is_counted(checkpoint: Checkpoint) -> None:
    work = plan_task(checkpoint, expert_set(checkpoint), 2)
    with KeptBytes(work) as source:
        waiting = source.tensors()
        assert source.nbytes == 0
        name = "model.layers.1.mlp.experts.1.down_proj.weight"  # the second that is kept is expert 7
        assert torch.equal(waiting[name][...], checkpoint.read(name.replace("experts.1", "experts.7")))
        assert source.nbytes == checkpoint.tensors[name].nbytes
        assert waiting[name].get_shape() == list(checkpoint.tensors[name].shape)
        assert (waiting[name].get_dtype(), waiting[name].dtype) == ("F32", torch.float32)
        for tensor in waiting.values():
            assert tensor[...].shape == tensor.shape
    assert source.nbytes == checkpoint.tensors[name].nbytes + sum(kept.spec.nbytes for kept in work.kept)


def test_a_quantized_copy_is_loaded_by_the_expert_set_of_the_original(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "experts." in name:
                rows, columns = -(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)
                tensors[name.removesuffix(".weight") + ".weight_scale_inv"] = torch.rand(rows, columns) + 0.5
                tensors[name] = tensor.to(torch.float8_e4m3fn)

    folder = Path(shutil.copytree(checkpoint.path, tmp_path / "fp8"))
    edit_shard(folder / "model.safetensors", quantize)
    told = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=told))
    original = expert_set(checkpoint)
    with pytest.raises(BadConfig, match="another model"):
        load_task(folder, original, 4)
    model = load_task(folder, original, 4, other_weights=True, device="cpu")
    outcomes = {layer: LayerOutcome(keep=tuple(keep)) for layer, keep in keep_sets(original, 4).items()}
    apply(Checkpoint.open(folder), outcomes, tmp_path / "out", record=Record(command="a test"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    mine, theirs = model.state_dict(), other.state_dict()
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_hub_id_is_resolved_as_by_load(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(model: str, **options: Any) -> Path:
        asked.append((model, options["revision"]))
        return checkpoint.path

    monkeypatch.setattr("moekit.checkpoint.folder.resolve", resolve)
    model = load_task("some/moe", expert_set(checkpoint), 2, revision="v2", device="cpu")
    assert asked == [("some/moe", "v2")]
    assert experts(model) == [2, 2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer than choices": ({"keep": 1}, "every token chooses 2"),
    "more than there are": ({"keep": 9}, "there are 8"),
    "nothing": ({"keep": 0}, "no budget.*at least 1"),
    "no share": ({"keep": 1.5}, "no budget.*fraction"),
    "uneven": ({"keep": Budget(keep=4, scope="global")}, "equally many"),
    "protected layer": ({"keep": 4, "protected": {7: [0]}}, "layer 7"),
    "protected expert": ({"keep": 4, "protected": {1: [8]}}, "layer 1: experts .8. are protected"),
    "too many protected": ({"keep": 2, "protected": {1: [0, 1, 2]}}, "protected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_wishes(checkpoint: Checkpoint, name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(BadConfig, match=words) as caught:
        load_task(checkpoint, expert_set(checkpoint), **options)
    assert caught.value.hint or "layer" in name


def test_expert_sets_of_another_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="made of another model"):
        load_task(checkpoint, expert_set(checkpoint, fingerprint="f" * 64), 4)
    short = make_expert_set("maths", {0: SCORES[0]}, tokens=1)
    for options in ({}, {"other_weights": True}):
        with pytest.raises(BadConfig, match="of another shape"):
            load_task(checkpoint, short, 4, **options)


def test_damage_is_told_by_file(checkpoint: Checkpoint) -> None:
    shard = checkpoint.path / "model.safetensors"
    made = expert_set(checkpoint)
    work = plan_task(checkpoint, made, 4)
    os_size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(os_size - 64)
    last = max(work.kept, key=lambda kept: kept.source.offsets[1])
    with KeptBytes(work) as source, pytest.raises(BadCheckpoint, match="ends before") as caught:
        source.read(last)
    assert str(caught.value.file) == str(shard)
    with pytest.raises(MoekitError):
        load_task(checkpoint.path, made, 4)


def test_a_routing_policy_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen3_moe")
    edit_json(folder / "moekit.json", lambda record: record.update(parts=[{"kind": "routing", "name": "c2r"}]))
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(BadConfig, match="carries routing"):
        load_task(checkpoint, expert_set(checkpoint), 4)


def test_tensors_are_read_when_they_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more in memory than what is loaded already and the layer at work."""
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen3_moe", num_hidden_layers=4))
    made = make_expert_set("maths", dict.fromkeys(range(4), SCORES[0]), tokens=1)
    ahead: list[int] = []
    open_now: set[int] = set()
    stock = KeptBytes.read

    def read(self: KeptBytes, kept: Any) -> torch.Tensor:
        tensor = stock(self, kept)
        if "experts" in kept.name:
            open_now.add(number := len(ahead))
            weakref.finalize(tensor, open_now.discard, number)
            ahead.append(len(open_now))
        return tensor

    monkeypatch.setattr(KeptBytes, "read", read)
    load_task(checkpoint, made, 4, device="cpu")
    assert len(ahead) == 4 * 4 * 3
    # Gate and up projections of a layer become one tensor, so eight are open together.
    assert max(ahead) <= 12
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
