"""`moekit super-experts` as a user calls it, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Moekit
from tests.planted import write_planted
from tests.tiny import write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_planted(folder / "moe", breaks=True, seed=2)
    write_planted(folder / "none", planted=False)
    write_text(folder / "text", documents=20)
    return folder


def call(made: Path, out: Path, *options: object, model: str = "moe") -> list[Any]:
    return ["super-experts", made / model, "--data", made / "text", "-o", out, "--random-seeds", 2, *options]


def test_it_says_what_it_found_and_whether_the_model_breaks(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*call(made, tmp_path / "out"))
    assert done.code == 0, done.err
    for words in (
        "the residual stream after each layer",
        "expert 40",
        "passed on",
        "experts of the largest outputs",
        "without super experts",
        "1:7 2:40",
        "super experts: 7 of layer 1, 40 of layer 2",
        "without its 2 super experts the model breaks: perplexity",
    ):
        assert words in done.out, words
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    file = tmp_path / "out" / "super-experts.json"
    # What the last line says is what prune takes.
    assert f"--protect {file}" in done.out
    options = ("--method", "random", "--keep", 4, "--data", made / "text", "--protect", file)
    plan = moekit("prune", made / "moe", *options, "--plan", tmp_path / "p.json", "--json")
    assert plan.code == 0, plan.err
    protected = {layer["layer"]: layer["protected"] for layer in plan.json["layers"] if layer["protected"]}
    assert protected == {1: [7], 2: [40]}


@pytest.mark.full
@pytest.mark.slow
def test_none_found_is_no_error(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*call(made, tmp_path / "out", model="none"))
    assert done.code == 0
    assert "no super expert: no layer forms a massive activation" in done.out
    assert "--protect" not in done.out
    assert "skipped" not in done.out
    assert json.loads((tmp_path / "out" / "super-experts.json").read_text())["protect"] == {}


@pytest.mark.full
@pytest.mark.slow
def test_json_holds_the_whole_answer(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    told = moekit(*call(made, tmp_path / "out", "--no-proof", "--json")).json
    assert told["protect"] == {"1": [7], "2": [40]}
    assert told["check"] is None
    assert [s["layer"] for s in told["streams"] if s["origin"] == "routed"] == [1, 2]
    assert told["out"] == str(tmp_path / "out")


def test_a_dry_run_does_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*call(made, tmp_path / "out", "--dry-run"))
    assert done.code == 0
    assert "2 draws of as many others" in done.out
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@pytest.mark.slow
def test_bad_input_is_one_message(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    out = tmp_path / "out"
    for args, words in (
        (["super-experts", made / "moe", "-o", out], "--data"),
        (["super-experts", made / "moe", "--data", tmp_path / "nothing.txt", "-o", out], "nothing.txt"),
        (call(made, out, "--percentile", 101), "less than or equal to 100"),
        (call(made, out, "--no-proof", "--heldout", made / "text"), "no check"),
        (call(made, tmp_path / "there"), "the folder exists"),
        (["super-experts", tmp_path / "there", "--data", made / "text", "-o", out], "config.json"),
    ):
        done = moekit(*args)
        assert done.code == 2, args
        assert words in done.err, done.err
    assert not out.exists()
    # A report of another model protects nothing here.
    assert moekit(*call(made, out, "--no-proof", "--quiet")).code == 0
    options = ("--method", "random", "--keep", 4, "--data", made / "text", "--plan", tmp_path / "p.json")
    done = moekit("prune", made / "none", *options, "--protect", out / "super-experts.json")
    assert done.code == 2
    assert "this report is of" in done.err
    assert "another one's super experts are other experts" in done.err
