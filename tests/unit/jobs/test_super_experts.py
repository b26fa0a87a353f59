"""`use: super-experts`: planted ones are found, reported, checked, protected; many models have none."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.data import tokenize
from moekit.diagnose.super_experts.report import SuperExpertReport
from moekit.errors import BadConfig, BadData
from moekit.evaluation import perplexity_of_documents
from moekit.evaluation.super_expert_study import STUDY_FILE, SuperExpertStudy
from moekit.jobs import super_experts as job
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.options.super_experts import SuperExpertsOptions
from moekit.jobs.shared.inputs import load_tokenizer, read_text
from moekit.jobs.shared.opened import open_source
from moekit.jobs.weights.protection import parse_protected
from moekit.recipe import runner
from moekit.recipe.forecast import estimate
from moekit.recipe.schema import load_recipe
from moekit.trace.streamed import Streamed
from tests.planted import PLANTED, write_planted
from tests.tiny import tokenizer, write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_planted(folder / "moe", breaks=True, seed=2)
    write_planted(folder / "none", planted=False)
    write_text(folder / "text", documents=20)
    return folder


def step(made: Path, **options: Any) -> SuperExpertsOptions:
    asked = {"model": made / "moe", "data": made / "text", "random_seeds": 2}
    return SuperExpertsOptions(**{**asked, **options})


def place(folder: Path, name: str = "out", seed: int = 0) -> JobContext:
    return JobContext(out=folder / name, scratch=folder / f"scratch-{name}", seed=seed, command="a test")


@pytest.fixture(scope="module")
def found(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study of the model that breaks, and what was told of it."""
    folder = tmp_path_factory.mktemp("found")
    return folder / "out" / STUDY_FILE, step(made).run(place(folder))


def test_planted_experts_are_found_with_what_they_make(found: tuple[Path, dict[str, Any]]) -> None:
    file, told = found
    study = SuperExpertStudy.load(file)
    assert study.report.pairs == list(PLANTED)
    assert study.protect == {layer: (expert,) for layer, expert in PLANTED}
    made = {s.layer: (s.origin, s.expert) for s in study.streams if s.massive}
    assert made == {
        1: ("routed", 7),
        2: ("routed", 40),
        **dict.fromkeys(range(3, 8), ("passed on", None)),
    }
    assert [study.streams[layer].gain_channel for layer, _ in PLANTED] == [6, 7]
    assert told["verdict"] == "super experts: 7 of layer 1, 40 of layer 2"
    assert told["file"] == str(file)
    assert told["forms"] == [1, 2]
    assert told["source"].endswith("text[train]")


@pytest.mark.full
@pytest.mark.slow
def test_the_model_breaks_by_what_a_stock_model_with_zeroed_experts_gives(
    made: Path, found: tuple[Path, dict[str, Any]]
) -> None:
    _, told = found
    check = told["check"]
    assert check["outcome"] == "breaks"
    assert told["check_verdict"].startswith("without its 2 super experts the model breaks: perplexity ")
    documents = tokenize(read_text(str(made / "text"), split="heldout"), load_tokenizer(str(made / "moe")))
    assert check["source"].endswith("text[heldout]")
    for gone, part in (
        ([], check["without"]["overall"]["a"]),
        (list(PLANTED), check["without"]["overall"]["b"]),
        *((control["pairs"], control["text"]["overall"]["b"]) for control in check["controls"]),
    ):
        model = AutoModelForCausalLM.from_pretrained(made / "moe").eval()
        layers = {layer.index: layer for layer in find_moe_layers(model)}
        for layer, expert in gone:
            with torch.no_grad():
                layers[layer].experts.down_proj[expert] = 0
        slow = perplexity_of_documents(model, documents)
        assert part["perplexity"] == pytest.approx(slow.overall.perplexity, rel=1e-4)
        assert part["documents"] == len(documents) == 4
    assert all(sorted(layer for layer, _ in control["pairs"]) == [1, 2] for control in check["controls"])
    largest = check["largest"]
    assert largest["unchanged"]["7"] > 100
    assert largest["without super experts"]["7"] < 1
    assert largest["without others"]["7"] == pytest.approx(largest["unchanged"]["7"], rel=1e-3)


