"""Which class a folder is, and what is said where it is none that moekit can open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moekit
from moekit.checking import check
from moekit.checkpoint.architecture import architecture_of, class_name
from moekit.checkpoint.expected import verify
from moekit.checkpoint.experts import mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.meta import architecture
from moekit.checkpoint.names import text_config, text_path, where, with_text_config
from moekit.checkpoint.record import Record
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.mtp import longer_config, mtp_blocks
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadCheckpoint, UnsupportedModel
from moekit.streaming.loader import LayerLoader
from moekit.trace.streamed import Streamed
from moekit.training.freeze import train_only
from tests.checkpoints import edit_json, edit_shard, plain
from tests.families import EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, _common, build, randomize
from tests.odd_folders import tensors_of, with_mtp
from tests.wrappers import LAYERS, WRAPPERS, save_wrapper


def named(folder: Path, *names: str) -> Path:
    edit_json(folder / "config.json", lambda config: config.update(architectures=list(names)))
    return folder


def test_the_class_that_the_config_names_counts(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "model", "qwen3_5_moe")
    found = architecture(Checkpoint.open(folder))
    assert found.kind is transformers.Qwen3_5MoeForConditionalGeneration
    assert found.auto is None


@pytest.mark.parametrize("names", [(), ("Nothing",), ("Qwen3MoeForCausalLM",), ("Qwen3_5MoeModel",), ("os.system",)])
def test_else_the_language_model_of_the_config(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = named(save_wrapper(tmp_path / "model", "qwen3_5_moe"), *names)
    model = moekit.load(folder, device="cpu")
    assert type(model) is transformers.Qwen3_5MoeForCausalLM
    moekit.save(model, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_else_the_model_of_images_and_text(tmp_path: Path) -> None:
    folder = named(save_wrapper(tmp_path / "model", "qwen3_vl_moe"))
    assert type(moekit.load(folder, device="cpu")) is transformers.Qwen3VLMoeForConditionalGeneration


def test_an_encoder_and_a_decoder_with_configs_of_their_own_are_refused() -> None:
    config = transformers.T5GemmaConfig(architectures=["T5GemmaForConditionalGeneration"])
    with pytest.raises(UnsupportedModel, match=r"'t5gemma'|language model"):
        architecture_of(config)


def test_two_language_models_are_refused_by_name(tmp_path: Path) -> None:
    class Two(transformers.PreTrainedConfig):
        model_type = "two"

    config = Two()
    config.decoder, config.text_config = transformers.MixtralConfig(), transformers.MixtralConfig()
    with pytest.raises(UnsupportedModel, match=r"language model.*\['decoder', 'text_config'\]"):
        architecture_of(config)


def test_a_part_of_an_unknown_type(tmp_path: Path) -> None:
    folder = save_wrapper(tmp_path / "model", "mistral3")

    def change(config: dict[str, Any]) -> None:
        config["text_config"]["model_type"] = "mistral9"

    edit_json(folder / "config.json", change)
    with pytest.raises(UnsupportedModel, match="knows no model type 'mistral9', of which the text_config is"):
        verify(Checkpoint.open(folder))


@pytest.mark.parametrize("code", [None, {"AutoModelForCausalLM": "modeling_new.NewForCausalLM"}])
def test_a_config_of_a_newer_transformers(tmp_path: Path, code: Any) -> None:
    folder = plain(tmp_path / "model", "qwen2_moe")
    change = {"model_type": "brand_new", "transformers_version": "99.1.0"} | ({"auto_map": code} if code else {})
    edit_json(folder / "config.json", lambda config: config.update(change))
    with pytest.raises(UnsupportedModel, match="knows no model type 'brand_new'") as told:
        Checkpoint.open(folder)
    assert "transformers 99.1.0 wrote this config" in str(told.value)
    assert ("modeling_new.NewForCausalLM" in str(told.value)) is (code is not None)


def test_the_class_of_a_model_that_something_was_laid_over() -> None:
    model = build("mixtral")
    model.__class__ = type("FSDPMixtralForCausalLM", (type(model),), {})
    assert class_name(model) == "MixtralForCausalLM"


@pytest.mark.parametrize("family", sorted(WRAPPERS))
def test_the_language_part_of_a_config(family: str) -> None:
    config = WRAPPERS[family][1]()
    raw = json.loads(config.to_json_string(use_diff=False))
    assert text_config(raw)["num_hidden_layers"] == LAYERS
    changed = with_text_config(raw, {**text_config(raw), "num_hidden_layers": 7})
    assert text_config(changed)["num_hidden_layers"] == 7
    assert {key for key in raw if raw[key] != changed[key]} == set(text_path(raw)[:1] or ["num_hidden_layers"])


def test_language_parts_under_other_names() -> None:
    text = {"vocab_size": 8, "num_hidden_layers": 3}
    assert text_path({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": text}}) == (
        "thinker_config",
        "text_config",
    )
    assert text_path(
        {"model_type": "of_a_stranger", "llm_config": text, "vision_config": {"num_hidden_layers": 5}}
    ) == ("llm_config",)
    assert text_path({"model_type": "mixtral", "rope_parameters": {"rope_theta": 1}, **text}) == ()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.experts.5.up_proj.weight", 3),
        ("language_model.model.blocks.1.mlp.gate.weight", 1),
        ("model.vision_tower.encoder.layers.3.self_attn.q_proj.weight", None),
        ("vision_model.model.layers.0.mlp.fc1.weight", None),
        ("model.visual.blocks.4.attn.qkv.weight", None),
        ("model.audio_tower.layers.4.attn.weight", None),
        ("talker.model.layers.0.mlp.experts.0.up_proj.weight", None),
        ("mtp.layers.0.mlp.gate.weight", None),
    ],
)
def test_what_a_name_alone_says_of_layers(name: str, layer: int | None) -> None:
    assert where(name)[0] == layer


def beyond_the_last(folder: Path) -> tuple[Path, set[str]]:
    """A GLM-4.5V whose language model has a layer for multi-token prediction behind its last one."""
    save_wrapper(folder, "glm4v_moe")

    def more(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "language_model.layers.1." in name]:
            tensors[name.replace("layers.1.", f"layers.{LAYERS}.")] = tensors[name] * 1.5
        tensors[f"model.language_model.layers.{LAYERS}.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN)

    edit_shard(folder / "model.safetensors", more)
    edit_json(folder / "config.json", lambda config: config["text_config"].update(num_nextn_predict_layers=1))
    return folder, {name for name in tensors_of(folder) if f"language_model.layers.{LAYERS}." in name}


def beside_the_decoder(folder: Path) -> tuple[Path, set[str]]:
    """A Qwen3.5 whose layer for multi-token prediction stands in a stack of its own."""
    save_wrapper(folder, "qwen3_5_moe")

    def more(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "language_model.layers.1." in name]:
            tensors[name.replace("model.language_model.layers.1.", "mtp.layers.0.")] = tensors[name] * 1.5
        tensors["mtp.fc.weight"] = torch.randn(HIDDEN, 2 * HIDDEN)

    edit_shard(folder / "model.safetensors", more)
    return folder, {name for name in tensors_of(folder) if name.startswith("mtp.")}


@pytest.mark.parametrize("make", [beyond_the_last, beside_the_decoder])
def test_layers_for_multi_token_prediction_of_a_multimodal_model(tmp_path: Path, make: Any) -> None:
    source, names = make(tmp_path / "source")
    opened = Checkpoint.open(source)
    verify(opened)
    assert mtp_tensors(opened) == names
    model = moekit.load(source, device="cpu")
    moekit.save(model, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert check(tmp_path / "out", parent=source).ok
    keep = dict.fromkeys(range(LAYERS), LayerOutcome(keep=(0, 2, 3, 5)))
    apply(opened, keep, tmp_path / "small", record=Record(command="a test"))
    assert not names & set(tensors_of(tmp_path / "small"))
    assert {block.layer for block in mtp_blocks(opened)} == {LAYERS}


def deepseek_v4(folder: Path) -> Path:
    """A DeepSeek-V4 whose first layer finds a token's experts in a table."""
    config = transformers.DeepseekV4Config(
        **_common(), head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=2, moe_intermediate_size=WIDTH,
        n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, num_hash_layers=1, qk_rope_head_dim=4, index_head_dim=8,
        index_n_heads=2, index_topk=8, sliding_window=16,
    )  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(config).float()
    randomize(model, 0)
    for tensor in model.state_dict().values():
        if not tensor.is_floating_point():
            tensor.copy_(torch.randint(0, EXPERTS, tensor.shape))
    model.save_pretrained(folder)
    return folder


