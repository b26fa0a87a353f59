"""Whatever kills a prune run, its output is absent or complete, and the same command finishes with the same bytes."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit import catalogue
from moekit.checking import check
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and text; and everything a run imports, so that its processes only work."""
    for name in (
        "moekit.jobs.prune",
        "moekit.compress.engine.apply",
        "moekit.compress.engine.searching",
        "moekit.evaluation.variants",
        "moekit.checking.whole",
    ):
        importlib.import_module(name)
    catalogue.load_all()
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe", num_hidden_layers=3)
    write_text(folder / "text", documents=20, repeats=4)
    return folder


def _child(command: list[str], answer: Path) -> None:
    from moekit.cli.main import main

    torch.set_num_threads(1)
    with answer.open("w") as sys.stdout, answer.with_suffix(".err").open("w") as sys.stderr:
        main(command)


def start(command: list[str], answer: Path) -> multiprocessing.process.BaseProcess:
    # A fork of this process, which has imported everything: what is killed is the work.
    process = multiprocessing.get_context("fork").Process(target=_child, args=(command, answer))
    process.start()
    return process


def finish(command: list[str], answer: Path) -> dict[str, Any]:
    process = start(command, answer)
    process.join(120)
    assert process.exitcode == 0, answer.with_suffix(".err").read_text()
    told: dict[str, Any] = json.loads(answer.read_text())
    return {key: value for key, value in told.items() if key != "out"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def kill_at(moment: float, command: list[str], answer: Path) -> bool:
    """Start, and kill with no chance to clean up; whether it was still at work."""
    process = start(command, answer)
    time.sleep(moment)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def assert_absent_or_complete(out: Path) -> None:
    if out.exists():
        report = check(out)
        assert report.ok, report.findings


def survives(command: Callable[[Path], list[str]], folder: Path, shares: Sequence[float]) -> list[str]:
    """Kill runs at shares of the time that a whole one takes, and finish each; what the kills left."""
    whole = folder / "whole"
    answer = folder / "answer.json"
    finish(command(whole), answer)  # the first one also warms the disk
    expected = weights(whole)
    began = time.monotonic()
    told = finish(command(folder / "again"), answer)
    lasts = time.monotonic() - began
    left: list[str] = []
    for number, share in enumerate(shares):
        out = folder / f"out-{number}"
        # On a busy machine one run may last half as long as another: a kill that came too late is tried earlier.
        while not kill_at(share * lasts, command(out), answer):
            assert check(out).ok
            shutil.rmtree(out)
            lasts *= 0.8
        assert_absent_or_complete(out)
        left += [path.name for path in folder.glob(f".out-{number}.*")]
        complete = out.exists()
        assert finish([*command(out), *(["--overwrite"] if complete else [])], answer) == told
        found = weights(out)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert check(out).ok
        assert not list(folder.glob(f".out-{number}.*"))
    return left


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again(kills: int, made: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        told = ["prune", made / "moe", "--method", "easy-ep", "--keep", 0.5, "--data", made / "text", "-o", out]
        return [*map(str, told), "--seq-len", "64", "--json"]

    generator = random.Random(0)
    left = survives(command, tmp_path, [generator.uniform(0, 1) for _ in range(kills)])
    assert any("scratch" in name for name in left), "no kill hit the work: the test shows nothing"


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_rewriting_run_goes_on_layer_by_layer(made: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        told = ["prune", made / "moe", "--method", "dern", "--keep", 0.5, "--data", made / "text", "-o", out]
        return [*map(str, told), "--set", "alpha=0.0", "--seq-len", "64", "--json"]

    survives(command, tmp_path, [0.6, 0.9])


@pytest.mark.full
@pytest.mark.slow
def test_a_search_that_is_killed(made: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        told = ["prune", made / "moe", "--method", "naee", "--keep", 6, "--data", made / "text", "-o", out]
        return [*map(str, told), "--max-tokens", "400", "--seq-len", "64", "--json"]

    survives(command, tmp_path, [0.3, 0.6, 0.9])
