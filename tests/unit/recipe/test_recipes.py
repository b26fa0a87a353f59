"""The ready recipes: they parse, and run on tiny models from the first step to the page."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.recipe import runner
from moekit.recipe.forecast import estimate
from moekit.recipe.schema import load_recipe
from moekit.recipe.variables import parse_overrides
from tests.families import randomize
from tests.processes import Running
from tests.tiny import tokenizer, write_model, write_text

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_can_say_what_it_would_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No hub is asked for sizes here.
    monkeypatch.setattr("moekit.jobs.shared.inputs._hub_bytes", lambda reference: None)
    recipe = load_recipe(file)
    estimates = estimate(recipe)
    assert [step.id for step in recipe.steps] == list(estimates)
    assert recipe.steps[-1].use == "report"
    assert not recipe.folder.exists() or (recipe.folder / "run.json").exists()


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_no_recipe_names_a_precision_that_a_device_may_lack(file: Path) -> None:
    assert not re.search(r"bf16|bfloat16|float16|fp16", file.read_text())


@pytest.mark.parametrize("name", ["c2r", "c2r-demo"])
def test_what_is_planned_is_judged_on_other_text(name: str) -> None:
    steps = {step.id: step for step in load_recipe(RECIPES / f"{name}.yaml").steps}

    def text_of(reference: str) -> str:
        return steps[reference.removeprefix("${steps.").removesuffix("}")].data

    planned = {text_of(s.trace) for s in steps.values() if s.use in ("place", "route") and s.trace is not None}
    judged = {text_of(s.replay) for s in steps.values() if s.use == "place" and s.replay is not None}
    judged |= {s.data for s in steps.values() if s.use == "evaluate"}
    compared = [s for s in steps.values() if s.use == "place" and s.baseline is not None]
    assert compared
    assert all(s.replay is not None for s in compared)
    assert planned == {"${steps.text}/profile.jsonl"}
    assert judged == {"${steps.text}/heldout.jsonl"}


def dense_model(folder: Path) -> Path:
    """A tiny dense model with a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config)
    randomize(model, 0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def overrides(tmp_path: Path, model: Path) -> list[str]:
    text = write_text(tmp_path / "text", documents=24, repeats=24)
    tune = "{steps: 2, seq_len: 32, batch: 2, parts: [router, norms]}"
    return [f"model={model}", f"data={text}", "partners=[2, 4]", "devices=[2, 4]", f"tune={tune}"]


def test_the_demo_runs_from_a_dense_model_to_the_page(tmp_path: Path) -> None:
    pairs = overrides(tmp_path, dense_model(tmp_path / "dense"))
    pairs += ["layers=[0, 1]", "experts=8", "top_k=2", "width=8", "groups=[2, 4]"]
    pairs += ["train={steps: 3, seq_len: 32, batch: 2, objectives: {balance: 0.01}, parts: [router, experts]}"]
    pairs += [f"questions=continuations:{tmp_path / 'text'}", "limit=1"]
    recipe = load_recipe(RECIPES / "c2r-demo.yaml", parse_overrides(pairs), out=str(tmp_path / "run"))
    # On so little text some curve may rightly be called degenerate; the page is what is looked at here.
    last = recipe.steps[-1].model_copy(update={"strict": False})
    recipe = recipe.model_copy(update={"steps": (*recipe.steps[:-1], last)})
    result = runner.run(recipe)
    assert len(result.done) == len(recipe.steps)
    page = (recipe.folder / "report" / "report.html").read_text()
    assert "beyond placement" in page.lower()
    numbers = json.loads((recipe.folder / "report" / "report.json").read_text())
    assert {section["kind"] for section in numbers["sections"]} >= {"lines", "table", "heatmaps", "bars"}
    rows = {
        m.id: {p["devices"]: p["rows"][-1]["rows_per_token"] for p in m.results["devices"]}
        for m in result.done.values()
        if m.use == "place"
    }
    assert rows["rows-device-2"][2] == pytest.approx(1.0), "device-first sends one row a token by construction"
    assert rows["rows-device-4"][4] == pytest.approx(1.0)
    assert all(1 <= value <= 2 for part in rows.values() for value in part.values())
    assert runner.run(recipe).ran == []


@pytest.mark.full
@pytest.mark.slow
def test_any_moe_runs_through_c2r_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    pairs = overrides(tmp_path, write_model(tmp_path / "moe", "qwen3_moe"))
    pairs[-1] = "tune={steps: 24, seq_len: 32, batch: 2, lr: 1.0e-3, save_every: 2}"
    whole = load_recipe(RECIPES / "c2r.yaml", parse_overrides([*pairs, "seq_len=64"]), out=str(tmp_path / "whole"))
    unbroken = runner.run(whole, until="tuned-t2")
    command = [
        "run",
        str(RECIPES / "c2r.yaml"),
        *pairs,
        "seq_len=64",
        "--out",
        str(tmp_path / "broken"),
        "--until",
        "tuned-t2",
    ]
    _kill_while_training(command, tmp_path / "broken")
    broken = whole.model_copy(update={"out": str(tmp_path / "broken")})
    resumed = runner.run(broken, until="tuned-t2")
    assert "look" not in resumed.ran
    first, second = (result.done["tuned-t2"].results for result in (unbroken, resumed))
    assert second["losses"] == first["losses"]
    assert second["resumed_from"] is not None
    shards = [sorted((tmp_path / run / "tuned-t2").glob("model*.safetensors")) for run in ("whole", "broken")]
    assert [file.read_bytes() for file in shards[0]] == [file.read_bytes() for file in shards[1]]


@pytest.mark.full
@pytest.mark.slow
def test_a_lab_model_is_trained_and_shown(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", documents=24, repeats=40)
    pairs = [f"data={text}", "tokens=4096", "devices=[2]"]
    recipe = load_recipe(RECIPES / "pretrain-tiny.yaml", parse_overrides(pairs), out=str(tmp_path / "run"))
    small = {"vocabulary": 300, "hidden": 32, "layers": 2, "experts": 8, "top_k": 2, "width": 16, "context": 64}
    training = {"tokens": 4096, "seq_len": 64, "batch": 4, "lr": 2e-3, "objectives": {"balance": 0.01}}
    first = recipe.steps[0].model_copy(update={"settings": {**small, "training": training}})
    look = recipe.steps[1].model_copy(update={"seq_len": 64})
    result = runner.run(recipe.model_copy(update={"steps": (first, look, *recipe.steps[2:])}))
    losses = result.done["moe"].results["losses"]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "report.html").is_file()


def _kill_while_training(command: list[str], folder: Path) -> None:
    """Start the run and kill it, with no chance to clean up, once the second training has saved something."""
    code = "from moekit.cli.main import main; main()"
    process = Running(["-c", code, *command], env={"CI": "true"})
    deadline = time.monotonic() + 240
    # Not the first one: a kill while that is being written rightly starts over.
    while not list(folder.glob(".scratch/tuned-t2-*/checkpoint-[4-9]*/*")):
        assert process.poll() is None, process.output("err")
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
