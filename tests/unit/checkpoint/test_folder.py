import hashlib
import re

import pytest
import torch
from safetensors.torch import load_file

from moekit.checkpoint.digest import config_digest, file_digest, tensor_digests
from moekit.checkpoint.expected import verify
from moekit.checkpoint.experts import expert_counts
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import where
from moekit.errors import BadCheckpoint, UnsupportedModel
from tests.checkpoints import edit_json, edit_shard, plain, saved
from tests.families import EXPERTS, FAMILIES, build


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_of_every_family_verify_and_read(tmp_path, family, fused):
    folder = plain(tmp_path / "model", family, fused=fused)
    checkpoint = Checkpoint.open(folder)
    verify(checkpoint)
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in checkpoint.stream():
        assert torch.equal(tensor, expected[name])
    name = next(iter(expected))
    assert torch.equal(checkpoint.read(name), expected[name])
    assert checkpoint.nbytes == sum(t.numel() * 4 for t in expected.values())
    assert set(expert_counts(checkpoint.tensors).values()) == {EXPERTS}


def test_stream_goes_shard_by_shard_in_file_order(tmp_path):
    checkpoint = Checkpoint.open(saved(tmp_path / "model", max_shard_bytes=60_000))
    assert len(checkpoint.shards) > 2
    seen = [(checkpoint.tensors[name].shard, checkpoint.tensors[name].offsets) for name, _ in checkpoint.stream()]
    assert seen == sorted(seen)
    assert len(seen) == len(checkpoint.tensors)


def test_reading_what_is_not_there_names_layer_and_expert(tmp_path):
    checkpoint = Checkpoint.open(plain(tmp_path / "model", "olmoe"))
    with pytest.raises(BadCheckpoint) as caught:
        checkpoint.read("model.layers.1.mlp.experts.11.up_proj.weight")
    assert (caught.value.layer, caught.value.expert) == (1, 11)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", (12, 3)),
        ("layers.0.mlp.gate.weight", (0, None)),
        ("model.embed_tokens.weight", (None, None)),
        ("model.language_model.layers.7.block_sparse_moe.experts.31.w1.weight", (7, 31)),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", (2, None)),
    ],
)
def test_where(name, expected):
    assert where(name) == expected


