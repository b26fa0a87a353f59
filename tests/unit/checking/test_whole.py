"""What a report says as a whole: unsafe folders, other targets, parents that cannot be compared."""

import json
import os

import pytest
import torch

from moekit.checking import check
from moekit.checking.report import Finding, make_report
from moekit.checkpoint.model import save
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.record import Record
from moekit.errors import BadCheckpoint, BadConfig, UnsafeInput
from tests.checkpoints import edit_json, edit_shard, plain, saved, write_header
from tests.families import FAMILIES, VOCAB, build


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_models_of_every_family_pass_against_themselves(tmp_path, family, fused):
    folder = plain(tmp_path / "model", family, fused=fused)
    report = check(folder, parent=folder, for_="transformers")
    # transformers announces a layer for multi-token prediction in every config of these families.
    announced = {"mtp-missing"} if family in {"deepseek_v3", "glm4_moe"} else set()
    assert {f.code for f in report.findings} == announced, [str(f) for f in report.findings]
    assert any("counterpart" in sentence for sentence in report.proven)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_of_every_family_pass_for_vllm(tmp_path, family):
    report = check(saved(tmp_path / "model", family), for_="vllm")
    # vLLM's class is called PhiMoEForCausalLM, transformers' PhimoeForCausalLM.
    unlike = {"unknown-to-vllm"} if family == "phimoe" else set()
    assert {f.code for f in report.findings} == unlike, [str(f) for f in report.findings]


def test_unsafe_folders_are_not_read(tmp_path):
    folder = plain(tmp_path / "model")
    write_header(
        folder / "model.safetensors", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    )
    report = check(folder)
    assert report.unsafe
    assert [f.code for f in report.findings] == ["unsafe"]
    with pytest.raises(UnsafeInput, match="hole"):
        report.raise_if_bad()


def test_truncated_folders_are_reported(tmp_path):
    folder = plain(tmp_path / "model")
    os.truncate(folder / "model.safetensors", 5000)
    report = check(folder)
    assert [f.code for f in report.findings] == ["unreadable"]
    with pytest.raises(BadCheckpoint, match="truncated"):
        report.raise_if_bad()


def test_a_config_that_builds_nothing_is_one_finding_among_others(tmp_path):
    folder = plain(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(hidden_act="no such thing"))
    name = "model.layers.0.input_layernorm.weight"
    edit_shard(folder / "model.safetensors", lambda t: t[name].fill_(float("nan")))
    assert {"config", "non-finite"} <= check(folder).codes()


def test_more_choices_than_experts(tmp_path):
    folder = plain(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(num_experts_per_tok=9))
    (finding,) = check(folder).findings
    assert finding.code == "unreadable"
    assert "9" in finding.message


def test_an_edited_config_is_noticed(tmp_path):
    folder = saved(tmp_path / "model")
    edit_json(folder / "config.json", lambda config: config.update(norm_topk_prob=not config["norm_topk_prob"]))
    report = check(folder)
    assert not report.ok
    assert report.codes() == {"config-changed"}


def test_policies_are_ignored_elsewhere(tmp_path):
    lists = {"constants.0.0.partners": (torch.arange(64) % 8).view(8, 8).short()}
    record = Record(command="route", parts=[PartEntry(kind="routing", name="c2r", config={"top_t": 3}, layers=[0])])
    save(build("qwen2_moe"), tmp_path / "model", record=record, extra_tensors=lists)
    for target in ("vllm", "transformers"):
        report = check(tmp_path / "model", for_=target)
        assert report.ok
        assert report.codes() == {"policy-ignored"}
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.unlink()
    (tmp_path / "model" / "model-00001-of-00001.safetensors").rename(tmp_path / "model" / "model.safetensors")
    assert "extra-file-taken-for-weights" in check(tmp_path / "model", for_="vllm").codes()


