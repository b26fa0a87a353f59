"""What a recipe would do, told before its steps have written what later ones read, and beside what older runs left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from moekit.errors import BadConfig
from moekit.recipe import runner
from moekit.recipe.forecast import durations, estimate, left
from moekit.recipe.schema import Recipe, load_recipe
from tests.contracts import FULL
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=4)
    return folder


def recipe(made: Path, folder: Path, steps: list[dict[str, Any]], model: Path | None = None) -> Recipe:
    variables = {"model": str(model or made / "moe"), "text": str(made / "text")}
    body = {"name": "r", "out": str(folder / "run"), "vars": variables, "steps": steps}
    (folder / "r.yaml").write_text(yaml.safe_dump(body))
    return load_recipe(folder / "r.yaml")


TASKS = [
    {"use": "expert-sets", "id": "sets", "model": "${model}", "data": "${text}", "max_tokens": 200},
    {"use": "generate", "model": "${model}", "expert_sets": "${steps.sets}", "keep": 0.5, "max_new_tokens": 2},
]
PLAN = {"model": "${model}", "data": "${text}", "write": "plan", "proof": False, "max_tokens": 200}
PRUNED = [
    {"use": "prune", "id": "plan", "method": "frequency", "keep": 0.5, **PLAN},
    {"use": "apply", "plan": "${steps.plan}", "proof": False},
]
SPARSE = [
    {"use": "sparsify", "id": "plan", "method": "wanda", "sparsity": 0.5, **PLAN},
    {"use": "sparsify", "id": "again", "from_plan": "${steps.plan}", "proof": False},
]
ROUNDED = [
    {"use": "quantize", "id": "plan", "method": "gptq", "bits": 3, "settings": {"group": 8}, **PLAN},
    {"use": "quantize", "id": "again", "from_plan": "${steps.plan}", "proof": False},
]


def test_expert_sets_that_an_earlier_step_writes_are_unknown_beforehand(made: Path, tmp_path: Path) -> None:
    asked = recipe(made, tmp_path, TASKS)
    told = estimate(asked)
    assert told["generate"].memory is None
    assert [item.what for item in told["generate"].reads] == [str(made / "moe"), str(tmp_path / "run" / "sets")]
    assert set(durations(asked)) == {"sets", "generate"}
    assert runner.run(asked).ran == ["sets", "generate"]
    assert estimate(asked)["generate"].memory


@pytest.mark.parametrize(
    "steps",
    [pytest.param(TASKS, marks=FULL), PRUNED, pytest.param(SPARSE, marks=FULL), pytest.param(ROUNDED, marks=FULL)],
    ids=["expert sets", "apply", "sparsify", "quantize"],
)
def test_what_another_model_left_in_the_run_folder_is_no_obstacle(
    made: Path, tmp_path: Path, steps: list[dict[str, Any]]
) -> None:
    asked = recipe(made, tmp_path, steps, write_model(tmp_path / "moe", "qwen3_moe"))
    ids = [step.id for step in asked.steps]
    runner.run(asked)
    exact = estimate(asked)[ids[1]]
    assert exact.memory
    shutil.rmtree(tmp_path / "moe")
    write_model(tmp_path / "moe", "qwen3_moe", seed=1)
    told = estimate(asked)[ids[1]]
    assert told.memory is None
    assert any("unknown until" in note for note in told.notes)
    assert set(durations(asked)) == set(ids)
    assert runner.run(asked).ran == ids
    assert estimate(asked)[ids[1]].writes == exact.writes


def test_what_is_wrong_with_an_input_from_outside_is_still_told_at_once(made: Path, tmp_path: Path) -> None:
    asked = recipe(made, tmp_path, [{"use": "prune", "method": "frequency", "keep": 400, **PLAN, "write": "model"}])
    for told in (estimate, durations):
        with pytest.raises(BadConfig, match="step 'prune'"):
            told(asked)


COPIES = [
    {"use": "data", "id": "one", "source": "${text}"},
    {"use": "data", "id": "two", "source": "${steps.one}/train.jsonl"},
    {"use": "data", "id": "three", "source": "${text}", "train_bytes": 300},
]


def test_what_is_left_is_what_the_run_would_do(made: Path, tmp_path: Path) -> None:
    asked = recipe(made, tmp_path, COPIES)
    assert left(asked) == ["one", "two", "three"]
    assert left(asked, until="two") == ["one", "two"]
    runner.run(asked, until="two")
    assert left(asked) == ["three"]
    assert left(asked, again=frozenset({"one"})) == runner.run(asked, again=frozenset({"one"})).ran == ["one", "three"]
    assert left(asked) == []
    # A marker of other inputs is none of these.
    asked = recipe(made, tmp_path, [{**COPIES[0], "train_bytes": 500}, *COPIES[1:]])
    assert left(asked) == runner.run(asked).ran == ["one", "two"]
    with pytest.raises(BadConfig, match="no step 'four'"):
        left(asked, until="four")


def test_a_forecast_goes_as_far_as_the_run(made: Path, tmp_path: Path) -> None:
    asked = recipe(made, tmp_path, COPIES)
    assert list(estimate(asked, until="two")) == list(durations(asked, until="two")) == ["one", "two"]


def test_of_what_takes_long_and_cannot_be_counted_nothing_is_promised(made: Path, tmp_path: Path) -> None:
    steps = [
        {"use": "generate", "model": "${model}"},
        {"use": "check", "folder": "${model}"},
        *TASKS[:1],
        {"use": "super-experts", "id": "super", "model": "${model}", "data": "${text}"},
        {"use": "data", "id": "copy", "source": "${text}"},
        *PRUNED,
        {"use": "apply", "id": "proved", "plan": "${steps.plan}", "heldout": "${text}"},
    ]
    told = durations(recipe(made, tmp_path, steps))
    assert {name for name, seconds in told.items() if seconds is None} == {"generate", "check", "sets"}
    assert (told["proved"] or 0) > (told["apply"] or 0)