@pytest.mark.full
@pytest.mark.slow
def test_prune_protects_what_the_file_says(
    made: Path, found: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, _ = found
    source = open_source(str(made / "moe"))
    wanted = {layer: (expert,) for layer, expert in PLANTED}
    assert parse_protected(str(file), source) == parse_protected(str(file.parent), source) == wanted
    # The report of the library and the plain mapping say the same.
    SuperExpertStudy.load(file).report.save(tmp_path / "report.json")
    (tmp_path / "plain.json").write_text(json.dumps({str(layer): list(e) for layer, e in wanted.items()}))
    for name in ("report.json", "plain.json"):
        assert parse_protected(str(tmp_path / name), source) == wanted
    # Whatever a method thinks of them they stay; without the file these two go.
    options = {"model": made / "moe", "method": "random", "keep": 4, "data": made / "text", "write": "plan"}
    for protect in (None, str(file)):
        told = PruneOptions(**options, protect=protect).run(place(tmp_path, f"{protect is None}.json"))
        stay = {layer["layer"]: layer["kept"] for layer in told["layers"]}
        assert all((expert in stay[layer]) == (protect is not None) for layer, expert in PLANTED)
    # What a user adds to the file by hand is protected, too.
    edited = json.loads(file.read_text())
    edited["protect"] = {"0": [3], "1": []}
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    assert parse_protected(str(tmp_path / "edited.json"), source) == {0: (3,)}


def test_a_file_of_another_model_or_a_damaged_one_is_refused(
    made: Path, found: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    file, _ = found
    ours, other = (Checkpoint.open(made / name).fingerprint[:12] for name in ("moe", "none"))
    source = open_source(str(made / "none"))
    with pytest.raises(BadConfig, match=f"{ours}.*not of {other}"):
        parse_protected(str(file), source)
    told = json.loads(file.read_text())
    (tmp_path / "kind.json").write_text(json.dumps({**told, "kind": "something else"}))
    with pytest.raises(BadData, match="damaged report: kind"):
        parse_protected(str(tmp_path / "kind.json"), source)
    with pytest.raises(BadConfig, match="names no protected experts"):
        parse_protected(str(tmp_path), source)


@pytest.mark.full
@pytest.mark.slow
def test_none_found_is_a_full_answer(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = step(made, model=made / "none").run(place(tmp_path))
    assert told["verdict"] == "no super expert: no layer forms a massive activation"
    assert told["protect"] == {}
    assert told["check"] is told["check_verdict"] is None
    study = SuperExpertStudy.load(tmp_path / "out")
    assert [s.layer for s in study.streams] == list(range(8))
    assert not any(s.massive for s in study.streams)
    with caplog.at_level(logging.WARNING):
        assert parse_protected(str(tmp_path / "out"), open_source(str(made / "none"))) == {}
    assert "protects no routed expert; no super expert" in caplog.text


@pytest.mark.full
@pytest.mark.slow
def test_without_a_proof_all_of_the_text_is_looked_at(made: Path, tmp_path: Path) -> None:
    apart = step(made, model=made / "none").run(place(tmp_path, "a"))
    all_of_it = step(made, model=made / "none", proof=False).run(place(tmp_path, "b"))
    given = step(made, model=made / "none", heldout=made / "text").run(place(tmp_path, "c"))
    assert apart["report"]["tokens"] < all_of_it["report"]["tokens"] == given["report"]["tokens"]
    assert not all_of_it["source"].endswith("]")
    told = step(made, proof=False).run(place(tmp_path, "d"))
    assert told["check"] is None
    assert list(told["protect"]) == ["1", "2"]


@pytest.mark.full
@pytest.mark.slow
def test_the_rule_is_that_of_the_options(made: Path, tmp_path: Path) -> None:
    told = step(made, percentile=99.9, ratio=0.9, scope="model", forming="first-75", proof=False).run(place(tmp_path))
    report = SuperExpertStudy.load(tmp_path / "out").report
    assert report.rule.model_dump() == {"percentile": 99.9, "ratio": 0.9, "scope": "model", "forming": "first-75"}
    assert isinstance(report, SuperExpertReport)
    largest = max(c["value"] for c in told["report"]["found"])
    assert all(c["value"] > 0.9 * largest for c in told["report"]["found"])
    assert told["forms"] == [0, 1, 2, 3, 4, 5]


@pytest.mark.full
@pytest.mark.slow
def test_work_that_was_interrupted_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moekit.evaluation.super_experts as module

    whole = step(made).run(place(tmp_path, "whole"))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "compare_without", stop)
        with pytest.raises(KeyboardInterrupt):
            step(made).run(place(tmp_path))
    assert not (tmp_path / "out").exists()
    real, layers = Streamed._layer, []

    def layer(self: Streamed, index: int, *rest: Any) -> None:
        layers.append(index)
        real(self, index, *rest)

    monkeypatch.setattr(Streamed, "_layer", layer)
    again = step(made).run(place(tmp_path))
    assert layers == []
    assert {k: v for k, v in again.items() if k != "file"} == {k: v for k, v in whole.items() if k != "file"}


def test_texts_begin_as_the_tokenizer_begins_them(made: Path, tmp_path: Path) -> None:
    """Sinks stand at the beginning: each document begins a row, behind the token that the tokenizer puts there."""
    from tokenizers.processors import TemplateProcessing

    own = tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    shutil.copytree(made / "none", tmp_path / "moe")
    own.save_pretrained(tmp_path / "moe")
    source = open_source(str(tmp_path / "moe"))
    rows, heldout = job._texts(step(made, model=tmp_path / "moe"), source, place(tmp_path))
    firsts = rows.document_RS[1:, 0] != rows.document_RS[:-1, 0]
    assert rows.input_ids[0, 0] == 1
    assert bool((rows.input_ids[1:, 0][firsts] == 1).all())
    assert int((rows.input_ids == 1).sum()) == len(rows.document_RS.unique()) - 1  # padding is no document
    assert heldout is not None
    assert all(list(d.ids).count(1) == 1 and d.ids[0] == 1 and 2 not in d.ids for d in heldout.documents)
    plain, _ = job._texts(step(made, model=made / "none"), open_source(str(made / "none")), place(tmp_path))
    assert not bool((plain.input_ids == 1).any())
    assert rows.tokens - plain.tokens == 36
    # No row holds two documents.
    assert all(len(row.unique()) <= 2 for row in rows.document_RS)


def test_bad_input_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="held-out text, but no check"):
        step(made, heldout=made / "text", proof=False).check()
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadData):
        step(made, data=tmp_path / "empty.txt").run(place(tmp_path, "a"))
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(BadData, match="no document"):
        step(made, heldout=tmp_path / "short.txt").run(place(tmp_path, "b"))
    assert not list(tmp_path.glob("scratch-*"))


