import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moekit.checkpoint.fingerprint import fingerprint_model
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import load, read_extra_tensors, save
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import Record
from moekit.errors import BadCheckpoint, BadConfig, UnsupportedModel
from tests.checkpoints import edit_json, edit_shard, plain, saved
from tests.families import EXPERTS, FAMILIES, TOP_K, VOCAB, build, logits

RECORD = Record(command="moekit convert tiny", parent="org/tiny", seed=3, config={"ratio": 0.5})


def tokenizer_of(size):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0")), unk_token="t0"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_open_in_stock_transformers_with_equal_logits(tmp_path, family):
    model = build(family)
    save(model, tmp_path / "model", record=RECORD)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load(tmp_path / "model", device="cpu")
    for other in (stock, ours):
        state = other.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        # Weights are equal bit for bit; kernels may differ in the last bit where a file maps them elsewhere in memory.
        torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_lie_split_on_disk_where_the_family_does_so(tmp_path, family):
    folder, reference = saved(tmp_path / "model", family), plain(tmp_path / "plain", family)
    assert set(Checkpoint.open(folder).tensors) == set(Checkpoint.open(reference).tensors)


def test_the_record_tells_what_must_be_there(tmp_path):
    written = save(build("deepseek_v3"), tmp_path / "model", record=RECORD)
    record = Record.read(tmp_path / "model")
    assert record == written
    assert record.expectations.experts == {1: EXPERTS, 2: EXPERTS}
    assert record.expectations.top_k == TOP_K
    assert record.fingerprint == Checkpoint.open(tmp_path / "model").fingerprint
    assert set(record.expectations.tensors) == set(Checkpoint.open(tmp_path / "model").tensors)
    assert (record.command, record.parent, record.seed) == ("moekit convert tiny", "org/tiny", 3)
    assert set(record.versions) == {"torch", "transformers", "safetensors"}


def test_the_card_names_base_model_licence_and_how(tmp_path):
    parent = plain(tmp_path / "parent")
    (parent / "README.md").write_text("---\nlicense: apache-2.0\n---\nHello\n")
    entry = PartEntry(kind="routing", name="c2r", config={"top_t": 3}, layers=[0, 1])
    record = RECORD.model_copy(update={"parent": str(parent), "parts": [entry]})
    save(build("qwen2_moe"), tmp_path / "model", record=record, extra_tensors={"constants.0.0.x": torch.zeros(8)})
    text = (tmp_path / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert "moekit" in front["tags"]
    for piece in ("moekit convert tiny", str(parent), "c2r", "moekit.load", "## Limits", "ratio", "8 routed experts"):
        assert piece in text
    save(build("qwen2_moe"), tmp_path / "other", record=RECORD)
    front = yaml.safe_load((tmp_path / "other" / "README.md").read_text().split("---")[1])
    assert front["base_model"] == "org/tiny"


def test_extra_tensors_come_back_and_stock_loaders_do_not_mistake_them(tmp_path):
    model, extra = build("olmoe"), {"constants.0.0.partners": torch.arange(64, dtype=torch.int16).view(8, 8)}
    save(model, tmp_path / "model", record=RECORD, extra_tensors=extra)
    assert torch.equal(
        read_extra_tensors(tmp_path / "model")["constants.0.0.partners"], extra["constants.0.0.partners"]
    )
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert "moekit.safetensors" not in index["weight_map"].values()
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=5e-6)
    assert set(Record.read(tmp_path / "model").expectations.extra) == set(extra)


def test_without_extra_tensors_there_is_no_extra_file(tmp_path):
    names = {path.name for path in saved(tmp_path / "model").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "moekit.json", "README.md"}


def test_an_existing_folder_is_replaced_only_if_told(tmp_path):
    saved(tmp_path / "model")
    with pytest.raises(BadConfig, match="exists"):
        saved(tmp_path / "model")
    before = Checkpoint.open(tmp_path / "model").fingerprint
    save(build("qwen2_moe", seed=1), tmp_path / "model", record=RECORD, overwrite=True)
    assert Checkpoint.open(tmp_path / "model").fingerprint != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    model = build("olmoe")
    model.config.num_experts = 7  # the config now contradicts the weights
    with pytest.raises(BadCheckpoint):
        save(model, tmp_path / "model", record=RECORD)
    assert list(tmp_path.iterdir()) == []


