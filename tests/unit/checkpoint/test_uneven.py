"""Layers that hold different numbers of experts: opened by moekit, proven, refused by stock transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checking import check
from moekit.checkpoint.expected import verify
from moekit.checkpoint.fingerprint import fingerprint_model
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadCheckpoint, BadConfig
from moekit.streaming import LayerLoader
from tests.checkpoints import edit_json, edit_shard, plain
from tests.families import EXPERTS, FAMILIES, build, logits, tokens


def outcomes(family: str) -> dict[int, LayerOutcome]:
    indices = [layer.index for layer in find_moe_layers(build(family))]
    kept = [(0, 2, 5), (1, 2, 3, 4, 6, 7)]
    return {index: LayerOutcome(keep=kept[number % 2]) for number, index in enumerate(indices)}


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_disk_engine_writes_unevenly_moekit_loads(family: str, fused: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family, fused=fused))
    apply(checkpoint, outcomes(family), tmp_path / "out", record=Record(command="a test"))
    expected = logits(change_model(build(family), outcomes(family)))
    loaded = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert {layer.index: layer.geometry.experts for layer in find_moe_layers(loaded)} == {
        index: len(outcome.keep) for index, outcome in outcomes(family).items()
    }
    report = check(tmp_path / "out")
    assert report.ok, report
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_live_uneven_model_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    changed = change_model(build(family), outcomes(family))
    moekit.save(changed, tmp_path / "out")
    loaded = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(loaded), logits(changed), rtol=1e-5, atol=1e-5)
    assert check(tmp_path / "out").ok
    assert "does not" in (tmp_path / "out" / "README.md").read_text()
    again = copy.deepcopy(loaded)
    moekit.save(again, tmp_path / "twice")
    assert check(tmp_path / "twice").ok


def test_without_its_record_an_uneven_folder_is_refused(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), outcomes("mixtral")), tmp_path / "out")
    (tmp_path / "out" / "moekit.json").unlink()
    with pytest.raises(BadCheckpoint, match="missing"):
        moekit.load(tmp_path / "out")


def test_a_record_of_other_counts_is_refused(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), outcomes("mixtral")), tmp_path / "out")

    def change(record: dict[str, dict[str, dict[str, int]]]) -> None:
        record["expectations"]["experts"]["0"] = 4

    edit_json(tmp_path / "out" / "moekit.json", change)
    with pytest.raises(BadCheckpoint):
        moekit.load(tmp_path / "out")


def test_a_device_map_is_refused_with_the_reason(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), outcomes("mixtral")), tmp_path / "out")
    with pytest.raises(BadConfig, match="device_map"):
        moekit.load(tmp_path / "out", device_map="auto")


def test_the_card_and_the_check_say_who_loads_it(tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), outcomes("mixtral")), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "opens it without moekit" not in card
    assert "`moekit.load` opens the folder" in card
    assert check(tmp_path / "out").codes().isdisjoint({"expert-count", "shape", "config"})
    for target in ("transformers", "vllm"):
        report = check(tmp_path / "out", for_=target)
        assert not report.ok
        assert "uneven-experts" in report.codes()
    record = Record.read(tmp_path / "out")
    assert record is not None
    assert record.expectations.experts == {0: 3, 1: 6}
    assert Checkpoint.open(tmp_path / "out").config["num_local_experts"] == 6


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_layer_that_keeps_all_routes_as_freely_as_the_others(family: str, tmp_path: Path) -> None:
    """The config has one number of groups for all layers, and it no longer divides the smaller ones."""
    kept = {1: LayerOutcome(keep=(0, 2, 5)), 2: LayerOutcome(keep=tuple(range(EXPERTS)))}
    checkpoint = Checkpoint.open(plain(tmp_path / "m", family))
    apply(checkpoint, kept, tmp_path / "out", record=Record(command="a test"))
    loaded = moekit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    expected = change_model(build(family), kept)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)
    assert expected.config.n_group == loaded.config.n_group == 1


def test_a_stored_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    build("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "even")
    changed = change_model(moekit.load(tmp_path / "even", device="cpu"), outcomes("qwen3_moe"))
    moekit.save(changed, tmp_path / "out")
    head: list[torch.Tensor] = []

    def store(tensors: dict[str, torch.Tensor]) -> None:
        head.append(tensors["model.embed_tokens.weight"].flip(0).contiguous())
        tensors["lm_head.weight"] = head[0]

    edit_shard(tmp_path / "out" / "model.safetensors", store)
    loaded = moekit.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded.lm_head.weight, head[0])
    assert not torch.equal(loaded.model.embed_tokens.weight, head[0])


def test_a_loaded_model_is_like_a_stock_one(tmp_path: Path) -> None:
    """Settings of generation, dtype, gradients, tied weights and fingerprint, over several shards."""
    model = build("qwen3_moe", tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "even")
    even = moekit.load(tmp_path / "even", device="cpu")
    changed = change_model(moekit.load(tmp_path / "even", device="cpu"), outcomes("qwen3_moe"))
    moekit.save(changed, tmp_path / "out", max_shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    loaded = moekit.load(tmp_path / "out", device="cpu")
    assert torch.equal(logits(loaded), logits(changed))
    assert loaded.generation_config.max_new_tokens == 17
    assert type(loaded) is type(even)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.requires_grad for p in loaded.parameters()} == {p.requires_grad for p in even.parameters()}
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.config._experts_implementation == even.config._experts_implementation
    assert loaded.config._attn_implementation == even.config._attn_implementation
    assert not loaded.training
    assert fingerprint_model(loaded) == fingerprint_model(changed) == Checkpoint.open(tmp_path / "out").fingerprint
    half = moekit.load(tmp_path / "out", device="cpu", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    prompt = tokens(1, 4)
    said = loaded.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(said, changed.generate(prompt, max_new_tokens=4, do_sample=False))


def test_a_balance_loss_that_the_config_asks_for_is_off(tmp_path: Path) -> None:
    """The stock one stacks the routers' answers of all layers, and would fail in every forward."""
    source = plain(tmp_path / "m", "mixtral", output_router_logits=True)
    apply(Checkpoint.open(source), outcomes("mixtral"), tmp_path / "out", record=Record(command="a test"))
    loaded = moekit.load(tmp_path / "out", device="cpu")
    assert torch.isfinite(loaded(input_ids=tokens(), labels=tokens()).loss)