def test_the_forecast_reads_no_weight(made: Path, tmp_path: Path) -> None:
    estimate = step(made).estimate(tmp_path / "out", ByteSizes())
    assert estimate.disk is not None
    assert estimate.memory is not None
    assert any("2 draws" in note for note in estimate.notes)
    assert not any("draws" in note for note in step(made, proof=False).estimate(tmp_path / "out", ByteSizes()).notes)


def test_dense_layers_and_shared_experts_take_part(made: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "deepseek_v3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        model.model.layers[1].mlp.shared_experts.down_proj.weight[4] *= 1e6
    model.save_pretrained(tmp_path / "moe")
    told = step(made, model=tmp_path / "moe").run(place(tmp_path))
    assert [(c["layer"], c["expert"]) for c in told["report"]["found"]] == [(1, -1)]
    assert [s["kind"] for s in told["streams"]] == ["dense", "moe", "moe"]
    assert told["protect"] == {}
    # Another layer's shared expert stands for it.
    assert all(control["pairs"] == [[2, -1]] for control in told["check"]["controls"])
    assert all(math.isfinite(v) for v in told["check"]["largest"]["without super experts"].values())


@pytest.mark.full
@pytest.mark.slow
def test_a_recipes_report_shows_it(made: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: look
out: {tmp_path / "run"}
steps:
  - {{use: super-experts, id: super, model: {made / "moe"}, data: {made / "text"}, random_seeds: 1}}
  - {{use: report, super_experts: ["${{steps.super}}"]}}
"""
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert set(estimate(recipe)) == {"super", "report"}
    runner.run(recipe)
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    for words in ("Massive activations", "Which block makes them", "Does the model break without them?"):
        assert words in page
    data = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert data["headline"]["text"].startswith("Super experts: 7 of layer 1, 40 of layer 2; without its 2")
    assert data["headline"]["status"] == "bad"
    # Steps of the run that no one names are shown as well, and no step twice.
    assert [s["title"] for s in data["sections"]].count("Massive activations") == 1
    assert runner.run(recipe).ran == []
