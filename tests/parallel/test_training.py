"""Training with experts on ranks against one process with as many micro-batches; kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contracts import FULL
from tests.processes import ranks

SCRIPT = Path(__file__).parent / "train_script.py"
STEPS = {"steps": 10, "objectives": {"balance": 0.01, "z": 0.001}, "weight_decay": 0.1, "save_every": None}


def run(folder: Path, count: int, settings: dict[str, Any], code: int = 0) -> dict[str, Any]:
    """One training; its losses and weights."""
    folder.mkdir(exist_ok=True)
    done = ranks([SCRIPT, folder, json.dumps(settings)], count)
    assert all((rank.returncode == 0) == (code == 0) for rank in done), [rank.stderr[-3000:] for rank in done]
    if code:
        return {}
    return json.loads((folder / "result.json").read_text()) | {"weights": torch.load(folder / "weights.pt")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process that goes through the micro-batches of four one after the other."""
    return run(tmp_path_factory.mktemp("alone"), 1, STEPS)


def check(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    for name, weight in alone["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.mark.parametrize(
    "ways", [pytest.param({"data_parallel": "ddp"}, marks=FULL), {"data_parallel": "fsdp"}], ids=["ddp", "fsdp"]
)
def test_ten_steps_are_those_of_one_process(tmp_path: Path, alone: dict[str, Any], ways: dict[str, Any]) -> None:
    check(run(tmp_path, 4, STEPS | ways), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways",
    [{"copies": 2}, {"dispatch": "hierarchical"}, {"dispatch": "all-gather"}, {"dispatch": "once-per-expert"}],
    ids=["copies", "hierarchical", "all-gather", "once-per-expert"],
)
def test_ten_steps_in_other_ways(tmp_path: Path, alone: dict[str, Any], ways: dict[str, Any]) -> None:
    check(run(tmp_path, 4, STEPS | ways), alone)


@pytest.mark.slow
def test_two_hundred_steps_stray_no_further_than_another_order_of_sums(tmp_path: Path) -> None:
    """fp32 training diverges by itself: what ranks add must be no more than twice that."""
    settings = {**STEPS, "steps": 200}
    plain, turned = (run(tmp_path / str(n), 1, settings | {"other_order": bool(n)}) for n in (0, 1))
    spread = run(tmp_path / "ranks", 4, settings)
    gap, own = (
        max(abs(a - b) for a, b in zip(other["losses"], plain["losses"], strict=True)) for other in (spread, turned)
    )
    assert own > 0
    assert gap <= 2 * own, f"{gap:.2e} against {own:.2e}"


@pytest.mark.slow  # in the quick run, tests/unit/training/test_ranks.py breaks a run and test_sharded.py changes ranks
def test_a_run_killed_on_four_ranks_goes_on_with_two(tmp_path: Path) -> None:
    settings = {"steps": 8, "objectives": {"balance": 0.01}, "save_every": 3, "copies": 1}
    whole = run(tmp_path / "whole", 4, settings)
    broken = tmp_path / "broken"
    run(broken, 4, settings | {"stop": 4}, code=1)
    assert (broken / "run" / "checkpoint-3").is_dir()
    resumed = run(broken, 2, settings)
    assert resumed["resumed"] == 3
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    for name, weight in whole["weights"].items():
        assert (resumed["weights"][name] - weight).norm() <= 1e-3 * weight.norm(), name
