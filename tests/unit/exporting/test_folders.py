"""Packed folders: bit for bit what was rounded, by moekit's own reader, by word arithmetic, and by the libraries."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moekit
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.experts.methods.factored import Factored
from moekit.routing.methods.naee_skip import NAEESkip
from moekit.runtime import attach
from tests.checkpoints import edit_json, edit_shard, plain
from tests.exporting import rounded
from tests.families import logits
from tests.quantizing import from_words


def by_expert(layer: int, part: str, expert: int) -> int:
    """Widths that differ in a layer."""
    return 2 + (expert + layer + len(part)) % 3


def export(source: Path, to: str, out: Path, **how: Any) -> Any:
    return moekit.export(source, to=to, out=out, **how)  # type: ignore[arg-type]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "bits", "dtype", "fused"),
    [
        ("qwen3_moe", 4, torch.bfloat16, False),
        ("mixtral", 8, torch.float32, True),
        pytest.param("deepseek_v3", 1, torch.float16, False, marks=[pytest.mark.full, pytest.mark.slow]),
    ],
)
def test_compressed_tensors_are_read_back_bit_for_bit(
    family: str, bits: int, dtype: torch.dtype, fused: bool, tmp_path: Path
) -> None:
    source = rounded(tmp_path / "rounded", family, bits, dtype=dtype, fused=fused)
    made = export(source, "compressed-tensors", tmp_path / "out")
    before = tensors_of(rounded(tmp_path / "split", family, bits, dtype=dtype)) if fused else tensors_of(source)
    after = tensors_of(tmp_path / "out")
    experts = {name for name in before if ".experts." in name and "shared" not in name}
    packed = Checkpoint.open(tmp_path / "out")
    with WeightReader(packed, dtype) as reader:
        for name, value in before.items():
            if name in experts:
                assert name not in after
                assert torch.equal(reader.weight(name), value), name
            else:
                assert torch.equal(after[name], value), name
    # By hand, one matrix: words apart as Python integers, less the middle, times the scale of the group.
    name = next(iter(sorted(experts)))
    stem, width = name.removesuffix(".weight"), max(bits, 2)
    numbers = from_words(after[f"{stem}.weight_packed"], width, 1) - (1 << (width - 1))
    scales = after[f"{stem}.weight_scale"].float().repeat_interleave(32, 1)
    assert torch.equal((numbers * scales).to(dtype), before[name])
    assert after[f"{stem}.weight_shape"].tolist() == list(before[name].shape)
    assert made.check is not None
    assert made.check["ok"]
    assert made.matrices == {f"{bits} bits": len(experts)}
    assert made.bytes["after"] == sum(t.numel() * t.element_size() for t in after.values())
    assert moekit.check(tmp_path / "out").ok
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert record["parent"] == str(source)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "The package `compressed-tensors` must be installed" in (tmp_path / "out" / "README.md").read_text()


def test_compressed_tensors_in_stock_transformers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for family, bits, dtype in (("qwen3_moe", 4, torch.bfloat16), ("mixtral", 2, torch.float32)):
        source = rounded(tmp_path / family, family, bits, dtype=dtype)
        export(source, "compressed-tensors", tmp_path / f"{family}-out")
        wanted, made = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for folder in (source, tmp_path / f"{family}-out")
        )
        for name, value in wanted.state_dict().items():
            assert torch.equal(made.state_dict()[name], value), name
        assert float((logits(made) - logits(wanted)).norm()) <= 1e-3 * float(logits(wanted).norm())


@pytest.mark.parametrize(("family", "fused"), [("qwen3_moe", False), ("qwen3_moe", True), ("mixtral", False)])
def test_layers_that_were_not_rounded_stay_as_they_are(family: str, fused: bool, tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", family, lambda layer, part, expert: 4 if layer else None, fused=fused)
    with pytest.raises(BadConfig, match="layer 0: this layer was not rounded, and transformers reads no experts in"):
        export(source, "compressed-tensors", tmp_path / "out")
    made = export(source, "compressed-tensors", tmp_path / "out", layers_may_differ=True)
    before = tensors_of(rounded(tmp_path / "split", family, lambda layer, part, expert: 4 if layer else None))
    after = tensors_of(tmp_path / "out")
    experts = {name for name in before if ".experts." in name}
    whole = {name for name in experts if ".layers.0." in name}
    assert made.matrices == {"4 bits": len(experts) // 2}
    assert all(torch.equal(after[name], before[name]) for name in whole), "split as on the hub, to the bit"
    assert not (experts - whole) & set(after)
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    ignored, target = told["ignore"], told["config_groups"]["group_0"]["targets"]
    assert len(ignored) == len(target) == 1
    for name in experts:
        stem = name.removesuffix(".weight")
        assert bool(re.fullmatch(ignored[0].removeprefix("re:"), stem)) == (name in whole)
        assert bool(re.fullmatch(target[0].removeprefix("re:"), stem)) != (name in whole)
    assert made.check is not None
    assert made.check["ok"]
    with WeightReader(Checkpoint.open(tmp_path / "out"), torch.float32) as reader:
        assert all(torch.equal(reader.weight(name), before[name]) for name in experts)
    with pytest.raises(BadConfig, match=r"layer 0, expert 0: the .* projection was not rounded, and auto-round packs"):
        export(source, "auto-round", tmp_path / "no")


def test_auto_round_holds_a_width_for_each_expert(tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", by_expert, dtype=torch.float16)
    made = export(source, "auto-round", tmp_path / "out")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name for name in after if ".experts." not in name} == {name for name in before if ".experts." not in name}
    names = [name.removesuffix(".weight") for name in before if ".experts." in name]
    for stem in names:
        layer, expert = int(stem.split(".")[2]), int(stem.split(".")[5])
        bits = by_expert(layer, stem.rpartition(".")[2].removesuffix("_proj"), expert)
        assert told["extra_config"].get(stem, told)["bits"] == bits
        rows, columns = before[f"{stem}.weight"].shape
        # Words without gaps: a column of the file is one whole number, inputs from its lowest bits up.
        words = (after[f"{stem}.qweight"].long() & 0xFFFFFFFF).T.tolist()
        whole = [sum(word << (32 * place) for place, word in enumerate(row)) for row in words]
        numbers = torch.tensor([[number >> (bits * c) & ((1 << bits) - 1) for c in range(columns)] for number in whole])
        scales = after[f"{stem}.scales"].T.float().repeat_interleave(32, 1)
        assert torch.equal(((numbers - (1 << (bits - 1))) * scales).half(), before[f"{stem}.weight"])
        zeros = (after[f"{stem}.qzeros"].long() & 0xFFFFFFFF).tolist()
        for row in zeros:
            number = sum(word << (32 * place) for place, word in enumerate(row))
            assert {number >> (bits * r) & ((1 << bits) - 1) for r in range(rows)} == {(1 << (bits - 1)) - 1}
    assert told["block_name_to_quantize"] == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert sum(made.matrices.values()) == len(names)
    assert set(made.matrices) == {"2 bits", "3 bits", "4 bits"}


# auto-round changes transformers for its whole process: what it reads is told from another one.
AUTO_ROUND = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, file, *names = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
torch.nn.Module.float(model)  # it loads as float16, which holds all of the weights
with torch.no_grad():
    # What a linear map does to each unit vector is a column of its matrix.
    made = {name: model.get_submodule(name)(torch.eye(64)).T.contiguous() for name in names}
    made["logits"] = model(torch.arange(5, 17)[None]).logits
save_file(made, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_auto_round_in_stock_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    source = rounded(tmp_path / "rounded", family, by_expert, dtype=torch.float16)
    export(source, "auto-round", tmp_path / "out")
    names = [name.removesuffix(".qweight") for name in tensors_of(tmp_path / "out") if name.endswith(".qweight")]
    command = [sys.executable, "-c", AUTO_ROUND, str(tmp_path / "out"), str(tmp_path / "made"), *names]
    subprocess.run(command, check=True, capture_output=True)
    made, stored = load_file(tmp_path / "made"), tensors_of(source)
    for name in names:
        disk = name if family == "qwen3_moe" else name.replace(".mlp.", ".block_sparse_moe.")
        short = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        disk = disk if family == "qwen3_moe" else f"{disk.rpartition('.')[0]}.{short[disk.rpartition('.')[2]]}"
        assert torch.equal(made[name].half(), stored[f"{disk}.weight"]), name
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), torch.arange(5, 17)[None])
    # Rotary frequencies were float16, too.
    assert float((made["logits"] - wanted).norm()) <= 1e-3 * float(wanted.norm())


def test_layers_of_different_widths_are_written_for_vllm_alone(tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "mixtral", lambda layer, part, expert: (4, 8)[layer])
    with pytest.raises(BadConfig, match=r"layers of 4, 8 bits: transformers would read") as refused:
        export(source, "compressed-tensors", tmp_path / "out")
    assert "--layers-may-differ" in str(refused.value)
    export(source, "compressed-tensors", tmp_path / "out", layers_may_differ=True)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]
    before, packed = tensors_of(source), Checkpoint.open(tmp_path / "out")
    with WeightReader(packed, torch.float32) as reader:
        assert all(torch.equal(reader.weight(name), before[name]) for name in before if ".experts." in name)
    with pytest.raises(BadConfig, match="changes nothing for auto-round"):
        export(source, "auto-round", tmp_path / "out", layers_may_differ=True)


def test_what_a_form_does_not_hold_is_refused_and_the_form_named_that_does(tmp_path: Path) -> None:
    source = rounded(tmp_path / "mixed", "qwen3_moe", by_expert)
    with pytest.raises(BadConfig, match=r"layer 0: matrices of 2, 3, 4 bits lie in one layer") as refused:
        export(source, "compressed-tensors", tmp_path / "out")
    assert "--to auto-round holds a width for each matrix" in str(refused.value)
    source = rounded(tmp_path / "three", "qwen3_moe", 3)
    with pytest.raises(BadConfig, match="3 bits: readers of compressed-tensors disagree"):
        export(source, "compressed-tensors", tmp_path / "out")
    source = rounded(tmp_path / "narrow", "qwen3_moe", 4, group=8, moe_intermediate_size=24)
    with pytest.raises(BadConfig, match=r"64 x 24 is no multiple of 32"):
        export(source, "auto-round", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_rounded_or_not_any_more_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="says of no grids") as refused:
        export(plain(tmp_path / "plain", "qwen3_moe"), "compressed-tensors", tmp_path / "out")
    assert "--set symmetric=true" in str(refused.value)
    source = rounded(tmp_path / "rounded", "qwen3_moe", 4)
    (shard,) = source.glob("model*.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    edit_shard(shard, lambda tensors: tensors[name][3, 3].add_(1e-3))
    for to in ("compressed-tensors", "auto-round"):
        with pytest.raises(NumericFault, match="layer 1, expert 5: the up projection does not lie on the grid of 4"):
            export(source, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edit_json(source / "moekit.json", lambda record: record["scores"]["grids"].update(symmetric=False))
    with pytest.raises(BadConfig, match="with zero points"):
        export(source, "compressed-tensors", tmp_path / "out")
    edit_json(source / "moekit.json", lambda record: record["scores"]["grids"]["bits"]["1"].pop("up"))
    edit_json(source / "moekit.json", lambda record: record["scores"]["grids"].update(symmetric=True))
    with pytest.raises(BadConfig, match="layer 1, expert 0: the up projection was not rounded"):
        export(source, "compressed-tensors", tmp_path / "out")


def test_experts_without_names_of_their_own_and_packed_folders_are_refused(tmp_path: Path) -> None:
    source = plain(tmp_path / "stacked", "gpt_oss")
    Record(command="a test", scores={"grids": {"group": 8, "symmetric": True, "bits": {}}}).write(source)
    with pytest.raises(UnsupportedModel, match=r"layer 0: .*no gate, up or down matrix of a single expert"):
        export(source, "compressed-tensors", tmp_path / "out")
    source = rounded(tmp_path / "four", "mixtral", 4)
    export(source, "compressed-tensors", tmp_path / "packed")
    with pytest.raises(UnsupportedModel, match=r"packed already \(compressed-tensors, pack-quantized\)"):
        export(tmp_path / "packed", "auto-round", tmp_path / "out")


@pytest.mark.parametrize("to", ["compressed-tensors", "auto-round", "gguf"])
def test_no_policy_that_belongs_to_the_model_is_lost(to: str, tmp_path: Path) -> None:
    source = rounded(tmp_path / "rounded", "qwen3_moe", 4)
    model = moekit.load(source)
    attach(model, NAEESkip(beta=0.5))
    moekit.save(model, tmp_path / "skips")
    record = Record.read(source)
    edit_json(tmp_path / "skips" / "moekit.json", lambda told: told["scores"].update(grids=record.scores["grids"]))
    with pytest.raises(UnsupportedModel, match="computes with routing 'naee-skip', which engines do not know"):
        export(tmp_path / "skips", to, tmp_path / "out")


def test_factored_experts_are_refused_with_the_way_to_whole_ones(tmp_path: Path) -> None:
    model = moekit.load(plain(tmp_path / "plain", "qwen3_moe"))
    attach(model, Factored(rank=2))
    moekit.save(model, tmp_path / "factored")
    with pytest.raises(UnsupportedModel, match="computes with experts 'factored'") as caught:
        export(tmp_path / "factored", "packed", tmp_path / "out")
    assert "parts=False" in str(caught.value.hint)


def test_experts_that_were_left_alone_since_lie_on_their_parents_grids(tmp_path: Path) -> None:
    def by_number(layer: int, part: str, expert: int) -> int:
        return 4 if expert % 2 else 3

    source = rounded(tmp_path / "rounded", "qwen3_moe", by_number)
    record = Record.read(source)
    assert record is not None
    pruned = apply(
        Checkpoint.open(source),
        {layer: LayerOutcome(keep=(1, 3, 4)) for layer in (0, 1)},
        tmp_path / "pruned",
        record=Record(command="a test"),
    )
    assert pruned.parent_fingerprint == record.fingerprint
    made = export(tmp_path / "pruned", "auto-round", tmp_path / "out")
    assert made.matrices == {"3 bits": 6, "4 bits": 12}
    # Trained since: the parents' grids say nothing of such experts.
    (shard,) = (tmp_path / "pruned").glob("model*.safetensors")
    edit_shard(shard, lambda tensors: [t.add_(1e-3 * torch.rand_like(t)) for n, t in tensors.items() if "experts" in n])
    with pytest.raises(BadConfig, match="says of no grids"):
        export(tmp_path / "pruned", "auto-round", tmp_path / "again")
    # Another model lies where the parent did.
    edit_json(source / "moekit.json", lambda told: told.update(fingerprint="0" * 64))
    with pytest.raises(BadConfig, match="says of no grids"):
        export(tmp_path / "pruned", "auto-round", tmp_path / "again")
