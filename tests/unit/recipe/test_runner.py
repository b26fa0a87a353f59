"""Running, skipping, resuming."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moekit.errors import BadConfig, BadData
from moekit.jobs.options.data import DataOptions
from moekit.jobs.shared.hashes import artefact_hash
from moekit.recipe import runner
from moekit.recipe.forecast import estimate
from moekit.recipe.schema import Recipe, load_recipe

TEXT = "The quick brown fox jumps over the lazy dog, again and again. "


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "text.txt").write_text(TEXT * 200)
    body = {
        "name": "two",
        "out": str(tmp_path / "run"),
        "steps": [
            {"use": "data", "id": "first", "source": str(tmp_path / "text.txt")},
            {"use": "data", "id": "second", "source": "${steps.first}/train.jsonl", "train_bytes": 500},
        ],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(body))
    return load_recipe(tmp_path / "r.yaml")


def changed(recipe: Recipe, position: int, **values: Any) -> Recipe:
    steps = list(recipe.steps)
    steps[position] = steps[position].model_copy(update=values)
    return recipe.model_copy(update={"steps": tuple(steps)})


def test_steps_run_once(recipe: Recipe) -> None:
    events: list[tuple[str, str]] = []
    first = runner.run(recipe, tell=lambda event, name, marker: events.append((event, name)))
    assert first.ran == ["first", "second"]
    assert events == [("started", "first"), ("finished", "first"), ("started", "second"), ("finished", "second")]
    assert (recipe.folder / "second" / "train.jsonl").is_file()
    again = runner.run(recipe)
    assert again.ran == []
    assert again.done == first.done
    summary = json.loads((recipe.folder / "run.json").read_text())
    assert [step["id"] for step in summary["steps"]] == ["first", "second"]
    assert summary["steps"][1]["results"]["domains"]["text"]["train"]["bytes"] <= 500


def test_only_what_depends_on_a_change_runs_again(recipe: Recipe) -> None:
    runner.run(recipe)
    assert runner.run(changed(recipe, 1, train_bytes=400)).ran == ["second"]
    assert runner.run(changed(recipe, 0, train_bytes=4000)).ran == ["first", "second"]


def test_changed_input_and_touched_output_run_again(recipe: Recipe, tmp_path: Path) -> None:
    runner.run(recipe)
    (tmp_path / "text.txt").write_text(TEXT * 201)
    assert runner.run(recipe).ran == ["first", "second"]
    (recipe.folder / "second" / "train.jsonl").write_text("damaged")
    assert runner.run(recipe).ran == ["second"]
    (recipe.folder / "second" / "heldout.jsonl").unlink()
    assert runner.run(recipe).ran == ["second"]


def test_a_changed_part_of_a_mix_runs_again(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(TEXT * 200)
    mixed = changed(recipe, 0, source=f"{tmp_path / 'text.txt'} + {tmp_path / 'more.txt'}")
    assert runner.run(mixed).ran == ["first", "second"]
    assert runner.run(mixed).ran == []
    (tmp_path / "more.txt").write_text(TEXT * 300)
    assert "first" in runner.run(mixed).ran


def test_a_step_does_not_replace_what_it_reads(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run" / "first").mkdir(parents=True)
    (tmp_path / "run" / "first" / "a.txt").write_text(TEXT * 200)
    for source in ("first", "."):
        with pytest.raises(BadConfig, match=r"step 'first': this (would replace|lies in)"):
            runner.run(changed(recipe, 0, source=str(tmp_path / "run" / source)))
    assert (tmp_path / "run" / "first" / "a.txt").is_file()


def test_another_seed_runs_again_and_a_steps_own_seed_holds(recipe: Recipe) -> None:
    own = changed(recipe, 0, seed=3)
    runner.run(own)
    assert runner.run(own.model_copy(update={"seed": 1})).ran == ["second"]


def test_again_and_until(recipe: Recipe) -> None:
    assert runner.run(recipe, until="first").ran == ["first"]
    assert runner.run(recipe, again=frozenset({"first"})).ran == ["first", "second"]
    # The same step gives the same bytes, so what depends on it stands.
    assert runner.run(recipe, again=frozenset({"first"})).ran == ["first"]
    with pytest.raises(BadConfig, match="no step 'third'"):
        runner.run(recipe, until="third")


def test_a_failing_step_is_named_and_leaves_no_marker(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("   ")
    with pytest.raises(BadData, match="step 'first'"):
        runner.run(recipe)
    assert not (recipe.folder / "first").exists()
    assert runner.read_marker(recipe.folder, "first") is None


def _slow_run(recipe: Recipe, ready: Any) -> None:
    original = DataOptions.run

    def slow(self: DataOptions, work: Any) -> dict[str, Any]:
        if self.id == "second":
            (work.scratch / "half").write_text("half")
            ready.set()
            time.sleep(60)
        return original(self, work)

    DataOptions.run = slow  # type: ignore[method-assign]
    runner.run(recipe)


def _start(recipe: Recipe) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_slow_run, args=(recipe, ready))
    process.start()
    assert ready.wait(120)
    return process


def test_a_killed_run_goes_on_with_its_scratch(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    process = _start(recipe)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    found: list[str] = []
    original = DataOptions.run

    def look(self: DataOptions, work: Any) -> dict[str, Any]:
        found.extend(path.name for path in work.scratch.iterdir())
        return original(self, work)

    monkeypatch.setattr(DataOptions, "run", look)
    assert runner.run(recipe).ran == ["second"]
    assert found == ["half"]
    assert not list((recipe.folder / runner.SCRATCH).iterdir())


def test_two_processes_do_not_share_a_run_folder(recipe: Recipe) -> None:
    process = _start(recipe)
    try:
        with pytest.raises(BadConfig, match=str(process.pid)):
            runner.run(recipe)
    finally:
        process.kill()
        process.join()


def test_the_forecast_reads_sizes_and_writes_nothing(recipe: Recipe) -> None:
    estimates = estimate(recipe)
    assert list(estimates) == ["first", "second"]
    assert estimates["first"].reads[0].nbytes == len(TEXT) * 200
    assert estimates["second"].reads[0].what.endswith("first/train.jsonl")
    assert estimates["second"].reads[0].nbytes == len(TEXT) * 200
    assert not recipe.folder.exists()


def test_artefact_hashes_see_names_sizes_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_bytes(b"1234")
    before = artefact_hash(folder)
    (folder / "x").write_bytes(b"1235")
    middle = artefact_hash(folder)
    (folder / "x").rename(folder / "y")
    assert len({before, middle, artefact_hash(folder)}) == 3
    assert artefact_hash(tmp_path / "absent") is None


def test_a_large_file_is_hashed_at_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(40 << 20)
    hashes = {artefact_hash(file)}
    for position in (0, (40 << 20) - 1):
        with file.open("r+b") as stream:
            stream.seek(position)
            stream.write(b"x")
        hashes.add(artefact_hash(file))
    assert len(hashes) == 3
