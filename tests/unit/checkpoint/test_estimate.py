from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from moekit.checkpoint.estimate import estimate, measured_flops
from moekit.checkpoint.folder import Checkpoint
from moekit.errors import BadCheckpoint, BadConfig
from tests.checkpoints import plain, saved
from tests.families import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(tmp_path, family):
    model = build(family)
    guess = estimate(saved(tmp_path / "model", family, max_shard_bytes=60_000), flops=1e9)
    assert guess.parameters == model.num_parameters() + sum(
        b.numel() for n, b in model.named_buffers() if n in model.state_dict()
    )
    stacked = [p.numel() for n, p in model.named_parameters() if p.dim() == 3 or n.endswith("_proj_bias")]
    assert guess.expert_parameters == sum(stacked)
    assert guess.active_parameters == guess.parameters - sum(stacked) * 6 // 8
    assert guess.disk_bytes == guess.parameters * 4 == guess.load_bytes
    assert (guess.experts, guess.top_k, guess.download_bytes) == (8, 2, 0)
    assert guess.shards > 1
    assert guess.moe_layers == len([p for n, p in model.named_parameters() if n.endswith("experts.down_proj")])
    assert guess.peak_load_bytes > guess.load_bytes
    assert guess.seconds["forward_1k_tokens"] == pytest.approx(2 * guess.active_parameters * 1000 / 1e9)


def test_cache_bytes_are_those_of_a_real_cache(tmp_path):
    for family in ("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss"):
        model = build(family)
        guess = estimate(plain(tmp_path / family, family), flops=1e9)
        cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
        real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert guess.cache_bytes_per_token * 5 == real


def test_dtype_changes_memory_not_disk(tmp_path):
    folder = plain(tmp_path / "model")
    full, half = estimate(folder, flops=1.0), estimate(folder, dtype="bfloat16", flops=1.0)
    assert half.load_bytes * 2 == full.load_bytes
    assert half.disk_bytes == full.disk_bytes
    with pytest.raises(BadConfig, match="float13"):
        estimate(folder, dtype="float13")


def test_hub_models_are_estimated_from_headers(tmp_path, monkeypatch):
    folder = plain(tmp_path / "model", "olmoe")
    checkpoint = Checkpoint.open(folder)
    content = {
        name: SimpleNamespace(dtype=i.dtype, shape=list(i.shape), data_offsets=i.offsets)
        for name, i in checkpoint.tensors.items()
    }
    files = {"model.safetensors": SimpleNamespace(tensors=content)}
    asked = []

    def metadata(self, repo, *, revision=None):
        asked.append((repo, revision))
        return SimpleNamespace(files_metadata=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "config.json"))
    remote, local = estimate("org/olmoe", revision="v1", flops=1e9), estimate(folder, flops=1e9)
    assert asked == [("org/olmoe", "v1")]
    assert remote.download_bytes == local.disk_bytes == checkpoint.nbytes
    assert remote.seconds["download"] == pytest.approx(checkpoint.nbytes / 50e6)
    changed = {"model", "download_bytes", "seconds"}
    assert remote.model_dump(exclude=changed) == local.model_dump(exclude=changed)


def test_nothing_there():
    with pytest.raises(BadCheckpoint, match="no such folder"):
        estimate("./nothing/here")


def test_measured_flops_are_plausible():
    assert 1e8 < measured_flops(0.01) < 1e14