def test_pruned_evenly_afterwards_it_is_stock_again(tmp_path: Path) -> None:
    moekit.save(change_model(build("olmoe"), outcomes("olmoe")), tmp_path / "uneven")
    model = moekit.load(tmp_path / "uneven", device="cpu")
    change_model(model, {0: LayerOutcome(keep=(0, 1, 2)), 1: LayerOutcome(keep=(1, 3, 5))})
    record = Record.read(tmp_path / "uneven")
    moekit.save(model, tmp_path / "even", record=record)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "even").eval()
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_pruned_again_from_disk(tmp_path: Path) -> None:
    moekit.save(change_model(build("olmoe"), outcomes("olmoe")), tmp_path / "uneven")
    kept = {0: LayerOutcome(keep=(0, 2)), 1: LayerOutcome(keep=(1, 3, 5))}
    apply(Checkpoint.open(tmp_path / "uneven"), kept, tmp_path / "out", record=Record(command="a test"))
    expected = change_model(moekit.load(tmp_path / "uneven", device="cpu"), kept)
    loaded = moekit.load(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [0, -1, 7, 10**12])
def test_a_record_of_impossible_counts_is_refused_before_anything_is_built(count: int, tmp_path: Path) -> None:
    moekit.save(change_model(build("mixtral"), outcomes("mixtral")), tmp_path / "out")

    def change(record: dict[str, dict[str, dict[str, int]]]) -> None:
        record["expectations"]["experts"]["0"] = count

    edit_json(tmp_path / "out" / "moekit.json", change)
    with pytest.raises(BadCheckpoint, match=str(count)) as refused:
        moekit.load(tmp_path / "out")
    assert refused.value.layer == 0
    assert not check(tmp_path / "out").ok


def test_layers_beyond_the_models_own_do_not_count(tmp_path: Path) -> None:
    """Multi-token-prediction layers follow the decoder layers on disk, and may hold another number of experts."""
    moekit.save(build("mixtral"), tmp_path / "out")
    stock = logits(moekit.load(tmp_path / "out", device="cpu"))

    def change(record: dict[str, dict[str, dict[str, int]]]) -> None:
        record["expectations"]["experts"]["2"] = 3

    edit_json(tmp_path / "out" / "moekit.json", change)
    assert torch.equal(logits(moekit.load(tmp_path / "out", device="cpu")), stock)


def test_quantized_weights_become_floats(tmp_path: Path) -> None:
    source = plain(tmp_path / "m", "qwen3_moe")

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name.replace(".weight", ".weight_scale_inv")] = torch.ones(2, 2)
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_shard(source / "model.safetensors", shrink)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    edit_json(source / "config.json", lambda config: config.update(quantization_config=quantization))
    apply(Checkpoint.open(source), outcomes("qwen3_moe"), tmp_path / "out", record=Record(command="a test"))
    verify(Checkpoint.open(tmp_path / "out"))
    loaded = moekit.load(tmp_path / "out", device="cpu")
    counts = {layer: moe.geometry.experts for layer, moe in enumerate(find_moe_layers(loaded))}
    assert counts == {layer: outcome.experts for layer, outcome in outcomes("qwen3_moe").items()}
    layers = LayerLoader(Checkpoint.open(tmp_path / "out"), device="cpu")
    for index in range(layers.layers):
        layers.load(index)
    layers.load_rest()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, layers.model(tokens()).logits)