def test_missing_tensors_are_listed_in_full(tmp_path):
    folder = plain(tmp_path / "model", "qwen3_moe")
    gone = [f"model.layers.1.mlp.experts.5.{part}_proj.weight" for part in ("gate", "up", "down")]
    gone.append("model.layers.0.mlp.gate.weight")
    edit_shard(folder / "model.safetensors", lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(BadCheckpoint) as caught:
        verify(Checkpoint.open(folder))
    assert "4 tensors missing" in str(caught.value)
    assert all(name in str(caught.value) for name in gone)
    assert caught.value.layer == 0
    assert caught.value.hint


def test_a_missing_expert_is_named(tmp_path):
    folder = plain(tmp_path / "model", "mixtral")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    edit_shard(folder / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(BadCheckpoint) as caught:
        verify(Checkpoint.open(folder))
    assert (caught.value.layer, caught.value.expert) == (1, 5)


def test_one_expert_too_many(tmp_path):
    folder = plain(tmp_path / "model", "olmoe")

    def add(tensors):
        for part in ("gate", "up", "down"):
            stem = "model.layers.0.mlp.experts"
            tensors[f"{stem}.8.{part}_proj.weight"] = tensors[f"{stem}.0.{part}_proj.weight"].clone()

    edit_shard(folder / "model.safetensors", add)
    with pytest.raises(BadCheckpoint, match="3 tensors that the config does not know") as caught:
        verify(Checkpoint.open(folder))
    assert (caught.value.layer, caught.value.expert) == (0, 8)


COUNT_KEYS = {"mixtral": "num_local_experts", "deepseek_v3": "n_routed_experts", "ernie4_5_moe": "moe_num_experts"}


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_expert_count_off_by_one(tmp_path, family, by, fused):
    folder = plain(tmp_path / "model", family, fused=fused)

    def change(config):
        keys = [key for key in config if re.fullmatch(r"(moe_)?n(um)?_(local_|routed_)?experts", key)]
        assert keys
        config.update({key: EXPERTS + by for key in keys}, n_group=1, topk_group=1)

    edit_json(folder / "config.json", change)
    with pytest.raises(BadCheckpoint) as caught:
        verify(Checkpoint.open(folder))
    assert f"the tensors hold {EXPERTS} experts a layer" in caught.value.hint


def test_wrong_shapes_name_both(tmp_path):
    folder = plain(tmp_path / "model", "qwen2_moe")
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    edit_shard(folder / "model.safetensors", lambda t: t.update({name: t[name].T.contiguous()}))
    with pytest.raises(BadCheckpoint, match=re.escape(f"{name} [24, 32] instead of [32, 24]")) as caught:
        verify(Checkpoint.open(folder))
    assert (caught.value.layer, caught.value.expert) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats(tmp_path, dtype):
    folder = plain(tmp_path / "model", "qwen2_moe")
    name = "model.layers.0.mlp.gate.weight"
    edit_shard(folder / "model.safetensors", lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(BadCheckpoint, match="of a wrong dtype") as caught:
        verify(Checkpoint.open(folder))
    assert caught.value.layer == 0


def test_one_expert_of_another_dtype_would_be_cast_in_silence(tmp_path):
    folder = plain(tmp_path / "model", "qwen2_moe")
    name = "model.layers.0.mlp.experts.6.up_proj.weight"
    edit_shard(folder / "model.safetensors", lambda t: t.update({name: t[name].half()}))
    with pytest.raises(BadCheckpoint, match="F16 among F32") as caught:
        verify(Checkpoint.open(folder))
    assert (caught.value.layer, caught.value.expert) == (0, 6)


def test_surplus_tensors(tmp_path):
    folder = plain(tmp_path / "model", "qwen2_moe")
    edit_shard(folder / "model.safetensors", lambda t: t.update({"model.surprise": torch.zeros(2)}))
    with pytest.raises(BadCheckpoint, match=r"model\.surprise"):
        verify(Checkpoint.open(folder))


def test_known_leftovers_and_prediction_layers_are_no_surplus(tmp_path):
    folder = plain(tmp_path / "model", "glm4_moe", num_nextn_predict_layers=1)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.layers.3.enorm.weight"] = torch.zeros(32)

    edit_shard(folder / "model.safetensors", add)
    verify(Checkpoint.open(folder))


def test_tied_and_untied_heads(tmp_path):
    tied = plain(tmp_path / "tied", "qwen2_moe", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(tied).tensors
    verify(Checkpoint.open(tied))
    edit_json(tied / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(BadCheckpoint, match="1 tensors missing: lm_head"):
        verify(Checkpoint.open(tied))


def test_a_config_that_contradicts_itself(tmp_path):
    folder = plain(tmp_path / "model", "qwen2_moe")
    edit_json(folder / "config.json", lambda config: config.update(hidden_size="wide"))
    with pytest.raises(BadCheckpoint, match="no model can be built"):
        verify(Checkpoint.open(folder))


def test_a_config_of_no_language_model(tmp_path):
    folder = plain(tmp_path / "model", "qwen2_moe")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedModel, match="no model of type 'vit' that writes text"):
        verify(Checkpoint.open(folder))


def test_quantized_checkpoints_are_checked_for_presence(tmp_path):
    folder = plain(tmp_path / "model", "qwen3_moe")
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))

    def quantize(tensors):
        for name in [n for n in tensors if "experts" in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    edit_shard(folder / "model.safetensors", quantize)
    verify(Checkpoint.open(folder))
    gone = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit_shard(folder / "model.safetensors", lambda t: (t.pop(gone), t.pop(f"{gone}_scale_inv")))
    with pytest.raises(BadCheckpoint, match=re.escape(gone)):
        verify(Checkpoint.open(folder))


def test_not_a_folder(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such folder"):
        Checkpoint.open(tmp_path / "nothing")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(BadCheckpoint, match="a file, not a model folder"):
        Checkpoint.open(file)
    with pytest.raises(BadCheckpoint, match="no such folder"):
        Checkpoint.open("../not/a/hub/id")


def test_fingerprint_sees_weights_and_config_but_not_sharding(tmp_path):
    one = Checkpoint.open(saved(tmp_path / "one")).fingerprint
    assert Checkpoint.open(saved(tmp_path / "sharded", max_shard_bytes=60_000)).fingerprint == one
    assert Checkpoint.open(saved(tmp_path / "seed", seed=1)).fingerprint != one
    assert Checkpoint.open(saved(tmp_path / "k", num_experts_per_tok=3)).fingerprint != one
    swapped = plain(tmp_path / "swapped")
    assert Checkpoint.open(swapped).fingerprint == one

    def swap(tensors):
        a, b = (f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in (2, 3))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    edit_shard(swapped / "model.safetensors", swap)
    assert Checkpoint.open(swapped).fingerprint != one


def test_digests_are_sha256_of_the_bytes(tmp_path):
    checkpoint = Checkpoint.open(saved(tmp_path / "model"))
    digests = tensor_digests(checkpoint.path, checkpoint.tensors.values())
    for name, tensor in checkpoint.stream():
        assert digests[name].sha256 == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert digests[name].shape == list(tensor.shape)
    assert digests == checkpoint.record.expectations.tensors


def test_digest_of_a_file_that_shrank(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(10))
    with pytest.raises(BadCheckpoint, match="shorter"):
        file_digest(path, (0, 11))


def test_config_digest_ignores_what_transformers_rewrites():
    config = build("mixtral").config.to_dict()
    assert config_digest(config) == config_digest({**config, "transformers_version": "9"})
    assert config_digest(config) != config_digest({**config, "num_experts_per_tok": 3})