def test_whole_numbers_that_the_class_declares_are_legal(tmp_path: Path) -> None:
    source = deepseek_v4(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    stock = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=0)
    moekit.save(model, tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    table = next(name for name in before if name.endswith("tid2eid"))
    assert after[table].dtype == torch.int64
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert check(tmp_path / "out", parent=source).ok
    loader = LayerLoader(Checkpoint.open(source), device="cpu")
    with loader.loaded(0) as layer:
        assert torch.equal(layer.state_dict()["mlp.gate.tid2eid"], before[table])


def test_whole_numbers_that_the_class_does_not_declare_are_not(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    edit_shard(
        source / "model.safetensors",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].long()}),
    )
    with pytest.raises(BadCheckpoint, match="I64 is no float"):
        verify(Checkpoint.open(source))


def test_another_config_is_of_the_checkpoints_class_and_counts(tmp_path: Path) -> None:
    model = build("mixtral")
    change_model(model, {0: LayerOutcome(keep=tuple(range(EXPERTS))), 1: LayerOutcome(keep=(0, 2, 3))})
    moekit.save(model, tmp_path / "uneven")
    checkpoint = Checkpoint.open(tmp_path / "uneven")
    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    config.num_hidden_layers = 3
    made = empty_model(checkpoint, config=config)
    assert [layer.mlp.experts.down_proj.shape[0] for layer in made.model.layers] == [EXPERTS, 3, EXPERTS]


def test_a_walk_under_another_config_does_not_go_on_where_this_one_stopped(tmp_path: Path) -> None:
    source, _ = with_mtp(tmp_path / "source")
    checkpoint = Checkpoint.open(source)
    rows = [torch.randint(3, VOCAB, (1, 8))]
    config = longer_config(architecture_config(checkpoint), mtp_blocks(checkpoint))
    with Streamed(checkpoint, rows) as plain_walk, Streamed(checkpoint, rows, config=config) as longer:
        assert plain_walk._key() != longer._key()


def architecture_config(checkpoint: Checkpoint) -> Any:
    return transformers.AutoConfig.from_pretrained(checkpoint.path)


def test_a_tower_is_not_trained_on_text(tmp_path: Path) -> None:
    model = moekit.load(save_wrapper(tmp_path / "model", "gemma4"), device="cpu")
    counted = train_only(model, ["all"])
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[1] for name in still} == {"vision_tower", "embed_vision"}
    assert sum(counted.frozen.values()) == sum(p.numel() for p in model.parameters() if not p.requires_grad)
