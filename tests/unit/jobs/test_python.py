"""`moekit.prune(...)` and its like: the same work, the same answer as the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import moekit
from moekit.checkpoint import Record
from moekit.cli.main import main
from moekit.errors import BadCheckpoint, BadConfig, OutOfBudget
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from tests.checkpoints import edit_shard
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text of two domains, and a trace."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe", num_hidden_layers=2)
    write_text(folder / "text", documents=20)
    moekit.profile(folder / "moe", data=folder / "text", out=folder / "trace", seq_len=64, max_tokens=2000)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """What a command answers with --json, but for the folder it wrote."""

    def call(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*map(str, words), "--json", "--quiet"])
        assert left.value.code == 0
        return without_out(json.loads(capsys.readouterr().out))

    return call


def without_out(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key != "out"}


def plain(result: Any) -> dict[str, Any]:
    """A result as it reads after JSON."""
    told: dict[str, Any] = json.loads(json.dumps(result.to_dict()))
    return without_out(told)


def test_profile_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    how = ["--data", made / "text", "--seq-len", 64, "--max-tokens", 500]
    asked = command("profile", made / "moe", "-o", tmp_path / "a", *how)
    called = moekit.profile(made / "moe", data=made / "text", seq_len=64, max_tokens=500, out=tmp_path / "b")
    assert plain(called) == asked
    assert called.out == tmp_path / "b"
    assert (tmp_path / "b" / "trace.json").is_file() == (tmp_path / "a" / "trace.json").is_file()


def test_prune_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    how = ["--method", "reap", "--keep", 0.5, "--data", made / "text", "--max-tokens", 500, "--proof-tokens", 200]
    asked = command("prune", made / "moe", *how, "-o", tmp_path / "a")
    called = moekit.prune(
        made / "moe",
        method="reap",
        keep=0.5,
        data=made / "text",
        max_tokens=500,
        proof_tokens=200,
        out=tmp_path / "a",
        overwrite=True,
    )
    assert plain(called) == asked
    assert called.proof is not None
    assert called.experts == {"before": 16, "after": 8}
    record = Record.read(tmp_path / "a")
    assert record is not None
    assert record.command.startswith("moekit.prune(")


def test_place_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    asked = command("place", "swap", made / "trace", "-o", tmp_path / "a", "--devices", "2")
    called = moekit.place(made / "trace", method="swap", devices=(2,), out=tmp_path / "b")
    assert plain(called) == asked
    kept = moekit.place(made / "trace", method="swap", devices=(2,))
    assert kept.out is None
    assert kept.to_dict() == without_out(called.to_dict())


def test_evaluate_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    asked = command("evaluate", made / "moe", "-o", tmp_path / "a", "--data", made / "text", "--max-tokens", 400)
    called = moekit.evaluate(made / "moe", data=made / "text", max_tokens=400)
    assert plain(called) == asked


def test_generate_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    short = ["--prompt", "the river", "-p", "1 + 2: 3, 4", "--max-new-tokens", 3]
    said = ("the river", "1 + 2: 3, 4")
    asked = command("generate", made / "moe", *short)
    called = moekit.generate(made / "moe", prompt=said, max_new_tokens=3)
    assert plain(called) == asked
    assert (called.out, called.pairs) == (None, [])
    assert [entry["prompt"] for entry in called.completions] == list(said)
    other = write_model(tmp_path / "other", "qwen3_moe", seed=1, num_hidden_layers=2)
    asked = command("generate", made / "moe", other, *short)
    called = moekit.generate(made / "moe", other=other, prompt=said, max_new_tokens=3, out=tmp_path / "kept")
    assert plain(called) == asked
    assert json.loads((tmp_path / "kept" / "completions.json").read_text()) == asked
    assert 0 <= asked["agreement"] <= 1
    # A model in memory says what its folder says; a text alone is one prompt.
    model = moekit.load(made / "moe", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(made / "moe")
    live = moekit.generate(model, tokenizer=tokenizer, prompt="the river", max_new_tokens=3, device="cpu")
    of_folder = moekit.generate(made / "moe", prompt="the river", max_new_tokens=3)
    assert live.completions == of_folder.completions


@pytest.mark.full
@pytest.mark.slow
def test_generate_by_task_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    sets = tmp_path / "sets"
    moekit.expert_sets(made / "moe", data=made / "text", max_tokens=500, out=sets)
    how = ["--expert-sets", sets, "--keep", 4, "-p", "the river", "--max-new-tokens", 2]
    asked = command("generate", made / "moe", *how)
    called = moekit.generate(made / "moe", expert_sets=sets, keep=4, prompt="the river", max_new_tokens=2)
    assert plain(called) == asked
    assert [told["of"] for told in called.loaded.values()] == [8]
    with pytest.raises(BadConfig, match="for one model, by one process"):
        moekit.generate(made / "moe", other=made / "moe", expert_sets=sets, keep=4)


def test_check_answers_as_the_command_does(made: Path, tmp_path: Path, command: Any) -> None:
    asked = command("check", made / "moe", "--parent", made / "moe", "--for", "transformers")
    called = moekit.check(made / "moe", parent=made / "moe", for_="transformers", out=tmp_path / "kept")
    assert plain(called) == asked
    assert called.ok
    kept = json.loads((tmp_path / "kept" / "check.json").read_text())
    assert {"ok": True, **kept} == asked
    broken = shutil.copytree(made / "moe", tmp_path / "broken")
    edit_shard(broken / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    found = moekit.check(broken)
    assert not found.ok
    assert found.findings[0].code == "non-finite"
    with pytest.raises(BadCheckpoint, match=r"model\.norm\.weight"):
        moekit.check(broken, strict=True)


def test_steps_of_a_recipe_check_and_generate(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    steps: list[dict[str, Any]] = [
        {"use": "check", "folder": str(made / "moe"), "strict": True},
        {"use": "generate", "model": str(made / "moe"), "prompt": ["the river"], "max_new_tokens": 3},
    ]
    file.write_text(yaml.safe_dump({"name": "short", "out": str(tmp_path / "run"), "steps": steps}))
    done = runner.run(load_recipe(file)).done
    assert done["check"].results["ok"] is True
    called = moekit.generate(made / "moe", prompt="the river", max_new_tokens=3)
    assert done["generate"].results == plain(called)
    assert (tmp_path / "run" / "check" / "check.json").is_file()


def test_a_model_in_memory_is_measured_as_its_folder_is(made: Path) -> None:
    model = moekit.load(made / "moe", device="cpu").train()
    tokenizer = AutoTokenizer.from_pretrained(made / "moe")
    of_folder = moekit.evaluate(made / "moe", data=made / "text", max_tokens=400, device="cpu")
    of_memory = moekit.evaluate(model, tokenizer=tokenizer, data=made / "text", max_tokens=400, name="moe")
    assert of_memory.domains == of_folder.domains
    assert model.training, "left in the mode it came in"
    # What is measured is this model, not what it was loaded from.
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    flat = moekit.evaluate(model, tokenizer=tokenizer, data=made / "text", max_tokens=400)
    assert flat.domains[0]["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-4)
    with pytest.raises(BadConfig, match="no tokenizer"):
        moekit.evaluate(model, data=made / "text")


def test_texts_may_be_given_as_they_are(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKIT_HOME", str(tmp_path / "home"))
    texts = {"prose": ["one two three four five six"] * 3, "sums": ["1 + 2 = 3, 4 + 5 = 9"] * 3}
    (tmp_path / "same.jsonl").write_text(
        "".join(json.dumps({"text": t, "domain": d}) + "\n" for d, some in texts.items() for t in some)
    )
    given = moekit.evaluate(made / "moe", data=texts)
    assert [d["domain"] for d in given.domains][1:] == ["prose", "sums"]
    assert given.domains == moekit.evaluate(made / "moe", data=tmp_path / "same.jsonl").domains
    with pytest.raises(BadConfig, match="no text"):
        moekit.evaluate(made / "moe", data=[1, 2])  # type: ignore[list-item]


def test_progress_is_told_to_a_function_and_silent_on_request(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int | None, str]] = []
    moekit.evaluate(made / "moe", data=made / "text", max_tokens=200, progress=lambda *told: seen.append(told))
    assert seen
    capfd.readouterr()
    moekit.evaluate(made / "moe", data=made / "text", max_tokens=200, progress=False)
    # No terminal here: nothing is drawn either where nothing was said.
    moekit.evaluate(made / "moe", data=made / "text", max_tokens=200)
    assert capfd.readouterr().err == ""
    moekit.evaluate(made / "moe", data=made / "text", max_tokens=200, progress=True)
    assert seen[0][0].split()[0] in capfd.readouterr().err


def test_further_texts_are_named_by_the_caller(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEKIT_HOME", str(tmp_path / "home"))
    same = {"prose": made / "text" / "prose", "sums": ["1 + 2 = 3, 4 + 5 = 9"] * 30}
    settings = {"steps": 1, "seq_len": 32, "batch": 2, "objectives": {n: {"use": "ce", "text": n} for n in same}}
    trained = moekit.train(made / "moe", data=made / "text", texts=same, settings=settings, out=tmp_path / "out")
    assert trained.steps == 1
    record = Record.read(tmp_path / "out")
    assert record is not None
    assert f"'prose': '{made / 'text' / 'prose'}'" in record.command
    with pytest.raises(BadConfig, match="no text"):
        moekit.train(made / "moe", data=made / "text", texts={"x": [1]}, out=tmp_path / "x")  # type: ignore[dict-item]


def test_super_experts_need_no_place_to_write(made: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": made / "text", "proof": False, "max_tokens": 200}
    told = moekit.super_experts(made / "moe", **how)
    assert told.out is None
    assert told.file is None
    kept = moekit.super_experts(made / "moe", **how, out=tmp_path / "super")
    assert kept.file == str(tmp_path / "super" / "super-experts.json")
    assert told.report == kept.report


def test_expert_sets_are_added_replaced_or_made_anew_as_asked(made: Path, tmp_path: Path) -> None:
    def add(task: str, **how: Any) -> list[str]:
        return moekit.expert_sets(
            made / "moe", data=made / "text", task=task, max_tokens=200, out=tmp_path / "sets", **how
        ).tasks

    assert add("one") == ["one"]
    assert add("two") == ["one", "two"]
    with pytest.raises(BadConfig, match="already"):
        add("two", existing="add")
    assert add("two", existing="replace") == add("two", overwrite=True) == ["one", "two"]
    with pytest.raises(BadConfig, match="the folder exists"):
        add("three", existing="anew")
    assert add("three", existing="anew", overwrite=True) == ["three"]
    with pytest.raises(BadConfig, match="overwrite"):
        add("three", existing="add", overwrite=True)


def test_what_is_not_kept_costs_no_hashes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(reference: str) -> list[str | None]:
        raise AssertionError(f"{reference} was hashed for a folder that nobody finds again")

    monkeypatch.setattr("moekit.jobs.call.reference_hash", never)
    assert moekit.generate(made / "moe", prompt="a", max_new_tokens=1).completions
    with pytest.raises(AssertionError, match="hashed"):
        moekit.generate(made / "moe", prompt="a", max_new_tokens=1, out=tmp_path / "kept")


@pytest.mark.parametrize("job", ["prune", "sparsify", "quantize"])
def test_a_run_that_failed_can_be_called_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    share = {
        "prune": {"method": "frequency", "keep": 0.5},
        "sparsify": {"method": "wanda", "sparsity": 0.5},
        "quantize": {"method": "gptq", "bits": 3, "settings": {"group": 8}},
    }[job]
    how: dict[str, Any] = {"data": made / "text", "max_tokens": 200, "proof": False, **share}

    def again() -> Any:
        return getattr(moekit, job)(made / "moe", plan=tmp_path / "p.json", out=tmp_path / "out", **how)

    def full(*_: Any) -> None:
        raise OutOfBudget("the disk is full")

    with monkeypatch.context() as patched:
        where = "weights.fewer_job" if job == "prune" else job
        patched.setattr(f"moekit.jobs.{where}.finish", full)
        with pytest.raises(OutOfBudget):
            again()
    assert list(tmp_path.iterdir()) == []
    assert again().out == tmp_path / "out"
    assert (tmp_path / "p.json").is_file()


def test_a_published_page_does_not_replace_another_unasked(made: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    how: dict[str, Any] = {"traces": [made / "trace"], "publish": True}
    with pytest.raises(BadConfig, match=r"report\.html: the file exists"):
        moekit.write_report(**how, out=tmp_path / "page")
    assert (tmp_path / "report.html").read_text() == "mine"
    moekit.write_report(**how, out=tmp_path / "page", overwrite=True)
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "page" / "report.html").read_bytes()
