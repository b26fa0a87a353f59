"""`moekit heal` as a user calls it: what changes and what stays, what it proves and refuses, what a kill costs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moekit as api
from moekit.anatomy import find_moe_layers
from moekit.checkpoint import Checkpoint, Record
from moekit.errors import BadCheckpoint, BadConfig, NumericFault, UnsupportedModel
from moekit.jobs.healing.sources import find_teacher, open_sources
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.routing import TopK, plan_routing
from moekit.training.objectives.kd import Distillation
from tests.checkpoints import edit_json
from tests.commands import Moekit
from tests.families import build
from tests.tiny import tokenizer, write_text

SHORT: dict[str, Any] = {"steps": 4, "seq_len": 32, "batch": 2, "warmup": 0, "precision": "fp32"}
Tensors = dict[str, torch.Tensor]


def write_bf16(folder: Path, family: str = "qwen3_moe", seed: int = 0, **overrides: Any) -> Path:
    build(family, seed, **overrides).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, half of its experts, a text."""
    folder = tmp_path_factory.mktemp("made")
    write_bf16(folder / "moe")
    write_text(folder / "text", documents=20)
    api.prune(folder / "moe", method="random", keep=0.5, proof=False, out=folder / "half")
    return folder


def heal(made: Path, out: Path, **how: Any) -> Any:
    """Short, and by default without a proof."""
    settings = SHORT | how.pop("settings", {})
    given = {"model": made / "half", "data": made / "text", "proof": False, **how}
    return api.heal(given.pop("model"), settings=settings, out=out, **given)


def tensors_of(folder: Path) -> Tensors:
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "moekit.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def changed(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose bytes differ; names, shapes and dtypes may not."""
    was, now = tensors_of(before), tensors_of(after)
    assert {n: (t.shape, t.dtype) for n, t in was.items()} == {n: (t.shape, t.dtype) for n, t in now.items()}
    return {name for name in was if not torch.equal(was[name].view(torch.uint8), now[name].view(torch.uint8))}


def test_it_heals_the_routers_proves_it_and_finds_the_parent_by_itself(
    moekit: Moekit, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    settings = ("--steps", 3, "--seq-len", 32, "--batch", 2, "--lr", 2e-2, "--proof-tokens", 400)
    done = moekit("heal", made / "half", "--data", made / "text", *settings, "-o", out)
    assert done.code == 0, done.err
    assert done.says(r"changed 2 of \d+ tensors")
    assert done.says("healed / compressed")
    assert list(tmp_path.iterdir()) == [out]
    assert changed(made / "half", out) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert {t.dtype for t in tensors_of(out).values()} == {torch.bfloat16}
    same = [json.loads((folder / "config.json").read_text()) for folder in (made / "half", out)]
    assert same[0] == same[1]
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "Qwen3MoeForCausalLM"
    record = Record.read(out)
    assert record is not None
    assert (record.parent, record.config["teacher"]) == (str(made / "half"), str(made / "moe"))
    assert api.check(out, parent=made / "half").ok


@pytest.mark.full
@pytest.mark.slow
def test_the_figures_are_those_of_the_folders(made: Path, tmp_path: Path) -> None:
    told = heal(made, tmp_path / "out", proof=True, heldout=made / "text", window=48)
    assert told.self_divergence == pytest.approx(0, abs=1e-4)
    proof = told.proof
    assert [model["name"] for model in proof["models"]] == ["parent", "compressed", "healed"]
    for model, folder in zip(proof["models"], (made / "moe", made / "half", tmp_path / "out"), strict=True):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        loss = count = 0.0
        reads = tokenizer()
        for file in sorted((made / "text").rglob("*.txt")):
            ids = torch.tensor(reads(file.read_text(), add_special_tokens=False)["input_ids"])
            for piece in torch.split(ids, 48):
                with torch.no_grad():
                    found = stock(input_ids=piece[None]).logits[0, :-1].log_softmax(-1)
                loss -= float(found.gather(1, piece[1:, None]).sum())
                count += len(piece) - 1
        assert proof["tokens"] == count
        assert model["nll"] == pytest.approx(loss / count, rel=1e-3)
        assert model["perplexity"] == pytest.approx(math.exp(model["nll"]))
    parent, student, healed = proof["models"]
    assert parent["divergence"] == pytest.approx(0, abs=1e-3)
    assert 0 < healed["divergence"] < 1
    assert proof["closer"]["divergence"]["mean"] == pytest.approx(healed["divergence"] - student["divergence"])


OWN = {
    "router": r"mlp\.gate\.weight",
    "norms": r"norm\.weight",
    "experts": r"experts",
    "lora": r"self_attn\.[qkvo]_proj\.weight",
    "all": r".",
}


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("what", ["norms", "experts", "lora", "all"])
def test_only_what_is_named_changes(made: Path, tmp_path: Path, what: str) -> None:
    rate = {"norms": 0.1, "lora": 0.1}.get(what, 1e-2)
    told = heal(made, tmp_path / "out", what=what, settings={"lr": rate})
    names = changed(made / "half", tmp_path / "out")
    assert names
    assert all(re.search(OWN[what], name) for name in names)
    assert sorted(told.changed["names"]) == sorted(names)
    if what == "all":
        assert any("experts" in name for name in names)


@pytest.mark.full
@pytest.mark.slow
def test_a_broken_run_goes_on_to_the_same_end(made: Path, tmp_path: Path) -> None:
    settings = {"save_every": 1, "lr": 1e-2}
    whole = heal(made, tmp_path / "whole", settings=settings)
    assert whole.resumed_from is None

    def die(label: str, done: int, total: int | None, note: str) -> None:
        if label == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heal(made, tmp_path / "again", settings=settings, progress=die)
    assert not (tmp_path / "again").exists()
    again = heal(made, tmp_path / "again", settings=settings)
    assert again.resumed_from in (2, 3)
    assert again.losses == whole.losses
    assert changed(tmp_path / "whole", tmp_path / "again") == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "whole"]


