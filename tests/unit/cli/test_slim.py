"""`moekit slim` as a user calls it, from Python and in a recipe, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moekit as api
from moekit.errors import BadConfig
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.trace.streamed import Streamed
from tests.commands import Moekit
from tests.contracts import FULL
from tests.families import EXPERTS, HIDDEN, WIDTH
from tests.tiny import write_model, write_text

NARROW = WIDTH // 2
WEIGHTS = 2 * EXPERTS * 3 * HIDDEN * WIDTH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    return folder


def slim(made: Path, *options: object) -> list[Any]:
    return ["slim", made / "moe", "--data", made / "text", "--max-tokens", 400, *options]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_it_writes_a_narrow_stock_model_and_says_what_it_costs(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*slim(made, "--width", "1/2", "--proof-tokens", 200, "-o", tmp_path / "out"))
    assert done.code == 0, done.err
    printed = " ".join(done.out.split())
    for words in (
        "slimmoe (repair=least-squares, score=taylor)",
        f"neurons of a routed expert {WIDTH} -> {NARROW}",
        f"weights of routed experts {WEIGHTS:,} -> {WEIGHTS // 2:,}",
        "slimmoe against magnitude at the same width",
        "slimmoe against random at the same width",
        "unrepaired",
        "proven: every tensor",
    ):
        assert words in printed, words
    checked = moekit("check", tmp_path / "out", "--parent", made / "moe")
    assert checked.code == 0
    assert "narrower or wider than the parent's: not compared" in " ".join(checked.out.split())
    assert "is its counterpart" not in checked.out, "nothing was compared"
    assert "outside of routed experts are byte for byte" in checked.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_intermediate_size"] == NARROW
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert (record["config"]["method"], record["config"]["width"]) == ("slimmoe", NARROW)
    assert set(record["scores"]["proof"]["perplexity"]) == {"slimmoe", "magnitude", "random"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_a_stored_plan_narrows_alike_and_walks_the_text_for_the_repair_alone(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repair: str
) -> None:
    how = ("--width", NARROW, "--set", "score=output-norm", "--set", f"repair={repair}", "--no-proof")
    done = moekit(*slim(made, *how, "--plan", tmp_path / "p.json", "-o", tmp_path / "out", "--json"))
    assert done.code == 0, done.err
    figures = [layer["figures"] for layer in done.json["layers"]]
    assert all(told["repaired"] < told["unrepaired"] if repair != "none" else not told for told in figures)
    passes, walk = list[object](), Streamed.run

    def count(streamed: Streamed, *given: Any) -> None:
        passes.append(streamed)
        walk(streamed, *given)

    monkeypatch.setattr(Streamed, "run", count)
    done = moekit("slim", "--from", tmp_path / "p.json", "-o", tmp_path / "again", "--no-proof", "--json")
    assert done.code == 0, done.err
    assert len(passes) == (repair != "none")
    assert "bit for bit" not in done.err
    assert done.json["width"] == {"before": WIDTH, "after": NARROW}
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_bytes_are_kept_and_told_and_all_neurons_are_the_model(made: Path, tmp_path: Path) -> None:
    before = tensors_of(made / "moe")
    stored = sum(t.numel() * t.element_size() for t in before.values())
    how: dict[str, Any] = {"method": "magnitude", "settings": {"repair": "none"}, "proof": False}
    # Room for 17 neurons, of which 16 are a multiple of 2.
    neuron = 2 * EXPERTS * 3 * HIDDEN * 4
    limit = f"{stored - 7 * neuron}B"
    result = api.slim(made / "moe", **how, max_bytes=limit, out=tmp_path / "out")
    after = sum(t.numel() * t.element_size() for t in tensors_of(tmp_path / "out").values())
    assert result.width == {"before": WIDTH, "after": 16}
    assert result.bytes == {"before": stored, "after": after}
    assert after == stored - 8 * neuron
    assert result.weights == {"before": WEIGHTS, "after": WEIGHTS * 16 // WIDTH}
    whole = api.slim(made / "moe", **how, width=1.0, out=tmp_path / "whole")
    assert whole.bytes["after"] == stored
    assert all(torch.equal(t, before[name]) for name, t in tensors_of(tmp_path / "whole").items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing says how wide"),
        ({"width": 12, "max_bytes": "1GiB"}, "both say"),
        ({"width": 13}, "no multiple of 2"),
        ({"width": 48}, "cannot become 48 wide"),
        ({"width": "much"}, "width of 'much'"),
        ({"max_bytes": "1kB"}, "do not hold experts"),
        ({"width": 12, "data": None}, "slimmoe decides from load, neuron_taylor_size"),
        ({"width": 12, "data": None, "method": "random"}, "the repair is measured on text"),
        ({"width": 12, "settings": {"score": "luck"}}, "score"),
        ({"width": 12, "settings": {"score": "kd"}}, "needs a teacher"),
        ({"width": 12, "settings": {"groups": 3}}, "cannot keep 3"),
        ({"width": 12, "settings": {"groups": 1, "score": "output-norm"}}, "go by gradients"),
        ({"width": 12, "teacher": "moe"}, "nothing is asked of it"),
        ({"width": 12, "method": "reap"}, "no slim method"),
    ],
)
def test_what_is_impossible_is_refused(made: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    asked = {"data": made / "text", "proof": False, **options}
    with pytest.raises(BadConfig, match=words):
        api.slim(made / "moe", **asked, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_tells_the_memory_of_a_backward_pass(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    told = {}
    for score in ("taylor", "output-norm"):
        done = moekit(
            *slim(made, "--width", "1/2", "--set", f"score={score}", "-o", tmp_path / "x", "--dry-run", "--json")
        )
        assert done.code == 0, done.err
        told[score] = done.json["memory_bytes"]
    # Of 8 rows of 128 positions and 128 words: logits three times, beside what each layer keeps.
    assert told["taylor"] - told["output-norm"] > 3 * 4 * 8 * 128 * 128
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.slow
def test_a_second_stage_is_scored_by_how_far_it_is_from_the_teacher(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    asked = ("--data", made / "text", "--max-tokens", 400, "--set", "score=kd", "--teacher", made / "moe")
    same = moekit("slim", made / "moe", "--width", "1/2", *asked, "--no-proof", "-o", tmp_path / "first")
    assert same.code == 2
    assert "the teacher is the model itself" in same.err
    how: dict[str, Any] = {"data": made / "text", "max_tokens": 400, "proof": False}
    api.slim(made / "moe", width=16, **how, out=tmp_path / "first")
    done = moekit(
        "slim", tmp_path / "first", "--width", "1/2", *asked, "--proof-tokens", 200, "-o", tmp_path / "second", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["settings"]["score"] == "kd"
    assert done.json["width"] == {"before": 16, "after": 8}
    plain = api.slim(tmp_path / "first", width="1/2", **how, out=tmp_path / "plain")
    assert plain.plan != done.json["plan"]
    dry = [
        moekit("slim", tmp_path / "first", "--width", "1/2", *more, "-o", tmp_path / "x", "--dry-run", "--json")
        for more in (("--data", made / "text"), asked)
    ]
    held = sum(t.numel() * t.element_size() for t in tensors_of(made / "moe").values())
    assert dry[1].json["memory_bytes"] - dry[0].json["memory_bytes"] == held
    step = {
        "use": "slim",
        "id": "narrow",
        "model": str(tmp_path / "first"),
        "width": "1/2",
        "teacher": str(made / "moe"),
    }
    step |= {"settings": {"score": "kd"}, **how, "data": str(made / "text")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "out": str(tmp_path / "run"), "steps": [step]}))
    assert runner.run(load_recipe(tmp_path / "r.yaml")).ran == ["narrow"]
    one, two = tensors_of(tmp_path / "second"), tensors_of(tmp_path / "run" / "narrow")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items() if "up_proj" in name)


def test_shared_experts_are_left_and_named(moekit: Moekit, tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen2_moe")
    how = ("--method", "magnitude", "--set", "repair=none", "--no-proof")
    done = moekit("slim", tmp_path / "moe", "--width", "1/3", *how, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "shared experts stay as wide as they are" in done.out
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("moe", "out"))
    assert after["moe_intermediate_size"] == 8
    assert after["shared_expert_intermediate_size"] == before["shared_expert_intermediate_size"]


def test_shared_experts_and_groups_of_heads_go_by_the_same_score(moekit: Moekit, tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen2_moe")
    write_text(tmp_path / "text", documents=20)
    text = ("--data", tmp_path / "text", "--max-tokens", 400)
    how = ("--width", "1/3", "--set", "shared=8", "--set", "groups=1", *text)
    dry = moekit("slim", tmp_path / "moe", *how, "-o", tmp_path / "out", "--dry-run", "--json")
    assert dry.code == 0, dry.err
    done = moekit(
        "slim", tmp_path / "moe", *how, "--proof-tokens", 200, "--plan", tmp_path / "p.json", "-o", tmp_path / "out"
    )
    assert done.code == 0, done.err
    printed = " ".join(done.out.split())
    for words in ("groups of attention heads 2 -> 1", "neurons of shared experts 20 -> 8", "proven: every tensor"):
        assert words in printed, words
    assert "shared experts stay" not in printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim", "shared_expert_intermediate_size")
    assert [config[key] for key in keys] == [2, 1, 8, 8]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    cuts = json.loads((tmp_path / "p.json").read_text())["cuts"].values()
    assert {(cut["kind"], len(cut["keep"])) for cut in cuts} == {("groups", 1), ("shared", 8)}
    again = moekit("slim", "--from", tmp_path / "p.json", "--no-proof", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    checked = moekit("check", tmp_path / "out", "--parent", tmp_path / "moe")
    assert checked.code == 0, checked.out


@pytest.mark.full
@pytest.mark.slow
def test_shared_experts_that_are_a_multiple_of_routed_ones_stay_one(made: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "glm4_moe")
    how: dict[str, Any] = {"data": made / "text", "max_tokens": 400, "proof": False, "width": 8}
    done = api.slim(tmp_path / "moe", **how, settings={"shared": 16}, out=tmp_path / "out")
    assert done.beside == {"shared": {"before": WIDTH, "after": 16}}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (8, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    with pytest.raises(BadConfig, match="12 is none"):
        api.slim(tmp_path / "moe", **how, settings={"shared": 12}, out=tmp_path / "no")


@pytest.mark.parametrize("score", [pytest.param("fisher", marks=FULL), pytest.param("output-norm", marks=FULL)])
def test_a_recipe_takes_every_score(made: Path, tmp_path: Path, score: str) -> None:
    step = {
        **{"use": "slim", "id": "narrow", "model": str(made / "moe"), "width": "1/2", "data": str(made / "text")},
        **{"settings": {"score": score}, "max_tokens": 400, "proof": False},
    }
    body = {"name": "r", "out": str(tmp_path / "run"), "steps": [step]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body))
    assert runner.run(load_recipe(tmp_path / "r.yaml")).ran == ["narrow"]
    config = json.loads((tmp_path / "run" / "narrow" / "config.json").read_text())
    assert config["moe_intermediate_size"] == NARROW
