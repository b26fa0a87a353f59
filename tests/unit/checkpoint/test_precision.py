"""Checkpoints in half precision on a CPU that would emulate it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import moekit
from moekit import _device
from moekit.checking import check
from moekit.checkpoint.fingerprint import fingerprint_model
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import load, save
from moekit.checkpoint.precision import stored_dtype
from moekit.checkpoint.record import Record
from moekit.checkpoint.stored import saved_bytes
from moekit.errors import BadConfig
from moekit.streaming import LayerLoader
from tests.checkpoints import edit_json, edit_shard
from tests.families import build, logits
from tests.odd_folders import with_mtp

RECORD = Record(command="a test")


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_device, "cpu_features", lambda: frozenset({"avx2"}))


def half(folder: Path, family: str = "qwen2_moe", dtype: torch.dtype = torch.bfloat16) -> Path:
    build(family).to(dtype).save_pretrained(folder)
    return folder


def bits(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                found[name] = (str(tensor.dtype), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoe"])
def test_it_is_computed_in_float32_and_written_as_it_was_stored(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder = half(tmp_path / "model", family, dtype)
    model = load(folder, device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(model), logits(stock), rtol=0, atol=1e-6)

    save(model, tmp_path / "again", record=RECORD)
    assert bits(tmp_path / "again") == bits(folder)
    told = json.loads((tmp_path / "again" / "config.json").read_text())
    assert told["dtype"] == str(dtype).removeprefix("torch.")
    assert Checkpoint.open(tmp_path / "again").fingerprint == Checkpoint.open(folder).fingerprint
    assert not check(tmp_path / "again", parent=folder).findings
    # Nothing of it shows on the model.
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dtype == model.dtype == torch.float32
    assert torch.equal(logits(model), logits(load(folder, device="cpu")))


def test_what_goes_beyond_the_model_is_carried_along(tmp_path: Path) -> None:
    source, names = with_mtp(tmp_path / "source")

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    for shard in source.glob("model*.safetensors"):
        edit_shard(shard, narrow)
    edit_json(source / "config.json", lambda config: config.update(dtype="bfloat16"))
    moekit.save(moekit.load(source, device="cpu"), tmp_path / "again")
    assert names
    assert bits(tmp_path / "again") == bits(source)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_where_the_device_multiplies_it_nothing_is_widened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_device, "cpu_features", lambda: frozenset({"amx_bf16"}))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    folder = half(tmp_path / "model")
    assert load(folder, device="cpu").dtype == torch.bfloat16
    assert LayerLoader(Checkpoint.open(folder), device="cpu").dtype == torch.bfloat16


def test_layers_read_one_at_a_time_are_computed_in_float32(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(half(tmp_path / "model"))
    loader = LayerLoader(checkpoint, device="cpu")
    assert (loader.dtype, loader.stored) == (torch.float32, torch.bfloat16)
    with loader.loaded(1) as layer:
        assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert LayerLoader(checkpoint, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_a_tensor_that_is_stored_wider_stays_so(tmp_path: Path) -> None:
    folder = half(tmp_path / "model")
    name, exact = "model.layers.0.mlp.gate.weight", torch.pi * torch.ones(8, 16)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = exact.clone().resize_(tensors[name].shape)

    edit_shard(folder / "model.safetensors", widen)
    before = bits(folder)
    assert before[name][0] == "torch.float32"
    save(load(folder, device="cpu"), tmp_path / "again", record=RECORD)
    assert bits(tmp_path / "again") == before


def test_a_changed_model_is_named_as_it_will_be_written(tmp_path: Path) -> None:
    model = load(half(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        model.lm_head.weight.add_(torch.pi / 100)
    told, size = fingerprint_model(model), saved_bytes(model)
    save(model, tmp_path / "changed", record=RECORD)
    written = Checkpoint.open(tmp_path / "changed")
    assert told == written.fingerprint != Checkpoint.open(tmp_path / "model").fingerprint
    assert written.nbytes <= size < 1.01 * written.nbytes  # rotary frequencies are counted, not written
    assert {info.dtype for info in written.tensors.values()} == {"BF16"}


def test_a_type_that_is_asked_for_is_kept(tmp_path: Path) -> None:
    folder = half(tmp_path / "model")
    save(load(folder, device="cpu", dtype="float32"), tmp_path / "wide", record=RECORD)
    assert {info.dtype for info in Checkpoint.open(tmp_path / "wide").tensors.values()} == {"F32"}
    assert load(folder, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(BadConfig, match="int4"):
        load(folder, dtype="int4")
    with pytest.raises(BadConfig, match="'gpu' cannot be used"):
        load(folder, device="gpu")


def test_what_was_trained_keeps_its_small_steps(tmp_path: Path) -> None:
    from moekit.data import Document
    from moekit.training import TrainConfig, train
    from tests.unit.training.helpers import word_tokenizer

    model = load(half(tmp_path / "model"), device="cpu")
    text = [Document("w3 w4 w5 w6 w7 w8 w9 w10 " * 8, "a", "a")]
    train(model, word_tokenizer(), text, TrainConfig(steps=1, seq_len=16, batch=2, save_every=None))
    save(model, tmp_path / "trained", record=RECORD)
    assert {info.dtype for info in Checkpoint.open(tmp_path / "trained").tensors.values()} == {"F32"}


@pytest.mark.parametrize(
    ("config", "dtypes", "stored"),
    [
        ({"dtype": "bfloat16"}, ["F32", "BF16"], torch.bfloat16),
        ({"torch_dtype": "float16"}, ["F16"], torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, ["BF16"], torch.bfloat16),
        ({}, ["I64", "BF16"], torch.bfloat16),
        ({"dtype": None}, ["F32"], torch.float32),
        ({}, [], None),
        ({"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, ["F8_E4M3"], None),
    ],
)
def test_how_a_checkpoint_is_stored(config: dict[str, object], dtypes: list[str], stored: torch.dtype | None) -> None:
    from moekit.checkpoint import TensorInfo

    tensors = {str(i): TensorInfo(str(i), "model.safetensors", d, (1,), (0, 8)) for i, d in enumerate(dtypes)}
    assert stored_dtype(config, tensors) == stored