def test_a_loss_that_is_no_number_ends_with_the_last_good_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, calls = Distillation.loss, []

    def broken(self: Distillation, inputs: Any) -> torch.Tensor:
        calls.append(1)
        # The check of the teacher against itself comes first, with a row each time.
        return stock(self, inputs) * (math.nan if len(calls) > 3 + 2 else 1.0)

    monkeypatch.setattr(Distillation, "loss", broken)
    with pytest.raises(NumericFault, match=r"step 3; the weights of step 2 are kept in .*out-step-2") as caught:
        heal(made, tmp_path / "out", settings={"save_every": 2, "lr": 1e-2})
    assert "lower rate" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["out-step-2"]
    assert changed(made / "half", tmp_path / "out-step-2") == {f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)}
    assert api.check(tmp_path / "out-step-2").ok


@pytest.mark.full
@pytest.mark.slow
def test_a_cache_is_kept_and_teaches_as_the_teacher_does(made: Path, tmp_path: Path) -> None:
    live = heal(made, tmp_path / "live")
    cache = tmp_path / "said"
    first = heal(made, tmp_path / "first", teacher_cache=cache)
    assert first.losses == pytest.approx(live.losses, rel=1e-2, abs=1e-4)
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
    assert written
    second = heal(made, tmp_path / "second", teacher_cache=cache, settings={"lr": 1e-2})
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")} == written
    assert second.losses[0] == pytest.approx(first.losses[0])
    with pytest.raises(BadConfig, match="another store"):
        heal(made, tmp_path / "third", teacher_cache=cache, settings={"top_k": 8})
    with pytest.raises(BadConfig, match="whole distribution"):
        heal(made, tmp_path / "third", teacher_cache=cache, settings={"loss": "full"})
    with pytest.raises(BadConfig, match="temperature 2"):
        heal(made, tmp_path / "third", teacher_cache=cache, settings={"temperature": 2.0})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"control": True, "proof": True}, "nothing to learn"),
        ({"settings": {"weight_decay": 0.1}}, "never decayed"),
        ({"settings": {"lora": {"rank": 2}}}, "lora is given, but router"),
        ({"settings": {"kl_weight": 0}}, "nothing to learn"),
        ({"settings": {"stepps": 1}}, "stepps"),
        ({"heldout": "TEXT"}, "no proof is wanted"),
        ({"teacher": "HALF"}, "the student itself"),
        ({"teacher_cache": "HALF"}, "would replace|lies in"),
        ({"model": "MOE"}, "no teacher is given"),
        ({"model": "MOE", "teacher": "HALF"}, "fewer than the student's"),
    ],
)
def test_impossible_options_are_refused(made: Path, tmp_path: Path, how: dict[str, Any], words: str) -> None:
    places = {"TEXT": made / "text", "HALF": made / "half", "MOE": made / "moe"}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in how.items()}
    with pytest.raises(BadConfig, match=words):
        heal(made, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_models_that_do_not_belong_together_are_refused(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "moe", tmp_path / "other")
    spoken = json.loads((other / "tokenizer.json").read_text())
    names = spoken["model"]["vocab"]
    names["a"], names["b"] = names["b"], names["a"]
    (other / "tokenizer.json").write_text(json.dumps(spoken))
    with pytest.raises(BadConfig, match="other tokens"):
        heal(made, tmp_path / "out", teacher=other)
    wide = write_bf16(tmp_path / "wide", vocab_size=136)
    with pytest.raises(BadConfig, match="136 tokens, the student 128"):
        heal(made, tmp_path / "out", teacher=wide)
    packed = shutil.copytree(made / "half", tmp_path / "packed")
    edit_json(packed / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises((UnsupportedModel, BadCheckpoint)):
        heal(made, tmp_path / "out", model=packed, teacher=made / "moe")


@pytest.mark.full
@pytest.mark.slow
def test_routers_whose_weight_is_always_one_are_refused(made: Path, tmp_path: Path) -> None:
    big = write_bf16(tmp_path / "big", num_experts_per_tok=1)
    api.prune(big, method="random", keep=0.5, proof=False, out=tmp_path / "small")
    with pytest.raises(BadConfig, match="no gradient reaches the routers") as caught:
        heal(made, tmp_path / "out", model=tmp_path / "small")
    assert caught.value.layer == 0
    assert "--what norms" in str(caught.value.hint)


@pytest.mark.full
@pytest.mark.slow
def test_the_teacher_is_the_nearest_larger_ancestor(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heal(made, tmp_path / "healed")
    assert find_teacher(Checkpoint.open(tmp_path / "healed")) == str(made / "moe")
    api.quantize(tmp_path / "healed", method="rtn", bits=4, settings={"group": 8}, proof=False, out=tmp_path / "low")
    assert open_sources(str(tmp_path / "low"), None).reference == str(made / "moe")
    # Where no ancestor is larger: the one that it was made from, and that of a healed model again.
    api.quantize(made / "moe", method="rtn", bits=2, settings={"group": 8}, proof=False, out=tmp_path / "two")
    assert find_teacher(Checkpoint.open(tmp_path / "two")) == str(made / "moe")
    heal(made, tmp_path / "better", model=tmp_path / "two")
    assert not caplog.text
    heal(made, tmp_path / "free", model=tmp_path / "two", what="experts")
    assert "were rounded to few bits, and what learns does not stay so" in caplog.text
    assert find_teacher(Checkpoint.open(tmp_path / "better")) == str(made / "moe")


@pytest.mark.full
@pytest.mark.slow
def test_a_policy_stays(made: Path, tmp_path: Path) -> None:
    model = api.load(made / "moe", device="cpu")
    plan_routing(find_moe_layers(model), TopK(top_k=3), "topk").apply(model)
    api.save(model, tmp_path / "routed", tokenizer=tokenizer())
    heal(made, tmp_path / "out", model=tmp_path / "routed", teacher=made / "moe", settings={"lr": 1e-2})
    before, after = (Record.read(tmp_path / name) for name in ("routed", "out"))
    assert before is not None
    assert after is not None
    assert after.parts == before.parts != []
    assert changed(tmp_path / "routed", tmp_path / "out") == {f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)}


@pytest.mark.full
@pytest.mark.slow
def test_the_control_tells_what_the_text_alone_brings(made: Path, tmp_path: Path) -> None:
    told = heal(made, tmp_path / "out", proof=True, control=True, what="all", settings={"lm": 1.0, "lr": 1e-2})
    control = told.proof["control"]
    assert control["overall"]["b"]["nll"] < control["overall"]["a"]["nll"]
    assert control["a"] == "parent"


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_process_goes_on(made: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, moekit\n"
        "def die(label, done, total, note):\n"
        "    if label == 'training' and done == 3 and len(sys.argv) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"moekit.heal({str(made / 'half')!r}, data={str(made / 'text')!r}, proof=False, out='out', progress=die,\n"
        f"    settings={SHORT | {'save_every': 1, 'lr': 1e-2}!r})\n"
    )
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", script]
    killed = subprocess.run([*command, "die"], cwd=tmp_path, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    heal(made, tmp_path / "whole", settings={"save_every": 1, "lr": 1e-2})
    assert changed(tmp_path / "whole", tmp_path / "out") == set()


@pytest.mark.full
@pytest.mark.slow
def test_command_call_and_recipe_do_the_same(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    how = ("--steps", 4, "--seq-len", 32, "--batch", 2, "--warmup", 0, "--precision", "fp32", "--what", "norms")
    asked = moekit("heal", made / "half", "--data", made / "text", *how, "-o", tmp_path / "a", "--json").json
    called = heal(made, tmp_path / "b", proof=True, what="norms")
    told = json.loads(json.dumps(called.to_dict()))
    moved = ("seconds", "out")
    assert {k: v for k, v in told.items() if k not in moved} == {k: v for k, v in asked.items() if k not in moved}
    file = tmp_path / "recipe.yaml"
    step = {"use": "heal", "model": str(made / "half"), "data": str(made / "text"), "what": "norms", "settings": SHORT}
    file.write_text(yaml.safe_dump({"name": "short", "out": str(tmp_path / "run"), "steps": [step]}))
    done = runner.run(load_recipe(file)).done["heal"]
    assert done.results["proof"] == asked["proof"]
    assert changed(tmp_path / "a", tmp_path / "b") == changed(tmp_path / "a", tmp_path / "run" / "heal") == set()
    dry = moekit("heal", made / "half", "--data", made / "text", "-o", tmp_path / "c", "--dry-run", "--json")
    assert [read["what"] for read in dry.json["reads"]][1] == str(made / "moe")
