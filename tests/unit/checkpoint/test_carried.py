"""What a source holds beyond the language model goes through load -> change -> save byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration

import moekit
from moekit.anatomy import find_moe_layers
from moekit.checking import check
from moekit.checkpoint.carried import append_tensors
from moekit.checkpoint.experts import expert_counts
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.checkpoint.safety import read_header
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.conversion.methods.copy import CopyUpcycling
from moekit.errors import BadCheckpoint, BadConfig
from moekit.parallel import save_sharded
from moekit.parallel.checkpoints.reshard import plain as plain_folder
from moekit.routing import plan_routing
from moekit.routing.methods.topk import TopK
from tests.checkpoints import edit_json, edit_shard, plain
from tests.dense import dense_model
from tests.families import VOCAB, build, logits
from tests.odd_folders import nudge, spread, tensors_of, with_mtp, with_own_head, with_vision

TEXT_ONLY = {"dtype", "transformers_version"}


def config_of(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in TEXT_ONLY}


@pytest.mark.parametrize("case", [{}, {"shards": 3}, {"fused": True}], ids=["one file", "shards", "fused"])
@pytest.mark.parametrize("limit", [10**9, 60_000], ids=["room", "small shards"])
def test_layers_for_multi_token_prediction_stay(tmp_path, case, limit):
    source, names = with_mtp(tmp_path / "source", **case)
    model = moekit.load(source, device="cpu")
    nudge(model)
    moekit.save(model, tmp_path / "out", max_shard_bytes=limit)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert len(names) >= 15
    assert set(after) == set(before)
    for name in names:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    assert config_of(tmp_path / "out") == config_of(source)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), rtol=0, atol=5e-6
    )
    assert check(tmp_path / "out").ok
    assert (len(Checkpoint.open(tmp_path / "out").shards) > 2) is (limit < 10**9)


def test_a_vision_model_stays_one(tmp_path):
    source = with_vision(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    nudge(model)
    moekit.save(model, tmp_path / "out")
    whole, told = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids = torch.arange(3, 40)[None] % VOCAB
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=5e-6)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    tower = [name for name in before if "visual" in name]
    assert tower
    assert all(torch.equal(before[name], after[name]) for name in tower)
    assert config_of(tmp_path / "out") == config_of(source)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 4}'


def test_layers_of_different_sizes_keep_the_names_of_a_vision_model(tmp_path):
    source = with_vision(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    kept = {0: LayerOutcome(keep=tuple(range(8))), 1: LayerOutcome(keep=(0, 2, 3, 5))}
    moekit.save(change_model(model, kept), tmp_path / "uneven")
    again = moekit.load(tmp_path / "uneven", device="cpu")
    nudge(again)
    moekit.save(again, tmp_path / "twice")
    assert set(tensors_of(tmp_path / "twice")) == set(tensors_of(tmp_path / "uneven"))
    assert {name.split(".")[0] for name in tensors_of(tmp_path / "twice")} == {"model", "lm_head"}
    assert all(
        n.startswith(("model.language_model.", "model.visual.", "lm_head.")) for n in tensors_of(tmp_path / "twice")
    )
    torch.testing.assert_close(logits(moekit.load(tmp_path / "twice", device="cpu")), logits(again), rtol=0, atol=5e-6)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_nothing_is_lost_in_silence_where_the_source_is_not_what_it_was(tmp_path, damage):
    source, names = with_mtp(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    if damage == "gone":
        shutil.rmtree(source)
    else:
        edit_shard(source / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(BadCheckpoint, match=f"{len(names)} tensors .*model.layers.2.*would be lost") as told:
        moekit.save(model, tmp_path / "out")
    assert "drop_unknown=True" in str(told.value)
    assert not (tmp_path / "out").exists()
    record = moekit.save(model, tmp_path / "out", drop_unknown=True)
    assert f"{len(names)} tensors" in record.config["left_out"]
    assert not any(".layers.2." in name for name in tensors_of(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_tower_is_nothing_unknown(tmp_path):
    source = with_vision(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    shutil.rmtree(source)
    with pytest.raises(BadCheckpoint, match=r"preprocessor_config.json would be lost"):
        moekit.save(model, tmp_path / "out")
    moekit.save(model, tmp_path / "out", drop_unknown=True)
    assert config_of(tmp_path / "out")["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    stock, told = Qwen3_5MoeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=5e-6)


def test_layers_of_another_number_of_experts_are_refused_or_dropped(tmp_path):
    source, names = with_mtp(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    layers = expert_counts(Checkpoint.open(source).tensors)
    kept = LayerOutcome(keep=(0, 1, 2, 4, 5, 6))
    change_model(model, {layer: kept for layer in layers if layer < 2}, groups="free")
    with pytest.raises(BadConfig, match=r"layer 2: .*8 experts, the changed model 6") as told:
        moekit.save(model, tmp_path / "out")
    assert 'mtp="drop"' in str(told.value)
    moekit.save(model, tmp_path / "out", mtp="drop")
    assert not names & set(tensors_of(tmp_path / "out"))
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert config_of(tmp_path / "out")["kept_by_no_class"] == "yes"


def test_a_model_from_nowhere_announces_no_layer_that_it_lacks(tmp_path):
    moekit.save(build("deepseek_v3"), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) == 0


@pytest.mark.parametrize("kind", ["mtp", "vision"])
def test_a_sharded_checkpoint_becomes_the_whole_folder_again(tmp_path, kind):
    source = with_mtp(tmp_path / "source")[0] if kind == "mtp" else with_vision(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    save_sharded(model, tmp_path / "sharded")
    plain_folder(tmp_path / "sharded", tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(tmp_path / "out") == config_of(source)
    shutil.rmtree(source)
    with pytest.raises(BadCheckpoint, match="would be lost"):
        plain_folder(tmp_path / "sharded", tmp_path / "again")
    plain_folder(tmp_path / "sharded", tmp_path / "again", drop_unknown=True)
    lost = {name for name in before if kind == "mtp" and ".layers.2." in name}
    assert set(tensors_of(tmp_path / "again")) == set(before) - lost


def test_converting_a_dense_model_with_more_than_a_language_model_is_refused(tmp_path):
    dense_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "dense")
    beyond = {"model.layers.2.eh_proj.weight": torch.ones(2, 2)}
    edit_shard(tmp_path / "dense" / "model.safetensors", lambda tensors: tensors.update(beyond))
    edit_json(tmp_path / "dense" / "config.json", lambda config: config.update(num_nextn_predict_layers=1))
    model = moekit.load(tmp_path / "dense", device="cpu")
    with pytest.raises(BadConfig, match=r"1 tensors \(model.layers.2.eh_proj.weight\) would be lost"):
        CopyUpcycling(experts=2, top_k=1).convert(model)
    moekit.save(CopyUpcycling(experts=2, top_k=1).convert(model, drop_unknown=True), tmp_path / "moe")
    assert check(tmp_path / "moe").ok


def test_a_tied_config_with_a_head_of_its_own(tmp_path):
    source = with_own_head(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(source)
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=0)
    nudge(model)
    moekit.save(model, tmp_path / "out")
    torch.testing.assert_close(logits(moekit.load(tmp_path / "out", device="cpu")), logits(model), rtol=0, atol=5e-6)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model), rtol=0, atol=5e-6
    )


def test_appended_tensors_keep_their_bytes_whatever_their_dtype(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    held = tensors_of(folder)
    extra = {
        "a": torch.randint(0, 255, (3,), dtype=torch.uint8),
        "b": torch.randn(5, dtype=torch.bfloat16),
        "c": torch.tensor([2**40], dtype=torch.int64),
        "d": torch.randn(7).to(torch.float8_e4m3fn),
    }
    other = tmp_path / "other"
    other.mkdir()
    spread(other, extra)
    infos = read_header(other / "model.safetensors").tensors
    append_tensors(folder, [(info, other / "model.safetensors") for info in infos.values()], 10**9)
    after = tensors_of(folder)
    for name, tensor in (held | extra).items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with pytest.raises(BadConfig, match="written twice"):
        append_tensors(folder, [(infos["a"], other / "model.safetensors")], 1)


def test_a_saved_folder_without_more_is_what_it_was(tmp_path):
    source = plain(tmp_path / "source", "qwen2_moe")
    model = moekit.load(source, device="cpu")
    shutil.rmtree(source)  # nothing of it is needed
    record = moekit.save(model, tmp_path / "out", record=Record(command="x"))
    assert "left_out" not in record.config


def test_extra_tensors_that_nothing_could_read_again_are_refused(tmp_path):
    model = build("mixtral")
    plan_routing(find_moe_layers(model), TopK(), "topk").apply(model)
    for name in ("theta", "routing.0.partners", "layers.one.theta"):
        with pytest.raises(BadConfig, match="extra tensor"):
            moekit.save(model, tmp_path / "out", extra_tensors={name: torch.ones(3)})
    moekit.save(model, tmp_path / "out", extra_tensors={"layers.0.theta": torch.ones(3)})
    torch.testing.assert_close(logits(moekit.load(tmp_path / "out", device="cpu")), logits(model), rtol=0, atol=5e-6)
