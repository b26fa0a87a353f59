"""Experts dropped on disk: every byte is the source's, for every family and layout; what cannot be is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moekit
from moekit.checking import check
from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadCheckpoint, BadConfig, NumericFault, OutOfBudget, UnsupportedModel
from tests.checkpoints import edit_json, edit_shard, plain
from tests.contracts import families
from tests.families import EXPERTS, HIDDEN, TOP_K, WIDTH, build, logits
from tests.processes import python

# Tensors on disk that count experts, and the axis that does; written down by hand, from the families' model cards.
COUNTING = [
    (r"\.experts\.(gate_up_proj|down_proj)(_bias|_blocks|_scales|_scale_inv)?$", 0),
    (r"\.(input|output)_linear\.weight$", 0),
    (r"\.(mlp|block_sparse_moe)\.(gate|router)\.(weight|bias)$", 0),
    (r"\.router\.layer\.weight$", 0),
    (r"\.gate\.e_score_correction_bias$", 0),
    (r"\.moe_statics\.e_score_correction_bias$", 1),
]


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def sliced(source: Mapping[str, torch.Tensor], keep: Mapping[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """What must come out, by slices made here."""
    result = {}
    for name, tensor in source.items():
        layer = int(m.group(1)) if (m := re.search(r"layers\.(\d+)\.", name)) else None
        expert = int(m.group(1)) if (m := re.search(r"\.experts\.(\d+)\.", name)) else None
        axis = next((axis for pattern, axis in COUNTING if re.search(pattern, name)), None)
        if layer in keep and expert is not None:
            if expert in keep[layer]:
                new = sorted(keep[layer]).index(expert)
                result[name.replace(f".experts.{expert}.", f".experts.{new}.")] = tensor
        elif layer in keep and axis is not None:
            wide = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
            result[name] = torch.stack([wide.select(axis, e) for e in keep[layer]], axis).view(tensor.dtype)
        else:
            result[name] = tensor
    return result


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def moe_layers(folder: Path) -> list[int]:
    config = json.loads((folder / "config.json").read_text())
    first = config.get("first_k_dense_replace", config.get("moe_layer_start_index", 0))
    return list(range(first, config["num_hidden_layers"]))


def keeping(folder: Path, *keeps: tuple[int, ...]) -> dict[int, LayerOutcome]:
    """The keeps given, in turn, for all MoE layers."""
    return {layer: LayerOutcome(keep=keeps[n % len(keeps)]) for n, layer in enumerate(moe_layers(folder))}


def as_tuples(outcomes: Mapping[int, LayerOutcome]) -> dict[int, tuple[int, ...]]:
    return {layer: outcome.keep for layer, outcome in outcomes.items()}


def run(source: Path, target: Path, outcomes: Mapping[int, LayerOutcome], **options: object) -> Record:
    return apply(Checkpoint.open(source), outcomes, target, record=Record(command="a test"), **options)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", families("test_every_byte_is_the_sources"))
def test_every_byte_is_the_sources(family: str, fused: bool, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", family, fused=fused)
    outcomes = keeping(source, (1, 2, 4, 7), (0, 3, 4, 5))
    planned = prepare(Checkpoint.open(source), outcomes, max_shard_bytes=60_000).nbytes
    record = run(source, tmp_path / "out", outcomes, max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(source), as_tuples(outcomes)))
    written = Checkpoint.open(tmp_path / "out")
    assert written.record == record
    assert record.expectations.tensors == tensor_digests(written.path, written.tensors.values())
    assert record.scores["kept"] == {str(layer): list(d.keep) for layer, d in outcomes.items()}
    assert record.parent_fingerprint == Checkpoint.open(source).fingerprint
    sizes = {file.name: file.stat().st_size for file in written.path.iterdir()}
    assert planned == sum(sizes.values()) - sizes["moekit.json"] - sizes["README.md"]
    report = check(written.path)
    assert report.ok, report.findings
    stock, info = AutoModelForCausalLM.from_pretrained(written.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.isfinite(logits(stock)).all()


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_a_source_of_many_shards(fused: bool, tmp_path: Path) -> None:
    build("ernie4_5_moe").save_pretrained(tmp_path / "s", max_shard_size=30_000, save_original_format=not fused)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    outcomes = keeping(tmp_path / "s", (0, 7))
    run(tmp_path / "s", tmp_path / "out", outcomes)
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(tmp_path / "s"), as_tuples(outcomes)))


@pytest.mark.parametrize("family", families("test_keeping_all_changes_nothing"))
def test_keeping_all_changes_nothing(family: str, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", family)
    run(source, tmp_path / "out", keeping(source, tuple(range(EXPERTS))))
    assert_equal(read_all(tmp_path / "out"), read_all(source))
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "granitemoe"])
def test_as_many_experts_as_the_model_is_wide(family: str, tmp_path: Path) -> None:
    """Shapes alone do not say which axis counts experts here."""
    key = "num_experts" if family == "qwen3_moe" else "num_local_experts"
    source = plain(tmp_path / "source", family, **{key: 32})
    outcomes = keeping(source, tuple(range(1, 32, 3)))
    run(source, tmp_path / "out", outcomes)
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(source), as_tuples(outcomes)))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen2_moe", tie_word_embeddings=True)
    run(source, tmp_path / "out", keeping(source, (2, 3)))
    assert "lm_head.weight" not in read_all(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.lm_head.weight.data_ptr() == stock.model.embed_tokens.weight.data_ptr()


def test_the_config_keeps_what_need_not_change(tmp_path: Path) -> None:
    """Also keys nobody knows, their order, and the name that the file uses for the number of experts."""
    source = plain(tmp_path / "source", "qwen3_moe")

    def as_on_the_hub(config: dict) -> None:
        config["num_experts"] = config.pop("num_local_experts")
        config["house_number"] = {"of": [1, None]}

    edit_json(source / "config.json", as_on_the_hub)
    run(source, tmp_path / "out", keeping(source, (0, 1, 5)), top_k=1)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(after) == list(before)
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "num_experts": 3,
        "num_experts_per_tok": 1,
    }


def test_groups_are_given_up_or_kept(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "deepseek_v3")
    run(source, tmp_path / "free", keeping(source, (0, 1, 2, 5)))
    config = Checkpoint.open(tmp_path / "free").config
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 4)
    logits(AutoModelForCausalLM.from_pretrained(tmp_path / "free"))
    with pytest.raises(BadConfig, match=r"would keep \[2, 1, 1, 0\]"):
        run(source, tmp_path / "torn", keeping(source, (0, 1, 2, 5)), groups="equal")


def test_small_files_come_along(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    (source / "tokenizer.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nold")
    (source / "modeling.py").write_text("raise SystemExit")
    run(source, tmp_path / "out", keeping(source, (0, 1)))
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "modeling.py").exists()
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


# Quantized weights.


def quantize(folder: Path, fused: bool) -> None:
    """Experts and attention in fp8 with scales of blocks of 16 x 16, as DeepSeek's files have them."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if ("experts." in name or "self_attn" in name) and tensor.dim() >= 2:
                rows, columns = -(-tensor.shape[-2] // 16), -(-tensor.shape[-1] // 16)
                scale = name + ("_scale_inv" if fused and "experts." in name else "")
                scale = scale.removesuffix(".weight") + ".weight_scale_inv" if scale == name else scale
                tensors[scale] = torch.rand(*tensor.shape[:-2], rows, columns)
                tensors[name] = tensor.to(torch.float8_e4m3fn)

    edit_shard(folder / "model.safetensors", change)
    skipped = ["lm_head", "model.layers.0.mlp.experts.5.down_proj", "model.layers.1.mlp.experts.0.down_proj"]
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": skipped}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_fp8_with_scales(fused: bool, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe", fused=fused)
    quantize(source, fused)
    assert any("scale_inv" in name for name in read_all(source))
    outcomes = keeping(source, (1, 5, 6), (2, 3, 7))
    run(source, tmp_path / "out", outcomes)
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(source), as_tuples(outcomes)))
    report = check(tmp_path / "out")
    assert report.ok, report.findings
    told = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert told["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.experts.1.down_proj"]


