import json

import pytest
import torch
from safetensors.torch import load_file

from moekit.checkpoint import shards
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.header import read_header
from moekit.checkpoint.shards import ShardWriter
from moekit.errors import BadConfig
from tests.checkpoints import plain
from tests.families import logits


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(5, 7, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "c": torch.randn(2, 2, generator=generator).double(),
        "d": torch.tensor(True),
        "e": torch.zeros(0, 4),
        "f": torch.randn(4, 6, generator=generator).T,
        "g": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "h": torch.arange(3, dtype=torch.int16),
    }


def read_all(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        read_header(path)
        found.update(load_file(path))
    return found


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left.float(), right.float())


@pytest.mark.parametrize("max_bytes", [1, 40, 100, 10**9])
@pytest.mark.parametrize("buffer", [0, 64 << 20], ids=["streamed", "buffered"])
def test_what_is_written_is_read_back(tmp_path, monkeypatch, max_bytes, buffer):
    monkeypatch.setattr(shards, "_BUFFER_BYTES", buffer)
    with ShardWriter(tmp_path, max_bytes) as writer:
        for name, tensor in tensors().items():
            writer.add(name, tensor)
    found = read_all(tmp_path)
    assert set(found) == set(tensors())
    assert all(same(found[name], tensor) for name, tensor in tensors().items())
    assert not list(tmp_path.glob("*.partial"))


def test_one_shard_needs_no_index_many_do(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    for folder, limit in ((one, 10**9), (many, 100)):
        with ShardWriter(folder, limit) as writer:
            for name in "xyz":
                writer.add(name, torch.ones(20))
    assert [path.name for path in one.iterdir()] == ["model.safetensors"]
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("xyz", 1)}
    assert index["metadata"]["total_size"] == 240


def test_a_full_header_starts_a_new_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_RESERVED_HEADER", 1000)
    with ShardWriter(tmp_path) as writer:
        for number in range(50):
            writer.add(f"model.layers.{number}.weight", torch.full((2,), float(number)))
    found = read_all(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert all(found[f"model.layers.{n}.weight"][0] == n for n in range(50))


def test_a_copied_model_is_the_same_model(tmp_path):
    from transformers import AutoModelForCausalLM

    source = Checkpoint.open(plain(tmp_path / "model", "deepseek_v2"))
    copy = tmp_path / "copy"
    copy.mkdir()
    with ShardWriter(copy, 50_000) as writer:
        for name, tensor in source.stream():
            writer.add(name, tensor)
    (copy / "config.json").write_bytes((source.path / "config.json").read_bytes())
    twin = Checkpoint.open(copy)
    verify(twin)
    assert twin.fingerprint == source.fingerprint
    left, right = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source.path, copy))
    torch.testing.assert_close(logits(left), logits(right), rtol=0, atol=5e-6)


def write_all(folder, *named):
    with ShardWriter(folder) as writer:
        for name, tensor in named:
            writer.add(name, tensor)


def test_refusals(tmp_path):
    with pytest.raises(BadConfig, match="twice"):
        write_all(tmp_path, ("a", torch.ones(1)), ("a", torch.ones(1)))
    with pytest.raises(BadConfig, match="complex128"):
        write_all(tmp_path, ("a", torch.ones(1, dtype=torch.complex128)))
    assert not list(tmp_path.glob("*.safetensors"))