def test_what_vllm_cannot_load(tmp_path):
    uneven = plain(tmp_path / "uneven")
    edit_shard(uneven / "model.safetensors", lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts.7." in n])
    assert "uneven-experts" in check(uneven, for_="vllm").codes()
    fused = plain(tmp_path / "fused", fused=True)
    assert check(fused, for_="vllm").codes() == {"fused-experts"}
    nameless = plain(tmp_path / "nameless")
    edit_json(nameless / "config.json", lambda config: config.pop("architectures"))
    assert "no-architecture" in check(nameless, for_="vllm").codes()
    mixed = plain(tmp_path / "mixed")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_shard(mixed / "model.safetensors", lambda t: t.update({name: t[name].half()}))
    assert "mixed-formats" in check(mixed, for_="vllm").codes()


def test_unknown_targets(tmp_path):
    with pytest.raises(BadConfig, match="abacus"):
        check(plain(tmp_path / "model"), for_="abacus")


def test_parents_that_cannot_be_compared_are_said_so(tmp_path):
    child = plain(tmp_path / "child")
    for parent in (plain(tmp_path / "deepseek", "deepseek_v3"), plain(tmp_path / "fused", fused=True, seed=1)):
        report = check(child, parent=parent)
        assert report.ok
        assert not any("counterpart" in sentence for sentence in report.proven)
        assert {f.code for f in report.findings} == {"not-comparable"}
    unrelated = check(child, parent=plain(tmp_path / "mixtral", "mixtral"))
    assert {f.code for f in unrelated.findings} == {"unrelated"}
    fewer = plain(tmp_path / "fewer", num_experts=6)
    assert {f.code for f in check(child, parent=fewer).findings} == {"not-comparable"}


def test_a_parent_that_is_missing(tmp_path):
    with pytest.raises(BadCheckpoint, match="no such folder"):
        check(plain(tmp_path / "child"), parent=tmp_path / "gone")


def test_findings_are_ordered_and_told_once():
    def finding(severity, layer=None, expert=None):
        return Finding(severity=severity, code="c", message="m", layer=layer, expert=expert)

    mixed = [finding("note"), finding("error", 1, 2), finding("warning"), finding("error", 1), finding("error", 0)]
    report = make_report("x", [*mixed, finding("error", 0)], [], 0, 0)
    expected = [("error", 0, None), ("error", 1, 2), ("error", 1, None), ("warning", None, None), ("note", None, None)]
    assert [(f.severity, f.layer, f.expert) for f in report.findings] == expected
    assert not report.ok
    assert str(report.findings[1]) == "error [c] layer 1, expert 2: m"
    with pytest.raises(BadCheckpoint, match=r"of 3 errors: 3 c") as caught:
        report.raise_if_bad()
    assert caught.value.layer == 0
    assert json.loads(report.model_dump_json())["findings"][0]["layer"] == 0


def test_what_holds_for_many_layers_is_told_once():
    notes = [Finding(severity="warning", code="silent-layer", message="silent", layer=layer) for layer in range(6)]
    errors = [Finding(severity="error", code="dead-expert", message="dead", layer=layer) for layer in range(6)]
    findings = make_report("x", [*notes, *errors], [], 0, 0).findings
    assert len(findings) == 7
    assert findings[-1].message == "silent (layers 0, 1, 2, 3, 4, 5)"
    assert findings[-1].layer is None
    assert len(make_report("x", notes[:3], [], 0, 0).findings) == 3


def tokenizer_json(ids, added=()):
    return json.dumps({"model": {"vocab": ids}, "added_tokens": [{"id": one} for one in added]})


def test_tokenizers_larger_than_the_embedding(tmp_path):
    path = plain(tmp_path / "model") / "tokenizer.json"
    fits = {f"t{i}": i for i in range(VOCAB)}
    unigram = [[f"t{i}", 0.0] for i in range(VOCAB)]
    for ids, added in ((fits, ()), (unigram, ()), ({}, (VOCAB - 1,))):
        path.write_text(tokenizer_json(ids, added))
        assert check(path.parent).findings == []
    for ids, added in (({**fits, "x": VOCAB}, ()), ([*unigram, ["x", 0.0]], ()), (fits, (VOCAB,))):
        path.write_text(tokenizer_json(ids, added))
        (finding,) = check(path.parent).findings
        assert finding.code == "tokenizer"
        assert f"up to {VOCAB}" in finding.message
    path.write_text("{")
    assert check(path.parent).codes() == {"tokenizer"}
