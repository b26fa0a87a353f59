"""How long a recipe will take: operations by hand, and a rate that is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.cli.main import main
from moekit.jobs.estimates import ByteSizes
from moekit.recipe.duration import STEP_SECONDS, MachineSpeed, durations, in_words, shape_of
from moekit.recipe.steps import STEPS
from tests.families import build
from tests.tiny import write_model

DENSE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}


def test_weights_that_a_token_passes_through_are_those_of_the_model() -> None:
    sizes = {name: value for name, value in DENSE.items() if name != "vocab_size"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    matrices = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n and "embed" not in n)
    shape = shape_of(DENSE)
    assert shape is not None
    assert shape.blocks + shape.head == matrices
    assert shape.forward == 2 * matrices
    assert shape.backward(("all",)) == 4 * matrices


def test_of_a_moe_only_the_chosen_experts_count() -> None:
    model = build("qwen3_moe")
    config = model.config
    held = dict(model.named_parameters())
    routed = sum(p.numel() for n, p in held.items() if ".experts." in n) * config.num_experts_per_tok
    shape = shape_of(config.to_dict())
    assert shape is not None
    assert shape.experts == routed / config.num_experts
    others = sum(p.numel() for n, p in held.items() if p.dim() == 2 and not any(w in n for w in ("gate.", "embed")))
    others -= sum(p.numel() for n, p in held.items() if ".experts." in n and p.dim() == 2)
    assert shape.blocks + shape.head == pytest.approx(others + shape.experts)


def test_what_lies_below_the_experts_needs_no_backward_pass() -> None:
    shape = shape_of(DENSE)
    assert shape is not None
    half = SimpleNamespace(**{**shape.__dict__, "first": 1})
    made = type(shape)(**half.__dict__)
    assert made.backward(("router", "experts")) == 2 * (shape.blocks / 2 + shape.head)


class Fixed(MachineSpeed):
    """A machine of a known rate."""

    def rate(self, hidden: int, dtype: torch.dtype) -> float:
        return 1e6


def test_seconds_are_operations_over_the_rate(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DENSE))
    text = tmp_path / "text.txt"
    text.write_text("four" * 1000)
    steps: dict[str, Any] = {
        "look": STEPS["profile"](model=str(tmp_path / "model"), data=str(text), max_tokens=500),
        "judge": STEPS["evaluate"](model=str(tmp_path / "model"), data=str(text)),
        "learn": STEPS["train"](
            model=str(tmp_path / "model"), data=str(text), settings={"steps": 3, "batch": 2, "seq_len": 10}
        ),
        "other": STEPS["profile"](model="org/unknown", data=str(text)),
    }
    found = durations(steps, ByteSizes(), Fixed("cpu"))
    shape = shape_of(DENSE)
    assert shape is not None
    one = shape.forward / (0.5 * 1e6)
    assert found["look"] == pytest.approx(STEP_SECONDS + 500 * one, rel=1e-3)
    assert found["judge"] == pytest.approx(STEP_SECONDS + 1000 * one, rel=1e-3)
    assert found["learn"] == pytest.approx(STEP_SECONDS + 3 * 2 * 10 * 3 * one, rel=1e-3)
    assert found["other"] is None


def test_the_rate_is_measured_once_for_each_shape() -> None:
    machine = MachineSpeed("cpu", seconds=0.01)
    assert machine.rate(16, torch.float32) == machine.rate(16, torch.float32) > 0


@pytest.mark.parametrize(("seconds", "words"), [(3, "3 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_dry_run_tells_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "moe", "qwen3_moe")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: r\nabout: a test\nout: {tmp_path / 'run'}\nsteps:\n"
        f"  - {{use: profile, id: look, model: {model}, data: {tmp_path / 'text'}}}\n"
    )
    with pytest.raises(SystemExit) as left:
        main(["run", str(recipe), "--dry-run", "--json"])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"] > 0
    assert told["steps"]["look"]["seconds"] == pytest.approx(told["seconds"])