def pack_experts(tensors: dict[str, torch.Tensor]) -> None:
    """4-bit blocks with scales, as GPT-OSS's files have them."""
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 255, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(0, 255, (experts, outer, inner // 32), dtype=torch.uint8)


def test_four_bit_blocks(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "gpt_oss", intermediate_size=64)
    edit_shard(source / "model.safetensors", pack_experts)
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "mxfp4"}))
    outcomes = keeping(source, (0, 6, 7))
    run(source, tmp_path / "out", outcomes)
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(source), as_tuples(outcomes)))


def as_gptq(gate: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"gate.qweight": torch.zeros(gate.shape[1] // 8, gate.shape[0], dtype=torch.int32)}


def as_four_bit_numbers(gate: torch.Tensor) -> dict[str, torch.Tensor]:
    packed = torch.zeros(gate.numel() // 2, 1, dtype=torch.uint8)
    return {"gate.weight": packed, "gate.weight.absmax": torch.zeros(gate.numel() // 64)}


@pytest.mark.parametrize("pack", [as_gptq, as_four_bit_numbers])
def test_a_packed_router_is_refused(pack: Callable, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        packed = pack(tensors.pop("model.layers.1.mlp.gate.weight"))
        tensors.update({f"model.layers.1.mlp.{name}": tensor for name, tensor in packed.items()})

    edit_shard(source / "model.safetensors", change)
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "x"}))
    with pytest.raises(UnsupportedModel, match=r"gate\.(q?)weight.*no axis of 8 experts") as caught:
        run(source, tmp_path / "out", keeping(source, (0, 1)))
    assert caught.value.layer == 1
    assert not (tmp_path / "out").exists()


# Multi-token prediction.


def with_mtp(folder: Path) -> Path:
    """A checkpoint with a third layer's copy behind its last, as DeepSeek-V3's files have it."""
    source = plain(folder, "deepseek_v3")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.layers.2.")]:
            tensors[name.replace("layers.2.", "layers.3.")] = tensors[name] + 1
        tensors["model.layers.3.eh_proj.weight"] = torch.ones(32, 64)

    edit_shard(source / "model.safetensors", add)
    return source


def test_mtp_layers_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    source = with_mtp(tmp_path / "source")
    outcomes = keeping(source, (0, 1, 2))
    record = run(source, tmp_path / "out", outcomes)
    rest = {name: t for name, t in read_all(source).items() if "layers.3." not in name}
    assert_equal(read_all(tmp_path / "out"), sliced(rest, as_tuples(outcomes)))
    assert Checkpoint.open(tmp_path / "out").config["num_nextn_predict_layers"] == 0
    assert "multi-token-prediction" in record.config["mtp"]
    assert check(tmp_path / "out").ok


def test_mtp_layers_stay_where_counts_allow(tmp_path: Path) -> None:
    source = with_mtp(tmp_path / "source")
    with pytest.raises(BadConfig, match="8 experts, the config would say 3") as caught:
        run(source, tmp_path / "out", keeping(source, (0, 1, 2)), mtp="keep")
    assert caught.value.layer == 3
    run(source, tmp_path / "out", keeping(source, tuple(range(8))), mtp="keep")
    assert_equal(read_all(tmp_path / "out"), read_all(source))


# Rewriting.


def scaled(keep: Mapping[int, tuple[int, ...]]):
    """Doubles gates, quadruples up projections, takes eight times the down projections; the router stays."""

    def rewrite(layer: int, weights: LayerWeights) -> LayerWeights:
        kept = weights.select(keep[layer])
        return dataclasses.replace(
            kept,
            gate_EIH=kept.gate_EIH * 2,
            up_EIH=kept.up_EIH * 4,
            down_EHI=kept.down_EHI * 8,
            gate_bias_EI=None if kept.gate_bias_EI is None else kept.gate_bias_EI * 2,
            up_bias_EI=None if kept.up_bias_EI is None else kept.up_bias_EI * 4,
            down_bias_EH=None if kept.down_bias_EH is None else kept.down_bias_EH * 8,
        )

    return rewrite


def scaled_by_hand(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "shared" in name or not re.search(r"\.experts\.|(in|out)put_linear", name):
        return tensor
    if re.search(r"down_proj|\.w2\.|output_linear", name):
        return tensor * 8
    if re.search(r"\.gate_proj|\.w1\.", name):
        return tensor * 2
    if re.search(r"\.up_proj|\.w3\.", name):
        return tensor * 4
    both = tensor.clone()
    if name.endswith(("gate_up_proj_bias",)) or tensor.shape[1:] == (HIDDEN, 2 * WIDTH):  # GPT-OSS: in turns, last axis
        both[..., 0::2] *= 2
        both[..., 1::2] *= 4
    else:  # gate rows, then up rows
        both[:, :WIDTH] *= 2
        both[:, WIDTH:] *= 4
    return both


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", families("test_rewritten_layers_lie_as_the_sources"))
def test_rewritten_layers_lie_as_the_sources(family: str, fused: bool, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", family, fused=fused)
    outcomes = keeping(source, (1, 2, 4, 7), (0, 3, 4, 5))
    keep = as_tuples(outcomes)
    run(source, tmp_path / "out", outcomes, rewrite=scaled(keep), max_shard_bytes=60_000)
    expected = {name: scaled_by_hand(name, t) for name, t in sliced(read_all(source), keep).items()}
    assert_equal(read_all(tmp_path / "out"), expected)
    report = check(tmp_path / "out")
    assert report.ok, report.findings
    logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_dtypes_stay_and_what_is_not_changed_is_not_rounded(tmp_path: Path) -> None:
    """A bf16 model whose router and selection bias are kept in fp32."""
    source = plain(tmp_path / "source", "deepseek_v3")

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".mlp.gate." not in n]:
            tensors[name] = tensors[name].bfloat16()

    edit_shard(source / "model.safetensors", narrow)
    edit_json(source / "config.json", lambda config: config.update(dtype="bfloat16"))
    outcomes = keeping(source, (1, 2, 4, 7))
    keep = as_tuples(outcomes)
    run(source, tmp_path / "out", outcomes, rewrite=scaled(keep))
    expected = {name: scaled_by_hand(name, t) for name, t in sliced(read_all(source), keep).items()}
    assert expected["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert_equal(read_all(tmp_path / "out"), expected)


def test_layers_that_keep_all_are_copied_unless_their_outcome_changes_them(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "olmoe")
    outcomes = keeping(source, tuple(range(8)))
    keep = as_tuples(outcomes)
    run(source, tmp_path / "copied", outcomes, rewrite=scaled(keep))
    assert_equal(read_all(tmp_path / "copied"), read_all(source))
    changing = {layer: LayerOutcome(keep=kept, sparsity=0.0) for layer, kept in keep.items()}
    run(source, tmp_path / "scaled", changing, rewrite=scaled(keep))
    assert_equal(read_all(tmp_path / "scaled"), {name: scaled_by_hand(name, t) for name, t in read_all(source).items()})


@pytest.mark.parametrize(
    ("rewrite", "kind", "said"),
    [
        (lambda layer, w: w.select((0, 5)).map(lambda t: t * float("nan")), NumericFault, "NaN or infinity"),
        (lambda layer, w: w.select((0, 5, 6)), BadConfig, "gave 3 experts, the outcome keeps 2"),
    ],
)
def test_bad_rewriting_leaves_nothing(rewrite, kind, said, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    with pytest.raises(kind, match=said) as caught:
        run(source, tmp_path / "out", keeping(source, (0, 5)), rewrite=rewrite)
    assert caught.value.layer == 0
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_quantized_weights_are_not_rewritten(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")
    quantize(source, fused=False)
    outcomes = keeping(source, (0, 5))
    with pytest.raises(UnsupportedModel, match=r"quantized \(fp8\)"):
        run(source, tmp_path / "out", outcomes, rewrite=scaled(as_tuples(outcomes)))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


# Layers that keep different numbers.


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize(
    "family", families("test_uneven_layers", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
)
def test_uneven_layers(family: str, fused: bool, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", family, fused=fused)
    outcomes = keeping(source, (1, 2, 4, 7), (0, 3, 5))
    keep = as_tuples(outcomes)
    run(source, tmp_path / "out", outcomes)
    assert_equal(read_all(tmp_path / "out"), sliced(read_all(source), keep))
    report = check(tmp_path / "out")
    assert report.ok, report.findings
    assert torch.isfinite(logits(moekit.load(tmp_path / "out", device="cpu"))).all()
    run(source, tmp_path / "scaled", outcomes, rewrite=scaled(keep))
    expected = {name: scaled_by_hand(name, t) for name, t in sliced(read_all(source), keep).items()}
    assert_equal(read_all(tmp_path / "scaled"), expected)
    # And on from there to layers that are equal again.
    again = keeping(source, (0, 2, 3), (0, 1, 2))
    run(tmp_path / "out", tmp_path / "even", again, stock_only=True)
    both = keeping(source, (1, 4, 7), (0, 3, 5))
    assert_equal(read_all(tmp_path / "even"), sliced(read_all(source), as_tuples(both)))
    logits(AutoModelForCausalLM.from_pretrained(tmp_path / "even"))


# What is refused, before the work.


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda d: {k: LayerOutcome(keep=(3,)) for k in d}, {}, rf"1 experts would stay.*chooses {TOP_K}"),
        (lambda d: {k: LayerOutcome(keep=(0, 8)) for k in d}, {}, "experts 0 to 7, at most 8 can be kept"),
        (lambda d: {0: d[0]}, {}, "says nothing of 1 MoE layers: 1"),
        (lambda d: d | {2: d[0]}, {}, "holds no routed experts; there are 0-1"),
        (lambda d: d | {1: LayerOutcome(keep=(0, 1, 2))}, {"stock_only": True}, "stock transformers knows one"),
        (lambda d: d, {"top_k": 4}, "chooses 4"),
    ],
)
def test_impossible_decisions(change, options, said, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    outcomes = change(keeping(source, (0, 5)))
    with pytest.raises(BadConfig, match=said) as caught:
        run(source, tmp_path / "out", outcomes, **options)
    assert "->" in str(caught.value)
    with pytest.raises(BadConfig, match=said):
        prepare(Checkpoint.open(source), outcomes, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_fewer_choices_allow_fewer_experts(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "olmoe")
    run(source, tmp_path / "out", keeping(source, (3,)), top_k=1)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (stock.config.num_experts, stock.config.num_experts_per_tok) == (1, 1)
    logits(stock)


def test_too_little_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plain(tmp_path / "source", "mixtral")
    outcomes = keeping(source, (0, 1))
    need = prepare(Checkpoint.open(source), outcomes).nbytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    with pytest.raises(OutOfBudget, match="bytes are needed"):
        run(source, tmp_path / "out", outcomes)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_routing_policy_is_refused(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    Record(command="x", parts=[PartEntry(kind="routing", name="c2r")]).write(source)
    save_file({"constants.0.0.partners": torch.zeros(8, 8)}, source / "moekit.safetensors")
    with pytest.raises(BadConfig, match="'c2r'"):
        run(source, tmp_path / "out", keeping(source, (0, 1)))


def test_missing_experts_of_a_quantized_source(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen3_moe")
    quantize(source, fused=False)
    edit_shard(source / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts.4." in n])
    with pytest.raises(BadCheckpoint, match="this expert are missing") as caught:
        run(source, tmp_path / "out", keeping(source, (0, 1)))
    assert (caught.value.layer, caught.value.expert) == (1, 4)


def test_an_existing_folder(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    run(source, tmp_path / "out", keeping(source, (0, 1)))
    with pytest.raises(BadConfig, match="exists"):
        run(source, tmp_path / "out", keeping(source, (0, 1)))
    run(source, tmp_path / "out", keeping(source, (2, 3)), overwrite=True)
    assert Checkpoint.open(tmp_path / "out").record.scores["kept"]["0"] == [2, 3]


class Counter:
    def __init__(self) -> None:
        self.total, self.done, self.labels = 0, 0, []

    def start(self, label: str, total: int | None) -> None:
        self.total += total or 0
        self.labels.append(label)

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount

    def finish(self) -> None:
        pass


def test_progress_counts_bytes_and_nothing_is_hashed_again(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    counter = Counter()
    run(source, tmp_path / "out", keeping(source, (0, 1)), progress=counter)
    assert counter.labels == ["writing"]
    assert counter.done == counter.total == Checkpoint.open(tmp_path / "out").nbytes


# Memory.

PEAK = """
import re, sys
from pathlib import Path
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
keep = (1, 3, 4, 6)
def kilobytes(what):  # not ru_maxrss: a child begins with that of its parent
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for source, target in (sys.argv[2:4], sys.argv[4:6]):
    checkpoint = Checkpoint.open(source)
    outcomes = {layer: LayerOutcome(keep=keep) for layer in range(checkpoint.config["num_hidden_layers"])}
    rewrite = (lambda layer, weights: weights.select(keep)) if sys.argv[1] == "rewrite" else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = kilobytes("VmRSS")
    apply(checkpoint, outcomes, target, rewrite=rewrite, record=Record(command="x"))
print((kilobytes("VmHWM") - before) * 1024)
"""
# 24 layers of 12 MiB.
LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 24}


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("how", "bound"), [("copy", 48 << 20), ("rewrite", 112 << 20)])
def test_memory_does_not_grow_with_the_model(how: str, bound: int, tmp_path: Path) -> None:
    small = plain(tmp_path / "small", "mixtral")
    large = plain(tmp_path / "large", "mixtral", **LARGE)
    assert Checkpoint.open(large).nbytes > 300 * 2**20
    folders = [small, tmp_path / "small-out", large, tmp_path / "large-out"]
    told = python(["-c", PEAK, how, *folders])
    assert told.returncode == 0, told.stderr
    print(how, int(told.stdout.split()[-1]) / 2**20)
    assert int(told.stdout.split()[-1]) < bound  # buffers are 32 MiB


def test_the_source_and_what_holds_it_are_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "models" / "base"
    build("qwen3_moe").save_pretrained(source)
    checkpoint = Checkpoint.open(source)
    outcomes = {layer: LayerOutcome(keep=(0, 1, 2, 3)) for layer in (0, 1)}
    for target in (source, tmp_path / "models", source / "half"):
        with pytest.raises(BadConfig, match="which is read"):
            apply(checkpoint, outcomes, target, record=Record(command="a test"), overwrite=True)
    verify(Checkpoint.open(source))


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "m")
    outcomes = {layer: LayerOutcome(keep=(0, 1, 2, 3)) for layer in (0, 1)}
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "out")
    with pytest.raises(BadConfig, match="mount point"):
        apply(Checkpoint.open(tmp_path / "m"), outcomes, tmp_path / "out", record=Record(command="a test"))


def test_a_model_with_code_of_its_own_is_refused_before_the_work(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    checkpoint.remote_code = True
    outcomes = {layer: LayerOutcome(keep=(0, 1, 2, 3)) for layer in (0, 1)}
    with pytest.raises(UnsupportedModel, match="code comes with its repository"):
        apply(checkpoint, outcomes, tmp_path / "out", record=Record(command="a test"))
    assert not (tmp_path / "out").exists()
