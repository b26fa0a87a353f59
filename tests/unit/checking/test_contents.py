"""What a folder lacks of what its config announces, of what was recorded, and of what its parent holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import moekit
from moekit.checking import check
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.cli.main import main
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.conversion.methods.residual import Residual
from tests.checkpoints import edit_json, edit_shard, plain, saved
from tests.dense import dense_model
from tests.families import EXPERTS
from tests.odd_folders import nudge, spread, tensors_of, with_mtp, with_vision
from tests.tiny import tokenizer

KEPT = (1, 2, 4, 5, 7)


def errors(report) -> set[str]:
    return {finding.code for finding in report.findings if finding.severity == "error"}


def messages(report, code: str) -> str:
    return " | ".join(finding.message for finding in report.findings if finding.code == code)


def without(folder: Path, target: Path, lost) -> Path:
    shutil.copytree(folder, target)
    spread(target, {name: tensor for name, tensor in tensors_of(folder).items() if not lost(name)})
    return target


def test_announced_layers_that_no_tensor_holds_are_not_proven(tmp_path):
    source, names = with_mtp(tmp_path / "source")
    assert check(source).codes() == set()
    lacking = without(source, tmp_path / "lacking", lambda name: name in names)
    report = check(lacking)
    assert report.codes() == {"mtp-missing"}
    assert not any("config demands" in sentence for sentence in report.proven)
    against = check(lacking, parent=source)
    assert errors(against) == {"lost-tensors"}
    assert f"{len(names)} tensors of multi-token-prediction layers" in messages(against, "lost-tensors")
    edit_json(lacking / "config.json", lambda config: config.update(num_nextn_predict_layers=0))
    assert check(lacking, parent=source).ok


def test_a_tower_that_the_config_names_must_be_there(tmp_path):
    source = with_vision(tmp_path / "source")
    assert check(source).codes() == set()
    lacking = without(source, tmp_path / "lacking", lambda name: "visual" in name)
    report = check(lacking)
    assert errors(report) == {"missing-tensor"}
    assert "the config demands model.visual.patch_embed.proj.weight, which is missing" in messages(
        report, "missing-tensor"
    )


def test_a_language_model_alone_has_lost_its_parents_tower(tmp_path):
    source = with_vision(tmp_path / "source")
    moekit.save(moekit.load(source, device="cpu"), tmp_path / "whole")
    assert check(tmp_path / "whole", parent=source).codes() == set()
    names = Checkpoint.open(source).config["architectures"]
    edit_json(source / "config.json", lambda config: config.update(architectures=[]))
    moekit.save(moekit.load(source, device="cpu"), tmp_path / "text", drop_unknown=True)
    edit_json(source / "config.json", lambda config: config.update(architectures=names))
    report = check(tmp_path / "text", parent=source)
    assert report.ok
    assert "beside the language model" in messages(report, "lost-tensors")


def test_a_parent_with_more_layers_is_compared_where_both_have_them(tmp_path):
    source, _ = with_mtp(tmp_path / "source")
    model = moekit.load(source, device="cpu")
    moekit.save(model, tmp_path / "child", mtp="drop")
    report = check(tmp_path / "child", parent=source)
    assert report.ok
    assert "every expert is its counterpart" in " ".join(report.proven)
    down = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (2, 5)]

    def swap(tensors):
        tensors[down[0]], tensors[down[1]] = tensors[down[1]].clone(), tensors[down[0]].clone()

    (tmp_path / "child" / "moekit.json").unlink()
    edit_shard(tmp_path / "child" / "model.safetensors", swap)
    swapped = check(tmp_path / "child", parent=source)
    assert "experts 2 and 5 are swapped (down)" in messages(swapped, "experts-swapped")


@pytest.fixture
def pruned(tmp_path) -> tuple[Path, Path]:
    source = plain(tmp_path / "source")
    outcomes = {0: LayerOutcome(keep=KEPT), 1: LayerOutcome(keep=(0, 1, 2, 3, 6))}
    apply(Checkpoint.open(source), outcomes, tmp_path / "pruned", record=Record(command="prune"))
    return source, tmp_path / "pruned"


@pytest.mark.parametrize("recorded", [True, False], ids=["by the record", "by the router"])
def test_a_pruned_child_is_compared_with_the_experts_that_it_kept(pruned, recorded):
    source, child = pruned
    if not recorded:
        (child / "moekit.json").unlink()
    report = check(child, parent=source)
    assert report.findings == []
    assert "every expert is its counterpart" in " ".join(report.proven)
    names = [f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight" for expert in (1, 3) for part in ("up", "down")]

    def damage(tensors):
        tensors[names[0]].copy_(torch.randn_like(tensors[names[0]]) / 6)
        tensors[names[3]].copy_(tensors_of(source)["model.layers.0.mlp.experts.0.down_proj.weight"])

    edit_shard(child / "model.safetensors", damage)
    told = check(child, parent=source)
    assert "experts.1.up_proj.weight has nothing in common" in messages(told, "unrelated")
    assert "this is the parent's expert 0 (down)" in messages(told, "expert-replaced")


def test_rewriter_a_parent_say_nothing(tmp_path):
    dense = dense_model("llama", num_hidden_layers=2)
    moe = Residual(experts=4, top_k=2, width=16).convert(dense)
    moekit.save(moe, tmp_path / "converted")
    tuned = moekit.load(tmp_path / "converted", device="cpu")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "experts" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    moekit.save(tuned, tmp_path / "tuned")
    report = check(tmp_path / "tuned", parent=tmp_path / "converted")
    assert report.ok, [str(finding) for finding in report.findings]
    assert "down" in messages(report, "zeros-say-nothing")
    assert "as far as its weights are not zeros" in " ".join(report.proven)


def with_tokenizer(folder: Path) -> Path:
    model = moekit.load(plain(folder.parent / "made"), device="cpu")
    moekit.save(model, folder, tokenizer=tokenizer())
    return folder


def test_files_beside_the_weights_are_what_was_recorded(tmp_path):
    folder = with_tokenizer(tmp_path / "model")
    assert check(folder).findings == []
    edit_json(folder / "tokenizer.json", lambda value: value["added_tokens"][0].update(content="<other>"))
    report = check(folder)
    assert errors(report) == {"tokenizer-changed"}
    assert "tokenizer.json is not what was recorded" in messages(report, "tokenizer-changed")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in messages(check(folder), "tokenizer-changed")


def test_a_tokenizer_that_is_not_the_parents(tmp_path):
    folder = with_tokenizer(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "child")
    (tmp_path / "child" / "moekit.json").unlink()
    edit_json(tmp_path / "child" / "tokenizer.json", lambda value: value["added_tokens"][0].update(content="<other>"))
    assert check(tmp_path / "child", parent=folder).codes() == {"tokenizer-differs"}


def test_a_broken_generation_config_is_found(tmp_path):
    folder = plain(tmp_path / "model")
    path = folder / "generation_config.json"
    good = path.read_text()
    for text in ("{", json.dumps({"eos_token_id": 5000}), json.dumps({"max_new_tokens": -4})):
        path.write_text(text)
        assert errors(check(folder)) == {"generation-config"}, text
    path.write_text(good)
    assert check(folder).findings == []


def test_a_record_with_another_fingerprint_is_found(tmp_path):
    folder = saved(tmp_path / "model")
    edit_json(folder / "moekit.json", lambda record: record.update(fingerprint="0" * 64))
    report = check(folder)
    assert errors(report) == {"record-fingerprint"}
    assert "000000000000" in messages(report, "record-fingerprint")


def test_an_edit_that_changes_what_is_computed_is_an_error(tmp_path):
    folder = saved(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=123.0))
    report = check(folder)
    assert errors(report) == {"config-changed"}
    assert "rope_parameters.rope_theta is 123.0, recorded was 10000.0" in messages(report, "config-changed")


def test_an_edit_that_changes_nothing_computed_is_a_warning(tmp_path):
    folder = saved(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(use_cache=False))
    report = check(folder)
    assert report.ok
    assert report.codes() == {"config-changed"}


def test_a_config_that_computes_something_else_than_the_parents(tmp_path):
    parent, child = plain(tmp_path / "parent"), plain(tmp_path / "child")
    edit_json(child / "config.json", lambda config: config["rope_parameters"].update(rope_theta=123.0))
    report = check(child, parent=parent)
    assert report.codes() == {"config-differs"}
    assert "rope_theta is 123.0, the parent's 10000.0" in messages(report, "config-differs")


def test_float8_weights_without_scales_are_named(tmp_path):
    folder = plain(tmp_path / "model")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_shard(folder / "model.safetensors", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    report = check(folder)
    assert errors(report) == {"unreadable"}
    assert name in messages(report, "unreadable")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: plain(folder), f"nothing is wrong; 2 expert layers of {EXPERTS} experts, "),
        (
            lambda folder: dense_model("llama").save_pretrained(folder),
            "nothing is wrong; 0 expert layers (a dense model)",
        ),
        (lambda folder: plain(folder, "deepseek_v3"), "no error, 1 warning; "),
    ],
    ids=["moe", "dense", "warned"],
)
def test_the_verdict_says_what_was_looked_at(tmp_path, capsys, make, said):
    make(tmp_path / "model")
    with pytest.raises(SystemExit) as left:
        main(["check", str(tmp_path / "model")])
    assert left.value.code == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_experts_of_unlike_formats_are_no_layer_for_vllm(tmp_path):
    folder = plain(tmp_path / "model")
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(EXPERTS)]

    def packed(tensors):
        for name in names:
            tensors.pop(f"{name}.weight")
            width = 8 if name == names[3] else 4
            tensors[f"{name}.weight_packed"] = torch.zeros(24, 32 * width // 32, dtype=torch.int32)
            tensors[f"{name}.weight_scale"] = torch.ones(24, 1)

    edit_shard(folder / "model.safetensors", packed)
    edit_json(
        folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "compressed-tensors"})
    )
    report = check(folder, for_="vllm")
    assert [f.layer for f in report.findings if f.code == "mixed-formats"] == [0]


def test_a_class_that_vllm_has_not_is_said(tmp_path):
    report = check(plain(tmp_path / "model", "phimoe"), for_="vllm")
    assert report.codes() == {"unknown-to-vllm"}
    assert "PhimoeForCausalLM" in messages(report, "unknown-to-vllm")


@pytest.mark.full
@pytest.mark.slow
def test_a_trained_child_of_a_pruned_parent(pruned, tmp_path):
    _, parent = pruned
    model = moekit.load(parent, device="cpu")
    nudge(model)
    moekit.save(model, tmp_path / "tuned")
    assert check(tmp_path / "tuned", parent=parent).findings == []