def test_tied_embeddings_stay_tied(tmp_path):
    model = build("granitemoe", tie_word_embeddings=True)
    save(model, tmp_path / "model", record=RECORD)
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "model").tensors
    loaded = load(tmp_path / "model", device="cpu")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=5e-6)


def test_half_precision_round_trip(tmp_path):
    model = build("deepseek_v3").to(torch.bfloat16)
    save(model, tmp_path / "model", record=RECORD)
    loaded = load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert loaded.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    assert load(tmp_path / "model", device="cpu", dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_load_refuses_what_does_not_verify(tmp_path):
    folder = plain(tmp_path / "model", "olmoe")
    edit_shard(folder / "model.safetensors", lambda t: t.pop("model.layers.0.mlp.experts.1.up_proj.weight"))
    with pytest.raises(BadCheckpoint, match="1 tensors missing"):
        load(folder)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_fingerprint_of_a_live_model_is_that_of_its_checkpoint(tmp_path, family, fused):
    folder = plain(tmp_path / "model", family, fused=fused)
    expected = Checkpoint.open(folder).fingerprint
    assert fingerprint_model(load(folder, device="cpu")) == expected
    assert fingerprint_model(AutoModelForCausalLM.from_pretrained(folder)) == expected
    if not fused:
        assert fingerprint_model(build(family)) == expected


def test_the_stamp_does_not_outlive_a_change_of_weights(tmp_path):
    folder = plain(tmp_path / "model")
    model = load(folder, device="cpu")
    stamped = fingerprint_model(model)
    model.model.layers[1].mlp.experts.down_proj.data[5] += 1
    changed = fingerprint_model(model)
    assert changed != stamped
    save(model, tmp_path / "changed", record=RECORD)
    assert Checkpoint.open(tmp_path / "changed").fingerprint == changed
    assert fingerprint_model(load(tmp_path / "changed", device="cpu")) == changed


def test_the_stamp_is_kept_in_another_precision(tmp_path):
    folder = plain(tmp_path / "model")
    model = load(folder, device="cpu", dtype=torch.bfloat16)
    assert fingerprint_model(model) == Checkpoint.open(folder).fingerprint


def test_the_tokenizer_is_saved_beside_the_model(tmp_path):
    save(build("mixtral"), tmp_path / "model", tokenizer=tokenizer_of(VOCAB), record=RECORD)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert len(again) == VOCAB


def test_load_says_what_is_wrong_with_a_record(tmp_path):
    folder = saved(tmp_path / "model")
    edit_json(folder / "moekit.json", lambda record: record.update(seed="three"))
    with pytest.raises(BadCheckpoint, match="seed"):
        load(folder)


def test_a_local_parent_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    parent = plain(tmp_path / "parent")
    monkeypatch.chdir(tmp_path)
    written = save(build("qwen2_moe"), "model", record=Record(command="x", parent="parent"))
    assert written.parent == str(parent)
    assert save(build("qwen2_moe"), "other", record=Record(command="x", parent="org/name")).parent == "org/name"


REMOTE_CODE = """
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM


class MadeUpConfig(Qwen2MoeConfig):
    model_type = "made_up_moe"


class MadeUpForCausalLM(Qwen2MoeForCausalLM):
    config_class = MadeUpConfig
"""


def test_local_remote_code_runs_with_the_flag_only(tmp_path):
    folder = plain(tmp_path / "made_up", fused=True)  # stock conversions do not apply to code that is not stock
    (folder / "modeling_made_up.py").write_text(REMOTE_CODE)
    names = {"AutoConfig": "MadeUpConfig", "AutoModelForCausalLM": "MadeUpForCausalLM"}
    auto_map = {key: f"modeling_made_up.{name}" for key, name in names.items()}
    edit_json(folder / "config.json", lambda c: c.update(model_type="made_up_moe", auto_map=auto_map))
    with pytest.raises(UnsupportedModel, match="made_up_moe"):
        load(folder)
    model = load(folder, device="cpu", allow_remote_code=True)
    assert type(model).__name__ == "MadeUpForCausalLM"
    torch.testing.assert_close(logits(model), logits(build("qwen2_moe")), rtol=0, atol=5e-6)


def test_device_maps_and_devices(tmp_path):
    folder = plain(tmp_path / "model")
    for keywords in ({"device": "cpu"}, {"device": torch.device("cpu")}, {"device_map": {"": "cpu"}}):
        model = load(folder, **keywords)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert not model.training
